"""dpo.py: its losses against TRL and by hand, every way to compute the reference, and the whole run."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch

import dpo
from configurator import UserError, configure
from dataset.chat_rows import PairRows, pair_batch
from dataset.shards import DataFolder
from formats import checkpoint, files, hf
from formats.peft import weights_sha256
from formats.tokenizer import Tokenizer
from model import GPT
from prepare import PrepareConfig, prepare
from tests.conftest import busy_model, shared, smollm2, tiny_config
from tests.runs import events, kill_in_step, losses, stopped_in_step
from tests.test_sft import assert_equal, edited
from training.losses import linear_log_probs, preference_loss

SIZES = """--block_size=64 --global_batch_size=8 --micro_batch_size=4 --max_steps=10 --learning_rate=1e-3
    --eval_tokens=2048 --device=cpu --log_interval=1 --eval_interval=0 --save_interval=0
    --sample_answers=0""".split()
TINY = [*SIZES, "--nll_weight=0"]


def run(base, pairs, out, *words):
    dpo.main([*TINY, f"--init_from={base}", f"--dataset={pairs}", f"--out_dir={out}", *words])
    return events(out)


@pytest.fixture(scope="module")
def chat_model(trained, chats, tmp_path_factory):
    """The out_dir of a short fine-tuning, from which the preference runs start."""
    import sft

    out = tmp_path_factory.mktemp("sft") / "sft"
    sft.main([*SIZES, f"--init_from={trained}", f"--dataset={chats}", f"--out_dir={out}"])
    return out


def sides(rows, indices):
    """The pairs as two padded rows each, the chosen first: (ids, 1 in the answer, 1 in front of padding),
    (2n, T) int64 each."""
    docs, found = rows.documents, []
    for side, document in itertools.product((1, 2), rows.usable[indices]):
        ids, mask = docs.tokens(document, docs.end[document] - docs.begin[document])
        kept = mask != 3 - side
        found.append(torch.from_numpy(np.stack((ids, mask == side, np.ones_like(ids)))[:, kept].T))
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True).unbind(-1)


# ---- The mathematics --------------------------------------------------------------------------------------


def test_by_hand():
    """beta 0.1, margin 2 nats: -log sigmoid(0.2); label_smoothing 0.25 mixes in -log sigmoid(-0.2)."""
    ratios, lengths = torch.tensor([[1.5], [-0.5]]), torch.tensor([[3], [5]])
    right, wrong = math.log1p(math.exp(-0.2)), math.log1p(math.exp(0.2))
    assert preference_loss(ratios, lengths, 0.1).item() == pytest.approx(right, rel=1e-6)
    smoothed = 0.75 * right + 0.25 * wrong
    assert preference_loss(ratios, lengths, 0.1, 0.25).item() == pytest.approx(smoothed, rel=1e-6)
    ipo = (1.5 / 3 + 0.5 / 5 - 1 / 0.2) ** 2
    assert preference_loss(ratios, lengths, 0.1, kind="ipo").item() == pytest.approx(ipo, rel=1e-6)


def test_no_ratio_is_ln_2_and_a_swap_flips_the_sign():
    lengths = torch.ones(2, 6)
    assert torch.allclose(preference_loss(torch.zeros(2, 6), lengths, 0.1), torch.tensor(math.log(2)))
    ratios = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (there,) = torch.autograd.grad(preference_loss(ratios, lengths, 0.1).sum(), ratios)
    assert (there[0] < 0).all() and (there[1] > 0).all()
    (back,) = torch.autograd.grad(preference_loss(ratios.flip(0), lengths, 0.1).sum(), ratios)
    assert (back[0] > 0).all() and (back[1] < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_are_log_softmax(dtype):
    """Values and gradients, with a different upstream gradient per token, over several chunks."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1100, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(128, 16, generator=generator).requires_grad_()
    targets = torch.randint(100, (1100,), generator=generator)
    counts = torch.randn(1100, generator=generator)
    found = linear_log_probs(hidden, weight, targets, 100)
    expected = (hidden.float() @ weight.to(dtype).float()[:100].T).log_softmax(-1)
    expected = expected.gather(1, targets[:, None])[:, 0]
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.05, atol=0.15)
    torch.testing.assert_close(found, expected, **tolerance)
    grads = torch.autograd.grad((found * counts).sum(), (hidden, weight))
    wanted = torch.autograd.grad((expected * counts).sum(), (hidden, weight))
    for one, two in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one.float(), two.float(), **tolerance)
    assert (grads[1][100:] == 0).all()


