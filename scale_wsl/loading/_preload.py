"""What the loader's fork server imports before it forks the first worker; must never be imported by anything else.

Importing the loader here, once, lets workers start in milliseconds. And it makes the fork server and the loader's
workers deaf, from birth, to the signals that mean "save and stop" to the trainer: schedulers and launchers send them to
the whole process group, while the trainer still needs batches. Any other process that is forked from this server, which
all of `multiprocessing` shares, hears them again before its own code runs.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import signal

from scale_wsl.loading.loader import TRAINERS_SIGNALS, WorkerProcess

_BEFORE = {number: signal.signal(number, signal.SIG_IGN) for number in TRAINERS_SIGNALS}


def _decide(_: object) -> None:
    if isinstance(multiprocessing.current_process(), WorkerProcess):
        # PyTorch sets a SIGTERM handler of its own before the loader's code runs, so ignoring is not enough.
        signal.pthread_sigmask(signal.SIG_BLOCK, TRAINERS_SIGNALS)
    else:
        for number, handler in _BEFORE.items():
            signal.signal(number, handler)


multiprocessing.util.register_after_fork(_decide, _decide)
