"""lm-evaluation-harness (the PyPI package lm_eval) on our checkpoint folders and on the rows that we
evaluate.

    names = write_tasks(Path("scratch"), "../data", ["mmlu", "hellaswag"], limit=100)
    run("out/base", "scratch", names, {"mmlu": 4, "hellaswag": 4})["mmlu"]["answers"]

The task files of the package are included, with local rows in place of the hub's rows, in the hub's form. The
few-shot examples are the first ones, as ours are. HellaSwag files with the key `question` lack two of the
hub's keys: here the activity is made up, and the last sentence becomes ctx_b. The rows of llm-foundry
(scripts/eval/local_data: query, choices, gold) are turned back into the hub's form. Its CommonsenseQA has
four of the five choices, so the fifth is made up.
"""

import contextlib
import io
import itertools
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from bench.measure import write_jsonl
from configurator import UserError
from dataset.tasks import COLUMNS
from evals.benchmarks import read

Row = dict[str, Any]
INCLUDED = {"mmlu": "mmlu/default/_default_template_yaml", "hellaswag": "hellaswag/hellaswag.yaml",
            "arc_easy": "arc/arc_easy.yaml", "arc_challenge": "arc/arc_challenge.yaml",
            "truthfulqa": "truthfulqa/truthfulqa_mc1.yaml", "sst2": "glue/sst2/default.yaml",
            "openbookqa": "openbookqa/openbookqa.yaml", "commonsense_qa": "commonsense_qa/default.yaml",
            "mmlu_pro": "leaderboard/mmlu_pro/mmlu_pro.yaml", "piqa": "piqa/piqa.yaml",
            "winogrande": "winogrande/default.yaml", "boolq": "super_glue/boolq/default.yaml",
            "sciq": "sciq/sciq.yaml", "copa": "super_glue/copa/default.yaml",
            "lambada": "lambada/lambada_openai.yaml",
            **{name: f"glue/{name}/default.yaml"
               for name in ("cola", "rte", "mnli", "mrpc", "qqp", "qnli", "wnli")}}
SHOTS = {"mmlu": 5, "arc_easy": 25, "arc_challenge": 25, "mmlu_pro": 5}
HEADERS = ("index", "Quality", "id", "sentence")  # first cells of lines of headers


# ---- Rows in the hub's form -------------------------------------------------------------------------------

def hub_form(name: str, row: Row) -> Row:
    """A row of our public files in the hub's form."""
    if name == "mmlu":
        return {"question": row["question"], "choices": row["choices"], "subject": row["subject"],
                "answer": "ABCD".index(row["answer"])}
    if name == "hellaswag":
        first, _, last = row["question"].rpartition(". ")
        return {"activity_label": "Something done", "ctx_a": f"{first}." if first else "", "ctx_b": last,
                "endings": [row["choices"][letter] for letter in "ABCD"],
                "label": str("ABCD".index(row["answer"]))}
    if name == "arc_easy":
        labels = list("ABCDE"[:len(row["choices"])])
        return {"question": row["query"].removeprefix("Question: "), "answerKey": labels[row["gold"]],
                "choices": {"text": row["choices"], "label": labels}}
    if name == "arc_challenge":
        choices = row["question"]["choices"]
        return {"question": row["question"]["stem"], "answerKey": row["answerKey"], "choices": {
            "text": [choice["text"] for choice in choices], "label": [choice["label"] for choice in choices]}}
    if name == "truthfulqa":
        return {"question": row["question"], **{
            key: {"choices": list(row[key]), "labels": list(row[key].values())}
            for key in ("mc1_targets", "mc2_targets")}}
    if "fields" in row:  # a line of a .tsv
        named = dict(zip(COLUMNS[name], row["fields"], strict=True))
        labels = {"entailment": 0, "not_entailment": 1}
        return named | {"label": labels[named["label"]] if named["label"] in labels else int(named["label"])}
    if {"gold", "continuation"} & row.keys():
        return from_foundry(name, row)
    return {key: value for key, value in row.items() if key not in ("file", "split")}


