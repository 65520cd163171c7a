"""A model that scores answers: it learns from answers that the policy sampled and the checker judged.

    python verifier.py                                   # out/grpo's answers -> out/verifier
    python verifier.py --init_from=out/sft --num_problems=2000 --out_dir=out/verifier
    python eval.py --model=out/grpo --num_samples=8 --verifier=out/verifier

Samples answers to the embedded problems from init_from and judges them (generation/judged.py). The answers
are kept in data/judged and used again. A verifier is a frozen copy of that model with a scalar head and, if
lora_rank is set, a LoRA adapter (generation/verifier.py). It learns to tell right answers from wrong ones
(arXiv 2110.14168):

    <user> 15 * 4? <assistant> 10 * 4 = 40; 5 * 4 = 20; 40 + 20 = 60 / 60 <end>     ->  right
    <user> 15 * 4? <assistant> 10 * 4 = 40; 5 * 4 = 24; 40 + 24 = 64 / 64 <end>     ->  wrong

Half of the answers in every batch are right, in every family of problems. So the family says nothing, and
neither does "most answers are right". A bias puts the natural share of right answers back into the scores, so
that they are probabilities.

One problem in eight is held out. Its answers, in their natural shares, are the validation: ROC-AUC, also
among answers of the same family and length, which a verifier that knows only the length does not pass; the
calibration error; false accepts and false rejects at a threshold of one half. Writes out_dir as train.py
does.
"""

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import UserError, require, require_positive, run_script
from dataset.dataloader import validation_batches
from evals.calibration import auc_within, calibration_error, roc_auc, wrong_decisions
from formats import hf, peft
from formats.chat_format import require_chat
from formats.files import write_json
from formats.tokenizer import Tokenizer
from generation.judged import Request, family_names, make_answers
from generation.rollouts import Limits, RolloutSampler
from generation.verifier import FILE, answer_logits, answer_rows
from loop import Run, fit, start_run
from model import GPT, GPTConfig
from modeling.devices import to_device
from training.curves import print_end
from training.finetuning import PostTrainingConfig
from training.lora import AdaptedGPT, targets_of
from training.losses import linear_log_probs
from training.stages import configure_run

LENGTH_BUCKET = 4  # tokens: answers whose lengths share a bucket count as equally long
HELD_OUT = 8  # one problem in this many is for validation
LEAST_AUC = 0.6  # below this, within family and length, a verifier has learned little more than both


@dataclass(frozen=True, kw_only=True)
class VerifierConfig(PostTrainingConfig):
    """The keys of a run, of an adapter, and of a verifier."""

    out_dir: str = "out/verifier"  # folder for checkpoints and logs; the same command again continues the run
    init_from: str = "out/grpo"  # model folder, out_dir or hub id: it samples the answers, and is copied
    dataset: Literal["problems"] = "problems"  # the embedded problems
    max_steps: int = 160  # optimizer steps
    global_batch_size: int = 32  # answers per optimizer step, over all ranks; half of them are right
    micro_batch_size: int = 32  # answers per forward pass on one rank
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon trains the blocks' matrices, AdamW everything else
    learning_rate: float = 1e-3  # peak learning rate
    weight_decay: float = 0.0  # weight decay, applied to matrices only
    eval_interval: int = 80  # steps between evaluations; 0 evaluates only at the end of each stage
    save_interval: int = 80  # steps between checkpoints; 0 saves only at the end of each stage
    lora_rank: int = 0  # rank of an adapter; 0 trains the scalar head alone
    # ---- Answers
    families: str = "add,subtract,multiply,story,sort,count,date"  # problems that are answered
    calculator: bool = False  # offer the calculator
    num_problems: int = 1000  # problems that are answered
    num_samples: int = 8  # answers per problem
    temperature: float = 1.0  # of the answers
    max_new_tokens: int = 100  # most tokens of an answer
    answers_batch_size: int = 256  # answers that are generated together

    resume_free = PostTrainingConfig.resume_free | {"answers_batch_size"}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_problems", "num_samples", "max_new_tokens", "answers_batch_size")
        require(self, "temperature", 0 < self.temperature < math.inf, "positive")
        family_names(self.families)  # raises UserError for an unknown one
        for key, only in (("parallel", ("none", "ddp")), ("quantize_base", (None,)), ("merge", (False,)),
                          ("stages", ([],))):
            require(self, key, getattr(self, key) in only, f"{only[-1]!r} in verifier.py")

    @property
    def request(self) -> Request:
        return Request(family_names(self.families), self.num_problems, self.num_samples, self.calculator)


# ---- Model and loss ---------------------------------------------------------------------------------------

