"""Which samples each training step reads, across the stages of a run; and what it evaluates.

    data = StagedData(cfg, Rows, rank=0, world_size=2)
    stage_cfg, mix, first, count = data.shard_for_step(step)     # this rank's samples of the step
    rows = mix.samples(first, count)

The answer depends only on (seed, step, rank, world size), so a resumed run needs no loader state. The ranks'
samples together are the same for any number of ranks:

    step 5, global_batch_size 8, 2 ranks:     rank 0 reads samples 40-43, rank 1 reads samples 44-47

Stages that read the same data set with the same row length share one position in it: the later stage
continues where the earlier one stopped.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor

from configurator import UserError
from dataset.chat_rows import ChatRows
from dataset.dataloader import Mix, Rows, rank_batches, validation_rows
from formats import hf
from formats.tokenizer import Tokenizer
from modeling.devices import to_device
from training.config import RunConfig
from training.run import Run
from training.stages import Config, plan_stages, stage_at, stage_configs, with_steps


class StagedData(Generic[Config]):
    """Maps a step to its samples, stage by stage."""

    def __init__(self, cfg: Config, kind: Callable[..., Any] = Rows, rank: int = 0, world_size: int = 1):
        """kind: the class of the rows, as in Mix. Raises UserError if the stages' tokenizers differ."""
        # Stages may count epochs; self.cfg counts steps, as fit does.
        self.cfg = with_steps(cfg, lambda stage: Mix(stage.dataset, stage.block_size, cfg.seed, kind)
                              .epoch_samples() / stage.global_batch_size)
        self.stages, self.rank, self.world_size = plan_stages(self.cfg), rank, world_size
        self.mixes = {self.key(stage.cfg): Mix(stage.cfg.dataset, stage.cfg.block_size, cfg.seed, kind)
                      for stage in self.stages}
        self.last_mix = self.mixes[self.key(self.stages[-1].cfg)]
        self.tokenizer = self.last_mix.tokenizer
        if any(mix.tokenizer.definition != self.tokenizer.definition for mix in self.mixes.values()):
            raise UserError("stages: their data sets were made with different tokenizers (prepare.py "
                            f"--tokenizer={self.last_mix.folders[0].folder} makes data with the last one's)")

    @staticmethod
    def key(cfg: Config) -> tuple[str, int]:
        """Stages with the same key read the same rows; the later one continues after the earlier one."""
        return cfg.dataset, cfg.block_size

    def shard_for_step(self, step: int) -> tuple[Config, Mix, int, int]:
        """This rank's part of a step: the stage's configuration, its mix, the first sample, their number."""
        stage = stage_at(self.stages, step)
        cfg = stage.cfg
        # Samples of the same rows that earlier stages have read.
        earlier = sum((s.last - s.first) * s.cfg.global_batch_size for s in self.stages
                      if s.first < stage.first and self.key(s.cfg) == self.key(cfg))
        count = cfg.global_batch_size // self.world_size
        first = earlier + (step - stage.first) * cfg.global_batch_size + self.rank * count
        return cfg, self.mixes[self.key(cfg)], first, count

    def used(self) -> Iterator[tuple[Any, np.ndarray]]:
        """(rows, row numbers that the run reads) for every folder of every mix."""
        for key, mix in self.mixes.items():
            count = sum((stage.last - stage.first) * stage.cfg.global_batch_size
                        for stage in self.stages if self.key(stage.cfg) == key)
            owner, index = mix.locate(0, count)
            for folder, rows in enumerate(mix.rows):
                yield rows, np.unique(index[owner == folder])

    def hashes(self) -> dict[str, str]:
        """`Mix.hashes` of all stages."""
        return {folder: digest for mix in self.mixes.values() for folder, digest in mix.hashes().items()}

    def tokens(self) -> dict[str, int]:
        """{folder: its training tokens}, for run.json."""
        return {str(folder.folder): folder.meta["tokens"]["train"] for mix in self.mixes.values()
                for folder in mix.folders}


