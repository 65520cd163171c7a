"""Distillation end to end: online and from a cache, resumed bit for bit, the same for any micro-batch size
and number of ranks, and with an unchanged teacher."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import distill
import loop
from configurator import UserError, configure
from dataset.dataloader import Rows
from dataset.shards import DataFolder
from distillation.divergences import DenseTeacher
from distillation.student import Student, gradient_cosine
from distillation.teacher import ForeignTeacher, load_teacher
from formats import checkpoint, hf
from formats.peft import weights_sha256
from formats.tokenizer import Tokenizer
from model import GPT
from prepare import PrepareConfig, prepare
from tests.conftest import busy_model, strangers_model, tiny_config
from tests.runs import events, kill_in_step, losses, stopped_in_step
from tests.test_sft import assert_equal
from tools import cache_teacher

TINY = """--n_layer=1 --n_embd=32 --n_head=2 --intermediate_size=64 --block_size=64 --global_batch_size=8
    --micro_batch_size=4 --max_steps=20 --learning_rate=3e-3 --eval_tokens=1024 --device=cpu --log_interval=1
    --eval_interval=0 --save_interval=0""".split()
PRUNED = [word for word in TINY if not word.startswith(("--n_", "--inter"))] + ["--student_layers=last:1"]
LAYER_LOSSES = ["--hidden_weight=1", "--attention_weight=0.5"]


def arguments(trained, data, out, *more, sizes=TINY):
    return [*sizes, f"--teacher={trained}", f"--dataset={data}", f"--out_dir={out}", *more]


def run(*args, sizes=TINY):
    argv = arguments(*args, sizes=sizes)
    distill.main(argv)
    return events(args[2])


def cache(trained, data, *more):
    argv = [f"--teacher={trained}", f"--dataset={data}", "--block_size=64", "--device=cpu"]
    cache_teacher.main([*argv, *more])


# ---- It learns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        [],
        # The formulas of the slow ones have cheaper tests in tests/distillation.
        pytest.param(["--divergence=reverse_kl", "--temperature=2"], marks=pytest.mark.slow),
        ["--divergence=jsd", "--alpha=1"],
        ["--divergence=mse", "--alpha=0.1"],
        pytest.param(["--alpha=0"], marks=pytest.mark.slow),
        pytest.param(LAYER_LOSSES, marks=pytest.mark.slow),
        [*LAYER_LOSSES, "--hidden_loss=mse", "--attention_loss=mse", "--layer_map=last"],
        pytest.param(["--hidden_weight=1", "--hidden_loss=info_nce", "--layer_map=uniform_consecutive"],
                     marks=pytest.mark.slow),
        pytest.param(["--hidden_weight=1", "--hidden_loss=sinkhorn"], marks=pytest.mark.slow),
        ["--ternary=True"],
        ["--on_policy=0.5"],
        ["--dtype=bfloat16", *LAYER_LOSSES],
    ],
)
def test_it_learns(trained, data, tmp_path, more):
    before = weights_sha256(hf.find_folder(trained))
    log = run(trained, data, tmp_path / "a", *more)
    assert losses(log)[-1] < losses(log)[0] - 0.15
    last = log[-1]
    assert last["val_teacher_loss"] < last["val_loss"] < losses(log)[0]
    assert 0 < last["val_kl"] < last["val_loss"] and 0 <= last["val_agreement"] <= 1
    assert last["val_perplexity"] == pytest.approx(math.exp(last["val_loss"]))
    assert weights_sha256(hf.find_folder(trained)) == before
    folder = hf.find_folder(tmp_path / "a")
    assert GPT.from_pretrained(folder).config.n_embd == 32


def test_layer_losses_fall_and_projections_are_saved(trained, data, tmp_path):
    log = run(trained, data, tmp_path / "a", *LAYER_LOSSES)
    features = [(event["hidden"], event["attention"]) for event in log if "hidden" in event]
    assert features[-1][0] < 0.9 * features[0][0] and all(np.isfinite(features).flatten())
    folder = hf.find_folder(tmp_path / "a")
    assert (folder / "projections.safetensors").is_file()
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.config.hidden_size == 32


def test_a_pruned_student_starts_better(trained, data, tmp_path):
    pruned = losses(run(trained, data, tmp_path / "a", "--max_steps=1", sizes=PRUNED))[0]
    scratch = losses(run(trained, data, tmp_path / "b", "--max_steps=1"))[0]
    assert pruned < scratch - 0.1
    log = run(trained, data, tmp_path / "c", "--n_embd=32", "--intermediate_size=64", sizes=PRUNED)
    assert losses(log)[-1] < losses(log)[0]
    config = GPT.from_pretrained(tmp_path / "c").config
    assert (config.n_layer, config.n_embd, config.n_head, config.head_dim) == (1, 32, 4, 16)
    run(trained, data, tmp_path / "d", "--n_head=2", "--n_kv_head=None", "--intermediate_size=None",
        "--max_steps=0", sizes=PRUNED)  # None: the teacher's width, or its number of query heads per key head
    config = GPT.from_pretrained(tmp_path / "d").config
    assert (config.n_head, config.n_kv_head, config.intermediate_size) == (2, 1, 128)


def test_the_teacher_itself_has_nothing_to_learn(trained, data, tmp_path):
    sizes = [word for word in PRUNED if "layers" not in word] + ["--student_layers=0,1", "--alpha=1"]
    log = run(trained, data, tmp_path / "a", "--max_steps=1", "--learning_rate=1e-9", sizes=sizes)
    assert abs(log[0]["divergence"]) < 1e-6
    assert log[-1]["val_kl"] == pytest.approx(0, abs=1e-5) and log[-1]["val_agreement"] > 0.999


def test_chats_are_distilled_at_the_assistants_tokens(trained, chats, data, tmp_path, capsys):
    """The teacher has the chat tokens. The first token of an answer is trained too."""
    import sft

    short = [word for word in PRUNED if "layers" not in word]
    chats = shutil.copytree(chats, tmp_path / "chats")
    sft.main([*short, f"--init_from={trained}", f"--dataset={chats}", f"--out_dir={tmp_path / 'teacher'}"])
    log = run(tmp_path / "teacher", chats, tmp_path / "a", "--packing=False", "--eval_tasks=problems",
              "--eval_limit=2")
    assert "val_problems_accuracy" in log[-1] and log[-1]["val_loss"] < losses(log)[0]
    assert "val_bits_per_byte" not in log[-1]
    assert f"sample.py --model={tmp_path / 'a'} --chat=True\n" in capsys.readouterr().out
    cache(tmp_path / "teacher", chats, "--method=topk", "--k=506")
    cached = run(tmp_path / "teacher", chats, tmp_path / "b", "--cache=topk")
    packed = run(tmp_path / "teacher", chats, tmp_path / "c")
    np.testing.assert_allclose(losses(cached), losses(packed), rtol=2e-3)


def test_stages_change_what_is_learned(trained, data, tmp_path):
    config = tmp_path / "two.py"
    config.write_text("""
