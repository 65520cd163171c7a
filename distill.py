"""Stage 2, distillation: a small model learns what a larger one knows.

    python distill.py                       # out/base teaches a model a quarter of its size -> out/distilled
    python distill.py --student_layers=every:2 --n_embd=128 --n_head=2     # begin as a part of the teacher
    python -m tools.cache_teacher --teacher=out/base --dataset=pystdlib --method=sample
    python distill.py --cache=sample                     # the teacher is read from disk
    python distill.py config/distill_two_stage.py

Reads data/<dataset>/ of text or chats, made with the teacher's tokenizer, and writes out_dir as train.py
does. The loss of each target is (1 - alpha) cross-entropy + alpha T^2 divergence from the teacher
(distillation/divergences.py), and, where asked for, what layers inside lose against layers of the teacher
(distillation/layer_losses.py, between the pairs of distillation/layer_maps.py). With on_policy a share of
the batches is continued by the student itself (distillation/on_policy.py), and the teacher says what it
thinks of that. The teacher is never changed."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from configurator import UserError, configure, require, run_script
from dataset.chat_rows import ChatRows, UnpackedChatRows, batch_of
from dataset.dataloader import Mix, Rows, parse_mix
from dataset.shards import DataFolder
from distillation.divergences import (
    DenseTeacher,
    Kind,
    Objective,
    SparseTeacher,
    linear_distillation,
    select_targets,
)
from distillation.evaluation import StudentEvaluation
from distillation.layer_maps import Strategy, layer_map, map_text
from distillation.on_policy import beginnings, continued
from distillation.pruning import WIDTHS, kept_layers, prune, pruned_config
from distillation.student import ActivationHooks, Student, feature_loss
from distillation.teacher import load_teacher, shard_teacher
from distillation.teacher_cache import TeacherCache, identity_of
from formats import hf
from formats.chat_format import end_of_turn
from formats.hf import teacher_sha256
from formats.tokenizer import Tokenizer
from loop import Run, RunConfig, compiles, fit, stage_at, stage_configs, start_run, training_dtype
from model import GPT, GPTConfig
from modeling.devices import DTYPES
from prepare import PrepareConfig, prepare
from training.staged_data import StagedData, in_epochs

CHOICES = ("dropout", "ternary")  # of a student that is cut out: the tensors are the same either way


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RunConfig, GPTConfig):
    """A run's keys, the student's architecture (where it is not cut out of the teacher), and the teaching."""

    vocab_size: int | None = None  # token ids the student has; None: as many as the data's tokenizer
    n_layer: int = 2  # blocks
    n_head: int = 2  # query heads
    n_embd: int = 128  # width of the residual stream
    intermediate_size: int | None = 256  # width of the MLP; None: 8/3 (gelu: 4) n_embd, rounded up to 256s
    out_dir: str = "out/distilled"  # checkpoints and logs go here; the same command again continues the run
    teacher: str = "out/base"  # model folder, out_dir (its best checkpoint, else the last) or hub id
    teacher_dtype: Literal["float32", "bfloat16"] | None = None  # of its weights; None: as the run computes
    student_layers: str | None = None  # cut the student out of the teacher: every:2, first:3, last:3 or 0,2,5
    alpha: float = 0.9  # share of the divergence; the rest is cross-entropy with the text
    temperature: float = 1.0  # of both sides in the divergence
    divergence: Kind = "forward_kl"  # or reverse_kl, jsd, tv; mse of the logits
    jsd_beta: float = 0.5  # jsd: the teacher's share of the mixture
    cache: Literal["none", "topk", "sample"] = "none"  # read the teacher from what tools.cache_teacher wrote
    layer_map: Strategy = "uniform_plus_last"  # or last, last_k_uniform, all, uniform_consecutive
    hidden_weight: float = 0.0  # weight of a loss between the outputs of mapped blocks
    hidden_loss: Literal["mse", "cosine", "sinkhorn", "info_nce"] = "cosine"  # which
    attention_weight: float = 0.0  # weight of a loss between the attention of mapped blocks
    attention_loss: Literal["relations", "mse"] = "relations"  # relations of q, k and v (MiniLMv2), or direct
    lr_multipliers: dict = field(  # {regex of names: factor}, first match, 0 freezes; the table learns fast
        default_factory=lambda: {"embed_tokens": 5.0})
    on_policy: float = 0.0  # share of the steps whose text the student continues itself (GKD's lambda)
    packing: bool = True  # of chats: several conversations a row, each for itself
    document_mask: bool = False  # of text: attend within documents only

    stage_fixed = frozenset({"teacher", "teacher_dtype", "student_layers", "cache", "layer_map", "packing"})
    resume_free = frozenset({"teacher_dtype"})

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        if not (self.student_layers or self.init_from):  # else the sizes come from a folder
            GPTConfig.from_keys(self, vocab_size=self.vocab_size or 64)
        require(self, "alpha", 0 <= self.alpha <= 1, "from 0 to 1")
        require(self, "temperature", 0 < self.temperature < math.inf, "positive")
        require(self, "jsd_beta", 0 < self.jsd_beta < 1, "between 0 and 1")
        require(self, "hidden_weight", self.hidden_weight >= 0, "at least 0")
        require(self, "attention_weight", self.attention_weight >= 0, "at least 0")
        require(self, "on_policy", 0 <= self.on_policy <= 1, "from 0 to 1")
        if self.cache != "none":
            plain = {"divergence": "forward_kl", "on_policy": 0, "hidden_weight": 0, "attention_weight": 0}
            for key, value in plain.items():
                if getattr(self, key) != value:
                    raise UserError(f"{key}={getattr(self, key)}: needs the teacher itself, not cache="
                                    f"{self.cache}")
        if self.on_policy and self.document_mask:
            raise UserError(f"on_policy={self.on_policy}: the student writes without document_mask")
        if self.student_layers and self.init_from:
            raise UserError(f"student_layers={self.student_layers}: cuts the student out of the teacher; "
                            f"init_from={self.init_from} gives another. Leave one of them away")

    # The text has no weight of its own. AdamW and Muon do not mind a gradient's size, so only the ratio of
    # weights counts: hidden_weight=100 with alpha=0 all but leaves the text out.
    @property
    def objective(self) -> Objective:
        return Objective(self.alpha, self.temperature, self.divergence, self.jsd_beta)

    @property
    def uses_layer_losses(self) -> bool:
        return self.hidden_weight > 0 or self.attention_weight > 0


# ---- Data -------------------------------------------------------------------------------------------------

def batches_at(data: StagedData, caches: dict[int, TeacherCache], step: int) -> list[dict[str, Any]]:
    """This rank's micro-batches of a step; with a cache, also what the teacher said of their rows."""
    cfg, mix, first, count = data.shard_for_step(step)
    owner, index = mix.locate(first, count)
    # Whether a step is the student's own follows from (seed, step), so all ranks agree.
    draw = np.random.default_rng((cfg.seed, step, 1)).random()
    batches = []
    for start in range(0, count, cfg.micro_batch_size):
        part = slice(start, start + cfg.micro_batch_size)
        rows = mix.samples(first + start, cfg.micro_batch_size)
        batch = batch_of(rows, cfg, mix.tokenizer.eot_id)
        if caches:
            batch |= cached_teacher(caches, mix, owner[part], index[part], batch)
        if draw < cfg.on_policy:
            prompts, lengths = beginnings(rows)
            numbers = list(range(first + start, first + start + len(rows)))
            batch |= {"prompts": prompts, "lengths": lengths, "numbers": numbers, "count": sum(lengths)}
        batches.append(batch | {"stage": data.stages.index(stage_at(data.stages, step))})
    return batches


