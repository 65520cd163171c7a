"""Write a report on training runs, in the form of a short paper: report.md, its pictures, and report.pdf.

    python -m tools.report out/base out/sft out/dpo --out=report
    python -m tools.report out/base exports --results=out/studies --pdf=False

Name the run folders in the order of training. A folder that has only results of eval.py works, too. Every
number, table and picture comes from a file:

    run.json, metrics.jsonl, a checkpoint's config.json    model, data, training, alignment, commands
    results.json of eval.py                                evaluation, test-time compute, long context
    answers/*.jsonl of eval.py                             errors, with the kinds of tools/errors.py
    *.json in --results                                    ablations: what --json= of tools/ablate.py wrote

A section without data is left out; the limitations name it, and the command that makes its data. pandoc and
Typst make the PDF (pip install pypandoc_binary typst); without them there is only report.md. Left out: prose
on what the numbers mean; the flags --decontaminate, --quality and --dedup in the commands, because meta.json
has only their results.
"""

import dataclasses
import itertools
import json
import re
import shlex
import textwrap
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from matplotlib.figure import Figure

from configurator import UserError, configure, optional_import, run_script
from distill import DistillConfig
from dpo import DPOConfig
from eval import TASKS, EvalConfig, table_rows
from evals import votes
from evals.all_tasks import draw as draw_task
from formats import hf
from formats.checkpoint import read_run
from formats.files import read_json, read_jsonl, write_bytes, write_text
from formats.markdown import fenced
from formats.model_card import RunSummary, data_table, public, run_tables, summarize, summary, table
from grpo import GRPOConfig
from model import GPT, GPTConfig
from prepare import PrepareConfig
from sft import SFTConfig
from tools import ablate
from tools.errors import count_chart, count_table, sort_answers
from train import TrainConfig
from training.curves import draw
from verifier import VerifierConfig

# {stage of a run: the keys of its script}
SCHEMAS = {"pre-training": TrainConfig, "distillation": DistillConfig, "fine-tuning": SFTConfig,
           "preferences": DPOConfig, "reinforcement learning": GRPOConfig, "verifier": VerifierConfig}
LONG = ("context_length", "needle")  # the tasks of the section on long contexts
# {section: what makes its data}
SOURCES = {"Abstract": "eval.py", "Model": "train.py", "Data": "prepare.py", "Training": "train.py",
           "Alignment": "sft.py, dpo.py, grpo.py", "Evaluation": "eval.py",
           "Test-time compute": "eval.py --num_samples=8", "Ablations": "python -m tools.ablate --json=FILE",
           "Long context": "eval.py --tasks=context_length,needle", "Errors": "eval.py"}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    out: str = "report"  # folder for report.md, its pictures and report.pdf
    results: str = "docs/results"  # folder with the JSON files of tools.ablate
    pdf: bool | None = None  # also write report.pdf; None writes it if pypandoc and typst are installed


# ---- Markdown ---------------------------------------------------------------------------------------------

def captioned(caption: str, rows: list[list[Any]]) -> str:
    """A table, the first row of which is its header; "" without other rows."""
    return f"**Table.** {caption}\n\n{table(rows[0], rows[1:])}" if rows[1:] else ""


def figure(path: Path, picture: Figure, caption: str) -> str:
    """Save a picture; returns the Markdown that shows it."""
    picture.savefig(path, dpi=130)
    return f"![picture]({quote(path.name)})\n\n**Figure.** {caption}"


def numbered(text: str) -> str:
    """The text with numbers in its captions."""
    for kind in ("Table", "Figure"):
        pieces = re.split(rf"^\*\*{kind}\.\*\*", text, flags=re.M)
        text = pieces[0] + "".join(f"**{kind} {n}.**{piece}" for n, piece in enumerate(pieces[1:], 1))
    return text


# ---- Sections of run folders ------------------------------------------------------------------------------

def architectures(runs: dict[Path, RunSummary]) -> str:
    names = defaultdict(list)
    for folder, run in runs.items():
        config = GPTConfig.read(hf.find_folder(folder))
        with torch.device("meta"):  # without memory for the weights
            names[summary(config, GPT(config).num_parameters())].append(run.name)
    return "\n\n".join(f"**{', '.join(each)}.** {text}" for text, each in names.items())


def training(runs: dict[Path, RunSummary], path: Path) -> str:
    """Settings, curves, and the metrics of the last evaluation of each run. path: of the picture."""
    if not runs:
        return ""
    logs = {run.name: read_jsonl(folder / "metrics.jsonl") for folder, run in runs.items()}
    last = [([event for event in log if "val_loss" in event] or [{}])[-1] for log in logs.values()]
    metrics = dict.fromkeys(key for event in last for key in event if key.startswith("val_"))
    return "\n\n".join([
        f"**Table.** The runs, and their main settings.\n\n{run_tables([*runs.values()])}",
        captioned("The last evaluation on validation data.", [
            ["metric", *logs], *([key, *(event.get(key, "-") for event in last)] for key in metrics)]),
        figure(path, draw(logs), "Loss, learning rate and speed.")])


