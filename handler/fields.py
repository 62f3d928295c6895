"""How a field of a request is declared: once, for the checks, the messages and the documents.

A declaration is a type with bounds, which pydantic checks. `describe` says in words what it allows.
Where type and bounds do not say it all, a `Rule` in the field's `Annotated` does.
"""

import json
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from handler.config import Limits

Location = tuple[int | str, ...]
"""Where a value stands in the body: names and list indices, as pydantic reports them."""
Declaration = tuple[Any, list[Any]]
"""A field's type without `| None`, and the metadata from its `Annotated`."""


@dataclass(frozen=True)
class Rule:
    """What a field should be, where its type and bounds do not say it.

    `{ge}`, `{gt}`, `{le}`, `{min_length}` and `{max_length}` stand for the field's bounds.
    """

    text: str


@dataclass(frozen=True)
class Doc:
    """The effect of a parameter, and what is the default if no value says it."""

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
    """No unknown names, no silent conversion ("5" is not 5, true is not 1), no NaN, no null."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    rule: ClassVar[str] = "an object"

    @field_validator("*", mode="before")
    @classmethod
    def _reject_null(cls, value: Any) -> Any:
        # None stands for "not given" here. A client leaves such a field out.
        if value is None:
            raise PydanticCustomError("null", "is null")
        return value


def _integral(value: Any) -> Any:
    """Read 50.0 as 50. Every number is a double in `google.protobuf.Value`, so that is what comes
    from Vertex AI for a client that uses gRPC.
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
            field = kind.model_fields[part]
            kind, metadata = _declaration(field.annotation, field.metadata)
    return kind, metadata


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
        text = f"{', '.join(first)} or {last}"
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


def markdown_table(model: type[BaseModel], limits: Limits, defaults: dict[str, Any]) -> str:
    """Write a Markdown table of parameters: value, default and effect of each.

    Args:
        model: each of its fields has a `Doc`.
        limits: the app's.
        defaults: values that win over those of the model.
    """
    lines = ["| parameter | value | default | effect |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        kind, metadata = _declaration(field.annotation, field.metadata)
        value = describe((kind, metadata), limits)
        if get_origin(kind) is list:
            value += f", each {describe(_declaration(get_args(kind)[0]), limits)}"
        doc = next(item for item in metadata if isinstance(item, Doc))
        default = doc.default or json.dumps(defaults.get(name, field.default)).removesuffix(".0")
        lines.append(f"| `{name}` | {value} | {default} | {doc.effect} |")
    return "\n".join(lines)
