"""One optimizer step: ours beside nanoGPT's and a plain transformers training step, at equal parameters.

    python -m bench train --nanogpt=../nanoGPT                     # nanoGPT's README size for a CPU
    python -m bench train --nanogpt=../nanoGPT --compile=True
    python -m bench train --nanogpt=../nanoGPT --device=cuda --size=124m --batch_size=12
    python -m bench train --device=cuda --size=1.1b --arms="bfloat16, compiled"

Ours is what `fit` does in a step, with its own functions: rows of a data folder, prefetched; loop.backward,
loop.update, make_optimizers. nanoGPT's is that of its train.py (get_batch, clip, AdamW, zero_grad), with
autocast where its train.py has none (bfloat16 on a CPU). transformers' is what a user writes: logits,
cross_entropy, clip_grad_norm_, AdamW. Checked first: on one batch our GPT-2 settings with nanoGPT's weights
give its loss (with GPT-2's GELU), and transformers gives ours from the folder we save.

"of peak" is model FLOPs (`GPT.flops_per_token`) a second, beside the best matrix product of this run at the
model's own shapes. float32 on a GPU is without TF32, for all. Left out: accumulation and many processes.
"""

import contextlib
import copy
import io
import re
import sysconfig
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bench import peers
from bench.measure import (
    PeerConfig,
    baselines,
    interleaved,
    matmul_arms,
    matmul_peak,
    milliseconds,
    row,
    start,
    table,
)
from bench.peers import Shape, llama_config, nanogpt_batch, require_close
from configurator import UserError
from loop import DTYPES, backward, pinned, update
from model import GPT
from modeling.devices import emulates_bfloat16
from prepare import PrepareConfig, prepare
from train import TrainConfig, batches_at, next_token_loss
from training.metrics import Meter
from training.optim import learning_rate_at, make_optimizers, set_learning_rate
from training.run import Run
from training.staged_data import StagedData

SIZES = {  # nanoGPT's README for a CPU; GPT-2; config/train_nanollama_1b.py
    "readme": dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, batch_size=12),
    "124m": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, batch_size=12),
    "1.1b": dict(n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, block_size=4096, vocab_size=32000,
                 intermediate_size=5632, tie_embeddings=False, batch_size=4)}


RATE, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0  # of nanoGPT's README run; for all arms


@dataclass(frozen=True, kw_only=True)
class Config(PeerConfig):
    dtype: Literal["float32", "bfloat16", "both"] | None = None  # None: both on the CPU, bfloat16 on cuda
    size: Literal["readme", "124m", "1.1b"] = "readme"  # the defaults of the next nine keys
    n_layer: int | None = None  # blocks
    n_head: int | None = None  # query heads
    n_kv_head: int | None = None  # key and value heads; fewer than n_head leave nanoGPT out
    n_embd: int | None = None  # width
    block_size: int | None = None  # tokens of a row
    vocab_size: int | None = None  # token ids
    intermediate_size: int | None = None  # width of our MLP; None: that of equal parameters
    tie_embeddings: bool | None = None  # one table for input and output; False leaves nanoGPT out
    batch_size: int | None = None  # rows of a step
    compile: bool | None = None  # also the compiled arms; None: on cuda
    arms: str = ""  # only arms in whose name this regular expression is found

    def sizes(self) -> dict[str, Any]:
        """The sizes, given or the default ones."""
        names = {each.name for each in fields(Shape)} | {"batch_size"}
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return SIZES[self.size] | given


@dataclass(frozen=True)
class Arm:
    """One way to take a step."""

    step: Callable[[], Any]
    dtype: str
    parameters: int
    flops: float  # of the model, a step


