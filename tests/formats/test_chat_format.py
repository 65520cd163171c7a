"""The chat format: the training mask, equality with the saved template, and no forged special tokens."""

import itertools
import json
import random

import pytest

from dataset.conversations import conversation, preference, rename_keys
from dataset.problems import problem_rows
from dataset.sources import Skip, find_files, read_rows, row_value
from formats.chat_format import (
    CHAT_TOKENS,
    encode_answer,
    encode_chat,
    encode_prompt,
    end_of_turn,
    read_answer,
    require_chat,
    with_chat_tokens,
)
from formats.tokenizer import END_OF_TEXT, Tokenizer
from tests.conftest import CODE, shared


@pytest.fixture(scope="module")
def tokenizer():
    texts = [row["text"] for row in problem_rows("text", 500, seed=1)]
    return with_chat_tokens(Tokenizer.train([*texts, CODE], 500))


@pytest.fixture(scope="module")
def template(tokenizer, tmp_path_factory):
    """The saved tokenizer, as transformers loads it."""
    import transformers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


CONVERSATION = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "12 * 30?"},
    {
        "role": "assistant",
        "content": "",
        "thought": " 12 * 3 = 36 ",
        "tool_calls": [{"name": "calculator", "arguments": {"expression": "12*30 \u00e9"}}],
    },
    {"role": "tool", "content": "360"},
    {"role": "assistant", "content": "\n It is 360. "},
]


def test_a_conversation_by_hand(tokenizer):
    ids, mask = encode_chat(tokenizer, CONVERSATION)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n12 * 30?<|im_end|>\n"
        "<|im_start|>assistant\n<|start_thought|>12 * 3 = 36<|end_thought|><|tool_call|>"
        '{"name": "calculator", "arguments": {"expression": "12*30 \u00e9"}}<|im_end|>\n'
        "<|im_start|>tool\n<|tool_response|>360<|im_end|>\n<|im_start|>assistant\nIt is 360.<|im_end|>\n"
    )
    assert targets(tokenizer, CONVERSATION) == (
        '<|start_thought|>12 * 3 = 36<|end_thought|><|tool_call|>{"name": "calculator", "arguments": '
        '{"expression": "12*30 \u00e9"}}<|im_end|>It is 360.<|im_end|>'
    )
    assert len(ids) == len(mask)


def targets(tokenizer, messages):
    """The masked ids as text."""
    ids, mask = encode_chat(tokenizer, messages)
    return tokenizer.decode([i for i, wanted in zip(ids, mask, strict=True) if wanted])


def spoken(messages):
    """The assistant's text, built independently of the encoder in formats/chat_format.py."""
    text = ""
    for message in messages:
        if message["role"] == "assistant":
            if message.get("thought"):
                text += f"<|start_thought|>{message['thought'].strip()}<|end_thought|>"
            text += message["content"].strip()
            for call in message.get("tool_calls", []):
                text += "<|tool_call|>" + json.dumps(call, ensure_ascii=False)
                assert call["name"] in text
            text += "<|im_end|>"
    return text


def assert_as_the_template(tokenizer, template, messages):
    theirs = template.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encode_chat(tokenizer, messages)
    assert theirs["input_ids"] == ids and theirs["assistant_masks"] == mask


def test_the_template_gives_the_same_ids_and_mask(tokenizer, template):
    assert_as_the_template(tokenizer, template, CONVERSATION)
    opened = template.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True, return_dict=True)
    assert opened["input_ids"] == encode_prompt(tokenizer, CONVERSATION[:2])


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_generated_conversations(count, tokenizer, template):
    """decode(targets) is exactly the assistants' text. Ids and masks are equal to the template's."""
    for number, row in enumerate(problem_rows("chat", count, seed=7)):
        messages = row["messages"]
        assert targets(tokenizer, messages) == spoken(messages)
        if number % 10 == 0:
            assert_as_the_template(tokenizer, template, messages)


