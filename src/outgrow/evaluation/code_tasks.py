"""Questions made of held-out Python: which name, which bracket, which indentation comes next. They need no network and no licence.

Each question is a stretch of a document, cut off where something is decided that the text before shows, and the ways in which it might
go on. They are chosen by hash, so the same documents give the same questions on every machine.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import keyword
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from outgrow.data.corpus import Document

CHARACTERS = 500  # of text before a question: some 200 tokens of a small vocabulary
TEXT_CHARACTERS = 4000  # of a document whose bits per byte are measured
FAR = 25  # characters between brackets, from which on the last few tokens do not show what is open
_PAIRS = {")": "(", "]": "[", "}": "{"}
_WORTHY = 3  # characters of a name, at least


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        context: the text before.
        choices: the ways to go on, in an order that says nothing.
        answer: the index of the document's own.
        document, offset: where it stands, in characters.
        kind: questions are chosen in equal numbers of each kind, so that no answer is likely beforehand.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    document: str
    offset: int
    kind: str = ""

    @property
    def order(self) -> str:
        return _hash(self.context, *self.choices)


@dataclass(frozen=True)
class Token:
    """A token of Python and its offset in the document."""

    kind: int
    text: str
    offset: int
    column: int


def make_questions(found: Iterable[Document], count: int) -> dict[str, list[dict[str, Any]]]:
    """Task -> its documents as records, at most `count` each, of the Python among the documents; any other text gives text alone.

    Args:
        found: held-out documents; read once, a handful kept.
        count: of questions a task.
    """
    best: dict[tuple[str, str], list[tuple[int, str, dict[str, Any]]]] = defaultdict(list)
    for document in found:
        for task, kind, order, record in _records(document):
            heap, entry = best[task, kind], (-int(order[:16], 16), order, record)
            if not any(order == kept[1] for kept in heap):
                (heapq.heappush if len(heap) < count else heapq.heappushpop)(heap, entry)
    return {task: _equal(task, best, count) for task in TASKS}


def _equal(task: str, best: dict[tuple[str, str], list[tuple[int, str, dict[str, Any]]]], count: int) -> list[dict[str, Any]]:
    """As many of each kind of a task as there are of the rarest, in turn, so that the first few of them hold each kind too."""
    heaps = [sorted(heap, key=lambda entry: -entry[0]) for (name, _), heap in sorted(best.items()) if name == task]
    share = min([count // max(len(heaps), 1), *map(len, heaps)], default=0)
    return [record for turn in zip(*(heap[:share] for heap in heaps), strict=True) for _, _, record in turn]


def _records(document: Document) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(task, kind, order, record) of everything that a document gives."""
    yield "code_text", "", _hash(document.text), {"text": document.text[:TEXT_CHARACTERS], "document": document.name}
    tokens = python_tokens(document.text)
    for task, questions in QUESTIONS.items():
        for question in questions(document, tokens):
            record = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(question).items()}
            yield task, question.kind, question.order, record


def _without_f_strings(tokens: list[tokenize.TokenInfo]) -> Iterator[tokenize.TokenInfo]:
    """From Python 3.12 on names and brackets inside f-strings are tokens; before, each was one of a kind that no question asks for."""
    depth = 0
    for token in tokens:
        kind = tokenize.tok_name[token.type]
        depth += kind.endswith("STRING_START") - kind.endswith("STRING_END")
        if not depth and not kind.endswith("STRING_END"):
            yield token


def python_tokens(text: str) -> list[Token]:
    """The tokens of a Python source; none where it is not one."""
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    try:
        found = list(tokenize.generate_tokens(io.StringIO(text, newline="").readline))
    except (tokenize.TokenError, SyntaxError):
        return []
    inside = [token for token in _without_f_strings(found) if token.start[0] <= len(lines)]
    tokens = [Token(token.type, token.string, starts[token.start[0] - 1] + token.start[1], token.start[1]) for token in inside]
    return (
        tokens if all(text.startswith(token.text, token.offset) for token in tokens if token.kind in (tokenize.NAME, tokenize.OP)) else []
    )


