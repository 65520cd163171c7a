"""Stage 2, distillation: a small model, the student, learns the predictions of a larger one, the teacher.

    python distill.py                       # out/base teaches a model a quarter of its size -> out/distilled
    python distill.py --student_layers=every:2 --n_embd=128 --n_head=2 --out_dir=out/half   # cut out of it
    python distill.py config/distill_two_stage.py
    python -m tools.cache_teacher --teacher=out/base --dataset=pystdlib --method=sample
    python distill.py --cache=sample --out_dir=out/cached    # read the teacher's predictions from disk
    python distill.py --teacher=path/to/SmolLM2 --align=bytes --out_dir=out/aligned     # another tokenizer

Reads data/<dataset>/, text or chats, made with the teacher's tokenizer. Writes out_dir as train.py does.

The loss of each target is (1 - alpha) cross-entropy + alpha T^2 divergence from the teacher, with both models
at temperature T (arXiv 1503.02531). forward_kl is KL(teacher || student), reverse_kl the other way round
(distillation/divergences.py). Optional: losses between layers (distillation/layer_losses.py), a student
pruned from the teacher (distillation/pruning.py), and text that the student writes itself
(distillation/on_policy.py). A teacher with another tokenizer needs --align=bytes (distillation/alignment.py).
The teacher is never changed.
"""
# mypy: disable-error-code="assignment"
# (here vocab_size may be None, which GPTConfig does not allow)

import dataclasses
import math
import shlex
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from configurator import UserError, require, require_not_negative, run_script
from dataset.chat_rows import ChatRows, batch_of, row_class
from dataset.dataloader import Rows, parse_mix
from dataset.shards import DataFolder
from distillation import divergences
from distillation.alignment import Aligner, compared_first
from distillation.divergences import AlignedTeacher, DenseTeacher, Objective, SparseTeacher, select_targets
from distillation.evaluation import StudentEvaluation
from distillation.layer_maps import explicit_pairs, layer_map
from distillation.on_policy import prompt_lengths, rollout_batch
from distillation.pruning import WIDTHS, copy_tables, kept_layers, prune, pruned_config
from distillation.student import ActivationHooks, Student, feature_loss, gradient_cosine, noise_term
from distillation.teacher import context_of, load_teacher
from distillation.teacher_cache import TeacherCache, decode, identity_of
from evals.all_tasks import with_tasks
from formats import hf
from formats.chat_format import end_of_turn
from formats.hf import model_sha256
from formats.tokenizer import Tokenizer
from loop import Run, RunConfig, compiles, fit, shard, stage_at, stage_configs, start_run
from model import GPT, GPTConfig
from modeling.devices import pick_dtype, to_device
from prepare import PrepareConfig, prepare
from training.curves import print_end
from training.staged_data import StagedData, chat_rows_text, check_vocabulary, prepare_default
from training.stages import configure_run, context_length, require_free_keys, require_multipliers

FREE_KEYS = ("dropout", "ternary")  # keys that a pruned student may change: they change no tensor shape


