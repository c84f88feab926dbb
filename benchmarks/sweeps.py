"""What a sweep costs: many edits of one run, against a loop of plain hooks, nnsight, TransformerLens's bridge, pyvene, and what cannot be avoided.

    python benchmarks/sweeps.py                     # ViT-B/16, a LLaVA of 600 positions and a PI0, on one CPU thread
    python benchmarks/sweeps.py --quick             # three small models, a few rounds
    python benchmarks/sweeps.py --device cuda       # ViT-B/16, LLaVA-1.5-7B's and PI0's real shapes

Prints, for each model, one row per study and tool: seconds for the whole study, how many times faster than the loop of plain hooks, time over
the time of the operations that cannot be avoided, and peak memory. One full forward per edit takes hours, so the tools that work that way are
timed on a seeded random sample of the edits; where a study is too long, ours is timed on a random sample with as many edits of every layer. The
table says on how many. All tools run in turn in every round, so that drift cancels. The tables and their numbers go to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Nothing may be installed or downloaded while the peers load, and one thread makes process time mean something.
os.environ.update(PIP_NO_INDEX="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import sweep_shapes
import torch
from measuring import AGAIN, Samples, peak_bytes, samples_in_rounds, spread, surroundings
from operations import of_forward, unavoidable
from sweep_shapes import SHAPES, STUDIES, Edit, Study, SweepShape
from sweep_tools import TOOLS, Sweep, check, sweeps_of

from circuitvision.files import write_text

BARE, LOOP, OURS = "bare forward", TOOLS["plain-hooks"][0], TOOLS["circuitvision"][0]
MIN_ROUNDS = 3
CHECKED = 5
AT_LEAST = 144
"""Edits of one study that our sweep is timed on, if it has that many: fewer would mostly measure the clean run it starts from."""


@dataclass(frozen=True)
class Budget:
    """How long a study may take: wall seconds for its rounds, and whether our sweep runs over every edit however long that is."""

    seconds: float
    whole: bool


def count(shape: SweepShape, edit: Edit) -> int:
    """The operations of one edit that cannot be avoided."""
    return unavoidable(shape.network, edit.layer, edit.first, edit.end, edit.head is not None)


def mean_count(shape: SweepShape, edits: Sequence[Edit]) -> float:
    return sum(count(shape, edit) for edit in edits) / len(edits)


def sample(edits: Sequence[Edit], at_most: int, seed: int = 0) -> list[Edit]:
    """At most so many of the edits (but one per layer): of whole denoising steps, spread evenly, and the same number from every layer of them."""
    steps = sorted({edit.run for edit in edits})
    kept = steps[:: math.ceil(len(steps) / max(1, at_most * len(steps) // len(edits)))]
    groups: dict[tuple[int, int], list[Edit]] = {}
    for edit in edits:
        if edit.run in kept:
            groups.setdefault((edit.run, edit.layer), []).append(edit)
    each = max(1, at_most // len(groups))
    draw = random.Random(seed).sample
    return [edit for group in groups.values() for edit in (group if len(group) <= each else draw(group, each))]


def slices(edits: Sequence[Edit], size: int, seed: int = 0) -> Callable[[], list[Edit]]:
    """The next ``size`` of the edits in a random order, over and over."""
    mixed = list(edits)
    random.Random(seed).shuffle(mixed)
    endless = itertools.cycle(mixed)
    return lambda: list(itertools.islice(endless, size))


def in_turn(sweep: Sweep, edits: Sequence[Edit], size: int) -> Callable[[], Any]:
    """A run that does the next few edits every time it is called; all tools see the same ones in the same round."""
    following = slices(edits, size)
    return lambda: sweep(following())


def repeat(run: Callable[[], Any], times: int) -> None:
    """Run it so many times and keep nothing."""
    for _ in range(times):
        run()


def first_check(shape: SweepShape, tools: Sequence[str], exact: bool) -> tuple[dict[str, Sweep], dict[str, str]]:
    """The tools that can, and why the others cannot, once every tool's values on random edits of every study are those of the loop."""
    able, unable = sweeps_of(shape, tools)
    loop = sweeps_of(shape, ["plain-hooks"])[0][LOOP]
    for study in shape.studies:
        edits = slices(study.edits, min(CHECKED, len(study.edits)), seed=1)()
        clean = {run: shape.metric(shape.module(**shape.runs[run]).logits) for run in {edit.run for edit in edits}}
        check(able, loop(edits), torch.stack([clean[edit.run] for edit in edits]), edits, exact)
    return able, unable


