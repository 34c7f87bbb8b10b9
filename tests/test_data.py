from __future__ import annotations

import numpy as np
import pytest
from transformers import AutoTokenizer

from outgrow.data.config import DataConfig
from outgrow.data.corpus import Document, content_hash, documents, split
from outgrow.data.packed import Batches, open_packed, prepare, validation_batches
from outgrow.errors import OutgrowError
from outgrow.files import read_json


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
    assert content_hash(texts) == content_hash(renamed)
    assert content_hash(texts) != content_hash(texts[:1])


def test_packing_twice_gives_the_same_bytes_and_the_tokenizer_gives_the_text_back(config, corpus, tmp_path):
    one, two = prepare(config, tmp_path / "one"), prepare(config, tmp_path / "two")
    for name in ("training.npy", "validation.npy", "tokenizer.json", "manifest.json"):
        assert (one.directory / name).read_bytes() == (two.directory / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(one.directory)
    manifest = read_json(one.directory / "manifest.json")
    texts = tokenizer.decode(one.validation.tolist()).split("<|endoftext|>")[:-1]
    assert texts == [(corpus / name).read_text() for name in manifest["validation_documents"]]
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


def test_an_epoch_reads_everything_once_and_the_next_in_another_order():
    tokens = np.arange(101, dtype=np.uint16)
    batches = Batches(tokens, context=10, seed=0)
    first, second = batches.at(0, 10), batches.at(100, 10)
    for epoch in (first, second):
        assert sorted(epoch[:, :-1].flatten().tolist()) == list(range(100))
        assert (epoch[:, 1:] == epoch[:, :-1] + 1).all()
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(batches.at(90, 2)[1], second[0])


def test_validation_is_bounded_and_in_order(config, tmp_path):
    packed = prepare(config, tmp_path)
    short = config.model_copy(update={"validation_tokens": 100})
    rows = np.concatenate(list(validation_batches(packed, short, 4)))
    assert rows.shape == (6, 17)
    np.testing.assert_array_equal(rows[:, :-1].flatten(), packed.validation[:96])


@pytest.mark.parametrize(
    ("files", "edits", "message"),
    [
        (None, {}, "does not exist; give a text file, a folder of them, or 'python'"),
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
