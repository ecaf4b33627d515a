"""Completed uploads: one file each under `files/<id>`, with its facts in the database."""

import secrets
import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from model_store.atomic import Staging
from model_store.database import Database
from quantizers.errors import NotFound


class File(BaseModel):
    """OpenAI's File object; `sha256` is ours. `bytes` and `created_at` as theirs, in seconds since 1970."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    sha256: str


class Files:
    """The folder `files/` and its table. A row without its file, or a file without its row, does not last a restart."""

    def __init__(self, root: Path, staging: Staging, database: Database) -> None:
        self._root, self._staging, self._database = root, staging, database
        root.mkdir(parents=True, exist_ok=True)
        with database.transaction() as connection:  # while this is held, no other process is between rename and commit
            known = {row["id"] for row in connection.execute("SELECT id FROM files")}
            for path in root.iterdir():
                if path.name not in known:
                    staging.remove(path)

    def list(self) -> list[File]:
        """All files, oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute("SELECT * FROM files ORDER BY created_at, id").fetchall()
        return [File(**row) for row in rows]

    def get(self, file_id: str) -> File:
        """Raises NotFound."""
        with self._database.reading() as connection:
            row = connection.execute("SELECT * FROM files WHERE id = ?", (file_id,)).fetchone()
        if row is None:
            raise NotFound(f"no file {file_id[:80]!r}: the id is in the answer that completed its upload", param="file_id")
        return File(**row)

    def path(self, file_id: str) -> Path:
        """Where the bytes lie. They are not to be changed. Raises NotFound."""
        return self._root / self.get(file_id).id

    def delete(self, file_id: str) -> None:
        """Raises NotFound. A checkpoint that was made of the file keeps its own link to the bytes."""
        with self._database.transaction() as connection:
            if connection.execute("DELETE FROM files WHERE id = ?", (file_id,)).rowcount == 0:
                raise NotFound(f"no file {file_id[:80]!r}", param="file_id")
        self._staging.remove(self._root / file_id)

    def new_id(self) -> str:
        return f"file-{secrets.token_hex(12)}"

    def place(self, staged: Path, file_id: str) -> None:
        """Move a whole file in. The caller's transaction inserts the row, so that both come or neither stays."""
        self._staging.publish(staged, self._root / file_id)


def new_file(file_id: str, *, filename: str, size: int, purpose: str, sha256: str) -> File:
    """The facts of a file that is about to exist."""
    return File(id=file_id, bytes=size, created_at=int(time.time()), filename=filename, purpose=purpose, sha256=sha256)
