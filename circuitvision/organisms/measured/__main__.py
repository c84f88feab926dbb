"""``python -m circuitvision.organisms.measured NAME --out FILE``: measure an organism or a folder, and print the tables of its card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from circuitvision.errors import CircuitVisionError
from circuitvision.files import write_text
from circuitvision.organisms.measured import measure
from circuitvision.organisms.measured.tables import markdown


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the numbers as JSON, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m circuitvision.organisms.measured", description=main.__doc__)
    parser.add_argument("name", help="a model's folder, or the name of an organism")
    parser.add_argument("--out", type=Path, default=None, help="where the numbers go as JSON (default: nowhere)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    for name, default in (measure.__kwdefaults__ or {}).items():
        if name not in ("seed", "progress"):
            parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args(arguments))
    name, out = options.pop("name"), options.pop("out")
    try:
        found = measure(name, **options)
    except CircuitVisionError as error:
        parser.error(str(error))
    if out is not None:
        write_text(out, json.dumps(found, indent=1) + "\n")
    print(markdown(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
