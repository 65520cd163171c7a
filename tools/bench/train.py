"""One optimizer step: ours as `fit` does it, beside nanoGPT's and a plain loop over transformers' Llama.

All have the same number of parameters (within 1 %) and the same batches; nanoGPT and transformers are fed as
their users do it. Tokens a second, and the share of the FLOP/s that this machine's matrix products reach.
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configurator import UserError
from loop import RunConfig, backward, update
from model import GPT
from parts.data import Mix, text_batch
from parts.meter import memory_gb
from parts.optim import make_optimizers, set_learning_rate
from parts.run import Run
from parts.shards import DataFolder
from prepare import PrepareConfig, prepare
from tools.bench.config import SIZES, BenchConfig
from tools.bench.machine import matmul_flops, timed
from tools.bench.peers import nanogpt_pair, our_config, transformers_twin
from train import next_token_loss

RATE = 1e-3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def small_data(folder: Path, size: str) -> Path:
    """A data folder of real text, whose ids are folded into the size's vocabulary: only speed is measured."""
    out, (*_, B, T, V) = folder / "data", SIZES[size]
    stdlib = Path(tempfile.__file__).parent
    source = f"{stdlib / 'email'},{stdlib / 'asyncio'}"
    prepare(PrepareConfig(source=source, out=str(out), vocab_size=500, num_proc=1))
    for path in out.glob("*.bin"):
        np.memmap(path, np.uint16, "r+")[:] %= V
    if len(DataFolder(out).shards["train"][0]) < 4 * (B * T + 1):
        raise UserError(f"size={size}: {stdlib} has too little text for its batches")
    return out


def our_step(model: GPT, data: Path, size: str, dtype: str, optimizer: str = "adamw") -> Callable[[], Tensor]:
    """What one turn of the training loop does, from the rows on disk to the changed weights."""
    *_, B, T, V = SIZES[size]
    device, mix, numbers = model.head_weight.device, Mix(str(data), T, seed=0), itertools.count()
    run = Run(Path("."), device)
    optimizers = make_optimizers(model, RunConfig(optimizer=optimizer))
    set_learning_rate(optimizers, RATE)
    amp = torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def step() -> Tensor:
        batch = text_batch(mix.samples(next(numbers) * B % 1000, B))
        sums = backward(model, [batch], lambda m, b: next_token_loss(m, b, V), amp, scaler, 1 / batch["count"], run)
        update(model, optimizers, scaler, 1.0)
        return sums["loss"] / batch["count"]

    return step