class MixEvaluation(Generic[Config]):
    """What the evaluations of train.py, sft.py, dpo.py and distill.py share: validation rows, sums and means.

    A run has one evaluation, made from the last entry of `stages`: the same rows at every step. So results
    before and after a change of stage can be compared, also to decide which checkpoint is the best.
    """

    def __init__(self, cfg: Config, mix: Mix, kind: Callable[..., Any], run: Run):
        """kind: the class of the rows. Raises UserError for too little validation data."""
        self.cfg, self.mix, self.run = cfg, mix, run
        self.rows = [kind(folder, "val", cfg.block_size) for folder in mix.folders]

    @functools.cached_property
    def byte_counts(self) -> Tensor:
        """The number of bytes of each token, (V,)."""
        lengths = [len(token) for token in self.mix.tokenizer.token_bytes()]
        return torch.tensor(lengths, device=self.run.device)

    def means(self, values: Callable[[Any], dict[str, float]]) -> dict[str, float]:
        """The means of values(rows) over the folders, with their weights in training.

        A mix also gets the losses and the bits per byte of each folder: {"val_loss/books": 3.2, ...}.
        """
        means, each = dict[str, float](), dict[str, float]()
        for rows, weight in zip(self.rows, self.mix.weights, strict=True):
            for name, value in values(rows).items():
                means[name] = means.get(name, 0.0) + weight * value
                if len(self.rows) > 1 and name in ("val_loss", "val_bits_per_byte"):
                    each[f"{name}/{rows.data.folder.name}"] = value
        return means | each

    def num_rows(self, rows: Any) -> int:
        """The number of rows in a folder's first cfg.eval_tokens tokens."""
        return validation_rows(rows, self.cfg.eval_tokens)

    def sums(self, rows: Any, make_batch: Callable[[np.ndarray], dict[str, Any]],
             measure: Callable[[dict[str, Any]], Sequence[Tensor | int]]) -> list[float]:
        """The numbers that measure(batch) returns, summed over one folder's rows and over all ranks.

        make_batch(row numbers) makes a batch of CPU tensors; measure gets it on the run's device. Its numbers
        are scalars, and stay on the device until the end.
        """
        run, sums = self.run, list[Tensor | int]()
        for numbers in rank_batches(self.num_rows(rows), self.cfg.micro_batch_size, run.rank, run.world_size):
            # All ranks must take part in each forward pass: one that runs out of rows reads row 0 again.
            values = measure(to_device(make_batch(numbers if len(numbers) else np.zeros(1, int)), run.device))
            if len(numbers):
                sums = [a + b for a, b in zip(sums or [0] * len(values), values, strict=True)]
        return run.sum([float(value) for value in sums or [0] * len(values)])


def chat_rows_text(rows: ChatRows, remedy: str = "") -> str:
    """What a run reads from one folder, for its first lines: rows, and the conversations that do not fit.

    remedy: what a script can do about conversations that are cut, besides longer rows.
    """
    text = f"data      {rows.data.folder}: {len(rows):,} {rows.split} rows"
    if rows.left_out:
        reason = "no answer in" if rows.overlong == "cut" else "longer than"
        text += f"\n          {rows.left_out:,} conversations left out: {reason} {rows.T} tokens"
    if rows.cut:
        text += (f"\n          {rows.cut:,} of {len(rows.usable):,} conversations are cut at {rows.T} tokens"
                 "; a larger --block_size keeps them whole, in a model\n          with that context "
                 f"(train.py --block_size=512, or an open model){remedy}")
    return text


def prepare_default(cfg: RunConfig, run: Run, name: str, make: Callable[[], object]) -> None:
    """Let rank 0 make the embedded data set `name`, if a stage of the run reads it. All ranks call it."""
    def work() -> None:
        make()  # does nothing if the data is there; the result stays on rank 0

    if any(stage.dataset == name for stage in stage_configs(cfg)):
        run.run_on_rank0(work)


def check_vocabulary(cfg: RunConfig, vocab_size: int | None, tokenizer: Tokenizer) -> None:
    """Raises UserError unless the model has every token id of the data's tokenizer, with the same meaning.

    vocab_size: the number of ids that the user asked for; None takes the tokenizer's.
    """
    if cfg.init_from and Tokenizer.load(hf.find_folder(cfg.init_from)).definition != tokenizer.definition:
        raise UserError(f"init_from={cfg.init_from}: its tokenizer is not that of dataset={cfg.dataset} "
                        f"(prepare.py --tokenizer={cfg.init_from}, and the same sink_tokens)")
    if vocab_size and vocab_size < tokenizer.vocab_size:
        raise UserError(f"vocab_size={vocab_size}: the data's tokenizer has {tokenizer.vocab_size} ids; "
                        "give at least that many")
