"""bench: every comparison at toy size, with a stand-in that has nanoGPT's interface; and its errors.

The measured values mean nothing here. The tests show that the checks refuse sides that do not agree, that
both sides have the same number of parameters, and that the JSON holds every number that is promised.
"""

import functools
import importlib
import json
import math

import pytest
import torch

import generation.generate
from bench import distill, generate, llama_cpp, loss, peers, serve, train
from bench.__main__ import main
from bench.machine import matmul_arms, matmul_peak
from bench.measure import in_turns, run_child, text_table, time_in_turns
from bench.peers import Shape, llama_config, nanogpt_parameters
from configurator import UserError, configure, help_text
from dataset.shards import DataFolder
from formats.tokenizer import Tokenizer
from model import GPT
from tests.conftest import ROOT, busy_model, tiny_config

TOY = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --vocab_size=65".split()
QUICK = ["--rounds=2", "--seconds=0.001"]
# The interface and the parameter names of nanoGPT's model.py, with its own attention and no options.
STAND_IN = '''
import torch, dataclasses
from torch import nn
from torch.nn import functional as F

@dataclasses.dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool

class Norm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c.n_embd)), None
    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.n_head
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=False)
    def forward(self, x):
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, 2))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf)
        return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=False)
        self.gelu = nn.GELU()
    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = Norm(c), Attention(c), Norm(c), MLP(c)
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        print("number of parameters: some")
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(c.vocab_size, c.n_embd), wpe=nn.Embedding(c.block_size, c.n_embd),
            h=nn.ModuleList([Block(c) for _ in range(c.n_layer)]), ln_f=Norm(c)))
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
    def forward(self, ids, targets=None):
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
    @torch.no_grad()
    def generate(self, ids, length, temperature=1.0, top_k=None):
        for _ in range(length):
            ids = torch.cat((ids, self(ids)[0][:, -1:].argmax(-1)), 1)
        return ids
'''


@pytest.fixture(scope="module")
def nanogpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nanogpt")
    (folder / "model.py").write_text(STAND_IN)
    return folder


def run(tmp_path, *argv):
    """The JSON of `python -m bench ARGV`, and its arms by name."""
    path = tmp_path / "results.json"
    assert main([argv[0], *QUICK, *argv[1:], f"--json={path}"]) == 0
    figures = json.loads(path.read_text())
    assert figures["command"].startswith(f"python -m bench {argv[0]}")
    assert {"torch", "transformers", "numpy", "machine", "threads", "clock"} <= figures["versions"].keys()
    for arm in figures["arms"]:
        assert 0 < arm["min_seconds"] <= arm["median_seconds"] <= arm["max_seconds"] < 60
        assert len(arm["seconds"]) in (1, 2) and arm["first_call_seconds"] > 0
        assert all(0 < ratio < math.inf for ratio in arm["speed_of"].values())
        assert 0 < arm["share_of_peak"] < 5  # a toy is so small that one clock tick matters
    return figures, {arm["arm"]: arm for arm in figures["arms"]}


# ---- Each comparison --------------------------------------------------------------------------------------

def test_train(tmp_path, nanogpt, capsys):
    figures, arms = run(tmp_path, "train", *TOY, "--batch_size=2", f"--nanogpt={nanogpt}")
    kinds = ("nanoGPT", "transformers", "our Llama", "our Llama, Muon", "our GPT-2")
    assert list(arms) == [f"{kind}, {dtype}" for dtype in ("float32", "bfloat16") for kind in kinds]
    assert arms["nanoGPT, float32"]["speed_of"]["nanoGPT, float32"] == 1
    for arm in arms.values():
        assert arm["parameters"] == pytest.approx(arms["nanoGPT, float32"]["parameters"], rel=0.01)
        assert arm["dtype"] == arm["arm"].split(", ")[-1]
    assert len(figures["checks"]) == 2
    assert all(check["difference"] <= 1e-5 for check in figures["checks"].values())
    assert figures["checks"]["loss of our weights"]["ours"] == pytest.approx(math.log(65), rel=0.05)
    printed = capsys.readouterr().out
    assert "x nanoGPT, float32" in printed and "GFLOP/s" in printed and "number of parameters" not in printed


def test_train_without_nanogpt_says_so(tmp_path, capsys):
    arms = run(tmp_path, "train", *TOY, "--batch_size=2", "--arms=Llama, f|tr.*, f")[1]
    assert list(arms) == ["transformers, float32", "our Llama, float32"]
    assert "nanoGPT is left out: --nanogpt=DIR" in capsys.readouterr().out


