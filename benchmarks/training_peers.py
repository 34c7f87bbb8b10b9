"""Times one training step of one model in every engine that can be had here: transformers, litgpt and outgrow, plain and compiled.

    python benchmarks/training_peers.py --markdown benchmarks/training_peers.md

Forward, backward, clip, AdamW on the same shape and batch, in bf16 where the CPU has it and in fp32 where not; then whole training loops,
the transformers Trainer's and ours, data and records included. The engines take turns, so that a drifting machine does not decide; nothing
else should run meanwhile. litgpt is left out where it is not installed
(`pip install --no-deps litgpt lightning lightning-utilities torchmetrics jsonargparse docstring-parser typeshed-client
importlib-resources`).
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from outgrow.data.config import DataConfig
from outgrow.data.packed import Packed
from outgrow.models.build import initialised, resolved
from outgrow.models.decoder import Decoder
from outgrow.training.config import OptimizerConfig, RunConfig
from outgrow.training.distributed import product_dtype
from outgrow.training.loop import train

LAYERS, HIDDEN, FFN, HEADS, CONTEXT, SEQUENCES = 8, 256, 704, 4, 256, 16
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def shape(vocab: int) -> dict[str, Any]:
    """The config of the model that all engines train."""
    return {
        "model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_attention_heads": HEADS, "vocab_size": vocab, "max_position_embeddings": CONTEXT,
    }  # fmt: skip


def engines(vocab: int, dtype: torch.dtype) -> dict[str, tuple[torch.nn.Module, Loss]]:
    """Name -> (model, loss of inputs and labels)."""
    config = resolved(shape(vocab))
    found: dict[str, tuple[torch.nn.Module, Loss]] = {}

    def cross_entropy(call: Callable[[torch.Tensor], torch.Tensor]) -> Loss:
        def loss(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = call(inputs)
            return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

        return loss

    for name, compiled in (("transformers", False), ("transformers, compiled", True)):
        model = initialised(config, seed=0)
        call = torch.compile(model) if compiled else model
        found[name] = model, cross_entropy(lambda inputs, call=call: call(inputs, use_cache=False).logits)
    if find_spec("litgpt"):
        from litgpt.config import Config
        from litgpt.model import GPT

        settings = Config(
            n_layer=LAYERS, n_head=HEADS, n_embd=HIDDEN, vocab_size=vocab, padded_vocab_size=vocab, block_size=CONTEXT, bias=False,
            rotary_percentage=1.0, parallel_residual=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=FFN,
        )  # fmt: skip
        for name, compiled in (("litgpt", False), ("litgpt, compiled", True)):
            gpt = GPT(settings)
            found[name] = gpt, cross_entropy(torch.compile(gpt) if compiled else gpt)
    for name, compiled in (("outgrow", False), ("outgrow, compiled", True)):
        model = initialised(config, seed=0)
        found[name] = model, Decoder(model, dtype, compile=compiled).loss
    return found


def step_of(model: torch.nn.Module, loss: Loss, tokens: torch.Tensor) -> Callable[[], float]:
    """One step; returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        value = loss(tokens[:, :-1], tokens[:, 1:])
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def table(vocab: int, rounds: int) -> list[str]:
    """The engines on one vocabulary, in turns."""
    dtype = product_dtype("bf16")
    tokens = torch.randint(0, vocab, (SEQUENCES, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    steps = {name: step_of(model, loss, tokens) for name, (model, loss) in engines(vocab, dtype).items()}
    losses = {name: [step() for _ in range(2)] for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    fastest = min((name for name in steps if "outgrow" not in name), key=lambda name: statistics.median(times[name]))
    lines = [
        f"Vocabulary {vocab:,}, {str(dtype).removeprefix('torch.')}:\n",
        f"| engine | tokens/s | times {fastest} | loss at step 2 |\n|---|---|---|---|",
    ]
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[fastest], taken, strict=True))
        lines.append(f"| {name} | {SEQUENCES * CONTEXT / statistics.median(taken):,.0f} | {ratio:.2f} | {losses[name][-1]:.4f} |")
    return [*lines, ""]


def trainer_seconds(vocab: int, compiled: bool, steps: int, folder: Path) -> list[float]:
    """Seconds of each step of the transformers Trainer, from the end of one to the end of the next."""
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            ends.append(time.perf_counter())

    rows = torch.randint(0, vocab, (steps * SEQUENCES, CONTEXT), generator=torch.Generator().manual_seed(0))
    settings = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=SEQUENCES, bf16=product_dtype("bf16") == torch.bfloat16,
        use_cpu=True, torch_compile=compiled, optim="adamw_torch_fused", learning_rate=1e-3, max_grad_norm=1.0, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, dataloader_num_workers=0,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = transformers.Trainer(initialised(resolved(shape(vocab)), seed=0), settings, train_dataset=data, callbacks=[Clock()])
    trainer.train()
    return [b - a for a, b in pairwise(ends)]


def our_seconds(vocab: int, compiled: bool, steps: int, folder: Path) -> list[float]:
    """Seconds of each step of our loop, from one row of its record to the next."""
    ends: list[float] = []

    class Clock:
        def row(self, row: dict[str, Any]) -> None:
            if "loss" in row:
                ends.append(time.perf_counter())

        def stop(self) -> bool:
            return False

    tokens = torch.randint(0, vocab, ((steps + 1) * SEQUENCES * CONTEXT + 1,), generator=torch.Generator().manual_seed(0)).numpy()
    text = Packed(folder, tokens, tokens[: SEQUENCES * CONTEXT + 1], 3.0, "random", vocab)
    batch = SEQUENCES * CONTEXT
    run = RunConfig(
        model=shape(vocab), data=DataConfig(vocab=max(vocab, 257), context=CONTEXT, validation_tokens=batch), tokens=steps * batch,
        batch_tokens=batch, optimizer=OptimizerConfig(learning_rate=1e-3), validate_every=10**9, save_every=10**9, compile=compiled,
    )  # fmt: skip
    train(run, folder / f"run-{time.monotonic_ns()}", replace(text, directory=folder), None, Clock())
    return [b - a for a, b in pairwise(ends[:-1])]  # the last is followed by a checkpoint


def loops(vocab: int, rounds: int, steps: int = 14, warm: int = 4) -> list[str]:
    """Whole loops, in turns; the first steps of each are left out."""
    ways = {
        "transformers Trainer": partial(trainer_seconds, vocab, False),
        "transformers Trainer, compiled": partial(trainer_seconds, vocab, True),
        "outgrow train": partial(our_seconds, vocab, False),
        "outgrow train, compiled": partial(our_seconds, vocab, True),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    with TemporaryDirectory() as folder:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (Path(folder) / name).write_text("{}")
        for _ in range(rounds):
            for name, way in ways.items():
                taken[name].append(statistics.median(way(steps, Path(folder))[warm:]))
    fastest = min((name for name in ways if "outgrow" not in name), key=lambda name: statistics.median(taken[name]))
    lines = [f"Whole loops, vocabulary {vocab:,}:\n", f"| loop | tokens/s | times {fastest} |\n|---|---|---|"]
    for name, seconds in taken.items():
        ratio = statistics.median(a / b for a, b in zip(taken[fastest], seconds, strict=True))
        lines.append(f"| {name} | {SEQUENCES * CONTEXT / statistics.median(seconds):,.0f} | {ratio:.2f} |")
    return [*lines, ""]


def main() -> None:
    """Prints the tables, and writes them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096])
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    processor = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    lines = [
        "# One training step against other engines\n",
        "`python benchmarks/training_peers.py`: forward, backward, clip, AdamW; medians, ratios over rounds.",
    ]
    machine = (processor or [platform.machine()])[0]
    lines.append(f"{LAYERS} layers, hidden {HIDDEN}, context {CONTEXT}, batch {SEQUENCES}. {machine}, {torch.get_num_threads()} threads,")
    lines.append(f"torch {torch.__version__}, transformers {transformers.__version__}, commit {commit}.\n")
    for vocab in arguments.vocabularies:
        lines += table(vocab, arguments.rounds)
    lines += loops(arguments.vocabularies[0], max(2, arguments.rounds // 2))
    print("\n".join(lines))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
