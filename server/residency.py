"""The memory ledger: what resident variants hold, what they may hold, and which of them goes when another needs room.

Pure bookkeeping over numbers: nothing is loaded, freed or measured here (`server.engine.residents` does that), and no lock is taken.
A claim has bytes of its own by kind, and shared items: named tensors or groups of tensors that several variants of a checkpoint use
and that are stored once. The sum of all own bytes and of each distinct shared item never exceeds the budget.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from quantizers.errors import OutOfMemory
from server.engine.interface import MemoryKind, VariantKey


@dataclass(frozen=True)
class Claim:
    """Bytes that a variant asks for or holds. `shared` names what it has in common with others; one name, one size for all who claim it."""

    own: Mapping[MemoryKind, int]
    shared: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(self.own.values()) + sum(self.shared.values())


@dataclass
class _Entry:
    own: dict[MemoryKind, int]
    shared: dict[str, int]
    pins: int = 0
    used_at: int = 0


class Ledger:
    """Reservations under `budget` bytes. A pinned entry is in use and is never chosen to go; the others go least recently used first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._entries: dict[VariantKey, _Entry] = {}
        self._clock = 0

    def __contains__(self, key: VariantKey) -> bool:
        return key in self._entries

    @property
    def reserved(self) -> int:
        """Bytes held or promised now; at most `budget`."""
        return self._total(self._entries)

    @property
    def shared(self) -> int:
        """Of `reserved`, the bytes of shared items, each counted once."""
        return sum(self._shared_items(self._entries).values())

    def claim_of(self, key: VariantKey) -> Claim:
        entry = self._entries[key]
        return Claim(dict(entry.own), dict(entry.shared))

    def pinned(self, key: VariantKey) -> bool:
        return self._entries[key].pins > 0

    def idle(self) -> tuple[VariantKey, ...]:
        """Entries that nobody uses, least recently used first."""
        return tuple(sorted((key for key, entry in self._entries.items() if not entry.pins), key=lambda key: self._entries[key].used_at))

    def room(self, key: VariantKey, kind: MemoryKind) -> int:
        """Bytes of `kind` that `key` may hold without anything of the others' having to go."""
        return self.budget - self.reserved + self._entries[key].own.get(kind, 0)

    def give_back(self, key: VariantKey, kinds: Collection[MemoryKind]) -> int:
        """`key` holds nothing of `kinds` any more; returns the bytes that it held. Not a use: its place in the order stays."""
        own = self._entries[key].own
        freed = sum(own.get(kind, 0) for kind in kinds)
        self._entries[key].own = {kind: size for kind, size in own.items() if kind not in kinds}
        return freed

    def victims(self, key: VariantKey, claim: Claim) -> tuple[VariantKey, ...] | None:
        """Idle entries to release, least recently used first, so that `key` may hold `claim` instead of what it holds now.

        None where it would fit only after entries that are pinned now have become idle. Raises OutOfMemory where it never would.
        """
        others = {other: entry for other, entry in self._entries.items() if other != key}
        if claim.bytes > self.budget:
            raise self._too_large(key, claim)
        remaining, gone = dict(others), []
        for other in [other for other in self.idle() if other != key]:
            if self._fits(remaining, claim):
                break
            del remaining[other]
            gone.append(other)
        return tuple(gone) if self._fits(remaining, claim) else None

    def reserve(self, key: VariantKey, claim: Claim) -> None:
        """Hold `claim` for `key`, in place of what it held. Raises OutOfMemory, and changes nothing, where the others leave no room."""
        others = {other: entry for other, entry in self._entries.items() if other != key}
        if not self._fits(others, claim):
            raise self._too_large(key, claim)
        self._clock += 1
        entry = self._entries.setdefault(key, _Entry({}, {}))
        entry.own, entry.shared, entry.used_at = dict(claim.own), dict(claim.shared), self._clock

    def release(self, key: VariantKey) -> None:
        """Forget `key`. A pinned one must be unpinned first."""
        assert not self._entries[key].pins, f"{key} is in use"
        del self._entries[key]

    def pin(self, key: VariantKey) -> None:
        """Count one more user of `key`."""
        self._clock += 1
        self._entries[key].pins += 1
        self._entries[key].used_at = self._clock

    def unpin(self, key: VariantKey) -> None:
        """Count one user less."""
        assert self._entries[key].pins > 0, f"{key} is not in use"
        self._clock += 1
        self._entries[key].pins -= 1
        self._entries[key].used_at = self._clock

    def _fits(self, entries: Mapping[VariantKey, _Entry], claim: Claim) -> bool:
        return self._total(entries, claim) <= self.budget

    def _total(self, entries: Mapping[VariantKey, _Entry], claim: Claim | None = None) -> int:
        own = sum(sum(entry.own.values()) for entry in entries.values())
        shared = self._shared_items(entries)
        if claim is not None:
            own += sum(claim.own.values())
            # The larger of two sizes for one name: a prediction may differ from what was measured for another variant.
            shared = {name: max(shared.get(name, 0), claim.shared.get(name, 0)) for name in shared.keys() | claim.shared.keys()}
        return own + sum(shared.values())

    @staticmethod
    def _shared_items(entries: Mapping[VariantKey, _Entry]) -> dict[str, int]:
        items: dict[str, int] = {}
        for entry in entries.values():
            for name, size in entry.shared.items():
                items[name] = max(items.get(name, 0), size)
        return items

    def _too_large(self, key: VariantKey, claim: Claim) -> OutOfMemory:
        pinned = [other for other, entry in self._entries.items() if entry.pins and other != key]
        return OutOfMemory(
            f"{key} needs {claim.bytes} bytes, of which {sum(claim.shared.values())} may be shared; the budget is {self.budget} bytes, "
            f"{self.reserved} are reserved by {len(self._entries)} variants, {len(pinned)} of them in use. "
            "Unload a variant, choose a smaller precision, or raise PRECIS_MEMORY_BUDGET_BYTES"
        )
