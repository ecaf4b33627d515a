"""Work whose peak is measured, for a process of its own: what other tests have left in a heap is not this work's."""

from pathlib import Path

import torch
from transformers import AutoConfig

from model_store.formats.safetensors import SafetensorsSource
from quantizers.memory import PeakMemory, keep_large_tensors_apart, trim_heap
from quantizers.methods.bnb import quantize_bnb
from quantizers.methods.rtn import quantize_minifloat, quantize_nearest
from quantizers.pipeline import QuantizationResult, quantize
from quantizers.recipe import parse_recipe
from quantizers.scheme import BnbScheme, IntegerScheme, MinifloatScheme


def tensors_held(slug: str) -> tuple[float, float]:
    """The peak of rounding a weight by `slug` and of reading it back, in fp32 tensors of its size; and the largest error."""
    keep_large_tensors_apart(tokens_flow=False)
    scheme, weight = parse_recipe(slug).scheme, torch.randn(4096, 2048, generator=torch.Generator().manual_seed(0))
    make = {IntegerScheme: quantize_nearest, MinifloatScheme: quantize_minifloat, BnbScheme: quantize_bnb}[type(scheme)]
    make(weight[:64], scheme, layer="warm")  # libraries
    trim_heap()
    with PeakMemory("cpu") as peak:
        difference = make(weight, scheme, layer="layer").dequantize() - weight
    return peak.bytes / weight.nbytes, difference.abs().max().item()


def quantized(folder: Path, slug: str) -> QuantizationResult:
    """A checkpoint in the format `slug`, its artifact dropped."""
    config, source = AutoConfig.from_pretrained(folder, local_files_only=True), SafetensorsSource([folder / "model.safetensors"])
    return quantize(config, source, parse_recipe(slug), lambda *_: None)