@dataclass(frozen=True, kw_only=True)
class DistillConfig(RunConfig, GPTConfig):
    """The keys of a run, of the student's architecture (unless a folder brings it), and of distillation."""

    vocab_size: int | None = None  # token ids of the student; None is the size of the data's tokenizer
    n_layer: int = 2  # blocks
    n_head: int = 2  # query heads
    n_embd: int = 128  # width of the residual stream
    intermediate_size: int | None = 256  # MLP width; None is 8/3 n_embd (gelu: 4), the next multiple of 256
    out_dir: str = "out/distilled"  # checkpoints and logs go here; the same command again continues the run
    teacher: str = "out/base"  # model folder, out_dir (its best checkpoint, else the last) or hub id
    teacher_dtype: Literal["float32", "bfloat16"] | None = None  # of its weights; None is the run's dtype
    align: Literal["ids", "bytes"] = "ids"  # bytes: a teacher with another tokenizer reads the same text
    student_layers: str | None = None  # prune the student from the teacher: every:2, first:3, last:3 or 0,2,5
    alpha: float = 0.9  # weight of the divergence; the cross-entropy with the text has the weight 1 - alpha
    temperature: float = 1.0  # of student and teacher in the divergence
    divergence: divergences.Kind = "forward_kl"  # between teacher and student; mse compares logits
    jsd_beta: float = 0.5  # weight of the teacher in the mixture of divergence=jsd
    cache: Literal["none", "topk", "sample"] = "none"  # read predictions that tools.cache_teacher wrote
    new_weights: bool = False  # with student_layers, keep the architecture only and draw random weights
    student_embeddings: Literal["own", "teacher"] = "own"  # teacher: begin with its embedding table
    layer_map: str = "uniform_plus_last"  # student and teacher layers: a strategy, or pairs such as 0:1,1:3
    hidden_weight: float = 0.0  # weight of a loss between the outputs of mapped blocks
    hidden_loss: Literal["mse", "cosine", "sinkhorn", "info_nce"] = "cosine"  # the loss of hidden_weight
    attention_weight: float = 0.0  # weight of a loss between the attention of mapped blocks
    attention_loss: Literal["relations", "relations_mse", "mse"] = "relations"  # within q, k, v (MiniLMv2)
    log_gradient_cosine: bool = False  # log the cosine between the gradients of predictions and layer losses
    gradient_noise: float = 0.0  # norm of Gaussian noise that is added to each step's gradient
    lr_multipliers: dict = field(  # {regex of parameter names: factor}, first match wins, 0 freezes
        default_factory=lambda: {"embed_tokens": 5.0})
    on_policy: float = 0.0  # share of the steps whose text the student writes itself (lambda in GKD)
    packing: bool = True  # chats: several conversations per row, each attending to itself only
    document_mask: bool = False  # text: attend within documents only

    model_keys = ("init_from", "teacher")
    stage_fixed = frozenset({"teacher", "teacher_dtype", "align", "student_layers", "student_embeddings",
                             "new_weights", "cache", "layer_map", "packing"})
    resume_free = frozenset({"teacher_dtype"})

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        if not (self.student_layers or self.init_from):  # otherwise the sizes come from a model folder
            GPTConfig.from_keys(self, vocab_size=self.vocab_size or 64)
        require(self, "alpha", 0 <= self.alpha <= 1, "from 0 to 1")
        require(self, "temperature", 0 < self.temperature < math.inf, "positive")
        require(self, "jsd_beta", 0 < self.jsd_beta < 1, "between 0 and 1")
        require(self, "on_policy", 0 <= self.on_policy <= 1, "from 0 to 1")
        require_not_negative(self, "hidden_weight", "attention_weight", "gradient_noise")
        explicit_pairs(self.layer_map)  # raises UserError
        has_weights = self.init_from or (self.student_layers and not self.new_weights)
        for is_set, keys, need in (  # if is_set, the keys must have their defaults
                # A cache has the teacher's probabilities of the data, and nothing else.
                (self.cache != "none", ("divergence", "on_policy", "hidden_weight", "attention_weight"),
                 "needs the teacher itself, so it only works with cache=none"),
                (self.align == "bytes", ("student_layers", "student_embeddings", "hidden_weight",
                                         "attention_weight"),
                 "needs the teacher's tokenizer, so it only works with align=ids"),
                # Only this divergence is right for the mean over the cases of distillation/alignment.py.
                (self.divergence != "forward_kl", ("align",), "only works with divergence=forward_kl"),
                (self.cache == "sample", ("align",), "does not work with cache=sample"),
                (self.parallel == "fsdp", ("gradient_noise", "log_gradient_cosine"),
                 "does not work with parallel=fsdp"),
                (self.document_mask, ("on_policy",), "does not work with document_mask=True"),
                (self.init_from, ("student_layers",), "starts from the teacher; remove init_from"),
                (has_weights, ("student_embeddings",),
                 "needs random weights: no init_from, and student_layers with new_weights only"),
                (not self.student_layers, ("new_weights",), "only works with student_layers")):
            for key in keys:
                if is_set and getattr(self, key) != getattr(DistillConfig, key):
                    raise UserError(f"{key}={getattr(self, key)}: {need}")

    @property
    def uses_layer_losses(self) -> bool:
        """Whether a loss between layers is part of the loss."""
        return self.hidden_weight > 0 or self.attention_weight > 0


# ---- Data -------------------------------------------------------------------------------------------------

Caches = dict[Any, TeacherCache]  # {rows of a folder: the predictions for them}


