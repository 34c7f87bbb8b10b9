"""Tasks as files, jsonl and the YAML that lm-evaluation-harness reads, made of the held-out documents of a corpus."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from outgrow.data.config import VALIDATION_SHARE
from outgrow.data.corpus import Document, content_hash, held_out
from outgrow.errors import OutgrowError
from outgrow.evaluation.code_tasks import make_questions
from outgrow.evaluation.suite import presets, read_task_file
from outgrow.files import flush, new_directory, write_json

COUNT, VERSION = 400, 1
MADE = "made.json"
_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "context",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
_TEXT = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": name} for name in ("bits_per_byte", "byte_perplexity", "word_perplexity")],
}


def write_tasks(
    sources: Sequence[str], target: Path, count: int = COUNT, validation_share: float = VALIDATION_SHARE, text_key: str = "text"
) -> dict[str, int]:  # fmt: skip
    """Writes the tasks of a corpus's held-out documents into a directory that `--tasks` takes; returns task -> questions.

    Args:
        sources: see `outgrow.data.corpus.read`.
        target: a directory that does not exist yet; it appears whole or not at all.
        count: questions a task, at most.
        validation_share: share of documents held out, as in the runs that are evaluated.
        text_key: where the text is in records.

    Raises:
        OutgrowError: too few held-out documents for any question.
    """
    digests: list[bytes] = []

    def seen() -> Iterator[Document]:
        for document in held_out(sources, validation_share, text_key):
            digests.append(document.digest)
            yield document

    made = make_questions(seen(), count)
    if not made["code_text"]:
        raise OutgrowError(f"none of the documents of {', '.join(sources)} is held out; give more text or a larger --validation-share")
    kept = {task: records for task, records in made.items() if records}
    with new_directory(target) as temporary:
        for task, records in kept.items():
            lines = "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
            (temporary / f"{task}.jsonl").write_text(lines, encoding="utf-8")
            written = hashlib.sha256(lines.encode()).hexdigest()
            (temporary / f"{task}.yaml").write_text(_task_text(task, written), encoding="utf-8")
        (temporary / "suite.yaml").write_text(_suite_text(list(kept)), encoding="utf-8")
        settings = {"count": count, "validation_share": validation_share, "version": VERSION}
        write_json(temporary / MADE, {**settings, "documents": len(set(digests)), "corpus_hash": content_hash(set(digests))})
        flush(temporary)
    return {task: len(records) for task, records in kept.items()}


def made_tasks(
    cache: Path, sources: Sequence[str] = ("python",), count: int = COUNT, validation_share: float = VALIDATION_SHARE
) -> Path:  # fmt: skip
    """The directory of such tasks under `cache`, written if it is not there; a corpus that changed gets another."""
    digests = {document.digest for document in held_out(sources, validation_share)}
    directory = cache / f"code-tasks-{content_hash(digests)[:10]}-{count}-{validation_share:g}-{VERSION}"
    if not directory.is_dir():
        write_tasks(sources, directory, count, validation_share)
    return directory


def read_task(path: Path, within: Sequence[Path] = ()) -> tuple[dict[str, Any], list[Path]]:
    """A task's settings, with what its YAML file includes and its data found beside it; and every file that they come from.

    Raises:
        OutgrowError: a file that is not there, is not YAML, or includes itself.
    """
    if path.resolve() in within:
        raise OutgrowError(f"'{path}' includes itself")
    content = read_task_file(path)
    data = _locate_data(content, path.parent)
    included = content.pop("include", [])
    names = included if isinstance(included, list) else [included]
    files, settings = [path], dict[str, Any]()
    for name in names:
        if not isinstance(name, str):
            raise OutgrowError(f"'{path}' includes {name!r}, and 'include' takes the names of files")
        inner, more = read_task(path.parent / name, (*within, path.resolve()))
        settings |= {key: value for key, value in inner.items() if key != "task_list"}
        files += more
    return {**settings, **content}, [*files, *data]


def files_hash(files: Sequence[Path]) -> str:
    """A hash over the bytes of files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _locate_data(content: dict[str, Any], folder: Path) -> list[Path]:
    """Puts full paths in the place of the local files that a task's `dataset_kwargs` name, and returns them."""
    settings = content.get("dataset_kwargs")
    named = settings.get("data_files") if isinstance(settings, dict) else None
    found: set[Path] = set()

    def located(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: located(one) for key, one in value.items()}
        if isinstance(value, list):
            return [located(one) for one in value]
        if isinstance(value, str) and (folder / value).is_file():
            found.add(folder / value)
            return str((folder / value).resolve())
        return value

    if named:
        content["dataset_kwargs"] = {**settings, "data_files": located(named)}  # type: ignore[dict-item]
    return sorted(found)


def _task_text(task: str, content: str) -> str:
    settings = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{task}.jsonl"}},
        "test_split": "test",
        **(_CHOICE if task != "code_text" else _TEXT),
        "metadata": {"version": VERSION, "content_hash": content},
    }
    return yaml.safe_dump(settings, sort_keys=False)


def _suite_text(tasks: list[str]) -> str:
    code = presets()["code"]
    choices = [{"task": f"{task.name}.yaml", "metric": task.metric} for task in code.tasks if task.name in tasks]
    averages = {name: [part for part in parts if part in tasks] for name, parts in code.averages.items()}
    return yaml.safe_dump({"tasks": choices, "averages": {name: parts for name, parts in averages.items() if parts}}, sort_keys=False)
