"""What growth did to the held-out loss at once, and how much training made it good again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Recovery:
    """Losses in nats a token; as fine as validations are close.

    Attributes:
        before: held-out loss of the model that was grown.
        after: of the grown model before a step.
        peak: the highest since.
        tokens: from growth until the loss is, after its peak, at `before` or below; None where it never is.
    """

    before: float
    after: float
    peak: float
    tokens: int | None

    @property
    def spike(self) -> float:
        """The highest loss since growth, over the loss before it; 0 where it never rose."""
        return max(0.0, self.peak - self.before)


def recovery(before: float, points: Sequence[tuple[int, float]]) -> Recovery:
    """Reads a run that began by growth.

    Args:
        before: held-out loss at the end of what was grown.
        points: (tokens, held-out loss) of the grown run, its first before a step.
    """
    start, after = points[0]
    peak = max(points, key=lambda point: point[1])
    back = next((tokens - start for tokens, loss in points if tokens >= peak[0] and loss <= before), None)
    return Recovery(before, after, peak[1], back)