def from_foundry(name: str, row: Row) -> Row:
    """A row of llm-foundry in the hub's form."""
    if name == "lambada":
        return {"text": f"{row['context']} {row['continuation']}"}
    if name == "winogrande":
        before = os.path.commonprefix(row["context_options"])
        options = [text.removeprefix(before) for text in row["context_options"]]
        return {"sentence": f"{before}_ {row['continuation']}", "answer": str(row["gold"] + 1),
                "option1": options[0], "option2": options[1]}
    query, choices, gold = row["query"], row["choices"], row["gold"]
    if name == "piqa":
        return {"goal": query.removeprefix("Question: ").strip(), "sol1": choices[0], "sol2": choices[1],
                "label": gold}
    if name == "copa":
        premise, _, word = query.rpartition(" ")
        return {"premise": premise.rstrip(",") + ".", "question": "cause" if word == "because" else "effect",
                "choice1": choices[0], "choice2": choices[1], "label": gold}
    if name == "boolq":
        passage, question = query.removeprefix("Passage: ").rsplit("\nQuestion: ", 1)
        return {"passage": passage, "question": question.removesuffix("?"),
                "label": ["no", "yes"].index(choices[gold])}
    if name == "commonsense_qa":
        question, *options = query.removeprefix("Question: ").removesuffix("\nAnswer:").split("\n")
        choices = [option[3:] for option in options if option != "Choices:"] + ["something else"]
        return {"question": question, "answerKey": "ABCDE"[gold],
                "choices": {"text": choices, "label": list("ABCDE")}}
    return {"question_stem": query, "answerKey": "ABCD"[gold],  # openbookqa
            "choices": {"text": choices, "label": list("ABCD")}}


def question_rows(name: str, data: str, limit: int) -> tuple[list[Row], list[Row]]:
    """The few-shot examples and the questions. MMLU takes the first question of each subject, and so on."""
    rows = [row for row in read(data, name, "") if row.get("fields", [""])[0] not in HEADERS]
    if name == "arc_easy":
        rows = [row | {"split": "train" if number < SHOTS[name] else "test"}
                for number, row in enumerate(rows)]
    examples = [row for row in rows if is_example(name, row)]
    questions = [row for row in rows if not is_example(name, row)]
    if name == "mmlu":
        subjects = [[row for row in questions if row["subject"] == subject]
                    for subject in sorted({row["subject"] for row in questions})]
        questions = [row for turn in itertools.zip_longest(*subjects) for row in turn if row]
    return [hub_form(name, row) for row in examples], [hub_form(name, row) for row in questions[:limit]]


def is_example(name: str, row: Row) -> bool:
    if name == "truthfulqa":
        return False
    if "split" in row:
        return row["split"] in ("dev", "train")
    return ("train" if name in (*COLUMNS, "mnli") else "dev") in row["file"]


# ---- Task files -------------------------------------------------------------------------------------------

def write_tasks(folder: Path, data: str, names: list[str], limit: int,
                shots: int | None = None) -> dict[str, list[str]]:
    """Write rows and YAML files into a folder; returns {our task: the package's task names}.

    shots: number of worked examples; None takes the number of the task.
    The rows are also written as <task>_<split>.jsonl, so our load() can read the folder.
    """
    package = Path(import_package().__file__).parent / "tasks"
    (folder / "harness").mkdir(parents=True, exist_ok=True)
    made: dict[str, list[str]] = {}
    for name in names:
        if name not in INCLUDED:
            raise UserError(f"tasks={name}: must be one of {', '.join(INCLUDED)}")
        splits = dict(zip(("train", "test"), question_rows(name, data, limit), strict=True))
        count = SHOTS.get(name, 0) if shots is None else shots
        settings = {"include": str(package / INCLUDED[name]), "dataset_path": "json", "dataset_name": None,
                    "num_fewshot": count, "test_split": "test", "validation_split": None,
                    "training_split": None, "fewshot_split": "train" if count else None,
                    "fewshot_config": {"sampler": "first_n"}}
        if name == "mmlu":
            made[name] = write_mmlu(folder, splits, settings)
            continue
        for split, rows in splits.items():
            if rows:
                write_jsonl(folder / f"{name}_{split}.jsonl", rows)
        made[name] = [write_task(folder, f"our_{name}", splits, settings)]
        if name == "truthfulqa":
            settings["include"] = str(package / INCLUDED[name].replace("mc1", "mc2"))
            made[name].append(write_task(folder, "our_truthfulqa_mc2", splits, settings))
    return made


