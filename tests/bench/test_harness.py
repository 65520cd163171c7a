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

AS_THEY_ARE = ["mmlu", "arc_easy", "arc_challenge", "truthfulqa", "sst2", "cola", "rte", "mrpc", "qqp",
               "qnli", "wnli"]  # eval.py reads these files in another form than the hub's
NAMES = [*AS_THEY_ARE, "hellaswag", "openbookqa", "commonsense_qa", "mmlu_pro", "piqa", "winogrande", "boolq",
         "sciq", "copa", "lambada", "mnli"]
WORDS = """the file is read by a parser which returns bytes, if not "None"; naïve 日本 users' e-mail  headers
    (RFC 2822) are decoded: x = 3.14 and tabs or [brackets] remain""".split(" ")


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """A few dozen questions per task, in the forms of the public files."""
    folder, draw = tmp_path_factory.mktemp("benchmarks"), random.Random(0)

    def text(most):
        return " ".join(draw.choice(WORDS).strip() or "x" for _ in range(draw.randint(1, most)))

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
    for name, row in (
            ("openbookqa", lambda: {"query": text(9), "choices": [text(4) for _ in "ABCD"], "gold": 1}),
            ("commonsense_qa", lambda: {
                "query": f"Question: {text(9)}?\nChoices:\nA. {text(2)}\nB. {text(2)}\nC. {text(2)}\n"
                         f"D. {text(2)}\nAnswer:", "choices": list("ABCD"), "gold": 2}),
            ("mmlu_pro_dev", lambda: {"question": text(9), "options": [text(3) for _ in range(10)],
                                      "answer": draw.choice("ABCDEFGHIJ")}),
            ("mmlu_pro_test", lambda: {"question": f" {text(9)} ", "options": [text(3) for _ in range(7)],
                                       "answer": draw.choice("ABCDEFG")}),
            ("piqa", lambda: {"query": f"Question: {text(9)}\n", "choices": [text(6), text(6)], "gold": 1}),
            ("winogrande", lambda: {"context_options": [f"{text(6)} so {name}" for name in ("Ann", "Anna")],
                                    "continuation": f"{text(5)}.", "gold": 1}),
            ("boolq", lambda: {"query": f"Passage: {text(20)}\nQuestion: {text(6)}?", "gold": 0,
                               "choices": ["no", "yes"]}),
            ("sciq_test", lambda: {"question": f"{text(6)}?", "support": draw.choice(["", f" {text(9)}"]),
                                   "correct_answer": text(2), "distractor1": text(2), "distractor2": text(2),
                                   "distractor3": text(2)}),
            ("copa", lambda: {"query": f"{text(5)}, {draw.choice(['because', 'therefore'])}",
                              "choices": [f"{text(4)}.", f"{text(4)}."], "gold": 1}),
            ("lambada", lambda: {"context": text(20), "continuation": draw.choice(WORDS).strip() or "x"}),
            ("mnli_validation_matched", lambda: {
                "premise": text(9), "hypothesis": text(6) + draw.choice(["", ".", ". "]), "label": 2})):
        write(f"{name}.jsonl", [row() for _ in range(20)])
    for name, header, line in (
            ("mrpc_dev", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t5\t6\t{0}\t{1}"),
            ("qqp_dev", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t5\t6\t{0}\t{1}\t0"),
            ("qnli_dev", "index\tquestion\tsentence\tlabel", "3\t{0}\t{1}\tnot_entailment"),
            ("wnli_dev", "index\tsentence1\tsentence2\tlabel", "3\t{0}\t{1}\t1")):
        lines = [header, *(line.format(text(7), text(7)) for _ in range(20))]
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
    tasks = harness.write_tasks(tmp_path, str(benchmarks), NAMES, limit=8)
    assert [len(tasks[name]) for name in NAMES] == [2, 1, 1, 2] + [1] * 18
    cut = {}
    for model, folder in models.items():
        theirs = harness.run(folder, str(tmp_path), tasks, dict.fromkeys(tasks, 8))
        lm = TimedLM(folder)
        for name in NAMES:
            module, settings = evaluation.TASKS[name].module, evaluation.TASKS[name].settings
            questions = module.load(str(tmp_path), 8, None, **settings)
            cut[model, name] = module.score(lm, questions, **settings).details["truncated"]
            if name in AS_THEY_ARE:
                assert questions == module.load(str(benchmarks), 8, None, **settings)
            found = compare(lm.answers(questions), theirs[name]["answers"])  # raises if the texts differ
            assert found["differ"] == 0 and found["largest_difference"] < 1e-3
            assert found["agree"] + found["near_ties"] == (16 if name == "truthfulqa" else 8), name
            assert found["near_ties"] < 4
    assert cut["trained", "arc_easy"] == 8 and cut["random", "mmlu"] == 0


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
    ours = [[[context, "x", one, False], [context, "y", two, False]] for context, one, two in
            (("a", -1.0, -2.0), ("b", -1.0, -1.00005), ("c", -3.0, -2.0))]
    theirs = [["a", "x", -1.0, True], ["a", "y", -2.0, True], ["b", "x", -1.0, True],
              ["b", "y", -0.9999, True], ["c", "x", -3.0, True], ["c", "y", -4.0, True]]
    assert compare(ours, theirs) == {"questions": 3, "texts": 6, "agree": 1, "differ": 1, "near_ties": 1,
                                     "largest_difference": 2.0}
    for greedy, key in ((True, "agree"), (False, "differ")):  # one choice: is it what greedy decoding writes?
        assert compare([[["a", "x", -1.0, greedy]]], theirs[:1])[key] == 1
    with pytest.raises(UserError, match="only one side scores 'y' after 'c'"):
        compare(ours, theirs[:-1])