def measure(cfg: Config) -> dict[str, Any]:
    """Check, then time every arm. UserError where a check fails or no arm is left."""
    device = start(cfg)[0]
    with tempfile.TemporaryDirectory() as scratch:
        bench = StepBench(cfg, device, Path(scratch))
        checks = bench.check()
        arms = bench.arms()
        dtypes = sorted({arm.dtype for arm in arms.values()})
        limits = {}
        for dtype in dtypes:
            limits |= matmul_arms(bench.products(), dtype, device)
        timings = interleaved({name: arm.step for name, arm in arms.items()} | limits, cfg.rounds, device,
                              cfg.seconds)
    peak = {dtype: matmul_peak(timings, dtype) for dtype in dtypes}
    beside = baselines(timings, "nanoGPT", "transformers")
    rows = [row(name, arm.dtype, timings[name], beside,
                arm.flops / timings[name].median / peak[arm.dtype], parameters=arm.parameters,
                flops=arm.flops, compiled="compiled" in name) for name, arm in arms.items()]
    return {"sizes": cfg.sizes(), "checks": checks, "peak_flops": peak, "notes": bench.notes, "arms": rows}


def report(figures: dict[str, Any]) -> str:
    """The table, the numbers of parameters, and the peaks."""
    notes = [f"best matrix product, {dtype}: {flops / 1e9:,.1f} GFLOP/s"
             for dtype, flops in figures["peak_flops"].items()]
    counts = {each["arm"].split(",")[0]: each["parameters"] for each in figures["arms"]}
    notes.append("parameters: " + "; ".join(f"{name} {count:,}" for name, count in counts.items()))
    return table(figures["arms"], "ms a step", milliseconds, notes + figures["notes"])