stages = [dict(steps=6, alpha=0.0, hidden_weight=1.0, lr_multipliers={"embed_tokens": 0.0}),
          dict(steps=6, restart=True, temperature=2.0)]
""")
    argv = [word for word in arguments(trained, data, tmp_path / "a") if "max_steps" not in word]
    distill.main([str(config), *argv])
    whole = events(tmp_path / "a")
    first = [event for event in whole if event.get("step", 0) <= 6 and "divergence" in event]
    second = [event for event in whole if event.get("step", 0) > 6 and "divergence" in event]
    assert all(event["divergence"] == 0 < event["hidden"] for event in first)
    assert all(event["hidden"] == 0 < event["divergence"] for event in second)
    state = torch.load(tmp_path / "a" / "step_000006" / "trainer" / "state.pt", weights_only=True)
    assert not any("embed_tokens" in name for name in state["optimizer"]), "frozen parameters have no state"


# ---- From a cache -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def little(trained, tmp_path_factory):
    """About 20,000 tokens, which a teacher reads in a second."""
    folder = tmp_path_factory.mktemp("little") / "text"
    source = Path(json.__file__).parent
    prepare(PrepareConfig(source=str(source), out=str(folder), tokenizer=str(trained), val_fraction=0.2,
                          num_proc=1))  # fmt: skip
    return folder


@pytest.fixture
def own_data(little, tmp_path):
    """A copy, so that each test has its own caches."""
    return shutil.copytree(little, tmp_path / "little")


def test_the_whole_teacher_from_a_cache_is_the_teacher(trained, own_data, tmp_path):
    """With k = V: the same run in float32, and nearly the same in float16."""
    expected = run(trained, own_data, tmp_path / "online", "--temperature=2")
    for values, tolerance in (("float32", 1e-5), ("float16", 3e-3)):
        cache(trained, own_data, "--method=topk", "--k=500", f"--values={values}", "--temperature=2")
        log = run(trained, own_data, tmp_path / values, "--temperature=2", "--cache=topk")
        for key in ("loss", "divergence"):
            ours, theirs = ([e[key] for e in each if key in e] for each in (log, expected))
            np.testing.assert_allclose(ours, theirs, rtol=tolerance)
        shutil.rmtree(next(own_data.glob("teacher_*")))


@pytest.mark.parametrize("method", ["topk", "sample"])
def test_it_learns_from_a_cache(trained, own_data, tmp_path, method, capsys):
    cache(trained, own_data, f"--method={method}")
    width = {"topk": 64 * 2 + 65 * 2, "sample": 64}[method]
    assert f"tokens, {width} bytes each" in capsys.readouterr().out
    log = run(trained, own_data, tmp_path / "a", f"--cache={method}")
    assert losses(log)[-1] < losses(log)[0] - 0.15 and "val_kl" not in log[-1]


def test_a_cache_that_was_interrupted_continues(trained, own_data, tmp_path, monkeypatch):
    """Killed in its second shard, it loses that shard only, and the result is the same."""
    from distillation import teacher_cache

    rows = Rows(DataFolder(own_data), "train", 64)
    identity = teacher_cache.identity_of(rows, weights_sha256(hf.find_folder(trained)), False)
    spec = teacher_cache.CacheSpec("sample", 1.5, 8)
    teacher = load_teacher(trained, Tokenizer.load(own_data), "cpu", torch.float32, 64)
    monkeypatch.setattr(teacher_cache, "SHARD_BYTES", 30 * 64 * 16)  # 30 rows of 64 records of 8 ids
    calls = []

    @torch.no_grad()
    def run_teacher(numbers):
        calls.append(len(numbers))
        if len(calls) == 5:
            raise KeyboardInterrupt
        ids = torch.from_numpy(rows.read(numbers)[:, :-1])
        return DenseTeacher(teacher(ids).flatten(0, 1), None)

    with pytest.raises(KeyboardInterrupt):
        teacher_cache.CacheWriter(rows, spec, identity).fill(run_teacher, 10)
    with pytest.raises(UserError, match="has 30 of .* rows. Make it: again"):
        teacher_cache.TeacherCache(rows, identity, "sample", 1.5, "again")
    writer = teacher_cache.CacheWriter(rows, spec, identity)
    assert writer.done == 30
    writer.fill(run_teacher, 10)
    reader = teacher_cache.TeacherCache(rows, identity, "sample", 1.5, "again")
    teacher_cache.verify(reader.folder)
    got = teacher_cache.decode(reader.read(31))
    assert got["teacher_ids"].shape == (64, 8) and got["teacher_probs"].unique().item() == 1 / 8
    path = reader.folder / "train_00001.cache"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    with pytest.raises(UserError, match="does not match its sha256"):
        teacher_cache.verify(reader.folder)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="missing, or not .* bytes long"):
        teacher_cache.TeacherCache(rows, identity, "sample", 1.5, "again")


def test_a_cache_with_another_identity_is_refused(trained, own_data, tmp_path):
    cache(trained, own_data, "--method=sample")
    for more, reason in ((["--temperature=2"], "temperature"), (["--block_size=60"], "block_size"),
                         (["--document_mask=True"], "document_mask")):  # fmt: skip
        pattern = f"has another {reason}. Make it: python -m tools.cache_teacher --teacher="
        with pytest.raises(UserError, match=pattern):
            run(trained, own_data, tmp_path / "a", "--cache=sample", *more)
    config = tmp_path / "stages.py"
    config.write_text("stages = [dict(steps=2), dict(steps=2, temperature=4.0)]\n")
    argv = [word for word in arguments(trained, own_data, tmp_path / "a") if "max_steps" not in word]
    with pytest.raises(UserError, match="temperature and document_mask cannot change with a cache"):
        distill.main([str(config), *argv, "--cache=sample"])
    cache(trained, own_data, "--method=sample", "--k=8")
    with pytest.raises(UserError, match="teacher_.*teacher_.* all match; delete all but one"):
        run(trained, own_data, tmp_path / "a", "--cache=sample")


def test_a_damaged_cache_does_no_harm_if_it_is_not_read(trained, own_data, tmp_path):
    cache(trained, own_data, "--method=sample", "--k=8")
    damaged = own_data / "teacher_0123456789ab"
    damaged.mkdir()
    (damaged / "meta.json").write_text('{"shards": 7}')
    run(trained, own_data, tmp_path / "a", "--cache=sample", "--max_steps=1")
    with pytest.raises(UserError, match="none in .*; .*meta.json: damaged; delete .*. Make it: python"):
        run(trained, own_data, tmp_path / "b", "--cache=topk", "--max_steps=1")


def test_a_cache_is_made_chunk_by_chunk(trained, own_data, monkeypatch):
    """The records are the same for any chunk size, and only one chunk of logits is computed at a time."""
    from distillation import teacher_cache

    written, seen = [], []
    encode = teacher_cache.encode
    monkeypatch.setattr(teacher_cache, "encode",
                        lambda logs, *more: seen.append(logs.shape) or encode(logs, *more))
    for rows in (64, 7):
        monkeypatch.setattr(teacher_cache, "chunk_rows", lambda hidden, V, rows=rows: rows)
        cache(trained, own_data, "--method=topk", "--k=16")
        folder = next(own_data.glob("teacher_*"))
        written.append((folder / "train_00000.cache").read_bytes())
        shutil.rmtree(folder)
    assert written[0] == written[1] and set(seen) == {(64, 500), (7, 500), (1, 500)}


def test_a_disk_without_enough_space_is_refused(trained, own_data, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="GB, the disk has 0.0 free"):
        cache(trained, own_data, "--method=sample", "--k=9")


# ---- Exactness --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [LAYER_LOSSES, ["--on_policy=0.5"], ["--cache=sample"]])
def test_stopped_and_resumed_is_the_same_run(trained, own_data, tmp_path, more, monkeypatch):
    if "--cache=sample" in more:
        cache(trained, own_data, "--method=sample")
    more = [*more, "--max_steps=6"]
    run(trained, own_data, tmp_path / "whole", *more)
    stopped_in_step(3, monkeypatch, lambda: run(trained, own_data, tmp_path / "cut", *more))
    assert checkpoint.step_folders(tmp_path / "cut")[-1].name == "step_000003"
    run(trained, own_data, tmp_path / "cut", *more)
    assert_equal(tmp_path / "whole", tmp_path / "cut")


def test_killed_and_started_again_is_the_same_run(trained, data, tmp_path):
    more = ["--save_interval=3", "--max_steps=10"]
    run(trained, data, tmp_path / "whole", *more, sizes=PRUNED)
    argv = arguments(trained, data, tmp_path / "killed", *more, sizes=PRUNED)
    kill_in_step(5, distill.main, argv)
    distill.main(argv)
    assert_equal(tmp_path / "whole", tmp_path / "killed")


def on_two_ranks(*args):
    run(*args)


def test_gradients_do_not_depend_on_micro_batch_or_ranks(trained, data, tmp_path, two_ranks):
    """Also if the teacher is sharded, and if the student writes the text."""
    more = ["--optimizer=adamw", "--hidden_weight=1", "--attention_weight=1", "--max_steps=4"]
    expected = losses(run(trained, data, tmp_path / "one", *more))
    small = losses(run(trained, data, tmp_path / "small", *more, "--micro_batch_size=1"))
    np.testing.assert_allclose(small, expected, rtol=1e-5)
    for name, how in (("ddp", []), ("fsdp", ["--parallel=fsdp"])):
        two_ranks(on_two_ranks, str(trained), str(data), str(tmp_path / name), *more, *how)
        np.testing.assert_allclose(losses(events(tmp_path / name)), expected, rtol=1e-5)
    own = ["--optimizer=adamw", "--on_policy=1", "--max_steps=2"]
    two_ranks(on_two_ranks, str(trained), str(data), str(tmp_path / "own"), *own, "--parallel=fsdp")
    expected = losses(run(trained, data, tmp_path / "alone", *own))
    np.testing.assert_allclose(losses(events(tmp_path / "own")), expected, rtol=1e-5)


def staged(config, *argv):
    distill.main([str(config), *argv])


def test_two_ranks_pass_from_one_stage_to_the_next(trained, data, tmp_path, two_ranks):
    """The second stage does not use the projections of the first."""
    config = tmp_path / "two.py"
    config.write_text("stages = [dict(steps=2, hidden_weight=1.0), dict(steps=3)]\n")
    argv = [word for word in arguments(trained, data, tmp_path / "a") if "max_steps" not in word]
    two_ranks(staged, str(config), *map(str, argv))
    assert len(losses(events(tmp_path / "a"))) == 5
    staged(config, *map(str, argv), f"--out_dir={tmp_path / 'one'}")
    two_ranks(staged, str(config), *map(str, argv), f"--out_dir={tmp_path / 'fsdp'}", "--parallel=fsdp")
    expected = losses(events(tmp_path / "one"))
    for name in ("a", "fsdp"):
        np.testing.assert_allclose(losses(events(tmp_path / name)), expected, rtol=1e-5)


# ---- Teachers ---------------------------------------------------------------------------------------------


def test_a_teacher_of_transformers(tmp_path, data):
    """An architecture that model.py does not have: the logits are those of transformers."""
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.load(data)
    config = transformers.GPTNeoXConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128)  # fmt: skip
    folder = tmp_path / "neox"
    theirs = transformers.GPTNeoXForCausalLM(config)
    theirs.save_pretrained(folder)
    tokenizer.save(folder)
    teacher = load_teacher(folder, tokenizer, "cpu", torch.float32, 64)
    assert isinstance(teacher, ForeignTeacher)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(teacher(ids), theirs.eval()(ids).logits)
    log = run(folder, data, tmp_path / "a", "--max_steps=3")
    assert log[-1]["val_kl"] > 0


def test_a_teacher_that_brings_code_is_refused(tmp_path, data, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    folder = strangers_model(tmp_path / "model", "AutoModelForCausalLM", tmp_path / "bang")
    Tokenizer.load(data).save(folder)
    with pytest.raises(UserError, match="teacher=.*custom code"):
        load_teacher(folder, Tokenizer.load(data), "cpu", torch.float32, 64)
    assert not (tmp_path / "bang").exists()


def test_a_teacher_with_other_ids_is_refused(trained, data, tmp_path):
    tokenizer = Tokenizer.load(data)
    definition = tokenizer.definition | {"model": dict(tokenizer.definition["model"])}
    vocab = dict(definition["model"]["vocab"])
    (one, first), (two, second) = list(vocab.items())[300:302]
    vocab[one], vocab[two] = second, first
    definition["model"]["vocab"] = vocab
    folder = tmp_path / "permuted"
    busy_model(tiny_config()).save_pretrained(folder)
    Tokenizer(definition, tokenizer.settings).save(folder)
    with pytest.raises(UserError, match="2 token ids mean something else: .* is '.*' there and '.*' in"):
        run(folder, data, tmp_path / "a")
    small = tmp_path / "small"
    busy_model(tiny_config(vocab_size=499)).save_pretrained(small)
    tokenizer.save(small)
    with pytest.raises(UserError, match="has 499 token ids, its tokenizer 500"):
        run(small, data, tmp_path / "a")
    # A pruned student has the teacher's ids, but the fault is the data's tokenizer.
    fewer = tmp_path / "fewer"
    busy_model(tiny_config(vocab_size=300)).save_pretrained(fewer)
    Tokenizer.train(["text of another kind " * 50], 300).save(fewer)
    with pytest.raises(UserError, match="token ids mean something else"):
        run(fewer, data, tmp_path / "a", sizes=PRUNED)


def test_a_model_that_the_run_reads_is_never_deleted(trained, data, tmp_path):
    """A refused command does not delete a finished run either."""
    own = shutil.copytree(trained, tmp_path / "own")
    for more in ([f"--init_from={own}"], []):
        teacher = trained if more else own
        sizes = [word for word in TINY if not word.startswith(("--n_", "--inter"))] if more else TINY
        with pytest.raises(UserError, match="holds the model of"):
            run(teacher, data, own, "--overwrite=True", *more, sizes=sizes)
    assert hf.find_folder(own)
    run(trained, data, tmp_path / "a", "--max_steps=2")
    with pytest.raises(UserError, match="none in"):
        run(trained, data, tmp_path / "a", "--max_steps=2", "--overwrite=True", "--cache=sample")
    assert checkpoint.step_folders(tmp_path / "a")


def test_a_students_own_text_does_not_depend_on_micro_batches(trained, data, tmp_path):
    both = [losses(run(trained, data, tmp_path / size, "--on_policy=1", f"--micro_batch_size={size}",
                        "--max_steps=2")) for size in ("1", "8")]  # fmt: skip
    np.testing.assert_allclose(*both, rtol=1e-5)


def test_padded_columns_are_cut(data, tmp_path):
    """The teacher's output matrix has more rows than its tokenizer has ids."""
    folder = tmp_path / "padded"
    busy_model(tiny_config(vocab_size=640)).save_pretrained(folder)
    Tokenizer.load(data).save(folder)
    log = run(folder, data, tmp_path / "a", "--max_steps=2")
    assert np.isfinite(log[-1]["val_kl"])
    config = GPT.from_pretrained(tmp_path / "a").config
    assert config.vocab_size == 500


