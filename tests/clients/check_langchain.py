"""langchain-openai's ChatOpenAI."""

import sys
from typing import Annotated

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    millions: int = Field(ge=0, le=40)


@tool
def weather(city: Annotated[str, Field(max_length=20)]) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def model(name: str = "demo", **options: object) -> ChatOpenAI:
    return ChatOpenAI(model=name, base_url=f"{sys.argv[1]}/v1", api_key="none", temperature=0, timeout=300, max_retries=0, **options)


QUESTION = [HumanMessage("What is the capital of France?")]
answer = model(max_tokens=12).invoke(QUESTION)
assert "Paris" in answer.content and answer.usage_metadata["output_tokens"] > 0
assert "".join(chunk.content for chunk in model(max_tokens=12).stream(QUESTION)) == answer.content
print("ok: invoke and stream")
assert len(model(max_tokens=8).batch(["One", "Two", "Three"])) == 3
print("ok: batch")
city = model(max_tokens=200, seed=1).with_structured_output(City, method="json_schema").invoke("Describe Paris.")
assert isinstance(city, City)
print("ok: structured output by JSON schema")
called = model("tools", max_tokens=200).bind_tools([weather], tool_choice="weather").invoke("The weather in Rome?")
assert called.tool_calls[0]["name"] == "weather" and "city" in called.tool_calls[0]["args"]
print("ok: bound tools")
