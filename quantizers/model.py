"""From a checkpoint and an artifact to a model that runs: every tensor of both files and every parameter of the model accounted for."""

import gc
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantizers.blocks import decoder_blocks, input_embedding, layer_shape, linear_layers, output_matrix, replace
from quantizers.errors import CorruptData, InvalidInput
from quantizers.kernels import Kernel, LayerKind, select
from quantizers.kernels.reference import Reference
from quantizers.linear import QuantizedEmbedding, QuantizedLinear
from quantizers.packing import packed_width
from quantizers.recipe import Recipe
from quantizers.scheme import FloatScheme, IntegerScheme, MixedScheme
from quantizers.shared import SharedKey, SharedTensors
from quantizers.skeleton import DTYPES, match_tensors, put_tensor, serving_dtype, skeleton
from quantizers.tensors import TensorSource
from quantizers.weights import QuantizedScheme, QuantizedWeight, tensor_specs

UNQUANTIZED_KERNEL = "torch"


@dataclass
class LoadedModel:
    """A model in memory. `bytes` by kind sum to what it holds; `shared_weights` may be held for others too. `close` gives all back."""

    model: PreTrainedModel
    kernels: dict[str, int]  # kernel name -> linear layers that it runs; `torch` runs the unquantized ones
    bytes: dict[str, int]  # `weights`: this variant's own; `shared_weights`: in the cache of shared tensors
    bytes_by_dtype: dict[str, int]
    _shared: SharedTensors
    _keys: list[SharedKey] = field(default_factory=list)

    def close(self) -> None:
        """Release the shared tensors and drop the rest. A second call does nothing."""
        keys, self._keys = self._keys, []
        for key in keys:
            self._shared.release(key)
        for module in self.model.modules():  # whoever still refers to the model holds an empty one
            module._parameters = dict.fromkeys(module._parameters)
            module._buffers = dict.fromkeys(module._buffers)
        gc.collect()


@dataclass
class _Plan:
    """The empty model of a recipe, and where each of its tensors comes from."""

    model: PreTrainedModel
    quantized: dict[str, QuantizedLinear]  # by full name, filled from the artifact
    tensors: dict[str, str]  # full name of a parameter or persistent buffer -> key in the checkpoint
    own: set[str]  # keys of weights that no other recipe of this dtype uses
    replaced: set[str]  # full names of unquantized tensors of blocks that the artifact holds, changed by a method
    dtype: torch.dtype


def load_model(
    config: PretrainedConfig,
    recipe: Recipe,
    checkpoint: TensorSource,
    artifact: TensorSource | None,
    *,
    device: str,
    shared: SharedTensors,
    checkpoint_key: str,
) -> LoadedModel:
    """Build the model of `config` in `recipe`'s precision on `device`. A baseline has no artifact.

    `checkpoint_key` names the checkpoint's content: variants that are loaded with the same key and dtype share their unquantized
    tensors. On the CPU a tensor that already has its dtype may be the source's own view of a file; it counts as held.

    Raises CorruptData where a tensor is missing, left over, of another shape or format; InvalidInput where recipe and artifact do not
    go together.
    """
    return _load(config, recipe, checkpoint, artifact, torch.device(device), shared, checkpoint_key, DTYPES[recipe.dtype], select)


