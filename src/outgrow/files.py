"""Files and directories that are either whole or absent: written aside, flushed to disk, renamed."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any

from outgrow.errors import OutgrowError


@contextmanager
def new_directory(target: Path, replace: bool = False) -> Generator[Path, None, None]:
    """Yields a temporary sibling of `target` that becomes `target` when the block ends well, and vanishes when not.

    A process that is killed leaves a hidden `.NAME.partial-…` folder, never half a `target`; the next call, or `mend`, removes it. With
    `replace` a directory that stands there is moved aside last of all, and then removed; killed in between, the next call puts it back.
    """
    target = without_links(target)
    mend(target.parent, glob.escape(target.name))
    if target.exists() and not replace:
        raise OutgrowError(f"'{target}' exists already; remove it or choose another place")
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        if replace and target.exists():
            before = target.with_name(f".{target.name}.replaced-{os.getpid()}")
            target.rename(before)
            try:
                temporary.rename(target)
            except BaseException:
                before.rename(target)
                raise
            shutil.rmtree(before, ignore_errors=True)
        else:
            temporary.rename(target)
        flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def without_links(path: Path) -> Path:
    """Where a path leads, through every link but one at its very end, which stays what it is."""
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def flush(path: Path) -> None:
    """Forces a file or directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON as `write_text` writes."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_at(file: int, data: memoryview, place: int) -> None:
    """Writes all of a buffer to a place in an open file; the system may take it in parts."""
    while data:
        written = os.pwrite(file, data, place)
        data, place = data[written:], place + written


class DuplicateKeyError(ValueError):
    """A JSON object names a key twice."""


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON (`object_pairs_hook`) whose keys stand once each; which of two values is meant nobody knows."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DuplicateKeyError(key)
        found[key] = value
    return found


def read_json(path: Path, unique: bool = False) -> Any:
    """Reads JSON; a missing or malformed file is told in one sentence, and if asked for, a key that stands twice."""
    refuse_special(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates if unique else None)
    except DuplicateKeyError as error:
        raise OutgrowError(f"'{path}' names '{error}' twice") from None
    except FileNotFoundError:
        raise OutgrowError(f"there is no '{path.name}' in '{path.parent}'") from None
    except (ValueError, RecursionError) as error:  # ValueError: malformed, not UTF-8, or a number of thousands of digits
        raise OutgrowError(f"'{path}' is not valid JSON: {error}") from None


def refuse_special(path: Path) -> None:
    """Refuses what is there and is no regular file: reading a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise OutgrowError(f"'{path}' is not a regular file")


def mend(folder: Path, names: str = "*") -> None:
    """Removes what killed processes left in a folder, and puts back what one of them had moved aside; living ones keep their own.

    Nothing in it may be in the making in this process, whose number a killed one may have had.
    """
    for kind in ("partial", "replaced"):
        for leftover in folder.glob(f".{names}.{kind}-*"):
            name, _, pid = leftover.name[1:].rpartition(f".{kind}-")
            if not pid.isdigit() or (pid != str(os.getpid()) and _alive(pid)):
                continue
            if kind == "replaced" and not (folder / name).exists():
                leftover.rename(folder / name)
            else:
                shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def file_hash(path: Path, stopped: Event | None = None) -> str:
    """The hash of a file's bytes, 4 MiB in memory at a time; given up, and then of no worth, once `stopped` is set."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while not (stopped and stopped.is_set()) and (block := file.read(1 << 22)):
            digest.update(block)
    return digest.hexdigest()
