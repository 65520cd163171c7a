"""A real pre-training run on one GPU: our recipe and nanoGPT's, in equal time on the same tokens.

    python -m bench.gpu_run --arm=ours                 # 124 M parameters, three minutes of steps
    python -m bench.gpu_run --arm=nanoGPT
    python -m bench.gpu_run --arm=compare              # reads the runs; writes out/gpu/run/curves.png

Reads the files that bench/gpu.py lists from --inputs. The text is novels and C++ documentation in GPT-2's
tokens. nanoGPT's train.py runs in a copy, with its own defaults for GPT-2 124M, but 32 rows per step without
accumulation, and with a schedule as long as the run. Ours is train.py with the default recipe at this size.

Equal time: the first steps of each side give the time of a step, which gives the number of steps that fit
into --seconds. Compilation, evaluation and saving do not count on either side. eval.py measures both models.
nanoGPT's weights are saved as our GPT-2 for that; its GELU is the exact one, ours the tanh approximation.
A stopped run of ours continues; nanoGPT's starts again.
"""

import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.measure import run_benchmark, text_table
from bench.peers import Shape, gpt2_twin, run_nanogpt
from configurator import UserError, require_positive, run_script
from dataset.shards import DataFolder
from formats.files import read_json, write_json
from formats.tokenizer import Tokenizer
from prepare import PrepareConfig, prepare
from tools.arms import run_eval, run_once

SIZES = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024)
TOY_SIZES = dict(n_layer=1, n_head=2, n_embd=32, block_size=32)
ROWS = 32  # per step, on both sides
SHARES = {"ours": 1.0, "ours_half": 0.5, "nanoGPT": 1.0}  # {arm: share of --seconds}


@dataclass(frozen=True, kw_only=True)
class InputsConfig:
    """Where a part finds its input, and where it works."""

    inputs: str = ".gpu"  # the user's files, as bench/gpu.py lists them
    work: str = "out/gpu"  # data and runs; a command that is called again goes on from there
    device: str = "cuda"  # cuda or cpu
    toy: bool = False  # a model of one layer and a few steps
    json: str | None = None  # also write the results to this file

    def find(self, pattern: str) -> str:
        """The input file or folder of this name. Raises UserError if it is missing."""
        if found := sorted(Path(self.inputs).glob(pattern)):
            return str(found[0])
        raise UserError(f"{self.inputs}/{pattern}: missing (bench/gpu.py lists the files)")

    def prepared(self, name: str, sources: list[str], **keys: Any) -> DataFolder:
        """A data folder of the input files with these names, made once."""
        folder = Path(self.work) / name
        if not (folder / "meta.json").is_file():
            prepare(PrepareConfig(source=",".join(map(self.find, sources)), out=str(folder), **keys))
        return DataFolder(folder)


@dataclass(frozen=True, kw_only=True)
class Config(InputsConfig):
    arm: Literal["ours", "ours_half", "nanoGPT", "compare"] = "ours"  # ours_half trains for half the time
    nanogpt: str | None = None  # nanoGPT's folder; None is nanoGPT in --inputs
    seconds: float = 180  # of training steps per run

    def __post_init__(self) -> None:
        require_positive(self, "seconds")

    def sizes(self) -> dict[str, int]:
        return TOY_SIZES if self.toy else SIZES

    def steps(self, step_seconds: float) -> int:
        return 6 if self.toy else int(SHARES[self.arm] * self.seconds / step_seconds)


# ---- The arms ---------------------------------------------------------------------------------------------

def text_data(cfg: Config) -> DataFolder:
    """Novels and C++ documentation: 32 M tokens with GPT-2's tokenizer."""
    tokenizer = dict(vocab_size=400) if cfg.toy else dict(tokenizer="gpt2")
    return cfg.prepared("run_data", ["novels*", "cpp_docs*"], val_fraction=0.03, **tokenizer)


def our_argv(cfg: Config, data: DataFolder) -> list[str]:
    """Our recipe: the defaults of train.py at this size."""
    vocab = 50304 if not cfg.toy else data.meta["vocab_size"]
    sizes = [f"--{key}={value}" for key, value in cfg.sizes().items()]
    return [*sizes, f"--intermediate_size={cfg.sizes()['n_embd'] * 8 // 3}", f"--vocab_size={vocab}",
            f"--dataset={data.folder}", f"--global_batch_size={ROWS}", f"--micro_batch_size={ROWS}",
            f"--device={cfg.device}", f"--compile={cfg.device == 'cuda'}", "--sample_tokens=0",
            f"--eval_tokens={2**12 if cfg.toy else 2**20}"]


