"""Quantized layers as compressed-tensors stores them, which transformers loads: one layer's tensors, and the `quantization_config`.

    pack-quantized  weight_packed      int32 [out, ceil(in * b / 32)]  codes from 0 up, a dense stream of bits a row, lowest bits first
                    weight_scale       fp16  [out, G]
                    weight_zero_point  int32 [ceil(out * b / 32), G]   the same stream down each column; with zero points only
                    weight_shape       int64 [2]
    int-quantized   weight             int8  [out, in]
                    weight_scale       fp16  [out, 1]
    float-quantized weight             e4m3  [out, in]
                    weight_scale       fp32  [out, 1]
    mxfp4-pack-     weight_packed      uint8 [out, in / 2]             two e2m1 a byte
      quantized     weight_scale       uint8 [out, in / 32]            e8m0
    nvfp4-pack-     weight_packed      uint8 [out, in / 2]
      quantized     weight_scale       e4m3  [out, in / 16]
                    weight_global_scale fp32 [1]                       w = codes * scale / global_scale

The stream is the one of `quantizers.packing`, in words of 32 bits instead of bytes. Groups are contiguous in the original order of the
columns (gptq's order of activations is the order of the work only), so no `weight_g_idx` is needed. The library itself checks the config.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from quantizers.errors import UnsupportedScheme
from quantizers.scheme import BnbScheme, IntegerScheme, MinifloatScheme

if TYPE_CHECKING:
    from torch import Tensor

    from quantizers.weights import QuantizedScheme, QuantizedWeight

FORMAT = "compressed-tensors"
PACKED, INTEGERS, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
FLOATS = {"fp8": "float-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}
Exportable = IntegerScheme | MinifloatScheme


def expressible(scheme: "QuantizedScheme", layer: str) -> Exportable:
    """`scheme`, where the format has it. Raises UnsupportedScheme naming `layer`, the reason and what to do."""
    if isinstance(scheme, BnbScheme):
        raise UnsupportedScheme(
            f"{layer} is {scheme.slug}: {FORMAT} has no code table or outlier columns of bitsandbytes; export an integer format such as "
            "rtn-w4g64 or gptq-w4g64z",
            param="variant",
        )
    if isinstance(scheme, MinifloatScheme):
        return scheme
    if scheme.zero == "minimum":
        raise UnsupportedScheme(
            f"{layer} is {scheme.slug}: {FORMAT} has integer zero points only, and a real minimum is none; "
            f"export a variant in {scheme.slug.replace('m', 'z')}",
            param="variant",
        )
    return scheme


def layer_format(scheme: Exportable) -> str:
    """Plain int8 where the activations are int8 too and rows are not cut into groups, packed words for all other integers."""
    if isinstance(scheme, MinifloatScheme):
        return FLOATS[scheme.format]
    plain = scheme.weight_bits == 8 and scheme.symmetric and scheme.group_size is None and scheme.activation_bits is not None
    return INTEGERS if plain else PACKED


def layer_tensors(weight: "QuantizedWeight") -> "dict[str, Tensor]":
    """Name in the layer -> tensor. Raises UnsupportedScheme."""
    import torch

    scheme = expressible(weight.scheme, "the layer")
    if isinstance(scheme, MinifloatScheme):
        return _float_tensors(scheme, weight.tensors)
    if layer_format(scheme) == INTEGERS:
        return {"weight": weight.tensors["codes"], "weight_scale": weight.tensors["scale"]}
    stream = weight.tensors["codes"]
    if stream.dtype == torch.int8:  # two's complement -> from 0 up
        stream = stream.view(torch.uint8) ^ 0x80
    tensors = {
        "weight_packed": _words(stream),
        "weight_scale": weight.tensors["scale"],
        "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }
    if scheme.zero == "integer":
        from quantizers.packing import pack

        columns = _words(pack(weight.tensors["zero_point"].T.contiguous(), scheme.weight_bits))
        tensors["weight_zero_point"] = columns.T.contiguous()
    return tensors


def _float_tensors(scheme: MinifloatScheme, tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The same bytes as ours, under its names and dtypes."""
    import torch

    codes, scale = tensors["codes"], tensors["scale"]
    if scheme.format == "fp8":
        return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
    if scheme.format == "mxfp4":
        return {"weight_packed": codes, "weight_scale": scale}
    return {"weight_packed": codes, "weight_scale": scale.view(torch.float8_e4m3fn), "weight_global_scale": tensors["global_scale"]}


