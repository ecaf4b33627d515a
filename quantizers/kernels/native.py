"""Our own CPU kernels behind the registry. Integer products inside: the layer's input is rounded to 8 bits while it is multiplied.

Weight-only formats say nothing of the input; here it is rounded dynamically, each 32 inputs of a token with a scale of their own
(`a8g32` in the kernel's name), which costs about 0.4 % of a product's size. `a8` formats round as they are specified, each token with one
scale. A row's result is the same to the bit at any batch size, thread count and instruction set.
"""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from quantizers.kernels.base import Kernel, LayerKind
from quantizers.kernels.cpu import library
from quantizers.scheme import IntegerScheme
from quantizers.weights import QuantizedWeight, Spec, is_plain_int8

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Form(NamedTuple):
    """Fields of `library.Matrix` that a format decides: the kind of kernel, bits of a code, inputs of a group, kind of zero."""

    kind: int
    bits: int
    group: int
    zero: int = 0


class NativeWeightOnly(Kernel):
    """2, 3, 4 and 8 bits, groups of 32, 64, 128 or a row, symmetric, with zero points or minimums; inputs rounded to 8 bits by 32.

    One buffer, `packed`, in the layout of `cpu/native/layout.h`.
    """

    name = "native-cpu-a8g32"
    rank = 20
    kind: ClassVar[int] = library.GROUPED

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:
        return _supported(layer) and isinstance(layer.scheme, IntegerScheme) and layer.scheme.activation_bits is None

    def specs(self) -> dict[str, Spec]:
        return {"packed": ((library.packed_bytes(self.matrix(0, None)),), torch.uint8)}

    def prepare(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        assert isinstance(self.layer.scheme, IntegerScheme)
        tensors = {name: tensor.contiguous() for name, tensor in weight.tensors.items()}
        source = library.Source(
            codes=tensors["codes"].data_ptr(),
            row_bytes=tensors["codes"].shape[1],
            flip=128 if is_plain_int8(self.layer.scheme) else 0,
            scale=tensors["scale"].data_ptr(),
            zero_point=tensors["zero_point"].data_ptr() if "zero_point" in tensors else None,
            minimum=tensors["minimum"].data_ptr() if "minimum" in tensors else None,
        )
        return {"packed": self._pack(source)}

    def _pack(self, source: library.Source) -> Tensor:
        """The matrix in the kernel's layout. What `source` points to must still be there."""
        matrix = self.matrix(0, None)
        packed = library.aligned_bytes(library.packed_bytes(matrix))
        library.call(library.library().precis_pack, source, matrix, packed.data_ptr(), library.threads())
        return packed

    def run(self, x: Tensor, buffers: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        tokens = x.reshape(-1, self.layer.in_features).float().contiguous()
        y = library.run_linear(self.matrix(buffers["packed"].data_ptr(), None), tokens)
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], self.layer.out_features).to(x.dtype)

    def rows(self, indices: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        scheme = self.layer.scheme
        assert isinstance(scheme, IntegerScheme) and (scheme.weight_bits, scheme.zero) == (8, "none"), "the format of embeddings"
        group = scheme.group_size or self.layer.in_features
        count = self.layer.in_features // group
        # [blocks of 16 rows, groups, bytes]; of a group's codes [group / 4, 16 rows, 4 inputs], then 16 scales: see layout.h.
        packed = buffers["packed"].view(-1, count, 16 * group + 32)[indices // 16]
        each, row = torch.arange(len(indices), device=indices.device), indices % 16
        codes = packed[..., : 16 * group].view(len(indices), count, group // 4, 16, 4)[each, :, :, row].reshape(len(indices), count, group)
        scale = packed[..., 16 * group :].contiguous().view(torch.float16)[each, :, row]
        return ((codes.float() - 128) * scale.float().unsqueeze(-1)).view(len(indices), self.layer.in_features)

    def form(self) -> Form:
        """What the C interface has to know of the format."""
        scheme = self.layer.scheme
        assert isinstance(scheme, IntegerScheme)
        return Form(self.kind, scheme.weight_bits, scheme.group_size or self.layer.in_features, library.ZEROS[scheme.zero])

    def matrix(self, data: int, bias: int | None) -> library.Matrix:
        """The layer for the C interface, with its packed weight at the address `data` and its fp32 bias, if any, at `bias`."""
        return library.Matrix(
            **self.form()._asdict(),
            rows=self.layer.out_features,
            columns=self.layer.in_features,
            data=data,
            bias=bias,
        )


class NativeInt8Tokens(NativeWeightOnly):
    """8 bits a channel with 8 bits a token: exact integer sums, so the reference's results to the bit."""

    name = "native-cpu-w8a8"
    kind = library.TOKEN

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:
        return _supported(layer) and _has_int8_tokens(layer) and _is_channel_int8(layer)


class NativeTokens(NativeWeightOnly):
    """8 bits a token with every other integer format: exact integer sums of 32 products each, added up in fp32 with the groups' scales."""

    name = "native-cpu-a8"
    kind = library.GROUPED_TOKEN

    @classmethod
    def supports(cls, layer: LayerKind) -> bool:
        return _supported(layer) and _has_int8_tokens(layer) and not _is_channel_int8(layer)


def _has_int8_tokens(layer: LayerKind) -> bool:
    return isinstance(layer.scheme, IntegerScheme) and layer.scheme.activation_bits == 8


def _is_channel_int8(layer: LayerKind) -> bool:
    return isinstance(layer.scheme, IntegerScheme) and layer.scheme.group_size is None and is_plain_int8(layer.scheme)


def _supported(layer: LayerKind) -> bool:
    return isinstance(layer.scheme, IntegerScheme) and layer.in_features % (layer.scheme.group_size or 1) == 0 and has_native_shape(layer)


def has_native_shape(layer: LayerKind) -> bool:
    """Whether the library is there and takes a layer of this shape, dtype and device, whatever its format."""
    return (
        layer.device.type == "cpu"
        and layer.dtype in _DTYPES
        and layer.in_features % library.INPUTS == 0
        and 0 < layer.in_features <= library.MAX_IN_FEATURES
        and layer.out_features > 0
        and library.missing() is None
    )
