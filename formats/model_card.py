"""The model card: a README.md as the Hugging Face hub reads it, of what the files beside a model say.

    described = Card(name="dpo", model="out/dpo", folder=Path("out/dpo/step_000060"), license="mit")
    text = described.text(parameters, use="...")

Data, tokens, settings and losses are from run.json and metrics.jsonl of the run and of those that it began
from; rows of data from data/<name>/meta.json, what of them benchmarks hold from contaminated.json beside it;
scores from a results.json of eval.py, those of the same weights only. What is not there is said to be
missing, or left out: a card never guesses. Absolute paths of this machine are cut to their last part.
"""

import json
import math
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configurator import UserError
from formats import checkpoint, hf
from formats.files import file_sha256, read_jsonl
from formats.hf import teacher_sha256
from formats.peft import weights_sha256

# A stage is known by a key that only its script has.
STAGES = {"sample_tokens": "pre-training", "student_layers": "distillation", "packing": "fine-tuning",
          "reference": "preferences"}
SHOWN = ("optimizer", "learning_rate", "min_lr", "schedule", "warmup_steps", "weight_decay", "beta1", "beta2",
         "grad_clip", "global_batch_size", "block_size", "dtype", "seed", "lora_rank", "teacher", "alpha",
         "temperature", "divergence", "loss", "beta", "nll_weight")  # the keys of a run that are told
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class RunSummary:
    """A run that went into the model: its out_dir, its configuration, its log's words of a checkpoint."""

    name: str
    out_dir: Path
    config: dict[str, Any]
    data: dict[str, str]  # {folder: hash}
    step: int | str  # of the checkpoint
    trained: dict[str, Any]  # the last event with "tokens" up to there
    validated: dict[str, Any]  # the last with "val_loss"

    @property
    def kind(self) -> str:
        return next((kind for key, kind in STAGES.items() if key in self.config), "training")

    def logged(self, event: dict[str, Any], key: str) -> Any:
        """What an event says, with its step where that is not the checkpoint's."""
        value, step = event.get(key, "?"), event.get("step", self.step)
        return value if step == self.step else f"{shown(value)} (step {shown(step)})"


