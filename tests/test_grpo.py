"""grpo.py: its mathematics in float64 and against TRL, and runs that learn, resume and refuse."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import grpo
import loop
from configurator import UserError, configure
from formats import checkpoint, hf
from formats.chat_format import encode_prompt
from formats.peft import weights_sha256
from formats.tokenizer import Tokenizer
from generation.rollouts import Rollout, group_batch
from model import GPT
from tests.conftest import busy_model, tiny_config
from tests.runs import events, kill_in_step, losses, norms, stopped_in_step
from tests.test_sft import assert_equal
from training.losses import group_advantages, kl_estimate, policy_loss

TINY = """--block_size=128 --max_new_tokens=10 --group_size=4 --global_batch_size=4 --micro_batch_size=2
    --max_steps=6 --learning_rate=3e-3 --optimizer=adamw --calculator=0.2 --eval_prompts=6 --log_interval=1
    --save_interval=0 --device=cpu --sample_answers=1""".split()
# A model with random weights is never right, so it is paid for letters.
LETTERS = "def score(prompt, answer, row): return sum(c.isalpha() for c in answer['content']) / 20"


@pytest.fixture(scope="module")
def chat(chat_folder, tmp_path_factory):
    """(a chat model with random weights and a context of 128 tokens, a reward for it)."""
    folder = tmp_path_factory.mktemp("grpo")
    tokenizer = Tokenizer.load(chat_folder)
    model = busy_model(tiny_config(vocab_size=tokenizer.vocab_size, block_size=128))
    with torch.no_grad():  # most answers have an end within ten tokens
        ids = torch.tensor([encode_prompt(tokenizer, [{"role": "user", "content": "Sort 3 1 2."}])])
        hidden = model(ids, head=lambda hidden, weight: hidden)[0].mean(0)  # (C,)
        model.head_weight[tokenizer.token_id("<|im_end|>")] += 10 * hidden / hidden.square().sum()
    model.save_pretrained(folder / "model", eos_token_id=tokenizer.end_ids)
    tokenizer.save(folder / "model")
    (folder / "reward.py").write_text(LETTERS)
    return folder / "model", f"{folder / 'reward.py'}:score"


def run(chat, out, *words):
    stages = any(word.endswith(".py") for word in words)  # which bring their own number of steps
    tiny = [word for word in TINY if not (stages and word.startswith("--max_steps"))]
    grpo.main([*tiny, f"--init_from={chat[0]}", f"--reward={chat[1]}", f"--out_dir={out}", *words])
    return events(out)


def config(*words):
    return configure(grpo.GRPOConfig, list(words))[0]


# ---- The mathematics --------------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 0, 0, 0], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    expected = {
        "mean": [[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25], [0] * 4],
        "rloo": [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [1, -1 / 3, -1 / 3, -1 / 3], [0] * 4],
        "grpo": [[0.5 / (3**-0.5 + 1e-4) * sign for sign in (1, -1, -1, 1)],
                 [0.75 / 0.5001, *[-0.25 / 0.5001] * 3], [0] * 4],
        "reinforce": [[0.6, -0.4, -0.4, 0.6], [0.6, -0.4, -0.4, -0.4], [-0.3] * 4]}  # fmt: skip
    for kind, values in expected.items():
        found = group_advantages(rewards, kind, 0.4)
        np.testing.assert_allclose(found, values, atol=1e-12, err_msg=kind)
    assert (group_advantages(rewards, "grpo", 0.4)[2] == 0).all(), "rounding makes no gradient"


def test_gradients_by_hand():
    """d/dlogp of the clipped loss is -A r inside the clip and 0 where it binds; of k3 it is 1 - p_ref / p."""
    generator = torch.Generator().manual_seed(0)
    log_probs, old, reference, advantages = torch.randn(4, 200, generator=generator, dtype=torch.float64)
    log_probs = (old + 0.3 * log_probs).requires_grad_()
    losses, clipped = policy_loss(log_probs, old, advantages, 0.2)
    ratio = np.exp((log_probs - old).detach().numpy())
    a = advantages.numpy()
    binds = ((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8))
    assert 20 < binds.sum() < 180 and (clipped.numpy() == binds).all()
    np.testing.assert_allclose(losses.detach(), np.where(binds, -a * ratio.clip(0.8, 1.2), -a * ratio))
    (found,) = torch.autograd.grad(losses.sum(), log_probs, retain_graph=True)
    np.testing.assert_allclose(found, np.where(binds, 0, -a * ratio), rtol=1e-12)
    kl = kl_estimate(log_probs, reference)
    assert (kl >= 0).all()
    (found,) = torch.autograd.grad(kl.sum(), log_probs)
    np.testing.assert_allclose(found, 1 - np.exp((reference - log_probs).detach().numpy()), rtol=1e-12)
    # Exact for a distribution: the mean of k3 over it is the KL divergence.
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    mean, exact = (p * kl_estimate(p.log(), q.log())).sum(), (p * (p / q).log()).sum()
    assert mean.item() == pytest.approx(exact.item(), rel=1e-5)


def rollouts_of(chat, temperature=1.0):
    """Two prompts with four answers of random tokens each, with advantages, and a token of a tool."""
    model, tokenizer = GPT.from_pretrained(chat[0]), Tokenizer.load(chat[0])
    generator, groups = torch.Generator().manual_seed(1), []
    for text in ("2 + 2?", "Sort 3 1."):
        prompt, rollouts = encode_prompt(tokenizer, [{"role": "user", "content": text}]), []
        for length in (3, 12, 1, 7):
            ids = torch.randint(tokenizer.vocab_size, (length,), generator=generator)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids[:-1].tolist()]))[0, len(prompt) - 1:] / temperature
            log_probs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
            rollouts.append(Rollout(prompt, ids.tolist(), [place != 2 for place in range(length)],
                                    log_probs.tolist()))
        for rollout, value in zip(rollouts, torch.randn(4, generator=generator).tolist(), strict=True):
            rollout.advantage = value
        groups.append(rollouts)
    return model, groups


@pytest.mark.parametrize("advantage", ["mean", "rloo"])
def test_the_models_gradient_by_hand(chat, advantage):
    """Every weight's gradient against -sum(A grad log p) / tokens, one answer at a time, in float64."""
    model, groups = rollouts_of(chat)
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 1]], dtype=torch.float64)
    for rollout, value in zip(sum(groups, []), group_advantages(rewards, advantage, 0.0).flatten().tolist(),
                              strict=True):
        rollout.advantage = value
    batch, cfg = group_batch(groups), config(f"--advantage={advantage}")
    log_probs = grpo.token_log_probs(model, batch, model.config.vocab_size)
    loss, _ = grpo.loss_fn(log_probs, batch, None, cfg)
    (loss / len(batch["targets"])).backward()
    exact, total = GPT.from_pretrained(chat[0]).double(), 0
    for rollout in sum(groups, []):
        logits = exact(torch.tensor([rollout.prompt + rollout.ids[:-1]]))[0, len(rollout.prompt) - 1:]
        found = logits.log_softmax(-1).gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]
        mask = torch.tensor(rollout.sampled)
        total += mask.sum().item()
        (-rollout.advantage * found[mask].sum()).backward()
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        wanted = other.grad / total
        assert (parameter.grad - wanted).abs().max() <= 1e-5 * max(wanted.abs().max(), 1e-3), name


