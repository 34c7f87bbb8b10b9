from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from outgrow.data.config import DataConfig
from outgrow.data.corpus import Document, content_hash, documents, split
from outgrow.data.packed import Batches, Packed, open_packed, prepare, validation_batches
from outgrow.data.tokens import Mixture, Tokens
from outgrow.errors import OutgrowError
from outgrow.lab.tiny import TINY
from outgrow.training import distributed
from outgrow.training.config import OptimizerConfig, RunConfig, Start
from outgrow.training.refusals import problems


@pytest.fixture
def config(corpus):
    return DataConfig(corpus=str(corpus), vocab=300, context=16, validation_share=0.1)


def test_validation_documents_never_appear_in_training(corpus):
    (corpus / "copy_of_7.py").write_text((corpus / "module_007.py").read_text())
    found = documents(str(corpus))
    training, validation = split(found, 0.2)
    assert len(found) == 120
    assert validation
    assert len(training) + len(validation) == 120
    assert not {document.text for document in training} & {document.text for document in validation}


def test_a_documents_side_does_not_depend_on_the_others(corpus):
    found = documents(str(corpus))
    held = {document.name for document in split(found, 0.2)[1]}
    assert {document.name for document in split(found[::2], 0.2)[1]} == held & {document.name for document in found[::2]}


def test_the_embedded_corpus_is_python_source():
    found = documents("python")
    assert "json/decoder.py" in {document.name for document in found}
    assert not [document.name for document in found if "site-packages" in document.name]


def test_the_corpus_hash_is_of_texts_alone():
    texts = [Document("a", "one"), Document("b", "two")]
    renamed = [Document("c", "two"), Document("d", "one")]
    hashes = [content_hash(document.digest for document in found) for found in (texts, renamed, texts[:1])]
    assert hashes[0] == hashes[1] != hashes[2]


