"""Model FLOPs utilisation of the training loop on an accelerator: the paper's 410M shape on real text.

    python benchmarks/mfu.py --markdown benchmarks/mfu.md              # one GPU
    torchrun --nproc-per-node 8 benchmarks/mfu.py --markdown benchmarks/mfu.md

The text is the Python source on the machine, packed with a vocabulary of 32,000 that is trained on it. Medians over the steps after the
first ones; MFU counts 6 x matmul parameters + 12 x layers x heads x head_dim x context a token against the maker's dense bf16 peak.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from outgrow.checkpoint.ranks import join_ranks, leads, world
from outgrow.data.config import DataConfig
from outgrow.data.packed import prepare
from outgrow.training.config import OptimizerConfig, RunConfig
from outgrow.training.distributed import device, wait
from outgrow.training.loop import train

SHAPE = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


class Rows:
    """Keeps what a run reports."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    def row(self, row: dict[str, Any]) -> None:
        self.kept += [row] if "loss" in row else []

    def stop(self) -> bool:
        return False


def main() -> None:
    """Trains some steps and prints what they reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="site-packages")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=16, help="of each forward pass, on each rank")
    parser.add_argument("--passes", type=int, default=4, help="forward passes of a step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm", type=int, default=10, help="steps that are left out")
    parser.add_argument("--plain", action="store_true", help="do not compile")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--markdown", type=Path)
    asked = parser.parse_args()
    join_ranks()
    micro = asked.sequences * asked.context * world()
    model = SHAPE | {"num_hidden_layers": asked.layers, "vocab_size": asked.vocab, "max_position_embeddings": asked.context}
    run = RunConfig(
        model=model, data=DataConfig(corpus=asked.corpus, vocab=asked.vocab, context=asked.context, validation_tokens=micro, epochs=100),
        tokens=asked.steps * asked.passes * micro, batch_tokens=asked.passes * micro, micro_batch_tokens=micro,
        optimizer=OptimizerConfig(learning_rate=6e-4), validate_every=10**12, save_every=10**12, compile=not asked.plain,
        recompute=asked.recompute,
    )  # fmt: skip
    rows = Rows()
    with TemporaryDirectory() as folder:
        packed = prepare(run.data, Path("runs") / "data") if leads() else None
        wait()
        made = train(run, Path(folder) / "run", packed or prepare(run.data, Path("runs") / "data"), None, rows)
    if leads():
        report(asked, made.flops_per_token, rows.kept[asked.warm :])


def report(asked: argparse.Namespace, flops_per_token: int, rows: list[dict[str, Any]]) -> None:
    """Prints a row of a table, and adds it to a file if asked."""
    cuda = device().type == "cuda"
    name = torch.cuda.get_device_name() if cuda else "CPU"
    speed, mfu = (statistics.median(row[key] for row in rows) if key in rows[0] else None for key in ("tokens_per_second", "mfu"))
    memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else "-"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    line = (
        f"| {world()} x {name} | {asked.layers} layers, context {asked.context}, {asked.sequences} x {asked.passes} sequences"
        f"{'' if asked.plain else ', compiled'}{', recomputed' if asked.recompute else ''} | {speed:,.0f} | {flops_per_token:.3e} | "
        f"{'-' if mfu is None else f'{mfu:.1%}'} | {memory} | {commit}, torch {torch.__version__} |"
    )
    print(line)
    if asked.markdown:
        columns = ["device", "shape", "tokens/s", "FLOPs a token", "MFU", "memory", "commit"]
        head = f"# MFU\n\n`python benchmarks/mfu.py`\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
        before = asked.markdown.read_text() if asked.markdown.exists() else head
        asked.markdown.write_text(before + line + "\n")


if __name__ == "__main__":
    main()
