"""modeling/devices.py: how many threads a process uses."""

import math

import pytest
import torch

from configurator import UserError
from modeling import devices


def cgroup(tmp_path, files, own=""):
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    return devices.cgroup_cores(tmp_path / "root", tmp_path / "own")


@pytest.mark.parametrize("files, own, cores", [
    ({}, "", math.inf),
    ({"cpu.max": "max 100000\n"}, "0::/\n", math.inf),
    ({"cpu.max": "250000 100000\n"}, "0::/\n", 2.5),
    ({"job/cpu.max": "max 100000", "cpu.max": "400000 100000"}, "1:cpu:/x\n0::/job/step\n", 4),
    ({"job/step/cpu.max": "100000 100000", "cpu.max": "400000 100000"}, "0::/job/step\n", 1),
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/\n", math.inf),
    ({"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/\n", 1.5),
    ({"cpu.max": "nonsense"}, "", math.inf),
])
def test_the_limit_of_a_container(tmp_path, files, own, cores):
    assert cgroup(tmp_path, files, own) == cores


@pytest.fixture
def four_cores(monkeypatch):
    """A machine with four cores that nobody uses, and torch as it starts there."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(devices, "cgroup_cores", lambda: math.inf)
    monkeypatch.setattr(devices, "busy_cores", lambda cores: 0.1)
    torch.set_num_threads(4)
    yield monkeypatch
    torch.set_num_threads(1)


def test_threads(four_cores):
    assert devices.use_threads(None) == "" and torch.get_num_threads() == 4
    four_cores.setattr(devices, "busy_cores", lambda cores: 3.2)
    assert "keep 3.2 of 4 cores busy" in (note := devices.use_threads(None)) and "--threads=1 " in note
    assert torch.get_num_threads() == 4  # never chosen by the load
    assert devices.use_threads(2) == "" and torch.get_num_threads() == 2
    for threads in (0, -1, 10**9):
        with pytest.raises(UserError, match=f"threads={threads}: must be from 1 to 1024"):
            devices.use_threads(threads)
    four_cores.setattr(devices, "busy_cores", lambda cores: 1.9)
    assert devices.use_threads(None) == ""  # two of four are free


def test_a_container_lowers_the_threads(four_cores):
    four_cores.setattr(devices, "cgroup_cores", lambda: 2.5)
    assert devices.use_threads(None) == "" and torch.get_num_threads() == 2
    four_cores.setattr(devices, "cgroup_cores", lambda: 0.5)
    assert devices.use_threads(None) == "" and torch.get_num_threads() == 1
    four_cores.setenv("OMP_NUM_THREADS", "4")
    torch.set_num_threads(4)
    assert devices.use_threads(None) == "" and torch.get_num_threads() == 4  # the user's choice


def test_the_busy_cores_of_this_machine():
    assert 0 <= devices.busy_cores({0}, 0.05) <= 1
