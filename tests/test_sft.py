"""sft.py as a whole: it learns, resumes bit-identically, and does not depend on micro-batches or ranks."""

import json
import shutil

import numpy as np
import pytest
import torch

import distill
import dpo
import sft
import train
from configurator import UserError, configure
from dataset.chat_rows import ChatRows, UnpackedChatRows
from dataset.dataloader import IGNORE
from dataset.shards import DataFolder
from formats import checkpoint, hf
from formats.peft import weights_sha256
from formats.tokenizer import Tokenizer
from model import GPT
from tests.runs import events, kill_in_step, losses, stopped_in_step
from training import finetuning
from training.staged_data import StagedData

TINY = """--block_size=64 --global_batch_size=8 --micro_batch_size=4 --max_steps=12 --learning_rate=3e-3
    --eval_tokens=512 --device=cpu --log_interval=1 --eval_interval=0 --save_interval=0
    --sample_answers=0""".split()
LORA = ["--lora_rank=4", "--lora_dropout=0.1"]


def run(base, chats, out, *words):
    sft.main([*TINY, f"--init_from={base}", f"--dataset={chats}", f"--out_dir={out}", *words])
    return events(out)


def stored(out):
    """Every tensor of the newest checkpoint, by name."""
    from safetensors.torch import load_file

    folder = checkpoint.step_folders(out)[-1]
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    state = torch.load(folder / "trainer" / "state.pt", weights_only=True)["optimizer"]
    return tensors | {f"{n}.{k}": torch.as_tensor(v) for n, entry in state.items() for k, v in entry.items()}


def assert_equal(one, two):
    assert losses(events(one)) == losses(events(two))
    first, second = stored(one), stored(two)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name, schema", [("sft_lora", sft.SFTConfig), ("dpo_lora", dpo.DPOConfig)])
def test_config_files_describe_runs(name, schema):
    cfg = configure(schema, [f"config/{name}.py"])[0]
    assert cfg.lora_rank and cfg.stages[0]["epochs"] and cfg.optimizer == "adamw"


def test_frozen_matrices_have_the_dtype_of_the_run(trained, chats, tmp_path, monkeypatch):
    """They are stored in bfloat16, and the run is that of float32 matrices, which autocast rounds."""
    words, cast = ["--lora_rank=2", "--dtype=bfloat16", "--max_steps=4"], finetuning.cast_frozen
    asked = []
    monkeypatch.setattr(finetuning, "cast_frozen", lambda model, dtype: asked.append(dtype))
    run(trained, chats, tmp_path / "a", *words)
    monkeypatch.setattr(finetuning, "cast_frozen", cast)
    run(trained, chats, tmp_path / "b", *words)
    assert_equal(tmp_path / "a", tmp_path / "b")
    assert asked == [torch.bfloat16]


def test_it_learns_and_leaves_a_chat_model(trained, chats, tmp_path):
    found = run(trained, chats, tmp_path / "a")
    assert found[-1]["val_loss"] < 0.8 * found[0]["loss"]
    folder = hf.find_folder(tmp_path / "a")
    tokenizer = Tokenizer.load(folder)
    assert "generation" in tokenizer.settings["chat_template"]
    ends = [tokenizer.hf.token_to_id("<|im_end|>"), tokenizer.eot_id]
    assert hf.end_ids(folder) == tokenizer.end_ids == ends
    assert GPT.from_pretrained(folder).config.vocab_size == tokenizer.vocab_size == 506
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(400, 440)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids).logits, GPT.from_pretrained(folder).eval()(ids), rtol=1e-5, atol=1e-5
        )
    assert theirs.generation_config.eos_token_id == tokenizer.end_ids


