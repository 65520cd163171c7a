"""Stage 5, reinforcement learning from checked answers: right answers become likelier than wrong ones.

    python grpo.py                                       # out/sft on the embedded problems -> out/grpo
    python grpo.py --init_from=out/mine --dataset=gsm8k_train.jsonl --task=gsm8k --block_size=512 \\
        --max_new_tokens=300 --out_dir=out/gsm8k
    python grpo.py --dataset=prompts.jsonl --reward=my_reward.py:score --out_dir=out/rewarded
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

A group with equal rewards has no gradient (except with --advantage=reinforce), so it is counted ("even") and
left out of the learning; with --refill=True other prompts are sampled in its place. What a tool writes is not
trained on. With updates_per_rollout above 1 the answers serve several steps, with PPO's clipped ratio.

Prompts are a function of the step. Answers are a function of the weights and of seeds that depend on the
step, so a resumed run repeats them. A reward of your own is a function score(prompt, answer, row) that
returns a number (evals/rewards.py). Another micro-batch size or number of ranks changes a step by rounding;
rounding may, rarely, change a sampled token. In the log, `tokens` counts the tokens of the prompts only.

Left out: a value function, rewards from a model, sampling on other machines, parallel=fsdp.
"""

import shlex
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from configurator import UserError, require, require_not_negative, require_positive, run_script
from dataset.prompts import EMBEDDED, VALIDATION, Prompt, PromptSource, family_names
from dataset.tasks import TaskName
from evals.all_tasks import with_tasks
from evals.judged import judge
from evals.rewards import BUILT_IN, Reward, is_well_formed, require_reference
from formats import hf
from formats.chat_format import require_chat
from formats.checkpoint import folder_step, step_folders
from formats.files import read_json, write_json
from formats.tokenizer import Tokenizer
from generation.rollouts import Limits, Rollout, RolloutSampler, group_batch, is_even
from generation.samples import log_text, transcript
from loop import Run, fit, plan_stages, stage_at, start_run
from model import GPT
from modeling.devices import pick_dtype, to_device
from training.finetuning import PostTrainingConfig, chat_model, finish
from training.losses import group_advantages, kl_estimate, policy_loss
from training.reference import ReferenceModel, check_reference, token_log_probs
from training.stages import Stage, configure_run, with_steps

