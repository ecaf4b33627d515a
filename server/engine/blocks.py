"""Who owns which block of the paged cache: counted references, and full blocks found again by what they hold.

A block is free, or held by one or more sequences. A full block whose keys and values are computed may be published under its key, a
hash chained over everything before it; it can then be taken by any sequence that begins the same way, also after its last holder
has left, until its memory is needed: those that nobody holds go least recently used first. What others may find or hold is never written.

Pure bookkeeping over numbers; no tensor is touched here, and no lock is taken.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

Key = bytes
_KEY_BYTES = 16  # of a cryptographic hash: nobody can make up two texts that share a block without being the same


def root_key(salt: str) -> Key:
    """Where the chain of a sequence begins. Sequences with different salts share nothing and so cannot time each other's prompts."""
    return hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES, person=b"precis-salt").digest()


def next_key(parent: Key, token_ids: Sequence[int]) -> Key:
    """Key of the block that holds `token_ids` and follows the block of `parent`."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=_KEY_BYTES, person=b"precis-block").digest()


class OutOfBlocks(Exception):
    """Every block is held. The scheduler answers with preemption; it never reaches a caller of the engine."""


class BlockPool:
    """`total` blocks, numbered from 0."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._references = [0] * total
        self._empty = list(range(total - 1, -1, -1))  # free and of no use to anybody; low numbers first, so that few pages are touched
        self._idle: OrderedDict[int, None] = OrderedDict()  # free and published, least recently used first
        self._key_of: dict[int, Key] = {}
        self._published: dict[Key, int] = {}

    @property
    def free(self) -> int:
        """Blocks that `take` can give, those that would be forgotten for it included."""
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that some sequence holds."""
        return self.total - self.free

    def references(self, block: int) -> int:
        return self._references[block]

    def published(self, block: int) -> bool:
        """Whether `block` may be found by others."""
        return block in self._key_of

    def take(self) -> int:
        """A block of nobody else's, with one reference. Raises OutOfBlocks."""
        if self._empty:
            block = self._empty.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        else:
            raise OutOfBlocks(f"all {self.total} blocks are held")
        self._references[block] = 1
        return block

    def find(self, key: Key) -> int | None:
        """The block published under `key`, not taken yet."""
        return self._published.get(key)

    def share(self, block: int) -> None:
        """One more reference to a block that is held or published."""
        if self._references[block] == 0:
            del self._idle[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One reference less. With the last one the block is free, and is still found if it was published."""
        assert self._references[block] > 0, f"block {block} is not held"
        self._references[block] -= 1
        if self._references[block] == 0:
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._empty.append(block)

    def publish(self, block: int, key: Key) -> None:
        """Let others find `block`, which is held, full and computed. Where another has that content already, nothing changes."""
        assert self._references[block] > 0, f"block {block} is not held"
        if key not in self._published and block not in self._key_of:
            self._published[key] = block
            self._key_of[block] = key

    def retract(self, block: int) -> None:
        """Nobody finds `block`, which is held, any more: what it holds turned out to be worthless."""
        assert self._references[block] > 0, f"block {block} is not held"
        if block in self._key_of:
            self._forget(block)

    def _forget(self, block: int) -> None:
        del self._published[self._key_of.pop(block)]


class BlockTable:
    """The blocks of one sequence, and how far their content is known."""

    def __init__(self, pool: BlockPool, block_size: int, salt: str) -> None:
        self.blocks: list[int] = []
        self._pool, self._size = pool, block_size
        self._root = root_key(salt)
        self._keys: list[Key] = []  # of the leading full blocks whose content is known

    def match(self, token_ids: Sequence[int], limit: int) -> int:
        """Take published blocks that hold the beginning of `token_ids`, at most `limit` tokens; returns how many that are.

        For an empty table. A block that reaches past `limit` is taken as well, for `reserve` to copy before it is written.
        """
        assert not self.blocks, "a table is matched before it is filled"
        key, held = self._root, 0
        while held < limit and held + self._size <= len(token_ids):
            key = next_key(key, token_ids[held : held + self._size])
            block = self._pool.find(key)
            if block is None:
                break
            self._pool.share(block)
            self.blocks.append(block)
            self._keys.append(key)
            held += self._size
        return min(held, limit)

    def fork(self, other: "BlockTable", tokens: int) -> None:
        """Hold the blocks of the first `tokens` tokens of `other`, the last of which may be shared in part: it is copied when written.

        For an empty table, and where `other` begins with the same tokens under the same salt.
        """
        assert not self.blocks, "a table is forked before it is filled"
        self.blocks = other.blocks[: -(-tokens // self._size)]
        self._keys = other._keys[: tokens // self._size]
        for block in self.blocks:
            self._pool.share(block)

    def needed(self, start: int, end: int) -> int:
        """Blocks that `reserve(start, end)` would take from the pool."""
        missing = max(0, -(-end // self._size) - len(self.blocks))
        return missing + sum(self._must_copy(index) for index in self._written(start, end))

    def reserve(self, start: int, end: int) -> list[tuple[int, int]]:
        """Make positions `start` to `end` writable. Returns the (src, dst) blocks to copy before anything is written.

        Raises OutOfBlocks, and changes nothing.
        """
        if self.needed(start, end) > self._pool.free:
            raise OutOfBlocks(f"{self.needed(start, end)} blocks are needed and {self._pool.free} are free")
        copies = []
        for index in self._written(start, end):
            if self._must_copy(index):
                source, self.blocks[index] = self.blocks[index], self._pool.take()
                copies.append((source, self.blocks[index]))
                self._pool.release(source)
            elif self._pool.published(self.blocks[index]):
                self._pool.retract(self.blocks[index])  # nobody else holds it; `publish` lets it be found again
                del self._keys[index:]
        while len(self.blocks) * self._size < end:
            self.blocks.append(self._pool.take())
        return copies

    def _written(self, start: int, end: int) -> range:
        return range(start // self._size, min(len(self.blocks), -(-end // self._size)))

    def _must_copy(self, index: int) -> bool:
        return self._pool.references(self.blocks[index]) > 1

    def publish(self, token_ids: Sequence[int], computed: int) -> None:
        """Let others find every block that is full with the first `computed` of `token_ids`, whose keys and values are written."""
        for index in range(len(self._keys), computed // self._size):
            parent = self._keys[-1] if self._keys else self._root
            key = next_key(parent, token_ids[index * self._size : (index + 1) * self._size])
            self._keys.append(key)
            self._pool.publish(self.blocks[index], key)

    def retract(self) -> None:
        """Nobody finds these blocks any more."""
        for block in self.blocks:
            self._pool.retract(block)

    def release(self) -> None:
        """Give all blocks back; the last first, so that the beginning of a text, which more texts share, is forgotten last."""
        for block in reversed(self.blocks):
            self._pool.release(block)
        self.blocks, self._keys = [], []
