"""pydantic-ai: an agent's text, its stream, a typed output and a tool."""

import asyncio
import sys

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


def model(name: str) -> OpenAIChatModel:
    return OpenAIChatModel(name, provider=OpenAIProvider(base_url=f"{sys.argv[1]}/v1", api_key="none"))


async def main() -> None:
    settings = {"max_tokens": 200, "temperature": 0.0, "seed": 1}
    agent = Agent(model("demo"), model_settings=settings)
    answer = await agent.run("What is the capital of France? Answer in one word.")
    assert "Paris" in answer.output and answer.usage.output_tokens > 0 if not callable(answer.usage) else answer.usage().output_tokens > 0
    print("ok: run")
    async with agent.run_stream("What is the capital of France? Answer in one word.") as stream:
        assert await stream.get_output() == answer.output
    print("ok: stream")
    typed = await Agent(model("tools"), output_type=Person, model_settings=settings).run("Invent a person.")
    assert isinstance(typed.output, Person)
    print("ok: typed output by tool")
    typed = await Agent(model("demo"), output_type=NativeOutput(Person), model_settings=settings).run("Invent a person.")
    assert isinstance(typed.output, Person)
    print("ok: typed output by JSON schema")


asyncio.run(main())