def _words(stream: "Tensor") -> "Tensor":
    """uint8 [rows, bytes] -> int32 [rows, ceil(bytes / 4)], what is left of the last word zero."""
    import torch

    padded = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4))
    return padded.reshape(-1).view(torch.int32).view(len(stream), -1)


def quantization_config(layers: Mapping[str, Exportable], unquantized: Collection[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json. `layers`: full name -> format; `unquantized`: full names of all other linear layers.

    One format everywhere is a group for the class `Linear`, several are a group each with their layers by name.

    `dequantize` is transformers' own switch, read from here by its loader and by nobody else: the weights are multiplied out while they
    are loaded, with the scales as they are stored. Without it, it rounds the scales to the model's dtype first, and cannot load packed
    zero points (transformers 5.24 with compressed-tensors 0.20). It knows one format only, and leaves int8 activations out.
    """
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig

    schemes = list(dict.fromkeys(layers.values()))
    formats = {layer_format(scheme) for scheme in schemes}
    named = {scheme: [name for name, each in layers.items() if each == scheme] for scheme in schemes}
    config = QuantizationConfig.model_validate(
        {
            "config_groups": {
                f"group_{index}": _group(scheme, ["Linear"] if len(schemes) == 1 else named[scheme]) for index, scheme in enumerate(schemes)
            },
            "format": formats.pop() if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "ignore": sorted(unquantized),
        }
    )
    alone = len(schemes) == 1 and schemes[0].activation_bits is None
    return {"version": compressed_tensors.__version__, **config.model_dump(mode="json"), **({"dequantize": True} if alone else {})}


def transformers_loads(layers: Mapping[str, Exportable]) -> bool:
    """Whether its loader (5.24, with compressed-tensors 0.20) reads a folder with layers in these formats, by full name: zero points only
    where all layers have one format and tokens are not quantized, experts only without either.
    """
    schemes = set(layers.values())
    experts = {scheme for name, scheme in layers.items() if ".experts." in name}
    if any(scheme.activation_bits or not _symmetric(scheme) for scheme in experts):
        return False
    alone = len(schemes) == 1 and all(scheme.activation_bits is None for scheme in schemes)
    return alone or all(_symmetric(scheme) for scheme in schemes)


def _symmetric(scheme: Exportable) -> bool:
    return isinstance(scheme, MinifloatScheme) or scheme.symmetric


def _group(scheme: Exportable, targets: list[str]) -> dict[str, Any]:
    tokens = {"num_bits": 8, "type": "float" if isinstance(scheme, MinifloatScheme) else "int", "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": _weights(scheme),
        "input_activations": None if scheme.activation_bits is None else {**tokens, "symmetric": True},
        "format": layer_format(scheme),
    }


def _weights(scheme: Exportable) -> dict[str, Any]:
    if isinstance(scheme, IntegerScheme):
        strategy = "channel" if scheme.group_size is None else "group"
        numbers = {"num_bits": scheme.weight_bits, "type": "int", "symmetric": scheme.symmetric}
        return {**numbers, "strategy": strategy, "group_size": scheme.group_size}
    blocks: dict[str, dict[str, Any]] = {
        "fp8": {"strategy": "channel"},
        "mxfp4": {"strategy": "group", "group_size": scheme.group_size, "scale_dtype": "torch.uint8"},
        "nvfp4": {"strategy": "tensor_group", "group_size": scheme.group_size, "scale_dtype": "torch.float8_e4m3fn"},
    }
    return {"num_bits": scheme.weight_bits, "type": "float", "symmetric": True, **blocks[scheme.format]}
