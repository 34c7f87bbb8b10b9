"""The command line: it reads arguments, calls the library, and prints. Bad input is one sentence and a non-zero exit.

Commands register themselves when their files are imported; the help lists them in that order.
"""

from outgrow.cli.app import app, main

from outgrow.cli import train, study, grow, evaluate, data  # isort: skip

__all__ = ["app", "data", "evaluate", "grow", "main", "study", "train"]
