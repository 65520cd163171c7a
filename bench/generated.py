"""Generated answers and running text: ours compared with lm-evaluation-harness, question by question.

    python -m bench generated --data=../data --tasks=gsm8k,triviaqa --limit=50         # a random model
    python -m bench generated --data=../data --model=out/base --max_new_tokens=64
    python -m bench generated --data=../data --answers=True --metrics=../evaluate --allow_code=True

Both programs get the same rows and the same model. Counted are the questions with the same prompt, the same
generated text, the same answer read from it, and the same score of each kind. With --answers=True no model
generates: both programs get the same texts, which are right answers, rewritten or made wrong in the ways that
bench/generated_rows.py names.

TASKS has the harness's task files and what is changed in them. lm_eval reads some metrics from the hub;
--metrics is a clone of github.com/huggingface/evaluate that has them (squad_v2, code_eval). mbpp runs
programs on both sides, so it needs --allow_code=True. For toxicity, --classifier judges on both sides, in
place of the service that the harness calls. wikitext has no generated text: both programs score the harness's
text of each article, and our side is LM.loglikelihood. docs/evaluation.md says which rows were stand-ins.
"""

import logging
import math
import os
import re
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from json import dumps, loads
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from bench import eval as choices
from bench import generated_rows as made
from bench import harness
from bench.measure import BenchConfig, run_child, text_table
from configurator import UserError, optional_import, require_positive
from evals.all_tasks import TASKS as OUR_TASKS
from evals.lm import LM
from evals.tasks import toxicity, word_problems
from formats.files import write_json
from generation.generate import visible_text

Row = dict[str, Any]
EXAMPLES = 4  # differences of each kind that the JSON shows


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    data: str = "../data"  # folder with the files of the benchmarks
    tasks: str = "gsm8k,asdiv,triviaqa"  # task names, separated by commas
    limit: int = 50  # number of questions per task
    model: str | None = None  # model folder or out_dir; None: a random one of 11 M parameters
    answers: bool = False  # give both programs the same texts in place of the model's
    block_size: int = 4096  # context length of the random model
    max_new_tokens: int = 256  # most tokens of an answer, if this is less than what the task has
    metrics: str | None = None  # a clone of huggingface/evaluate
    classifier: str = ""  # for toxicity: folder of a text classifier
    allow_code: bool = False  # run the programs of mbpp

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "limit", "block_size", "max_new_tokens")
        for name in self.tasks.split(","):
            if name not in TASKS:
                raise UserError(f"tasks={name}: must be one of {', '.join(TASKS)}")
            if TASKS[name].needs and not getattr(self, TASKS[name].needs):
                raise UserError(f"tasks={name}: needs --{TASKS[name].needs}")
        if self.metrics is None and {"mbpp", "squad_v2"} & set(self.tasks.split(",")):
            raise UserError("tasks: mbpp and squad_v2 need --metrics, a clone of huggingface/evaluate")


# ---- The tasks --------------------------------------------------------------------------------------------

def number_read(text: str) -> str:
    """What the harness read as the number, in the form of our answer's "vote"."""
    digits = text.replace(",", "").replace("$", "").rstrip(".")
    return str(Decimal(digits).normalize()) if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", digits) else ""


class Task(NamedTuple):
    """A task of the harness.

    file: the task file in the package. rows: (source, name) -> rows by split. scores: {our figure: the
    harness's filter and metric}. changes: keys of the task file. needs: a key of Config that must be set.
    """

    file: str
    rows: Callable[[str, str], dict[str, list[Row]]]
    scores: dict[str, tuple[str, str]]
    changes: dict[str, Any] = {}
    needs: str = ""


FIRST = {"sampler": "first_n"}
WORDS = Task("gsm8k/gsm8k.yaml", made.gsm8k_rows, {
    "strict": ("strict-match", "exact_match"), "flexible": ("flexible-extract", "exact_match")},
    {"num_fewshot": word_problems.SHOTS, "fewshot_config": FIRST, "fewshot_split": "train"})
