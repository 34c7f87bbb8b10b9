"""Tokenizers: a byte-level BPE trained on the training documents, or one that exists; saved so that `AutoTokenizer` reads it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from outgrow.errors import OutgrowError, one_line
from outgrow.files import read_json

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # for files that do not say


@dataclass(frozen=True)
class Encoder:
    """A tokenizer ready to pack documents.

    Attributes:
        vocab: one more than its largest token; a model needs at least as many.
        end: the token that ends a document.
    """

    tokenizer: Tokenizer
    vocab: int
    end: int

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.vocab <= 2**16 else np.uint32)

    def row(self, texts: list[str]) -> NDArray[Any]:
        """The tokens of texts, one behind the other, each with its end; tokenized by as many threads as RAYON_NUM_THREADS allows."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return np.concatenate([np.empty(0, self.dtype), *(np.array([*one.ids, self.end], self.dtype) for one in encoded)])


def train(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with `vocab` entries; entry 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab:
        raise OutgrowError(
            f"the corpus is too small for a vocabulary of {vocab}: it gave {tokenizer.get_vocab_size()}; ask for that, or give more text"
        )
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, the two files a Hugging Face directory carries."""
    tokenizer.save(str(directory / "tokenizer.json"))
    _save_settings(directory, END_OF_TEXT)


def locate(name: str) -> Path:
    """The tokenizer.json of a file, a directory or a hub id."""
    place = Path(name)
    if not place.exists() and _HUB_ID.fullmatch(name):
        from huggingface_hub import snapshot_download

        try:
            place = Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
        except Exception as error:  # the network's, the hub's and the cache's own classes
            reason = str(error).splitlines()[0]
            raise OutgrowError(f"there is no tokenizer '{name}' here, and the hub gives none ({reason}); give a tokenizer.json") from None
    if place.is_dir():
        place = place / "tokenizer.json"
    if not place.is_file():
        raise OutgrowError(
            f"there is no tokenizer '{name}'; give a tokenizer.json, a directory with one, or a hub id whose repository has one"
        )
    return place


def copy(source: Path, directory: Path) -> None:
    """Copies a tokenizer.json byte for byte, and the settings beside it where there are some."""
    shutil.copyfile(source, directory / "tokenizer.json")
    settings = source.parent / "tokenizer_config.json"
    if settings.exists():
        shutil.copyfile(settings, directory / "tokenizer_config.json")
    else:
        _save_settings(directory, _end(_open(source), {}, source))


def open_encoder(directory: Path) -> Encoder:
    """The tokenizer of a directory; it neither cuts nor pads, whatever its file says, and text that spells a control token is text."""
    path = directory / "tokenizer.json"
    tokenizer = _open(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    end = _end(tokenizer, read_json(directory / "tokenizer_config.json"), path)
    vocabulary = tokenizer.get_vocab()
    return Encoder(tokenizer, max(vocabulary.values()) + 1, vocabulary[end])


def _open(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise OutgrowError(f"'{path}' is not a tokenizer ({one_line(error)}); give a tokenizer.json of the tokenizers library") from None


def _end(tokenizer: Tokenizer, settings: dict[str, Any], path: Path) -> str:
    """The token that ends a document: the one that the settings name, or a well-known one."""
    said = settings.get("eos_token")
    said = said.get("content") if isinstance(said, dict) else said
    for end in [said] if said else _KNOWN_ENDS:
        if tokenizer.token_to_id(end) is not None:
            return end
    raise OutgrowError(
        f"'{path}' has no end-of-text token{f' {said!r}' if said else ''}; name one as 'eos_token' in a tokenizer_config.json beside it"
    )


def _save_settings(directory: Path, end: str) -> None:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "bos_token": end,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
