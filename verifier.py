"""A model that scores answers: it learns from answers that the policy sampled and the checker judged.

    python verifier.py                                   # out/grpo's answers -> out/verifier
    python verifier.py --init_from=out/sft --num_problems=2000 --out_dir=out/sft_verifier
    python verifier.py --init_from=out/mine --dataset=gsm8k_train.jsonl --task=gsm8k --block_size=512 \\
        --max_new_tokens=300 --out_dir=out/mine_verifier
    python eval.py --model=out/grpo --num_samples=8 --verifier=out/verifier

Samples answers to the prompts of dataset/prompts.py from init_from and judges them (evals/judged.py). The
answers are kept in data/judged and used again. A verifier is a frozen copy of that model with a scalar head
and, if lora_rank is set, a LoRA adapter (generation/verifier.py). It learns to tell right answers from wrong
ones (arXiv 2110.14168):

    <user> 15 * 4? <assistant> 10 * 4 = 40; 5 * 4 = 20; 40 + 20 = 60 / 60 <end>     ->  right
    <user> 15 * 4? <assistant> 10 * 4 = 40; 5 * 4 = 24; 40 + 24 = 64 / 64 <end>     ->  wrong

A right answer is trained on together with a wrong one of the same family of problems, so neither the family
nor the share of right answers helps to guess. Answers without such a partner are left out. To undo this
balance, the loss subtracts the log-odds of a right answer among all samples from the head's output. So the
output itself is the log-odds among all samples.

One problem in eight is held out. Its answers are the validation set, in their natural shares. The metrics are
the ROC-AUC; the ROC-AUC among answers of the same family and length, where knowing the length hardly helps;
the calibration error; and false accepts and false rejects at a threshold of one half. Writes out_dir as
train.py does.
"""

import math
import shlex
import zlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configurator import UserError, require, run_script
from dataset.prompts import EMBEDDED
from dataset.tasks import TaskName
from evals.judged import AnswerKeys, stored_answers
from formats import hf, peft
from formats.tokenizer import Tokenizer
from generation.verifier import answer_logits, answer_rows
from loop import Run, fit, start_run
from model import GPT, GPTConfig
from modeling.devices import to_device
from training.finetuning import PostTrainingConfig, chat_model, finish, require_no_adapter
from training.lora import AdaptedGPT, targets_of
from training.losses import linear_log_probs
from training.stages import configure_run

LENGTH_BUCKET = 4  # tokens: answers whose lengths share a bucket count as equally long
HELD_OUT = 8  # one problem in this many is for validation
LEAST_AUC = 0.6  # below this, within family and length, a verifier has learned little more than both
BINS = 10  # of the calibration error, of equal width, as in arXiv 1706.04599


@dataclass(frozen=True, kw_only=True)
class VerifierConfig(AnswerKeys, PostTrainingConfig):
    """The keys of a run, of an adapter, and of the answers."""

    out_dir: str = "out/verifier"  # folder for checkpoints and logs; the same command again continues the run
    init_from: str = "out/grpo"  # model folder, out_dir or hub id: it samples the answers, and is copied
    dataset: str = EMBEDDED  # problems (the embedded ones), or files of prompts with reference answers
    task: TaskName | None = None  # the files' rows are of this benchmark, with the prompts of eval.py
    max_steps: int = 160  # optimizer steps
    global_batch_size: int = 32  # answers per optimizer step, over all ranks; half of them are right
    micro_batch_size: int = 32  # answers per forward pass on one rank
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon trains the blocks' matrices, AdamW everything else
    learning_rate: float = 1e-3  # peak learning rate
    weight_decay: float = 0.0  # weight decay, applied to matrices only
    eval_interval: int = 80  # steps between evaluations; 0 evaluates only at the end of each stage
    save_interval: int = 80  # steps between checkpoints; 0 saves only at the end of each stage
    lora_rank: int = 0  # rank of an adapter; 0 trains the scalar head alone

    resume_free = PostTrainingConfig.resume_free | {"answers_batch_size"}

    def __post_init__(self) -> None:
        PostTrainingConfig.__post_init__(self)
        AnswerKeys.__post_init__(self)
        # A merged model has no place for the head, and tasks measure texts, not scores. The other keys are
        # not implemented here.
        for key, only in (("parallel", ("none", "ddp")), ("quantize_base", (None,)), ("merge", (False,)),
                          ("stages", ([],)), ("eval_tasks", ("",))):
            require(self, key, getattr(self, key) in only, f"{only[-1]!r} in verifier.py")


# ---- Model and loss ---------------------------------------------------------------------------------------

class AdaptedScoredGPT(AdaptedGPT):
    """A frozen model with an adapter and the head `score`, which starts as the answer's log-probability."""

    def __init__(self, config: GPTConfig, spec: peft.AdapterSpec, base: dict[str, str], seed: int,
                 log_odds: float):
        """log_odds: of a right answer in the natural shares. The head starts with them as its last weight."""
        super().__init__(config, spec, base, seed)
        # Two inputs more than the hidden state: the answer's log-probability, and a constant.
        self.score, self.log_odds = nn.Linear(config.n_embd + 2, 1, bias=False), log_odds

    def new_adapter(self) -> Any:
        # The adapter's own matrices first; without an adapter there are none.
        yield from super().new_adapter()
        # At the start the output is log p(answer) + log-odds: what the model itself says of its answer.
        yield "score.weight", torch.tensor([[0.0] * self.config.n_embd + [1, self.log_odds]])  # (1, C + 2)


