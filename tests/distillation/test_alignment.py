"""A teacher with another tokenizer: spans by hand, the loss and its gradient in float64 by hand, equal
tokenizers against ordinary distillation, hostile text, chats, a cache, and mistakes of the user."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

import distill
from configurator import UserError, configure
from dataset.chat_rows import ChatRows, chat_batch
from dataset.dataloader import Rows, text_batch
from dataset.shards import DataFolder
from distillation.alignment import AlignedRows, Aligner, cached_spans, match_spans
from distillation.divergences import (
    DenseTeacher,
    Objective,
    SparseTeacher,
    linear_distillation,
    select_targets,
)
from distillation.teacher_cache import decode, encode, record_type
from formats import hf
from formats.chat_format import with_chat_tokens
from formats.tokenizer import Tokenizer
from model import GPT
from prepare import PrepareConfig, prepare
from tests.runs import events, losses
from tests.test_distill import cache, on_two_ranks, run

CPU = torch.device("cpu")
TEXT = "def main(args):\n    return args + 1234  # naïve 日本\n" * 4


def bpe(vocab, text=TEXT):
    return Tokenizer.train([text], vocab)


def saved(tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(student's tokenizer, aligner to a teacher whose tokenizer has fewer merges)."""
    student, folder = bpe(330), saved(bpe(280, TEXT[::-1] + TEXT), tmp_path_factory.mktemp("t"))
    return student, Aligner(student, folder, 512, CPU)


def sentencepiece(scheme="always", normalizer=None, pieces=()):
    """A BPE that spells spaces as the marker and unknown bytes as <0x..>."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁",
              *sorted(set("defmain(args):return+1234#b") | {"▁a", "ar"}), *pieces]
    hf_tokenizer = HFTokenizer(models.BPE(vocab={piece: k for k, piece in enumerate(pieces)},
                                          merges=[("▁", "a"), ("a", "r")], byte_fallback=True,
                                          unk_token="<unk>", fuse_unk=False))
    if normalizer:
        hf_tokenizer.normalizer = normalizer
    hf_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    hf_tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                              decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    hf_tokenizer.add_special_tokens(["<s>", "</s>"])
    definition = json.loads(hf_tokenizer.to_str())
    return Tokenizer(definition, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
                                  "eos_token": "</s>"})


# ---- Spans ------------------------------------------------------------------------------------------------

@pytest.mark.fast
def test_spans_by_hand():
    """def|_main|() :  against  def|_ma|in|()|_:  and bytes 5 to 7 that the teacher lacks."""
    def spans(*sides):
        return match_spans(*(np.array(tokens).reshape(-1, 3) for tokens in sides)).tolist()

    ours = [(0, 0, 3), (1, 3, 8), (2, 8, 12)]
    theirs = [(9, 0, 0), (0, 0, 3), (1, 3, 6), (2, 6, 8), (3, 8, 10), (4, 10, 12)]
    assert spans(ours, theirs) == [[0, 1, 1, 2], [1, 2, 2, 4], [2, 3, 4, 6]]
    gap = [(0, 0, 3), (1, 3, 5), (2, 7, 8), (3, 8, 12)]
    assert spans(ours, gap) == [[0, 1, 0, 1], [2, 3, 3, 4]]
    gap = [(0, 0, 3), (1, 8, 12), (2, 12, 12)]
    assert spans(ours, gap) == [[0, 1, 0, 1], [2, 3, 1, 2]]
    assert spans([(0, 0, 3), (1, 3, 6)], [(0, 3, 6)]) == [[1, 2, 0, 1]]
    assert spans([(0, 0, 2)], [(0, 0, 1)]) == [] == spans([], theirs)


@pytest.mark.fast
@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_tokens_tile_the_text(tmp_path, scheme):
    """Both sides' tokens spell the same bytes, also with a sentencepiece marker and cut characters."""
    student = bpe(300)
    aligner = Aligner(student, saved(sentencepiece(scheme), tmp_path), 512, CPU)
    ids = [student.eot_id, *student.encode(TEXT[:90])]
    ours, theirs = aligner.tokens(ids)
    assert [index for index, _, _ in ours] == ids
    text = student.decode(ids[1:]).encode()
    assert ours[-1][2] == theirs[-1][2] == 1 + len(text)
    for index, begin, end in theirs:
        if end > begin > 0 and index not in aligner.teacher.special_ids:
            assert aligner.theirs[index].endswith(text[begin - 1:end - 1])
    spans = match_spans(ours, theirs)
    assert spans[0].tolist() == [0, 1, 0, 1], "the end-of-text tokens are a span"
    assert sum(b - a for a, b, _, _ in spans) == len(ids), "every token is in a span"
    # A row that begins and ends within characters: their bytes have no token of the teacher.
    broken = [student.token_id(letter) for letter in "¥æ"] + student.encode(" ab")
    ours, theirs = aligner.tokens(broken)
    assert len(ours) == len(broken) and match_spans(ours, theirs)[0][0] == 2


