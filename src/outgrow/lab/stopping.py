"""Ctrl-C and SIGTERM ask a run to save and stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_stop(ask: Callable[[], None]) -> Iterator[None]:
    """Calls `ask` at SIGINT and SIGTERM, but for those that someone has taken: a job of submitit passes SIGTERM by, and is queued again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    free = [number for number, handler in before.items() if not callable(handler) or handler is signal.default_int_handler]
    for number in free:
        signal.signal(number, lambda number, frame: ask())
    try:
        yield
    finally:
        for number in free:
            signal.signal(number, before[number])