@pytest.mark.parametrize("kl, updates", [(0.0, 1), (0.3, 2)])
def test_loss_and_gradient_are_trls(chat, tmp_path, kl, updates):
    """TRL's trainer, given the same weights, answers, masks, advantages and other log-probabilities."""
    trl, datasets, transformers = (pytest.importorskip(name) for name in ("trl", "datasets", "transformers"))
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(chat[0], dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(output_dir=str(tmp_path), loss_type="dapo", scale_rewards="none", epsilon=0.2,
                            beta=kl, num_generations=4, per_device_train_batch_size=8, temperature=0.8,
                            max_completion_length=12, use_cpu=True, bf16=False, gradient_checkpointing=False,
                            report_to=[], use_bias_correction_kl=False),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}]),
        processing_class=transformers.AutoTokenizer.from_pretrained(chat[0], pad_token="<|endoftext|>"))
    model, groups = rollouts_of(chat, 0.8)
    batch, cfg = group_batch(groups), config(f"--kl_weight={kl}", f"--updates_per_rollout={updates}")
    generator = torch.Generator().manual_seed(2)
    batch["old"] += 0.3 * torch.randn(len(batch["old"]), generator=generator)  # so that some are clipped
    reference = batch["old"] + torch.randn(len(batch["old"]), generator=generator)
    log_probs = grpo.token_log_probs(model, batch, model.config.vocab_size, 0.8)
    loss, metrics = grpo.loss_fn(log_probs, batch, reference if kl else None, cfg)
    (loss / len(batch["targets"])).backward()

    answers = sum(groups, [])

    def padded(lists, left=False):
        longest = max(map(len, lists))
        rows = [(each, [0] * (longest - len(each))) for each in lists]
        return torch.tensor([pad + each if left else each + pad for each, pad in rows])

    def spread(values):  # from the flat targets to (answers, tokens)
        out = torch.zeros(tool_mask.shape)
        out[tool_mask.bool()] = values
        return out

    prompts = [each.prompt for each in answers]
    tool_mask = padded([list(map(int, each.sampled)) for each in answers])
    inputs = {"prompt_ids": padded(prompts, True),
              "prompt_mask": padded([[1] * len(prompt) for prompt in prompts], True),
              "completion_ids": padded([each.ids for each in answers]), "tool_mask": tool_mask,
              "completion_mask": padded([[1] * len(each.ids) for each in answers]),
              "advantages": torch.tensor([each.advantage for each in answers]),
              "num_items_in_batch": tool_mask.sum(), "ref_per_token_logps": spread(reference)}
    if updates > 1:
        inputs["old_per_token_logps"] = spread(batch["old"])
    theirs = trainer.model.eval()  # TRL divides an evaluation by the number of tokens alone
    found = trainer._compute_loss(theirs, inputs)
    found.backward()
    assert loss.item() / len(batch["targets"]) == pytest.approx(found.item(), rel=1e-5, abs=1e-7)
    if updates > 1:
        assert 0 < metrics["clipped"] < len(batch["targets"])
    named = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        if name in named:
            grad = parameter.grad[: len(named[name])]
            assert (grad - named[name].grad).abs().max() <= 1e-5 * named[name].grad.abs().max(), name


