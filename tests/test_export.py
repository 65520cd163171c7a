"""export.py: the folders in transformers and in our scripts; refusals; kills and full disks."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import export
import formats.model_card
import sample
import sft
import train
from configurator import UserError
from formats import checkpoint, hf
from formats import gguf as gguf_file
from formats.chat_format import encode_prompt, with_chat_tokens
from formats.peft import AdapterSpec, is_adapter, weights_sha256
from formats.tokenizer import Tokenizer
from model import GPT
from modeling.ternary import pack_codes, unpack_codes
from tests.conftest import ROOT, busy_model, tiny_config
from training.lora import AdaptedGPT

IDS = torch.arange(40).view(2, 20)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12 * 30?"}]
PIECES = ["The quick brown fox jumps over the lazy dog. ", "def main(argv):\n    return 0\n", "12 * 30 = 360"]
EVERY = ",".join(gguf_file.KINDS)


@pytest.fixture(scope="module")
def tokenizer():
    return with_chat_tokens(Tokenizer.train(PIECES, 300))


@pytest.fixture
def chat_model(tmp_path, tokenizer):
    """A chat model with random weights, and its folder."""
    return saved(tmp_path / "chatty", tokenizer)


def saved(folder, tokenizer, **changes):
    model = busy_model(tiny_config(**dict(vocab_size=tokenizer.vocab_size) | changes))
    model.save_pretrained(folder, eos_token_id=tokenizer.end_ids)
    tokenizer.save(folder)
    return model, folder


def run(model, out, *args):
    export.main([f"--model={model}", f"--out={out}", *args])
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in out.iterdir()} - {"manifest.json"}
    assert checkpoint.find_corruption(out) is None
    return out


def logits(model, ids=IDS):
    with torch.no_grad():
        output = model(ids)
    return getattr(output, "logits", output)  # transformers returns an object


# ---- A Hugging Face folder --------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    {}, dict(tie_embeddings=False), dict(bias="qkv"), dict(qk_norm=True),
    dict(position="learned", norm="layernorm", mlp="gelu", bias="all", n_kv_head=4)])  # fmt: skip
def test_transformers_computes_our_logits(changes, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    model, folder = saved(tmp_path / "m", tokenizer, **changes)
    out = run(folder, tmp_path / "out", "--dtype=float32")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-5
    assert theirs.num_parameters() == model.num_parameters()


def test_the_pipeline_and_the_chat_template(chat_model, tokenizer, tmp_path):
    from transformers import pipeline

    model, folder = chat_model
    out = run(folder, tmp_path / "out", "--dtype=float32")
    generate = pipeline("text-generation", model=str(out))
    ids = generate.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert ids == encode_prompt(tokenizer, CHAT)
    answer = generate(CHAT, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    config = sample.SampleConfig(model=str(out), temperature=0, max_new_tokens=8)
    sampler = sample.Sampler(config)
    ours = sampler.run([ids], 0, stream=False)[0]["completion"]
    assert answer.replace("\ufffd", "") == generate.tokenizer.decode(
        tokenizer.encode(ours), skip_special_tokens=True).replace("\ufffd", "") and answer
    assert generate.model.generation_config.eos_token_id == tokenizer.end_ids


def test_the_bos_token_is_the_tokenizers(tokenizer, tmp_path):
    """Such as Llama's <s>, in both files that transformers reads. Without one, it is the EOS token."""
    from transformers import AutoModelForCausalLM

    for name, expected in (("<s>", tokenizer.vocab_size), (None, tokenizer.eot_id)):
        other = tokenizer.extended(["<s>"], {"bos_token": name})
        _, folder = saved(tmp_path / f"{name} model", other)
        theirs = AutoModelForCausalLM.from_pretrained(run(folder, tmp_path / f"{name} export"))
        assert theirs.config.bos_token_id == theirs.generation_config.bos_token_id == expected
        assert theirs.generation_config.eos_token_id == other.end_ids == tokenizer.end_ids
        assert theirs.generate(max_new_tokens=2, do_sample=False)[0, 0] == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_the_bytes(dtype, chat_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model, folder = chat_model
    out = run(folder, tmp_path / "out", f"--dtype={dtype}")
    size = (out / "model.safetensors").stat().st_size
    assert 2 * model.num_parameters() < size < 2 * model.num_parameters() + 5000
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == getattr(torch, dtype)
    rounded = {name: value.detach().to(theirs.dtype) for name, value in model.named_parameters()}
    for name, value in GPT.from_pretrained(out).named_parameters():
        rows = model.config.vocab_size if name in hf.VOCABULARY_TABLES else None
        assert torch.equal(value[:rows], rounded[name][:rows].float())


def test_our_scripts_take_it(trained, data, chats, tmp_path, capsys):
    """As --model of sample.py and as --init_from of sft.py; the result can be exported again."""
    out = run(trained, tmp_path / "mine")
    sample.main([f"--model={out}", "--prompt=def", "--max_new_tokens=5", "--device=cpu"])
    assert capsys.readouterr().out
    tiny = ["--block_size=64", "--global_batch_size=4", "--micro_batch_size=4", "--max_steps=2",
            "--device=cpu", "--eval_tokens=256", "--save_interval=0", "--eval_interval=0",
            "--sample_answers=0"]
    sft.main([*tiny, f"--init_from={out}", f"--dataset={chats}", f"--out_dir={tmp_path / 'sft'}"])
    run(tmp_path / "sft", tmp_path / "chatty", "--dtype=float32")
    assert Tokenizer.load(tmp_path / "chatty").settings["chat_template"]


def test_an_adapter_is_merged(chat_model, tokenizer, tmp_path):
    model, folder = chat_model
    spec = AdapterSpec(4, 8.0, 0.0, ("q_proj", "down_proj"), False)
    with torch.device("meta"):
        adapted = AdaptedGPT(model.config, spec, {"path": str(folder), "sha256": weights_sha256(folder)})
    adapted.to_empty(device="cpu")
    adapted.load(folder)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter", eos_token_id=tokenizer.end_ids)
    tokenizer.save(tmp_path / "adapter")
    out = run(tmp_path / "adapter", tmp_path / "out", "--dtype=float32")
    assert not is_adapter(out)
    merged = logits(GPT.from_pretrained(out))
    assert (merged - logits(adapted.eval())).abs().max() <= 1e-5
    assert (merged - logits(model)).abs().max() > 0.1


def test_the_next_commands(tmp_path, tokenizer):
    folder = tmp_path / "my export"
    folder.mkdir()
    plain = Tokenizer.train(PIECES, 300)
    assert export.next_commands(folder, plain) == [f"python sample.py --model='{folder}'"]
    (folder / "a.gguf").touch()
    assert export.next_commands(folder, tokenizer) == [
        f"llama-server -m '{folder}/a.gguf' --jinja", f"python sample.py --model='{folder}' --chat=True"]


# ---- GGUF -------------------------------------------------------------------------------------------------

def test_every_type_in_one_folder(tokenizer, tmp_path, capsys):
    _, folder = saved(tmp_path / "m", tokenizer, n_embd=256, intermediate_size=256, n_layer=3)
    args = ["--format=gguf", f"--quantize={EVERY}", "--name=mine", "--license=mit"]
    out = run(folder, tmp_path / "out", *args)
    sizes = [(out / f"mine-{kind}.gguf").stat().st_size for kind in ("f32", "f16", "q8_0", "q6_k", "q4_k_m")]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.25 * sizes[0]
    printed = capsys.readouterr().out
    assert "mine-q4_k_m.gguf\n  type" in printed and "Q4_K" in printed and f"{sizes[-1]:,} bytes" in printed
    first = min(out.glob("*.gguf"))  # several types: our scripts need the file's name
    assert f"\nnext    llama-server -m {first} --jinja\n" in printed
    assert printed.endswith(f"        python sample.py --model={first} --chat=True\n")
    import gguf

    fields = gguf.GGUFReader(out / "mine-q8_0.gguf").fields
    assert fields["general.name"].contents() == "mine" and fields["general.license"].contents() == "mit"
    with pytest.raises(UserError, match="holds several .gguf files"):
        GPT.from_pretrained(out)


@pytest.mark.parametrize("kind, tolerance", [("f32", 0.0), ("f16", 0.01), ("q8_0", 0.2)])
def test_a_folder_of_one_type_is_a_model(chat_model, tmp_path, kind, tolerance):
    """So an export can be measured: its logits differ by the rounding of its type only."""
    model, folder = chat_model
    out = run(folder, tmp_path / "out", "--format=gguf", f"--quantize={kind}")
    difference = (logits(GPT.from_pretrained(out)) - logits(model)).abs().max()
    assert difference <= tolerance and (kind == "f32" or difference > 0)
    assert hf.end_ids(out) == hf.end_ids(folder) and Tokenizer.load(out).vocab_size
    assert weights_sha256(out) != weights_sha256(folder)
    path = next(out.glob("*.gguf"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="damaged"):
        GPT.from_pretrained(out)


def test_llama_cpps_spelling_of_a_type_is_the_same_export(chat_model, tmp_path, capsys):
    """Q8_0 is q8_0: the same file name, and the same command in lower case finds the export up to date."""
    _, folder = chat_model
    out = run(folder, tmp_path / "out", "--format=gguf", "--quantize=Q8_0", "--name=mine")
    assert [path.name for path in out.glob("*.gguf")] == ["mine-q8_0.gguf"]
    capsys.readouterr()
    run(folder, tmp_path / "out", "--format=gguf", "--quantize=q8_0", "--name=mine")
    assert "exists already" in capsys.readouterr().out


# ---- Ternary ----------------------------------------------------------------------------------------------

def test_four_codes_to_a_byte_by_hand():
    """-1, 0, 1, 1 -> 0, 1, 2, 2 -> 0b10_10_01_00. A row of five codes has three 3s in its second byte."""
    codes = torch.tensor([[-1.0, 0.0, 1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    packed = pack_codes(codes)
    assert packed.tolist() == [[0b10_10_01_00, 0b11_11_11_00], [0b01_01_01_01, 0b11_11_11_10]]
    assert torch.equal(unpack_codes(packed), codes)


def test_a_ternary_model_packed_and_read_back(tokenizer, tmp_path, capsys):
    """The same logits, exactly, at an eighth of float16's size. A packed folder can be exported again."""
    model, folder = saved(tmp_path / "m", tokenizer, ternary=True, intermediate_size=130)
    out = run(folder, tmp_path / "out", "--format=ternary")
    assert float(capsys.readouterr().out.split(" of float16's")[0].split()[-1]) <= 0.14
    assert "sample.py --chat=True --model=m  # this folder" in (out / "README.md").read_text()
    packed = GPT.from_pretrained(out).eval()
    assert torch.equal(logits(packed), logits(model))
    plain = sum(p.numel() for n, p in model.named_parameters() if "_proj" not in n)
    expected = 4 * plain + sum(-(-p.shape[1] // 4) * p.shape[0] + 4 for n, p in model.named_parameters()
                               if "_proj" in n)
    expected -= 4 * (model.config.padded_vocab_size - model.config.vocab_size) * model.config.n_embd
    assert expected < (out / "model.safetensors").stat().st_size < expected + 6000
    again = run(out, tmp_path / "again", "--format=ternary", "--name=m")
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    sample.main([f"--model={out}", "--max_new_tokens=3", "--device=cpu"])


def test_packed_weights_are_not_trained_or_saved(tokenizer, data, tmp_path):
    """The weights before rounding are gone, so both would silently continue from other weights."""
    _, folder = saved(tmp_path / "m", tokenizer, ternary=True)
    packed = GPT.from_pretrained(run(folder, tmp_path / "out", "--format=ternary"))
    with pytest.raises(UserError, match="packed ternary weights cannot be trained"):
        packed.train()
    with pytest.raises(UserError, match="can only be written by export.py --format=ternary"):
        packed.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_training_from_packed_weights_is_one_line(trained, data, tmp_path):
    tokenizer = Tokenizer.load(hf.find_folder(trained))
    _, folder = saved(tmp_path / "m", tokenizer, ternary=True)
    run(folder, tmp_path / "out", "--format=ternary")
    with pytest.raises(UserError, match="packed ternary weights cannot be trained"):
        train.main([f"--init_from={tmp_path / 'out'}", f"--dataset={data}", f"--out_dir={tmp_path / 'run'}",
                    "--max_steps=2", "--block_size=64", "--global_batch_size=4", "--micro_batch_size=4",
                    "--device=cpu", "--eval_tokens=128"])  # fmt: skip


# ---- The folder -------------------------------------------------------------------------------------------

def test_the_same_again_does_nothing(chat_model, tmp_path, capsys, monkeypatch):
    out = run(chat_model[1], tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "README.md").write_text("my own words")  # people edit the card
    monkeypatch.setattr(formats.model_card, "commit", lambda: "the next one")
    export.main([f"--model={chat_model[1]}", f"--out={out}"])
    assert "exists already" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"README.md"}
    assert GPT.from_pretrained(out)


def test_another_export_is_not_replaced_by_default(chat_model, tmp_path):
    out = run(chat_model[1], tmp_path / "out")
    args = [f"--model={chat_model[1]}", f"--out={out}", "--dtype=float32"]
    with pytest.raises(UserError, match=r"from other inputs \(dtype differ\); --overwrite=True replaces"):
        export.main(args)
    export.main([*args, "--overwrite=True"])
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chatty", "out"]


def test_a_damaged_export_is_made_again(chat_model, tmp_path):
    out = run(chat_model[1], tmp_path / "out")
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    run(chat_model[1], out)
    assert (out / "model.safetensors").read_bytes() == content


def test_nothing_of_this_machine_is_written(chat_model, tmp_path):
    out = run(chat_model[1], tmp_path / "out")
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in out.iterdir())


def test_other_peoples_folders_are_left_alone(chat_model, trained, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    step = shutil.copytree(hf.find_folder(trained), tmp_path / "step")
    (tmp_path / "file").write_text("x")
    for name, message in (("mine", "holds files, but no export"), ("step", "holds a checkpoint"),
                          ("file", "is a file")):
        for more in ([], ["--overwrite=True"]):
            with pytest.raises(UserError, match=message):
                export.main([f"--model={chat_model[1]}", f"--out={tmp_path / name}", *more])
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert checkpoint.find_corruption(step) is None


def test_a_model_is_not_replaced_by_itself(chat_model, tmp_path):
    out = run(chat_model[1], tmp_path / "out")
    with pytest.raises(UserError, match="is the model itself"):
        export.main([f"--model={out}", f"--out={out}", "--dtype=float32", "--overwrite=True"])


def test_names(trained, tmp_path, monkeypatch):
    """The default folder is exports/<name>-<format>; a step's folder has the name of its run."""
    monkeypatch.chdir(tmp_path)
    run(hf.find_folder(trained), tmp_path / "exports" / "trained-gguf", "--format=gguf")
    export.main([f"--model={trained}/{hf.find_folder(trained).name}", "--format=gguf"])
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["trained-gguf"]
    assert (tmp_path / "exports" / "trained-gguf" / "trained-q8_0.gguf").exists()


# ---- Refusals ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, message", [
    (["--quantize=q8_0"], "command line: quantize only works with --format=gguf"),
    (["--format=gguf", "--dtype=float32"], "command line: dtype only works with --format=hf"),
    (["--format=gguf", "--quantize=q5_k_m"], "'q5_k_m' is not a type .* f32, f16, bf16, q8_0, q6_k, q4_k_m"),
    (["--format=gguf", "--quantize=q8_0,"], "'' is not a type"),
    (["--format=ternary"], "has no ternary weights"),
    (["--format=onnx"], "expected hf|gguf|ternary"),
    (["--name=../x"], "must be a plain name"),
    (["--dtype=int8"], "expected bfloat16|float16|float32"),
])  # fmt: skip
def test_mistakes_of_a_user(args, message, chat_model, tmp_path):
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        export.main([f"--model={chat_model[1]}", f"--out={tmp_path / 'out'}", *args])
    assert [path.name for path in tmp_path.iterdir()] == ["chatty"]


@pytest.mark.parametrize("changes, format, message", [
    (dict(ternary=True), "hf", "transformers has no .* with ternary=True; use --format=ternary"),
    (dict(position="learned", n_kv_head=4), "hf", "transformers has no .* with position=learned$"),
    (dict(n_expert=4, expert_size=32), "hf", "no model with n_expert=4, expert_size=32$"),
    (dict(n_expert=4, qk_norm=True, expert_size=32, balance="bias"), "hf",
     "no model with qk_norm=True, n_expert=4, balance=bias$"),
    (dict(ternary=True), "gguf", "llama.cpp has no architecture with ternary=True"),
])  # fmt: skip
def test_models_that_a_format_cannot_hold(changes, format, message, tokenizer, tmp_path):
    _, folder = saved(tmp_path / "m", tokenizer, **changes)
    with pytest.raises(UserError, match=message):
        export.main([f"--model={folder}", f"--out={tmp_path / 'out'}", f"--format={format}"])
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("value, args, fits", [
    (float("nan"), ["--dtype=float32"], False), (float("inf"), [], False), (1e5, ["--dtype=float16"], False),
    (1e5, ["--dtype=bfloat16"], True), (1e5, ["--format=gguf"], False),
    (1e5, ["--format=gguf", "--quantize=f32,bf16"], True)])  # fmt: skip
def test_weights_that_do_not_fit_a_type(value, args, fits, tokenizer, tmp_path):
    model, folder = saved(tmp_path / "m", tokenizer)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = value
    model.save_pretrained(folder, eos_token_id=tokenizer.end_ids)
    if fits:
        run(folder, tmp_path / "out", *args)
        return
    with pytest.raises(UserError, match="1.mlp.up_proj.weight: a weight is larger than .* or not a number"):
        export.main([f"--model={folder}", f"--out={tmp_path / 'out'}", *args])
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_one_line_and_exit_code_2(tmp_path):
    process = subprocess.run([sys.executable, "export.py", f"--model={tmp_path / 'none'}"], cwd=ROOT,
                             capture_output=True, text=True)
    assert process.returncode == 2 and not process.stdout
    assert process.stderr.startswith("export.py: ") and process.stderr.count("\n") == 1


# ---- Kills and full disks ---------------------------------------------------------------------------------

FORMATS = {"hf": [], "gguf": ["--format=gguf", "--quantize=q8_0,q4_k_m"], "ternary": ["--format=ternary"]}


def in_a_fork(work):
    """Run work() in a fork of this process. Returns its exit code and the message of its UserError."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        code = 1
        try:
            work()
            code = 0
        except (UserError, OSError) as error:
            code = 2
            os.write(write, str(error).encode())
        finally:
            os._exit(code)
    os.close(write)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(read) as pipe:
        return code, pipe.read()


@pytest.mark.parametrize("format", FORMATS)
def test_killed_at_any_moment(format, tokenizer, tmp_path, monkeypatch):
    """SIGKILL before each fsync, rename and file: the folder is absent, the old export or the new one.

    The same command then completes the export, and leaves no temporary folder.
    """
    monkeypatch.setattr(formats.model_card, "commit", lambda: "fixed")  # the card names it
    _, folder = saved(tmp_path / "m", tokenizer, ternary=format == "ternary", n_layer=1)
    before = run(folder, tmp_path / "before", *FORMATS[format])
    args = [*FORMATS[format], "--name=other"]
    complete = run(folder, tmp_path / "complete", *args)
    expected = {path.name: path.read_bytes() for path in complete.iterdir()}

    def killed(moment, out):
        def work():
            left = [moment]

            def killing(original):
                def call(*arguments, **options):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*arguments, **options)

                return call

            for module, name in ((os, "fsync"), (os, "replace"), (hf, "write_tensors"), (gguf_file, "encode"),
                                 (shutil, "rmtree")):
                setattr(module, name, killing(getattr(module, name)))
            export.main([f"--model={folder}", f"--out={out}", "--overwrite=True", *args])
        return in_a_fork(work)[0]

    for moment in range(1000):
        out = tmp_path / f"out{moment}"
        if moment % 2:
            shutil.copytree(before, out)
        code = killed(moment, out)
        visible = [path.name for path in tmp_path.iterdir() if path.name.startswith("out")]
        if out.name in visible and out.exists():
            assert checkpoint.find_corruption(out) is None  # the old one or the new one
        export.main([f"--model={folder}", f"--out={out}", "--overwrite=True", *args])
        assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
        left = sorted(path.name for path in tmp_path.iterdir() if out.name in path.name)
        assert left == [out.name]
        if code == 0:
            break
        assert code == -signal.SIGKILL
        shutil.rmtree(out)
    assert moment > 10


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("limit", [0, 100, 5_000, 40_000])
def test_a_full_disk(format, limit, tokenizer, tmp_path):
    """The kernel limits the size of files: the message names the folder, and nothing is left of it."""
    _, folder = saved(tmp_path / "m", tokenizer, ternary=format == "ternary")
    old = run(folder, tmp_path / "old", *FORMATS[format])
    kept = {path.name: path.read_bytes() for path in old.iterdir()}

    def work(*args):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        export.main([f"--model={folder}", *FORMATS[format], *args])

    for args in ([f"--out={tmp_path / 'new'}"], [f"--out={old}", "--overwrite=True", "--name=other"]):
        code, message = in_a_fork(lambda args=args: work(*args))
        assert code == 2 and args[0][2:] in message and "could not be written" in message, message
    assert {path.name: path.read_bytes() for path in old.iterdir()} == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "old"]