def with_score(cfg: VerifierConfig, plain: GPT, base: dict[str, str], log_odds: float) -> AdaptedScoredGPT:
    """The model with the head and, if cfg.lora_rank is set, an adapter."""
    targets = targets_of(plain, cfg.lora_targets) if cfg.lora_rank else ()
    # Without targets there is no adapter, whatever its rank; PEFT's files want a positive one.
    spec = peft.AdapterSpec(max(cfg.lora_rank, 1), cfg.lora_alpha, cfg.lora_dropout, targets, cfg.rslora,
                            ("score",))
    return AdaptedScoredGPT(plain.config, spec, base, cfg.seed, log_odds)


def loss_fn(forward: nn.Module, batch: dict[str, Any],
            model: AdaptedScoredGPT) -> tuple[Tensor, dict[str, Tensor]]:
    """Binary cross-entropy summed over the answers, whose shares are balanced, and the number of answers on
    the right side of one half. forward: model, or DDP's wrapper."""
    # Half of a batch is right, where the log-odds are 0: take those of the natural shares off.
    logits = answer_logits(forward, model, batch, linear_log_probs) - model.log_odds  # (n,)
    loss = F.binary_cross_entropy_with_logits(logits, batch["right"], reduction="sum")
    return loss, {"loss": loss, "accuracy": ((logits > 0) == (batch["right"] > 0)).float().sum()}


# ---- Data -------------------------------------------------------------------------------------------------

Answer = dict[str, Any]  # "ids", "sampled", "right" and "family"


def make_batch(answers: list[Answer], block_size: int) -> dict[str, Any]:
    """An `answer_rows` batch with "right", (n,) float32, "count" n, and "context", the length of its rows."""
    # The model reads what a tool wrote, but only sampled tokens count in the answer's log-probability.
    batch = answer_rows([answer["ids"] for answer in answers],
                        [[bool(each) for each in answer["sampled"]] for answer in answers], block_size)
    right = torch.tensor([float(answer["right"]) for answer in answers])
    return batch | {"right": right, "count": len(answers), "context": batch["input_ids"].shape[1]}


class Answers:
    """Judged answers: pairs for training, and those of the held-out problems as they are."""

    def __init__(self, cfg: VerifierConfig, rows: list[dict[str, Any]]):
        """Raises UserError if either part has no right or no wrong answer."""
        self.cfg, parts = cfg, dict[bool, list[Answer]]({True: [], False: []})
        for row in rows:
            # A hash of the problem without its wording decides, so all its answers are on one side.
            key = row["row"].get("key", row["prompt"][-1]["content"])
            held_out = zlib.crc32(f"verifier/{key}".encode()) % HELD_OUT == 0
            family = row["row"].get("family", "")
            parts[held_out] += [answer | {"family": family} for answer in row["answers"]]
        self.val, train = parts[True], parts[False]
        for part in parts.values():
            if len({answer["right"] for answer in part}) < 2:
                raise UserError(f"init_from={cfg.init_from}: all its answers are right, or all are wrong; a "
                                "verifier needs both (--num_problems, --temperature, --families)")
        # The natural share of right answers, which the balanced pairs no longer show.
        share = sum(answer["right"] for answer in train) / len(train)
        self.log_odds = math.log(share / (1 - share))
        # A right answer and a wrong one of the same family. What has no partner is left out.
        self.pairs: list[tuple[Answer, Answer]] = []
        draw = np.random.default_rng(cfg.seed)
        for family in sorted({answer["family"] for answer in train}):
            right, wrong = ([answer for answer in train if answer["family"] == family
                             and answer["right"] == side] for side in (True, False))
            self.pairs += [(right[i], wrong[j]) for i, j in zip(
                draw.permutation(len(right)), draw.permutation(len(wrong)), strict=False)]

    def sample(self, number: int) -> Answer:
        """Sample k of the run: the right answer of a pair if k is even, and then the wrong one.

        Every epoch has the pairs in a new order.
        """
        # A function of the number alone, so a resumed run goes on with the same answers.
        epoch, place = divmod(number // 2, len(self.pairs))
        order = np.random.default_rng((self.cfg.seed, epoch)).permutation(len(self.pairs))
        return self.pairs[order[place]][number % 2]

    def batches_at(self, step: int, rank: int, world_size: int) -> list[dict[str, Any]]:
        """A rank's micro-batches of a step."""
        # The ranks take consecutive parts of the step's answers.
        cfg, count = self.cfg, self.cfg.global_batch_size // world_size
        first, size = step * cfg.global_batch_size + rank * count, cfg.micro_batch_size
        answers = [self.sample(number) for number in range(first, first + count)]
        return [make_batch(answers[at:at + size], cfg.block_size) for at in range(0, count, size)]


# ---- Evaluation -------------------------------------------------------------------------------------------

def auc_within(scores: Iterable[float], right: Sequence[bool], groups: Sequence[Hashable]) -> float:
    """The share of (right, wrong) pairs of the same group in which the right answer scores higher.

    A tie counts half. With a single group it is the area under the ROC curve. nan if no group has both.
    """
    higher, pairs = 0.0, 0
    members: dict[Hashable, tuple[list[float], list[float]]] = {}
    for score, good, group in zip(scores, right, groups, strict=True):
        members.setdefault(group, ([], []))[good].append(score)
    for low, high in members.values():  # the scores of wrong answers, and of right ones
        # For each right answer: how many wrong ones score less, and how many score no more.
        below, up_to = (np.searchsorted(np.sort(low), high, side) for side in ("left", "right"))
        higher += (below + up_to).sum() / 2
        pairs += len(low) * len(high)
    return float(higher / pairs) if pairs else math.nan


def calibration_error(scores: np.ndarray, right: np.ndarray) -> float:
    """ECE (arXiv 1706.04599): |mean score - share of right answers| in each tenth of [0, 1], by size."""
    # Weighted by size, |mean score - share| of a bin is |sum of (score - right)| / n.
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)  # (n,)
    return float(np.abs(np.bincount(bins, scores - right, minlength=BINS)).sum() / len(scores))


