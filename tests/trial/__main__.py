"""``python -m tests.trial --draws 5000``: how many edits were compared with hand-written hooks, and the largest deviation of each kind."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict

from transformers.utils import logging

from tests.trial.trial import Outcome, compare, draw, tolerance


def _table(title: str, groups: dict[str, list[Outcome]]) -> None:
    print(
        f"\n| {title} | compared | largest deviation (float64) | (float32) | moved the output | refused |\n|---|---|---|---|---|---|"
    )
    for name, outcomes in sorted(groups.items()):
        done = [outcome for outcome in outcomes if not outcome.refusal]
        worst = {
            single: max((o.deviation for o in done if (o.draw.attention == "eager") == single), default=0.0)
            for single in (False, True)
        }
        moved = sum(outcome.effect > 1e-6 for outcome in done)
        print(
            f"| {name} | {len(done)} | {worst[False]:.1e} | {worst[True]:.1e} | {moved} | {len(outcomes) - len(done)} |"
        )


def main() -> None:
    """Draw, compare, print the tables and everything that deviates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    options = parser.parse_args()
    logging.set_verbosity_error()
    outcomes = []
    for number in range(options.first, options.first + options.draws):
        made = draw(number)
        if made is not None:
            outcomes.append(compare(made))
            if not outcomes[-1].refusal and not outcomes[-1].deviation <= tolerance(made):
                print(f"{number}: deviates by {outcomes[-1].deviation:.2g}: {made}")
    for title, key in (
        ("edit", lambda o: o.draw.kind),
        ("model", lambda o: o.draw.name),
        ("run", lambda o: f"{o.draw.mode}, padding {o.draw.side}"),
        ("site", lambda o: o.draw.site.split(".", 3)[-1] if ".blocks." in o.draw.site else o.draw.site),
    ):
        groups: dict[str, list[Outcome]] = defaultdict(list)
        for outcome in outcomes:
            groups[key(outcome)].append(outcome)
        _table(title, groups)
    print()
    for reason, count in Counter(
        outcome.refusal.split(": ")[-1] for outcome in outcomes if outcome.refusal
    ).most_common():
        print(f"{count} refused: {reason}")


if __name__ == "__main__":
    main()
