"""A step of fine-tuning or of preference optimisation, compared with TRL: time and memory.

    python -m bench sft --rounds=3 --json=docs/results/bench_sft.json
    python -m bench dpo --rounds=3 --json=docs/results/bench_dpo.json

Every arm trains the same random model on the same rows in a process of its own: our sft.py or dpo.py as a
user runs them, or TRL's trainer (requirements-dev.txt) with the flags that make it fastest here. All arms
train all weights with AdamW in float32 on one thread, and cut a batch to its longest row. DPO's reference
log-probabilities are computed before the clock starts. The rows are lines of the standard library: some lines
as the prompt, and their continuation (or a wrong one) as the answer.

Time is the CPU time between the ends of two optimizer steps, after the first five. Memory is the peak of the
process minus its memory before training, with every package loaded (Linux only). On a GPU, time is wall time,
memory is that of the tensors, and all arms are compiled and compute in bfloat16. The losses of the first step
must agree; in fine-tuning only to 10 %, because the trainers begin with different rows.
"""

import functools
import importlib.util
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench.machine import status_megabytes
from bench.measure import DeviceConfig, children_in_turns, now, text_table, value_range, write_jsonl
from bench.peers import load_transformers
from configurator import UserError, require
from dataset.sources import find_files
from formats.chat_format import with_chat_tokens
from formats.files import read_jsonl
from formats.tokenizer import Tokenizer
from model import GPT, GPTConfig
from prepare import PrepareConfig, prepare

WARM_UP = 5  # steps before the clock counts
Run = dict[str, list[float]]  # {"times": CPU seconds at the end of each step, "losses": loss of each step}


@dataclass(frozen=True, kw_only=True)
class Config(DeviceConfig):
    steps: int = 25  # optimizer steps of one turn
    batch_size: int = 8  # conversations or pairs per step
    vocab_size: int = 32_000  # number of token ids
    n_layer: int = 4  # number of blocks
    n_embd: int = 256  # width
    block_size: int = 256  # longest row in tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "steps", self.steps > WARM_UP + 1, f"more than {WARM_UP + 1}")


# ---- The model and the rows -------------------------------------------------------------------------------

def write_inputs(cfg: Config, kind: str, folder: Path) -> None:
    """Write a random model (model/), rows as JSON lines (rows.jsonl), and our data set of them (data/)."""
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in find_files("pystdlib")[0][:400]]
    tokenizer = with_chat_tokens(Tokenizer.train(texts, cfg.vocab_size - 6))
    write_model(folder / "model", tokenizer, cfg.n_layer, cfg.n_embd, cfg.block_size)
    pieces = [lines for text in texts if len(lines := text.splitlines()) > 40]
    draw, rows = random.Random(1), []
    while len(rows) < 3 * cfg.steps * cfg.batch_size:
        prompt, chosen, rejected = parts = draw_pair(pieces, draw)
        lengths = [len(tokenizer.encode(part)) for part in parts]
        if all(parts) and chosen != rejected and lengths[0] + max(lengths[1:]) + 10 <= cfg.block_size:
            question = [{"role": "user", "content": prompt}]
            good, bad = ([{"role": "assistant", "content": answer}] for answer in (chosen, rejected))
            rows.append({"messages": question + good} if kind == "sft" else
                        {"prompt": question, "chosen": good, "rejected": bad})
    write_jsonl(folder / "rows.jsonl", rows)
    prepare(PrepareConfig(source=str(folder / "rows.jsonl"), kind="chat" if kind == "sft" else "preference",
                          tokenizer=str(folder / "model"), out=str(folder / "data"), num_proc=1,
                          val_fraction=0.1))


def draw_pair(pieces: list[list[str]], draw: random.Random) -> tuple[str, str, str]:
    """Four lines of a file, the lines after them, and the first lines of another file."""
    lines, others = draw.choice(pieces), draw.choice(pieces)
    at, length = draw.randrange(len(lines) - 20), draw.randint(3, 14)
    parts = lines[at:at + 4], lines[at + 4:at + 4 + length], others[:draw.randint(3, 14)]
    prompt, chosen, rejected = ("\n".join(part).strip() for part in parts)
    return prompt, chosen, rejected


