"""Faults 1, 3 and 16: the process is killed, or the power fails."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import distill
import sft
from dataset.shards import DataFolder
from formats import checkpoint
from tests.conftest import ROOT, TINY_RUN
from tests.runs import assert_same_run, events, kill_in_step


@pytest.mark.slow
def test_thirty_kills_change_no_bit(tmp_path, text_folder):
    """Some of them during a save. `python -m bench.soak --kills=1000` is the same test before a release."""
    words = ["--kills=30", f"--source={text_folder}", f"--json={tmp_path / 'j'}"]
    found = subprocess.run([sys.executable, "-m", "bench.soak", *words], cwd=ROOT, capture_output=True,
                           text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert found.returncode == 0, found.stderr + found.stdout
    counts = json.loads((tmp_path / "j").read_text())
    assert counts["kills"] >= 30 and counts["runs"] >= 1 and counts["runs_that_differ"] == 0


def test_a_run_whose_reader_is_gone_saves_and_ends(tmp_path, data):
    """`python train.py | tee log`: Ctrl-C ends tee too, so the next line of the log cannot be written."""
    argv = [sys.executable, "train.py", *TINY_RUN, f"--dataset={data}", f"--out_dir={tmp_path}/out",
            "--max_steps=100000", "--save_interval=0", "--log_interval=1"]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.stdout.readline().split()[:1] != ["step"]:
        assert process.poll() is None
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == ""
    (saved,) = checkpoint.step_folders(tmp_path / "out")
    assert int(saved.name.removeprefix("step_")) < 1000
    assert events(tmp_path / "out")[-1]["step"] == int(saved.name.removeprefix("step_"))


class Power:
    """A disk whose power may fail. Renames reach it at once, contents only by fsync.

    `states` collects what a power cut after each operation would leave, {name: content}. A file without an
    fsync exists but is empty.
    """

    def __init__(self, root, monkeypatch):
        self.root, self.forced, self.states = root, {}, []
        for module, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree")):
            monkeypatch.setattr(module, name, self.watched(getattr(module, name), name))

    def watched(self, function, name):
        def call(*arguments, **options):
            if name == "fsync":
                path = Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))
                if path.is_file():
                    self.forced[os.stat(path).st_ino] = path.read_bytes()
            result = function(*arguments, **options)
            self.states.append({
                path.relative_to(self.root): self.forced.get(path.stat().st_ino, b"")
                for path in self.root.rglob("*") if path.is_file()
            })
            return result

        return call


def test_a_power_cut_leaves_a_checkpoint_that_verifies(tmp_path, monkeypatch):
    """At every moment of three saves the newest checkpoint that verifies is complete, and no finished save is
    lost."""
    disk = tmp_path / "disk"
    disk.mkdir()
    power, finished = Power(disk, monkeypatch), []

    def write(folder):
        step = int(folder.name[6:12])
        (folder / "trainer").mkdir()
        (folder / "model.safetensors").write_bytes(bytes([step]) * 1000)
        (folder / "trainer" / "state.pt").write_bytes(bytes([step]) * 2000)

    for step in (1, 2, 3):
        folder = checkpoint.write_checkpoint(disk, step, write)
        checkpoint.update_pointers(disk, 1, last=folder.name)
        finished.append(len(power.states))
    monkeypatch.undo()
    found = []
    for number, state in enumerate(power.states):
        after = tmp_path / "after"
        for name, content in state.items():
            (after / name).parent.mkdir(parents=True, exist_ok=True)
            (after / name).write_bytes(content)
        newest = checkpoint.newest_verified(after, lambda text: None) if after.exists() else None
        step = checkpoint.folder_step(newest) if newest else 0
        assert step >= sum(number >= done for done in finished), f"a finished save is lost at {number}"
        if newest:
            assert (newest / "model.safetensors").read_bytes() == bytes([step]) * 1000
            pointed = checkpoint.read_pointers(after)
            assert not pointed or checkpoint.find_corruption(after / pointed["last"]) is None
        found.append(step)
        shutil.rmtree(after, ignore_errors=True)
    assert set(found) == {0, 1, 2, 3} and len(found) > 30


def test_a_killed_prepare_is_never_seen_and_runs_again(tmp_path, text_folder):
    words = [sys.executable, "prepare.py", f"--source={text_folder}", "--vocab_size=500", "--num_proc=1"]
    begin = time.monotonic()
    subprocess.run([*words, f"--out={tmp_path / 'whole'}"], cwd=ROOT, check=True, capture_output=True)
    span = time.monotonic() - begin
    out = tmp_path / "killed"
    for number in range(8):
        process = subprocess.Popen([*words, f"--out={out}"], cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        time.sleep(span * (number + 1) / 9)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (out / "meta.json").exists():
            DataFolder(out).verify()
    subprocess.run([*words, f"--out={out}"], cwd=ROOT, check=True, capture_output=True)
    assert digests(out) == digests(tmp_path / "whole")


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# ---- On-policy runs ---------------------------------------------------------------------------------------


def kill_in_rollout(number, argv):
    """Run distill.py in a fork. SIGKILL ends it while it has the `number`-th rollout, before its loss."""
    child = os.fork()
    if child == 0:
        original, calls = distill.rollout_batch, []

        def rollout_batch(*args):
            batch = original(*args)
            calls.append(None)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return batch

        distill.rollout_batch = rollout_batch
        distill.main(argv)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("words", [["--on_policy=1"], ["--on_policy=0.5", "--dropout=0.1"],
                                   ["--on_policy=1", "--packing=False"]])
def test_an_on_policy_run_is_killed_while_it_trains(trained, data, chats, tmp_path, words):
    """In a rollout, in a backward pass and again after each resume: same losses, weights and optimizer."""
    source = chats if "--packing=False" in words else data
    teacher = trained
    if source == chats:  # the teacher has to know the chat tokens
        teacher = tmp_path / "teacher"
        sft.main([f"--init_from={trained}", f"--dataset={chats}", f"--out_dir={teacher}", "--block_size=64",
                  "--max_steps=2", "--eval_tokens=512", "--sample_answers=0", "--device=cpu"])
    base = """--n_layer=1 --n_embd=32 --n_head=2 --intermediate_size=64 --block_size=64 --global_batch_size=8
        --micro_batch_size=4 --max_steps=10 --learning_rate=3e-3 --eval_tokens=512 --device=cpu
        --log_interval=1 --eval_interval=5 --save_interval=3""".split()
    argv = [*base, *words, f"--teacher={teacher}", f"--dataset={source}"]
    distill.main([*argv, f"--out_dir={tmp_path / 'whole'}"])
    argv.append(f"--out_dir={tmp_path / 'killed'}")
    kill_in_rollout(3, argv)  # before the first checkpoint: two micro-batches per step
    kill_in_step(5, distill.main, argv)  # in step 5; step 3 is saved
    kill_in_rollout(2, argv)
    kill_in_step(5, distill.main, argv)  # from step 3: in step 8; step 6 is saved
    distill.main(argv)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    whole, killed = ([event for event in events(tmp_path / name) if "own_divergence" in event]
                     for name in ("whole", "killed"))
    assert len(whole) > 2 and [event["own_divergence"] for event in whole] == [
        event["own_divergence"] for event in killed]
