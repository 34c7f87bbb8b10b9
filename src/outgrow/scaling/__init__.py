"""Laws of loss and of growth fitted to runs, and what they advise: when to grow, by how much, and what it saves."""

from outgrow.scaling.fit import Fit, fit
from outgrow.scaling.growth import GrowthTiming, growth_timing, mixing_tokens, stage_tokens
from outgrow.scaling.laws import LAWS, Law, compute_optimal
from outgrow.scaling.points import points_of, read_table

__all__ = [
    "LAWS",
    "Fit",
    "GrowthTiming",
    "Law",
    "compute_optimal",
    "fit",
    "growth_timing",
    "mixing_tokens",
    "points_of",
    "read_table",
    "stage_tokens",
]
