"""The trainer: AdamW without weight decay (Loshchilov and Hutter 2019), a cosine schedule with warm-up, clipped and accumulated gradients.

It knows parameters and a function that gives a loss; what is trained against what is its caller's. A run that is killed goes on from its
last checkpoint and ends in the same numbers: a step's loss may depend on nothing but the parameters and the step's number.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantizers.errors import QuantizationFailed
from quantizers.training.schedule import share
from quantizers.training.state import State, read_state, write_state

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8

LossOf = Callable[[int], Tensor]
Tell = Callable[[int, int, float, float], None]


@dataclass(frozen=True)
class Plan:
    """steps: of the optimizer, each on `accumulate` losses. warmup: share of the steps. floor: share of the learning rate at the end.

    clip_norm: of all gradients together. save_every: steps between two checkpoints.
    """

    steps: int
    accumulate: int = 1
    warmup: float = 0.0
    floor: float = 0.05
    clip_norm: float = 1.0
    save_every: int = 50


@dataclass(frozen=True)
class ParameterGroup:
    """Leaf tensors by name, trained in place with `learning_rate`; after every step each is clamped to `low` and `high`."""

    parameters: Mapping[str, Tensor]
    learning_rate: float
    low: float | None = None
    high: float | None = None


def train(
    groups: Sequence[ParameterGroup],
    loss_of: LossOf,
    plan: Plan,
    *,
    name: str,
    checkpoint: Path | None = None,
    identity: str = "",
    tell: Tell = lambda *_: None,
) -> tuple[float, ...]:
    """Train, and return the mean loss of every step. `loss_of(n)` is the scalar loss number n, of plan.steps * plan.accumulate.

    `name` is the block's or model's, for messages; `tell` is given steps done, steps in all, the last loss and the seconds left.
    `identity` says what the losses are made from: a checkpoint of another identity, plan or learning rate is not taken up.

    Raises QuantizationFailed naming `name` and the step where a loss or gradient is not finite; the last good checkpoint stays.
    """
    run = _Run(groups, plan, name, checkpoint, identity)
    started, first = time.monotonic(), run.step
    while run.step < plan.steps:
        run.take(loss_of)
        done = run.step - first
        tell(run.step, plan.steps, run.losses[-1], (time.monotonic() - started) / done * (plan.steps - run.step))
    return tuple(run.losses)


class _Run:
    def __init__(self, groups: Sequence[ParameterGroup], plan: Plan, name: str, checkpoint: Path | None, identity: str) -> None:
        self._groups, self._plan, self._name, self._file = groups, plan, name, checkpoint
        self._parameters = {key: tensor for group in groups for key, tensor in group.parameters.items()}
        assert len(self._parameters) == sum(len(group.parameters) for group in groups), "parameter groups share a name"
        self._means = {key: torch.zeros_like(tensor) for key, tensor in self._parameters.items()}
        self._squares = {key: torch.zeros_like(tensor) for key, tensor in self._parameters.items()}
        self.step, self.losses = 0, list[float]()
        rates = [(group.learning_rate, sorted(group.parameters)) for group in groups]
        facts = json.dumps([asdict(plan), rates, identity], sort_keys=True)
        self._fingerprint = hashlib.sha256(facts.encode()).hexdigest()
        self._resume()

    def take(self, loss_of: LossOf) -> None:
        """One step of the optimizer."""
        total = 0.0
        with torch.enable_grad():
            for index in range(self._plan.accumulate):
                loss = loss_of(self.step * self._plan.accumulate + index) / self._plan.accumulate
                total += float(loss.detach())
                self._check(total, "loss")
                loss.backward()  # type: ignore[no-untyped-call]
        gradients = {key: tensor.grad for key, tensor in self._parameters.items() if tensor.grad is not None}
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in gradients.values()])))
        self._check(norm, "gradient")
        factor = min(1.0, self._plan.clip_norm / (norm + 1e-12))
        with torch.no_grad():
            for group in self._groups:
                for key in group.parameters.keys() & gradients.keys():
                    self._update(key, gradients[key].mul_(factor), group)
        self.step += 1
        self.losses.append(total)
        if self._file is not None and (self.step % self._plan.save_every == 0 or self.step == self._plan.steps):
            write_state(self._file, State(self.step, tuple(self.losses), self._tensors(self.step), self._fingerprint))

    def _update(self, key: str, gradient: Tensor, group: ParameterGroup) -> None:
        parameter, mean, square = self._parameters[key], self._means[key], self._squares[key]
        mean.lerp_(gradient, 1 - _BETAS[0])
        square.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        count = self.step + 1
        rate = group.learning_rate * share(self.step, self._plan.steps, warmup=self._plan.warmup, floor=self._plan.floor)
        size = (square / (1 - _BETAS[1] ** count)).sqrt_().add_(_EPSILON)
        parameter.addcdiv_(mean, size, value=-rate / (1 - _BETAS[0] ** count))
        if group.low is not None or group.high is not None:
            parameter.clamp_(group.low, group.high)
        parameter.grad = None

    def _check(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            kept = "" if self._file is None or not self._file.exists() else f"; the checkpoint {self._file.name} before it is kept"
            raise QuantizationFailed(
                f"training diverged: the {what} of step {self.step + 1} of {self._plan.steps} is {value}{kept}. Lower the learning rate",
                layer=self._name,
            )

    def _tensors(self, step: int) -> dict[str, Tensor]:
        """What is kept after so many steps: who has taken the last needs no moments any more."""
        moments = {} if step == self._plan.steps else {"mean": self._means, "square": self._squares}
        kinds = {"parameter": self._parameters, **moments}
        return {f"{kind}.{key}": tensor for kind, tensors in kinds.items() for key, tensor in tensors.items()}

    def _resume(self) -> None:
        state = None if self._file is None else read_state(self._file, self._tensors, self._fingerprint)
        if state is None:
            return
        with torch.no_grad():
            for key, tensor in self._tensors(state.step).items():
                tensor.copy_(state.tensors[key])
        self.step, self.losses = state.step, list(state.losses)
