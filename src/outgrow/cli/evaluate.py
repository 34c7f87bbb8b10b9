"""Commands that ask checkpoints: tasks, loss, samples, diagnosis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from outgrow.cli.app import app
from outgrow.cli.options import (
    AsJson,
    BatchSize,
    ContextOf,
    Corpora,
    Device,
    Dtype,
    Runs,
    Share,
    TextKey,
    TokenizerOf,
    refuse_given,
    share_of,
)
from outgrow.cli.show import print_table, refuse_picture, short_names, told, without_nan
from outgrow.data.config import VALIDATION_SHARE
from outgrow.errors import OutgrowError


@app.command("eval")
def evaluate(
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoint directories or hub ids, grown, trained or others.")],
    tasks: Annotated[
        str, typer.Option(help="paper8, paper-7b, code, task names with commas between, a YAML file or a directory.")
    ] = "code",
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task, at most; all if not given.")] = None,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    tokenizer: TokenizerOf = None,
    context: ContextOf = None,
    corpus: Corpora = None,
    validation_share: Share = VALIDATION_SHARE,
    runs: Runs = Path("runs"),
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Let task files run the Python that lies beside them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run tasks of lm-evaluation-harness on checkpoints, side by side; results are kept in evaluation/ beside the weights.

    The tasks of 'code' are made of held-out Python and need no network; --corpus says of which text, as in data.corpus of a run.
    """
    from outgrow.checkpoint.hub import local
    from outgrow.evaluation import harness, results
    from outgrow.evaluation.local_tasks import made_tasks
    from outgrow.evaluation.suite import needs_made, read_suite

    harness.require()
    suite = read_suite(tasks)
    made = made_tasks(runs / "data", corpus or ["python"], validation_share=share_of(validation_share)) if needs_made(suite) else None
    if corpus and not made:
        raise OutgrowError("--corpus has no effect: none of the tasks is made of a corpus; leave it out")
    loaded = harness.load_tasks(suite, made, trust_code)
    found = {
        name: results.evaluate(local(name), suite, loaded, limit, batch_size, tokenizer, context, device, dtype, told)
        for name in dict.fromkeys(checkpoints)
    }
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print_table(results.table(suite, dict(zip(short_names(list(found)), found.values(), strict=True))))
    if rows := results.reference_table(suite):
        print_table(rows)
        print(f"reference: {suite.reference.source if suite.reference else ''}")


@app.command()
def loss(
    command: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint directory or a hub id.")],
    corpus: Corpora = None,
    validation_share: Share = VALIDATION_SHARE,
    everything: Annotated[bool, typer.Option("--all", help="Read all documents, not the held-out ones alone.")] = False,
    documents: Annotated[int | None, typer.Option(min=1, help="Of each corpus, at most; all if not given.")] = None,
    by_file: Annotated[bool, typer.Option("--by-file", help="One row a file, and not one a corpus.")] = False,
    text_key: TextKey = "text",
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    tokenizer: TokenizerOf = None,
    context: ContextOf = None,
    as_json: AsJson = False,
) -> None:
    """Measure loss and bits per byte on the held-out documents of any text, by source, with standard errors over documents."""
    from outgrow.checkpoint.hub import local
    from outgrow.evaluation.loss import corpus_loss
    from outgrow.evaluation.model import open_model

    if everything:
        refuse_given(command, "--validation-share", "with --all, which reads all documents")
    opened = open_model(local(checkpoint), tokenizer, context, device, dtype)
    share = None if everything else share_of(validation_share)
    rows = corpus_loss(opened, corpus or ["python"], share, text_key, documents, by_file, batch_size)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    shown = [["corpus", "documents", "tokens", "loss, nats per token", "bits per byte"]]
    for name, row in rows.items():
        measured = (
            f"{row[key]:.4f}" + ("" if row[f"{key}_stderr"] is None else f" ± {row[f'{key}_stderr']:.4f}")
            for key in ("loss", "bits_per_byte")
        )
        shown.append([name, f"{row['documents']:,}", f"{row['tokens']:,}", *measured])
    print_table(shown)


@app.command()
def sample(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint directory or a hub id.")],
    prompt: Annotated[str, typer.Option(help="How the text begins.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="Of the distribution that is drawn from; 0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from so many of the likeliest tokens; from all if not given.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same text.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Texts.")] = 1,
    device: Device = None,
    dtype: Dtype = "auto",
    tokenizer: TokenizerOf = None,
) -> None:
    """Write text with a checkpoint."""
    from outgrow.checkpoint.hub import local
    from outgrow.evaluation.model import open_model
    from outgrow.evaluation.sample import sample as written

    if temperature == 0 and count > 1:
        raise OutgrowError("--count has no effect with --temperature 0, which writes the same text each time; leave either out")
    texts = written(open_model(local(checkpoint), tokenizer, None, device, dtype), prompt, tokens, temperature, top_k, seed, count)
    print("\n\n".join(f"--- {number}\n{text}" for number, text in enumerate(texts, 1)) if count > 1 else texts[0])


@app.command()
def diagnose(
    command: typer.Context,
    checkpoints: Annotated[list[str], typer.Argument(help="Checkpoint directories or hub ids; several of one run show how copies part.")],
    documents: Annotated[int, typer.Option(min=0, help="Held-out documents on which each layer is skipped in turn; 0 skips none.")] = 20,
    no_ranks: Annotated[bool, typer.Option("--no-ranks", help="Leave out effective ranks, whose cost is cubic in the width.")] = False,
    corpus: Corpora = None,
    validation_share: Share = VALIDATION_SHARE,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = "auto",
    tokenizer: TokenizerOf = None,
    output: Annotated[Path | None, typer.Option(help="A page (HTML) with all figures.")] = None,
    figure: Annotated[Path | None, typer.Option(help="The figures as PNG, SVG or PDF.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what growth left in checkpoints, layer by layer: size, effective rank, likeness of copies, what each layer adds to the loss."""
    from dataclasses import asdict

    from outgrow.checkpoint.hub import local
    from outgrow.evaluation.skipped import first_held_out
    from outgrow.lab import diagnosing

    refuse_picture(figure)
    if not documents:
        refuse_given(command, "--corpus", "with --documents 0")
        refuse_given(command, "--validation-share", "with --documents 0")
    names = list(dict.fromkeys(checkpoints))
    texts = first_held_out(corpus or ["python"], documents, share_of(validation_share)) if documents else []
    found = {
        short: diagnosing.diagnose_with(local(name), texts, not no_ranks, batch_size, device=device, dtype=dtype, tokenizer=tokenizer)
        for short, name in zip(names if as_json else short_names(names), names, strict=True)
    }
    if as_json:
        print(json.dumps(without_nan({name: asdict(one) for name, one in found.items()}), indent=2))
    else:
        for name, one in found.items():
            print(f"{name}: {one.tokens:,} tokens" + ("" if one.loss is None else f", held-out loss {one.loss:.4f}"))
            print_table(diagnosing.rows(one))
        print("\n".join(diagnosing.sentences(found)))
    diagnosing.write_diagnosis(found, output, figure)
