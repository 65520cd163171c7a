"""configurator.py: three sources in order, all of them checked. A mistake is one line: place and remedy."""

import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest

from configurator import (
    ProgressBar,
    UserError,
    configure,
    differences,
    field_comments,
    help_text,
    other_names,
    override,
    run_script,
    version,
)

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base schema."""

    rate: float = 1e-3  # how fast
    steps: int = 10  # how long


@dataclass(frozen=True, kw_only=True)
class Schema(Base):
    """The whole schema."""

    name: str | None = None  # what it is called
    mode: Literal["fast", "slow"] = "fast"  # which way
    loud: bool = False  # whether it prints
    maybe: bool | None = None  # None decides later
    parts: dict = field(default_factory=dict)  # a table
    tasks: list | str | None = None  # one or several

    def __post_init__(self):
        if self.steps <= 0:
            raise UserError(f"steps={self.steps}: must be positive")


def config_file(tmp_path, text):
    path = tmp_path / "c.py"
    path.write_text(text)
    return str(path)


def test_later_sources_win(tmp_path):
    file = config_file(tmp_path, "steps = 2 * 10\nrate = 1\nmode = 'slow'\n_private = 3\nimport math\n")
    config, provenance = configure(Schema, [file, "--steps=7", "--name=run one"])
    assert (config.steps, config.rate, config.mode, config.name) == (7, 1.0, "slow", "run one")
    assert isinstance(config.rate, float)
    assert provenance == {
        "steps": "command line",
        "rate": f"{file}:2",
        "mode": f"{file}:3",
        "name": "command line",
    }
    assert differences(config) == {"steps": 7, "rate": 1.0, "mode": "slow", "name": "run one"}


@pytest.mark.parametrize(
    "arg, key, value",
    [
        ("--rate=1", "rate", 1.0),
        ("--rate=3e-4", "rate", 3e-4),
        ("--steps=1e3", "steps", 1000),
        ("--steps=1_000", "steps", 1000),
        ("--loud=True", "loud", True),
        ("--loud=true", "loud", True),
        ("--loud=FALSE", "loud", False),
        ("--loud", "loud", True),
        ("--maybe", "maybe", True),
        ("--maybe=false", "maybe", False),
        ("--maybe=None", "maybe", None),
        ("--name=None", "name", None),
        ("--name=1", "name", "1"),
        ("--parts={'a': 0.5}", "parts", {"a": 0.5}),
        ("--tasks=['a', 'b']", "tasks", ["a", "b"]),
        ("--tasks=a", "tasks", "a"),
        ("--name=a=b", "name", "a=b"),
        ("--mode=slow", "mode", "slow"),
    ],
)
def test_arguments_become_values(arg, key, value):
    result = getattr(configure(Schema, [arg])[0], key)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    "arg, parts",
    [
        ("--stesp=3", ["command line", "'stesp'", "did you mean 'steps'"]),
        ("--steps=three", ["--steps=three", "int"]),
        ("--steps=1.5", ["int"]),
        ("--loud=yes", ["--loud=yes: expected True|False"]),
        ("--loud=1", ["expected True|False"]),
        ("--maybe=2", ["expected True|False or None"]),
        ("--loud=", ["no value"]),
        ("--naem", ["unknown key 'naem', did you mean 'name'?"]),
        ("--name", ["write --name=value"]),
        ("--config=c.py", ["write the name of the file alone"]),
        ("--steps=True", ["int"]),
        ("--mode=quick", ["fast|slow"]),
        ("--steps", ["--steps=value"]),
        ("--parts=[1]", ["dict"]),
        ("--steps=__import__('os').getpid()", ["int"]),
        ("--steps=0", ["steps=0", "positive"]),
        ("--rate=" + "9" * 5000, ["--rate="]),
        ("--rate=1e400", ["float"]),
        ("--parts=" + "[" * 5000, ["dict"]),
    ],
)
def test_a_wrong_argument_is_one_line(arg, parts):
    with pytest.raises(UserError) as error:
        configure(Schema, [arg])
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("a = 1\nstep = 3\n", [":1", "'a'"]),
        ("steps = 1\nrat = 3\n", [":2", "'rat'", "did you mean 'rate'"]),
        ("steps = '3'\n", [":1", "steps = '3'", "int"]),
        ("loud = 1\n", ["expected True|False"]),
        ("steps = 1\nreturn\n", ["SyntaxError", "'return' outside function"]),
        ("steps = 1\0\n", ["not a config file"]),
        ("import numpy\nmode = numpy.zeros(3)\n", [":2", "fast|slow"]),
        ("parts = " + "[" * 300 + "]" * 300 + "\n", ["not a config file"]),
        ("steps = = 3\n", [":1", "not a config file"]),
        ("steps = 1 / 0\n", ["ZeroDivisionError"]),
        ("mode = 'x'\n", ["fast|slow"]),
        ("rate = 2\nsteps = 0\n", ["c.py:2: steps=0: must be positive"]),
    ],
)
def test_wrong_files_name_the_line(tmp_path, text, parts):
    with pytest.raises(UserError) as error:
        configure(Schema, [config_file(tmp_path, text)])
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_config_file_may_begin_with_a_bom(tmp_path):
    path = tmp_path / "c.py"
    path.write_bytes(b"\xef\xbb\xbfsteps = 3\r\n")
    assert configure(Schema, [str(path)])[0].steps == 3


def test_missing_file_suggests(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="did you mean 'config/train_shakespeare.py'"):
        configure(Schema, ["config/train_shakespear.py"])


def test_help_lists_every_key_with_default_and_comment():
    text = help_text(Schema, "what it does")
    for expected in (
        "what it does",
        "--rate=0.001",
        "how fast",
        "--mode=fast",
        "fast|slow: which way",
        "--parts={}",
    ):
        assert expected in text
    # One section per class, the bases first.
    assert text.index("A base schema:\n  --rate") < text.index("This script only:\n  --name")
    with pytest.raises(SystemExit) as exit:
        configure(Schema, ["--help"])
    assert exit.value.code == 0


def test_help_has_the_sections_of_the_source():
    """A comment `# ---- Name` begins a section. A key that a script redefines stays in its base's section."""
    from sft import SFTConfig

    page = help_text(SFTConfig, "")
    sections = {block.strip().partition(":\n")[0]: re.findall(r"^  --(\w+)=", block, re.MULTILINE)
                for block in page.split("\n\n")[1:]}
    assert sections["Adapter"][0] == "lora_rank" and sections["This script only"] == ["packing", "overlong"]
    assert "max_steps" in sections["Batches and steps"]
    assert sorted(sum(sections.values(), [])) == sorted(f.name for f in fields(SFTConfig))
    _, keys = help_text(Base, "usage").split("file):\n")
    assert keys == (f"{'  --rate=0.001':40} float: how fast\n"  # a single section has no name
                    f"{'  --steps=10':40} int: how long")


