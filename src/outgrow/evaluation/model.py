"""A checkpoint opened to be asked: the model that `transformers` makes of it, its tokenizer, and a hash of its weights.

No code and no pickle of a checkpoint is run: weights are safetensors, families are those that `transformers` has.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from outgrow.arch import positions
from outgrow.checkpoint.describe import CONTEXT
from outgrow.checkpoint.huggingface import CONFIG, INDEX, SINGLE
from outgrow.checkpoint.lineage import read_lineage
from outgrow.config import hash_of
from outgrow.data.tokenizer import open_encoder
from outgrow.errors import OutgrowError, one_line
from outgrow.files import file_hash, read_json

DTYPES = ("auto", "float32", "bfloat16", "float16")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_READ_WITH_IT = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")


@dataclass(frozen=True)
class Opened:
    """A model in memory.

    Attributes:
        model: of transformers, on `device`, not in training.
        tokenizer: of transformers.
        context: tokens that it sees at once, at most.
        prefix: the token before a text: what was packed between documents where outgrow trained the model; of others what begins a text,
            or else what ends one.
        trained: by outgrow, on text alone: its tokenizer adds no special tokens, and reads none in a text.
    """

    model: Any
    tokenizer: Any
    context: int
    prefix: int
    trained: bool

    @property
    def device(self) -> torch.device:
        return self.model.device


def open_model(
    directory: Path, tokenizer: str | None = None, context: int | None = None, device: str | None = None, dtype: str = "auto"
) -> Opened:  # fmt: skip
    """Opens a checkpoint directory of any family that `transformers` has.

    Args:
        directory: grown, trained, or from elsewhere; a half-open masked one holds the weights that it runs on.
        tokenizer: a directory with a tokenizer, where the checkpoint has none.
        context: tokens that it may see at once; as many as its config says if not given.
        device: `cuda` where there is one, or else `cpu`, if not given.
        dtype: `auto` is what the weights are stored in, and float32 on a CPU.

    Raises:
        OutgrowError: no checkpoint, no tokenizer, weights that are only pickled, a family that needs code of its own.
    """
    if dtype not in DTYPES:
        raise OutgrowError(f"--dtype takes {', '.join(DTYPES)}, not '{dtype}'")
    if not (directory / CONFIG).is_file():
        raise OutgrowError(f"there is no checkpoint in '{directory}': no '{CONFIG}'")
    place = _device(device)
    chosen = "float32" if dtype == "auto" and place.type == "cpu" else dtype
    trained, folder = is_trained(directory), Path(tokenizer) if tokenizer else directory
    words = _tokenizer(folder, trained)
    transformers.utils.logging.disable_progress_bar()
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=chosen, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (ValueError, OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise OutgrowError(f"transformers cannot open '{directory}': {one_line(error)}") from None
    if odd := next((name for name, value in model.named_parameters() if not bool(value.isfinite().all())), None):
        raise OutgrowError(
            f"'{odd}' of '{directory}' holds what is no number, so nothing can be measured; give a checkpoint from before that"
        )
    entries = model.get_input_embeddings().weight.shape[0]
    if len(words) > entries:
        raise OutgrowError(
            f"the tokenizer has {len(words):,} entries and the model of '{directory}' {entries:,}; give the tokenizer it was trained with, "
            "--tokenizer DIR"
        )
    prefix = open_encoder(folder).end if trained else _prefix(words, directory)
    return Opened(model.to(place).eval(), words, _context(model.config, context), prefix, trained)


def is_trained(directory: Path) -> bool:
    """Did outgrow train a checkpoint, or what it was grown from?"""
    return read_lineage(directory).tokens > 0


def weights_hash(directory: Path) -> str:
    """One sha256 for a checkpoint's weights and config: what it computes, whatever lies beside them."""
    names = [SINGLE]
    if (directory / INDEX).is_file() and not (directory / SINGLE).is_file():
        index = read_json(directory / INDEX)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise OutgrowError(f"'{directory / INDEX}' needs a 'weight_map' from tensors to files")
        names = sorted(set(shards.values()))
    missing = [name for name in (CONFIG, *names) if not (directory / name).is_file()]
    if missing:
        raise OutgrowError(f"there is no '{missing[0]}' in '{directory}'; give a checkpoint directory with safetensors in it")
    return hashlib.sha256("".join(file_hash(directory / name) for name in (CONFIG, *names)).encode()).hexdigest()


def tokenizer_hash(directory: Path, tokenizer: str | None) -> str:
    """A hash of a tokenizer's files."""
    folder = Path(tokenizer) if tokenizer else directory
    return hash_of({name: file_hash(folder / name) for name in (*_TOKENIZERS, *_READ_WITH_IT) if (folder / name).is_file()})


def _tokenizer(folder: Path, trained: bool) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise OutgrowError(f"'{folder}' has no tokenizer; give the directory of the one that the model was trained with, --tokenizer DIR")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, split_special_tokens=trained
        )
    except Exception as error:  # tokenizer libraries raise what they like
        raise OutgrowError(f"the tokenizer in '{folder}' cannot be opened ({one_line(error)}); give another, --tokenizer DIR") from None


def _prefix(tokenizer: Any, directory: Path) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise OutgrowError(
        f"the tokenizer of '{directory}' names no token that begins or ends a text; set eos_token in its tokenizer_config.json"
    )


def _context(config: Any, asked: int | None) -> int:
    longest = positions(config.to_dict())
    if asked and longest and asked > longest:
        raise OutgrowError(f"--context {asked:,} is more than the {longest:,} tokens that the model takes at once; ask for fewer")
    return asked or longest or CONTEXT


def _device(name: str | None) -> torch.device:
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise OutgrowError(f"--device takes cpu, cuda, cuda:1, mps, ..., not '{name}'") from None
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise OutgrowError(f"--device {name} is asked for and torch finds none; leave it out, or install torch for it") from None
    return found