def cached_teacher(caches: dict[int, TeacherCache], mix: Mix, owner: np.ndarray, index: np.ndarray,
                   batch: dict[str, Any]) -> dict[str, Tensor]:
    """{"teacher_ids", "teacher_probs": (N, k), "teacher_tail": (N,)} at the positions of the batch's targets;
    samples have no tail."""
    T = batch["input_ids"].shape[1]
    found = [caches[id(mix.rows[o])].read(i)[:T] for o, i in zip(owner, index, strict=True)]  # (T, width)
    values = np.stack(found)  # (n, T, width)
    values = values.reshape(-1, values.shape[-1])
    if "positions" in batch:
        values = values[batch["positions"].numpy()]
    return caches[id(mix.rows[owner[0]])].decoded(values)


# ---- Loss -------------------------------------------------------------------------------------------------

class Distillation:
    """The loss of a batch: the student's forward pass inside the teacher's, where both output matrices are
    gathered, however they are sharded."""

    def __init__(self, student: Student, teacher: nn.Module | None, configs: list[DistillConfig],
                 vocab_size: int, end_ids: set[int]):
        """configs: of the stages. teacher: None where batches bring what it said. end_ids: what ends a row
        that the student writes."""
        self.student, self.teacher, self.vocab_size = student, teacher, vocab_size
        self.configs, self.end_ids = configs, end_ids
        self.taps = None
        if student.pairs and teacher is not None:
            self.taps = (ActivationHooks(student, [s for s, _ in student.pairs]),
                         ActivationHooks(teacher, [t for _, t in student.pairs]))

    def __call__(self, forward: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss summed over the targets, metrics). forward: the student, or DDP's wrapper of it."""
        cfg = self.configs[batch["stage"]]
        if "prompts" in batch:
            batch = continued(self.student, batch, self.configs[0].seed, self.vocab_size, self.end_ids)
        if "teacher_ids" in batch:
            source = SparseTeacher(batch["teacher_ids"], batch["teacher_probs"], batch.get("teacher_tail"))
            return self.student_loss(forward, batch, source)

        def head(hidden: Tensor, weight: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.enable_grad():
                return self.student_loss(forward, batch, DenseTeacher(select_targets(hidden, batch), weight))

        if cfg.alpha == 0 and not cfg.uses_layer_losses and "prompts" not in batch:  # nobody is asked
            return self.student_loss(forward, batch, None)
        with torch.no_grad():
            return self.teacher(batch["input_ids"], document_ids=batch.get("document_ids"), head=head)

    def student_loss(self, forward: nn.Module, batch: dict[str, Any],
               teacher: DenseTeacher | SparseTeacher | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's forward pass, against what the teacher says."""
        cfg, own = self.configs[batch["stage"]], "prompts" in batch
        # The student's own words teach it nothing; what the teacher says of them does.
        objective = cfg.objective._replace(alpha=1.0) if own else cfg.objective

        def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            found = linear_distillation(select_targets(hidden, batch), weight, batch["targets"].flatten(),
                                        teacher, self.vocab_size, objective)
            inside = hidden.new_zeros((2,))
            if self.student.pairs:
                inside = feature_loss(self.student, *self.taps, batch, cfg)  # (2,) hidden, attention
            return (*found, inside)

        loss, ce, kd, inside = forward(batch["input_ids"], document_ids=batch.get("document_ids"), head=head)
        loss = loss + cfg.hidden_weight * inside[0] + cfg.attention_weight * inside[1]
        if not cfg.hidden_weight:  # DDP waits for the gradient of every parameter
            loss = loss + 0.0 * sum(matrix.sum() for matrix in self.student.projections.parameters())
        # Of its own words the cross-entropy estimates the student's entropy: not what a text costs.
        metrics = {"entropy": ce, "own_divergence": kd} if own else {"loss": ce, "divergence": kd}
        if self.student.pairs:
            metrics |= {"hidden": inside[0].detach(), "attention": inside[1].detach()}
        return loss, metrics


# ---- Go ---------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> int:
    cfg, provenance = configure(DistillConfig, argv, usage=__doc__)
    cfg, layers = with_architecture(cfg, provenance)
    with start_run(cfg, provenance) as run:
        if any(stage.dataset == "pystdlib" for stage in stage_configs(cfg)):
            run.run_on_rank0(lambda: prepare(PrepareConfig()))  # the embedded default, or nothing to do
        kind = row_kind(cfg)
        user_cfg, cfg = cfg, in_epochs(cfg, kind)
        data = StagedData(cfg, kind, run.rank, run.world_size)
        tokenizer = run.tokenizer = data.tokenizer
        check_folders(cfg, tokenizer)
        teacher_hash = run.run_on_rank0(lambda: teacher_sha256(hf.find_folder(cfg.teacher)))
        caches, teacher = {}, None
        if cfg.cache != "none":
            caches = {id(rows): open_cache(cfg, rows, teacher_hash)
                      for mix in data.mixes.values() for rows in mix.rows}
            if len({cache.records.spec for cache in caches.values()}) > 1:
                raise UserError(f"cache={cfg.cache}: the caches of these data sets differ in k or values")
        else:
            dtype = DTYPES[cfg.teacher_dtype] if cfg.teacher_dtype else training_dtype(cfg, run)
            longest = max(stage.block_size for stage in stage_configs(cfg))
            teacher = load_teacher(cfg.teacher, tokenizer, run.device, dtype, longest)
            shard_teacher(teacher, cfg.parallel, run)
        student = make_student(cfg, layers, teacher, data, run)
        if isinstance(teacher, GPT) and compiles(cfg, student, run):  # one of transformers stays as it is
            for block in teacher.model["layers"]:
                block.compile()
        evaluation = StudentEvaluation(data.stages[-1].cfg, data.last_mix, kind, teacher, run)
        run.write_run_json(user_cfg, data=data.hashes(), teacher=teacher_hash,
                     caches=sorted(cache.folder.name for cache in caches.values()))
        # Where the student's own answers end; a row of text goes on behind an end.
        ends = {tokenizer.eot_id, end_of_turn(tokenizer)} if kind.kind == "chat" else set()
        loss_fn = Distillation(student, teacher, stage_configs(cfg), tokenizer.vocab_size, ends)
        results = fit(cfg, student, lambda step: batches_at(data, caches, step), loss_fn, evaluation, run)
        print_summary(cfg, student, teacher, results, run, kind.kind)
    return 0


def with_architecture(cfg: DistillConfig, provenance: dict[str, str]) -> tuple[DistillConfig, list[int]]:
    """`cfg` with the student's architecture, and the layers that are cut out of the teacher, if any.

    UserError for keys of the architecture that come with init_from or with the teacher.
    """
    if not cfg.init_from and not cfg.student_layers:
        return cfg, []
    architecture = {each.name for each in dataclasses.fields(GPTConfig)}
    free = {"block_size", *((*WIDTHS, *CHOICES) if cfg.student_layers else ())}
    source = f"student_layers={cfg.student_layers}" if cfg.student_layers else f"init_from={cfg.init_from}"
    if both := sorted(architecture & provenance.keys() - free):
        raise UserError(f"{provenance[both[0]]}: {both[0]} comes with {source} and cannot be given")
    fields = hf.read_config(hf.find_folder(cfg.init_from or cfg.teacher))
    layers = []
    if cfg.student_layers:
        layers = kept_layers(cfg.student_layers, fields["n_layer"])
        widths = {key: getattr(cfg, key) for key in WIDTHS if key in provenance}
        fields = dataclasses.asdict(pruned_config(GPTConfig(**fields), layers, widths))
        fields |= {key: getattr(cfg, key) for key in CHOICES if key in provenance}
    return dataclasses.replace(cfg, **fields | {"block_size": cfg.block_size}), layers


def check_folders(cfg: DistillConfig, tokenizer: Tokenizer) -> None:
    """UserError where out_dir holds a model that is read, or a model's ids are not those of the data."""
    for key in ("teacher", "init_from"):
        source = getattr(cfg, key)
        if source and hf.find_folder(source).resolve().is_relative_to(Path(cfg.out_dir).resolve()):
            raise UserError(f"out_dir={cfg.out_dir}: holds the model of {key}={source}; give another")
    if cfg.vocab_size and cfg.vocab_size < tokenizer.vocab_size:
        raise UserError(f"vocab_size={cfg.vocab_size}: the data's tokenizer has {tokenizer.vocab_size} ids")
    if cfg.init_from and Tokenizer.load(hf.find_folder(cfg.init_from)).definition != tokenizer.definition:
        raise UserError(f"init_from={cfg.init_from}: its tokenizer is not that of dataset={cfg.dataset}")


def row_kind(cfg: DistillConfig) -> Any:
    """What the rows of the first data set are: text, or chats."""
    kind = DataFolder(parse_mix(stage_configs(cfg)[0].dataset)[0][0]).meta["kind"]
    if kind == "chat" and any(stage.on_policy for stage in stage_configs(cfg)):
        if cfg.packing:
            raise UserError("on_policy: the student answers one conversation a row; add --packing=False")
        if cfg.parallel == "fsdp":  # whose ranks would have to write equally long answers
            raise UserError("on_policy: of chats, needs parallel=ddp or none")
    return Rows if kind == "text" else ChatRows if cfg.packing else UnpackedChatRows


def open_cache(cfg: DistillConfig, rows: Any, teacher_hash: str) -> TeacherCache:
    """What tools/cache_teacher.py wrote of these rows. UserError, with its command line, if it did not."""
    for stage in stage_configs(cfg):
        if (stage.temperature, stage.document_mask) != (cfg.temperature, cfg.document_mask):
            raise UserError("stages: temperature and document_mask cannot change under a cache; give them to "
                            "the whole run")
    words = {"teacher": cfg.teacher, "dataset": rows.data.folder, "block_size": rows.T, "method": cfg.cache,
             "temperature": cfg.temperature}
    words |= {key: value for key, value in (("packing", cfg.packing), ("document_mask", cfg.document_mask))
              if value != getattr(DistillConfig, key)}
    hint = "python -m tools.cache_teacher " + " ".join(f"--{key}={value}" for key, value in words.items())
    return TeacherCache(rows, identity_of(rows, teacher_hash, cfg.document_mask), cfg.cache, cfg.temperature,
                        hint)


def make_student(cfg: DistillConfig, layers: list[int], teacher: nn.Module | None, data: StagedData,
                 run: Run) -> Student:
    """On the meta device, for random weights or those of init_from; cut out of the teacher, with weights."""
    stages = stage_configs(cfg)
    longest = max(stage.block_size for stage in stages)
    if cfg.init_from or layers:  # a context that is there stays
        longest = max(longest, hf.read_config(hf.find_folder(cfg.init_from or cfg.teacher))["block_size"])
    config = GPTConfig.from_keys(cfg, vocab_size=cfg.vocab_size or data.tokenizer.vocab_size, block_size=longest)
    pairs, width = [], None
    if any(stage.uses_layer_losses for stage in stages):
        fields = hf.read_config(hf.find_folder(cfg.teacher))
        pairs = layer_map(cfg.layer_map, config.n_layer, fields["n_layer"])
        width = fields["n_embd"] if any(stage.hidden_weight for stage in stages) else None
        run.print(f"layers    {cfg.layer_map}\n{map_text(pairs)}")
    with torch.device("meta"):
        student = Student(config, pairs, width, cfg.seed)
    if layers:
        source = GPT.from_pretrained(hf.find_folder(cfg.teacher))  # whole, on each rank, for a moment
        ids = batch_of(data.last_mix.samples(0, 16), cfg, data.tokenizer.eot_id)["input_ids"]
        student.materialize("cpu", cfg.seed)
        student.load_state_dict(prune(source.eval(), config, layers, ids).state_dict(), strict=False)
    run.print(f"student   {student.num_parameters():,} parameters"
              + (f", cut out of {cfg.teacher}: layers {', '.join(map(str, layers))}" if layers else ""))
    return student


def print_summary(cfg: DistillConfig, student: Student, teacher: nn.Module | None, results: dict[str, float],
                  run: Run, kind: str) -> None:
    """How good the student is beside its teacher, and what to do next."""
    if run.rank > 0 or not results:
        return
    run.print(f"\nvalidation  student  loss {results['val_loss']:.4f}, perplexity "
              f"{results['val_perplexity']:.2f}  ({student.num_parameters():,} parameters)")
    if teacher is not None:
        loss = results["val_teacher_loss"]
        run.print(f"            teacher  loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}\n"
                  f"            KL {results['val_kl']:.4f} nats, the same likeliest token at "
                  f"{100 * results['val_agreement']:.1f} % of places")
    words = "--chat=True" if kind == "chat" else '--prompt="import os"'
    run.print(f"next        python sample.py --model={run.out_dir} {words}\n"
              f"            python -m tools.compare --teacher={cfg.teacher} --student={run.out_dir}")


if __name__ == "__main__":
    run_script(main)
