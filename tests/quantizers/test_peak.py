"""The peak is said before the work, by what takes it, and it is what is measured then; where there is less room nothing is begun."""

from collections.abc import Callable
from concurrent.futures import Executor

import pytest
import torch

from quantizers.calibration import Calibration
from quantizers.errors import OutOfMemory
from quantizers.peak import predict_peak
from quantizers.pipeline import Progress, quantize
from quantizers.recipe import parse_recipe
from tests.quantizers.apart import tensors_held
from tests.quantizers.conftest import MemoryTensors, calibration_tokens

# Of tensors that are all of some megabytes; what the heap keeps and libraries allocate once is some ten megabytes beside.
GRANULARITY = 0.25
SAMPLES, LENGTH, HIDDEN = 2048, 64, 64
STREAM = SAMPLES * LENGTH * HIDDEN * 4  # 34 MB in fp32


def many_tokens() -> Calibration:
    tokens = torch.randint(3, 90, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    return Calibration(tokens, torch.ones_like(tokens), "random", "0" * 64)


@pytest.mark.parametrize(("slug", "streams"), [("smoothquant-w8a8", 2), ("gptq-w4g32", 4), ("smoothquant-gptq-w8a8", 4)])
def test_the_streams_are_what_many_tokens_take(slug: str, streams: int, tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    recipe, said = parse_recipe(slug), []
    result = quantize(model.config, checkpoint, recipe, lambda *_: None, calibration=many_tokens(), progress=said.append)
    assert result.predicted_peak["streams"] == streams * STREAM
    assert result.peak_bytes == pytest.approx(result.predicted_peak_bytes, rel=GRANULARITY)
    assert result.predicted_peak_bytes == result.predicted_peak["total"] == said[0].predicted_peak_bytes
    assert all(step.predicted_peak_bytes is None for step in said[1:])
    alone = predict_peak(model.config, recipe, checkpoint, samples=SAMPLES, length=LENGTH)
    assert alone.facts() == result.predicted_peak


@pytest.mark.parametrize("slug", ["rtn-w8a8", "rtn-w4g64", "rtn-w3g64z", "rtn-w2g64m", "rtn-fp8", "rtn-mxfp4", "rtn-nvfp4", "bnb-nf4"])
def test_rounding_holds_few_tensors_of_a_layer(slug: str, apart: Executor) -> None:
    """Predicted are two, and three and a half for bitsandbytes; beside them lie the stored form and small pieces. No wide integers of all
    codes on the way from a weight to its stored form and back.
    """
    tensors, error = apart.submit(tensors_held, slug).result()
    assert 1 < tensors < (3.75 if slug.startswith("bnb") else 2.75)
    assert error < 2


def test_parts_grow_with_what_they_are_of(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    few, many = (predict_peak(model.config, parse_recipe("gptq-w4g32"), checkpoint, samples=samples, length=64) for samples in (512, 1024))
    assert many.streams == 2 * few.streams and many.activations == few.activations, "inside a block one chunk is alive"
    assert few.block > sum(parameter.numel() for parameter in model.model.layers[0].parameters()) * 4
    file, memory = (predict_peak(model.config, parse_recipe("rtn-w4g32"), checkpoint, keeps_artifact=keeps) for keeps in (False, True))
    weights = sum(layer.numel() for name, layer in checkpoint.items() if name.endswith("_proj.weight"))
    assert file.artifact == 0 and memory.artifact == weights // 2 + weights // 32 * 2


def test_half_precision_is_widened_before_the_blocks(tiny: Callable) -> None:
    """With few tokens the embedding, as fp32, is the most that a run holds; in fp32 it is read in place."""
    model, checkpoint = tiny("llama")
    model.config.vocab_size = 1 << 16
    wide = MemoryTensors({**checkpoint, **{name: torch.zeros(1 << 16, 64) for name in ("model.embed_tokens.weight", "lm_head.weight")}})
    half = MemoryTensors({name: tensor.bfloat16() for name, tensor in wide.items()})
    sizes = [predict_peak(model.config, parse_recipe("gptq-w4g32"), source, samples=1, length=8).block for source in (wide, half)]
    assert sizes[1] >= (1 << 16) * 64 * 4 > sizes[0]


def test_too_little_room_is_refused_before_the_work(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    recipe, sink, said = parse_recipe("gptq-w4g32"), MemoryTensors(), []

    def quantize_within(limit: int) -> None:
        quantize(
            model.config,
            checkpoint,
            recipe,
            sink.__setitem__,
            calibration=calibration_tokens(),
            progress=said.append,
            memory_limit=limit,
        )

    with pytest.raises(OutOfMemory, match=r"predicted to take \d+ MB at its peak \(.*\), and 5 MB are free: give fewer .* samples"):
        quantize_within(5_000_000)
    assert not sink and all(isinstance(step, Progress) and step.stage == "try" for step in said)
    quantize_within(100_000_000)
    assert sink
