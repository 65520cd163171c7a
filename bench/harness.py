"""lm-evaluation-harness (the PyPI package lm_eval) on our checkpoint folders, and on the rows that we ask.

    names = write_tasks(Path("scratch"), "../data", ["mmlu", "hellaswag"], limit=100)
    texts, seconds = answers("out/base", Path("scratch"), names["mmlu"], batch_size=4)
    texts[context, continuation]                                             # its log-probability

Its own task files are included, with local rows in place of the hub's, in the hub's form. The examples are
the first ones, as ours are. HellaSwag's rows lack two of the hub's keys where they are those of a file with
`question`: an activity is made up, and the last sentence is ctx_b.
"""

import contextlib
import io
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configurator import UserError
from evals.benchmarks import read

Row = dict[str, Any]
INCLUDED = {"mmlu": "mmlu/default/_default_template_yaml", "hellaswag": "hellaswag/hellaswag.yaml",
            "arc_easy": "arc/arc_easy.yaml", "arc_challenge": "arc/arc_challenge.yaml",
            "truthfulqa": "truthfulqa/truthfulqa_mc1.yaml", "sst2": "glue/sst2/default.yaml",
            "cola": "glue/cola/default.yaml", "rte": "glue/rte/default.yaml"}
SHOTS = {"mmlu": 5, "arc_easy": 25, "arc_challenge": 25}


# ---- Rows in the hub's form -------------------------------------------------------------------------------

def hub_form(name: str, row: Row) -> Row:
    """A row of our public files as the hub has it."""
    if name == "mmlu":
        return {"question": row["question"], "choices": row["choices"], "subject": row["subject"],
                "answer": "ABCD".index(row["answer"])}
    if name == "hellaswag":
        first, _, last = row["question"].rpartition(". ")
        return {"activity_label": "Something done", "ctx_a": f"{first}." * bool(first), "ctx_b": last,
                "endings": [row["choices"][letter] for letter in "ABCD"],
                "label": str("ABCD".index(row["answer"]))}
    if name == "arc_easy":
        labels = ["A", "B", "C", "D", "E"][:len(row["choices"])]
        return {"question": row["query"].removeprefix("Question: "), "answerKey": labels[row["gold"]],
                "choices": {"text": row["choices"], "label": labels}}
    if name == "arc_challenge":
        choices = row["question"]["choices"]
        return {"question": row["question"]["stem"], "answerKey": row["answerKey"], "choices": {
            "text": [each["text"] for each in choices], "label": [each["label"] for each in choices]}}
    if name == "truthfulqa":
        return {"question": row["question"], **{
            key: {"choices": list(row[key]), "labels": list(row[key].values())}
            for key in ("mc1_targets", "mc2_targets")}}
    if name == "rte":
        return {"sentence1": row["fields"][1], "sentence2": row["fields"][2],
                "label": int(row["fields"][3] == "not_entailment")}
    return {"sentence": row["fields"][0 if name == "sst2" else 3],
            "label": int(row["fields"][1])}


def question_rows(name: str, data: str, limit: int) -> tuple[list[Row], list[Row]]:
    """The rows of examples and those that are asked: of MMLU the first of each subject in turn."""
    rows = read(data, name, "")
    if name == "arc_easy":
        rows = [row | {"split": "train" if number < SHOTS[name] else "test"}
                for number, row in enumerate(rows)]
    first = [row for row in rows if is_example(name, row)]
    rest = [row for row in rows if not is_example(name, row)]
    if name == "mmlu":
        seen: dict[str, int] = {}
        turns = []
        for row in rest:
            turns.append((seen.setdefault(row["subject"], 0), row["subject"]))
            seen[row["subject"]] += 1
        rest = [row for _, row in sorted(zip(turns, rest, strict=True), key=lambda pair: pair[0])]
    return ([hub_form(name, row) for row in first if row.get("fields", [""])[0] != "index"],
            [hub_form(name, row) for row in rest[:limit]])


def is_example(name: str, row: Row) -> bool:
    if name == "truthfulqa":
        return False
    if "split" in row:
        return row["split"] in ("dev", "train")
    return ("train" if name in ("sst2", "cola", "rte") else "dev") in row["file"]


# ---- Its tasks --------------------------------------------------------------------------------------------

