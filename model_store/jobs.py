"""Quantization jobs: a table of what was asked for, how far it is and how it ended, with an event log that a client can resume.

queued ──> running ──> succeeded | failed | cancelled
  │           └──────> queued          (its process died; at most MAX_TRIES starts)
  └──────────────────> cancelled | failed
"""

import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from model_store.database import Database
from model_store.inspection import check_name
from quantizers.errors import Conflict, InvalidInput, NotFound
from quantizers.recipe import Recipe

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
MAX_TRIES = 3  # a job that took its process down three times will do so a fourth time

ALLOWED: dict[State, tuple[State, ...]] = {
    "queued": ("running", "cancelled", "failed"),
    "running": ("succeeded", "failed", "cancelled", "queued"),
    "succeeded": (),
    "failed": (),
    "cancelled": (),
}


class JobError(BaseModel):
    """As in an HTTP error's body."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    message: str
    param: str | None = None
    code: str | None = None


class Job(BaseModel):
    """`progress` from 0 to 1 over the whole job; times in seconds since 1970; `variant` is the id of what was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    checkpoint: str
    slug: str
    recipe: Recipe
    options: dict[str, Any]
    state: State
    stage: str | None
    progress: float
    seconds_left: float | None
    error: JobError | None
    created: float
    started: float | None
    finished: float | None
    variant: str | None
    tries: int

    @property
    def is_over(self) -> bool:
        return not ALLOWED[self.state]


