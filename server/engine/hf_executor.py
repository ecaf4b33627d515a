"""Runs any causal decoder through transformers' own modeling code, over a paged cache: the executor that fits every architecture."""

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from quantizers.errors import InvalidInput
from quantizers.kernels import cuda
from quantizers.kernels.kv_cache import Plane
from quantizers.skeleton import BUILDING
from server.engine import paged_attention
from server.engine.decode_buckets import DecodeBuckets, DecodeInputs, NotRecordable, Record
from server.engine.device import move
from server.engine.executor import Chunk, Int32, RaggedBatch, ragged_batch
from server.engine.paged_attention import DecodeStep, LayerCache, LayerShape, PagedStep, Probe, attending

logger = logging.getLogger(__name__)

BLOCK_SIZE = 16  # small enough that short prefixes are shared and little is lost at the end, large enough to gather by rows
_PROBE_TOKENS = 2
_WARM_TOKENS = (1, 32, 64, 512)  # of a step: the sizes for which products are compiled, up to the largest step
# What a GPU's libraries keep for their work: cuBLAS 32 MiB, once beside the graphs and once in them, a product split into segments and
# attention split into pieces at most 33 MiB each.
_LIBRARY_BYTES = 130 << 20
# Rotary frequencies that depend on how long the sequences of a pass are: sequences must not see each other's lengths.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class HfExecutor:
    """An `Executor` over the model's own forward pass. It sets the model's attention implementation for good."""

    name = "transformers"
    block_size = BLOCK_SIZE
    largest: Int32 | None = None

    def __init__(
        self, model: PreTrainedModel, config: PretrainedConfig, record: Record | None = None, *, cache_dtype: torch.dtype | None = None
    ) -> None:
        """`record` records decode steps; None: as CUDA graphs where our kernels run on the model's device, else not at all.
        `cache_dtype`: int8, or None for the model's own.

        Raises InvalidInput where the architecture keeps a state that is not plain keys and values.
        """
        self._model = model
        weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        self._device, self.cache_dtype = weight.device, cache_dtype or weight.dtype
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._alone = _rope_type(config) in _LENGTH_DEPENDENT_ROPE
        model.set_attn_implementation(paged_attention.NAME)
        self._shapes = self._probe(config)
        self._layers: dict[int, LayerCache] = {}
        text: Any = config.get_text_config(decoder=True)
        self._max_blocks = -(-int(getattr(text, "max_position_embeddings", 0) or 0) // self.block_size)
        self._longest: int | None = None  # positions that a sequence of the cache may have, where decoding follows the block tables
        self._buckets = self._make_buckets(record)
        self.held_bytes = 0 if self._buckets is None else DecodeBuckets.bytes(int(text.vocab_size), self._max_blocks)
        if self._device.type == "cuda":
            self.held_bytes += _LIBRARY_BYTES

    def _make_buckets(self, record: Record | None) -> DecodeBuckets | None:
        if record is None and cuda.why_not(self._device) is None:
            from server.engine.cuda_graph import CudaGraphs

            record = CudaGraphs(self._device)
        # Where frequencies depend on the lengths, the modeling code asks the device for them.
        if record is None or self._alone:
            return None
        return DecodeBuckets(self._decode, record, block_size=self.block_size, device=self._device)

    @property
    def bytes_per_block(self) -> int:
        return self.block_size * sum(
            Plane.bytes_per_position(shape.kv_heads, dim, self.cache_dtype)
            for shape in self._shapes.values()
            for dim in (shape.key_dim, shape.value_dim)
        )

    def allocate(self, num_blocks: int) -> None:
        self._layers = {}  # first, or both caches would be held for a moment
        of_sequence = min(num_blocks, self._max_blocks or num_blocks)
        if self._buckets is not None:
            self._buckets.allocate(of_sequence)  # what was recorded reads the cache that goes
            self._longest = of_sequence * self.block_size
        if num_blocks == 0:
            return
        self._layers = {
            layer: LayerCache(self._empty(num_blocks, shape, shape.key_dim), self._empty(num_blocks, shape, shape.value_dim))
            for layer, shape in self._shapes.items()
        }

    def _empty(self, num_blocks: int, shape: LayerShape, dim: int) -> Plane:
        return Plane.zeros(num_blocks, self.block_size, shape.kv_heads, dim, self.cache_dtype, self._device)

    def copy_block(self, src: int, dst: int) -> None:
        for layer in self._layers.values():
            layer.keys.copy(src, dst)
            layer.values.copy(src, dst)

    def forward(self, batch: RaggedBatch) -> Tensor:
        if self._alone and batch.sequences > 1:
            return torch.cat([self.forward(batch.alone(index)) for index in range(batch.sequences)])
        if self._buckets is not None and self._buckets.takes(batch):
            try:
                with BUILDING, torch.inference_mode():
                    return self._buckets.forward(batch)
            except NotRecordable as error:
                logger.warning("%s decodes without CUDA graphs, which its code does not allow: %s", type(self._model).__name__, error)
                self._buckets = None
        step = PagedStep(batch, self.block_size, self._device, self._longest)
        step.layers = self._layers
        with BUILDING, torch.inference_mode(), attending(step):
            return self._run(batch)

    def warm_up(self) -> None:
        """Compile what steps of every size need, where kernels are compiled when first run. Needs no cache, and leaves none."""
        if self._device.type != "cuda":
            return
        self.allocate(_WARM_TOKENS[-1] // self.block_size)
        for tokens in _WARM_TOKENS:
            self.forward(ragged_batch([Chunk([0] * tokens, 0, range(-(-tokens // self.block_size)), tokens - 1)]))
        self.allocate(0)

    def _decode(self, inputs: DecodeInputs) -> Tensor:
        assert self._longest is not None, "decoding needs a cache"
        step = DecodeStep(self._layers, inputs.slots, inputs.tables, inputs.positions, self._longest)
        with attending(step):
            output = self._model(input_ids=inputs.token_ids[None], position_ids=inputs.positions[None], use_cache=False)
        logits: Tensor = output.logits[0].float()
        return logits

    def _run(self, batch: RaggedBatch) -> Tensor:
        ids, positions, rows = (
            move(torch.from_numpy(part).long(), self._device) for part in (batch.token_ids, batch.positions, batch.logits_rows)
        )
        arguments: dict[str, Any] = {"logits_to_keep": rows} if self._keeps_logits else {}
        output = self._model(input_ids=ids[None], position_ids=positions[None], use_cache=False, **arguments)
        logits: Tensor = output.logits[0]
        return (logits if self._keeps_logits else logits[rows]).float()

    def _probe(self, config: PretrainedConfig) -> dict[int, LayerShape]:
        """One pass over two tokens shows what every layer caches, whatever the config calls it."""
        probe = Probe()
        ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device=self._device)
        positions = torch.arange(_PROBE_TOKENS, device=self._device)[None]
        with BUILDING, torch.inference_mode(), attending(probe):
            self._model(input_ids=ids, position_ids=positions, use_cache=False)
        _check_layers(self._model, config, probe.shapes)
        return dict(sorted(probe.shapes.items()))


def _check_layers(model: nn.Module, config: PretrainedConfig, shapes: dict[int, LayerShape]) -> None:
    """Raises InvalidInput unless every decoder block attends once, over all of its past or a sliding window of it."""
    text: Any = config.get_text_config(decoder=True)
    blocks = int(text.num_hidden_layers)
    if sorted(shapes) != list(range(blocks)):
        raise InvalidInput(
            f"{type(model).__name__} has {blocks} decoder blocks, of which {len(shapes)} use transformers' attention "
            "interface: architectures with a state other than keys and values are not served",
            param="model",
        )
    kinds = getattr(text, "layer_types", None) or []
    for layer, kind in enumerate(kinds):
        window = shapes[layer].window
        if kind not in ("full_attention", "sliding_attention") or (kind == "sliding_attention" and window is None):
            raise InvalidInput(
                f"layer {layer} of {type(model).__name__} has {kind!r}, which is not served: allowed are full_attention and "
                "sliding_attention with a window",
                param="model",
            )


def _rope_type(config: PretrainedConfig) -> str:
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    found = parameters.get("rope_type", parameters.get("type", "default"))
    return str(found)
