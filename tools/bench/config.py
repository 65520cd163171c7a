"""The keys of all benchmarks."""

from dataclasses import dataclass
from typing import Literal

from configurator import UserError

# name: layers, heads, key/value heads, width, MLP of a Llama, rows, tokens a row, vocabulary
SIZES = {"tiny": (1, 2, 2, 32, 88, 2, 16, 300),
         "readme": (4, 4, 4, 128, 344, 12, 64, 65),  # nanoGPT's README, on a CPU
         "4m": (4, 8, 8, 256, 688, 1, 512, 4096),
         "124m": (12, 12, 12, 768, 2048, 16, 1024, 50_304),
         "1.1b": (22, 32, 4, 2048, 5632, 4, 4096, 32_000)}


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured, and how often."""

    nanogpt: str | None = None  # nanoGPT's folder; None: its arms are left out
    size: Literal["tiny", "readme", "4m", "124m", "1.1b"] | None = None  # None: train readme, generate 4m
    device: str = "cpu"  # cpu, cuda
    threads: int = 1  # of the CPU
    compile: bool = False  # train: also arms under torch.compile
    dtypes: str = "float32,bfloat16"  # train: precisions; a CPU without bfloat16 units takes long over it
    rounds: int = 5  # times each arm is measured; base: seeds
    steps: int = 20  # calls a round
    new_tokens: int = 256  # generate: tokens a prompt
    batch_size: int = 1  # generate: prompts at a time
    gigabytes: float = 10.0  # load: of the data set that is opened
    source: str = "pystdlib"  # prepare: the text
    copies: int = 4  # prepare: times it is taken, each document then with a first line of its own
    vocab_size: int = 4096  # prepare: ids of the BPE trained on it
    json: str | None = None  # also write the figures here

    def __post_init__(self) -> None:
        for key in ("threads", "rounds", "steps", "new_tokens", "batch_size", "gigabytes", "copies"):
            if getattr(self, key) <= 0:
                raise UserError(f"{key}={getattr(self, key)}: must be positive")
