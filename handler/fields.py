"""How a field of a request is declared: once, for the checks, the messages and the documents.

A declaration is a type with bounds, which pydantic checks. `describe` says in words what it allows.
Where type and bounds do not say it all, a `Rule` in the field's `Annotated` does.
"""

import json
import types
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from handler.config import Limits, show
from handler.errors import RequestError

Model = TypeVar("Model", bound=BaseModel)

Location = tuple[int | str, ...]
"""Where a value stands in the body: names and list indices, as pydantic reports them."""
Declaration = tuple[Any, list[Any]]
"""A field's type without `| None`, and the metadata from its `Annotated`."""


@dataclass(frozen=True)
class Rule:
    """The text of what a field should be, where its type and bounds do not suffice.

    `{ge}`, `{gt}`, `{le}`, `{min_length}` and `{max_length}` stand for the field's bounds.
    """

    text: str


@dataclass(frozen=True)
class Doc:
    """The effect of a parameter, and the text for its default where no value describes it."""

    effect: str
    default: str = ""


@dataclass(frozen=True)
class AppLimit:
    """An upper bound that each app sets under `limits:`; `name` is the field's name there."""

    name: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        def check(value: float, info: core_schema.ValidationInfo) -> float:
            if value > getattr(info.context, self.name):
                raise PydanticCustomError("too_large", "is too large")
            return value

        return core_schema.with_info_after_validator_function(check, handler(source))


@dataclass(frozen=True)
class ZeroOrAtLeast:
    """A lower bound, `ge`, that 0 may go below."""

    ge: float

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        def check(value: float) -> float:
            if value < self.ge and value != 0:
                raise PydanticCustomError("too_small", "is too small")
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))


class Input(BaseModel):
    """No unknown names, no silent conversion ("5" is not 5, true is not 1), no NaN.

    A field that is null counts as not given, because many clients send every field they know.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    rule: ClassVar[str] = "an object"
    hints: ClassVar[dict[str, str]] = {}
    """Names that are not known here -> what to do instead."""

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, value: Any) -> Any:
        if isinstance(value, dict) and any(item is None for item in value.values()):
            return {name: item for name, item in value.items() if item is not None}
        return value


def problem(text: str, at: str = "") -> PydanticCustomError:
    """Return the error for a wrong value.

    Args:
        text: what is wrong; it completes a sentence that begins with the field.
        at: the place in the value, as in `[1].type`.
    """
    return PydanticCustomError("problem", "{problem}", {"problem": text, "at": at})


def _integral(value: Any) -> Any:
    """Read 50.0 as 50. Every number is a double in `google.protobuf.Value`, so Vertex AI sends 50.0
    for a client that uses gRPC.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    return value


def in_a_list(value: Any) -> Any:
    """Read a single string as a list of one."""
    return [value] if isinstance(value, str) else value


WholeNumber = Annotated[int, BeforeValidator(_integral)]


def declaration_at(model: type[BaseModel], location: Location) -> Declaration:
    """Return how the value at `location` is declared in `model`."""
    kind: Any = model
    metadata: list[Any] = []
    for part in location:
        if isinstance(part, int):
            kind, metadata = _declaration(get_args(kind)[0])
        else:
            field = _field(kind, part)
            kind, metadata = _declaration(field.annotation, field.metadata)
    return kind, metadata


def _field(model: type[BaseModel], name: str) -> FieldInfo:
    """Return the field with this name in JSON."""
    fields = model.model_fields
    return fields.get(name) or next(f for f in fields.values() if f.alias == name)


def _declaration(annotation: Any, metadata: Iterable[Any] = ()) -> Declaration:
    """Split `Annotated[... | None, ...]` into the type and its metadata."""
    while get_origin(annotation) in (Annotated, Union, types.UnionType):
        if get_origin(annotation) is Annotated:
            annotation, *inner = get_args(annotation)
            metadata = [*inner, *metadata]
        else:
            (annotation,) = (a for a in get_args(annotation) if a is not types.NoneType)
    flat: list[Any] = []
    for item in metadata:
        flat += item.metadata if isinstance(item, FieldInfo) else [item]
    return annotation, flat


_WORDS = {
    bool: "true or false",
    int: "a whole number from {ge} to {le}",
    float: "a number from {ge} to {le}",
    str: "a string",
}