class ScoringGPT(AdaptedGPT):
    """A frozen model with an adapter and the head `score`, which starts as the answer's log-probability."""

    def __init__(self, config: GPTConfig, spec: peft.AdapterSpec, base: dict[str, str], seed: int,
                 bias: float):
        """bias: log-odds of a right answer in nature, which a checkpoint keeps."""
        super().__init__(config, spec, base, seed)
        self.score, self.bias = nn.Linear(config.n_embd + 1, 1, bias=False), bias

    def new_adapter(self) -> Any:
        yield from super().new_adapter()
        yield "score.weight", F.pad(torch.ones(1, 1), (self.config.n_embd, 0))  # (1, C + 1)

    def save_pretrained(self, path: str | Path, *args: Any, **settings: Any) -> None:
        super().save_pretrained(path, *args, **settings)
        write_json(Path(path) / FILE, {"bias": self.bias})


def scoring_model(cfg: VerifierConfig, folder: Path, bias: float) -> tuple[ScoringGPT, dict[str, str]]:
    """The model on the meta device, and the identity of its base for run.json."""
    identity = {"base": peft.weights_sha256(folder), "base_config": hf.config_sha256(folder)}
    base = {"path": str(folder.resolve()), "sha256": identity["base"],
            "config_sha256": identity["base_config"]}
    with torch.device("meta"):
        config = GPTConfig(**hf.read_config(folder) | {"dropout": 0.0})
        targets = targets_of(GPT(config), cfg.lora_targets) if cfg.lora_rank else ()
        spec = peft.AdapterSpec(max(cfg.lora_rank, 1), cfg.lora_alpha, cfg.lora_dropout, targets, cfg.rslora,
                                ("score",))
        return ScoringGPT(config, spec, base, cfg.seed, bias), identity


def verifier_loss(logits: Tensor, right: Tensor) -> Tensor:
    """Binary cross-entropy summed over the answers: logits (n,), right (n,) of 0 and 1, both float."""
    return F.binary_cross_entropy_with_logits(logits, right, reduction="sum")


def loss_fn(forward: nn.Module, batch: dict[str, Any],
            model: ScoringGPT) -> tuple[Tensor, dict[str, Tensor]]:
    """`verifier_loss`, and the number of answers on the right side of one half. forward: model, or DDP's."""
    logits = answer_logits(forward, model, batch, linear_log_probs)
    loss = verifier_loss(logits, batch["right"])
    return loss, {"loss": loss, "accuracy": ((logits > 0) == (batch["right"] > 0)).float().sum()}


# ---- Data -------------------------------------------------------------------------------------------------

Answer = dict[str, Any]  # "ids", "sampled", "right" and "family"


def make_batch(answers: list[Answer], block_size: int) -> dict[str, Any]:
    batch = answer_rows([answer["ids"] for answer in answers],
                        [[bool(each) for each in answer["sampled"]] for answer in answers], block_size)
    right = torch.tensor([float(answer["right"]) for answer in answers])
    return batch | {"right": right, "count": len(answers), "context": batch["input_ids"].shape[1]}


