"""How a rank ends: a user's mistake as one sentence and exit code 2, a defect as a traceback that is not buried.

When one rank dies, the others fail a moment later in a collective, and their tracebacks would scroll the cause away. So
the first rank to fail claims a file in the run folder, prints its error and exits; a rank that finds the file claimed
ends without a word.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scale_wsl.errors import UserError

__all__ = ["clear", "exit_code_of", "first_failure_speaks"]

_NOTE = "failure.txt"


@contextmanager
def first_failure_speaks(folder: Path, rank: int, size: int) -> Iterator[None]:
    """Run a block in which, of all ranks that fail, only the first prints; the others exit with code 1.

    `folder` is the run folder, seen by all ranks; the caller removes an older note with `clear` before any rank starts.
    Must be left before the process group is: a rank's sockets close only after its note is written.
    """
    try:
        yield
    except (UserError, SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        text = f"rank {rank} of {size} failed:\n{''.join(traceback.format_exception(error))}"
        try:
            with open(folder / _NOTE, "x", encoding="utf-8") as note:
                note.write(text)
        except FileExistsError:
            sys.exit(1)
        except OSError:  # no folder to write to: better two errors than none
            pass
        _record_for_torchrun(error)
        print(text, file=sys.stderr, flush=True)
        sys.exit(1)


def clear(folder: Path) -> None:
    """Remove the note of an earlier run's failure."""
    (folder / _NOTE).unlink(missing_ok=True)


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
