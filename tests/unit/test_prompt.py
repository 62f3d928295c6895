"""Three kinds of model, three formats of the same question."""

import pytest

from handler.config import PromptConfig, load_app
from handler.engine import Sampling
from handler.prompt import render, shows_prompt
from handler.request import Item, RequestError

PLAIN = PromptConfig()
CHAT = PromptConfig(style="chat")
DOLLY = load_app("dolly-v2-3b").prompt


def item(prompt=None, messages=None, full_text=None) -> Item:
    return Item(prompt, messages, Sampling(), full_text)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def template(messages):
    return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def no_template(_):
    return None


def test_plain_continues():
    assert render(item("Hi {prompt}"), PLAIN, no_template, "") == "Hi {prompt}"
    assert shows_prompt(item("Hi"), PLAIN)
    assert not shows_prompt(item("Hi", full_text=False), PLAIN)


def test_dollys_instruction_format():
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nWhy?\n\n### Response:\n"
    )
    assert render(item("Why?"), DOLLY, no_template, "") == expected
    assert render(item(messages=user("Why?")), DOLLY, no_template, "") == expected
    assert not shows_prompt(item("Why?"), DOLLY)
    assert shows_prompt(item("Why?", full_text=True), DOLLY)


def test_an_instruction_is_not_formatted_twice():
    assert render(item("{prompt} %s {0}"), DOLLY, no_template, "").count("{prompt} %s {0}") == 1


def test_chat():
    assert render(item("Hi"), CHAT, template, "") == "<user>Hi<assistant>"
    assert render(item(messages=user("Hi")), PLAIN, template, "") == "<user>Hi<assistant>"
    assert not shows_prompt(item(messages=user("Hi")), PLAIN)


@pytest.mark.parametrize(
    ("given", "config", "chat", "message"),
    [
        (item(""), PLAIN, template, "instances[3]: the prompt is empty"),
        (item(messages=user("a")), PLAIN, no_template, "has no chat template"),
        (item(messages=user("a") * 2), DOLLY, no_template, "a single message by the user"),
        (item(messages=user("a")), PLAIN, lambda _: 1 / 0, "refused by the chat template"),
    ],
)
def test_refusals(given, config, chat, message):
    with pytest.raises(RequestError) as refused:
        render(given, config, chat, "instances[3]")
    assert message in refused.value.message
    assert refused.value.field.startswith("instances[3]")