def data_folders(runs: dict[Path, RunSummary]) -> list[Path]:
    """Every data set that the runs read, once."""
    return [*dict.fromkeys(Path(path) for run in runs.values() for path in run.identity.get("data", {}))]


def command(schema: type, settings: dict[str, Any]) -> str:
    """The command line for these settings: those that differ from the defaults."""
    defaults = json.loads(json.dumps(dataclasses.asdict(schema())))  # as JSON has them: tuples are lists
    words = [f"--{key}={public(str(value))}" for key, value in settings.items()
             if key in defaults and value != defaults[key]]
    return shlex.join(["python", f"{schema.__module__}.py", *words])


def reproduction(runs: dict[Path, RunSummary], results: dict[Path, dict[str, Any]]) -> str:
    """The commands, with the versions that the runs used."""
    lines = []
    for path in data_folders(runs):
        meta = read_json(path / "meta.json")
        if "kind" in meta and meta["kind"] == meta["inputs"]["kind"]:  # not written by tools/synthesize.py
            names = {"source": meta["source"], "tokenizer": meta["tokenizer"], "out": str(path)}
            lines.append(command(PrepareConfig, meta["inputs"] | {"decontaminate": None} | names))
    for folder, run in runs.items():
        used = {"commit": "unknown", "versions": {}, **read_run(folder)}
        lines += [f"# commit {used['commit']}, torch {used['versions'].get('torch', 'unknown')}",
                  command(SCHEMAS[run.stage], run.config)]
    return fenced("\n".join([*lines, *(command(EvalConfig, each["settings"]) for each in results.values())]))


# ---- Sections of results ----------------------------------------------------------------------------------

def measurements(results: dict[Path, dict[str, Any]], out: Path) -> dict[str, str]:
    """Abstract, evaluation, test-time compute and long context, from {folder: results.json}."""
    sections: dict[str, list[str]] = defaultdict(list)
    for folder, content in results.items():
        models = [{**model, "not_run": {}, "name": public(model["name"])} for model in content["models"]]
        ways = votes.method_rows(models)
        known = {row[1] for row in ways}  # figures that are in this table
        header, *rows = table_rows(models, {}, {})
        rows = [row for row in rows if row[0] in TASKS and row[1] not in known]
        for task, name, n, *cells in (next(each) for _, each in itertools.groupby(rows, lambda row: row[0])):
            scores = ", ".join(f"{model['name']} {cell}" for model, cell in zip(models, cells, strict=True))
            sections["Abstract"].append(f"On {task} (n = {n}), the {name} is {scores}.")
        place = f"{public(str(folder))}/results.json; each value has its standard error."
        long = [row for row in rows if row[0] in LONG]
        sections["Evaluation"].append(captioned(place, [header, *(row for row in rows if row not in long)]))
        sections["Test-time compute"].append(captioned(f"Choices among several answers. {place}", ways))
        sections["Long context"].append(captioned(place, [header, *long]))
        for name in TASKS:
            if picture := draw_task(name, {model["name"]: model["tasks"][name]["details"] for model in models
                                           if name in model["tasks"]}):
                sections["Long context" if name in LONG else "Test-time compute"].append(
                    figure(out / f"{folder.name}_{name}.png", picture, f"Task {name}."))
    return {title: "\n\n".join(filter(None, parts)).replace("+-", "±") for title, parts in sections.items()}


