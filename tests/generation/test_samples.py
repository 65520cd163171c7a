"""generation/samples.py: answers to read, and text that a terminal shows as it is."""

from formats.chat_format import encode_prompt
from formats.tokenizer import Tokenizer
from generation.generate import Sampling, generate
from generation.samples import ANSWER_TOKENS, PROMPT_CHARACTERS, log_text, sample_answers, transcript
from model import GPT


def test_a_sample_is_indented_text():
    text = log_text("sample    ", "\ndef a():\r\n\treturn 'é'\n\n")
    assert text == "sample    def a():\n          \treturn 'é'"
    assert log_text("s ", "\x1b[2Ja\x00\u2028\r.  ") == "s \\x1b[2Ja\\x00\\u2028\\r."
    assert log_text("s ", "\n") == "s (empty)"


def test_a_thought_has_a_line_of_its_own():
    text = ("<|im_start|>user\n94 - 8?<|im_end|>\n<|im_start|>assistant\n"
            "<|start_thought|>94 - 8 = 86<|end_thought|>86<|im_end|>")
    assert transcript(text) == "user: 94 - 8?\nassistant: 94 - 8 = 86\n86"


def test_answers_are_greedy_and_follow_their_prompts(chat_folder):
    model, tokenizer = GPT.from_pretrained(chat_folder).eval(), Tokenizer.load(chat_folder)
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in ("2+2?", "a" * 900)]
    first, second = sample_answers(model, tokenizer, prompts)
    new = [tokens[0] for tokens in generate(model, prompts[:1], ANSWER_TOKENS, Sampling(temperature=0))]
    ends = [index for index, token in enumerate(new) if token in tokenizer.special_ids]
    assert first.startswith("user: 2+2?\nassistant: ")
    assert first.split("assistant: ")[1].startswith(tokenizer.decode(new[:ends[0]] if ends else new))
    assert second.startswith("... aaa") and "assistant: " in second
    assert second.index("assistant: ") < PROMPT_CHARACTERS
    assert sample_answers(model, tokenizer, []) == []
