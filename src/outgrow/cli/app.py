"""The application that commands belong to, and how mistakes become one sentence."""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

from outgrow import __version__
from outgrow.errors import Interrupted, OutgrowError

app = typer.Typer(
    help="Model growth for LLM pre-training: train a small model, grow it, finish sooner.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Text to packed tokens.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")
_WAYS_OUT = {
    errno.ENOSPC: "; make room, and the same command goes on from its last whole checkpoint",
    errno.EEXIST: "; choose another place",
    errno.ENOTDIR: "; choose another place",
}
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


def _version(asked: bool) -> None:
    if asked:
        print(f"outgrow {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None: ...


def main() -> None:
    """The console script: what people can mend is one sentence on stderr, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files need not be UTF-8
    try:
        status = app(prog_name="outgrow", standalone_mode=False)
        if status == INTERRUPTED:  # typer turns Ctrl-C into a status
            raise KeyboardInterrupt
        sys.exit(status)
    except typer.TyperException as error:  # a mistake in the arguments
        said = error.format_message() if hasattr(error, "format_message") else str(error)  # with the option's name
        context = getattr(error, "ctx", None)
        if context and said == context.get_help():  # nothing was asked for
            print(said, file=sys.stderr)
            sys.exit(2)
        _fail(f"{said.rstrip('.').replace('Value error, ', '')}; see '{context.command_path if context else 'outgrow'} --help'", 2)
    except Interrupted as stop:
        _fail(str(stop), INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; nothing unfinished was kept, and the same command goes on from what is whole", INTERRUPTED)
    except OutgrowError as error:
        _fail(str(error), 1)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("outgrow"):
            raise
        _fail(f"this command needs '{error.name}', which is not installed; pip install 'outgrow[train,report]'", 1)
    except MemoryError:
        _fail("there is not enough memory for that; ask for less at once", 1)
    except OSError as error:
        place = f": '{error.filename}'" if error.filename else ""
        _fail(f"{error.strerror or error}{place}{_WAYS_OUT.get(error.errno or 0, '')}", 1)


def _fail(message: str, status: int) -> None:
    # One line, whatever the files that it speaks of are called.
    print("outgrow: " + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message), file=sys.stderr)
    sys.exit(status)