def test_what_it_prints(trained, chats, tmp_path, capsys, pictures):
    """Answers to read at each evaluation; the next commands, also for a folder with a space in its name."""
    out = tmp_path / "my run"
    found = run(trained, chats, out, "--max_steps=2", "--eval_interval=1", "--sample_answers=2",
                "--eval_tasks=calculator", "--eval_limit=2")
    assert "val_calculator_accuracy" in found[-1]
    printed = capsys.readouterr().out
    assert printed.count("\nsample    user: ") == 4 and printed.count("\n          assistant:") == 4
    assert "\ncurves      training    █" in printed and f"\n            {out / 'loss.png'}\n" in printed
    assert printed.endswith(f"\nnext        python sample.py --model='{out}' --chat=True\n"
                            f"            python dpo.py --init_from='{out}' --out_dir='{out}_dpo'\n")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    run(trained, chats, tmp_path / "b", "--max_steps=1")
    assert "sample    " not in capsys.readouterr().out


def test_an_adapter_learns_and_its_base_does_not_change(trained, chats, tmp_path):
    before = weights_sha256(hf.find_folder(trained))
    found = run(trained, chats, tmp_path / "a", *LORA, "--merge=True")
    assert found[-1]["val_loss"] < 0.9 * found[0]["loss"]
    assert weights_sha256(hf.find_folder(trained)) == before
    folder = hf.find_folder(tmp_path / "a")
    assert not (folder / "model.safetensors").exists()
    merged, whole = GPT.from_pretrained(folder), GPT.from_pretrained(tmp_path / "a" / "merged")
    for (name, one), (_, two) in zip(merged.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    state = torch.load(folder / "trainer" / "state.pt", weights_only=True)["optimizer"]
    assert all(".lora_" in name or "embed_tokens" in name for name in state), "frozen weights have no state"


def test_four_bits_learn_too(trained, chats, tmp_path):
    pytest.importorskip("bitsandbytes")
    found = run(trained, chats, tmp_path / "a", *LORA, "--quantize_base=nf4")
    assert found[-1]["val_loss"] < 0.9 * found[0]["loss"]


@pytest.mark.parametrize("words", [[], LORA])
def test_stopped_and_resumed_is_the_same_run(trained, chats, tmp_path, words, monkeypatch):
    run(trained, chats, tmp_path / "whole", *words)
    stopped_in_step(6, monkeypatch, lambda: run(trained, chats, tmp_path / "cut", *words))
    assert checkpoint.step_folders(tmp_path / "cut")[-1].name == "step_000006"
    run(trained, chats, tmp_path / "cut", *words)
    assert_equal(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("words", [[], LORA])
def test_killed_and_started_again_is_the_same_run(trained, chats, tmp_path, words):
    words = [*words, "--save_interval=3"]
    run(trained, chats, tmp_path / "whole", *words)
    argv = [*TINY, f"--init_from={trained}", f"--dataset={chats}", f"--out_dir={tmp_path / 'killed'}", *words]
    kill_in_step(5, sft.main, argv)
    kill_in_step(6, sft.main, argv)  # from step 3: in the ninth
    sft.main(argv)
    assert_equal(tmp_path / "whole", tmp_path / "killed")


def on_two_ranks(base, chats, out, words):
    return losses(run(base, chats, out, *words))


@pytest.mark.parametrize("words", [["--optimizer=adamw"], ["--optimizer=adamw", "--lora_rank=4"]])
def test_gradients_do_not_depend_on_micro_batch_or_ranks(trained, chats, tmp_path, two_ranks, words):
    expected = losses(run(trained, chats, tmp_path / "one", *words))
    small = losses(run(trained, chats, tmp_path / "small", *words, "--micro_batch_size=1"))
    both = two_ranks(on_two_ranks, str(trained), str(chats), str(tmp_path / "two"), words)[0] or losses(
        events(tmp_path / "two")
    )
    sharded = [*words, "--parallel=fsdp"]
    two_ranks(on_two_ranks, str(trained), str(chats), str(tmp_path / "fsdp"), sharded)
    for found in (small, both, losses(events(tmp_path / "fsdp"))):
        np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_packing_or_not_the_loss_of_a_pass_is_the_same(trained, chats):
    """The same conversations with the same loss per target; packed rows only waste less."""
    words = [*TINY, f"--init_from={trained}", f"--dataset={chats}"]
    cfg = configure(sft.SFTConfig, words)[0]
    model = GPT.from_pretrained(trained).eval()
    totals, waste = [], []
    for kind in (ChatRows, UnpackedChatRows):
        rows = StagedData(cfg, kind).last_mix.rows[0]
        nll, count, size = 0.0, 0, 0
        for start in range(0, len(rows), 64):
            read = rows.read(np.arange(start, min(start + 64, len(rows))))
            read[:, 0] = np.minimum(read[:, 0], 499)  # the base has no chat tokens
            read[:, 1] = np.where(read[:, 1] > 499, IGNORE, read[:, 1])
            batch = sft.chat_batch(read)
            with torch.no_grad():
                nll += sft.loss_fn(model, batch, 500)[0].item()
            count += batch["count"]
            size += batch["input_ids"].numel()
        totals.append((nll / count, count))
        waste.append(size)
    assert totals[0][1] == totals[1][1] and totals[0][0] == pytest.approx(totals[1][0], rel=1e-5)
    assert waste[0] < waste[1]


def test_stages_and_weights(trained, chats, tmp_path):
    config = tmp_path / "stages.py"
    config.write_text(
        f"dataset = {f'{chats}:0.5,{chats}:0.5'!r}\n"
        "stages = [dict(steps=3, learning_rate=1e-3), dict(steps=2, lr_multipliers={'embed': 0.0})]\n"
    )
    words = [word for word in TINY if "max_steps" not in word]
    sft.main([str(config), *words, f"--init_from={trained}", f"--out_dir={tmp_path / 'a'}"])
    assert [event["step"] for event in events(tmp_path / "a") if "loss" in event] == [1, 2, 3, 4, 5]
    table = json.loads((tmp_path / "a" / "lr_multipliers_2.json").read_text())
    assert table["model.embed_tokens.weight"] == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["--n_layer=3"], "unknown key 'n_layer'"),
        (["--block_size=4096"], "has a context of 64 tokens"),
        (["--lora_rank=-1"], "lora_rank=-1: must be at least 0"),
        (["--lora_rank=2", "--lora_targets=xyz"], "lora_targets=xyz: matches none"),
        (["--merge=True"], "merge=True: only works with an adapter; set lora_rank"),
        (["--quantize_base=nf4"], "quantize_base=nf4: only works with an adapter; set lora_rank"),
        (["--quantize_base=nf4", "--lora_rank=2", "--parallel=fsdp"], "4-bit matrices cannot be sharded"),
        (["--init_from=nowhere/at/all"], "no model here"),
    ],
)
def test_mistakes_are_one_line(trained, chats, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run(trained, chats, tmp_path / "a", *words)


@pytest.mark.parametrize("stage", [sft, dpo])
def test_rows_that_are_too_long_are_refused_before_data_is_made(trained, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(stage, "prepare_problems", lambda kind, model: pytest.fail("the data is made"))
    with pytest.raises(UserError, match="block_size=4096: .* has a context of 64 tokens"):
        stage.main([f"--init_from={trained}", f"--out_dir={tmp_path / 'a'}", "--block_size=4096"])


def test_data_of_another_kind_or_tokenizer_is_refused(trained, data, chats, tmp_path):
    with pytest.raises(UserError, match="holds text rows, not chat; prepare.py --kind=chat makes those"):
        run(trained, data, tmp_path / "a")
    import shutil

    other = tmp_path / "other"
    shutil.copytree(hf.find_folder(trained), other)
    Tokenizer.train(["some other text"] * 9, 300).save(other)
    (other / "manifest.json").unlink()
    with pytest.raises(UserError, match="made with another tokenizer than that of init_from"):
        run(other, chats, tmp_path / "a")


def test_an_adapter_cannot_be_the_base_of_another(trained, chats, tmp_path):
    run(trained, chats, tmp_path / "a", "--lora_rank=2", "--max_steps=1")
    with pytest.raises(UserError, match="is an adapter itself; run its command again with --merge=True"):
        run(tmp_path / "a", chats, tmp_path / "b", "--lora_rank=2")


def test_a_setting_that_no_model_has_is_named(trained, chats, tmp_path):
    shutil.copytree(hf.find_folder(trained), tmp_path / "newer")
    fields = hf.read_config(tmp_path / "newer") | {"dreams": 3}
    (tmp_path / "newer" / "config.json").write_text(
        json.dumps({"model_type": "nanollama", "gpt_config": fields}))
    words = [f"--dataset={chats}", f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--block_size=32",
             f"--init_from={tmp_path / 'newer'}"]
    for script in (sft, train, distill):
        with pytest.raises(UserError, match="config.json: .*unexpected keyword argument 'dreams'"):
            script.main(words)


def test_only_the_adapter_is_trained_whatever_the_multipliers(trained, chats, tmp_path):
    """In stages, too. A user's pattern can change the adapter's rates and nothing else."""
    config = tmp_path / "stages.py"
    words = [word for word in TINY if "max_steps" not in word] + ["--lora_rank=2"]
    words += [f"--init_from={trained}", f"--dataset={chats}"]
    config.write_text("stages = [dict(steps=1), dict(steps=1, lr_multipliers={'norm': 1.0})]\n")
    with pytest.raises(UserError, match="'norm' matches no parameter"):
        sft.main([str(config), *words, f"--out_dir={tmp_path / 'b'}"])
    config.write_text("stages = [dict(steps=2), dict(steps=2, lr_multipliers={'lora_B': 4.0})]\n")
    sft.main([str(config), *words, f"--out_dir={tmp_path / 'a'}"])
    table = json.loads((tmp_path / "a" / "lr_multipliers_2.json").read_text())
    rates = {name: rate for name, rate in table.items() if rate}
    assert set(rates.values()) == {1.0, 4.0} and all(".lora_" in n or "embed_tokens" in n for n in rates)


def test_a_finished_adapter_can_be_merged_later(trained, chats, tmp_path):
    run(trained, chats, tmp_path / "a", "--lora_rank=2", "--max_steps=1")
    assert not (tmp_path / "a" / "merged").exists()
    (tmp_path / "a" / ".merged.tmp").mkdir()  # a merge that was killed
    run(trained, chats, tmp_path / "a", "--lora_rank=2", "--max_steps=1", "--merge=True")
    assert GPT.from_pretrained(tmp_path / "a" / "merged").config.vocab_size == 506


@pytest.mark.parametrize("overlong", ["cut", "drop"])
def test_conversations_that_are_too_long_are_counted(trained, chats, tmp_path, capsys, overlong):
    """The counts by hand: inputs of each conversation up to its last answer, compared with block_size."""
    rows = ChatRows(DataFolder(chats), "train", 64)
    lengths = rows.documents.end - rows.documents.begin - 1
    short = int((lengths[rows.usable] <= 48).sum())
    assert 0 < short < len(rows.usable)
    run(trained, chats, tmp_path / "a", "--block_size=48", "--max_steps=1", f"--overlong={overlong}")
    out = capsys.readouterr().out
    if overlong == "cut":
        usable = int((rows.documents.first_target - rows.documents.begin <= 48).sum())
        cut = usable - int((lengths <= 48).sum())
        assert f"{cut:,} of {usable:,} conversations are cut at 48 tokens; a larger --block_size keeps" in out
        assert "train.py --block_size=512, or an open model); --overlong=drop leaves them out" in out
    else:
        assert f"{len(lengths) - short:,} conversations left out: longer than 48 tokens" in out
        assert "are cut" not in out


def edited(folder, name, **changes):
    """Change keys of a JSON file of a model folder, as somebody might with an editor."""
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))
    (folder / "manifest.json").unlink(missing_ok=True)


