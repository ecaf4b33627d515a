"""NativeStep: whole engine steps of a Llama-like model in one C call each, over a paged KV cache of its own layout.

Arithmetic: weights as they are held (packed integers, bf16 or fp32), fp32 sums, an fp32 residual stream, and a cache in bf16 (fp32 for an
fp32 model), or in int8 with a scale for each position and head, whose products are exact integers. A row's logits are the same to the bit
whatever else is in the batch, however its prompt was cut into steps, and at any number of threads: sums have one order, and the context is
cut into fixed parts.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from quantizers.errors import InvalidInput, OutOfMemory
from quantizers.kernels.cpu import library
from quantizers.kernels.cpu.llama import Facts, matrix, read, why_not
from quantizers.kernels.cpu.sampling import Choice, Int32, describe
from quantizers.kernels.cpu.structs import PHASES, Batch, Draw, Layer, Model, Rounds
from quantizers.kernels.cpu.team import TeamSize
from quantizers.kernels.kv_cache import Plane

BLOCK_SIZE = 16  # positions of a cache block
_FIRST_POSITIONS = 1024  # of the rotary tables, which double when a text grows beyond them
_NO_MEMORY = 1
_WAIT = PHASES.index("wait")
_CACHE_KINDS = {torch.bfloat16: 0, torch.float32: 1, torch.int8: 2}  # CacheKind of native/kernels.h
_REFUSALS = {
    2: "a token id lies outside the vocabulary of {vocab}",
    3: "a position is negative or does not follow its sequence's position before it by one",
    4: "query_start must rise from 0 to the number of tokens, with at least one token a sequence",
    5: "a position lies in a block that its sequence's block table does not name or the cache of {blocks} blocks does not have",
    6: "logits are wanted of a token that the step does not have",
}


class NativeStep:
    """Runs one loaded model. Reads the model's weights in place, so the model must be kept, and not be changed, while this is used.

    Not thread-safe. Small fp32 copies (norms, biases, rotary tables) are counted by `bytes`.
    """

    block_size = BLOCK_SIZE

    def __init__(self, model: nn.Module, cache_dtype: torch.dtype | None = None) -> None:
        """`cache_dtype`: the model's own (None) or int8. Raises InvalidInput for another, and where `supports` does not answer None."""
        self._facts = read(model)
        self._cache_dtype = cache_dtype or self._facts.dtype
        if self._cache_dtype not in (self._facts.dtype, torch.int8):
            raise InvalidInput(f"a cache of {cache_dtype} for a model of {self._facts.dtype}: its own dtype and int8 are possible")
        self._library = library.library()
        self._copies: list[Tensor] = []
        self._layers = (Layer * len(self._facts.blocks))(*(self._layer(index) for index in range(len(self._facts.blocks))))
        self._model = self._describe()
        self._step = self._library.precis_step_new(ctypes.byref(self._model))
        if not self._step:
            raise OutOfMemory("no memory for the native step's description of the model")
        self._gather()
        self._team = TeamSize()
        self._seconds = (ctypes.c_double * len(PHASES))()
        self._cache = torch.empty(0, dtype=torch.uint8)
        self._blocks = 0
        self.largest: Int32 = np.empty(0, np.int32)
        """[R], of each row of the last `forward`: its first largest logit, or -1 where one of them is not finite."""
        self._cos = self._sin = torch.empty(0, self._facts.head_dim // 2)
        self._grow_rotary(_FIRST_POSITIONS)

    @staticmethod
    def supports(model: nn.Module) -> str | None:
        """Why the native step cannot run `model` (a transformers model as `quantizers.model` loads it); None where it can."""
        return why_not(model)

    @property
    def vocab_size(self) -> int:
        return self._facts.vocab

    @property
    def cache_dtype(self) -> torch.dtype:
        """int8 where it was asked for, else fp32 for a model of fp32 and bf16 for others."""
        return self._cache_dtype

    @property
    def bytes_per_block(self) -> int:
        """Of the cache: keys and values of `block_size` positions over all layers."""
        facts = self._facts
        head = Plane.bytes_per_position(1, facts.head_dim, self._cache_dtype)
        return 2 * len(facts.blocks) * facts.kv_heads * head * BLOCK_SIZE

    @property
    def bytes(self) -> int:
        """What this holds beside the model, the cache and the workspace: fp32 copies of norms and biases, and the rotary tables."""
        return sum(tensor.nbytes for tensor in (*self._copies, self._cos, self._sin))

    @property
    def workspace_bytes(self) -> int:
        """What the steps so far have needed beside their logits; it is kept for the next ones."""
        return int(self._library.precis_step_workspace_bytes(self._step))

    def allocate(self, num_blocks: int) -> None:
        """Make the cache of `num_blocks` blocks; what an earlier one held is lost. Raises InvalidInput or OutOfMemory."""
        if num_blocks < 1:
            raise InvalidInput(f"a cache of {num_blocks} blocks: it needs at least one", param="num_blocks")
        self._cache, self._blocks = torch.empty(0, dtype=torch.uint8), 0
        size = num_blocks * self.bytes_per_block
        try:
            self._cache = library.aligned_bytes(size)
        except RuntimeError as error:
            raise OutOfMemory(f"no memory for a KV cache of {num_blocks} blocks, {size} bytes: ask for fewer") from error
        self._library.precis_advise_huge(self._cache.data_ptr(), size)
        self._blocks = num_blocks

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block of the cache over another. Raises InvalidInput for a block that the cache does not have."""
        for block in (source, target):
            if not 0 <= block < self._blocks:
                raise InvalidInput(f"block {block} is outside the cache of {self._blocks} blocks", param="block")
        self._library.precis_copy_block(ctypes.byref(self._model), self._cache.data_ptr(), self._blocks, source, target)

    def forward(self, token_ids: Int32, positions: Int32, query_start: Int32, block_tables: Int32, logits_rows: Int32) -> Tensor:
        """One step over S sequences and T tokens; returns fp32 logits [R, vocab].

        token_ids, positions: int32 [T], the new tokens of each sequence behind one another, positions rising by one.
        query_start: int32 [S + 1], where each sequence's tokens begin; the last entry is T.
        block_tables: int32 [S, max_blocks], the cache block of positions 16i to 16i + 15; entries that are not needed may hold anything.
        logits_rows: int32 [R], tokens (0 to T - 1) whose logits are wanted.

        Keys and values of the new tokens are written first; a token attends to cached positions up to its own (within the layer's window).
        Raises InvalidInput, with nothing written, where an argument is not as said; OutOfMemory without a workspace.
        """
        batch, logits = self._batch(token_ids, positions, query_start, block_tables, logits_rows)
        self._run(lambda threads: self._library.precis_step_forward(self._step, ctypes.byref(batch), threads))
        return logits

    def decode(
        self,
        token_ids: Int32,
        positions: Int32,
        block_tables: Int32,
        choices: Sequence[Choice],
        rounds: int,
        seconds: float,
        interrupted: ctypes.c_int32,
    ) -> Int32:
        """Up to `rounds` steps in a row over S sequences, each on the tokens that the one before chose; returns these, int32 [done, S].

        token_ids, positions: int32 [S], one token of each sequence. block_tables: as of `forward`, with the blocks of all positions that
        are written, `rounds` of each sequence. The bits are those of as many calls of `forward`.

        A round is the last where a token in it ends its sequence, or is -1, as its logits are not finite or leave none; where another
        would not end within `seconds` of the beginning, as far as those done tell; or where `interrupted`, which another thread may set,
        is not 0 after it. Raises InvalidInput as `forward`, before anything is written.
        """
        count = len(token_ids)
        if rounds < 1 or len(choices) != count or any(len(choice.u) not in (0, rounds) for choice in choices):
            raise InvalidInput(
                f"{rounds} rounds with {len(choices)} choices for {count} tokens: one or more, a choice each with a number a round"
            )
        each = np.arange(count + 1, dtype=np.int32)
        batch, _ = self._batch(token_ids, positions, each, block_tables, each[:-1], rounds)
        draws = (Draw * (rounds * count))()
        for row, choice in enumerate(choices):
            for index, u in enumerate(choice.u):
                describe(draws[index * count + row], choice.filters, u)
        ends = np.array([token for choice in choices for token in choice.ends], np.int32)
        end_start = np.cumsum([0, *(len(choice.ends) for choice in choices)], dtype=np.int32)
        tokens = np.empty((rounds, count), np.int32)
        plan = Rounds(
            most=rounds,
            draw=ctypes.addressof(draws),
            end=ends.ctypes.data,
            end_start=end_start.ctypes.data,
            seconds=seconds,
            interrupted=ctypes.addressof(interrupted),
            token=tokens.ctypes.data,
        )
        self._run(lambda threads: self._library.precis_step_decode(self._step, ctypes.byref(batch), ctypes.byref(plan), threads))
        return tokens[: plan.done]

    def _batch(
        self, token_ids: Int32, positions: Int32, query_start: Int32, block_tables: Int32, logits_rows: Int32, rounds: int = 1
    ) -> tuple[Batch, Tensor]:
        """The arguments of `forward` for the C interface, with memory for the logits."""
        if self._step is None:
            raise InvalidInput("the native step was closed: make another one for the model")
        arrays = [_int32(array, name) for array, name in zip((token_ids, positions, query_start, logits_rows), _FLAT, strict=True)]
        tables = _int32(block_tables, "block_tables", dimensions=2)
        if len(arrays[0]) == 0 or len(arrays[1]) != len(arrays[0]) or len(arrays[2]) != len(tables) + 1:
            counts = f"{len(arrays[0])} token ids, {len(arrays[1])} positions, {len(tables)} block tables, {len(arrays[2])} of query_start"
            raise InvalidInput(f"{counts}: there must be as many positions as tokens (one or more), and one query_start more than tables")
        self._grow_rotary(int(arrays[1].max()) + rounds)
        logits = torch.empty(len(arrays[3]), self._facts.vocab)
        self.largest = np.empty(len(arrays[3]), np.int32)
        batch = Batch(
            tokens=len(arrays[0]),
            sequences=len(tables),
            table_width=tables.shape[1],
            logit_rows=len(arrays[3]),
            blocks=self._blocks,
            positions=len(self._cos),
            **{name: array.ctypes.data for name, array in zip(("id", "position", "query_start", "logit_row"), arrays, strict=True)},
            table=tables.ctypes.data,
            cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
            cache=self._cache.data_ptr(),
            logits=logits.data_ptr(),
            largest=self.largest.ctypes.data,
        )
        batch.holds = (*arrays, tables, logits)
        return batch, logits

    def _run(self, call: Callable[[int], int]) -> None:
        threads, waited, started = self._team.choose(library.threads()), self._waited(), time.perf_counter()
        self._check(call(threads))
        self._team.learn(threads, time.perf_counter() - started, self._waited() - waited)

    def _waited(self) -> float:
        self._library.precis_step_seconds(self._step, self._seconds)
        return self._seconds[_WAIT]

    def profile(self) -> dict[str, float]:
        """Seconds that the calling thread spent in each phase, over all steps so far. `wait`: for the other threads."""
        self._library.precis_step_seconds(self._step, self._seconds)
        return dict(zip(PHASES, self._seconds, strict=True))

    def close(self) -> None:
        """Give the cache and the workspace back. A second call does nothing; no other call may follow."""
        step, self._step = self._step, None
        if step:
            self._library.precis_step_free(step)
        self._cache, self._blocks = torch.empty(0, dtype=torch.uint8), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_step", None):
            self.close()

    def _check(self, code: int) -> None:
        if code == _NO_MEMORY:
            raise OutOfMemory("no memory for the workspace of a step: put fewer tokens into one")
        if code:
            raise InvalidInput(_REFUSALS[code].format(vocab=self._facts.vocab, blocks=self._blocks))

    def _describe(self) -> Model:
        facts: Facts = self._facts
        return Model(
            layers=len(facts.blocks),
            hidden=facts.hidden,
            heads=facts.heads,
            kv_heads=facts.kv_heads,
            head_dim=facts.head_dim,
            intermediate=facts.intermediate,
            vocab=facts.vocab,
            embedding_fp32=int(facts.dtype == torch.float32),
            cache_kind=_CACHE_KINDS[self._cache_dtype],
            epsilon=facts.epsilon,
            scaling=facts.scaling,
            embedding=facts.embedding.data_ptr() if isinstance(facts.embedding, Tensor) else None,
            final_norm=self._fp32(facts.final_norm),
            head=self._matrix(facts.head),
            table=library.Matrix() if isinstance(facts.embedding, Tensor) else matrix(facts.embedding, None),
            layer=ctypes.addressof(self._layers),
        )

    def _layer(self, index: int) -> Layer:
        block = self._facts.blocks[index]
        return Layer(
            *(self._matrix(module) for module in block.linears()),
            *(self._fp32(norm) for norm in (block.input_norm, block.post_norm, block.q_norm, block.k_norm)),
            block.window,
        )

    def _matrix(self, module: nn.Module) -> library.Matrix:
        bias = module.bias
        assert bias is None or isinstance(bias, Tensor)
        return matrix(module, self._fp32(bias))

    def _fp32(self, tensor: Tensor | None) -> int | None:
        """Address of an fp32 copy that lives as long as this, or of the tensor itself where it is fp32."""
        if tensor is None:
            return None
        copy = tensor.detach().float().contiguous()
        if copy.data_ptr() != tensor.data_ptr():
            self._copies.append(copy)
        return copy.data_ptr()

    def _gather(self) -> None:
        """Ask for the weights' memory in huge pages: layers of a megabyte, made one by one, lie in small ones, and read a sixth slower."""
        embedding = self._facts.embedding
        tensors = [embedding] if isinstance(embedding, Tensor) else [*embedding.buffers()]
        for module in (self._facts.head, *(linear for block in self._facts.blocks for linear in block.linears())):
            tensors += [*module.parameters(), *module.buffers()]
        for tensor in tensors:
            self._library.precis_collapse_huge(tensor.data_ptr(), tensor.nbytes)

    def _grow_rotary(self, positions: int) -> None:
        """Rotary tables [positions, head_dim / 2] as the model's own module computes them."""
        if positions <= len(self._cos):
            return
        rotary = self._facts.rotary
        frequencies = rotary.get_buffer("inv_freq").float()
        angles = torch.arange(1 << (positions - 1).bit_length()).float().unsqueeze(-1) * frequencies
        scaling = float(rotary.attention_scaling)  # type: ignore[arg-type]
        self._cos, self._sin = (angles.cos() * scaling).contiguous(), (angles.sin() * scaling).contiguous()


_FLAT = ("token_ids", "positions", "query_start", "logits_rows")


def _int32(array: Int32, name: str, dimensions: int = 1) -> Int32:
    if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.ndim != dimensions:
        found = f"{array.dtype} with {array.ndim} dimensions" if isinstance(array, np.ndarray) else type(array).__name__
        raise InvalidInput(f"{name} is {found}: it must be a numpy array of int32 with {dimensions}", param=name)
    return np.ascontiguousarray(array)
