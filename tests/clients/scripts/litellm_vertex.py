"""LiteLLM with endpoints of Vertex AI: options beside a prompt, and @requestFormat."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no download of prices

import litellm

litellm.telemetry = False
given = json.load(sys.stdin)
place = {"vertex_project": given["project"], "vertex_location": given["location"]}
ask = {"messages": given["messages"], **given["greedy"], **place, "num_retries": 0}


def complete(**more):
    response = litellm.completion(**ask, **more)
    usage = response.usage
    return {
        "text": response.choices[0].message.content,
        "usage": [usage.prompt_tokens, usage.completion_tokens],
    }


try:
    litellm.completion(model=f"vertex_ai/openai/{given['shared']}", **ask)
    refused = "accepted"
except litellm.InternalServerError as error:
    refused = str(error)

print(
    json.dumps(
        {
            "flat": complete(model=f"vertex_ai/{given['shared']}"),
            "format": complete(model="vertex_ai/gemma/any", api_base=given["predict_url"]),
            "refused": refused,
        }
    )
)
