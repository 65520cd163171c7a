"""Evaluation: the table, the files, the reader of benchmarks; the embedded problems with an oracle."""

import gzip
import json
import re

import pytest
import torch

import eval as evaluation
from configurator import UserError
from evals.all_tasks import TASKS, places_of
from evals.benchmarks import convert, read
from evals.lm import LM
from evals.results import Result, mean
from evals.tasks import problems as problems_task
from formats import hf
from formats.chat_format import encode_prompt
from tests.conftest import ROOT


def test_a_mean_and_its_standard_error():
    assert mean([1.0, 2.0, 3.0, 4.0]) == (2.5, pytest.approx((5 / 3 / 4) ** 0.5), 4)
    assert mean([7]) == (7, 0, 1)


def test_right_and_wrong_answers_to_the_problems(chat_folder, monkeypatch):
    lm = LM(str(chat_folder), device="cpu")
    found = problems_task.load(None, 40, None)
    assert len({problem.key for problem in found}) == 40 and all(problem.is_test for problem in found)
    assert not any(problem.family == "hard" for problem in found)

    def asked(texts):
        said = [[{"role": "assistant", "content": text}] for text in texts]
        monkeypatch.setattr(lm, "reply", lambda conversations, max_new_tokens: said)
        return problems_task.score(lm, found)

    figures = asked([problem.answer for problem in found]).figures
    assert figures == {"accuracy": (1.0, 0.0, 40), "well_formed": (1.0, 0.0, 40)}
    assert asked(["no"] * 40).figures == {"accuracy": (0.0, 0.0, 40), "well_formed": (0.0, 0.0, 40)}
    result = asked([p.answer if i % 2 else "9" * 9 for i, p in enumerate(found)])
    assert result.figures["accuracy"] == (0.5, pytest.approx(0.5 / 39**0.5), 40)
    assert [answer["right"] for answer in result.answers] == [bool(i % 2) for i in range(40)]