@pytest.mark.parametrize("kind", ["dpo", "ipo"])
def test_loss_and_gradient_are_trls(chat_model, pairs, tmp_path, kind):
    """TRL's trainer, given the same weights, ids and reference log-probabilities."""
    trl, datasets, transformers = (pytest.importorskip(name) for name in ("trl", "datasets", "transformers"))
    folder = hf.find_folder(chat_model)
    row = {"prompt": "a b c", "chosen": " d", "rejected": " e"}
    trainer = trl.DPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=str(tmp_path), loss_type=[{"dpo": "sigmoid"}.get(kind, kind)], beta=0.1, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to=[], precompute_ref_log_probs=True),
        train_dataset=datasets.Dataset.from_list([row]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder, pad_token="<|endoftext|>"),
    )  # fmt: skip
    rows = PairRows(DataFolder(pairs), "train", 64)
    batch = pair_batch([rows.pair(number) for number in range(6)])
    reference = -10 - 5 * torch.rand(2, 6, generator=torch.Generator().manual_seed(1))
    model = GPT.from_pretrained(folder)
    cfg = configure(dpo.DPOConfig, [f"--loss={kind}", "--nll_weight=0"])[0]
    loss, _ = dpo.loss_fn(model, batch, reference, cfg, 506)
    (loss / 6).backward()
    ids, completion, seen = sides(rows, np.arange(6))
    theirs = trainer.model.eval()
    found = trainer._compute_loss(
        theirs,
        {"input_ids": ids, "attention_mask": seen, "completion_mask": completion,
         "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]},
        return_outputs=False,
    )  # fmt: skip
    found.backward()
    assert loss.item() / 6 == pytest.approx(found.item(), rel=1e-6)
    named = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        if name in named:
            grad = parameter.grad[: len(named[name])]
            scale = named[name].grad.abs().max()
            assert (grad - named[name].grad).abs().max() <= 1e-5 * scale, name


@pytest.mark.slow
def test_first_20_losses_of_smollm2_are_trls(tmp_path, monkeypatch):
    """A real model and real pairs: 20 steps of AdamW with the same batches, by dpo.py and by TRL."""
    trl, datasets, transformers = (pytest.importorskip(name) for name in ("trl", "datasets", "transformers"))
    source, model = shared("prefs/rasbt_instruction_preference.json"), tmp_path / "model"
    GPT.from_pretrained(smollm2()).save_pretrained(model)
    Tokenizer.load(smollm2()).save(model)
    rows = sorted((row for row in json.loads(source.read_text()) if row["chosen"] != row["rejected"]),
                  key=lambda row: len(str(row)))[:100]
    pairs = [{"prompt": [{"role": "user", "content": f"{row['instruction']} {row['input']}".strip()}]}
             | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
             for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    prepare(PrepareConfig(source=str(tmp_path / "rows.jsonl"), kind="preference", tokenizer=str(model),
                          out=str(tmp_path / "pairs"), val_fraction=0.05, num_proc=1))
    batches = []
    monkeypatch.setattr(dpo, "pair_batch", lambda pairs: batches.append(pairs) or pair_batch(pairs))
    dpo.main(f"""--init_from={model} --dataset={tmp_path / "pairs"} --out_dir={tmp_path / "out"}
        --max_steps=20 --global_batch_size=2 --micro_batch_size=2 --block_size=256 --optimizer=adamw
        --beta2=0.999 --schedule=constant --warmup_steps=0 --learning_rate=1e-5 --nll_weight=0
        --reference=device --eval_interval=0 --save_interval=0 --eval_tokens=128 --log_interval=1
        --sample_answers=0 --device=cpu""".split())
    trainer = trl.DPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"), max_steps=20, per_device_train_batch_size=2, learning_rate=1e-5,
            lr_scheduler_type="constant", train_sampling_strategy="sequential", max_length=256, use_cpu=True,
            bf16=False, gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[]),
        train_dataset=datasets.Dataset.from_list(pairs[:1]),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    # TRL also teaches the line break after the token that ends an answer, so it gets our ids.
    trainer.train_dataset = datasets.Dataset.from_list([
        {"prompt_ids": ids[:prompt], "chosen_ids": ids[prompt:prompt + chosen],
         "rejected_ids": ids[prompt + chosen:]}
        for batch in batches[:20] for ids, prompt, chosen in batch])
    trainer.train()
    found = [event["loss"] for event in trainer.state.log_history if "loss" in event]
    assert losses(events(tmp_path / "out")) == pytest.approx(found, abs=1e-4)
    assert max(found) - min(found) > 0.2  # the model has moved


@pytest.mark.parametrize("changes", [
    dict(n_head=6, n_kv_head=2, n_embd=96),
    dict(position="learned", norm="layernorm", mlp="gelu", bias="all", n_kv_head=4),
    dict(qk_norm=True, head_dim=32, bias="qkv"),
])  # fmt: skip
def test_a_shared_prompt_equals_two_rows(pairs, changes):
    """The log-probability of every answer token, and all gradients, with random weights per answer."""
    rows = PairRows(DataFolder(pairs), "train", 64)
    batch = pair_batch([rows.pair(number) for number in range(24)])
    ids, answer, _ = sides(rows, np.arange(24))
    model = busy_model(tiny_config(vocab_size=506, **changes))

    one = model(batch["input_ids"], paths=batch["paths"]).log_softmax(-1)[0, batch["positions"]]
    one = one.gather(1, batch["targets"][:, None])[:, 0]
    two = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]  # (2n, T - 1)
    of_answers = answer[:, 1:].bool()
    by_pair = (each.view(2, 24, -1).transpose(0, 1) for each in (two, of_answers))
    torch.testing.assert_close(one, torch.masked_select(*by_pair), rtol=0, atol=1e-5)

    found = dpo.answer_log_probs(model, batch, 506)
    expected = torch.where(of_answers, two, 0.0).sum(-1).view(2, 24)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    counts = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())
    grads = (torch.autograd.grad((sums * counts).sum(), parameters.values()) for sums in (found, expected))
    for name, one, two in zip(parameters, *grads, strict=True):  # a bias of the keys has a gradient of 0
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5 * max(two.abs().max(), 0.1), msg=name)


