"""Our Triton products behind the registry: integers of 2, 3, 4 and 8 bits, and the 16 codes of NF4 and FP4, with bf16 or fp16 inputs.

Integers are multiplied as they are and scales applied to fp32 sums, so the weight is not rounded to the inputs' dtype, as the
reference's is; the 16 numbers of a code book are.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantizers.kernels import cuda
from quantizers.kernels.base import Kernel, LayerKind
from quantizers.kernels.cuda import layout
from quantizers.packing import unpack
from quantizers.scheme import BNB_BLOCK, BnbScheme, IntegerScheme
from quantizers.weights import QuantizedWeight, Spec, block_absmax, code_book, groups, is_plain_int8

_DTYPES = (torch.bfloat16, torch.float16)
_WIDTHS = (2, 3, 4, 8)


class TritonWeightOnly(Kernel):
    """Groups of a multiple of 32 inputs or a whole row; symmetric, with zero points or minimums.

    `low` (and `high` for 3 bits) as `cuda/layout.py` draws them; `scale`, `zero_point` and `minimum` as in the weight, but
    [groups, rows], so that those of neighbouring rows lie beside each other.
    """

    name = "triton-weight-only"
    rank = 20

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:
        scheme = layer.scheme
        return (
            isinstance(scheme, IntegerScheme)
            and scheme.weight_bits in _WIDTHS
            and scheme.activation_bits is None
            and (scheme.group_size or layout.PLANE) % layout.PLANE == 0
            and layer.in_features % (scheme.group_size or 1) == 0
            and _runs(layer)
        )

    def specs(self) -> dict[str, Spec]:
        scheme, rows = self._scheme, self.layer.out_features
        per_group = (groups(scheme, self.layer.in_features), rows)
        specs = _code_specs(rows, self.layer.in_features, scheme.weight_bits)
        specs["scale"] = (per_group, torch.float16)
        if scheme.zero == "integer":
            specs["zero_point"] = (per_group, torch.uint8)
        if scheme.zero == "minimum":
            specs["minimum"] = (per_group, torch.float16)
        return specs

    @property
    def _scheme(self) -> IntegerScheme:
        assert isinstance(self.layer.scheme, IntegerScheme)
        return self.layer.scheme

    def prepare(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        scheme, tensors = self._scheme, dict(weight.tensors)
        codes = tensors.pop("codes")
        if is_plain_int8(scheme):
            codes = codes.view(torch.uint8) ^ 0x80  # from two's complement to codes that count from 0
        laid = layout.interleave(unpack(codes, scheme.weight_bits, self.layer.in_features), scheme.weight_bits)
        return laid | {name: tensor.T.contiguous() for name, tensor in tensors.items()}

    def rows(self, indices: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        assert (self._scheme.weight_bits, self._scheme.zero) == (8, "none"), "the format of embeddings"
        count = buffers["scale"].shape[0]
        codes = buffers["low"][:, indices].transpose(0, 1).flatten(1)[:, : self.layer.in_features]  # spans are in order
        grouped = (codes.float() - 128).view(len(indices), count, self.layer.in_features // count)
        return (grouped * buffers["scale"][:, indices].T.float().unsqueeze(-1)).view(len(indices), self.layer.in_features)

    def run(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        kinds = {"none": layout.SYMMETRIC, "integer": layout.POINT, "minimum": layout.MINIMUM}
        prepared = layout.Weight(
            rows=self.layer.out_features,
            columns=self.layer.in_features,
            bits=self._scheme.weight_bits,
            zero_kind=kinds[self._scheme.zero],
            group=self._scheme.group_size or 0,
            low=buffers["low"],
            high=buffers.get("high"),
            scale=buffers["scale"],
            zero=buffers.get("zero_point", buffers.get("minimum")),
        )
        return _product(x, prepared, bias)


class TritonCodeBook(Kernel):
    """NF4 and FP4 where a row is a whole number of blocks of 64: `low` as for 4 bits, `absmax` fp32 [blocks of a row, rows]."""

    name = "triton-code-book"
    rank = 20

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:
        known = isinstance(layer.scheme, BnbScheme) and layer.scheme.format in ("nf4", "fp4")
        return known and layer.in_features % BNB_BLOCK == 0 and _runs(layer)

    @property
    def _scheme(self) -> BnbScheme:
        assert isinstance(self.layer.scheme, BnbScheme)
        return self.layer.scheme

    def specs(self) -> dict[str, Spec]:
        rows, columns = self.layer.out_features, self.layer.in_features
        return _code_specs(rows, columns, 4) | {"absmax": ((columns // BNB_BLOCK, rows), torch.float32)}

    def prepare(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        rows, columns = self.layer.out_features, self.layer.in_features
        packed = weight.tensors["codes"]
        codes = torch.stack((packed >> 4, packed & 0xF), -1).view(rows, columns)
        absmax = block_absmax(self._scheme, weight.tensors).view(rows, columns // BNB_BLOCK).T.contiguous()
        return layout.interleave(codes, 4) | {"absmax": absmax}

    def run(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        prepared = layout.Weight(
            rows=self.layer.out_features,
            columns=self.layer.in_features,
            bits=4,
            zero_kind=layout.TABLE,
            group=BNB_BLOCK,
            low=buffers["low"],
            high=None,
            scale=buffers["absmax"],
            zero=None,
            book=code_book(self._scheme.format),
        )
        return _product(x, prepared, bias)


def _product(x: Tensor, weight: layout.Weight, bias: Tensor | None) -> Tensor:
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], weight.rows)
    from quantizers.kernels.cuda import weight_only

    y: Tensor = weight_only.product(x.reshape(-1, weight.columns).contiguous(), weight, bias)
    return y.view(*x.shape[:-1], weight.rows)


def _code_specs(rows: int, columns: int, bits: int) -> dict[str, Spec]:
    count = layout.spans(columns, bits)
    specs: dict[str, Spec] = {"low": ((count, rows, layout.PLANE), torch.uint8)}
    if bits == 3:
        specs["high"] = ((count, rows, layout.PLANE // 2), torch.uint8)
    return specs


def _runs(layer: LayerKind) -> bool:
    return layer.dtype in _DTYPES and layer.out_features > 0 and layer.in_features > 0 and cuda.why_not(layer.device) is None
