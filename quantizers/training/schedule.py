"""The learning rate over a run: linear warm-up, then half a cosine down to a share of the top (Loshchilov and Hutter 2017, eq. 5)."""

import math


def share(step: int, steps: int, *, warmup: float, floor: float) -> float:
    """Of the top learning rate, in the optimizer's step number `step` of `steps`, from 0. `warmup` is a share of the steps."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    done = (step - rising) / max(1, steps - rising)
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
