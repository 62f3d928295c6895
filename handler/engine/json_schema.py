"""JSON schemas that completions must fulfill: checked before anything runs, and as masks of tokens.

The library llguidance checks a schema for all engines. It computes the masks of `transformers`, and
inside vLLM those of `vllm`.
GenAI has xgrammar inside for `openvino`. It ignores keywords that it does not know, and an error in
it ends the pipeline, so `for_xgrammar` lets only schemas through that it is known to fulfill.
"""

import json
import math
import re
from collections.abc import Callable, Set
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from handler.engine import ParameterError, Sampling

MAX_CHARACTERS = 65_536
"""Length of a schema's text. One with 2,000 properties has 60,000 and compiles in 0.2 s."""

_LIMITS = LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=100_000, verbose_errors=False)
"""A fifth of the library's own. A step over the limit takes about 0.1 s and ends the sequence."""

_RANGE = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_EXACT = 2**53 - 1

_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly"}
_ANNOTATIONS |= {"writeOnly", "$comment", "$schema", "$id", "$defs", "definitions"}

_OPTIONS: Any = {"whitespace_pattern": " ?"}
"""At most one space between two parts, so that no completion runs on in white space."""


class Grammar:
    """The state of one completion in its schema.

    Args:
        schema: the text of a JSON schema.
        tokenizer: the model's, with its end tokens; None if the library cannot read it.

    Raises:
        ParameterError: says what is wrong with the schema, or that the model's tokens do not allow
            one.
    """

    def __init__(self, schema: str, tokenizer: LLTokenizer | None) -> None:
        if tokenizer is None:
            raise _error(
                "cannot be used with this model, because the bytes of its tokens are not known"
            )
        content = _read(schema)
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(content), overrides=_OPTIONS)
        except ValueError as error:  # such as NaN, which JSON does not have
            raise _error(f"is not JSON: {_line(str(error))}") from error
        self._end_tokens = tokenizer.eos_tokens
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
        if not self._matcher.is_error():
            self._matcher.compute_bitmask()  # finds a schema that no text fulfills
        if self._matcher.is_error():
            why = self._matcher.get_error().split("<state>")[0].strip()
            why = "no text can fulfill it" if why.startswith("NoExtension") else _line(why)
            raise _error(f"cannot be used: {why}")

    def allowed(self, rows: int) -> np.ndarray:
        """Return for each of a model's logits whether its token may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.zeros(rows, bool)
        known = np.unpackbits(bits, count=min(rows, bits.size * 8), bitorder="little")
        mask[: known.size] = known
        if not self._matcher.is_accepting():  # an end token may have a text that would fit
            mask[[token for token in self._end_tokens if token < rows]] = False
        if self._matcher.is_error() or not mask.any():
            raise ArithmeticError(f"no token continues the JSON: {self._matcher.get_error()}")
        return mask

    def add(self, token: int) -> None:
        """Add the token that was chosen."""
        self._matcher.consume_token(token)

    @property
    def accepting(self) -> bool:
        """Whether the completion fulfills the schema, so that it may end here."""
        return self._matcher.is_accepting() and not self._matcher.is_error()

    @property
    def complete(self) -> bool:
        """Whether nothing can follow but an end token."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


def read_schema(sampling: Sampling, tokenizer: Callable[[], LLTokenizer | None]) -> Grammar | None:
    """Return the grammar of a request; None if it has no schema.

    Raises:
        ParameterError: as `Grammar`, or the request wants no end.
    """
    if sampling.json_schema is None:
        return None
    if sampling.ignore_eos:
        raise ParameterError("ignore_eos", "must be false with a JSON schema, which has an end")
    return Grammar(sampling.json_schema, tokenizer())