TASKS = {
    **dict.fromkeys(("gsm8k", "asdiv", "svamp", "mawps"), WORDS),
    "triviaqa": Task("triviaqa/default.yaml", made.triviaqa_rows,
                     {"exact_match": ("remove_whitespace", "exact_match")},
                     {"num_fewshot": 5, "fewshot_config": FIRST, "fewshot_split": "train",
                      "doc_to_text": "Question: {{question}}\nAnswer:",  # without a second question mark
                      "generation_kwargs": {"until": ["\n"], "do_sample": False}}),  # not at . and , as well
    "squad_v2": Task("squadv2/squadv2.yaml", made.squad_rows,
                     {"exact_match": ("none", "exact"), "f1": ("none", "f1")}),
    "mbpp": Task("mbpp/mbpp.yaml", made.mbpp_rows, {"pass_at_1": ("none", "pass_at_1")}, needs="allow_code"),
    "summarize": Task("cnn_dailymail/cnn_dailymail.yaml", made.plain_rows,
                      {name: ("none", name) for name in ("rouge1", "rouge2", "rougeL")},
                      {"doc_to_text": "{{article}}\n\nTL;DR:"}),  # the harness asks for a "Summary:"
    "toxicity": Task("realtoxicityprompts/realtoxicityprompts.yaml", made.plain_rows, {
        "toxic": ("none", "score"), "probability": ("none", "perspective_api_toxicity_score")},
        {"generation_kwargs": {"until": [], "do_sample": False}}, needs="classifier"),  # not at a blank line
    "wikitext": Task("wikitext/wikitext.yaml", made.page_rows, {
        "nats": ("none", "nats"), "bits_per_byte": ("none", "bits_per_byte"),
        "word_perplexity": ("none", "word_perplexity")})}


def write_rows(folder: Path, cfg: Config, name: str) -> list[Row]:
    """Write the rows of a task for both programs, and the task file; returns the rows that are asked."""
    task = TASKS[name]
    rows = task.rows(cfg.data, name)
    asked = list(rows)[-1]
    rows[asked] = rows[asked][:cfg.limit]
    (folder / "harness").mkdir(parents=True, exist_ok=True)
    for split, each in rows.items():
        place = "test" if split == "validation" else split
        harness.write_jsonl(folder / f"{name}_{place}.jsonl", each)
    if name == "triviaqa":  # our examples are the last rows of one file
        harness.write_jsonl(folder / "triviaqa_test.jsonl", rows["test"] + rows["train"])
        (folder / "triviaqa_train.jsonl").unlink()
    package = Path(harness.import_package().__file__).parent / "tasks"
    harness.write_task(folder, f"our_{name}", rows, {
        "include": str(package / task.file), "dataset_path": "json", "dataset_name": None,
        "training_split": None, "validation_split": None, "test_split": asked, **task.changes})
    return rows[asked]


# ---- The two programs, each in a process of its own -------------------------------------------------------
# plan.json: {task: {"rows"; "texts": what both sides say in place of a model, or None; "most": new tokens}}

class KeepingLM(LM):
    """Keeps prompts and texts. given, most: "texts" and "most" of the plan."""

    def generate_until(self, prompts: Any, stops: list[str], max_new_tokens: int) -> list[str]:
        self.prompts = [each if isinstance(each, str) else self.tokenizer.decode(each) for each in prompts]
        if self.given is None:
            self.said = super().generate_until(prompts, stops, min(max_new_tokens, self.most))
        else:
            self.truncated = [False] * len(self.prompts)
            self.said = [visible_text(text, stops) for text in self.given]
        return self.said


def run_ours(model: str, folder: str, keys: Row) -> dict[str, list[Row]]:
    """Our side: {"prompt", "text", "read", and the scores} of each question of each task."""
    lm, records = KeepingLM(model, "cpu", batch_size=1), {}
    for name, each in loads(Path(folder, "plan.json").read_text()).items():
        if name == "wikitext":
            records[name] = score_pages(lm, each["rows"])
            continue
        lm.given, lm.most = each["texts"], each["most"]
        task, more = OUR_TASKS[name], {key: keys[key] for key in OUR_TASKS[name].keys}
        source = keys["data"] if TASKS[name] is WORDS else folder
        questions = task.module.load(source, len(each["rows"]), None, **task.settings, **more)
        answers = task.module.score(lm, questions, **task.settings, **more).answers
        records[name] = [
            {"prompt": prompt, "text": text,
             "read": answer["vote"] if TASKS[name] is WORDS else answer["said"].strip(),
             **{key: float(answer[key]) for key in TASKS[name].scores}}
            for prompt, text, answer in zip(lm.prompts, lm.said, answers, strict=True)]
    return records


