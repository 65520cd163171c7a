"""Tool use: Python questions of the Berkeley Function Calling Leaderboard: simple, multiple, parallel,
parallel_multiple, irrelevance.

    {"id": "simple_python_0", "question": [[{"role": "user", "content": "Area of a triangle, base 10, ..?"}]],
     "function": [{"name": "triangle_area", "description": "..", "parameters": {"required": ["base"],
       "type": "dict", "properties": {"base": {"type": "integer", ..}, "unit": {"type": "string", ..}}}}]}
    {"id": "simple_python_0", "ground_truth": [{"triangle_area": {"base": [10], "unit": ["units", ""]}}]}

The system message offers the function as our chats offer the calculator, then describes it as the file does:

    You can call triangle_area(base, unit).
    {"name": "triangle_area", "description": "..", "parameters": {..}}

A multiple question offers several functions, of which one is right. A parallel question needs several calls,
in any order; parallel_multiple is both. The first message of the assistant is judged; nothing is run. There
are four figures:

- accuracy: exactly the right calls, each of the right function with right arguments;
- valid_syntax: there are calls, and all of them are JSON with a name and arguments;
- right_function: exactly the right names, each as often as it is needed;
- right_arguments: the right number of calls, with right arguments; the names may be wrong.

An irrelevance question asks for something the function cannot do. Its accuracy is the share of messages
without a call, so a model that never calls gets them all right. A malformed call counts as a call here; on
the leaderboard it counts as none.

Right arguments are those that the leaderboard's checker accepts (ast_checker.py of the package bfcl_eval,
from github.com/ShishirPatil/gorilla). Like the checker, we take for each right call the first call that fits.
Each parameter has a list of possible values; "" in the list means that the parameter is optional. A value
must have the described type. An integer is accepted as a float, but not inside an array. Strings are compared
without case, spaces and the characters ,./-_*^. If the possible values have another type than the
description, they are compared as they are. Files: bfcl_v4*; hub (version 3):
gorilla-llm/Berkeley-Function-Calling-Leaderboard.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from configurator import UserError
from dataset.tool_problems import offer
from evals.benchmarks import Questions, convert, read, text_of, texts_of
from evals.lm import LM
from evals.results import Result, means, truncated
from formats.chat_format import require_chat
from generation.assistant import Message

HUB = "gorilla-llm/Berkeley-Function-Calling-Leaderboard"
HUB_FILES = {
    **{name: [f"BFCL_v3_{file}.json", f"possible_answer/BFCL_v3_{file}.json"] for name, file in (
        ("simple_python", "simple"), ("multiple", "multiple"), ("parallel", "parallel"),
        ("parallel_multiple", "parallel_multiple"))},
    "irrelevance": ["BFCL_v3_irrelevance.json"]}
MAX_NEW_TOKENS = 200
TYPES = {"string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list,
         "dict": dict, "any": str}


# ---- The leaderboard's comparison of arguments ------------------------------------------------------------

def normalized(value: Any) -> Any:
    """A string without case, spaces and some punctuation; any other value as it is."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if isinstance(value, str) else value


def first_type(values: list) -> type | None:
    """The type of the first value that is not "", the mark of an optional parameter."""
    return next((type(value) for value in values if value != ""), None)


def described_types(described: dict[str, Any]) -> tuple[type, type | None]:
    """The described type, and the type of the items if it is an array."""
    kind = TYPES[described["type"]]
    return kind, TYPES[described["items"]["type"]] if kind is list else None


def has_items(value: list, kind: type, answer: Any) -> bool:
    """Whether each item has this type, or the type of the first item of an answer."""
    return not isinstance(answer, list) or all(type(item) in (kind, first_type(answer)) for item in value)


def matches(value: Any, answer: Any) -> bool:
    """Whether an object agrees with an answer {key: possible values}, where "" makes a key optional."""
    if not isinstance(value, dict) or not isinstance(answer, dict):
        return False
    known = all(key in answer and normalized(item) in map(normalized, answer[key])
                for key, item in value.items())
    return known and all(key in value or "" in values for key, values in answer.items())


def is_possible(value: Any, described: dict[str, Any], possible: list) -> bool:
    """Whether a value has the described type and is one of the possible values."""
    (kind, item_kind), first_kind = described_types(described), first_type(possible)
    own = float if kind is float and type(value) is int else type(value)  # an integer is accepted as a float
    if own is not kind and own is not first_kind:
        return False
    if own is kind and item_kind and not any(has_items(value, item_kind, answer) for answer in possible):
        return False
    if first_kind not in (kind, None):  # the description is wrong: compare values as they are
        return value in possible
    if kind is dict:
        return any(matches(value, answer) for answer in possible)
    if item_kind is dict:
        return any(len(value) == len(answer) and all(map(matches, value, answer)) for answer in possible)
    if kind is list:
        items = [normalized(item) for item in value]
        return any(items == [normalized(item) for item in answer] for answer in possible)
    return normalized(value) in map(normalized, possible)


