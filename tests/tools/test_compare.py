"""tools/compare.py: its numbers are those of distill.py, and the page can hold any text of a model."""

import os
import re

import pytest

import export
from configurator import UserError
from formats import files, hf
from formats.tokenizer import Tokenizer
from generation.generate import Sampling, generate
from model import GPT
from tests.conftest import busy_model, tiny_config
from tests.test_distill import LAYER_LOSSES, PRUNED, run
from tools import compare

MORE = ["--eval_tokens=1024", "--max_new_tokens=12"]


@pytest.fixture(scope="module")
def distilled(trained, data, tmp_path_factory):
    """A student that has projections, and the last event of its log."""
    out = tmp_path_factory.mktemp("compare") / "student"
    return out, run(trained, data, out, *LAYER_LOSSES)[-1]


def page(trained, student, dataset, *more):
    compare.main([str(trained), str(student), f"--dataset={dataset}", *MORE, *more])
    return (student / "compare.md").read_text(encoding="utf-8")


def cells(text):
    """{name of a row of the table: [the teacher's cell, the student's cell]}."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: values for name, *values in lines[1:]}


def test_numbers_are_those_of_the_run(trained, data, distilled, capsys):
    out, logged = distilled
    text = page(trained, out, data)
    rows = cells(text)
    assert rows["validation loss, nats per token"] == [
        f"{logged['val_teacher_loss']:.4f}", f"{logged['val_loss']:.4f}"]  # fmt: skip
    assert rows["perplexity"][1] == f"{logged['val_perplexity']:,.2f}"
    bits = logged["val_bits_per_byte"], logged["val_teacher_loss"] / logged["val_loss"]
    assert rows["bits per byte"] == [f"{bits[0] * bits[1]:.4f}", f"{bits[0]:.4f}"]
    assert f"KL(teacher || student) is {logged['val_kl']:.4f} nats" in text
    assert f"likely token at {100 * logged['val_agreement']:.1f} % of the positions" in text
    models = [GPT.from_pretrained(folder) for folder in (trained, out)]
    assert rows["parameters"] == [f"{model.num_parameters():,}" for model in models]
    for shown, model in zip(rows["weights on disk, MB"], models, strict=True):
        weights = 4 * model.num_parameters() / 1e6  # without the projections
        assert float(shown) == pytest.approx(weights, abs=0.01)
    assert all(float(speed.replace(",", "")) > 0 for speed in rows["greedy tokens/s"])
    printed = capsys.readouterr().out
    assert "| perplexity |" in printed and printed.endswith(f"{out / 'compare.md'}: written\n")


def test_the_size_of_a_gguf_file(trained, data, tmp_path):
    export.main([f"--model={trained}", "--format=gguf", "--quantize=f16", f"--out={tmp_path / 'gguf'}"])
    file, = (tmp_path / "gguf").glob("*.gguf")
    compare.main([str(trained), str(file), f"--dataset={data}", *MORE, f"--out={tmp_path / 'page.md'}"])
    shown = cells((tmp_path / "page.md").read_text(encoding="utf-8"))["weights on disk, MB"]
    assert shown[1] == f"{file.stat().st_size / 1e6:,.2f}" != "0.00"


def test_chats_have_no_bits_per_byte(trained, chats, data, tmp_path):
    """The teacher is compared with itself, so both columns are equal."""
    import sft

    short = [word for word in PRUNED if "layers" not in word]
    sft.main([*short, "--sample_answers=0", f"--init_from={trained}", f"--dataset={chats}",
              f"--out_dir={tmp_path / 'a'}"])
    text = page(tmp_path / "a", tmp_path / "a", chats)
    assert "bits per byte" not in text
    assert float(re.search(r"\) is (\S+) nats", text)[1]) == pytest.approx(0, abs=1e-4)
    teacher, student = cells(text)["validation loss, nats per token"]
    assert teacher == student and "the same most likely token at 100.0 %" in text


def test_what_they_write(trained, data, distilled, tmp_path):
    """The texts are those of `generate` for both models; a seed fixes the samples."""
    out, _ = distilled
    (tmp_path / "prompts.txt").write_text("import sys\r\n\n    def a(self):\n")
    argv = [f"--prompts={tmp_path / 'prompts.txt'}", "--seed=3", "--temperature=0.7"]
    first, second = (page(trained, out, data, *argv).split("## What they write")[1] for _ in range(2))
    assert first == second != page(trained, out, data, *argv, "--seed=4").split("## What they write")[1]
    blocks = re.findall(r"^(`{3,})text\n(.*?)\n\1$", first, flags=re.S | re.M)
    texts = [text for _, text in blocks]
    assert len(texts) == 6 and (texts[0], texts[3]) == ("import sys", "    def a(self):")
    tokenizer = Tokenizer.load(data)
    for place, folder in enumerate((trained, out), 1):
        model, how = GPT.from_pretrained(folder).eval(), Sampling(temperature=0.7, seed=3)
        ids = [tokens[0] for tokens in generate(model, [tokenizer.encode("import sys")], 12, how)]
        ids = ids[: ids.index(tokenizer.eot_id)] if tokenizer.eot_id in ids else ids
        assert texts[place] == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "text, fence", [("", 3), ("a", 3), ("```\n# out", 4), ("a ````` b ``", 6), ("~~~\n</td></table>", 3)]
)
def test_no_text_leaves_its_fence(text, fence):
    marks = "`" * fence
    assert compare.fenced(text) == f"{marks}text\n{text}\n{marks}"
    markdown = pytest.importorskip("markdown_it").MarkdownIt().parse(compare.fenced(text))
    assert [token.content for token in markdown if token.type == "fence"] == [f"{text}\n"]


def test_the_page_is_replaced_in_one_step(trained, data, distilled, tmp_path, monkeypatch):
    target = tmp_path / "pages" / "compare.md"
    target.parent.mkdir()
    files.write_text(target, "old")
    replace = os.replace

    def fails(source, path):
        assert target.read_text() == "old" and source.read_text() == "new"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="No space left on device: '.*compare.md'"):
        files.write_text(target, "new")
    assert [path.name for path in target.parent.iterdir()] == ["compare.md"] and target.read_text() == "old"
    monkeypatch.setattr(os, "replace", replace)
    files.write_text(target, "new")
    assert target.read_text() == "new"


def test_two_models_are_named():
    with pytest.raises(UserError, match="name two models"):
        compare.main(["out/base"])


def test_mistakes_are_one_line(trained, data, distilled, tmp_path):
    out, _ = distilled
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"d\xe9ux\n")
    tokenizer, other = Tokenizer.load(data), Tokenizer.train(["another text " * 9], 300)
    for name, its, size in (("small", tokenizer, 499), ("other", other, 512)):
        busy_model(tiny_config(vocab_size=size)).save_pretrained(tmp_path / name)
        its.save(tmp_path / name)
    for more, message in (
        (["--eval_tokens=0"], "eval_tokens=0: must be positive"),
        (["--temperature=-1"], "temperature=-1.0: must be between"),
        ([f"--prompts={tmp_path / 'blank.txt'}"], "blank.txt: no prompts in it"),
        ([f"--prompts={tmp_path / 'latin.txt'}"], "latin.txt: not text"),
        (["--dataset=nowhere"], "no data set here"),
        (["--out=some/one.md"], "out=some/one.md: some is no folder; give the place of the page"),
    ):
        with pytest.raises(UserError, match=message) as error:
            page(trained, out, data, *more)
        assert "\n" not in str(error.value)
    for name in ("small", "other"):
        with pytest.raises(UserError, match=f"{name}: its token ids are not those of dataset=") as error:
            page(tmp_path / name, out, data)
        assert "\n" not in str(error.value)
    assert hf.find_folder(out).is_dir()