def score_pages(lm: LM, rows: list[Row]) -> list[Row]:
    """The log-probability of the harness's text of each article, and per byte and word of the article."""
    module = optional_import("lm_eval.tasks.wikitext.preprocess_wikitext", "wikitext")
    texts = [module.wikitext_detokenizer(row) for row in rows]
    scored = [each.log_prob for each in lm.loglikelihood([("", text) for text in texts])]
    return [{"prompt": "", "text": text, "read": "", "nats": -value,
             "bits_per_byte": -value / math.log(2) / len(row["page"].encode()),
             "word_perplexity": math.exp(-value / len(re.split(r"\s+", row["page"])))}
            for text, row, value in zip(texts, rows, scored, strict=True)]


def local_metrics(folder: str | None, classifier: str) -> None:
    """Make the harness read metrics from a clone, and ask a classifier of ours in place of the service."""
    if folder:
        evaluate = optional_import("evaluate", "metrics")
        load = evaluate.load
        evaluate.load = lambda name, *rest, **more: load(str(Path(folder, "metrics", name)), *rest, **more)
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    if classifier:
        os.environ["PERSPECTIVE_API_KEY"] = "none"
        requests = optional_import("requests", "classifier")

        def post(session: Any, url: str, json: Row, headers: Row) -> Any:
            [value] = toxicity.probabilities(classifier, [json["comment"]["text"]])
            answer = {"attributeScores": {"TOXICITY": {"summaryScore": {"value": value}}}}
            return SimpleNamespace(ok=True, text=dumps(answer))
        requests.Session.post = post


def squad_task(folder: str) -> Any:
    """The harness's SQuAD 2.0, which is a class, with local rows."""
    module = optional_import("lm_eval.tasks.squadv2.task", "squad_v2")
    datasets = optional_import("datasets", "squad_v2")

    class Local(module.SQuAD2):
        def download(self, dataset_kwargs: Any = None, **more: Any) -> None:
            file = f"{folder}/harness/our_squad_v2_validation.jsonl"
            self.dataset = datasets.load_dataset("json", data_files={"train": file, "validation": file},
                                                 cache_dir=f"{folder}/cache")

        def process_results(self, doc: Row, results: Any) -> Row:
            """The script's figures of this question alone."""
            pair = super().process_results(doc, results)["exact"]
            return {key: module._squad_agg(key, [pair]) / 100 for key in ("exact", "f1")}

        def aggregation(self) -> Row:
            return dict.fromkeys(("exact", "f1"), statistics.mean)

        def higher_is_better(self) -> Row:
            return dict.fromkeys(("exact", "f1"), True)
    task = Local()
    task.config.task = "our_squad_v2"
    return task


def run_theirs(model: str, folder: str, keys: Row) -> dict[str, list[Row]]:
    """The harness's side, in the form of run_ours."""
    lm_eval, records = harness.import_package(), {}
    logging.disable(logging.WARNING)
    local_metrics(keys["metrics"], keys["classifier"])
    utils = optional_import("lm_eval.models.utils", "lm_eval")

    class KeepingHFLM(lm_eval.models.huggingface.HFLM):
        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            for request in requests:
                context, settings = request.args
                request.arguments = context, settings | {"max_gen_toks": self.most}
            if self.given is None:
                return super().generate_until(requests, disable_tqdm)
            return [utils.postprocess_generated_text(text, request.args[1].get("until"), None)
                    for text, request in zip(self.given, requests, strict=True)]

    lm = KeepingHFLM(pretrained=model, device="cpu", batch_size=1, dtype="float32")
    manager = lm_eval.tasks.TaskManager(include_path=f"{folder}/harness", include_defaults=False)
    for name, each in loads(Path(folder, "plan.json").read_text()).items():
        lm.given, lm.most = each["texts"], each["most"]
        task = squad_task(folder) if name == "squad_v2" else f"our_{name}"
        results = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0,
                                          confirm_run_unsafe_code=True)
        records[name] = read_samples(name, results["samples"][f"our_{name}"])
    logging.disable(logging.NOTSET)
    return records


def read_samples(name: str, samples: list[Row]) -> list[Row]:
    """The harness's samples, one per question and filter, in the form of run_ours."""
    metrics = optional_import("lm_eval.api.metrics", "lm_eval")
    records: dict[int, Row] = {}
    for sample in samples:
        prompt, said, read_text = (sample["arguments"][0][0], sample["resps"][0][0],
                                   sample["filtered_resps"][0])
        record = records.setdefault(sample["doc_id"], {"prompt": prompt, "text": said})
        if name == "wikitext":
            record |= {"prompt": "", "text": prompt, "read": "", "nats": -said,
                       "bits_per_byte": metrics.bits_per_byte([sample["bits_per_byte"]]),
                       "word_perplexity": metrics.weighted_perplexity([sample["word_perplexity"]])}
            continue
        record |= {ours: float(sample[metric]) for ours, (kind, metric) in TASKS[name].scores.items()
                   if sample["filter"] == kind}
        if "read" not in record:  # the first filter is the strict one
            record["read"] = number_read(read_text) if TASKS[name] is WORDS else read_text.strip()
    return [records[number] for number in sorted(records)]


