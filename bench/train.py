"""One optimizer step: ours compared with nanoGPT's and a plain transformers step, at equal parameters.

    python -m bench train --nanogpt=../nanoGPT                     # nanoGPT's README size for a CPU
    python -m bench train --nanogpt=../nanoGPT --compile=True
    python -m bench train --nanogpt=../nanoGPT --device=cuda --size=124m --batch_size=12
    python -m bench train --device=cuda --size=1.1b --arms="bfloat16, compiled"

Our step calls the functions of loop.py that a run calls, with prefetched rows of a data folder. nanoGPT's
step is that of its train.py (get_batch, clipping, AdamW, zero_grad), plus autocast in bfloat16 on a CPU,
where its train.py has none. The transformers step is what a user would write: logits, cross_entropy,
clip_grad_norm_, AdamW. First checks on one batch: our GPT-2 settings with nanoGPT's weights have its loss
(with GPT-2's GELU), and transformers has our loss from the folder we save.

"of peak" is model FLOPs (`GPT.flops_per_token`) per second, relative to the fastest matrix product of this
run at the model's own shapes. On a GPU, float32 is without TF32 for all arms. Left out: gradient accumulation
and several processes.
"""

import contextlib
import copy
import functools
import io
import itertools
import re
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import peers
from bench.machine import matmul_arms, matmul_peak
from bench.measure import baselines, row, start, time_in_turns, timing_table
from bench.peers import ModelConfig, count_parameters, nanogpt_batch, require_close
from configurator import UserError
from loop import TrainState, enter_stage, next_batches, prefetch, train_step
from modeling.devices import DTYPES, emulates_bfloat16
from prepare import PrepareConfig, prepare
from train import TrainConfig, batches_at, next_token_loss
from training.run import Run
from training.staged_data import StagedData

KINDS = ("nanoGPT", "transformers", "our Llama", "our Llama, Muon", "our GPT-2")
RATE, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0  # nanoGPT's README run; the same for all arms


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    dtype: Literal["float32", "bfloat16", "both"] | None = None  # None: both on the CPU, bfloat16 on cuda
    document_mask: bool = False  # our runs attend within documents (FlexAttention on a GPU)
    arms: str = ""  # time only the arms whose name matches this regular expression


# ---- Models and data --------------------------------------------------------------------------------------

class Setup:
    """The models of one size, their data, and the settings that all arms share."""

    def __init__(self, cfg: Config, device: torch.device, scratch: Path):
        self.cfg, self.device, self.scratch = cfg, device, scratch
        self.shape, self.batch_size = cfg.shape(), cfg.sizes()["batch_size"]
        self.models, self.notes = peers.make_models(cfg)  # on the CPU
        self.data = tiny_data(scratch / "data", self.shape.vocab_size)

    def model(self, name: str) -> Any:
        """A copy of a model on the device."""
        return copy.deepcopy(self.models[name]).to(self.device)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the peers, (B, T) each."""
        return nanogpt_batch(self.data / "train_00000.bin", self.batch_size, self.shape.block_size,
                             self.device)

    def train_config(self, optimizer: str, dtype: str = "float32") -> TrainConfig:
        """Our run at this size: one micro-batch per step, and the optimizer settings of the peers."""
        return TrainConfig(dataset=str(self.data), block_size=self.shape.block_size, optimizer=optimizer,
                           dtype=dtype, global_batch_size=self.batch_size,
                           micro_batch_size=self.batch_size, learning_rate=RATE, schedule="constant",
                           warmup_steps=0, max_steps=10**6, lr_multipliers={}, weight_decay=WEIGHT_DECAY,
                           beta1=BETAS[0], beta2=BETAS[1], grad_clip=CLIP,
                           document_mask=self.cfg.document_mask)

    def flops(self, name: str) -> float:
        """Model FLOPs per step of one of our models. With document_mask, a token attends to its document."""
        cfg, T = self.train_config("adamw"), self.shape.block_size
        context = batches_at(StagedData(cfg), 0)[0]["context"] if cfg.document_mask else T
        return self.models[name].flops_per_token(context) * self.batch_size * T

    def products(self) -> set[tuple[int, int, int]]:
        """The matrix products of a forward pass of our Llama, (rows, in, out)."""
        matrices = [p for p in self.models["our Llama"].parameters() if p.ndim == 2]
        return {(self.batch_size * self.shape.block_size, p.shape[1], p.shape[0]) for p in matrices}


def tiny_data(out: Path, vocab_size: int) -> Path:
    """A data folder of two packages of the standard library, about 0.7 MB of text.

    If the model has fewer ids than a byte-level tokenizer needs (257), the ids are taken modulo that number:
    the cost of a step depends on the number of ids, not on their meaning.
    """
    source = ",".join(f"{sysconfig.get_paths()['stdlib']}/{name}" for name in ("email", "asyncio"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare(PrepareConfig(source=source, out=str(out), vocab_size=max(257, min(vocab_size, 4096)),
                              num_proc=1))
    for path in out.glob("*.bin"):
        ids = np.memmap(path, dtype=np.uint16, mode="r+")
        ids %= vocab_size
    return out


# ---- Losses and checks -----------------------------------------------------------------------------------

def nanogpt_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x, y)[1]


def plain_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of a transformers model, from its logits."""
    logits = model(input_ids=x, use_cache=False).logits  # (B, T, V)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1))