def test_train_leaves_nanogpt_out_for_sizes_it_cannot_have(tmp_path, nanogpt, capsys):
    argv = ["--n_kv_head=1", "--arms=our Llama, float32", f"--nanogpt={nanogpt}"]
    run(tmp_path, "train", *TOY, "--batch_size=2", *argv)
    assert "nanoGPT is left out: it has no grouped heads" in capsys.readouterr().out


def test_our_step_is_a_step_of_fit(tmp_path, data):
    """Three steps have the losses of three steps of train.py, with the same weights and rows."""
    import train as stage
    cfg = train.Config(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=500, batch_size=4)
    setup = train.Setup(cfg, torch.device("cpu"), tmp_path)
    setup.data, config = data, setup.models["our Llama"].config
    state = train.TrainState(setup.train_config("muon"), GPT(config, seed=1337),
                             train.Run(tmp_path, setup.device))
    train.enter_stage(state)
    step = train.our_step(state)
    for _ in range(3):
        step()
    stage.main([f"--dataset={data}", f"--out_dir={tmp_path / 'out'}", "--max_steps=3", "--log_interval=3",
                "--n_layer=1", "--n_head=2", "--n_embd=32", f"--intermediate_size={config.intermediate_size}",
                "--block_size=16", "--global_batch_size=4", "--micro_batch_size=4", "--learning_rate=1e-3",
                "--schedule=constant", "--warmup_steps=0", "--lr_multipliers={}",
                "--weight_decay=0.1", "--beta2=0.99", "--device=cpu", "--eval_tokens=64",
                "--sample_tokens=0"])
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    metrics = state.metrics
    assert events[0]["loss"] == metrics.sums["loss"].item() / metrics.counts["loss"]
    assert events[0]["grad_norm"] == metrics.norm.item()


def test_generate(tmp_path, nanogpt, monkeypatch):
    monkeypatch.setattr(generation.generate, "compiled_step", lambda: generation.generate.last_logits)
    argv = [arg for arg in TOY if "block" not in arg]
    figures, arms = run(tmp_path, "generate", *argv, "--block_size=64", "--max_new_tokens=24",
                        "--batch_size=3", "--prompt_tokens=4", f"--nanogpt={nanogpt}", "--compile=True")
    assert list(arms) == ["nanoGPT", "transformers", "our Llama", "our GPT-2", "our Llama, compiled"]
    for check in figures["checks"].values():
        assert check["tokens"] == 72 and check["distinct"] > 5
    assert figures["gemv_seconds_per_step"] > 0 and figures["copy_bytes_per_second"] > 0


@pytest.mark.skipif(not llama_cpp.has_server(), reason="xllamacpp is not installed")
def test_generate_with_llama_cpp(tmp_path):
    """The arm reads the same prompt, and generates our tokens from matrices in float16."""
    tokenizer = Tokenizer.train(["hello world, here we are. " * 40], 300)
    config = tiny_config(vocab_size=tokenizer.vocab_size, block_size=256)
    busy_model(config).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    argv = [f"--model={tmp_path / 'model'}", "--batch_size=2", "--prompt_tokens=4", "--max_new_tokens=6"]
    figures, arms = run(tmp_path, "generate", *argv)
    assert list(arms) == ["our Llama", "transformers", "llama.cpp"]
    assert arms["llama.cpp"]["bytes_per_token"] * 2 == arms["our Llama"]["bytes_per_token"]
    cfg, prompts = configure(generate.Config, argv)[0], torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])
    ours = GPT.from_pretrained(tmp_path / "model").eval()
    with generate.llama_cpp_arms(cfg, ours, prompts) as peer:
        assert peer["llama.cpp"]() == generate.generate_tokens("our Llama", ours, prompts, 6)


def test_loss(tmp_path):
    """Full logits keep several (n, v) tensors, our head only a chunk of 512 rows, so memory differs."""
    figures, arms = run(tmp_path, "loss", "--n=2048", "--d=32", "--v=4000", "--rounds=1")
    assert max(figures["checks"].values()) <= 1e-5
    full, ours = (min(arms[name]["memory_megabytes"]) for name in ("full logits", "our head"))
    assert full > 2 * 4 * 2048 * 4000 / 1e6 and 0 < ours < 0.6 * full


