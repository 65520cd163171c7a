"""A tiny random T5 learns to copy; an adapter is saved in PEFT's form; mistakes have one line."""

import json
import random
import shutil

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors

from configurator import UserError
from evals.tasks.summarize import rouge
from formats.files import read_json
from tests.conftest import strangers_model
from tools.finetune_seq2seq import main

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
WORDS = ["red", "blue", "green", "cat", "dog", "fish", "tree", "lake"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5 with random weights and a tokenizer of words, and rows whose summary is the document."""
    folder = tmp_path_factory.mktemp("t5")
    words = ["<pad>", "</s>", "<unk>", "summarize", ":", *WORDS]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(folder / "model")
    transformers.set_seed(0)
    config = transformers.T5Config(
        vocab_size=len(words), d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4,
        num_decoder_layers=1, feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1, dropout_rate=0.0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    texts = sorted({" ".join(draw.choices(WORDS, k=draw.randint(1, 3))) for _ in range(600)})
    (folder / "rows.jsonl").write_text("".join(json.dumps({"dialogue": text, "summary": text}) + "\n"
                                               for text in texts))
    return folder


def run(folder, out, *more):
    main([f"--model={folder / 'model'}", f"--source={folder / 'rows.jsonl'}", f"--out_dir={out}",
          "--batch_size=32", "--summary_tokens=6", *more])
    return read_json(out / "results.json")


def test_a_random_t5_learns_to_copy(folder, tmp_path, capsys):
    results = run(folder, tmp_path / "out", "--lora_rank=0", "--learning_rate=5e-3", "--max_steps=150")
    before, after = (results["figures"][name]["rougeL"] for name in ("zero-shot", "tuned"))
    assert before["value"] < 0.1 and after["value"] > 0.5 and after["n"] == len(results["summaries"]) > 4
    rows = results["summaries"]
    others = [rouge(row["tuned"], other["summary"])["rougeL"] for row in rows for other in rows
              if row != other]
    assert sum(others) / len(others) < after["value"] - 0.25, "each summary is about its own document"
    assert f"| rougeL | {after['n']} | {before['value']:.4f} ± " in capsys.readouterr().out
    # What was saved writes the same summaries.
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    row = rows[0]
    ids = model.generate(**tokenizer(f"summarize: {row['document']}", return_tensors="pt"), max_new_tokens=6)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == row["tuned"]


def test_an_adapter_is_trained_and_saved(folder, tmp_path):
    results = run(folder, tmp_path / "out", "--lora_rank=4", "--max_steps=3", "--limit=1")
    config = peft.PeftConfig.from_pretrained(tmp_path / "out")
    assert (config.r, config.lora_alpha, config.task_type) == (4, 8, "SEQ_2_SEQ_LM")
    assert results["settings"]["max_steps"] == 3 and len(results["summaries"]) == 1
    again = run(folder, tmp_path / "again", "--lora_rank=4", "--max_steps=3", "--limit=1")
    assert again["summaries"] == results["summaries"]


def test_mistakes_of_the_user(folder, tmp_path):
    with pytest.raises(UserError, match="model=.*absent"):
        main([f"--model={tmp_path / 'absent'}", f"--source={folder / 'rows.jsonl'}"])
    (tmp_path / "one.jsonl").write_text('{"document": "a", "summary": "b"}\n')
    with pytest.raises(UserError, match="needs rows for training and for validation; there are 1 and 0"):
        main([f"--source={tmp_path / 'one.jsonl'}"])
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="bad.jsonl:1: not a row of summarize"):
        main([f"--source={tmp_path / 'bad.jsonl'}"])
    with pytest.raises(UserError, match="max_steps=0: must be positive"):
        main(["--max_steps=0"])


def test_a_model_that_brings_code_or_a_pickle_is_refused(folder, tmp_path, monkeypatch):
    """Even if the terminal would answer "y" to the question of transformers."""
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    strange = strangers_model(tmp_path / "model", "AutoModelForSeq2SeqLM", tmp_path / "bang")
    for file in (folder / "model").glob("*token*"):
        shutil.copy(file, strange)
    rows = f"--source={folder / 'rows.jsonl'}"
    with pytest.raises(UserError, match="model=.*custom code"):
        main([f"--model={strange}", rows, f"--out_dir={tmp_path / 'out'}"])
    assert not (tmp_path / "bang").exists()
    shutil.copytree(folder / "model", tmp_path / "old")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(UserError, match="model=.*safetensors"):
        main([f"--model={tmp_path / 'old'}", rows, f"--out_dir={tmp_path / 'out'}"])
