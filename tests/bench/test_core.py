"""bench core: counts the questions on which nanochat and we agree, with a stand-in for nanochat."""

import json
import random

import pytest

from bench import core
from configurator import UserError

NANOCHAT = """def evaluate_example(index, model, tokenizer, rows, device, task):
    assert index != 3, "nanochat refuses this row"
    assert task["task_type"] == "multiple_choice" and task["num_fewshot"] == 0
    assert tokenizer(["a b"], prepend=tokenizer.get_bos_token_id())[0][0] == tokenizer.get_bos_token_id()
    return True
"""


def test_the_questions_are_compared_one_by_one(trained, tmp_path):
    rows = [{"query": "import", "choices": ["os", "zq\u00e9"], "gold": number % 2} for number in range(6)]
    (tmp_path / "copa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="no file nanochat/core_eval.py"):
        core.measure(core.Config(nanochat=str(tmp_path), data=str(tmp_path), model=str(trained)))
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "core_eval.py").write_text(NANOCHAT)
    results = core.measure(core.Config(nanochat=str(tmp_path), data=str(tmp_path), model=str(trained)))
    copa = results["tasks"]["copa"]
    assert (copa["questions"], copa["refused"], copa["right"]) == (6, 1, 3), "the first choice is likelier"
    random.Random(1337).shuffle(rows)
    assert copa["same"] == sum(row["gold"] == 0 for row in rows[:3] + rows[4:]), "theirs are all right"
    assert core.report(results).splitlines()[-1].split()[:2] == ["all", "6"]