def write_model(folder: Path, tokenizer: Tokenizer, n_layer: int, n_embd: int, block_size: int,
                seed: int = 0) -> None:
    """A random model with heads of width 64, and its tokenizer."""
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=n_layer, n_embd=n_embd,
                          n_head=n_embd // 64, block_size=block_size), seed)
    model.save_pretrained(folder, eos_token_id=tokenizer.end_ids)
    tokenizer.save(folder)


# ---- The arms, each in a process of its own ---------------------------------------------------------------

def run_ours(cfg: Config, kind: str, folder: Path, packing: bool = False) -> Run:
    """sft.py or dpo.py."""
    import dpo
    import sft
    argv = [*stage_argv(cfg, folder), "--learning_rate=1e-5"]
    if kind == "sft":
        return run_stage(sft.main, cfg, [*argv, f"--packing={packing}"], folder)
    return run_stage(dpo.main, cfg, [*argv, "--nll_weight=0"], folder)


def stage_argv(cfg: Config, folder: Path) -> list[str]:
    """The arguments that our stages share. Each run evaluates and saves once, at the end."""
    return [f"--init_from={folder / 'model'}", f"--dataset={folder / 'data'}", f"--out_dir={folder / 'out'}",
            f"--max_steps={cfg.steps}", f"--global_batch_size={cfg.batch_size}", "--optimizer=adamw",
            f"--micro_batch_size={cfg.batch_size}", f"--block_size={cfg.block_size}", "--eval_interval=0",
            f"--device={cfg.device}", "--save_interval=0", "--eval_tokens=256", "--log_interval=1",
            "--overwrite=True", f"--compile={cfg.device == 'cuda'}"]


def run_stage(main: Callable[[list[str]], int], cfg: Config, argv: list[str], folder: Path,
              metric: str = "loss") -> Run:
    """One of our stages as a user runs it; the losses come from its log."""
    times = clock_steps(cfg)
    main(argv)
    return {"times": times, "losses": [event[metric] for event in read_jsonl(folder / "out/metrics.jsonl")
                                       if metric in event]}


def clock_steps(cfg: Config) -> list[float]:
    """A list that gets the seconds of the clock at the end of every optimizer step from now on.

    On a CPU these are CPU seconds of the process, on a GPU wall seconds after the GPU has finished.
    """
    times: list[float] = []
    register_optimizer_step_post_hook(lambda *_: times.append(now(torch.device(cfg.device))))
    return times


def run_trl(cfg: Config, kind: str, folder: Path) -> Run:
    """TRL's trainer."""
    import datasets
    import trl
    common = trl_arguments(cfg, folder) | dict(learning_rate=1e-5, logging_strategy="steps", logging_steps=1)
    if kind == "sft":
        make_trainer, arguments = trl.SFTTrainer, trl.SFTConfig(**common, assistant_only_loss=True)
    else:
        make_trainer, arguments = trl.DPOTrainer, trl.DPOConfig(**common, precompute_ref_log_probs=True)
    rows = datasets.Dataset.from_list(read_jsonl(folder / "rows.jsonl"))
    trainer = make_trainer(load_transformers(folder / "model", "cpu"), args=arguments, train_dataset=rows,
                           processing_class=trl_tokenizer(folder))
    times = clock_steps(cfg)
    trainer.train()
    return {"times": times, "losses": [event["loss"] for event in trainer.state.log_history
                                       if "loss" in event]}


def trl_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder / "model", pad_token="<|endoftext|>")


def trl_arguments(cfg: Config, folder: Path) -> dict[str, Any]:
    """The arguments that TRL's trainers share: fused AdamW, nothing recomputed, saved or shown.

    On a GPU it computes in bfloat16 and is compiled, as our stages are.
    """
    return dict(output_dir=str(folder / "trl"), max_steps=cfg.steps, report_to=[],
                per_device_train_batch_size=cfg.batch_size, use_cpu=cfg.device == "cpu",
                bf16=cfg.device == "cuda", torch_compile=cfg.device == "cuda",
                gradient_checkpointing=False, max_length=cfg.block_size, save_strategy="no",
                disable_tqdm=True, optim="adamw_torch_fused")


