"""Second-order statistics of a layer's inputs, and the factors that methods make of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.errors import QuantizationFailed

_ROWS = 8192  # tokens whose products are summed at once
_STRIP = 256  # rows of a product that are computed at once
_DAMPING_STEP = 4.0  # between two tries
_LARGEST_DAMPING = 1.0  # of the mean diagonal: beyond it the statistics say nothing any more


class Gram:
    """Running mean over tokens of x_i y_j, or of x_i x_j: some tokens after the other, summed in fp32 [in, in]."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._tokens = 0

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """`x` and `y` [tokens, in], any floating dtype. Always with `y`, or never."""
        if self._total is None:
            self._total = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
        for start in range(0, len(x), _ROWS):
            left = x[start : start + _ROWS].float()
            if y is None:
                _add_lower(self._total, left)
            else:
                self._total.addmm_(left.T, y[start : start + _ROWS].float())
        self._symmetric = y is None
        self._tokens += len(x)

    def mean(self) -> Tensor:
        """fp32 [in, in]. To be asked for once, after at least one token: it is made in place."""
        assert self._total is not None, "some tokens came before"
        if self._symmetric:
            _mirror(self._total)
        return self._total.div_(self._tokens)


def gram(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Mean over tokens of x_i y_j (of x_i x_j without `y`): `x` and `y` [tokens, in], any floating dtype -> fp32 [in, in]."""
    total = Gram()
    total.add(x, y)
    return total.mean()


def _add_lower(total: Tensor, x: Tensor) -> None:
    """x^T x, a strip of rows up to the diagonal at a time: the rest is its mirror image, and nearly half of the work."""
    for start in range(0, len(total), _STRIP):
        end = min(start + _STRIP, len(total))
        total[start:end, :end].addmm_(x[:, start:end].T, x[:, :end])


def _mirror(total: Tensor) -> None:
    for start in range(0, len(total), _STRIP):
        end = min(start + _STRIP, len(total))
        total[:start, start:end] = total[start:end, :start].T


@dataclass(frozen=True)
class Factors:
    """Of a damped Hessian H fp32 [in, in], in the order in which columns are to be quantized.

    order: int64 [in], positions of columns. inverse: fp32 [in, in] upper triangular, inverse^T inverse = H^-1 in that order.
    dead: bool [in] in the layer's own order, inputs that were always zero. ridge: what was added to the diagonal.
    """

    order: Tensor
    inverse: Tensor
    dead: Tensor
    ridge: float


def factors(hessian: Tensor, *, damping: float, by_magnitude: bool, layer: str) -> Factors:
    """Raises QuantizationFailed naming `layer` where the Hessian is not finite, or not positive definite at any damping."""
    if not bool(torch.isfinite(hessian).all()):
        raise QuantizationFailed("its inputs on the calibration tokens are not finite: use another text, or rtn", layer=layer)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    if bool(dead.all()):
        raise QuantizationFailed("all of its inputs on the calibration tokens are zero: use another text, or rtn", layer=layer)
    order = diagonal.argsort(descending=True, stable=True) if by_magnitude else torch.arange(len(diagonal), device=hessian.device)
    mean = float(diagonal[~dead].double().mean())
    tried = damping
    while tried <= _LARGEST_DAMPING:
        damped = hessian[order][:, order].double()
        damped.diagonal()[dead[order]] = 1
        damped.diagonal().add_(tried * mean)
        inverse = _inverse_factor(damped)
        if inverse is not None:
            return Factors(order, inverse, dead, tried * mean)
        tried *= _DAMPING_STEP
    raise QuantizationFailed(
        f"the Hessian of its inputs is not positive definite, damped with up to {_LARGEST_DAMPING:g} of its mean diagonal: "
        "calibrate on more or other text, or use rtn",
        layer=layer,
    )


def _inverse_factor(work: Tensor) -> Tensor | None:
    """Upper Cholesky factor of the inverse of `work` fp64 [in, in], which is overwritten; fp32, or None where one of the two is not
    positive definite.
    """
    failed = work.new_empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(work, out=(work, failed))  # in place: each of these matrices is twice as large as the Hessian
    if int(failed):
        return None
    torch.cholesky_inverse(work, out=work)
    torch.linalg.cholesky_ex(work, upper=True, out=(work, failed))
    return None if int(failed) or not bool(torch.isfinite(work).all()) else work.float()