@pytest.mark.fast
def test_random_ids_always_align(pair):
    """Any ids at all: spans are in order, tile on both sides, and no batch raises."""
    student, aligner = pair
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(student.vocab_size, size=(3, 33))
        batch = aligner.align(text_batch(ids, student.eot_id if seed % 2 else None))
        assert sorted(batch["positions"].tolist()) == list(range(96))
        assert batch["targets"].tolist() == ids[:, 1:].flatten()[batch["positions"]].tolist()
        assert (batch["longer_slots"] < batch["teacher_input_ids"].numel()).all()
        assert len(batch["exact_slots"]) + len(batch["span_of"]) <= 96


@pytest.mark.fast
def test_bos_stands_once_before_each_document(tmp_path):
    """Ours has none: the teacher's begins rows and documents. Equal names: the student's stands for it."""
    def with_bos(tokenizer, folder):
        definition = tokenizer.definition | {"post_processor": {
            "type": "TemplateProcessing", "pair": [], "special_tokens": {
                "<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}]}}
        return saved(Tokenizer(definition, tokenizer.settings), folder)

    folder, ours = with_bos(sentencepiece(), tmp_path / "t"), bpe(300)
    aligner = Aligner(ours, folder, 512, CPU)
    a, end = ours.encode("a"), ours.eot_id
    letter = aligner.teacher.encode("a", inside=True)
    assert aligner.tokens([*a, end, *a])[1][:, 0].tolist() == [1, *letter, 2, 1, *letter]
    changed = sentencepiece(pieces=["other"])
    student = Tokenizer.load(with_bos(changed, tmp_path / "s"))
    aligner = Aligner(student, folder, 512, CPU)
    ids = [1, *student.encode("a"), 2]
    assert not aligner.same and aligner.tokens(ids)[1][:, 0].tolist() == [1, *letter, 2]


# ---- The loss ---------------------------------------------------------------------------------------------

def first_token(aligner, index):
    """The student's first token of a text of the teacher; None for a special token that it lacks, and for
    bytes that are no text and no token of the student."""
    if index in aligner.special.values():
        return next(ours for ours, theirs in aligner.special.items() if theirs == index)
    text = aligner.theirs[index]
    if text in aligner.ours and text:
        return len(aligner.ours) - 1 - aligner.ours[::-1].index(text)
    try:
        return aligner.student.encode(text.decode(), inside=True)[0]
    except (IndexError, UnicodeDecodeError):
        return None


def by_hand(z, y, batch, aligner, T, alpha):
    """The loss in float64, from student logits z (B T, V) and teacher logits y (B T', V'), span by span."""
    log_p, log_q = (z / T).log_softmax(-1), (y / T).log_softmax(-1)
    begins = [first_token(aligner, index) for index in range(y.shape[1])]
    ours = sorted({index for index in begins if index is not None})
    assert len(ours) < z.shape[1], "some tokens of the student are a class"
    first, kd = len(batch["exact_slots"]), 0.0
    for k in range(first):
        p, q = log_p[batch["positions"][k]].exp(), log_q[batch["exact_slots"][k]].exp()
        p = torch.cat((p[ours], 1 - p[ours].sum()[None]))
        q = torch.stack([q[[index for index, begin in enumerate(begins) if begin == each]].sum()
                         for each in ours])
        q = torch.cat((q, 1 - q.sum()[None]))
        kd = kd + (q * (q / p).log()).sum()
    for s in range(batch["spans"]):
        members = first + (batch["span_of"] == s).nonzero()[:, 0]
        p = log_p[batch["positions"][members], batch["targets"][members]].sum().exp()
        mine = batch["longer_span"] == s
        q = log_q[batch["longer_slots"][mine], batch["longer_targets"][mine]].sum().exp()
        kd = kd + q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    ce = -z.log_softmax(-1)[batch["positions"], batch["targets"]].sum()
    return (1 - alpha) * ce + alpha * T**2 * kd


@pytest.mark.parametrize("T,alpha", [(1.0, 0.9), (2.0, 1.0)])
@pytest.mark.fast
def test_loss_and_gradient_are_those_of_float64_by_hand(pair, T, alpha):
    student, aligner = pair
    ids = np.array(student.encode(TEXT))[:66].reshape(2, 33)
    batch = aligner.align(text_batch(ids))
    assert len(batch["exact_slots"]) > 5 and batch["spans"] > 5
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 32, 16, generator=g, requires_grad=True)
    weight = torch.randn(student.vocab_size + 10, 16, generator=g, requires_grad=True)
    y = 2 * torch.randn(*batch["teacher_input_ids"].shape, aligner.teacher.vocab_size, generator=g)
    teacher = aligner.teacher_of(batch, y, None, T)
    loss, _, _ = linear_distillation(select_targets(hidden, batch), weight, batch["targets"], teacher,
                                     student.vocab_size, Objective(alpha, T))
    loss.backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = by_hand(h.flatten(0, 1) @ w[:student.vocab_size].T, y.flatten(0, 1).double(), batch, aligner,
                       T, alpha)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-4, atol=1e-5)


def permuted(source, folder, seed=5):
    """A copy of a model folder whose token ids are shuffled: another tokenizer.json, the same function."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("manifest.json"))
    definition = json.loads((folder / "tokenizer.json").read_text())
    vocab = definition["model"]["vocab"]
    order = np.random.default_rng(seed).permutation(len(vocab))  # added tokens keep their ids, which follow
    definition["model"]["vocab"] = {piece: int(order[index]) for piece, index in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            moved = tensors[name].clone()
            moved[torch.tensor(order)] = tensors[name][:len(order)]
            tensors[name] = moved
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_equal_tokenizers_are_ordinary_distillation(trained, data, tmp_path):
    """The same loss and gradient from the same tokenizer, and from one with other ids for the same pieces."""
    folder, tokenizer = hf.find_folder(trained), Tokenizer.load(data)
    # A row that ends within a word would be read in another way, so the rows have whole words.
    rows = Rows(DataFolder(data), "train", 64).read(np.arange(300))
    rows = np.stack([row for row in rows if tokenizer.eot_id not in row
                     and tokenizer.encode(tokenizer.decode(row)) == row.tolist()][:4])
    student = GPT.from_pretrained(folder)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    results = []
    for source in (None, folder, permuted(folder, tmp_path / "p")):
        batch = text_batch(rows, tokenizer.eot_id)
        teacher = GPT.from_pretrained(source or folder).eval()
        with torch.no_grad():
            if source is None:
                dense = teacher(batch["input_ids"], document_ids=batch["document_ids"], head=DenseTeacher)
                dense = DenseTeacher(dense.hidden.flatten(0, 1), dense.weight)
                batch["targets"] = batch["targets"].flatten()
            else:
                aligner = Aligner(tokenizer, source, 64, CPU)
                batch = aligner.align(batch)
                whole = teacher(batch["teacher_input_ids"], document_ids=batch["teacher_document_ids"],
                                head=DenseTeacher)
                dense = aligner.teacher_of(batch, whole.hidden, whole.weight, 2.0)
        student.zero_grad()
        loss, ce, kd = student(
            batch["input_ids"], document_ids=batch["document_ids"],
            head=lambda h, w, batch=batch, dense=dense: linear_distillation(
                select_targets(h, batch), w, batch["targets"], dense, tokenizer.vocab_size,
                Objective(0.7, 2.0)))
        loss.backward()
        results.append((loss.item(), ce.item(), kd.item(), student.head_weight.grad.clone(),
                        len(batch.get("exact_slots", []))))
    ordinary, same, other = results
    assert same[4] == 256, "all targets are exact"
    np.testing.assert_allclose(same[:3], ordinary[:3], rtol=1e-5)
    torch.testing.assert_close(same[3], ordinary[3], rtol=1e-4, atol=1e-5)
    assert other[4] == 256
    np.testing.assert_allclose(other[:3], ordinary[:3], rtol=1e-5)
    torch.testing.assert_close(other[3], ordinary[3], rtol=1e-4, atol=1e-5)


def test_a_cache_has_the_same_loss(pair):
    """With all tokens that are reached in float32 records, the loss is that of the teacher itself."""
    student, aligner = pair
    batch = text_batch(np.array(student.encode(TEXT))[:66].reshape(2, 33))
    aligned = aligner.align(batch)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 32, 8, generator=g), torch.randn(student.vocab_size, 8, generator=g)
    y = torch.randn(*aligned["teacher_input_ids"].shape, aligner.teacher.vocab_size, generator=g)
    teacher = aligner.teacher_of(aligned, y, None, 1.5)
    reached = student.vocab_size - len(aligner.first.unreached)
    identity = {"method": "topk", "k": reached, "values": "float32", "align": "bytes"}
    dtype = record_type(identity, student.vocab_size)
    stored = AlignedRows(teacher, aligned["lengths"], batch["targets"].flatten().numpy())
    values = torch.cat([stored.log_probs(slice(first, first + 16), student.vocab_size, 1.5)
                        for first in range(0, 64, 16)])
    records = encode(values, dtype, student.vocab_size)
    again = batch | cached_spans(batch, stored.lengths, decode(records))
    assert all(torch.equal(again[key], aligned[key]) for key in ("positions", "targets", "span_of"))
    cached = teacher._replace(exact=SparseTeacher(again["teacher_ids"], again["teacher_probs"],
                                                  again["teacher_tail"]), span_log_q=again["span_log_q"])
    one, two = (linear_distillation(select_targets(hidden, aligned), weight, aligned["targets"], each,
                                    student.vocab_size, Objective(0.9, 1.5)) for each in (teacher, cached))
    np.testing.assert_allclose(one[0].item(), two[0].item(), rtol=1e-4)


# ---- Whole runs -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def other(trained, tmp_path_factory):
    """A teacher with a tokenizer of its own: that of `trained` with other ids."""
    return permuted(hf.find_folder(trained), tmp_path_factory.mktemp("other") / "teacher")


@pytest.mark.parametrize("more", [["--document_mask=True", "--divergence=jsd"], ["--on_policy=0.5"]])
def test_a_student_learns_from_a_teacher_with_other_ids(other, data, tmp_path, more):
    log = run(other, data, tmp_path / "a", "--align=bytes", *more)
    assert losses(log)[-1] < losses(log)[0] - 0.15
    aligned = [event["aligned"] for event in log if "aligned" in event]
    # What an untrained student writes is partly no UTF-8.
    assert (0.5 if "--on_policy=0.5" in more else 0.95) < np.mean(aligned) <= 1
    assert "val_kl" not in log[-1], "the teacher has no predictions for the student's ids"


def test_online_and_cached_runs_agree(trained, other, tmp_path):
    own, source = tmp_path / "data", Path(json.__file__).parent
    prepare(PrepareConfig(source=str(source), out=str(own), tokenizer=str(trained), val_fraction=0.2,
                          num_proc=1))
    short = ["--align=bytes", "--max_steps=5", "--temperature=2"]
    online = run(other, own, tmp_path / "a", *short)
    with pytest.raises(UserError, match="--align=bytes"):
        run(other, own, tmp_path / "b", *short, "--cache=topk")
    with pytest.raises(UserError, match="k=501: the teacher's tokens begin with only 500 of the data's"):
        cache(other, own, "--method=topk", "--k=501", "--align=bytes")
    cache(other, own, "--method=topk", "--k=450", "--temperature=2", "--align=bytes", "--values=float32")
    cached = run(other, own, tmp_path / "b", *short, "--cache=topk")
    for key in ("loss", "divergence", "aligned"):
        ours, theirs = ([event[key] for event in log if key in event] for log in (online, cached))
        np.testing.assert_allclose(ours, theirs, rtol=2e-3)
    with pytest.raises(UserError, match="teacher_.* has another teacher, align|has another align"):
        run(other, own, tmp_path / "c", *short[1:], "--cache=topk", f"--teacher={other}")


def test_packed_chats_and_masks(chats, trained, tmp_path):
    """Only the assistant's tokens are compared, each conversation sees itself only, packed or not."""
    source = permuted(hf.find_folder(trained), tmp_path / "t")
    with_chat_tokens(Tokenizer.load(source)).save(source)
    data, tokenizer = DataFolder(chats), Tokenizer.load(chats)
    aligner, teacher = Aligner(tokenizer, source, 64, CPU), GPT.from_pretrained(source).eval()
    rows = ChatRows(data, "train", 64).read(np.arange(3))
    batch = chat_batch(rows)
    aligned = aligner.align(batch)
    assert sorted(aligned["positions"].tolist()) == batch["positions"].tolist()
    assert len(aligned["exact_slots"]) + len(aligned["span_of"]) >= 0.9 * len(batch["positions"])
    # The teacher's logits at an exact span of the packed row are those of its conversation alone.
    with torch.no_grad():
        packed = teacher(aligned["teacher_input_ids"], document_ids=aligned["teacher_document_ids"])
        slot, T = int(aligned["exact_slots"][-1]), aligned["teacher_input_ids"].shape[1]
        row, place = divmod(slot, T)
        documents = aligned["teacher_document_ids"][row]
        alone = aligned["teacher_input_ids"][row][documents == documents[place]][None]
        first = int((documents == documents[place]).nonzero()[0])
        torch.testing.assert_close(packed[row, place], teacher(alone)[0, place - first], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [["--on_policy=0.5"], ["--parallel=fsdp"]])
def test_two_ranks_have_the_losses_of_one(other, data, tmp_path, two_ranks, how):
    more = ["--align=bytes", "--optimizer=adamw", "--max_steps=4"]
    alone = run(other, data, tmp_path / "one", *more, *(how if "on_policy" in how[0] else []))
    two_ranks(on_two_ranks, str(other), str(data), str(tmp_path / "two"), *more, *how)
    both = events(tmp_path / "two")
    for key in ("loss", "aligned", "own_divergence"):
        one, two = ([event[key] for event in log if key in event] for log in (alone, both))
        np.testing.assert_allclose(two, one, rtol=1e-5)
    assert len(losses(both)) == 4 or how == ["--on_policy=0.5"]


@pytest.mark.fast
def test_mistakes_have_one_line(data, tmp_path):
    for argv, text in ((["--divergence=mse"], "align=bytes: works with neither divergence=mse"),
                       (["--cache=sample"], "align=bytes: works with neither"),
                       (["--student_layers=every:2"], "student_layers=every:2: needs the teacher's"),
                       (["--hidden_weight=1"], "hidden_weight=1.0: needs the teacher's tokenizer")):
        with pytest.raises(UserError, match=text):
            configure(distill.DistillConfig, ["--align=bytes", *argv])
    lower = saved(sentencepiece(normalizer=normalizers.Lowercase()), tmp_path / "lower")
    with pytest.raises(UserError, match="so its bytes cannot be aligned"):
        Aligner(Tokenizer.load(data), lower, 64, CPU)
