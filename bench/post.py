"""A step of fine-tuning or of preference optimisation beside TRL's: time and memory.

    python -m bench sft --rounds=3 --json=docs/results/bench_sft.json
    python -m bench dpo --rounds=3 --json=docs/results/bench_dpo.json

Every arm is a process of its own that trains the same random model on the same rows by its own command: our
sft.py or dpo.py, or TRL's trainer (requirements-dev.txt) with the flags that make it fastest here. All train
all weights with AdamW in float32 on one thread, in batches of the same rows, cut to the longest of the batch;
DPO's reference log-probabilities are computed before the clock starts. The rows are lines of the standard
library: some to continue, and their continuation (or a wrong one). Time is CPU time from the end of one step
to the end of the next, after the first five; memory is the peak of the process less what it had before
training, with every package loaded (Linux only). Losses of the first step have to agree: to a few per cent in
fine-tuning, whose first rows differ.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.loss import status_megabytes
from bench.measure import BenchConfig
from configurator import UserError, configure
from dataset.sources import find_files
from formats.chat_format import with_chat_tokens
from formats.tokenizer import Tokenizer
from model import GPT, GPTConfig
from prepare import PrepareConfig, prepare

WARM_UP = 5  # steps before the clock counts


@dataclass(frozen=True, kw_only=True)
class Config(BenchConfig):
    steps: int = 25  # of an arm's turn
    batch_size: int = 8  # conversations, or pairs, a step
    vocab_size: int = 32_000  # token ids
    n_layer: int = 4  # blocks
    n_embd: int = 256  # width
    block_size: int = 256  # longest row, in tokens
    device: str = "cpu"  # where all compute
    threads: int = 1  # of torch


def write_model(folder: Path, tokenizer: Tokenizer, n_layer: int, n_embd: int, block_size: int,
                seed: int = 0) -> None:
    """A random model, with heads of 64, and its tokenizer."""
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=n_layer, n_embd=n_embd,
                          n_head=n_embd // 64, block_size=block_size), seed)
    model.save_pretrained(folder, eos_token_id=tokenizer.end_ids)
    tokenizer.save(folder)


def write_inputs(cfg: Config, kind: str, folder: Path) -> None:
    """A random model, rows of the kind as JSON lines, and our data folder of them."""
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in find_files("pystdlib")[0][:400]]
    tokenizer = with_chat_tokens(Tokenizer.train(texts, cfg.vocab_size - 6))
    write_model(folder / "model", tokenizer, cfg.n_layer, cfg.n_embd, cfg.block_size)
    draw, rows = random.Random(1), []
    pieces = [lines for text in texts if len(lines := text.splitlines()) > 40]
    while len(rows) < 3 * cfg.steps * cfg.batch_size:
        lines, others = draw.choice(pieces), draw.choice(pieces)
        at, length = draw.randrange(len(lines) - 20), draw.randint(3, 14)
        prompt, chosen, rejected = ("\n".join(part).strip() for part in (
            lines[at:at + 4], lines[at + 4:at + 4 + length], others[:draw.randint(3, 14)]))
        ids = [tokenizer.encode(part) for part in (prompt, chosen, rejected)]
        longest = len(ids[0]) + max(map(len, ids[1:])) + 10
        if prompt and chosen and rejected and chosen != rejected and longest <= cfg.block_size:
            said = [[{"role": "assistant", "content": side}] for side in (chosen, rejected)]
            asked = [{"role": "user", "content": prompt}]
            rows.append({"messages": asked + said[0]} if kind == "sft" else
                        {"prompt": asked, "chosen": said[0], "rejected": said[1]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepare(PrepareConfig(source=str(folder / "rows.jsonl"), kind={"sft": "chat", "dpo": "preference"}[kind],
                          tokenizer=str(folder / "model"), out=str(folder / "data"), num_proc=1,
                          val_fraction=0.1))


# ---- What a process does ----------------------------------------------------------------------------------

def run_ours(cfg: Config, kind: str, folder: Path, packing: bool = False) -> dict[str, Any]:
    """sft.py or dpo.py."""
    import dpo
    import sft
    words = [*our_words(cfg, folder), "--learning_rate=1e-5"]
    if kind == "sft":
        return clocked(sft.main, [*words, f"--packing={packing}"])
    return clocked(dpo.main, [*words, "--nll_weight=0"])


def our_words(cfg: Config, folder: Path) -> list[str]:
    """The command line that our stages share: one evaluation, of few tokens, and one checkpoint, at the end.
    """
    return [f"--init_from={folder / 'model'}", f"--dataset={folder / 'data'}", f"--out_dir={folder / 'out'}",
            f"--max_steps={cfg.steps}", f"--global_batch_size={cfg.batch_size}", "--optimizer=adamw",
            f"--micro_batch_size={cfg.batch_size}", f"--block_size={cfg.block_size}", "--eval_interval=0",
            f"--device={cfg.device}", "--save_interval=0", "--eval_tokens=256", "--log_interval=1000",
            "--overwrite=True"]


def clocked(main: Callable[[list[str]], int], words: list[str], metric: str = "loss") -> dict[str, Any]:
    """A stage of ours as a user runs it: {"times": CPU seconds at the end of each step, "losses": the mean of
    the metric in each}."""
    import loop
    times, losses, update, backward = [], [], loop.update, loop.backward

    def timed_update(*arguments: Any) -> Any:
        result = update(*arguments)
        times.append(time.process_time())
        return result

    def noted_backward(forward: Any, batches: list[dict], *others: Any) -> dict[str, Any]:
        sums = backward(forward, batches, *others)
        losses.append(sums[metric].item() / sum(batch["count"] for batch in batches))
        return sums

    loop.update, loop.backward = timed_update, noted_backward
    with open(os.devnull, "w") as sys.stdout:
        main(words)
    sys.stdout = sys.__stdout__
    return {"times": times, "losses": losses}


def run_trl(cfg: Config, kind: str, folder: Path) -> dict[str, Any]:
    """TRL's trainer, with a clock behind each step."""
    import datasets
    import transformers
    import trl
    times: list[float] = []
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model", pad_token="<|endoftext|>")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    common = trl_arguments(cfg, folder) | dict(learning_rate=1e-5, logging_strategy="steps", logging_steps=1)
    if kind == "sft":
        arguments = trl.SFTConfig(**common, assistant_only_loss=True)
        trainer = trl.SFTTrainer(model, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
                                 processing_class=tokenizer, callbacks=[trl_clock(times)])
    else:
        arguments = trl.DPOConfig(**common, precompute_ref_log_probs=True)
        trainer = trl.DPOTrainer(model, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
                                 processing_class=tokenizer, callbacks=[trl_clock(times)])
    with open(os.devnull, "w") as sys.stdout:
        trainer.train()
    sys.stdout = sys.__stdout__
    losses = [event["loss"] for event in trainer.state.log_history if "loss" in event]
    return {"times": times, "losses": losses}


