"""Chat templates: programs of strangers, which may refuse, fail or never end."""

import asyncio
import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from quantizers.errors import InvalidInput
from server.text.chat import render_chat
from server.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]


def with_template(demo: Path, folder: Path, template: str | None) -> Tokenizer:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(demo / name, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


def render(tokenizer: Tokenizer, time_limit: float = 2.0) -> str:
    return asyncio.run(render_chat(tokenizer, MESSAGES, time_limit))


def test_rendering_is_transformers_own(demo: Path) -> None:
    tokenizer = Tokenizer(demo)
    expected = tokenizer.backend.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert render(tokenizer) == expected
    assert expected.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{% for %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ range(10**9) | list }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_cannot_do_is_invalid_input(demo: Path, tmp_path: Path, template: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        render(with_template(demo, tmp_path, template))
    assert caught.value.param == "messages"


def test_a_template_that_never_ends_is_stopped(demo: Path, tmp_path: Path) -> None:
    endless = "{% set r = range(90000) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}"
    begun = time.monotonic()
    with pytest.raises(InvalidInput, match="did not finish"):
        render(with_template(demo, tmp_path, endless), time_limit=0.2)
    assert time.monotonic() - begun < 1.5
    deadline = time.monotonic() + 3
    while any(thread.name == "chat-template" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the thread runs on"
        time.sleep(0.02)


def test_the_loop_turns_while_a_template_runs(demo: Path, tmp_path: Path) -> None:
    endless = "{% set r = range(90000) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"
    tokenizer = with_template(demo, tmp_path, endless)

    async def count_turns() -> int:
        task = asyncio.create_task(render_chat(tokenizer, MESSAGES, 0.5))
        turns = 0
        while not task.done():
            await asyncio.sleep(0.01)
            turns += 1
        with pytest.raises(InvalidInput):
            await task
        return turns

    assert asyncio.run(count_turns()) > 10


def test_no_template(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no chat template") as caught:
        render(with_template(demo, tmp_path, None))
    assert caught.value.param == "messages"


def test_a_template_that_makes_half_a_character(demo: Path, tmp_path: Path) -> None:
    template = "{{ " + json.dumps("\ud83d") + " }}"
    with pytest.raises(InvalidInput):
        render(with_template(demo, tmp_path, template))
