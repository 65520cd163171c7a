"""Serving a model: speed, memory, size and perplexity of what export.py makes of it.

    python -m bench serve --model=out/base
    python -m bench serve --model=out/dpo --quantize=q8_0,q4_k_m --batch_sizes=1,4,16 --rounds=5

Exports the model (folders in float32 and bfloat16, GGUF files of the types of --quantize), and lets each arm
write greedily behind the same prompts: our generate, transformers, and llama.cpp on the GGUF files, where the
package xllamacpp is installed. Every arm is a process of its own. The time to the first token is that of a
call for one token a row; prompt tokens a second are those of the prompts over that time, decoded ones those
of the rest of a longer call over the rest of its time. Time is CPU time on the CPU; memory is the peak of the
process less what it had with all packages loaded, before the model (Linux only; on a GPU, the peak of what is
allocated). Checked first: transformers, and llama.cpp with f32, write our ids, up to the first that ends a
text.

Perplexity is over windows of the whole context, of --text: a data folder's validation text, or a text file. A
GGUF file is measured twice: with its weights in our model, so in float32, and by llama.cpp, which also rounds
what it multiplies them with, where the package llama-cpp-python is installed.
"""

import contextlib
import io
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import export
from bench import llama_cpp
from bench.loss import status_megabytes
from bench.measure import BenchConfig, now
from bench.post import in_turns
from configurator import UserError, configure, require_positive
from dataset.shards import DataFolder
from formats import gguf as gguf_file
from formats import hf
from formats.tokenizer import Tokenizer
from generation.generate import Sampling, generate
from model import GPT

REPEATS = 3  # calls of a process, of which the median counts


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    model: str = "out/dpo"  # model folder or out_dir
    quantize: str = "f32,f16,q8_0,q6_k,q4_k_m"  # types of GGUF files
    batch_sizes: str = "1,16"  # prompts at a time
    prompt_tokens: int = 64  # of each prompt
    max_new_tokens: int = 64  # written behind each
    text: str = "data/pystdlib"  # data folder, whose validation text is read, or text file
    eval_tokens: int = 20_000  # of it, for perplexity
    device: str = "cpu"  # of our arm and transformers'
    threads: int = 1  # on the CPU

    def __post_init__(self) -> None:
        BenchConfig.__post_init__(self)
        sizes = self.batch_sizes.split(",")
        if not all(size.isdecimal() and int(size) for size in sizes):
            raise UserError(f"batch_sizes={self.batch_sizes}: must be whole numbers with commas between")
        require_positive(self, "prompt_tokens", "max_new_tokens", "eval_tokens", "threads")

    @property
    def sizes(self) -> list[int]:
        return [int(size) for size in self.batch_sizes.split(",")]


# ---- What a process does ----------------------------------------------------------------------------------

def work(argv: list[str]) -> int:
    """One arm in this process, its figures as JSON. argv: the arm, the scratch folder, the batch size, and
    Config's words."""
    arm, folder, batch, *words = argv
    cfg, _ = configure(Config, words)
    print(json.dumps(measured(cfg, arm, Path(folder), int(batch))))
    return 0


def measured(cfg: Config, arm: str, folder: Path, batch: int) -> dict[str, Any]:
    """{"first", "whole": seconds of a call for one token and for all, "megabytes", "rows": what it wrote}."""
    torch.set_num_threads(cfg.threads)
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))[:batch]
    device = torch.device(cfg.device)
    import transformers  # noqa: F401
    with contextlib.suppress(ImportError):
        import xllamacpp  # noqa: F401
    before = status_megabytes("VmRSS")
    write = ARMS.get(arm, llama_arm)(cfg, arm, folder, batch)
    rows = write(prompts, cfg.max_new_tokens)
    seconds: dict[int, list[float]] = {1: [], cfg.max_new_tokens: []}
    for length in [*seconds] * REPEATS:
        begin = now(device)
        write(prompts, length)
        seconds[length].append(now(device) - begin)
    first, whole = (statistics.median(each) for each in seconds.values())
    used = status_megabytes("VmHWM") - before
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device) / 1e6
    return {"first": first, "whole": whole, "megabytes": used, "rows": rows}


Writer = Callable[[list[list[int]], int], list[list[int]]]


def our_arm(cfg: Config, arm: str, folder: Path, batch: int) -> Writer:
    model = GPT.from_pretrained(folder / "float32", cfg.device).eval()

    def write(prompts: list[list[int]], length: int) -> list[list[int]]:
        steps = list(generate(model, prompts, length, Sampling(temperature=0)))
        return [list(row) for row in zip(*steps, strict=True)]

    return write


