"""OpenAI's Python client: plain, streamed, asynchronous, parsed, raw, and its errors."""

import asyncio
import json
import sys
from typing import Any, Literal

import openai
from pydantic import BaseModel

given = json.load(sys.stdin)
MODEL, MESSAGES, GREEDY = given["model"], given["messages"], given["greedy"]
client = openai.OpenAI(base_url=given["base_url"], api_key=given["key"], max_retries=0)


class Country(BaseModel):
    """What `parse` asks for; its fields end soon, so that a small model fulfills them."""

    capital: Literal["Tokyo", "Kyoto"]
    island: bool


def summary(completion: Any) -> dict[str, Any]:
    (choice,) = completion.choices
    return {
        "text": choice.message.content,
        "finish_reason": choice.finish_reason,
        "usage": [completion.usage.prompt_tokens, completion.usage.completion_tokens],
        "model": completion.model,
    }


def plain() -> Any:
    return summary(client.chat.completions.create(model=MODEL, messages=MESSAGES, **GREEDY))


def streamed() -> Any:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    return {
        "text": "".join(choice.delta.content or "" for choice in choices),
        "finish_reason": choices[-1].finish_reason,
        "usage": [chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens],
        "role": choices[0].delta.role,
        "ids": len({chunk.id for chunk in chunks}),
        "pieces": sum(bool(choice.delta.content) for choice in choices),
    }


def stream_helper() -> Any:
    """Its final completion raises if the length ended it, so this one is longer."""
    longer = {**GREEDY, "max_tokens": 30}
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, **longer) as stream:
        events = [event.type for event in stream]
        text = stream.get_final_completion().choices[0].message.content
    return {"text": text, "events": sorted(set(events))}


def asynchronous() -> Any:
    async def four() -> list[str]:
        async with openai.AsyncOpenAI(base_url=given["base_url"], api_key=given["key"]) as many:
            create = many.chat.completions.create
            found = await asyncio.gather(
                *(create(model=MODEL, messages=MESSAGES, **GREEDY) for _ in range(3))
            )
            stream = await create(model=MODEL, messages=MESSAGES, stream=True, **GREEDY)
            pieces = [c.choices[0].delta.content or "" async for c in stream if c.choices]
        return [*(one.choices[0].message.content for one in found), "".join(pieces)]

    return asyncio.run(four())


def parsed() -> Any:
    completion = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Country, max_tokens=60, temperature=0
    )
    value = completion.choices[0].message.parsed
    assert isinstance(value, Country), completion
    return value.model_dump()


def raw() -> Any:
    response = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, **GREEDY
    )
    return {
        "status": response.status_code,
        "content_type": response.headers["content-type"],
        "text": response.parse().choices[0].message.content,
    }


def parts() -> Any:
    """The same question as a list of text parts."""
    content = [{"type": "text", "text": MESSAGES[-1]["content"]}]
    messages = [*MESSAGES[:-1], {"role": "user", "content": content}]
    return summary(client.chat.completions.create(model=MODEL, messages=messages, **GREEDY))


def extra_fields() -> Any:
    """vLLM's own fields, which `temperature` 0 ignores, and one that changes nothing at 1."""
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.0}
    return summary(
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, extra_body=extra, seed=1, **GREEDY
        )
    )


def several() -> Any:
    """Three choices with a seed, twice."""
    options: dict[str, Any] = {"n": 3, "seed": 7, "temperature": 1.0, "max_tokens": 12}
    runs = [
        client.chat.completions.create(model=MODEL, messages=MESSAGES, **options) for _ in range(2)
    ]
    return [[choice.message.content for choice in run.choices] for run in runs]


def completions() -> Any:
    plain = client.completions.create(model=MODEL, prompt=given["prompt"], **GREEDY)
    stream = client.completions.create(model=MODEL, prompt=given["prompt"], stream=True, **GREEDY)
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    return {
        "text": plain.choices[0].text,
        "usage": [plain.usage.prompt_tokens, plain.usage.completion_tokens],
        "streamed": "".join(pieces),
    }


def models() -> Any:
    (model,) = client.models.list().data
    return {"listed": model.id, "retrieved": client.models.retrieve(model.id).id}


def errors() -> Any:
    found = {}
    wrong: dict[str, Any] = {
        "temperature": {"temperature": 9},
        "model": {"model": "gpt-5"},
        "messages": {"messages": []},
    }
    for name, change in wrong.items():
        try:
            client.chat.completions.create(
                **{"model": MODEL, "messages": MESSAGES, **GREEDY, **change}
            )
        except openai.APIStatusError as error:
            found[name] = {
                "class": type(error).__name__,
                "param": error.param,
                "type": error.type,
                "message": error.message,
            }
    return found


def early_end() -> Any:
    """Leave a stream after its first chunk, as `break` does."""
    with client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, max_tokens=200
    ) as stream:
        for chunk in stream:
            return chunk.object


CASES = (
    *(plain, streamed, stream_helper, asynchronous, parsed, raw, parts, extra_fields, several),
    *(completions, errors, early_end),
)
results = {case.__name__: case() for case in CASES}
if given["gets"]:  # Vertex AI's `invoke` passes only POST on
    results["models"] = models()
print(json.dumps(results))