PEER_LOSSES = {"nanoGPT": nanogpt_loss, "transformers": plain_loss}


@torch.no_grad()
def check(setup: Setup) -> dict[str, Any]:
    """Losses of both sides for the JSON. UserError if a loss or the number of parameters differs."""
    torch.manual_seed(0)  # for the batch
    x, y = setup.batch()

    def compare(what: str, name: str, theirs: Tensor) -> dict[str, float]:
        batch = {"input_ids": x, "targets": y}
        loss_sum = next_token_loss(setup.model(name), batch, setup.shape.vocab_size)[0]
        return require_close(what, loss_sum.item() / y.numel(), theirs.item())

    checks = {}
    if "nanoGPT" in setup.models:
        ours, theirs = (count_parameters(setup.models[name]) for name in ("our Llama", "nanoGPT"))
        if abs(ours - theirs) > 0.01 * theirs:
            raise UserError(f"parameters: ours has {ours:,}, nanoGPT {theirs:,}; try another n_embd")
        peer = setup.model("nanoGPT")
        with peers.tanh_gelu(peer):
            loss = nanogpt_loss(peer, x, y)
        checks["loss of nanoGPT's weights"] = compare("loss of nanoGPT's weights", "our GPT-2", loss)
    if "transformers" in setup.models:
        loss = plain_loss(setup.model("transformers"), x, y)
        checks["loss of our weights"] = compare("transformers' loss of our weights", "our Llama", loss)
    return checks


# ---- Arms -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Arm:
    """One way to take a step."""

    step: Callable[[], Any]
    dtype: str
    parameters: int
    flops: float  # model FLOPs per step


def our_step(state: TrainState) -> Callable[[], None]:
    """A function that takes the next step of a run, without logging, saving and evaluation."""
    batches = functools.partial(batches_at, StagedData(state.cfg))
    loss_fn = functools.partial(next_token_loss, vocab_size=state.model.config.vocab_size)
    pool = ThreadPoolExecutor(1)
    upcoming = [prefetch(pool, batches, 0, state.total)]

    def step() -> None:  # the same calls as in loop.train
        data = next_batches(upcoming.pop(), state.run)
        upcoming.append(prefetch(pool, batches, state.progress.step + 1, state.total))
        train_step(state, data, loss_fn)

    return step