# ---- The run ----------------------------------------------------------------------------------------------


def test_it_learns(chat, tmp_path):
    """The reward rises, the start model does not change, and the log has what a reader needs."""
    before = weights_sha256(hf.find_folder(chat[0]))
    log = run(chat, tmp_path / "a", "--max_steps=14", "--global_batch_size=8", "--micro_batch_size=8",
              "--eval_tasks=problems", "--eval_limit=2")
    assert "val_problems_accuracy" in log[-1]
    rewards = [event["reward"] for event in log if "reward" in event]
    assert np.mean(rewards[-5:]) > 1.5 * np.mean(rewards[:5])
    assert log[-1]["val_reward"] == -log[-1]["val_loss"] == log[-1]["val_reward/custom"]
    assert log[0]["reward"] == pytest.approx(log[0]["reward/custom"]) and log[0]["length"] <= 10
    names = {"even", "cut", "calls", "entropy", "sampled_per_second", "sampling_seconds"}
    assert names <= log[0].keys() and log[0]["entropy"] > 1
    assert sum(event.get("sampling_seconds", 0) for event in log) < log[-2]["seconds"]
    assert weights_sha256(hf.find_folder(chat[0])) == before
    GPT.from_pretrained(tmp_path / "a")


def test_stopped_killed_and_resumed_is_the_same_run(chat, tmp_path, monkeypatch):
    """Between two updates from one rollout, and before a new one: steps 0, 3 and 6 sample answers."""
    words = ["--updates_per_rollout=3", "--kl_weight=0.1", "--refill", "--save_interval=2", "--max_steps=7"]
    run(chat, tmp_path / "whole", *words)
    stopped_in_step(5, monkeypatch, lambda: run(chat, tmp_path / "cut", *words))
    assert checkpoint.step_folders(tmp_path / "cut")[-1].name == "step_000005"
    run(chat, tmp_path / "cut", *words)
    assert_equal(tmp_path / "whole", tmp_path / "cut")
    argv = [*TINY, f"--init_from={chat[0]}", f"--reward={chat[1]}", f"--out_dir={tmp_path / 'killed'}"]
    kill_in_step(6, grpo.main, argv + words)  # in step 6 of 7; the newest checkpoint is step 4
    kill_in_step(2, grpo.main, argv + words)
    grpo.main(argv + words)
    log = events(tmp_path / "whole")
    assert max(norms(log)) > 0.01 and max(event.get("clipped", 1) for event in log) > 0
    assert_equal(tmp_path / "whole", tmp_path / "killed")
    # Only the files that a checkpoint may need are kept.
    assert {file.stem for file in (tmp_path / "whole" / "rollouts").iterdir()} == {"000003", "000006"}
    (tmp_path / "cut" / "rollouts" / "000006.json").unlink()
    with pytest.raises(UserError, match="000006.json: is missing"):
        run(chat, tmp_path / "cut", *words, "--max_steps=9")