def report(logits: list[float], answers: list[Answer]) -> dict[str, float]:
    """The validation metrics of the head's outputs for judged answers in their natural shares."""
    labels, odds = [bool(answer["right"]) for answer in answers], torch.tensor(logits)
    scores, right = odds.sigmoid().numpy(), np.array(labels)
    # Within a family and a length, neither of the two can tell right from wrong.
    groups = [(answer["family"], sum(answer["sampled"]) // LENGTH_BUCKET) for answer in answers]
    loss = F.binary_cross_entropy_with_logits(odds, torch.tensor(labels).float())
    return {"val_loss": loss.item(), "val_auc": auc_within(scores, labels, [0] * len(answers)),
            "val_auc_within": auc_within(scores, labels, groups),
            "val_ece": calibration_error(scores, right),
            "val_false_accepts": float((scores[~right] >= 0.5).mean()),
            "val_false_rejects": float((scores[right] < 0.5).mean())}


def evaluate(model: AdaptedScoredGPT, answers: list[Answer], cfg: VerifierConfig,
             run: Run) -> dict[str, float]:
    """`report` of the held-out answers. The ranks share the work."""
    # Every world_size-th answer, so that all ranks have about as much to do.
    mine, logits = answers[run.rank::run.world_size], list[float]()
    for at in range(0, len(mine), cfg.micro_batch_size):
        batch = to_device(make_batch(mine[at:at + cfg.micro_batch_size], cfg.block_size), run.device)
        logits += answer_logits(model, model, batch).tolist()
    parts = run.gather(logits)
    # Answer i was measured by rank i % world_size: back into the order of `answers`.
    return report([parts[i % len(parts)][i // len(parts)] for i in range(len(answers))], answers)


# ---- Main -------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> None:
    cfg, _ = configure_run(VerifierConfig, argv, usage=__doc__)
    with start_run(cfg) as run:
        folder = hf.find_folder(cfg.init_from)
        run.tokenizer = Tokenizer.load(folder)  # saved with every checkpoint
        require_no_adapter(cfg, folder)
        answers = Answers(cfg, run.run_on_rank0(lambda: stored_answers(
            Path("data/judged"), cfg, cfg.init_from, cfg.dataset, cfg.seed, run.device, cfg.task)))
        model, identity = chat_model(cfg, run.tokenizer, run, partial(with_score, log_odds=answers.log_odds),
                                     dropout=0.0)
        assert isinstance(model, AdaptedScoredGPT)
        run.write_run_json(cfg, {}, **identity)
        right = sum(answer["right"] for answer in answers.val)
        run.print(f"data      {2 * len(answers.pairs):,} answers, half of them right; held out: "
                  f"{len(answers.val):,}, {right:,} of them right")
        results = fit(cfg, model,
                      lambda step: answers.batches_at(step, run.rank, run.world_size),
                      lambda forward, batch: loss_fn(forward, batch, model),
                      lambda scorer, last: evaluate(model, answers.val, cfg, run), run)
        if results and not results["val_auc_within"] >= LEAST_AUC:  # also nan: no group had both kinds
            run.print("note      among answers of one family and length it hardly tells right from wrong: do "
                      "not use it")
        finish(cfg, run, results, "ROC-AUC {val_auc:.3f}, within family and length {val_auc_within:.3f}; "
                                  "accepts {val_false_accepts:.1%} of wrong answers, rejects "
                                  "{val_false_rejects:.1%} of right ones",
               f"python eval.py --model={shlex.quote(cfg.init_from)} --num_samples=8 --verifier={run.quoted}")


if __name__ == "__main__":
    run_script(main)
