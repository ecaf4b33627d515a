"""The model without its weights: the architecture's own code on the meta device, and which tensor of a checkpoint fills which parameter."""

import copy
import re
import threading

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from quantizers.errors import CorruptData, InvalidInput
from quantizers.experts import names_in_checkpoints, take_apart
from quantizers.tensors import TensorSource

# Building a model sets torch's default dtype, which is one for all threads of the process: whoever computes beside a thread that
# loads holds this meanwhile.
BUILDING = threading.Lock()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Buffers that old checkpoints stored and that every model now computes; transformers passes over them too.
_COMPUTED = (r"(^|\.)rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"(^|\.)attn\.(masked_)?bias$")


def skeleton(config: PretrainedConfig, dtype: torch.dtype, *, every_token: bool = False) -> PreTrainedModel:
    """The causal language model of `config`, in evaluation mode, every parameter and buffer on the meta device,
    each of a mixture's experts with layers of its own. `every_token`: each of them is shown all tokens (`quantizers.experts`).

    Code that comes with a checkpoint is never run.

    Raises InvalidInput where transformers has no such architecture.
    """
    try:
        with BUILDING, torch.device("meta"):
            model = _build(config, dtype)
            take_apart(model, every_token=every_token)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise InvalidInput(
            f"transformers cannot build a causal language model of this config (model_type "
            f"{getattr(config, 'model_type', None)!r}): {error}",
            param="model",
        ) from error
    model.requires_grad_(False)
    return model.eval()


def _build(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """With sdpa attention, or where an architecture's attention is none that sdpa can do (Gemma 2 caps its scores), with its own."""
    supported = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_supports_sdpa", True)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa" if supported else "eager", trust_remote_code=False
    )
    return model


def match_tensors(model: PreTrainedModel, source: TensorSource) -> dict[str, str]:
    """Name of every parameter and persistent buffer of `model` -> name of the tensor of `source` that fills it; tied names share one.

    Raises CorruptData where a tensor is missing, left over or of another shape than the parameter.
    """
    keys = set(source.keys())
    wanted = model.state_dict(keep_vars=True)
    names = names_in_checkpoints(model, keys)
    found = {name: key for name in wanted if (key := _key(name, names, model.base_model_prefix)) is not None}
    used = set(found.values())
    for target, origin in model.all_tied_weights_keys.items():
        _tie(found, target, origin, source)
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise CorruptData(f"the checkpoint lacks {len(missing)} tensors that the model needs: {_some(missing)}")
    ignored = (*_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ()))
    unexpected = sorted(key for key in keys - used if not any(re.search(pattern, key) for pattern in ignored))
    if unexpected:
        raise CorruptData(f"the checkpoint has {len(unexpected)} tensors that the model has no place for: {_some(unexpected)}")
    for name, key in found.items():
        if tuple(wanted[name].shape) != tuple(source.shape(key)):
            raise CorruptData(f"{key} has the shape {list(source.shape(key))}, the config asks for {list(wanted[name].shape)}")
    return found


def _key(name: str, keys: dict[str, str], prefix: str) -> str | None:
    """Checkpoints of a base model leave the base's prefix out, as GPT-2's do, or have it where the model does not."""
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if candidate in keys:
            return keys[candidate]
    return None


def _tie(found: dict[str, str], target: str, origin: str, source: TensorSource) -> None:
    """The rule of transformers: whichever of the two is present fills both; two that differ are not tied."""
    if target not in found and origin in found:
        found[target] = found[origin]
    elif origin not in found and target in found:
        found[origin] = found[target]
    elif target in found and found[target] != found[origin]:
        first, second = source.get(found[target]), source.get(found[origin])
        if first.shape == second.shape and torch.equal(first, second):
            found[target] = found[origin]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def serving_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the parameter `name` runs in a model of `dtype`: an architecture may keep some in fp32."""
    kept = set(model._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    return torch.float32 if any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in kept) else dtype


def put_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make `tensor` (a Parameter where the model has one) the parameter or buffer that has this full name."""
    parent, _, attribute = name.rpartition(".")
    module = model.get_submodule(parent)
    if attribute in module._parameters:
        module._parameters[attribute] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[attribute] = tensor
