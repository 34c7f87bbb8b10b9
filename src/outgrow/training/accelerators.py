"""Accelerators as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """What its maker states.

    Attributes:
        flops: per second, of dense bf16 products.
        bytes: of memory, of the largest that is sold.
    """

    flops: float
    bytes: float


# By a part of the device's name.
ACCELERATORS: Mapping[str, Accelerator] = {
    "H200": Accelerator(989e12, 141e9),
    "H100": Accelerator(989e12, 80e9),
    "A100": Accelerator(312e12, 80e9),
    "B200": Accelerator(2250e12, 192e9),
}
