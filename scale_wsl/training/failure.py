"""How a rank ends: a user's mistake as one sentence and exit code 2, a defect as a traceback that is not buried.

When one rank stops, the others fail a moment later in a collective, and their tracebacks would scroll the cause away.
So the first rank to stop claims a file in the run folder, prints its error and exits; a rank that finds the file
claimed ends without a word, and with the same exit code.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scale_wsl.errors import UserError

__all__ = ["NOTE", "clear", "exit_code_of", "first_failure_speaks"]

NOTE = "failure.txt"
_PATIENCE = 5.0  # seconds for the first rank to print its error, before the others end


@contextmanager
def first_failure_speaks(folder: Path, rank: int, size: int) -> Iterator[None]:
    """Run a block in which, of all ranks that stop with an error, only the first prints; all exit with its code.

    `folder` is the run folder, seen by all ranks; an older note is removed with `clear` before any rank starts. Must be
    left before the process group is: a rank's sockets close only after its note is there.

    Raises:
        SystemExit: with code 2 after a `UserError`, 1 after any other error.
    """
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        code = 2 if isinstance(error, UserError) else 1
        try:
            note = open(folder / NOTE, "x", encoding="utf-8")  # noqa: SIM115 - written once the error is printed
        except FileExistsError:
            sys.exit(_code_of_the_first(folder))
        except OSError:  # no folder to write to: better two errors than none
            note = None
        text = f"error: {error}\n"
        if code == 1:
            text = f"rank {rank} of {size} failed:\n{''.join(traceback.format_exception(error))}"
            _record_for_torchrun(error)
        print(text, end="", file=sys.stderr, flush=True)
        if note is not None:
            with note:
                note.write(f"{code}\n{text}")
        sys.exit(code)


def _code_of_the_first(folder: Path) -> int:
    """Wait until the rank that claimed the note has printed - a launcher stops all at the first that ends."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        code, newline, _ = (folder / NOTE).read_text(encoding="utf-8").partition("\n")
        if newline:
            return int(code)
        time.sleep(0.05)
    return 1


def clear(folder: Path) -> None:
    """Remove the note of an earlier run's failure."""
    (folder / NOTE).unlink(missing_ok=True)


def _record_for_torchrun(error: BaseException) -> None:
    """Let torchrun's closing summary show this error as the root cause."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        handler = get_error_handler()
        handler.initialize()
        handler.record_exception(error)


def exit_code_of(main: Callable[[], None]) -> int:
    """Run an entry point of one process: 0 when it returns, 2 after a `UserError`, printed as `error: ...`."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0
