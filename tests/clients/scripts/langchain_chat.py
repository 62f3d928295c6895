"""LangChain's ChatOpenAI: plain, streamed, in a batch, asynchronous, with structured output."""

import asyncio
import json
import sys
from typing import Literal

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

given = json.load(sys.stdin)


class Country(BaseModel):
    """The answer about a country."""

    capital: Literal["Tokyo", "Kyoto"]
    island: bool


connection = {"base_url": given["base_url"], "api_key": given["key"], "model": given["model"]}
chat = ChatOpenAI(**connection, temperature=0, max_tokens=given["greedy"]["max_tokens"])
messages = [(message["role"], message["content"]) for message in given["messages"]]

plain = chat.invoke(messages)
pieces = list(chat.stream(messages, stream_usage=True))
whole = pieces[0]
for piece in pieces[1:]:
    whole = whole + piece
chain = ChatPromptTemplate.from_messages([("user", "{question}")]) | chat
question = given["messages"][-1]["content"]
text = OpenAI(**connection, temperature=0, max_tokens=given["greedy"]["max_tokens"])
structured = ChatOpenAI(**connection, temperature=0, max_tokens=60).with_structured_output(
    Country, method="json_schema"
)


def usage(message):
    return [message.usage_metadata["input_tokens"], message.usage_metadata["output_tokens"]]


print(
    json.dumps(
        {
            "plain": {"text": plain.text, "usage": usage(plain)},
            "streamed": {"text": whole.text, "usage": usage(whole), "pieces": len(pieces)},
            "batch": [one.text for one in chat.batch([messages] * 3)],
            "asynchronous": asyncio.run(chat.ainvoke(messages)).text,
            "chain": chain.invoke({"question": question}).text,
            "completion": text.invoke(given["prompt"]),
            "structured": structured.invoke(messages).model_dump(),
        }
    )
)
