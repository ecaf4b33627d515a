"""Which variants are loaded: predict, reserve, evict, load, measure. Every change of the ledger's numbers happens here, under one lock.

`load` and `unload` block, and are called by one thread only (the loop's loader); the other methods are quick and may be called by
any. `changed` is the lock of all state here, and what is notified when memory or a pin is given back.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from quantizers.errors import NotFound, OutOfMemory
from server.engine.device import DeviceMemory, measure
from server.engine.interface import MemoryInfo, MemoryKind, ResidentInfo, VariantKey, VariantSpec
from server.engine.runner import Runner
from server.residency import Claim, Ledger

logger = logging.getLogger(__name__)

_CACHE_KINDS: tuple[MemoryKind, ...] = ("kv_cache", "workspace")
_MEASURE_SECONDS = 1.0  # the kernel walks every page table entry of the process to answer: not after each request


class LoadedVariant(Protocol):
    """A variant in device memory: what runs it, and what it holds by its own count."""

    runner: Runner
    claim: Claim
    kernels: dict[str, int]
    bytes_by_dtype: dict[str, int]

    def close(self) -> None: ...


class Loader(Protocol):
    """Knows where bytes are. `predict` reads headers only; both raise errors of `quantizers.errors` for what is wrong with the files."""

    def predict(self, spec: VariantSpec) -> Claim: ...

    def load(self, spec: VariantSpec) -> LoadedVariant: ...


@dataclass
class _Resident:
    spec: VariantSpec
    variant: LoadedVariant
    predicted_bytes: int
    load_seconds: float


class Residents:
    """The loaded variants of one device under a ledger."""

    def __init__(self, loader: Loader, ledger: Ledger, device: torch.device) -> None:
        self.changed = threading.Condition()
        self.blocked = False  # a load or unload waits for pinned variants to become idle: pin no more until it has its turn
        self.evictions: dict[str, int] = {}
        self._loader, self._ledger, self._device = loader, ledger, device
        self._residents: dict[VariantKey, _Resident] = {}
        self._measured: tuple[float, DeviceMemory] = (time.monotonic(), measure(device))

    def runner(self, spec: VariantSpec) -> Runner | None:
        """What runs `spec`, None where it is not resident or other files are under its name."""
        with self.changed:
            resident = self._residents.get(spec.key)
            return resident.variant.runner if resident is not None and resident.spec == spec else None

    def runner_of(self, key: VariantKey) -> Runner | None:
        """What runs the variant under this name, None where none is resident."""
        with self.changed:
            resident = self._residents.get(key)
            return None if resident is None else resident.variant.runner

    def pin(self, key: VariantKey) -> None:
        """`key`, which must be resident, stays until it is unpinned as often."""
        with self.changed:
            self._ledger.pin(key)

    def unpin(self, key: VariantKey) -> None:
        with self.changed:
            self._ledger.unpin(key)
            self.changed.notify_all()

    def load(self, spec: VariantSpec, on_ready: Callable[[], None]) -> None:
        """Make `spec` resident, and call `on_ready` under the lock while it cannot be evicted yet.

        Waits for running sequences where only they are in the way. Raises OutOfMemory and what the loader raises.
        """
        with self.changed:  # at once: a cache that is made may evict what is not pinned
            resident = self.runner(spec) is not None
            if resident:
                self.pin(spec.key)
        if not resident:
            self._replace(spec)
        with self.changed:
            try:
                on_ready()
            finally:
                self.unpin(spec.key)

    def _replace(self, spec: VariantSpec) -> None:
        """Load `spec` and leave it pinned."""
        predicted = self._loader.predict(spec)
        with self.changed:
            if spec.key in self._residents:
                self.unload(spec.key)  # the same name for other files, such as an artifact that was made anew
        with self.changed:
            gone = self._wait(lambda: self._victims(spec.key, predicted))
            evicted = [self._evict(key, spec.key) for key in gone]
            self._ledger.reserve(spec.key, predicted)
            self._ledger.pin(spec.key)
        self._close(evicted)
        started = time.perf_counter()
        try:
            variant = self._loader.load(spec)
            try:
                self._settle(spec.key, variant.claim)
            except OutOfMemory:
                variant.close()
                raise
        except BaseException:
            with self.changed:
                self._ledger.unpin(spec.key)
                self._ledger.release(spec.key)
                self.changed.notify_all()
            raise
        seconds = time.perf_counter() - started
        with self.changed:
            self._residents[spec.key] = _Resident(spec, variant, predicted.bytes, seconds)
        logger.info("loaded %s in %.2f s: %d bytes, %d predicted", spec.key, seconds, variant.claim.bytes, predicted.bytes)

    def unload(self, key: VariantKey) -> None:
        """Free `key` once it is idle. Raises NotFound where it is not resident."""
        with self.changed:
            if key not in self._residents:
                names = ", ".join(sorted(map(str, self._residents))) or "none"
                raise NotFound(f"{key} is not resident; resident are: {names}", param="model")
            self._wait(lambda: None if self._ledger.pinned(key) else ())
            variant = self._drop(key)
        self._close([variant])

    def open_cache(self, key: VariantKey, tokens: int) -> None:
        """Make the cache of `key`, which is pinned and has none open, as large as is sensible, and for at least `tokens` tokens.

        Caches of idle variants go first for that, idle variants next. Raises OutOfMemory where those in use leave too little.
        """
        with self.changed:
            runner = self._residents[key].variant.runner
            held = self._ledger.claim_of(key)
            idle = sum(self._ledger.claim_of(other).own.get(kind, 0) for other in self._ledger.idle() for kind in _CACHE_KINDS)
            room = self._ledger.room(key, "kv_cache") + idle - runner.workspace_bytes
            blocks = runner.cache_blocks(room, tokens)
            own = {**held.own, "kv_cache": runner.kv_bytes(blocks), "workspace": runner.workspace_bytes}
            self._settle(key, Claim(own, held.shared))
            try:
                runner.open_cache(blocks)
            except BaseException:
                self._close_cache(key)
                raise

    def close_cache(self, key: VariantKey) -> None:
        """Give the cache of `key` back, which no sequence uses."""
        with self.changed:
            self._close_cache(key)
            self.changed.notify_all()

    def _close_cache(self, key: VariantKey) -> int:
        self._residents[key].variant.runner.close_cache()
        return self._ledger.give_back(key, _CACHE_KINDS)

    def _victims(self, key: VariantKey, claim: Claim) -> tuple[VariantKey, ...] | None:
        """As the ledger's, after idle variants have given their caches back where that makes a difference."""
        for other in self._ledger.idle():
            if self._ledger.victims(key, claim) == ():
                break
            if other != key and other in self._residents and (freed := self._close_cache(other)):
                logger.info("closed the cache of %s, %d bytes, to make room for %s", other, freed, key)
        return self._ledger.victims(key, claim)

    def _settle(self, key: VariantKey, claim: Claim) -> None:
        with self.changed:
            gone = self._victims(key, claim)
            evicted = [self._evict(victim, key) for victim in gone or ()]
            self._ledger.reserve(key, claim)  # raises where pinned variants leave no room: what runs now cannot wait for them
            self.changed.notify_all()
        self._close(evicted)

    def _wait(self, attempt: Callable[[], tuple[VariantKey, ...] | None]) -> tuple[VariantKey, ...]:
        """What `attempt` returns as soon as it is not None; until then nothing new is pinned."""
        try:
            while (result := attempt()) is None:
                self.blocked = True
                self.changed.wait()
            return result
        finally:
            self.blocked = False

    def _evict(self, key: VariantKey, wanted_by: VariantKey) -> LoadedVariant:
        logger.info("evicting %s to make room for %s", key, wanted_by)
        self.evictions[str(key)] = self.evictions.get(str(key), 0) + 1
        return self._drop(key)

    def _drop(self, key: VariantKey) -> LoadedVariant:
        self._ledger.release(key)
        self.changed.notify_all()
        return self._residents.pop(key).variant

    def _close(self, variants: list[LoadedVariant]) -> None:
        for variant in variants:
            variant.close()
        if variants and self._device.type == "cuda":
            torch.cuda.empty_cache()  # else the driver goes on counting what the allocator keeps

    def info(self, key: VariantKey) -> ResidentInfo:
        """What is in effect for `key`. Raises NotFound where it is not resident."""
        with self.changed:
            if key not in self._residents:
                raise NotFound(f"{key} is not resident", param="model")
            return self._describe(self._residents[key])

    def _describe(self, resident: _Resident) -> ResidentInfo:
        variant, claim = resident.variant, self._ledger.claim_of(resident.spec.key)
        dtype, kv_dtype = (str(name).removeprefix("torch.") for name in (variant.runner.dtype, variant.runner.kv_dtype))
        kinds: dict[MemoryKind, int] = {"weights": 0, "shared_weights": sum(claim.shared.values()), "kv_cache": 0, "workspace": 0}
        return ResidentInfo(
            key=resident.spec.key,
            device=str(self._device),
            max_model_len=variant.runner.max_model_len,
            vocab_size=variant.runner.vocab_size,
            dtype=dtype,
            kv_dtype=kv_dtype,
            kernels=variant.kernels,
            predicted_bytes=resident.predicted_bytes,
            bytes={**kinds, **claim.own},
            bytes_by_dtype=variant.bytes_by_dtype,
            load_seconds=resident.load_seconds,
        )

    def memory(self) -> MemoryInfo:
        """The ledger and the device; the device as measured at most a second ago."""
        now = time.monotonic()
        if now - self._measured[0] > _MEASURE_SECONDS:
            self._measured = (now, measure(self._device))
        device = self._measured[1]
        with self.changed:
            return MemoryInfo(
                device=str(self._device),
                total_bytes=device.total,
                used_bytes=device.used,
                free_bytes=device.free,
                budget_bytes=self._ledger.budget,
                reserved_bytes=self._ledger.reserved,
                shared_bytes=self._ledger.shared,
                residents=tuple(self._describe(self._residents[key]) for key in sorted(self._residents, key=str)),
            )
