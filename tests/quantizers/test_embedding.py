"""Quantized embeddings: rows are those of the stored matrix, a tied matrix is held once, and where there is nothing to do it is said."""

from collections.abc import Callable

import pytest
import torch

from quantizers.errors import InvalidInput
from quantizers.kernels import KERNELS, LayerKind
from quantizers.kernels.cpu import library
from quantizers.kernels.cpu.step import NativeStep
from quantizers.linear import QuantizedEmbedding, QuantizedLinear
from quantizers.methods.rtn import quantize_nearest
from quantizers.model import LoadedModel, load_model, predict_bytes
from quantizers.pipeline import quantize
from quantizers.recipe import parse_recipe
from quantizers.scheme import EMBED8
from quantizers.shared import SharedTensors
from tests.quantizers.conftest import MemoryTensors

CPU = torch.device("cpu")
TOKENS = torch.arange(24)[None] % 90
VOCAB, HIDDEN = 96, 64  # of the tiny models
MATRIX = VOCAB * HIDDEN + VOCAB * HIDDEN // 32 * 2  # bytes, and fp16 scales


def load(model: torch.nn.Module, checkpoint: MemoryTensors, slug: str) -> tuple[LoadedModel, MemoryTensors]:
    recipe, artifact = parse_recipe(slug), MemoryTensors()
    quantize(model.config, checkpoint, recipe, artifact.__setitem__)
    return load_model(model.config, recipe, checkpoint, artifact, device="cpu", shared=SharedTensors(), checkpoint_key="x"), artifact


def kernels_of_embeddings() -> list[str]:
    """Those that could run the output matrix, on this device or another."""
    kinds = [LayerKind(EMBED8, *shape, torch.bfloat16, CPU) for shape in ((96, 64), (8192, 1024))]
    return [name for name, kernel in KERNELS.items() if any(kernel.supports(kind) for kind in kinds)] + ["triton-weight-only"]


@pytest.mark.parametrize("name", list(dict.fromkeys(kernels_of_embeddings())))
@pytest.mark.parametrize("shape", [(50, 96), (8192, 1024)])
def test_rows_are_those_of_the_stored_matrix(name: str, shape: tuple[int, int]) -> None:
    weight = quantize_nearest(torch.randn(shape, generator=torch.Generator().manual_seed(1)), EMBED8, layer="embedding")
    kernel = KERNELS[name](LayerKind(EMBED8, *shape, torch.bfloat16, CPU))
    indices = torch.tensor([0, shape[0] - 1, 17, 16, 15, 17])
    rows = kernel.rows(indices, kernel.prepare(weight))
    # torch's own kernels hold scales in bf16.
    torch.testing.assert_close(rows, weight.dequantize()[indices], rtol=2**-8 if name.startswith("torch") else 0, atol=0)
    assert kernel.rows(indices[:0], kernel.prepare(weight)).shape == (0, shape[1])


def test_a_kernel_of_another_format_says_that_it_looks_nothing_up() -> None:
    kernel = KERNELS["torch-int4-cpu"](LayerKind(EMBED8, 64, 64, torch.bfloat16, CPU))
    with pytest.raises(NotImplementedError, match="torch-int4-cpu"):
        kernel.rows(torch.tensor([0]), {})


def test_an_embedding_of_its_own_is_looked_up_in_its_own_matrix(tiny: Callable) -> None:
    model, checkpoint = tiny("llama")
    plain, _ = load(model, checkpoint, "rtn-w8g32")
    loaded, artifact = load(model, checkpoint, "rtn-w8g32-embed8")
    embedding = loaded.model.get_input_embeddings()
    assert isinstance(embedding, QuantizedEmbedding) and type(loaded.model.lm_head) is torch.nn.Linear
    stored = quantize_nearest(checkpoint["model.embed_tokens.weight"], EMBED8, layer="embedding")
    assert torch.equal(artifact["model.embed_tokens.codes"], stored.tensors["codes"])
    assert torch.equal(embedding(TOKENS), stored.dequantize()[TOKENS].bfloat16())
    saved = sum(plain.bytes.values()) - sum(loaded.bytes.values())
    assert saved == 2 * VOCAB * HIDDEN - MATRIX
    with torch.no_grad():
        first, second = (each.model(TOKENS).logits for each in (plain, loaded))
    assert 0 < (first - second).norm() < 0.05 * first.norm()


