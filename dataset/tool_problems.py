"""Tools beyond the calculator: how functions are offered in a chat, and generated conversations about them.

    python prepare.py --kind=chat --source=tools --tokenizer=out/base --out=data/tools

    offer(function)                      # the text of a system message that offers a function
    offered_functions(messages)          # the functions that the system messages of a chat offer
    rows = list(tool_rows(1000, seed=1))             # {"messages": [...]}

A generated row offers one to three functions with random names and parameters. In half of the rows one call
is right, in a quarter two calls, and in a quarter none, because no function does what the user wants:

    system     You can call find_hotel(city, nights).
               {"name": "find_hotel", "description": "Find a hotel.", "parameters": {"type": "dict", ...}}
    user       Find a hotel with city Oslo and nights 3.
    assistant  <|tool_call|>{"name": "find_hotel", "arguments": {"city": "Oslo", "nights": 3}}

Descriptions have the form of the Berkeley Function Calling Leaderboard (evals/tasks/bfcl.py), whose types are
not quite those of JSON schema. A parameter that is not required may be absent from question and call.
"""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

TOOL_ROWS = 10_000  # rows of the data set
TOOL_ROWS_VERSION = 1  # data folders record it; raise it whenever a row changes
NO_FUNCTION = "None of the functions can do that."
VERBS = ("find book cancel create delete send rename open close print sort count translate convert measure "
         "rate archive share schedule estimate").split()
NOUNS = ("hotel flight recipe bill meeting playlist photo parcel lamp route garden ticket contract budget "
         "lesson survey backup chart loan poem").split()
WORDS = ("Oslo", "Lima", "blue", "large", "weekly", "Ann Lee", "north gate", "jazz", "room 12", "report.txt")
PARAMETERS = {"string": "city owner title color category note", "integer": "count nights year limit page",
              "float": "price weight width ratio", "boolean": "urgent public", "array": "sizes scores"}
KINDS = {name: kind for kind, names in PARAMETERS.items() for name in names.split()}  # of each parameter


# ---- Offers -----------------------------------------------------------------------------------------------

def offer(function: dict[str, Any]) -> str:
    """The text that offers a function: {"name", "description", "parameters": {"properties", "required"}}."""
    names = ", ".join(function["parameters"]["properties"])
    return f"You can call {function['name']}({names}).\n{json.dumps(function, ensure_ascii=False)}"


def offered_functions(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The functions that system messages offer, as `offer` takes them.

    Without a description, all parameters are required strings: the calculator's expression is one. Raises
    ValueError for a description that is not JSON.
    """
    functions = []
    for text in (message["content"] for message in messages if message["role"] == "system"):
        for name, names, described in re.findall(
                r"^You can call ([^\s(]+)\((.*)\)\.[ \t]*$(?:\n(\{.*\})$)?", text, re.M):
            parameters = names.split(", ") if names else []
            functions.append(json.loads(described) if described else {"name": name, "parameters": {
                "properties": {each: {"type": "string"} for each in parameters}, "required": parameters}})
    return functions


# ---- Conversations ----------------------------------------------------------------------------------------

def draw_function(draw: random.Random) -> dict[str, Any]:
    """A function with one to four parameters, the first of them required."""
    verb, noun, names = draw.choice(VERBS), draw.choice(NOUNS), draw.sample(sorted(KINDS), draw.randint(1, 4))
    properties = {name: {"type": KINDS[name], "description": f"The {name} of the {noun}."}
                  | ({"items": {"type": "integer"}} if KINDS[name] == "array" else {}) for name in names}
    required = names[:draw.randint(1, len(names))]
    return {"name": f"{verb}_{noun}", "description": f"{verb.capitalize()} a {noun}.",
            "parameters": {"type": "dict", "properties": properties, "required": required}}


def draw_value(kind: str, draw: random.Random) -> Any:
    """A value of a type."""
    number = draw.randrange(1, 10**draw.randint(1, 4))
    return {"string": draw.choice(WORDS), "integer": number, "float": number / 100, "boolean": number < 50,
            "array": [draw.randrange(100) for _ in range(draw.randint(1, 4))]}[kind]


def draw_call(function: dict[str, Any], draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A wish in words, and the call that grants it. Half of the optional parameters are absent."""
    required = function["parameters"]["required"]
    arguments = {name: draw_value(KINDS[name], draw) for name in function["parameters"]["properties"]
                 if name in required or draw.random() < 0.5}
    # A truth value is spelled as JSON does, and a list without brackets, as people write it.
    *first, last = (f"{name} {value if isinstance(value, str) else json.dumps(value).strip('[]')}"
                    for name, value in arguments.items())
    wish = f"{function['description'].lower()[:-1]} with {', '.join(first)}{' and ' if first else ''}{last}"
    return wish, {"name": function["name"], "arguments": arguments}


def tool_row(draw: random.Random) -> dict[str, Any]:
    """A conversation that offers one to three functions."""
    functions: dict[str, dict[str, Any]] = {}  # by name, because two of one name would be a riddle
    while len(functions) < 4:
        functions |= {each["name"]: each for each in [draw_function(draw)]}
    *offered, absent = functions.values()
    offered, calls = offered[:draw.randint(1, 3)], draw.choice((0, 1, 1, 2))
    wanted = [draw.choice(offered) for _ in range(calls)] or [absent]
    wishes, right = zip(*(draw_call(function, draw) for function in wanted), strict=True)
    text = draw.choice(("{}.", "Please {}.", "Can you {}?", "I want to {}.")).format(", then ".join(wishes))
    answer = {"content": "", "tool_calls": list(right)} if calls else {"content": NO_FUNCTION}
    return {"messages": [{"role": "system", "content": "\n".join(map(offer, offered))},
                         {"role": "user", "content": text[0].upper() + text[1:]},
                         {"role": "assistant", **answer}]}


def tool_rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` rows."""
    draw = random.Random(f"tools/{seed}")
    return (tool_row(draw) for _ in range(count))
