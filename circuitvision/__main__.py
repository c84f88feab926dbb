"""``python -m circuitvision``: the command line."""

from circuitvision.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
