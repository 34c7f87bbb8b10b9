"""Commands that prepare text: packed tokens, tasks made of held-out text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from outgrow.cli.app import data_app
from outgrow.cli.options import Share, Sources, TextKey, share_of
from outgrow.cli.show import bar
from outgrow.data.config import VALIDATION_SHARE


@data_app.command("prepare")
def data_prepare(
    sources: Sources,
    output: Annotated[Path, typer.Option(help="The directory to write, for data.sources of a run.")],
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer.json, a directory with one, or a hub id.")] = None,
    vocab: Annotated[int | None, typer.Option(min=257, help="Train a byte-level BPE of this size instead.")] = None,
    validation_share: Share = VALIDATION_SHARE,
    text_key: TextKey = "text",
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens per file.")] = 2**27,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that tokenize; one per core if not given.")] = None,
) -> None:
    """Pack text into shards of tokens with a manifest, each distinct document once and on one side of the split.

    Folders may hold .parquet, .jsonl and text, compressed or not (.gz, .bz2, .xz, .zst); hidden files are not read, and files that are no
    UTF-8 text are left out, counted, and named in the manifest. An interrupted command goes on where it stopped.
    """
    if workers:
        os.environ["RAYON_NUM_THREADS"] = str(workers)  # read once, when the tokenizers' threads start
    from outgrow.data.packing import prepare_sources
    from outgrow.files import read_json

    with bar() as progress:
        prepare_sources(sources, output, tokenizer, vocab, share_of(validation_share), text_key, shard_tokens, progress)
    made = read_json(output / "manifest.json")
    counts = (f"{made['tokens'][part]:,} {part} tokens of {made['documents'][part]:,} documents" for part in ("training", "validation"))
    print(f"{', '.join(counts)}; vocabulary {made['vocab']:,}; {output}")
    if left_out := made.get("skipped"):
        print(f"left out, since they are no UTF-8 text: {len(left_out):,} files, such as '{left_out[0]}'; all are named in manifest.json")


@data_app.command("tasks")
def data_tasks(
    sources: Sources,
    output: Annotated[Path, typer.Option(help="The directory to write, for 'outgrow eval --tasks'.")],
    count: Annotated[int, typer.Option(min=1, help="Questions of a task, at most.")] = 400,
    validation_share: Share = VALIDATION_SHARE,
    text_key: TextKey = "text",
) -> None:
    """Make evaluation tasks of the held-out Python of a corpus: a name, a bracket, an indentation to choose, and bits per byte.

    They are jsonl files and task files of lm-evaluation-harness, the same on every machine that has the same text.
    """
    from outgrow.evaluation.local_tasks import write_tasks

    made = write_tasks(sources, output, count, share_of(validation_share), text_key)
    print(f"{', '.join(f'{task} {records:,}' for task, records in made.items())}; {output}")
