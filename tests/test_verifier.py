"""verifier.py: its loss and metrics by hand, balanced batches, whole runs, and eval.py with a verifier."""

import json
import math
import random
import shutil
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import sample
import verifier
from configurator import UserError
from evals import judged
from formats import checkpoint, hf, peft
from formats.tokenizer import Tokenizer
from generation.verifier import Verifier
from model import GPT
from tests.conftest import config_of
from tests.runs import events, kill_in_step, losses, stopped_in_step
from verifier import Answers, VerifierConfig, auc_within, calibration_error, report

TINY = """--num_problems=24 --num_samples=4 --max_new_tokens=6 --families=add,copy --lora_rank=2
    --block_size=64 --global_batch_size=8 --micro_batch_size=4 --max_steps=6 --eval_interval=0
    --save_interval=3 --log_interval=1 --device=cpu""".split()


@pytest.fixture
def run(chat_folder, tmp_path, monkeypatch):
    """Run verifier.py in an empty folder. Half of the answers are called right, by a hash of their text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(judged, "is_right", lambda row, message: zlib.crc32(str(message).encode()) % 2)

    def main(out, *words):
        verifier.main([*TINY, f"--init_from={chat_folder}", f"--out_dir={out}", *words])
        return events(out)

    return main


def rows_of(*families, problems=40, samples=4):
    """Judged rows by hand; every third answer is wrong, and all of the last family are."""
    return [{"row": {"family": family, "key": f"{family} {number}"}, "prompt": [{"content": ""}], "answers": [
        {"ids": [1, 2, number % 50, sample + 3], "sampled": [0, 0, 1, 1],
         "right": bool((number + sample) % 3) and family != families[-1]} for sample in range(samples)]}
        for family in families for number in range(problems)]


def adapter(out):
    return load_file(checkpoint.step_folders(out)[-1] / peft.WEIGHTS)


# ---- Loss and metrics -------------------------------------------------------------------------------------


def roc_auc(scores, right):
    return auc_within(scores, right, [0] * len(scores))


def test_loss_and_gradient_by_hand(monkeypatch):
    """With log-odds of 1: -log sigmoid(2) for the right answer, -log(1 - sigmoid(-1)) for the wrong one."""
    outputs = torch.tensor([3.0, 0.0], requires_grad=True)
    monkeypatch.setattr(verifier, "answer_logits", lambda *rest: outputs)
    loss, metrics = verifier.loss_fn(None, {"right": torch.tensor([1.0, 0.0])}, SimpleNamespace(log_odds=1.0))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)), rel=1e-6)
    assert metrics["accuracy"] == 2
    loss.backward()
    assert outputs.grad.tolist() == pytest.approx([1 / (1 + math.exp(-2)) - 1, 1 / (1 + math.exp(1))])


def test_auc_by_hand():
    assert roc_auc([0.9, 0.4, 0.7], [True, False, True]) == 1
    assert roc_auc([0.9, 0.4, 0.7], [False, True, True]) == 0
    # Pairs (right, wrong): (.5, .5) is a tie, (.5, .2) is won, (.1, .5) and (.1, .2) are lost: 1.5 of 4.
    assert roc_auc([0.5, 0.1, 0.5, 0.2], [True, True, False, False]) == 0.375
    assert math.isnan(roc_auc([0.5, 0.1], [True, True]))
    # Group a: (.2, .1) is won. Group b: (.8, .9) is lost. Between the groups nothing is compared.
    scores, right = [0.2, 0.1, 0.8, 0.9], [True, False, True, False]
    assert auc_within(scores, right, ["a", "a", "b", "b"]) == 0.5


def test_auc_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = random.Random(0)
    for _ in range(20):
        right = [draw.random() < 0.7 for _ in range(50)]
        scores = [draw.randrange(10) / 10 for _ in right]  # with ties
        assert roc_auc(scores, right) == pytest.approx(metrics.roc_auc_score(right, scores), rel=1e-12)


def test_calibration_error_by_hand():
    # Bin [.9, 1]: mean score .95, half are right: .45 off. Bin [.1, .2): mean .1, none is right: .1 off.
    error = calibration_error(np.array([0.9, 1.0, 0.1, 0.1]), np.array([True, False, False, False]))
    assert error == pytest.approx((0.45 * 2 + 0.1 * 2) / 4)
    assert calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0
    # Errors of the two answers in one bin cancel: that is what calibration means.
    assert calibration_error(np.array([0.5, 0.5]), np.array([True, False])) == 0


def test_false_accepts_and_rejects_by_hand():
    answers = [{"right": right, "sampled": [1], "family": ""} for right in (False, False, True, True)]
    found = report([0.1, -0.4, 2.0, -1.0], answers)
    assert (found["val_false_accepts"], found["val_false_rejects"]) == (0.5, 0.5)


def test_a_verifier_that_knows_only_the_length_does_not_pass():
    """Long answers are mostly wrong. Within one family and length bucket, the score says nothing."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 40, (3000,), generator=generator).tolist()
    right = [chance > length / 48 for chance, length in
             zip(torch.rand(3000, generator=generator).tolist(), lengths, strict=True)]
    answers = [{"sampled": [1] * length, "right": each, "family": "add"}
               for length, each in zip(lengths, right, strict=True)]
    by_length = report([(24 - length) / 8 for length in lengths], answers)
    assert by_length["val_auc"] > 0.7 and by_length["val_auc_within"] < verifier.LEAST_AUC
    knowing = report([3.0 if each else -3.0 for each in right], answers)
    assert knowing["val_auc"] == knowing["val_auc_within"] == 1
    assert knowing["val_false_accepts"] == knowing["val_false_rejects"] == 0
    assert knowing["val_ece"] == pytest.approx(1 / (1 + math.exp(3)))


