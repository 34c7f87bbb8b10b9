"""Times one training step: transformers' own forward pass and loss against ours, side by side, same weights and batch.

    python benchmarks/training_step.py > benchmarks/training_step.md

Each shape runs in turn A B A B ..., and the ratio is the median over pairs, so that a drifting machine does not decide.
Nothing else should run meanwhile.
"""

from __future__ import annotations

import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from outgrow.models.build import initialised, resolved
from outgrow.models.decoder import Decoder
from outgrow.models.loss import next_token_loss

# name: layers, hidden, ffn, heads, vocabulary, context, sequences
SHAPES = {
    "nano base": (2, 48, 128, 2, 1024, 256, 8),
    "nano target": (8, 48, 128, 2, 1024, 256, 8),
    "0.4M": (8, 64, 176, 2, 1024, 256, 16),
    "6M": (8, 256, 704, 4, 4096, 256, 16),
}
PAIRS = 12


def _steps(shape: tuple[int, ...]) -> tuple[Callable[[], None], Callable[[], None]]:
    layers, hidden, ffn, heads, vocab, context, sequences = shape
    config = resolved(
        {
            "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn,
            "num_attention_heads": heads, "vocab_size": vocab, "max_position_embeddings": context,
        }
    )  # fmt: skip
    model = initialised(config, seed=0)
    decoder = Decoder(model, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, vocab, (sequences, context + 1), generator=torch.Generator().manual_seed(0))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]

    def step(loss: Callable[[], torch.Tensor]) -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def theirs() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    def ours() -> torch.Tensor:
        return next_token_loss(decoder.hidden_states(inputs), decoder.head, labels)

    return lambda: step(theirs), lambda: step(ours)


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    """Prints the table as Markdown."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    print("# One training step, tokens per second\n")
    print("`python benchmarks/training_step.py`: forward, backward, clip, AdamW; bf16; medians, ratio over pairs.\n")
    processor = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    print(f"{(processor or [platform.machine()])[0]}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, commit {commit}\n")
    print("| shape | transformers | outgrow | ratio |\n|---|---|---|---|")
    for name, shape in SHAPES.items():
        theirs, ours = _steps(shape)
        for _ in range(3):
            theirs()
            ours()
        pairs = [(_seconds(theirs), _seconds(ours)) for _ in range(PAIRS)]
        tokens = shape[5] * shape[6]
        speeds = [tokens / statistics.median(side) for side in zip(*pairs, strict=True)]
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"| {name} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
