"""Constrained decoding: only tokens that keep an answer inside a grammar can be chosen.

    python sample.py --model=out/base --json_schema=person.json     # JSON that fits the schema
    python eval.py --model=out/sft --tasks=bfcl_simple --constrain=tools    # a call of an offered tool

    constraint = Constraint(tokenizer, end_ids, ConstraintKeys(json_schema="person.json"))
    guide = constraint.guide([messages, ...])      # the answers of a batch, for Options(guide=...)
    logits = guide.mask(logits)                    # (B, V): only the tokens that may come next
    guide.advance(tokens)                          # the tokens that were chosen

The package llguidance (github.com/guidance-ai/llguidance) follows the grammar. The mask is applied before
temperature and filters, and it only removes tokens: the order of the legal ones stays, and a legal word may
be spelled with any tokens. An end token is legal where the answer is complete, so an answer that ends by
itself always fits. An answer that max_new_tokens cuts may not; it is marked as cut ("length").

Legal JSON has the keys of an object in the order of the schema and unknown keys last. Between its parts is
nothing, a space, or a line's end with an indent. A thought is legal with constrain=auto only. A schema with a
keyword that llguidance cannot enforce is refused: not, if, contains, uniqueItems, propertyNames, look-ahead,
formats that it does not know, and dates.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from configurator import UserError, optional_import
from dataset.tool_problems import offered_functions
from formats.chat_format import CALL, THOUGHT, THOUGHT_END
from formats.files import read_json
from formats.tokenizer import Tokenizer

Message = dict[str, Any]
# Without no_forcing, llguidance allows only the usual tokens of a word that has to follow.
HEADER = '%llguidance {"no_forcing": true}\n'
# White space between the parts of JSON has a limit, because a model may write it forever.
OPTIONS = {"whitespace_pattern": r" |\n[ \t]{0,40}", "json_allow_general_unicode_escapes": True}
# The names of types in BFCL's descriptions that are not JSON schema's. "any" is any value.
JSON_TYPES = {"dict": "object", "float": "number", "tuple": "array"}


@dataclass(frozen=True, kw_only=True)
class ConstraintKeys:
    """The keys of constrained decoding."""

    constrain: Literal["tools", "auto"] | None = None  # tools: a call of an offered tool; auto: also text
    json_schema: str | None = None  # file with a JSON schema; answers are JSON that fits it


# ---- Grammars ---------------------------------------------------------------------------------------------

def argument_schema(described: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a parameter as BFCL and OpenAI describe it: type, enum, items, properties."""
    kind = JSON_TYPES.get(described.get("type", "any"), described.get("type", "any"))
    schema = {key: described[key] for key in ("enum", "required") if key in described}
    schema |= {"type": kind} if kind != "any" else {}
    if "items" in described:
        schema["items"] = argument_schema(described["items"])
    if "properties" in described:
        properties = {name: argument_schema(each) for name, each in described["properties"].items()}
        schema |= {"properties": properties, "additionalProperties": False}
    return schema


