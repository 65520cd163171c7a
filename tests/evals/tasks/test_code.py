"""HumanEval and MBPP: right and wrong programs; programs that loop, eat memory, write or fork."""

import json
import os
import re
import resource
import time

import pytest

from configurator import UserError
from evals.lm import LM
from evals.tasks import code
from evals.tasks.code import run_program

HUMANEVAL = {"task_id": "HumanEval/0", "prompt": 'def add(a, b):\n    """The sum."""\n', "entry_point": "add",
             "canonical_solution": "    return a + b\n",
             "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n"}
MBPP = [{"task_id": number, "text": f"Add {number}.", "code": f"def f(a):\n  return a + {number}",
         "test_list": [f"assert f(1) == {number + 1}"], "test_setup_code": "import math"}
        for number in (2, 3, 4, 11, 12, 511)]


@pytest.mark.parametrize("program, outcome", [
    ("assert 1 + 1 == 2", "passed"), ("assert 1 + 1 == 3", "AssertionError"), ("def f(:", "SyntaxError"),
    ("import sys; sys.exit()", "ended by 0"),
    ("import os; os._exit(0)", "ended by 0"), ("raise SystemExit", "ended by 0"),
    ("print('\\ud800')", "UnicodeEncodeError"), ("input()", "EOFError"),
    ("import os; assert not dict(os.environ), dict(os.environ)", "passed|AssertionError: .*LC_CTYPE"),
    ("import os; assert len(os.listdir()) == 1", "passed"),
    ("print('x' * 10**6)\n" * 20, "passed"),  # nobody reads it
    # What reaches its end has passed, whatever its folder is and whatever "open" means there.
    ("import os\nos.chdir('/')", "passed"), ("from os import *", "passed"),
    ("def open(door): pass", "passed"),
    ("import os\nfor _ in range(3000): os.mkdir('a'), os.chdir('a')", "passed"),  # the folders are deleted
    ("if __name__ == '__main__':\n  input()", "passed"),  # a module, as in lm-eval
])
def test_programs(program, outcome):
    assert re.match(outcome, run_program(program))


@pytest.mark.parametrize("program, outcome", [
    ("x = bytearray(10 * 2**30)", "MemoryError"),
    ("x = []\nwhile True: x.append(' ' * 2**20)", "MemoryError"),
    ("open('big', 'w').write('x' * 2**21)", "OSError: .*File too large|ended by -25"),
    ("import os\nos.fork()", "BlockingIOError"),
    ("import os\nwhile True:\n  try: os.fork()\n  except OSError: break\nassert 0", "AssertionError"),
    ("import threading\nthreading.Thread(target=print).start()", "RuntimeError"),
    ("import subprocess\nsubprocess.run(['ls'])", "BlockingIOError"),
    ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))", "ValueError"),
])
def test_hostile_programs(program, outcome):
    begin = time.monotonic()
    assert re.match(outcome, said := run_program(program)) and said != "passed", said
    assert time.monotonic() - begin < 15


def test_time_is_limited(monkeypatch):
    monkeypatch.setattr(code, "LAUNCHER", code.LAUNCHER.replace("'CPU': 5", "'CPU': 1"))
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run_program("while True: pass") in ("ended by -24", "ended by -9")
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime < 2  # of CPU, on a busy machine too
    monkeypatch.setattr(code, "SECONDS", 1)
    assert run_program("import time\ntime.sleep(99)") == "more than 1 s"


def test_a_program_cannot_write_where_its_user_cannot(tmp_path):
    """As root, the program is "nobody"; otherwise it has the rights of the user."""
    place = tmp_path / "file"
    said = run_program(f"open({str(place)!r}, 'w').write('x')")
    if os.geteuid() == 0:
        assert said.startswith("PermissionError") and not place.exists()


def write(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_tasks(trained, tmp_path, monkeypatch):
    write(tmp_path, "humaneval", [HUMANEVAL] * 3)
    write(tmp_path, "mbpp", MBPP)
    lm, asked = LM(str(trained), device="cpu"), []

    def scored(name, texts):
        monkeypatch.setattr(lm, "generate_until", lambda *words: asked.append(words) or texts)
        questions = code.load(str(tmp_path), 500, None, name, True)
        return [answer["outcome"] for answer in code.score(lm, questions, name, True).answers]

    texts = ["    return a + b\n", "    return a - b", "```python\ndef add(a, b):\n  return 3\n```"]
    assert scored("humaneval", texts) == ["passed", "AssertionError", "passed"]
    assert asked[0] == ([HUMANEVAL["prompt"]] * 3, code.STOPS["humaneval"], 1024)
    texts = ["def f(a):\n  return a + 11", "def f(a): return 0"]
    assert scored("mbpp", texts) == ["passed", "AssertionError"]
    prompt = ("You are an expert Python programmer, and here is your task: Add {0}. Your code should pass "
              "these tests:\n\nassert f(1) == {1}\n[BEGIN]\n")
    shots = "".join(prompt.format(n, n + 1) + f"def f(a):\n  return a + {n}\n[DONE]\n\n" for n in (2, 3, 4))
    assert asked[1][0] == [shots + prompt.format(n, n + 1) for n in (11, 12)]
    with pytest.raises(UserError, match="executes the programs that the model writes: --allow_code=True"):
        code.load(str(tmp_path), 500, None, "humaneval", False)
    write(tmp_path, "mbpp", [MBPP[0] | {"task_id": "Mbpp/2"}])
    with pytest.raises(UserError, match="mbpp.jsonl: row 1 does not fit this benchmark .*'Mbpp/2'"):
        code.load(str(tmp_path), 500, None, "mbpp", True)