def test_the_command(trained, chat_folder, tmp_path, capsys):
    argv = [f"--model={chat_folder}", f"--compare={trained}", "--limit=6", "--device=cpu"]
    assert evaluation.main([*argv, "--tasks=embedded", f"--out_dir={tmp_path / 'e'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and lines[0].split() == ["task", "figure", "n", str(chat_folder),
                                                     str(trained)]
    assert lines[9].split()[:3] == ["all", "questions/s", "24"] and lines[10].startswith("all     ")
    assert lines[1].split()[:6] == ["problems", "accuracy", "6", "0.0000", "+-", "0.0000"]
    found = json.loads((tmp_path / "e" / "results.json").read_text())
    assert [each["model"] for each in found["models"]] == [str(chat_folder), str(hf.find_folder(trained))]
    assert found["models"][0]["tasks"].keys() == {"problems", "calculator", "hard", "hard_calculator"}
    assert found["models"][0]["tasks"]["hard"]["figures"]["accuracy"] == {"value": 0.0, "stderr": 0.0, "n": 6}
    written = (tmp_path / "e" / "results.md").read_text().splitlines()
    assert len(written) == 12 and written[2].startswith("| problems | accuracy | 6 | 0.0000 +- 0.0000 |")


def test_targets(chat_folder, tmp_path, capsys, monkeypatch):
    """The first figure of a task meets its target, or misses it; a perplexity has to be lower."""
    def fixed(lm, found, calculator=False, family=None):
        return Result({"accuracy": mean([1, 1, 1, 0]), "other": mean([0])})

    monkeypatch.setattr(problems_task, "score", fixed)
    (tmp_path / "book.txt").write_text("def f(): pass\n" * 50)
    argv = [f"--model={chat_folder}", f"--out_dir={tmp_path / 'e'}", "--tasks=problems,hard,perplexity",
            f"--data=perplexity={tmp_path / 'book.txt'}", "--device=cpu"]
    for target, code, cells in (
            ("", 0, {}),
            ("problems:0.75", 0, {"problems": "met (>= 0.75)"}),
            ("problems:0.751", 3, {"problems": "missed (>= 0.751)"}),
            ("problems:0.1,perplexity:1e6", 0, {"problems": "met (>= 0.1)", "perplexity": "met (<= 1e+06)"}),
            ("perplexity:1.5,problems:0", 3, {"problems": "met (>= 0)", "perplexity": "missed (<= 1.5)"})):
        assert evaluation.main([*argv, f"--target={target}"]) == code, target
        rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
        assert (rows[0][-1] == "target") == bool(target)
        assert {row[0]: row[-1] for row in rows[1:] if "=" in row[-1]} == cells
        assert json.loads((tmp_path / "e" / "results.json").read_text())["targets"] == cells
        assert all(f"| {cell} |" in (tmp_path / "e" / "results.md").read_text() for cell in cells.values())


def test_published_figures():
    """Every published figure is of a task that exists, and has a source; measured tasks are listed."""
    published = json.loads(evaluation.REFERENCE.read_text())
    assert all(each["task"] in evaluation.TASKS and each["source"] and each["settings"]
               and 0 < each["value"] < 1 for each in published)
    figure = mean([1, 0])._asdict()
    model = {"name": "mine", "tasks": {"gsm8k": {"figures": {"strict": figure}},
                                       "piqa": {"figures": {"accuracy": mean([1])._asdict(),
                                                            "accuracy_norm": figure}}}}
    rows = evaluation.reference_rows(model)
    assert rows[0][4] == "mine" and {row[1] for row in rows[1:]} == {"gsm8k", "piqa"}
    assert ["SmolLM2-135M", "gsm8k", "exact match", "0.0140", "0.5000 +- 0.5000", "5-shot, lighteval"] in rows
    assert ["SmolLM2-135M", "piqa", "accuracy_norm", "0.6840", "0.5000 +- 0.5000",
            "0-shot, lighteval: choices divided by characters"] in rows


def test_a_task_that_is_not_run_misses_its_target(trained, chat_folder, tmp_path, capsys, monkeypatch):
    """Targets are for --model; the models of --compare may miss them."""
    argv = [f"--model={trained}", f"--compare={chat_folder}", f"--out_dir={tmp_path}", "--tasks=all",
            f"--data={write_mmlu(tmp_path / 'd')}", "--limit=2", "--shots=0", "--device=cpu"]
    assert evaluation.main([*argv, "--target=hellaswag:0.1,mmlu:0"]) == 3
    rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert {row[0]: row[-1] for row in rows if row[-1].endswith(")") and len(row) > 1} == {
        "mmlu": "met (>= 0)", "hellaswag": "missed (>= 0.1)"}


def write_mmlu(folder):
    """A folder with three questions of MMLU and no other benchmark."""
    rows = [{"subject": "anatomy", "split": split, "question": "?", "choices": ["1", "2", "3", "4"],
             "answer": "A"} for split in ("dev", "test", "test", "test")]
    folder.mkdir()
    (folder / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_all_tasks_and_the_reasons_of_those_not_run(trained, chat_folder, tmp_path, capsys):
    out, data = tmp_path / "e", write_mmlu(tmp_path / "d")
    argv = [f"--model={trained}", f"--data={data}", "--shots=1", "--device=cpu"]
    evaluation.main([*argv, f"--compare={chat_folder}", "--tasks=all", "--limit=2", f"--out_dir={out}"])
    printed = capsys.readouterr()
    rows = [line.split() for line in printed.out.splitlines()]
    assert ["hellaswag", "not", "run", "-", "-", "-"] in rows and rows[0][:3] == ["task", "figure", "n"]
    reasons = [line for line in printed.out.splitlines() if line.startswith("not run: ")]
    assert f"not run: hellaswag: data={data}: no file hellaswag*" in "\n".join(reasons)
    results = json.loads((out / "results.json").read_text())
    assert results["complete"] and results["settings"]["shots"] == 1 and "torch" in results["versions"]
    first, second = (model["tasks"] for model in results["models"])
    assert first.keys() == {"perplexity", "context_length", "mmlu", "problems", "calculator", "hard",
                            "hard_calculator"}
    assert results["not_run"].keys() == evaluation.TASKS.keys() - first.keys() - {"needle"}
    assert all("needle" in model["not_run"] for model in results["models"]), "its context is too short"
    assert first["mmlu"]["figures"]["accuracy"]["n"] == 2 and first["mmlu"]["details"]["chance"] == 0.25
    assert first["perplexity"]["details"]["text"] == second["perplexity"]["details"]["text"], "the same text"
    hashes = results["data_sha256"]
    assert hashes.keys() == first.keys() | {"needle"} and len(set(hashes.values())) == 6
    assert hashes["hard"] == hashes["hard_calculator"] != hashes["calculator"]
    assert {path.name for path in out.iterdir()} == {"results.json", "results.md", "answers",
                                                     "context_length.png"}
    answers = [json.loads(line) for line in (out / "answers" / "mmlu.jsonl").read_text().splitlines()]
    names = [str(hf.find_folder(trained)), str(chat_folder)]
    assert [answer["model"] for answer in answers] == [names[0]] * 2 + [names[1]] * 2
    assert answers[0].keys() >= {"prompt", "choices", "log_probs", "gold", "said", "right", "subject"}
    assert (out / "results.md").read_text().splitlines()[-1].startswith("- not run: ")
    assert "mmlu  accuracy 0." in printed.err or "mmlu  accuracy 1." in printed.err
    # The same questions have the same hash, other questions another hash.
    for limit, same in ((2, True), (3, False)):
        evaluation.main([*argv, "--tasks=mmlu", f"--limit={limit}", f"--out_dir={tmp_path / 'again'}"])
        other = json.loads((tmp_path / "again" / "results.json").read_text())
        assert (other["data_sha256"]["mmlu"] == hashes["mmlu"]) == same
        assert other["models"][0]["weights_sha256"] == results["models"][0]["weights_sha256"]


def test_a_task_that_one_model_cannot_do_is_reported(trained, chat_folder, tmp_path, capsys, monkeypatch):
    def refuse(lm, found, **settings):
        raise UserError("too hard")

    monkeypatch.setattr(problems_task, "score", refuse)
    argv = [f"--model={chat_folder}", f"--compare={trained}", "--limit=2", "--device=cpu"]
    argv.append(f"--out_dir={tmp_path}")
    with pytest.raises(UserError, match="too hard"):
        evaluation.main([*argv, "--tasks=problems"])
    assert not (tmp_path / "results.json").exists()
    evaluation.main([*argv, "--tasks=embedded"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["problems", "not", "run", "-", "-", "-"]
    assert f"not run: problems: {chat_folder}: too hard" in lines


def test_an_interrupted_run_keeps_the_finished_tasks(trained, tmp_path, monkeypatch, capsys):
    done = []

    def stop(lm, found, **settings):
        done.append(settings)
        if len(done) == 3:
            raise KeyboardInterrupt
        return Result({"accuracy": mean([1, 0])}, [{"said": 1}])

    monkeypatch.setattr(problems_task, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main([f"--model={trained}", "--tasks=embedded", "--device=cpu", f"--out_dir={tmp_path}"])
    assert f"stopped; the finished tasks are in {tmp_path / 'results.json'}" in capsys.readouterr().err
    results = json.loads((tmp_path / "results.json").read_text())
    assert [*results["models"][0]["tasks"]] == ["problems", "calculator"] and not results["complete"]
    assert {path.name for path in (tmp_path / "answers").iterdir()} == {"calculator.jsonl", "problems.jsonl"}
    assert len((tmp_path / "results.md").read_text().splitlines()) == 5


def test_places_of_data():
    assert places_of("data", "") == dict.fromkeys(TASKS)
    assert places_of("data", "../data") == dict.fromkeys(TASKS, "../data")
    assert places_of("data", "mmlu=a.jsonl,d,perplexity=b.txt") == {
        **dict.fromkeys(TASKS, "d"), "mmlu": "a.jsonl", "perplexity": "b.txt"}


def test_choices_in_the_chat_format(chat_folder):
    plain, chat = (LM(str(chat_folder), device="cpu", chat=chat) for chat in (False, True))
    asked = [("Is it?", " yes"), ("Is it?", " no, not")]
    found = chat.loglikelihood(asked)
    assert [each.log_prob for each in found] != [each.log_prob for each in plain.loglikelihood(asked)]
    before = encode_prompt(chat.tokenizer, [{"role": "user", "content": "Is it?"}])
    for choice, each in zip(("yes", "no, not"), found, strict=True):
        ids = before + chat.tokenizer.encode(choice)
        with torch.no_grad():
            rows = chat.model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        expected = sum(rows[at - 1, ids[at]].item() for at in range(len(before), len(ids)))
        assert each.log_prob == pytest.approx(expected, abs=1e-5)


def test_a_base_model_generates_plain_text(trained):
    lm = LM(str(trained), device="cpu", batch_size=2)
    whole = lm.generate_until(["import os", "def f", "x"], [], 12)
    assert lm.tokens > 0 and lm.generate_until(["import os"], [], 12) == whole[:1], "rows are independent"
    stop = whole[0][3:5]
    assert lm.generate_until(["import os"], [stop], 12) == [whole[0][:whole[0].index(stop)]]
    with pytest.raises(UserError, match="its tokenizer has no chat tokens"):
        LM(str(trained), chat=True)


def test_benchmarks_are_read_from_files_of_any_kind(tmp_path):
    rows, lines, splits, fields = [{"q": "a"}, {"q": "b"}], "quiz_1.jsonl.gz", "quiz_2.json", "quiz_3.tsv"
    (tmp_path / "deep").mkdir()
    with gzip.open(tmp_path / "deep" / lines, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / splits).write_text(json.dumps({"name": "quiz", "dev": rows[:1], "test": rows[1:]}))
    (tmp_path / fields).write_text("a\tb\n1\t\n")
    found = read(str(tmp_path), "quiz", "hub/quiz")
    assert found == [{"q": "a", "file": lines}, {"q": "b", "file": lines},
                     {"q": "a", "split": "dev", "file": splits}, {"q": "b", "split": "test", "file": splits},
                     {"fields": ["a", "b"], "file": fields}, {"fields": ["1", ""], "file": fields}]
    assert read(str(tmp_path / fields), "quiz", "") == found[4:]
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "quiz.jsonl").write_text("{}\n")
    (tmp_path / "QUIZ.md").write_text("what this is")
    assert read(str(tmp_path), "quiz", "") == found, "answers/ and files of other kinds are not read"
    lists = [{"q": [{"role": "user"}]}, {"q": [{"role": "user"}]}]
    (tmp_path / "ASKED_1.json").write_text("".join(json.dumps(row) + "\n" for row in lists))
    found = read(str(tmp_path), "asked", "")
    assert found == [{**row, "file": "ASKED_1.json"} for row in lists], "lists inside rows are not splits"
    assert convert(found, lambda row: row["q"][0]["role"]) == ["user", "user"]
    with pytest.raises(UserError, match=r"ASKED_1.json: row 1 does not fit this benchmark .IndexError: list"):
        convert(found, lambda row: row["q"][1])
    (tmp_path / "bad.jsonl").write_text("[1]\n")
    (tmp_path / "half.jsonl").write_text('{"q": "\\ud83d"}\n')
    (tmp_path / "twice.jsonl").write_text("{}\n")
    (tmp_path / "twice.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    (tmp_path / "latin.tsv").write_bytes(b"na\xefve\t1\n")
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(b"a\t1\n" * 99)[:-9])
    for name, message in (("other", "no file other"), ("bad", "not a JSON"), ("half", "row 1 has a lone"),
                          ("twice", "twice.jsonl: the folder has another file of this name"),
                          ("latin", "latin.tsv: damaged"), ("cut", "cut.tsv.gz: damaged")):
        with pytest.raises(UserError, match=message):
            read(str(tmp_path), name, "")
    (tmp_path / "blank.tsv").write_text("\ufeffnice\t1\r\n\r\n", encoding="utf-8")
    assert read(str(tmp_path), "blank", "") == [{"fields": ["nice", "1"], "file": "blank.tsv"}]
    (tmp_path / "space.jsonl").write_text('{"q": 1}\n\n')
    assert read(str(tmp_path), "space", "") == [{"q": 1, "file": "space.jsonl"}]


@pytest.mark.parametrize("argv, message", [
    (["--tasks=mmmlu"], "tasks=mmmlu: unknown task 'mmmlu', did you mean 'mmlu'. .known: all, embedded, pe"),
    (["--limit=0"], "limit=0: must be positive"),
    (["--limit=1e12"], "limit=1000000000000: must be at most 100,000"),
    (["--batch_size=1e12"], "batch_size=1000000000000: must be at most 16,384"),
    (["--context_length=1e12"], "context_length=1000000000000: must be at most 1,048,576"),
    (["--num_tests=1e12"], "num_tests=1000000000000: must be at most 100,000"),
    (["--model=\udcff"], "command line: model is not UTF-8"),
    (["--target=problms:1"], "target=problms:1: unknown task 'problms', did you mean 'problems'"),
    (["--target=needle:0.5"], "target=needle:0.5: needle is not in tasks=problems,calculator"),
    (["--target=problems:85"], "a share of right answers is at most 1"),
    (["--target=problems"], "'problems' must be TASK:VALUE"),
    (["--target=problems:nan"], "'problems:nan' must be TASK:VALUE"),
    (["--target=problems:0.1,problems:0.2"], "'problems:0.2' must be TASK:VALUE, each task once"),
    (["--shots=-1"], "shots=-1: must be at least 0"),
    (["--stride=0"], "stride=0: must be positive"),
    (["--data=a,b"], "data=a,b: give one folder for all tasks, and TASK=PLACE for others"),
    (["--data=mmmlu=x"], "data=mmmlu=x: unknown task 'mmmlu', did you mean 'mmlu'. .known: perplexity"),
    (["--tasks=mmlu", "--data=/none"], "data=/none: no such file or folder"),
    (["--tasks=hellaswag", "--data=hellaswag=/none.json"], "^data=/none.json: no such file or folder"),
    (["--tasks=perplexity", "--data=perplexity=/none.txt"], "^data=/none.txt: no such file"),
    (["--tasks=needle", "--data=needle=/none.txt"], "^data=/none.txt: no such file"),
    (["--tasks=mmlu", f"--data={ROOT}/evals"], r"evals: no file mmlu\*; give --data=TASK=PLACE"),
])
def test_mistakes_are_one_line(argv, message):
    with pytest.raises(UserError, match=message):
        evaluation.main(argv)


def test_mistakes_are_found_before_anything_is_measured(trained, tmp_path, capsys):
    rows = [{"query": "Question: x", "choices": ["a", "b"], "gold": 0}] * 25
    (tmp_path / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [f"--model={trained}", f"--data={tmp_path}", f"--out_dir={tmp_path / 'out'}", "--device=cpu"]
    for more, message in (([f"--compare={trained}, out/nope"], "out/nope"),
                          (["--chat=True"], "its tokenizer has no chat tokens"),
                          (["--tasks=arc_easy"], "arc_easy: there is no question in")):
        with pytest.raises(UserError, match=message):
            evaluation.main([*argv, *more])
    assert "accuracy" not in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_generated_answers_from_the_command(trained, chat_folder, tmp_path, capsys):
    """Every task with generated answers, on files in their usual form; these models answer nothing right."""
    pytest.importorskip("matplotlib")
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    problem = {"question": "What is 2 + 2?", "answer": "2 + 2 = <<2+2=4>>4.\n#### 4"}
    function = {"name": "add", "description": "Adds.", "parameters": {
        "type": "dict", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
    call = {"id": "0", "question": [[{"role": "user", "content": "Add 2."}]], "function": [function]}
    truth = {"id": "0", "ground_truth": [{"add": {"a": [2]}}]}
    for name, rows in (("gsm8k_train", [problem] * 8), ("gsm8k_test", [problem] * 3),
                       ("hotpotqa", [{"question": "Who?", "answer": "Nobody", "type": "bridge"}] * 8),
                       ("triviaqa", [{"question": "Who?", "answer": {"value": "A", "aliases": []}}] * 8),
                       ("bfcl_v4_simple_python", [call] * 3), ("bfcl_v4_irrelevance", [call] * 3),
                       ("bfcl_v4_simple_python_answers", [truth]),
                       ("summarize", [{"document": "Long.", "summary": "Short."}] * 3)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [f"--data={data}", "--limit=3", "--context_length=160", f"--out_dir={out}", "--device=cpu"]
    assert evaluation.main([*argv, f"--model={trained}", f"--compare={chat_folder}",
                            "--tasks=gsm8k,hotpotqa,triviaqa,summarize,needle"]) == 0
    lines = {tuple(line.split()[:3]) for line in capsys.readouterr().out.splitlines()}
    figures = {"gsm8k": "strict flexible truncated", "hotpotqa": "exact_match f1 truncated",
               "triviaqa": "exact_match f1 truncated", "summarize": "rouge1 rouge2 rougeL rougeLsum",
               "needle": "accuracy"}
    assert {(task, key, "3") for task, keys in figures.items() for key in keys.split()} <= lines
    assert (out / "needle.png").read_bytes().startswith(b"\x89PNG")
    assert evaluation.main([*argv, f"--model={chat_folder}", "--tasks=bfcl_simple,bfcl_irrelevance",
                            "--chat=True"]) == 0
    tasks = json.loads((out / "results.json").read_text())["models"][0]["tasks"]
    assert tasks["bfcl_simple"]["figures"]["accuracy"] == {"value": 0.0, "stderr": 0.0, "n": 3}
    assert tasks["bfcl_irrelevance"]["details"]["first_prompt"][1] == {"role": "user", "content": "Add 2."}