def transformers_arm(cfg: Config, arm: str, folder: Path, batch: int) -> Writer:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder / "float32", dtype=torch.float32).to(cfg.device)
    model.generation_config.eos_token_id = None  # none of the arms stops early

    def write(prompts: list[list[int]], length: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=cfg.device)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length,
                               do_sample=False, pad_token_id=0)
        return found[:, ids.shape[1]:].tolist()

    return write


def llama_arm(cfg: Config, arm: str, folder: Path, batch: int) -> Writer:
    kind = arm.rpartition(" ")[2]
    context = cfg.prompt_tokens + cfg.max_new_tokens
    server = llama_cpp.Server(folder / "gguf" / f"m-{kind}.gguf", context, batch, cfg.threads,
                              exact=kind == "f32")
    return lambda prompts, length: server.write(prompts, length, to_the_end=False)


ARMS = {"ours": our_arm, "transformers": transformers_arm}


# ---- Perplexity -------------------------------------------------------------------------------------------

def ids_of(path: str, tokenizer: Tokenizer) -> np.ndarray:
    """int64 ids of a text file, or those of a data folder's validation shards. UserError for a folder whose
    ids stand for other tokens."""
    if not Path(path).is_dir():
        return np.array(tokenizer.encode(Path(path).read_text(encoding="utf-8")), dtype=np.int64)
    folder = DataFolder(path)
    if not Tokenizer.load(folder.folder).hf.get_vocab().items() <= tokenizer.hf.get_vocab().items():
        raise UserError(f"text={path}: its ids are other tokens than the model's; give a text file")
    return np.concatenate(folder.shards["val"]).astype(np.int64)