def test_the_chosen_answers_nll_is_added(chat_model, pairs):
    """Per token within an answer, and with the same weight for every pair."""
    model, rows = GPT.from_pretrained(chat_model), PairRows(DataFolder(pairs), "train", 64)
    batch = pair_batch([rows.pair(number) for number in range(6)])
    log_probs = dpo.answer_log_probs(model, batch, 506)
    expected = -(log_probs[0] / batch["lengths"][:, 0]).sum().item()
    found = {weight: dpo.loss_fn(model, batch, log_probs.detach(), configure(
        dpo.DPOConfig, [f"--nll_weight={weight}"])[0], 506) for weight in (0.0, 2.0)}
    assert found[0.0][1]["loss/nll"].item() == pytest.approx(expected, rel=1e-5)
    assert found[0.0][0].item() == pytest.approx(6 * math.log(2), rel=1e-5)
    assert found[2.0][0].item() - found[0.0][0].item() == pytest.approx(2 * expected, rel=1e-5)
    assert found[2.0][1]["loss"].item() == found[2.0][0].item()


# ---- The run ----------------------------------------------------------------------------------------------


def test_it_learns_to_prefer(chat_model, pairs, tmp_path):
    before = weights_sha256(hf.find_folder(chat_model))
    found = run(chat_model, pairs, tmp_path / "a", "--max_steps=30", "--learning_rate=3e-3",
                "--eval_tasks=problems", "--eval_limit=2")
    first, last = found[0], found[-2]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["loss/dpo"] == first["loss"] and abs(first["rewards/margins"]) < 1e-5
    assert np.mean(losses(found)[-10:]) < 0.6
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"} <= last.keys()
    margin = last["rewards/chosen"] - last["rewards/rejected"]
    assert margin == pytest.approx(last["rewards/margins"], abs=1e-5)
    assert weights_sha256(hf.find_folder(chat_model)) == before
    assert found[-1]["val_loss"] < 0.65 and "val_problems_accuracy" in found[-1]


