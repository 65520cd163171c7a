"""The class that scores: its head against transformers, and what may not change a score."""

import json
import math

import pytest
import torch

from configurator import UserError
from formats import peft
from formats.chat_format import with_chat_tokens
from formats.tokenizer import Tokenizer
from generation import verifier as scoring
from generation.verifier import ScoredGPT, Verifier, answer_rows
from model import GPT
from tests.conftest import busy_model, tiny_config


@pytest.fixture(scope="module")
def folder(chat_folder, tmp_path_factory):
    """A verifier's folder: an adapter of rank 4 on q_proj, and a head with random weights."""
    path, generator = tmp_path_factory.mktemp("verifier") / "v", torch.Generator().manual_seed(3)
    base = GPT.from_pretrained(chat_folder)
    spec = peft.AdapterSpec(4, 8.0, 0.0, ("q_proj",), False, ("score",))
    state = {"score.weight": torch.randn(1, base.config.n_embd + 2, generator=generator) / 8}
    for name, parameter in base.named_parameters():
        if name.endswith("q_proj.weight"):
            prefix, (rows, columns) = name.removesuffix(".weight"), parameter.shape
            state[f"{prefix}.lora_A"] = torch.randn(4, columns, generator=generator) / 8
            state[f"{prefix}.lora_B"] = torch.randn(rows, 4, generator=generator) / 8
    digest = peft.weights_sha256(chat_folder)
    peft.write_adapter(path, state, spec, {"path": str(chat_folder), "sha256": digest})
    Tokenizer.load(chat_folder).save(path)
    return path


@pytest.fixture(scope="module")
def verifier(folder):
    return Verifier(folder, Tokenizer.load(folder))


def random_rows(count, seed=0, longest=40):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, longest, (count,), generator=generator).tolist()
    return [torch.randint(300, (length,), generator=generator).tolist() for length in lengths]


def test_scores_are_transformers_hidden_state_and_log_probabilities(folder, chat_folder, verifier, tmp_path):
    """The model with the adapter merged by PEFT: the last hidden state, and log p of the answer's tokens."""
    transformers, theirs = pytest.importorskip("transformers"), pytest.importorskip("peft")
    head = peft.read_adapter(folder)[0]["score.weight"][0]
    tensors = {name: tensor for name, tensor in peft.read_adapter(folder)[0].items() if "lora" in name}
    peft.write_adapter(tmp_path, tensors, peft.AdapterSpec(4, 8.0, 0.0, ("q_proj",), False),
                       {"path": str(chat_folder)})
    base = transformers.AutoModelForCausalLM.from_pretrained(chat_folder, dtype=torch.float32)
    model = theirs.PeftModel.from_pretrained(base, tmp_path).merge_and_unload().eval()
    rows = random_rows(6)
    for row, score in zip(rows, verifier.score_rows(rows, [[i >= 3 for i in range(len(r))] for r in rows]),
                          strict=True):
        with torch.no_grad():
            found = model(torch.tensor([row]), output_hidden_states=True)
        log_probs = found.logits[0, 2:-1].log_softmax(-1).gather(1, torch.tensor(row[3:])[:, None]).sum()
        expected = head[:-2] @ found.hidden_states[-1][0, -1] + head[-2] * log_probs + head[-1]
        assert score.item() == pytest.approx(1 / (1 + math.exp(-expected.item())), rel=1e-4)


def test_score_is_a_float32_number_per_answer(verifier):
    prompt, *answers = random_rows(8, seed=1)
    scores = verifier.score(prompt, answers)
    assert scores.shape == (7,) and scores.dtype == torch.float32 and ((scores > 0) & (scores < 1)).all()
    rows = [prompt + answer for answer in answers]
    marks = [[False] * len(prompt) + [True] * len(answer) for answer in answers]
    assert torch.equal(scores, verifier.score_rows(rows, marks))
    assert verifier.score(prompt, []).shape == (0,)


def test_a_score_does_not_depend_on_other_answers(verifier, monkeypatch):
    prompt, *answers = random_rows(8, seed=2)
    together = verifier.score(prompt, answers)
    alone = torch.cat([verifier.score(prompt, [answer]) for answer in answers])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 64)
    torch.testing.assert_close(verifier.score(prompt, answers), together, rtol=1e-5, atol=1e-6)


def test_the_likelihood_of_a_tools_result_does_not_count(verifier):
    """Row: 4 tokens of a prompt, 2 generated, 3 of a result, 2 generated."""
    row, marks = list(range(11)), [False] * 4 + [True] * 2 + [False] * 3 + [True] * 2
    batch = answer_rows([row], [marks], 64)
    assert batch["targets"].tolist() == [4, 5, 9, 10] and batch["positions"].tolist() == [3, 4, 8, 9]
    assert batch["last"].tolist() == [10] and batch["owners"].tolist() == [0] * 4


def test_a_batch_of_two_rows_by_hand():
    marks = [[False, True, True], [False, False, False, True, True]]
    batch = answer_rows([[5, 6, 7], [1, 2, 3, 4, 8]], marks, 4)
    # The second row keeps its last four tokens: 2 3 4 8.
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [2, 3, 4, 8]] and batch["last"].tolist() == [2, 3]
    assert batch["positions"].tolist() == [0, 1, 5, 6] and batch["targets"].tolist() == [6, 7, 4, 8]
    assert batch["owners"].tolist() == [0, 0, 1, 1]


def test_an_answer_longer_than_the_context_is_scored_by_its_end(verifier):
    (row,) = random_rows(1, seed=4, longest=6)
    long = (row * 40)[:100]
    end = long[-verifier.model.config.block_size:]
    assert torch.equal(verifier.score([1], [long]), verifier.score_rows([end], [[True] * len(end)]))


def test_folders_that_are_no_verifier(folder, chat_folder):
    tokenizer = Tokenizer.load(folder)
    with pytest.raises(UserError, match="is no verifier .verifier.py trains one"):
        Verifier(chat_folder, tokenizer)
    with pytest.raises(UserError, match="another tokenizer than the model's"):
        Verifier(folder, with_chat_tokens(Tokenizer.train(["another text"], 300)))
    with pytest.raises(UserError, match="score.weight has no place in its base model"):
        GPT.from_pretrained(folder)  # a verifier is no language model


def test_a_tokenizer_with_equal_ids_and_another_file_is_accepted(folder, verifier):
    """A .gguf export has the special tokens in the vocabulary, too."""
    own = Tokenizer.load(folder)
    vocab = own.definition["model"]["vocab"] | own.hf.get_vocab()
    other = Tokenizer(own.definition | {"model": own.definition["model"] | {"vocab": vocab}}, own.settings)
    assert other.definition != own.definition
    answers = [[3, 4], [5]]
    assert torch.equal(Verifier(folder, other).score([1, 2], answers), verifier.score([1, 2], answers))


def test_a_changed_base_is_refused(folder, chat_folder, tmp_path):
    model = busy_model(tiny_config(vocab_size=GPT.from_pretrained(chat_folder).config.vocab_size), seed=9)
    model.save_pretrained(tmp_path / "base")
    content = {"path": str(tmp_path / "base"), "sha256": "0" * 64}
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / peft.BASE).write_text(json.dumps(content))
    with pytest.raises(UserError, match="whose weights have changed"):
        ScoredGPT.from_pretrained(tmp_path)