def wrong_argument(arguments: Any, parameters: dict[str, Any], possible: dict[str, list]) -> str | None:
    """What is wrong with the arguments of a call, or None."""
    if not isinstance(arguments, dict):
        return "not an object"
    optional = {name for name, values in possible.items() if "" in values}
    if missing := ({*parameters["required"]} | possible.keys() - optional) - arguments.keys():
        return f"no {min(missing)}"
    for name, value in arguments.items():
        if name not in parameters["properties"] or name not in possible:
            return f"{name} is unknown"
        if not is_possible(value, parameters["properties"][name], possible[name]):
            return f"{name} = {value!r}"
    return None


# ---- The task -------------------------------------------------------------------------------------------

class ToolQuestion(NamedTuple):
    id: str
    messages: list[Message]
    functions: dict[str, dict[str, Any]]  # {name: {"properties": {name: {"type": ..}}, "required": [..]}}
    calls: list[tuple[str, dict[str, list]]]  # right calls: a name, possible values of each parameter


def download_files(names: list[str]) -> Path:
    """Download files from the hub; returns their folder. `datasets` cannot read them: their columns differ.
    """
    from huggingface_hub import hf_hub_download
    try:
        return Path([hf_hub_download(HUB, name, repo_type="dataset") for name in names][0]).parent
    except OSError as error:  # all errors of the hub are OSErrors
        raise UserError(f"hf:{HUB}: {str(error).splitlines()[0]}") from None


def question_of(row: dict[str, Any], truth: list[dict[str, Any]] | None) -> ToolQuestion:
    """truth: [{function: {parameter: possible values}}], or None for an irrelevance question."""
    [messages], offered = row["question"], row["function"]
    functions = {text_of(function["name"]): function["parameters"] for function in offered}
    conversation = [{"role": "system", "content": "\n".join(map(offer, offered))}]
    conversation += [{"role": message["role"], "content": message["content"].strip()} for message in messages]
    calls = []
    for each in truth or []:
        [(name, possible)] = each.items()
        parameters = functions[name]  # KeyError for a function that is not offered
        texts_of(parameters["required"])
        for parameter, values in possible.items():
            if parameter in parameters["properties"]:  # parallel_multiple_12 has one that is not described
                described_types(parameters["properties"][parameter])  # KeyError for an unknown type
            if not isinstance(values, list):
                raise TypeError(f"{parameter}: the possible values {values!r} are not a list")
        calls.append((name, possible))
    if truth == []:
        raise ValueError("no right call")
    return ToolQuestion(row["id"], conversation, functions, calls)


def load(source: str | None, limit: int, shots: int | None, category: str) -> Questions:
    """The first `limit` questions. There are no worked examples."""
    if source is None:
        rows = read(str(download_files(HUB_FILES[category])), Path(HUB_FILES[category][0]).stem, "")
    else:
        rows = [row for row in read(source, f"bfcl_v4_{category}", "")  # parallel* is also parallel_multiple*
                if not str(row.get("id")).startswith(f"{category}_multiple")]
    # Answers are rows of their own, in another file, with the id of their question.
    truths = dict(convert([row for row in rows if "ground_truth" in row],
                          lambda row: (text_of(row["id"]), row["ground_truth"] or [])))
    questions = [row for row in rows if "ground_truth" not in row][:limit]
    silent = category == "irrelevance"
    return Questions(convert(questions,
                             lambda row: question_of(row, None if silent else truths[row["id"]])), [])


def wrong_call(question: ToolQuestion, calls: list[dict[str, Any]], named: bool) -> str | None:
    """What is wrong with the calls, or None. named: whether their names have to be right, too."""
    if len(calls) != len(question.calls):
        return f"{len(calls)} calls instead of {len(question.calls)}"
    left = list(calls)
    for name, possible in question.calls:
        reasons = ["wrong function" if named and call["name"] != name else
                   wrong_argument(call["arguments"], question.functions[name], possible) for call in left]
        if None not in reasons:
            return reasons[0]
        del left[reasons.index(None)]
    return None


def judge_message(question: ToolQuestion, message: Message) -> dict[str, Any]:
    """The four verdicts, and under "wrong" what is wrong with the arguments, or None.

    If no call is right, the only verdict is the accuracy.
    """
    calls = message.get("tool_calls", [])
    if not question.calls:
        return {"accuracy": not calls and not message.get("malformed")}
    valid = bool(calls) and not message.get("malformed")
    said, needed = Counter(call["name"] for call in calls), Counter(name for name, _ in question.calls)
    wrong = wrong_call(question, calls, named=False) if valid else "no valid call"
    return {"accuracy": valid and not wrong_call(question, calls, named=True), "valid_syntax": valid,
            "right_function": valid and said == needed, "right_arguments": not wrong, "wrong": wrong}


def score(lm: LM, questions: Questions, category: str) -> Result:
    """Four figures, or one for irrelevance. UserError for a model without chat tokens."""
    require_chat(lm.tokenizer, str(lm.folder))
    replies = lm.reply([question.messages for question in questions.asked], MAX_NEW_TOKENS, most_calls=0)
    answers = [{"id": question.id, "question": question.messages[-1]["content"], "said": message,
                **judge_message(question, message)}
               for question, [message] in zip(questions.asked, replies, strict=True)]
    figures = means(answers, [key for key, value in answers[0].items() if isinstance(value, bool)])
    return Result(figures | truncated(lm.truncated), answers, {"first_prompt": questions.asked[0].messages})
