"""Tool use: the simple (Python) and the irrelevance questions of the Berkeley Function Calling Leaderboard.

    {"id": "simple_python_0", "question": [[{"role": "user", "content": "Area of a triangle, base 10, ..?"}]],
     "function": [{"name": "triangle_area", "description": "..", "parameters": {"required": ["base"],
       "type": "dict", "properties": {"base": {"type": "integer", ..}, "unit": {"type": "string", ..}}}}]}
    {"id": "simple_python_0", "ground_truth": [{"triangle_area": {"base": [10], "unit": ["units", ""]}}]}

The system message offers the function as our chats offer the calculator, and describes it as the file does:

    You can call triangle_area(base, unit).
    {"name": "triangle_area", "description": "..", "parameters": {..}}

What the assistant says first is judged; nothing is run. Of a simple question "accuracy" is one call, of the
right function, with right arguments. Beside it: calls, all of which are JSON with a name and arguments
("valid_syntax"); one call, of the right name ("right_function"); one call with right arguments, whatever its
name ("right_arguments"). Irrelevance asks for what the function cannot do, and "accuracy" is no call, which a
model that never calls has, too. A malformed call counts as one there, on the leaderboard as none.

Right arguments are what the leaderboard's checker accepts (ast_checker.py of the package bfcl_eval, from
github.com/ShishirPatil/gorilla). Each parameter has a list of possible values, where "" says that it may be
left out; its type is the described one; an integer may stand for a float, though not inside an array; of
strings neither case nor blanks nor the signs ,./-_*^ count. Where the possible values have another type than
the described one, the value is compared as it is. Files: bfcl_v4*; hub (version 3):
gorilla-llm/Berkeley-Function-Calling-Leaderboard.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from configurator import UserError
from evals.benchmarks import Questions, convert, read
from evals.lm import LM
from evals.results import Result, mean, truncated
from formats.chat_format import require_chat
from generation.assistant import Message

HUB = "gorilla-llm/Berkeley-Function-Calling-Leaderboard"
HUB_FILES = {"simple_python": ["BFCL_v3_simple.json", "possible_answer/BFCL_v3_simple.json"],
             "irrelevance": ["BFCL_v3_irrelevance.json"]}
MAX_NEW_TOKENS = 200
TYPES = {"string": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list,
         "dict": dict, "any": str}


class ToolQuestion(NamedTuple):
    id: str
    messages: list[Message]
    name: str  # of the function
    parameters: dict[str, Any]  # their description: {"properties": {name: {"type": ..}}, "required": [..]}
    possible: dict[str, list]  # the values that each may have; of irrelevance none


def load(source: str | None, limit: int, shots: int | None,
         category: Literal["simple_python", "irrelevance"]) -> Questions:
    """The first `limit` questions. There are no shots."""
    if source is None:
        rows = read(str(download(HUB_FILES[category])), Path(HUB_FILES[category][0]).stem, "")
    else:
        rows = read(source, f"bfcl_v4_{category}", "")
    truths = {row.get("id"): row["ground_truth"] for row in rows if "ground_truth" in row}
    asked = [row for row in rows if "ground_truth" not in row][:limit]
    simple = category == "simple_python"
    return Questions(convert(asked, lambda row: question_of(row, truths[row["id"]] if simple else None)), [])


def question_of(row: dict[str, Any], truth: list[dict[str, Any]] | None) -> ToolQuestion:
    [messages], [function] = row["question"], row["function"]
    properties = function["parameters"]["properties"]
    offer = f"You can call {function['name']}({', '.join(properties)}).\n"
    asked = [{"role": "system", "content": offer + json.dumps(function, ensure_ascii=False)}]
    asked += [{"role": message["role"], "content": message["content"].strip()} for message in messages]
    [(_, possible)] = truth[0].items() if truth else [("", {})]
    for name in possible:
        kinds_of(properties[name])
    return ToolQuestion(row["id"], asked, function["name"], function["parameters"], possible)


def download(names: list[str]) -> Path:
    """The folder with files of the hub's; `datasets` cannot load them, since their columns differ."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    try:
        return Path([hf_hub_download(HUB, name, repo_type="dataset") for name in names][0]).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"hf:{HUB}: {str(error).splitlines()[0]}") from None


