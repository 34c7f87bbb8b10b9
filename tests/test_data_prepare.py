from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from outgrow.config import parse
from outgrow.data.config import DataConfig
from outgrow.data.packed import Batches, open_packed, prepare, validation_batches
from outgrow.data.packing import prepare_sources
from outgrow.errors import OutgrowError
from outgrow.files import read_json

END = "<|endoftext|>"
OUTGROW = [sys.executable, "-W", "error", "-c", "from outgrow.cli import main; main()"]
TEXTS = [f"Document {number} says: " + " ".join(f"word{number * k % 97}" for k in range(40)) for number in range(60)]


def records(texts, key="text"):
    return "".join(json.dumps({key: text, "meta": {"set": "x"}}) + "\n" for text in texts).encode()


TWO_FRAMES = zstandard.compress(records(TEXTS[:3])) + zstandard.compress(records(TEXTS[3:6]))


def write_all_forms(folder):
    """TEXTS over every form that a folder may hold; the compressed file has two frames, as pzstd writes them."""
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(records(TEXTS[:10]) + b"\n")
    frames = [zstandard.compress(records(part)) for part in (TEXTS[10:20], TEXTS[20:30])]
    (folder / "b.jsonl.zst").write_bytes(b"".join(frames))
    (folder / "c.json.gz").write_bytes(gzip.compress(records(TEXTS[30:40])))
    pyarrow.parquet.write_table(pyarrow.table({"other": [0] * 10, "text": [*TEXTS[40:49], None]}), folder / "d.parquet")
    for number, text in enumerate(TEXTS[49:]):
        (folder / f"e{number:02d}.txt").write_text(text)
    return folder


@pytest.fixture
def source(tmp_path):
    return write_all_forms(tmp_path / "texts")


@pytest.fixture
def packed(source, tmp_path):
    """A prepared directory of four shards or more."""
    prepare_sources([str(source)], tmp_path / "packed", vocab=300, validation_share=0.2, shard_tokens=1500)
    return tmp_path / "packed"


def texts_of(directory):
    """(training, validation) texts of a packed corpus, in order."""
    opened, tokenizer = open_packed(directory), AutoTokenizer.from_pretrained(directory)
    return tuple(tokenizer.decode(part[:].tolist()).split(END)[:-1] for part in (opened.training, opened.validation))


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- what is written ------------------------------------------------------------------------------------------------


def test_every_form_is_read_and_every_text_is_on_one_side(packed):
    training, validation = texts_of(packed)
    assert sorted([*training, *validation]) == sorted(TEXTS)
    assert len(validation) > 3
    manifest = read_json(packed / "manifest.json")
    assert manifest["documents"] == {"training": len(training), "validation": len(validation)}
    assert [shard["tokens"] for shard in manifest["shards"]["training"]][:-1] == [1500] * (len(manifest["shards"]["training"]) - 1)
    assert len(manifest["shards"]["training"]) > 3
    assert manifest["tokens"]["training"] == sum(shard["tokens"] for shard in manifest["shards"]["training"])
    assert open_packed(packed).bytes_per_token == sum(len(text) for text in validation) / manifest["tokens"]["validation"]
    assert np.load(packed / "training-00000.npy").dtype == np.uint16


