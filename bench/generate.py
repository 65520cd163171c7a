"""Greedy generation: our models compared with nanoGPT's and transformers' (each about 4 M parameters).

    python -m bench generate --nanogpt=../nanoGPT
    python -m bench generate --nanogpt=../nanoGPT --batch_size=16 --compile=True
    python -m bench generate --device=cuda --size=124m --batch_size=1
    python -m bench generate --model=out/smollm2 --batch_size=1 --prompt_tokens=64 --max_new_tokens=24

One call reads the prompts and generates max_new_tokens for each. First checks, in float32: transformers
generates our tokens from the folder we save, and nanoGPT (with GPT-2's GELU) generates the tokens of our
GPT-2 settings with its weights. The weights are random, and larger than a new model's so that the tokens
vary. With --model, a real model is compared with transformers alone.

"of peak" is the time of multiplying each of the model's matrices once by batch_size vectors (GEMV), relative
to the time of a token. Left out: sampling, and compiled peers.
"""

import copy
import functools
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench import peers
from bench.machine import copy_arm, gemv_arm
from bench.measure import baselines, row, start, time_in_turns, timing_table
from bench.peers import ModelConfig, count_parameters, require_equal_tokens
from configurator import UserError
from formats import hf
from generation.generate import Sampling, generate
from model import GPT
from modeling.devices import DTYPES

COMPILED = "our Llama, compiled"
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
    V, B = models["our Llama"].config.vocab_size, cfg.sizes()["batch_size"]
    prompts = torch.randint(V, (B, cfg.prompt_tokens), generator=torch.Generator().manual_seed(0)).to(device)
    checks = check(models, prompts, cfg.max_new_tokens)
    arms = {name: functools.partial(generate_tokens, name, model.to(DTYPES[dtype]), prompts,
                                    cfg.max_new_tokens) for name, model in models.items()}
    arms["gemv"] = gemv_arm(models["our Llama"], B)
    arms["copy"], copied = copy_arm(device)
    timings = time_in_turns(arms, cfg.rounds, device, cfg.seconds)
    gemv, copying = (min(timings[limit].seconds) for limit in ("gemv", "copy"))
    relative_to = baselines(timings, "nanoGPT", "transformers")
    rows = [row(name, dtype, timings[name], relative_to, cfg.max_new_tokens * gemv / timings[name].median,
                parameters=count_parameters(model)) for name, model in models.items()]
    return {"tokens_per_call": B * cfg.max_new_tokens, "batch_size": B,
            "checks": checks, "gemv_seconds_per_step": gemv,
            "weight_bytes": models["our Llama"].num_parameters() * DTYPES[dtype].itemsize,
            "copy_bytes_per_second": copied / copying, "notes": notes, "arms": rows}


def report(results: dict[str, Any]) -> str:
    """Tokens per second of all rows together, and the limits set by matrix products and by memory."""
    tokens, rows = results["tokens_per_call"], results["batch_size"]
    bandwidth = results["copy_bytes_per_second"]
    notes = [f"limits: {rows / results['gemv_seconds_per_step']:,.0f} tokens/s by matrix-vector products, "
             f"{rows * bandwidth / results['weight_bytes']:,.0f} by reading the weights at the "
             f"{bandwidth / 1e9:,.1f} GB/s of a copy",
             "parameters: " + "; ".join(f"{arm['arm']} {arm['parameters']:,}" for arm in results["arms"])]
    if COMPILED in results["checks"]:
        seconds = results["checks"][COMPILED]["first_call_seconds"]
        notes.append(f"{COMPILED}: the first call took {seconds:.0f} s (less with a filled compiler cache)")
    return timing_table(results["arms"], f"tokens/s, batch {rows}", lambda seconds: tokens / seconds,
                        notes + results["notes"])