def peer_step(setup: Setup, name: str, model: nn.Module, dtype: str,
              compiled: bool) -> Callable[[], None]:
    """A function that takes one step of nanoGPT or of transformers."""
    if name == "nanoGPT":
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer = model.configure_optimizers(WEIGHT_DECAY, RATE, BETAS, setup.device.type)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    called = torch.compile(model) if compiled else model
    amp = torch.autocast(setup.device.type, DTYPES[dtype], enabled=dtype != "float32")
    batches = [setup.batch()]

    def step() -> None:
        x, y = batches.pop()
        with amp:
            loss = PEER_LOSSES[name](called, x, y)
        batches.append(setup.batch())  # fetched while a GPU computes, as in nanoGPT's train.py
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_arm(setup: Setup, kind: str, dtype: str, compiled: bool) -> Arm:
    """The arm of one of KINDS: the name of a model, and of an optimizer other than AdamW."""
    name = kind.removesuffix(", Muon")
    model = setup.model(name).train()
    if name in PEER_LOSSES:
        step = peer_step(setup, name, model, dtype, compiled)
        return Arm(step, dtype, count_parameters(model), setup.flops(peers.TWINS[name]))
    if compiled:
        for block in model.model["layers"]:
            block.compile()  # as loop.place does
    train_cfg = setup.train_config("adamw" if kind == name else "muon", dtype)
    state = TrainState(train_cfg, model, Run(setup.scratch, setup.device))
    enter_stage(state)
    return Arm(our_step(state), dtype, count_parameters(model), setup.flops(name))


def make_arms(setup: Setup) -> dict[str, Arm]:
    """The arms that match --arms: eager ones before compiled ones, float32 before bfloat16."""
    cfg, on_gpu = setup.cfg, setup.device.type == "cuda"
    default = ["bfloat16"] if on_gpu else ["float32", "bfloat16"]
    dtypes = {None: default, "both": ["float32", "bfloat16"]}.get(cfg.dtype, [cfg.dtype])
    if "bfloat16" in dtypes and emulates_bfloat16(setup.device):
        setup.notes.append("this CPU has no bfloat16 units, so the bfloat16 results are of an emulation")
    if on_gpu and "float32" not in dtypes:
        torch.set_float32_matmul_precision("high")  # after the checks; both train.py files set it, too
    torch._dynamo.config.recompile_limit = 64  # the arms share code, and each one compiles it again
    kinds = [kind for kind in KINDS if kind.removesuffix(", Muon") in setup.models]
    suffixes = ("", ", compiled") if cfg.compiles(setup.device) else ("",)
    arms = {}
    for suffix, dtype, kind in itertools.product(suffixes, dtypes, kinds):
        if re.search(cfg.arms, name := f"{kind}, {dtype}{suffix}"):
            arms[name] = make_arm(setup, kind, dtype, bool(suffix))
    if not arms:
        raise UserError(f"arms={cfg.arms}: matches the name of no arm")
    return arms


# ---- The comparison ---------------------------------------------------------------------------------------

def measure(cfg: Config) -> dict[str, Any]:
    """Check, then time every arm. UserError if a check fails or no arm is left."""
    device = start(cfg)[0]
    with tempfile.TemporaryDirectory() as scratch:
        setup = Setup(cfg, device, Path(scratch))
        checks, arms = check(setup), make_arms(setup)
        dtypes = sorted({arm.dtype for arm in arms.values()})
        limits = {}
        for dtype in dtypes:
            limits |= matmul_arms(setup.products(), dtype, device)
        timings = time_in_turns({name: arm.step for name, arm in arms.items()} | limits, cfg.rounds, device,
                                cfg.seconds)
    peak = {dtype: matmul_peak(timings, dtype) for dtype in dtypes}
    relative_to = baselines(timings, "nanoGPT", "transformers")
    rows = [row(name, arm.dtype, timings[name], relative_to,
                arm.flops / timings[name].median / peak[arm.dtype], parameters=arm.parameters,
                flops=arm.flops, compiled="compiled" in name) for name, arm in arms.items()]
    return {"sizes": cfg.sizes(), "checks": checks, "peak_flops": peak, "notes": setup.notes, "arms": rows}


def report(results: dict[str, Any]) -> str:
    """The table, the numbers of parameters, and the peaks."""
    notes = [f"fastest matrix product, {dtype}: {flops / 1e9:,.1f} GFLOP/s"
             for dtype, flops in results["peak_flops"].items()]
    counts = {arm["arm"].split(",")[0]: arm["parameters"] for arm in results["arms"]}
    notes.append("parameters: " + "; ".join(f"{name} {count:,}" for name, count in counts.items()))
    return timing_table(results["arms"], "ms per step", lambda seconds: 1e3 * seconds,
                        notes + results["notes"])
