"""What the tests share: markers, a tiny model, small data sets, a short run, and two ranks in one group."""

import json
import multiprocessing
import os
import socket
import sys
import sysconfig
import textwrap
import traceback
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts are in the root, as their users find them

from configurator import configure
from dataset.problems import problem_rows
from formats.chat_format import with_chat_tokens
from formats.tokenizer import Tokenizer
from model import GPT, GPTConfig
from prepare import PrepareConfig, prepare
from tests.mistakes import mistake_rows
from training import curves

ROOT = Path(__file__).parent.parent
CODE = Path(textwrap.__file__).read_text(encoding="utf-8")  # 20 kB of Python and English, for tokenizers
torch.set_num_threads(1)  # tiny models gain nothing from more threads, and lose much on a busy machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network


class OnePixel:
    """Stands for the picture of a run. Drawing it would take half of the time of a tiny run."""

    def savefig(self, file, **options):
        if isinstance(file, Path):
            file.write_bytes(ONE_PIXEL)
        else:
            file.write(ONE_PIXEL)


# A PNG image: its signature, then the chunks IHDR (1 x 1 pixels, 8 bits, grey), IDAT and IEND.
ONE_PIXEL = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001000000010800000000"
                          "3a7e9b550000000a49444154789c636000000002000148afa4710000000049454e44ae426082")
DRAW = curves.draw
curves.draw = lambda runs: OnePixel()  # also in the processes of `two_ranks`, which import this module
SHARED = ROOT.parent / "shared" / "data"  # public data next to the repository; tests skip without it
# The smallest run that still has grouped queries, several rows per batch and several batches per step.
TINY_RUN = """--n_layer=2 --n_embd=64 --n_head=4 --n_kv_head=2 --intermediate_size=128 --block_size=64
    --global_batch_size=8 --micro_batch_size=4 --learning_rate=3e-3 --eval_tokens=1024 --sample_tokens=0
    --device=cpu --log_interval=1 --eval_interval=0 --save_interval=0""".split()


# The modules of `pytest -m fast`: about 1,700 tests in 50 seconds on one core. Tests that use a fixture of
# TRAINED are left out, and those of NOT_FAST, which take long. The others start no training run and no child
# process.
FAST = """
    test_configurator.py test_dpo.py test_eval.py test_imports.py test_model.py test_sft.py
    bench/test_learn.py bench/test_reason.py bench/test_scoring.py bench/test_teach.py
    dataset/test_chat_rows.py dataset/test_conversations.py dataset/test_download.py
    dataset/test_eval_items.py dataset/test_minhash.py dataset/test_problems.py dataset/test_prompts.py
    dataset/test_sources.py dataset/test_words.py
    distillation/test_divergences.py distillation/test_layer_losses.py distillation/test_layer_maps.py
    distillation/test_on_policy.py distillation/test_pruning.py
    evals/tasks/test_bfcl.py evals/tasks/test_math_problems.py evals/tasks/test_ifeval.py
    evals/tasks/test_needle.py evals/tasks/test_open_qa.py evals/tasks/test_word_problems.py
    evals/tasks/test_choice.py evals/tasks/test_perplexity.py evals/tasks/test_summarize.py
    evals/tasks/test_conll.py evals/tasks/test_mt_bench.py
    evals/test_likelihood.py evals/test_lm.py evals/test_rewards.py evals/test_votes.py
    generation/test_api.py generation/test_rollouts.py generation/test_verifier.py generation/test_batcher.py
    formats/test_bad_models.py formats/test_chat_format.py formats/test_kquants.py
    generation/test_assistant.py generation/test_constraints.py generation/test_samples.py
    dataset/test_tasks.py dataset/test_tool_problems.py tools/test_errors.py
    modeling/test_attention.py modeling/test_devices.py modeling/test_kv_cache.py modeling/test_sinks.py
    modeling/test_ternary.py
    tools/test_compare.py tools/test_make_pairs.py tools/test_plot.py
    training/test_curves.py training/test_lora.py training/test_losses.py training/test_optim.py
""".split()
TRAINED = {"trained", "chats", "pairs", "two_ranks"}
NOT_FAST = {"test_exit_codes", "test_arrow_keys_edit_the_line_in_a_chat",
            "test_a_model_on_the_meta_device_is_filled_without_a_second_copy",
            "test_a_run_lowers_its_loss", "test_a_teacher_whose_bytes_cannot_be_aligned",
            "test_a_tree_of_texts_equals_transformers_on_each_text",
            "test_conversations_that_are_cut_are_counted_or_dropped"}


def fast_module(path):
    return path.is_relative_to(ROOT / "tests") and path.relative_to(ROOT / "tests").as_posix() in FAST


def pytest_ignore_collect(collection_path, config):
    """With -m fast, do not even import the other modules."""
    if config.option.markexpr == "fast" and collection_path.suffix == ".py":
        return not fast_module(collection_path) or None
    return None


def pytest_collection_modifyitems(config, items):
    """Mark the fast tests; without -m, skip the slow ones."""
    for item in items:
        slow = item.get_closest_marker("slow")
        if slow and not config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow: runs with -m slow"))
        if not slow and fast_module(item.path) and not TRAINED & set(item.fixturenames) \
                and item.originalname not in NOT_FAST:
            item.add_marker(pytest.mark.fast)


