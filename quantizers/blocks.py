"""Finding the decoder blocks and the linear layers of a model from its module tree, whatever the architecture is called."""

from collections.abc import Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

from quantizers.errors import InvalidInput
from quantizers.experts import routers

# Subclasses that compute just what `nn.Linear` does. Any other may not, so it is not taken for one.
_PLAIN = frozenset({"FalconLinear"})


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Full name -> module of the decoder blocks in order: the members of the largest ModuleList of equal-class modules with linear layers.

    Raises InvalidInput where there is none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and _is_stack(module)}
    if not lists:
        raise InvalidInput(
            f"{type(model).__name__} has no list of equal decoder blocks with linear layers, so it cannot be quantized block by block; "
            "serve one of its baselines",
            param="model",
        )
    name = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    return {f"{name}.{index}": block for index, block in enumerate(lists[name])}


def _is_stack(modules: nn.ModuleList) -> bool:
    return len(modules) > 0 and len({type(module) for module in modules}) == 1 and bool(linear_layers(modules[0]))


def linear_layers(block: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Full name -> module of the layers that a recipe quantizes inside `block`: `nn.Linear` and GPT-2's Conv1D, whose weight is transposed.

    Routers beside experts are left out. Raises InvalidInput for weights that are neither and would be left alone in silence, such as
    experts that are stacked in another way than `quantizers.experts` takes apart.
    """
    layers: dict[str, nn.Module] = {}
    left_out = routers(block, prefix)
    for name, module in block.named_modules(prefix=prefix):
        if name in left_out:
            continue
        if type(module) in (nn.Linear, Conv1D) or (isinstance(module, nn.Linear) and type(module).__name__ in _PLAIN):
            layers[name] = module
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 2:
                raise InvalidInput(
                    f"{name}.{parameter_name} is a weight of shape {list(parameter.shape)} outside any linear layer (stacked experts): "
                    "no method here quantizes it; serve one of the model's baselines",
                    param="model",
                )
    return layers


def output_matrix(model: nn.Module) -> str:
    """Full name of the output matrix (lm_head). Raises InvalidInput where the model has none that is an `nn.Linear`."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if module is head and type(module) is nn.Linear:
            return str(name)
    raise InvalidInput(f"{type(model).__name__} has no linear output matrix, so no recipe with -head8 applies to it", param="model")


def input_embedding(model: nn.Module) -> str:
    """Full name of the token embedding. Raises InvalidInput where it is no plain `nn.Embedding`, such as one that scales its rows."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if module is embedding and type(module) is nn.Embedding:
            return str(name)
    raise InvalidInput(
        f"{type(model).__name__} looks tokens up in {type(embedding).__name__}, which is no plain embedding, so no recipe with -embed8 "
        "applies to it",
        param="model",
    )


def layer_shape(layer: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of an `nn.Linear` or Conv1D."""
    rows, columns = layer.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put each module in the place of the one that has its name."""
    for name, module in modules.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)
