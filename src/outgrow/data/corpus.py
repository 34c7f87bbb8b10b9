"""Sources of text, the distinct documents in them, and the side of each: training or held out."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from outgrow.data.readers import Texts, hub, is_read, reader
from outgrow.errors import OutgrowError

EMBEDDED, INSTALLED, HUB = "python", "site-packages", "hf:"
_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text with the name it is found under, relative to its source.

    Attributes:
        position: bytes of all sources that were read to find it, for progress.
    """

    name: str
    text: str
    position: int = 0

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(self.text.encode()).digest()


def read(sources: Sequence[str], text_key: str = "text", skipped: list[str] | None = None) -> Iterator[Document]:
    """The non-empty documents of sources, one after another, files in name order; hidden ones are not looked at.

    Args:
        sources: "python" for the standard library of the running interpreter, "site-packages" for what is installed beside it,
            "hf:owner/name" or "hf:owner/name:config" for a hub data set, or the path of a file or folder.
        text_key: where the text is in the records of .jsonl files, compressed or not, of .parquet files and of hub data sets.
        skipped: gets the files that hold no UTF-8 text.
    """
    before = 0
    for source in sources:
        empty = True
        for name, size, texts in _pieces(source, text_key):
            for text, done in texts:
                if text is None:
                    if skipped is not None:
                        skipped.append(str(Path(source, name)))
                elif text.strip():
                    empty = False
                    yield Document(name, text, before + done)
            before += size
        if empty:
            raise OutgrowError(f"the corpus '{source}' holds no text; give a folder with UTF-8 text files, or '{EMBEDDED}'")


def size(sources: Sequence[str]) -> int | None:
    """Bytes of all sources; None where a hub data set is among them."""
    sizes = [sum(path.stat().st_size for path in _files(source)[1]) for source in sources if not source.startswith(HUB)]
    return sum(sizes) if len(sizes) == len(sources) else None


def documents(source: str, skipped: list[str] | None = None) -> list[Document]:
    """The distinct non-empty documents of a source; see `read`."""
    return list(distinct(read([source], skipped=skipped), set()))


def distinct(found: Iterable[Document], seen: set[bytes]) -> Iterator[Document]:
    """The documents whose text is not among the digests in `seen`, which are added to it (some 120 bytes of memory each)."""
    for document in found:
        if document.digest not in seen:
            seen.add(document.digest)
            yield document


def is_held_out(document: Document, validation_share: float) -> bool:
    """The document's side. It depends on its own text alone, so no text can ever be on both."""
    return int.from_bytes(document.digest[:4], "big") < int(validation_share * 2**32)


def held_out(sources: Sequence[str], validation_share: float, text_key: str = "text") -> Iterator[Document]:
    """The held-out documents of sources, in order."""
    return (document for document in read(sources, text_key) if is_held_out(document, validation_share))


def split(found: Iterable[Document], validation_share: float) -> tuple[list[Document], list[Document]]:
    """(training, validation) documents."""
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in found:
        sides[is_held_out(document, validation_share)].append(document)
    return sides


def content_hash(digests: Iterable[bytes]) -> str:
    """One hash for a whole corpus: of every text, whatever the files are called or where they lie."""
    total = hashlib.sha256()
    for digest in sorted(digests):
        total.update(digest.hex().encode())
    return total.hexdigest()


def _pieces(source: str, text_key: str) -> Iterator[tuple[str, int, Texts]]:
    """(name, bytes, texts) of each file of a source."""
    if source.startswith(HUB):
        yield source, 0, hub(source.removeprefix(HUB), text_key)
        return
    root, paths = _files(source)
    for path in paths:
        yield path.relative_to(root).as_posix(), path.stat().st_size, reader(path)(path, text_key)


def _files(source: str) -> tuple[Path, list[Path]]:
    """(root, files in name order) of a source on this machine."""
    standard = {EMBEDDED: "stdlib", INSTALLED: "purelib"}
    root = Path(sysconfig.get_paths()[standard[source]]) if source in standard else Path(source)
    if not root.exists():
        raise OutgrowError(
            f"the corpus '{source}' does not exist; give a file of text, a folder of them, '{EMBEDDED}', '{INSTALLED}' or '{HUB}owner/name'"
        )
    inside = root.rglob("*.py" if source in standard else "*")
    paths = [root] if root.is_file() else sorted(path for path in inside if _is_source(path.relative_to(root)) and path.is_file())
    if unread := [f"'{path}'" for path in paths if not is_read(path)]:
        names = ", ".join(unread[:3]) + (f" and {len(unread) - 3:,} more" if unread[3:] else "")
        raise OutgrowError(
            f"the corpus '{source}' has files of a form that is not read here ({names}); "
            "unpack them, or convert them to text, .jsonl or .parquet, or take them out of it"
        )
    return root, paths


def _is_source(path: Path) -> bool:
    """Is nothing on a path hidden, and nothing of it installed or made by the interpreter?"""
    return not any(part.startswith(".") or part in _NOT_SOURCE for part in path.parts)
