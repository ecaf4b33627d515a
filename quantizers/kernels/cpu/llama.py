"""What the native step reads of a transformers model: which module is what, found from the module tree; or why it cannot run the model.

The classes of `FAMILIES` are those whose forward is the one of native/step.cpp. Their module trees say the rest: biases, norms of queries
and keys, windows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.errors import InvalidInput
from quantizers.kernels.cpu import library
from quantizers.kernels.native import NativeWeightOnly
from quantizers.linear import QuantizedEmbedding, QuantizedLinear

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the length of the text
_KINDS = {torch.bfloat16: library.BF16, torch.float32: library.FP32}
_HEAD_DIM_STEP = 16  # heads are read in whole vectors


@dataclass(frozen=True)
class Block:
    """Linear layers and norms of one decoder block; `window` 0 where a token attends to all before it."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int

    def linears(self) -> Iterator[nn.Module]:
        return iter((self.q, self.k, self.v, self.o, self.gate, self.up, self.down))


@dataclass(frozen=True)
class Facts:
    """A model that the native step runs."""

    blocks: tuple[Block, ...]
    embedding: Tensor | QuantizedLinear  # [vocab, hidden], bf16 or fp32, or the matrix that holds its rows
    final_norm: Tensor
    head: nn.Module
    rotary: nn.Module
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    epsilon: float
    scaling: float
    dtype: torch.dtype


def why_not(model: nn.Module) -> str | None:
    """Why the native step cannot run `model`; None where it can."""
    try:
        read(model)
    except InvalidInput as error:
        return error.message
    return None


def read(model: nn.Module) -> Facts:
    """Raises InvalidInput saying what the native step lacks for `model`."""
    reason = library.missing()
    if reason is not None:
        raise InvalidInput(f"the native kernels are {reason}")
    name = type(model).__name__
    if name not in FAMILIES:
        raise InvalidInput(f"{name} is none of the architectures that the native step runs: {', '.join(FAMILIES)}")
    tree: Any = model
    facts = _facts(tree)
    for module in (*(linear for block in facts.blocks for linear in block.linears()), facts.head):
        _check_linear(module)
    if facts.head_dim % _HEAD_DIM_STEP or facts.hidden % library.INPUTS:
        raise InvalidInput(
            f"head_dim {facts.head_dim} and hidden size {facts.hidden} must be multiples of {_HEAD_DIM_STEP} and {library.INPUTS}"
        )
    return facts


def _facts(tree: Any) -> Facts:
    config, base = tree.config, tree.model
    if config.hidden_act not in ("silu", "swish"):
        raise InvalidInput(f"the native step has the activation function silu, not {config.hidden_act!r}")
    rope = getattr(base.rotary_emb, "rope_type", "default")
    if rope not in _ROPE_TYPES:
        raise InvalidInput(
            f"rotary embeddings of type {rope!r} depend on the length of the text; the native step has {', '.join(_ROPE_TYPES)}"
        )
    attention, embedding, norm = base.layers[0].self_attn, _embedding(base.embed_tokens), base.norm.weight
    if norm.dtype not in _KINDS or norm.device.type != "cpu":
        raise InvalidInput(f"the native step runs bf16 and fp32 on a CPU, not {norm.dtype} on {norm.device.type}")
    if 2 * base.rotary_emb.inv_freq.numel() != attention.head_dim:
        raise InvalidInput(
            f"rotary embeddings turn {2 * base.rotary_emb.inv_freq.numel()} of {attention.head_dim} dimensions: the native step turns all"
        )
    return Facts(
        blocks=tuple(_block(layer, config) for layer in base.layers),
        embedding=embedding,
        final_norm=base.norm.weight,
        head=tree.lm_head,
        rotary=base.rotary_emb,
        hidden=norm.numel(),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        intermediate=config.intermediate_size,
        vocab=base.embed_tokens.num_embeddings,
        epsilon=base.norm.variance_epsilon,
        scaling=attention.scaling,
        dtype=norm.dtype,
    )


def _embedding(module: nn.Module) -> Tensor | QuantizedLinear:
    if isinstance(module, QuantizedEmbedding):
        _check_linear(module.matrix)
        return module.matrix
    if type(module) is not nn.Embedding:
        raise InvalidInput(f"the native step looks tokens up in an embedding, not in {type(module).__name__}")
    return module.weight


def _block(layer: Any, config: Any) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    # Mistral has one window for all layers in its config; Qwen has a layer's own in its attention.
    window = attention.sliding_window if hasattr(attention, "sliding_window") else getattr(config, "sliding_window", None)
    norms = [getattr(attention, name).weight if hasattr(attention, name) else None for name in ("q_norm", "k_norm")]
    return Block(
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
        layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight,
        norms[0],
        norms[1],
        window or 0,
    )


def _check_linear(module: nn.Module) -> None:
    if isinstance(module, QuantizedLinear):
        if not isinstance(module._kernel, NativeWeightOnly):
            raise InvalidInput(f"a layer in {module.scheme.slug} runs on the kernel {module.kernel}, which the native step cannot call")
        return
    if type(module) is not nn.Linear:
        raise InvalidInput(f"the native step runs linear layers, not {type(module).__name__}")
    if module.weight.dtype not in _KINDS or module.in_features % library.INPUTS or not module.weight.is_contiguous():
        raise InvalidInput(
            f"a layer of {module.weight.dtype} with {module.in_features} inputs: the native step runs contiguous bf16 and fp32 with a "
            f"multiple of {library.INPUTS} inputs"
        )


def matrix(module: nn.Module, bias: int | None) -> library.Matrix:
    """The layer for the C interface, reading the module's own memory; `bias` is the address of an fp32 copy of its bias."""
    if isinstance(module, QuantizedLinear):
        kernel = module._kernel
        assert isinstance(kernel, NativeWeightOnly)
        return kernel.matrix(module.get_buffer("packed").data_ptr(), bias)
    assert isinstance(module, nn.Linear)
    weight = module.weight
    rows, columns = weight.shape
    return library.Matrix(
        kind=_KINDS[weight.dtype], bits=0, group=columns, zero=0, rows=rows, columns=columns, data=weight.data_ptr(), bias=bias
    )
