"""Hugging Face checkpoint directories: config.json and safetensors, one file or shards with an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any

from outgrow.arch import FAMILIES, Arch, arch_for
from outgrow.checkpoint.dcp import Blob, Chunked, is_dcp, read_dcp
from outgrow.checkpoint.lineage import LINEAGE
from outgrow.checkpoint.names import Names, names_of
from outgrow.checkpoint.safetensors_file import Stored, entry_bytes, stored_in
from outgrow.errors import OutgrowError
from outgrow.files import file_hash, read_json

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SIDE_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}
_KNOWN = (
    "tokenizer", "vocab", "merges.txt", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model",
    "chat_template",
)  # fmt: skip
_END = 1 << 20  # bytes of a weight file that tell it from another
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
# What is true of the source alone: its weights' place and sizes, its training, its scores.
_NOT_SIDE = {
    CONFIG, LINEAGE, "params.json", "training.json", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory, its headers read and checked against its config; no tensor is loaded.

    Attributes:
        directory: where it lies.
        arch: its family.
        config: its config.json.
        tensors: name, as transformers names it -> where it lies.
        names: of a distributed checkpoint: what its tensors are called there.
        held: of a distributed checkpoint: everything in it, by the names there.
        tied: tensors that stand in the files although the config ties them to others.
        file: the one that is the source by itself; None where the directory is.
    """

    directory: Path
    arch: Arch
    config: dict[str, Any]
    tensors: Mapping[str, Stored | Chunked]
    names: Names | None = None
    held: Mapping[str, Chunked | Blob] = field(default_factory=dict[str, "Chunked | Blob"])
    tied: Mapping[str, Stored | Chunked] = field(default_factory=dict[str, "Stored | Chunked"])
    file: Path | None = None

    @property
    def title(self) -> str:
        """What people call it: its id on the hub with the revision, where the hub's cache holds it, or the name of its directory."""
        place = self.directory.resolve()
        owner, _, name = place.parent.parent.name.removeprefix("models--").partition("--")
        cached = place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--") and name
        return f"{owner}/{name}@{place.name}" if cached else place.name

    @property
    def weight_files(self) -> list[Path]:
        return sorted(set().union(*(stored.files for stored in self.tensors.values())))

    def hashes(self, stopped: Event | None = None) -> dict[str, str]:
        """File name -> sha256 of every weight file; given up, and then of no worth, once `stopped` is set."""
        return {path.name: file_hash(path, stopped) for path in self.weight_files}

    def fingerprint(self) -> str:
        """What tells it from another in an instant: a hash of its config, its receipt, and each weight file's size and ends."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in (self.directory / LINEAGE, *self.weight_files):
            if path.is_file():
                size = path.stat().st_size
                with path.open("rb") as file:
                    digest.update(f"{path.name} {size}".encode() + file.read(_END))
                    file.seek(max(0, size - _END))
                    digest.update(file.read(_END))
        return digest.hexdigest()

    def side_files(self) -> list[Path]:
        """Tokenizer, generation config, chat templates, code and licence: what travels beside the weights."""
        near = [*sorted(self.directory.iterdir()), *sorted(self.directory.glob("additional_chat_templates/*.jinja"))]
        files = (path for path in near if path.is_file() and path.name not in _NOT_SIDE and not path.name.endswith(".index.json"))
        found = [path for path in files if self._is_side(path)]
        if away := [path for path in found if not self._is_here(path)]:
            raise OutgrowError(f"'{away[0]}' is a link out of its checkpoint, and is not followed; put the file there, or remove the link")
        return found

    def _is_side(self, path: Path) -> bool:
        """Beside a source that is one file lies what belongs to others too, so its companions are known by their names."""
        kind = path.suffix in _SIDE_SUFFIXES and (not self.file or path.name.startswith(_KNOWN))
        return kind or path.stem.upper().startswith(_LEGAL)

    def _is_here(self, path: Path) -> bool:
        """Does a file lie in the directory itself, or, linked, where the hub's cache keeps it?"""
        here, place = self.directory.resolve(), path.resolve()
        return here in place.parents or (here.parent.name == "snapshots" and place.parent == here.parent.parent / "blobs")