class JobEvent(BaseModel):
    """Event `id` of a job, counted from 1 without gaps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: int
    created: float
    data: dict[str, Any]


class Jobs:
    """The tables `jobs` and `job_events`. Every change of a job is an event as well, in the same transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, checkpoint: str, recipe: Recipe, options: Mapping[str, Any] | None = None) -> Job:
        """Queue one recipe over one checkpoint. Where such a job is queued or running, that one is returned instead.

        Raises Conflict where the open job has other options or another recipe under the same slug.
        """
        check_name(checkpoint)
        wanted = (recipe.model_dump_json(), json.dumps(dict(options or {}), sort_keys=True))
        with self._database.transaction() as connection:
            row = connection.execute(
                "SELECT * FROM jobs WHERE checkpoint = ? AND slug = ? AND state IN ('queued', 'running')", (checkpoint, recipe.slug)
            ).fetchone()
            if row is not None:
                if (row["recipe"], row["options"]) != wanted:
                    raise Conflict(
                        f"{row['id']} makes {checkpoint}@{recipe.slug} with other options: wait for it or cancel it", param="recipe"
                    )
                return _job(row)
            job_id = f"job-{secrets.token_hex(12)}"
            connection.execute(
                "INSERT INTO jobs (id, checkpoint, slug, recipe, options, state, created) VALUES (?,?,?,?,?,'queued',?)",
                (job_id, checkpoint, recipe.slug, *wanted, time.time()),
            )
            _append(connection, job_id, {"state": "queued"})
            return _job(_row(connection, job_id))

    def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        with self._database.reading() as connection:
            return _job(_row(connection, job_id))

    def list(self, state: State | None = None, checkpoint: str | None = None) -> list[Job]:
        """Jobs in the order they were created, of one state or checkpoint where given."""
        query = "SELECT * FROM jobs WHERE (? IS NULL OR state = ?) AND (? IS NULL OR checkpoint = ?) ORDER BY number"
        with self._database.reading() as connection:
            return [_job(row) for row in connection.execute(query, (state, state, checkpoint, checkpoint))]

    def counts(self) -> dict[State, int]:
        """Jobs by state, for the metrics."""
        counts: dict[State, int] = dict.fromkeys(get_args(State), 0)
        with self._database.reading() as connection:
            counts.update({row[0]: row[1] for row in connection.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state")})
        return counts

    def start_next(self, owner: str) -> Job | None:
        """Take the oldest queued job and mark it running for `owner`, a name of the process; None where the queue is empty."""
        with self._database.transaction() as connection:
            row = connection.execute("SELECT id FROM jobs WHERE state = 'queued' ORDER BY number LIMIT 1").fetchone()
            return None if row is None else self._start(connection, row["id"], owner)

    def start(self, job_id: str, owner: str) -> Job:
        """Mark one queued job running for `owner`. Raises NotFound, Conflict where it is not queued."""
        with self._database.transaction() as connection:
            return self._start(connection, job_id, owner)

    def advance(self, job_id: str, *, stage: str, progress: float, seconds_left: float | None = None, loss: float | None = None) -> Job:
        """Say how far a running job is, and the last step's loss where it trains, which only the event has.

        Raises InvalidInput for a share outside of 0 to 1, Conflict where it does not run.
        """
        if not 0 <= progress <= 1:
            raise InvalidInput(f"progress is {progress}: it is a share from 0 to 1", param="progress")
        with self._database.transaction() as connection:
            row = _row(connection, job_id)
            if row["state"] != "running":
                raise Conflict(f"{job_id} is {row['state']}, not running: it makes no progress", param="job_id")
            facts = {"stage": stage, "progress": progress, "seconds_left": seconds_left}
            connection.execute("UPDATE jobs SET stage = ?, progress = ?, seconds_left = ? WHERE id = ?", (*facts.values(), job_id))
            _append(connection, job_id, {"state": "running", **facts, **({} if loss is None else {"loss": loss})})
            return _job(_row(connection, job_id))

    def succeed(self, job_id: str, variant: str) -> Job:
        """End a running job; `variant` is the id of what it made. Raises NotFound, Conflict."""
        with self._database.transaction() as connection:
            return _move(connection, job_id, "succeeded", progress=1.0, seconds_left=0.0, variant=variant, finished=time.time())

    def fail(self, job_id: str, message: str, *, param: str | None = None, code: str | None = None) -> Job:
        """End a job with what went wrong. Raises NotFound, Conflict where it is over already."""
        error = JobError(message=message, param=param, code=code).model_dump_json()
        with self._database.transaction() as connection:
            return _move(connection, job_id, "failed", error=error, seconds_left=None, finished=time.time())

    def cancel(self, job_id: str) -> Job:
        """End a queued or running job; who runs it has to stop it. Raises NotFound, Conflict where it is over already."""
        with self._database.transaction() as connection:
            return _move(connection, job_id, "cancelled", seconds_left=None, finished=time.time())

    def recover(self, is_alive: Callable[[str], bool] | None = None) -> tuple[Job, ...]:
        """Queue again the jobs that dead processes left running, or fail them after MAX_TRIES starts; those jobs.

        To be called before any job runs; `is_alive` says of an owner whether it still works, where several processes run
        jobs; without it none does.
        """
        with self._database.transaction() as connection:
            running = connection.execute("SELECT * FROM jobs WHERE state = 'running' ORDER BY number").fetchall()
            return tuple(self._recover(connection, row) for row in running if is_alive is None or not is_alive(row["owner"]))

    def append_event(self, job_id: str, data: Mapping[str, Any]) -> JobEvent:
        """Log something that is no change of the job itself, such as a layer's error. Raises NotFound."""
        with self._database.transaction() as connection:
            _row(connection, job_id)
            return _append(connection, job_id, data)

    def events_since(self, job_id: str, last_event_id: int = 0) -> tuple[JobEvent, ...]:
        """Events after `last_event_id`, oldest first. Raises NotFound."""
        with self._database.reading() as connection:
            _row(connection, job_id)
            rows = connection.execute(
                "SELECT * FROM job_events WHERE job_id = ? AND id > ? ORDER BY id", (job_id, last_event_id)
            ).fetchall()
        return tuple(JobEvent(id=row["id"], created=row["created"], data=json.loads(row["data"])) for row in rows)

    @staticmethod
    def _start(connection: sqlite3.Connection, job_id: str, owner: str) -> Job:
        tries = _row(connection, job_id)["tries"] + 1
        return _move(connection, job_id, "running", owner=owner, tries=tries, started=time.time(), progress=0.0, stage=None)

    @staticmethod
    def _recover(connection: sqlite3.Connection, row: sqlite3.Row) -> Job:
        if row["tries"] < MAX_TRIES:
            return _move(connection, row["id"], "queued", owner=None, stage=None, progress=0.0, seconds_left=None, started=None)
        error = JobError(message=f"its process died in each of {row['tries']} tries", code="process_died").model_dump_json()
        return _move(connection, row["id"], "failed", error=error, seconds_left=None, finished=time.time())


def _move(connection: sqlite3.Connection, job_id: str, state: State, **columns: Any) -> Job:
    """Change the state, where the table at the top allows it, with other columns and an event. Column names are this file's own."""
    row = _row(connection, job_id)
    if state not in ALLOWED[row["state"]]:
        raise Conflict(f"{job_id} is {row['state']} and cannot become {state}", param="job_id")
    assignments = ", ".join(f"{name} = ?" for name in ("state", *columns))
    connection.execute(f"UPDATE jobs SET {assignments} WHERE id = ?", (state, *columns.values(), job_id))  # noqa: S608
    job = _job(_row(connection, job_id))
    event = {"state": state, "stage": job.stage, "progress": job.progress, "variant": job.variant}
    _append(connection, job_id, event | ({"error": job.error.model_dump()} if job.error else {}))
    return job


def _append(connection: sqlite3.Connection, job_id: str, data: Mapping[str, Any]) -> JobEvent:
    last = connection.execute("SELECT COALESCE(MAX(id), 0) FROM job_events WHERE job_id = ?", (job_id,)).fetchone()[0]
    event = JobEvent(id=last + 1, created=time.time(), data=dict(data))
    connection.execute("INSERT INTO job_events VALUES (?,?,?,?)", (job_id, event.id, event.created, json.dumps(event.data)))
    return event


def _row(connection: sqlite3.Connection, job_id: str) -> sqlite3.Row:
    row: sqlite3.Row | None = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise NotFound(f"no job {job_id[:80]!r}: the id is in the answer that created it", param="job_id")
    return row


def _job(row: sqlite3.Row) -> Job:
    values: dict[str, Any] = {key: row[key] for key in Job.model_fields}
    values["recipe"] = Recipe.model_validate_json(row["recipe"])
    values["options"] = json.loads(row["options"])
    values["error"] = JobError.model_validate_json(row["error"]) if row["error"] else None
    return Job(**values)
