"""Serving a model: speed, memory, size and perplexity of the files that export.py makes.

    python -m bench serve --model=out/base
    python -m bench serve --model=out/dpo --quantize=q8_0,q4_k_m --batch_sizes=1,4,16 --rounds=5

Exports the model (folders in float32 and bfloat16, GGUF files of the types in --quantize). Each arm then
generates greedily after the same prompts: our generate, transformers, and llama.cpp on the GGUF files if
xllamacpp is installed. Every arm is a process of its own. The time to the first token is the time of a call
for one token per row. Prompt tokens per second are the prompts' tokens over that time; decoded tokens per
second are the other tokens of a longer call over the rest of its time. Time is CPU time on the CPU. Memory is
the peak of the process minus its memory with all packages loaded, before the model (Linux only), and on a GPU
the peak of allocated memory. First checks that transformers, and llama.cpp with f32, generate our ids up to
the first one that ends a text.

Perplexity is over windows of the full context of --text: a data folder's validation text, or a text file. A
GGUF file is measured twice: with its weights in our model, so in float32; and by llama.cpp, which also rounds
activations, if llama-cpp-python is installed.
"""

import contextlib
import functools
import io
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import export
from bench import llama_cpp
from bench.generate import generate_tokens
from bench.machine import status_megabytes
from bench.measure import DeviceConfig, children_in_turns, now, numbers, text_table
from bench.peers import load_transformers
from configurator import UserError, require, require_positive
from dataset.shards import DataFolder
from formats import hf
from formats.tokenizer import Tokenizer
from model import GPT

REPEATS = 3  # calls per process, of which the median counts


@dataclass(frozen=True, kw_only=True)
class Config(DeviceConfig):
    model: str = "out/dpo"  # model folder or out_dir
    quantize: str = "f32,f16,q8_0,q6_k,q4_k_m"  # types of GGUF files, separated by commas
    batch_sizes: str = "1,16"  # numbers of prompts at a time, separated by commas
    prompt_tokens: int = 64  # length of each prompt
    max_new_tokens: int = 64  # tokens generated per prompt
    text: str = "data/pystdlib"  # data folder (its validation text is read) or text file
    eval_tokens: int = 20_000  # number of tokens of the text for the perplexity

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers(self, "batch_sizes")
        require(self, "max_new_tokens", self.max_new_tokens > 1, "at least 2 (the first is timed alone)")
        require_positive(self, "prompt_tokens", "eval_tokens")

    @property
    def sizes(self) -> list[int]:
        return numbers(self, "batch_sizes")

    @property
    def formats(self) -> dict[str, list[str]]:
        """{exported folder: arguments of export.py}."""
        folders = {f"hf {dtype}": [f"--dtype={dtype}"] for dtype in ("float32", "bfloat16")}
        return folders | {f"gguf {kind}": ["--format=gguf", f"--quantize={kind}"]
                          for kind in self.quantize.split(",")}


# ---- The arms, each in a process of its own ---------------------------------------------------------------

Writer = Callable[[list[list[int]], int], list[list[int]]]  # (prompts, number of tokens) -> generated ids


def make_writer(cfg: Config, arm: str, folder: Path, batch: int) -> Writer:
    """Load the model of an arm. Returns its greedy generation, which does not stop at the end of a text."""
    if arm.startswith("llama.cpp"):
        kind = arm.removeprefix("llama.cpp ")
        server = llama_cpp.Server(hf.gguf_of(folder / f"gguf {kind}"), cfg.prompt_tokens + cfg.max_new_tokens,
                                  batch, cfg.threads, exact=kind == "f32")
        return functools.partial(server.write, stop=False)
    if arm == "transformers":
        model = load_transformers(folder / "hf float32", cfg.device)
        model.generation_config.eos_token_id = None
    else:
        model = GPT.from_pretrained(folder / "hf float32", cfg.device).eval()
    return lambda prompts, length: generate_tokens(arm, model, torch.tensor(prompts, device=cfg.device),
                                                   length)