def ablations(folder: Path, out: Path) -> str:
    """A table and a picture for each JSON file of tools/ablate.py in the folder."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_bytes())  # files of other programs may hold lists
        if isinstance(content, dict) and {"base", "commands", "runs"} <= content.keys():
            runs, base = content["runs"], "`, `".join(content["base"])
            parts += [f"**Table.** {path.stem}: {metric} of variants of `{base}`.\n\n"
                      f"{ablate.report(runs, metric)}" for metric in runs["base"][0]["metrics"]]
            parts.append(figure(out / f"{path.stem}.png", ablate.chart(runs), f"{path.stem}: differences."))
    return "\n\n".join(parts)


def mistakes(folders: list[Path], out: Path) -> str:
    """Counts by kind, and of each kind the first mistake of the model that makes it most often."""
    paths = [path for folder in folders for path in sorted(folder.glob("answers/*.jsonl"))]
    found, confusions = sort_answers(paths)
    found = {public(name): kinds for name, kinds in found.items()}
    parts = [f"**Table.** Wrong answers by kind.\n\n{count_table(found)}",
             figure(out / "errors.png", count_chart(found), "Wrong answers by kind.")] if found else []
    for kind in next(iter(found.values()), {}):
        name = max(found, key=lambda name, kind=kind: len(found[name][kind]))
        row = found[name][kind][0]
        lines = [textwrap.fill(f"{key}: {row[key]}"[:600], 90)  # a document may have pages
                 for key in ("question", "answer", "answers", "said") if key in row]
        parts.append(f"{kind} ({name}):\n\n" + fenced("\n".join(lines)))
    return "\n\n".join([*parts, *confusions])


def limitations(runs: dict[Path, RunSummary], results: dict[Path, dict[str, Any]],
                sections: dict[str, str]) -> str:
    """The limitations of the numbers that the files show. sections: those that have data."""
    stages = Counter(run.stage for run in runs.values())
    points = [f"{stage}: one run, so the spread between seeds is unknown" for stage in stages
              if stages[stage] == 1]
    points += [f"{path.name}: not searched for the questions of benchmarks" for path in data_folders(runs)
               if not (path / "contaminated.json").is_file()]
    for content in results.values():
        reasons = [content["not_run"], *(model["not_run"] for model in content["models"])]
        points += [f"{task}: not run, {public(why)}" for each in reasons for task, why in each.items()]
    points += [f"{title}: no data (`{maker}` makes it)" for title, maker in SOURCES.items()
               if title not in sections]
    return "\n".join(f"- {point}." for point in points)


# ---- The page ---------------------------------------------------------------------------------------------

def page(folders: list[Path], cfg: ReportConfig) -> str:
    """The text of report.md. Saves its pictures."""
    out = Path(cfg.out)
    runs = {folder: summarize(folder, None) for folder in folders if (folder / "run.json").is_file()}
    results = {folder: each for folder in folders if (each := read_json(folder / "results.json"))}
    base = {folder: run for folder, run in runs.items() if run.stage in ("pre-training", "distillation")}
    found = measurements(results, out)
    lines = [f"{run.stage.capitalize()} ({run.name}): {run.tokens} tokens, validation loss {run.val_loss}."
             for run in runs.values()]
    found |= {
        "Abstract": " ".join([*lines, found.get("Abstract", "").replace("\n\n", " ")]).strip(),
        "Model": architectures(runs), "Data": data_table([*runs.values()]),
        "Training": training(base, out / "training.png"),
        "Alignment": training({f: run for f, run in runs.items() if f not in base}, out / "alignment.png"),
        "Ablations": ablations(Path(cfg.results), out), "Errors": mistakes(folders, out)}
    sections = {title: found[title] for title in SOURCES if found.get(title)}
    sections["Limitations"] = limitations(runs, results, sections)
    sections["Reproduction"] = reproduction(runs, results)
    parts = [f"# Report on {', '.join(folder.name for folder in folders)}",
             *(f"## {title}\n\n{text}" for title, text in sections.items())]
    return numbered("\n\n".join(parts) + "\n")


def main(argv: list[str]) -> None:
    # Arguments without -- are folders here, not config files.
    cfg, _ = configure(ReportConfig, [arg for arg in argv if arg.startswith("-")], usage=__doc__)
    folders = [Path(arg) for arg in argv if not arg.startswith("-")]
    names = [folder.name for folder in folders]
    if twice := [name for name in names if names.count(name) > 1]:  # their pictures would have one name
        raise UserError(f"{twice[0]}: two folders have this name; rename or copy one of them")
    for folder in folders or [Path("")]:
        if not any((folder / name).is_file() for name in ("run.json", "results.json")):
            raise UserError(f"{folder}: neither a run nor results of eval.py; name folders such as out/base")
    has_pdf = all(map(find_spec, ("pypandoc", "typst"))) if cfg.pdf is None else cfg.pdf
    if has_pdf:
        pandoc = optional_import("pypandoc", "pdf=True", "pypandoc_binary")
        typst = optional_import("typst", "pdf=True")
    (out := Path(cfg.out)).mkdir(parents=True, exist_ok=True)
    write_text(out / "report.md", text := page(folders, cfg))
    if has_pdf:
        body = pandoc.convert_text(text, "typst", "gfm", ["--standalone", "--wrap=none"])
        # Captions stay on the page of their tables and pictures.
        body = re.sub(r"^#(strong\[Table|box\(image).*$", r"#block(sticky: true)[\g<0>]", body, flags=re.M)
        style = Path(__file__).with_suffix(".typ").read_text()
        write_bytes(out / "report.pdf", typst.compile((style + body).encode(), root=cfg.out))
    print(f"report    {out / 'report.md'}{' and report.pdf' if has_pdf else ''}")
    if not has_pdf and cfg.pdf is None:
        print("note      no report.pdf: it needs pip install pypandoc_binary typst")


if __name__ == "__main__":
    run_script(main)
