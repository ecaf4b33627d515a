"""Uploads in parts, as OpenAI's interface has them: announced, sent in any order and number, then assembled to one file.

A part counts once it is whole on the disk: it is written under `tmp/`, renamed into `uploads/<id>/`, and then noted in the database.
What was interrupted before that leaves nothing, so a client resumes by asking which parts there are.
"""

import asyncio
import hashlib
import json
import secrets
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict

from model_store.atomic import CHUNK, Staging, disk_full_is_too_large, flush
from model_store.database import Database
from model_store.files import File, Files, new_file
from model_store.inspection import check_filename
from quantizers.errors import Conflict, InvalidInput, NotFound, TooLarge

LIFETIME_SECONDS = 24 * 3600  # a large model over a slow line takes a night
STORED_PER_ANNOUNCED = 2  # parts whose answer was lost are sent again; more than twice everything is no resuming
MAX_PARTS = 10_000

Status = Literal["pending", "completed", "cancelled", "expired"]


class Part(BaseModel):
    """OpenAI's UploadPart object, with its size for clients that resume."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    object: Literal["upload.part"] = "upload.part"
    upload_id: str
    bytes: int
    created_at: int


class Upload(BaseModel):
    """OpenAI's Upload object. `bytes` is what was announced; `file` is there once completed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    mime_type: str
    purpose: str
    status: Status
    file: File | None = None