def test_compressed_text_is_read_hidden_text_is_not_and_what_is_no_text_is_named(tmp_path):
    folder = tmp_path / "repository"
    (folder / ".git" / "hooks").mkdir(parents=True)
    for place in (".git/HEAD", ".git/hooks/update.sample", ".editorconfig"):
        (folder / place).write_text("rubbish")
    (folder / "a.jsonl").write_bytes(records(TEXTS[:10]))
    (folder / "b.jsonl.bz2").write_bytes(bz2.compress(records(TEXTS[10:20])))
    (folder / "c.json.xz").write_bytes(lzma.compress(records(TEXTS[20:30])))
    (folder / "d.JSONL.zstd").write_bytes(zstandard.compress(records(TEXTS[30:40])))
    for number, (ending, compress) in enumerate({"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.items()):
        (folder / f"e.txt.{ending}").write_bytes(compress(TEXTS[40 + number].encode()))
    (folder / "f.txt").write_text("\r\n".join(TEXTS[43:]))
    (folder / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (folder / "picture.gz").write_bytes(gzip.compress(b"\x89PNG"))
    command = [*OUTGROW, "data", "prepare", str(folder), "--vocab", "300", "--output", str(tmp_path / "out"), "--validation-share", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(text for part in texts_of(tmp_path / "out") for text in part) == sorted([*TEXTS[:43], "\n".join(TEXTS[43:])])
    left_out = [str(folder / "latin.txt"), str(folder / "picture.gz")]
    assert read_json(tmp_path / "out" / "manifest.json")["skipped"] == left_out
    assert f"left out, since they are no UTF-8 text: 2 files, such as '{left_out[0]}'" in done.stdout


def test_text_that_spells_a_control_token_stays_text(packed, tmp_path):
    texts = [f"{text} {END} </s> {number}" for number, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_bytes(records(texts))
    prepare_sources([str(tmp_path / "a.jsonl")], tmp_path / "out", str(packed), validation_share=0.2)
    opened, tokenizer = open_packed(tmp_path / "out"), AutoTokenizer.from_pretrained(packed)
    found = []
    for part in (opened.training[:], opened.validation[:]):
        ends = np.flatnonzero(part == 0)
        assert ends[-1] == len(part) - 1
        found += [tokenizer.decode(text.tolist()) for text in np.split(part, ends)[:-1]]
    assert sorted(text.removeprefix(END) for text in found) == sorted(texts)


def test_the_same_texts_in_other_files_have_the_same_hash_and_sides(packed, tmp_path):
    (tmp_path / "all.jsonl").write_bytes(records([*reversed(TEXTS), *TEXTS], "content"))
    prepare_sources([str(tmp_path / "all.jsonl")], tmp_path / "other", str(packed), validation_share=0.2, text_key="content")
    assert open_packed(tmp_path / "other").corpus_hash == open_packed(packed).corpus_hash
    assert [sorted(part) for part in texts_of(tmp_path / "other")] == [sorted(part) for part in texts_of(packed)]
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == (packed / "tokenizer.json").read_bytes()


def test_a_hub_data_set_is_streamed(source, packed, tmp_path):
    """A folder stands in for the hub: the same loader streams it."""
    for path in source.glob("*"):
        if path.suffix != ".jsonl":
            path.unlink()
    prepare_sources([f"hf:{source}"], tmp_path / "streamed", str(packed), validation_share=0.2)
    assert sorted(text for part in texts_of(tmp_path / "streamed") for text in part) == sorted(TEXTS[:10])


def test_without_a_network_the_hub_is_refused_in_a_sentence(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OutgrowError, match="the hub data set 'owner/name:config' cannot be read .*check its name and the network"):
        prepare_sources(["hf:owner/name:config"], tmp_path / "out", str(packed))
    with pytest.raises(OutgrowError, match="there is no tokenizer 'owner/name' here, and the hub gives none"):
        prepare_sources(["python"], tmp_path / "out", "owner/name")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cuts_pads_and_starts_texts_packs_whole_texts(packed, source, tmp_path):
    tokenizer = Tokenizer.from_file(str(packed / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=700)
    tokenizer.add_special_tokens(["<eos>"])
    (tmp_path / "given").mkdir()
    tokenizer.save(str(tmp_path / "given" / "tokenizer.json"))
    (tmp_path / "given" / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    prepare_sources([str(source)], tmp_path / "out", str(tmp_path / "given" / "tokenizer.json"), validation_share=0.2)
    opened = open_packed(tmp_path / "out")
    assert opened.vocab == 301
    assert (opened.validation[:] == 300).sum() == len(texts_of(packed)[1])
    np.testing.assert_array_equal(np.where(opened.training[:] == 300, 0, opened.training[:]), open_packed(packed).training[:])


# --- resuming -------------------------------------------------------------------------------------------------------


def test_a_killed_work_goes_on_and_ends_in_the_same_bytes(source, packed, tmp_path):
    """Killed for real, between the tokens and the state that counts them, again and again."""
    code = (
        "import os, signal, sys; from pathlib import Path; from outgrow.data import packing\n"
        "packing.BATCH_CHARACTERS, calls, flush = 500, [], packing.flush\n"
        "def fatal(path):\n"
        "    calls.append(path); flush(path)\n"
        "    if len(calls) == 25: os.kill(os.getpid(), signal.SIGKILL)\n"
        "packing.flush = fatal\n"
        "packing.prepare_sources([sys.argv[1]], Path(sys.argv[2]), vocab=300, validation_share=0.2, shard_tokens=1500)\n"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "killed")]
    killed = 0
    while subprocess.run(command, timeout=60).returncode == -9:
        killed += 1
        assert not (tmp_path / "killed").exists()
    assert killed > 1
    assert contents(tmp_path / "killed") == contents(packed)
    assert not (tmp_path / "killed.unfinished").exists()


def interrupt(source, target, monkeypatch):
    """Stops after the first batches."""

    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("outgrow.data.packing.BATCH_CHARACTERS", 500)
    with pytest.raises(KeyboardInterrupt):
        prepare_sources([str(source)], target, vocab=300, validation_share=0.2, progress=stop)


def test_shards_are_on_the_disk_before_the_progress_that_counts_them(source, tmp_path, monkeypatch):
    """A batch may fill several."""
    from outgrow.data import packing

    flushed, told = set(), []

    def write_json(path, content):
        if path.name == packing.PROGRESS and content["tokens"]["training"]:
            told.append(content["tokens"]["training"])
            needed = {f"training-{number:05d}.npy" for number in range(-(-told[-1] // 400))}
            assert needed <= flushed
            assert path.parent.name in flushed
        return real(path, content)

    real, flush = packing.write_json, packing.flush
    monkeypatch.setattr(packing, "write_json", write_json)
    monkeypatch.setattr(packing, "flush", lambda path: (flush(path), flushed.add(path.name)))
    prepare_sources([str(source)], tmp_path / "packed", vocab=300, validation_share=0.2, shard_tokens=400)
    assert told
    assert told[0] > 800


def test_unfinished_work_goes_on_with_the_same_text_and_settings_only(source, tmp_path, monkeypatch):
    target = tmp_path / "out"
    interrupt(source, target, monkeypatch)
    with pytest.raises(OutgrowError, match=r"out.unfinished' was packed with other settings \(vocab 300 there, 299 here\)"):
        prepare_sources([str(source)], target, vocab=299, validation_share=0.2)
    with pytest.raises(OutgrowError, match="holds no packed corpus"):
        open_packed(target)
    first = (source / "a.jsonl").read_bytes()
    (source / "a.jsonl").write_bytes(first.replace(b"word", b"term", 1))
    with pytest.raises(OutgrowError, match="the text is not the one that '.*out.unfinished' was begun with"):
        prepare_sources([str(source)], target, vocab=300, validation_share=0.2)
    (source / "a.jsonl").write_bytes(first)
    prepare_sources([str(source)], target, vocab=300, validation_share=0.2)
    assert sorted(text for part in texts_of(target) for text in part) == sorted(TEXTS)


def test_finished_work_is_found_and_other_settings_are_refused(source, packed, tmp_path, monkeypatch):
    before = contents(packed)
    prepare_sources([str(source)], packed, vocab=300, validation_share=0.2, shard_tokens=1500)
    assert contents(packed) == before
    with pytest.raises(OutgrowError, match=r"packed' was packed with other settings \(text_key text there, body here; vocab"):
        prepare_sources([str(source)], packed, vocab=400, text_key="body", validation_share=0.2, shard_tokens=1500)
    (tmp_path / "full").mkdir()
    monkeypatch.chdir(tmp_path / "full")
    for place in (tmp_path / "full", Path("."), Path("x/..")):
        with pytest.raises(OutgrowError, match="full' exists already and is no packed corpus"):
            prepare_sources([str(source)], place, vocab=300)
    with pytest.raises(OutgrowError, match="'/' exists already"):
        prepare_sources([str(source)], Path("/"), vocab=300)
    with pytest.raises(OutgrowError, match="'out' lies in the source '.', which would hold what is written there; choose another place"):
        prepare_sources(["."], Path("out"), vocab=300)


def test_several_processes_at_once_make_it_once(source, packed, tmp_path):
    """Threads here: the lock holds between open files, whoever opened them."""

    def work(_):
        prepare_sources([str(source)], tmp_path / "out", vocab=300, validation_share=0.2, shard_tokens=1500)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert contents(tmp_path / "out") == contents(packed)


def test_memory_does_not_grow_with_the_corpus(packed, tmp_path):
    """6 MB of text, with what is saved at a time made small; the digests of its documents are all that stays."""
    (tmp_path / "long.jsonl").write_bytes(records(f"{number} " * 3000 for number in range(400)))
    code = (
        "import re, sys; from pathlib import Path; from outgrow.data import packing\n"
        "packing.BATCH_CHARACTERS, peaks = 50_000, []\n"
        "status = Path('/proc/self/status')\n"
        "note = lambda done, total: peaks.append(int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]))\n"
        "packing.prepare_sources([sys.argv[1]], Path(sys.argv[2]), sys.argv[3], progress=note)\n"
        "print(peaks[len(peaks) // 2], peaks[-1])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "long.jsonl"), str(tmp_path / "out"), str(packed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    middle, end = (int(peak) for peak in done.stdout.split())  # KiB; the text of the second half is as much
    assert end - middle < 3 * 1024


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", records(TEXTS[:2]) + b"{text\n", r"a.jsonl', line 3, is not JSON \(.*, column 2\)"),
        ("a.jsonl", b'["text"]\n', "a.jsonl', line 1, is not an object with a 'text'"),
        ("a.jsonl", b'{"content": "x", "id": 1}\n', "a.jsonl', line 1, has no 'text'; it has content, id: name one with --text-key"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl', line 1, has a 'text' that is not text but int"),
        ("a.jsonl", b'{"text": null}\n', "holds no text"),
        ("a.jsonl", b"\xff\n", "a.jsonl' cannot be read after line 0"),
        ("a.jsonl.gz", gzip.compress(records(TEXTS))[:-20], "a.jsonl.gz' cannot be read after line"),
        ("a.jsonl.zst", b"not zst", "a.jsonl.zst' cannot be read after line 0"),
        (
            "a.jsonl.zst",
            TWO_FRAMES[:-9],
            r"a.jsonl.zst' cannot be read after line 3 \(it ends in the middle of a frame\); get the file again",
        ),
        ("a.txt.zst", TWO_FRAMES[:-9], r"a.txt.zst' cannot be read \(it ends in the middle of a frame\); get the file again"),
        ("a.txt.gz", b"not gz", "a.txt.gz' cannot be read .*; get the file again"),
        ("a.parquet", b"PAR1", "a.parquet' is not a whole parquet file"),
        ("a.zip", b"PK", r"files of a form that is not read here \('.*a.zip'\); unpack them, or convert them to text"),
        ("a.tar.gz", b"", "a form that is not read here"),
        ("a.arrow", b"", "a form that is not read here"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"one document", "has 1 documents, too few to hold out a share of 0.04"),
    ],
)
def test_text_that_cannot_serve_is_refused_and_leaves_nothing(tmp_path, packed, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OutgrowError, match=message):
        prepare_sources([str(tmp_path / name)], tmp_path / "out", str(packed))
    assert not list(tmp_path.glob("out*/*.npy"))


def test_a_damaged_half_of_a_character_is_replaced(tmp_path, packed):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "half \\ud800"}\n' + records(TEXTS))
    prepare_sources([str(tmp_path / "a.jsonl")], tmp_path / "out", str(packed), validation_share=0.2)
    assert "half ?" in [text for part in texts_of(tmp_path / "out") for text in part]


def test_a_parquet_file_without_the_column_says_which_it_has(source, packed, tmp_path):
    with pytest.raises(OutgrowError, match="d.parquet' has no column 'body'; it has other, text: name one with --text-key"):
        prepare_sources([str(source / "d.parquet")], tmp_path / "out", str(packed), text_key="body")


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "give either --tokenizer, one that exists, or --vocab"),
        ("nowhere/at/all", "there is no tokenizer 'nowhere/at/all'"),
        ("folder", "there is no tokenizer '.*folder'; give a tokenizer.json"),
        ("folder/bad.json", "bad.json' is not a tokenizer"),
        ("folder/endless.json", "endless.json' has no end-of-text token; name one as 'eos_token'"),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused(source, tmp_path, tokenizer, message):
    from tokenizers import models

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "bad.json").write_text('{"model": 3}')
    Tokenizer(models.BPE({"a": 0}, [])).save(str(folder / "endless.json"))
    given = str(tmp_path / tokenizer) if tokenizer and tokenizer.startswith("folder") else tokenizer
    with pytest.raises(OutgrowError, match=message):
        prepare_sources([str(source)], tmp_path / "out", given)
    assert not list(tmp_path.glob("out*"))


def test_damaged_shards_are_refused_by_name(packed):
    path = packed / "training-00001.npy"
    whole = path.read_bytes()
    for content, message in [
        (whole[:-2], "training-00001.npy' is damaged"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "training-00001.npy' is damaged: its bytes are not those"),
        ((packed / "training-00000.npy").read_bytes(), "training-00001.npy' is damaged: its bytes are not those"),
        (b"", "training-00001.npy' is damaged"),
        (None, "training-00001.npy' is damaged: it is missing"),
    ]:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(OutgrowError, match=message):
            open_packed(packed)
        path.touch()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    open_packed(packed, verify=False)
    (packed / "manifest.json").write_text("{}")
    with pytest.raises(OutgrowError, match="manifest.json' is not the manifest of a packed corpus"):
        open_packed(packed)


# --- runs read it ---------------------------------------------------------------------------------------------------


def test_a_run_reads_prepared_directories_as_one_mixture(packed, tmp_path):
    (tmp_path / "more.jsonl").write_bytes(records([text.replace("word", "term") for text in TEXTS * 2]))
    prepare_sources([str(tmp_path / "more.jsonl")], tmp_path / "more", str(packed), validation_share=0.2)
    places = [{"path": str(packed), "weight": 0.75}, {"path": str(tmp_path / "more"), "weight": 0.25}]
    config = parse(DataConfig, {"sources": places, "context": 16}, "test")
    mixed, single = prepare(config, tmp_path / "cache"), open_packed(packed)
    assert not (tmp_path / "cache").exists()
    assert mixed.vocab == 300
    assert mixed.tokenizer_files == single.tokenizer_files
    batches = Batches(mixed.training, 16, 0)
    usable = (len(single.training) - 1) // 16  # three quarters of the sequences come from as many tokens
    assert batches.sequences_per_epoch == usable * 4 // 3
    assert batches.at(0, 8).shape == (8, 17)
    measured = np.concatenate(list(validation_batches(mixed, config, 4)))
    held_out = (len(single.validation) - 1) // 16
    own = held_out * 4 // 3 * 3 // 4  # all that the first holds out, but for what its share leaves over
    assert own >= held_out - 1
    assert len(measured) == own + held_out * 4 // 3 // 4
    np.testing.assert_array_equal(measured[:own, :-1].flatten(), single.validation[: own * 16])
    assert single.bytes_per_token != mixed.bytes_per_token

    hashes = {prepare(parse(DataConfig, {"sources": some}, "test"), tmp_path).corpus_hash for some in (places, places[:1], places[1:])}
    reweighted = [places[0], {**places[1], "weight": 0.5}]
    assert len({*hashes, prepare(parse(DataConfig, {"sources": reweighted}, "test"), tmp_path).corpus_hash}) == 4


def test_a_single_prepared_source_gives_the_batches_of_the_corpus(source, packed, tmp_path):
    own = prepare(DataConfig(corpus=str(source), vocab=300, validation_share=0.2), tmp_path / "cache")
    given = prepare(parse(DataConfig, {"sources": [{"path": str(packed)}]}, "test"), tmp_path / "cache")
    np.testing.assert_array_equal(Batches(own.training, 16, 1).at(320, 9), Batches(given.training, 16, 1).at(320, 9))
    np.testing.assert_array_equal(own.validation[:], given.validation[:])
    assert own.bytes_per_token == given.bytes_per_token


def test_sources_with_different_tokenizers_are_refused(source, packed, tmp_path):
    prepare_sources([str(source)], tmp_path / "other", vocab=280, validation_share=0.2)
    places = [{"path": str(packed)}, {"path": str(tmp_path / "other")}]
    with pytest.raises(OutgrowError, match="packed' and '.*other' were packed with different tokenizers"):
        prepare(parse(DataConfig, {"sources": places}, "test"), tmp_path)
    with pytest.raises(OutgrowError, match="nowhere' holds no packed corpus; 'outgrow data prepare SOURCE --output .*nowhere' writes one"):
        prepare(parse(DataConfig, {"sources": [{"path": str(tmp_path / "nowhere")}]}, "test"), tmp_path)


def test_sources_that_hold_out_different_shares_are_refused(source, packed, tmp_path):
    """A document that one holds out is one of training in the other."""
    prepare_sources([str(source)], tmp_path / "other", str(packed), validation_share=0.1)
    assert set(texts_of(tmp_path / "other")[0]) & set(texts_of(packed)[1])
    places = [{"path": str(packed)}, {"path": str(tmp_path / "other")}]
    with pytest.raises(
        OutgrowError, match=r"packed' and '.*other' hold out different shares \(0.2 and 0.1\), so one may train on what the"
    ):
        prepare(parse(DataConfig, {"sources": places}, "test"), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sources": [{"path": "a"}], "vocab": 400, "corpus": "x"}, "data.corpus and data.vocab has no effect with data.sources"),
        ({"sources": [{"path": "a"}, {"path": "a"}]}, "names a directory twice"),
        ({"sources": [{"path": "a", "weight": 0}]}, "'sources.0.weight' should be greater than 0"),
        ({"sources": [{"path": "a", "wieght": 1}]}, "unknown key 'sources.0.wieght'; did you mean 'weight'"),
    ],
)
def test_sources_that_contradict_are_refused(content, message):
    with pytest.raises(OutgrowError, match=message):
        parse(DataConfig, content, "test")


def test_the_identity_of_runs_without_sources_is_what_it_was():
    assert "sources" not in DataConfig().identifying()
    one, two = (parse(DataConfig, {"sources": [{"path": "a", "weight": weight}]}, "test") for weight in (1, 2))
    assert len({DataConfig().identity(), one.identity(), two.identity()}) == 3


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_made_and_refuses_in_a_sentence(source, tmp_path):
    command = [*OUTGROW, "data", "prepare", str(source), "--vocab", "300", "--workers", "1", "--output", str(tmp_path / "out")]
    done = subprocess.run([*command, "--validation-share", "0.2"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    tokens = read_json(tmp_path / "out" / "manifest.json")["tokens"]
    assert done.stdout.startswith(f"{tokens['training']:,} training tokens of ")
    assert done.stderr == ""
    refused = subprocess.run([*command, "--validation-share", "2"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1
    assert refused.stderr == "outgrow: --validation-share takes a share between 0 and 1, such as 0.04, not 2\n"
