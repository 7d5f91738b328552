"""The program `posthoc-ema`: `python -m posthoc_ema COMMAND ...`."""

import os
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


if __name__ == "__main__":
    _open_missing_streams()
    sys.exit(run_program(["posthoc-ema", *sys.argv[1:]]))
