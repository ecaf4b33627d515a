"""`precis export`: a variant as an ordinary model folder, for transformers and everything else that reads compressed-tensors.

The exported numbers are the variant's own: the same codes, scales and zero points, bit for bit, and the normalizations that a method
changed. What a recipe leaves alone is written in the floating type that is asked for. Imports torch.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from model_store.atomic import new_folder
from model_store.checkpoints import MANIFEST, Checkpoint
from model_store.formats.compressed_tensors import Exportable, expressible, layer_tensors, quantization_config, transformers_loads
from model_store.formats.safetensors import SafetensorsWriter
from model_store.inspection import INDEX, SINGLE, read_json
from model_store.store import Store
from quantizers.blocks import input_embedding, layer_shape, output_matrix
from quantizers.errors import InvalidInput, UnsupportedScheme
from quantizers.model import read_layers, replaced_tensors, stored_layers
from quantizers.recipe import Recipe, parse_recipe
from quantizers.skeleton import DTYPES, match_tensors, serving_dtype, skeleton
from quantizers.tensors import TensorSource
from server.console import bar
from server.settings import Settings

Dtype = Literal["bf16", "fp16", "fp32"]
Progress = Callable[[str, float], None]  # stage, share done from 0 to 1


def export_variant(settings: Settings, model: str, directory: Path, *, dtype: Dtype | None) -> None:
    """Export the variant that `model` names, `checkpoint@recipe`, with a bar on the terminal; `dtype` None is the recipe's.

    Raises InvalidInput for what is no such id, NotFound where it was not made, and what `export` raises.
    """
    name, at, slug = model.partition("@")
    if not at:
        raise InvalidInput(f"{model!r} names no variant: write checkpoint@recipe, such as {name or 'my-model'}@rtn-w4g64", param="variant")
    recipe = parse_recipe(slug)
    if recipe.is_baseline and dtype not in (None, recipe.dtype):
        raise InvalidInput(f"{model} is exported in {recipe.dtype} alone: leave --dtype out or name that baseline", param="dtype")
    with Store(settings.data_dir) as store, bar(f"exporting {model}") as share:
        checkpoint = store.checkpoints.get(name)
        artifact = None if recipe.is_baseline else store.variants.get(name, slug).tensors()
        done = export(checkpoint, recipe, artifact, directory, dtype=dtype or recipe.dtype, progress=share)
    formats = Counter(scheme.slug for scheme in done.layers.values())
    what = ", ".join(f"{each} x{count}" for each, count in formats.items()) or "nothing quantized"
    console = Console(stderr=True)
    console.print(f"{model}: {done.bytes / 1e6:.1f} MB of tensors, {what}, in {directory}", highlight=False, soft_wrap=True)
    if not transformers_loads(done.layers):
        console.print(
            "transformers 5.24 cannot load zero points in more than one format or beside int8 tokens, nor experts with either",
            highlight=False,
            soft_wrap=True,
        )


@dataclass(frozen=True)
class Exported:
    """bytes: of the tensors. layers: full name -> format, of those that are quantized."""

    directory: Path
    bytes: int
    layers: dict[str, Exportable]


def export(
    checkpoint: Checkpoint, recipe: Recipe, artifact: TensorSource | None, directory: Path, *, dtype: Dtype, progress: Progress
) -> Exported:
    """Write `directory`, which appears whole or not at all. A baseline has no artifact and becomes a folder in `dtype` without a
    quantization_config.

    Raises UnsupportedScheme for what the format cannot express, before anything is written; Conflict where `directory` has content;
    CorruptData where checkpoint and artifact do not fit.
    """
    model = skeleton(AutoConfig.from_pretrained(checkpoint.dir, local_files_only=True), DTYPES[dtype])
    layers = {} if artifact is None else _layers(model, recipe, artifact)
    with new_folder(directory) as folder:
        _copy_rest(checkpoint, folder)
        config = read_json(checkpoint.dir / "config.json")
        (folder / "config.json").write_text(json.dumps(_config(config, model, layers, dtype), indent=2) + "\n", encoding="utf-8")
        written = 0
        with SafetensorsWriter(folder / SINGLE) as writer:

            def put(name: str, tensor: Tensor) -> None:
                nonlocal written
                written += tensor.nbytes
                writer(name, tensor)

            _write(model, checkpoint.tensors(), recipe, artifact, layers, DTYPES[dtype], put, progress)
    return Exported(directory, written, layers)


def _layers(model: PreTrainedModel, recipe: Recipe, artifact: TensorSource) -> dict[str, Exportable]:
    embedding = None if recipe.embedding is None else input_embedding(model)
    stored = {name: scheme for name, scheme in stored_layers(model, recipe, artifact).items() if name != embedding}
    layers = {name: expressible(scheme, name) for name, scheme in stored.items()}
    for name in layers:
        if not isinstance(model.get_submodule(name), nn.Linear):
            raise UnsupportedScheme(
                f"{name} is a {type(model.get_submodule(name)).__name__}, and compressed-tensors quantizes nn.Linear only: "
                "serve this variant here, or export a baseline such as bf16",
                param="variant",
            )
    return layers


def _copy_rest(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer, chat template, generation config: everything but weights, their index and the config."""
    for name in checkpoint.files:
        if not name.endswith(".safetensors") and name not in (INDEX, MANIFEST, "config.json"):
            shutil.copyfile(checkpoint.dir / name, folder / name)


