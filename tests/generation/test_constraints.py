"""Constrained decoding: what a random model writes under a schema parses and validates with jsonschema; a
legal choice is never changed; calls of offered tools; batches and filters; schemas that are refused."""

import itertools
import json

import pytest
import torch

from configurator import UserError
from dataset.tool_problems import tool_rows
from formats.chat_format import encode_answer, read_answer, with_chat_tokens
from formats.tokenizer import Tokenizer
from generation.assistant import Assistant
from generation.constraints import Constraint, ConstraintKeys, call_schema
from generation.generate import Options, Sampling, generate
from tests.conftest import busy_model, tiny_config

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")


def an_object(required=(), extra=False, **properties):
    return {"type": "object", "properties": properties, "required": [*required],
            "additionalProperties": extra}


STRING, INTEGER = {"type": "string", "maxLength": 8}, {"type": "integer", "minimum": -9, "maximum": 120}
NUMBER = {"type": "number", "minimum": 0, "maximum": 2.5}
SIMPLE = [
    STRING, INTEGER, NUMBER, {"type": "boolean"}, {"type": "null"}, {"const": "yes"},
    {"enum": ["a", 1, None, "é"]},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"}, {"type": "string", "format": "uuid"},
    {"type": "string", "minLength": 2, "maxLength": 3},
    {"type": ["integer", "null"], "maximum": 99, "minimum": 0},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 999},
    {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 2},
    {"anyOf": [{"type": "boolean"}, INTEGER]}, {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"type": "boolean"}, "maxItems": 4}}}]
SCHEMAS = [
    *SIMPLE,
    *({"type": "array", "items": items, "minItems": low, "maxItems": 3}
      for items, low in itertools.product(SIMPLE[:8], (0, 2))),
    *(an_object("a", a=first, b=second) for first, second in zip(SIMPLE, SIMPLE[1:14], strict=False)),
    {"type": "array", "prefixItems": [INTEGER, STRING], "items": False},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3},
    {"type": "object", "patternProperties": {"^x[0-9]$": INTEGER}, "additionalProperties": False},
    an_object("ab", a=an_object("c", c=STRING), b={"type": "array", "items": an_object(d=NUMBER)})]


@pytest.fixture(scope="module")
def chat():
    """(a random model, a chat tokenizer of 300 ids)."""
    call = {"name": "calculator", "arguments": {"expression": "12 * 30"}}
    text = [json.dumps(call), "What is it? No, true."]
    tokenizer = with_chat_tokens(Tokenizer.train(text * 5, 300))
    return busy_model(tiny_config(vocab_size=tokenizer.vocab_size, block_size=256)), tokenizer


def schema_file(tmp_path, schema):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    return str(path)


def ends(tokenizer):
    return {tokenizer.eot_id, tokenizer.token_id("<|im_end|>")}


def constraint(tokenizer, **keys):
    return Constraint(tokenizer, ends(tokenizer), ConstraintKeys(**keys))


def sample(model, tokenizer, guide, rows, tokens, sampling):
    """(ids, whether the row ended by itself) of each row."""
    new, stop = [[] for _ in range(rows)], ends(tokenizer)
    for chosen in generate(model, [[tokenizer.eot_id]] * rows, tokens, sampling,
                           lambda row, ids: ids[-1] in stop,
                           Options(vocab_size=tokenizer.vocab_size, guide=guide)):
        for row, token in zip(new, chosen, strict=True):
            row += [] if token is None else [token]
    return [(row[:-1], True) if row[-1] in stop else (row, False) for row in new]


def check_schemas(chat, tmp_path, schemas, rows, tokens):
    """(samples that ended, samples that were cut); those that ended parse and validate."""
    (model, tokenizer), counts = chat, [0, 0]
    for number, schema in enumerate(schemas):
        rules = constraint(tokenizer, json_schema=schema_file(tmp_path, schema))
        odd = number % 2  # half of the runs have filters
        sampling = Sampling(temperature=[1.0, 0.5, 3.0][number % 3], top_k=20 * odd, top_p=1 - 0.1 * odd,
                            repetition_penalty=1 + 0.3 * odd, seed=number)
        validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        for ids, ended in sample(model, tokenizer, rules.guide([None] * rows), rows, tokens, sampling):
            counts[ended] += 1
            if ended:
                validator.validate(json.loads(tokenizer.decode(ids, inside=True)))
    return counts


def test_samples_of_a_random_model_fit_the_schema(chat, tmp_path):
    cut, ended = check_schemas(chat, tmp_path, SCHEMAS[::4], rows=4, tokens=60)
    assert cut + ended == 4 * len(SCHEMAS[::4]) and ended >= 30