class StepBench:
    """The models of one size, their data, and their steps."""

    def __init__(self, cfg: Config, device: torch.device, scratch: Path):
        self.cfg, self.device, self.scratch = cfg, device, scratch
        sizes = cfg.sizes()
        self.batch_size = sizes.pop("batch_size")
        self.shape = Shape(**sizes)
        self.notes: list[str] = []
        self.llama = GPT(llama_config(self.shape))
        self.nanogpt = peers.load_nanogpt(cfg.nanogpt)
        if self.nanogpt is None:
            self.notes.append("nanoGPT is left out: --nanogpt=DIR names its folder")
        elif not self.shape.has_twin:
            self.notes.append("nanoGPT is left out: it has no grouped heads, untied tables or other MLPs")
            self.nanogpt = None
        self.data = tiny_data(scratch / "data", self.shape.vocab_size)

    def products(self) -> set[tuple[int, int, int]]:
        """The matrix products of a forward pass of our Llama, (rows, in, out)."""
        matrices = [p for p in self.llama.parameters() if p.ndim == 2]
        return {(self.batch_size * self.shape.block_size, p.shape[1], p.shape[0]) for p in matrices}

    # ---- Checks

    def check(self) -> dict[str, Any]:
        """The same losses and about as many parameters on both sides, or UserError; figures for the JSON."""
        torch.manual_seed(0)  # of the batch
        x, y = self.nanogpt_batch()
        checks = {}
        if self.nanogpt:
            peer = peers.nanogpt_model(self.nanogpt, self.shape)
            counts = self.llama.num_parameters(), sum(p.numel() for p in peer.parameters())
            if abs(counts[0] - counts[1]) > 0.01 * counts[1]:
                raise UserError(f"parameters: ours {counts[0]:,}, nanoGPT {counts[1]:,}: give another n_embd")
            ours = peers.gpt2_twin(peer, self.shape).to(self.device)
            with torch.no_grad(), peers.tanh_gelu(peer):
                theirs = peer.to(self.device)(x, y)[1].item()
            checks["loss of nanoGPT's weights"] = require_close("loss of nanoGPT's weights",
                                                                self.loss_of(ours, x, y), theirs)
        peer = self.transformers_model()
        with torch.no_grad():
            theirs = plain_loss(peer, x, y).item()
        ours = copy.deepcopy(self.llama).to(self.device)
        checks["loss of our weights"] = require_close("transformers' loss of our weights",
                                                      self.loss_of(ours, x, y), theirs)
        return checks

    @torch.no_grad()
    def loss_of(self, model: GPT, x: torch.Tensor, y: torch.Tensor) -> float:
        batch = {"input_ids": x, "targets": y}
        return next_token_loss(model, batch, self.shape.vocab_size)[0].item() / y.numel()

    # ---- Arms

    def arms(self) -> dict[str, Arm]:
        """Every arm that --arms asks for, eager ones before compiled ones, float32 before bfloat16."""
        cfg, on_gpu = self.cfg, self.device.type == "cuda"
        dtypes = {None: ["bfloat16"] if on_gpu else ["float32", "bfloat16"],
                  "both": ["float32", "bfloat16"]}.get(cfg.dtype, [cfg.dtype])
        if "bfloat16" in dtypes and emulates_bfloat16(self.device):
            self.notes.append("this CPU has no bfloat16 units: those figures are of their emulation")
        if on_gpu and "float32" not in dtypes:
            torch.set_float32_matmul_precision("high")  # after the checks; both train.py files set it, too
        torch._dynamo.config.recompile_limit = 64  # the arms share code, and each compiles it for itself
        arms = {}
        for compiled in (False, True) if cfg.compile or (cfg.compile is None and on_gpu) else (False,):
            for dtype in dtypes:
                for kind, build in self.kinds().items():
                    name = f"{kind}, {dtype}" + ", compiled" * compiled
                    if re.search(cfg.arms, name):
                        arms[name] = build(dtype, compiled)
        if not arms:
            raise UserError(f"arms={cfg.arms}: no arm has such a name")
        return arms

    def kinds(self) -> dict[str, Callable[[str, bool], Arm]]:
        """{name: what builds the arm from (dtype, compiled)}."""
        kinds = {"nanoGPT": self.nanogpt_arm} if self.nanogpt else {}
        kinds["transformers"] = self.transformers_arm
        kinds["our Llama"] = lambda *args: self.our_arm(self.llama, "adamw", *args)
        kinds["our Llama, Muon"] = lambda *args: self.our_arm(self.llama, "muon", *args)
        if self.shape.has_twin:
            kinds["our GPT-2"] = lambda *args: self.our_arm(self.gpt2(), "adamw", *args)
        return kinds

    def our_arm(self, model: GPT, optimizer: str, dtype: str, compiled: bool) -> Arm:
        model = copy.deepcopy(model).to(self.device).train()
        if compiled:
            for block in model.model["layers"]:
                block.compile()  # as loop.place does
        step = OurStep(model, self.train_config(optimizer), Run(self.scratch, self.device), dtype)
        return Arm(step, dtype, model.num_parameters(), self.flops(model))

    def nanogpt_arm(self, dtype: str, compiled: bool) -> Arm:
        model = peers.nanogpt_model(self.nanogpt, self.shape).to(self.device).train()
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer = model.configure_optimizers(WEIGHT_DECAY, RATE, BETAS, self.device.type)
        called = torch.compile(model) if compiled else model
        amp = self.autocast(dtype)
        batches = [self.nanogpt_batch()]  # as there, fetched ahead of the step that uses it

        def step() -> None:
            for group in optimizer.param_groups:
                group["lr"] = RATE
            x, y = batches.pop()
            with amp:
                _, loss = called(x, y)
            batches.append(self.nanogpt_batch())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        count = sum(parameter.numel() for parameter in model.parameters())
        return Arm(step, dtype, count, self.flops(self.gpt2()))

    def transformers_arm(self, dtype: str, compiled: bool) -> Arm:
        model = self.transformers_model().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        called = torch.compile(model) if compiled else model
        amp = self.autocast(dtype)

        def step() -> None:
            x, y = self.nanogpt_batch()
            with amp:
                loss = plain_loss(called, x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()

        return Arm(step, dtype, model.num_parameters(), self.flops(self.llama))

    # ---- What the arms share

    def gpt2(self) -> GPT:
        """Our class in GPT-2's settings, with nanoGPT's weights where it is at hand."""
        peer = peers.nanogpt_model(self.nanogpt, self.shape) if self.nanogpt else None
        return peers.gpt2_twin(peer, self.shape)

    def transformers_model(self) -> nn.Module:
        return peers.transformers_twin(self.llama, self.scratch / "llama", self.device)

    def nanogpt_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return nanogpt_batch(self.data / "train_00000.bin", self.batch_size, self.shape.block_size,
                             self.device)

    def autocast(self, dtype: str) -> Any:
        return torch.autocast(self.device.type, DTYPES[dtype], enabled=dtype != "float32")

    def train_config(self, optimizer: str) -> TrainConfig:
        """Our run at this size: one micro-batch, and the rates that the peers have."""
        return TrainConfig(dataset=str(self.data), block_size=self.shape.block_size, optimizer=optimizer,
                           global_batch_size=self.batch_size, micro_batch_size=self.batch_size,
                           learning_rate=RATE, schedule="constant", warmup_steps=0, max_steps=10**6,
                           lr_multipliers={}, weight_decay=WEIGHT_DECAY, beta1=BETAS[0], beta2=BETAS[1],
                           grad_clip=CLIP)

    def flops(self, model: GPT) -> float:
        """FLOPs of the model in a step."""
        T = self.shape.block_size
        return model.flops_per_token(T) * self.batch_size * T


class OurStep:
    """The body of fit's loop without logging, saving and evaluating: call it to take the next step."""

    def __init__(self, model: GPT, cfg: TrainConfig, run: Run, dtype: str):
        self.model, self.cfg, self.run, self.data = model, cfg, run, StagedData(cfg)
        self.vocab_size = model.config.vocab_size
        self.amp = torch.autocast(run.device.type, DTYPES[dtype], enabled=dtype != "float32")
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=False)
        self.meter = Meter(model, run, self.scaler)
        self.optimizers = make_optimizers(model, cfg)
        self.step, self.pool = 0, ThreadPoolExecutor(1)
        self.upcoming = self.pool.submit(batches_at, self.data, 0)

    def __call__(self) -> None:
        batches = [pinned(batch, self.run.device) for batch in self.upcoming.result()]
        self.upcoming = self.pool.submit(batches_at, self.data, self.step + 1)
        count, tokens = self.run.sum([sum(batch["count"] for batch in batches),
                                      sum(batch["input_ids"].numel() for batch in batches)])
        torch.manual_seed(zlib.crc32(f"{self.cfg.seed}/{self.step}/0".encode()))
        set_learning_rate(self.optimizers, learning_rate_at(self.cfg, self.step, self.cfg.max_steps))
        sums = backward(self.model, batches, self.loss, self.amp, self.scaler, 1 / count, self.run)
        norm = update(self.model, self.optimizers, self.scaler, self.cfg.grad_clip)
        self.meter.add(self.step, sums, count, tokens, norm)
        self.step += 1

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return next_token_loss(model, batch, self.vocab_size)


def plain_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of a transformers model, from its logits."""
    logits = model(input_ids=x, use_cache=False).logits  # (B, T, V)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1))


def tiny_data(out: Path, vocab_size: int) -> Path:
    """A data folder of two packages of the standard library, about 0.7 MB of text.

    Where the model has fewer ids than a byte-level tokenizer can (257), the folder's are taken modulo that
    number: what a step costs depends on how many there are, not on what they mean.
    """
    source = ",".join(f"{sysconfig.get_paths()['stdlib']}/{name}" for name in ("email", "asyncio"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare(PrepareConfig(source=source, out=str(out), vocab_size=max(257, min(vocab_size, 4096)),
                              num_proc=1))
    for path in out.glob("*.bin"):
        ids = np.memmap(path, dtype=np.uint16, mode="r+")
        ids %= vocab_size
    return out