def _config(config: Mapping[str, Any], model: PreTrainedModel, layers: Mapping[str, Exportable], dtype: Dtype) -> dict[str, Any]:
    """The checkpoint's config.json with what changed. A quantized output matrix is no longer the embedding that it was tied to."""
    changed = {key: value for key, value in config.items() if key != "torch_dtype"}  # the name of `dtype` in older files
    changed["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    if _tied_to_quantized(model, layers):
        changed["tie_word_embeddings"] = False
    if layers:
        others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
        changed["quantization_config"] = quantization_config(layers, others)
    return changed


def _tied_to_quantized(model: PreTrainedModel, layers: Mapping[str, Exportable]) -> bool:
    return any(name.removesuffix(".weight") in layers for pair in model.all_tied_weights_keys.items() for name in pair)


def _write(
    model: PreTrainedModel,
    checkpoint: TensorSource,
    recipe: Recipe,
    artifact: TensorSource | None,
    layers: Mapping[str, Exportable],
    dtype: torch.dtype,
    put: Callable[[str, Tensor], None],
    progress: Progress,
) -> None:
    """Every tensor of the model once, a layer at a time, by the checkpoint's own names. A quantized embedding is multiplied out: loaders
    look rows up in floating point.
    """
    tensors = match_tensors(model, checkpoint)
    shared = Counter(tensors.values())
    stored = {} if artifact is None else stored_layers(model, recipe, artifact)
    embedding = None if recipe.embedding is None else input_embedding(model)
    keys = {name: tensors.pop(f"{name}.weight") for name in {*stored, *([embedding] if embedding else [])}}
    changed = replaced_tensors(model, recipe, tensors.keys(), artifact)
    done, total = 0, len(stored) + len(tensors)
    if artifact is not None:
        shapes = {name: layer_shape(model.get_submodule(name)) for name in stored}
        for name, weight in read_layers(artifact, stored, shapes, changed):
            if name in layers:
                # A tied output matrix leaves the embedding's name to the embedding.
                prefix = name if shared[keys[name]] > 1 else keys[name].removesuffix(".weight")
                for local, tensor in layer_tensors(weight).items():
                    exact = tensor.float() if dtype == torch.float32 and tensor.dtype == torch.float16 else tensor
                    put(f"{prefix}.{local}", exact)  # who reads fp16 scales also multiplies in fp16
            if embedding is not None and name == (embedding if embedding in stored else output_matrix(model)):
                put(keys[embedding], weight.dequantize().to(dtype))
            done += 1
            progress("layers", done / total)
    written = set()
    for name, key in tensors.items():
        done += 1
        if key in written:  # tied: one tensor fills both
            continue
        written.add(key)
        source = artifact.get(name) if artifact is not None and name in changed else checkpoint.get(key)
        put(key, source.to(serving_dtype(model, name, dtype)) if source.is_floating_point() else source)
        progress("other tensors", done / total)
