"""From what the client wrote to what the model was trained to read.

Three kinds of model, three formats: a plain one continues the text (gpt2); an instruction-tuned
one wants its template around it (dolly); a chat model has a template of its own in the tokenizer.
"""

from collections.abc import Callable

from handler.config import PromptConfig
from handler.request import Item, RequestError

ChatTemplate = Callable[[list[dict[str, str]]], str | None]


def render(item: Item, config: PromptConfig, chat_template: ChatTemplate, field: str) -> str:
    """The text the engine tokenizes.

    Args:
        item: one instance of the request.
        config: the app's prompt style.
        chat_template: messages -> text, or None if the model has no template.
        field: where the instance stands in the body, for error messages.

    Raises:
        RequestError: messages for a model that cannot hold a conversation, or an empty prompt.
    """
    if item.messages is None and not item.prompt:
        raise RequestError(400, f"{field}: the prompt is empty; give some text", field)
    if config.style == "instruct":
        return config.template.replace("{prompt}", _instruction(item, field))
    if item.messages is None and config.style == "plain":
        return item.prompt
    messages = item.messages or [{"role": "user", "content": item.prompt}]
    try:
        text = chat_template(messages)
    except Exception as error:  # templates refuse, for example, two user messages in a row
        raise RequestError(400, f"{field}: refused by the chat template: {error}", field) from error
    if text is None:
        raise RequestError(
            400, f"{field}: this model has no chat template; it reads plain prompts", field
        )
    return text


def _instruction(item: Item, field: str) -> str:
    if item.messages is None:
        return item.prompt
    if len(item.messages) > 1 or item.messages[0]["role"] != "user":
        field += ".messages"
        raise RequestError(
            400, f"{field}: this model takes one instruction, a single message by the user", field
        )
    return item.messages[0]["content"]


def shows_prompt(item: Item, config: PromptConfig) -> bool:
    """Whether the reply begins with the prompt: yes for plain text, unless the client says else."""
    if item.return_full_text is not None:
        return item.return_full_text
    return item.messages is None and config.style == "plain"
