"""Write an instance as the prompt that the model was trained to read.

There are three kinds of models. A plain one continues text (gpt2). An instruction-tuned one needs
a template around the text (dolly). A chat model has its template in the tokenizer's files.
"""

from collections.abc import Callable
from typing import NamedTuple

from jinja2 import TemplateSyntaxError

from handler.config import PromptConfig
from handler.engine import Messages
from handler.engine.special import TemplatedPrompt
from handler.errors import RequestError
from handler.request import Instance

ChatTemplate = Callable[[Messages], str | None]


class Prompt(NamedTuple):
    """`text` is what the engine tokenizes, `echo` what the prediction shows of it: all or none.

    A template's `text` is a `TemplatedPrompt`: `<|im_end|>` in what a user wrote is text there. In
    a plain prompt it is a control token, because such a prompt is the whole input of the model.
    """

    text: str
    echo: str


def render(instance: Instance, config: PromptConfig, chat_template: ChatTemplate) -> Prompt:
    """Write the prompt of one instance.

    The prediction repeats it if it is plain text, unless the client asks for something else with
    `return_full_text`.

    Args:
        instance: one instance of the request.
        config: the app's prompt style.
        chat_template: messages -> text, or None if the model has no template.

    Raises:
        RequestError: the prompt is empty, or the model cannot read these messages.
    """
    field = instance.field
    if instance.prompt == "":
        raise RequestError(400, f"{field}: the prompt is empty; give some text", field)
    plain = config.style == "plain" or instance.raw
    if config.style == "instruct" and not instance.raw:
        instruction = _instruction(instance, field)
        before, *after = config.template.split("{prompt}")
        parts = [part for text in after for part in (instruction, text)]
        text: str = TemplatedPrompt(before, *parts)
    elif plain and isinstance(instance.prompt, str):
        text = instance.prompt
    else:
        text, plain = _chat(instance, chat_template, field), False
    if config.special_tokens_in_content == "control" and isinstance(text, TemplatedPrompt):
        text = text.trusting_users()
    shown = plain if instance.return_full_text is None else instance.return_full_text
    return Prompt(text, echo=str(text) if shown else "")


def _chat(instance: Instance, chat_template: ChatTemplate, field: str) -> str:
    messages = instance.prompt
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    try:
        text = chat_template(messages)
    except TemplateSyntaxError as error:
        message = (
            f"{field}: this model's chat template has an error in line {error.lineno}: "
            f"{error.message}; use a plain prompt instead"
        )
        raise RequestError(400, message, field) from error
    except Exception as error:  # a template may reject, for example, two user messages in a row
        message = f"{field}: rejected by the chat template: {error}"
        raise RequestError(400, message, field) from error
    if text is None:
        raise RequestError(
            400, f"{field}: this model has no chat template; it reads plain prompts", field
        )
    return text


def _instruction(instance: Instance, field: str) -> str:
    if isinstance(instance.prompt, str):
        return instance.prompt
    if len(instance.prompt) > 1 or instance.prompt[0]["role"] != "user":
        field = field if field.endswith("messages") else f"{field}.messages"
        raise RequestError(
            400, f"{field}: this model takes one instruction, a single message by the user", field
        )
    return instance.prompt[0]["content"]
