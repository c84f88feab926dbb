"""Choose the training run of reach-pi0 that ships, and write its card.

``python -m circuitvision.organisms.reach_card RUN RUN RUN --out FOLDER`` scores every run's folder anew, takes the one
with the best validation success (smallest seed on a tie), and writes it to FOLDER with ``card.json`` and ``README.md``.
A run is a folder written by training, with the JSON that training printed beside it as ``RUN.json`` (for its seed and
minutes).

The test episodes take no part in the choice: no layout is in two splits, and the streams differ.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from circuitvision.data import reach
from circuitvision.organisms import reach_pi0, registry
from circuitvision.organisms.cards import parameter_count, versions, write_with_card

NAME = "reach-pi0"
SPENT = ("seed", "minutes", "cpu_minutes")


def make_card(runs: list[dict[str, Any]], parameters: int, trained_on: str) -> dict[str, Any]:
    """The card as a JSON-ready mapping; ships the run with the best validation success, smallest seed among equals."""
    shipped = min(runs, key=lambda run: (-run["validation"], run["seed"]))
    board, entry = reach.Board(), registry.entry(NAME)
    return {
        "name": NAME,
        "model_class": entry.model_class,
        "task": entry.task,
        "parameters": parameters,
        "data": f"Boards of {board.size} x {board.size} cells of {board.cell_pixels} pixels with {board.n_objects} objects of "
        f"different colours ({', '.join(reach.COLOR_NAMES)}), a gripper and an instruction 'reach <colour>'; the labels are the "
        f"expert's next {reach_pi0.CHUNK} steps. A tenth of all layouts is kept for validation and another for test.",
        "score": f"share of new closed-loop episodes in which the gripper rests on the named object after {reach_pi0.HORIZON} steps, "
        "on layouts (which colours stand where) never trained on; it starts away from it",
        "random_policy": shipped["random_policy"],
        "ships": shipped["seed"],
        "chosen_by": "validation success: layouts and episodes that neither training nor the held-out score uses",
        "held_out": shipped["held_out"],
        "trained": shipped["trained"],
        "seeds": sorted(runs, key=lambda run: run["seed"]),
        "command": f"circuitvision organisms train {NAME} --seed {shipped['seed']} --out FOLDER",
        "minutes_measured": shipped["minutes"],
        "cpu_minutes_measured": shipped["cpu_minutes"],
        "trained_on": trained_on,
        "versions": versions(),
        "license": "Apache-2.0",
    }


def make_readme(card: dict[str, Any]) -> str:
    """The card for people."""
    rows = [
        f"| {run['seed']}{' (ships)' if run['seed'] == card['ships'] else ''} | {run['held_out']:.1%} | {run['validation']:.1%} "
        f"| {run['trained']:.1%} | {run['held_out_actions']:.1%} | {run['minutes']:.1f} | {run['cpu_minutes']:.1f} |"
        for run in card["seeds"]
    ]
    episodes = card["seeds"][0]["held_out_episodes"]
    versions = ", ".join(f"{key} {value}" for key, value in card["versions"].items())
    return f"""# {card["name"]}

A `{card["model_class"]}` with {card["parameters"]:,} parameters that was trained to {card["task"]}.

**Data.** {card["data"]} Drawn by `circuitvision.data.reach`, seeded, without end.

**Score.** {card["score"][0].upper() + card["score"][1:]}; {episodes} episodes per column.
"Actions" is the share of single test scenes in which both next steps are the expert's.
A random policy succeeds in {card["random_policy"]:.1%} of the same test episodes.

| seed | held out | validation | trained layouts | actions | minutes | CPU minutes |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

The shipped seed was chosen by {card["chosen_by"]}.
Minutes are wall-clock time on {card["trained_on"]}; CPU minutes are what the run itself used.

**Use it.** A processor call takes one list of cameras per prompt, and the state is the gripper's (row, column):

```python
processor = AutoProcessor.from_pretrained(folder)  # SigLIP's image processor, so torchvision is not needed
model = PI0ForConditionalGeneration.from_pretrained(folder)
inputs = processor(images=[[image]], text=["reach red"], state=[[0, 3]])
actions = model.sample_actions(**inputs)  # normalised; reach_pi0.to_steps makes (row step, column step)
```

**Train it again.**

```
{card["command"]}
```

Versions: {versions}.
Other versions or thread counts round differently, so a run repeats the recipe, not every bit. Licence: Apache-2.0.
"""


def ship(folders: list[Path], out: Path, trained_on: str) -> dict[str, Any]:
    """Score every run, copy the chosen one to ``out`` with its card, and return the card."""
    runs = []
    for folder in folders:
        printed = json.loads(folder.with_name(folder.name + ".json").read_text(encoding="utf-8"))
        runs.append({**{key: printed[key] for key in SPENT}, **registry.evaluate(NAME, folder)})
    card = make_card(runs, 0, trained_on)
    chosen = folders[[run["seed"] for run in runs].index(card["ships"])]
    card["parameters"] = parameter_count(chosen)
    write_with_card(chosen, out, card, make_readme(card))
    return card


def main(arguments: list[str] | None = None) -> int:
    """Ship the best of several runs and print its card."""
    parser = argparse.ArgumentParser(prog="python -m circuitvision.organisms.reach_card", description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trained-on", default="one CPU thread", help="the machine that the minutes were measured on")
    options = parser.parse_args(arguments)
    print(json.dumps(ship(options.runs, options.out, options.trained_on), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