def test_projections_are_seeded_by_their_names():
    student = Student(tiny_config(), [(0, 1), (1, 3)], teacher_width=96)
    assert student.projected(1, torch.ones(1, 2, 64)).shape == (1, 2, 96)
    # The disk must have room for them, too.
    assert student.num_saved() - student.num_parameters() == 2 * 64 * 96
    other = Student(tiny_config(), [(0, 1), (1, 3)], teacher_width=96, seed=1)
    matrices = [m.weight for s in (student, other) for m in s.projections.values()]
    assert all((a != b).any() for i, a in enumerate(matrices) for b in matrices[:i])
    same = Student(tiny_config(), [(0, 1)], teacher_width=64)
    assert not list(same.projections) and same.projected(0, torch.ones(3)).tolist() == [1, 1, 1]


def test_projections_of_another_width_are_redrawn(tmp_path):
    student = Student(tiny_config(), [(0, 1), (1, 3)], teacher_width=96)
    student.save_pretrained(tmp_path)
    for width in (96, 80):
        other = Student(tiny_config(), [(0, 1)], teacher_width=width, seed=1)
        before = other.projections["0"].weight.clone()
        other.load(tmp_path)
        expected = student.projections["0"].weight if width == 96 else before
        assert torch.equal(other.projections["0"].weight, expected)
        assert torch.equal(other.head_weight, student.head_weight)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--alpha=1.5"], "alpha=1.5: must be from 0 to 1"),
        (["--temperature=0"], "temperature=0.0: must be positive"),
        (["--cache=topk", "--divergence=jsd"], "divergence=jsd: needs the teacher itself, so it only works"),
        (["--cache=sample", "--on_policy=0.5"], "on_policy=0.5: needs the teacher itself"),
        (["--on_policy=1", "--document_mask=True"], "on_policy=1.0: does not work with document_mask=True"),
        (["--vocab_size=300"], "vocab_size=300: the data's tokenizer has 500 ids"),
        (["--student_layers=first:1"], "comes with student_layers=first:1 and cannot be given"),
        (["--student_layers=last:1", "--n_head=3"], "comes with student_layers|n_head=3"),
        (["--hidden_weight=1", "--layer_map=all"], "layer_map=all"),
        (["--teacher=/nowhere"], "no model here"),
        (["--block_size=80"], "block_size=80: teacher=.* has a context of 64 tokens"),
    ],
)
def test_mistakes_are_one_line(trained, data, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        run(trained, data, tmp_path / "a", *more)


@pytest.mark.parametrize("name", ["tiny", "gpt2_half", "two_stage", "nanollama"])
def test_config_files_describe_runs(name):
    cfg = configure(distill.DistillConfig, [f"config/distill_{name}.py"])[0]
    assert cfg.teacher and loop.stage_configs(cfg)


# ---- Layers, tables, noise --------------------------------------------------------------------------------


def test_pairs_of_layers_embeddings_and_the_cosine(trained, data, tmp_path):
    """Explicit pairs, relations as MSE, the teacher's table, and the angle of two gradients in one run."""
    argv = ["--layer_map=0:1", "--attention_loss=relations_mse", "--student_embeddings=teacher"]
    argv += LAYER_LOSSES
    log = run(trained, data, tmp_path / "a", *argv, "--log_gradient_cosine=True", "--max_steps=4")
    cosines = [event["cosine"] for event in log if "cosine" in event]
    assert len(cosines) == 4 and all(0 < abs(value) < 1 for value in cosines)
    plain = run(trained, data, tmp_path / "b", *argv, "--max_steps=4")
    assert losses(plain) == losses(log), "measuring the cosine changes nothing"
    with pytest.raises(UserError, match="layer_map=0:2: the student has layers 0 to 0, the teacher 0 to 1"):
        run(trained, data, tmp_path / "c", "--layer_map=0:2", *LAYER_LOSSES)


def test_the_cosine_by_hand():
    x, y = torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([3.0]))
    assert gradient_cosine((x.sum(), x[0] + y.sum()), [x, y]).item() == pytest.approx(0.5)
    assert gradient_cosine((x.sum(), (0 * x).sum()), [x, y]).item() == 0