def test_rows_that_have_ended_allow_everything(chat, tmp_path):
    """Masks of all rows come from one call: open rows keep theirs, wherever the ended ones stand."""
    tokenizer = chat[1]
    rules = constraint(tokenizer, json_schema=schema_file(tmp_path, {"type": "boolean"}))
    alone, vocab_size = rules.guide([None]).allowed(tokenizer.vocab_size), tokenizer.vocab_size
    guide, logits = rules.guide([None] * 3), torch.randn(3, vocab_size)
    for row in (0, 2):
        guide.matchers[row] = None
    assert guide.allowed(vocab_size)[[0, 2]].all() and (guide.allowed(vocab_size)[1] == alone).all()
    guide.matchers[1] = None
    assert torch.equal(guide.mask(logits), logits)


@pytest.mark.slow
def test_ten_thousand_samples(chat, tmp_path):
    cut, ended = check_schemas(chat, tmp_path, SCHEMAS[:50], rows=200, tokens=200)
    print(f"\n{ended:,} samples ended and are valid, {cut:,} were cut at 200 tokens")
    assert cut + ended == 10_000 and cut < 500


# ---- What is legal ----------------------------------------------------------------------------------------

def accepts(tokenizer, row, ids):
    """Whether every id may come next, one after the other, and then an end."""
    for token in ids:
        if not row.allowed(tokenizer.vocab_size)[0][token]:
            return False
        row.advance([token])
    return bool(row.allowed(tokenizer.vocab_size)[0][tokenizer.eot_id])


def test_a_legal_choice_is_never_changed(chat, tmp_path):
    """Legal JSON passes, spelled in the usual tokens or byte by byte, compact or indented."""
    _, tokenizer = chat
    schema = an_object("ab", a={"type": "integer"}, b={"type": "array", "items": STRING})
    value = {"a": 12, "b": ["é", 'say "x"', "\n"]}
    rules = constraint(tokenizer, json_schema=schema_file(tmp_path, schema))
    table = {token: index for index, token in enumerate(tokenizer.token_bytes())}
    for text in (json.dumps(value), json.dumps(value, indent=4, ensure_ascii=False),
                 json.dumps(value, separators=(",", ":"))):
        assert accepts(tokenizer, rules.guide([None]), tokenizer.encode(text)), text
        assert accepts(tokenizer, rules.guide([None]), [table[bytes([byte])] for byte in text.encode()]), text
    for text in ('{"a": 12}', '{"a": 1.5, "b": []}', '{"a": 12, "b": []} x', '{"a": 12, "b": [], "c": 1}'):
        assert not accepts(tokenizer, rules.guide([None]), tokenizer.encode(text)), text


def test_the_mask_only_removes_tokens(chat, tmp_path):
    """Masked logits are the old ones or -inf, and a row is chosen as it would be alone."""
    model, tokenizer = chat
    rules = constraint(tokenizer, json_schema=schema_file(tmp_path, INTEGER))
    logits = torch.randn(2, tokenizer.vocab_size)
    masked = rules.guide([None, None]).mask(logits)
    kept = masked.isfinite()
    assert torch.equal(masked[kept], logits[kept]) and 0 < kept[0].sum() < 40
    legal = {token for token in range(tokenizer.vocab_size) if kept[0][token]}
    assert {tokenizer.decode([token]) for token in legal} <= {*"-0123456789"} | {
        text for text in map(tokenizer.decode, ([token] for token in legal)) if text.strip("-").isdigit()}
    sampling = Sampling(temperature=1.0)
    both = sample(model, tokenizer, rules.guide([None, None]), 2, 20, sampling)
    assert both[:1] == sample(model, tokenizer, rules.guide([None]), 1, 20, sampling)


def test_special_and_unused_ids_are_no_text(chat, tmp_path):
    """Inside a string and inside a thought, no special token may come."""
    _, tokenizer = chat
    special = sorted(tokenizer.special_ids)
    row = constraint(tokenizer, json_schema=schema_file(tmp_path, STRING)).guide([None])
    row.advance([tokenizer.encode('"')[0]])
    assert not row.allowed(tokenizer.vocab_size)[0][special].any()
    row = constraint(tokenizer, constrain="auto").guide([[{"role": "user", "content": "Hi"}]])
    row.advance([tokenizer.token_id("<|start_thought|>")])
    allowed = row.allowed(tokenizer.vocab_size)[0]
    assert [index for index in special if allowed[index]] == [tokenizer.token_id("<|end_thought|>")]