def test_packing_twice_gives_the_same_bytes_and_the_tokenizer_gives_the_text_back(config, corpus, tmp_path):
    one, two = prepare(config, tmp_path / "one"), prepare(config, tmp_path / "two")
    for name in ("training-00000.npy", "validation-00000.npy", "tokenizer.json", "manifest.json"):
        assert (one.directory / name).read_bytes() == (two.directory / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(one.directory)
    texts = tokenizer.decode(one.validation[:].tolist()).split("<|endoftext|>")[:-1]
    assert texts == [document.text for document in split(documents(str(corpus)), 0.1)[1]]
    assert one.vocab == 300
    held_out_bytes = sum(len(text.encode()) for text in texts)
    assert one.bytes_per_token == pytest.approx(held_out_bytes / len(one.validation))
    assert open_packed(one.directory).corpus_hash == one.corpus_hash


def test_a_batch_depends_on_seed_and_clock_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    batches = Batches(tokens, context=10, seed=3)
    whole = np.concatenate([batches.at(clock, 2) for clock in range(0, 200, 20)])
    np.testing.assert_array_equal(whole, batches.at(0, 20))
    np.testing.assert_array_equal(Batches(tokens, 10, 3).at(120, 2), whole[12:14])
    assert not np.array_equal(Batches(tokens, 10, 4).at(0, 20), whole)


def test_the_order_of_a_single_source_is_the_one_that_committed_results_were_made_with():
    batches = Batches(np.arange(1000, dtype=np.uint16), context=10, seed=3)
    assert batches.at(0, 6)[:, 0].tolist() == [830, 450, 220, 10, 340, 230]
    assert batches.at(9850, 6)[:, 0].tolist() == [120, 940, 690, 70, 510, 20]


def test_the_ranks_together_read_what_one_reads(monkeypatch):
    batches = Batches(np.arange(1000, dtype=np.uint16), context=10, seed=3)
    whole = batches.at(950, 8)
    for ranks in (1, 2, 3, 8, 11):  # a held-out batch need not divide
        monkeypatch.setattr(distributed, "world", lambda ranks=ranks: ranks)
        parts = []
        for rank in range(ranks):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            own = distributed.own_rows(8)
            parts += [batches.at(950, 8, own)] if own.start < own.stop else []
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def mixture(lengths, weights):
    """Sources whose tokens say where they come from: source x 10,000 + place."""
    parts = tuple(Tokens((np.arange(length) + 10_000 * number,)) for number, length in enumerate(lengths))
    return Mixture(parts, tuple(Fraction(repr(weight)) / sum(Fraction(repr(one)) for one in weights) for weight in weights))


@pytest.mark.parametrize("weights", [(1.0,), (0.7, 0.3), (0.1, 0.2, 0.7), (3.0, 1.0, 1e-3, 2.5)])
def test_any_stretch_of_a_mixture_holds_its_sources_in_their_shares(weights):
    mixed = mixture([1001] * len(weights), weights)
    rows = Batches(mixed, context=10, seed=1).at(0, 1000)
    sources = rows[:, 0] // 10_000
    for first, last in [(0, 1000), (0, 10), (123, 456), (700, 750)]:
        for source, share in enumerate(mixed.shares):
            assert abs((sources[first:last] == source).sum() - share * (last - first)) < len(weights)


def test_a_mixture_reads_each_source_to_its_end_before_any_of_it_again():
    mixed = mixture([401, 201, 101], (0.5, 0.3, 0.2))
    batches = Batches(mixed, context=10, seed=0)
    assert batches.sequences_per_epoch == 50  # the last source has 10 sequences and gives a fifth
    starts = batches.at(0, 50)[:, 0]
    assert len(set(starts.tolist())) == 50
    assert [(starts // 10_000 == source).sum() for source in range(3)] == [25, 15, 10]
    assert batches.epochs(500) == (25 / 40, 15 / 20, 10 / 10)
    longer = batches.at(0, 200)[:, 0]
    for source, sequences in enumerate((40, 20, 10)):
        own = [start for start in longer.tolist() if start // 10_000 == source]
        for first in range(0, len(own) - sequences + 1, sequences):
            assert len(set(own[first : first + sequences])) == sequences
    np.testing.assert_array_equal(Batches(mixed, 10, 0).at(770, 31), batches.at(0, 108)[77:])


def test_shards_are_read_as_one_row():
    whole = np.arange(23)
    tokens = Tokens((whole[:10], whole[10:20], whole[20:]))
    assert len(tokens) == 23
    for start, stop in [(0, 23), (0, 0), (9, 11), (10, 20), (8, 22), (20, 99), (22, 23), (30, 40)]:
        np.testing.assert_array_equal(tokens[start:stop], whole[start:stop])


def test_an_epoch_reads_everything_once_and_the_next_in_another_order():
    tokens = np.arange(101, dtype=np.uint16)
    batches = Batches(tokens, context=10, seed=0)
    first, second = batches.at(0, 10), batches.at(100, 10)
    for epoch in (first, second):
        assert sorted(epoch[:, :-1].flatten().tolist()) == list(range(100))
        assert (epoch[:, 1:] == epoch[:, :-1] + 1).all()
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(batches.at(90, 2)[1], second[0])


def held_out_rows(tokens, **settings):
    """The sequences of 10 tokens that a validation reads of held-out text."""
    packed = Packed(Path(), tokens, tokens, 1.0, "", 300)
    return np.concatenate(list(validation_batches(packed, DataConfig(context=10, **settings), 4)))


def test_validation_is_bounded_in_order_and_spread_over_all_that_is_held_out():
    rows = held_out_rows(Tokens((np.arange(1001),)), corpus="folder", validation_tokens=69)
    assert rows.shape == (6, 11)
    assert rows[:, 0].tolist() == [0, 160, 330, 500, 660, 830]
    assert (np.diff(rows) == 1).all()
    whole = held_out_rows(Tokens((np.arange(1001),)), corpus="folder")
    np.testing.assert_array_equal(whole[:, :-1].flatten(), np.arange(1000))


def test_the_embedded_corpus_is_validated_on_the_sequences_that_committed_results_were_made_with():
    assert held_out_rows(Tokens((np.arange(1001),)), validation_tokens=69)[:, 0].tolist() == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize(("weights", "counts"), [((0.7, 0.3), [11, 4]), ((1.0, 1e-5), [15, 1])])
def test_validation_reads_all_of_every_source_in_its_share(weights, counts):
    rows = held_out_rows(mixture([1001, 1001], weights), corpus="folder", validation_tokens=169)
    sources, places = np.divmod(rows[:, 0], 10_000)
    assert np.bincount(sources).tolist() == counts
    for source, count in enumerate(counts):
        assert places[sources == source].tolist() == [number * 100 // count * 10 for number in range(count)]


@pytest.mark.parametrize(
    ("edits", "told"),
    [
        ({}, None),
        ({"data": {"context": 16, "epochs": 2, "validation_tokens": 64}}, None),
        ({"seed": 1}, "it has another seed than 'base' and so would read again some of what that has read; give it the same, or let start"),
        ({"seed": 1, "data": {"context": 8}}, "another seed and another data.context than 'base'"),
        ({"data": {"context": 16, "vocab": 300}}, "another data.vocab than"),
        ({"data": {"context": 16, "sources": [{"path": "other"}]}}, "another data.sources than"),
    ],
)
def test_a_run_that_would_read_its_parents_text_again_is_refused(edits, told):
    model = {**TINY["llama"], "vocab_size": 1024}
    settings = {"batch_tokens": 64, "data": {"context": 16}, "optimizer": OptimizerConfig(learning_rate=0.01)}
    base = RunConfig(name="base", model=model, tokens=640, **settings)
    run = RunConfig(start=Start(run=base), tokens=1280, **settings | edits)
    found = list(problems(run, model, 640, None, 1))
    assert len(found) == (told is not None)
    assert told is None or told in found[0]
    by_hand = run.model_copy(update={"start": Start(checkpoint="base/checkpoints/640")})
    assert not list(problems(by_hand, model, 640, None, 1))


@pytest.mark.parametrize(
    ("files", "edits", "message"),
    [
        (None, {}, "does not exist; give a file of text, a folder of them, 'python'"),
        ({}, {}, "holds no text"),
        ({"a.txt": b"\xff\xfe\xff", "b.txt": b" \n"}, {}, "holds no text"),
        ({"a.txt": b"one document"}, {}, "1 documents, too few to hold out"),
        ({f"{n}.txt": b"some text %d" % n for n in range(50)}, {"vocab": 5000}, r"too small for a vocabulary of 5000: it gave \d+"),
    ],
)
def test_a_corpus_that_cannot_serve_is_refused(tmp_path, files, edits, message):
    place = tmp_path / "corpus"
    if files is not None:
        place.mkdir()
        for name, content in files.items():
            (place / name).write_bytes(content)
    with pytest.raises(OutgrowError, match=message):
        prepare(DataConfig(corpus=str(place), **edits), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))