def row_kind(cfg: DistillConfig) -> type[Rows] | type[ChatRows]:
    """The class of the training rows: text or chats, as in the first data set. Raises UserError if on_policy
    does not work with them."""
    # Mix refuses folders of another kind, so the first one decides.
    data = DataFolder(parse_mix(stage_configs(cfg)[0].dataset)[0][0])
    if data.meta["kind"] == "chat" and any(stage.on_policy for stage in stage_configs(cfg)):
        if cfg.packing:
            raise UserError("on_policy: needs one conversation per row; add --packing=False")
        if cfg.parallel == "fsdp":  # all ranks would have to generate the same number of tokens
            raise UserError("on_policy: does not work with chats and parallel=fsdp; use parallel=ddp or none")
    return row_class(data, cfg.packing)


def open_cache(cfg: DistillConfig, rows: Rows | ChatRows, teacher_hash: str) -> TeacherCache:
    """The cache of these rows. Raises UserError, with the command that makes the cache, if there is none."""
    # The command must have the settings of this run.
    keys = ("teacher", "temperature", "packing", "document_mask", "align")
    settings = {key: getattr(cfg, key) for key in keys} | {
        "dataset": rows.data.folder, "block_size": rows.T, "method": cfg.cache}
    hint = shlex.join(["python", "-m", "tools.cache_teacher",
                       *(f"--{key}={value}" for key, value in settings.items())])
    identity = identity_of(rows, teacher_hash, cfg.document_mask, cfg.align)
    return TeacherCache(rows, identity, cfg.cache, cfg.temperature, hint)


def open_caches(cfg: DistillConfig, data: StagedData, teacher_hash: str) -> Caches:
    """The caches of all training rows, {} with cache=none. Raises UserError if one is missing or differs."""
    if cfg.cache == "none":
        return {}
    for stage in stage_configs(cfg):
        # The stored probabilities have one temperature, and the teacher saw the rows in one way.
        if (stage.temperature, stage.document_mask) != (cfg.temperature, cfg.document_mask):
            raise UserError("stages: temperature and document_mask cannot change with a cache; set them for "
                            "the whole run")
    caches = {rows: open_cache(cfg, rows, teacher_hash) for mix in data.mixes.values() for rows in mix.rows}
    # A batch may mix rows of several folders, so their records must have the same format.
    if len({cache.dtype for cache in caches.values()}) > 1:
        raise UserError(f"cache={cfg.cache}: the caches of these data sets differ in k or values")
    return caches


def cached_predictions(caches: Caches, places: list[tuple[Any, int]],
                       batch: dict[str, Any]) -> dict[str, Any]:
    """The teacher's predictions for the targets of a batch. places: its rows, as (rows of a folder, number).

    Returns {"teacher_ids", "teacher_probs": (N, k)} and, for topk, "teacher_tail": (N,). With --align=bytes,
    N counts only the targets that are compared, and the keys of `compared_first` are added.
    """
    # A cache has a record for each position of a whole row. Chat batches are cut after their last target, and
    # compute logits at the targets only.
    T = batch["input_ids"].shape[1]
    records = np.concatenate([caches[rows].read(number)[:T] for rows, number in places])  # (B T,)
    if "kind" in (records.dtype.names or ()):
        return compared_first(batch, records["kind"]) | decode(records[records["kind"] > 0])
    if "positions" in batch:
        records = records[batch["positions"].numpy()]  # (N,)
    return decode(records)


def batches_at(data: StagedData, caches: Caches, step: int,
               aligner: Aligner | None = None) -> list[dict[str, Any]]:
    """This rank's micro-batches of a step, with cached predictions, or with prompts if it is on-policy."""
    cfg, mix, first, count = data.shard_for_step(step)
    # Where each sample is, to find its cached records.
    places = [(mix.rows[folder], row) for folder, row in zip(*mix.locate(first, count), strict=True)]
    # Drawn from (seed, step) alone, so all ranks agree on whether the student writes the text of this step.
    is_on_policy = np.random.default_rng((cfg.seed, step, 1)).random() < cfg.on_policy
    batches = []
    for start in range(0, count, cfg.micro_batch_size):
        rows = mix.samples(first + start, cfg.micro_batch_size)  # (B, T + 1) of text or (B, 3, T) of chats
        batch = batch_of(rows, mix.tokenizer.eot_id, cfg.packing, cfg.document_mask)
        if caches:
            batch |= cached_predictions(caches, places[start:start + cfg.micro_batch_size], batch)
        if is_on_policy:
            # The text itself is generated in the loss, with the current weights. The rows' numbers in the run
            # seed it, so that it does not depend on how a step is split.
            prompts, lengths = prompt_lengths(rows)
            numbers = list(range(first + start, first + start + len(rows)))
            batch |= {"prompts": prompts, "lengths": lengths, "numbers": numbers, "count": sum(lengths)}
        elif aligner and not caches and cfg.alpha > 0:
            batch = aligner.align(batch)
        # The loss reads its weights and temperature from the config of the stage.
        batches.append(batch | {"stage": data.stages.index(stage_at(data.stages, step)),
                                "noise_seed": (cfg.seed * 2**32 + step) % 2**63})  # the same on all ranks
    return batches