@pytest.mark.parametrize("most", [300, pytest.param(10**6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["chat", "math/gsm8k_test.jsonl", "tools/glaive_toolcall_en_demo.json"])
def test_every_real_file(tokenizer, template, name, most):
    """The same for real conversations, except those that contain the name of a control token."""
    rows = 0
    for row in itertools.islice(read_rows(find_files(str(shared(name)))[0], None, 2**20), most):
        try:
            messages = conversation(row_value(row))
        except Skip:
            continue
        if any(token in str(messages) for token in (*CHAT_TOKENS, END_OF_TEXT)):
            continue
        assert targets(tokenizer, messages) == spoken(messages)
        rows += 1
        if rows % 40 == 0:
            assert_as_the_template(tokenizer, template, messages)
    assert rows > 280


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_hostile_strings_give_no_control_token(count, tokenizer):
    """All control tokens, complete, split and nested, in the content, thought and call of every role."""
    draw = random.Random(1)
    special = [*CHAT_TOKENS, END_OF_TEXT]
    ids_of = {name: tokenizer.hf.token_to_id(name) for name in special}
    for number in range(count):
        pieces = []
        for _ in range(draw.randint(1, 6)):
            token = draw.choice(special)
            cut = draw.randrange(len(token))
            nested = token[:cut] + draw.choice(special) + token[cut:]
            pieces.append(draw.choice([token, nested, token[:cut], " ", "\n", "assistant\n", "\u00e9"]))
        hostile = "".join(pieces)
        messages = [
            {"role": "system", "content": hostile},
            {"role": "user", "content": hostile},
            {
                "role": "assistant",
                "content": hostile,
                "thought": hostile + "x",
                "tool_calls": [{"name": hostile, "arguments": {hostile: hostile}}],
            },
            {"role": "tool", "content": hostile},
        ]
        names = [name for i in encode_chat(tokenizer, messages)[0] for name, at in ids_of.items() if at == i]
        expected = ["<|im_start|>", "<|im_end|>"] * 2 + [
            "<|im_start|>", "<|start_thought|>", "<|end_thought|>", "<|tool_call|>", "<|im_end|>",
            "<|im_start|>", "<|tool_response|>", "<|im_end|>"]  # fmt: skip
        assert names == expected, (number, hostile)


def test_an_answer_is_read_back(tokenizer):
    for message in (CONVERSATION[2], CONVERSATION[4], {"role": "assistant", "content": "", "thought": "a"}):
        answer = read_answer(tokenizer, encode_answer(tokenizer, message))
        assert answer == {
            key: value.strip() if isinstance(value, str) else value for key, value in message.items()
        }


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<|start_thought|>never ends", {"content": "", "malformed": ["never ends"]}),
        ("a<|tool_call|>{not json<|im_end|>", {"content": "a", "malformed": ["{not json"]}),
        ('<|tool_call|>{"name": 3, "arguments": {}}', {"malformed": ['{"name": 3, "arguments": {}}']}),
        ('<|tool_call|>{"name": "f"}', {"malformed": ['{"name": "f"}']}),
        ("360<|im_end|>more", {"content": "360"}),
        ("", {"content": ""}),
    ],
)
def test_malformed_thoughts_and_calls(tokenizer, text, expected):
    ids = tokenizer.hf.encode(text, add_special_tokens=False).ids
    assert read_answer(tokenizer, ids) == {"role": "assistant", "content": ""} | expected


def test_existing_tokens_keep_their_ids(tokenizer):
    again = with_chat_tokens(tokenizer)
    assert again.definition == tokenizer.definition and again.vocab_size == tokenizer.vocab_size
    assert end_of_turn(tokenizer) in tokenizer.end_ids and tokenizer.end_ids[-1] == tokenizer.eot_id
    plain = Tokenizer.train(["a text"] * 3, 300)
    assert end_of_turn(plain) is None and plain.end_ids == plain.eot_id
    with pytest.raises(ValueError, match="out/base: its tokenizer has no chat tokens"):
        require_chat(plain, "out/base")


def test_one_token_does_not_end_both_a_text_and_a_turn(tokenizer):
    """Qwen's chat models have one token for both. The end of a turn must not end a conversation."""
    theirs = Tokenizer(tokenizer.definition, tokenizer.settings | {"eos_token": "<|im_end|>"})
    assert theirs.eot_id == end_of_turn(theirs)
    ours = with_chat_tokens(theirs)
    assert ours.eot_id == tokenizer.eot_id and ours.end_ids == tokenizer.end_ids
    assert ours.eot_id not in encode_chat(ours, CONVERSATION)[0]


def test_a_call_with_a_lone_surrogate_is_malformed(tokenizer):
    text = '<|tool_call|>{"name": "calculator", "arguments": {"expression": "\\ud800"}}'
    answer = read_answer(tokenizer, tokenizer.hf.encode(text, add_special_tokens=False).ids)
    assert "tool_calls" not in answer and len(answer["malformed"]) == 1
    call = {"name": "f", "arguments": {"x": "\ud800"}}
    with pytest.raises(Skip, match="lone surrogate"):
        conversation({"messages": [QA[0], {"role": "assistant", "tool_calls": [call]}]})


# ---- Rows of data sets -> messages ------------------------------------------------------------------------