def measure(
    shape: SweepShape, study: Study, able: dict[str, Sweep], device: torch.device, forward_count: int, budget: Budget
) -> list[dict[str, Any]]:
    """One row per tool of one study, as plain values; the bare forward is the first."""

    def bare_forward() -> Any:
        return shape.module(**shape.runs[0])

    few = samples_in_rounds({BARE: bare_forward}, BARE, device, 0, MIN_ROUNDS)
    one = min(seconds for seconds, _ in few[BARE])
    share = budget.seconds / MIN_ROUNDS / 2
    size = max(1, min(8, len(study.edits), round(share / one / (len(able) + 2))))
    # Room for half as much again as the aim allows: an unavoidable operation runs at the speed of a bare forward.
    affordable = max(AT_LEAST, int(share * forward_count / (1.5 * one * mean_count(shape, study.edits))))
    ours = sample(study.edits, len(study.edits) if budget.whole else affordable)
    timed = {title: len(ours) if title == OURS else size for title in able} | {BARE: size, AGAIN: size}
    runs: dict[str, Callable[[], Any]] = {BARE: lambda: repeat(bare_forward, size)}
    for title, sweep in able.items():
        runs[title] = (lambda sweep=sweep: sweep(ours)) if title == OURS else in_turn(sweep, study.edits, size)
    peaks = {title: peak_bytes(run, device) for title, run in runs.items()}
    samples = samples_in_rounds(runs, BARE, device, budget.seconds, MIN_ROUNDS)
    rows = []
    for title in (BARE, AGAIN, *able):
        expected = mean_count(shape, ours if title == OURS else study.edits) / forward_count
        row = _row(title, samples, timed, expected, len(study.edits))
        rows.append(row | {"study": study.name, "peak_mib": peaks.get(title, peaks[BARE]) / 2**20})
    return rows


def _row(title: str, samples: Samples, timed: dict[str, int], expected: float, edits: int) -> dict[str, Any]:
    """Ratios of the same round: to the bare forward per edit, of the loop to this tool, and to ``expected`` bare forwards."""

    def per_edit(name: str) -> list[float]:
        return [seconds / timed[name] for seconds, _ in samples[name]]

    own, bare = per_edit(title), per_edit(BARE)
    forwards, low, high = spread([mine / theirs for mine, theirs in zip(own, bare, strict=True)])
    row: dict[str, Any] = {
        "tool": title,
        "timed": timed[title],
        "edits": edits,
        "rounds": len(own),
        "forwards_per_edit": forwards,
        "forwards_low": low,
        "forwards_high": high,
        "seconds_per_edit": spread(own)[0],
        "over_unavoidable": forwards / expected,
        "over_unavoidable_low": low / expected,
        "over_unavoidable_high": high / expected,
    }
    if LOOP in samples:
        faster = spread([theirs / mine for mine, theirs in zip(own, per_edit(LOOP), strict=True)])
        row |= dict(zip(("faster", "faster_low", "faster_high"), faster, strict=True))
    return row


