"""The one file field of a multipart body as a stream of its bytes: nothing is collected in memory, no temporary file is made."""

from collections.abc import AsyncGenerator, AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from quantizers.errors import InvalidInput


async def stream_field(content_type: str | None, body: AsyncIterator[bytes], field: str) -> AsyncGenerator[bytes, None]:
    """The bytes of the part named `field`, as they arrive.

    Raises InvalidInput for another content type, malformed or cut off multipart, another field, or one that is there twice or never.
    """
    reader = _FieldReader(_boundary(content_type), field)
    async for chunk in body:
        for data in reader.feed(chunk):
            yield data
    reader.finish()


def _boundary(content_type: str | None) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidInput(
            f"the content type is {(content_type or 'missing')[:80]!r}: send multipart/form-data with a boundary "
            "and the bytes in the field 'data'",
            param="data",
        )
    return boundary


class _FieldReader:
    """Collects what the parser's callbacks say about one chunk, so that it can be handed on before the next chunk is read."""

    def __init__(self, boundary: bytes, field: str) -> None:
        self._field = field
        self._seen = False
        self._ended = False
        self._header_name = b""
        self._header_value = b""
        self._disposition = b""
        self._data: list[bytes] = []
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begins,
                    "on_header_field": self._name,
                    "on_header_value": self._value,
                    "on_header_end": self._header_ends,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": self._part_data,
                    "on_end": self._all_ends,
                },
            )
        except FormParserError as error:
            raise InvalidInput(f"the multipart boundary cannot be used: {error}", param="data") from error

    def feed(self, chunk: bytes) -> list[bytes]:
        """The field's bytes in `chunk`."""
        self._data = []
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidInput(f"the multipart body is malformed: {error}", param="data") from error
        return self._data

    def finish(self) -> None:
        if not self._ended:
            raise InvalidInput("the multipart body is cut off: its closing boundary is missing", param="data")
        if not self._seen:
            raise InvalidInput(f"the multipart body has no field {self._field!r}", param=self._field)

    def _part_begins(self) -> None:
        self._disposition = b""

    def _name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_ends(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _headers_end(self) -> None:
        name = parse_options_header(self._disposition.decode("latin-1"))[1].get(b"name", b"").decode("utf-8", "replace")
        if name != self._field:
            raise InvalidInput(f"unknown field {name[:80]!r}: the only field is {self._field!r}", param=name[:80] or self._field)
        if self._seen:
            raise InvalidInput(f"the field {self._field!r} is there twice: send one part a request", param=self._field)
        self._seen = True

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def _all_ends(self) -> None:
        self._ended = True