# ---- Data -------------------------------------------------------------------------------------------------


def test_half_of_every_batch_is_right_in_every_family():
    cfg = config_of(VerifierConfig, "--global_batch_size=8", "--micro_batch_size=4", "--block_size=8")
    answers = Answers(cfg, rows_of("add", "sort", "date"))
    for family in ("add", "sort", "date"):
        pairs = [pair for pair in answers.pairs if pair[0]["family"] == family]
        assert (len(pairs) > 20) == (family != "date")
        assert all(a["right"] and not b["right"] and b["family"] == family for a, b in pairs)
    for batch in answers.batches_at(3, 0, 1):
        assert batch["right"].tolist() == [1, 0, 1, 0] and batch["count"] == 4
    # An epoch reads every pair once.
    size = len(answers.pairs)
    first = [id(answers.sample(2 * number)) for number in range(size)]
    assert len(set(first)) == size
    assert first != [id(answers.sample(2 * (size + number))) for number in range(size)]


def test_the_global_batch_is_the_same_for_any_world_size():
    rows = rows_of("add", "sort")
    wide = Answers(config_of(VerifierConfig, "--global_batch_size=8", "--micro_batch_size=8"), rows)
    narrow = Answers(config_of(VerifierConfig, "--global_batch_size=8", "--micro_batch_size=2"), rows)
    (whole,) = wide.batches_at(5, 0, 1)
    parts = [batch for rank in range(2) for batch in narrow.batches_at(5, rank, 2)]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in parts]), whole["input_ids"])
    assert torch.equal(torch.cat([batch["right"] for batch in parts]), whole["right"])


def test_held_out_problems_are_not_trained_on_and_keep_their_shares():
    rows = rows_of("add", "sort")
    answers = Answers(config_of(VerifierConfig), rows)
    total = sum(len(row["answers"]) for row in rows)
    assert 0 < len(answers.val) < total / 4
    train = [answer for row in rows for answer in row["answers"]
             if zlib.crc32(f"verifier/{row['row']['key']}".encode()) % verifier.HELD_OUT]
    share = sum(answer["right"] for answer in train) / len(train)
    assert answers.log_odds == pytest.approx(math.log(share / (1 - share)))
    assert len(train) + len(answers.val) == total


# ---- Runs -------------------------------------------------------------------------------------------------


def test_a_run_from_the_first_loss_to_the_saved_folder(run, chat_folder, tmp_path, capsys):
    before = peft.weights_sha256(chat_folder)
    log = run("a")
    # At the start the log-odds are the log-probability of the answer: float64, with the plain model.
    cfg = config_of(VerifierConfig, *TINY, f"--init_from={chat_folder}")
    (path,) = (tmp_path / "data" / "judged").glob("*/*.jsonl")
    answers = Answers(cfg, [json.loads(line) for line in path.read_text().splitlines()[:24]])
    model, expected = GPT.from_pretrained(chat_folder).double().eval(), 0.0
    for answer in map(answers.sample, range(8)):
        ids = torch.tensor([answer["ids"]])
        log_probs = model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
        logit = sum(p.item() for p, mark in zip(log_probs, answer["sampled"][1:], strict=True) if mark)
        expected += math.log1p(math.exp(logit)) - (logit if answer["right"] else 0)
    assert log[0]["loss"] == pytest.approx(expected / 8, rel=1e-5)
    # What is saved scores the held-out answers as the run did, and the base is what it was.
    loaded = Verifier("a", Tokenizer.load(chat_folder))
    scores = loaded.score_rows([a["ids"] for a in answers.val], [list(map(bool, a["sampled"]))
                                                                 for a in answers.val])
    right = torch.tensor([float(a["right"]) for a in answers.val])
    nll = torch.nn.functional.binary_cross_entropy(scores, right).item()
    assert log[-1]["val_loss"] == pytest.approx(nll, rel=1e-3)
    assert peft.weights_sha256(chat_folder) == before
    # The run says so if the verifier has learned nothing but the length.
    is_poor = not log[-1]["val_auc_within"] >= verifier.LEAST_AUC
    assert ("do not use it" in capsys.readouterr().out) == is_poor