def describe(declaration: Declaration, limits: Limits) -> str:
    """Say what a field with this declaration should be."""
    kind, metadata = declaration
    origin: Any = get_origin(kind)
    if kind in _WORDS:
        text = _WORDS[kind]
    elif origin is Literal:
        *first, last = (json.dumps(value) for value in get_args(kind))
        text = f"{', '.join(first)} or {last}" if first else last
    else:
        text = getattr(kind, "rule", "")
    bounds: dict[str, Any] = {}
    for item in metadata:
        if isinstance(item, Rule):
            text = item.text
        elif isinstance(item, AppLimit):
            bounds["le"] = getattr(limits, item.name)
        for name in ("ge", "gt", "le", "min_length", "max_length"):
            if hasattr(item, name):
                bounds[name] = getattr(item, name)
    return text.format(**bounds) if bounds else text


def validate(model: type[Model], value: Any, limits: Limits, where: str = "") -> Model:
    """Check a value of a request.

    Args:
        model: what it should be.
        value: from the body.
        limits: the app's.
        where: its place in the body, as in `instances[0]`.

    Raises:
        RequestError: names the field, what was given and what is allowed.
    """
    try:
        return model.model_validate(value, context=limits)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    location, kind = first["loc"], first["type"]
    field = _path(where, location)
    if kind == "missing":
        text = f"is missing{_unknown(first['input'], _names_at(model, location[:-1]))}"
    elif kind == "extra_forbidden":
        text = _not_known(model, location)
    elif kind == "one_of":
        text = first["msg"] + _unknown(first["input"], _names_at(model, location))
    elif kind == "problem":
        at = first["ctx"]["at"]
        text, field = first["msg"], f"{field}.{at}" if field and at[:1].isalpha() else field + at
    else:
        rule = describe(declaration_at(model, location), limits)
        text = f"should be {rule}, not {show(first['input'])}"
    raise RequestError(400, f"{field}: {text}" if field else f"the body {text}", field)


def _path(where: str, location: Location) -> str:
    path = where
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            name = part if len(part) <= 60 else f"{part[:57]}..."
            path += f".{name}" if path else name
    return path


_MOST_NAMES = 20
"""Allowed names in a message. If there are more, it has only the one most like the given one."""


def _not_known(model: type[BaseModel], location: Location) -> str:
    """Say what to do instead of giving this field."""
    kind, _ = declaration_at(model, location[:-1])
    name, names = str(location[-1]), _names_at(model, location[:-1])
    if hint := kind.hints.get(name):
        return hint
    if len(names) <= _MOST_NAMES:
        return f"is not known here; allowed are {', '.join(names)}"
    like = get_close_matches(name, names, 1)
    return "is not known here" + (f"; the most similar name is {like[0]}" if like else "")


def _names_at(model: type[BaseModel], location: Location) -> list[str]:
    """The names allowed in the object at `location`."""
    kind, _ = declaration_at(model, location)
    return [field.alias or name for name, field in kind.model_fields.items()]


def _unknown(given: dict[str, Any], allowed: list[str]) -> str:
    """The first name given that is not allowed: most often the missing one, misspelt."""
    name = next((name for name in given if name not in allowed), None)
    return f"; {show(name)} is not known here" if name is not None else ""


def markdown_table(
    model: type[BaseModel],
    limits: Limits,
    defaults: dict[str, Any],
    names: Iterable[str] = (),
) -> str:
    """Write a Markdown table of parameters: value, default and effect of each.

    Args:
        model: each of its fields has a `Doc`.
        limits: the app's.
        defaults: values that win over those of the model.
        names: the rows; all fields without it.
    """
    fields = model.model_fields
    lines = ["| parameter | value | default | effect |", "|---|---|---|---|"]
    for name, field in ((name, fields[name]) for name in names or fields):
        kind, metadata = _declaration(field.annotation, field.metadata)
        value = describe((kind, metadata), limits)
        if get_origin(kind) is list and get_args(kind)[0] is not str:
            value += f", each {describe(_declaration(get_args(kind)[0]), limits)}"
        # The outer annotation comes last, as in `Annotated[MaxTokens, Doc(...)]`.
        doc = next(item for item in reversed(metadata) if isinstance(item, Doc))
        default = doc.default or json.dumps(defaults.get(name, field.default)).removesuffix(".0")
        lines.append(f"| `{name}` | {value} | {default} | {doc.effect} |")
    return "\n".join(lines)
