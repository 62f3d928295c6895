"""Three kinds of models, three formats of the same prompt."""

import pytest

from handler.config import PromptConfig, load_app
from handler.engine import Messages, Sampling
from handler.errors import RequestError
from handler.prompt import render
from handler.request import Instance

PLAIN = PromptConfig(style="plain", special_tokens_in_content="text")
CHAT = PromptConfig(style="chat", special_tokens_in_content="text")
DOLLY = load_app("dolly-v2-3b").prompt


def instance(prompt: str | Messages, full_text: bool | None = None) -> Instance:
    return Instance(prompt, Sampling(), full_text, "instances[3]")


def user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def template(messages: Messages) -> str:
    return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def no_template(_: Messages) -> None:
    return None


def test_plain_text_is_unchanged_and_echoed():
    assert render(instance("Hi {prompt}"), PLAIN, no_template) == ("Hi {prompt}", "Hi {prompt}")
    assert render(instance("Hi", full_text=False), PLAIN, no_template) == ("Hi", "")


def test_instruction_format_of_dolly():
    expected = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nWhy?\n\n### Response:\n"
    )
    assert render(instance("Why?"), DOLLY, no_template) == (expected, "")
    assert render(instance(user("Why?")), DOLLY, no_template) == (expected, "")
    with_echo = render(instance("Why?", full_text=True), DOLLY, no_template)
    assert with_echo == (expected, expected)


def test_instruction_is_not_formatted_twice():
    prompt = render(instance("{prompt} %s {0}"), DOLLY, no_template)
    assert prompt.text.count("{prompt} %s {0}") == 1


def test_chat_template():
    expected = "<user>Hi<assistant>"
    assert render(instance("Hi"), CHAT, template) == (expected, "")
    assert render(instance(user("Hi")), PLAIN, template) == (expected, "")
    assert render(instance(user("Hi"), full_text=True), PLAIN, template).echo == expected


@pytest.mark.parametrize(
    ("given", "config", "chat", "message"),
    [
        (instance(""), PLAIN, template, "instances[3]: the prompt is empty"),
        (instance(user("a")), PLAIN, no_template, "has no chat template"),
        (instance(user("a") * 2), DOLLY, no_template, "a single message by the user"),
        (instance(user("a")), PLAIN, lambda _: 1 / 0, "rejected by the chat template"),
    ],
)
def test_rejects_prompt_the_model_cannot_read(given, config, chat, message):
    with pytest.raises(RequestError) as rejected:
        render(given, config, chat)
    assert message in rejected.value.message
    assert rejected.value.field.startswith("instances[3]")