def test_a_killed_run_continues_bit_for_bit(run, chat_folder, tmp_path, monkeypatch):
    undisturbed = run("a")
    argv = [*TINY, f"--init_from={chat_folder}", "--out_dir=b"]
    kill_in_step(5, verifier.main, argv)
    assert checkpoint.folder_step(checkpoint.step_folders(tmp_path / "b")[-1]) == 3
    assert losses(run("b")) == losses(undisturbed)
    stopped_in_step(2, monkeypatch, lambda: run("c"))
    assert losses(run("c")) == losses(undisturbed)
    first = adapter(tmp_path / "a")
    for other in (adapter(tmp_path / "b"), adapter(tmp_path / "c")):
        assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


def test_without_an_adapter_only_the_head_is_trained(run, chat_folder, tmp_path):
    run("a", "--lora_rank=0")
    width = GPT.from_pretrained(chat_folder).config.n_embd
    assert {name: tensor.shape for name, tensor in adapter(tmp_path / "a").items()} == {
        "base_model.model.score.weight": (1, width + 2)}
    assert Verifier("a", Tokenizer.load(chat_folder)).score([1], [[2, 3]]).shape == (1,)


def test_mistakes_are_one_line(run, chat_folder, tmp_path, monkeypatch):
    for words, message in ((["--families=add,nosuch"], "no family 'nosuch'"),
                           (["--parallel=fsdp"], "parallel"), (["--merge=True"], "merge"),
                           (["--temperature=0"], "temperature"), (["--dataset=chats"], "dataset")):
        with pytest.raises(UserError, match=message):
            run("x", *words)
    run("a")
    with pytest.raises(UserError, match="is an adapter itself"):
        verifier.main([*TINY, "--init_from=a", "--out_dir=b"])
    monkeypatch.setattr(judged, "is_right", lambda row, message: True)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match="all its answers are right, or all are wrong"):
        run("c")


def test_sample_prints_the_best_scored_answer(run, chat_folder, tmp_path, capsys):
    """Two conversations with three answers each, in batches that split them."""
    run("v")
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("1 + 1", "Copy 3 4 5.")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [f"--model={chat_folder}", "--prompt_file=p.jsonl", "--num_samples=3", "--batch_size=4",
            "--max_new_tokens=5", "--device=cpu"]
    capsys.readouterr()
    sample.main(argv)
    every = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    sample.main([*argv, "--verifier=v"])
    best = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(every) == 6 and len(best) == 2
    for number, line in enumerate(best):
        assert line["messages"] == rows[number]["messages"] and 0 <= line["score"] <= 1
        assert {k: line[k] for k in ("completion", "replies", "finish_reason")} in [
            {k: each[k] for k in ("completion", "replies", "finish_reason")}
            for each in every[3 * number:3 * number + 3]]
    with pytest.raises(UserError, match="scores answers to messages"):
        sample.main([f"--model={chat_folder}", "--verifier=v"])


def test_eval_samples_votes_and_chooses(run, chat_folder, tmp_path, capsys):
    run("v")
    argv = [f"--model={chat_folder}", "--tasks=problems", "--limit=2", "--device=cpu", "--out_dir=e",
            "--num_samples=2", "--verifier=v", "--retries=1"]
    assert evaluation.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["problems", "verified@2", "2"] for line in lines)
    assert any(line.split()[:2] == ["problems", "revise"] for line in lines)
    found = json.loads((tmp_path / "e" / "results.json").read_text())["models"][0]["tasks"]["problems"]
    methods = found["details"]["methods"]
    assert {"greedy", "pass@1", "maj@2", "weighted@2", "verified@2", "oracle@2", "longer",
            "revise"} <= methods.keys()
    assert methods["maj@2"]["tokens"] == pytest.approx(2 * methods["pass@1"]["tokens"])
    assert methods["verified@2"]["tokens"] == pytest.approx(2 * methods["maj@2"]["tokens"])
    assert (tmp_path / "e" / "problems.png").stat().st_size > 10_000
    assert "| problems | maj@2 |" in (tmp_path / "e" / "results.md").read_text()
    # Greedy figures are what they are without samples, and the same samples come again.
    assert evaluation.main([*argv, "--batch_size=3"]) == 0
    again = json.loads((tmp_path / "e" / "results.json").read_text())["models"][0]["tasks"]["problems"]
    assert again["details"]["methods"].keys() == methods.keys()
    for name, method in methods.items():
        assert again["details"]["methods"][name] == pytest.approx(method), name
    assert again["figures"]["accuracy"] == found["figures"]["accuracy"]
    with pytest.raises(UserError, match="is no verifier"):
        evaluation.main([*argv, f"--verifier={hf.find_folder(chat_folder)}"])