def test_version_is_that_of_pyproject(capsys):
    with pytest.raises(SystemExit) as exit:
        configure(Schema, ["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"nanollama {version()}\n"
    assert f'version = "{version()}"' in (ROOT / "pyproject.toml").read_text()


def test_progress_in_a_log_file_is_a_line_every_30_seconds(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with ProgressBar(total=80, unit="row") as bar:
        for _ in range(80):
            now[0] += 1
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("|")[0].strip() for line in lines] == ["38%", "75%"]
    assert "30/80 [00:30<00:50,  1.00row/s]" in lines[0] and "\r" not in lines[0]


def test_override_checks_like_a_file():
    assert override(Schema(), {"rate": 2}, "stages[0]").rate == 2.0
    with pytest.raises(UserError, match=r"stages\[1\]: unknown key 'rats'"):
        override(Schema(), {"rats": 2}, "stages[1]")


@pytest.mark.parametrize(
    "body, code, stderr",
    [
        ("return 0", 0, ""),
        ("raise UserError('a\\nb')", 2, "s.py: a b\n"),
        (
            "raise OSError(28, 'No space left on device', 'x.bin')",
            2,
            "s.py: [Errno 28] No space left on device: 'x.bin'\n",
        ),
        ("raise KeyboardInterrupt", 130, ""),
        ("raise MemoryError('Unable to allocate 9 TiB')", 2,
         "s.py: out of memory: use smaller sizes or batches (Unable to allocate 9 TiB)\n"),
        ("raise RuntimeError('CUDA out of memory. Tried to allocate 2 GiB.\\nSee')", 2,
         "s.py: out of memory: use smaller sizes or batches (CUDA out of memory. Tried to allocate 2 GiB.)"
         "\n"),
        ("raise RuntimeError('ours')", 1, None),
    ],
)
def test_exit_codes(tmp_path, body, code, stderr):
    script = tmp_path / "s.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom configurator import UserError, run_script\n"
        f"def main(argv):\n    {body}\nrun_script(main)\n"
    )
    process = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert process.returncode == code
    assert "Traceback" in process.stderr if stderr is None else process.stderr == stderr


def test_a_mistake_of_one_rank_is_printed_when_the_first_one_had_its_turn(tmp_path, monkeypatch, capsys):
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("configurator.time.sleep", waited.append)
    monkeypatch.setattr("sys.argv", ["s.py"])

    def main(argv):
        raise UserError("my reward has failed")

    with pytest.raises(SystemExit) as code:
        run_script(main)
    assert (code.value.code, waited) == (2, [10])
    assert capsys.readouterr().err == "s.py: my reward has failed\n"


def schemas():
    from distill import DistillConfig
    from dpo import DPOConfig
    from eval import EvalConfig
    from export import ExportConfig
    from prepare import PrepareConfig
    from sample import SampleConfig
    from sft import SFTConfig
    from train import TrainConfig

    return {"prepare": PrepareConfig, "train": TrainConfig, "distill": DistillConfig, "sft": SFTConfig,
            "dpo": DPOConfig, "sample": SampleConfig, "eval": EvalConfig, "export": ExportConfig}


def test_every_key_of_every_script_is_explained():
    """A field without a comment at the end of its line would have no text in --help."""
    for name, schema in schemas().items():
        missing = set(schema.__dataclass_fields__) - field_comments(schema).keys()
        assert not missing, f"{name}: {missing}"


# ---- Names of other tools ---------------------------------------------------------------------------------

TRAINING = ["train", "distill", "sft", "dpo"]
ALL = [*TRAINING, "prepare", "sample", "eval", "export"]


@pytest.mark.parametrize(
    "key, scripts, answer",
    [
        ("lr", TRAINING, "here it is learning_rate"),
        ("learning-rate", TRAINING, "here it is learning_rate"),
        ("Learning_Rate", TRAINING, "here it is learning_rate"),
        ("lr", ["prepare", "sample", "eval", "export"], "unknown key 'lr' (--help"),
        ("batch_size", TRAINING, "here it is global_batch_size (rows per optimizer step, in passes"),
        ("batch_size", ["prepare", "export"], "unknown key 'batch_size' (--help"),
        ("gradient_accumulation_steps", TRAINING, "here it is global_batch_size (rows per"),
        ("epochs", TRAINING, "here it is max_steps (or in a config file stages = [dict(epochs=2)])"),
        ("num_epochs", TRAINING, "here it is max_steps (or"),
        ("num_train_epochs", TRAINING, "here it is max_steps (or"),
        ("max_iters", TRAINING, "here it is max_steps"),
        ("lr_decay_iters", TRAINING, "here it is max_steps"),
        ("eval_iters", TRAINING, "here it is eval_tokens"),
        ("eval_steps", TRAINING, "here it is eval_interval"),
        ("warmup_iters", TRAINING, "here it is warmup_steps"),
        ("ctx_len", TRAINING, "here it is block_size"),
        ("n_ctx", TRAINING, "here it is block_size"),
        ("n_ctx", ["eval"], "here it is context_length"),
        ("wandb_log", TRAINING, "here it is wandb"),
        ("gradient_checkpointing", TRAINING, "here it is activation_checkpointing"),
        ("no_compile", [*TRAINING, "sample"], "here it is compile=False"),
        ("out", TRAINING, "here it is out_dir"),
        ("out", ["sample"], "unknown key 'out' (--help"),
        ("out_dir", ["prepare", "export"], "here it is out"),
        ("out_dir", ["sample"], "here it is model"),
        ("model", ["train", "distill", "sft", "dpo"], "here it is init_from"),
        ("init_from", ["sample", "eval", "export"], "here it is model"),
        ("start", ["sample"], "here it is prompt"),
        ("start", TRAINING, "unknown key 'start' (--help"),
        ("max_tokens", ["sample"], "here it is max_new_tokens"),
        ("num_fewshot", ["eval"], "here it is shots"),
        ("lora_r", ["sft", "dpo"], "here it is lora_rank"),
        ("data", ["prepare"], "here it is source"),
        ("num_workers", ["prepare"], "here it is num_proc"),
        ("outtype", ["export"], "here it is quantize"),
        # No suggestion is better than the name of something else.
        ("quantize", ["sample", "train", "eval", "prepare"], "unknown key 'quantize' (--help"),
        ("min_new_tokens", ["sample"], "unknown key 'min_new_tokens' (--help"),
        ("min_steps", TRAINING, "unknown key 'min_steps' (--help"),
        ("dropout", ["sft", "dpo"], "unknown key 'dropout' (--help"),
        # A misspelling has one.
        ("learning_rat", TRAINING, "did you mean 'learning_rate'?"),
        ("max_step", TRAINING, "did you mean 'max_steps'?"),
        ("maxsteps", TRAINING, "did you mean 'max_steps'?"),
        ("outdir", [*TRAINING, "eval"], "did you mean 'out_dir'?"),
        ("max_token", ["prepare"], "did you mean 'max_tokens'?"),
        ("temprature", ["sample", "distill"], "did you mean 'temperature'?"),
    ],
)
def test_the_names_of_other_tools_are_answered_with_ours(key, scripts, answer):
    for script in scripts:
        for arg in (f"--{key}=1", f"--{key}"):
            with pytest.raises(UserError) as error:
                configure(schemas()[script], [arg])
            assert answer in str(error.value), f"{script}: {error.value}"


def test_no_answer_names_a_key_that_the_script_lacks():
    """Every name of the table in every script that has no such key: the answer begins with a key."""
    for name, schema in schemas().items():
        keys = {f.name for f in fields(schema)}
        for key in {other for others in other_names().values() for other in others.split()} - keys:
            with pytest.raises(UserError) as error:
                configure(schema, [f"--{key}=1"])
            answer = re.search(r"here it is (\w+)", str(error.value))
            assert answer is None or answer[1] in keys, f"{name}: {error.value}"
            assert "did you mean" not in str(error.value), f"{name}: {error.value}"


@pytest.mark.parametrize("value", ["scratch", "resume"])
@pytest.mark.parametrize("script", TRAINING)
def test_nanogpts_values_of_init_from_are_explained(script, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = config_file(tmp_path, f"init_from = {value!r}\n")
    for arg in (f"--init_from={value}", file):
        with pytest.raises(UserError, match=f"init_from={value}: leave the key out; "):
            configure(schemas()[script], [arg])
    (tmp_path / value).mkdir()  # a folder of this name is a model like any other
    assert configure(schemas()[script], [f"--init_from={value}"])[0].init_from == value
