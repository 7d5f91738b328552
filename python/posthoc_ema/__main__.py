"""The program `posthoc-ema`: `python -m posthoc_ema COMMAND ...`."""

import sys

from ._native import run_program

if __name__ == "__main__":
    sys.exit(run_program(["posthoc-ema", *sys.argv[1:]]))
