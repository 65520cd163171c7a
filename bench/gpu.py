"""What one large GPU does with this project, part by part, each in a few minutes and resumable.

    bench/gpu.sh train                              # one of PARTS; writes docs/results/gpu/train.json
    bench/gpu.sh decode --minutes=2.5 --out=DIR     # stop in time; the next call goes on
    bench/gpu.sh real --arm=teacher                 # one figure of a part
    bench/gpu.sh train --toy=True --out=DIR         # the same commands on a CPU, in toy size

correct     the tests that need a GPU             long     8,192 and 16,384 tokens per row, and a needle
train       an optimizer step, and the loss head  run      124 M parameters, ours and nanoGPT in equal time
decode      greedy decoding                       real     half of SmolLM2's layers (bench/gpu_smollm2.py)
post        fine-tuning, compared with TRL        grpo     SmolLM2 learns GSM8K's word problems
distill     distillation, compared with TRL

A part is a list of figures: benchmarks and tests. Its file is written again after each of them, and holds the
GPU, the versions, the commit, the fastest matrix product (8,192 cubed, bfloat16) and the copy speed of the
same call. A figure that fails or runs out of time costs none of the others, and is tried again by the next
call; training runs go on where they were. A file of another GPU or commit is replaced.

A user copies the input into --inputs, by default .gpu/:

  nanoGPT/              github.com/karpathy/nanoGPT; without it, train and decode have no such peer
  smollm2/              the folder that tools/get_smollm2.py makes
  novels*, cpp_docs*    text files that prepare.py reads; wikitext*, the test split of WikiText-2
  gsm8k_train*, gsm8k_test*      JSON lines; the tokenizer of GPT-2 is in tiktoken's cache
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.machine import copy_arm, matmul_arms, matmul_peak
from bench.measure import time_in_turns
from configurator import UserError, configure, require_positive, run_script
from formats.files import write_json
from modeling.devices import device_name, pick_device

STOP_SECONDS = 20  # for a training run to save its step
TIMING = ["--rounds=3", "--seconds=0.3", "--device=cuda"]
GPT2 = ["--n_layer=12", "--n_head=12", "--n_embd=768", "--vocab_size=50304", "--block_size=1024"]
LONG = ["--size=1.1b", "--transformers=False", "--arms=our Llama, bfloat16, compiled"]
TRAINED = ["--device=cuda", "--rounds=1", "--n_layer=24", "--n_embd=1024", "--block_size=1024",
           "--batch_size=16"]
# {part: {figure: (seconds at most, arguments of python -m)}}
PARTS: dict[str, dict[str, tuple[int, list[str]]]] = {
    "correct": {"tests": (120, ["pytest", "-q", "-x", "tests/test_gpu.py"])},
    "train": {
        "loss_head": (60, ["bench", "loss", *TIMING, "--n=16384", "--d=768", "--v=50304"]),
        "124m": (110, ["bench", "train", *TIMING, "--size=124m", "--batch_size=32",
                       "--transformers=False", "--arms=(nanoGPT|our Llama|our GPT-2), bfloat16, compiled"]),
        "1.1b": (90, ["bench", "train", *TIMING, "--size=1.1b", "--transformers=False",
                       "--arms=our Llama, bfloat16, compiled"])},
    "decode": {
        "124m": (90, ["bench", "generate", *TIMING, *GPT2, "--max_new_tokens=128"]),
        "1.1b": (110, ["bench", "generate", *TIMING, "--size=1.1b", "--transformers=False",
                        "--max_new_tokens=64", "--batch_size=1"]),
        "124m_rows_64": (60, ["bench", "generate", *TIMING, *GPT2, "--max_new_tokens=64", "--batch_size=64"]),
        "124m_rows_256": (60, ["bench", "generate", *TIMING, *GPT2, "--max_new_tokens=64",
                               "--batch_size=256"])},
    "post": {"sft": (150, ["bench", "sft", *TRAINED]), "dpo": (150, ["bench", "dpo", *TRAINED])},
    "distill": {"0.3b": (240, ["bench", "distill", *TRAINED, "--teacher_n_layer=22", "--teacher_n_embd=2048",
                               "--batch_size=8"])},
    "long": {
        "1.1b_8k": (90, ["bench", "train", *TIMING, *LONG, "--block_size=8192", "--batch_size=2"]),
        "1.1b_16k": (90, ["bench", "train", *TIMING, *LONG, "--block_size=16384", "--batch_size=1"]),
        "1.1b_16k_documents": (90, ["bench", "train", *TIMING, *LONG, "--block_size=16384", "--batch_size=1",
                                    "--document_mask=True"]),
        "needle_16k": (150, ["bench.gpu_smollm2", "--arm=needle"])},
    "run": {arm: (420, ["bench.gpu_run", f"--arm={arm}"])
            for arm in ("ours", "nanoGPT", "ours_half", "compare")},
    "real": {arm: (420, ["bench.gpu_smollm2", f"--arm={arm}"])
             for arm in ("whole", "cut", "text", "teacher", "ternary")},
    "grpo": {arm: (540, ["bench.gpu_smollm2", f"--arm={arm}"]) for arm in ("sft", "grpo")},
}
TOY = {"bench loss": ["--n=64", "--d=32", "--v=500"],
       "bench train": ["--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=300", "--block_size=16",
                       "--batch_size=2", "--arms=float32$"],
       "bench generate": ["--n_layer=1", "--n_head=2", "--n_embd=32", "--vocab_size=300", "--block_size=64",
                          "--batch_size=2", "--max_new_tokens=8"],
       "bench sft": ["--n_layer=1", "--n_embd=64", "--vocab_size=1000", "--steps=8"],
       "pytest": ["-q"]}
TOY["bench dpo"] = TOY["bench sft"]
TOY["bench distill"] = [*TOY["bench sft"], "--teacher_n_layer=1", "--teacher_n_embd=64"]


@dataclass(frozen=True, kw_only=True)
class Config:
    out: str = "docs/results/gpu"  # folder of the parts' files
    arm: str | None = None  # only this figure of the part
    inputs: str = ".gpu"  # folder of the user's files
    work: str = "out/gpu"  # where run, real, grpo and the needle keep data and runs
    minutes: float = 9.0  # stop by then; what cannot go on later is started only if it fits
    toy: bool = False  # the same commands on a CPU with tiny models

    def __post_init__(self) -> None:
        require_positive(self, "minutes")


def machine(device: torch.device) -> dict[str, Any]:
    """The GPU, the versions, the commit, and the speeds that figures are compared with."""
    size = 256 if device.type == "cpu" else 8192
    copy, copied = copy_arm(device)
    products = matmul_arms({(size, size, size)}, "bfloat16", device)
    timings = time_in_turns(products | {"copy": copy}, 3, device, 0.1)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {"gpu": device_name(device), "torch": torch.__version__, "commit": git.stdout.strip() or None,
            "matmul_flops": matmul_peak(timings, "bfloat16"),
            "copy_bytes_per_second": copied / timings["copy"].median}


def command(words: list[str], cfg: Config) -> list[str]:
    """The arguments of python -m: in toy size if wanted, with the folders that the module needs."""
    name = " ".join(words[:2]) if words[0] == "bench" else words[0]
    if name.startswith("bench.gpu_"):
        words = [*words, f"--inputs={cfg.inputs}", f"--work={cfg.work}", f"--toy={cfg.toy}"]
        words += ["--device=cpu"] * cfg.toy
    elif cfg.toy and words[0] == "bench":
        changes = [word for word in words if word.startswith("--document_mask")]  # no matter of size
        words = [*words[:2], *changes, "--rounds=1", *TOY[name]]
        words += ["--seconds=0.01"] * (name in ("bench loss", "bench train", "bench generate"))
    nanogpt = Path(cfg.inputs) / "nanoGPT"
    if nanogpt.is_dir() and name in ("bench train", "bench generate"):
        words = [*words, f"--nanogpt={nanogpt}"]
    return words


def run_figure(words: list[str], seconds: float) -> Any:
    """The JSON of a benchmark, or the last line of a test run. UserError if it fails or takes too long."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "figure.json"
        argv = [sys.executable, "-m", *words, *([f"--json={path}"] if words[0] != "pytest" else [])]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   start_new_session=True)
        try:
            printed, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            stop(process)
            raise UserError(f"took more than {seconds:.0f} s") from None
        except BaseException:  # Ctrl-C or SIGTERM: the process has a session of its own, and would go on
            stop(process)
            raise
        print(printed, flush=True)
        if process.returncode:
            raise UserError(f"exit code {process.returncode}: {(errors or printed).strip()[-1500:]}")
        return json.loads(path.read_text()) if path.exists() else printed.strip().splitlines()[-1]