def test_a_student_begins_with_the_teachers_tables(trained, data, tmp_path):
    """As wide: the same table. Narrower: its principal components, with the same mean square."""
    teacher = GPT.from_pretrained(hf.find_folder(trained)).model["embed_tokens"].weight[:500]
    for width in (64, 32):
        run(trained, data, tmp_path / str(width), "--student_embeddings=teacher", "--max_steps=0",
            f"--n_embd={width}")
        table = GPT.from_pretrained(hf.find_folder(tmp_path / str(width))).model["embed_tokens"].weight[:500]
        assert table.square().mean().item() == pytest.approx(teacher.square().mean().item(), rel=1e-4)
        gram, theirs = table @ table.T, teacher @ teacher.T
        if width == 64:
            torch.testing.assert_close(table, teacher)
        assert torch.corrcoef(torch.stack((gram.flatten(), theirs.flatten())))[0, 1] > 0.8
    with pytest.raises(UserError, match="wider than the teacher's 64"):
        run(trained, data, tmp_path / "w", "--student_embeddings=teacher", "--n_embd=128")


def test_no_steps_write_the_student_as_it_starts(trained, data, tmp_path):
    log = run(trained, data, tmp_path / "a", "--max_steps=0", sizes=PRUNED)
    assert [event["step"] for event in log] == [0] and log[0]["val_loss"] > 0
    kept = GPT.from_pretrained(tmp_path / "a" / "step_000000").state_dict()
    source = GPT.from_pretrained(hf.find_folder(trained)).state_dict()
    assert torch.equal(kept["model.layers.0.mlp.up_proj.weight"], source["model.layers.1.mlp.up_proj.weight"])
    assert run(trained, data, tmp_path / "a", "--max_steps=0", sizes=PRUNED) == log
    assert losses(run(trained, data, tmp_path / "a", "--max_steps=1", sizes=PRUNED)) != []