def run_arm(arm: str, folder: str, batch: int, keys: dict[str, Any]) -> dict[str, Any]:
    """One arm in this process. keys: the fields of Config.

    Returns {"first", "whole": seconds of a call for one token and for all, "megabytes", "rows": the ids}.
    """
    cfg, scratch = Config(**keys), Path(folder)
    device = torch.device(cfg.device)
    prompts = json.loads((scratch / "prompts.json").read_text(encoding="utf-8"))[:batch]
    import transformers  # noqa: F401  (every arm loads every package, so that memory compares)
    with contextlib.suppress(ImportError):
        import xllamacpp  # noqa: F401
    before = status_megabytes("VmRSS")
    write = make_writer(cfg, arm, scratch, batch)
    rows = write(prompts, cfg.max_new_tokens)
    seconds: dict[int, list[float]] = {1: [], cfg.max_new_tokens: []}
    for length in [*seconds] * REPEATS:
        begin = now(device)
        write(prompts, length)
        seconds[length].append(now(device) - begin)
    first, whole = (statistics.median(values) for values in seconds.values())
    used = status_megabytes("VmHWM") - before
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device) / 1e6
    return {"first": first, "whole": whole, "megabytes": used, "rows": rows}


# ---- Perplexity -------------------------------------------------------------------------------------------

def text_ids(path: str, tokenizer: Tokenizer) -> np.ndarray:
    """int64 ids of a text file or of a data folder's validation shards.

    Raises UserError if the ids of the folder are other tokens than the model's.
    """
    if not Path(path).is_dir():
        return np.array(tokenizer.encode(Path(path).read_text(encoding="utf-8")), dtype=np.int64)
    folder = DataFolder(path)
    if not Tokenizer.load(folder.folder).hf.get_vocab().items() <= tokenizer.hf.get_vocab().items():
        raise UserError(f"text={path}: its ids are other tokens than the model's; give a text file")
    return np.concatenate(folder.shards["val"]).astype(np.int64)


