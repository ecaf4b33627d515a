"""What the worker says over its socket, whoever reads, and how fast."""

import random
import socket
import threading
import time

from server.engine.frames import receive_frame
from server.engine.interface import Failed
from server.engine.messages import RequestEvent, StepTokens, decode_report
from server.engine.worker import _Writer

REPORTS = 20_000


def note(connection: socket.socket, found: dict[int, list[int]]) -> bool:
    """Read one report and note its tokens by call; False at the end."""
    frame = receive_frame(connection)
    if frame is None:
        return False
    report = decode_report(frame)
    assert isinstance(report, StepTokens)
    for call, index in report.tokens:
        found[call].append(index)
    return True


def test_a_reader_that_lags_holds_nobody_up_and_misses_nothing() -> None:
    """Far more than the socket holds, from two threads, while nobody reads; then from a reader that pauses."""
    ours, theirs = socket.socketpair()
    writer = _Writer(ours)

    def emit(caller: int) -> None:
        for index in range(REPORTS):
            writer.emit(StepTokens(tokens=((caller, index),)))

    threads = [threading.Thread(target=emit, args=(caller,)) for caller in (1, 2)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "who emits waits for who reads"
    assert time.monotonic() - began < 30
    choose = random.Random(0)
    found: dict[int, list[int]] = {1: [], 2: []}
    for _ in range(2 * REPORTS):
        if choose.random() < 0.001:
            time.sleep(0.005)
            writer.emit(StepTokens(tokens=()))  # while it is behind, and when it is not any more
        note(theirs, found)
    writer.flush(5)
    ours.shutdown(socket.SHUT_WR)
    while note(theirs, found):
        pass
    assert found == {caller: list(range(REPORTS)) for caller in (1, 2)}, "in order, each once"
    ours.close()
    theirs.close()


def test_a_report_too_large_for_a_frame_is_its_requests_failure() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer = _Writer(ours)
        writer.emit(RequestEvent(call=7, event=Failed(kind="InvalidInput", message="x" * (65 << 20))))
        frame = receive_frame(theirs)
        assert frame is not None
        report = decode_report(frame)
        assert isinstance(report, RequestEvent) and isinstance(report.event, Failed)
        assert (report.call, report.event.kind) == (7, "TooLarge")
        writer.flush(5)
