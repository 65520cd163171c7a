"""Stage 5, reinforcement learning from checked answers: right answers become likelier than wrong ones.

    python grpo.py                                       # out/sft on the embedded problems -> out/grpo
    python grpo.py --init_from=out/mine --dataset=gsm8k_train.jsonl --block_size=512 --max_new_tokens=300
    python grpo.py --dataset=prompts.jsonl --reward=my_reward.py:score
    python sample.py --model=out/grpo --chat=True --system="You can call calculator(expression)."

Reads the prompts of dataset/prompts.py: the embedded problems, or JSON lines with reference answers. Writes
out_dir as train.py does. Batch sizes count prompts. Dropout is off.

In each step the policy samples group_size answers to each prompt and calls the calculator where it is
offered. Every answer gets a reward (evals/rewards.py). Its advantage is the reward minus the mean of its
group, and every sampled token of the answer is made likelier by that much (GRPO, arXiv 2402.03300, without
its divisions by the standard deviation and by the answer's length: Dr. GRPO, arXiv 2503.20783):

    prompt        answers         reward   advantage
    12 * 30?      360 <end>         1        0.5        likelier
                  36 <end>          0       -0.5        less likely
    the loss: sum over all sampled tokens of -advantage * ratio, divided by the number of sampled tokens

A group with equal rewards has no gradient, so it is counted ("even") and left out of the learning; with
--refill=True other prompts are sampled in its place. What a tool writes is not trained on. With
updates_per_rollout above 1 the answers serve several steps, with PPO's clipped ratio.

Prompts are a function of the step. Answers are a function of the weights and of seeds that depend on the
step, so a resumed run repeats them. Another micro-batch size or number of ranks changes a step by rounding;
rounding may, rarely, change a sampled token. In the log, `tokens` counts prompts only.

Left out: a value function, rewards from a model, sampling on other machines, parallel=fsdp.
"""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from configurator import UserError, require, require_not_negative, require_positive, run_script
from dataset.problems import FAMILIES
from dataset.prompts import EMBEDDED, VALIDATION, Prompt, PromptSource
from dataset.sources import find_files
from evals.rewards import BUILT_IN, Reward, is_well_formed, require_reference
from formats import hf
from formats.chat_format import encode_prompt, require_chat
from formats.checkpoint import folder_step, step_folders
from formats.files import file_sha256, read_json, write_json
from formats.tokenizer import Tokenizer
from generation.rollouts import Limits, Rollout, RolloutSampler
from generation.samples import log_text
from loop import Run, fit, plan_stages, stage_at, start_run, training_dtype
from model import GPT
from modeling.devices import to_device
from training.curves import print_end
from training.finetuning import PostTrainingConfig, chat_model, write_merged
from training.lora import AdaptedGPT
from training.losses import group_advantages, kl_estimate, linear_log_probs, policy_loss
from training.reference import ReferenceModel
from training.stages import Stage, configure_run, with_steps

