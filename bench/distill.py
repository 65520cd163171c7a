"""A step of distillation beside TRL's GKDTrainer and beside full logits: time and memory.

    python -m bench distill --rounds=3 --json=docs/results/bench_distill.json

Every arm is a process of its own that teaches the same random student by the same random teacher, on the same
rows in the same order, with the same AdamW in float32 on one thread: distill.py by its own command
(--packing=False); TRL's GKDTrainer (requirements-dev.txt) with the flags that suit it best here, never on the
student's own text; and plain, a loop over two models of transformers that does what a first version does:
both log-softmaxes whole, (B, T, V), F.kl_div of the two, the mean at the targets. Rows and their figures are
those of bench/post.py; only the assistant's words are targets. TRL and plain get rows as token ids, as
ours does, so that nobody tokenizes while the clock runs.

The loss is the divergence alone, at temperature 1, as a mean over the targets of a batch: forward KL, from
teacher to student, is TRL's beta=0; "jsd" is its default beta=0.5, m = beta teacher + (1 - beta) student and
beta KL(teacher || m) + (1 - beta) KL(student || m), without another factor, which is our jsd at jsd_beta=0.5.
(GKDConfig's temperature is not one of its loss, only of sampling.) So the losses of the first step agree to
rounding, and those of the last one, because rows and updates are the same, almost: both are held.

What the arms do differently is their own: TRL pads on the left, so that attention needs a mask, and puts the
last target through both models too; plain pads on the right and needs no mask; both compute logits at all
positions. Ours does at the targets alone, about a third of them here, chunk by chunk.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench import post
from configurator import UserError, configure
from dataset.chat_rows import UnpackedChatRows, chat_batch
from dataset.dataloader import IGNORE, Mix
from formats.tokenizer import Tokenizer
from loop import RunConfig

BETA = {"forward_kl": 0.0, "jsd": 0.5}  # GKDConfig's beta for a divergence of ours
RATE, BETA2 = 1e-3, 0.999  # of AdamW; beta1 0.9, no decay, gradients clipped to a norm of 1


@dataclass(frozen=True, kw_only=True)
class Config(post.Config):
    teacher_n_layer: int = 8  # blocks; n_layer are the student's
    teacher_n_embd: int = 512  # width; n_embd is the student's


def write_inputs(cfg: Config, folder: Path) -> None:
    """The student as folder/model, rows and data as for fine-tuning; and folder/teacher."""
    post.write_inputs(cfg, "sft", folder)
    post.write_model(folder / "teacher", Tokenizer.load(folder / "model"), cfg.teacher_n_layer,
                     cfg.teacher_n_embd, cfg.block_size, seed=1)


def packed_rows(cfg: post.Config, folder: Path) -> np.ndarray:
    """What distill.py reads, in its order: (steps * B, 3, T) of inputs, targets and conversation numbers."""
    mix = Mix(str(folder / "data"), cfg.block_size, RunConfig.seed, UnpackedChatRows)
    return mix.samples(0, cfg.steps * cfg.batch_size)


def trl_rows(rows: np.ndarray) -> Iterator[dict[str, Any]]:
    """(n, 3, T) -> the same tokens as TRL's collator takes them: whole, and which are to be predicted."""
    for inputs, targets, documents in rows:
        length = int((documents == 0).sum())  # of the inputs, which are one less than the tokens
        yield {"prompt": "", "input_ids": [*inputs[:length].tolist(), int(targets[length - 1])],
               "completion_mask": [0, *(targets[:length] != IGNORE).astype(int).tolist()]}


# ---- What a process does ----------------------------------------------------------------------------------

def run_ours(cfg: post.Config, divergence: str, folder: Path) -> dict[str, Any]:
    """distill.py, as a user runs it."""
    import distill
    return post.clocked(distill.main, [
        *post.our_words(cfg, folder), f"--teacher={folder / 'teacher'}", "--packing=False", "--alpha=1",
        "--temperature=1", f"--divergence={divergence}", "--jsd_beta=0.5", f"--learning_rate={RATE}",
        f"--beta2={BETA2}", "--weight_decay=0", "--grad_clip=1", "--schedule=constant", "--warmup_steps=0",
        "--lr_multipliers={}"], "divergence")