def on_two_ranks(chat, out, words):
    run(chat, out, *words)


def test_micro_batches_and_ranks_change_only_rounding(chat, tmp_path, two_ranks):
    # A small rate: AdamW turns rounding in a gradient of 0 into a full step, and that may change a token.
    words = ["--max_steps=2", "--kl_weight=0.1", "--learning_rate=1e-5"]
    one = run(chat, tmp_path / "one", *words)
    for name, more in (("small", ["--micro_batch_size=1"]), ("ranks", ["--micro_batch_size=1"])):
        out = tmp_path / name
        if name == "ranks":
            two_ranks(on_two_ranks, tuple(map(str, chat)), str(out), words + more)
        else:
            run(chat, out, *words, *more)
        found = events(out)
        np.testing.assert_allclose(losses(found), losses(one), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(norms(found), norms(one), rtol=1e-4)
        assert [e["reward"] for e in found if "reward" in e] == pytest.approx(
            [e["reward"] for e in one if "reward" in e], abs=1e-7)


def test_even_groups_are_counted_and_teach_nothing(chat, tmp_path):
    """A constant reward: every group is even, nothing is learned, and a refill finds nothing either."""
    reward = tmp_path / "constant.py"
    reward.write_text("def score(prompt, answer, row): return 0")
    log = run((chat[0], f"{reward}:score"), tmp_path / "a", "--max_steps=2", "--refill")
    assert [event["even"] for event in log if "even" in event] == [1.0, 1.0]
    assert norms(log) == [0.0, 0.0]


def test_dropping_even_groups_changes_no_gradient(chat):
    """A group with advantages of 0 adds nothing to the sum, and its tokens stay in the count."""
    model, groups = rollouts_of(chat)
    for rollout in groups[1]:
        rollout.advantage = 0.0
    grads = []
    for kept in (groups, groups[:1]):
        batch = group_batch(kept)
        log_probs = grpo.token_log_probs(model, batch, model.config.vocab_size)
        loss, _ = grpo.loss_fn(log_probs, batch, None, config())
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5 * max(two.abs().max(), 1))


def test_stages_and_own_prompts(chat, tmp_path):
    """A curriculum over families; prompts of a file in epochs, with the built-in reward and its terms."""
    stages = [dict(steps=1, families="sort", calculator=0.0), dict(steps=1, families="add", calculator=0.0)]
    (tmp_path / "c.py").write_text(f"stages = {stages}")
    run(chat, tmp_path / "a", str(tmp_path / "c.py"))
    rows = [{"prompt": f"Say {n}.", "regex": "[^a]*"} for n in range(18)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "d.py").write_text("stages = [dict(epochs=1)]")
    log = run((chat[0], "answer"), tmp_path / "b", str(tmp_path / "d.py"), "--format_weight=0.1",
              f"--dataset={tmp_path / 'own.jsonl'}", "--length_weight=0.2")  # 17 for training
    assert log[-1]["step"] == 4 and {"reward/answer", "reward/format", "reward/length"} <= log[0].keys()
    parts = sum(log[0][f"reward/{name}"] for name in ("answer", "format", "length"))
    assert log[0]["reward"] == pytest.approx(parts) and log[0]["reward/length"] < 0
    with pytest.raises(UserError, match="have no epochs; count steps"):
        run(chat, tmp_path / "e", str(tmp_path / "d.py"))


