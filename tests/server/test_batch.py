"""Batches through the real application over a scripted engine: order, resuming, and what is wrong with single lines."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from quantizers.errors import InvalidInput
from server.batch import Summary, run_batch


class Service:
    """An application that answers with the prompt, later for odd ones, and counts what it is asked at once."""

    def __init__(self, answer: Callable[[int], Response] | None = None) -> None:
        self.app = Starlette(routes=[Route("/v1/completions", self._complete, methods=["POST"])])
        self.asked: list[Any] = []
        self.most = self._now = 0
        self._answer = answer

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body["prompt"])
        nth = len(self.asked)
        self._now += 1
        self.most = max(self.most, self._now)
        await asyncio.sleep(0.02 if nth % 2 else 0.001)
        self._now -= 1
        if self._answer is not None:
            return self._answer(nth)
        return JSONResponse({"text": body["prompt"]}, headers={"X-Request-Id": f"req-{body['prompt']}"})


def line(custom_id: Any, **fields: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": custom_id}, **fields})


def run(service: Service, source: Path, at_once: int = 4) -> tuple[Summary, list[dict[str, Any]]]:
    target = source.with_suffix(".out")
    shares: list[float] = []
    summary = asyncio.run(run_batch(service.app, source, target, lambda done, share: shares.append(share), at_once=at_once))
    assert shares == sorted(shares) and all(0 < share <= 1 for share in shares)
    return summary, [json.loads(text) for text in target.read_text().splitlines()]


def test_answers_are_in_order_and_several_at_once(tmp_path: Path) -> None:
    source, service = tmp_path / "in.jsonl", Service()
    source.write_text("\n".join(line(f"r{index} é") for index in range(20)) + "\n\n")
    summary, answers = run(service, source)
    assert summary == Summary(20, 0, 0) and 1 < service.most <= 4
    assert [answer["custom_id"] for answer in answers] == [f"r{index} é" for index in range(20)]
    assert answers[3]["response"]["body"] == {"text": "r3 é"} and answers[3]["response"]["status_code"] == 200
    assert answers[3]["error"] is None and len({answer["id"] for answer in answers}) == 20


@pytest.mark.parametrize("cut", [0, 5, 200, 400, 1000])
def test_an_interrupted_batch_goes_on_behind_its_last_whole_line(tmp_path: Path, cut: int) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(line(f"r{index}") + "\n" for index in range(9)))
    _, whole = run(Service(), source)
    target = source.with_suffix(".out")
    target.write_bytes(target.read_bytes()[:cut])
    kept = target.read_bytes().count(b"\n")
    service = Service()
    summary, answers = run(service, source)
    assert summary == Summary(9 - kept, 0, kept) and len(service.asked) == 9 - kept
    assert [answer["custom_id"] for answer in answers] == [answer["custom_id"] for answer in whole]
    again = Service()
    assert run(again, source)[0] == Summary(0, 0, 9) and again.asked == []


def test_answers_to_other_lines_are_not_gone_on_with(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(line("a") + "\n")
    run(Service(), source)
    source.write_text(line("b") + "\n")
    with pytest.raises(InvalidInput, match="--output"):
        run(Service(), source)


@pytest.mark.parametrize(
    ("raw", "custom_id", "code", "param"),
    [
        ("no json", None, "invalid_json", None),
        ("[1]", None, "invalid_json", None),
        ("{}", None, "missing_field", "custom_id"),
        (line(5), None, "invalid_value", "custom_id"),
        (line("x", url="/v1/models"), "x", "invalid_value", "url"),
        (line("x", method="GET"), "x", "invalid_value", "url"),
        (line("x", more=1), "x", "unknown_field", "more"),
        (line("x", body=[]), "x", "invalid_value", "body"),
        (line("x", body={"prompt": "x", "stream": True}), "x", "invalid_value", "body.stream"),
        (line("good"), "good", "duplicate_custom_id", "custom_id"),
        ('{"a": "\\ud800"}', None, "invalid_json", None),
        ("[" * 100_000, None, "invalid_json", None),
    ],
)  # fmt: skip
def test_a_bad_line_has_its_error_and_the_rest_their_answers(tmp_path: Path, raw: str, custom_id: Any, code: str, param: Any) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(f"{line('good')}\n{raw}\n{line('better')}\n")
    summary, (first, bad, last) = run(Service(), source)
    assert summary == Summary(2, 1, 0)
    assert first["response"]["body"] == {"text": "good"} and last["response"]["body"] == {"text": "better"}
    assert (bad["custom_id"], bad["response"]) == (custom_id, None)
    assert (bad["error"]["code"], bad["error"]["param"]) == (code, param) and bad["error"]["message"]


def test_a_line_without_an_end_is_bounded(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"x" * (11 << 20) + b"\n" + line("good").encode())
    summary, (bad, good) = run(Service(), source)
    assert summary == Summary(1, 1, 0) and bad["error"]["code"] == "line_too_long" and good["custom_id"] == "good"


def test_errors_are_answers_and_a_full_server_is_asked_again(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(line("a") + "\n" + line("b") + "\n")
    busy = JSONResponse({"error": {}}, 503, headers={"Retry-After": "0.01"})
    service = Service(lambda asked: busy if asked <= 3 else JSONResponse({"error": {"message": "no"}}, 404))
    summary, answers = run(service, source)
    assert summary == Summary(0, 2, 0) and len(service.asked) == 5
    assert [answer["response"]["status_code"] for answer in answers] == [404, 404]
