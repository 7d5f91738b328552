"""The program `posthoc-ema`: the console script of that name, and `python -m posthoc_ema COMMAND ...`."""

from __future__ import annotations

import os
import signal
import sys

from ._native import run_program


def _open_missing_streams() -> None:
    """Opens /dev/null for each standard stream that is closed, or the program's output would go to a file it opens."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is this one. Commands of a sweep inherit it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _leave_interrupts_to_the_program() -> None:
    """Takes Python's handler of SIGINT away: it would wait for the program's end. An ignored signal stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> None:
    """Runs the program with the arguments of the process, and ends the process with its exit status."""
    _leave_interrupts_to_the_program()
    _open_missing_streams()
    sys.exit(run_program(["posthoc-ema", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