class Uploads:
    """The folder `uploads/` and its tables. Calls block on the disk, except `add_part`, which an event loop can await."""

    def __init__(self, root: Path, staging: Staging, database: Database, files: Files, max_bytes: int) -> None:
        self._root, self._staging, self._database, self._files = root, staging, database, files
        self._max_bytes = max_bytes
        root.mkdir(parents=True, exist_ok=True)
        with database.transaction() as connection:
            pending = {row["id"] for row in connection.execute("SELECT id FROM uploads WHERE status = 'pending'")}
            for path in root.iterdir():
                if path.name not in pending:
                    staging.remove(path)

    def create(self, filename: str, size: int, mime_type: str, purpose: str) -> Upload:
        """Announce `size` bytes. Raises InvalidInput, and TooLarge where the limit or the disk does not hold them."""
        check_filename(filename)
        if size <= 0:
            raise InvalidInput(f"bytes is {size}: announce the size of the file, at least 1", param="bytes")
        if size > self._max_bytes:
            raise TooLarge(f"{size} bytes are announced, allowed are {self._max_bytes}", param="bytes")
        free = shutil.disk_usage(self._root).free
        if 2 * size > free:  # parts and the file that is assembled of them lie side by side for a moment
            raise TooLarge(f"{size} bytes are announced and need twice that for a moment, the disk has {free} left", param="bytes")
        now = int(time.time())
        upload_id = f"upload_{secrets.token_hex(12)}"
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO uploads (id, filename, bytes, mime_type, purpose, status, created_at, expires_at) VALUES (?,?,?,?,?,?,?,?)",
                (upload_id, filename, size, mime_type, purpose, "pending", now, now + LIFETIME_SECONDS),
            )
            (self._root / upload_id).mkdir()
        return self.get(upload_id)

    def get(self, upload_id: str) -> Upload:
        """Raises NotFound."""
        with self._database.reading() as connection:
            row = _row(connection, upload_id)
        file = self._files.get(row["file_id"]) if row["file_id"] and self._has_file(row["file_id"]) else None
        return Upload(**{key: row[key] for key in Upload.model_fields if key in row.keys()}, file=file)  # noqa: SIM118

    def parts(self, upload_id: str) -> list[Part]:
        """The parts that arrived whole, in the order of arrival. Raises NotFound."""
        with self._database.reading() as connection:
            _row(connection, upload_id)
            rows = connection.execute("SELECT * FROM parts WHERE upload_id = ? ORDER BY rowid", (upload_id,)).fetchall()
        return [Part(**row) for row in rows]

    async def add_part(self, upload_id: str, chunks: AsyncIterator[bytes]) -> Part:
        """Write one part as it streams in. Raises NotFound, Conflict where the upload is not pending, InvalidInput for an empty part,
        TooLarge; whatever `chunks` raises goes on. In each case the part leaves nothing."""
        upload = await asyncio.to_thread(self._pending, upload_id)
        with self._incoming(upload) as incoming:
            async for chunk in chunks:
                await asyncio.to_thread(incoming.write, chunk)
            return await asyncio.to_thread(self._keep, incoming)

    def add_part_from(self, upload_id: str, chunks: Iterable[bytes]) -> Part:
        """`add_part` for a caller that may block: an iterable of bytes, such as an open file's reads."""
        with self._incoming(self._pending(upload_id)) as incoming:
            for chunk in chunks:
                incoming.write(chunk)
            return self._keep(incoming)

    def complete(self, upload_id: str, part_ids: Sequence[str], md5: str | None = None) -> Upload:
        """Assemble the parts in the order given. The answer's `file` is the result; asking again in the same words gives it again.

        Raises InvalidInput for ids that are unknown or twice there, for a total that differs from the announced one, or an MD5 (in hex)
        that does; NotFound; Conflict where the upload is not pending.
        """
        if (done := self._completed_before(upload_id, part_ids)) is not None:
            return done
        upload = self._pending(upload_id)
        self._check_parts(upload, part_ids)
        with self._staging.file() as staged, disk_full_is_too_large():
            try:
                size, sha256, found_md5 = _assemble([self._root / upload_id / each for each in part_ids], staged)
            except FileNotFoundError as error:
                raise Conflict(f"{upload_id} was cancelled or completed meanwhile", param="upload_id") from error
            if md5 is not None and md5.lower() != found_md5:
                raise InvalidInput(
                    f"the assembled file has the MD5 {found_md5}, announced was {md5[:80]!r}: send the parts anew", param="md5"
                )
            file = new_file(self._files.new_id(), filename=upload.filename, size=size, purpose=upload.purpose, sha256=sha256)
            flush(staged)
            with self._database.transaction() as connection:
                _check_pending(_row(connection, upload_id))
                connection.execute(
                    "INSERT INTO files (id, filename, bytes, purpose, created_at, sha256) VALUES (?,?,?,?,?,?)",
                    (file.id, file.filename, file.bytes, file.purpose, file.created_at, file.sha256),
                )
                connection.execute(
                    "UPDATE uploads SET status = 'completed', file_id = ?, part_ids = ? WHERE id = ?",
                    (file.id, json.dumps(list(part_ids)), upload_id),
                )
                self._files.place(staged, file.id)
        self._staging.remove(self._root / upload_id)
        return self.get(upload_id)

    def cancel(self, upload_id: str) -> Upload:
        """Drop a pending upload and its parts. Cancelling twice is no error. Raises NotFound, Conflict where it was completed."""
        with self._database.transaction() as connection:
            row = _row(connection, upload_id)
            if row["status"] != "cancelled":
                _check_pending(row)
                self._drop(connection, upload_id, "cancelled")
        self._staging.remove(self._root / upload_id)
        return self.get(upload_id)

    def expire(self, now: float) -> list[str]:
        """Drop every upload that is pending past its time; their ids. `now` in seconds since 1970."""
        with self._database.transaction() as connection:
            rows = connection.execute("SELECT id FROM uploads WHERE status = 'pending' AND expires_at <= ?", (now,)).fetchall()
            stale = [str(row["id"]) for row in rows]
            for upload_id in stale:
                self._drop(connection, upload_id, "expired")
        for upload_id in stale:
            self._staging.remove(self._root / upload_id)
        return stale

    def counts(self) -> dict[Status, int]:
        """Uploads by state, for the metrics."""
        counts: dict[Status, int] = {"pending": 0, "completed": 0, "cancelled": 0, "expired": 0}
        with self._database.reading() as connection:
            counts.update({row[0]: row[1] for row in connection.execute("SELECT status, COUNT(*) FROM uploads GROUP BY status")})
        return counts

    def _has_file(self, file_id: str) -> bool:
        with self._database.reading() as connection:
            return connection.execute("SELECT 1 FROM files WHERE id = ?", (file_id,)).fetchone() is not None

    def _pending(self, upload_id: str) -> Upload:
        upload = self.get(upload_id)
        _check_pending({"id": upload.id, "status": upload.status, "expires_at": upload.expires_at})
        return upload

    @contextmanager
    def _incoming(self, upload: Upload) -> Iterator["_Incoming"]:
        with self._staging.file() as path, disk_full_is_too_large(), path.open("wb") as file:
            yield _Incoming(upload, path, file)

    def _keep(self, incoming: "_Incoming") -> Part:
        upload, size = incoming.upload, incoming.size
        if size == 0:
            raise InvalidInput("the part is empty: send at least one byte in 'data'", param="data")
        incoming.file.flush()
        flush(incoming.path)  # before the transaction, which others wait for
        part = Part(id=f"part_{secrets.token_hex(12)}", upload_id=upload.id, bytes=size, created_at=int(time.time()))
        with self._database.transaction() as connection:
            _check_pending(_row(connection, upload.id))
            stored, count = connection.execute(
                "SELECT COALESCE(SUM(bytes), 0), COUNT(*) FROM parts WHERE upload_id = ?", (upload.id,)
            ).fetchone()
            if stored + size > STORED_PER_ANNOUNCED * upload.bytes or count >= MAX_PARTS:
                raise TooLarge(
                    f"{upload.id} has {count} parts of {stored} bytes for {upload.bytes} announced ones: complete or cancel it",
                    param="data",
                )
            self._staging.publish(incoming.path, self._root / upload.id / part.id)
            connection.execute(
                "INSERT INTO parts (id, upload_id, bytes, created_at) VALUES (?,?,?,?)", (part.id, upload.id, size, part.created_at)
            )
        return part

    def _check_parts(self, upload: Upload, part_ids: Sequence[str]) -> None:
        known = {part.id: part.bytes for part in self.parts(upload.id)}
        unknown = [each for each in part_ids if each not in known]
        if unknown:
            raise InvalidInput(f"{upload.id} has no part {unknown[0][:80]!r}; it has {len(known)} parts", param="part_ids")
        if len(set(part_ids)) != len(part_ids):
            raise InvalidInput("a part id occurs twice: name each part once, in the order of the file", param="part_ids")
        total = sum(known[each] for each in part_ids)
        if total != upload.bytes:
            raise InvalidInput(f"the parts named have {total} bytes, announced were {upload.bytes}", param="part_ids")

    def _completed_before(self, upload_id: str, part_ids: Sequence[str]) -> Upload | None:
        with self._database.reading() as connection:
            row = _row(connection, upload_id)
        if row["status"] != "completed" or json.loads(row["part_ids"]) != list(part_ids):
            return None
        upload = self.get(upload_id)
        return upload if upload.file is not None else None

    @staticmethod
    def _drop(connection: sqlite3.Connection, upload_id: str, status: Status) -> None:
        connection.execute("DELETE FROM parts WHERE upload_id = ?", (upload_id,))
        connection.execute("UPDATE uploads SET status = ? WHERE id = ?", (status, upload_id))


