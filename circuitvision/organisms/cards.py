"""Choose the training run of an organism on scenes that ships, and write its card.

``python -m circuitvision.organisms.cards NAME RUN RUN RUN --out FOLDER`` takes the smallest seed whose validation
score reaches the target (the best one, where none does), copies it to FOLDER and writes ``card.json`` and ``README.md``
beside the weights. Where a model has aims for what it was trained on, a seed that misses more of them than another does not ship.
A run is a folder written by training, with what training printed (seed, minutes, scores) beside it as ``RUN.json``; ``--measured FILE`` adds what
:mod:`circuitvision.organisms.measured` found in the run that ships.

The held-out scores take no part in the choice: validation pairs and test pairs are different pairs, and all streams of scenes differ.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from circuitvision.data.worlds import find_world
from circuitvision.organisms import registry
from circuitvision.organisms.measured.tables import markdown

TARGET = 0.98
"""Validation score at which an organism is good enough to ship; differences above it are no reason to change the weights others study."""

_BOUND = "Scenes of three objects of 2 x 2 patches, anywhere on 8 x 8 patches, 64 x 64 pixels, drawn so that no patch tells both colour and shape."
DETAILS: dict[str, dict[str, str]] = {
    "shapes-vit": {
        "data": "Scenes of two to four objects of three sizes on a 4 x 4 grid, 64 x 64 pixels; the label is the shape of the largest one.",
        "score": "share of new scenes whose most likely class is the shape of the largest object, which has a pair never trained on",
        "chance": "0.2",
    },
    "shapes-clip": {
        "data": "Scenes of two objects on a 4 x 4 grid, 64 x 64 pixels, with captions such as 'red circle and blue square'.",
        "score": "share of new scenes whose true caption has the highest logit among 16 distinct ones: eight differ from it in "
        "one colour or one shape; at least four pairs never trained on are named, and one of them is in the scene",
        "chance": "0.0625",
        "parts": "For swaps, some of the eight have the two colours exchanged instead: every word is right, what belongs together is not.",
    },
    "shapes-llava": {
        "data": "Scenes of two or three objects on a 4 x 4 grid, 64 x 64 pixels, with questions about colour, shape and position.",
        "score": "share of questions about an object with a pair never trained on whose most likely next token is the answer",
        "parts": "The parts are the kinds of question.",
        "chance": "0.275 (1/2 for side and height, 1/8 for colours, 1/5 for shapes)",
    },
    "scenes-vit": {
        "world": "binding",
        "data": f"{_BOUND} One object is large; the label is its shape.",
        "score": "share of new scenes whose most likely class is the shape of the large object, which has a pair never trained on",
        "chance": "0.125",
    },
    "scenes-clip": {
        "world": "binding",
        "data": f"{_BOUND} Captions such as 'red circle and blue square' name two of them.",
        "score": "share of new scenes whose true caption has the highest logit among 16 distinct ones: eight differ from it in "
        "one colour or one shape; at least four pairs never trained on are named, and one of them is in the scene",
        "chance": "0.0625",
        "parts": "For swaps, some of the eight have the two colours exchanged instead: every word is right, what belongs together is not.",
    },
    "scenes-llava": {
        "world": "binding",
        "data": f"{_BOUND} Questions about colour, shape, relation ('what color is left of the red circle ?') and count.",
        "score": "share of questions about an object with a pair never trained on whose most likely next token is the answer",
        "parts": "The parts are the kinds of question.",
        "chance": "1/8 for colours and shapes, 1/4 for counts; 1/3 for who knows what is in the scene, but not which object is meant",
    },
}

AIMS: dict[str, dict[str, float]] = {
    "scenes-vit": {"held_out": 0.98, "trained": 0.98},
    "scenes-clip": {"held_out": 0.98, "trained": 0.98},
    "scenes-llava": {
        **{f"{group}_{kind}": 0.98 for group in ("trained", "held_out") for kind in ("color", "shape")},
        **{
            f"{group}_{kind}": aim
            for group, aim in (("trained", 0.95), ("held_out", 0.9))
            for kind in ("relation", "count")
        },
    },
}
"""The scores that a model was made to reach; its card says which of them it does not."""


def choose(runs: list[dict[str, Any]], aims: Mapping[str, float] = MappingProxyType({})) -> dict[str, Any]:
    """Of the seeds that miss the fewest of the aims on trained pairs the smallest whose validation score reaches the target; where none does, the
    best of them.
    """

    def missed(run: Mapping[str, Any]) -> int:
        return sum(run[score] < aim for score, aim in aims.items() if score.startswith("trained"))

    fewest = min(map(missed, runs))
    runs = [run for run in runs if missed(run) == fewest]
    reached = [run for run in runs if run["validation"] >= TARGET]
    if reached:
        return min(reached, key=lambda run: run["seed"])
    return min(runs, key=lambda run: (-run["validation"], run["seed"]))


def make_card(
    name: str, runs: list[dict[str, Any]], parameters: int, trained_on: str, measured: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The card as a JSON-ready mapping."""
    shipped = choose(runs, AIMS.get(name, {}))
    entry = registry.entry(name)
    details = {"world": "shapes", **DETAILS[name]}
    world = find_world(details["world"])
    return {
        "name": name,
        "model_class": entry.model_class,
        "task": entry.task,
        "parameters": parameters,
        **details,
        "pairs": len(world.all_pairs),
        "test_pairs": [" ".join(pair) for pair in world.test_pairs],
        "validation_pairs": [" ".join(pair) for pair in world.validation_pairs],
        "trained_pairs": len(world.train_pairs),
        "ships": shipped["seed"],
        "chosen_by": f"{'the fewest aims missed on trained pairs, then ' if name in AIMS else ''}validation score, the smallest seed with at least "
        f"{TARGET:.0%}: pairs and scenes that neither training nor the held-out score uses",
        "held_out": shipped["held_out"],
        "trained": shipped["trained"],
        "seeds": sorted(runs, key=lambda run: run["seed"]),
        "command": f"circuitvision organisms train {name} --seed {shipped['seed']} --out FOLDER",
        "minutes_measured": shipped["minutes"],
        "cpu_minutes_measured": shipped["cpu_minutes"],
        "trained_on": trained_on,
        "versions": versions(),
        "license": "Apache-2.0",
        **({} if measured is None else {"measured": measured}),
    }