def test_loss_in_bfloat16_has_the_limit_of_bfloat16():
    differences = loss.check(loss.problem(64, 16, 100, "bfloat16", "cpu"))
    assert max(differences.values()) <= 2e-2


# ---- Errors -----------------------------------------------------------------------------------------------

def test_altered_weights_are_refused(tmp_path, nanogpt, monkeypatch):
    """If one matrix is multiplied by -3 on the way to a peer, nothing is timed."""
    def altered(make):
        def made(*arguments):
            model = make(*arguments)
            with torch.no_grad():
                next(p for n, p in model.named_parameters() if "down_proj" in n).mul_(-3)
            return model
        return made

    argv = ["train", *TOY, "--batch_size=2", f"--nanogpt={nanogpt}"]
    for name, what in (("gpt2_twin", "nanoGPT's weights"), ("transformers_twin", "our weights")):
        with monkeypatch.context() as patch:
            patch.setattr(peers, name, altered(getattr(peers, name)))
            with pytest.raises(UserError, match=f"{what}: ours is .* nothing was timed"):
                main(argv)
            with pytest.raises(UserError, match="greedy tokens: token"):
                main(["generate", *argv[1:-2], "--block_size=64", "--max_new_tokens=40", *QUICK, argv[-1]])


def test_another_loss_is_refused(monkeypatch):
    monkeypatch.setitem(loss.ARMS, "our head", lambda *inputs: 1.001 * loss.our_head(*inputs))
    with pytest.raises(UserError, match="loss: our head differs by 1.0e-03"):
        main(["loss", "--n=8", "--d=4", "--v=10"])


def test_another_divergence_is_refused():
    """The last losses may differ a little, because rounding grows; the first ones may not."""
    results = {name: [{"loss": 0.1, "last_loss": 0.05}] * 2 for name in distill.ARMS}
    distill.check(distill.Config(), results | {"ours": [{"loss": 0.100001, "last_loss": 0.05001}]})
    for altered, message in (({"loss": 0.1001, "last_loss": 0.05}, "forward_kl: loss differs"),
                             ({"loss": 0.1, "last_loss": 0.0502}, "forward_kl: last_loss differs")):
        with pytest.raises(UserError, match=message):
            distill.check(distill.Config(), results | {"plain": [altered]})


@pytest.mark.parametrize("argv, message", [
    (["train", "--nanogpt=nowhere"], "no model.py here"),
    (["train", "--arms=none"], "arms=none: matches the name of no arm"),
    (["train", "--rounds=0"], "rounds=0: must be positive"),
    (["generate", "--prompt_tokens=400"], r"block_size=512: must be at least prompt_tokens \+ max"),
    (["loss", "--n=0"], "n=0: must be positive"),
    (["sft", "--steps=6"], "steps=6: must be more than 6"),
    (["speed"], "name what to measure"),
    (["load"], "name what to measure"),
    ([], "name what to measure"),
])
def test_user_errors(argv, message):
    with pytest.raises(UserError, match=message):
        main([*argv, *(TOY if argv[:1] == ["train"] else [])])


# ---- The parts --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, parameters", [
    (Shape(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65), 804_096),
    (Shape(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257), 124_337_664),
])
def test_our_llama_has_nanogpts_number_of_parameters(shape, parameters):
    """nanoGPT prints 0.80M and 123.55M: it does not count the position table's 8,192 and 786,432."""
    with torch.device("meta"):
        ours = GPT(llama_config(shape)).num_parameters()
    assert ours == pytest.approx(nanogpt_parameters(shape), rel=0.01)
    assert nanogpt_parameters(shape) == parameters
    assert llama_config(shape).intermediate_size % 8 == 0


def test_arms_take_turns():
    """Three warm-up calls per arm, two if a call takes longer than a turn; then a turn per arm and round."""
    for seconds, warm_up in ((1e-9, "aabb"), (1e-3, "aaabbb")):
        calls = []
        arms = {"a": functools.partial(calls.append, "a"), "b": functools.partial(calls.append, "b")}
        timings = time_in_turns(arms, rounds=2, device=torch.device("cpu"), seconds=seconds)
        assert "".join(calls).startswith(warm_up + "a" * timings["a"].repeats + "b")
        assert all(len(timing.seconds) == 2 for timing in timings.values())
        assert (timings["a"].repeats == 1) == (seconds == 1e-9)