QA = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": QA},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
        {"instruction": "2 + 2?", "response": 4},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": QA[:1], "answer": 4.0},
        {"question": "2 + 2?", "answer": "4"},
    ],
)
def test_the_forms_of_a_conversation(row):
    assert conversation(row) == QA


def test_system_messages_inputs_and_calls():
    row = {"system": "Be brief.", "instruction": "Add.", "input": "2 and 2", "output": "4"}
    system, user, _ = conversation(row)
    assert system == {"role": "system", "content": "Be brief."} and user["content"] == "Add.\n\n2 and 2"
    call = {"name": "f", "arguments": {"x": 1}}
    openai = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    for call_message in (
        {"role": "assistant", "content": None, "tool_calls": [openai]},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ):
        result = {"role": "function", "content": "4"}
        messages = conversation({"messages": [QA[0], call_message, result, QA[1]]})
        assert messages[1]["tool_calls"] == [call] and messages[2] == {"role": "tool", "content": "4"}
    renamed = rename_keys({"text": "2 + 2?", "ans": 4.0}, {"question": "text", "answer": "ans"})
    assert conversation(renamed) == QA


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"text": "a"}, "no conversation"),
        ({"question": "a"}, "no answer"),
        ({"question": "", "answer": "a"}, "empty question"),
        ({"question": "a", "answer": " "}, "empty answer"),
        ({"question": "a", "answer": ["b"]}, "the answer is not a string"),
        ({"question": "a", "answer": "\ud800"}, "lone surrogate"),
        ({"messages": QA[:1]}, "no turn of an assistant"),
        ({"messages": []}, r"no conversation .keys: messages"),
        ({"messages": [3]}, "no list of messages"),
        ({"messages": [{"role": "root", "content": "a"}]}, "unknown role 'root'"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown role"),
        ({"messages": [{"from": "function_call", "value": "{"}]}, "a function call that is not JSON"),
        (
            {"messages": [QA[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "a tool call's arguments are not JSON",
        ),
        ({"messages": QA, "system": "a"} | {"messages": [{"role": "system", "content": "b"}]}, "two system"),
    ],
)
def test_rows_that_are_not_conversations(row, reason):
    with pytest.raises(Skip, match=reason):
        conversation(row)


HUMAN = "\n\nHuman: 2 + 2?\n\nAssistant: 4\n\nHuman: And 1?\n\nAssistant: "


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"instruction": "2 + 2?", "input": "", "output": "4", "chosen": "4", "rejected": "5"},
        {"prompt": QA[:1], "chosen": [QA[1]], "rejected": [{"role": "assistant", "content": "5"}]},
        {"chosen": QA, "rejected": [QA[0], {"role": "assistant", "content": "5"}]},
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
    ],
)
def test_the_forms_of_a_preference(row):
    assert preference(row) == (QA[:1], QA[1], {"role": "assistant", "content": "5"})


def test_complete_conversations_keep_the_system_message_of_the_row():
    other = [QA[0], {"role": "assistant", "content": "5"}]
    prompt, _, _ = preference({"system": "Be brief.", "chosen": QA, "rejected": other})
    assert prompt == [{"role": "system", "content": "Be brief."}, QA[0]]


def test_transcripts_share_their_beginning():
    prompt, chosen, rejected = preference({"chosen": HUMAN + "5", "rejected": HUMAN + "Who cares?"})
    assert prompt == [*QA, {"role": "user", "content": "And 1?"}]
    assert (chosen["content"], rejected["content"]) == ("5", "Who cares?")


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "a", "chosen": "b"}, "no 'chosen' and 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, "chosen and rejected are equal"),
        ({"chosen": HUMAN + "5", "rejected": HUMAN + "5"}, "chosen and rejected are equal"),
        ({"chosen": HUMAN + "5", "rejected": HUMAN.replace("4", "3") + "5"}, "not two answers to one prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "empty answer"),
        ({"chosen": "b", "rejected": "c"}, "no prompt"),
    ],
)
def test_rows_that_are_not_preferences(row, reason):
    with pytest.raises(Skip, match=reason):
        preference(row)


def test_every_real_preference():
    counts = {}
    for row in itertools.islice(read_rows(find_files(str(shared("prefs")))[0], None, 2**20), 4000):
        try:
            preference(row_value(row))
            counts["kept"] = counts.get("kept", 0) + 1
        except Skip as reason:
            counts[str(reason)] = counts.get(str(reason), 0) + 1
    assert counts == {
        "kept": 3697,
        "empty answer": 4,
        "chosen and rejected are equal": 6,
        "chosen and rejected are not two answers to one prompt": 5,
    }