def load_reference(
    config: PretrainedConfig,
    recipe: Recipe,
    checkpoint: TensorSource,
    artifact: TensorSource,
    *,
    device: str,
    shared: SharedTensors,
    checkpoint_key: str,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """The same numbers as `load_model` serves, by the reference kernel of each format: in fp32 nothing is rounded but what the format
    says. What a recipe leaves alone is the checkpoint's, in `dtype`. Raises as `load_model` does.
    """
    return _load(config, recipe, checkpoint, artifact, torch.device(device), shared, checkpoint_key, dtype, Reference)


def _load(
    config: PretrainedConfig,
    recipe: Recipe,
    checkpoint: TensorSource,
    artifact: TensorSource | None,
    device: torch.device,
    shared: SharedTensors,
    checkpoint_key: str,
    dtype: torch.dtype,
    choose: Callable[[LayerKind], Kernel],
) -> LoadedModel:
    if recipe.is_baseline != (artifact is None):
        raise InvalidInput(
            f"{recipe.slug} is a baseline and has no artifact" if recipe.is_baseline else f"{recipe.slug} needs an artifact: quantize first"
        )
    plan = _plan(config, recipe, checkpoint, artifact, device, dtype, choose)
    if artifact is not None:
        _fill_quantized(plan.quantized, plan.replaced, artifact)
        for name in plan.replaced:
            served = serving_dtype(plan.model, name, plan.dtype)
            put_tensor(plan.model, name, artifact.get(name).to(device=device, dtype=served))
    keys: list[SharedKey] = []
    try:
        _fill_unquantized(plan, checkpoint, device, shared, checkpoint_key, keys)
        return _measured(plan, shared, keys)
    except BaseException:
        for key in keys:
            shared.release(key)
        raise


def predict_bytes(
    config: PretrainedConfig, recipe: Recipe, checkpoint: TensorSource, artifact: TensorSource | None = None, *, device: str = "cpu"
) -> dict[str, int]:
    """What `load_model` will hold, by kind, from shapes alone: `weights` and `shared_weights`. Raises as `load_model` does.

    Without an artifact (there may be none yet) the norms that a method is going to change count as shared.
    """
    plan = _plan(config, recipe, checkpoint, artifact, torch.device(device), DTYPES[recipe.dtype], select)
    sizes: dict[str, int] = {}
    for name, key in plan.tensors.items():
        sizes[key] = checkpoint_numel(checkpoint, key) * serving_dtype(plan.model, name, plan.dtype).itemsize
    weights = sum(size for key, size in sizes.items() if key in plan.own)
    shared = sum(size for key, size in sizes.items() if key not in plan.own)
    wanted = plan.model.state_dict(keep_vars=True)
    weights += sum(wanted[name].numel() * serving_dtype(plan.model, name, plan.dtype).itemsize for name in plan.replaced)
    weights += sum(buffer.nbytes for layer in plan.quantized.values() for buffer in layer.buffers())
    weights += sum(buffer.nbytes for _, _, buffer in _computed_buffers(plan.model))
    return {"weights": weights, "shared_weights": shared}


def checkpoint_numel(checkpoint: TensorSource, key: str) -> int:
    return torch.Size(checkpoint.shape(key)).numel()


def _plan(
    config: PretrainedConfig,
    recipe: Recipe,
    checkpoint: TensorSource,
    artifact: TensorSource | None,
    device: torch.device,
    dtype: torch.dtype,
    choose: Callable[[LayerKind], Kernel],
) -> _Plan:
    model = skeleton(config, dtype)
    matched = match_tensors(model, checkpoint)
    tensors = dict(matched)
    quantized: dict[str, QuantizedLinear] = {}
    own: set[str] = set()
    if isinstance(recipe.scheme, FloatScheme):
        blocks = decoder_blocks(model)
        own = {tensors[f"{name}.weight"] for prefix, block in blocks.items() for name in linear_layers(block, prefix)}
    for name, scheme in stored_layers(model, recipe, artifact).items():
        layer = model.get_submodule(name)
        rows, columns = layer_shape(layer)
        quantized[name] = QuantizedLinear(scheme, columns, rows, bias=_has_bias(layer), dtype=dtype, device=device, choose=choose)
        del tensors[f"{name}.weight"]
    embedding = _embedding(model, quantized, matched) if recipe.embedding is not None else {}
    for name in embedding:
        tensors.pop(f"{name}.weight", None)
    replaced = replaced_tensors(model, recipe, tensors.keys(), artifact)
    fill_computed_buffers(model, device)
    replace(model, quantized)
    replace(model, embedding)
    return _Plan(model, quantized, {name: key for name, key in tensors.items() if name not in replaced}, own, replaced, dtype)


def _has_bias(layer: nn.Module) -> bool:
    return getattr(layer, "bias", None) is not None


def _embedding(model: PreTrainedModel, quantized: dict[str, QuantizedLinear], matched: dict[str, str]) -> dict[str, QuantizedEmbedding]:
    """Full name -> the embedding over its own matrix among `quantized`, or over the output matrix that it is tied to.

    Raises InvalidInput where the checkpoint holds two different matrices though the architecture ties them.
    """
    name = input_embedding(model)
    if name in quantized:
        return {name: QuantizedEmbedding(quantized[name])}
    head = output_matrix(model)
    if matched[f"{name}.weight"] != matched[f"{head}.weight"]:
        raise InvalidInput(
            f"the config ties {name} to {head}, but the checkpoint holds two different matrices: set tie_word_embeddings to false in "
            "config.json, or leave -embed8 out",
            param="model",
        )
    return {name: QuantizedEmbedding(quantized[head])}


def replaced_tensors(model: PreTrainedModel, recipe: Recipe, unquantized: Collection[str], artifact: TensorSource | None) -> set[str]:
    """Full names of those of the `unquantized` tensors of blocks that `artifact` holds. Raises CorruptData for one of another shape."""
    if artifact is None or not any(method.changes_unquantized for method in recipe.methods):
        return set()
    inside = tuple(f"{name}." for name in decoder_blocks(model))
    found = {name for name in set(artifact.keys()) & set(unquantized) if name.startswith(inside)}
    wanted = model.state_dict(keep_vars=True)
    for name in found:
        if tuple(artifact.shape(name)) != tuple(wanted[name].shape):
            raise CorruptData(f"{name} of the artifact has the shape {list(artifact.shape(name))}, not {list(wanted[name].shape)}")
        if not artifact.dtype(name).is_floating_point or not bool(torch.isfinite(artifact.get(name)).all()):
            raise CorruptData(f"{name} of the artifact holds values that are not finite numbers: delete the variant and quantize again")
    return found


def recipe_layers(model: PreTrainedModel, recipe: Recipe) -> dict[str, QuantizedScheme | MixedScheme]:
    """Full name -> number format of the layers of an unquantized `model` that `recipe` quantizes, in the order of the walk.

    After the decoder's layers come the embedding, where it has a matrix of its own, and the output matrix.

    Raises InvalidInput for an override that fits no layer, and for an embedding that is tied to an output matrix that stays as it is.
    """
    layers: dict[str, QuantizedScheme | MixedScheme] = {}
    if recipe.is_baseline:
        return layers
    names = [name for prefix, block in decoder_blocks(model).items() for name in linear_layers(block, prefix)]
    for override in recipe.overrides:
        if not any(override.fits(name) for name in names):
            raise InvalidInput(
                f"the override {override.slug!r} fits no layer of {type(model).__name__}, from {names[0]!r} to {names[-1]!r}: "
                "a path is made of whole names between the dots, without underscores",
                param="model",
            )
    for name in names:
        scheme = recipe.scheme_of(name)
        if not isinstance(scheme, FloatScheme):
            layers[name] = scheme
    if recipe.embedding is not None and not embedding_is_tied(model):
        layers[input_embedding(model)] = recipe.embedding
    elif recipe.embedding is not None and recipe.head is None:
        raise InvalidInput(
            f"{type(model).__name__} has one matrix for its embedding and its output, which {recipe.slug} would hold twice: "
            f"use {recipe.slug.removesuffix('-embed8')}-head8-embed8",
            param="model",
        )
    if recipe.head is not None:
        layers[output_matrix(model)] = recipe.head
    return layers


def embedding_is_tied(model: PreTrainedModel) -> bool:
    """Whether the architecture has one matrix for the token embedding and the output."""
    names = {f"{input_embedding(model)}.weight", f"{output_matrix(model)}.weight"}
    return any({target, origin} == names for target, origin in model.all_tied_weights_keys.items())


def stored_layers(model: PreTrainedModel, recipe: Recipe, artifact: TensorSource | None) -> dict[str, QuantizedScheme]:
    """`recipe_layers`, with the format that each layer of a mixed recipe has in `artifact`. Raises CorruptData where it has none."""
    return {
        name: _given(scheme, artifact, name, layer_shape(model.get_submodule(name))[1]) if isinstance(scheme, MixedScheme) else scheme
        for name, scheme in recipe_layers(model, recipe).items()
    }


def _given(scheme: MixedScheme, artifact: TensorSource | None, name: str, columns: int) -> IntegerScheme:
    """The format that a layer was given, read from the shape of its codes; without an artifact one that the budget affords everywhere."""
    if artifact is None:
        return max(
            (choice for choice in scheme.choices if choice.bits_per_weight(columns) <= scheme.bits), key=lambda each: each.weight_bits
        )
    key = f"{name}.codes"
    width = artifact.shape(key)[-1] if key in artifact.keys() else None  # noqa: SIM118  a source of tensors is no mapping
    choice = next((choice for choice in scheme.choices if packed_width(columns, choice.weight_bits) == width), None)
    if choice is None:
        raise CorruptData(f"{key} of the artifact has rows of {width} bytes: none of the widths of {scheme.slug} makes such rows")
    return choice


def _fill_quantized(layers: dict[str, QuantizedLinear], replaced: set[str], artifact: TensorSource) -> None:
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    for name, weight in read_layers(artifact, {name: layer.scheme for name, layer in layers.items()}, shapes, replaced):
        try:
            layers[name].load(weight)
        except CorruptData as error:
            raise CorruptData(f"{name}: {error.message}") from error


def read_layers(
    artifact: TensorSource, schemes: Mapping[str, QuantizedScheme], shapes: Mapping[str, tuple[int, int]], replaced: Collection[str]
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Full name and weight of every layer of `artifact`, one at a time. `shapes`: (out_features, in_features) of each.

    Raises CorruptData, before the first, where the artifact lacks a tensor or has one that is neither a layer's nor `replaced`.
    """
    specs = {name: tensor_specs(scheme, *shapes[name]) for name, scheme in schemes.items()}
    expected = {f"{name}.{tensor}" for name, tensors in specs.items() for tensor in tensors}
    found = set(artifact.keys()) - set(replaced)
    if found != expected:
        missing, unexpected = sorted(expected - found)[:5], sorted(found - expected)[:5]
        raise CorruptData(f"the artifact is not this recipe's: it lacks {missing or 'nothing'} and has {unexpected or 'nothing'} beyond it")
    for name, scheme in schemes.items():
        tensors = {tensor: artifact.get(f"{name}.{tensor}") for tensor in specs[name]}
        try:
            weight = QuantizedWeight(scheme, *shapes[name], tensors)
        except CorruptData as error:
            raise CorruptData(f"{name}: {error.message}") from error
        yield name, weight


def _fill_unquantized(
    plan: _Plan, checkpoint: TensorSource, device: torch.device, shared: SharedTensors, checkpoint_key: str, keys: list[SharedKey]
) -> None:
    """Tied names get one Parameter. What is acquired from `shared` is noted in `keys` at once, so that a failure can give it back."""
    parameters: dict[str, nn.Parameter] = {}
    for name, key in plan.tensors.items():
        if key not in parameters:
            dtype = serving_dtype(plan.model, name, plan.dtype)
            if key in plan.own:
                tensor = _fetch(checkpoint, key, dtype, device)
            else:
                shared_key = (checkpoint_key, key, dtype, device)
                tensor = shared.acquire(shared_key, lambda key=key, dtype=dtype: _fetch(checkpoint, key, dtype, device))  # type: ignore[misc]
                keys.append(shared_key)
            parameters[key] = nn.Parameter(tensor, requires_grad=False)
        put_tensor(plan.model, name, parameters[key])


def _fetch(checkpoint: TensorSource, key: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = checkpoint.get(key)
    if not tensor.is_floating_point():
        return tensor.to(device)
    return tensor.to(device=device, dtype=dtype)


def _computed_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """(module, name, buffer) of every buffer that no file holds, such as the rotary frequencies."""
    return [
        (module, name, module._buffers[name])  # type: ignore[misc]
        for module in model.modules()
        for name in sorted(module._non_persistent_buffers_set)
        if module._buffers[name] is not None
    ]


def fill_computed_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """As `from_pretrained` does: the model's own initialization computes them. It runs before layers are replaced, whose weights an
    architecture's initialization may ask for, and is told that every parameter has its value: none are drawn.

    A model initializes itself only once, so a second call leaves everything as it is, and buffers must be kept until then.
    """
    missing = [(module, name, buffer) for module, name, buffer in _computed_buffers(model) if buffer.device.type == "meta"]
    for module, name, buffer in missing:
        module._buffers[name] = torch.empty_like(buffer, device=device)
    if missing:
        for parameter in model.parameters():
            parameter._is_hf_initialized = True
        model.initialize_weights()


def _measured(plan: _Plan, shared: SharedTensors, keys: list[SharedKey]) -> LoadedModel:
    held: dict[int, Tensor] = {}
    for name, tensor in [*plan.model.named_parameters(), *plan.model.named_buffers()]:
        if tensor.device.type == "meta":
            raise CorruptData(f"{name} was filled by neither the checkpoint nor the artifact nor the model's own initialization")
        held[id(tensor)] = tensor
    total = sum(tensor.nbytes for tensor in held.values())
    by_dtype: Counter[str] = Counter()
    for tensor in held.values():
        by_dtype[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    shared_keys = {key for key in plan.tensors.values() if key not in plan.own}
    shared_bytes = sum({key: _tensor(plan.model, name).nbytes for name, key in plan.tensors.items() if key in shared_keys}.values())
    kernels = Counter(
        module.kernel if isinstance(module, QuantizedLinear) else UNQUANTIZED_KERNEL
        for module in plan.model.modules()
        if isinstance(module, QuantizedLinear | nn.Linear | Conv1D)
    )
    return LoadedModel(
        plan.model, dict(kernels), {"weights": total - shared_bytes, "shared_weights": shared_bytes}, dict(by_dtype), shared, keys
    )


def _tensor(model: nn.Module, name: str) -> Tensor:
    parent, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(parent), attribute)  # type: ignore[no-any-return]
