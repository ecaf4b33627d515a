"""Quantized weights of random codes: the whole range of everything that a format can hold, whatever a method would make of it."""

import torch

from quantizers.packing import pack
from quantizers.scheme import IntegerScheme
from quantizers.weights import QuantizedScheme, QuantizedWeight, is_plain_int8, tensor_specs


def random_weight(scheme: QuantizedScheme, rows: int, columns: int, seed: int = 0) -> QuantizedWeight:
    """Codes over the whole range; scales of which every seventh is zero; zero points over the whole range."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (shape, dtype) in tensor_specs(scheme, rows, columns).items():
        if dtype in (torch.uint8, torch.int8):
            tensors[name] = torch.randint(0, 256, shape, generator=generator, dtype=torch.int64).to(torch.uint8).view(dtype)
        else:
            values = torch.randn(shape, generator=generator) * 0.02
            tensors[name] = values.to(dtype)
            if name in ("scale", "absmax"):
                tensors[name].view(-1)[::7] = 0
    if isinstance(scheme, IntegerScheme):
        if not is_plain_int8(scheme):
            codes = torch.randint(0, 1 << scheme.weight_bits, (rows, columns), generator=generator, dtype=torch.int64)
            tensors["codes"] = pack(codes.to(torch.uint8), scheme.weight_bits)
        if scheme.zero == "integer":
            tensors["zero_point"] = tensors["zero_point"] & ((1 << scheme.weight_bits) - 1)
    return QuantizedWeight(scheme, rows, columns, tensors)
