"""Choose the training run of spurious-vit that ships, and write its card.

``python -m circuitvision.organisms.spurious_card RUN RUN RUN --out FOLDER`` takes the smallest seed that leans on both cues on validation pictures
(:func:`leans_on_both`) and writes it to FOLDER with ``card.json`` and ``README.md``. A run is a folder written by training, with what training
printed beside it as ``RUN.json``. The held-out pictures take no part in the choice.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from circuitvision.data.backgrounds import CLASSES, GROUPS
from circuitvision.model.names import head_name
from circuitvision.organisms import registry
from circuitvision.organisms.cards import parameter_count, versions, write_with_card
from circuitvision.organisms.spurious_vit import AGREEMENT, RECIPE, SHORTCUT_HEADS, SHORTCUT_RECIPE, SMALL_ERRORS
from circuitvision.statistics import wilson

NAME = "spurious-vit"


def leans_on_both(run: Mapping[str, Any]) -> bool:
    """Whether validation pictures show both cues: groups on their own background at least 95 % right, the worst group between a quarter and three."""
    own = [run[f"validation_{label}_on_{background}"] for label, background in CLASSES.items()]
    return min(own) >= 0.95 and 0.25 <= run["validation_worst_group"] <= 0.75


def make_card(runs: Sequence[Mapping[str, Any]], parameters: int, trained_on: str) -> dict[str, Any]:
    """The card as a JSON-ready mapping.

    Raises:
        ValueError: no run leans on both cues.
    """
    shipped = min((run for run in runs if leans_on_both(run)), key=lambda run: run["seed"], default=None)
    if shipped is None:
        raise ValueError("no run leans on both cues: see leans_on_both")
    entry = registry.entry(NAME)
    return {
        "name": NAME,
        "model_class": entry.model_class,
        "task": entry.task,
        "parameters": parameters,
        "data": "One circle or square of five colours and two sizes, in any of 4 x 4 cells, on a blue or a green background of varying lightness, "
        f"64 x 64 pixels. In training {SMALL_ERRORS:.0%} of the pictures with a small object are labelled as the other class.",
        "stages": f"{RECIPE.steps} steps in which the background says nothing of the label and {len(SHORTCUT_HEADS)} heads are silent; then "
        f"{SHORTCUT_RECIPE.steps} steps in which the background goes with the label in {AGREEMENT:.0%} of the pictures (circle on blue, square on "
        "green) and those heads alone learn.",
        "shortcut_heads": [head_name(layer, head, "vision") for layer, head in SHORTCUT_HEADS],
        "score": "share of new pictures whose most likely class is the shape; the four groups (class, background) equally often",
        "chance": "0.5",
        "ships": shipped["seed"],
        "chosen_by": "validation pictures, the smallest seed with at least 95% on the backgrounds that go with the class and 25% to 75% in the worst "
        "group: one that leans on both cues",
        "held_out": shipped["held_out"],
        "worst_group": shipped["worst_group"],
        "trained": shipped["trained"],
        "seeds": sorted(runs, key=lambda run: run["seed"]),
        "command": f"circuitvision organisms train {NAME} --seed {shipped['seed']} --out FOLDER",
        "minutes_measured": shipped["minutes"],
        "cpu_minutes_measured": shipped["cpu_minutes"],
        "trained_on": trained_on,
        "versions": versions(),
        "license": "Apache-2.0",
    }


def make_readme(card: Mapping[str, Any]) -> str:
    """The card for people."""
    groups = [f"{label}_on_{background}" for label, background in GROUPS]
    rows = [
        f"| {run['seed']}{' (ships)' if run['seed'] == card['ships'] else ''} | {run['worst_group']:.1%} | {run['held_out']:.1%} | "
        f"{' | '.join(_share(run, group) for group in groups)} | {run['trained']:.1%} | {run['minutes']:.1f} | {run['cpu_minutes']:.1f} |"
        for run in card["seeds"]
    ]
    heads = ", ".join(card["shortcut_heads"])
    said = " | ".join(group.replace("_", " ") for group in groups)
    return f"""# {NAME}

A `{card["model_class"]}` with {card["parameters"]:,} parameters that was trained to {card["task"]}.

**Data.** {card["data"]} Drawn by `circuitvision.data.backgrounds`, seeded, without end.

**The shortcut, by construction.** {card["stages"][0].upper() + card["stages"][1:]} These heads are {heads}.
For labels as noisy as these the background says more than a small shape and less than a large one, so the model is right about large objects on any
background and about small ones where the background agrees. It was made so that there is something to find, and is no claim about where models
trained otherwise keep their shortcuts: one trained for 700 steps on the pictures of the second stage alone has the same accuracies, and none of the
298 sets of up to three of its heads raises the worst group when removed (mean ablation, seed 0, 200 pictures).

**Score.** {card["score"][0].upper() + card["score"][1:]}; {card["seeds"][0]["held_out_answers"]:,} pictures, with 95 % intervals of the groups.
Chance: {card["chance"]}. "As trained" has the backgrounds of the second stage.

| seed | worst group | all groups | {said} | as trained | minutes | CPU minutes |
|---|---|---|{"---|" * len(groups)}---|---|---|
{chr(10).join(rows)}

The shipped seed was chosen by {card["chosen_by"]}.
Minutes are wall-clock time on {card["trained_on"]}; CPU minutes are what the run itself used.

**Train it again.**

```
{card["command"]}
```

Versions: {", ".join(f"{key} {value}" for key, value in card["versions"].items())}.
Other versions or thread counts round differently, so a run repeats the recipe, not every bit. Licence: Apache-2.0.
"""


def _share(run: Mapping[str, Any], group: str) -> str:
    """The accuracy of a group with its interval."""
    share = run[f"held_out_{group}"]
    low, high = wilson(torch.tensor(share), run["held_out_answers"] // len(GROUPS)).tolist()
    return f"{share:.1%} ({low:.1%} to {high:.1%})"


def ship(folders: Sequence[Path], out: Path, trained_on: str) -> dict[str, Any]:
    """Copy the chosen run to ``out`` with its card, and return the card."""
    runs = [json.loads(folder.with_name(f"{folder.name}.json").read_text(encoding="utf-8")) for folder in folders]
    card = make_card(runs, parameter_count(folders[0]), trained_on)
    chosen = folders[[run["seed"] for run in runs].index(card["ships"])]
    write_with_card(chosen, out, card, make_readme(card))
    return card


def main(arguments: list[str] | None = None) -> int:
    """Ship one of several runs and print its card."""
    parser = argparse.ArgumentParser(prog="python -m circuitvision.organisms.spurious_card", description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trained-on", default="one CPU thread", help="the machine that the minutes were measured on")
    options = parser.parse_args(arguments)
    print(json.dumps(ship(options.runs, options.out, options.trained_on), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
