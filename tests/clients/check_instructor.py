"""instructor, with answers by tools and by JSON schema."""

import sys

import instructor
import openai
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", timeout=300, max_retries=0)
MESSAGES = [{"role": "user", "content": "Invent a person."}]
for mode, model in ((instructor.Mode.TOOLS, "tools"), (instructor.Mode.JSON_SCHEMA, "demo")):
    person = instructor.from_openai(client, mode=mode).chat.completions.create(
        model=model, messages=MESSAGES, response_model=Person, max_tokens=200, max_retries=0, seed=1
    )
    assert isinstance(person, Person)
    print(f"ok: {mode.value}")
