"""Runs quantization jobs: one at a time, each in a process of its own that can be killed, its progress written to the store as events."""

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from functools import partial
from typing import Any

from anyio.to_thread import run_sync

from model_store.jobs import Job, JobEvent
from model_store.store import Store
from quantizers.errors import Conflict, InvalidInput, NotFound
from quantizers.recipe import parse_recipe
from server.calibration import CalibrationOptions
from server.settings import Settings

logger = logging.getLogger(__name__)

EVENT_SECONDS = 0.2  # progress events are no closer than this: every one is a transaction


class JobRunner:
    """The queue's only consumer. What it knows lies in the store, so that a restart goes on where the last process stopped."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings, self._store = settings, store
        self._owner = f"server-{os.getpid()}"
        self._task: asyncio.Task[None] | None = None
        self._process: Process | None = None
        self._running: str | None = None  # id of the job that `_process` runs
        self._changed = asyncio.Condition()
        self._queued = asyncio.Event()

    async def start(self) -> None:
        """Queue again what a dead server left running, and begin to work."""
        for job in await run_sync(self._store.jobs.recover):
            logger.info("%s, interrupted by the end of the last server, is %s", job.id, job.state)
        self._queued.set()
        self._task = asyncio.create_task(self._work(), name="quantization jobs")

    async def stop(self) -> None:
        """Kill the running process; its job is queued again at the next start."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def submit(self, checkpoint: str, slug: str, calibration: CalibrationOptions | None = None) -> Job:
        """Queue a job, or return the open one for this variant; without `calibration`, whatever that calibrates on.

        Raises NotFound, UnknownRecipe, Conflict where the variant exists or is being made with another calibration, InvalidInput where
        the recipe looks at no tokens.
        """
        recipe = parse_recipe(slug)
        if calibration is not None and not recipe.needs_calibration:
            raise InvalidInput(f"{slug} looks at no calibration tokens: leave calibration out", param="calibration")
        if recipe.is_baseline:
            raise Conflict(f"{slug} is a baseline: {checkpoint}@{slug} needs no quantization, ask for it as it is", param="recipe")
        with contextlib.suppress(NotFound):
            await run_sync(self._store.checkpoints.get, checkpoint)
            await run_sync(self._store.variants.get, checkpoint, slug)
            raise Conflict(f"{checkpoint}@{slug} exists already: delete it to make it anew", param="recipe")
        await run_sync(self._store.checkpoints.get, checkpoint)
        open_jobs = [job for job in await run_sync(self._store.jobs.list, None, checkpoint) if job.slug == slug and not job.is_over]
        if open_jobs and calibration is None:
            return open_jobs[0]
        options = {"calibration": calibration.model_dump(mode="json")} if calibration else {}
        job = await run_sync(self._store.jobs.create, checkpoint, recipe, options)
        self._queued.set()
        await self._notify()
        return job

    async def cancel(self, job_id: str) -> Job:
        """End a queued or running job at once. Raises NotFound, Conflict where it is over."""
        job = await run_sync(self._store.jobs.cancel, job_id)
        if self._running == job_id:
            self._kill()  # and `_run` removes what it leaves
        else:
            await run_sync(self._store.forget_training, job.checkpoint, job.slug)
        await self._notify()
        return job

    async def wait(self, job_id: str) -> Job:
        """The job, when it is over. Raises NotFound."""
        async with self._changed:
            while not (job := await run_sync(self._store.jobs.get, job_id)).is_over:
                await self._changed.wait()
        return job

    async def changed(self, job_id: str, last_event_id: int, timeout: float) -> tuple[JobEvent, ...]:
        """Events after `last_event_id`, waiting up to `timeout` seconds for the first; empty after that. Raises NotFound."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout), self._changed:
                while not (events := await run_sync(self._store.jobs.events_since, job_id, last_event_id)):
                    await self._changed.wait()
            return events
        return ()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _work(self) -> None:
        while True:
            await self._queued.wait()
            self._queued.clear()
            while (job := await run_sync(self._store.jobs.start_next, self._owner)) is not None:
                await self._notify()
                await self._run(job)
                await self._notify()

    async def _run(self, job: Job) -> None:
        """One job to its end, whatever that is; an error here must not end the queue."""
        command = [sys.executable, "-m", "server.quantize_worker", "--data-dir", str(self._settings.data_dir)]
        command += ["--checkpoint", job.checkpoint, "--recipe", job.slug, "--device", self._settings.device]
        if "calibration" in job.options:
            command += ["--calibration", json.dumps(job.options["calibration"])]
        self._process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, limit=1 << 22)
        self._running = job.id
        try:
            last = await self._follow(job.id, self._process)
            status = await self._process.wait()
        finally:
            self._kill()
            self._process, self._running = None, None
        if (await run_sync(self._store.jobs.get, job.id)).is_over:  # cancelled meanwhile
            await run_sync(self._store.forget_training, job.checkpoint, job.slug)
            return
        if "result" in last:
            peak = {name: last["result"][name] for name in ("peak_bytes", "predicted_peak_bytes")}
            await run_sync(self._store.jobs.append_event, job.id, {"state": "running", **peak})
            await run_sync(self._store.jobs.succeed, job.id, last["result"]["variant"])
            return
        error = last.get("error") or {
            "message": f"the quantization process ended with status {status}"
            + (", killed, perhaps for want of memory" if status < 0 else ""),
            "param": None,
            "code": "process_died",
        }
        logger.warning("%s (%s@%s) failed: %s", job.id, job.checkpoint, job.slug, error["message"])
        await run_sync(partial(self._store.jobs.fail, job.id, error["message"], param=error["param"], code=error["code"]))

    async def _follow(self, job_id: str, process: Process) -> dict[str, Any]:
        """Write progress to the store as it comes; the last line, which is no progress."""
        assert process.stdout is not None
        last: dict[str, Any] = {}
        due = 0.0
        async for line in process.stdout:
            message: dict[str, Any] = json.loads(line)
            if "progress" not in message:
                last = message
                continue
            predicted = message["progress"]["predicted_peak_bytes"]
            if predicted is not None:
                said = {"state": "running", "predicted_peak_bytes": predicted}
                await run_sync(self._store.jobs.append_event, job_id, said)
            if time.monotonic() < due:
                continue
            due = time.monotonic() + EVENT_SECONDS
            now = message["progress"]
            with contextlib.suppress(Conflict):  # cancelled a moment ago
                share = now["done"] / now["total"] if now["total"] else 0.0
                facts = {"stage": now["stage"], "progress": share, "seconds_left": now["seconds_left"], "loss": now["loss"]}
                await run_sync(partial(self._store.jobs.advance, job_id, **facts))
            await self._notify()
        return last

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
