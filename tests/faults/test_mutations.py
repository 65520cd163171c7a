"""Fault 32: any leaf or key of a JSON file is changed. The outcome is one line, or transformers' result.

The files of a model, an adapter, a data and a checkpoint folder are mutated in this process: each leaf is
replaced by null, true, -1, 0, 1e308, NaN, "", "0", [], {} and a deep list, and each key is removed, renamed
and repeated. A file with many leaves is sampled, with a fixed seed.
"""

import contextlib
import copy
import io
import json
import random
import resource
import shutil
import sys
import time
import warnings

import numpy as np
import pytest
import torch

import train
from configurator import UserError, configure
from dataset.dataloader import Mix, Rows
from dataset.shards import DataFolder
from formats import checkpoint, hf, model_card
from formats.files import read_jsonl, write_tensors
from formats.peft import AdapterSpec, write_adapter
from formats.tokenizer import Tokenizer
from model import GPT
from tests.conftest import CODE, TINY_RUN, busy_model, tiny_config
from tests.formats.test_tokenizer_kinds import files_of, llama2, neox, ours, unigram
from training.run import refuse_changed_keys

LEAVES = [None, True, -1, 0, 1e308, float("nan"), "", "0", [], {}, "deep"]
KEYS = ["removed", "renamed", "repeated"]
DEEP, DEEPER = ("[" * depth + "]" * depth for depth in (200, 100_000))
HOLE = "the deep list comes here"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
TEXT = "def f(x):  return 12345 caf\u00e9"
SMALL = dict(n_layer=1, n_embd=32, n_head=2, n_kv_head=1, intermediate_size=64, vocab_size=400, block_size=32)
MODELS = {
    "llama": dict(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                                "beta_fast": 8, "mscale": 0.7, "mscale_all_dim": 0.5}),
    "llama3": dict(tie_embeddings=False, bias="all",
                   rope_scaling={"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0,
                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 16}),
    "qwen2": dict(bias="qkv"),
    "qwen3": dict(qk_norm=True, head_dim=8),
    "gpt2": dict(position="learned", norm="layernorm", mlp="gelu", bias="all", n_kv_head=2),
    "nanollama": dict(mlp="gelu", ternary=True),
}


# ---- Mutations --------------------------------------------------------------------------------------------

def places(node, at=()):
    """The path of every leaf and key below the top: three elements of a list, and eight of a large table."""
    items = list(node.items()) if isinstance(node, dict) else []
    items = list(enumerate(node[:3])) if isinstance(node, list) else items
    for key, value in items[::len(items) // 8] if len(items) > 40 else items:
        yield (*at, key)
        yield from places(value, (*at, key))


def mutated(content, place, change):
    """The text of a file whose content has changed at one place, or None where the change is not possible."""
    content = copy.deepcopy(content)
    node, key = content, place[-1]
    for step in place[:-1]:
        node = node[step]
    if change in KEYS[1:] and not isinstance(node, dict):
        return None
    if change == "removed":
        del node[key]
    elif change == "renamed":
        node[f"{key}_"] = node.pop(key)
    elif change == "repeated":  # with null; parsers keep the last
        node[HOLE] = None
        return json.dumps(content).replace(json.dumps(HOLE), json.dumps(key))
    else:
        node[key] = HOLE if change in ("deep", "deeper") else change
    return json.dumps(content).replace(json.dumps(HOLE), DEEP if change == "deep" else DEEPER)


def mutations(content, limit):
    every = [(place, change) for place in places(content) for change in [*LEAVES, *KEYS]]
    chosen = random.Random(0).sample(every, limit) if len(every) > limit else every
    for place, change in [*chosen, (every[0][0], "deeper")]:
        text = mutated(content, place, change)
        if text is not None:
            yield place, change, text


def peak_memory():
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)


