"""litellm with an OpenAI-compatible server: plain, streamed, asynchronous, and an error."""

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no download of prices

import litellm

litellm.telemetry = False
given = json.load(sys.stdin)
connection = {"api_base": given["base_url"], "api_key": given["key"], "num_retries": 0}
ask = {**connection, **given["greedy"], "messages": given["messages"]}
model = f"openai/{given['model']}"

plain = litellm.completion(model=model, **ask)
chunks = list(
    litellm.completion(model=model, stream=True, stream_options={"include_usage": True}, **ask)
)
texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
usages = [usage for chunk in chunks if (usage := getattr(chunk, "usage", None))]
words = litellm.text_completion(
    model=f"text-completion-openai/{given['model']}",
    prompt=given["prompt"],
    **connection,
    **given["greedy"],
)
try:
    litellm.completion(model=model, **{**ask, "temperature": 9})
    refused = "accepted"
except litellm.BadRequestError as error:
    refused = str(error)


def counts(usage):
    return [usage.prompt_tokens, usage.completion_tokens]


print(
    json.dumps(
        {
            "plain": {"text": plain.choices[0].message.content, "usage": counts(plain.usage)},
            "streamed": {"text": "".join(texts), "usage": counts(usages[-1])},
            "asynchronous": asyncio.run(litellm.acompletion(model=model, **ask))
            .choices[0]
            .message.content,
            "completion": words.choices[0].text,
            "refused": refused,
        }
    )
)
