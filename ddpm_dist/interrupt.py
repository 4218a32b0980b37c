"""Ctrl-C while a command's packages load, which takes seconds: one line, and the end.

A script asks for it before all other imports, and only where it is the program: what else imports a script, such as a
test or a child of multiprocessing, keeps its own Ctrl-C.

A handler that raised KeyboardInterrupt would print a traceback, or be swallowed by an `except:` in the middle of
somebody's import, and the command would go on. `cli.run` gives Ctrl-C its usual meaning back.
"""

import os
import signal
from types import FrameType

MESSAGE = b"interrupted; the same command continues\n"
EXIT_CODE = 130


def leave_quietly() -> None:
    """From here on Ctrl-C ends the process with one line, unless a shell in the background had it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, MESSAGE)
    os._exit(EXIT_CODE)


def restore() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