def read_json(path: Path) -> Any:
    """A JSON file's content, or None where there is none. UserError for a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error})") from None


def lineage(model: str | None) -> list[RunSummary]:
    """The runs behind a model, the first one first: its own, and those behind init_from, as far as their
    folders are here and hold the weights that were begun from."""
    stages: list[RunSummary] = []
    digest = None  # of the model, where the run behind it has noted one
    while model and Path(model).is_dir():
        try:
            path = hf.find_folder(model)
        except UserError:  # its checkpoints are gone
            break
        if digest and digest not in (weights_sha256(path), teacher_sha256(path)):
            break
        found = next((each for each in (path, path.parent) if (each / "run.json").is_file()), None)
        if found is None or any(found == stage.out_dir for stage in stages):
            break
        step = checkpoint.folder_step(path) if checkpoint.NAME.fullmatch(path.name) else math.inf
        run = read_json(found / "run.json")
        try:
            config, identity = dict(run["config"]), dict(run["identity"])
            data = dict(identity.get("data", {}))
        except (TypeError, KeyError, ValueError, AttributeError):
            raise UserError(f"{found / 'run.json'}: not a run's") from None
        events = [event for event in read_jsonl(found / "metrics.jsonl") if event.get("step", 0) <= step]
        trained, validated = (next((event for event in reversed(events) if key in event), {})
                              for key in ("tokens", "val_loss"))
        step = step if step < math.inf else trained.get("step", "?")
        stages.append(RunSummary(found.name, found, config, data, step, trained, validated))
        model, digest = config.get("init_from"), identity.get("base")
        if config.get("student_layers"):
            model, digest = config.get("teacher"), identity.get("teacher")
    return stages[::-1]


def scores(places: Iterable[Path], digest: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """({"task", "figure", "value", "stderr", "n"} ..) of the first of these results.json that is there, those
    of the weights with this hash; and the settings they were measured with."""
    place = next((path for path in places if path.is_file()), None)
    results = read_json(place) if place else {}
    if not isinstance(results, dict):
        raise UserError(f"{place}: not a results.json of eval.py")
    rows = []
    for measured in results.get("models", []):
        if measured.get("weights_sha256") == digest:
            for task, result in measured.get("tasks", {}).items():
                rows += [{"task": task, "figure": figure, **values}
                         for figure, values in result.get("figures", {}).items()]
    return rows, results.get("settings", {})


def commit() -> str:
    """The commit of this code, "modified" where files differ from it, or that there is none."""
    try:
        found, changed = (subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True,
                                         timeout=20, check=True).stdout.strip()
                          for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"]))
    except (OSError, subprocess.SubprocessError):
        return "not in a git checkout"
    return found + (", modified" if changed else "")


def public(value: Any) -> Any:
    """A setting without where it lies on this machine: absolute paths, also in lists, by their last part."""
    if isinstance(value, dict):
        return {key: public(each) for key, each in value.items()}
    if isinstance(value, list):
        return [public(each) for each in value]
    if isinstance(value, str):
        return ",".join(Path(part).name if Path(part).is_absolute() else part for part in value.split(","))
    return value


def shown(value: Any) -> str:
    """A setting as a cell of a table."""
    value = public(value)
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else \
        f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(shown, row)) + " |" for row in lines)


@dataclass(frozen=True)
class Card:
    """What is known of a model; `text` writes it down."""

    name: str
    model: str  # as the user gave it
    folder: Path  # where it was found
    config: Any  # GPTConfig
    tokenizer: Any
    license: str | None = None
    library: str = "transformers"  # that loads these files, as the hub names it
    results: str | None = None  # eval.py's results.json; None: that beside the model, if there is one

    @cached_property
    def digest(self) -> str:
        return weights_sha256(self.folder)

    def text(self, parameters: int, use: str) -> str:
        """The whole card. use: Markdown, how these files are used."""
        stages = lineage(self.model) or lineage(str(self.folder))
        beside = (path / "results.json" for path in (Path(self.model), self.folder, self.folder.parent))
        rows, settings = scores([Path(self.results)] if self.results else beside, self.digest)
        if self.results and not rows:
            raise UserError(f"results={self.results}: has no scores of the weights of {self.model}")
        sections = [self.front_matter(rows), f"# {self.name}", self.summary(parameters), f"## Use\n\n{use}",
                    training(stages), data(stages), evaluation(rows, settings), self.origin()]
        return "\n\n".join(filter(None, sections)) + "\n"

    def front_matter(self, rows: list[dict[str, Any]]) -> str:
        """The YAML that the hub reads, with every score as a model index."""
        from huggingface_hub import EvalResult, ModelCardData
        results = [EvalResult(task_type="text-generation", dataset_type=row["task"], dataset_name=row["task"],
                              metric_type=row["figure"], metric_name=row["figure"], metric_value=row["value"])
                   for row in rows]
        tags = ["nanollama", hf.architecture(self.config)]
        tags += ["conversational"] if "chat_template" in self.tokenizer.settings else []
        described = ModelCardData(license=self.license, library_name=self.library, tags=tags,
                                  pipeline_tag="text-generation", model_name=self.name,
                                  eval_results=results or None, ignore_metadata_errors=False)
        return f"---\n{described.to_yaml().strip()}\n---"

    def summary(self, parameters: int) -> str:
        c = self.config
        kind = "ternary model" if c.ternary else f"{hf.architecture(c)} model"
        return (f"A {kind} of {parameters:,} parameters: {c.n_layer} layers, {c.n_embd} wide, {c.n_head} "
                f"heads of queries and {c.n_kv_head} of keys, an MLP of {c.intermediate_size:,}, "
                f"{c.vocab_size:,} token ids, a context of {c.block_size:,} tokens.")

    def origin(self) -> str:
        packages = ("torch", "safetensors", "tokenizers")
        versions = ", ".join([f"Python {platform.python_version()}",
                              *(f"{package} {version(package)}" for package in packages)])
        return ("## Origin\n\n" + table(["", ""], [
            ["exported from", shown(str(self.folder))], ["sha256 of its weights", f"`{self.digest}`"],
            ["nanollama, commit", commit()], ["versions", versions]])
            + "\n\nThe sha256 of every file here is in manifest.json.")


def training(stages: list[RunSummary]) -> str:
    """What each run saw and reached, its main settings, and all of them to unfold."""
    if not stages:
        return "## Training\n\nNot known: no run of nanollama stands beside this model."
    first = stages[0].config.get("init_from")
    begun = f"\n\nThe first of these runs began from {shown(first)}." if first else ""
    rows = [[f"{stage.kind} ({stage.name})", stage.config.get("dataset"), stage.step,
             stage.logged(stage.trained, "tokens"), stage.logged(stage.validated, "val_loss")]
            for stage in stages]
    keys = [key for key in SHOWN if any(stage.config.get(key) not in (None, 0) for stage in stages)]
    settings = [[key, *(stage.config.get(key, "") for stage in stages)] for key in keys]
    everything = json.dumps({stage.name: public(stage.config) for stage in stages}, indent=1)
    return "\n\n".join([
        "## Training" + begun,
        table(["run", "data", "steps", "tokens", "validation loss"], rows),
        table(["setting", *(stage.name for stage in stages)], settings),
        f"<details><summary>all settings</summary>\n\n```json\n{everything}\n```\n</details>"])


def data(stages: list[RunSummary]) -> str:
    """Where the text came from, and which benchmarks were found in it."""
    rows, found = [], []
    for path, digest in {path: digest for stage in stages for path, digest in stage.data.items()}.items():
        file, name = Path(path) / "meta.json", Path(path).name
        same = file.is_file() and file_sha256(file) == digest  # not another data set of that name by now
        meta = read_json(file) if same else {}
        counts = [sum((meta.get(key) or {}).values()) or "?" for key in ("documents", "tokens")]
        rows.append([name, meta.get("source", "not at hand any more"), *counts, f"`{str(digest)[:16]}`"])
        contaminated = read_json(file.with_name("contaminated.json")) if same else None
        benchmarks = (contaminated or {}).get("benchmarks", {})
        found += [[name, each, *(counts.get(key, "") for key in ("documents", "ngram", "minhash"))]
                  for each, counts in benchmarks.items()]
        if contaminated is None:
            found.append([name, "not looked for" if same else "not known", "", "", ""])
    if not rows:
        return ""
    return "\n\n".join(["## Data", table(["set", "source", "documents", "tokens", "sha256, beginning"], rows),
                        "Rows that benchmarks hold too, found and removed by `prepare.py --decontaminate`:",
                        table(["set", "benchmark", "documents", "by 13-grams", "by MinHash"], found)])


def evaluation(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    if not rows:
        return "## Evaluation\n\nNot measured: `eval.py` has written no results.json for these weights."
    told = ", ".join(f"{key}={shown(settings[key])}" for key in ("limit", "shots", "chat", "dtype")
                     if settings.get(key) not in (None, ""))
    cells = [[row["task"], row["figure"], *(row.get(key, "") for key in ("value", "stderr", "n"))]
             for row in rows]
    return ("## Evaluation\n\n" + table(["task", "figure", "value", "standard error", "n"], cells)
            + (f"\n\nMeasured by `eval.py` with {told}." if told else ""))
