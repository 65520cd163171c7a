"""A step of distillation, compared with TRL's GKDTrainer and with full logits: time and memory.

    python -m bench distill --rounds=3 --json=docs/results/bench_distill.json

Every arm trains the same random student with the same random teacher in a process of its own, on the same
rows in the same order, with the same AdamW in float32 on one thread:

  ours    distill.py as a user runs it, with --packing=False
  TRL     GKDTrainer (requirements-dev.txt) with the flags that suit it best here, never on the student's text
  plain   a loop over two transformers models: both log-softmaxes in full, (B, T, V), F.kl_div of the two, and
          the mean over the targets

Rows and measurements are those of bench/post.py. Only the assistant's tokens are targets. TRL and plain get
token ids, as ours does, so nobody tokenizes while the clock runs.

The loss is the divergence alone, at temperature 1, as a mean over the targets of a batch. Forward KL, from
teacher to student, is TRL's beta=0. "jsd" is TRL's default beta=0.5: with m = beta teacher + (1 - beta)
student it is beta KL(teacher || m) + (1 - beta) KL(student || m), which is our jsd with jsd_beta=0.5.
(GKDConfig's temperature is that of sampling, not of the loss.) So the losses of the first step agree up to
rounding. Rows and updates are the same, so the last losses nearly agree. Both are checked.

The arms differ in their own ways: TRL pads on the left, so its attention needs a mask, and passes the last
target through both models; plain pads on the right and needs no mask. Both compute logits at all positions.
Ours computes logits at the targets only, about a third of the positions here, in chunks.
"""

import functools
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench import post
from bench.measure import children_in_turns
from bench.peers import load_transformers
from configurator import UserError
from dataset.chat_rows import UnpackedChatRows, chat_batch
from dataset.dataloader import IGNORE, Mix
from formats.tokenizer import Tokenizer
from loop import RunConfig

BETA = {"forward_kl": 0.0, "jsd": 0.5}  # {our divergence: GKDConfig's beta}
RATE, BETA2 = 1e-3, 0.999  # AdamW, with beta1 0.9 and no decay; gradients are clipped to a norm of 1


@dataclass(frozen=True, kw_only=True)
class Config(post.Config):
    teacher_n_layer: int = 8  # the teacher's number of blocks; n_layer is the student's
    teacher_n_embd: int = 512  # the teacher's width; n_embd is the student's


def write_inputs(cfg: Config, folder: Path) -> None:
    """Write the student (model/), rows and data as for fine-tuning, and the teacher (teacher/)."""
    post.write_inputs(cfg, "sft", folder)
    post.write_model(folder / "teacher", Tokenizer.load(folder / "model"), cfg.teacher_n_layer,
                     cfg.teacher_n_embd, cfg.block_size, seed=1)


def training_rows(cfg: Config, folder: Path) -> np.ndarray:
    """The rows of distill.py in its order: (steps * B, 3, T) of inputs, targets and conversation numbers."""
    mix = Mix(str(folder / "data"), cfg.block_size, RunConfig.seed, UnpackedChatRows)
    return mix.samples(0, cfg.steps * cfg.batch_size)


def trl_rows(rows: np.ndarray) -> Iterator[dict[str, Any]]:
    """(n, 3, T) -> the same tokens for TRL's collator: all ids, and a mask of those to predict."""
    for inputs, targets, documents in rows:
        length = int((documents == 0).sum())  # number of inputs, one less than the number of tokens
        yield {"prompt": "", "input_ids": [*inputs[:length].tolist(), int(targets[length - 1])],
               "completion_mask": [0, *(targets[:length] != IGNORE).astype(int).tolist()]}


# ---- The arms, each in a process of its own ---------------------------------------------------------------

def run_ours(cfg: Config, divergence: str, folder: Path) -> post.Run:
    """distill.py."""
    import distill
    return post.run_stage(distill.main, cfg, [
        *post.stage_argv(cfg, folder), f"--teacher={folder / 'teacher'}", "--packing=False", "--alpha=1",
        "--temperature=1", f"--divergence={divergence}", "--jsd_beta=0.5", f"--learning_rate={RATE}",
        f"--beta2={BETA2}", "--weight_decay=0", "--grad_clip=1", "--schedule=constant", "--warmup_steps=0",
        "--lr_multipliers={}"], folder, "divergence")


