"""Files and directories that are either whole or absent: written aside, flushed to disk, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outgrow.errors import OutgrowError


@contextmanager
def new_directory(target: Path, replace: bool = False) -> Generator[Path, None, None]:
    """Yields a temporary sibling of `target` that becomes `target` when the block ends well, and vanishes when not.

    A process that is killed leaves a hidden `.NAME.partial-…` folder, never half a `target`; the next call removes it. With
    `replace` a directory that stands there is moved aside last of all, and then removed.
    """
    if target.exists() and not replace:
        raise OutgrowError(f"'{target}' exists already; remove it or choose another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        if replace and target.exists():
            before = target.with_name(f".{target.name}.replaced-{os.getpid()}")
            target.rename(before)
            temporary.rename(target)
            shutil.rmtree(before)
        else:
            temporary.rename(target)
        flush(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def flush(path: Path) -> None:
    """Forces a file or directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    flush(temporary)
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Reads JSON; a missing or malformed file is told in one sentence."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OutgrowError(f"there is no '{path.name}' in '{path.parent}'") from None
    except (ValueError, RecursionError) as error:  # ValueError: malformed, not UTF-8, or a number of thousands of digits
        raise OutgrowError(f"'{path}' is not valid JSON: {error}") from None


def _remove_leftovers(target: Path) -> None:
    """Removes what killed processes left of `target`; a living process keeps its own."""
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        pid = leftover.name.rpartition("-")[2]
        if pid == str(os.getpid()) or not _alive(pid):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def file_hash(path: Path) -> str:
    """The hash of a file's bytes, 4 MiB in memory at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
