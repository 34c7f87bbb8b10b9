"""Model growth for LLM pre-training: train a small model, grow it, finish sooner."""

from outgrow.api import grow, grow_moments, grow_state, plan, verify
from outgrow.errors import OutgrowError
from outgrow.growth.plan import Claims, GrowthPlan

__version__ = "0.1.0"

__all__ = ["Claims", "GrowthPlan", "OutgrowError", "grow", "grow_moments", "grow_state", "plan", "verify"]
