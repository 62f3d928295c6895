"""Clients that are made for structured output: instructor and Pydantic AI. And httpx-sse."""

import json
import sys
from typing import Literal

import httpx
import httpx_sse
import instructor
import openai
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

given = json.load(sys.stdin)
question = given["messages"][-1]["content"]


class Country(BaseModel):
    """The answer about a country."""

    capital: Literal["Tokyo", "Kyoto"]
    island: bool


def by_instructor():
    client = openai.OpenAI(base_url=given["base_url"], api_key=given["key"], max_retries=0)
    wrapped = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
    return wrapped.chat.completions.create(
        model=given["model"],
        messages=given["messages"],
        response_model=Country,
        max_retries=0,
        max_tokens=60,
        temperature=0,
    ).model_dump()


def pydantic_ai():
    provider = OpenAIProvider(base_url=given["base_url"], api_key=given["key"])
    model = OpenAIChatModel(given["model"], provider=provider)
    settings = {"max_tokens": 60, "temperature": 0}
    text = Agent(model, model_settings={**settings, **given["greedy"]}).run_sync(question)
    agent = Agent(model, output_type=NativeOutput(Country), model_settings=settings)
    usage = text.usage() if callable(text.usage) else text.usage
    return {
        "text": text.output,
        "usage": [usage.input_tokens, usage.output_tokens],
        "structured": agent.run_sync(question).output.model_dump(),
    }


def events():
    body = {"model": given["model"], "messages": given["messages"], "stream": True}
    address = f"{given['base_url']}/chat/completions"
    headers = {"Authorization": f"Bearer {given['key']}"}
    with httpx.Client(timeout=60, headers=headers) as client:
        with httpx_sse.connect_sse(
            client, "POST", address, json={**body, **given["greedy"]}
        ) as source:
            found = [event.data for event in source.iter_sse()]
    chunks = [json.loads(one) for one in found[:-1]]
    return {
        "last": found[-1],
        "text": "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks),
    }


print(
    json.dumps({"instructor": by_instructor(), "pydantic_ai": pydantic_ai(), "httpx_sse": events()})
)