def run_trl(cfg: Config, divergence: str, folder: Path) -> post.Run:
    """TRL's GKDTrainer, on the answers of the data only."""
    import datasets
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    losses: list[float] = []

    class LoggingTrainer(GKDTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    student, teacher = transformers_models(cfg, folder)
    arguments = GKDConfig(
        **post.trl_arguments(cfg, folder), beta=BETA[divergence], lmbda=0.0, seq_kd=False, temperature=1.0,
        learning_rate=RATE, adam_beta2=BETA2, weight_decay=0.0, max_grad_norm=1.0, warmup_steps=0,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", logging_strategy="no")
    rows = datasets.Dataset.from_list(list(trl_rows(training_rows(cfg, folder))))
    trainer = LoggingTrainer(student, teacher, arguments, train_dataset=rows,
                             processing_class=post.trl_tokenizer(folder))
    times = post.clock_steps(cfg)
    trainer.train()
    return {"times": times, "losses": losses}


def transformers_models(cfg: Config, folder: Path) -> list[Any]:
    """Student and teacher in float32, without the key-value caches that transformers would fill in vain."""
    models = [load_transformers(folder / name, cfg.device) for name in ("model", "teacher")]
    for model in models:
        model.config.use_cache = False
    return models


def run_plain(cfg: Config, _: str, folder: Path) -> post.Run:
    """Forward KL of full logits."""
    student, teacher = transformers_models(cfg, folder)
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), RATE, (0.9, BETA2), weight_decay=0.0, fused=True)
    times, losses, rows = post.clock_steps(cfg), [], training_rows(cfg, folder)
    for batch in np.split(rows, cfg.steps):
        ids = chat_batch(batch)["input_ids"].to(cfg.device)  # (B, T), cut after the last target
        is_target = torch.from_numpy(batch[:, 1, :ids.shape[1]] != IGNORE).to(cfg.device)  # (B, T)
        with torch.no_grad():
            log_q = teacher(ids).logits.log_softmax(-1)  # (B, T, V)
        log_p = student(ids).logits.log_softmax(-1)  # (B, T, V)
        kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)  # (B, T)
        loss = kl[is_target].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"times": times, "losses": losses}


ARMS = {"ours": (run_ours, "forward_kl"), "ours, jsd": (run_ours, "jsd"), "TRL": (run_trl, "forward_kl"),
        "TRL, jsd": (run_trl, "jsd"), "plain": (run_plain, "forward_kl")}  # {arm: (function, divergence)}


def run_arm(arm: str, folder: str, keys: dict[str, Any]) -> dict[str, float]:
    """One arm in this process. keys: the fields of Config."""
    if post.has_trl():
        from trl.experimental.gkd import GKDTrainer  # noqa: F401  (every arm loads every package)
    run, divergence = ARMS[arm]
    cfg = Config(**keys)
    return post.measure_run(cfg, functools.partial(run, cfg, divergence, Path(folder)))


# ---- The comparison ---------------------------------------------------------------------------------------

def measure(cfg: Config) -> dict[str, Any]:
    """Run every arm once per round. UserError if the losses differ."""
    with tempfile.TemporaryDirectory() as scratch:
        write_inputs(cfg, Path(scratch))
        results = children_in_turns(run_arm, post.installed(ARMS), scratch, asdict(cfg), rounds=cfg.rounds,
                                    threads=cfg.threads)
    check(cfg, results)
    return {"subject": "distill", "sizes": asdict(cfg), "arms": results}


def check(cfg: Config, results: dict[str, list[dict[str, float]]]) -> None:
    """UserError unless the arms of a divergence agree in the first and in the last loss of every round.

    A log-probability near ln(1 / 32,000) = -10.4 has a resolution of 1e-6 in float32. A divergence here, 0.01
    to 0.2 nats, is a mean of differences of such numbers, whose errors mostly cancel: with models of one
    layer and 32,000 ids the arms differ by a relative 2e-6, also in the last of 25 losses. 1e-4 leaves room
    for deeper models, and 1e-3 for what AdamW makes of their rounding. A mistake in the mask, the rows or the
    formula is larger. On a GPU, bfloat16 makes the errors larger: 5e-2.
    """
    for divergence, (key, limit) in itertools.product(BETA, (("loss", 1e-4), ("last_loss", 1e-3))):
        losses = {name: [run[key] for run in runs]
                  for name, runs in results.items() if ARMS[name][1] == divergence}
        values = sum(losses.values(), [])
        limit = limit if cfg.device == "cpu" else 5e-2
        if not max(values) - min(values) <= limit * min(values):
            raise UserError(f"{divergence}: {key} differs, so the arms do not compute the same: {losses}")


def report(results: dict[str, Any]) -> str:
    """post.report, with ratios to the peers of the same divergence."""
    same_kind = {"forward_kl": "TRL", "jsd": "TRL, jsd"}
    return post.report(results, {
        "TRL": {name: same_kind[kind] for name, (_, kind) in ARMS.items()},
        "plain": {name: "plain" for name, (_, kind) in ARMS.items() if kind == "forward_kl"}})