# ---- The comparison ---------------------------------------------------------------------------------------

def given_texts(name: str, rows: list[Row]) -> tuple[list[str], list[str]]:
    """Each row's answer and how it is written; the rows take turns."""
    chosen = []
    for number, row in enumerate(rows):
        ways = list(made.ANSWERS[name](row).items())
        chosen.append(ways[number % len(ways)])
    return [text for _, text in chosen], [way for way, _ in chosen]


def compare(name: str, ours: list[Row], theirs: list[Row], ways: list[str]) -> dict[str, Any]:
    """Count the questions on which both sides agree; {kind: [ours, theirs, text]} of differences."""
    counts = {"questions": len(ours), **dict.fromkeys(("prompt", "text", "read", *TASKS[name].scores), 0)}
    differ: dict[str, dict[str, Any]] = {}
    largest = 0.0
    for one, two, way in zip(ours, theirs, ways, strict=True):
        for key in list(counts)[1:]:
            same = one[key] == two[key]
            if isinstance(one[key], float):
                difference = abs(one[key] - two[key]) / max(1.0, abs(two[key]))
                largest, same = max(largest, difference), difference < 1e-4
            counts[key] += same
            if not same:
                found = differ.setdefault(key, {}).setdefault(way, {"count": 0, "examples": []})
                found["count"] += 1
                if len(found["examples"]) < EXAMPLES:
                    found["examples"].append([one[key], two[key], one["text"][-200:]])
    means = {side: {key: sum(row[key] for row in rows) / len(rows) for key in TASKS[name].scores}
             for side, rows in (("ours", ours), ("theirs", theirs))}
    return {"same": counts, "largest_difference": largest, "means": means, "differ": differ}


def measure(cfg: Config) -> dict[str, Any]:
    """Run both sides on each task, and compare them."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, model = Path(scratch), Path(scratch, "model")
        choices.write_model(choices.Config(data=cfg.data, model=cfg.model, block_size=cfg.block_size), model)
        plan, ways = dict[str, Row](), dict[str, list[str]]()
        for name in cfg.tasks.split(","):
            rows = write_rows(folder, cfg, name)
            texts, ways[name] = None, [""] * len(rows)
            if cfg.answers and name in made.ANSWERS:
                texts, ways[name] = given_texts(name, rows)
            most = getattr(OUR_TASKS[name].module, "MAX_NEW_TOKENS", 0)
            most = min(cfg.max_new_tokens, most[name] if isinstance(most, dict) else most)
            plan[name] = {"rows": rows, "texts": texts, "most": most}
        keys = {key: getattr(cfg, key) for key in ("data", "metrics", "classifier", "allow_code")}
        write_json(folder / "plan.json", plan)
        theirs, ours = (run_child(side, str(model), str(folder), keys) for side in (run_theirs, run_ours))
        parameters = LM(str(model), "cpu").model.num_parameters()
    who = "given answers" if cfg.answers else cfg.model or "random"
    return {"model": who, "parameters": parameters, "tasks": {
        name: compare(name, ours[name], theirs[name], ways[name]) for name in plan}}


def report(results: dict[str, Any]) -> str:
    """One line per task, and one per way of writing an answer on which the two sides differ."""
    lines, notes = [], []
    for name, task in results["tasks"].items():
        same = task["same"]
        lines.append([name, *(f"{same[key]:,}" for key in ("questions", "prompt", "text", "read")),
                      ", ".join(f"{key} {same[key]:,}" for key in TASKS[name].scores),
                      f"{task['largest_difference']:.1e}"])
        notes += [f"{name}: {key} differs for {found['count']} answers {way}: {found['examples'][0]}"
                  for key, ways in task["differ"].items() for way, found in ways.items()]
    headers = ["task", "questions", "same prompt", "text", "answer read", "scores", "largest diff."]
    return "\n".join([text_table(headers, lines), *notes,
                      f"{results['model']}, {results['parameters']:,} parameters"])