# ---- Tools ------------------------------------------------------------------------------------------------

def test_calls_of_a_random_model_are_calls_of_offered_tools(chat):
    model, tokenizer = chat
    conversations = [row["messages"][:2] for row in tool_rows(6, seed=3)]
    rules = constraint(tokenizer, constrain="tools")
    assistant = Assistant(model, tokenizer, Sampling(temperature=1.0), 150, rules)
    done, replies = 0, assistant.reply(conversations, most_calls=0)
    for [message], conversation, ids in zip(replies, conversations, assistant.rows, strict=True):
        assert ("cut" in message) == (ids[-1] not in assistant.end_ids)  # calls are the whole answer
        calls = message.get("tool_calls", [])
        assert message["content"] == "" and "thought" not in message
        for call in calls:
            schemas = [call_schema(json.loads(line)) for line in conversation[0]["content"].split("\n")[1::2]]
            jsonschema.validate(call, {"anyOf": schemas})
        done += bool(calls)
    assert done >= 3


def test_the_right_answers_are_legal(chat):
    """What the data set teaches passes the grammar: calls with tools and auto, words with auto only."""
    _, tokenizer = chat
    rules = {mode: constraint(tokenizer, constrain=mode) for mode in ("tools", "auto")}
    for row in tool_rows(30, seed=4):
        *prompt, answer = row["messages"]
        ids = encode_answer(tokenizer, answer)[:-1]
        assert read_answer(tokenizer, ids).get("tool_calls") == answer.get("tool_calls")
        assert accepts(tokenizer, rules["auto"].guide([prompt]), ids)
        assert accepts(tokenizer, rules["tools"].guide([prompt]), ids) == ("tool_calls" in answer)
        after = [*prompt, answer, {"role": "tool", "content": "done"}]
        assert accepts(tokenizer, rules["tools"].guide([after]), tokenizer.encode("It is done."))


def test_the_calculator_needs_no_description(chat):
    _, tokenizer = chat
    system = {"role": "system", "content": "You can call calculator(expression)."}
    row = constraint(tokenizer, constrain="tools").guide([[system, {"role": "user", "content": "2 + 2?"}]])
    call = {"name": "calculator", "arguments": {"expression": "2 + 2"}}
    assert accepts(tokenizer, row, encode_answer(tokenizer, {"role": "assistant", "content": "",
                                                             "tool_calls": [call]})[:-1])


# ---- Refusals ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("schema", [
    {"type": "array", "uniqueItems": True}, {"not": {"type": "string"}}, {"contains": {"type": "integer"}},
    {"if": {"type": "string"}, "then": {"minLength": 3}}, {"type": "string", "format": "no such"},
    {"properties": {"a": {"format": "date"}}}, {"type": "string", "format": "date-time"},
    {"type": "string", "pattern": "(?=a)b"}, {"$ref": "https://example.com/x"}, {"type": "strin"},
    {"x-guidance": {"lenient": True}, "contains": {"type": "integer"}}, {"const": 5, "maximum": 3},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]}])
def test_a_schema_that_cannot_be_enforced_is_refused(chat, schema, tmp_path):
    with pytest.raises(UserError, match="json_schema=.*cannot be enforced: ") as error:
        constraint(chat[1], json_schema=schema_file(tmp_path, schema))
    assert "\n" not in str(error.value)


def test_mistakes_have_one_line(chat, tmp_path):
    tokenizer = chat[1]
    with pytest.raises(UserError, match="not a file with a JSON schema"):
        constraint(tokenizer, json_schema=str(tmp_path / "absent.json"))
    with pytest.raises(UserError, match="damaged"):
        constraint(tokenizer, json_schema=schema_file(tmp_path, [1]))
    with pytest.raises(UserError, match="does not work with json_schema"):
        constraint(tokenizer, json_schema=schema_file(tmp_path, STRING), constrain="auto")
    with pytest.raises(UserError, match="without our tokens"):
        Constraint(Tokenizer.train(["text"], 260), {256}, ConstraintKeys(constrain="tools"))
    tools = constraint(tokenizer, constrain="tools")
    with pytest.raises(UserError, match="no tool is offered"):
        tools.guide([[{"role": "user", "content": "Hi"}]])
    with pytest.raises(UserError, match="a tool's description is damaged"):
        tools.guide([[{"role": "system", "content": "You can call f(x).\n{\"name\": }"}]])
    endless = schema_file(tmp_path, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})
    with pytest.raises(UserError, match="cannot be"):
        constraint(tokenizer, json_schema=endless).guide([None]).allowed(tokenizer.vocab_size)