def write_tasks(folder: Path, data: str, names: list[str], limit: int) -> dict[str, list[str]]:
    """Write rows and YAML files into a folder; returns {our task: the names of its tasks}.

    The rows lie there as <task>_<split>.jsonl, so that our load() reads the folder, too.
    """
    lm_eval = imported()
    theirs = Path(lm_eval.__file__).parent / "tasks"
    made: dict[str, list[str]] = {}
    for name in names:
        if name not in INCLUDED:
            raise UserError(f"tasks={name}: must be of {', '.join(INCLUDED)}")
        examples, asked = question_rows(name, data, limit)
        common = {"include": str(theirs / INCLUDED[name]), "dataset_path": "json", "dataset_name": None,
                  "num_fewshot": SHOTS.get(name, 0), "test_split": "test", "validation_split": None,
                  "training_split": None, "fewshot_split": "train" if name in SHOTS else None,
                  "fewshot_config": {"sampler": "first_n"}}
        if name == "mmlu":
            write_rows(folder / "mmlu.jsonl", [row | {"split": split} for split, rows in (
                ("dev", examples), ("test", asked)) for row in rows])
            made[name] = []
            for subject in sorted({row["subject"] for row in asked}):
                words = subject.replace("_", " ")
                opening = f"The following are multiple choice questions (with answers) about {words}.\n\n"
                parts = [[row for row in rows if row["subject"] == subject] for rows in (examples, asked)]
                made[name].append(write_task(folder, f"our_mmlu_{subject}", parts,
                                             common | {"description": opening}))
        else:
            for split, rows in (("train", examples), ("test", asked)):
                write_rows(folder / f"{name}_{split}.jsonl", rows)
            made[name] = [write_task(folder, f"our_{name}", [examples, asked], common)]
            if name == "truthfulqa":
                included = str(theirs / INCLUDED[name].replace("mc1", "mc2"))
                made[name].append(write_task(folder, "our_truthfulqa_mc2", [examples, asked],
                                             common | {"include": included}))
    return made


def write_task(folder: Path, task: str, rows: list[list[Row]], settings: dict[str, Any]) -> str:
    """The YAML file of a task (JSON is YAML) and its rows below harness/; returns the task's name."""
    place = folder / "harness"
    place.mkdir(exist_ok=True)
    files = {}
    for split, part in zip(("train", "test"), rows, strict=True):
        if part:
            files[split] = str((place / f"{task}_{split}.jsonl").resolve())
            write_rows(Path(files[split]), part)
    described = settings | {"task": task, "dataset_kwargs": {
        "data_files": files, "cache_dir": str((folder / "cache").resolve())}}
    (place / f"{task}.yaml").write_text(json.dumps(described))
    return task


def write_rows(path: Path, rows: list[Row]) -> None:
    if rows:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def imported() -> Any:
    """The package. UserError where it is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else it asks the network for rows that lie here
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError:
        raise UserError("lm-evaluation-harness is not installed (pip install lm_eval)") from None
    return lm_eval


# ---- Its answers ------------------------------------------------------------------------------------------

def answers(model: str, folder: Path, tasks: list[str], batch_size: int,
            clock: Callable[[], float] = time.process_time) -> tuple[dict[tuple[str, str], float],
                                                                     dict[str, float]]:
    """What it says of every (context, continuation); and the seconds of that: of `asking`, which is encoding
    and computing, and of the `whole`, from task files to scores."""
    lm_eval = imported()
    logging.disable(logging.WARNING)  # one for each context that is cut
    harness = lm_eval.models.huggingface.HFLM(pretrained=model, device="cpu", batch_size=batch_size,
                                              dtype="float32")
    seconds = {"asking": 0.0}
    asked = harness.loglikelihood

    def clocked(*arguments: Any, **more: Any) -> Any:
        begin = clock()
        found = asked(*arguments, **more)
        seconds["asking"] += clock() - begin
        return found

    harness.loglikelihood = clocked
    begin = clock()
    with contextlib.redirect_stderr(io.StringIO()):
        manager = lm_eval.tasks.TaskManager(include_path=str(folder / "harness"), include_defaults=False)
        found = lm_eval.simple_evaluate(harness, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    seconds["whole"] = clock() - begin
    logging.disable(logging.NOTSET)
    return {tuple(pair): reply[0] for samples in found["samples"].values() for sample in samples
            for pair, reply in zip(sample["arguments"], sample["filtered_resps"], strict=True)}, seconds