def windows(cfg: Config, tokenizer: Tokenizer, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (n, T) of consecutive windows of the text. UserError if the text is too short."""
    ids = text_ids(cfg.text, tokenizer)
    n = min(cfg.eval_tokens // T, (len(ids) - 1) // T)
    if n < max(cfg.sizes):
        raise UserError(f"text={cfg.text}, eval_tokens={cfg.eval_tokens}: has {n} windows of {T} tokens, but "
                        f"batch_sizes={cfg.batch_sizes} needs {max(cfg.sizes)}")
    return ids[:n * T].reshape(n, T), ids[1:n * T + 1].reshape(n, T)


@torch.no_grad()
def perplexity(model: GPT, inputs: np.ndarray, targets: np.ndarray) -> float:
    """Perplexity of our model; each row of inputs (n, T) is a text that predicts its targets (n, T)."""
    batches = (torch.from_numpy(ids).to(model.head_weight.device).split(16) for ids in (inputs, targets))
    total = 0.0
    for x, y in zip(*batches, strict=True):
        total += F.cross_entropy(model(x).double().flatten(0, 1), y.flatten(), reduction="sum").item()
    return math.exp(total / targets.size)


def measure_format(cfg: Config, folder: Path, inputs: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """{"format", "bytes", "perplexity", "llama_cpp": perplexity by llama.cpp} of an exported folder."""
    model, gguf, theirs = GPT.from_pretrained(folder, cfg.device).eval(), hf.gguf_of(folder), None
    if gguf and llama_cpp.has_logits():
        theirs = math.exp(llama_cpp.mean_loss(gguf, inputs, targets, cfg.threads))
    return {"format": folder.name, "bytes": (gguf or folder / "model.safetensors").stat().st_size,
            "perplexity": perplexity(model, inputs, targets), "llama_cpp": theirs}


# ---- The comparison ---------------------------------------------------------------------------------------

def measure(cfg: Config) -> dict[str, Any]:
    """Export, check, and measure each arm in turn. UserError if the arms do not generate the same."""
    source = hf.find_folder(cfg.model)
    model, tokenizer = GPT.from_pretrained(source), Tokenizer.load(source)
    T = model.config.block_size
    if cfg.prompt_tokens + cfg.max_new_tokens > T:
        raise UserError(f"prompt_tokens={cfg.prompt_tokens}, max_new_tokens={cfg.max_new_tokens}: do not fit "
                        f"the context of {T}")
    inputs, targets = windows(cfg, tokenizer, T)
    arms, notes = ["ours", "transformers"], []
    if llama_cpp.has_server():
        arms += [f"llama.cpp {kind}" for kind in cfg.quantize.split(",")]
    else:
        notes.append("llama.cpp is left out: pip install xllamacpp")
    if not llama_cpp.has_logits():
        notes.append("llama.cpp's perplexity is left out: llama-cpp-python is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        for name, argv in cfg.formats.items():
            with contextlib.redirect_stdout(io.StringIO()):
                export.main([f"--model={source}", f"--out={scratch}/{name}", *argv])
        prompts = inputs[:max(cfg.sizes), :cfg.prompt_tokens].tolist()
        (Path(scratch) / "prompts.json").write_text(json.dumps(prompts))
        formats = [measure_format(cfg, Path(scratch) / name, inputs, targets) for name in cfg.formats]
        runs = {batch: children_in_turns(run_arm, arms, scratch, batch, asdict(cfg), rounds=cfg.rounds,
                                         threads=cfg.threads) for batch in cfg.sizes}
    ends = tokenizer.end_ids if isinstance(tokenizer.end_ids, list) else [tokenizer.end_ids]
    return {"sizes": asdict(cfg), "parameters": model.num_parameters(), "perplexity_tokens": targets.size,
            "formats": formats, "notes": notes,
            "checks": {str(batch): check(arms, set(ends)) for batch, arms in runs.items()},
            "arms": [summarize(cfg, name, batch, rounds) for batch, arms in runs.items()
                     for name, rounds in arms.items()]}


def check(arms: dict[str, list[dict[str, Any]]], ends: set[int]) -> dict[str, int]:
    """The number of tokens at which each exact arm equals ours. UserError if an arm differs."""
    ours, counts = arms["ours"][0]["rows"], {}
    for name in {"transformers", "llama.cpp f32"} & arms.keys():
        counts[name] = 0
        for row, (mine, theirs) in enumerate(zip(ours, arms[name][0]["rows"], strict=True)):
            length = next((place for place, token in enumerate(mine) if token in ends), len(mine))
            if mine[:length] != theirs[:length]:
                raise UserError(f"{name}: generates other tokens than ours in row {row}")
            counts[name] += length
    return counts


def summarize(cfg: Config, arm: str, batch: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """An arm's entry in the JSON: medians over the rounds, and the values of each round."""
    first = statistics.median(run["first"] for run in runs)
    rest = statistics.median(run["whole"] - run["first"] for run in runs)
    return {"arm": arm, "batch_size": batch, "first_token_seconds": first,
            "prompt_tokens_per_second": batch * cfg.prompt_tokens / first,
            "decoded_tokens_per_second": batch * (cfg.max_new_tokens - 1) / rest,
            "megabytes": statistics.median(run["megabytes"] for run in runs),
            "rounds": [{key: run[key] for key in ("first", "whole", "megabytes")} for run in runs]}


def report(results: dict[str, Any]) -> str:
    """One line per arm and batch size, then one line per format."""
    speed = {(arm["arm"], arm["batch_size"]): arm["decoded_tokens_per_second"] for arm in results["arms"]}
    arms = [[arm["arm"], str(arm["batch_size"]), f"{arm['prompt_tokens_per_second']:,.0f}",
             f"{arm['decoded_tokens_per_second']:,.0f}",
             f"{arm['decoded_tokens_per_second'] / speed['transformers', arm['batch_size']]:.2f}",
             f"{1e3 * arm['first_token_seconds']:,.1f} ms", f"{arm['megabytes']:,.0f}"]
            for arm in results["arms"]]
    full = results["formats"][0]

    def perplexity_cells(value: float | None) -> list[str]:
        return [f"{value:.4f}", f"{value / full['perplexity'] - 1:+.3%}"] if value else ["", ""]

    formats = [[each["format"], f"{each['bytes']:,}", f"{each['bytes'] / full['bytes']:.3f}",
                *perplexity_cells(each["perplexity"]), *perplexity_cells(each["llama_cpp"])]
               for each in results["formats"]]
    arm_headers = ["arm", "batch", "prompt tok/s", "decode tok/s", "x transformers", "first token", "MB"]
    format_headers = ["format", "bytes", "of float32", "perplexity", "", "by llama.cpp", ""]
    return "\n".join([text_table(arm_headers, arms), "", text_table(format_headers, formats),
                      *results["notes"]])