def mutate(file, use, limit=10**6):
    """Call use() for each mutation of a file, which must raise a UserError of one line or return.

    Each call has 10 s of CPU time, and all of them 2 GB of memory. Returns the number of mutations. The file
    is put back at the end.
    """
    memory = peak_memory()
    good = file.read_bytes()
    content, count, bad = json.loads(good), 0, []
    for place, change, text in mutations(content, limit):
        file.write_text(text)
        count, begin = count + 1, time.process_time()
        try:
            use()
        except UserError as error:
            if "\n" in str(error) or len(str(error)) > 1000:
                bad.append((place, change, f"long: {str(error)[:200]}"))
        except BaseException as error:  # the tokenizers library has panics that are no Exception
            bad.append((place, change, f"{type(error).__name__}: {str(error)[:200]}"))
        if time.process_time() - begin > 10:
            bad.append((place, change, "10 seconds"))
    file.write_bytes(good)
    assert peak_memory() < memory + 2e9
    assert not bad, "\n".join(map(str, [len(bad), *bad[:12]]))
    return count


# ---- Uses -------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def quiet():
    import transformers
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(50)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), \
            contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(before)


@torch.no_grad()
def use_model(folder):
    """Ours loads: the logits are finite, and those of transformers if it loads too."""
    from transformers import AutoModelForCausalLM

    logits = GPT.from_pretrained(folder).eval()(IDS)
    hf.end_ids(folder)
    assert logits.isfinite().all()
    try:
        with quiet():
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            expected = theirs(input_ids=IDS).logits
    except Exception:
        return
    assert (logits - expected).abs().max() < 1e-4


def use_tokenizer(folder):
    """Ours loads: the ids are those of AutoTokenizer if it loads too."""
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(TEXT)
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size
    tokenizer.decode(ids)
    try:
        with quiet():
            theirs = AutoTokenizer.from_pretrained(folder)
            expected = theirs(TEXT, add_special_tokens=False).input_ids
    except BaseException:
        return
    assert ids == expected


