"""`python -m tests.conformance [case …]`: runs every promise on every model of the table (the zoo and the synthetic families) and prints the table.

A cell is green (ok), red (FAIL) or empty where the promise says nothing about that model. The exit status is 1 if any cell is red.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback

import torch
import transformers

from tests.conformance.cases import EVERY, case
from tests.conformance.promises import PROMISES, applies, hold, setting_for

GREEN, RED, PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[0m"


def cell(promise: str, name: str, failures: list[str]) -> str:
    """Run one check; the text of its cell."""
    if not applies(promise, case(name)):
        return ""
    torch.manual_seed(0)
    try:
        hold(promise, setting_for(promise, case(name)))
    except Exception:
        failures.append(f"{name}, {promise}:\n{traceback.format_exc()}")
        return "FAIL"
    return "ok"


def painted(text: str, width: int) -> str:
    """A padded cell, coloured when the output is a terminal."""
    padded = text.center(width)
    if not sys.stdout.isatty() or not text:
        return padded
    return (GREEN if text == "ok" else RED) + padded + PLAIN


def main() -> int:
    """Print the table row by row, then what failed and why."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("cases", nargs="*", help="names of cases (default: all)")
    parser.add_argument("--promise", action="append", choices=list(PROMISES), help="only this column; may be repeated")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    columns = chosen.promise or list(PROMISES)
    for number, promise in enumerate(columns):
        print(f"{number + 1:>3}  {promise:14} {(PROMISES[promise].__doc__ or '').splitlines()[0]}")
    print("\n" + " " * 27 + "".join(str(number + 1).center(5) for number in range(len(columns))))
    failures: list[str] = []
    count, start = 0, time.time()
    for name in chosen.cases or list(EVERY):
        cells = [cell(promise, name, failures) for promise in columns]
        count += sum(map(bool, cells))
        print(f"{name:27}" + "".join(painted(text, 5) for text in cells), flush=True)
    print(f"\n{count - len(failures)} of {count} cells are green, in {time.time() - start:.0f} s.")
    for failure in failures:
        print("\n" + failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