def run_trl(cfg: post.Config, divergence: str, folder: Path) -> dict[str, Any]:
    """TRL's GKDTrainer, on the given answers alone."""
    import datasets
    import transformers
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    times: list[float] = []
    losses: list[float] = []

    class Noting(GKDTrainer):
        def compute_loss(self, *arguments: Any, **more: Any) -> torch.Tensor:
            loss = super().compute_loss(*arguments, **more)
            losses.append(loss.item())
            return loss

    student, teacher = transformers_models(cfg, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model", pad_token="<|endoftext|>")
    arguments = GKDConfig(
        **post.trl_arguments(cfg, folder), beta=BETA[divergence], lmbda=0.0, seq_kd=False, temperature=1.0,
        learning_rate=RATE, adam_beta2=BETA2, weight_decay=0.0, max_grad_norm=1.0, warmup_steps=0,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", logging_strategy="no")
    rows = datasets.Dataset.from_list(list(trl_rows(packed_rows(cfg, folder))))
    trainer = Noting(student, teacher, arguments, train_dataset=rows, processing_class=tokenizer,
                     callbacks=[post.trl_clock(times)])
    with open(os.devnull, "w") as sys.stdout:
        trainer.train()
    sys.stdout = sys.__stdout__
    return {"times": times, "losses": losses}


def transformers_models(cfg: post.Config, folder: Path) -> list[Any]:
    """Student and teacher in float32, without the key-value caches that transformers else fills in vain."""
    from transformers import AutoModelForCausalLM
    models = [AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).to(cfg.device)
              for name in ("model", "teacher")]
    for model in models:
        model.config.use_cache = False
    return models


def run_plain(cfg: post.Config, _: str, folder: Path) -> dict[str, Any]:
    """Forward KL of full logits."""
    student, teacher = transformers_models(cfg, folder)
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), RATE, (0.9, BETA2), weight_decay=0.0, fused=True)
    times, losses, rows = [], [], packed_rows(cfg, folder)
    for first in range(0, len(rows), cfg.batch_size):
        some = rows[first:first + cfg.batch_size]
        ids = chat_batch(some)["input_ids"].to(cfg.device)  # (B, T), cut behind the last target
        wanted = torch.from_numpy(some[:, 1, :ids.shape[1]] != IGNORE).to(cfg.device)  # (B, T)
        with torch.no_grad():
            log_q = teacher(ids).logits.log_softmax(-1)  # (B, T, V)
        log_p = student(ids).logits.log_softmax(-1)  # (B, T, V)
        kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)  # (B, T)
        loss = kl[wanted].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time())
        losses.append(loss.item())
    return {"times": times, "losses": losses}


ARMS = {"ours": (run_ours, "forward_kl"), "ours, jsd": (run_ours, "jsd"), "TRL": (run_trl, "forward_kl"),
        "TRL, jsd": (run_trl, "jsd"), "plain": (run_plain, "forward_kl")}  # and which divergence
PEERS = {"TRL": {"forward_kl": "TRL", "jsd": "TRL, jsd"}, "plain": {"forward_kl": "plain"}}
SIZES = ("batch_size", "vocab_size", "block_size", "n_layer", "n_embd", "teacher_n_layer", "teacher_n_embd")


def work(argv: list[str]) -> int:
    """One arm in this process, its figures as JSON. argv: the arm, folder, and post.Config's words."""
    arm, folder, *words = argv
    cfg, _ = configure(post.Config, words)
    run, divergence = ARMS[arm]
    from trl.experimental.gkd import GKDTrainer  # noqa: F401  (before memory is counted, for all arms)
    print(json.dumps(post.measured(cfg, lambda: run(cfg, divergence, Path(folder)))))
    return 0


# ---- The comparison ---------------------------------------------------------------------------------------

def measure(cfg: Config) -> dict[str, Any]:
    """Every arm, once a round, in a process of its own."""
    post.require_steps(cfg)
    with tempfile.TemporaryDirectory() as scratch:
        write_inputs(cfg, Path(scratch))
        results = post.in_turns(cfg, list(ARMS), "bench.distill", scratch)
    check(results)
    return {"subject": "distill", "trl": version("trl"), "sizes": {key: getattr(cfg, key) for key in SIZES},
            "arms": results}


def check(results: dict[str, list[dict[str, float]]]) -> None:
    """UserError unless the arms of a divergence have the same first and the same last loss, in every round.

    A log-probability near ln(1 / 32,000) = -10.4 has steps of 1e-6 in float32, and a divergence here, 0.01 to
    0.2 nats, is a mean of differences of such, whose errors mostly cancel: with models of one layer and
    32,000 ids the arms differ by 2e-6 of it, the last of 25 losses, too. 1e-4 leaves room for deeper models,
    and 1e-3 for what AdamW makes of their rounding; a mistake in the mask, the rows or the formula is larger.
    """
    for divergence in BETA:
        names = [name for name, (_, kind) in ARMS.items() if kind == divergence]
        for key, limit in (("loss", 1e-4), ("last_loss", 1e-3)):
            found = {name: [run[key] for run in results[name]] for name in names}
            everyone = sum(found.values(), [])
            if not max(everyone) - min(everyone) <= limit * min(everyone):
                raise UserError(f"{divergence}: {key} differs, so the arms do not do the same: {found}")


def report(figures: dict[str, Any]) -> str:
    """post.report, with ratios to the peers of the same divergence."""
    peers = {column: {name: arms.get(kind) for name, (_, kind) in ARMS.items()}
             for column, arms in PEERS.items()}
    return post.report(figures, peers)
