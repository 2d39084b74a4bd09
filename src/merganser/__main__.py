"""`python -m merganser` is the command `merganser`."""

from __future__ import annotations

import gc
import os
import signal

# nothing is imported that Ctrl-C could still interrupt: typing alone takes some milliseconds
TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn


def main() -> NoReturn:
    """Run the command of this process.

    Raises:
        SystemExit: With the exit code.
    """
    # Python raises KeyboardInterrupt only where nothing else was decided, such as in a shell script's background
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    # Importing torch makes 300,000 objects and a plan millions, which all stay alive: to scan them for garbage took a
    # twentieth of a short command, and half of a plan's time. This is for a process that is ours only.
    gc.set_threshold(500_000, 50, 100)
    from .cli import main as run_command

    run_command()


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """End the process at Ctrl-C during imports, when no files exist yet that a handler would have to keep or remove."""
    os.write(2, b"error: stopped\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
