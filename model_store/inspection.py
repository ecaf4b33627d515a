"""What a folder must be to become a checkpoint: the rules, each a refusal in words, and the facts that are read on the way.

Only names, sizes, JSON and safetensors headers are read: no tensor, no torch, and nothing of the folder is executed.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from model_store.architectures import check_architecture
from model_store.formats.safetensors_header import TensorEntry, read_header
from quantizers.errors import InvalidInput

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
KEPT = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")  # what a model is made of; a folder's other files stay behind
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON_BYTES = 64 << 20  # the largest tokenizer.json in use has about 35 MB
DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}

# One fact, the names that the families give it
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_FILENAME = re.compile(r"[^/\\\x00-\x1f\x7f]{1,255}")


class ConfigFacts(BaseModel):
    """Read from config.json and the headers. `dtype` is that of most bytes of the weights; no `max_position_embeddings`: no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: str
    vocab_size: int = Field(gt=0)
    max_position_embeddings: int | None = Field(gt=0)
    num_layers: int = Field(gt=0)
    dtype: str


def check_name(name: str) -> None:
    """Raises InvalidInput where `name` cannot name a checkpoint: in model ids '@' parts it from the recipe, and folders bear it."""
    if not _NAME.fullmatch(name) or name.endswith("."):
        raise InvalidInput(
            f"{name[:80]!r} cannot name a checkpoint: use 1 to 64 of a-z, 0-9, '.' and '-', a letter or digit first and no '.' last",
            param="name",
        )


def check_filename(filename: str) -> None:
    """Raises InvalidInput for anything but the plain name of one file."""
    if (
        not _FILENAME.fullmatch(filename)
        or len(filename.encode(errors="replace")) > 255
        or filename.startswith(".")
        or filename.strip() != filename
    ):
        raise InvalidInput(
            f"{filename[:80]!r} is no plain file name: it needs 1 to 255 bytes without '/', '\\' and control characters, "
            "no '.' or space first and no space last",
            param="filename",
        )


def check_files(files: Mapping[str, Path]) -> None:
    """Raises InvalidInput where a name or kind of file is not allowed in a checkpoint."""
    for filename, path in files.items():
        check_filename(filename)
        if filename.lower().endswith(PICKLES):
            raise InvalidInput(
                f"{filename} is of a format that can run code when it is read: remove it, and bring the weights as safetensors "
                "(transformers' save_pretrained writes them)",
                param="files",
                code="unsafe_format",
            )
        if not filename.endswith(KEPT):
            raise InvalidInput(f"{filename} is no part of a checkpoint: its files end in {', '.join(KEPT)}", param="files")
        if path.is_symlink() or not path.is_file():
            raise InvalidInput(f"{filename} is a link or no file: copy what it points to in its place", param="files")


def inspect(folder: Path) -> ConfigFacts:
    """The facts of a folder with exactly the files of one checkpoint. Raises InvalidInput for what is missing, wrong or left over."""
    if not (folder / "config.json").exists():
        raise InvalidInput("config.json is missing: a checkpoint has config.json, tokenizer files and *.safetensors", param="files")
    config = read_json(folder / "config.json")
    _refuse_code_and_quantization(config)
    model_type = check_architecture(config.get("model_type"), config.get("architectures"))
    _check_tokenizer(folder)
    entries = _check_weights(folder)
    text = config.get("text_config", config)  # families that also see keep the language model's facts one level down
    if not isinstance(text, dict):
        raise InvalidInput("config.json has a text_config that is no object", param="files")
    return ConfigFacts(
        model_type=model_type,
        vocab_size=_required(_count(text, ("vocab_size",)), "vocab_size"),
        num_layers=_required(_count(text, LAYERS), " or ".join(LAYERS)),
        max_position_embeddings=_count(text, POSITIONS),
        dtype=_dominant_dtype(entries),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InvalidInput where it is too large, broken or something else."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InvalidInput(f"{path.name} has {path.stat().st_size} bytes, allowed are {MAX_JSON_BYTES}", param="files")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path.name} is not valid JSON: {error}", param="files") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{path.name} is not a JSON object", param="files")
    return value


def _refuse_code_and_quantization(config: Mapping[str, Any]) -> None:
    if "auto_map" in config:
        raise InvalidInput(
            "config.json has auto_map: the model brings code of its own, which Precis never runs (no trust_remote_code). "
            "Use a model whose architecture transformers itself has",
            param="files",
            code="remote_code",
        )
    if config.get("quantization_config") is not None:
        raise InvalidInput(
            "config.json has quantization_config: the weights are quantized already. Import the original, Precis quantizes it by a recipe",
            param="files",
            code="already_quantized",
        )


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).exists() for name in TOKENIZERS):
        raise InvalidInput(f"the tokenizer is missing: one of {', '.join(TOKENIZERS)} is needed", param="files")
    for path in folder.glob("*.json"):
        content = read_json(path)
        if path.name == "tokenizer_config.json" and "auto_map" in content:
            raise InvalidInput(
                "tokenizer_config.json has auto_map: a tokenizer with code of its own is never run", param="files", code="remote_code"
            )


def _check_weights(folder: Path) -> list[TensorEntry]:
    present = {path.name for path in folder.glob("*.safetensors")}
    if (folder / INDEX).exists():
        mapping = read_json(folder / INDEX).get("weight_map")
        if not isinstance(mapping, dict) or not mapping or not all(isinstance(shard, str) for shard in mapping.values()):
            raise InvalidInput(f"{INDEX} has no weight_map of tensor names to file names", param="files")
        expected = set(mapping.values())
    else:
        mapping, expected = None, {SINGLE}
    if present != expected:
        missing, extra = sorted(expected - present), sorted(present - expected)
        raise InvalidInput(
            f"the weights are not whole: missing {_listed(missing)}, not called for {_listed(extra)}. "
            f"A checkpoint has {SINGLE}, or {INDEX} and every shard that it names",
            param="files",
        )
    held: dict[str, str] = {}
    entries: list[TensorEntry] = []
    for shard in sorted(present):
        header = read_header(folder / shard)
        for name in header.keys() & held.keys():
            raise InvalidInput(f"tensor {name!r} is in {held[name]} and again in {shard}", param="files")
        held.update(dict.fromkeys(header, shard))
        entries.extend(header.values())
    if mapping is not None and mapping != held:
        wrong = sorted(name for name in mapping.keys() | held.keys() if mapping.get(name) != held.get(name))
        raise InvalidInput(f"{INDEX} and the shards disagree about {_listed(wrong)}", param="files")
    return entries


def _dominant_dtype(entries: list[TensorEntry]) -> str:
    sizes: Counter[str] = Counter()
    for entry in entries:
        sizes[entry.dtype] += entry.bytes
    dtype = sizes.most_common(1)[0][0] if sizes else None
    if dtype not in DTYPES:
        raise InvalidInput(f"most of the weights are {dtype}; a checkpoint holds {', '.join(DTYPES)}", param="files")
    return DTYPES[dtype]


def _count(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if type(value) is not int or not 0 < value < 1 << 31:
            raise InvalidInput(f"config.json has {name} {str(value)[:40]!r}, which is no positive number", param="files")
        return value
    return None


def _required(value: int | None, what: str) -> int:
    if value is None:
        raise InvalidInput(f"config.json lacks {what}", param="files")
    return value


def _listed(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:5])
    return (shown + f" and {len(names) - 5} more" if len(names) > 5 else shown) or "nothing"
