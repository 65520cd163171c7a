"""Run the arms of an experiment: each arm is trained once per seed, and finished runs are kept.

    arms = {"small lr": lambda seed: run_once("train.py", [f"--seed={seed}", "--learning_rate=1e-3"],
                                              Path(f"out/small_{seed}"))}
    logs = run_arms(arms, seeds=[1, 2, 3])                   # {"small lr": [log of seed 1, 2, 3]}
    mean_and_range([log[-1]["val_loss"] for log in logs["small lr"]])     # "1.234 (1.210 - 1.260)"

A log is the list of the events in metrics.jsonl. The same call again repeats no finished run, and continues a
run that was killed. Used by tools/ablate.py, sweep.py, task_table.py, search_layers.py, and by bench/.
"""

import dataclasses
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from configurator import UserError, configure
from eval import EvalConfig
from formats import hf
from formats.files import read_json, read_jsonl, write_json
from formats.peft import weights_sha256

ROOT = Path(__file__).parent.parent
Result = TypeVar("Result")


def require_writable(json: str | None, png: str | None) -> None:
    """Raises UserError unless these files can be written, before hours of training. None: no such file."""
    for file in filter(None, (json, png)):
        folder = Path(file).parent
        if Path(file).is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"{file}: cannot be written; name a file in a folder that exists")
    if png and not png.endswith(".png"):
        raise UserError(f"{png}: must be the name of a .png file")


def split(text: str) -> list[str]:
    """The words of a text, as a shell splits it. Raises UserError for a quote that is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{text}: {error}") from None


def run_process(script: str, argv: list[str], threads: int | None = None) -> None:
    """Run a script of the root in a process of its own. Raises UserError if it fails.

    threads: OpenMP threads of the process.
    """
    if not (ROOT / script).is_file():
        raise UserError(f"{script}: no such script")
    command = [sys.executable, str(ROOT / script), *argv]
    limit = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.run(command, env=os.environ | limit, capture_output=True, text=True)
    if process.returncode:
        raise UserError(f"{' '.join(command[1:])}: exit code {process.returncode}: "
                        f"{process.stderr.strip()[-600:]}")


def is_finished(log: list[dict[str, Any]], metric: str, steps: int | None) -> bool:
    """Whether the last event of a log has the metric, at step `steps` unless that is None."""
    return bool(log) and metric in log[-1] and steps in (None, log[-1]["step"])


def run_once(script: str, argv: list[str], out_dir: Path, metric: str = "val_loss",
             steps: int | None = None, threads: int | None = None) -> list[dict[str, Any]]:
    """Run a stage's script in a process of its own, unless out_dir holds the finished run. Returns its log.

    A run is finished if an earlier call with these arguments, and with the same weights in the models that
    they name, returned its log. Else the script is started: it continues its run, or refuses other settings.
    The last event of the log must have the metric, at step `steps` unless that is None; so evaluate at the
    end only (--eval_interval=0). threads: OpenMP threads of the process. Raises UserError if the process
    fails or logs no such metric.
    """
    models = [weights_sha256(hf.find_folder(word.partition("=")[2])) for word in argv
              if word.startswith(("--init_from=", "--teacher="))]
    path, record = out_dir / "metrics.jsonl", out_dir / "arm.json"
    arguments = {"arguments": [script, *argv, *models]}
    log = read_jsonl(path)
    # The log alone does not tell: each of several stages ends with an evaluation.
    if read_json(record) != arguments or not is_finished(log, metric, steps):
        run_process(script, [*argv, f"--out_dir={out_dir}"], threads)
        log = read_jsonl(path)
        if not is_finished(log, metric, steps):
            raise UserError(f"{path}: the last event has no {metric}")
        write_json(record, arguments)
    return log


def run_eval(argv: list[str], out_dir: Path, threads: int | None = None) -> dict[str, dict[str, Any]]:
    """Run eval.py, unless out_dir has all its results for these arguments and the model's weights.

    Returns {task: its figures}.
    """
    path = out_dir / "results.json"
    results = read_json(path)
    argv = [*argv, f"--out_dir={out_dir}"]
    # All keys: results with a limit that is now left out are others.
    settings = dataclasses.asdict(configure(EvalConfig, argv)[0])
    if not results.get("complete") or results["settings"] != settings or \
            results["models"][0]["weights_sha256"] != weights_sha256(hf.find_folder(settings["model"])):
        run_process("eval.py", argv, threads)
        results = read_json(path)
    return {task: each["figures"] for task, each in results["models"][0]["tasks"].items()}


def run_arms(arms: Mapping[str, Callable[[int], Result]], seeds: Iterable[int],
             jobs: int = 1) -> dict[str, list[Result]]:
    """Call every arm with every seed, `jobs` at a time. Returns {arm: one result per seed, in order}."""
    stopped = Event()  # after an error or Ctrl-C no other run starts

    def call(arm: Callable[[int], Result], seed: int) -> Result:
        if stopped.is_set():
            raise CancelledError
        try:
            return arm(seed)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        runs = [(name, pool.submit(call, arm, seed)) for seed in seeds for name, arm in arms.items()]
        results: dict[str, list[Result]] = {name: [] for name in arms}
        try:
            for name, run in runs:
                results[name].append(run.result())
        finally:
            stopped.set()
    return results


def mean_and_range(values: list[float], digits: int = 3) -> str:
    """The mean and, for more than one value, the lowest and the highest: "1.234 (1.210 - 1.260)"."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} - {max(values):.{digits}f})"
