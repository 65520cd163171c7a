"""The model card: the README.md of an export, as the Hugging Face hub reads it.

    text = card(Exported("out/sft", folder, config, tokenizer, parameters=3_600_000, title="sft", format="hf",
                         gguf_kind="q8_0", license="mit"))

What the card reports, and where it comes from:

    data, tokens, settings, losses    run.json and metrics.jsonl of the run, and of the runs it started from
    documents and tokens of the data  data/<name>/meta.json
    scores                            results.json of eval.py, only for the same weights

A card never guesses: it says so if something is missing. Absolute paths are cut to their last part, so that
nothing about this machine is published.
"""

import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from configurator import UserError
from formats import checkpoint, hf, markdown
from formats.files import file_sha256, read_json, read_jsonl
from formats.hf import GPTConfig, model_sha256
from formats.peft import weights_sha256
from formats.tokenizer import Tokenizer

# {a key of a stage's script: the name of the stage}. The first key that a run has decides: distill.py has
# "packing" too, and grpo.py has "reference" too.
STAGES = {"sample_tokens": "pre-training", "student_layers": "distillation", "num_problems": "verifier",
          "group_size": "reinforcement learning", "packing": "fine-tuning", "reference": "preferences"}
# The settings of a run in the table of main settings.
SHOWN = ("optimizer", "learning_rate", "min_lr", "schedule", "warmup_steps", "weight_decay", "beta1", "beta2",
         "grad_clip", "global_batch_size", "block_size", "stages", "dtype", "seed", "lora_rank", "teacher",
         "alpha", "temperature", "divergence", "loss", "beta", "nll_weight")
ROOT = Path(__file__).parent.parent


# ---- Cells ------------------------------------------------------------------------------------------------

def public(text: str) -> str:
    """The text without absolute paths: each is cut to its last part, also in JSON."""
    # A path begins the text or follows a comma, a quote or "=": dataset=/data/a:0.5,/data/b:0.5 contains two.
    return re.sub(r"""(^|["',=])/(?:[^"',]*/)?(?=[^"',/])""", r"\1", text)


def shown(value: Any) -> str:
    """A value as a cell of a Markdown table."""
    text = format(value, {int: ",", float: ".6g"}.get(type(value), ""))
    return public(text).replace("|", "\\|").replace("\n", " ")


