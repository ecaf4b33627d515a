"""Training with keys and values as a cache in bytes gives them back: int8 with a scale for each head and token, the gradient straight
through (Liu et al. 2023, LLM-QAT, arXiv 2305.17888, section 2.3.2).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantizers.kernels.kv_cache import quantize_heads


@contextmanager
def rounding_cache(model: PreTrainedModel) -> Iterator[None]:
    """Meanwhile `model` attends to keys, after their rotation, and values as the cache would hold them."""
    usual: str = model.config._attn_implementation
    name = f"precis_int8_cache_{usual}"
    AttentionInterface.register(name, _attention(usual))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[usual])
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _attention(usual: str) -> Callable[..., Any]:
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        inner = ALL_ATTENTION_FUNCTIONS.get(usual) or vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        return inner(module, query, rounded_heads(key), rounded_heads(value), *args, **kwargs)

    return attend


def rounded_heads(x: Tensor) -> Tensor:
    """`x` [..., dim] as its codes and scales give it back, with the gradient of the identity."""
    with torch.no_grad():
        codes, scales = quantize_heads(x)
        change = (codes * scales[..., None]).to(x.dtype) - x
    return x + change