Advantage = Literal["mean", "grpo", "rloo", "reinforce"]  # see group_advantages
MOST_REFILLS = 3  # times that other prompts are sampled in place of even groups
REFILL_STRIDE = 2**40  # prompt numbers of a refill: far from those of all steps


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(PostTrainingConfig):
    """The keys of a run, of an adapter, and of reinforcement learning."""

    out_dir: str = "out/grpo"  # folder for checkpoints and logs; the same command again continues the run
    init_from: str = "out/sft"  # model folder, out_dir or hub id to start from; also the KL's reference
    dataset: str = EMBEDDED  # problems (the embedded ones), or files of prompts with reference answers
    task: TaskName | None = None  # the files' rows are of this benchmark, with the prompts of eval.py
    block_size: int = 128  # tokens of a prompt and its answer; the model's own context does not change
    global_batch_size: int = 32  # prompts per optimizer step, over all ranks
    micro_batch_size: int = 32  # prompts per forward pass on one rank
    max_steps: int = 60  # optimizer steps; if stages are listed, the sum of their steps counts instead
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
    reward_seconds: float = 10.0  # the reward of an answer that takes longer ends the run
    # ---- Policy gradient
    advantage: Advantage = "mean"  # the reward minus a baseline; grpo also divides by the standard deviation
    updates_per_rollout: int = 1  # optimizer steps per sampled answer
    clip: float = 0.2  # with several updates, no gradient where the ratio has left 1 +- clip
    kl_weight: float = 0.0  # weight of the KL divergence from the start model
    reference: Literal["device", "cpu", "adapter_off"] = "device"  # where the KL's reference is computed

    stage_fixed = PostTrainingConfig.stage_fixed | {
        "dataset", "task", "block_size", "group_size", "eval_prompts", "reward", "reward_seconds",
        "advantage", "updates_per_rollout", "clip", "kl_weight", "reference"}
    resume_free = PostTrainingConfig.resume_free | {"reward_seconds", "eval_prompts"}
    log_line_without = frozenset({"cut", "calls", "sampled_per_second"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "group_size", "max_new_tokens", "updates_per_rollout", "eval_prompts",
                         "temperature", "clip", "reward_seconds")
        require_not_negative(self, "kl_weight", "format_weight", "length_weight")
        require(self, "calculator", 0 <= self.calculator <= 1, "from 0 to 1")
        require(self, "group_size", self.group_size > 1 or self.advantage == "reinforce",
                "at least 2 (or set advantage=reinforce)")
        require(self, "refill", not self.refill or self.advantage != "reinforce",
                "False with advantage=reinforce, where equal rewards teach, too")
        family_names(self.families)  # raises UserError for an unknown one
        check_reference(self, self.reference, is_used=self.kl_weight > 0)
        if self.parallel == "fsdp":  # all ranks would have to sample the same number of tokens
            raise UserError("parallel=fsdp: does not work with sampling; use parallel=ddp or none")


# ---- Loss -------------------------------------------------------------------------------------------------

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

def batches_at(stages: list[Stage[GRPOConfig]], source: PromptSource, run: Run,
               step: int) -> list[dict[str, Any]]:
    """This rank's micro-batches of a step. The answers are sampled in the loss, with the current weights."""
    # The step in which the answers were sampled. Its stage has the keys, even if another has begun since.
    begin = step - step % stages[0].cfg.updates_per_rollout
    cfg = stage_at(stages, begin).cfg
    # Prompts are numbered through the whole run. Stages may differ in their batch size, so add theirs up.
    earlier = sum((min(begin, stage.last) - stage.first) * stage.cfg.global_batch_size
                  for stage in stages if stage.first < begin)
    # Each rank samples from its own part of the step's prompts.
    count, size = cfg.global_batch_size // run.world_size, cfg.micro_batch_size
    numbers = list(range(earlier + run.rank * count, earlier + (run.rank + 1) * count))
    batches = []
    for part, start in enumerate(range(0, count, size)):
        prompts = [source.prompt(number, cfg.families, cfg.calculator)
                   for number in numbers[start:start + size]]
        ids = torch.tensor([sum((prompt.ids for prompt in prompts), [])])  # (1, tokens), for the log
        # The count is of answers: each of them has a reward, and the loop's metrics are means over answers.
        batches.append({"input_ids": ids, "count": size * cfg.group_size, "context": cfg.block_size,
                        "step": step, "begin": begin, "numbers": numbers, "part": part,
                        "parts": count // size})
    return batches


# ---- Sampling and learning --------------------------------------------------------------------------------

class PolicyGradient:
    """The loss of a batch. The first micro-batch of a step samples the answers for all of them."""

    def __init__(self, stages: list[Stage[GRPOConfig]], model: GPT, source: PromptSource,
                 reference: ReferenceModel, run: Run):
        self.stages, self.model, self.source, self.reference, self.run = stages, model, source, reference, run
        self.reward = Reward(stages[0].cfg.reward, stages[0].cfg.reward_seconds)
        self.begin = -1  # the step in which the answers below were sampled
        self.groups: list[list[Rollout]] = []  # this rank's answers
        self.scale = 0.0  # answers per sampled token, over all ranks

    def __call__(self, forward: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of a micro-batch. forward: the model, or DDP's wrapper of it.

        The loop divides by the number of answers. Times `scale`, that is a division by the sampled tokens.
        """
        cfg, metrics = stage_at(self.stages, batch["begin"]).cfg, dict[str, float]()
        if batch["part"] == 0 and batch["step"] == batch["begin"]:
            metrics = self.roll_out(cfg, batch)
        elif self.begin != batch["begin"]:  # resumed between two updates: the answers are in a file
            self.load_answers(batch["begin"])
        # Equal rewards have no advantage and so no gradient. Only a KL term still learns from such answers.
        groups = [group for group in self.groups if any(each.advantage for each in group) or cfg.kl_weight]
        # This micro-batch's share of them, which may be empty. DDP needs a backward pass even then.
        share = [groups[i] for i in np.array_split(np.arange(len(groups)), batch["parts"])[batch["part"]]]
        learned = to_device(group_batch(share or self.groups[:1]), batch["input_ids"].device)
        vocab_size = self.source.tokenizer.vocab_size
        log_probs, reference = token_log_probs(forward, learned, vocab_size, cfg.temperature), None
        if cfg.kl_weight:
            reference = self.reference.compute(lambda model: token_log_probs(
                model, to_device(learned, model.head_weight.device), vocab_size, cfg.temperature))
            reference = reference.to(log_probs.device)  # it may be on the CPU
        loss, sums = loss_fn(log_probs, learned, reference, cfg)
        # With an empty share the answers are those of another micro-batch, so they must not count twice.
        scale = self.scale if share else 0.0
        sampling = {name: torch.tensor(float(value), device=loss.device) for name, value in metrics.items()}
        return loss * scale, sampling | {name: value.detach() * scale for name, value in sums.items()}

    def sample(self, cfg: GRPOConfig, numbers: list[int], size: int,
               temperature: float) -> list[list[Rollout]]:
        """`size` answers to each of these prompts, with their rewards."""
        limits = Limits(max_new_tokens=cfg.max_new_tokens, block_size=cfg.block_size,
                        temperature=temperature, seed=cfg.seed)

        # The reward is the sum of its terms, and each of them is logged under its own name.
        def terms(prompt: Prompt, rollout: Rollout) -> dict[str, float]:
            result = self.reward.terms(prompt, rollout.messages[-1])
            if cfg.format_weight:
                result["format"] = cfg.format_weight * is_well_formed(rollout.messages[-1])
            if cfg.length_weight:
                result["length"] = -cfg.length_weight * rollout.num_sampled / cfg.max_new_tokens
            return result

        prompts = [self.source.prompt(number, cfg.families, cfg.calculator) for number in numbers]
        return judge(RolloutSampler(self.model, self.source.tokenizer, limits), prompts, numbers, size, terms)

    def roll_out(self, cfg: GRPOConfig, batch: dict[str, Any]) -> dict[str, float]:
        """Sample this rank's answers of a step, and compute their advantages. Returns `sampling_metrics`."""
        start, numbers, replaced = time.perf_counter(), batch["numbers"], list[list[Rollout]]()
        groups = self.sample(cfg, numbers, cfg.group_size, cfg.temperature)
        # Refill: sample other prompts in place of the even groups. Each attempt has its own prompt numbers.
        for attempt in range(1, MOST_REFILLS + 1 if cfg.refill else 1):
            even = [place for place, group in enumerate(groups) if is_even(group)]
            replaced += [groups[place] for place in even]
            others = self.sample(cfg, [numbers[place] + attempt * REFILL_STRIDE for place in even],
                                 cfg.group_size, cfg.temperature)
            for place, group in zip(even, others, strict=True):
                groups[place] = group
        seconds = time.perf_counter() - start
        rewards = torch.tensor([[each.reward for each in group] for group in groups], dtype=torch.float64)
        tokens = sum(each.num_sampled for group in groups for each in group)
        # The loop divides by the answers, but the loss is a mean over tokens: `scale` is their ratio.
        all_tokens, reward, answers = self.run.sum([tokens, rewards.sum().item(), rewards.numel()])
        self.begin, self.groups, self.scale = batch["begin"], groups, answers / all_tokens
        advantages = group_advantages(rewards, cfg.advantage, reward / answers)  # (P, G)
        for rollout, value in zip(sum(groups, []), advantages.flatten().tolist(), strict=True):
            rollout.advantage = value
        if cfg.updates_per_rollout > 1:  # after the first update these weights are gone
            self.save_answers(cfg.updates_per_rollout)
        return self.sampling_metrics(groups + replaced, seconds)

    def save_answers(self, updates: int) -> None:
        """Write the answers for a run that is resumed between two updates, and delete files of older steps.

        Such a run no longer has the weights that sampled the answers.
        """
        content = {"scale": self.scale, "ranks": self.run.gather(
            [[asdict(rollout) for rollout in group] for group in self.groups])}
        folder = self.run.out_dir / "rollouts"

        def write() -> None:
            folder.mkdir(exist_ok=True)
            write_json(folder / f"{self.begin:06d}.json", content)
            oldest = min(map(folder_step, step_folders(self.run.out_dir)), default=0)
            for old in folder.glob("*.json"):
                if int(old.stem) <= oldest - updates:  # no checkpoint continues with these answers
                    old.unlink()

        self.run.run_on_rank0(write)

    def load_answers(self, begin: int) -> None:
        """Load what `save_answers` wrote. Raises UserError if the file does not fit this run."""
        path = self.run.out_dir / "rollouts" / f"{begin:06d}.json"
        content = self.run.run_on_rank0(lambda: read_json(path))
        if len(content.get("ranks", [])) != self.run.world_size:
            raise UserError(f"{path}: is missing, or of another number of processes; a run with "
                            "updates_per_rollout needs it to continue between two updates")
        self.begin, self.scale = begin, content["scale"]
        self.groups = [[Rollout(**each) for each in group] for group in content["ranks"][self.run.rank]]

    def sampling_metrics(self, sampled: list[list[Rollout]], seconds: float) -> dict[str, float]:
        """Metrics as sums over the answers, because the loop divides by the number of answers.

        sampled: the groups that are learned from, and those that a refill has replaced.
        """
        answers = [rollout for group in self.groups for rollout in group]
        n, tokens = len(answers), sum(each.num_sampled for group in sampled for each in group)
        # All ranks log the same names: a term of a user's reward may be missing on one of them.
        names = set().union(*sum(self.run.gather([[*each.terms] for each in answers]), []))
        terms = {f"reward/{name}": sum(each.terms.get(name, 0.0) for each in answers)
                 for name in sorted(names)}
        return {"reward": sum(terms.values()), **terms,
                "even": n * sum(map(is_even, sampled)) / len(sampled),
                "length": sum(each.num_sampled for each in answers),
                "cut": sum("cut" in each.messages[-1] for each in answers),
                "calls": sum(message["role"] == "tool" for each in answers for message in each.messages),
                # The mean of -log p over samples from p is an unbiased estimate of the entropy per token.
                "entropy": -self.scale * sum(sum(each.log_probs) for each in answers),
                "sampling_seconds": n * seconds, "sampled_per_second": n * tokens / seconds}


def evaluate(cfg: GRPOConfig, learner: PolicyGradient, run: Run) -> dict[str, float]:
    """Means over the greedy answers to the first cfg.eval_prompts validation prompts.

    {"val_loss": minus the reward, "val_reward", "val_length", "val_reward/answer", ..}.
    """
    source = learner.source
    # The embedded problems have no end, so eval_prompts of them are used; a file may have fewer.
    count = min(cfg.eval_prompts, len(source.val) or cfg.eval_prompts)
    # Validation prompts have numbers that no training step reaches.
    mine = [VALIDATION + number for number in range(run.rank, count, run.world_size)]
    # One answer per prompt at temperature 0, so two evaluations differ only by the weights.
    answers = [group[0] for group in learner.sample(cfg, mine, 1, 0.0)]
    for answer in answers[:cfg.sample_answers]:
        run.print(log_text("sample    ", transcript(source.tokenizer.decode(answer.prompt + answer.ids))))
    own_rows = [{"val_reward": each.reward, "val_length": each.num_sampled}
                | {f"val_reward/{name}": value for name, value in each.terms.items()} for each in answers]
    rows: list[dict[str, float]] = sum(run.gather(own_rows), [])
    # A term of a user's reward may be missing in some answers.
    means = {name: sum(row.get(name, 0.0) for row in rows) / count
             for name in dict.fromkeys(name for row in rows for name in row)}
    # The loop calls the lowest val_loss the best, and a reward should be high.
    return {"val_loss": -means["val_reward"]} | means


# ---- Main -------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> None:
    cfg, _ = configure_run(GRPOConfig, argv, usage=__doc__)
    with start_run(cfg) as run:
        # Data: the prompts, in the chat format of the model. Stages may count epochs; fit counts steps.
        tokenizer = run.tokenizer = Tokenizer.load(hf.find_folder(cfg.init_from))
        require_chat(tokenizer, f"init_from={cfg.init_from}")
        check = require_reference if cfg.reward == BUILT_IN else lambda row: None
        source = PromptSource(cfg.dataset, tokenizer, cfg.block_size, cfg.seed, check, cfg.task)
        user_cfg = cfg
        cfg = with_steps(cfg, lambda stage: source.epoch_size / stage.global_batch_size)
        stages = plan_stages(cfg)
        # The model. With dropout, the policy that learns would not be the one that samples.
        model, identity = chat_model(cfg, tokenizer, run, dropout=0.0)
        reference = ReferenceModel(model, cfg.init_from, cfg.reference, run.device,
                                   pick_dtype(cfg.dtype, run.device))
        learner = PolicyGradient(stages, model, source, reference, run)
        evaluation = with_tasks(cfg, run, lambda policy, last: evaluate(stages[-1].cfg, learner, run))
        run.write_run_json(user_cfg, {}, data=source.hashes, reward=learner.reward.identity, **identity)
        if source.train:
            run.print(f"data      {len(source.train):,} prompts for training, {len(source.val):,} for "
                      f"validation, {source.left_out:,} left out: longer than {cfg.block_size} tokens")
        results = fit(cfg, model, lambda step: batches_at(stages, source, run, step), learner, evaluation,
                      run)
        finish(cfg, run, results, "reward {val_reward:.3f}, {val_length:.1f} tokens per answer",
               f"python eval.py --model={run.quoted} --compare={shlex.quote(cfg.init_from)} "
               "--tasks=problems,calculator,hard_calculator",
               f"python sample.py --model={run.quoted} --chat=True")


if __name__ == "__main__":
    run_script(main)
