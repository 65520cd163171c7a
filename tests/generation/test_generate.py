"""generate.py and sample.py: cached = uncached, batched = alone, and every edge case."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import generation.generate
import sample
from configurator import UserError
from formats.tokenizer import Tokenizer
from generation.generate import (
    Options,
    PrefixCache,
    Sampling,
    TextEnd,
    append_tokens,
    choose,
    complete,
    generate,
    penalize,
    shift_context,
    visible_text,
)
from generation.terminal import Printer
from model import GPT
from tests.conftest import ROOT, busy_model, tiny_config
from tests.formats.test_tokenizer_kinds import llama2

GREEDY = Sampling(temperature=0)


def run(model, prompts, count, sampling=GREEDY, is_done=None, **options):
    """Return the new ids of each row. options: the fields of Options."""
    rows = [[] for _ in prompts]
    for tokens in generate(model, prompts, count, sampling, is_done, Options(**options)):
        append_tokens(rows, tokens)
    return rows


def uncached(model, prompt, count):
    """Greedy decoding by its definition: the model reads the whole context for every token."""
    window, new = prompt[-model.config.block_size :], []
    for _ in range(count):
        with torch.no_grad():
            new.append(model(torch.tensor([window]))[0, -1].argmax().item())
        window = window + new[-1:]
        if len(window) > model.config.block_size:
            window = window[-(model.config.block_size // 2) :]
    return new


def prompts_of(count, longest=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(500, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize(
    "changes", [{}, dict(position="learned", norm="layernorm", mlp="gelu", bias="all", n_kv_head=4)]
)
def test_greedy_tokens_of_80_prompts(changes):
    """Cached = uncached, and a ragged batch = each row alone, also past the end of the context (64)."""
    model, prompts = busy_model(tiny_config(**changes)), prompts_of(40)
    together = [row for first in (0, 20) for row in run(model, prompts[first : first + 20], 20)]
    for prompt, row in zip(prompts, together, strict=True):
        assert row == uncached(model, prompt, 20)
        assert [row] == run(model, [prompt], 20)


def test_a_full_context_goes_on_with_its_last_half():
    model = busy_model(tiny_config())
    prompts = [prompts_of(1, seed=1)[0], list(range(64)), list(range(200))]
    assert run(model, prompts, 100) == [uncached(model, prompt, 100) for prompt in prompts]


def test_a_shift_worked_by_hand():
    context = [[1, 2, 3, 4, 5], [1, 2, 3, 4]]
    assert shift_context(context, block_size=4) and context == [[4, 5], [1, 2, 3, 4]]
    assert not shift_context(context, block_size=4)


def test_greedy_tokens_equal_transformers(trained):
    from transformers import AutoModelForCausalLM

    folder = trained / "step_000060"
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder).eval(), GPT.from_pretrained(folder).eval()
    for prompt in prompts_of(5, longest=20):
        reference = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert run(ours, [prompt], 30) == [reference[0, len(prompt) :].tolist()]


def test_rows_do_not_depend_on_each_other():
    model, prompts = busy_model(tiny_config()), prompts_of(6)
    sampling = Sampling(temperature=1.5, top_k=50, seed=3)
    together = run(model, prompts, 30, sampling)
    assert together == [
        run(model, [prompt], 30, sampling, row_numbers=[row])[0] for row, prompt in enumerate(prompts)
    ]
    assert together == run(model, prompts, 30, sampling)
    assert together != run(model, prompts, 30, Sampling(temperature=1.5, top_k=50, seed=4))
    same = run(model, [prompts[0]] * 2, 30, sampling)
    assert same[0] != same[1]  # samples of one prompt differ


@pytest.mark.parametrize("tails", [[[], [5], [6, 7, 8]], [[], [], []], [[1, 2], [3, 4], [5, 6]]])
def test_a_shared_prefix_is_read_once(monkeypatch, tails):
    model = busy_model(tiny_config(block_size=128))
    prompts = [list(range(100, 170)) + tail for tail in tails]
    alone = [run(model, [prompt], 70)[0] for prompt in prompts]
    read, forward_last = [], generation.generate.forward_last
    monkeypatch.setattr(generation.generate, "forward_last", lambda model, rows, cache: read.append(
        sum(map(len, rows))) or forward_last(model, rows, cache))
    assert run(model, prompts, 70) == alone, "also after a shift of the context"
    shared = 70 if all(tails) else 69  # each row keeps its last token
    assert read[:2] == [shared, sum(map(len, prompts)) - 3 * shared] and read[2] == 3
    monkeypatch.setattr(generation.generate, "MIN_SHARED_PREFIX", 71)
    read.clear()
    assert run(model, prompts, 70) == alone and read[0] == sum(map(len, prompts))


def test_a_row_that_ends_leaves_the_others_alone():
    model, prompts = busy_model(tiny_config()), [list(range(60)), [5], [7] * 30]
    free = run(model, prompts, 40)
    ended = run(model, prompts, 40, is_done=lambda row, new: row == 0 and len(new) == 3)
    assert ended == [free[0][:3], free[1], free[2]]
    assert run(model, prompts, 40, is_done=lambda row, new: True) == [row[:1] for row in free]


@pytest.mark.parametrize("changes, dtype", [
    ({}, torch.float32), (dict(position="learned", norm="layernorm", mlp="gelu", bias="all"), torch.float32),
    ({}, torch.bfloat16), (dict(ternary=True), torch.float32)])
def test_steps_of_one_shape_have_the_same_tokens(monkeypatch, changes, dtype):
    """Traced, not compiled: ragged rows, past the context, after a shared prefix, in few graphs."""
    torch._dynamo.reset()  # else the counter includes the graphs of earlier tests
    traced = torch.compile(generation.generate.last_logits, backend="eager")
    monkeypatch.setattr(generation.generate, "compiled_step", lambda: traced)
    model, prompts = busy_model(tiny_config(**changes)).to(dtype), [*prompts_of(4), [3], list(range(64))]
    counts, shared = torch._dynamo.utils.counters["stats"], [[7] * 70 + tail for tail in ([], [5], [6, 7])]
    texts, begin = [], counts["unique_graphs"]
    for model.compiled_steps in (False, True):
        ended = run(model, prompts, 30, is_done=lambda row, new: row % 2 == 0 and len(new) == 3)
        prefix = PrefixCache()
        turns = [run(model, [prompts[0] + list(range(n))], 9, prefix=prefix) for n in (1, 20)]
        texts.append([run(model, prompts, 70), run(model, shared, 20), ended, turns])
    assert texts[0] == texts[1]
    assert isinstance(prefix.cache, generation.generate.StepCache)
    assert counts["unique_graphs"] - begin <= 3  # one for 6 rows, one for any number, one for a single row


def test_a_compiled_step_has_the_same_tokens():
    torch._dynamo.reset()
    model, prompts = busy_model(tiny_config(block_size=512)), [[1, 2, 3], [4], [5] * 40]
    counts, lengths = torch._dynamo.utils.counters["stats"], (8, 60, 120, 250)  # caches of 128, 256, 384
    expected, begin = [run(model, prompts, length) for length in lengths], counts["unique_graphs"]
    model.compiled_steps = True
    assert [run(model, prompts, length) for length in lengths] == expected
    assert counts["unique_graphs"] == begin + 1  # one graph for all lengths and cache sizes


def test_ids_beyond_the_tokenizer_are_never_chosen():
    model = busy_model(tiny_config())
    assert (
        max(max(row) for row in run(model, prompts_of(4), 50, Sampling(temperature=50.0), vocab_size=3)) < 3
    )


def test_no_tokens_and_empty_prompts():
    model = busy_model(tiny_config())
    assert run(model, [[1]], 0) == [[]]
    with pytest.raises(ValueError, match="at least one token"):
        run(model, [[1], []], 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("options", [["--temperature=0"], ["--temperature=1", "--top_k=3"]])
def test_a_model_whose_logits_are_not_finite_is_named(value, options, tmp_path, trained):
    """No token is printed. For -inf all logits are the same infinity."""
    model = GPT.from_pretrained(trained)
    with torch.no_grad():
        model.head_weight.fill_(1.0)
        model.model["norm"].weight.fill_(value)
        if value != value:
            model.model["norm"].weight[1:] = 1.0  # a single NaN reaches all logits
    model.save_pretrained(tmp_path)
    Tokenizer.load(trained / "step_000060").save(tmp_path)
    with pytest.raises(UserError, match=f"^{tmp_path}: its logits are not finite, so its weights are broken"):
        sample.main([f"--model={tmp_path}", "--prompt=a", "--max_new_tokens=3", "--device=cpu", *options])


LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.05, 0.4, 0.05]]))  # most likely first: 1, 3, 0, 2, 4


@pytest.mark.parametrize(
    "options, uniform, expected",
    [
        (dict(temperature=0), 0.99, 1),
        (dict(temperature=1.0), 0.0, 1),
        (dict(temperature=1.0), 0.39, 1),
        (dict(temperature=1.0), 0.41, 3),
        (dict(temperature=1.0), 0.81, 0),
        (dict(temperature=1.0), 0.91, 2),
        (dict(temperature=1.0), 0.999999, 4),
        (dict(temperature=1.0, top_k=1), 0.999, 1),
        (dict(temperature=1.0, top_k=2), 0.49, 1),
        (dict(temperature=1.0, top_k=2), 0.51, 3),
        (dict(temperature=1.0, top_k=0), 0.999, 4),
        (dict(temperature=1.0, top_k=99), 0.999, 4),
        (dict(temperature=1.0, top_p=0.0), 0.999, 1),
        (dict(temperature=1.0, top_p=0.39), 0.999, 1),
        (dict(temperature=1.0, top_p=0.5), 0.999, 3),
        (dict(temperature=1.0, top_p=1.0), 0.999, 4),
        (dict(temperature=1.0, top_k=3, top_p=0.9), 0.999, 0),
        (dict(temperature=1.0, top_k=3, top_p=0.88), 0.999, 3),
        (dict(temperature=1.0, min_p=0.2), 0.999, 0),
        (dict(temperature=1.0, min_p=1.0), 0.999, 3),
        (dict(temperature=100.0), 0.999, 4),
    ],
)
def test_choice_by_hand(options, uniform, expected):
    assert choose(LOGITS.clone(), torch.tensor([uniform]), Sampling(**options)).tolist() == [expected]


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-40, 1e-38, 1e-20, 1e-7, 9e-6, 1e-5, 1e-4])
def test_tiny_temperatures_take_the_most_likely_token(temperature):
    """logits / temperature overflows float32 for the smallest temperatures."""
    logits = torch.tensor([[-3e4, 3.0, 2.9, -0.1], [-1e30, 0.0, -5.0, -1e-2]])
    for uniform in (0.0, 0.5, 1 - 2**-24):
        chosen = choose(logits.clone(), torch.full((2,), uniform), Sampling(temperature=temperature))
        assert chosen.tolist() == [1, 1]


def test_choice_has_the_distribution_of_transformers_filters():
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 3
    filters = LogitsProcessorList(
        [TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)]
    )
    expected = filters(None, logits.clone()).softmax(-1)[0]
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    chosen = choose(
        logits.expand(100_000, 50), uniform, Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02)
    )
    assert (torch.bincount(chosen, minlength=50) / 100_000 - expected).abs().max() < 1e-4


def test_repetition_penalty_equals_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, rows = (
        torch.randn(2, 30, generator=torch.Generator().manual_seed(0)),
        [[1, 2, 2, 5], [29, 0, 3, 3]],
    )
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(rows), logits.clone())
    assert torch.equal(penalize(logits.clone(), rows, 1.3), expected)
    assert torch.equal(penalize(logits.clone(), rows, 1.0), logits)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=-1), "temperature"),
        (dict(top_p=1.1), "top_p"),
        (dict(top_p=float("nan")), "top_p"),
        (dict(min_p=-0.1), "min_p"),
        (dict(top_k=-1), "top_k"),
        (dict(repetition_penalty=0), "repetition_penalty"),
        (dict(repetition_penalty=1e-300), "repetition_penalty=1e-300: must be between 0.01 and 100"),
        (dict(repetition_penalty=float("nan")), "repetition_penalty"),
    ],
)
def test_sampling_refuses(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)


# ---- sample.py --------------------------------------------------------------------------------------------


def call(capsys, trained, *words):
    sample.main([f"--model={trained}", "--device=cpu", *words])
    return capsys.readouterr()


@pytest.mark.parametrize("options", [[], ["--num_samples=2"]], ids=["stream", "samples"])
def test_a_terminal_gets_escapes_for_control_characters(capsys, trained, monkeypatch, options):
    ids = Tokenizer.load(trained / "step_000060").encode("a\x1b[2Jb")
    monkeypatch.setattr(sample, "generate", lambda model, prompts, *rest: ([i] * len(prompts) for i in ids))
    assert call(capsys, trained, *options).out == "a\x1b[2Jb\n" * (len(options) + 1)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert call(capsys, trained, *options).out == "a\\x1b[2Jb\n" * (len(options) + 1)


def test_only_the_generated_text_is_on_stdout(capsys, trained, monkeypatch):
    tokenizer, model = Tokenizer.load(trained / "step_000060"), GPT.from_pretrained(trained).eval()
    prompt = "import os"
    expected = tokenizer.decode(run(model, [tokenizer.encode(prompt)], 20)[0])
    printed = call(capsys, trained, f"--prompt={prompt}", "--max_new_tokens=20", "--temperature=0")
    assert printed.out == expected + "\n"
    assert "20 tokens in" in printed.err and "tokens/s" in printed.err
    monkeypatch.setattr(generation.generate, "compiled_step", lambda: generation.generate.last_logits)
    words = [f"--prompt={prompt}", "--max_new_tokens=20", "--temperature=0", "--compile=True"]
    assert call(capsys, trained, *words).out == expected + "\n"


def test_the_method_of_the_model_takes_the_same_tokens():
    """GPT.generate: greedy, and as often as the probabilities of the k most likely tokens say."""
    model = busy_model(tiny_config()).eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    greedy = model.generate(ids, 20, temperature=0)
    assert greedy[:, :3].equal(ids)
    assert greedy[:, 3:].tolist() == run(model, ids.tolist(), 20)
    torch.manual_seed(0)
    drawn = model.generate(ids[:1].repeat(4000, 1), 1, temperature=2.0, top_k=3)[:, -1]
    values, kept = model(ids[:1])[0, -1].topk(3)
    shares = torch.stack([(drawn == token).float().mean() for token in kept])
    assert shares.sum() == 1
    assert shares.tolist() == pytest.approx((values / 2).softmax(-1).tolist(), abs=0.03)
    assert model.generate(ids, 0).equal(ids)
    with pytest.raises(ValueError, match="do not fit block_size"):
        model.generate(ids, 10**4)


def test_complete_returns_the_texts_of_the_command(capsys, trained, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "def "}\n{"prompt": ""}\n{"prompt": "import os"}\n')
    options = [f"--prompt_file={tmp_path / 'p.jsonl'}", "--max_new_tokens=20", "--seed=5"]
    lines = call(capsys, trained, *options).out.splitlines()
    model, tokenizer = GPT.from_pretrained(trained).eval(), Tokenizer.load(trained / "step_000060")
    texts = complete(model, tokenizer, ["def ", "", "import os"], 20, Sampling(seed=5))
    assert texts == [json.loads(line)["completion"] for line in lines]
    assert complete(model, tokenizer, ["def "], 0) == [""]


@pytest.mark.parametrize("text, stop", [("\u4e2d\n", "\n"), ("\U0001f600\nmore", "\n"),
                                        ("\u4e2d\u00e9", "\u00e9")])
def test_a_stop_text_after_a_character_of_byte_tokens(text, stop):
    hf, settings = llama2()
    tokenizer, out = Tokenizer(json.loads(hf.to_str()), settings), []
    ids, end = tokenizer.encode(text, inside=True), TextEnd(tokenizer, {tokenizer.eot_id}, [stop])
    places = [n for n in range(len(ids)) if end.is_reached(ids[:n + 1])]
    assert places and tokenizer.decode(ids[:places[0] + 1], inside=True).endswith(stop)
    printer = Printer(tokenizer, out.append, False)
    for index in ids:
        printer(index)
    assert "".join(out) == tokenizer.decode(ids, inside=True)


def test_a_cache_that_dropped_tokens_is_not_used_again():
    model, sampling = busy_model(tiny_config(block_size=24)), Sampling(temperature=0, sinks=4, window=12)
    prefix, text = PrefixCache(), list(range(40, 55))

    def turn(**options):  # its row ends by itself
        return [tokens[0] for tokens in generate(model, [text], 8, sampling, lambda row, new: len(new) == 8,
                                                 Options(**options))]

    for _ in range(3):
        expected = turn()
        assert turn(prefix=prefix) == expected
        text += [*expected, 9, 8]


def test_a_prompt_whose_reading_was_interrupted(monkeypatch):
    """It has overwritten a part of the cached text, so that part must be read again."""
    model, prefix, text = busy_model(tiny_config()), PrefixCache(), list(range(1, 10))
    first = run(model, [text], 4, prefix=prefix)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.model["layers"][1], "forward", raise_interrupt)
        run(model, [[1, 2, *range(30, 37)]], 4, prefix=prefix)
    assert run(model, [text], 4, prefix=prefix) == first


def raise_interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_completion_keeps_its_first_space(capsys, tmp_path):
    """Llama 2's tokenizer removes the space of a text's first token: right for a text, wrong within one."""
    hf, settings = llama2()
    tokenizer = Tokenizer(json.loads(hf.to_str()), settings)
    model, folder = busy_model(tiny_config(vocab_size=tokenizer.vocab_size)), tmp_path / "llama"
    model.save_pretrained(folder)
    tokenizer.save(folder)
    (tmp_path / "p.jsonl").write_text('{"prompt": "def f"}\n')
    lines = call(capsys, folder, f"--prompt_file={tmp_path / 'p.jsonl'}", "--max_new_tokens=4",
                 "--temperature=50", "--num_samples=400").out.splitlines()
    completions, sampling = [json.loads(line)["completion"] for line in lines], Sampling(temperature=50.0)
    ids = tokenizer.encode("def f")
    rows = run(model.eval(), [tokenizer.prefix_ids + ids] * 400, 4, sampling,
               lambda row, new: new[-1] == tokenizer.eot_id)
    whole = [tokenizer.decode(ids + [token for token in row if token != tokenizer.eot_id]) for row in rows]
    assert whole == [f"def f{completion}" for completion in completions]
    assert complete(model, tokenizer, ["def f"] * 400, 4, sampling) == completions
    assert sum(completion.startswith(" ") for completion in completions) > 4


def test_streamed_and_batched_texts_agree(capsys, trained, tmp_path):
    single = call(capsys, trained, "--prompt=def ", "--max_new_tokens=50").out
    (tmp_path / "p.jsonl").write_text('{"prompt": "def ", "id": 7}\n\n{"prompt": ""}\n', encoding="utf-8")
    lines = call(
        capsys,
        trained,
        f"--prompt_file={tmp_path / 'p.jsonl'}",
        "--max_new_tokens=50",
        "--num_samples=2",
        "--batch_size=3",
    ).out.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prompt"] for row in rows] == ["def ", "def ", "", ""] and [
        row.get("id") for row in rows
    ] == [7, 7, None, None]
    assert rows[0]["completion"] + "\n" == single and rows[0]["completion"] != rows[1]["completion"]
    again = call(
        capsys, trained, f"--prompt_file={tmp_path / 'p.jsonl'}", "--max_new_tokens=50", "--num_samples=2"
    ).out.splitlines()
    assert again == lines  # the batch size changes nothing
    several = call(capsys, trained, "--prompt=def ", "--max_new_tokens=50", "--num_samples=2")
    assert several.out == rows[0]["completion"] + "\n" + rows[1]["completion"] + "\n"


@pytest.mark.parametrize("stop", ["m\u04af", "\u04af\u0385", "\u0385 w", "m\u04af\u0385 wi"])
def test_what_was_shown_stays_shown(stop):
    """Byte by byte, what may still become a stop text or another character waits."""
    data, shown = "I\ufffd m\u04af\u0385 wi\U0001f600d".encode(), ""
    for n in range(len(data) + 1):
        text = data[:n].decode(errors="replace")
        if stop in text:
            break
        now = visible_text(text, [stop], finished=False)
        assert now.startswith(shown)
        shown = now
    assert visible_text(data.decode(), [stop]).startswith(shown)


def test_stop_texts_end_a_sample_and_are_not_shown(capsys, trained, tmp_path):
    whole = call(capsys, trained, "--prompt=def ", "--max_new_tokens=60").out[:-1]
    stop = whole[20:23]
    expected = whole[: whole.index(stop)]
    assert (
        call(capsys, trained, "--prompt=def ", "--max_new_tokens=60", f"--stop={stop}").out == expected + "\n"
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "def "}\n')
    line = json.loads(
        call(
            capsys,
            trained,
            f"--prompt_file={tmp_path / 'p.jsonl'}",
            "--max_new_tokens=60",
            f"--stop={['nowhere', stop]}",
        ).out
    )
    assert (line["completion"], line["finish_reason"]) == (expected, "stop")


def test_streaming_never_takes_back_a_character(trained, monkeypatch):
    """A character comes byte by byte; a stop text begins and then does not go on."""
    sampler = sample.Sampler(sample.SampleConfig(model=str(trained), device="cpu", stop="END"))
    tokenizer = sampler.tokenizer
    ids = tokenizer.encode("née 中 EN E EN") + tokenizer.encode("D after")
    shown = [sampler.end.text(ids[:n], finished=False) for n in range(len(ids) + 1)]
    assert all(later.startswith(earlier) for earlier, later in zip(shown, shown[1:], strict=False))
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in shown)
    assert sampler.end.text(ids) == "née 中 EN E "


def test_prompts_are_text_and_long_ones_are_cut_with_a_note(capsys, trained):
    marker = call(capsys, trained, "--prompt=<|endoftext|>", "--max_new_tokens=5", "--temperature=0").out
    nothing = call(capsys, trained, "--prompt=", "--max_new_tokens=5", "--temperature=0").out
    assert marker != nothing
    printed = call(capsys, trained, "--prompt=" + "word " * 100, "--max_new_tokens=5")
    assert "the model reads the last 64" in printed.err
    assert call(capsys, trained, "--max_new_tokens=0").out == "\n"


def test_other_keys_of_a_prompt_are_copied(capsys, trained, tmp_path):
    (tmp_path / "p.jsonl").write_text('\ufeff\n{"prompt": "a", "k": "\\u00e9"}\n')
    printed = call(capsys, trained, f"--prompt_file={tmp_path / 'p.jsonl'}", "--max_new_tokens=2").out
    assert json.loads(printed)["k"] == "\u00e9"
    (tmp_path / "q.jsonl").write_text('\n\n{"prompt": "\\ud800"}\n')
    with pytest.raises(UserError, match="q.jsonl:3"):
        call(capsys, trained, f"--prompt_file={tmp_path / 'q.jsonl'}")


@pytest.mark.parametrize("how", [">&-", "2>&- <&-"])
def test_a_stream_may_be_closed(trained, how):
    command = f"{sys.executable} sample.py --model={trained} --prompt=a --max_new_tokens=3 --device=cpu {how}"
    found = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert found.returncode == 0 and "Traceback" not in found.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])  # UTF-8 is the default of other tests
def test_every_line_is_json_in_every_encoding_of_stdout(trained, tmp_path, encoding):
    """A latin-1 stdout cannot show most characters; the lines still hold them."""
    keys = {"k": "\u00e9 \u4e2d \U0001f600"}
    path = tmp_path / "prompts \u4e2d.jsonl"
    path.write_text(json.dumps({"prompt": "# \u4e2d\u00e9", **keys}) + "\n")
    command = [sys.executable, "sample.py", f"--model={trained}", f"--prompt_file={path}", "--device=cpu",
               "--max_new_tokens=20", "--temperature=3"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True,
                           env=os.environ | {"PYTHONIOENCODING": encoding})
    assert found.returncode == 0, found.stderr
    [line] = found.stdout.decode(encoding).splitlines()
    row = json.loads(line)
    assert row["k"] == keys["k"] and row["prompt"] == "# \u4e2d\u00e9" and row["completion"]


def test_non_ascii_folders_in_the_c_locale(trained, tmp_path):
    folder = tmp_path / "mod\u00e8le \u4e2d"
    shutil.copytree(trained / "step_000060", folder)
    for script, *options in (["sample.py", "--prompt=a", "--max_new_tokens=3"],
                             ["eval.py", "--tasks=hard", "--limit=2"]):
        command = [sys.executable, script, *options, f"--model={folder}", "--device=cpu"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8",
                               env=os.environ | {"LC_ALL": "C"})
        assert found.returncode == 0, found.stderr
        assert f"'{folder}'" in found.stderr.splitlines()[-1], "the next command, with the path in quotes"
    assert json.loads((folder / "results.json").read_text("utf-8"))["models"][0]["name"] == str(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no prompts"),
        ("{", ":1: not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}', ':2: needs the key "prompt"'),
        ('{"prompt": 3}', "needs the key"),
        ('{"prompt": "a", "prompt": "b"}', "name twice"),
        ('{"prompt": "\\ud800"}', "lone surrogate"),
        ("[1]", "needs the key"),
    ],
)
def test_bad_prompt_files_name_the_line(trained, tmp_path, content, message):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        sample.main([f"--model={trained}", f"--prompt_file={tmp_path / 'p.jsonl'}"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model=out/nowhere"], "no model here|the hub does not give it"),
        (["--prompt=a", "--prompt_file=b"], "only one"),
        (["--num_samples=0"], "num_samples"),
        ([f"--seed={2**43}"], "seed=8796093022208: must be between 0 and"),
        (["--max_new_tokens=1e12"], "max_new_tokens=1000000000000: must be between 0 and 1,048,576"),
        (["--num_samples=1e12"], "num_samples=1000000000000: must be between 1 and 131,072"),
        (["--batch_size=1e12"], "batch_size=1000000000000: must be between 1 and 16,384"),
        (["--model=\udcff"], "command line: model is not UTF-8"),
        (["--prompt=\udcff"], "command line: prompt is not UTF-8"),
        (["--stop="], "no value"),
        (["--stop=['']"], "none of them empty"),
        (["--device=tpu9"], "no such device"),
        (["--device=cuda:9"], "not on this machine"),
    ],
)
def test_wrong_arguments(trained, words, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        sample.main([f"--model={trained}", *words])


def test_the_prompt_is_shown_on_a_terminal_only(trained, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    sample.main([f"--model={trained}", "--prompt=import", "--max_new_tokens=3"])
    assert "import" in capsys.readouterr().err and not screen.getvalue().startswith("import")


def test_a_row_that_ends_with_a_full_context_does_not_shift_the_others():
    model = busy_model(tiny_config(block_size=16))
    prompts, sampling = [list(range(10)), [3, 4]], Sampling(temperature=0)

    def done(row, ids):
        return row == 0 and len(ids) == 7  # the seventh token would overflow its context

    both = [[], []]
    for tokens in generate(model, prompts, 20, sampling, done):
        for row, token in enumerate(tokens):
            both[row] += [] if token is None else [token]
    alone = [tokens[0] for tokens in generate(model, prompts[1:], 20, sampling)]
    assert len(both[0]) == 7 and both[1] == alone
