"""Mixtures of experts taken apart: transformers stacks the weights of all experts of a block into three dimensions, which no method here
and no kernel takes; here every expert has linear layers of its own, as checkpoints have them.
"""

import re
from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.integrations.moe import _default_apply_gate

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_NUMBER = re.compile(r"\.experts\.(\d+)\.")
# What transformers says of a stack: the gate's rows above the up projection's, [out, in], gated, no biases, nothing after an expert.
_PLAIN = {"is_concatenated": True, "is_transposed": False, "has_gate": True, "has_bias": False, "has_post_expert_norm": False}


class Expert(nn.Module):
    """One gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, act: nn.Module) -> None:
        """Of weights [inner, hidden], [inner, hidden] and [hidden, inner]."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return made


class Experts(nn.ModuleList):
    """The experts of one block, called as transformers calls its stack.

    every_token: each expert computes all tokens, whoever they are routed to, and the others count nothing. So calibration shows every
    expert every token, in one tensor that all of them share.
    """

    every_token = False

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """`hidden` [tokens, hidden_size]; `index` int64 and `weights` [tokens, k]: which experts a token goes to, and what each counts."""
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            if self.every_token:
                output += (weights * (index == number)).sum(-1, keepdim=True).to(output.dtype) * expert(hidden)
                continue
            tokens, places = torch.where(index == number)
            if len(tokens):
                output.index_add_(0, tokens, (expert(hidden[tokens]) * weights[tokens, places, None]).to(output.dtype))
        return output


def _linear(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def take_apart(model: nn.Module, *, every_token: bool = False) -> None:
    """Replace every stack of plain gated experts in `model` by `Experts`, whose weights are views of the stack's. Stacks of other kinds
    stay, and `linear_layers` refuses them.
    """
    for name, module in list(model.named_modules()):
        if _is_plain_stack(module):
            gate, up = module.gate_up_proj.detach().chunk(2, dim=1)
            experts = Experts(Expert(*each, module.act_fn) for each in zip(gate, up, module.down_proj.detach(), strict=True))
            experts.every_token = every_token
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, experts)


def _is_plain_stack(module: nn.Module) -> bool:
    shapes = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    return (
        shapes == dict.fromkeys(_PARTS, 3)
        and getattr(type(module), "_apply_gate", None) is _default_apply_gate
        and all(getattr(module, name, None) == value for name, value in _PLAIN.items())
    )


def has_experts(model: nn.Module) -> bool:
    return any(isinstance(module, Experts) for module in model.modules())


def routers(block: nn.Module, prefix: str = "") -> set[str]:
    """Full names of the linear layers beside experts that decide which of them count how much: never quantized."""
    return {
        f"{name}.{child}" if name else child
        for name, module in block.named_modules(prefix=prefix)
        if any(isinstance(each, Experts) for each in module.children())
        for child, layer in module.named_children()
        if isinstance(layer, nn.Linear)
    }


def names_in_checkpoints(model: PreTrainedModel, keys: Collection[str]) -> dict[str, str]:
    """Name that a tensor has in a `model` whose experts were taken apart -> its key among `keys`; every key by its own name too.

    transformers knows which families name tensors otherwise on disk and how it stacks experts; what its rules say of one expert's tensor
    is read from them.
    """
    rules = get_model_conversion_mapping(model, add_legacy=False)
    names: dict[str, str] = {}
    for key in keys:
        name = key
        for rule in rules:
            renamed, pattern = rule.rename_source_key(name)
            if pattern is None:
                continue
            stacks = isinstance(rule, WeightConverter)
            name = (_of_expert(name, renamed, rule.source_patterns.index(pattern)) or name) if stacks else renamed
        names[name] = key
    return names | {key: key for key in keys}


def _of_expert(name: str, stacked: str, place: int) -> str | None:
    """`name` of one expert's tensor, the `place`-th that goes into the tensor `stacked`, by the names that `Experts` has."""
    number = _NUMBER.search(name)
    parent, _, attribute = stacked.rpartition(".")
    parts = _PARTS.get(attribute, ())
    return f"{parent}.{number.group(1)}.{parts[place]}.weight" if number is not None and place < len(parts) else None
