"""LangChain's VertexAIModelGarden and Google's SDK, on an endpoint of Vertex AI."""

import json
import sys

from langchain_google_vertexai import VertexAIModelGarden

given = json.load(sys.stdin)
model = VertexAIModelGarden(
    project=given["project"],
    location=given["location"],
    endpoint_id=given["endpoint"],
    allowed_model_args=["temperature", "max_tokens"],
)
print(
    json.dumps(
        {"text": model.invoke(given["prompt"], temperature=0, max_tokens=given["max_tokens"])}
    )
)