def trl_arguments(cfg: Config, folder: Path) -> dict[str, Any]:
    """What TRL's trainers share: nothing recomputed, nothing saved or shown, float32, a fused AdamW."""
    return dict(output_dir=str(folder / "trl"), max_steps=cfg.steps, report_to=[],
                per_device_train_batch_size=cfg.batch_size, use_cpu=cfg.device == "cpu", bf16=False,
                gradient_checkpointing=False, max_length=cfg.block_size, save_strategy="no",
                disable_tqdm=True, optim="adamw_torch_fused")


def trl_clock(times: list[float]) -> Any:
    """A callback of transformers' Trainer that notes CPU seconds at the end of each step."""
    import transformers

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            times.append(time.process_time())

    return Clock()


ARMS = {"ours": run_ours, "ours, packed": lambda cfg, kind, folder: run_ours(cfg, kind, folder, True),
        "TRL": run_trl}


def work(argv: list[str]) -> int:
    """One arm in this process, its figures as JSON. argv: the arm, kind, folder, and Config's words."""
    arm, kind, folder, *words = argv
    cfg, _ = configure(Config, words)
    print(json.dumps(measured(cfg, lambda: ARMS[arm](cfg, kind, Path(folder)))))
    return 0


def measured(cfg: Config, run: Callable[[], dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of a step after the warm-up, megabytes of the peak, first and last loss of what `run` did.
    """
    torch.set_num_threads(cfg.threads)
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401
    # With every package loaded, for all arms. Not getrusage, whose peak begins with that of the parent.
    before = status_megabytes("VmRSS")
    found = run()
    steps = [b - a for a, b in zip(found["times"][WARM_UP:], found["times"][WARM_UP + 1:], strict=False)]
    return {"seconds": statistics.mean(steps), "loss": found["losses"][0], "last_loss": found["losses"][-1],
            "megabytes": status_megabytes("VmHWM") - before}


# ---- The comparison ---------------------------------------------------------------------------------------

def measure(cfg: Config, kind: str) -> dict[str, Any]:
    """Every arm, once a round, in a process of its own."""
    require_steps(cfg)
    with tempfile.TemporaryDirectory() as scratch:
        write_inputs(cfg, kind, Path(scratch))
        results = in_turns(cfg, ["ours", *["ours, packed"] * (kind == "sft"), "TRL"], "bench.post",
                           kind, scratch)
    first = {name: runs[0]["loss"] for name, runs in results.items()}
    if any(abs(loss / first["TRL"] - 1) > (1e-3 if kind == "dpo" else 0.1) for loss in first.values()):
        raise UserError(f"the first losses differ, so the arms do not do the same: {first}")
    return {"subject": kind, "sizes": {key: getattr(cfg, key) for key in
                                       ("batch_size", "vocab_size", "n_layer", "n_embd", "block_size")},
            "arms": results}


def require_steps(cfg: Config) -> None:
    """UserError where no step is left to be timed."""
    if cfg.steps <= WARM_UP + 1:
        raise UserError(f"steps={cfg.steps}: must be more than {WARM_UP + 1}")


def in_turns(cfg: Any, names: list[str], module: str, *arguments: str,
             keys: Iterable[str] = ("steps", "batch_size", "block_size", "device", "threads")
             ) -> dict[str, list[dict[str, Any]]]:
    """{arm: its figures, one a round}: the module's work([arm, *arguments, *words]), an arm after the other,
    each in a process of its own, told these keys of cfg. UserError, with what it said, for one that fails."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    words = [f"--{key}={getattr(cfg, key)}" for key in keys]
    code = f"import sys; from {module} import work; sys.exit(work(sys.argv[1:]))"
    environment = os.environ | {"OMP_NUM_THREADS": str(cfg.threads), "HF_HUB_OFFLINE": "1"}
    for _ in range(cfg.rounds):
        for name in names:
            found = subprocess.run([sys.executable, "-c", code, name, *arguments, *words], env=environment,
                                   capture_output=True, text=True)
            if found.returncode:
                raise UserError(f"{name}: {found.stderr[-800:]}")
            results[name].append(json.loads(found.stdout.splitlines()[-1]))
    return results


def report(figures: dict[str, Any], peers: dict[str, dict[str, str | None]] | None = None) -> str:
    """A line an arm: milliseconds a step, median and spread of the rounds; peak memory of training.

    peers: {column: {arm: the arm that it is compared with}}; None: all with TRL.
    """
    middle = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
              for name, runs in figures["arms"].items()}
    peers = peers or {"TRL": dict.fromkeys(middle, "TRL")}
    columns = [" ".join(f"{word + peer:>8}" for peer in peers) for word in ("x ", "of ")]
    lines = [f"{figures['subject']:14} {'ms a step':>10} {'(min - max)':>21} {columns[0]} {'MB':>9} "
             f"{columns[1]} {'first loss':>11}"]
    for name, runs in figures["arms"].items():
        low, high = (1e3 * pick(run["seconds"] for run in runs) for pick in (min, max))
        mine, others = middle[name], [middle.get(arms.get(name)) for arms in peers.values()]
        speeds = [f"{other['seconds'] / mine['seconds']:8.2f}" if other else " " * 8 for other in others]
        sizes = [f"{mine['megabytes'] / other['megabytes']:8.2f}" if other else " " * 8 for other in others]
        lines.append(f"{name:14} {1e3 * mine['seconds']:10,.1f} {f'({low:,.1f} - {high:,.1f})':>21} "
                     f"{' '.join(speeds)} {mine['megabytes']:9,.0f} {' '.join(sizes)} {mine['loss']:11.4f}")
    return "\n".join(lines)