@pytest.fixture(autouse=True)
def fast_tests_start_no_run(request, monkeypatch):
    """Fail a fast test that starts a training run or a child process: it belongs into NOT_FAST."""
    if request.node.get_closest_marker("fast"):
        import matplotlib.font_manager  # noqa: F401  (its first import on a machine asks a child for the fonts)

        def refuse(*args, **kwargs):
            pytest.fail(f"{request.node.originalname} is marked fast, but starts a run or a child process: "
                        "add it to NOT_FAST in tests/conftest.py")

        monkeypatch.setattr("loop.TrainState.__init__", refuse)
        monkeypatch.setattr("subprocess.Popen.__init__", refuse)
        monkeypatch.setattr("multiprocessing.process.BaseProcess.start", refuse)
        monkeypatch.setattr("os.fork", refuse)


def tiny_config(**changes):
    tiny = dict(vocab_size=500, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, intermediate_size=128,
                block_size=64)
    return GPTConfig(**tiny | changes)


def busy_model(config, seed=0):
    """A model with every parameter far from its initial value, so that no zero or one hides a mistake."""
    model = GPT(config, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def shared(name):
    """A file of the public data next to the repository. Skips the test if the file is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is missing (public data next to the repository)")
    return path


def smollm2():
    """The file that tools/get_smollm2.py downloads. Skips the test if it is missing."""
    folder = Path(os.environ.get("SMOLLM2", ROOT / "out" / "smollm2"))
    if not (files := sorted(folder.glob("*.gguf"))):
        pytest.skip("SmolLM2 is missing (python -m tools.get_smollm2; or its folder in SMOLLM2)")
    return files[0]


@pytest.fixture(scope="session")
def text_folder():
    """Real text that every machine has: two packages of the standard library, about 0.7 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return f"{root / 'email'},{root / 'asyncio'}"


@pytest.fixture(scope="session")
def data(tmp_path_factory, text_folder):
    """A prepared data folder of the Python files there, with a BPE of 500 ids."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    source = ",".join(f"{place}/**/*.py" for place in text_folder.split(","))
    prepare(PrepareConfig(source=source, out=str(folder), vocab_size=500, val_fraction=0.1, num_proc=1))
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data):
    """An out_dir after a short training run."""
    import train

    out = tmp_path_factory.mktemp("out") / "trained"
    train.main([*TINY_RUN, f"--dataset={data}", f"--out_dir={out}", "--max_steps=60"])
    return out


@pytest.fixture(scope="session")
def chats(tmp_path_factory, trained):
    """Problems as conversations, with the tokenizer of `trained`."""
    return problems_folder(tmp_path_factory, trained, "chat")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, trained):
    """Problems with right and wrong answers as preferences, with the tokenizer of `trained`."""
    rows = tmp_path_factory.mktemp("pairs") / "mistakes.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in mistake_rows(2000, seed=1)))
    return problems_folder(tmp_path_factory, trained, "preference", source=str(rows))


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    """A model folder with chat tokens and random weights."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    texts = [row["text"] for row in problem_rows("text", 500, seed=0)]
    tokenizer = with_chat_tokens(Tokenizer.train(texts, 400))
    model = busy_model(tiny_config(vocab_size=tokenizer.vocab_size))
    model.save_pretrained(folder, eos_token_id=tokenizer.end_ids)
    tokenizer.save(folder)
    return folder


def problems_folder(tmp_path_factory, model, kind, source="problems"):
    folder = tmp_path_factory.mktemp("problems") / kind
    prepare(PrepareConfig(source=source, kind=kind, out=str(folder), tokenizer=str(model), max_tokens=40_000,
                          num_proc=1))
    return folder


# ---- Two processes ----------------------------------------------------------------------------------------


def rank_main(rank, port, pipe):
    """The body of each of the two processes: run the functions that arrive through the pipe."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    import torch.distributed as dist

    dist.init_process_group("gloo")
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            pipe.send((function(*arguments), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def two_ranks():
    """Calls `function(*arguments)` on both of two gloo ranks and returns both results.

    The processes start once per session, because each start takes seconds.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=rank_main, args=(rank, port, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)

    def run(function, *arguments):
        for pipe in pipes:
            pipe.send((function, arguments))
        results = []
        for pipe in pipes:
            assert pipe.poll(120), f"a rank hangs; {results}"
            results.append(pipe.recv())
        for _, error in results:
            assert error is None, error
        return [result for result, _ in results]

    yield run
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join(timeout=20)
        process.kill()


@pytest.fixture
def pictures(monkeypatch):
    """Runs draw their real loss.png."""
    monkeypatch.setattr(curves, "draw", DRAW)


def config_of(schema, *argv):
    """A configuration from command-line arguments."""
    return configure(schema, list(argv))[0]


def strangers_model(folder, model_class, bang):
    """A folder whose config.json names code for transformers, as a hub model may. The code makes `bang`."""
    folder.mkdir()
    (folder / "strange.py").write_text(f"import os\nos.mkdir({str(bang)!r})\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": {
        "AutoConfig": "strange.Config", model_class: "strange.Model"}}))
    return folder