def nanogpt_step(model: Any, data: Path, size: str, dtype: str) -> Callable[[], Tensor]:
    """A turn of nanoGPT's loop: random rows, its own optimizer settings, clipping, gradients set to None."""
    *_, B, T, _ = SIZES[size]
    device = next(model.parameters()).device
    ids = np.memmap(data / "train_00000.bin", np.uint16, "r")
    optimizer = torch.optim.AdamW(decayed(model), lr=RATE, betas=(0.9, 0.99), fused=device.type == "cuda")
    amp = torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")

    def step() -> Tensor:
        starts = torch.randint(len(ids) - T, (B,))
        x, y = (torch.stack([torch.from_numpy(ids[i + shift:i + shift + T].astype(np.int64)) for i in starts])
                for shift in (0, 1))
        with amp:
            _, loss = model(x.to(device), y.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def transformers_step(model: Any, data: Path, size: str, dtype: str) -> Callable[[], Tensor]:
    """A plain loop as a user writes it: logits, cross-entropy, clipping, torch's default AdamW."""
    *_, B, T, V = SIZES[size]
    device, mix, numbers = next(model.parameters()).device, Mix(str(data), T, seed=0), itertools.count()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    amp = torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")

    def step() -> Tensor:
        batch = text_batch(mix.samples(next(numbers) * B % 1000, B))
        with amp:
            logits = model(batch["input_ids"].to(device), use_cache=False).logits
            loss = F.cross_entropy(logits.float().view(-1, V), batch["targets"].to(device).view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def decayed(model: Any) -> list[dict[str, Any]]:
    """nanoGPT's two groups: matrices decay, vectors do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]


def check_equal(model: GPT, peer: Callable[[Tensor, Tensor], Tensor], size: str, name: str) -> None:
    """UserError unless a peer with the same weights has the same loss, within 1e-5 relative."""
    *_, B, T, V = SIZES[size]
    ids = torch.randint(V, (min(B, 4), T + 1), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.head_weight.device)
    with torch.no_grad():
        ours = next_token_loss(model, {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}, V)[0] / ids[:, 1:].numel()
        theirs = peer(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    if not abs(ours / theirs - 1) <= 1e-5:
        raise UserError(f"{name} has the loss {theirs:.6f}, ours with the same weights {ours:.6f}: "
                        "nothing to compare")


def compiled(step: Callable[[], Tensor], notes: dict[str, Any], name: str) -> Callable[[], Tensor]:
    """The step, after the call that compiles it; its seconds go to the notes."""
    begin = time.perf_counter()
    step()
    notes[f"seconds to compile {name}"] = time.perf_counter() - begin
    return step


def measure(cfg: BenchConfig) -> dict[str, Any]:
    """Tokens a second of every arm. The large sizes on a GPU leave float32 and the copies of others out."""
    size, device = cfg.size or "readme", torch.device(cfg.device)
    n_layer, n_head, _, n_embd, _, B, T, V = SIZES[size]
    notes: dict[str, Any] = {}
    steps: dict[str, tuple[str, Callable[[], Tensor]]] = {}
    dtypes = cfg.dtypes.split(",")
    with tempfile.TemporaryDirectory() as name:
        data = small_data(Path(name), size)
        ours = GPT(our_config(size)).to(device)
        for dtype in dtypes:
            fresh = GPT(our_config(size)).to(device)
            steps[f"ours, Llama, AdamW, {dtype}"] = dtype, our_step(fresh, data, size, dtype)
        fresh = GPT(our_config(size)).to(device)
        steps["ours, Llama, Muon"] = dtypes[0], our_step(fresh, data, size, dtypes[0], "muon")
        peer = f"ours, Llama, AdamW, {dtypes[0]}"
        if size != "1.1b":
            twin = transformers_twin(ours, Path(name) / "model", device)
            check_equal(ours, lambda x, y: F.cross_entropy(twin(x).logits.view(-1, V), y.view(-1)), size,
                        "transformers")
            peer = f"transformers, Llama, {dtypes[0]}"
            steps[peer] = dtypes[0], transformers_step(twin.train(), data, size, dtypes[0])
        if cfg.nanogpt:
            for dtype in dtypes:
                theirs, gpt2 = nanogpt_pair(cfg, size, device)
                check_equal(gpt2, lambda x, y, m=theirs: m(x, y)[1], size, "nanoGPT")
                peers = {"nanoGPT": theirs, "ours, GPT-2": gpt2}
                steps[f"nanoGPT, {dtype}"] = dtype, nanogpt_step(peers["nanoGPT"], data, size, dtype)
                steps[f"ours, GPT-2, AdamW, {dtype}"] = dtype, our_step(gpt2, data, size, dtype)
            peer = f"nanoGPT, {dtypes[0]}"
            notes["parameters of nanoGPT"] = sum(p.numel() for p in theirs.parameters())
        notes["parameters of ours, Llama"] = ours.num_parameters()
        if cfg.compile:
            steps |= compiled_arms(cfg, size, data, dtypes, notes)
        figures = timed({name: step for name, (_, step) in steps.items()}, cfg.rounds, cfg.steps, device)
    products = [(B * T, n_embd, 4 * n_embd), (B * T, n_embd, V)]
    peaks = {dtype: matmul_flops(products, DTYPES[dtype], device) for dtype in dtypes}
    notes |= {f"peak GFLOP/s in {dtype}": flops / 1e9 for dtype, flops in peaks.items()}
    notes["memory of this process, GB"] = memory_gb(device)
    flops, arms = ours.flops_per_token(T), {}
    for name, (dtype, _) in steps.items():
        values = [B * T / seconds for seconds in figures[name]]
        arms[name] = {"dtype": dtype, "values": values, "of_peak": sorted(values)[len(values) // 2] * flops / peaks[dtype]}
    return {"unit": "tokens/s", "peer": peer, "arms": arms, "notes": notes}


def compiled_arms(cfg: BenchConfig, size: str, data: Path, dtypes: list[str],
                  notes: dict[str, Any]) -> dict[str, tuple[str, Callable[[], Tensor]]]:
    """Ours with its blocks compiled, as --compile=True does, and nanoGPT's model compiled whole, as it does."""
    device, arms = torch.device(cfg.device), {}
    for dtype in dtypes:
        model = GPT(our_config(size)).to(device)
        for block in model.model["layers"]:
            block.compile()
        name = f"ours, Llama, AdamW, {dtype}, compiled"
        arms[name] = dtype, compiled(our_step(model, data, size, dtype), notes, name)
        if cfg.nanogpt:
            theirs, _ = nanogpt_pair(cfg, size, device)
            name = f"nanoGPT, {dtype}, compiled"
            arms[name] = dtype, compiled(nanogpt_step(torch.compile(theirs), data, size, dtype), notes, name)
    return arms