# ---- Loss -------------------------------------------------------------------------------------------------

class Distillation:
    """The loss of a batch. The student's forward pass runs inside the teacher's:

        teacher.forward(ids)               teacher blocks -> hidden states; its output matrix is gathered
        |  teacher_head(hidden, weight)      switches gradients back on
        |  |  student.forward(ids)         student blocks -> hidden states; its output matrix is gathered
        |  |  |  student_head(hidden, weight)
        |  |  |  |  linear_distillation    per chunk: logits of both -> divergence, cross-entropy, gradients
        |  |  |  |  feature_loss           layer losses, from what the hooks recorded in both passes
        |  |  |  return loss, metrics

    There are two reasons. First, no (B, T, V) logits are stored: both heads see hidden states and compute
    logits chunk by chunk. Second, FSDP gathers an output matrix only while its model's forward pass runs,
    so both matrices are whole only inside both passes.
    """

    def __init__(self, student: Student, teacher: nn.Module | None, configs: list[DistillConfig],
                 end_ids: set[int | None], vocab_size: int, aligner: Aligner | None = None):
        """configs: one per stage. teacher: None if batches carry cached predictions. end_ids: the tokens that
        end what the student writes. aligner: for a teacher with another tokenizer."""
        self.student, self.teacher, self.vocab_size = student, teacher, vocab_size
        self.configs, self.end_ids, self.aligner = configs, end_ids, aligner
        # They stay for the whole run: a stage may turn the layer losses on or off.
        self.hooks: tuple[ActivationHooks, ActivationHooks] | None = None
        if student.pairs and isinstance(teacher, GPT):
            self.hooks = (ActivationHooks(student, [s for s, _ in student.pairs]),
                          ActivationHooks(teacher, [t for _, t in student.pairs]))

    def __call__(self, forward: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss summed over the targets, metrics). forward: the student, or DDP's wrapper of it."""
        cfg = self.configs[batch["stage"]]
        # On-policy: replace the text after each prompt by what the student writes now.
        if "prompts" in batch:
            batch = rollout_batch(self.student, batch, self.configs[0].seed, self.vocab_size, self.end_ids)
        # From a cache: no teacher in memory, so the student's forward pass is all there is.
        if "teacher_ids" in batch:
            cached = SparseTeacher(batch["teacher_ids"], batch["teacher_probs"], batch.get("teacher_tail"))
            return self.student_loss(forward, batch, self.aligner.teacher_of(batch, cached) if self.aligner
                                     else cached)
        # From the text alone: no need to run the teacher.
        if cfg.alpha == 0 and not cfg.uses_layer_losses and "prompts" not in batch:
            return self.student_loss(forward, batch, None)
        # From the teacher. It builds no graph; teacher_head turns gradients on again for the student.
        assert self.teacher is not None
        if self.aligner and "slots" not in batch:  # the student has just written this text
            batch = to_device(self.aligner.align(batch), batch["input_ids"].device)
        prefix = "teacher_" if self.aligner else ""
        with torch.no_grad():
            return self.teacher(batch[f"{prefix}input_ids"], document_ids=batch.get(f"{prefix}document_ids"),
                                head=lambda hidden, weight: self.teacher_head(forward, batch, hidden, weight))

    def teacher_head(self, forward: nn.Module, batch: dict[str, Any], hidden: Tensor,
                     weight: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """hidden: (B, T, C) of the teacher. weight: its output matrix, or None if `hidden` has its logits."""
        teacher: divergences.Teacher
        if self.aligner:
            teacher = self.aligner.teacher_of(batch, self.aligner.translated(batch, hidden, weight))
        else:
            teacher = DenseTeacher(select_targets(hidden, batch), weight)
        # Run the student now, while the teacher's output matrix is gathered.
        with torch.enable_grad():
            return self.student_loss(forward, batch, teacher)

    def student_loss(self, forward: nn.Module, batch: dict[str, Any],
                     teacher: divergences.Teacher | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's forward pass, and its loss against the teacher's predictions."""
        cfg, is_on_policy = self.configs[batch["stage"]], "prompts" in batch
        # Through `forward`, and not self.student: DDP's wrapper must see the pass to average the gradients.
        loss, ce, kd, features = forward(
            batch["input_ids"], document_ids=batch.get("document_ids"),
            head=lambda hidden, weight: self.student_head(batch, teacher, hidden, weight))  # scalars, (2,)
        # AdamW and Muon ignore the size of a gradient, so only the ratios of the weights count: with
        # hidden_weight=100 and alpha=0, the cross-entropy hardly matters.
        layers = cfg.hidden_weight * features[0] + cfg.attention_weight * features[1]
        # On its own text, the student's cross-entropy estimates its entropy; it says nothing about the data.
        metrics = {"entropy": ce, "own_divergence": kd} if is_on_policy else {"loss": ce, "divergence": kd}
        if isinstance(teacher, AlignedTeacher):
            metrics["aligned"] = torch.tensor(float(len(teacher.is_split)), device=ce.device)
        if self.student.pairs:
            metrics |= {"hidden": features[0].detach(), "attention": features[1].detach()}
        trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        if cfg.log_gradient_cosine and layers.requires_grad:
            metrics["cosine"] = gradient_cosine((loss, layers), trained) * batch["count"]
        loss = loss + layers
        if cfg.gradient_noise:  # the loop divides by the count of the whole step: all parts of it add up to 1
            loss = loss + batch["count"] * noise_term(trained, cfg.gradient_noise, batch["noise_seed"])
        return loss, metrics

    def student_head(self, batch: dict[str, Any], teacher: divergences.Teacher | None, hidden: Tensor,
                     weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, cross-entropy, T^2 * divergence, (2,) layer losses). hidden: (B, T, C) of the student."""
        cfg = self.configs[batch["stage"]]
        # The student's own tokens are not right answers, so on-policy there is no cross-entropy.
        alpha = 1.0 if "prompts" in batch else cfg.alpha
        loss, ce, kd = divergences.linear_distillation(
            select_targets(hidden, batch), weight, batch["targets"].flatten(), teacher, self.vocab_size,
            Objective(alpha, cfg.temperature, cfg.divergence, cfg.jsd_beta))
        # The teacher's forward pass has filled its hooks, and the student's blocks have just filled theirs.
        features = hidden.new_zeros(2)
        if self.hooks:
            features = feature_loss(self.student, *self.hooks, batch,
                                    cfg.hidden_loss if cfg.hidden_weight else None,
                                    cfg.attention_loss if cfg.attention_weight else None)
        # DDP waits for a gradient of every parameter, also in a stage that does not use the projections. With
        # FSDP they are whole only inside this forward pass.
        if not cfg.hidden_weight:
            loss = loss + 0.0 * sum(matrix.sum() for matrix in self.student.projections.parameters())
        return loss, ce, kd, features


# ---- Models -----------------------------------------------------------------------------------------------

def with_architecture(cfg: DistillConfig, provenance: dict[str, str]) -> tuple[DistillConfig, list[int]]:
    """`cfg` with the architecture of its model folder, and the teacher layers that a pruned student keeps.

    Raises UserError if the user set a key of the architecture that the folder determines.
    """
    if not cfg.init_from and not cfg.student_layers:
        return cfg, []
    # A model folder determines the architecture. Rows may be shorter than its context, and a pruned student
    # may be narrower than its teacher.
    if cfg.student_layers:
        require_free_keys(provenance, f"student_layers={cfg.student_layers}",
                          {"block_size", *WIDTHS, *FREE_KEYS})
    else:
        require_free_keys(provenance, f"init_from={cfg.init_from}", {"block_size"})
    folder = hf.find_folder(cfg.init_from or cfg.teacher)
    config, fields, layers = GPTConfig.read(folder), hf.read_config(folder), []
    if cfg.student_layers:
        # Here the folder is the teacher, whose architecture pruned_config makes smaller.
        layers = kept_layers(cfg.student_layers, config.n_layer)
        # The defaults of n_embd and so on are for a student from scratch: only what the user set counts here.
        # None is the teacher's width.
        widths = {key: getattr(cfg, key) for key in WIDTHS
                  if key in provenance and getattr(cfg, key) is not None}
        fields = dataclasses.asdict(pruned_config(config, layers, widths))
        fields |= {key: getattr(cfg, key) for key in FREE_KEYS if key in provenance}
    return dataclasses.replace(cfg, **fields | {"block_size": cfg.block_size}), layers


def make_teacher(cfg: DistillConfig, tokenizer: Tokenizer, run: Run) -> nn.Module:
    """The frozen teacher, in shards with parallel=fsdp."""
    # The teacher is not trained, so its weights need no more precision than the run's matrix products.
    # It has no backward pass, so gathered weights are always freed.
    cfg = dataclasses.replace(cfg, dtype=cfg.teacher_dtype or cfg.dtype, reshard_after_forward=True)
    if cfg.align == "bytes":  # it reads its own ids
        tokenizer = Tokenizer.load(hf.find_folder(cfg.teacher))
    teacher = load_teacher(cfg.teacher, tokenizer, run.device, pick_dtype(cfg.dtype, run.device),
                           context_length(cfg, None))
    if cfg.parallel == "fsdp" and run.world_size > 1:
        if not isinstance(teacher, GPT):
            raise UserError("parallel=fsdp: a teacher loaded by transformers cannot be sharded; use "
                            "parallel=ddp")
        shard(teacher, cfg, run)
    return teacher


def make_student(cfg: DistillConfig, layers: list[int], data: StagedData, run: Run) -> Student:
    """The student: with its weights if it is pruned from the teacher's `layers`, else on the meta device."""
    stages, pairs, width = stage_configs(cfg), [], None
    folder = (cfg.init_from or cfg.teacher) if cfg.init_from or layers else None
    config = GPTConfig.from_keys(cfg, vocab_size=cfg.vocab_size or data.tokenizer.vocab_size,
                                 block_size=context_length(cfg, folder))
    # Layer losses: which layers are paired, and whether projections are needed.
    if any(stage.uses_layer_losses for stage in stages):
        fields = hf.read_config(hf.find_folder(cfg.teacher))
        pairs = layer_map(cfg.layer_map, config.n_layer, fields["n_layer"])
        # Projections exist for the whole run if any stage compares hidden states.
        width = fields["n_embd"] if any(stage.hidden_weight for stage in stages) else None
        run.print(f"layers    {cfg.layer_map}, student:teacher {','.join(f'{s}:{t}' for s, t in pairs)}")
    with torch.device("meta"):  # no memory yet: fit gives each rank its part of the weights
        student = Student(config, pairs, width, cfg.seed)
    require_multipliers(cfg, student)
    text = f"student   {student.num_parameters():,} parameters"
    if cfg.student_embeddings == "teacher":
        student.materialize("cpu", cfg.seed)
        copy_tables(student, GPT.from_pretrained(hf.find_folder(cfg.teacher)).state_dict())
        text += f", token tables from {cfg.teacher}"
    if layers and not cfg.new_weights:
        # For a moment, each rank holds the whole teacher. 16 rows of data show which parts are active.
        source = GPT.from_pretrained(hf.find_folder(cfg.teacher))
        rows = data.last_mix.samples(0, 16)
        ids = batch_of(rows, data.tokenizer.eot_id, cfg.packing, cfg.document_mask)["input_ids"]
        student.materialize("cpu", cfg.seed)
        # strict=False: the projections, which a pruned GPT does not have, keep their random weights.
        student.load_state_dict(prune(source.eval(), config, layers, ids).state_dict(), strict=False)
        text += f", pruned from {cfg.teacher}: layers {', '.join(map(str, layers))}"
    run.print(text)
    return student


# ---- Main -------------------------------------------------------------------------------------------------

def print_summary(cfg: DistillConfig, student: Student, results: dict[str, float], run: Run,
                  kind: str) -> None:
    """How good the student is, compared with its teacher, and what to do next."""
    if run.rank > 0 or not results:  # no results: the run was finished before
        return
    run.print(f"\nvalidation  student  loss {results['val_loss']:.4f}, perplexity "
              f"{results['val_perplexity']:.2f}  ({student.num_parameters():,} parameters)")
    if "val_teacher_loss" in results:  # not with a cache: the teacher is not in memory
        loss = results["val_teacher_loss"]
        run.print(f"            teacher  loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}\n"
                  f"            KL {results['val_kl']:.4f} nats per token; same most likely token at "
                  f"{100 * results['val_agreement']:.1f} % of positions")
    # compare measures both models on the data of the last stage.
    dataset = stage_configs(cfg)[-1].dataset
    more = "" if dataset == "pystdlib" else f" --dataset={shlex.quote(dataset)}"
    teacher = shlex.quote(cfg.teacher)
    print_end(run, f"python -m tools.compare {teacher} {run.quoted}{more}",
              f"python eval.py --model={run.quoted} --compare={teacher} --tasks=embedded",
              f"python sample.py --model={run.quoted}" + (" --chat=True" if kind == "chat" else ""))


def distill(cfg: DistillConfig, layers: list[int], run: Run) -> None:
    """Open the data, make teacher and student, and train. layers: what with_architecture returned."""
    kind = row_kind(cfg)
    data = StagedData(cfg, kind, run.rank, run.world_size)
    tokenizer = run.tokenizer = data.tokenizer if kind is not Rows else data.tokenizer.with_sinks(0)
    # A pruned student has the teacher's ids, and the teacher is compared with the data when it is loaded.
    check_vocabulary(cfg, None if cfg.student_layers else cfg.vocab_size, tokenizer)
    # The two models. A resumed run must have the same teacher, so its hash goes into run.json.
    teacher_hash = run.run_on_rank0(lambda: model_sha256(hf.find_folder(cfg.teacher)))
    caches = open_caches(cfg, data, teacher_hash)
    teacher = None if caches else make_teacher(cfg, tokenizer, run)
    aligner = None
    if cfg.align == "bytes":
        context = context_of(teacher) if teacher is not None else 0  # with a cache it reads nothing
        aligner = Aligner(tokenizer, hf.find_folder(cfg.teacher), context, run.device)
        run.print(f"align     the teacher predicts {len({*aligner.groups.tolist()}):,} groups of "
                  f"{tokenizer.vocab_size:,} ids")
    student = make_student(cfg, layers, data, run)
    # Compile the teacher's blocks if fit compiles the student's. A model of transformers stays as it is.
    if isinstance(teacher, GPT) and compiles(data.cfg, student, run):
        for block in teacher.model["layers"]:
            block.compile()
    for rows, _ in data.used():
        if isinstance(rows, ChatRows):
            run.print(chat_rows_text(rows))
    # One evaluation for the whole run, so that the results of different stages can be compared.
    # A teacher with other ids has no prediction for the student's, so only the student is measured.
    judge = teacher if cfg.align == "ids" else None
    last = data.stages[-1].cfg
    evaluate = with_tasks(cfg, run, StudentEvaluation(last, data.last_mix, kind, judge, run, last.packing,
                                                      last.document_mask))
    # Everything that can fail comes before this: with overwrite=True, write_run_json deletes the old run.
    names = sorted(cache.folder.name for cache in caches.values())
    run.write_run_json(cfg, data.tokens(), data=data.hashes(), teacher=teacher_hash, caches=names)
    # The student's answer to a chat ends with the turn. Text continues after an end-of-text token.
    end_ids = {tokenizer.eot_id, end_of_turn(tokenizer)} if kind.kind == "chat" else set()
    loss_fn = Distillation(student, teacher, stage_configs(cfg), end_ids, tokenizer.vocab_size, aligner)
    results = fit(data.cfg, student, lambda step: batches_at(data, caches, step, aligner), loss_fn,
                  evaluate, run)
    print_summary(cfg, student, results, run, kind.kind)


def main(argv: list[str]) -> None:
    cfg, provenance = configure_run(DistillConfig, argv, usage=__doc__)
    cfg, layers = with_architecture(cfg, provenance)
    with start_run(cfg) as run:
        # The default data set is made here if it is missing.
        prepare_default(cfg, run, "pystdlib", lambda: prepare(PrepareConfig()))
        distill(cfg, layers, run)


if __name__ == "__main__":
    run_script(main)
