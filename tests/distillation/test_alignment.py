"""A teacher with another tokenizer: an example by hand, the loss and its gradient in float64 by hand, equal
tokenizers against ordinary distillation, hostile text, chats, a cache, and mistakes of the user."""

import json
import math
import re
import shutil
from functools import cache, partial
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
from distillation.alignment import AlignedRows, Aligner, compared_first
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
from tests.test_distill import cache as cache_teacher
from tests.test_distill import on_two_ranks, run

CPU = torch.device("cpu")
TEXT = "def main(args):\n    return args + 1234  # naïve 日本\n" * 4


def bpe(vocab, text=TEXT):
    return Tokenizer.train([text], vocab)


def saved(tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module", params=[(330, 280), (275, 330)])
def pair(request, tmp_path_factory):
    """(student's tokenizer, aligner to a teacher whose tokenizer has fewer or more merges)."""
    ours, theirs = request.param
    student, folder = bpe(ours), saved(bpe(theirs, TEXT[::-1] + TEXT), tmp_path_factory.mktemp("t"))
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


def byte_level(merges):
    """A tokenizer of single bytes and these merges, which also merges letters with other characters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(one + two for one, two in merges), "<|endoftext|>"]
    hf_tokenizer = HFTokenizer(models.BPE(vocab={piece: k for k, piece in enumerate(pieces)}, merges=merges))
    hf_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf_tokenizer.decoder = decoders.ByteLevel()
    hf_tokenizer.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(json.loads(hf_tokenizer.to_str()), {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})


# ---- Targets ----------------------------------------------------------------------------------------------

def test_the_example_by_hand(tmp_path):
    """def|_main|()|:  against  def|_ma|in|():  with the probabilities of each kind of target."""
    shared = [("d", "e"), ("de", "f"), ("_", "m"), ("_m", "a"), ("i", "n"), ("(", ")")]
    student = byte_level([*shared, ("_ma", "in")])
    aligner = Aligner(student, saved(byte_level([*shared, ("()", ":")]), tmp_path), 512, CPU)
    ours, theirs = (partial(map, each.token_id) for each in (student, aligner.teacher))
    ids = student.encode("def_main():")
    assert ids == [*ours(["def", "_main", "()", ":"])]
    assert aligner.groups[student.token_id("_main")] == student.token_id("_ma")
    batch = aligner.align(text_batch(np.array([ids])))
    assert batch["teacher_input_ids"][0, :4].tolist() == [*theirs(["def", "_ma", "in", "():"])]
    assert batch["slots"].tolist() == [0, 2, 2] and batch["kinds"].tolist() == [2, 1, 1]
    q = torch.zeros(1, batch["teacher_input_ids"].shape[1], aligner.teacher.vocab_size)
    for slot, row in enumerate(({"_ma": 0.6, "_m": 0.1, "d": 0.3}, {"in": 0.7, "i": 0.1, "d": 0.2},
                                {"():": 0.5, "()": 0.2, "(": 0.1, "in": 0.2})):
        q[0, slot, [*theirs(row)]] = torch.tensor([*row.values()])
    found = aligner.translated(batch, q.log(), None).log_probs(slice(0, 3), student.vocab_size, 1.0).exp()
    for row, expected in zip(found, ({"_main": 0.42, "_ma": 0.18, "_m": 0.1, "d": 0.3},
                                     {"()": 0.7, "(": 0.1, "in": 0.2}, {":": 1.0}), strict=True):
        torch.testing.assert_close(row[[*ours(expected)]], torch.tensor([*expected.values()]))
        assert row.sum().item() == pytest.approx(1)


def test_what_the_student_would_merge_does_not_count(tmp_path):
    """After the student's own "d" there is no "e", because the student would have read "de"."""
    student = byte_level([("d", "e"), ("e", "f")])
    aligner = Aligner(student, saved(byte_level([("e", "f"), ("e", "x")]), tmp_path), 512, CPU)
    ids = student.encode("xdax")
    batch = aligner.align(text_batch(np.array([ids])))
    assert len(ids) == 4 and batch["slots"].tolist() == [0, 1, 2]
    q = torch.zeros(1, batch["teacher_input_ids"].shape[1], aligner.teacher.vocab_size)
    row = {"e": 0.3, "ex": 0.1, "ef": 0.2, "a": 0.3, "d": 0.1}
    q[0, :, [aligner.teacher.token_id(text) for text in row]] = torch.tensor([*row.values()])
    found = aligner.translated(batch, q.log(), None).log_probs(slice(0, 3), student.vocab_size, 1.0).exp()
    # "def" is read as "de" and "f", so that "ef" does not count either. Elsewhere "e" stands for "ex", too.
    # The first target is "d", whose group {"d", "de"} is split by the next prediction.
    expected = ({"e": 0.4, "ef": 0.2, "a": 0.3, "d": 0.04, "de": 0.06}, {"a": 0.75, "d": 0.25},
                {"e": 0.4, "ef": 0.2, "a": 0.3, "d": 0.1})
    for place, each in enumerate(expected):
        values = found[place, [student.token_id(text) for text in each]]
        torch.testing.assert_close(values, torch.tensor([*each.values()]))
        assert found[place].sum().item() == pytest.approx(1)


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
    texts = zip(aligner.ours, aligner.groups, strict=True)
    assert all(text.startswith(aligner.ours[group]) for text, group in texts), "a group begins its texts"
    _, found = aligner.document(np.array(ids), np.arange(len(ids)) > 0)
    assert len(found) > 0.6 * len(ids) and (np.diff(found[:, 1]) >= 0).all()
    # A row that begins and ends within characters: their bytes have no token of the teacher.
    broken = [student.token_id(letter) for letter in "¥æ"] + student.encode(" ab")
    ours, theirs = aligner.tokens(broken)
    _, found = aligner.document(np.array(broken), np.arange(len(broken)) > 0)
    assert len(ours) == len(broken) and (found[:, 0] > 1).all()


def test_random_ids_always_align(pair):
    """Any ids at all: no batch raises, every target is there once, and every slot is in its row."""
    student, aligner = pair
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(student.vocab_size, size=(3, 33))
        batch = aligner.align(text_batch(ids, student.eot_id if seed % 2 else None))
        assert sorted(batch["positions"].tolist()) == list(range(96))
        assert batch["targets"].tolist() == ids[:, 1:].flatten()[batch["positions"]].tolist()
        width = batch["teacher_input_ids"].shape[1]
        assert (batch["slots"] // width == batch["positions"][:len(batch["slots"])] // 32).all()
        assert ((batch["split"] >= 0) == batch["is_split"].numpy()).all()


OTHERS = {"equal": lambda: bpe(330), "more merges": lambda: bpe(400, TEXT[::-1] + TEXT),
          "bytes": lambda: bpe(257), "a few merges": lambda: bpe(275, TEXT[::-1]),
          **{f"sentencepiece, {scheme}": partial(sentencepiece, scheme) for scheme in ("always", "never")}}


@pytest.mark.parametrize("ours", OTHERS)
@pytest.mark.parametrize("theirs", OTHERS)
def test_a_teacher_that_knows_the_text_is_never_contradicted(ours, theirs, tmp_path):
    """If it is sure of each next token of its own, then also of each target that it is compared with."""
    student, folder = OTHERS[ours](), saved(OTHERS[theirs](), tmp_path)
    aligner = Aligner(student, folder, 512, CPU)
    text = "  " + TEXT.replace("+", "++\n\n  ") + "mainly  def()"
    ids = np.array(student.encode(text))[:129]
    batch = aligner.align(text_batch(ids[None]))
    read = batch["teacher_input_ids"]
    y = 40.0 * torch.nn.functional.one_hot(read.roll(-1, 1), aligner.teacher.vocab_size)
    teacher = aligner.teacher_of(batch, aligner.translated(batch, y, None))
    compared = len(batch["slots"])
    q = teacher.predictions.log_probs(slice(0, compared), student.vocab_size, 1.0).exp()
    targets = batch["targets"][:compared]
    columns = torch.where(batch["is_split"], teacher.groups.part[targets], teacher.groups.group[targets])
    assert compared > (0.9 if ours == theirs else 0.5) * (len(ids) - 1)
    assert q.gather(1, columns[:, None]).min() > 0.999


def test_a_changed_line_is_left_out_alone(tmp_path):
    """A teacher that composes accents changes one line of a text; the others are compared."""
    student, composing = bpe(300), sentencepiece("never", normalizers.NFC())
    aligner = Aligner(student, saved(composing, tmp_path), 512, CPU)
    ids = np.array(student.encode(TEXT + "re\u0301turn a\n" + TEXT))
    ours, _ = aligner.tokens(ids.tolist())
    _, found = aligner.document(ids, np.arange(len(ids)) > 0)
    compared = np.isin(np.arange(len(ids)), found[:, 0] + 1)
    begin, end = len(TEXT.encode()), len((TEXT + "re\u0301turn a\n").encode())
    inside = (ours[:, 1] > begin) & (ours[:, 2] < end)
    assert not compared[inside].any() and compared[ours[:, 2] < begin].mean() > 0.6
    assert compared[ours[:, 1] > end].mean() > 0.6


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
    assert aligner.tokens([end, *a])[1][:, 0].tolist() == [2, 1, *letter]
    changed = sentencepiece(pieces=["other"])
    student = Tokenizer.load(with_bos(changed, tmp_path / "s"))
    aligner = Aligner(student, folder, 512, CPU)
    ids = [1, *student.encode("a"), 2]
    assert not aligner.same and aligner.tokens(ids)[1][:, 0].tolist() == [1, *letter, 2]


# ---- The loss ---------------------------------------------------------------------------------------------

@cache
def first_token(aligner, text):
    """The student's first token of a text; None for bytes that are no text and no token of the student."""
    if text in aligner.ours and text:
        return len(aligner.ours) - 1 - aligner.ours[::-1].index(text)
    try:
        return aligner.student.encode(text.decode(), inside=True)[0]
    except (IndexError, UnicodeDecodeError):
        return None


@cache
def groups_of(aligner):
    """The group and the part of each token, by the first two tokens that the teacher reads its text as."""
    groups, parts = [*range(len(aligner.ours))], [*range(len(aligner.ours))]
    for ours in sorted(range(len(groups)), key=lambda ours: len(aligner.ours[ours])):
        # Only the whole characters before one that is cut are a text.
        text = aligner.ours[ours].decode(errors="surrogateescape")
        if text := re.sub("[\udc80-\udcff].*", "", text, flags=re.DOTALL):
            if text[-1] in " \n" and first_token(aligner, aligner.ours[ours] + b"a") == ours:
                text += "a"
            read = [aligner.theirs[theirs] for theirs in aligner.teacher.encode(text, inside=True)]
            groups[ours] = parts[ours] = groups[first_token(aligner, read[0])]
            if len(read) > 1 and read[0] == aligner.ours[groups[ours]]:
                part = first_token(aligner, read[0] + read[1])
                if part is not None and groups[part] == groups[ours]:
                    parts[ours] = part if part == ours else parts[part]
    return groups, parts


@cache
def merges(aligner, before, prefix, text):
    """Would the student read another token in the place of `before` if this text followed? At the beginning
    of a token of the teacher, only texts that go on a longer token of the student are tried."""
    whole, own = aligner.ours[before] + text, aligner.ours[before]
    goes_on = any(len(own) < len(longer) and longer.startswith(own) and whole.startswith(longer)
                  for longer in aligner.ours)
    first = first_token(aligner, whole) if text and own and (prefix or goes_on) else None
    return first is not None and aligner.ours[first] != own


def predicted(aligner, q, following, before, index, prefix, token, second):
    """({tokens: probability}, those with the target, is it split?): one target in float64, by its texts.

    q, following: the teacher's probabilities (V',) here and after its next token, which is `token`; `second`
    follows that. before, index: the student's token before the target, and the target.
    """
    masses, (groups, parts) = dict[int, float](), groups_of(aligner)
    for theirs, text in enumerate(aligner.theirs):
        ours = {there: here for here, there in aligner.special.items()}.get(theirs) if not prefix else None
        if text.startswith(prefix) and len(text) > len(prefix):
            ours = first_token(aligner, text[len(prefix):])
        if ours is not None and not merges(aligner, before, prefix, text[len(prefix):]):
            masses[ours] = masses.get(ours, 0) + q[theirs]
    masses = {ours: mass / sum(masses.values()) for ours, mass in masses.items()}
    part_of = [frozenset(ours for ours, other in enumerate(groups) if other == group) for group in groups]
    target, members = groups[index], part_of[index]

    def member(text):
        """The part of the student's first token of the group's text and the following token's text."""
        ours = first_token(aligner, aligner.ours[target] + text)
        return parts[ours] if ours in members else target

    is_split = (not prefix and aligner.theirs[token] == aligner.ours[target] and second is not None
                and any(parts[ours] == ours != target for ours in members)
                and member(aligner.theirs[second]) == parts[index])
    if is_split:
        for ours in members:
            part_of[ours] = frozenset(other for other in members if parts[other] == parts[ours])
        whole = masses.pop(target, 0)
        for theirs, text in enumerate(aligner.theirs):
            masses[member(text)] = masses.get(member(text), 0) + whole * following[theirs]
    sums = dict[frozenset, float]()
    for ours, mass in masses.items():
        sums[part_of[ours]] = sums.get(part_of[ours], 0) + mass
    return sums, part_of[index], is_split


def by_hand(z, y, batch, aligner, T, alpha):
    """The loss in float64, target by target, from the logits z (B T, V) and the teacher's y (B T', V')."""
    log_p, loss = z.log_softmax(-1), 0.0
    ids, compared = batch["teacher_input_ids"].flatten(), len(batch["slots"])
    texts = [aligner.ours[index] for index in batch["input_ids"].flatten().tolist()]
    for k, position in enumerate(batch["positions"].tolist()):
        index = int(batch["targets"][k])
        ce = -log_p[position, index]
        if k >= compared:
            loss = loss + ce * (alpha < 1)
            continue
        # Where the target begins: after the tokens of its row, and the teacher's before its slot.
        row, slot = position // 32 * 32, int(batch["slots"][k])
        begin = len(b"".join(texts[row:position + 1]))
        width = batch["teacher_input_ids"].shape[1]
        done = len(aligner.bytes_of(ids[slot // width * width:slot + 1].tolist()))
        token = int(ids[slot + 1])
        second = int(ids[slot + 2]) if slot % width + 2 < width else None
        prefix = aligner.theirs[token][:begin - done]
        q, following = ((y[each] / T).softmax(-1).tolist() for each in (slot, slot + 1))
        masses, own, is_split = predicted(
            aligner, q, following, int(batch["input_ids"].flatten()[position]), index, prefix, token, second)
        assert is_split == bool(batch["is_split"][k])
        p = (z[position] / T).softmax(-1)
        for each, mass in masses.items():
            loss = loss + alpha * T**2 * mass * (np.log(mass + 1e-300) - p[[*each]].sum().log())
        inside = ce + log_p[position, [*own]].logsumexp(0)
        loss = loss + (1 - alpha) * ce + alpha * (alpha < 1) * inside
    return loss


@pytest.mark.parametrize("T,alpha", [(1.0, 0.9), (2.0, 1.0)])
def test_loss_and_gradient_are_those_of_float64_by_hand(pair, T, alpha):
    student, aligner = pair
    ids = np.array(student.encode(TEXT.replace("naïve 日本", "mainly def()")))[:66].reshape(2, 33)
    batch = aligner.align(text_batch(ids))
    assert len({*batch["kinds"].tolist()}) > 1, "several kinds of targets"
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 32, 16, generator=g, requires_grad=True)
    weight = torch.randn(student.vocab_size + 10, 16, generator=g, requires_grad=True)
    y = 2 * torch.randn(*batch["teacher_input_ids"].shape, aligner.teacher.vocab_size, generator=g)
    teacher = aligner.teacher_of(batch, aligner.translated(batch, y, None))
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
                dense = aligner.teacher_of(batch, aligner.translated(batch, whole.hidden, whole.weight))
        student.zero_grad()
        loss, ce, kd = student(
            batch["input_ids"], document_ids=batch["document_ids"],
            head=lambda h, w, batch=batch, dense=dense: linear_distillation(
                select_targets(h, batch), w, batch["targets"], dense, tokenizer.vocab_size,
                Objective(0.7, 2.0)))
        loss.backward()
        results.append((loss.item(), ce.item(), kd.item(), student.head_weight.grad.clone(),
                        len(batch.get("slots", []))))
    ordinary, same, other = results
    assert same[4] == 256, "all targets are compared"
    np.testing.assert_allclose(same[:3], ordinary[:3], rtol=1e-5)
    torch.testing.assert_close(same[3], ordinary[3], rtol=1e-4, atol=1e-5)
    assert other[4] == 256
    np.testing.assert_allclose(other[:3], ordinary[:3], rtol=1e-5)
    torch.testing.assert_close(other[3], ordinary[3], rtol=1e-4, atol=1e-5)


def test_a_cache_has_the_same_loss(pair):
    """With all tokens in float32 records, the loss is that of the teacher itself."""
    student, aligner = pair
    batch = text_batch(np.array(student.encode(TEXT))[:66].reshape(2, 33))
    aligned = aligner.align(batch)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 32, 8, generator=g), torch.randn(student.vocab_size, 8, generator=g)
    y = torch.randn(*aligned["teacher_input_ids"].shape, aligner.teacher.vocab_size, generator=g)
    teacher = aligner.teacher_of(aligned, aligner.translated(aligned, y, None))
    identity = {"method": "topk", "k": student.vocab_size, "values": "float32", "align": "bytes"}
    stored = AlignedRows(teacher.predictions, aligned["kinds"])
    values = torch.cat([stored.log_probs(slice(first, first + 16), student.vocab_size, 1.5)
                        for first in range(0, 64, 16)])
    records = encode(values, record_type(identity, student.vocab_size))
    again = batch | compared_first(batch, aligned["kinds"]) | decode(records[aligned["kinds"] > 0])
    assert all(torch.equal(again[key], aligned[key]) for key in ("positions", "targets", "is_split"))
    cached = aligner.teacher_of(again, SparseTeacher(again["teacher_ids"], again["teacher_probs"],
                                                     again["teacher_tail"]))
    one, two = (linear_distillation(select_targets(hidden, aligned), weight, aligned["targets"], each,
                                    student.vocab_size, Objective(0.9, 1.5)) for each in (teacher, cached))
    np.testing.assert_allclose(one[0].item(), two[0].item(), rtol=1e-4)


# ---- Whole runs -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def other(trained, tmp_path_factory):
    """A teacher with a tokenizer of its own: that of `trained` with other ids."""
    return permuted(hf.find_folder(trained), tmp_path_factory.mktemp("other") / "teacher")


@pytest.mark.parametrize("more", [["--document_mask=True", "--temperature=2"], ["--on_policy=0.5"]])
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
    cache_teacher(other, own, "--method=topk", "--k=450", "--temperature=2", "--align=bytes",
                  "--values=float32")
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
    assert len(aligned["slots"]) >= 0.9 * len(batch["positions"])
    # The teacher's logits at a target of the packed row are those of its conversation alone.
    with torch.no_grad():
        packed = teacher(aligned["teacher_input_ids"], document_ids=aligned["teacher_document_ids"])
        slot, T = int(aligned["slots"][-1]), aligned["teacher_input_ids"].shape[1]
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


def test_a_loss_that_is_not_finite(other, data, tmp_path, monkeypatch):
    """The batch, which has arrays of the alignment, is written down, and the run goes back."""
    compute, calls = distill.Distillation.__call__, []

    def third_is_nan(self, forward, batch):
        calls.append(batch)
        loss, metrics = compute(self, forward, batch)
        return loss * (math.nan if len(calls) == 5 else 1), metrics

    monkeypatch.setattr(distill.Distillation, "__call__", third_is_nan)
    log = run(other, data, tmp_path / "a", "--align=bytes", "--max_steps=4", "--save_interval=1",
              "--max_rollbacks=1")
    assert [event["rollbacks"] for event in log if "rollbacks" in event] == [1] and log[-1]["step"] == 4
    assert len(list((tmp_path / "a").glob("not_finite_*.json"))) == 1


def test_mistakes_have_one_line(data, tmp_path):
    for argv, text in ((["--divergence=mse"], "align=bytes: only works with divergence=forward_kl"),
                       (["--divergence=jsd"], "align=bytes: only works with divergence=forward_kl"),
                       (["--cache=sample"], "align=bytes: does not work with cache=sample"),
                       (["--student_layers=every:2"], "student_layers=every:2: needs the teacher's"),
                       (["--hidden_weight=1"], "hidden_weight=1.0: needs the teacher's tokenizer")):
        with pytest.raises(UserError, match=text):
            configure(distill.DistillConfig, ["--align=bytes", *argv])
    lower = saved(sentencepiece(normalizer=normalizers.Lowercase()), tmp_path / "lower")
    with pytest.raises(UserError, match="so its bytes cannot be aligned"):
        Aligner(Tokenizer.load(data), lower, 64, CPU)
