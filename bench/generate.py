"""Greedy generation: our models compared with nanoGPT's and transformers' (each about 4 M parameters).

    python -m bench generate --nanogpt=../nanoGPT
    python -m bench generate --nanogpt=../nanoGPT --batch_size=16 --compile=True
    python -m bench generate --device=cuda --size=124m --batch_size=1
    python -m bench generate --model=out/smollm2 --batch_size=1 --prompt_tokens=64 --max_new_tokens=24

One call reads the prompts and generates max_new_tokens for each. First checks, in float32: transformers
generates our tokens from the folder we save, and nanoGPT (with GPT-2's GELU) generates the tokens of our
GPT-2 settings with its weights. The weights are random, and larger than a new model's so that the tokens
vary. With --model, a real model is compared with transformers and, if xllamacpp is installed, with llama.cpp,
which reads its matrices in float16.

"of peak" is the time of multiplying each of our model's matrices once by batch_size vectors (GEMV), relative
to the time of a token. Left out: sampling, and compiled peers.
"""

import copy
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench import llama_cpp, peers
from bench.machine import copy_arm, gemv_arm
from bench.measure import baselines, row, start, time_in_turns, timing_table
from bench.peers import ModelConfig, count_parameters, require_equal_tokens
from configurator import UserError
from formats import gguf, hf
from formats.gguf_tokenizer import vocabulary
from formats.tokenizer import Tokenizer
from generation.generate import Sampling, generate
from model import GPT
from modeling.devices import DTYPES

COMPILED, LLAMA_CPP = "our Llama, compiled", "llama.cpp"
TWINS = peers.TWINS | {COMPILED: "our Llama"}  # {arm: the model that must generate the same}


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    size: Literal["readme", "4m", "124m", "1.1b"] = "4m"  # sets the defaults of n_layer .. batch_size
    model: str | None = None  # model folder, out_dir or .gguf, instead of random weights of a size
    prompt_tokens: int = 16  # length of each prompt
    max_new_tokens: int = 256  # tokens generated per prompt

    def __post_init__(self) -> None:
        super().__post_init__()
        fields = hf.read_config(hf.find_folder(self.model)) if self.model else self.sizes()
        T = fields["block_size"]
        if self.prompt_tokens + self.max_new_tokens > T:
            raise UserError(f"block_size={T}: must be at least prompt_tokens + max_new_tokens")


def make_models(cfg: Config, device: torch.device) -> tuple[dict[str, nn.Module], list[str]]:
    """{arm: its model}, all in float32 with random weights, and notes on what is left out."""
    if cfg.model:
        ours = GPT.from_pretrained(cfg.model)
        models: dict[str, nn.Module] = {"our Llama": ours, "transformers": peers.transformers_twin(ours)}
        notes = [f"model: {cfg.model}"]
    else:
        models, notes = peers.make_models(cfg)
        models = {name: enlarge(model) for name, model in models.items()}
    models = {name: model.to(device).eval() for name, model in models.items()}
    if cfg.compiles(device):
        models[COMPILED] = copy.deepcopy(models["our Llama"])
        models[COMPILED].compiled_steps = True
    return models, notes


@torch.no_grad()
def enlarge(model: nn.Module) -> nn.Module:
    """Make the blocks' matrices four times as large: a new model with tied tables repeats a few tokens."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and (".layers." in name or ".h." in name):
            parameter *= 4
    return model


def generate_tokens(name: str, model: nn.Module, prompts: Tensor, length: int) -> list[list[int]]:
    """The greedy tokens after each prompt, (B, length), from the model's own generation code."""
    T = prompts.shape[1]
    if name == "nanoGPT":
        return model.generate(prompts, length, top_k=1)[:, T:].tolist()
    if name == "transformers":
        ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=length,
                             min_new_tokens=length, do_sample=False, pad_token_id=0)
        return ids[:, T:].tolist()
    steps = list(generate(model, prompts.tolist(), length, Sampling(temperature=0)))
    return [list(tokens) for tokens in zip(*steps, strict=True)]