def table(headers: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table of `shown` values."""
    return markdown.table(map(shown, headers), [map(shown, row) for row in rows])


def summary(c: GPTConfig, parameters: int) -> str:
    """One sentence on an architecture."""
    kind = "ternary" if c.ternary else hf.architecture(c)
    mlp = f"MLP width {c.intermediate_size:,}"
    if c.n_expert:
        experts = f"{c.n_expert} experts of width {c.expert_size:,}, {c.n_expert_per_token} per token"
        mlp = f"{experts} ({mlp} in the blocks {c.dense_layers})" if c.dense_layers else experts
    return (f"A {kind} model with {parameters:,} parameters: {c.n_layer} layers, width {c.n_embd}, "
            f"{c.n_head} query heads, {c.n_kv_head} key/value heads, {mlp}, "
            f"{c.vocab_size:,} token ids, and a context of {c.block_size:,} tokens.")


# ---- Runs -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class RunSummary:
    """A run that the model was trained in, up to the checkpoint that was used."""

    name: str
    stage: str
    config: dict[str, Any]  # of run.json
    identity: dict[str, Any]  # of run.json: hashes of the data, and of the base model or teacher
    step: int | str  # of the checkpoint; "?" if unknown
    tokens: str  # that it was trained on
    val_loss: str


def summarize(out_dir: Path, step: int | None) -> RunSummary:
    """Summarize a run up to `step`; None is its end. Raises UserError for a damaged run.json."""
    run = checkpoint.read_run(out_dir)
    events = [event for event in read_jsonl(out_dir / "metrics.jsonl")
              if step is None or event.get("step", 0) <= step]
    last = {key: event for event in events for key in event}  # {key: the last event that has it}
    reached = last.get("tokens", {}).get("step", "?") if step is None else step

    def logged(key: str) -> str:
        """The last value, followed by its step if that is not the checkpoint's step."""
        event = last.get(key, {})
        value, at = shown(event.get(key, "?")), event.get("step", reached)
        return value if at == reached else f"{value} (step {shown(at)})"

    stage = next((stage for key, stage in STAGES.items() if key in run["config"]), "training")
    return RunSummary(out_dir.name, stage, run["config"], run["identity"], reached, logged("tokens"),
                      logged("val_loss"))


def lineage(model: str | None) -> list[RunSummary]:
    """The runs that led to a model, first to last: its own, the one it started from, and so on.

    The list stops where a folder is missing, or contains other weights than the next run started from.
    """
    runs: list[RunSummary] = []
    seen: set[Path] = set()
    digest = None  # of the model's weights, if the run that started from it recorded one
    while model and Path(model).is_dir():
        try:
            path = hf.find_folder(model)
        except UserError:  # its checkpoints were deleted
            break
        out_dir = next((each for each in (path, path.parent) if (each / "run.json").is_file()), None)
        has_changed = digest and digest not in (weights_sha256(path), model_sha256(path))
        if has_changed or out_dir is None or out_dir in seen:  # in seen: the runs form a circle
            break
        seen.add(out_dir)
        step = checkpoint.folder_step(path) if checkpoint.NAME.fullmatch(path.name) else None
        runs.insert(0, summarize(out_dir, step))
        # A student with student_layers is cut from its teacher.
        is_cut = bool(runs[0].config.get("student_layers"))
        model = runs[0].config.get("teacher" if is_cut else "init_from")
        digest = runs[0].identity.get("teacher" if is_cut else "base")
    return runs


# ---- Sections ---------------------------------------------------------------------------------------------

def run_tables(runs: list[RunSummary]) -> str:
    """The result of each run, and its main settings."""
    rows = [[f"{run.stage} ({run.name})", run.config.get("dataset"), run.step, run.tokens, run.val_loss]
            for run in runs]
    keys = [key for key in SHOWN if any(run.config.get(key) not in (None, 0, []) for run in runs)]
    settings = [[key, *(run.config.get(key, "") for run in runs)] for key in keys]
    return (table(["run", "data", "steps", "tokens", "validation loss"], rows) + "\n\n"
            + table(["setting", *(run.name for run in runs)], settings))


def data_table(runs: list[RunSummary]) -> str:
    """The source of each data set; "" if there is none."""
    rows = []
    digests = {path: digest for run in runs for path, digest in run.identity.get("data", {}).items()}
    for path, digest in digests.items():  # digest: of the folder's meta.json
        folder, meta_path = Path(path), Path(path) / "meta.json"
        # prepare.py may have written another data set of that name since.
        is_same = meta_path.is_file() and file_sha256(meta_path) == digest
        meta = read_json(meta_path) if is_same else {}
        counts = [sum((meta.get(key) or {}).values()) or "?" for key in ("documents", "tokens")]
        # Written as code, because a pattern has asterisks.
        source = f"`{public(meta['source'])}`" if is_same else "no longer available"
        rows.append([folder.name, source, *counts, f"`{str(digest)[:16]}`"])
    headers = ["set", "source", "documents", "tokens", "start of sha256"]
    return table(headers, rows) if rows else ""


def scores(paths: Iterable[Path], digest: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The scores of the weights with this hash, and the settings of the evaluation.

    Reads the first of `paths`, results.json files of eval.py, that exists. A score is a dict with the keys
    task, figure, value, stderr and n.
    """
    path = next((path for path in paths if path.is_file()), None)
    results = read_json(path) if path else {}
    rows = [{"task": task, "figure": figure, **values}
            for measured in results.get("models", []) if measured.get("weights_sha256") == digest
            for task, result in measured.get("tasks", {}).items()
            for figure, values in result.get("figures", {}).items()]
    return rows, results.get("settings", {})


def score_table(rows: list[dict[str, Any]]) -> str:
    """`scores` as a table; "" if there are none."""
    keys = {"task": "task", "figure": "figure", "value": "value", "stderr": "standard error", "n": "n"}
    return table(keys.values(), [[row.get(key, "") for key in keys] for row in rows]) if rows else ""


def commit() -> str:
    """The commit of this code, with ", modified" if files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*",  # a hash, no tag
               "--dirty=, modified"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not in a git checkout"


class Exported(NamedTuple):
    """What a card describes: a model, and the files that export.py makes of it."""

    model: str  # folder, out_dir, .gguf or hub id, as the user wrote it
    folder: Path  # where its weights are
    config: GPTConfig
    tokenizer: Tokenizer
    parameters: int
    title: str
    format: str  # hf, gguf or ternary
    gguf_kind: str  # quantization of the first GGUF file
    license: str | None  # by the hub's name


def front_matter(export: Exported, rows: list[dict[str, Any]]) -> str:
    """The YAML header that the hub reads. It lists every score."""
    from huggingface_hub import EvalResult, ModelCardData
    results = [EvalResult(task_type="text-generation", dataset_type=row["task"], dataset_name=row["task"],
                          metric_type=row["figure"], metric_name=row["figure"], metric_value=row["value"])
               for row in rows]
    tags = ["nanollama", hf.architecture(export.config)]
    tags += ["conversational"] if "chat_template" in export.tokenizer.settings else []
    # The hub shows how to load a model by the name of its library.
    library = {"hf": "transformers", "gguf": "gguf", "ternary": "nanollama"}[export.format]
    content = ModelCardData(license=export.license, library_name=library, tags=tags,
                            pipeline_tag="text-generation", model_name=export.title,
                            eval_results=results or None, ignore_metadata_errors=False)
    return content.to_yaml().strip()


def origin(folder: Path, digest: str) -> str:
    """Where the export comes from: folder, hash of its weights, commit of this code, versions of packages."""
    versions = [f"Python {platform.python_version()}",
                *(f"{package} {version(package)}" for package in ("torch", "safetensors", "tokenizers"))]
    rows = [["exported from", str(folder)], ["sha256 of its weights", f"`{digest}`"],
            ["nanollama, commit", commit()], ["versions", ", ".join(versions)]]
    return table(["", ""], rows)


def card(export: Exported) -> str:
    """The complete card, which model_card.jinja lays out."""
    folder, digest = export.folder, weights_sha256(export.folder)
    runs = lineage(export.model) or lineage(str(folder))
    nearby = [path / "results.json" for path in (Path(export.model), folder, folder.parent)]
    rows, settings = scores(nearby, digest)
    start = runs[0].config.get("init_from") if runs else None
    used = [f"{key}={shown(settings[key])}" for key in ("limit", "shots", "chat", "dtype")
            if settings.get(key) not in (None, "")]
    layout = jinja2.Template(Path(__file__).with_suffix(".jinja").read_text(encoding="utf-8"),
                             trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return layout.render(
        header=front_matter(export, rows), title=export.title,
        summary=summary(export.config, export.parameters),
        format=export.format, is_chat="chat_template" in export.tokenizer.settings,
        file=f"{export.title}-{export.gguf_kind}.gguf", start=shown(start) if start else "",
        runs=run_tables(runs) if runs else "", data=data_table(runs), scores=score_table(rows),
        used=", ".join(used), origin=origin(folder, digest)) + "\n"