def score(lm: LM, questions: Questions, category: str) -> Result:
    """Of simple questions four figures, of irrelevance one. UserError for a model without chat tokens."""
    require_chat(lm.tokenizer, str(lm.folder))
    replies = lm.reply([question.messages for question in questions.asked], MAX_NEW_TOKENS, most_calls=0)
    judge = judged_call if category == "simple_python" else judged_silence
    answers = [{"id": question.id, "question": question.messages[-1]["content"], "said": first,
                **judge(question, first)} for question, [first] in zip(questions.asked, replies, strict=True)]
    figures = {key: mean([answer[key] for answer in answers])
               for key, value in answers[0].items() if isinstance(value, bool)}
    return Result(figures | truncated(lm.truncated), answers, {"first_prompt": questions.asked[0].messages})


def judged_silence(question: ToolQuestion, message: Message) -> dict[str, bool]:
    return {"accuracy": not message.get("tool_calls") and not message.get("malformed")}


def judged_call(question: ToolQuestion, message: Message) -> dict[str, Any]:
    """The four verdicts, and what is wrong with the arguments, if anything is."""
    calls = message.get("tool_calls", [])
    valid = bool(calls) and not message.get("malformed")
    right_function, wrong = False, "not one call"
    if valid and len(calls) == 1:
        right_function = calls[0]["name"] == question.name
        wrong = wrong_argument(calls[0]["arguments"], question.parameters, question.possible)
    return {"accuracy": right_function and not wrong, "valid_syntax": valid,
            "right_function": right_function, "right_arguments": not wrong, "wrong": wrong}


# ---- The leaderboard's comparison of arguments ------------------------------------------------------------

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


def is_possible(value: Any, described: dict[str, Any], possible: list) -> bool:
    """Whether a value is of the described type and one of those that are possible."""
    (kind, inner), known = kinds_of(described), type_of_first(possible)
    own = float if kind is float and type(value) is int else type(value)
    if own is not kind and own is not known:
        return False
    if own is kind and inner and not any(has_items(value, inner, answer) for answer in possible):
        return False
    if known not in (kind, None):
        return value in possible
    if kind is dict:
        return any(fits(value, answer) for answer in possible)
    if inner is dict:
        return any(len(value) == len(answer) and all(map(fits, value, answer)) for answer in possible)
    if kind is list:
        return plain_items(value) in map(plain_items, possible)
    return plain(value) in map(plain, possible)


def kinds_of(described: dict[str, Any]) -> tuple[type, type | None]:
    """The described type, and of an array that of its items."""
    kind = TYPES[described["type"]]
    return kind, TYPES[described["items"]["type"]] if kind is list else None


def type_of_first(values: list) -> type | None:
    """The type of the first value that is not the "" of what may be left out."""
    return next((type(value) for value in values if value != ""), None)


def has_items(value: list, inner: type, answer: Any) -> bool:
    """Whether all items are of the described type, or of that of an answer's first item."""
    return not isinstance(answer, list) or all(type(item) in (inner, type_of_first(answer)) for item in value)


def fits(value: Any, answer: Any) -> bool:
    """Whether an object has the keys of an answer, {key: possible values}, with such values."""
    if not isinstance(value, dict) or not isinstance(answer, dict):
        return False
    known = all(key in answer and plain(item) in map(plain, answer[key]) for key, item in value.items())
    return known and all(key in value or "" in values for key, values in answer.items())


def plain_items(values: list) -> list:
    return [plain(value) for value in values]


def plain(value: Any) -> Any:
    """A string without what does not count; everything else as it is."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if isinstance(value, str) else value
