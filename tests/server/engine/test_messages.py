"""Frames: what goes in comes out, and what is no message of the protocol is refused, whatever it is."""

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quantizers import errors
from quantizers.errors import InvalidInput, OutOfMemory, PrecisError, QuantizationFailed, TooLarge
from server.engine.frames import MAX_FRAME_BYTES, FrameError
from server.engine.interface import Failed, Finished, Request, Sampling, Started, Token, TokenLogprob, VariantKey, VariantSpec
from server.engine.messages import (
    Cancel,
    Generate,
    Reply,
    RequestEvent,
    StepTokens,
    Unload,
    decode_command,
    decode_report,
    encode,
    to_error,
    to_failed,
)
from server.engine.sampler import NonFiniteLogits

KEY = VariantKey(model="m", precision="bf16")
SPEC = VariantSpec(key=KEY, checkpoint_dir="/c", artifact_dir=None)
UINT64 = st.integers(0, 2**63)
FINITE = st.floats(-100, 100)
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=UINT64,
    temperature=st.floats(0, 2),
    logit_bias=st.dictionaries(st.integers(0, 2**31), FINITE),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop_token_ids=st.lists(UINT64).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
REQUESTS = st.builds(Request, id=TEXT, variant=st.just(KEY), prompt_token_ids=st.lists(UINT64).map(tuple), sampling=SAMPLINGS)
LOGPROBS = st.builds(TokenLogprob, token_id=UINT64, logprob=FINITE, top=st.lists(st.tuples(UINT64, FINITE), max_size=3).map(tuple))
EVENTS = (
    st.builds(Started, prompt_tokens=UINT64, prompt_logprobs=st.none() | st.lists(st.none() | LOGPROBS, max_size=3).map(tuple))
    | st.builds(Token, token_id=UINT64, logprob=st.none() | LOGPROBS)
    | st.builds(Failed, kind=TEXT, message=TEXT, param=st.none() | TEXT)
    | st.builds(Finished, reason=st.sampled_from(["stop", "length", "cancelled"]), prompt_tokens=UINT64, completion_tokens=UINT64)
)


@given(UINT64, REQUESTS)
def test_commands_survive_the_wire(call: int, request: Request) -> None:
    for command in (Generate(call=call, request=request, spec=SPEC), Cancel(call=call), Unload(call=call, key=KEY)):
        assert decode_command(encode(command)[4:]) == command


@given(UINT64, EVENTS)
def test_events_survive_the_wire(call: int, event: Started | Token | Finished | Failed) -> None:
    report = RequestEvent(call=call, event=event)
    assert decode_report(encode(report)[4:]) == report


@given(st.lists(st.tuples(UINT64, UINT64), max_size=40))
def test_tokens_of_a_step_survive_the_wire(tokens: list[tuple[int, int]]) -> None:
    report = StepTokens(tokens=tuple(tokens))
    assert decode_report(encode(report)[4:]) == report


@pytest.mark.parametrize("tokens", [None, 5, [[1]], [[1, 2, 3]], [["a", 2]], {"1": 2}])
def test_tokens_of_another_shape_are_refused(tokens: object) -> None:
    with pytest.raises(FrameError):
        decode_report(msgpack.packb({"type": "tokens", "tokens": tokens}))


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xc1")
@example(b"\x91" * 100_000)  # nested beyond any stack
@example(b"\xdf\xff\xff\xff\xff")  # announces 4 billion entries
@example(msgpack.packb({"type": "cancel"}))
@example(msgpack.packb({"type": "cancel", "call": "one"}))
@example(msgpack.packb({"type": "cancel", "call": 1, "also": 2}))
@example(msgpack.packb({"type": "exec", "call": 1}))
@example(msgpack.packb({"type": "hello", "pid": 1, "device": "cpu"}))
@example(msgpack.packb({b"\xff": 1, 1.5: 2}))
@example(msgpack.packb([1, 2, 3]))
@example(msgpack.packb(msgpack.ExtType(5, b"x")))
@example(b"\xd9\x02\xff\xff")  # a string that is not UTF-8
def test_other_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(FrameError):
        decode_command(body)


def test_a_nan_where_a_range_is_checked_is_refused() -> None:
    body = msgpack.unpackb(encode(Generate(call=1, request=request_of(3), spec=SPEC))[4:], strict_map_key=False)
    body["request"]["sampling"]["temperature"] = float("nan")
    with pytest.raises(FrameError, match="temperature"):
        decode_command(msgpack.packb(body))


def request_of(tokens: int, **sampling: object) -> Request:
    return Request(id="r", variant=KEY, prompt_token_ids=tuple(range(tokens)), sampling=Sampling(max_tokens=1, **sampling))


def test_what_is_too_large_is_refused_before_it_is_sent() -> None:
    with pytest.raises(TooLarge, match=str(MAX_FRAME_BYTES)):
        encode(RequestEvent(call=1, event=Failed(kind="InvalidInput", message="x" * (MAX_FRAME_BYTES + 1))))


def test_what_msgpack_cannot_say_is_the_callers_error() -> None:
    with pytest.raises(InvalidInput, match="64 bits"):
        encode(Generate(call=1, request=request_of(1, seed=2**64), spec=SPEC))
    with pytest.raises(InvalidInput, match="Unicode"):
        encode(Unload(call=1, key=VariantKey(model="\ud800", precision="bf16")))


def error_types(root: type[PrecisError]) -> list[type[PrecisError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in error_types(child))]


@pytest.mark.parametrize("kind", [kind for kind in error_types(PrecisError) if kind.__module__ == errors.__name__])
def test_every_error_of_the_tree_crosses(kind: type[PrecisError]) -> None:
    error = kind("what, and what to do")
    returned = to_error(decode_report(encode(RequestEvent(call=1, event=to_failed(error)))[4:]).event)  # type: ignore[union-attr, arg-type]
    assert (type(returned), returned.message, returned.param, returned.code) == (kind, error.message, error.param, error.code)


def test_details_of_an_error_cross() -> None:
    returned = to_error(to_failed(OutOfMemory("no", param="model", code="tight")))
    assert (returned.param, returned.code) == ("model", "tight")
    assert to_error(to_failed(QuantizationFailed("bad", layer="layers.0"))).message == "layers.0: bad"


def test_an_error_that_only_the_worker_knows_goes_by_its_parent() -> None:
    assert to_failed(NonFiniteLogits("nan")).kind == "PrecisError"
    assert to_failed(NonFiniteLogits("nan")).code == "nonfinite_logits"


@pytest.mark.parametrize("kind", ["SystemExit", "__builtins__", "nonsense", ""])
def test_a_name_that_is_no_error_of_ours_is_refused(kind: str) -> None:
    with pytest.raises(FrameError):
        to_error(Failed(kind=kind, message="x"))


def test_an_answer_carries_the_resident_or_the_failure() -> None:
    reply = Reply(call=1, failed=to_failed(InvalidInput("no")))
    assert decode_report(encode(reply)[4:]) == reply
