"""A run of training on disk: tensors in safetensors, the rest as JSON in the same file's header, the whole file in place at once.

No pickle: what is read back is tensors by name, a step number and losses.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantizers.errors import CorruptData

_KEY = "training"


@dataclass(frozen=True)
class State:
    """`step` steps are done. `tensors` holds parameters and, until the last step, both of Adam's moments of each, by name; `losses` one
    number a step.

    fingerprint: of everything that decides the numbers to come; another one means another run.
    """

    step: int
    losses: tuple[float, ...]
    tensors: Mapping[str, Tensor]
    fingerprint: str


def write_state(file: Path, state: State) -> None:
    """Atomic: a process that is killed leaves the state before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")  # two processes may make the same variant
    header = {_KEY: json.dumps({"step": state.step, "losses": state.losses, "fingerprint": state.fingerprint})}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}, part, metadata=header)
    with part.open("rb") as written:
        os.fsync(written.fileno())
    part.replace(file)


def read_state(file: Path, expected: Callable[[int], Mapping[str, Tensor]], fingerprint: str) -> State | None:
    """None where there is no file, or one of another run. `expected` says what is kept after so many steps, by shapes.

    Raises CorruptData where it does not hold what its header promises.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {})[_KEY])
            if header["fingerprint"] != fingerprint:
                return None
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
            state = State(int(header["step"]), tuple(map(float, header["losses"])), tensors, fingerprint)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorruptData(f"the training checkpoint {file.name} cannot be read ({error}): delete it to begin anew") from error
    shapes = {name: tensor.shape for name, tensor in expected(state.step).items()}
    wrong = {name: tensor.shape for name, tensor in tensors.items()} != shapes or len(state.losses) != state.step
    if wrong or not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise CorruptData(f"the training checkpoint {file.name} does not hold the numbers of this run: delete it to begin anew")
    return state
