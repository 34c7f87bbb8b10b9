"""Times one training step of one model in every engine that can be had here: transformers, litgpt and outgrow, plain and compiled.

    python benchmarks/training_peers.py --markdown benchmarks/training_peers.md

Forward, backward, clip, AdamW on the same shape and batch, in bf16 where the CPU has it and in fp32 where not. The engines take turns,
so that a drifting machine does not decide; nothing else should run meanwhile. litgpt is left out where it is not installed
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
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from outgrow.models.build import initialised, resolved
from outgrow.models.decoder import Decoder
from outgrow.training.distributed import product_dtype

LAYERS, HIDDEN, FFN, HEADS, CONTEXT, SEQUENCES = 8, 256, 704, 4, 256, 16
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def engines(vocab: int, dtype: torch.dtype) -> dict[str, tuple[torch.nn.Module, Loss]]:
    """Name -> (model, loss of inputs and labels)."""
    config = resolved(
        {
            "model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "intermediate_size": FFN,
            "num_attention_heads": HEADS, "vocab_size": vocab, "max_position_embeddings": CONTEXT,
        }
    )  # fmt: skip
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
    print("\n".join(lines))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
