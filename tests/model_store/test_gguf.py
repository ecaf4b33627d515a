"""GGUF in: the numbers that went into the file come out, and a file that lies is refused before a reader believes it."""

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from model_store.formats.gguf import convert_gguf, convert_gguf_apart
from model_store.formats.gguf_header import read_gguf_header
from model_store.store import Store
from quantizers.errors import InvalidInput
from server.sources import demo_file

HEADS, KV_HEADS, LAYERS = 4, 2, 2
NAMES = {  # of a layer: transformers' and GGUF's
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF pairs neighbouring rows for rotary positions, transformers the two halves of a head."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, weights: dict[str, torch.Tensor], blocks: int = LAYERS, extra: dict[str, np.ndarray] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A model")
    writer.add_block_count(blocks)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<e>", "a", "b", "ab", *(chr(0x100 + i) for i in range(60))])
    writer.add_token_types([3] + [1] * 63)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, tensor in weights.items():
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = rotated(array, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    if name in ("model.embed_tokens.weight", "model.norm.weight"):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


@pytest.fixture(scope="session")
def weights(tiny: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny / "model.safetensors")


@pytest.fixture(scope="session")
def small(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", weights)


def test_a_gguf_file_becomes_a_checkpoint_with_the_numbers_that_went_in(
    store: Store, small: Path, weights: dict[str, torch.Tensor]
) -> None:
    stages: list[tuple[str, float]] = []
    checkpoint = store.checkpoints.import_gguf("small", small, lambda stage, share: stages.append((stage, share)))
    source = checkpoint.tensors()
    assert set(source.keys()) == set(weights)
    assert all(torch.equal(source.get(name), weights[name]) for name in weights)
    assert (checkpoint.source, checkpoint.num_layers, checkpoint.vocab_size, checkpoint.dtype) == ("gguf", 2, 64, "fp32")
    assert [share for _, share in stages] == sorted(share for _, share in stages) and stages[-1] == ("writing", 1.0)


def test_no_path_of_this_machine_stays_in_the_checkpoint(store: Store, small: Path) -> None:
    checkpoint = store.checkpoints.import_files("small", {"whatever it was called.gguf": small})
    for path in checkpoint.dir.glob("*.json"):
        assert str(store.data_dir) not in path.read_text() and str(small.parent) not in path.read_text(), path.name
    assert checkpoint.source == "upload"
    assert not list((store.data_dir / "tmp").glob("*/*/*"))


def test_the_demo_file_becomes_the_demo_checkpoint(demo: Path, tmp_path: Path) -> None:
    """The real file; the checkpoint beside it was written by transformers' own save_pretrained."""
    convert_gguf_apart(demo_file(), tmp_path)
    digests = [hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() for folder in (demo, tmp_path)]
    assert digests[0] == digests[1]


def test_a_tensor_that_the_reader_would_drop_is_refused(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", weights, extra={"rope_freqs.weight": np.ones(8, np.float32)})
    with pytest.raises(InvalidInput, match=r"rope_freqs\.weight"):
        convert_gguf(path, tmp_path / "out")


def test_a_missing_tensor_is_refused_and_not_made_up(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    kept = {name: tensor for name, tensor in weights.items() if "layers.1.mlp.down_proj" not in name}
    with pytest.raises(InvalidInput, match="does not fill its model"):
        convert_gguf(write_gguf(tmp_path / "x.gguf", kept), tmp_path / "out")


def test_an_architecture_that_transformers_cannot_read_crosses_the_process_boundary_as_itself(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(small.read_bytes().replace(b"llama", b"lxxxa"))
    with pytest.raises(InvalidInput, match="'lxxxa'") as caught:
        convert_gguf_apart(path, tmp_path / "out")
    assert caught.value.code == "unsupported_architecture"


def test_a_number_of_blocks_that_the_tensors_contradict(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="states 100000000 blocks and holds tensors of 2"):
        read_gguf_header(write_gguf(tmp_path / "x.gguf", weights, blocks=100_000_000))


def test_the_header_of_the_demo_file() -> None:
    header = read_gguf_header(demo_file())
    assert header.architecture == "llama"
    assert sum(header.tensors.values()) == 134_515_008  # the model card's 135 million


def put(letters: str, position: int, *values: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        struct.pack_into("<" + letters, changed, position, *values)
        return bytes(changed)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: b"", "too short"),
        (lambda content: b"GGUF", "too short"),
        (lambda content: b"PK\x03\x04" + content[4:], "letters GGUF"),
        (put("I", 4, 1), "version 1"),
        (put("I", 4, 3 << 24), "byte order"),
        (put("Q", 8, 0), "0 tensors"),
        (put("Q", 8, 1 << 62), "tensors"),
        (put("Q", 16, 1 << 62), "pairs"),
        (put("Q", 24, 1 << 63), "a name of"),  # the length of the first key
        (lambda content: content[: len(content) // 3], "are left|ends at byte"),
        (lambda content: content[:-64], "ends at byte"),
        (lambda content: content[:200], "are left"),
        (lambda content: content.replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.tokens"), "occurs twice"),
        (lambda content: content.replace(b"general.architecture", b"general.architectura"), "names no general.architecture"),
    ],
)
def test_headers_that_lie_are_refused(change: Callable[[bytes], bytes], words: str, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(change(small.read_bytes()))
    with pytest.raises(InvalidInput, match=words):
        read_gguf_header(path)


@pytest.mark.parametrize(
    ("kind", "count", "words"),
    [
        (6, 1 << 60, "allowed are"),
        (6, 1 << 21, "are left"),
        (8, 1 << 21, "are left"),
        (9, 1, "array of arrays"),
        (99, 1, "unknown type 99"),
    ],
)
def test_arrays_that_lie_are_refused(kind: int, count: int, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + key + struct.pack("<IQ", kind, count) + bytes(64))
    with pytest.raises(InvalidInput, match=words):
        read_gguf_header(path)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
def test_mutated_headers_are_refused_or_read_by_the_usual_reader(data: st.DataObject, small: Path, tmp_path: Path) -> None:
    """Bytes changed anywhere before the tensors' data: InvalidInput, or a file that the gguf package reads to the same sizes."""
    content = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    try:
        header = read_gguf_header(path)
    except InvalidInput:
        return
    assert {tensor.name: tensor.n_elements for tensor in gguf.GGUFReader(path).tensors} == header.tensors


@pytest.mark.parametrize(
    ("key", "value"), [("feed_forward_length", 1 << 31), ("context_length", (1 << 32) - 1), ("attention.head_count", 1 << 30)]
)
def test_metadata_that_ask_for_more_than_the_file_holds(key: str, value: int, small: Path, tmp_path: Path) -> None:
    """The header is in order; what it makes a model of is not. The process that converts is bounded, and its error comes back as ours."""
    content = small.read_bytes()
    position = content.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4  # past the key and its type
    path = tmp_path / "x.gguf"
    path.write_bytes(put("I", position, value)(content))
    if key == "context_length":  # a number like any other: it allocates nothing
        convert_gguf_apart(path, tmp_path / "out")
    else:
        with pytest.raises(InvalidInput, match=r"x\.gguf"):
            convert_gguf_apart(path, tmp_path / "out")


def test_a_callback_that_gives_up_ends_the_process(small: Path, tmp_path: Path) -> None:
    def give_up(stage: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_gguf_apart(small, tmp_path / "out", give_up)
    assert not (tmp_path / "out" / "model.safetensors").exists()