def versions() -> dict[str, str]:
    """What a run depends on, of the packages that run now."""
    found = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "numpy")}
    return found | {"python": platform.python_version()}


def make_readme(card: dict[str, Any]) -> str:
    """The card for people."""
    rows = [
        f"| {run['seed']}{' (ships)' if run['seed'] == card['ships'] else ''} | {run['held_out']:.2%} | {run['validation']:.2%} "
        f"| {run['trained']:.2%} | {run['minutes']:.1f} | {run['cpu_minutes']:.1f} |"
        for run in card["seeds"]
    ]
    shipped = next(run for run in card["seeds"] if run["seed"] == card["ships"])
    said = {"held_out": "Held out", "trained": "Trained pairs"}
    parts = {group: _parts(shipped, group) for group in said}
    lines = [
        f"# {card['name']}",
        "",
        f"A `{card['model_class']}` with {card['parameters']:,} parameters that was trained to {card['task']}.",
        "",
        f"**Data.** {card['data']} Drawn by `circuitvision.data`, seeded, without end.",
        f"Of {card['pairs']} colour-shape pairs {card['trained_pairs']} are trained on. Never in a training picture, in any role:",
        f"{', '.join(card['test_pairs'])} (test) and {', '.join(card['validation_pairs'])} (validation).",
        "",
        f"**Score.** {card['score'][0].upper() + card['score'][1:]}; {shipped['held_out_answers']:,} answers per column. Chance: {card['chance']}.",
        "",
        "| seed | held out | validation | trained pairs | minutes | CPU minutes |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *[
            f"{said[group]}, in parts (seed {card['ships']}): {', '.join(told)}. {card.get('parts', '')}".rstrip()
            + "\n"
            for group, told in parts.items()
            if told
        ],
        *_short_of(card["name"], shipped),
        f"The shipped seed was chosen by {card['chosen_by']}.",
        f"Minutes are wall-clock time on {card['trained_on']}; CPU minutes are what the run itself used.",
        "",
        "**Train it again.**",
        "",
        "```",
        card["command"],
        "```",
        "",
        f"Versions: {', '.join(f'{key} {value}' for key, value in card['versions'].items())}. "
        "Other versions or thread counts round differently, so a run repeats the recipe, not every bit. Licence: Apache-2.0.",
        "",
        *([markdown(card["measured"]), ""] if "measured" in card else []),
    ]
    return "\n".join(lines)