def test_a_stage_that_ends_between_two_updates(chat, tmp_path, monkeypatch):
    """The update after it learns from the answers, and with the keys, of the stage before."""
    (tmp_path / "s.py").write_text("stages = [dict(steps=3, global_batch_size=4), "
                                   "dict(steps=3, global_batch_size=8)]")
    backward, seen = loop.backward, []

    def spy(state, batches, learner, scale):
        result = backward(state, batches, learner, scale)
        tokens = sum(each.num_sampled for group in learner.groups for each in group)
        seen.append((len(learner.groups), round(scale * learner.scale * tokens, 6)))
        return result

    monkeypatch.setattr(loop, "backward", spy)
    run(chat, tmp_path / "a", str(tmp_path / "s.py"), "--updates_per_rollout=2")
    assert seen == [(4, 1.0)] * 4 + [(8, 1.0)] * 2  # (groups, factor of the sum over the sampled tokens)


def test_an_adapter_and_its_reference(chat, tmp_path):
    """The KL is the same with a second model and with the adapter switched off."""
    words = ["--lora_rank=4", "--kl_weight=0.5", "--max_steps=3"]
    one, two, three = (run(chat, tmp_path / where, *words, f"--reference={where}")
                       for where in ("device", "cpu", "adapter_off"))
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    np.testing.assert_allclose(losses(three), losses(one), rtol=1e-5)
    assert one[0]["kl"] == pytest.approx(0, abs=1e-5) and one[2]["kl"] > 1e-6


@pytest.mark.parametrize("words, message", [
    (["--group_size=1"], r"group_size=1: must be at least 2 \(or set advantage=reinforce\)"),
    (["--refill=True", "--advantage=reinforce"], "refill=True: must be False with advantage=reinforce"),
    (["--families=adds"], "families=adds: no family 'adds'"),
    (["--calculator=2"], "calculator=2.0: must be from 0 to 1"),
    (["--kl_weight=-1"], "kl_weight=-1.0"), (["--temperature=0"], "temperature=0.0"),
    (["--reference=adapter_off"], "needs an adapter; set lora_rank"),
    (["--lora_rank=2", "--lora_dropout=0.1"], "lora_dropout: must be 0"),
    (["--parallel=fsdp"], "parallel=fsdp: does not work with sampling"),
    (["--block_size=20"], "block_size=20: a prompt has"),
    (["--block_size=999"], "has a context of 128 tokens"),
    (["--dataset=nowhere.jsonl"], "dataset=nowhere.jsonl: no such file"),
    (["--reward=x.py:f"], "reward=x.py:f: must be answer or an existing file.py:function"),
])  # fmt: skip
def test_mistakes_are_one_line(chat, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run(chat, tmp_path / "a", *words)


def test_a_base_model_and_a_changed_reward_are_refused(chat, trained, tmp_path):
    with pytest.raises(UserError, match="has no chat tokens; sft.py makes a chat model"):
        run((trained, chat[1]), tmp_path / "a")
    reward = shutil.copy(chat[1].partition(":")[0], tmp_path / "mine.py")
    own = (chat[0], f"{reward}:score")
    run(own, tmp_path / "b", "--max_steps=1")
    with open(reward, "a") as file:
        file.write("\n# changed\n")
    with pytest.raises(UserError, match="other settings: reward was"):
        run(own, tmp_path / "b", "--max_steps=2")


@pytest.mark.parametrize("value, message", [
    ("1 / 0", "ZeroDivisionError: division by zero"), ("float('nan')", "TypeError: returned nan"),
    ("'good'", "TypeError: returned 'good'"), ("__import__('time').sleep(60)", "RewardTimeout: took longer")])
def test_a_hostile_reward_ends_the_run_with_one_line(chat, tmp_path, value, message):
    path = tmp_path / "bad.py"
    path.write_text(f"def score(prompt, answer, row): return {value}")
    with pytest.raises(UserError, match=f"bad.py:score: {message}") as fault:
        run((chat[0], f"{path}:score"), tmp_path / "a", "--max_new_tokens=60", "--reward_seconds=0.2")
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("name", ["grpo_tools", "grpo_gsm8k"])
def test_config_files_describe_runs(name):
    cfg = config(f"config/{name}.py")
    assert cfg.out_dir == f"out/{name}" and cfg.global_batch_size % cfg.micro_batch_size == 0


def test_a_stage_may_change_the_prompts():
    fields = {each.name for each in dataclasses.fields(grpo.GRPOConfig)}
    assert grpo.GRPOConfig.stage_fixed <= fields
    assert {"families", "calculator", "temperature", "refill"}.isdisjoint(grpo.GRPOConfig.stage_fixed)
