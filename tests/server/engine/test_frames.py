"""Frames over real sockets, from both ends: whole, in pieces, cut off, and what is no frame."""

import asyncio
import random
import socket
import struct
import threading

import pytest

from server.engine.frames import MAX_FRAME_BYTES, FrameError, FrameProtocol, framed, receive_frame

BODIES = [b"one", b"", b"x" * 300_000, b"last"]


def test_frames_over_a_blocking_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=lambda: (ours.sendall(b"".join(map(framed, BODIES))), ours.close()))
        sender.start()
        assert [receive_frame(theirs) for _ in BODIES] == BODIES
        assert receive_frame(theirs) is None
        sender.join()


@pytest.mark.parametrize("sent", [b"\x00\x00", struct.pack(">I", 100) + b"half"])
def test_a_peer_that_goes_in_the_middle_is_an_end(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(sent)
        assert receive_frame(theirs) is None
    assert read([sent]) == ([], None)


def test_an_announced_length_over_the_cap_is_refused_without_reading_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(struct.pack(">I", MAX_FRAME_BYTES + 1))
        with pytest.raises(FrameError, match=str(MAX_FRAME_BYTES + 1)):
            receive_frame(theirs)


def read(pieces: list[bytes], take_from: int = 0) -> tuple[list[bytes], FrameError | None]:
    """What a FrameProtocol hands on of `pieces`, which a peer sends and then closes, and how it ends; bodies are taken after `take_from`
    pieces."""

    async def run() -> tuple[list[bytes], FrameError | None]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        transport, frames = await loop.create_unix_connection(FrameProtocol, sock=theirs)
        found: list[bytes] = []
        try:
            serving = None
            for index, piece in enumerate([*pieces, b""]):
                if index == take_from:
                    serving = asyncio.create_task(serve(frames, found))
                await loop.sock_sendall(ours, piece)
                await asyncio.sleep(0.002)
            ours.close()
            assert serving is not None
            await asyncio.wait_for(serving, 10)
        except FrameError as error:
            return found, error
        finally:
            transport.close()
            ours.close()
        return found, None

    return asyncio.run(run())


async def serve(frames: FrameProtocol, found: list[bytes]) -> None:
    first = await frames.first()
    if first is not None:
        found.append(first)
        await frames.serve(found.append)


@pytest.mark.parametrize("take_from", [0, 5])
def test_frames_over_a_stream_however_they_are_cut(take_from: int) -> None:
    choose, data = random.Random(take_from), b"".join(map(framed, BODIES))
    cuts = [2, 9, *(choose.randrange(len(data)) for _ in range(4))]
    pieces = [data[first:last] for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True)]
    assert read(pieces, take_from) == (BODIES, None)


def test_what_follows_a_wrong_frame_is_not_read() -> None:
    found, error = read([framed(b"good"), framed(b"also") + b"\xff" * 8 + framed(b"never"), framed(b"nor this")])
    assert found == [b"good", b"also"] and "over the" in str(error)
    found, error = read([b"\xff" * 8])
    assert found == [] and "over the" in str(error)


def test_who_takes_may_refuse() -> None:
    """As the client does with a body that is no report: nothing more is handed on, and whoever serves is told."""

    async def run() -> list[bytes]:
        frames, taken = FrameProtocol(), list[bytes]()

        def take(body: bytes) -> None:
            taken.append(body)
            if body == b"bad":
                raise FrameError("no report")

        frames.data_received(framed(b"hello") + framed(b"good"))
        assert await frames.first() == b"hello"
        serving = asyncio.create_task(frames.serve(take))
        await asyncio.sleep(0)
        frames.data_received(framed(b"bad") + framed(b"more"))
        frames.data_received(framed(b"more"))
        with pytest.raises(FrameError, match="no report"):
            await serving
        frames.connection_lost(None)
        return taken

    assert asyncio.run(run()) == [b"good", b"bad"]
