"""The one SQLite file: its schema, and short transactions that are safe from several processes and threads."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from quantizers.errors import CorruptData

SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0  # transactions here take milliseconds; who waits longer than this meets a stuck process

_SCHEMA = """
CREATE TABLE uploads (
    id TEXT PRIMARY KEY, filename TEXT NOT NULL, bytes INTEGER NOT NULL, mime_type TEXT NOT NULL, purpose TEXT NOT NULL,
    status TEXT NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER NOT NULL, file_id TEXT, part_ids TEXT
);
CREATE TABLE parts (
    id TEXT PRIMARY KEY, upload_id TEXT NOT NULL REFERENCES uploads(id) ON DELETE CASCADE, bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL
);
CREATE INDEX parts_of_upload ON parts(upload_id);
CREATE TABLE files (
    id TEXT PRIMARY KEY, filename TEXT NOT NULL, bytes INTEGER NOT NULL, purpose TEXT NOT NULL, created_at INTEGER NOT NULL,
    sha256 TEXT NOT NULL
);
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, checkpoint TEXT NOT NULL, slug TEXT NOT NULL, recipe TEXT NOT NULL,
    options TEXT NOT NULL, state TEXT NOT NULL, stage TEXT, progress REAL NOT NULL DEFAULT 0, seconds_left REAL, error TEXT,
    created REAL NOT NULL, started REAL, finished REAL, variant TEXT, tries INTEGER NOT NULL DEFAULT 0, owner TEXT
);
CREATE UNIQUE INDEX one_open_job ON jobs(checkpoint, slug) WHERE state IN ('queued', 'running');
CREATE TABLE job_events (
    job_id TEXT NOT NULL REFERENCES jobs(id) ON DELETE CASCADE, id INTEGER NOT NULL, created REAL NOT NULL, data TEXT NOT NULL,
    PRIMARY KEY (job_id, id)
);
"""


class Database:
    """A connection per transaction, which no thread shares; one idle connection keeps the write-ahead log from being folded at each."""

    def __init__(self, path: Path) -> None:
        """Creates the file and its tables where they are missing. Raises CorruptData for a file of another schema or no database."""
        self._path = path
        try:
            self._idle = self._connect()
            self._idle.execute("PRAGMA journal_mode = WAL")
            with self.transaction() as connection:
                version = connection.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    for statement in _SCHEMA.split(";"):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                elif version != SCHEMA_VERSION:
                    raise CorruptData(
                        f"{path.name} has schema {version}, this version of Precis reads {SCHEMA_VERSION}: "
                        "use the version that wrote it, or another data directory"
                    )
        except sqlite3.DatabaseError as error:
            raise CorruptData(f"{path.name} is not a readable database ({error}): move it away to start anew") from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All statements or none; one writer at a time over all processes."""
        with closing(self._connect()) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.rollback()
                raise
            connection.commit()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent state, without waiting for a writer."""
        with closing(self._connect()) as connection:
            connection.execute("BEGIN")
            yield connection

    def close(self) -> None:
        self._idle.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        return connection