def _parts(scores: dict[str, Any], group: str) -> list[str]:
    """The scores of a group's parts, as words."""
    start = f"{group}_"
    return [
        f"{key.removeprefix(start)} {value:.2%}"
        for key, value in scores.items()
        if key.startswith(start) and not key.endswith("answers")
    ]


def _short_of(name: str, scores: dict[str, Any]) -> list[str]:
    """Which of its aims a model misses, as a paragraph; none where it was made without any."""
    aims = AIMS.get(name, {})
    missed = [f"{_spoken(key)} {scores[key]:.2%} ({aim:.0%})" for key, aim in aims.items() if scores[key] < aim]
    if not aims:
        return []
    return [f"**Falls short of its aims:** {', '.join(missed)}." if missed else "It meets all of its aims.", ""]


def _spoken(key: str) -> str:
    group, _, part = key.replace("held_out", "held out").partition("_")
    return f"{part}, {group}" if part else group


def ship(
    name: str, folders: list[Path], out: Path, trained_on: str, measured: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Copy the chosen run to ``out`` with its card, and return the card."""
    runs = [json.loads(folder.with_name(f"{folder.name}.json").read_text(encoding="utf-8")) for folder in folders]
    chosen = folders[runs.index(choose(runs))]
    card = make_card(name, runs, parameter_count(chosen), trained_on, measured)
    write_with_card(chosen, out, card, make_readme(card))
    return card


def parameter_count(folder: Path) -> int:
    """How many numbers the weights in a folder are."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        return sum(weights.get_tensor(key).numel() for key in weights.keys())  # noqa: SIM118


def write_with_card(chosen: Path, out: Path, card: Mapping[str, Any], readme: str) -> None:
    """Copy a run's folder to ``out`` with its card, in one move: complete, or not there at all. What was in ``out`` before is gone."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    shutil.copytree(chosen, temporary, dirs_exist_ok=True)
    (temporary / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (temporary / "README.md").write_text(readme, encoding="utf-8")
    temporary.chmod(0o755)
    for file in temporary.iterdir():
        file.chmod(0o644)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def main(arguments: list[str] | None = None) -> int:
    """Ship the best of several runs and print its card."""
    parser = argparse.ArgumentParser(prog="python -m circuitvision.organisms.cards", description=main.__doc__)
    parser.add_argument("name", choices=list(DETAILS))
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trained-on", default="one CPU thread", help="the machine that the minutes were measured on")
    parser.add_argument("--measured", type=Path, default=None, help="what was measured in the run that ships, as JSON")
    options = parser.parse_args(arguments)
    measured = None if options.measured is None else json.loads(options.measured.read_text(encoding="utf-8"))
    card = ship(options.name, options.runs, options.out, options.trained_on, measured)
    print(json.dumps({key: value for key, value in card.items() if key != "measured"}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
