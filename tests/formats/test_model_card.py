"""The model card: its front matter as the hub reads it, and every number compared with its file."""

import hashlib
import json
import shutil

import pytest
from huggingface_hub import ModelCard

import sft
from configurator import UserError
from formats import checkpoint, hf
from formats.hf import model_sha256
from formats.model_card import Exported, card, commit, lineage, shown, summary
from formats.peft import weights_sha256
from formats.tokenizer import Tokenizer
from model import GPT, GPTConfig
from tests.conftest import tiny_config
from tests.test_export import run


@pytest.fixture(scope="module")
def pipeline(trained, chats, tmp_path_factory):
    """An out_dir of sft.py, started from `trained`, with two checkpoints."""
    out = tmp_path_factory.mktemp("card") / "chatty"
    sft.main([f"--init_from={trained}", f"--dataset={chats}", f"--out_dir={out}", "--block_size=64",
              "--global_batch_size=4", "--micro_batch_size=4", "--max_steps=4", "--save_interval=2",
              "--eval_interval=2", "--device=cpu", "--eval_tokens=256", "--log_interval=1"])  # fmt: skip
    return out


@pytest.fixture
def copied(pipeline, tmp_path):
    return shutil.copytree(pipeline, tmp_path / "chatty")


def card_of(model, **changes):
    folder = hf.find_folder(model)
    fields = {"format": "hf", "gguf_kind": "q8_0", "license": None} | changes
    return card(Exported(str(model), folder, GPTConfig.read(folder), Tokenizer.load(folder),
                         parameters=1_234_567, title="mine", **fields))


def results(folder):
    """The content of a results.json of eval.py, with the model in `folder` and another model."""
    figures = {"accuracy": {"value": 0.8275, "stderr": 0.0217, "n": 300}}
    tasks = {"problems": {"figures": figures}, "mmlu": {"figures": {"acc": {"value": 0.26, "n": 9}}}}
    return {"settings": {"limit": 300, "shots": None, "dtype": "float32"}, "models": [
        {"weights_sha256": "of another", "tasks": {"hard": {"figures": {"accuracy": {"value": 0.1}}}}},
        {"weights_sha256": weights_sha256(folder), "tasks": tasks}]}


def test_the_hub_reads_it(copied):
    (copied / "results.json").write_text(json.dumps(results(hf.find_folder(copied))))
    data = ModelCard(card_of(copied, license="mit")).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "text-generation")
    assert data.tags == ["nanollama", "llama", "conversational"]
    assert {(each.dataset_name, each.metric_type, each.metric_value) for each in data.eval_results} == {
        ("problems", "accuracy", 0.8275), ("mmlu", "acc", 0.26)}


def test_without_a_license_none_is_named(copied):
    assert "license" not in card_of(copied).split("---")[1]


def test_every_number_is_in_its_file(copied, trained, chats, data):
    (copied / "results.json").write_text(json.dumps(results(hf.find_folder(copied))))
    text = card_of(copied)
    events = {}
    for out in (trained, copied):
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        events[out] = ([e for e in lines if "tokens" in e][-1], [e for e in lines if "val_loss" in e][-1])
    for out, name, kind in ((trained, "trained", "pre-training"), (copied, "chatty", "fine-tuning")):
        trained_by, validated = events[out]
        dataset = shown(str(data if out == trained else chats))
        assert f"| {kind} ({name}) | {dataset} | {trained_by['step']} | {trained_by['tokens']:,} | " \
            f"{validated['val_loss']:.6g} |" in text
    assert "| setting | trained | chatty |" in text and "| global_batch_size | 8 | 4 |" in text
    meta = json.loads((chats / "meta.json").read_text())
    documents, tokens = (sum(meta[key].values()) for key in ("documents", "tokens"))
    assert f"| {chats.name} | `problems` | {documents:,} | {tokens:,} |" in text
    assert "| problems | accuracy | 0.8275 | 0.0217 | 300 |" in text and "| hard |" not in text
    assert "Measured by `eval.py` with limit=300, dtype=float32." in text
    assert weights_sha256(hf.find_folder(copied)) in text and commit() in text
    assert "A llama model with 1,234,567 parameters: 2 layers, width 64, 4 query heads, 2 key/value" in text


def test_experts_are_counted_in_the_summary():
    config = tiny_config(n_expert=4, n_expert_per_token=2, expert_size=32)
    assert "2 key/value heads, 4 experts of width 32, 2 per token, 500 token ids" in summary(config, 1)
    config = tiny_config(n_expert=4, n_expert_per_token=2, expert_size=32, dense_layers=[0])
    assert "2 per token (MLP width 128 in the blocks [0]), 500 token ids" in summary(config, 1)


def test_settings_that_change_in_stages_are_in_the_table(copied):
    assert "| stages |" not in card_of(copied)
    run = json.loads((copied / "run.json").read_text())
    run["config"]["stages"] = [{"steps": 2, "block_size": 32}, {"steps": 2, "dataset": "/data/a"}]
    (copied / "run.json").write_text(json.dumps(run))
    stages = "[{'steps': 2, 'block_size': 32}, {'steps': 2, 'dataset': 'a'}]"
    assert f"| stages | [] | {stages} |" in card_of(copied)


