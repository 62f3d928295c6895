"""The openai client with the base_url and the API key that `make token` names."""

import json
import sys

import openai

given = json.load(sys.stdin)
client = openai.OpenAI(base_url=given["base_url"], api_key=given["key"], max_retries=0)
ask = {"model": given["model"], "messages": given["messages"], **given["greedy"]}
answer = client.chat.completions.create(**ask)
chunks = list(client.chat.completions.create(stream=True, **ask))
stranger = openai.OpenAI(base_url=given["base_url"], api_key="none", max_retries=0)
try:
    stranger.models.list()
    refused = 200
except openai.AuthenticationError as error:
    refused = error.status_code

print(
    json.dumps(
        {
            "text": answer.choices[0].message.content,
            "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
            "models": [model.id for model in client.models.list()],
            "refused": refused,
        }
    )
)