def test_results_of_turns_keep_their_order():
    calls = []

    def arm(name):
        calls.append(name)
        return len(calls)

    assert in_turns({"a": lambda: arm("a"), "b": lambda: arm("b")}, 2) == {"a": [1, 3], "b": [2, 4]}
    assert calls == list("abab")


def test_a_child_process_returns_json_or_its_error():
    assert run_child(json.loads, "[1, 2]") == [1, 2]
    with pytest.raises(UserError, match="(?s)loads.*Expecting value"):
        run_child(json.loads, "no JSON")


def test_a_text_table_by_hand():
    assert text_table(["arm", "ms"], [["ours", "1.5"], ["a peer", "10.0"]]).split("\n") == [
        "arm       ms", "ours     1.5", "a peer  10.0"]


def test_peak_is_that_of_the_fastest_product():
    products = {(8, 16, 32), (64, 64, 64)}
    cpu = torch.device("cpu")
    timings = time_in_turns(matmul_arms(products, "float32", cpu), 1, cpu, 1e-3)
    timings["matmul 8 x 16 x 32, float32"].seconds = [1.0]
    timings["matmul 64 x 64 x 64, float32"].seconds = [0.5, 0.25]
    assert matmul_peak(timings, "float32") == 2 * 64**3 / 0.25


def test_help_lists_every_key(capsys):
    for module in (train, generate, loss):
        with pytest.raises(SystemExit):
            main([module.__name__.split(".")[-1], "--help"])
        printed = capsys.readouterr().out
        assert module.__doc__.strip() in printed and "--rounds=5" in printed and "--threads=1" in printed
    assert main(["--help"]) == 0 and "python -m bench train" in capsys.readouterr().out
    for file in sorted((ROOT / "bench").glob("*.py")):
        module = importlib.import_module(f"bench.{file.stem}")
        assert "--" in help_text(getattr(module, "Config", train.Config), "")


