"""Which samples each training step reads, across the stages of a run.

    data = StagedData(cfg, Rows, rank=0, world_size=2)
    stage_cfg, mix, first, count = data.share(step)      # this rank's samples of the step
    rows = mix.samples(first, count)

The answer depends only on (seed, step, rank, world size), so a resumed run needs no loader state. Stages that
read the same data set with the same row length share one position in it: the later stage goes on where the
earlier one stopped.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from configurator import UserError
from dataset.dataloader import Mix, Rows
from training.stages import plan_stages, stage_at, with_steps


class StagedData:
    """Which samples a step reads, stage by stage: the same ones for any number of ranks."""

    def __init__(self, cfg: Any, kind: Callable = Rows, rank: int = 0, world_size: int = 1):
        """cfg: a run's. Raises UserError where its stages' data sets differ in their tokenizers."""
        self.stages, self.rank, self.world_size = plan_stages(cfg), rank, world_size
        self.mixes = {self.key(stage.cfg): Mix(stage.cfg.dataset, stage.cfg.block_size, cfg.seed, kind)
                      for stage in self.stages}
        self.last_mix = self.mixes[self.key(self.stages[-1].cfg)]
        self.tokenizer = self.last_mix.tokenizer
        if any(mix.tokenizer.definition != self.tokenizer.definition for mix in self.mixes.values()):
            raise UserError("stages: their data sets were made with different tokenizers")

    @staticmethod
    def key(cfg: Any) -> tuple[str, int]:
        """Stages that agree in this read the same rows, the later one from where the earlier one stopped."""
        return cfg.dataset, cfg.block_size

    def shard_for_step(self, step: int) -> tuple[Any, Mix, int, int]:
        """This rank's part of a step: the stage's configuration, its mix, the first sample, how many."""
        stage = stage_at(self.stages, step)
        cfg = stage.cfg
        earlier = sum((s.last - s.first) * s.cfg.global_batch_size for s in self.stages
                      if s.first < stage.first and self.key(s.cfg) == self.key(cfg))
        count = cfg.global_batch_size // self.world_size
        first = earlier + (step - stage.first) * cfg.global_batch_size + self.rank * count
        return cfg, self.mixes[self.key(cfg)], first, count

    def used(self) -> Iterator[tuple[Any, np.ndarray]]:
        """(rows, which of them the run reads) of every folder of every mix."""
        for key, mix in self.mixes.items():
            count = sum((stage.last - stage.first) * stage.cfg.global_batch_size
                        for stage in self.stages if self.key(stage.cfg) == key)
            owner, index = mix.locate(0, count)
            for folder, rows in enumerate(mix.rows):
                yield rows, np.unique(index[owner == folder])

    def hashes(self) -> dict[str, str]:
        """`Mix.hashes` of all stages."""
        return {folder: digest for mix in self.mixes.values() for folder, digest in mix.hashes().items()}


def in_epochs(cfg: Any, kind: Callable = Rows) -> Any:
    """`cfg` with its stages' epochs turned into steps."""
    return with_steps(cfg, lambda stage: Mix(stage.dataset, stage.block_size, cfg.seed, kind).epoch_samples()
                      / stage.global_batch_size)
