"""Models from strangers that cannot be used: each command prints one line and exits with 2."""

import gguf
import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import normalizers

import distill
import prepare
import sample
from configurator import run_script
from formats import chat_template
from formats.tokenizer import Tokenizer
from model import GPT
from tests.conftest import tiny_config
from tests.formats.test_gguf_reader import write


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["def main(args):\n    return args + 1234\n"] * 9, 300)


def stopped(main, argv, monkeypatch, capsys):
    """The line on stderr of a command that exits with 2."""
    monkeypatch.setattr("sys.argv", ["command", *argv])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1, line
    return line


@pytest.mark.parametrize("template, reason", [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than"),
    ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
    ("{{ raise_exception('no\nsystem') }}", "chat template: no system"),
])
def test_a_template_that_loops_or_raises(template, reason, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chat_template, "SECONDS", 0.1)
    folder = tmp_path / "model"
    GPT(tiny_config(n_layer=1, vocab_size=tokenizer.vocab_size)).save_pretrained(folder)
    Tokenizer(tokenizer.definition, tokenizer.settings | {"chat_template": template}).save(folder)
    chat = [f"--model={folder}", "--chat=True", "--device=cpu"]
    assert reason in stopped(sample.main, chat, monkeypatch, capsys)
    (tmp_path / "chats.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    argv = ["--kind=chat", f"--source={tmp_path / 'chats.jsonl'}", f"--tokenizer={folder}", "--num_proc=1",
            f"--out={tmp_path / 'data'}"]
    assert reason in stopped(prepare.main, argv, monkeypatch, capsys)


def test_a_gguf_file_that_is_cut_or_of_another_kind(tokenizer, tmp_path, monkeypatch, capsys):
    model = GPT(tiny_config(n_layer=1, vocab_size=tokenizer.vocab_size))
    path = tmp_path / "m.gguf"
    content = write(path, model, tokenizer).read_bytes()
    other = content.replace(b"llama", b"bloom")
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    big = (tmp_path / "big.gguf").read_bytes()
    for bad, reason in ((content[:-9], "cut: "), (content[:99], "not a GGUF file that can be read"),
                        (other, "architecture 'bloom' is not supported"), (big, "big-endian")):
        path.write_bytes(bad)
        line = stopped(sample.main, [f"--model={path}", "--prompt=a", "--device=cpu"], monkeypatch, capsys)
        assert reason in line, line


def test_a_teacher_whose_bytes_cannot_be_aligned(data, tmp_path, monkeypatch, capsys):
    """Its tokenizer makes all letters small."""
    hf = HFTokenizer.from_str(Tokenizer.train(["a b"], 257 + 3).hf.to_str())
    hf.normalizer = normalizers.Lowercase()
    GPT(tiny_config(n_layer=1, vocab_size=300)).save_pretrained(tmp_path / "teacher")
    hf.save(str(tmp_path / "teacher" / "tokenizer.json"))
    argv = [f"--dataset={data}", f"--teacher={tmp_path / 'teacher'}", "--align=bytes", "--device=cpu",
            "--block_size=64", f"--out_dir={tmp_path / 'out'}"]
    line = stopped(distill.main, argv, monkeypatch, capsys)
    assert "so its bytes cannot be aligned" in line, line