def test_an_earlier_checkpoint_has_its_own_numbers(copied):
    text = card_of(copied / "step_000002")
    assert "| fine-tuning (chatty) | " in text and " | 2 | " in text.split("fine-tuning (chatty)")[1][:60]


def test_a_value_logged_before_the_checkpoint_has_its_step(copied):
    """With log_interval=10 a checkpoint may be a few steps later than the last event of the log."""
    path = copied / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line["step"] < 4 or "val_loss" in line]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokens = next(line["tokens"] for line in lines if line["step"] == 3)
    assert f" | 4 | {tokens:,} (step 3) | {lines[-1]['val_loss']:.6g} |" in card_of(copied / "step_000004")


def test_no_path_of_this_machine_is_in_the_card(copied, trained, chats):
    """The runs of this test have absolute paths; the card has the last part of each."""
    text = card_of(copied)
    run_config = json.loads((copied / "run.json").read_text())["config"]
    assert run_config["init_from"] == str(trained) and str(trained) not in text
    assert "`*.py,*.py`" in text and "`/" not in text, "the source of the text, without its folder"
    assert str(chats.parent) not in text
    assert shown(f"{chats}:0.5,a/b:0.5") == f"{chats.name}:0.5,a/b:0.5"


@pytest.mark.parametrize("change", ["deleted", "rebuilt"])
def test_a_rebuilt_data_set_is_not_described(change, pipeline, chats):
    """Its source is not that of the data that was trained on."""
    file = chats / "meta.json"
    before, digest = file.read_text(), hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text(before.replace('"problems"', '"elsewhere"')) if change == "rebuilt" else file.unlink()
    try:
        text = card_of(pipeline)
    finally:
        file.write_text(before)
    assert f"| {chats.name} | no longer available | ? | ? | `{digest[:16]}` |" in text
    assert "elsewhere" not in text


def test_missing_information_is_stated(copied, tmp_path):
    alone = shutil.copytree(hf.find_folder(copied), tmp_path / "alone" / "model")
    text = card_of(alone)
    assert "there is no run of nanollama next to this model" in text and "Not measured" in text
    assert "## Data" not in text


def test_the_lineage_ends_where_a_folder_is_missing(copied):
    run_json = json.loads((copied / "run.json").read_text())
    run_json["config"]["init_from"] = "nowhere/base"
    (copied / "run.json").write_text(json.dumps(run_json))
    assert [run.name for run in lineage(str(copied))] == ["chatty"]
    assert "The first of these runs started from nowhere/base." in card_of(copied)
    run_json["config"]["init_from"] = str(copied)  # a circle
    (copied / "run.json").write_text(json.dumps(run_json))
    assert [run.name for run in lineage(str(copied))] == ["chatty"]


@pytest.mark.parametrize("change", ["none", "deleted", "trained on"])
def test_the_lineage_ends_where_the_weights_have_changed(change, copied, trained, tmp_path):
    base = shutil.copytree(trained, tmp_path / "base")
    run_json = json.loads((copied / "run.json").read_text())
    run_json["config"]["init_from"] = str(base)
    (copied / "run.json").write_text(json.dumps(run_json))
    if change == "deleted":
        checkpoint.remove_checkpoints(base)
    if change == "trained on":
        GPT(GPTConfig.read(hf.find_folder(base)), seed=1).save_pretrained(hf.find_folder(base))
    names = ["base", "chatty"] if change == "none" else ["chatty"]
    assert [run.name for run in lineage(str(copied))] == names


def test_a_student_cut_from_its_teacher_follows_it(copied, trained):
    run_json = json.loads((copied / "run.json").read_text())
    run_json["config"] |= {"init_from": None, "teacher": str(trained), "student_layers": "last:1"}
    for digest, names in ((model_sha256(hf.find_folder(trained)), ["trained", "chatty"]),
                          ("of another", ["chatty"])):
        run_json["identity"] = {"data": {}, "teacher": digest}
        (copied / "run.json").write_text(json.dumps(run_json))
        assert [run.name for run in lineage(str(copied))] == names


@pytest.mark.parametrize("name, content", [
    ("run.json", "{"), ("run.json", "[]"), ("run.json", '{"config": 3}'), ("results.json", "x"),
    ("results.json", "[3]")])  # fmt: skip
def test_damaged_files_are_one_line(name, content, copied):
    (copied / name).write_text(content)
    with pytest.raises(UserError, match=name):
        card_of(copied)


def test_a_truncated_log_is_read(copied):
    with open(copied / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "val_lo')
    assert "| fine-tuning (chatty) | " in card_of(copied)


def test_it_is_what_export_writes(copied, tmp_path):
    (copied / "results.json").write_text(json.dumps(results(hf.find_folder(copied))))
    uses = {"hf": 'pipeline("text-generation", model="chatty")', "gguf": "chatty-q8_0.gguf"}
    for format, expected in uses.items():
        text = (run(copied, tmp_path / format, f"--format={format}") / "README.md").read_text()
        assert expected in text and "| problems | accuracy | 0.8275 |" in text
        assert ModelCard(text).data.library_name == {"hf": "transformers", "gguf": "gguf"}[format]