def test_the_architecture_alone(trained, data, tmp_path):
    """new_weights=True keeps the sizes of a pruned student, and none of its weights."""
    run(trained, data, tmp_path / "a", "--max_steps=0", "--new_weights=True", "--seed=5", sizes=PRUNED)
    model, source = (GPT.from_pretrained(hf.find_folder(x)) for x in (tmp_path / "a", trained))
    assert model.config.n_embd == source.config.n_embd and model.config.n_layer == 1
    ours, theirs = (x.model["embed_tokens"].weight.flatten() for x in (model, source))
    assert abs(torch.corrcoef(torch.stack((ours, theirs)))[0, 1]) < 0.1


def test_noise_has_its_norm_and_does_not_depend_on_micro_batches(trained, data, tmp_path):
    plain = run(trained, data, tmp_path / "a", "--max_steps=1", "--grad_clip=0")
    logs = [run(trained, data, tmp_path / str(size), "--max_steps=2", "--grad_clip=0", "--gradient_noise=50",
                f"--micro_batch_size={size}") for size in (2, 8)]
    norms = [[event["grad_norm"] for event in log if "grad_norm" in event] for log in (plain, *logs)]
    assert norms[0][0] < 3 and norms[1][0] == pytest.approx(50, rel=0.05)
    np.testing.assert_allclose(norms[1], norms[2], rtol=1e-4)
    np.testing.assert_allclose(losses(logs[0]), losses(logs[1]), rtol=1e-4)


def test_bad_multipliers_leave_the_old_run(trained, data, tmp_path):
    run(trained, data, tmp_path / "a", "--max_steps=1")
    with pytest.raises(UserError, match="lr_multipliers"):
        run(trained, data, tmp_path / "a", "--overwrite=True", "--lr_multipliers={'nothing': 2.0}")
    assert (tmp_path / "a" / "step_000001").is_dir()


def test_a_cache_says_its_size_and_many_samples_are_refused(trained, little, capsys):
    with pytest.raises(UserError, match="k=1000000: must be at most 1,024 with method=sample"):
        cache(trained, little, "--method=sample", "--k=1e6")
    with pytest.raises(UserError, match="new_weights=True: only works with student_layers"):
        configure(distill.DistillConfig, ["--new_weights=True"])
    with pytest.raises(UserError, match="layer_map=0-1: write pairs student:teacher such as 0:1,1:3"):
        configure(distill.DistillConfig, ["--layer_map=0-1"])
