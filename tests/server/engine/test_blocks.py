"""Blocks over random schedules: none leaks, none has two owners who write, and what is found is what was published."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.blocks import BlockPool, BlockTable, OutOfBlocks, next_key, root_key

SIZE = 4


class Sequence:
    """A table whose blocks are really filled: `content` is the cache of all sequences, a list of token ids a block."""

    def __init__(self, pool: BlockPool, content: dict[int, list[int | None]], tokens: list[int], salt: str) -> None:
        self.table = BlockTable(pool, SIZE, salt)
        self.content, self.tokens = content, tokens
        self.computed = self.table.match(tokens, len(tokens) - 1)
        self.check()

    def compute(self, end: int) -> None:
        for source, target in self.table.reserve(self.computed, end):
            self.content[target] = list(self.content[source])
        for position in range(self.computed, end):
            self.content.setdefault(self.table.blocks[position // SIZE], [None] * SIZE)[position % SIZE] = self.tokens[position]
        self.computed = end
        self.table.publish(self.tokens, end)
        self.check()

    def check(self) -> None:
        found = [self.content[self.table.blocks[position // SIZE]][position % SIZE] for position in range(self.computed)]
        assert found == self.tokens[: self.computed], "the cache holds another sequence's tokens"


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_random_schedules_leak_nothing_and_mix_nothing(seed: int, total: int) -> None:
    """Sequences over an alphabet of two begin, grow and end at random: shared prefixes, copies and reuse happen all the time."""
    choose = random.Random(seed)
    pool, content, alive = BlockPool(total), dict[int, list[int | None]](), list[Sequence]()
    for _ in range(60):
        action = choose.random()
        if action < 0.4:
            alive.append(Sequence(pool, content, choose.choices([0, 1], k=choose.randint(1, 3 * SIZE)), choose.choice(["", "other"])))
        elif alive and action < 0.75:
            sequence = choose.choice(alive)
            if sequence.computed == len(sequence.tokens):
                sequence.tokens.append(choose.randint(0, 1))
            before = list(sequence.table.blocks), pool.free
            try:
                sequence.compute(choose.randint(sequence.computed + 1, len(sequence.tokens)))
            except OutOfBlocks:
                assert (sequence.table.blocks, pool.free) == before
        elif alive:
            sequence = alive.pop(choose.randrange(len(alive)))
            if choose.random() < 0.2:
                sequence.table.retract()
            sequence.table.release()
        held = Counter(block for sequence in alive for block in sequence.table.blocks)
        assert [pool.references(block) for block in range(total)] == [held[block] for block in range(total)]
        assert pool.used == len(held)
        for sequence in alive:
            sequence.check()
    for sequence in alive:
        sequence.table.release()
    assert (pool.free, pool.used) == (total, 0)
    assert sorted(pool.take() for _ in range(total)) == list(range(total))


def filled(pool: BlockPool, tokens: list[int], salt: str = "") -> BlockTable:
    table = BlockTable(pool, SIZE, salt)
    table.reserve(0, len(tokens))
    table.publish(tokens, len(tokens))
    return table


def test_a_prefix_is_found_after_its_holder_left() -> None:
    pool = BlockPool(8)
    filled(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9]).release()
    table = BlockTable(pool, SIZE, "")
    assert table.match([1, 2, 3, 4, 5, 6, 7, 8, 0, 0], 9) == 8
    assert len(set(table.blocks)) == 2
    assert BlockTable(pool, SIZE, "").match([0, 2, 3, 4, 5, 6, 7, 8], 7) == 0  # the second block alone is another text


def test_another_salt_finds_nothing() -> None:
    pool = BlockPool(8)
    filled(pool, [1, 2, 3, 4, 5], "alice")
    assert BlockTable(pool, SIZE, "bob").match([1, 2, 3, 4, 5], 4) == 0
    assert BlockTable(pool, SIZE, "alice").match([1, 2, 3, 4, 5], 4) == 4


def test_a_shared_block_is_copied_before_it_is_written() -> None:
    """A prompt that is known to its last token: the last is computed anew, in a copy while another sequence holds the block."""
    pool = BlockPool(4)
    first = filled(pool, [1, 2, 3, 4])
    second = BlockTable(pool, SIZE, "")
    assert second.match([1, 2, 3, 4], 3) == 3
    assert second.blocks == first.blocks
    assert second.needed(3, 4) == 1
    ((source, target),) = second.reserve(3, 4)
    assert (source, target) == (first.blocks[0], second.blocks[0])
    assert source != target


def test_a_block_of_ones_own_is_written_in_place_and_found_again() -> None:
    """In a pool that has no block for a copy: otherwise the only sequence could never go on."""
    pool = BlockPool(1)
    filled(pool, [1, 2, 3, 4]).release()
    table = BlockTable(pool, SIZE, "")
    assert table.match([1, 2, 3, 4], 3) == 3
    assert (table.needed(3, 4), table.reserve(3, 4)) == (0, [])
    assert BlockTable(pool, SIZE, "").match([1, 2, 3, 4], 3) == 0  # while it is written
    table.publish([1, 2, 3, 4], 4)
    assert BlockTable(pool, SIZE, "").match([1, 2, 3, 4], 3) == 3


def test_the_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4)
    filled(pool, [1] * 8).release()
    filled(pool, [2] * 8).release()
    BlockTable(pool, SIZE, "").match([1] * 8, 8)  # used again
    pool.take()
    assert pool.find(next_key(root_key(""), [2] * 4)) is not None
    assert BlockTable(pool, SIZE, "").match([2] * 8, 8) == 4


def test_what_is_retracted_is_not_found() -> None:
    pool = BlockPool(4)
    table = filled(pool, [1, 2, 3, 4])
    table.retract()
    table.release()
    assert BlockTable(pool, SIZE, "").match([1, 2, 3, 4], 4) == 0
    assert pool.free == 4


def test_a_pool_that_is_empty_says_so() -> None:
    pool = BlockPool(2)
    table = BlockTable(pool, SIZE, "")
    with pytest.raises(OutOfBlocks, match="3 blocks are needed and 2 are free"):
        table.reserve(0, 9)
    table.reserve(0, 8)
    with pytest.raises(OutOfBlocks):
        pool.take()
