"""Which JSON schemas the engines accept, without an engine."""

import json
import time

import pytest
from llguidance import LLTokenizer

from handler.engine import ParameterError, Sampling
from handler.engine.folder import ModelFolder
from handler.engine.json_schema import (
    MAX_CHARACTERS,
    Grammar,
    for_xgrammar,
    read_schema,
    tokens_for_xgrammar,
)
from tests import vocabularies


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer(vocabularies.byte_level().to_str(), slices=[])


def objects(**properties: object) -> dict:
    return {"type": "object", "properties": properties}


GOOD = [
    {},
    {"type": "object"},
    objects(name={"type": "string"}, age={"type": "integer", "minimum": 0}),
    objects(kind={"enum": ["New York", "é", 1, None]}) | {"required": ["kind"]},
    objects(child={"$ref": "#"}),
    {"$defs": {"a": {"type": "null"}}, "$ref": "#/$defs/a"},
    objects(maybe={"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}),
    {"type": "array", "items": objects(x={"type": "number"}), "minItems": 1, "maxItems": 3},
    {"type": "string", "pattern": r"^[A-Z][a-z]+ \d{2}$"},
    {"type": "string", "format": "date"},
    {"const": {"a b": [1, "é / x"]}},
]


@pytest.mark.parametrize("schema", GOOD, ids=json.dumps)
def test_accepts_schema_for_both_engines(tokenizer, schema):
    Grammar(json.dumps(schema), tokenizer)
    json.loads(for_xgrammar(json.dumps(schema)))


BAD = {
    "not JSON": "{",
    "a word": "nonsense",
    "nothing": "",
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "unknown type": '{"type": "objct"}',
    "type is a number": '{"type": 5}',
    "no type in a list": '{"type": []}',
    "empty enum": '{"enum": []}',
    "enum is a text": '{"enum": "x"}',
    "properties is a list": '{"type": "object", "properties": []}',
    "required is a text": '{"type": "object", "required": "a"}',
    "items is a number": '{"type": "array", "items": 3}',
    "minimum is a text": '{"type": "integer", "minimum": "a"}',
    "minimum above maximum": '{"type": "integer", "minimum": 5, "maximum": 1}',
    "negative length": '{"type": "string", "minLength": -1}',
    "lengths in the wrong order": '{"type": "string", "minLength": 5, "maxLength": 1}',
    "items in the wrong order": '{"type": "array", "minItems": 3, "maxItems": 2}',
    "unknown format": '{"type": "string", "format": "nope"}',
    "broken pattern": '{"type": "string", "pattern": "("}',
    "pattern that looks ahead": '{"type": "string", "pattern": "^(?=a)b$"}',
    "pattern with a back reference": r'{"type": "string", "pattern": "^(a)\\1$"}',
    "pattern is a number": '{"type": "string", "pattern": 5}',
    "empty anyOf": '{"anyOf": []}',
    "anyOf is an object": '{"anyOf": {}}',
    "oneOf that overlaps": '{"oneOf": [{"type": "integer"}, {"type": "number"}]}',
    "allOf without a value": '{"allOf": [{"type": "string"}, {"type": "integer"}]}',
    "not": '{"not": {"type": "string"}}',
    "if": '{"if": {}, "then": {}}',
    "uniqueItems": '{"type": "array", "uniqueItems": true}',
    "contains": '{"type": "array", "contains": {}}',
    "dependentRequired": '{"dependentRequired": {"a": ["b"]}}',
    "propertyNames": '{"type": "object", "propertyNames": {}}',
    "ref to nothing": '{"$ref": "#/$defs/a"}',
    "ref to itself": '{"$ref": "#"}',
    "ref to another host": '{"$ref": "http://example.com/schema.json"}',
    "ref is a number": '{"$ref": 5}',
    "additionalProperties is a number": '{"type": "object", "additionalProperties": 5}',
    "multiple of 0": '{"type": "integer", "multipleOf": 0}',
    "options of the library": '{"x-guidance": {"lenient": true}, "not": {}}',
    "a number too large": '{"type": "integer", "minimum": 1000000000000000000000000000000}',
    "not a number": '{"type": "integer", "minimum": NaN}',
    "half a character": r'{"const": "\ud800"}',
    "too long": json.dumps({"enum": ["x" * MAX_CHARACTERS]}),
    "too deep": '{"items":' * 5000 + "{}" + "}" * 5000,
    "too many combinations": json.dumps(
        {
            "allOf": [
                {"anyOf": [objects(**{f"a{i}{j}": {"type": "string"}}) for j in range(6)]}
                for i in range(7)
            ]
        }
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_rejects_bad_schema_in_a_second(tokenizer, name):
    begin = time.monotonic()
    with pytest.raises(ParameterError) as error:
        Grammar(BAD[name], tokenizer)
    assert time.monotonic() - begin < 1
    assert error.value.parameter == "json_schema"
    assert 10 < len(str(error.value)) < 400
    assert "\n" not in str(error.value)


ONLY_TRANSFORMERS = {
    "multipleOf": {"type": "integer", "multipleOf": 3},
    "several in allOf": {"allOf": [objects(a={}), objects(b={})]},
    "beside anyOf": {"anyOf": [{"minimum": 1}, {"maximum": -1}], "type": "integer"},
    "minProperties": {"type": "object", "minProperties": 1},
    "patternProperties": {"type": "object", "patternProperties": {"^a": {}}},
    "required but not in properties": {"type": "object", "required": ["a"]},
    "minLength beside pattern": {"type": "string", "minLength": 2, "pattern": "^a+$"},
    "a long string": {"type": "string", "maxLength": 100_000},
    "many strings": objects(**{f"p{i}": {"type": "string", "maxLength": 60} for i in range(9)}),
    "a long pattern": {"type": "string", "pattern": "^(?:a{99}){99}$"},
    "pattern with a range from the space": {"type": "string", "pattern": "^[ -~]+$"},
    "pattern with the negation of a class": {"type": "string", "pattern": r"^\S+$"},
    "pattern with all but some characters": {"type": "string", "pattern": "^[^0-9]{2,3}$"},
    "pattern with any character": {"type": "string", "pattern": "^.{1,3}$"},
    "alternatives outside a group": {"type": "string", "pattern": "^a|b$"},
    "an empty alternative": {"type": "string", "pattern": "^(|a)$"},
    "a limit of a number": {"type": "number", "exclusiveMinimum": 0},
    "a format that xgrammar reads differently": {"type": "string", "format": "ipv4"},
    "no value": objects(a=False),
    "a limit that is no integer": {"type": "integer", "minimum": 1.5},
    "a quotation mark in a name": objects(**{'a"b': {}}),
    "private use": {"const": "\ue000"},
    "an unused part that is no schema": {"$defs": {"a": 5, "b": {"type": "bogus"}}},
    "more places than items": {"type": "array", "prefixItems": [{}, {}], "maxItems": 1},
    "an array that cannot be filled": objects(
        a={"type": "array", "prefixItems": [{}], "items": False, "minItems": 2}
    ),
    "nested": objects(a={"type": "array", "items": {"type": "integer", "multipleOf": 3}}),
}


@pytest.mark.parametrize("name", ONLY_TRANSFORMERS)
def test_names_the_engine_that_supports_what_xgrammar_does_not(tokenizer, name):
    schema = json.dumps(ONLY_TRANSFORMERS[name])
    Grammar(schema, tokenizer)
    with pytest.raises(ParameterError, match="ENGINE=transformers"):
        for_xgrammar(schema)


def test_rejects_ignore_eos_with_a_schema(tokenizer):
    with pytest.raises(ParameterError) as error:
        read_schema(Sampling(json_schema="{}", ignore_eos=True), lambda: tokenizer)
    assert error.value.parameter == "ignore_eos"


def test_model_whose_tokens_are_unknown_cannot_have_a_schema():
    with pytest.raises(ParameterError, match="cannot be used with this model"):
        Grammar("{}", None)


def test_tokens_of_words_have_no_bytes_and_no_schemas(tmp_path):
    folder = ModelFolder(vocabularies.write_tokenizer(tmp_path, vocabularies.word_piece()))
    entry = folder.logprob(9, -1.0, [(7, -1.0)])
    assert (entry.text, entry.bytes) == (folder.token(9), None)
    assert entry.top[0].token_id == 7
    assert folder.reader is None
    assert tokens_for_xgrammar(folder.reader, set()) == []


@pytest.mark.parametrize("make", [vocabularies.byte_level, vocabularies.sentencepiece])
def test_bytes_of_tokens_join_to_the_text(tmp_path, make):
    folder = ModelFolder(vocabularies.write_tokenizer(tmp_path, make()))
    text = " the fox, 東京 🎉"
    ids = [i for i in folder.encode(text) if folder.token(i) not in vocabularies.SPECIAL]
    entries = [folder.logprob(token, -1.0) for token in ids]
    assert b"".join(entry.bytes for entry in entries).decode().strip() == text.strip()
    assert "\ufffd" in {entry.text for entry in entries}
    special = [folder.logprob(folder.encode(t)[-1], -1.0) for t in vocabularies.SPECIAL]
    assert [(e.text, e.bytes) for e in special] == [(t, None) for t in vocabularies.SPECIAL]


def test_grammar_is_complete_after_the_last_character(tokenizer):
    encode = vocabularies.byte_level().encode
    grammar = Grammar('{"type": "object", "properties": {"a": {"type": "integer"}}}', tokenizer)
    for token in encode('{"a": 12').ids:
        assert grammar.allowed(tokenizer.vocab_size)[token]
        assert not grammar.complete
        grammar.add(token)
    grammar.add(encode("}").ids[0])
    assert grammar.complete


def test_end_token_with_a_text_does_not_end_a_string():
    """Such as dolly's "### End", which is also four words of English."""
    words = vocabularies.byte_level()
    letter, quote = words.encode("a").ids[0], words.encode('"').ids[0]
    reader = LLTokenizer(words.to_str(), slices=[], eos_token=[letter])
    grammar = Grammar('{"type": "string"}', reader)
    for _ in range(2):
        assert not grammar.allowed(reader.vocab_size)[letter]
        grammar.add(quote)
    assert grammar.complete


def test_at_most_one_space_between_two_parts(tokenizer):
    encode = vocabularies.byte_level().encode
    grammar = Grammar("{}", tokenizer)
    brace, space = encode("{").ids[0], encode(" ").ids[0]
    grammar.add(brace)
    assert grammar.allowed(tokenizer.vocab_size)[space]
    grammar.add(space)
    allowed = grammar.allowed(tokenizer.vocab_size).nonzero()[0]
    assert not [i for i in allowed if tokenizer.decode_bytes([int(i)])[:1].isspace()]


def test_logits_without_a_token_are_not_allowed(tokenizer):
    rows = tokenizer.vocab_size + 40
    allowed = Grammar("{}", tokenizer).allowed(rows)
    assert allowed.shape == (rows,)
    assert not allowed[tokenizer.vocab_size :].any()


def test_xgrammar_reads_no_white_space(tokenizer):
    """Otherwise a completion could consist of spaces until its tokens are used up."""
    tokens = tokens_for_xgrammar(tokenizer, {69})
    assert tokens[69] == b""
    assert len(tokens) == tokenizer.vocab_size
    assert not [token for token in tokens if any(byte in b" \t\r\n" for byte in token)]
    assert " " not in for_xgrammar('{"enum": ["New York"]}')


def test_enum_keeps_only_the_values_of_its_type():
    written = json.loads(
        for_xgrammar('{"type": ["integer", "null"], "enum": ["a", null, 1, true]}')
    )
    assert [value["const"] for value in written["$defs"].values()] == [None, 1]