@torch.no_grad()
def use_adapter(folder, base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    logits = GPT.from_pretrained(folder).eval()(IDS)
    assert logits.isfinite().all()
    try:
        with quiet():
            theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            expected = PeftModel.from_pretrained(theirs, folder).eval()(input_ids=IDS).logits
    except Exception:
        return
    assert (logits - expected).abs().max() < 1e-4


def use_data(folder):
    data = DataFolder(folder)
    mix = Mix(str(folder), 32, 1, Rows)
    mix.samples(0, 2)
    Rows(data, "val", 32).read(np.arange(1))
    mix.tokenizer.encode(TEXT)


def use_run(out, cfg):
    """What a resumed run, a model card and a loader of its checkpoint read."""
    refuse_changed_keys(cfg, out)
    runs = model_card.lineage(str(out))
    model_card.run_tables(runs)
    model_card.data_table(runs)
    read_jsonl(out / "metrics.jsonl")
    checkpoint.newest_verified(out, lambda text: None)
    checkpoint.update_pointers(out, keep=9)
    hf.find_folder(out)


# ---- Tests ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder per architecture, each with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train([CODE], 400)
    for name, changes in MODELS.items():
        busy_model(tiny_config(**SMALL | changes)).save_pretrained(root / name, eos_token_id=[399, 3])
        tokenizer.save(root / name)
    return root


@pytest.mark.parametrize("name", MODELS)
def test_config(models, name):
    """All mutations of two kinds of file; the others share most of their keys with Llama's."""
    limit = 10**6 if name in ("llama", "gpt2") else 100
    assert mutate(models / name / "config.json", lambda: use_model(models / name), limit) > 90


def test_generation_config(models):
    folder = models / "qwen2"
    assert mutate(folder / "generation_config.json", lambda: use_model(folder)) > 40


@pytest.mark.parametrize("kind", [ours, neox, llama2, unigram], ids=lambda kind: kind.__name__)
def test_tokenizer(kind, tmp_path):
    definition, settings = files_of(kind)
    (tmp_path / "tokenizer.json").write_text(definition)
    (tmp_path / "tokenizer_config.json").write_text(settings)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert mutate(tmp_path / "tokenizer.json", lambda: use_tokenizer(tmp_path), 250) > 200
    assert mutate(tmp_path / "tokenizer_config.json", lambda: use_tokenizer(tmp_path)) > 50


def test_index_of_weights(models, tmp_path):
    folder = shutil.copytree(models / "qwen2", tmp_path / "model")
    tensors = dict(hf.read_tensors(folder))
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in {*files.values()}:
        write_tensors(folder / file, {name: tensors[name] for name in tensors if files[name] == file})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    assert mutate(index, lambda: use_model(folder), 120) > 100


def test_adapter(models, tmp_path):
    folder, base = tmp_path / "adapter", models / "qwen3"
    generator, state = torch.Generator().manual_seed(0), {}
    for name in ("q_proj", "o_proj"):
        state[f"model.layers.0.self_attn.{name}.lora_A"] = torch.randn(2, 32 if name[0] == "q" else 16,
                                                                      generator=generator)
        state[f"model.layers.0.self_attn.{name}.lora_B"] = torch.randn(16 if name[0] == "q" else 32, 2,
                                                                      generator=generator)
    spec = AdapterSpec(2, 4, 0.0, ("q_proj", "o_proj"), False)
    write_adapter(folder, state, spec, {"path": str(base), "sha256": hf.peft.weights_sha256(base),
                                        "config_sha256": hf.config_sha256(base)})
    shutil.copy(base / "tokenizer.json", folder)
    use_adapter(folder, base)
    assert mutate(folder / "adapter_config.json", lambda: use_adapter(folder, base)) > 100
    assert mutate(folder / "base.json", lambda: use_adapter(folder, base)) > 40


def test_data(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    use_data(folder)
    assert mutate(folder / "meta.json", lambda: use_data(folder), 400) > 100
    assert mutate(folder / "tokenizer.json", lambda: use_data(folder), 60) > 50


def test_run(trained, data, tmp_path):
    out = shutil.copytree(trained, tmp_path / "out")
    argv = [*TINY_RUN, f"--dataset={data}", f"--out_dir={out}", "--max_steps=60"]
    cfg = configure(train.TrainConfig, argv)[0]
    folder = hf.find_folder(out)
    use_run(out, cfg)
    assert mutate(out / "run.json", lambda: use_run(out, cfg), 250) > 200
    assert mutate(out / "checkpoints.json", lambda: use_run(out, cfg)) > 40
    assert mutate(folder / "manifest.json", lambda: use_run(out, cfg)) > 60
    assert mutate(folder / "manifest.json", lambda: GPT.from_pretrained(folder), 60) > 50
    line, log = out / "line.json", (out / "metrics.jsonl").read_bytes()
    line.write_bytes(log.split(b"\n")[0])

    def use_log():
        (out / "metrics.jsonl").write_bytes(log + line.read_bytes() + b"\n")
        use_run(out, cfg)

    assert mutate(line, use_log, 100) > 80


def test_pointers_stay_in_their_folder(trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "out")
    shutil.copytree(hf.find_folder(out), tmp_path / "step_000001")
    for name in ("../step_000001", str(tmp_path / "step_000001"), "step_000060/../../step_000001", ".", ""):
        (out / "checkpoints.json").write_text(json.dumps({"last": name}))
        with pytest.raises(UserError, match="checkpoints.json: damaged"):
            hf.find_folder(out)


def test_sizes_that_fill_no_memory(models, tmp_path):
    """Sizes that the weights cannot have are refused before anything is allocated."""
    folder = shutil.copytree(models / "llama", tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    for key in ("vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size",
                "head_dim"):
        for size in (2**24, 2**62, 10**30):
            (folder / "config.json").write_text(json.dumps(content | {key: size}))
            with pytest.raises(UserError, match="must be an integer|weights or more"):
                GPT.from_pretrained(folder)
