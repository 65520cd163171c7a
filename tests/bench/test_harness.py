"""lm-evaluation-harness reads our folders as they are and agrees with us: prompts, sums, choices."""

import json
import random

import pytest

import eval as evaluation
from bench import harness
from bench.__main__ import main
from bench.eval import TimedLM, compare
from configurator import UserError
from formats import hf
from formats.tokenizer import Tokenizer
from tests.conftest import busy_model, tiny_config

NAMES = ["mmlu", "hellaswag", "arc_easy", "arc_challenge", "truthfulqa", "sst2", "cola", "rte"]
WORDS = """the file is read by a parser which returns bytes, if not "None"; naïve 日本 users' e-mail  headers
    (RFC 2822) are decoded: x = 3.14 and tabs or [brackets] remain""".split(" ")


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """A few dozen questions per task, in the forms of the public files."""
    folder, draw = tmp_path_factory.mktemp("benchmarks"), random.Random(0)

    def text(most):
        return " ".join(draw.choice(WORDS).strip() for _ in range(draw.randint(1, most)))

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("mmlu.jsonl", [
        {"subject": subject, "split": split, "question": f"{text(9)}? ", "answer": draw.choice("ABCD"),
         "choices": [text(4) for _ in "ABCD"]}
        for subject in ("high_school_physics", "anatomy") for split in ["dev"] * 5 + ["test"] * 10])
    (folder / "hellaswag_20.json").write_text(json.dumps({split: [
        {"question": f"[header] {text(5)} [title] {text(5)}. {text(2)}", "answer": draw.choice("ABCD"),
         "choices": {letter: f"[step] {text(9)}" for letter in "ABCD"}} for _ in range(20)]
        for split in ("dev", "test")}))
    write("arc_easy.jsonl", [{"query": f"Question: {text(9)}", "gold": draw.randrange(4),
                              "choices": [text(4) for _ in "ABCD"]} for _ in range(45)])
    for split in ("dev", "test"):
        write(f"arc_challenge_{split}.jsonl", [
            {"answerKey": draw.choice("123"), "question": {"stem": text(9), "choices": [
                {"text": text(4), "label": label} for label in "123"]}} for _ in range(25)])
    targets = [{key: {f"{text(6)} {number}": int(number < true) for number in range(5)}
                for key, true in (("mc1_targets", 1), ("mc2_targets", 3))} for _ in range(20)]
    (folder / "truthfulqa_mc.json").write_text(json.dumps(
        [{"question": f"{text(8)}?", **each} for each in targets]))
    for name, columns in (("sst2_dev", "{0}\t{2}"), ("cola_dev", "gj04\t{2}\t\t{0}"),
                          ("rte_val", "{3}\t{0}\t{1}\t{4}")):
        lines = [columns.format(text(9), text(5), number % 2, number, kind)
                 for number, kind in enumerate(["entailment", "not_entailment"] * 10)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, trained):
    """A trained model with a short context, which cuts many prompts; a random GPT-2 with a longer one."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = Tokenizer.load(hf.find_folder(trained))
    model = busy_model(tiny_config(vocab_size=tokenizer.vocab_size, block_size=1024, position="learned",
                                   norm="layernorm", mlp="gelu", bias="all", n_kv_head=4))
    model.save_pretrained(folder, eos_token_id=tokenizer.eot_id)
    tokenizer.save(folder)
    return {"trained": str(hf.find_folder(trained)), "random": str(folder)}


def test_the_same_prompts_and_choices(benchmarks, models, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm_eval)")
    tasks = harness.write_tasks(tmp_path, str(benchmarks), NAMES, limit=20)
    assert [len(tasks[name]) for name in NAMES] == [2, 1, 1, 1, 2, 1, 1, 1]
    cut = {}
    for model, folder in models.items():
        theirs = harness.run(folder, str(tmp_path), sum(tasks.values(), []), batch_size=8)["answers"]
        lm = TimedLM(folder)
        for name in NAMES:
            # HellaSwag's rows are in the hub's form, the others as they are; both make the same prompts.
            module, settings = evaluation.TASKS[name].module, evaluation.TASKS[name].settings
            source = tmp_path if name == "hellaswag" else benchmarks
            questions = module.load(str(source), 20, None, **settings)
            details = module.score(lm, questions, **settings).details
            cut[model, name] = details["truncated"]
            assert questions == module.load(str(tmp_path), 20, None, **settings), "the hub's form differs"
        # Raises if only one side scores a text.
        found = compare(lm.answers, theirs)
        assert found["differ"] == 0 and found["agree"] > 150 and found["largest_difference"] < 1e-3
    assert cut["trained", "arc_easy"] == 20 and cut["random", "mmlu"] == 0


@pytest.mark.slow
def test_the_comparison_as_a_command(benchmarks, trained, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm_eval)")
    out = tmp_path / "figures.json"
    main(["eval", f"--data={benchmarks}", "--tasks=mmlu,truthfulqa", "--limit=6", "--batch_sizes=1,4",
          f"--model={trained}", f"--json={out}"])
    figures = json.loads(out.read_text())["tasks"]
    assert [(each["questions"], each["differ"]) for each in figures.values()] == [(6, 0), (12, 0)]
    assert all(seconds["asking"] > 0 for each in figures.values() for seconds in each["theirs_seconds"])
    assert len(capsys.readouterr().out.splitlines()) == 4
    with pytest.raises(UserError, match="tasks=gsm8k: must be one of mmlu, hellaswag"):
        main(["eval", f"--data={benchmarks}", "--tasks=gsm8k"])


def test_near_ties_are_counted_separately():
    ours = [(context, ["x", "y"], values) for context, values in
            (("a", [-1.0, -2.0]), ("b", [-1.0, -1.00005]), ("c", [-3.0, -2.0]))]
    theirs = [("a", "x", -1.0), ("a", "y", -2.0), ("b", "x", -1.0), ("b", "y", -0.9999), ("c", "x", -3.0),
              ("c", "y", -4.0)]
    assert compare(ours, theirs) == {"questions": 3, "texts": 6, "agree": 1, "differ": 1, "near_ties": 1,
                                     "largest_difference": 2.0}
    with pytest.raises(UserError, match="only one side scores 'y' after 'c'"):
        compare(ours, theirs[:-1])
