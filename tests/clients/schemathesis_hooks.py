"""Make most of the generated requests ask for a model that is there, and for short answers, so that more than their model is looked at."""

from typing import Any

import schemathesis

MOST_TOKENS = 4


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """One in four bodies of the generation routes stays as it was generated."""
    path = context.operation.path
    if path in ("/v1/completions", "/v1/chat/completions") and isinstance(body, dict) and hash(repr(body)) % 4:
        body["model"] = "demo"
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(name), int) and not isinstance(body[name], bool):
                body[name] = min(body[name], MOST_TOKENS)
        body.setdefault("max_tokens", MOST_TOKENS)
        if isinstance(body.get("n"), int):
            body["n"] = min(body["n"], 2)
    return body
