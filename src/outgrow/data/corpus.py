"""Sources of text: the Python standard library on this machine, or a folder of text files."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from outgrow.errors import OutgrowError

EMBEDDED = "python"
_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text with the name it is found under, relative to its source."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def documents(source: str) -> list[Document]:
    """The distinct non-empty documents of a source, in name order.

    Args:
        source: "python" for the standard library of the running interpreter, or the path of a text file or folder.
    """
    if source == EMBEDDED:
        root, pattern = Path(sysconfig.get_paths()["stdlib"]), "*.py"
    else:
        root, pattern = Path(source), "*"
        if not root.exists():
            raise OutgrowError(f"the corpus '{source}' does not exist; give a text file, a folder of them, or '{EMBEDDED}'")
    seen: set[str] = set()
    found: list[Document] = []
    for path in _files(root, pattern):
        text = _text(path)
        document = Document(path.relative_to(root).as_posix(), text or "")
        if document.text.strip() and document.digest not in seen:
            seen.add(document.digest)
            found.append(document)
    if not found:
        raise OutgrowError(f"the corpus '{source}' holds no text; give a folder with UTF-8 text files, or '{EMBEDDED}'")
    return found


def split(found: list[Document], validation_share: float) -> tuple[list[Document], list[Document]]:
    """(training, validation) documents. A document's side depends on its own text alone, so it can never be on both."""
    limit = int(validation_share * 16**8)
    held_out = [int(document.digest[:8], 16) < limit for document in found]
    training = [document for document, held in zip(found, held_out, strict=True) if not held]
    validation = [document for document, held in zip(found, held_out, strict=True) if held]
    return training, validation


def content_hash(found: list[Document]) -> str:
    """One hash for a whole corpus: of every text, whatever the files are called or where they lie."""
    total = hashlib.sha256()
    for digest in sorted(document.digest for document in found):
        total.update(digest.encode())
    return total.hexdigest()


def _files(root: Path, pattern: str) -> Iterator[Path]:
    if root.is_file():
        return iter([root])
    inside = (path for path in root.rglob(pattern) if not _NOT_SOURCE & set(path.relative_to(root).parts))
    return iter(sorted(path for path in inside if path.is_file()))


def _text(path: Path) -> str | None:
    """The file's text, or None where it is not UTF-8 (a few test files of the standard library are not, on purpose)."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