@contextmanager
def llama_cpp_arms(cfg: Config, ours: GPT, prompts: Tensor) -> Iterator[dict[str, Callable]]:
    """{arm: a call that generates greedily with llama.cpp in this process}, with matrices in float16."""
    if not cfg.model or not llama_cpp.has_server():
        yield {}
        return
    tokenizer = Tokenizer.load(hf.find_folder(cfg.model))
    metadata = vocabulary(tokenizer, ours.config.vocab_size, cfg.model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f16.gguf"
        state = {name: parameter.detach() for name, parameter in ours.named_parameters()}
        gguf.write(path, ours.config, state, metadata, "f16")
        context = cfg.prompt_tokens + cfg.max_new_tokens
        with llama_cpp.Server(path, context, len(prompts), cfg.threads) as server:
            yield {LLAMA_CPP: lambda: server.write(prompts.tolist(), cfg.max_new_tokens, stop=False)}


def check(models: dict[str, nn.Module], prompts: Tensor, length: int) -> dict[str, Any]:
    """Counts of equal tokens for the JSON. UserError if a peer's tokens are not those of our model."""
    checks = {}
    for arm, twin in TWINS.items():
        if arm in models:
            begin = time.perf_counter()
            with peers.tanh_gelu(models[arm]):
                theirs = generate_tokens(arm, models[arm], prompts, length)
            seconds = time.perf_counter() - begin
            ours = generate_tokens(twin, models[twin], prompts, length)
            checks[arm] = require_equal_tokens(f"{arm}'s greedy tokens", ours, theirs) | {
                "first_call_seconds": seconds}
    return checks


def measure(cfg: Config) -> dict[str, Any]:
    """Check, then time every arm. UserError if the tokens differ."""
    device, dtype = start(cfg)
    models, notes = make_models(cfg, device)
    ours, length = models["our Llama"], cfg.max_new_tokens
    V, B = ours.config.vocab_size, cfg.sizes()["batch_size"]
    prompts = torch.randint(V, (B, cfg.prompt_tokens), generator=torch.Generator().manual_seed(0)).to(device)
    checks = check(models, prompts, length)
    with llama_cpp_arms(cfg, ours, prompts) as peer:
        arms = {name: functools.partial(generate_tokens, name, model.to(DTYPES[dtype]), prompts, length)
                for name, model in models.items()} | peer | {"gemv": gemv_arm(ours, B)}
        arms["copy"], copied = copy_arm(device)
        timings = time_in_turns(arms, cfg.rounds, device, cfg.seconds)
    gemv, copying = (min(timings[limit].seconds) for limit in ("gemv", "copy"))
    relative_to = baselines(timings, "nanoGPT", "transformers")
    dtypes = dict.fromkeys(models, dtype) | dict.fromkeys(peer, "float16")
    rows = [row(name, kind, timings[name], relative_to, length * gemv / timings[name].median,
                parameters=count_parameters(models.get(name, ours))) for name, kind in dtypes.items()]
    for arm in rows:
        arm["bytes_per_token"] = arm["parameters"] * DTYPES[arm["dtype"]].itemsize
    return {"tokens_per_call": B * length, "batch_size": B,
            "checks": checks, "gemv_seconds_per_step": gemv,
            "copy_bytes_per_second": copied / copying, "notes": notes, "arms": rows}


def report(results: dict[str, Any]) -> str:
    """Tokens per second of all rows together, and the limits set by matrix products and by memory."""
    tokens, rows = results["tokens_per_call"], results["batch_size"]
    bandwidth = results["copy_bytes_per_second"]
    reading = [f"{arm['arm']} {arm['bytes_per_token'] / 1e6:,.0f} MB, at most "
               f"{rows * bandwidth / arm['bytes_per_token']:,.0f} tokens/s, reached "
               f"{tokens / arm['median_seconds'] * arm['bytes_per_token'] / rows / bandwidth:.0%}"
               for arm in results["arms"]]
    notes = [f"limit: {rows / results['gemv_seconds_per_step']:,.0f} tokens/s by matrix-vector products",
             f"weights read per step, at the {bandwidth / 1e9:,.1f} GB/s of a copy: {'; '.join(reading)}",
             "parameters: " + "; ".join(f"{arm['arm']} {arm['parameters']:,}" for arm in results["arms"])]
    if COMPILED in results["checks"]:
        seconds = results["checks"][COMPILED]["first_call_seconds"]
        notes.append(f"{COMPILED}: the first call took {seconds:.0f} s (less with a filled compiler cache)")
    return timing_table(results["arms"], f"tokens/s, batch {rows}", lambda seconds: tokens / seconds,
                        notes + results["notes"])