def call_schema(function: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a call of a function, as formats/chat_format.py writes it."""
    arguments = argument_schema({"properties": {}, **function["parameters"], "type": "object"})
    return {"type": "object", "properties": {"name": {"const": function["name"]}, "arguments": arguments},
            "required": ["name", "arguments"], "additionalProperties": False}


def grammar(start: str, schema: dict[str, Any], tokenizer: Tokenizer | None = None) -> str:
    """A grammar in llguidance's form of Lark. start: the rule of an answer, which may use json and, with the
    tokenizer of a chat model, call, thought and TEXT."""
    schema = schema | {"x-guidance": OPTIONS}  # takes the place of options in a user's schema
    rules = f"{HEADER}start: {start}\njson: %json {json.dumps(schema)}\n"
    if tokenizer is None:
        return rules
    thought, thought_end, call = map(tokenizer.token_id, (THOUGHT, THOUGHT_END, CALL))
    return f"{rules}call: <[{call}]> json\nthought: <[{thought}]> TEXT <[{thought_end}]>\nTEXT: /(.|\\n)*/\n"


# ---- Answers ----------------------------------------------------------------------------------------------

class Guide:
    """The state of the answers of a batch: which tokens may come next."""

    def __init__(self, matchers: list[Any], end_ids: set[int]):
        """matchers: of llguidance, one for each answer; None for one that has ended."""
        self.matchers, self.end_ids = matchers, sorted(end_ids)

    def allowed(self, vocab_size: int) -> np.ndarray:
        """(B, vocab_size) bool, all True for ended rows. Raises UserError if a row allows no token."""
        masks = [matcher and matcher.compute_bitmask() for matcher in self.matchers]
        every = b"\xff" * max(map(len, filter(None, masks)), default=vocab_size)  # of a row that has ended
        bits = np.frombuffer(b"".join(mask or every for mask in masks), np.uint8).reshape(len(masks), -1)
        # (B, bytes of a mask) -> (B, vocab_size), in one call for all rows, because the time is in the calls.
        allowed = np.unpackbits(bits, axis=1, count=vocab_size, bitorder="little").view(bool)
        allowed[:, self.end_ids] = [[matcher is None or matcher.is_accepting()] for matcher in self.matchers]
        if not (has_token := allowed.any(axis=1)).all():
            reason = self.matchers[has_token.argmin()].get_error().split("\n")[0]
            raise UserError(f"the answer cannot be constrained: {reason or 'no token can come next'}")
        return allowed

    def mask(self, logits: Tensor) -> Tensor:
        """logits (B, V) with -inf for tokens that may not come next. Rows that have ended are unchanged."""
        allowed = torch.from_numpy(self.allowed(logits.shape[1])).to(logits.device)
        return torch.where(allowed, logits, float("-inf"))

    def advance(self, tokens: Sequence[int | None]) -> None:
        """Go on after the token of each row; None or an end token ends an answer."""
        for row, (matcher, token) in enumerate(zip(self.matchers, tokens, strict=True)):
            if token is None or token in self.end_ids:
                self.matchers[row] = None
            elif matcher is not None and not matcher.consume_token(token):
                raise ValueError(f"token {token} is not allowed")


class Constraint:
    """The grammars of a tokenizer. Raises UserError if llguidance is absent or cannot enforce the schema."""

    def __init__(self, tokenizer: Tokenizer, end_ids: set[int], keys: ConstraintKeys):
        llguidance = optional_import("llguidance", "constrain and json_schema")
        self.matcher, self.tokenizer, self.end_ids, self.keys = llguidance.LLMatcher, tokenizer, end_ids, keys
        if keys.constrain and (keys.json_schema or tokenizer.hf.token_to_id(CALL) is None):
            raise UserError(f"constrain={keys.constrain}: does not work with json_schema, or for a model "
                            "without our tokens for tool calls")
        self.vocabulary = llguidance.LLTokenizer(
            tokenizer.hf.to_str(), n_vocab=tokenizer.vocab_size, eos_token=tokenizer.eot_id)
        if keys.json_schema:
            self.schema = read_json(Path(keys.json_schema))
            if not self.schema:
                raise UserError(f"json_schema={keys.json_schema}: not a file with a JSON schema")
            self.guide([None])

    def rules(self, messages: list[Message] | None) -> str:
        """The grammar of an answer. Raises UserError if a call is due and no tool is offered."""
        if self.keys.json_schema:
            return grammar("json", self.schema)
        try:
            schemas = [call_schema(function) for function in offered_functions(messages or [])]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"a tool's description is damaged ({type(error).__name__}: {error})") from None
        # After a result, the model has to be able to answer in words.
        forced = self.keys.constrain == "tools" and not (messages and messages[-1]["role"] == "tool")
        if forced and not schemas:
            raise UserError('constrain=tools: no tool is offered; a system message "You can call '
                            'calculator(expression)." offers one')
        start = "call+" if forced else "thought? TEXT call*" if schemas else "thought? TEXT"
        return grammar(start, {"anyOf": schemas} if schemas else {}, self.tokenizer)

    def guide(self, conversations: Sequence[list[Message] | None]) -> Guide:
        """The answers to conversations, or texts (None), at their beginning. UserError as for `rules`."""
        place = f"json_schema={self.keys.json_schema}" if self.keys.json_schema else "an offered tool"
        return self.guide_of([self.rules(messages) for messages in conversations], place)

    def guide_of(self, grammars: list[str], place: str) -> Guide:
        """The beginnings of answers that grammars describe. A UserError about them names `place`."""
        for rules in dict.fromkeys(grammars):
            faults = self.matcher.validate_grammar_with_warnings(rules, self.vocabulary)[1]
            # llguidance allows a 30th of February.
            faults += ["format date and date-time"] if '"format": "date' in rules else []
            if faults:
                raise UserError(f"{place}: cannot be enforced: {' '.join(faults[0].split())}")
        return Guide([self.matcher(self.vocabulary, rules) for rules in grammars], self.end_ids)


def constraint_of(tokenizer: Tokenizer, end_ids: set[int], keys: ConstraintKeys | None) -> Constraint | None:
    """The constraint that the keys ask for, or None."""
    return Constraint(tokenizer, end_ids, keys) if keys and (keys.constrain or keys.json_schema) else None
