"""bench/gpu.py: every part in toy size, with a stand-in for nanoGPT; resuming, failures and time limits."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from bench import gpu
from bench.measure import write_jsonl
from configurator import UserError
from formats.tokenizer import Tokenizer
from tests.bench.test_bench import STAND_IN
from tests.conftest import ROOT, busy_model, tiny_config

# The interface of nanoGPT's train.py: its keys, what it prints, and its checkpoint.
TRAINING = """
import pathlib, pickle, sys, time
import numpy as np
import torch
from model import GPT, GPTConfig

torch.manual_seed(1337)
given = dict(word[2:].split("=", 1) for word in sys.argv[1:])
sizes = {key: int(given[key]) for key in ("n_layer", "n_head", "n_embd", "block_size")}
ids = torch.from_numpy(np.fromfile("data/same/train.bin", dtype=np.uint16).astype(np.int64))
sizes |= pickle.loads(pathlib.Path("data/same/meta.pkl").read_bytes()) | {"dropout": 0.0, "bias": False}
model = GPT(GPTConfig(**sizes))
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
for step in range(int(given["max_iters"]) + 1):
    begin, T = time.perf_counter(), sizes["block_size"]
    rows = torch.stack([ids[place:place + T + 1] for place in torch.randint(len(ids) - T - 1, (4,)).tolist()])
    loss = model(rows[:, :-1], rows[:, 1:])[1]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"iter {step}: loss {loss.item():.4f}, time {1e3 * (time.perf_counter() - begin):.2f}ms, mfu 1.00%")
    print(f"step {step}: train loss {loss.item():.4f}, val loss {loss.item():.4f}")
pathlib.Path(given["out_dir"]).mkdir()
torch.save({"model": {f"_orig_mod.{name}": value for name, value in model.state_dict().items()},
            "model_args": sizes}, given["out_dir"] + "/ckpt.pt")
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, text_folder, chat_folder):
    """The files that a user copies: a small chat model in place of SmolLM2, and short texts."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "nanoGPT").mkdir()
    (folder / "nanoGPT" / "model.py").write_text(STAND_IN)
    (folder / "nanoGPT" / "train.py").write_text(TRAINING)
    tokenizer = Tokenizer.load(chat_folder)
    model = busy_model(tiny_config(vocab_size=tokenizer.vocab_size, block_size=256))
    model.save_pretrained(folder / "smollm2", eos_token_id=tokenizer.end_ids)
    tokenizer.save(folder / "smollm2")
    files = [path for place in text_folder.split(",") for path in sorted(Path(place).glob("*.py"))]
    for name, texts in (("novels.jsonl", files[:12]), ("cpp_docs.jsonl", files[12:30])):
        write_jsonl(folder / name, [{"text": path.read_text("utf-8")} for path in texts])
    (folder / "wikitext2_test.txt").write_text(files[0].read_text("utf-8"))
    problems = [{"question": f"What is {n} plus 2?", "answer": f"{n} + 2 = {n + 2}\n#### {n + 2}"}
                for n in range(40)]
    for split in ("train", "test"):
        write_jsonl(folder / f"gsm8k_{split}.jsonl", problems)
    return folder


def run_part(part, out, inputs, *words):
    return subprocess.run(["bench/gpu.sh", part, "--toy=True", f"--out={out}", f"--inputs={inputs}",
                           f"--work={out / 'work'}", *words], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.PARTS)
def test_the_parts_for_a_gpu_at_toy_size(part, tmp_path, inputs):
    """The same commands on this CPU; on a GPU only the sizes differ."""
    process = run_part(part, tmp_path, inputs)
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / f"{part}.json").read_text())
    assert results["figures"].keys() == gpu.PARTS[part].keys()
    assert results["matmul_flops"] > 1e8 and results["copy_bytes_per_second"] > 1e8
    before = (tmp_path / f"{part}.json").stat().st_mtime_ns
    assert run_part(part, tmp_path, inputs).returncode == 0  # everything is there
    assert (tmp_path / f"{part}.json").stat().st_mtime_ns == before


def test_a_part_for_a_gpu_goes_on_and_survives_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "machine", lambda device: {"gpu": "a GPU", "commit": "1"})
    argv = ["post", "--toy=True", f"--out={tmp_path}"]

    def fail_once(words, seconds):
        if words[1] == "sft":
            raise UserError("exit code 1: no memory")
        return {"arms": []}

    monkeypatch.setattr(gpu, "run_figure", fail_once)
    assert gpu.main(argv) == 1 and "missing: sft" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "run_figure", lambda words, seconds: {"arms": words[:2]})
    assert gpu.main(argv) == 0
    figures = json.loads((tmp_path / "post.json").read_text())["figures"]
    assert figures["sft"]["result"] == {"arms": ["bench", "sft"]} and figures["dpo"]["result"] == {"arms": []}
    with pytest.raises(UserError, match="name a part"):
        gpu.main(["pots"])


def test_one_figure_of_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "machine", lambda device: {"gpu": "a GPU", "commit": "1"})
    monkeypatch.setattr(gpu, "run_figure", lambda words, seconds: words)
    assert gpu.main(["real", "--arm=cut", "--toy=True", f"--out={tmp_path}", "--inputs=in"]) == 0
    figures = json.loads((tmp_path / "real.json").read_text())["figures"]
    assert list(figures) == ["cut"]
    assert figures["cut"]["result"] == ["bench.gpu_smollm2", "--arm=cut", "--inputs=in", "--work=out/gpu",
                                        "--toy=True", "--device=cpu"]
    with pytest.raises(UserError, match="arm=cat: real has the figures whole, cut, text, teacher, ternary"):
        gpu.main(["real", "--arm=cat", "--toy=True", f"--out={tmp_path}"])


def test_a_stopped_part_leaves_nothing_running(tmp_path, monkeypatch):
    (tmp_path / "endless.py").write_text(
        "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)")
    monkeypatch.chdir(tmp_path)

    def stopped(process, timeout):
        while not Path("pid").exists() or not Path("pid").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", stopped)
    with pytest.raises(KeyboardInterrupt):
        gpu.run_figure(["endless"], 30)
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)


def test_what_cannot_go_on_later_starts_only_if_it_fits(tmp_path, monkeypatch):
    """106 s are left: loss_head (60 s) fits, 124m (110 s) does not; a run of ours goes on later."""
    monkeypatch.setattr(gpu, "machine", lambda device: {"gpu": "a GPU", "commit": "1"})
    monkeypatch.setattr(gpu, "run_figure", lambda words, seconds: seconds)
    arguments = ["--toy=True", f"--out={tmp_path}", "--inputs=in", "--minutes=2.1"]
    assert gpu.main(["train", *arguments]) == 1
    assert list(json.loads((tmp_path / "train.json").read_text())["figures"]) == ["loss_head", "1.1b"]
    assert gpu.main(["run", "--arm=nanoGPT", *arguments]) == 1  # it starts again each time
    assert gpu.main(["real", "--arm=text", *arguments]) == 0
    assert json.loads((tmp_path / "real.json").read_text())["figures"]["text"]["result"] < 107


def test_a_figure_that_takes_too_long_is_stopped_with_its_children(tmp_path, monkeypatch):
    """The child of the command gets SIGTERM, and has time to save."""
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys; subprocess.run([sys.executable, 'child.py'])")
    (tmp_path / "child.py").write_text("""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), pathlib.Path("saved").touch(), sys.exit()))
pathlib.Path("started").touch()
time.sleep(60)
""")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="took more than 2 s"):
        gpu.run_figure(["parent"], 2)
    assert Path("started").exists() and Path("saved").exists()