def windows(cfg: Config, tokenizer: Tokenizer, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets (n, T) of the text, one window behind the other. UserError for too short a text."""
    ids = ids_of(cfg.text, tokenizer)
    n = min(cfg.eval_tokens // T, (len(ids) - 1) // T)
    if n < max(cfg.sizes):
        raise UserError(f"text={cfg.text}, eval_tokens={cfg.eval_tokens}: {n} windows of {T} tokens, "
                        f"{max(cfg.sizes)} are needed")
    return ids[:n * T].reshape(n, T), ids[1:n * T + 1].reshape(n, T)


@torch.no_grad()
def our_loss(model: GPT, inputs: np.ndarray, targets: np.ndarray) -> float:
    """Nats a token; each row of inputs (n, T) is a text that predicts its targets (n, T)."""
    x_y = (torch.from_numpy(ids).to(model.head_weight.device).split(16) for ids in (inputs, targets))
    total = 0.0
    for x, y in zip(*x_y, strict=True):
        total += F.cross_entropy(model(x).double().flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / targets.size


@torch.no_grad()
def with_weights(model: GPT, path: Path) -> GPT:
    """The model with the weights that a GGUF file of it holds."""
    parameters = dict(model.named_parameters())
    for name, tensor in gguf_file.read_tensors(path, model.config):
        parameters[name][:len(tensor)] = tensor
    return model


def formats(cfg: Config, folder: Path, inputs: np.ndarray, targets: np.ndarray) -> list[dict[str, Any]]:
    """{"format", "bytes", "perplexity", "llama_cpp"} of each exported file."""
    rows = []
    for name in ("float32", "bfloat16"):
        model = GPT.from_pretrained(folder / name, cfg.device).eval()
        rows.append({"format": f"hf {name}", "bytes": (folder / name / "model.safetensors").stat().st_size,
                     "perplexity": math.exp(our_loss(model, inputs, targets)), "llama_cpp": None})
    for kind in cfg.quantize.split(","):
        path = folder / "gguf" / f"m-{kind}.gguf"
        theirs = math.exp(llama_cpp.mean_loss(path, inputs, targets, cfg.threads)) if llama_cpp.has_logits() \
            else None
        rows.append({"format": f"gguf {kind}", "bytes": path.stat().st_size, "llama_cpp": theirs,
                     "perplexity": math.exp(our_loss(with_weights(model, path), inputs, targets))})
    return rows


# ---- The comparison ---------------------------------------------------------------------------------------

def measure(cfg: Config) -> dict[str, Any]:
    """Export, check, measure each arm in turn. UserError where the arms do not write the same."""
    source = hf.find_folder(cfg.model)
    model, tokenizer = GPT.from_pretrained(source), Tokenizer.load(source)
    T = model.config.block_size
    if cfg.prompt_tokens + cfg.max_new_tokens > T:
        raise UserError(f"prompt_tokens={cfg.prompt_tokens}, max_new_tokens={cfg.max_new_tokens}: do not fit "
                        f"the context of {T}")
    inputs, targets = windows(cfg, tokenizer, T)
    arms = ["ours", "transformers"]
    arms += [f"llama.cpp {kind}" for kind in cfg.quantize.split(",")] if llama_cpp.has_server() else []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with contextlib.redirect_stdout(io.StringIO()):
            for dtype in ("float32", "bfloat16"):
                export.main([f"--model={source}", f"--dtype={dtype}", f"--out={folder / dtype}"])
            export.main([f"--model={source}", "--format=gguf", f"--quantize={cfg.quantize}", "--name=m",
                         f"--out={folder / 'gguf'}"])
        (folder / "prompts.json").write_text(json.dumps(inputs[:max(cfg.sizes), :cfg.prompt_tokens].tolist()))
        files = formats(cfg, folder, inputs, targets)
        keys = ("prompt_tokens", "max_new_tokens", "device", "threads")
        served = {batch: in_turns(cfg, arms, "bench.serve", scratch, str(batch), keys=keys)
                  for batch in cfg.sizes}
    ends = set(tokenizer.end_ids if isinstance(tokenizer.end_ids, list) else [tokenizer.end_ids])
    notes = [] if llama_cpp.has_server() else ["llama.cpp is left out: pip install xllamacpp"]
    notes += [] if llama_cpp.has_logits() else ["llama.cpp's perplexity is left out: no llama-cpp-python"]
    return {"sizes": {key: getattr(cfg, key) for key in (*keys, "model", "text")},
            "parameters": model.num_parameters(), "perplexity_tokens": targets.size,
            "llama.cpp": llama_cpp.installed(),
            "checks": {str(batch): check(runs, ends) for batch, runs in served.items()}, "formats": files,
            "arms": [figures(cfg, name, batch, runs) for batch, each in served.items()
                     for name, runs in each.items()], "notes": notes}


def check(arms: dict[str, list[dict[str, Any]]], ends: set[int]) -> dict[str, int]:
    """How many tokens each exact arm wrote like ours. UserError for one that is not the same."""
    ours, counts = arms["ours"][0]["rows"], {}
    for name in {"transformers", "llama.cpp f32"} & arms.keys():
        counts[name] = 0
        for row, (mine, theirs) in enumerate(zip(ours, arms[name][0]["rows"], strict=True)):
            length = next((place for place, token in enumerate(mine) if token in ends), len(mine))
            if mine[:length] != theirs[:length]:
                raise UserError(f"{name}: row {row} is not what ours writes: nothing to compare")
            counts[name] += length
    return counts


def figures(cfg: Config, arm: str, batch: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """An arm's entry in the JSON, medians over rounds, and each round's."""
    first, rest = (statistics.median(values) for values in (
        [run["first"] for run in runs], [run["whole"] - run["first"] for run in runs]))
    return {"arm": arm, "batch_size": batch, "first_token_seconds": first,
            "prompt_tokens_per_second": batch * cfg.prompt_tokens / first,
            "decoded_tokens_per_second": batch * (cfg.max_new_tokens - 1) / rest,
            "megabytes": statistics.median(run["megabytes"] for run in runs),
            "rounds": [{key: run[key] for key in ("first", "whole", "megabytes")} for run in runs]}


def report(found: dict[str, Any]) -> str:
    """A line an arm and batch size, and a line a format."""
    lines = [f"{'arm':18} {'batch':>5} {'prompt tok/s':>13} {'decode tok/s':>13} {'x transformers':>14} "
             f"{'first token':>12} {'MB':>7}"]
    for each in found["arms"]:
        peer = next(arm for arm in found["arms"] if (arm["arm"], arm["batch_size"]) ==
                    ("transformers", each["batch_size"]))
        ratio = each["decoded_tokens_per_second"] / peer["decoded_tokens_per_second"]
        lines.append(f"{each['arm']:18} {each['batch_size']:5} {each['prompt_tokens_per_second']:13,.0f} "
                     f"{each['decoded_tokens_per_second']:13,.0f} {ratio:14.2f} "
                     f"{1e3 * each['first_token_seconds']:9,.1f} ms {each['megabytes']:7,.0f}")
    whole = found["formats"][0]
    lines += ["", f"{'format':18} {'bytes':>14} {'of float32':>11} {'perplexity':>11} {'':>9} "
                  f"{'by llama.cpp':>12}"]
    for each in found["formats"]:
        theirs = f" {each['llama_cpp']:12.4f} {each['llama_cpp'] / whole['perplexity'] - 1:+9.3%}" \
            if each["llama_cpp"] else ""
        lines.append(f"{each['format']:18} {each['bytes']:14,} {each['bytes'] / whole['bytes']:11.3f} "
                     f"{each['perplexity']:11.4f} "
                     f"{each['perplexity'] / whole['perplexity'] - 1:+9.3%}{theirs}")
    return "\n".join([*lines, *found["notes"]])
