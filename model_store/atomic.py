"""Bytes that appear whole or not at all: written under `tmp/`, flushed to the disk, then renamed into place.

A reader never sees half a folder, and a crash leaves nothing but an entry of `tmp/`, which the next start removes. Each `Staging`
works in a folder of its own there and holds a lock on it for as long as its process lives, so that a process which starts while
another one writes tells living work from leftovers, even where process ids repeat (containers).
"""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from quantizers.errors import Conflict, InvalidInput, TooLarge

CHUNK = 1 << 20  # bytes a read: large enough to be bound by the disk, small enough to hold many


class FileFacts(BaseModel):
    """What a manifest says of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Staging:
    """A private folder under `tmp`, and the one way by which files and folders enter the data directory."""

    def __init__(self, tmp: Path) -> None:
        """Creates `tmp` where it is missing and empties it of what dead processes left."""
        tmp.mkdir(parents=True, exist_ok=True)
        with _locked(tmp / ".lock"):
            _sweep(tmp)
            self._own = tmp / secrets.token_hex(8)
            self._own.mkdir()
            descriptor = os.open(self._own / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._close = weakref.finalize(self, _close, descriptor, self._own, os.getpid())

    def close(self) -> None:
        """Removes the private folder. Later writes through this object fail."""
        self._close()

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder to fill; it is removed at the end unless `publish` moved it away."""
        path = self._own / secrets.token_hex(8)
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def file(self) -> Iterator[Path]:
        """A path to write one file at; it is removed at the end unless `publish` moved it away."""
        path = self._own / secrets.token_hex(8)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def publish(self, staged: Path, target: Path) -> None:
        """Flush `staged`, a file or a folder, and rename it to `target`. Raises Conflict where a folder stands there already."""
        for path in [*staged.rglob("*"), staged] if staged.is_dir() else [staged]:
            flush(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise Conflict(f"{target.name!r} exists already") from error
            raise
        flush(target.parent)

    def write(self, target: Path, data: bytes) -> None:
        """Put a file with `data` at `target`, in place of the one that is there."""
        with self.file() as path:
            path.write_bytes(data)
            self.publish(path, target)

    def remove(self, target: Path) -> None:
        """Take a file or a folder away at once, then free its bytes. A missing one is no error."""
        grave = self._own / secrets.token_hex(8)
        with suppress(FileNotFoundError):
            target.rename(grave)
            flush(target.parent)
            if grave.is_dir():
                shutil.rmtree(grave)
            else:
                grave.unlink()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target`, anywhere on the disk, where the block ends well; where it does not, nothing is left.

    Raises Conflict where `target` exists and is no empty folder, InvalidInput where it cannot be written.
    """
    target = target.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise Conflict(f"{str(target)!r} exists already: name a folder that does not, or an empty one")
    staged = target.parent / f".{target.name}.{secrets.token_hex(4)}.part"  # beside it: a rename stays within a file system
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
    except OSError as error:
        raise InvalidInput(f"{str(target)!r} cannot be written: {error.strerror}") from error
    try:
        with disk_full_is_too_large():
            yield staged
            for path in [*staged.rglob("*"), staged]:
                flush(path)
        try:
            staged.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise Conflict(f"{str(target)!r} was written by something else meanwhile: choose another folder") from error
            raise
        flush(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def flush(path: Path) -> None:
    """fsync a file, or a folder's list of entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def measure(path: Path) -> FileFacts:
    """Bytes and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileFacts(bytes=size, sha256=digest.hexdigest())


@contextmanager
def disk_full_is_too_large() -> Iterator[None]:
    """Turn the system's words for a full disk into TooLarge."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise TooLarge("the disk is full: delete variants or checkpoints, then try again") from error
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(tmp: Path) -> None:
    for entry in tmp.iterdir():
        if entry.name == ".lock":
            continue
        if entry.is_dir() and _is_held(entry / ".lock"):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _is_held(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False  # no lock: whoever made the folder died before it could hold one
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _close(descriptor: int, folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child inherits this object, not the work
        shutil.rmtree(folder, ignore_errors=True)
    os.close(descriptor)