@pytest.mark.parametrize("words", [[], ["--loss=ipo"]])
def test_both_parts_of_the_loss_are_logged(chat_model, pairs, tmp_path, capsys, words):
    """nll_weight does not hide where the preference loss starts: at ln 2, for ipo at 1 / (2 beta)^2 = 25."""
    log = run(chat_model, pairs, tmp_path / "a", "--max_steps=2", "--nll_weight=10", *words)
    kind, start = ("ipo", 25.0) if words else ("dpo", math.log(2))
    assert log[0][f"loss/{kind}"] == pytest.approx(start, abs=1e-5)
    for event, before in ((log[0], ""), (log[-1], "val_")):
        parts = event[f"{before}loss/{kind}"] + 10 * event[f"{before}loss/nll"]
        assert event[f"{before}loss"] == pytest.approx(parts, rel=1e-6)
        assert {f"{before}rewards/accuracies", f"{before}rewards/margins"} <= event.keys()
        assert not {"kl", "accuracy", "margin"} & event.keys()
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/2"))
    assert f"{kind} {start:6.3f}" in line and "accuracies" in line and "chosen" not in line


def test_a_base_with_another_config_has_another_table(chat_model, pairs, tmp_path):
    """Another rope_theta in the base's config.json: the reference is computed again, and ln 2 stays ln 2."""
    pairs = shutil.copytree(pairs, tmp_path / "pairs", ignore=shutil.ignore_patterns("reference_*"))
    base = shutil.copytree(hf.find_folder(chat_model), tmp_path / "base")
    run(base, pairs, tmp_path / "a", "--max_steps=1")
    tables = set(pairs.glob("reference_*"))
    edited(base, "config.json", rope_theta=200.0)
    log = run(base, pairs, tmp_path / "b", "--max_steps=1")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert len(set(pairs.glob("reference_*")) - tables) == len(tables) > 0
    with pytest.raises(UserError, match="other settings: base_config was"):
        run(base, pairs, tmp_path / "a", "--max_steps=2")


def test_every_reference_is_the_same(chat_model, pairs, tmp_path):
    """Precomputed, on the device, on the CPU, and with the adapter switched off."""
    lora = ["--lora_rank=4", "--max_steps=6"]
    expected = losses(run(chat_model, pairs, tmp_path / "precomputed", *lora))
    for reference in ("device", "cpu", "adapter_off"):
        found = losses(run(chat_model, pairs, tmp_path / reference, *lora, f"--reference={reference}"))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert expected[-1] < expected[0]


def test_the_table_is_named_by_what_it_depends_on(chat_model, pairs, tmp_path, monkeypatch):
    pairs = shutil.copytree(pairs, tmp_path / "pairs", ignore=shutil.ignore_patterns("reference_*"))
    run(chat_model, pairs, tmp_path / "a", "--max_steps=2")
    known = sorted(path.name for path in pairs.glob("reference_*.npy"))
    computed = []
    original = dpo.Reference.compute
    monkeypatch.setattr(
        dpo.Reference, "compute", lambda self, batch: computed.append(batch["count"]) or original(self, batch)
    )
    run(chat_model, pairs, tmp_path / "b", "--max_steps=2", "--beta=0.5")
    assert not computed and known == sorted(path.name for path in pairs.glob("reference_*.npy"))
    run(chat_model, pairs, tmp_path / "c", "--max_steps=10")
    assert sum(computed) == 8 * 8, "only what was missing is computed"
    run(chat_model, pairs, tmp_path / "d", "--max_steps=2", "--block_size=60")
    assert len(list(pairs.glob("reference_*.npy"))) > len(known), "another block_size is another table"
    for path in pairs.glob("reference_*.npy"):
        path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(UserError, match="damaged; delete it, and it is computed again"):
        run(chat_model, pairs, tmp_path / "e", "--max_steps=2")


