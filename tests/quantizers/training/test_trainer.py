"""The trainer against torch's AdamW and clipping; a killed run ends in the same numbers, a diverging one stops by name."""

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from quantizers.errors import CorruptData, QuantizationFailed
from quantizers.training.schedule import share
from quantizers.training.trainer import ParameterGroup, Plan, train


def problem() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A regression: parameters, inputs by step and targets."""
    generator = torch.Generator().manual_seed(0)
    parameters = {"weight": torch.randn(4, 8, generator=generator), "bias": torch.zeros(4)}
    x, wanted = torch.randn(40, 16, 8, generator=generator), torch.randn(4, 8, generator=generator)
    return {name: tensor.requires_grad_() for name, tensor in parameters.items()}, x, x @ wanted.T


def loss_of(parameters: dict[str, Tensor], x: Tensor, y: Tensor, step: int) -> Tensor:
    return (x[step] @ parameters["weight"].T + parameters["bias"] - y[step]).square().mean()


def groups_of(parameters: dict[str, Tensor]) -> list[ParameterGroup]:
    return [ParameterGroup({"weight": parameters["weight"]}, 0.02), ParameterGroup({"bias": parameters["bias"]}, 0.005)]


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    rates = [share(step, 12, warmup=1 / 6, floor=0.1) for step in range(13)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[7] == pytest.approx(0.55) and rates[12] == pytest.approx(0.1)
    assert share(0, 1, warmup=0, floor=0.5) == 1


@pytest.mark.parametrize("accumulate", [1, 4])
def test_it_is_adamw_with_clipping(accumulate: int) -> None:
    ours, x, y = problem()
    theirs = {name: tensor.detach().clone().requires_grad_() for name, tensor in ours.items()}
    plan = Plan(steps=10, accumulate=accumulate, warmup=0.2, floor=0.05, clip_norm=0.7)
    losses = train(groups_of(ours), lambda n: loss_of(ours, x, y, n), plan, name="layer")
    optimizer = torch.optim.AdamW([{"params": [theirs["weight"]], "lr": 0.02}, {"params": [theirs["bias"]], "lr": 0.005}], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share(step, 10, warmup=0.2, floor=0.05))
    expected = []
    for step in range(10):
        optimizer.zero_grad()
        loss = torch.stack([loss_of(theirs, x, y, step * accumulate + index) for index in range(accumulate)]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.values(), 0.7)
        optimizer.step()
        schedule.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-6)


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [1, 7, 8, 13, 19])
def test_a_killed_run_goes_on_and_ends_in_the_same_numbers(kill_at: int, tmp_path: Path) -> None:
    file, plan = tmp_path / "state" / "block.safetensors", Plan(steps=20, save_every=4)
    whole, x, y = problem()
    losses = train(groups_of(whole), lambda n: loss_of(whole, x, y, n), plan, name="layer")
    killed, _, _ = problem()

    def until(n: int) -> Tensor:
        if n == kill_at:
            raise Killed
        return loss_of(killed, x, y, n)

    with pytest.raises(Killed):
        train(groups_of(killed), until, plan, name="layer", checkpoint=file)
    resumed, _, _ = problem()
    seen: list[int] = []

    def rest(n: int) -> Tensor:
        seen.append(n)
        return loss_of(resumed, x, y, n)

    assert train(groups_of(resumed), rest, plan, name="layer", checkpoint=file) == losses
    assert seen[0] == kill_at // 4 * 4, "what was saved is not trained again"
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    again, _, _ = problem()
    assert train(groups_of(again), lambda n: pytest.fail("it is done"), plan, name="layer", checkpoint=file) == losses
    assert torch.equal(again["weight"], whole["weight"])


@pytest.mark.parametrize("change", [{"identity": "other text"}, {"plan": Plan(steps=9, save_every=4)}])
def test_another_runs_checkpoint_is_not_taken_up(change: dict, tmp_path: Path) -> None:
    file = tmp_path / "block.safetensors"
    parameters, x, y = problem()
    given = {"plan": Plan(steps=8, save_every=4), "identity": "text"}
    for options in (given, given | change):
        plan, identity, first = options["plan"], options["identity"], list[int]()

        def counted(n: int, first: list[int] = first) -> Tensor:
            first.append(n)
            return loss_of(parameters, x, y, n)

        train(groups_of(parameters), counted, plan, name="layer", checkpoint=file, identity=identity)  # type: ignore[arg-type]
        assert first[0] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverging_run_stops_by_name_and_keeps_the_last_good_checkpoint(bad: float, tmp_path: Path) -> None:
    file = tmp_path / "block.safetensors"
    parameters, x, y = problem()

    def diverges(n: int) -> Tensor:
        return loss_of(parameters, x, y, n) * (bad if n == 6 else 1)

    with pytest.raises(QuantizationFailed, match=r"^layers\.3: training diverged: the loss of step 7 of 20 .* Lower") as failure:
        train(groups_of(parameters), diverges, Plan(steps=20, save_every=5), name="layers.3", checkpoint=file)
    assert failure.value.layer == "layers.3"
    with safe_open(file, framework="pt") as kept:
        assert '"step": 5' in kept.metadata()["training"]
        assert all(bool(torch.isfinite(kept.get_tensor(name)).all()) for name in kept.keys())  # noqa: SIM118


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    value = torch.zeros(1, requires_grad=True)
    with pytest.raises(QuantizationFailed, match=r"the gradient of step 1 of 2 is (nan|inf)"):
        train([ParameterGroup({"value": value}, 0.1)], lambda _: value.sqrt().sum(), Plan(steps=2), name="layer")


def test_parameters_stay_in_their_bounds() -> None:
    value = torch.ones(3, requires_grad=True)
    train([ParameterGroup({"value": value}, 5.0, low=0.25, high=2)], lambda _: value.sum(), Plan(steps=3), name="layer")
    assert value.tolist() == [0.25] * 3


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "header"])
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "block.safetensors"
    parameters, x, y = problem()
    plan = Plan(steps=4, save_every=2)
    train(groups_of(parameters), lambda n: loss_of(parameters, x, y, n), plan, name="layer", checkpoint=file)
    content = file.read_bytes()
    # The header is JSON: another number of steps in it, of the same length, no longer goes with the losses.
    damaged = {"cut": content[:-9], "text": b"hello", "empty": b"", "header": content.replace(b'\\"step\\": 4', b'\\"step\\": 3')}[damage]
    assert damaged != content
    file.write_bytes(damaged)
    with pytest.raises(CorruptData, match=r"training checkpoint block\.safetensors .* delete it to begin anew"):
        train(groups_of(parameters), lambda n: loss_of(parameters, x, y, n), plan, name="layer", checkpoint=file)