def _read(schema: str) -> dict[str, Any]:
    if len(schema) > MAX_CHARACTERS:
        raise _error(f"has {len(schema)} characters; at most {MAX_CHARACTERS} are allowed")
    try:
        content = json.loads(schema)
        # The library reads options from it, such as one that ignores keywords.
        extended = isinstance(content, dict) and "x-guidance" in json.dumps(content)
    except (ValueError, RecursionError) as error:
        raise _error(f"is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise _error("must be a JSON object")
    if extended:
        raise _error("must not contain x-guidance")
    if not content.keys() - _ANNOTATIONS:  # a model that begins with a number may never end it
        content["anyOf"] = [{"type": "object"}, {"type": "array"}]
    _bound(content)
    return content


def _bound(schema: Any) -> None:
    """Give integers without limits those of exact numbers in JSON.

    Otherwise a model may write digits until its tokens are used up.
    """
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "integer" and not schema.keys() & _RANGE:
        schema |= {"minimum": -_EXACT, "maximum": _EXACT}
    if schema.get("type") == "array":
        schema.setdefault("items", {})  # the default, which xgrammar does not know
    for child in _children(schema).values():
        _bound(child)


def _children(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schemas inside a schema, by their place in it."""
    children: dict[str, Any] = {}
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(several := schema.get(key), list):
            children |= {f"{key}/{i}": child for i, child in enumerate(several)}
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(named := schema.get(key), dict):
            children |= {f"{key}/{name}": child for name, child in named.items()}
    return children | {k: schema[k] for k in ("items", "additionalProperties") if k in schema}


_SPACE = "\ue000"
"""Stands for a space in what xgrammar reads of the schema and of the tokens.

It would allow any white space between two parts, without end. With this no token is white space for
it, so a completion has none outside of strings. The character is for private use, as are all that
begin with the same byte.
"""

_NEVER = re.compile(rb"[\x00-\x1f\xee]")
"""Bytes that no token may have: JSON escapes control characters, and the last one begins `_SPACE`.
"""

_KEYWORDS = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": _RANGE,
    "number": _RANGE,
    "boolean": set(),
    "null": set(),
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}
_ALONE = ("$ref", "anyOf", "oneOf", "allOf", "const", "enum")
_FORMATS = {"date", "date-time", "uuid"}

_PATTERN = re.compile(
    r"""\^?(?:
        [^\\\[\](){}|^$*+?./"\x00-\x1f]             # a character
        | \\[dw.\-+*?()\[\]{}|/$^]                  # a class, or a character with a meaning
        | \[(?!\^)(?:\\[dw.\-\]\[/]|[^\\\[\]\s&~"-]|[0-9A-Za-z]-[0-9A-Za-z]|-(?=\])|\x20(?!-))+\]
        | [()|] | \(\?:
        | [*+?](?![*+?]) | \{\d{1,3}(?:,\d{0,3})?\}
    )*\$?""",
    re.VERBOSE,
)
"""Regular expressions that xgrammar reads as JSON Schema defines them. It would let "." and "[^a]"
be a quotation mark, which ends the string."""

_ESCAPED = re.compile(r'["\\\x00-\x1f]')
_COUNTS = re.compile(r"(?<!\\)\{(?:\d+,)?(\d+)")

_MOST = 128
"""Characters that lengths and counts in patterns may add up to. Each takes xgrammar about 10 ms of
a core for 49,000 tokens, in which no other sequence advances; GenAI remembers the result."""


def for_guidance(schema: str) -> str:
    """Return a checked schema for vLLM, whose library takes our options from the schema itself."""
    return json.dumps(_read(schema) | {"x-guidance": {"whitespace_flexible": True} | _OPTIONS})


def for_xgrammar(schema: str) -> str:
    """Return a schema that `Grammar` accepts as xgrammar reads it.

    Raises:
        ParameterError: names the part that xgrammar does not fulfill.
    """
    content = _read(schema)
    try:
        counted = _check(content, "schema")
    except (AttributeError, KeyError, TypeError) as error:  # in a part that nothing refers to
        raise _unknown("schema", "a part that is not a schema") from error
    if counted > _MOST:
        raise _unknown("schema", f"lengths that add up to {counted} characters, more than {_MOST},")
    # Only strings have spaces in compact JSON.
    content = _Unions(content).schema
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    if len(text) > 2 * MAX_CHARACTERS:
        raise _unknown("schema", "too many alternatives, or integers between limits,")
    if _NEVER.search(text.encode("utf-8", "replace")):
        raise _unknown("schema", "a character for private use")
    return text.replace(" ", _SPACE)


def tokens_for_xgrammar(tokenizer: LLTokenizer | None, end_tokens: Set[int]) -> list[bytes]:
    """Return the tokens' bytes as xgrammar reads them: none for those that JSON cannot contain."""
    if tokenizer is None:
        return []
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    return [
        b""
        if i in end_tokens or tokenizer.is_special_token(i) or _NEVER.search(token)
        else token.replace(b" ", _SPACE.encode())
        for i, token in enumerate(tokens)
    ]


def _check(schema: Any, where: str) -> int:
    """Reject what xgrammar does not fulfill in a schema or below it; return what to count."""
    if schema is False and not where.endswith(("/items", "/additionalProperties")):
        raise _unknown(where, "the schema false")
    if schema is True or schema is False:
        return 0
    keys = set(schema) - _ANNOTATIONS
    if alone := next((key for key in _ALONE if key in keys), None):
        rest = keys - {alone} - ({"type"} if alone in ("const", "enum") else set())
        if rest:
            raise _unknown(where, f'"{sorted(rest)[0]}" beside "{alone}"')
        if alone == "$ref" and not re.fullmatch(r"#(/[^~%]+)?", schema["$ref"]):
            raise _unknown(where, f'"$ref" to {schema["$ref"]}')
        if alone == "allOf" and len(schema["allOf"]) > 1:
            raise _unknown(where, '"allOf" with several schemas')
    else:
        _check_types(schema, keys, where)
    counts = [int(count) for count in _COUNTS.findall(schema.get("pattern", ""))]
    counted = max(schema.get("minLength", 0), schema.get("maxLength", 0))
    counted += math.prod(counts) if counts else 0
    return counted + sum(_check(c, f"{where}/{name}") for name, c in _children(schema).items())


def _check_types(schema: dict[str, Any], keys: set[str], where: str) -> None:
    types = schema.get("type", [])
    types = types if isinstance(types, list) else [types]
    if not types:
        types = [kind for kind in ("object", "array") if keys and keys <= _KEYWORDS[kind]]
        if keys and not types:
            raise _unknown(where, f'"{sorted(keys)[0]}" without "type"')
    allowed = {"type"}.union(*(_KEYWORDS[kind] for kind in types))
    if unknown := keys - allowed:
        raise _unknown(where, f'"{sorted(unknown)[0]}"')
    if (kinds := keys & {"pattern", "format", "minLength", "maxLength"}) and (
        ("pattern" in kinds or "format" in kinds) and len(kinds) > 1
    ):
        raise _unknown(where, " beside ".join(f'"{kind}"' for kind in sorted(kinds)[:2]))
    if "format" in keys and schema["format"] not in _FORMATS:
        raise _unknown(where, f'the "format" {schema["format"]}')
    if "pattern" in keys and not _is_plain(schema["pattern"]):
        raise _unknown(where, f'the "pattern" {schema["pattern"]}')
    if len(schema.get("prefixItems", ())) > schema.get("maxItems", math.inf):
        raise _unknown(where, 'more "prefixItems" than "maxItems"')
    if schema.get("items") is False and schema.get("minItems", 0) > len(
        schema.get("prefixItems", ())
    ):
        raise _unknown(where, 'more "minItems" than "prefixItems", without other items,')
    if missing := set(schema.get("required", [])) - set(schema.get("properties", {})):
        raise _unknown(where, f'"required" {sorted(missing)[0]} without the property')

    limits = [schema[key] for key in _RANGE if key in schema]
    if limits and "number" in types:
        raise _unknown(where, 'limits of the type "number"')
    whole = all(float(limit).is_integer() for limit in limits)
    if any(abs(limit) > _EXACT for limit in limits) or ("integer" in types and not whole):
        raise _unknown(where, "limits that are not integers, or above 2^53")
    for name in schema.get("properties", {}):
        if _ESCAPED.search(name):
            raise _unknown(where, f"a property name with an escaped character, {name!r},")


def _type_of(value: Any) -> set[str]:
    """Return the types of JSON schemas that a value has."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if value == int(value) else {"number"}
    names = {str: "string", list: "array", dict: "object"}
    return {next((name for kind, name in names.items() if isinstance(value, kind)), "null")}


class _Unions:
    """Rewrites the alternatives in a schema so that GenAI's xgrammar reads them rightly.

    It merges alternatives that begin or end alike: of "a" and "aba" it makes "ababa", too, and of
    the range 0 to 120 also 124. It does not merge references, so each alternative becomes one.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._definitions: dict[str, Any] = {}
        self._prefix = "u"
        while any(name.startswith(self._prefix) for name in root.get("$defs", {})):
            self._prefix += "u"
        self.schema: dict[str, Any] = self._write(root, "schema")
        if self._definitions:
            self.schema["$defs"] = self.schema.get("$defs", {}) | self._definitions

    def _write(self, schema: Any, where: str) -> Any:
        if not isinstance(schema, dict):
            return schema
        if schema.get("$ref", "#").count("/") not in (0, 2):
            raise _unknown(where, f"$ref to {schema['$ref']}, which is not a definition,")
        written = dict(schema)
        for key in ("properties", "$defs", "definitions"):
            if isinstance(named := schema.get(key), dict):
                written[key] = {n: self._write(c, f"{where}/{key}/{n}") for n, c in named.items()}
        for key in ("items", "additionalProperties"):
            if key in schema:
                written[key] = self._write(schema[key], f"{where}/{key}")
        for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            if key in schema:
                several = [self._write(c, f"{where}/{key}/{i}") for i, c in enumerate(schema[key])]
                written[key] = [self._refer(c) for c in several] if "Of" in key else several
        types = schema.get("type", [])
        types = types if isinstance(types, list) else [types]
        if len(values := schema.get("enum", ())) > 1:
            del written["enum"]
            written.pop("type", None)  # it would stand beside anyOf
            allowed = [value for value in values if not types or _type_of(value) & {*types}]
            written["anyOf"] = [self._refer({"const": value}) for value in allowed]
        if "integer" in types and schema.keys() & _RANGE:
            written = self._integers(written, types, where)
        return written

    def _integers(self, schema: dict[str, Any], types: list[str], where: str) -> dict[str, Any]:
        """Write the limits of an integer as ranges and values that xgrammar reads rightly."""
        kept = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        if _children({k: v for k, v in schema.items() if k not in kept}):
            raise _unknown(where, "limits of an integer beside parts of an array or object")
        low = max(
            -_ALL_NINES,
            math.ceil(schema.get("minimum", -_ALL_NINES)),
            math.floor(schema.get("exclusiveMinimum", -_ALL_NINES - 1)) + 1,
        )
        high = min(
            _ALL_NINES,
            math.floor(schema.get("maximum", _ALL_NINES)),
            math.ceil(schema.get("exclusiveMaximum", _ALL_NINES + 1)) - 1,
        )
        ranges, listed = _split(low, high)
        if len(listed) > _MOST_LISTED or not (ranges or listed):
            raise _unknown(where, "limits of an integer with too many or no values between them")
        any_of: list[dict[str, Any]] = [
            {"type": "integer", "minimum": begin, "maximum": end} for begin, end in ranges
        ]
        any_of += [{"const": number} for number in listed]
        if others := [kind for kind in types if kind != "integer"]:
            rest = {k: v for k, v in schema.items() if k not in _RANGE | _ANNOTATIONS}
            any_of.append(rest | {"type": others})
        return {"anyOf": [self._refer(part) for part in any_of]} | kept

    def _refer(self, schema: Any) -> Any:
        name = f"{self._prefix}{len(self._definitions)}"
        self._definitions[name] = schema
        return {"$ref": f"#/$defs/{name}"}


_ALL_NINES = 10**15 - 1
"""The highest integer where a range has an open end: below 2^53, and easy for xgrammar."""

_MOST_LISTED = 1000


def _split(low: int, high: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Split a range of integers into ranges that xgrammar reads rightly, and single integers.

    It does so from 0, 1 or a power of ten up to a number whose digits are all 9, and for the
    negatives of such a range.
    """
    ranges: list[tuple[int, int]] = []
    listed: list[int] = []
    if low < 0:
        negative, single = _split(max(-high, 1), -low)
        ranges += [(-end, -begin) for begin, end in negative]
        listed += [-number for number in single]
        low = 0
    if low <= high:
        begin = 0 if low == 0 else 1 if low == 1 else 10 ** len(str(low - 1))
        end = 10 ** (len(str(high + 1)) - 1) - 1
        if begin > end:
            return ranges, [*listed, *_listed(low, high)]
        ranges.append((begin, end))
        listed += [*_listed(low, begin - 1), *_listed(end + 1, high)]
    return ranges, listed


def _listed(low: int, high: int) -> range:
    """Return some of these integers: more than may be listed if there are more."""
    return range(low, min(high, low + _MOST_LISTED) + 1)


def _is_plain(pattern: str) -> bool:
    """Whether xgrammar reads a pattern as JSON Schema defines it."""
    if not _PATTERN.fullmatch(pattern):
        return False
    # Alternatives must be in a group, because ^ and $ belong to the outer ones; and not empty.
    bare = re.sub(r"\\.|\[[^\]]*\]", "c", pattern).replace("(?:", "(")
    depth = 0
    for character in bare:
        depth += (character == "(") - (character == ")")
        if character == "|" and not depth:
            return False
    return not re.search(r"[(|]\||\|[)|*+?{]|\(\)", bare)


def _unknown(where: str, what: str) -> ParameterError:
    return _error(
        f"has {what} at {where}, which the engine openvino does not support: leave it out, or "
        "serve the model with ENGINE=transformers"
    )


def _error(message: str) -> ParameterError:
    return ParameterError("json_schema", message)


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
