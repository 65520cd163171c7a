"""Do attention sinks keep a model's loss flat far beyond its training length? And is any token slow?

    python -m bench.sinks --seeds=3 --json=docs/results/sinks.json --png=docs/results/sinks.png
    python -m bench.sinks --times=True            # only the time per token past the context

Trains a small model per tokenizer (BPE of 4,096 and bytes) and seed on the standard library with rows of 64
tokens. Each one reads rows of 16 times that length from validation text in three ways: with plain attention,
with a window of 64 tokens, and with 4 sinks and a window of 60 (evals/tasks/context_length.py). Then it times
each new token of one row past the context, with sinks and without, where half the context is read again. The
time of a token is the median of several runs in turns, in CPU seconds: what another program delays in one run
is not counted, and a token that is slow in every run is. Finished runs in out_dir are kept.
docs/architecture_studies.md shows the results.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from bench.measure import text_table
from configurator import configure, require, require_positive, run_script
from evals.lm import LM
from evals.tasks import context_length
from evals.tasks.perplexity import read_texts
from formats.files import read_json, write_json
from generation.generate import Sampling, generate
from model import GPT, GPTConfig
from prepare import PrepareConfig, prepare
from tools.arms import mean_and_range, run_once

T, FACTOR = 64, 16  # training length; the rows that are measured are FACTOR times as long
VOCABULARIES = {"bytes": 257, "BPE": 4096}
WAYS = {"plain attention": (0, None), "window of 64": (0, T), "4 sinks, window of 60": (4, T - 4)}
ARGV = ["--n_layer=3", "--n_embd=128", "--n_head=4", f"--block_size={T}", "--sample_tokens=0",
        "--eval_interval=0", "--save_interval=0", "--log_interval=100", "--eval_tokens=65536", "--device=cpu"]


@dataclass(frozen=True, kw_only=True)
class SinksConfig:
    seeds: int = 3  # models per tokenizer, with seeds 1, 2, ..
    tokenizers: str = "bytes,BPE"  # of the models, separated by commas
    steps: int = 400  # optimizer steps of each model
    limit: int = 64  # KiB of validation text
    out_dir: str = "out/sinks"  # folder for the models and their results
    json: str | None = None  # write the results to this file
    png: str | None = None  # draw the curves to this file
    times: bool = False  # only time untrained models
    rounds: int = 15  # of these times; the tokens' times are medians of them

    def __post_init__(self) -> None:
        require_positive(self, "seeds", "steps", "limit", "rounds")
        known = set(self.tokenizers.split(",")) <= VOCABULARIES.keys()
        require(self, "tokenizers", known, "bytes, BPE or both")


def token_times(model: GPT, sampling: Sampling, tokens: int) -> list[float]:
    """CPU seconds of each new token past the context."""
    times, begin = [], time.thread_time()
    prompt = [1] * (model.config.block_size - 2)
    for _ in generate(model, [prompt], tokens, sampling):
        times.append(time.thread_time() - begin)
        begin = time.thread_time()
    return times[3:]


def compared_times(model: GPT, tokens: int, rounds: int, ways: dict[str, Sampling]) -> dict[str, dict]:
    """The seconds per token of each way: {"median", "slowest" (divided by the median), "mean"}.

    All ways are timed in turns, `rounds` times, and the time of a token is its median over the rounds.
    """
    turns = [{name: token_times(model, sampling, tokens) for name, sampling in ways.items()}
             for _ in range(rounds)]
    result = {}
    for name in ways:
        times = [statistics.median(each) for each in zip(*(turn[name] for turn in turns), strict=True)]
        median = statistics.median(times)
        result[name] = {"median": median, "slowest": max(times) / median, "mean": statistics.mean(times)}
    return result


def measure_model(folder: Path, data: Path, limit: int) -> dict:
    """The losses of one model by position for every way, and its times. Kept in sinks.json of its folder."""
    if (folder / "sinks.json").is_file():
        return read_json(folder / "sinks.json")
    lm, texts = LM(str(folder), device="cpu"), read_texts(str(data), "", 1024 * limit)
    result: dict = {"losses": {}}
    for name, (sinks, window) in WAYS.items():
        details = context_length.score(lm, texts, "", FACTOR * T, sinks, window).details
        result["losses"][name] = [[each["first"], each["last"], each["value"]]
                                  for each in details["loss_by_position"]]
        result["rows"] = details["rows"]
    ways = {"sinks": Sampling(temperature=0, sinks=4), "read again": Sampling(temperature=0)}
    result["times"] = compared_times(lm.model, 8 * T, 5, ways)
    write_json(folder / "sinks.json", result)
    return result


def time_table(rounds: int) -> str:
    """The times of untrained models: without sinks, and with 4 and two windows. Without sinks, three quarters
    of the context are read on average."""
    rows = []
    for sizes in (dict(n_embd=128, vocab_size=257, block_size=64), {}, dict(block_size=1024)):
        model = GPT(GPTConfig(**sizes)).eval()
        context, ways = model.config.block_size, {"read again": Sampling(temperature=0)}
        for window in (context - 4, 3 * context // 4 - 4):
            ways[f"4 sinks, window of {window:,}"] = Sampling(temperature=0, sinks=4, window=window)
        for name, times in compared_times(model, min(600, 2 * context), rounds, ways).items():
            rows.append([f"3 x {model.config.n_embd}, {context:,}", name, f"{1e3 * times['mean']:.2f}",
                         f"{1e3 * times['median']:.2f}", f"{times['slowest']:.2f}"])
    return text_table(["model, context", "", "mean ms", "median ms", "slowest / median"], rows)


def mean_between(ranges: list, first: int, last: int) -> float:
    """The mean loss of positions from `first` to `last`, in nats."""
    inside = [(end - begin + 1, value) for begin, end, value in ranges if first <= begin and end <= last]
    return sum(count * value for count, value in inside) / sum(count for count, _ in inside)


def table_of(results: dict[str, list[dict]]) -> str:
    rows = []
    for data, models in results.items():
        for way in WAYS:
            near = [mean_between(each["losses"][way], T // 2, T - 1) for each in models]
            far = [mean_between(each["losses"][way], FACTOR * T // 2, FACTOR * T - 1) for each in models]
            rows.append([data, way, mean_and_range(near), mean_and_range(far),
                         mean_and_range([b - a for a, b in zip(near, far, strict=True)])])
    far = f"loss at {FACTOR * T // 2}-{FACTOR * T}"
    return text_table(["data", "attention", f"loss at {T // 2}-{T}", far, "difference"], rows)


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """One panel per tokenizer: loss by position, mean of the seeds with their range."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for number, (data, models) in enumerate(results.items(), 1):
        axes = figure.add_subplot(1, len(results), number)
        for color, way in enumerate(WAYS):
            places = [(first + last) / 2 + 1 for first, last, _ in models[0]["losses"][way]]
            curves = [[value for *_, value in each["losses"][way]] for each in models]
            columns = list(zip(*curves, strict=True))  # the seeds' values at each place
            axes.plot(places, [statistics.mean(column) for column in columns], color=f"C{color}", label=way)
            axes.fill_between(places, [min(column) for column in columns],
                              [max(column) for column in columns], alpha=0.25, color=f"C{color}")
        axes.axvline(T, color="gray", linestyle="--", label=f"training length {T}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set(xlabel="position (tokens)", ylabel="loss (nats per token)", title=data)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
    cfg, _ = configure(SinksConfig, argv, usage=__doc__)
    if cfg.times:
        torch.set_num_threads(1)
        print(time_table(cfg.rounds))
        return 0
    results: dict[str, list[dict]] = {}
    for name in cfg.tokenizers.split(","):
        data = Path(cfg.out_dir) / f"data_{name}"
        if not (data / "meta.json").is_file():
            prepare(PrepareConfig(out=str(data), vocab_size=VOCABULARIES[name]))
        for seed in range(1, cfg.seeds + 1):
            folder = Path(cfg.out_dir) / f"{name}_{seed}"
            run_once("train.py", [*ARGV, f"--dataset={data}", f"--seed={seed}", f"--max_steps={cfg.steps}"],
                     folder, steps=cfg.steps, threads=1)
            results.setdefault(name, []).append(measure_model(folder, data, cfg.limit))
            print(f"{name} {seed}: {results[name][-1]['times']}", flush=True)
    print(table_of(results))
    for name, models in results.items():
        for way in ("sinks", "read again"):
            times = [each["times"][way] for each in models]
            median, mean = (mean_and_range([1e3 * each[key] for each in times]) for key in ("median", "mean"))
            slowest = mean_and_range([each["slowest"] for each in times], 2)
            print(f"{name}, {way}: median {median} ms, mean {mean} ms, slowest / median {slowest}")
    if cfg.json:
        write_json(Path(cfg.json), {"steps": cfg.steps, "torch": torch.__version__, "results": results})
    if cfg.png:
        draw(results, Path(cfg.png))
    return 0


if __name__ == "__main__":
    run_script(main)