def write_mmlu(folder: Path, splits: dict[str, list[Row]], settings: dict[str, Any]) -> list[str]:
    """One task per subject; our own file has all subjects."""
    write_jsonl(folder / "mmlu.jsonl", [row | {"split": "dev" if split == "train" else split}
                                        for split, rows in splits.items() for row in rows])
    made = []
    for subject in sorted({row["subject"] for row in splits["test"]}):
        opening = ("The following are multiple choice questions (with answers) about "
                   f"{subject.replace('_', ' ')}.\n\n")
        parts = {split: [row for row in rows if row["subject"] == subject] for split, rows in splits.items()}
        made.append(write_task(folder, f"our_mmlu_{subject}", parts, settings | {"description": opening}))
    return made


def write_task(folder: Path, task: str, splits: dict[str, list[Row]], settings: dict[str, Any]) -> str:
    """Write the YAML file of a task (JSON is YAML) and its rows below harness/; returns the task's name."""
    place, files = folder.resolve() / "harness", {}
    for split, rows in splits.items():
        if rows:
            files[split] = str(place / f"{task}_{split}.jsonl")
            write_jsonl(Path(files[split]), rows)
    task_file = settings | {"task": task, "dataset_kwargs": {
        "data_files": files, "cache_dir": str(folder.resolve() / "cache")}}
    (place / f"{task}.yaml").write_text(json.dumps(task_file))
    return task


def import_package() -> Any:
    """The package lm_eval. UserError if it is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # otherwise it looks for the local rows on the hub
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError:
        raise UserError("lm-evaluation-harness is not installed (pip install lm_eval)") from None
    lm_eval.evaluator.add_env_info = lambda results: None  # it runs `pip list`, for seconds in every task
    return lm_eval


# ---- Answers ----------------------------------------------------------------------------------------------

def run(model: str, folder: str, tasks: dict[str, list[str]], batch_sizes: dict[str, int]) -> dict[str, Any]:
    """lm-evaluation-harness on the rows of a folder, as JSON: {our task: {"answers", "seconds"}}.

    "answers" lists [context, continuation, log-probability, greedy]. "seconds" are CPU seconds: "asking",
    which is encoding and computing, and "whole", from task files to scores.
    """
    lm_eval = import_package()
    logging.disable(logging.WARNING)  # it warns about each context that is cut
    seconds = {"asking": 0.0}

    class TimedLM(lm_eval.models.huggingface.HFLM):
        def loglikelihood(self, *args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            result = super().loglikelihood(*args, **kwargs)
            seconds["asking"] += time.process_time() - begin
            return result

    lm, runs = TimedLM(pretrained=model, device="cpu", batch_size=1, dtype="float32"), {}
    manager = lm_eval.tasks.TaskManager(include_path=f"{folder}/harness", include_defaults=False)
    for name, parts in tasks.items():
        lm.batch_size_per_gpu, seconds["asking"], begin = batch_sizes[name], 0.0, time.process_time()
        with contextlib.redirect_stderr(io.StringIO()):
            results = lm_eval.simple_evaluate(lm, tasks=parts, task_manager=manager, bootstrap_iters=0)
        answers = {tuple(pair): reply for samples in results["samples"].values() for sample in samples
                   for pair, reply in zip(sample["arguments"], sample["filtered_resps"], strict=True)}
        runs[name] = {"answers": [[*text, *reply] for text, reply in answers.items()],
                      "seconds": seconds | {"whole": time.process_time() - begin}}
    logging.disable(logging.NOTSET)
    return runs
