"""``python -m circuitvision.organisms NAME --seed S --out DIR``: train one organism and print its held-out scores."""

from __future__ import annotations

import argparse
import json

from circuitvision.errors import CircuitVisionError
from circuitvision.organisms import registry


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, train (or only score), and print the scores as JSON."""
    parser = argparse.ArgumentParser(prog="python -m circuitvision.organisms", description=main.__doc__)
    parser.add_argument("name", help=f"one of {', '.join(registry.names())}")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the training stream")
    parser.add_argument("--out", default=None, help="folder to write (default: ./NAME-seedS)")
    parser.add_argument("--steps", type=int, default=None, help="a shorter run than the recipe's")
    parser.add_argument(
        "--evaluate", action="store_true", help="score the shipped weights (or those in --out) instead of training"
    )
    options = parser.parse_args(arguments)
    try:
        if options.evaluate:
            scores = registry.evaluate(options.name, options.out)
        else:
            scores = registry.train(options.name, seed=options.seed, out=options.out, steps=options.steps)
    except CircuitVisionError as error:
        parser.error(str(error))
    print(json.dumps(scores, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
