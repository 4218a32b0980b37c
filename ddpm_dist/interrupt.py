"""Ctrl-C while a command's packages load, which takes seconds: one line, and the end. Commands import it first.

A handler that raised KeyboardInterrupt would print a traceback, or be swallowed by an `except:` in the middle of
somebody's import, and the command would go on. `cli.run` gives Ctrl-C its usual meaning back.
"""

import multiprocessing
import os
import signal
from types import FrameType

MESSAGE = b"interrupted; the same command continues\n"
EXIT_CODE = 130


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, MESSAGE)
    os._exit(EXIT_CODE)


def restore() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Not where a shell in the background ignores it, nor in a child of multiprocessing, which imports its parent's script.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler and multiprocessing.parent_process() is None:
    signal.signal(signal.SIGINT, _leave)