class Answers:
    """Judged answers: those for training, balanced, and those of the held-out problems, as they are."""

    def __init__(self, cfg: VerifierConfig, rows: list[dict[str, Any]]):
        """Raises UserError if either part has no right or no wrong answer."""
        self.cfg, parts = cfg, dict[bool, list[Answer]]({True: [], False: []})
        for row in rows:
            held_out = zlib.crc32(f"verifier/{row['key']}".encode()) % HELD_OUT == 0
            parts[held_out] += [answer | {"family": row["family"]} for answer in row["answers"]]
        self.val, train = parts[True], parts[False]
        for part in parts.values():
            if len({answer["right"] for answer in part}) < 2:
                raise UserError(f"init_from={cfg.init_from}: all its answers are right, or all are wrong; a "
                                "verifier needs both (--num_problems, --temperature, --families)")
        share = sum(answer["right"] for answer in train) / len(train)
        self.bias = math.log(share / (1 - share))
        # In each family the same number of right and wrong answers. sides[True] are the right ones.
        self.sides: dict[bool, list[Answer]] = {True: [], False: []}
        by_family = dict[str, dict[bool, list[Answer]]]()
        for answer in train:
            by_family.setdefault(answer["family"], {True: [], False: []})[answer["right"]].append(answer)
        for family, sides in sorted(by_family.items()):
            draw = np.random.default_rng((cfg.seed, zlib.crc32(family.encode())))
            count = min(map(len, sides.values()))
            for side, answers in sides.items():
                self.sides[side] += [answers[i] for i in draw.permutation(len(answers))[:count]]

    def sample(self, number: int) -> Answer:
        """Sample k of the run: right and wrong answers in turn, each side in a new order in every epoch."""
        side = self.sides[number % 2 == 0]
        epoch, place = divmod(number // 2, len(side))
        return side[np.random.default_rng((self.cfg.seed, number % 2, epoch)).permutation(len(side))[place]]

    def batches_at(self, step: int, rank: int, world_size: int) -> list[dict[str, Any]]:
        """A rank's micro-batches of a step."""
        cfg, count = self.cfg, self.cfg.global_batch_size // world_size
        first, size = step * cfg.global_batch_size + rank * count, cfg.micro_batch_size
        answers = [self.sample(number) for number in range(first, first + count)]
        return [make_batch(answers[at:at + size], cfg.block_size) for at in range(0, count, size)]


# ---- Evaluation -------------------------------------------------------------------------------------------

def report(logits: list[float], answers: list[Answer], bias: float) -> dict[str, float]:
    """The validation metrics of the head's outputs for judged answers in their natural shares."""
    odds = torch.tensor(logits) + bias
    scores, right = odds.sigmoid().tolist(), [answer["right"] for answer in answers]
    accepts, rejects = wrong_decisions(scores, right, 0.5)
    groups = [(answer["family"], sum(answer["sampled"]) // LENGTH_BUCKET) for answer in answers]
    return {"val_loss": verifier_loss(odds, torch.tensor(right).float()).item() / len(answers),
            "val_auc": roc_auc(scores, right), "val_auc_within": auc_within(scores, right, groups),
            "val_ece": calibration_error(scores, right), "val_false_accepts": accepts,
            "val_false_rejects": rejects}


def evaluate(model: ScoringGPT, answers: list[Answer], cfg: VerifierConfig, run: Run) -> dict[str, float]:
    """`report` of the held-out answers. The ranks share the work."""
    def batch_of(numbers: np.ndarray) -> dict[str, Any]:
        return make_batch([answers[i] for i in numbers], cfg.block_size) | {"numbers": numbers.tolist()}

    found: dict[int, float] = {}
    for batch in validation_batches(batch_of, len(answers), cfg.micro_batch_size, run.rank, run.world_size):
        logits = answer_logits(model, model, to_device(batch, run.device)).tolist()
        if batch["count"]:  # 0 marks a filler
            found |= zip(batch["numbers"], logits, strict=True)
    merged = {number: logit for part in run.gather(found) for number, logit in part.items()}
    return report([merged[number] for number in range(len(answers))], answers, model.bias)


# ---- Main -------------------------------------------------------------------------------------------------

def load_answers(cfg: VerifierConfig, folder: Path, tokenizer: Tokenizer, run: Run) -> Answers:
    """The judged answers; rank 0 makes those that are missing."""
    def make() -> list[dict[str, Any]]:
        policy = GPT.from_pretrained(folder, run.device).eval()
        limits = Limits(max_new_tokens=cfg.max_new_tokens, block_size=policy.config.block_size,
                        temperature=cfg.temperature, seed=cfg.seed)
        sampler = RolloutSampler(policy, tokenizer, limits)
        return make_answers(Path("data/judged"), folder, sampler, cfg.request, cfg.answers_batch_size)

    return Answers(cfg, run.run_on_rank0(make))


def main(argv: list[str]) -> int:
    cfg, provenance = configure_run(VerifierConfig, argv, usage=__doc__)
    with start_run(cfg, provenance) as run:
        folder = hf.find_folder(cfg.init_from)
        run.tokenizer = Tokenizer.load(folder)  # saved with every checkpoint
        require_chat(run.tokenizer, cfg.init_from)
        if peft.is_adapter(folder):
            raise UserError(f"init_from={cfg.init_from}: is an adapter itself; run its command again with "
                            "--merge=True and start from out_dir/merged")
        answers = load_answers(cfg, folder, run.tokenizer, run)
        model, identity = scoring_model(cfg, folder, answers.bias)
        run.print(f"model     {model.num_parameters():,} parameters; {model.num_saved():,} are trained")
        run.write_run_json(cfg, {}, **identity)
        right = sum(answer["right"] for answer in answers.val)
        run.print(f"data      {2 * len(answers.sides[True]):,} answers, half of them right; held out: "
                  f"{len(answers.val):,}, {right:,} of them right")
        results = fit(cfg.frozen_but_adapters(model), model,
                      lambda step: answers.batches_at(step, run.rank, run.world_size),
                      lambda forward, batch: loss_fn(forward, batch, model),
                      lambda scorer, last: evaluate(model, answers.val, cfg, run), run)
        if results:
            within = results["val_auc_within"]
            run.print(f"\nvalidation  ROC-AUC {results['val_auc']:.3f}, within family and length "
                      f"{within:.3f}; accepts {results['val_false_accepts']:.1%} of wrong answers, rejects "
                      f"{results['val_false_rejects']:.1%} of right ones")
            if not within >= LEAST_AUC:
                run.print("note      among answers of one family and length it hardly tells right from "
                          "wrong: do not use it")
            print_end(run, f"python eval.py --model={cfg.init_from} --num_samples=8 --verifier={run.quoted}")
    return 0


if __name__ == "__main__":
    run_script(main)