class _Incoming:
    """One part on its way to the disk."""

    def __init__(self, upload: Upload, path: Path, file: BinaryIO) -> None:
        self.upload, self.path, self.file = upload, path, file
        self.size = 0

    def write(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self.size > self.upload.bytes:
            raise TooLarge(f"the part has more bytes than the {self.upload.bytes} that were announced for the whole file", param="data")
        self.file.write(chunk)


def _row(connection: sqlite3.Connection, upload_id: str) -> sqlite3.Row:
    row: sqlite3.Row | None = connection.execute("SELECT * FROM uploads WHERE id = ?", (upload_id,)).fetchone()
    if row is None:
        raise NotFound(f"no upload {upload_id[:80]!r}: the id is in the answer that created it", param="upload_id")
    return row


def _check_pending(row: Any) -> None:
    if row["status"] != "pending":
        raise Conflict(f"{row['id']} is {row['status']}: create a new upload", param="upload_id")
    if row["expires_at"] <= time.time():
        raise Conflict(f"{row['id']} is expired: create a new upload", param="upload_id")


def _assemble(parts: Sequence[Path], target: Path) -> tuple[int, str, str]:
    """Concatenate in one pass; bytes, SHA-256 and MD5 of the whole."""
    sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
    with target.open("wb") as out:
        for path in parts:
            with path.open("rb") as part:
                while chunk := part.read(CHUNK):
                    out.write(chunk)
                    sha256.update(chunk)
                    md5.update(chunk)
                    size += len(chunk)
    return size, sha256.hexdigest(), md5.hexdigest()