def train_ours(cfg: Config, data: DataFolder, out: Path) -> dict[str, Any]:
    """Time 40 steps, then train for the number that fits. Returns the steps, their time, and the curve."""
    argv, rows = our_argv(cfg, data), ROWS * cfg.sizes()["block_size"]
    probe = run_once("train.py", [*argv, "--max_steps=40", "--log_interval=10", "--eval_interval=0",
                                  "--save_interval=0"], out.with_name("our_speed"))
    speeds = [event["tokens_per_second"] for event in probe if "tokens_per_second" in event]
    steps = cfg.steps(rows / max(speeds))
    every = max(1, steps // 12)
    log = run_once("train.py", [*argv, f"--max_steps={steps}", f"--eval_interval={every}",
                                f"--save_interval={every}"], out, steps=steps)
    curve = {event["step"]: event["val_loss"] for event in log if "val_loss" in event}
    return {"steps": steps, "step_seconds": rows / max(speeds), "curve": curve, "model": str(out)}


def nanogpt_argv(cfg: Config, steps: int) -> list[str]:
    """nanoGPT's defaults for GPT-2 124M with a schedule of this length, and a tenth of it as warm-up."""
    sizes = [f"--{key}={value}" for key, value in cfg.sizes().items()]
    return [*sizes, f"--batch_size={ROWS}", "--gradient_accumulation_steps=1", f"--max_iters={steps}",
            f"--lr_decay_iters={steps}", f"--warmup_iters={steps // 10}", "--wandb_log=False",
            f"--eval_interval={max(1, steps // 12)}", "--eval_iters=8", "--log_interval=1",
            f"--device={cfg.device}", f"--compile={cfg.device == 'cuda'}", "--always_save_checkpoint=True",
            f"--dtype={'bfloat16' if cfg.device == 'cuda' else 'float32'}"]


def train_nanogpt(cfg: Config, data: DataFolder, out: Path) -> dict[str, Any]:
    """The same for nanoGPT's train.py, and its model as a folder of ours."""
    source = cfg.nanogpt or cfg.find("nanoGPT")
    vocab = data.meta["vocab_size"] if cfg.toy else None  # None: its train.py takes 50,304
    done = out / "run.json"
    if not done.is_file():
        printed, _ = run_nanogpt(source, data, [*nanogpt_argv(cfg, 40), "--eval_interval=40"], vocab)
        times = re.findall(r"time ([\d.]+)ms", printed)[10:]
        step_seconds = statistics.median(float(time) / 1e3 for time in times)
        steps = cfg.steps(step_seconds)
        printed, model = run_nanogpt(source, data, nanogpt_argv(cfg, steps), vocab)
        shape = Shape(**cfg.sizes(), vocab_size=model.transformer.wte.num_embeddings)
        tokenizer = Tokenizer.load(data.folder)
        gpt2_twin(model, shape).save_pretrained(out, eos_token_id=tokenizer.eot_id)
        tokenizer.save(out)
        losses = re.findall(r"step (\d+):.*val loss ([\d.]+)", printed)
        curve = {int(step): float(loss) for step, loss in losses}
        write_json(done, {"steps": steps, "step_seconds": step_seconds, "curve": curve, "model": str(out)})
    return read_json(done)


def scores(cfg: Config, data: DataFolder, model: str) -> dict[str, Any]:
    """Perplexity and bits per byte on the validation text and on WikiText-2, by eval.py."""
    texts = {"validation": str(data.folder), "wikitext2": cfg.find("wikitext*")}
    limit = ["--limit=8"] if cfg.toy else []
    return {name: run_eval([f"--model={model}", "--tasks=perplexity", f"--data=perplexity={place}", *limit,
                            f"--device={cfg.device}"], Path(f"{model}_{name}"))["perplexity"]
            for name, place in texts.items()}


def compare(cfg: Config) -> dict[str, Any]:
    """Read the finished arms; draw validation loss against seconds of training steps."""
    from matplotlib.figure import Figure

    arms = {arm: read_json(Path(cfg.work) / "run" / f"{arm}.json") for arm in SHARES}
    if missing := [arm for arm, result in arms.items() if not result]:
        raise UserError(f"arm=compare: run {', '.join(missing)} first")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds of training steps", ylabel="validation loss (nats per token)")
    for arm, result in arms.items():
        seconds = [int(step) * result["step_seconds"] for step in result["curve"]]
        axes.plot(seconds, list(result["curve"].values()), marker="o", markersize=3, label=arm)
    axes.legend()
    picture = Path(cfg.work) / "run" / "curves.png"
    figure.savefig(picture, dpi=110)
    bits = {arm: result["scores"]["validation"]["bits_per_byte"]["value"] for arm, result in arms.items()}
    return {"picture": str(picture), "bits_per_byte": bits,
            "half_the_time_is_enough": bits["ours_half"] <= bits["nanoGPT"]}


def measure(cfg: Config) -> dict[str, Any]:
    if cfg.arm == "compare":
        return compare(cfg)
    data, out = text_data(cfg), Path(cfg.work) / "run" / cfg.arm
    result = (train_nanogpt if cfg.arm == "nanoGPT" else train_ours)(cfg, data, out)
    result["scores"] = scores(cfg, data, result["model"])
    write_json(out.with_suffix(".json"), result)
    return result


def report(results: dict[str, Any]) -> str:
    return text_table(["", "result"], [[key, str(value)] for key, value in results.items()])


def main(argv: list[str]) -> int:
    run_benchmark("bench.gpu_run", Config, measure, report, argv, __doc__)
    return 0


if __name__ == "__main__":
    run_script(main)
