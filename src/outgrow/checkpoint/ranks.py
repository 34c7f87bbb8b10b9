"""The processes that `torchrun` started, where there are several: who leads, and how rank 0 tells the others where to write."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

# How long ranks wait where one works alone: evaluates, hashes a corpus, learns maps, finishes a checkpoint.
PATIENCE = timedelta(days=7)


def started() -> int:
    """How many processes `torchrun`, or a job of submitit, started together; a stray WORLD_SIZE alone says nothing."""
    count = os.environ.get("WORLD_SIZE", "")
    return int(count) if count.isdecimal() and "MASTER_ADDR" in os.environ else 1


def world() -> int:
    """How many processes work together, since `join_ranks`."""
    group = _group()
    return group.get_world_size() if group else 1


def rank() -> int:
    """Which of them this is."""
    group = _group()
    return group.get_rank() if group else 0


def leads() -> bool:
    """Is this the process that names and finishes files: rank 0, or the only one?"""
    return rank() == 0


def local_rank() -> int:
    """Which of the processes of this machine this is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def join_ranks() -> None:
    """Makes a process group of the processes that `torchrun` started, if it did."""
    if started() > 1:
        import torch
        from torch import distributed

        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        if not distributed.is_initialized():
            distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            # Ranks wait for one another by gloo alone; NCCL keeps its own timeout, so that a lost GPU is noticed in minutes.
            distributed.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(PATIENCE)  # type: ignore[union-attr]


def _group() -> Any:
    """`torch.distributed`, where a process group has been made; torch is not imported to ask."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None


@contextmanager
def telling(group: Any = None) -> Generator[Callable[[Path], None], None, None]:
    """Yields what tells the other ranks where to write; where that is never reached, they are told that there is nothing to do."""
    done = False

    def tell(place: Path | None) -> None:
        nonlocal done
        done = True
        agreed(place, group)

    try:
        yield tell
    finally:
        if not done:
            tell(None)


def agreed(value: Any, group: Any = None) -> Any:
    """What rank 0 has, on every rank: over a network another may see a folder as it was a while ago."""
    if world() == 1:
        return value
    from torch import distributed

    said = [value]
    distributed.broadcast_object_list(said, group=group)
    return said[0]
