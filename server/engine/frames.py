"""Bytes of a socket as frames, on both ends: a length (4 bytes, big-endian, at most MAX_FRAME_BYTES), then as many bytes.

What a frame holds is `messages`' matter.
"""

import asyncio
import collections
import socket
import struct
from collections.abc import Callable

MAX_FRAME_BYTES = 64 << 20  # top-20 log-probabilities of a 128k prompt take about 40 MiB, and nothing larger is ever sent
_LENGTH = struct.Struct(">I")


class FrameError(Exception):
    """Bytes that are no frame of this protocol, or whose content is none."""


def framed(body: bytes) -> bytes:
    """`body`, of at most MAX_FRAME_BYTES, as a frame."""
    return _LENGTH.pack(len(body)) + body


def _length(header: bytes | bytearray) -> int:
    length = int.from_bytes(header, "big")
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame announces {length} bytes, over the {MAX_FRAME_BYTES} allowed")
    return length


class FrameProtocol(asyncio.Protocol):
    """Hands the body of every frame on in the very turn of the event loop in which its last byte arrives."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._bodies: collections.deque[bytes] = collections.deque()  # that nobody has taken yet
        self._take: Callable[[bytes], None] | None = None
        self._arrived = asyncio.Event()  # a body, or the end
        self._ended: asyncio.Future[FrameError | None] = asyncio.get_running_loop().create_future()

    async def first(self) -> bytes | None:
        """The body of the first frame, None where the peer closed before it was whole. Raises FrameError."""
        await self._arrived.wait()
        if self._bodies:
            return self._bodies.popleft()
        self._end()
        return None

    async def serve(self, take: Callable[[bytes], None]) -> None:
        """Give `take` every body that follows, in order, until the peer closes, in or between frames.

        Raises FrameError: that of the bytes, or what `take` raises.
        """
        self._take = take
        self._hand_on()
        await self._ended
        self._end()

    def data_received(self, data: bytes) -> None:
        if self._ended.done():
            return  # what follows a wrong frame has no meaning
        self._buffer += data
        try:
            while len(self._buffer) >= _LENGTH.size:
                end = _LENGTH.size + _length(self._buffer[: _LENGTH.size])
                if len(self._buffer) < end:
                    break
                self._bodies.append(bytes(self._buffer[_LENGTH.size : end]))
                del self._buffer[:end]
                self._arrived.set()
        except FrameError as error:
            self._finish(error)
        self._hand_on()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - a peer that dies and one that closes are the same here
        self._finish(None)

    def _hand_on(self) -> None:
        try:
            while self._bodies and self._take is not None:
                self._take(self._bodies.popleft())
        except FrameError as error:
            self._bodies.clear()
            self._finish(error)

    def _finish(self, error: FrameError | None) -> None:
        if not self._ended.done():
            self._ended.set_result(error)
        self._arrived.set()

    def _end(self) -> None:
        if (error := self._ended.result()) is not None:
            raise error


def receive_frame(connection: socket.socket) -> bytes | None:
    """The body of the next frame of a blocking socket, None where the peer closed, in or between frames. Raises FrameError."""
    try:
        header = _receive(connection, _LENGTH.size)
        return None if header is None else _receive(connection, _length(header))
    except ConnectionError:
        return None


def _receive(connection: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        chunk = connection.recv(min(count - len(data), 1 << 20))
        if not chunk:
            return None
        data += chunk
    return bytes(data)
