"""The ways in which a command ends early that are nobody's bug."""

NOT_LITERAL = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)  # what `ast.literal_eval` raises of a text


class OutgrowError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that names it and the way out."""


class DivergedError(OutgrowError):
    """A loss, a gradient or weights that are no numbers, or a loss that rose far above what it was."""


class Interrupted(Exception):
    """A run was asked to stop and has saved itself; the message says how to go on."""


def one_line(error: BaseException) -> str:
    """What a library says of an error, on one line of 240 characters at most; its kind where it says nothing."""
    return " ".join(str(error).split())[:240] or type(error).__name__
