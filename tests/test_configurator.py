"""configurator.py: three sources in order, all of them checked. A mistake is one line: place and remedy."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from configurator import UserError, configure, differences, help_text, override

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
        ("--loud=yes", ["bool"]),
        ("--loud=1", ["bool"]),
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
        ("loud = 1\n", ["bool"]),
        ("steps = = 3\n", [":1", "not a config file"]),
        ("steps = 1 / 0\n", ["ZeroDivisionError"]),
        ("mode = 'x'\n", ["fast|slow"]),
    ],
)
def test_wrong_files_name_the_line(tmp_path, text, parts):
    with pytest.raises(UserError) as error:
        configure(Schema, [config_file(tmp_path, text)])
    assert all(part in str(error.value) for part in parts), str(error.value)


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
    with pytest.raises(SystemExit) as exit:
        configure(Schema, ["--help"])
    assert exit.value.code == 0


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


def test_every_key_of_every_script_is_explained():
    """A field without a comment at the end of its line would have no text in --help."""
    from configurator import field_comments
    from distill import DistillConfig
    from dpo import DPOConfig
    from eval import EvalConfig
    from export import ExportConfig
    from prepare import PrepareConfig
    from sample import SampleConfig
    from sft import SFTConfig
    from train import TrainConfig

    for schema in (PrepareConfig, TrainConfig, DistillConfig, SFTConfig, DPOConfig, SampleConfig, EvalConfig,
                   ExportConfig):
        missing = set(schema.__dataclass_fields__) - field_comments(schema).keys()
        assert not missing, f"{schema.__name__}: {missing}"