MOST_REFILLS = 3  # times that other prompts are sampled in place of even groups
REFILL_STRIDE = 2**40  # prompt numbers of a refill: far from those of all steps


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(PostTrainingConfig):
    """The keys of a run, of an adapter, and of reinforcement learning."""

    out_dir: str = "out/grpo"  # folder for checkpoints and logs; the same command again continues the run
    init_from: str = "out/sft"  # model folder, out_dir or hub id to start from; also the KL's reference
    dataset: str = EMBEDDED  # problems (the embedded ones), or files of prompts with reference answers
    block_size: int = 128  # tokens of a prompt and its answer; the model's own context does not change
    global_batch_size: int = 32  # prompts per optimizer step, over all ranks
    micro_batch_size: int = 32  # prompts per forward pass on one rank
    max_steps: int = 60  # optimizer steps; if stages are listed, the sum of their steps counts instead
    optimizer: Literal["adamw", "muon"] = "muon"  # muon trains the blocks' matrices, AdamW everything else
    learning_rate: float = 1e-4  # peak learning rate
    weight_decay: float = 0.0  # weight decay, applied to matrices only
    eval_interval: int = 0  # steps between evaluations; 0 evaluates only at the end of each stage
    save_interval: int = 20  # steps between checkpoints; 0 saves only at the end of each stage
    log_interval: int = 1  # steps between log lines
    # ---- Prompts and answers
    calculator: float = 0.5  # share of the embedded prompts that offer the calculator; half of them need it
    families: str = ""  # families of the other embedded prompts, separated by commas; empty: all but hard
    eval_prompts: int = 200  # validation prompts that are answered greedily at each evaluation
    group_size: int = 8  # answers per prompt
    max_new_tokens: int = 100  # most tokens of an answer; a longer one is cut and worth 0
    temperature: float = 1.0  # of sampling, and of the probabilities in the loss
    refill: bool = False  # sample other prompts in place of groups with equal rewards, up to 3 times
    # ---- Reward
    reward: str = "answer"  # answer, or file.py:function of yours, which is executed (evals/rewards.py)
    format_weight: float = 0.0  # reward for a well-formed answer, right or wrong
    length_weight: float = 0.0  # subtracted for an answer of max_new_tokens; less for shorter ones
    reward_seconds: float = 10.0  # a call of your reward function that takes longer ends the run
    # ---- Policy gradient
    advantage: Literal["mean", "grpo", "rloo", "reinforce"] = "mean"  # see group_advantages
    updates_per_rollout: int = 1  # optimizer steps per sampled answer
    clip: float = 0.2  # with several updates, no gradient where the ratio has left 1 +- clip
    kl_weight: float = 0.0  # weight of the KL divergence from the start model
    reference: Literal["device", "cpu", "adapter_off"] = "device"  # where the KL's reference is computed

    stage_fixed = PostTrainingConfig.stage_fixed | {
        "dataset", "block_size", "group_size", "eval_prompts", "reward", "reward_seconds", "advantage",
        "updates_per_rollout", "clip", "kl_weight", "reference"}
    resume_free = PostTrainingConfig.resume_free | {"reward_seconds", "eval_prompts"}
    log_line_without = frozenset({"cut", "calls", "sampled_per_second", "learning_seconds"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "group_size", "max_new_tokens", "updates_per_rollout", "eval_prompts",
                         "temperature", "clip", "reward_seconds")
        require_not_negative(self, "kl_weight", "format_weight", "length_weight")
        require(self, "calculator", 0 <= self.calculator <= 1, "from 0 to 1")
        require(self, "group_size", self.group_size > 1 or self.advantage == "reinforce",
                "at least 2 (or set advantage=reinforce)")
        if unknown := {name for name in self.families.split(",") if name} - FAMILIES.keys():
            raise UserError(f"families={self.families}: no family {min(unknown)!r}; there are "
                            f"{', '.join(FAMILIES)}")
        if self.reference == "adapter_off" and not self.lora_rank:
            raise UserError("reference=adapter_off: needs an adapter; set lora_rank")
        if self.quantize_base and self.kl_weight and self.reference != "adapter_off":
            raise UserError(f"reference={self.reference}: would use the base in full precision; with "
                            "quantize_base set reference=adapter_off")
        if self.lora_dropout:
            raise UserError("lora_dropout: must be 0, because the policy that samples has none")
        if self.parallel == "fsdp":  # all ranks would have to sample the same number of tokens
            raise UserError("parallel=fsdp: does not work with sampling; use parallel=ddp or none")


# ---- Loss -------------------------------------------------------------------------------------------------

def token_log_probs(model: nn.Module, batch: dict[str, Any], temperature: float, vocab_size: int) -> Tensor:
    """log p(token) of every sampled token at the sampling temperature, (targets,)."""
    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        hidden = hidden.flatten(0, 1)[batch["positions"]]  # (1, N, C) -> (targets, C)
        return linear_log_probs(hidden / temperature, weight, batch["targets"], vocab_size)

    return model(batch["input_ids"], paths=batch["paths"], head=head)


def loss_fn(log_probs: Tensor, batch: dict[str, Any], reference: Tensor | None,
            cfg: GRPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss summed over the sampled tokens, and summed metrics. log_probs, reference: (targets,) each."""
    # With one update the policy is the one that sampled: the ratio is 1, and only its gradient counts.
    old = batch["old"] if cfg.updates_per_rollout > 1 else log_probs.detach()
    losses, clipped = policy_loss(log_probs, old, batch["advantages"], cfg.clip)  # (targets,) each
    metrics = {}
    if cfg.updates_per_rollout > 1:
        metrics["clipped"] = clipped.float().sum()
    if reference is not None:
        kl = kl_estimate(log_probs, reference)  # (targets,)
        losses = losses + cfg.kl_weight * kl
        metrics["kl"] = kl.sum()
    return losses.sum(), {"loss": losses.sum()} | metrics


# ---- Data -------------------------------------------------------------------------------------------------

class Group(NamedTuple):
    """The answers to one prompt, and the advantage of each."""

    rollouts: list[Rollout]
    advantages: list[float]


def group_batch(groups: list[Group]) -> dict[str, Any]:
    """Groups of answers as one row without padding, each prompt followed by its answers, as in pair_batch.

    Returns {"input_ids": (1, N), "paths": (answers, S), "positions", "targets", "old", "advantages":
    (targets,)}. Targets are the sampled tokens only; "old" has their log-probabilities when they were
    sampled. One prompt p with the answers a, where a tool writes t after a0, and b:

        slot         0   1   2   3   4   5
        input_ids   p0  p1  a0  t0  t1  b0      an answer's last token is no input
        paths       0 1 2 3 4                   positions   1  4   1  5
                    0 1 5 5 5                   targets    a0 a1  b0 b1
    """
    inputs, paths, positions, targets, old, advantages = [], [], [], [], [], []
    for group in groups:
        prompt = group.rollouts[0].prompt
        shared = list(range(len(inputs), len(inputs) + len(prompt)))
        inputs += prompt
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True):
            path = shared + list(range(len(inputs), len(inputs) + len(rollout.ids) - 1))
            inputs += rollout.ids[:-1]
            paths.append(path)
            sampled = [place for place, is_sampled in enumerate(rollout.sampled) if is_sampled]
            positions += [path[len(prompt) - 1 + place] for place in sampled]  # the token before predicts it
            targets += [rollout.ids[place] for place in sampled]
            old += [rollout.log_probs[place] for place in sampled]
            advantages += [advantage] * len(sampled)
    longest = max(map(len, paths))
    paths = [path + path[-1:] * (longest - len(path)) for path in paths]
    return {"input_ids": torch.tensor([inputs]), "paths": torch.tensor(paths),
            "positions": torch.tensor(positions), "targets": torch.tensor(targets),
            "old": torch.tensor(old), "advantages": torch.tensor(advantages)}  # float32 both


class Prompts:
    """The prompts of a run, with their token ids. Prompts of files that do not fit are left out."""

    def __init__(self, cfg: GRPOConfig, tokenizer: Tokenizer):
        """Raises UserError if a file cannot be read, or if no prompt fits block_size."""
        check = require_reference if cfg.reward == BUILT_IN else lambda row: None
        self.cfg, self.tokenizer = cfg, tokenizer
        self.source = PromptSource(cfg.dataset, cfg.seed, check)
        self.hashes, self.text = {}, f"data      prompts of {cfg.dataset}"
        if cfg.dataset == EMBEDDED:
            return
        self.hashes = {str(path): file_sha256(path) for path in find_files(cfg.dataset, "dataset")[0]}
        counts = self.source.keep(lambda prompt: len(self.encode(prompt)) <= cfg.block_size)
        self.text += ": {:,} for training, {:,} for validation, {:,} left out".format(*counts)
        self.text += f": longer than {cfg.block_size} tokens" if counts[2] else ""
        if not all(counts[:2]):
            raise UserError(f"dataset={cfg.dataset}: no prompts that fit block_size={cfg.block_size}")

    def encode(self, prompt: Prompt) -> list[int]:
        return encode_prompt(self.tokenizer, prompt.messages)

    def at(self, number: int, cfg: GRPOConfig) -> tuple[Prompt, list[int]]:
        """Prompt `number` and its ids. Raises UserError if it does not fit block_size."""
        prompt = self.source.prompt(number, cfg.families, cfg.calculator)
        ids = self.encode(prompt)
        if len(ids) > cfg.block_size:
            raise UserError(f"block_size={cfg.block_size}: a prompt has {len(ids)} tokens")
        return prompt, ids

    def steps_in_epoch(self, cfg: GRPOConfig) -> float:
        """Steps that read every prompt once. Raises UserError for the embedded ones, which have no end."""
        if cfg.dataset == EMBEDDED:
            raise UserError("stages: the embedded problems have no epochs; count steps")
        return len(self.source.train) / cfg.global_batch_size


def first_prompt(stages: list[Stage[GRPOConfig]], step: int) -> int:
    """The number of the first prompt of a step."""
    return sum((min(step, stage.last) - stage.first) * stage.cfg.global_batch_size
               for stage in stages if stage.first < step)


def batches_at(stages: list[Stage[GRPOConfig]], prompts: Prompts, run: Run,
               step: int) -> list[dict[str, Any]]:
    """This rank's micro-batches of a step. The answers are sampled in the loss, with the current weights."""
    cfg = stage_at(stages, step).cfg
    begin = step - step % cfg.updates_per_rollout  # the step in which the answers are sampled
    count = cfg.global_batch_size // run.world_size
    first = first_prompt(stages, begin) + run.rank * count
    numbers = list(range(first, first + count))
    batches = []
    for start in range(0, count, cfg.micro_batch_size):
        ids = [prompts.at(number, cfg)[1] for number in numbers[start:start + cfg.micro_batch_size]]
        batches.append({"input_ids": torch.tensor([sum(ids, [])]), "count": len(ids) * cfg.group_size,
                        "context": cfg.block_size, "step": step, "numbers": numbers,
                        "part": start // cfg.micro_batch_size, "parts": count // cfg.micro_batch_size})
    return batches


# ---- Sampling and learning --------------------------------------------------------------------------------

class Sampled(NamedTuple):
    """One prompt, its answers, and the terms of each answer's reward."""

    prompt: Prompt
    rollouts: list[Rollout]
    terms: list[dict[str, float]]

    @property
    def rewards(self) -> list[float]:
        return [sum(terms.values()) for terms in self.terms]

    @property
    def is_even(self) -> bool:
        return len(set(self.rewards)) == 1


class PolicyGradient:
    """The loss of a batch. The first micro-batch of a step samples the answers for all of them."""

    def __init__(self, stages: list[Stage[GRPOConfig]], model: GPT, prompts: Prompts, reward: Reward,
                 reference: ReferenceModel, run: Run):
        self.stages, self.model, self.prompts, self.reward = stages, model, prompts, reward
        self.reference, self.run = reference, run
        self.begin = -1  # the step in which the answers below were sampled
        self.groups: list[Group] = []  # this rank's groups
        self.scale = 0.0  # answers per sampled token, over all ranks
        self.sampling_ended: float | None = None  # for the time that learning takes

    def __call__(self, forward: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of a micro-batch. forward: the model, or DDP's wrapper of it.

        The loop divides by the number of answers. Times `scale`, that is a division by the sampled tokens.
        """
        cfg = stage_at(self.stages, batch["step"]).cfg
        metrics = self.begin_step(cfg, batch) if batch["part"] == 0 else {}
        groups = [group for group in self.groups if any(group.advantages) or cfg.kl_weight]
        part = [groups[i] for i in np.array_split(np.arange(len(groups)), batch["parts"])[batch["part"]]]
        # Every micro-batch needs a backward pass (DDP), also one that has nothing to learn from.
        learned = to_device(group_batch(part or self.groups[:1]), batch["input_ids"].device)
        reference = None
        if cfg.kl_weight:
            reference = self.reference.compute(lambda model: self.log_probs(model, learned, cfg))
        loss, sums = loss_fn(self.log_probs(forward, learned, cfg), learned, reference, cfg)
        scale = self.scale if part else 0.0
        return loss * scale, metrics | {name: value.detach() * scale for name, value in sums.items()}

    def log_probs(self, model: nn.Module, batch: dict[str, Any], cfg: GRPOConfig) -> Tensor:
        """`token_log_probs`, (targets,), returned where the batch is."""
        there = to_device(batch, next(model.parameters()).device)  # a reference may be on the CPU
        found = token_log_probs(model, there, cfg.temperature, self.prompts.tokenizer.vocab_size)
        return found.to(batch["targets"].device)

    def begin_step(self, cfg: GRPOConfig, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Sample the answers of a step, or keep those of an earlier one. Returns the sampling's metrics."""
        updates, run = cfg.updates_per_rollout, self.run
        begin = batch["step"] - batch["step"] % updates
        path = run.out_dir / "rollouts" / f"{begin:06d}.json"
        if batch["step"] == begin:
            metrics = self.roll_out(cfg, batch)
            # A run that is resumed between two updates no longer has the weights that sampled the answers.
            if updates > 1:
                ranks = run.gather([rollout_json(group) for group in self.groups])
                run.run_on_rank0(lambda: save_rollouts(path, {"scale": self.scale, "ranks": ranks}, updates))
        elif self.begin != begin:
            metrics, content = {}, run.run_on_rank0(lambda: read_json(path))
            if len(content.get("ranks", [])) != run.world_size:
                raise UserError(f"{path}: is missing or from another number of processes; "
                                f"updates_per_rollout={updates} needs it to continue between two updates")
            self.scale = content["scale"]
            self.groups = [Group([Rollout(**each) for each in group["rollouts"]], group["advantages"])
                           for group in content["ranks"][run.rank]]
        else:
            metrics = {}
        self.begin = begin
        return metrics

    def sample(self, cfg: GRPOConfig, numbers: list[int], group_size: int,
               temperature: float) -> list[Sampled]:
        """Answers to these prompts, with their rewards."""
        prompts, ids = zip(*(self.prompts.at(number, cfg) for number in numbers), strict=True)
        limits = Limits(max_new_tokens=cfg.max_new_tokens, block_size=cfg.block_size,
                        temperature=temperature, seed=cfg.seed)
        rows = [number * group_size + place for number in numbers for place in range(group_size)]
        rollouts = RolloutSampler(self.model, self.prompts.tokenizer, limits).sample(
            list(ids), rows, group_size, [prompt.offers_calculator for prompt in prompts])
        groups = [rollouts[first:first + group_size] for first in range(0, len(rollouts), group_size)]
        return [Sampled(prompt, group, [self.terms(cfg, prompt, rollout) for rollout in group])
                for prompt, group in zip(prompts, groups, strict=True)]

    def terms(self, cfg: GRPOConfig, prompt: Prompt, rollout: Rollout) -> dict[str, float]:
        """{name: value}, whose sum is the reward of an answer."""
        terms = self.reward.terms(prompt, rollout.messages[-1])
        if cfg.format_weight:
            terms["format"] = cfg.format_weight * is_well_formed(prompt.row, rollout.messages[-1])
        if cfg.length_weight:
            terms["length"] = -cfg.length_weight * rollout.num_sampled / cfg.max_new_tokens
        return terms

    def sample_step(self, cfg: GRPOConfig, numbers: list[int]) -> tuple[list[Sampled], list[Sampled]]:
        """(the samples of this rank's prompts, these and all that a refill has replaced)."""
        samples = self.sample(cfg, numbers, cfg.group_size, cfg.temperature)
        everything = list(samples)
        for attempt in range(1, MOST_REFILLS + 1 if cfg.refill else 1):
            even = [place for place, sample in enumerate(samples) if sample.is_even]
            if not even:
                break
            others = self.sample(cfg, [numbers[place] + attempt * REFILL_STRIDE for place in even],
                                 cfg.group_size, cfg.temperature)
            everything += others
            for place, sample in zip(even, others, strict=True):
                samples[place] = sample
        return samples, everything

    def roll_out(self, cfg: GRPOConfig, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Sample this rank's answers of a step, and compute their advantages. Returns metrics."""
        begin = time.perf_counter()
        learning = begin - self.sampling_ended if self.sampling_ended else 0.0
        samples, everything = self.sample_step(cfg, batch["numbers"])
        self.sampling_ended = time.perf_counter()
        rewards = torch.tensor([sample.rewards for sample in samples], dtype=torch.float64)  # (P, G)
        tokens = sum(rollout.num_sampled for sample in samples for rollout in sample.rollouts)
        all_tokens, reward, answers = self.run.sum([tokens, rewards.sum().item(), rewards.numel()])
        self.scale = answers / all_tokens
        advantages = group_advantages(rewards, cfg.advantage, reward / answers).tolist()
        self.groups = [Group(sample.rollouts, each) for sample, each in zip(samples, advantages, strict=True)]
        seconds = {"sampling": self.sampling_ended - begin, "learning": learning}
        return to_device(self.sampling_metrics(samples, everything, seconds), batch["input_ids"].device)

    def sampling_metrics(self, samples: list[Sampled], everything: list[Sampled],
                         seconds: dict[str, float]) -> dict[str, Tensor]:
        """Metrics as sums over the answers, because the loop divides by the number of answers."""
        rollouts = [rollout for sample in samples for rollout in sample.rollouts]
        terms = [each for sample in samples for each in sample.terms]
        n, names = len(rollouts), sorted({name for each in terms for name in each})
        sums = {"reward": sum(sum(sample.rewards) for sample in samples)}
        sums |= {f"reward/{name}": sum(each.get(name, 0.0) for each in terms) for name in names}
        sums |= {
            "even": n * sum(sample.is_even for sample in everything) / len(everything),
            "length": sum(rollout.num_sampled for rollout in rollouts),
            "cut": sum("cut" in rollout.messages[-1] for rollout in rollouts),
            "calls": sum(message["role"] == "tool" for rollout in rollouts for message in rollout.messages),
            # The mean of -log p over samples from p is an unbiased estimate of the entropy per token.
            "entropy": -self.scale * sum(sum(rollout.log_probs) for rollout in rollouts)}
        written = sum(rollout.num_sampled for sample in everything for rollout in sample.rollouts)
        sums |= {f"{name}_seconds": n * value for name, value in seconds.items()}
        sums["sampled_per_second"] = n * written / seconds["sampling"]
        return {name: torch.tensor(float(value)) for name, value in sums.items()}


def rollout_json(group: Group) -> dict[str, Any]:
    """A group for the file of a rollout, without the messages, which learning does not need."""
    rollouts = [{"prompt": each.prompt, "ids": each.ids, "sampled": each.sampled,
                 "log_probs": each.log_probs} for each in group.rollouts]
    return {"rollouts": rollouts, "advantages": group.advantages}


def save_rollouts(path: Path, content: dict[str, Any], updates: int) -> None:
    """Write the file of a rollout, and delete those that no checkpoint needs any more."""
    path.parent.mkdir(exist_ok=True)
    write_json(path, content)
    oldest = min([folder_step(folder) for folder in step_folders(path.parent.parent)], default=0)
    for old in path.parent.glob("*.json"):
        if int(old.stem) + updates <= oldest:
            old.unlink()


# ---- Evaluation -------------------------------------------------------------------------------------------

class PromptEvaluation:
    """Reward and length of the greedy answers to the first cfg.eval_prompts validation prompts."""

    def __init__(self, cfg: GRPOConfig, learner: PolicyGradient, run: Run):
        self.cfg, self.learner, self.run = cfg, learner, run

    def __call__(self, model: GPT, last: bool) -> dict[str, float]:
        """{"val_loss": minus the reward, "val_reward", "val_reward/answer", ..., "val_length"}: means."""
        cfg, run = self.cfg, self.run
        count = min(cfg.eval_prompts, len(self.learner.prompts.source.val) or cfg.eval_prompts)
        mine = [VALIDATION + number for number in range(run.rank, count, run.world_size)]
        samples = self.learner.sample(cfg, mine, 1, 0.0) if mine else []
        self.learner.sampling_ended = None  # the time from here on is not spent on learning
        for sample in samples[:cfg.sample_answers]:
            text = [sample.prompt.messages[-1]["content"], self.learner.prompts.tokenizer.decode(
                sample.rollouts[0].ids)]
            run.print(log_text("sample    ", "\n".join(text)))
        sums = [sum(sample.rewards[0] for sample in samples),
                sum(sample.rollouts[0].num_sampled for sample in samples)]
        names = sorted({name for ranks in run.gather([list(sample.terms[0]) for sample in samples])
                        for terms in ranks for name in terms})
        sums += [sum(sample.terms[0].get(name, 0.0) for sample in samples) for name in names]
        reward, length, *terms = [value / count for value in run.sum(sums)]
        return {"val_loss": -reward, "val_reward": reward, "val_length": length} | {
            f"val_reward/{name}": value for name, value in zip(names, terms, strict=True)}


# ---- Main -------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> int:
    cfg, provenance = configure_run(GRPOConfig, argv, usage=__doc__)
    with start_run(cfg, provenance) as run:
        # The prompts, in the chat format of the model.
        tokenizer = run.tokenizer = Tokenizer.load(hf.find_folder(cfg.init_from))
        require_chat(tokenizer, f"init_from={cfg.init_from}")
        prompts, reward = Prompts(cfg, tokenizer), Reward(cfg.reward, cfg.reward_seconds)
        user_cfg, cfg = cfg, with_steps(cfg, prompts.steps_in_epoch)
        stages = plan_stages(cfg)
        # The model. With dropout, the policy that learns would not be the one that samples.
        model, identity = chat_model(cfg, tokenizer, run, dropout=0.0)
        if cfg.reference == "adapter_off" and isinstance(model, AdaptedGPT) and model.spec.tables:
            raise UserError(f"reference=adapter_off: {cfg.init_from} has no chat tokens, so new embeddings "
                            "are trained, which cannot be switched off; start from a model of sft.py")
        device = torch.device("cpu") if cfg.reference == "cpu" else run.device
        reference = ReferenceModel(model, cfg.init_from, cfg.reference == "adapter_off", device,
                                   training_dtype(cfg, run))
        learner = PolicyGradient(stages, model, prompts, reward, reference, run)
        run.write_run_json(user_cfg, {}, data=prompts.hashes, reward=reward.identity, **identity)
        run.print(prompts.text)
        results = fit(cfg.frozen_but_adapters(model), model,
                      lambda step: batches_at(stages, prompts, run, step), learner,
                      PromptEvaluation(stages[-1].cfg, learner, run), run)
        if cfg.merge:
            write_merged(run, tokenizer)
        if results:
            run.print(f"\nvalidation  reward {results['val_reward']:.3f}, {results['val_length']:.1f} tokens "
                      f"per answer")
            print_end(run, f"python eval.py --model={run.quoted} --compare={shlex.quote(cfg.init_from)} "
                           "--tasks=problems,calculator,hard_calculator",
                      f"python sample.py --model={run.quoted} --chat=True")
    return 0


if __name__ == "__main__":
    run_script(main)
