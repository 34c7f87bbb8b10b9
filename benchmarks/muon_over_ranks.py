"""Times a step of Muon over matrices whose rows lie over gloo ranks: torch's own on sharded matrices against the one here.

torchrun --nproc-per-node 2 benchmarks/muon_over_ranks.py --markdown benchmarks/muon_over_ranks.md
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from outgrow.checkpoint.ranks import join_ranks, leads, world
from outgrow.training.sharded_muon import ShardedMuon

HIDDEN, BLOCKS = 256, 4
BLOCK = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN // 2, HIDDEN)] * 2 + [(3 * HIDDEN, HIDDEN)] * 2 + [(HIDDEN, 3 * HIDDEN)]


def matrices() -> list[torch.nn.Parameter]:
    """The matrices of the blocks, and a gradient for each."""
    generator, mesh = torch.Generator().manual_seed(0), init_device_mesh("cpu", (world(),))
    made = []
    for shape in BLOCK * BLOCKS:
        matrix, gradient = (distribute_tensor(torch.randn(shape, generator=generator), mesh, [Shard(0)]) for _ in range(2))
        made.append(torch.nn.Parameter(matrix))
        made[-1].grad = gradient
    return made


def main() -> None:
    """Prints the table, and writes it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    join_ranks()
    optimizers = [kind(matrices(), adjust_lr_fn="match_rms_adamw") for kind in (torch.optim.Muon, ShardedMuon)]
    sent = []
    for optimizer in optimizers:
        with CommDebugMode() as seen:
            optimizer.step()
        sent.append(seen.get_total_counts())
    seconds: list[list[float]] = [[], []]
    for _ in range(arguments.steps):
        for optimizer, spent in zip(optimizers, seconds, strict=True):  # in turns
            distributed.barrier()
            begun = time.perf_counter()
            optimizer.step()
            distributed.barrier()
            spent.append(time.perf_counter() - begun)
    theirs, ours = map(median, seconds)
    lines = [
        "# A step of Muon over ranks\n",
        f"`torchrun --nproc-per-node {world()} benchmarks/muon_over_ranks.py`: {BLOCKS} blocks of hidden {HIDDEN}, gloo, one thread a "
        "rank; medians, in turns.\n",
        "| way | milliseconds | collectives |",
        "|---|---|---|",
        f"| torch's Muon on sharded matrices | {1000 * theirs:.0f} | {sent[0]} |",
        f"| each rank the whole of its share | {1000 * ours:.0f} ({theirs / ours:.1f} times as fast) | {sent[1]} |",
    ]
    if leads():
        print("\n".join(lines))
        if arguments.markdown:
            arguments.markdown.write_text("\n".join(lines) + "\n")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