@pytest.mark.slow
def test_the_speed_of_preparing_text(tmp_path, text_folder, capsys):
    (tmp_path / "set.jsonl").write_text(json.dumps({"text": " ".join(f"word{i}" for i in range(20))}) + "\n")
    argv = ["--rounds=1", "--copies=2", f"--source={text_folder}", "--vocab_size=300"]
    assert main(["prepare", *argv, f"--sets={tmp_path / 'set.jsonl'}", f"--json={tmp_path / 'b.json'}"]) == 0
    figures = json.loads((tmp_path / "b.json").read_text())
    assert list(figures["arms"]) == [
        "tokenizers encode_batch_fast", "our encode", "prepare.py, 1 process", "prepare.py, 2 processes",
        "prepare.py, 1 process, quality", "prepare.py, 1 process, dedup",
        "prepare.py, 1 process, decontaminated"]  # fmt: skip
    assert figures["megabytes"] > 1
    assert all(rate > 0 for arm in figures["arms"].values() for rates in arm.values() for rate in rates)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["MB/s", "wall", "(min", "-", "max)", "cpu", "x", "peer"]
    assert lines[1].endswith("1.00") and lines[7].startswith("prepare.py, 1 process, decontaminated")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_fine_tuning_compared_with_trl(kind, tmp_path, capsys):
    toy = ["--rounds=1", "--steps=8", "--batch_size=2", "--vocab_size=600", "--n_layer=1", "--n_embd=64",
           "--block_size=256"]  # fmt: skip
    assert main([kind, *toy, f"--json={tmp_path / 'b.json'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("ours", "TRL")) for line in lines) == (3 if kind == "sft" else 2)
    figures = json.loads((tmp_path / "b.json").read_text())
    for runs in figures["arms"].values():
        assert all(run["seconds"] > 0 and run["megabytes"] > 0 for run in runs)
    if kind == "dpo":
        assert figures["arms"]["ours"][0]["loss"] == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.slow
def test_distillation_compared_with_trl_and_full_logits(tmp_path, capsys):
    toy = ["--rounds=1", "--steps=8", "--batch_size=2", "--vocab_size=600", "--n_layer=1", "--n_embd=64",
           "--teacher_n_layer=2", "--teacher_n_embd=128"]  # fmt: skip
    assert main(["distill", *toy, f"--json={tmp_path / 'b.json'}"]) == 0
    lines = capsys.readouterr().out.splitlines()[-6:]  # after the output of prepare
    headers = {header.strip() for header in lines[0].split("  ")}
    assert lines[0].startswith("distill") and {"x TRL", "x plain", "of TRL", "of plain"} <= headers
    assert len({len(line) for line in lines}) == 1, "the columns are not aligned"
    figures = json.loads((tmp_path / "b.json").read_text())
    assert list(figures["arms"]) == ["ours", "ours, jsd", "TRL", "TRL, jsd", "plain"]
    assert "trl" in figures["versions"]
    for runs in figures["arms"].values():
        assert all(run["seconds"] > 0 and run["megabytes"] > 0 for run in runs)
        assert all(run["last_loss"] < 0.9 * run["loss"] for run in runs)
    first = {name: runs[0]["loss"] for name, runs in figures["arms"].items()}
    assert first["ours"] == pytest.approx(first["TRL"], rel=1e-5)
    assert first["ours, jsd"] == pytest.approx(first["TRL, jsd"], rel=1e-5)


@pytest.mark.slow
def test_serving_what_is_exported(tmp_path, trained, data, capsys):
    argv = [f"--model={trained}", f"--text={data}", "--rounds=1", "--batch_sizes=1,3", "--prompt_tokens=20",
            "--max_new_tokens=20", "--quantize=f32,q8_0,q4_k_m", "--eval_tokens=2000"]  # fmt: skip
    assert main(["serve", *argv, f"--json={tmp_path / 'b.json'}"]) == 0
    figures = json.loads((tmp_path / "b.json").read_text())
    formats = {each["format"]: each for each in figures["formats"]}
    exact = formats["hf float32"]["perplexity"]
    assert formats["gguf f32"]["perplexity"] == exact
    assert formats["gguf q8_0"]["perplexity"] == pytest.approx(exact, rel=0.01)
    assert formats["gguf q4_k_m"]["perplexity"] == pytest.approx(exact, rel=0.05)
    assert formats["gguf q4_k_m"]["bytes"] < formats["gguf q8_0"]["bytes"] < formats["hf bfloat16"]["bytes"]
    theirs = ["llama.cpp f32", "llama.cpp q8_0", "llama.cpp q4_k_m"] if llama_cpp.has_server() else []
    assert [(each["arm"], each["batch_size"]) for each in figures["arms"]] == [
        (arm, batch) for batch in (1, 3) for arm in ["ours", "transformers", *theirs]]
    for each in figures["arms"]:
        assert each["decoded_tokens_per_second"] > 0 and each["prompt_tokens_per_second"] > 0
        assert each["megabytes"] > 0 and len(each["rounds"]) == 1
    assert all(count > 3 for counts in figures["checks"].values() for count in counts.values())
    printed = capsys.readouterr().out
    assert "x transformers" in printed and "gguf q4_k_m" in printed


def test_an_arm_that_generates_other_tokens_is_refused():
    ours = {"ours": [{"rows": [[1, 2, 0, 5]]}]}
    assert serve.check(ours | {"transformers": [{"rows": [[1, 2, 7, 7]]}]}, {0}) == {"transformers": 2}
    with pytest.raises(UserError, match="llama.cpp f32: generates other tokens than ours in row 0"):
        serve.check(ours | {"llama.cpp f32": [{"rows": [[1, 3, 0, 5]]}]}, {0})
    assert serve.check(ours | {"llama.cpp q8_0": [{"rows": [[9]]}]}, {0}) == {}


@pytest.mark.parametrize("argv, message", [
    (["--batch_sizes=1,x"], "batch_sizes=1,x: must be positive whole numbers"),
    (["--max_new_tokens=1"], "must be at least 2"),
    (["--prompt_tokens=60"], "do not fit the context of 64"),
    (["--prompt_tokens=8", "--max_new_tokens=8", "--eval_tokens=64"],
     "has 1 windows of 64 tokens, but batch_sizes=1,16 needs 16"),
])
def test_what_cannot_be_served(argv, message, trained, data):
    with pytest.raises(UserError, match=message):
        main(["serve", f"--model={trained}", f"--text={data}", *argv])


def test_ids_of_another_tokenizer_are_refused(trained, tmp_path, data):
    from formats import hf
    from formats.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(hf.find_folder(trained))
    assert len(serve.text_ids(str(data), tokenizer)) == sum(map(len, DataFolder(data).shards["val"]))
    (tmp_path / "text.txt").write_text("def main():\n")
    assert serve.text_ids(str(tmp_path / "text.txt"), tokenizer).tolist() == tokenizer.encode("def main():\n")
    with pytest.raises(UserError, match="its ids are other tokens than the model's"):
        serve.text_ids(str(data), Tokenizer.train(["other text"], 300))