def aims(study: Study, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What this library asks of its own sweeps, beside what was measured.

    The noise is the wider of the distance of the bare forward's second timing from one, times the ratio, and half the ratio's quartile range; an
    aim that fails by less than it is undecided.
    """
    found = {row["tool"]: row for row in rows}
    if OURS not in found:
        return []
    again, checks = abs(found[AGAIN]["forwards_per_edit"] - 1), []
    for key, aim, sign in (("faster", study.faster, 1), ("over_unavoidable", study.over_unavoidable, -1)):
        if aim is None or key not in found[OURS]:
            continue
        measured = found[OURS][key]
        noise = max(again * measured, (found[OURS][f"{key}_high"] - found[OURS][f"{key}_low"]) / 2)
        missing = sign * (aim - measured)
        verdict = "met" if missing <= 0 else "undecided: inside the noise" if missing <= noise else "missed"
        what = f"{study.title}: " + (
            "at least {} × faster than the loop" if sign > 0 else "at most {} × unavoidable"
        ).format(aim)
        checks.append({"aim": what, "limit": aim, "measured": measured, "noise": noise, "verdict": verdict})
    return checks


def table(shape: SweepShape, found: dict[str, Any]) -> str:
    """The studies of one model, and how their aims fared, as markdown."""
    bare = found["studies"][0]["rows"][0]
    rate = found["forward_operations"] / bare["seconds_per_edit"] / 1e9
    lines = [
        f"### {shape.title}",
        "",
        f"Bare forward {1e3 * bare['seconds_per_edit']:.1f} ms, {found['forward_operations'] / 1e9:.2f} GFLOP, {rate:.0f} GFLOP/s.",
        "",
        "| study | tool | edits timed | whole study, s | × faster than the loop (quartiles) | × unavoidable | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for study in found["studies"]:
        about = (
            f"{study['title']} ({study['edits']} edits, unavoidable: {study['unavoidable_forwards']:.3f} forwards each)"
        )
        for row in study["rows"]:
            lines.append(_line(about, row))
            about = ""
        lines += [f"| | {title} | cannot: {why} | | | | |" for title, why in found["unable"].items()]
    checks = [check for study in found["studies"] for check in study["aims"]]
    if checks:
        lines += ["", "| aim | measured | noise | verdict |", "|---|---|---|---|"]
        lines += [f"| {c['aim']} | {c['measured']:.2f} | {c['noise']:.2f} | {c['verdict']} |" for c in checks]
    return "\n".join(lines) + "\n"


def _line(about: str, row: dict[str, Any]) -> str:
    if row["tool"] in (BARE, AGAIN):
        name = BARE if row["tool"] == BARE else f"{BARE}, again"
        ratio = f"{row['forwards_per_edit']:.3f} ({row['forwards_low']:.3f} to {row['forwards_high']:.3f}) of the first"
        return f"| {about} | {name} | | | {ratio if row['tool'] == AGAIN else ''} | | {row['peak_mib']:.1f} |"
    whole = row["seconds_per_edit"] * row["edits"]
    timed = "all" if row["timed"] == row["edits"] else f"{row['timed']}, as many of every layer, extrapolated"
    if row["tool"] != OURS:
        timed = f"{row['timed']} at random per round, extrapolated"
    faster = f"{row['faster']:.2f} ({row['faster_low']:.2f} to {row['faster_high']:.2f})" if "faster" in row else ""
    over = f"{row['over_unavoidable']:.2f}"
    return f"| {about} | {row['tool']} | {timed} | {whole:.2f} | {faster} | {over} | {row['peak_mib']:.1f} |"


def study_model(
    name: str, tools: Sequence[str], wanted: Sequence[str], device: torch.device, budget: Budget
) -> tuple[SweepShape, dict[str, Any]]:
    """Check every tool, then measure every study of one model."""
    make = SHAPES[name]
    shape = sweep_shapes.build(make, device)
    exact = shape.module.dtype == torch.float32  # type: ignore[union-attr]
    if shape.checked_on is not None:
        first_check(sweep_shapes.build(shape.checked_on, device), tools, exact=True)
    able, unable = first_check(shape, tools, exact)
    forward_count = of_forward(shape.twin("eager"), shape.runs[0])
    studies = []
    for study in shape.studies:
        if study.name not in wanted:
            continue
        rows = measure(shape, study, able, device, forward_count, budget)
        studies.append(
            {
                **{key: value for key, value in asdict(study).items() if key != "edits"},
                "edits": len(study.edits),
                "unavoidable_forwards": mean_count(shape, study.edits) / forward_count,
                "rows": rows,
                "aims": aims(study, rows),
            }
        )
    return shape, {
        "title": shape.title,
        "forward_operations": forward_count,
        "unable": unable,
        "studies": studies,
    }


def report(about: dict[str, Any], tables: list[str]) -> str:
    """The whole result as one markdown page."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    head = [
        f"# The cost of sweeps on {about['device_name']}",
        "",
        f"{about['date']}, {about['clock']}, {about['threads']} thread(s), load average {about['load_average']}; {versions}.",
        "",
        "Every tool but circuitvision runs one full forward per edit and is timed on a random sample of the edits, a few in every round; the whole",
        "study is extrapolated per edit. The unavoidable operations of an edit are those downstream of it that the output reads; they are put at the",
        "speed of the bare forward of the same round. `benchmarks/README.md` says how to read this page; `python benchmarks/sweeps.py` makes it.",
        "",
    ]
    return "\n".join(head) + "\n" + "\n".join(tables)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--quick", action="store_true", help="small models and a few rounds; written only where --results says"
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, help="which models (default: those of the device's size)"
    )
    parser.add_argument(
        "--studies", nargs="+", choices=STUDIES, default=STUDIES, help="which studies of them (default: all)"
    )
    parser.add_argument(
        "--tools", nargs="+", choices=TOOLS, default=list(TOOLS), help="which tools beside the bare model"
    )
    parser.add_argument("--seconds", type=float, help="wall time to spend on the rounds of each study")
    parser.add_argument("--whole", action="store_true", help="time our sweep over every edit, however long that takes")
    parser.add_argument("--results", type=Path, help="folder for the markdown and JSON files")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, print, and write the results."""
    options = parsed(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch sees no CUDA device here; leave the option out to measure on the CPU.")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    import transformers

    transformers.logging.set_verbosity_error()
    seconds = options.seconds if options.seconds is not None else (1.0 if options.quick else 120.0)
    usual = sweep_shapes.ON_CUDA if device.type == "cuda" else sweep_shapes.ON_CPU
    names = options.shapes or (sweep_shapes.QUICK if options.quick else usual)
    about, tables, models = surroundings(device), [], {}
    with torch.no_grad():
        for name in names:
            budget = Budget(seconds, options.whole)
            shape, found = study_model(name, options.tools, options.studies, device, budget)
            if not found["studies"]:
                continue
            models[name] = found
            tables.append(table(shape, found))
            print(tables[-1], flush=True)
            del shape
    folder = options.results or (None if options.quick else Path(__file__).parent / "results")
    if folder is not None:
        stem = f"sweeps-{device.type}"
        write_text(folder / f"{stem}.md", report(about, tables))
        write_text(folder / f"{stem}.json", json.dumps({**about, "models": models}, indent=1) + "\n")
        print(f"Written to {folder / stem}.md and .json")


if __name__ == "__main__":
    # A closed pipe (… | head) is no error of the benchmark.
    with contextlib.suppress(BrokenPipeError):
        main()