def open_checkpoint(
    directory: Path, families: Iterable[Arch] = FAMILIES, trust_pickle: bool = False, config_file: Path | None = None
) -> Checkpoint:
    """Reads config.json and every header of a directory, and checks names and shapes against the architecture.

    Args:
        directory: a Hugging Face directory, one safetensors file, or a distributed checkpoint (DCP).
        families: the architectures that may be read.
        trust_pickle: open the metadata of a distributed checkpoint, a pickle, by the rules of `dcp.read_dcp`.
        config_file: the config.json, where none lies beside the weights.
    """
    file = directory if directory.is_file() else None
    directory = directory.parent if file else directory
    if not directory.is_dir():
        raise OutgrowError(f"there is no directory '{directory}'; give a Hugging Face checkpoint directory")
    distributed = file is None and is_dcp(directory)
    if distributed and config_file is None and not (directory / CONFIG).exists():
        raise OutgrowError(f"the distributed checkpoint '{directory}' has no '{CONFIG}' beside it; say with --config where it is")
    config_file = config_file or directory / CONFIG
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise OutgrowError(f"'{config_file}' must hold a JSON object")
    arch = arch_for(config, families)
    held = read_dcp(directory, trust_pickle) if distributed else {}
    names = names_of(held, arch, config) if distributed else None
    tensors = names.tensors(held, arch, config) if names else stored_tensors(file or directory, arch)
    if arch.layers(config) > len(tensors):
        raise OutgrowError(f"config.json of '{directory}' says {arch.layers(config):,} layers, and its files hold {len(tensors)} tensors")
    experts = arch.sizes(config).get("expert", 0)
    if experts > len(tensors):
        raise OutgrowError(f"config.json of '{directory}' says {experts:,} experts, and its files hold {len(tensors)} tensors")
    expected = arch.shapes(config)
    ignored = set(arch.aliases(config)) | {
        arch.layer_prefix.format(layer) + name for layer in range(arch.layers(config)) for name in arch.buffers
    }
    _same_names(directory, set(tensors) - ignored, set(expected))
    for name, shape in expected.items():
        if tensors[name].entry.shape != shape:
            raise OutgrowError(f"'{name}' in '{directory}' has shape {list(tensors[name].entry.shape)}, and config.json says {list(shape)}")
    tied = {alias: tensors[alias] for alias in arch.aliases(config) if alias in tensors}
    return Checkpoint(directory, arch, config, {name: tensors[name] for name in expected}, names, held, tied, file)


def stored_tensors(directory: Path, arch: Arch) -> dict[str, Stored]:
    """Every tensor in a directory's weight files, or in one file, named as in a file that was saved with the output head."""
    tensors = stored_in(directory) if directory.is_file() else _stored(directory)
    prefix = arch.backbone_prefix
    if not prefix or any(name.startswith(prefix) for name in tensors):
        return tensors
    return {name if name in arch.top else prefix + name: stored for name, stored in tensors.items()}


def shards(tensors: Mapping[str, tuple[str, tuple[int, ...]]], largest: int) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """Splits tensors (name -> dtype, shape), in order, into files of at most `largest` bytes of tensors each."""
    files: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    room = largest
    for name, (dtype, shape) in tensors.items():
        size = entry_bytes(dtype, shape)
        if size > room and files[-1]:
            files.append({})
            room = largest
        files[-1][name] = (dtype, shape)
        room -= size
    return files


def shard_name(number: int, total: int) -> str:
    """File name of shard `number`, from 0, in the hub's convention."""
    return SINGLE if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def index_text(weight_map: Mapping[str, str], total_bytes: int) -> str:
    """The text of an index file."""
    return json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}, indent=2) + "\n"


def _stored(directory: Path) -> dict[str, Stored]:
    """Every tensor in the directory's weight files; where there are both, of the single file, as transformers has it."""
    if (directory / SINGLE).exists():
        return stored_in(directory / SINGLE)
    if (directory / INDEX).exists():
        return _indexed(directory)
    if any(directory.glob("*.bin")):
        raise OutgrowError(f"'{directory}' holds pickled weights only, which are not opened; save the model as safetensors first")
    raise OutgrowError(f"'{directory}' holds no weights: neither '{SINGLE}' nor '{INDEX}'")


def _indexed(directory: Path) -> dict[str, Stored]:
    index = read_json(directory / INDEX, unique=True)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise OutgrowError(f"'{directory / INDEX}' needs a 'weight_map' of tensor names to file names")
    found: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        if PurePosixPath(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise OutgrowError(f"'{directory / INDEX}' points outside its directory: '{name}'")
        if not (directory / name).is_file():
            raise OutgrowError(f"'{directory / INDEX}' names the shard '{name}', which is missing")
        for tensor, stored in stored_in(directory / name).items():
            if tensor in found:
                raise OutgrowError(f"the tensor '{tensor}' stands in both '{found[tensor].path.name}' and '{name}'")
            found[tensor] = stored
    for tensor, name in weight_map.items():
        if tensor not in found or found[tensor].path.name != name:
            raise OutgrowError(f"'{directory / INDEX}' says that '{tensor}' is in '{name}', and it is not")
    return found


def _same_names(directory: Path, found: set[str], expected: set[str]) -> None:
    if missing := sorted(expected - found):
        raise OutgrowError(f"'{directory}' lacks the tensor '{missing[0]}'{_and_more(missing)} that its config.json calls for")
    if unknown := sorted(found - expected):
        raise OutgrowError(f"'{directory}' holds the tensor '{unknown[0]}'{_and_more(unknown)}, which its config.json does not call for")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
