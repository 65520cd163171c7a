"""bench/learn.py: the parts that need no training."""

import pytest

from bench import learn
from configurator import UserError, configure
from model import GPTConfig


def test_report_by_hand():
    def arm(*losses):
        return [{"val_loss": loss, "parameters": 1000, "tokens": 2000} for loss in losses]

    arms = {"nanoGPT's README": arm(2.0, 1.8), "ours": arm(1.5, 1.4, 1.3)}
    lines = learn.report({"arms": arms}).split("\n")
    assert lines[1].split() == ["nanoGPT's", "README", "1,000", "2,000", "1.9000", "(1.8000", "-", "2.0000)",
                                "+0.0000"]
    assert lines[2].split()[-5:] == ["1.4000", "(1.3000", "-", "1.5000)", "-0.5000"]


def test_both_sides_have_the_same_number_of_parameters():
    """Within 1 %: a Llama with an MLP of width 344, and nanoGPT's model, which learns its positions."""
    from model import GPT
    from train import TrainConfig

    cfg = configure(TrainConfig, learn.OUR_ARGV)[0]
    ours = GPT(GPTConfig.from_keys(cfg, vocab_size=257, block_size=learn.T)).num_parameters()
    C = learn.WIDTH
    theirs = learn.LAYERS * (12 * C * C + 2 * C) + C + 257 * C + learn.T * C
    assert ours == pytest.approx(theirs, rel=0.01)
    assert all(configure(TrainConfig, [*learn.OUR_ARGV, *argv])
               for _, argv in (learn.ARMS | learn.ABLATIONS).values())


def test_it_needs_nanogpts_folder(tmp_path):
    with pytest.raises(UserError, match="nanoGPT's train.py"):
        learn.main([f"--nanogpt={tmp_path}"])