@pytest.mark.parametrize("words", [[], LORA])
def test_a_base_with_another_config_is_another_base(trained, chats, tmp_path, words):
    """The weights stay the same, but rope_theta changes what they compute."""
    base = shutil.copytree(hf.find_folder(trained), tmp_path / "base")
    run(base, chats, tmp_path / "a", *words, "--max_steps=2")
    edited(base, "config.json", rope_theta=5e5)
    with pytest.raises(UserError, match="holds a run with other settings: base_config was"):
        run(base, chats, tmp_path / "a", *words, "--max_steps=4")
    if words:
        with pytest.raises(UserError, match="an adapter of .*, whose config.json has changed since"):
            GPT.from_pretrained(tmp_path / "a")


def test_an_adapters_scale_and_base_are_part_of_a_base(trained, chats, tmp_path):
    """sft.py continues from an adapter: everything that its outputs depend on counts."""
    base = shutil.copytree(hf.find_folder(trained), tmp_path / "base")
    run(base, chats, tmp_path / "adapter", "--lora_rank=2", "--max_steps=2", "--learning_rate=0.1")
    adapter = hf.find_folder(tmp_path / "adapter")
    run(adapter, chats, tmp_path / "a", "--max_steps=2")
    edited(adapter, "adapter_config.json", lora_alpha=32.0)
    with pytest.raises(UserError, match="other settings: base_config was"):
        run(adapter, chats, tmp_path / "a", "--max_steps=4")
    edited(adapter, "adapter_config.json", lora_alpha=16.0)
    first = hf.model_sha256(adapter)
    edited(base, "config.json", rope_theta=5e5)
    assert hf.model_sha256(adapter) != first
    with pytest.raises(UserError, match="other settings: base_config was"):
        run(adapter, chats, tmp_path / "a", "--max_steps=4")