def stop(process: subprocess.Popen) -> None:
    """End a process and its children. A training run among them saves its step first."""
    os.killpg(process.pid, signal.SIGTERM)
    end = time.monotonic() + STOP_SECONDS
    while time.monotonic() < end:
        process.poll()  # takes its exit code, so that it is no longer in the group
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def chosen_figures(part: str, arm: str | None) -> dict[str, tuple[int, list[str]]]:
    """The figures of a part, or only the named one. Raises UserError for an unknown name."""
    if arm and arm not in PARTS[part]:
        raise UserError(f"arm={arm}: {part} has the figures {', '.join(PARTS[part])}")
    return {name: figure for name, figure in PARTS[part].items() if arm in (None, name)}


def main(argv: list[str]) -> int:
    """Run what a part's file lacks. Returns 1 if a figure is missing at the end."""
    if not argv or argv[0] not in PARTS:
        raise UserError(f"name a part: bench/gpu.sh {'|'.join(PARTS)} --minutes=2.5 --out=DIR")
    begin, part = time.monotonic(), argv[0]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cfg, _ = configure(Config, argv[1:], __doc__)
    path = Path(cfg.out) / f"{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = machine(pick_device("cpu" if cfg.toy else "cuda"))
    before = json.loads(path.read_text()) if path.exists() else {}
    goes_on = all(before.get(key) == about[key] for key in ("gpu", "commit"))
    figures = before["figures"] if goes_on else {}
    wanted = chosen_figures(part, cfg.arm)
    for name, (seconds, words) in wanted.items():
        left = 60 * cfg.minutes - (time.monotonic() - begin) - STOP_SECONDS
        is_resumable = words[0].startswith("bench.gpu_") and name != "nanoGPT"
        if name in figures or left < (20 if is_resumable else seconds):
            continue
        words = command(words, cfg)
        print(f"== {part} {name}: python -m {' '.join(words)}", flush=True)
        try:
            result = run_figure(words, min(seconds, left))
            figures[name] = {"command": f"python -m {' '.join(words)}", "result": result}
        except UserError as error:
            print(f"{part} {name}: {error}", file=sys.stderr, flush=True)
        write_json(path, {"part": part, **about, "command": f"bench/gpu.sh {part}", "figures": figures})
    missing = wanted.keys() - figures
    print(f"{path}: {len(figures)} of {len(PARTS[part])} figures; missing: {', '.join(missing) or 'none'}")
    return int(bool(missing))


if __name__ == "__main__":
    sys.argv[0] = "bench/gpu.sh"
    run_script(main)