def identifiers(document: Document, tokens: list[Token]) -> Iterator[Question]:
    """A name that stood in the text before, against three others that stood there too, of much the same length."""
    names = [token for token in tokens if token.kind == tokenize.NAME and _is_worthy(token.text)]
    for place, token in enumerate(names):
        if document.text[: token.offset].rpartition("\n")[2].strip() == "":
            continue  # what begins a line is anybody's guess
        context = _before(document.text, token.offset)
        seen: dict[str, None] = {}
        for earlier in reversed(names[:place]):
            if earlier.offset < token.offset - len(context):
                break
            seen.setdefault(earlier.text)
        others = [name for name in seen if not name.startswith(token.text) and not token.text.startswith(name)]
        if token.text in seen and len(others) >= 3:
            nearest = sorted(others, key=lambda name: (abs(len(name) - len(token.text)), _hash(context, name)))[:3]
            yield _question(document, token.offset, context, token.text, nearest)


def brackets(document: Document, tokens: list[Token]) -> Iterator[Question]:
    """Which of the three brackets closes what is open, where the opening one can be seen, far off or with another pair inside."""
    opened: list[Token] = []
    closed = -1  # where the bracket before was closed
    for token in (token for token in tokens if token.kind == tokenize.OP):
        if token.text in _PAIRS.values():
            opened.append(token)
        elif token.text in _PAIRS and opened:
            context, start = _before(document.text, token.offset), opened.pop()
            far = closed > start.offset or token.offset - start.offset >= FAR
            closed = token.offset
            # behind a letter or digit a closing bracket is a token of its own in every byte-level vocabulary, or begins one
            if far and start.offset >= token.offset - len(context) and context[-1:].isalnum():
                yield _question(document, token.offset, context, token.text, [other for other in _PAIRS if other != token.text], token.text)


def indentations(document: Document, tokens: list[Token]) -> Iterator[Question]:
    """How far the next line is indented, against two other depths: deeper, as before, or shallower than the line above."""
    logical = False
    column = 0
    for token, following in zip(tokens, _next_lines(tokens), strict=True):
        if not logical and token.kind not in (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT):
            logical, column = True, token.column
        if token.kind != tokenize.NEWLINE:
            continue
        logical = False
        if following is None or following.column % 4 or document.text[token.offset : following.offset] != "\n" + " " * following.column:
            continue
        depth = following.column
        others = sorted((d for d in (depth - 8, depth - 4, depth + 4, depth + 8) if d >= 0), key=lambda d: (abs(d - depth), d))[:2]
        kind = "deeper" if depth > column else "shallower" if depth < column else "same"
        lines = ["\n" + " " * d + following.text.split("\n")[0] for d in (depth, *others)]
        context = _before(document.text, token.offset)
        if context.strip() and not context[-1].isspace():
            yield _question(document, token.offset, context, lines[0], lines[1:], kind)


def _next_lines(tokens: list[Token]) -> list[Token | None]:
    """For each token the next one that is more than layout."""
    layout = (tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE)
    following: list[Token | None] = []
    last: Token | None = None
    for token in reversed(tokens):
        following.append(last)
        if token.kind not in layout and token.kind != tokenize.ENDMARKER:
            last = token
    return following[::-1]


def _question(document: Document, offset: int, context: str, right: str, wrong: list[str], kind: str = "") -> Question:
    choices = tuple(sorted([right, *wrong], key=lambda choice: _hash(context, str(offset), choice)))
    return Question(context, choices, choices.index(right), document.name, offset, kind)


def _before(text: str, offset: int) -> str:
    """The text before an offset, from the beginning of a line."""
    context = text[max(0, offset - CHARACTERS) : offset]
    if offset > CHARACTERS:
        _, newline, rest = context.partition("\n")
        context = rest if newline and rest.strip() else context
    return context


def _is_worthy(name: str) -> bool:
    return len(name) >= _WORTHY and name.isascii() and name[0].isalpha() and not keyword.iskeyword(name)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x00".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


QUESTIONS: dict[str, Callable[[Document, list[Token]], Iterator[Question]]] = {
    "code_identifier": identifiers,
    "code_bracket": brackets,
    "code_indent": indentations,
}
TASKS = (*QUESTIONS, "code_text")