def test_stopped_and_resumed_is_the_same_run(chat_model, pairs, tmp_path, monkeypatch):
    run(chat_model, pairs, tmp_path / "whole")
    stopped_in_step(5, monkeypatch, lambda: run(chat_model, pairs, tmp_path / "cut"))
    assert checkpoint.step_folders(tmp_path / "cut")[-1].name == "step_000005"
    run(chat_model, pairs, tmp_path / "cut")
    assert_equal(tmp_path / "whole", tmp_path / "cut")


def test_killed_and_started_again_is_the_same_run(chat_model, pairs, tmp_path):
    words = ["--save_interval=3"]
    run(chat_model, pairs, tmp_path / "whole", *words)
    argv = [*TINY, f"--init_from={chat_model}", f"--dataset={pairs}", f"--out_dir={tmp_path / 'killed'}"]
    argv += words
    kill_in_step(5, dpo.main, argv)
    kill_in_step(5, dpo.main, argv)  # from step 3: in the eighth
    dpo.main(argv)
    assert_equal(tmp_path / "whole", tmp_path / "killed")


def on_two_ranks(base, pairs, out, words):
    run(base, pairs, out, *words)


def test_gradients_do_not_depend_on_micro_batch_or_ranks(chat_model, pairs, tmp_path, two_ranks):
    words = ["--optimizer=adamw"]
    expected = losses(run(chat_model, pairs, tmp_path / "one", *words))
    small = losses(run(chat_model, pairs, tmp_path / "small", *words, "--micro_batch_size=1"))
    np.testing.assert_allclose(small, expected, rtol=1e-5)
    for name, more in (("ddp", []), ("fsdp", ["--parallel=fsdp", "--reference=device"])):
        two_ranks(on_two_ranks, str(chat_model), str(pairs), str(tmp_path / name), words + more)
        np.testing.assert_allclose(losses(events(tmp_path / name)), expected, rtol=1e-5)


def test_dropout_is_off(pairs, tmp_path, chat_model):
    folder = tmp_path / "dropping"
    model = busy_model(tiny_config(vocab_size=506, dropout=0.5))
    model.save_pretrained(folder)
    from formats.tokenizer import Tokenizer

    Tokenizer.load(hf.find_folder(chat_model)).save(folder)
    first = run(folder, pairs, tmp_path / "a", "--max_steps=1")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    path, table = tmp_path / "reference_x.npy", np.ones((3, 2), np.float32)
    dpo.save_array(path, table)
    np.testing.assert_array_equal(dpo.read_table(path, 3), table)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*reference_x.npy"):
        dpo.save_array(path, 2 * table)
    np.testing.assert_array_equal(dpo.read_table(path, 3), table)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--beta=0"], "beta=0.0"),
        (["--nll_weight=-1"], "nll_weight=-1.0: must be at least 0"),
        (["--label_smoothing=0.5"], "label_smoothing=0.5"),
        (["--label_smoothing=0.1", "--loss=ipo"], "label_smoothing: only works with loss=dpo"),
        (["--reference=adapter_off"], "reference=adapter_off: needs an adapter; set lora_rank"),
        (["--lora_rank=2", "--quantize_base=nf4"], "with quantize_base set reference=adapter_off"),
        (["--lora_rank=2", "--lora_dropout=0.1"], "must be 0, because dropout"),
        (["--block_size=8"], "train preferences fits block_size=8"),
    ],
)
def test_mistakes_are_one_line(chat_model, pairs, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run(chat_model, pairs, tmp_path / "a", *words)


def test_a_stage_cannot_change_the_loss(chat_model, pairs, tmp_path):
    config = tmp_path / "stages.py"
    config.write_text("stages = [dict(steps=2), dict(steps=2, beta=0.5)]\n")
    words = [word for word in SIZES if "max_steps" not in word]
    words += [f"--init_from={chat_model}", f"--dataset={pairs}", f"--out_dir={tmp_path / 'a'}"]
    with pytest.raises(UserError, match=r"stages\[1\]: beta cannot change during a run"):
        dpo.main([str(config), *words])


def test_an_adapter_with_tables_cannot_be_switched_off(trained, pairs, tmp_path):
    with pytest.raises(UserError, match="start from a model of sft.py"):
        run(trained, pairs, tmp_path / "a", "--lora_rank=2", "--reference=adapter_off")
