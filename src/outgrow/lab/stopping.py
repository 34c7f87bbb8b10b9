"""Ctrl-C and SIGTERM ask a run to save and stop, and so does a cluster whose time for a job is up."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from outgrow.errors import Interrupted
from outgrow.training.distributed import wait


@contextmanager
def on_stop(ask: Callable[[int], None]) -> Iterator[None]:
    """Calls `ask` with the number of the signal at SIGINT and SIGTERM, but for those that someone has taken.

    A job of submitit passes SIGTERM by, and takes SIGUSR2 to be queued again, at once; it is asked to save first.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    free = {number for number, handler in before.items() if not callable(handler) or handler is signal.default_int_handler}
    queue_again = before[signal.SIGUSR2]
    asked = set[int]()

    def heard(number: int, frame: object) -> None:
        asked.add(number)
        ask(number)

    ours = free ^ {signal.SIGUSR2}  # that one where it is taken, and only there
    for number in ours:
        signal.signal(number, heard)
    try:
        yield
    except Interrupted:
        if signal.SIGUSR2 in asked and callable(queue_again):
            queue_again(signal.SIGUSR2, None)  # ends the first rank
            wait()
        raise
    finally:
        for number in ours:
            signal.signal(number, before[number])
