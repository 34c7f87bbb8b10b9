"""Trains a run (JSON) on as many ranks as started this: RUN DIRECTORY PACKED [START]."""

import sys
from pathlib import Path

import torch

from outgrow.checkpoint.ranks import join_ranks
from outgrow.data.packed import open_packed
from outgrow.training.config import RunConfig
from outgrow.training.loop import train


class Observer:
    """Watches nothing."""

    def row(self, row):
        """Ignores it."""

    def stop(self):
        """Never."""
        return False


torch.set_num_threads(1)
join_ranks()
run = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
train(run, Path(sys.argv[2]), open_packed(Path(sys.argv[3])), Path(sys.argv[4]) if len(sys.argv) > 4 else None, Observer())
