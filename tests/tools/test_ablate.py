"""tools.ablate: commands and table by hand, two variants and again, stages that variants share."""

import importlib
import json
import shlex

import pytest

from configurator import UserError
from model import GPT, GPTConfig
from tests.conftest import TINY_RUN
from tools import ablate
from tools.ablate import AblateConfig, main, report, variant


def test_commands_by_hand():
    base = ["train.py --a=1", "sft.py", "dpo.py --beta=2"]
    assert variant(base, "") == base
    assert variant(base, "n_kv_head=1 norm=layernorm")[0] == "train.py --a=1 --n_kv_head=1 --norm=layernorm"
    assert variant(base, "-sft.py") == ["train.py --a=1", "dpo.py --beta=2"]
    cfg = AblateConfig(changes="position=none; n_kv_head=1")
    assert cfg.variants == {"base": ["train.py"], "position=none": ["train.py --position=none"],
                            "n_kv_head=1": ["train.py --n_kv_head=1"]}
    for change in ("-grpo.py", "norm"):
        with pytest.raises(UserError, match="must be key=value, or -SCRIPT"):
            AblateConfig(changes=change).variants  # noqa: B018
    for bad in ([], ["  "], [3]):
        with pytest.raises(UserError, match="must be a list of commands"):
            AblateConfig(base=bad)
    for change, reason in (("-train.py", "leaves no command"), ("-train.py n_layer=3", "must be key=value"),
                           ("dataset='a", "No closing quotation"), ({"a": 3}, "must be texts"),
                           ({"base": "n_layer=3"}, "none is named base")):
        with pytest.raises(UserError, match=reason):
            AblateConfig(changes=change).variants  # noqa: B018
    with pytest.raises(UserError, match="No closing quotation"):
        AblateConfig(base=["train.py --dataset='a"])
    assert shlex.split(variant(base, "dataset='my data'")[0])[2] == "--dataset=my data"


def test_report_by_hand():
    def runs(*values):
        return [{"metrics": {"val_loss": value}, "speed": 1000.0, "memory_gb": 0.5, "parameters": 10,
                 "active": 10} for value in values]

    text = report({"base": runs(2.0, 3.0), "b": runs(2.1, 3.3), "c": runs(2.0, 3.0)}, "val_loss")
    assert text.splitlines()[2:] == [
        "| base | 2.500 (2.000 - 3.000) |  |  | 1,000 | 0.50 | 10 |",
        # the differences 0.1 and 0.3 have the mean 0.2 and the standard deviation 0.1 sqrt(2)
        "| b | 2.700 (2.100 - 3.300) | +0.200 | 1.4 | 1,000 | 0.50 | 10 |",
        "| c | 2.500 (2.000 - 3.000) | +0.000 |  | 1,000 | 0.50 | 10 |"]


def test_two_variants_and_again(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tools.arms.run_process", lambda script, argv, threads: importlib.import_module(
        script.removesuffix(".py")).main(argv))
    # run_arms has threads, in which a training run cannot set its signal handlers.
    monkeypatch.setattr(ablate, "run_arms", lambda arms, seeds: {
        name: [arm(seed) for seed in seeds] for name, arm in arms.items()})
    base = " ".join(["train.py", *TINY_RUN, f"--dataset={data}", "--max_steps=2"])
    argv = [f"--base={[base]!r}", "--changes={'experts': 'n_expert=4 expert_size=64'}", "--seeds=1",
            f"--out_dir={tmp_path}", f"--json={tmp_path / 'a.json'}", f"--png={tmp_path / 'a.png'}"]
    main(argv)
    results = json.loads((tmp_path / "a.json").read_text())
    assert results["runs"].keys() == {"base", "experts"}
    experts = results["runs"]["experts"][0]
    assert experts["active"] < experts["parameters"] and 5 < experts["metrics"]["val_loss"] < 7
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    first = capsys.readouterr().out
    monkeypatch.setattr("tools.arms.run_process", None)  # a finished run is not started again
    main(argv)
    assert capsys.readouterr().out.splitlines()[-4:] == first.splitlines()[-4:]


def test_equal_time_by_hand(tmp_path, monkeypatch):
    """The base takes 20 seconds for 10 steps, the variant 50: it gets 4 steps, in the base's time."""
    ran = []

    def run_once(script, argv, folder):
        ran.append(argv)
        seconds = 50 if "--norm=layernorm" in argv else 20
        return [{"step": 10, "tokens": 1, "seconds": seconds, "memory_gb": 1}, {"val_loss": 1.0}]

    monkeypatch.setattr(ablate, "run_once", run_once)
    monkeypatch.setattr(ablate.GPT, "from_pretrained", lambda folder: GPT(GPTConfig(n_layer=1)))
    cfg = AblateConfig(base=["train.py --max_steps=10"], changes="norm=layernorm", equal_time=True,
                       out_dir=str(tmp_path))
    for commands in cfg.variants.values():
        ablate.train_variant(cfg, commands, 1)
    steps = [[word for word in argv if word.startswith("--max_steps")] for argv in ran]
    assert steps == [["--max_steps=10"]] * 5 + [["--max_steps=10", "--max_steps=4"]]


def test_a_verifier_chooses_or_the_answers_vote(tmp_path, monkeypatch):
    asked = []

    def run_eval(argv, folder):
        asked.append((argv, folder))
        names = ["right", "maj@8"] if "--num_samples=8" in argv else ["right"]
        names += ["verified@8"] if any(word.startswith("--verifier=") for word in argv) else []
        return {"problems": {name: {"value": number / 10} for number, name in enumerate(names)}}

    log = [{"tokens": 1, "seconds": 1, "memory_gb": 1, "step": 1}, {"val_loss": 1.0}]
    monkeypatch.setattr(ablate, "run_once", lambda script, argv, folder: log)
    monkeypatch.setattr(ablate, "run_eval", run_eval)
    monkeypatch.setattr(ablate.GPT, "from_pretrained", lambda folder: GPT(GPTConfig(n_layer=1)))
    found = []
    for evaluate in ("--num_samples=8", ""):
        cfg = AblateConfig(base=["grpo.py", "verifier.py"], changes="-verifier.py", tasks="problems",
                           evaluate=evaluate, out_dir=str(tmp_path))
        found += [ablate.train_variant(cfg, commands, 1)["metrics"] for commands in cfg.variants.values()]
    assert [each["problems"] for each in found] == [0.2, 0.1, 0.1, 0.0]
    (with_one, verifier), (without, policy) = asked[:2]
    assert with_one == [f"--model={policy.parent}", "--tasks=problems", "--num_samples=8",
                        f"--verifier={verifier.parent}"] and without == with_one[:3]


def test_stages_before_a_difference_are_shared(tmp_path, monkeypatch):
    folders = []

    def run_once(script, argv, folder):
        folders.append(folder)
        return [{"tokens": 1, "seconds": 1, "memory_gb": 1, "step": 1}, {"val_loss": 1.0}]

    monkeypatch.setattr(ablate, "run_once", run_once)
    monkeypatch.setattr(ablate.GPT, "from_pretrained", lambda folder: GPT(GPTConfig(n_layer=1)))
    stages = ["train.py", "sft.py", "dpo.py"]
    cfg = AblateConfig(base=stages, changes="-dpo.py; -sft.py", out_dir=str(tmp_path))
    for commands in cfg.variants.values():
        ablate.train_variant(cfg, commands, 1)
    train, sft, _, again, sft_again, third, alone = folders
    assert train == again == third and sft == sft_again and alone != folders[2]
