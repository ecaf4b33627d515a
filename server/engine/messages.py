"""What crosses the socket between the HTTP process and the worker: one msgpack map a frame, {"type": ..., fields}.

Both ends validate every frame with the models below. A frame that does not fit them means that the peer is not the one that was
started, so both ends then close the connection; nothing is guessed. No torch here.
"""

from typing import Annotated, Any, Literal, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from quantizers import errors
from quantizers.errors import Overloaded, PrecisError, QuantizationFailed
from server.engine.frames import MAX_FRAME_BYTES, FrameError, framed
from server.engine.interface import Event, Failed, Request, ResidentInfo, StepStats, VariantKey, VariantSpec

T = TypeVar("T")


class _Frame(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Generate(_Frame):
    """`call` is the client's own number of the request, unique over the life of a connection; ids of callers need not be."""

    type: Literal["generate"] = "generate"
    call: int
    request: Request
    spec: VariantSpec


class Cancel(_Frame):
    type: Literal["cancel"] = "cancel"
    call: int


class Load(_Frame):
    type: Literal["load"] = "load"
    call: int
    spec: VariantSpec


class Unload(_Frame):
    type: Literal["unload"] = "unload"
    call: int
    key: VariantKey


class Hello(_Frame):
    """First frame of the worker: its device is open and it takes commands."""

    type: Literal["hello"] = "hello"
    pid: int
    device: str


class RequestEvent(_Frame):
    """One event of the request `call`; `finished` and `failed` are its last."""

    type: Literal["event"] = "event"
    call: int
    event: Event


class StepTokens(_Frame):
    """Tokens without log-probabilities, as (call, token id), of one step or several: what RequestEvents with a Token each would say."""

    type: Literal["tokens"] = "tokens"
    tokens: tuple[tuple[int, int], ...]


class Reply(_Frame):
    """Answer to Load (`resident`), to Unload (neither), or to either (`failed`)."""

    type: Literal["reply"] = "reply"
    call: int
    resident: ResidentInfo | None = None
    failed: Failed | None = None


class Stats(_Frame):
    type: Literal["stats"] = "stats"
    stats: StepStats


Command = Generate | Cancel | Load | Unload
Report = Hello | RequestEvent | StepTokens | Reply | Stats
_COMMANDS: TypeAdapter[Command] = TypeAdapter(Annotated[Command, Field(discriminator="type")])
_REPORTS: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="type")])


def encode(message: Command | Report) -> bytes:
    """The whole frame of `message`. Raises TooLarge over MAX_FRAME_BYTES, InvalidInput where a value has no place in msgpack."""
    try:
        body: bytes = msgpack.packb(message.model_dump(), use_bin_type=True)
    except (OverflowError, UnicodeEncodeError) as error:
        raise errors.InvalidInput(f"integers must fit in 64 bits and text must be valid Unicode to reach the engine: {error}") from error
    if len(body) > MAX_FRAME_BYTES:
        raise errors.TooLarge(
            f"a message of {len(body)} bytes to or from the engine is over the {MAX_FRAME_BYTES} allowed: "
            "shorten the prompt or ask for fewer log-probabilities"
        )
    return framed(body)


def decode_command(body: bytes) -> Command:
    """Raises FrameError."""
    return _decode(_COMMANDS, body)


def decode_report(body: bytes) -> Report:
    """Raises FrameError."""
    return _decode(_REPORTS, body)


def _decode(adapter: TypeAdapter[T], body: bytes) -> T:
    try:
        # Integer keys are logit_bias's; msgpack's own limits already follow from len(body).
        return adapter.validate_python(msgpack.unpackb(body, raw=False, strict_map_key=False))
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise FrameError(f"a frame of {len(body)} bytes is not a message of the engine's protocol: {_short(error)}") from error


def _short(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors()[:3])
    return f"{type(error).__name__}: {error}"[:200]


def to_failed(error: PrecisError) -> Failed:
    """`error` as an event; a subclass that the error tree does not name goes by its nearest ancestor there."""
    kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__module__ == errors.__name__)
    retry_after = error.retry_after_seconds if isinstance(error, Overloaded) else None
    return Failed(kind=kind, message=error.message, param=error.param, code=error.code, retry_after_seconds=retry_after)


def to_error(failed: Failed) -> PrecisError:
    """The exception that `failed` stands for. Raises FrameError where `kind` names no type of the error tree."""
    kind: Any = getattr(errors, failed.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, PrecisError)):
        raise FrameError(f"{failed.kind!r} is not an error of quantizers.errors")
    if kind is QuantizationFailed:  # its `layer` is already in the message
        return QuantizationFailed(failed.message)
    if kind is Overloaded:
        return Overloaded(failed.message, param=failed.param, code=failed.code, retry_after_seconds=failed.retry_after_seconds)
    error: PrecisError = kind(failed.message, param=failed.param, code=failed.code)
    return error