def test_a_tied_matrix_is_held_and_counted_once(tiny: Callable) -> None:
    model, checkpoint = tiny("llama-tied")
    head, _ = load(model, checkpoint, "rtn-w8g32-head8")
    both, artifact = load(model, checkpoint, "rtn-w8g32-head8-embed8")
    assert isinstance(both.model.lm_head, QuantizedLinear)
    assert both.model.get_input_embeddings().matrix is both.model.lm_head
    assert not any("embed_tokens" in name for name in artifact.keys())  # noqa: SIM118
    assert sum(head.bytes.values()) - sum(both.bytes.values()) == 2 * VOCAB * HIDDEN, "the bf16 embedding is gone, nothing came"
    held = {buffer.data_ptr(): buffer.nbytes for buffer in both.model.lm_head.buffers()}
    assert sum(held.values()) == MATRIX


@pytest.mark.parametrize(
    ("family", "slug"), [("llama", "rtn-w4g64-embed8"), ("llama", "rtn-w4g64-head8-embed8"), ("llama-tied", "rtn-w4g64-head8-embed8")]
)
def test_bytes_are_predicted(family: str, slug: str, tiny: Callable) -> None:
    model, checkpoint = tiny(family)
    loaded, _ = load(model, checkpoint, slug)
    assert predict_bytes(model.config, parse_recipe(slug), checkpoint) == loaded.bytes
    assert sum(loaded.bytes.values()) == sum(loaded.bytes_by_dtype.values())


def test_a_tied_embedding_without_its_output_matrix_is_refused(tiny: Callable) -> None:
    model, checkpoint = tiny("llama-tied")
    with pytest.raises(InvalidInput, match=r"hold twice: use rtn-w4g64-head8-embed8"):
        quantize(model.config, checkpoint, parse_recipe("rtn-w4g64-embed8"), MemoryTensors().__setitem__)


def test_two_matrices_that_the_config_ties_are_refused(tiny: Callable) -> None:
    model, checkpoint = tiny("llama-tied")
    artifact = MemoryTensors()
    recipe = parse_recipe("rtn-w4g64-head8-embed8")
    quantize(model.config, checkpoint, recipe, artifact.__setitem__)
    checkpoint["lm_head.weight"] = checkpoint["model.embed_tokens.weight"] + 1
    with pytest.raises(InvalidInput, match="two different matrices: set tie_word_embeddings to false"):
        load_model(model.config, recipe, checkpoint, artifact, device="cpu", shared=SharedTensors(), checkpoint_key="x")


def test_an_embedding_that_scales_its_rows_is_refused(tiny: Callable) -> None:
    model, checkpoint = tiny("gemma3")
    with pytest.raises(InvalidInput, match="no plain embedding"):
        quantize(model.config, checkpoint, parse_recipe("rtn-w4g64-head8-embed8"), MemoryTensors().__setitem__)


@pytest.mark.skipif(library.missing() is not None, reason=f"native kernels are {library.missing()}")
@pytest.mark.parametrize(("family", "slug"), [("llama", "rtn-w8g32-embed8"), ("llama-tied", "rtn-w8g32-head8-embed8")])
def test_the_native_step_looks_rows_up_in_the_packed_matrix(family: str, slug: str, tiny: Callable) -> None:
    import numpy as np

    model, checkpoint = tiny(family)
    for name in [name for name in checkpoint.keys() if name.endswith("proj.weight")]:  # noqa: SIM118
        checkpoint[name] = checkpoint[name] * 4
    loaded, _ = load(model, checkpoint, slug)
    assert NativeStep.supports(loaded.model) is None
    ids = TOKENS[0].numpy().astype(np.int32)
    count = len(ids)
    with NativeStep(loaded.model) as step, torch.no_grad():
        step.allocate(4)
        every = np.arange(count, dtype=np.int32)
        found = step.forward(ids, every, np.array([0, count], np.int32), np.arange(4, dtype=np.int32)[None], every)
        expected = loaded.model(TOKENS).logits[0].float()
        assert (found - expected).norm() < 0.02 * expected.norm()
        without = loaded.model.get_input_embeddings().matrix.get_buffer("packed")
        without.zero_()  # read in place: it is the step's embedding too
        assert not torch.equal(step.forward(ids, every, np.array([0, count], np.int32), np.arange(4, dtype=np.int32)[None], every), found)
