"""The engine's process: opens the device, takes commands from the socket that it inherited, computes.

    python -m server.engine.worker --socket-fd N [options of `_options`]

Threads: the main one computes; others read commands, write reports, load variants, report gauges every second and wait for SIGTERM.
The process ends when its parent does, because the socket then ends, whatever it is doing.
"""

import argparse
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from typing import NoReturn, get_args

import torch

from quantizers.errors import PrecisError, TooLarge
from server.engine.device import default_budget, open_device
from server.engine.frames import FrameError, receive_frame
from server.engine.interface import KvDtype
from server.engine.loading import FolderLoader
from server.engine.loop import Loop
from server.engine.messages import (
    Cancel,
    Generate,
    Hello,
    Load,
    Report,
    RequestEvent,
    Stats,
    Unload,
    decode_command,
    encode,
    to_failed,
)
from server.engine.residents import Residents
from server.residency import Ledger

logger = logging.getLogger("server.engine.worker")  # not __main__

_STATS_SECONDS = 1.0
_FLUSH_SECONDS = 2.0  # for the last reports to reach a client that still reads


class _Writer:
    """Reports to the socket, in order. Who emits sends what the socket takes at once; the rest goes out in a thread of its own, so that
    nobody who emits waits for who reads. To wake that thread for every step would cost the step more than the sending does."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._behind = 0  # pieces that the thread has yet to send
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def emit(self, report: Report) -> None:
        frame = _frame(report)
        with self._lock:
            rest = frame if self._behind else frame[self._send(frame) :]
            if rest:
                self._behind += 1
                self._queue.put(rest)

    def _send(self, frame: bytes) -> int:
        """Bytes that the socket took without waiting."""
        try:
            return self._connection.send(frame, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            _leave("the server no longer reads")

    def flush(self, seconds: float) -> None:
        self._queue.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (rest := self._queue.get()) is not None:
            try:
                self._connection.sendall(rest)
            except OSError:
                _leave("the server no longer reads")
            with self._lock:
                self._behind -= 1


def _frame(report: Report) -> bytes:
    """A report too large for a frame becomes its request's failure instead of a silence."""
    try:
        return encode(report)
    except TooLarge as error:
        if not isinstance(report, RequestEvent):
            raise
        return encode(RequestEvent(call=report.call, event=to_failed(error)))


def _leave(why: str) -> NoReturn:
    """End at once from any thread: the other threads may be deep in a kernel, and nobody is left to hear of them."""
    logger.info("leaving: %s", why)
    sys.stderr.flush()
    os._exit(0)


def _read(connection: socket.socket, loop: Loop) -> None:
    try:
        while (body := receive_frame(connection)) is not None:
            command = decode_command(body)
            match command:
                case Generate():
                    loop.submit(command.call, command.request, command.spec)
                case Cancel():
                    loop.cancel(command.call)
                case Load():
                    loop.load(command.call, command.spec)
                case Unload():
                    loop.unload(command.call, command.key)
    except FrameError as error:
        logger.error("closing the connection: %s", error)
    _leave("the server is gone")


def _report(loop: Loop, writer: _Writer) -> None:
    while True:
        time.sleep(_STATS_SECONDS)
        writer.emit(Stats(stats=loop.stats()))


def _catch_sigterm() -> int:
    """A descriptor that turns readable with SIGTERM, whichever thread gets it; a handler alone would wait for the main one to wake."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writable)
    return readable


def _await_sigterm(terminated: int, loop: Loop) -> None:
    os.read(terminated, 1)
    logger.info("stopping")
    loop.close()


def _start(target: object, *arguments: object) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()  # type: ignore[arg-type]


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.engine.worker", description="The engine's process; started by the server.")
    parser.add_argument("--socket-fd", type=int, required=True, help="inherited Unix socket to the server")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--memory-budget-bytes", type=int, help="what residents may hold; default 80 %% of what is free")
    parser.add_argument("--max-waiting", type=int, default=64, help="requests that may wait")
    parser.add_argument("--speculation", choices=("off", "lookup"), default="lookup", help="guess tokens and verify them, where that pays")
    parser.add_argument("--twin-precision", help="variant of each checkpoint that drafts for the others, while it is resident and idle")
    parser.add_argument("--kv-dtype", choices=get_args(KvDtype), default="auto", help="of cached keys and values; auto: the model's")
    parser.add_argument("--threads", type=int, help="of a matrix product; default: cores of this process")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Serve until SIGTERM, or until the socket ends. Returns the exit status."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    terminated = _catch_sigterm()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the server decides when this process ends
    options = _options(arguments)
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    try:
        device = open_device(options.device)
    except PrecisError as error:
        logger.error("%s", error.message)
        return 2
    budget = options.memory_budget_bytes or default_budget(device)
    connection = socket.socket(fileno=options.socket_fd)
    writer = _Writer(connection)
    residents = Residents(FolderLoader(device, options.kv_dtype), Ledger(budget), device)
    loop = Loop(
        residents,
        writer.emit,
        max_waiting=options.max_waiting,
        speculates=options.speculation == "lookup",
        twin_precision=options.twin_precision,
    )
    writer.emit(Hello(pid=os.getpid(), device=str(device)))
    writer.emit(Stats(stats=loop.stats()))
    _start(_await_sigterm, terminated, loop)
    _start(_read, connection, loop)
    _start(loop.run_loads)
    _start(_report, loop, writer)
    loop.run()
    writer.flush(_FLUSH_SECONDS)
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    # Not sys.exit: a daemon thread inside a kernel would be torn down with the interpreter under it.
    os._exit(status)
