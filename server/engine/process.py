"""One worker process from start to end: its socket, its log lines, its last words. What is said over the socket is `client`'s matter."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections import deque
from typing import Protocol, Self

from quantizers.errors import EngineUnavailable
from server.engine.frames import FrameError, FrameProtocol
from server.engine.messages import Hello, decode_report

logger = logging.getLogger("server.engine.worker")

_TERMINATE_SECONDS = 5.0  # from SIGTERM to SIGKILL: one step, and the last reports
_EXIT_SECONDS = 2.0  # from the end of the socket to the end of the process
_LEVELS = {"DEBUG": logging.DEBUG, "INFO": logging.INFO, "WARNING": logging.WARNING, "ERROR": logging.ERROR, "CRITICAL": logging.CRITICAL}


class EngineSettings(Protocol):
    """What of the server's settings the worker is started with. No budget: 80 % of the memory that is free then."""

    @property
    def device(self) -> str: ...

    @property
    def memory_budget_bytes(self) -> int | None: ...

    @property
    def max_waiting(self) -> int: ...

    @property
    def speculation(self) -> str: ...

    @property
    def twin_precision(self) -> str | None: ...

    @property
    def kv_dtype(self) -> str: ...


def worker_command(settings: EngineSettings, socket_fd: int, threads: int | None) -> list[str]:
    """The worker's command line. None leaves the threads to the worker: every core that this process may use."""
    # -P: a folder named `server` where the user happens to stand is not ours.
    command = [sys.executable, "-P", "-m", "server.engine.worker", "--socket-fd", str(socket_fd)]
    command += ["--device", settings.device, "--max-waiting", str(settings.max_waiting)]
    command += ["--speculation", settings.speculation, "--kv-dtype", settings.kv_dtype]
    if settings.twin_precision is not None:
        command += ["--twin-precision", settings.twin_precision]
    if settings.memory_budget_bytes is not None:
        command += ["--memory-budget-bytes", str(settings.memory_budget_bytes)]
    if threads is not None:
        command += ["--threads", str(threads)]
    return command


class WorkerProcess:
    """A worker that said hello. `frames` and `transport` are the two directions of its socket."""

    def __init__(self, process: asyncio.subprocess.Process, transport: asyncio.WriteTransport, frames: FrameProtocol) -> None:
        self.transport, self.frames = transport, frames
        self._process = process
        self._last_lines: deque[str] = deque(maxlen=3)
        assert process.stderr is not None
        self._log = asyncio.create_task(self._pass_on(process.stderr), name="engine-log")

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def start(cls, settings: EngineSettings, *, threads: int | None, timeout_seconds: float) -> Self:
        """Start a worker and wait for its hello. Raises EngineUnavailable, and leaves no process, where it does not come in time."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *worker_command(settings, theirs.fileno(), threads),
                    pass_fds=[theirs.fileno()],
                    stdin=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                    env=_environment(),
                )
            except OSError as error:
                ours.close()
                raise EngineUnavailable(f"the engine's process cannot be started: {error}") from error
        worker = cls(process, *await asyncio.get_running_loop().create_unix_connection(FrameProtocol, sock=ours))
        try:
            async with asyncio.timeout(timeout_seconds):
                body = await worker.frames.first()
            if body is not None and isinstance(decode_report(body), Hello):
                return worker
            why = "its first words are not the protocol's" if body is not None else None
        except (TimeoutError, FrameError) as error:
            why = f"no hello within {timeout_seconds:g} s" if isinstance(error, TimeoutError) else str(error)
        except BaseException:
            await worker.finish()
            raise
        death = await worker.finish()
        raise EngineUnavailable(f"the engine's process did not come up: {why or death}")

    async def terminate(self) -> None:
        """SIGTERM, then SIGKILL for one that does not end; what it reports meanwhile is still to be taken from `frames`."""
        if self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), _TERMINATE_SECONDS)
            except TimeoutError:
                logger.warning("the engine's process did not end within %g s of SIGTERM and is killed", _TERMINATE_SECONDS)
                self._kill()

    async def finish(self) -> str:
        """Close the socket, which ends the process; wait, kill if need be. Returns how it died, for people."""
        self.transport.close()
        try:
            await asyncio.wait_for(self._process.wait(), _EXIT_SECONDS)
        except TimeoutError:
            self._kill()
            await self._process.wait()
        await self._log
        return self._death()

    def _kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    def _death(self) -> str:
        code = self._process.returncode
        assert code is not None, "finish() has waited"
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        words = f" (last words: {' | '.join(self._last_lines)})" if code > 0 and self._last_lines else ""
        return f"its process ended, {how}{words}"

    async def _pass_on(self, stream: asyncio.StreamReader) -> None:
        """The worker's stderr as log lines here; what is no log line of its own, such as a traceback, as warnings."""
        pending = b""
        while chunk := await stream.read(1 << 16):
            *lines, pending = (pending + chunk).split(b"\n")
            if len(pending) > 1 << 16:  # a line without an end must not grow here
                lines.append(pending)
                pending = b""
            for line in lines:
                self._log_line(line)
        if pending:
            self._log_line(pending)

    def _log_line(self, line: bytes) -> None:
        text = line.decode("utf-8", errors="replace").rstrip()
        if text:
            word, _, rest = text.partition(" ")
            logger.log(_LEVELS.get(word, logging.WARNING), "%s", rest if word in _LEVELS else text)
            self._last_lines.append(text)


def _environment() -> dict[str, str]:
    """The server's, with the hub's clients offline: the worker reads folders only."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
