"""Messages to the prompt's text through the checkpoint's own chat template, in transformers' sandboxed jinja, within a time limit.

A template is a program that came with a checkpoint, so it runs in a thread of its own that is stopped when it takes too long.
"""

import asyncio
import ctypes
import threading
from typing import Any

import jinja2

from quantizers.errors import InvalidInput
from server.text.tokenizer import Tokenizer, check_text

TIME_LIMIT = 2.0  # seconds; an ordinary template takes well under a millisecond

# What a template can raise over its input; anything else is our own fault and stays what it is.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)


class _Stopped(BaseException):
    """Raised inside a runaway rendering; not an Exception, so that no handler of the template engine catches it."""


async def render_chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    time_limit: float = TIME_LIMIT,
    *,
    tools: list[dict[str, Any]] | None = None,
    opens_turn: bool = True,
) -> str:
    """The prompt's text, with the opening of the assistant's turn at its end unless the conversation is over. `tools` are in OpenAI's form.

    Raises InvalidInput (param `messages`) where there is no template, where it refuses the messages, or where it runs out of time.
    """
    if tokenizer.chat_template is None:
        raise InvalidInput("this checkpoint has no chat template: send a text to /v1/completions instead", param="messages")
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[str] = loop.create_future()
    thread = threading.Thread(
        target=_render, args=(tokenizer, messages, tools, opens_turn, loop, outcome), name="chat-template", daemon=True
    )
    thread.start()
    try:
        async with asyncio.timeout(time_limit):
            text = await outcome
    except TimeoutError as error:
        _stop(thread)
        raise InvalidInput(
            f"the chat template did not finish within {time_limit:g} s: send fewer or shorter messages, or repair the template",
            param="messages",
        ) from error
    except asyncio.CancelledError:
        _stop(thread)
        raise
    except _TEMPLATE_ERRORS as error:
        raise InvalidInput(f"the chat template refuses these messages: {error}", param="messages") from error
    check_text(text, "messages")
    return text


def _render(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    opens_turn: bool,
    loop: asyncio.AbstractEventLoop,
    outcome: "asyncio.Future[str]",
) -> None:
    try:
        try:
            text = tokenizer.backend.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=opens_turn)
        except Exception as error:  # noqa: BLE001 - handed to the waiting coroutine, which translates it
            _settle(loop, outcome, error)
        else:
            _settle(loop, outcome, str(text))
    except _Stopped:
        return


def _settle(loop: asyncio.AbstractEventLoop, outcome: "asyncio.Future[str]", result: str | BaseException) -> None:
    def settle() -> None:
        if outcome.done():
            return
        if isinstance(result, BaseException):
            outcome.set_exception(result)
        else:
            outcome.set_result(result)

    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)


def _stop(thread: threading.Thread) -> None:
    """Raise _Stopped inside `thread` at its next bytecode, if it still runs (CPython's PyThreadState_SetAsyncExc)."""
    if thread.is_alive() and thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Stopped))