def test_a_run_from_before_base_config_was_recorded_continues(trained, chats, tmp_path):
    run(trained, chats, tmp_path / "a", "--max_steps=2")
    path = tmp_path / "a" / "run.json"
    content = json.loads(path.read_text())
    recorded = content["identity"].pop("base_config")
    path.write_text(json.dumps(content))
    assert run(trained, chats, tmp_path / "a", "--max_steps=3")[-1]["step"] == 3
    assert json.loads(path.read_text())["identity"]["base_config"] == recorded


def test_overwriting_does_not_delete_the_model_to_start_from(trained, chats):
    with pytest.raises(UserError, match="holds the model of init_from="):
        run(trained, chats, trained, "--overwrite=True")
    assert hf.find_folder(trained).is_dir()


def test_gpt2s_adapter_is_trained_merged_and_exported(chats, tmp_path):
    import transformers

    import export
    from tests.conftest import tiny_config

    gpt2 = dict(position="learned", norm="layernorm", mlp="gelu", bias="all", n_kv_head=4)
    GPT(tiny_config(**gpt2, vocab_size=500, block_size=128)).save_pretrained(tmp_path / "g")
    base = Tokenizer.load(chats)
    base.save(tmp_path / "g")
    log = run(tmp_path / "g", chats, tmp_path / "a", "--lora_rank=2", "--max_steps=2", "--merge=True")
    adapter, merged = (GPT.from_pretrained(tmp_path / "a" / name).eval()
                       for name in (hf.find_folder(tmp_path / "a").name, "merged"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(adapter(ids), merged(ids))
    assert log[-1]["step"] == 2 and adapter.config.vocab_size == 506
    export.main([f"--model={tmp_path / 'a'}", f"--out={tmp_path / 'e'}", "--dtype=float32"])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "e").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, merged(ids), rtol=1e-5, atol=1e-5)
