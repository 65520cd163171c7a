"""What the tests share: a tiny model, a small data set of real text, and a pair of processes in one group."""

import multiprocessing
import os
import socket
import sys
import sysconfig
import traceback
from pathlib import Path

import pytest
import torch

sys.path.insert(
    0, str(Path(__file__).parent.parent)
)  # the scripts stand in the root, as their users find them

from configurator import configure
from formats.chat_format import with_chat_tokens
from formats.tokenizer import Tokenizer
from model import GPT, GPTConfig
from prepare import PrepareConfig, prepare

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where the machine is shared
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
SHARED = ROOT.parent / "shared" / "data"  # public data that is not part of the project
# The smallest run that still has grouped queries, several rows a batch and several batches a step.
TINY_RUN = """--n_layer=2 --n_embd=64 --n_head=4 --n_kv_head=2 --intermediate_size=128 --block_size=64
    --global_batch_size=8 --micro_batch_size=4 --learning_rate=3e-3 --eval_tokens=1024 --sample_tokens=0
    --device=cpu --log_interval=1 --eval_interval=0 --save_interval=0""".split()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs with -m slow")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: runs with -m slow"))


def tiny_config(**changes):
    tiny = dict(
        vocab_size=500, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, intermediate_size=128, block_size=64
    )
    return GPTConfig(**tiny | changes)


def busy_model(config, seed=0):
    """A model whose every parameter is far from where it began: nothing hides behind a zero or a one."""
    model = GPT(config, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def shared(name):
    """A file of the public data next to the repository; skips the test where there is none."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not at hand (public data beside the repository)")
    return path


@pytest.fixture(scope="session")
def text_folder():
    """Real text that every machine has: two packages of the standard library, about 0.7 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return f"{root / 'email'},{root / 'asyncio'}"


@pytest.fixture(scope="session")
def data(tmp_path_factory, text_folder):
    """A prepared data folder with a BPE of 500 ids."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    prepare(PrepareConfig(source=text_folder, out=str(folder), vocab_size=500, val_fraction=0.1, num_proc=1))
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
    """Problems and mistakes as preferences, with the tokenizer of `trained`."""
    return problems_folder(tmp_path_factory, trained, "preference", source="mistakes")


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    """A model folder with chat tokens and random weights."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = with_chat_tokens(Tokenizer.train([open(__file__, encoding="utf-8").read()], 400))
    model = busy_model(tiny_config(vocab_size=tokenizer.vocab_size))
    model.save_pretrained(folder, eos_token_id=tokenizer.end_ids)
    tokenizer.save(folder)
    return folder


def problems_folder(tmp_path_factory, model, kind, source="problems"):
    folder = tmp_path_factory.mktemp("problems") / kind
    prepare(
        PrepareConfig(
            source=source, kind=kind, out=str(folder), tokenizer=str(model), max_tokens=40_000, num_proc=1
        )
    )
    return folder


# ---- Two processes ----------------------------------------------------------------------------------------


def rank_main(rank, port, pipe):
    """What each of the two processes does: run the functions it is sent, one after the other."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
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
    """A function that runs `function(*arguments)` on both of two gloo ranks and returns both results.

    The processes start once a session: each start costs seconds.
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


def config_of(schema, *words):
    """A configuration from command-line words."""
    return configure(schema, list(words))[0]