ARMS = {"ours": run_ours, "ours, packed": functools.partial(run_ours, packing=True), "TRL": run_trl}


def has_trl() -> bool:
    return all(importlib.util.find_spec(name) for name in ("datasets", "trl"))


def installed(arms: Iterable[str]) -> list[str]:
    """The arms whose packages are installed. Prints a note if TRL is left out."""
    if has_trl():
        return list(arms)
    print("note: trl or datasets is not installed, so nothing is compared with TRL")
    return [name for name in arms if "TRL" not in name]


def run_arm(arm: str, kind: str, folder: str, keys: dict[str, Any]) -> dict[str, float]:
    """One arm in this process. keys: the fields of Config."""
    cfg = Config(**keys)
    return measure_run(cfg, functools.partial(ARMS[arm], cfg, kind, Path(folder)))


def megabytes(cfg: Config, key: str) -> float:
    """Memory of this process, or on a GPU of its tensors: now (VmRSS) or at its peak (VmHWM)."""
    if cfg.device == "cpu":
        return status_megabytes(key)
    return (torch.cuda.memory_allocated() if key == "VmRSS" else torch.cuda.max_memory_allocated()) / 1e6


def measure_run(cfg: Config, run: Callable[[], Run]) -> dict[str, float]:
    """Mean seconds per step after the warm-up, first and last loss, and megabytes of memory of a run."""
    from transformers import LlamaForCausalLM  # noqa: F401  (every arm loads all, so that memory compares)
    if has_trl():
        import datasets  # noqa: F401
        from trl import DPOTrainer, SFTTrainer  # noqa: F401
    before = megabytes(cfg, "VmRSS")
    result = run()
    times = result["times"][WARM_UP:]
    return {"seconds": (times[-1] - times[0]) / (len(times) - 1), "loss": result["losses"][0],
            "last_loss": result["losses"][-1], "megabytes": megabytes(cfg, "VmHWM") - before}


# ---- The comparison ---------------------------------------------------------------------------------------

def measure(cfg: Config, kind: str) -> dict[str, Any]:
    """Run every arm once per round. kind: sft or dpo. UserError if the first losses differ."""
    arms = installed(["ours", "ours, packed", "TRL"] if kind == "sft" else ["ours", "TRL"])
    with tempfile.TemporaryDirectory() as scratch:
        write_inputs(cfg, kind, Path(scratch))
        results = children_in_turns(run_arm, arms, kind, scratch, asdict(cfg), rounds=cfg.rounds,
                                    threads=cfg.threads)
    first = {name: runs[0]["loss"] for name, runs in results.items()}
    limit = 0.1 if kind == "sft" else 1e-3 if cfg.device == "cpu" else 1e-2  # bfloat16 rounds
    if any(abs(loss / first["ours"] - 1) > limit for loss in first.values()):
        raise UserError(f"the first losses differ, so the arms do not compute the same: {first}")
    return {"subject": kind, "arms": results, "sizes": asdict(cfg)}


def report(results: dict[str, Any], peers: dict[str, dict[str, str]] | None = None) -> str:
    """One line per arm: milliseconds per step, median and range of the rounds; peak memory; first loss.

    peers: {column: {arm: the arm it is compared with}}. None compares all arms with TRL.
    """
    arms, lines = results["arms"], []
    medians = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
               for name, runs in arms.items()}
    peers = peers or {"TRL": dict.fromkeys(arms, "TRL")}
    for name, runs in arms.items():
        ours, theirs = medians[name], [medians.get(peer_of.get(name)) for peer_of in peers.values()]
        lines.append([name, f"{1e3 * ours['seconds']:,.1f}",
                      value_range([1e3 * run["seconds"] for run in runs], 1),
                      *(f"{peer['seconds'] / ours['seconds']:.2f}" if peer else "" for peer in theirs),
                      f"{ours['megabytes']:,.0f}",
                      *(f"{ours['megabytes'] / peer['megabytes']:.2f}" if peer else "" for peer in theirs),
                      f"{ours['loss']:.4f}"])
    return text_table([results["subject"], "ms per step", "(min - max)", *(f"x {peer}" for peer in peers),
                       "MB", *(f"of {peer}" for peer in peers), "first loss"], lines)
