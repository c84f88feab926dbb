"""What ``causal.py`` and ``circuits.py`` share: studies of a model are checked, measured in rounds, judged by their aims, and written as tables."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(PIP_NO_INDEX="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import sweep_shapes
import torch
from causal_tools import OURS, PEERS, CausalStudy, Scene
from measuring import AGAIN, Samples, peak_bytes, samples_in_rounds, spread, surroundings
from sweep_shapes import SHAPES

from circuitvision.files import write_text

MIN_ROUNDS = 3
LONG = 8.0
"""Seconds from which on a reference is timed in one round less."""
CELLS = 3
"""Cells that a loop runs in one round."""
QUICK, USUAL = ("vit-small", "llava-small"), ("vit-b16", "llava-600")
MODELS = (*QUICK, *USUAL, "llava-7b")


@dataclass(frozen=True)
class Bench:
    """A benchmark: the script's docstring, its name, the heading of its page, and its studies, with what makes those of a model."""

    about: str
    name: str
    heading: str
    studies: Sequence[str]
    make: Callable[[Scene, Sequence[str], Sequence[str], int], dict[str, Callable[[], CausalStudy]]]


def measure(study: CausalStudy, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """One row per arm, as plain values; the reference is the first."""
    runs = {title: arm.run for title, arm in study.arms.items()}
    # The tools were checked before, so this is no first run of any of them.
    peaks = {title: peak_bytes(run, device) for title, run in runs.items()}
    started = time.process_time()
    runs[study.reference]()
    long = time.process_time() - started > LONG
    samples = samples_in_rounds(runs, study.reference, device, seconds, MIN_ROUNDS - long)
    return [_row(study, title, samples, peaks.get(title, peaks[study.reference])) for title in samples]


def _row(study: CausalStudy, title: str, samples: Samples, peak: int) -> dict[str, Any]:
    """The whole study in one way: seconds, ratios of the same round (quartiles) and of the minima to the unavoidable, and from the loop to it."""

    def whole(name: str) -> list[float]:
        share = study.arms[study.reference if name == AGAIN else name].share
        return [seconds / share for seconds, _ in samples[name]]

    own, least = whole(title), [study.unavoidable * one for one in whole(study.reference)]
    over, low, high = spread([mine / one for mine, one in zip(own, least, strict=True)])
    faster, faster_low, faster_high = spread(
        [theirs / mine for mine, theirs in zip(own, whole(study.loop), strict=True)]
    )
    arm = study.arms.get(title)
    return {
        "way": title,
        "passes": "" if arm is None else arm.passes,
        "share": 1.0 if arm is None else arm.share,
        "rounds": len(own),
        "seconds": spread(own)[0],
        "over_unavoidable": over,
        "over_unavoidable_low": low,
        "over_unavoidable_high": high,
        "over_unavoidable_minima": min(own) / min(least),
        "faster": faster,
        "faster_low": faster_low,
        "faster_high": faster_high,
        "peak_mib": peak / 2**20,
    }


def aims(study: CausalStudy, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the library asks of itself, beside what was measured; the noise is the reference's second timing and the spread of the rounds."""
    found = {row["way"]: row for row in rows}
    own, again = found[OURS], abs(found[AGAIN]["over_unavoidable"] / found[study.reference]["over_unavoidable"] - 1)
    checks = []
    base = next(row["peak_mib"] for row in rows if row["way"] == study.reference)
    if study.memory is not None:
        ratio = own["peak_mib"] / base
        what = f"{study.title}: at most {study.memory} × the memory of {study.reference}"
        verdict = "met" if ratio <= study.memory else "missed"
        checks = [{"aim": what, "limit": study.memory, "measured": ratio, "noise": 0.0, "verdict": verdict}]
    for key, limit, sign, words in (
        ("over_unavoidable", study.aim, -1, "at most {} × what is unavoidable"),
        ("faster", study.faster, 1, "at least {} × faster than the loop"),
    ):
        if limit is None:
            continue
        noise = max(again * own[key], (own[f"{key}_high"] - own[f"{key}_low"]) / 2)
        missing = sign * (limit - own[key])
        verdict = "met" if missing <= 0 else "undecided: inside the noise" if missing <= noise else "missed"
        what = f"{study.title}: {words.format(limit)}"
        checks.append({"aim": what, "limit": limit, "measured": own[key], "noise": noise, "verdict": verdict})
    return checks


def table(title: str, found: dict[str, Any]) -> str:
    """The studies of one model, and how their aims fared, as markdown."""
    lines = [
        f"### {title}",
        "",
        "| study | way | runs | timed | whole study, s | × unavoidable (quartiles) | minima | × faster than the loop | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for study in found["studies"]:
        about = f"{study['title']} (unavoidable: {study['unavoidable']:.3g} × {study['reference']})"
        for row in study["rows"]:
            lines.append(_line(about, row, study["reference"]))
            about = ""
        lines += [f"| | {way} | cannot: {why} | | | | | | |" for way, why in study["unable"].items()]
    checks = [check for study in found["studies"] for check in study["aims"]]
    if checks:
        lines += ["", "| aim | measured | noise | verdict |", "|---|---|---|---|"]
        lines += [f"| {c['aim']} | {c['measured']:.2f} | {c['noise']:.2f} | {c['verdict']} |" for c in checks]
    return "\n".join(lines) + "\n"


def _line(about: str, row: dict[str, Any], reference: str) -> str:
    name = f"{reference}, again" if row["way"] == AGAIN else row["way"]
    timed = "all" if row["share"] == 1 else f"{row['share']:.1%} per round"
    over = f"{row['over_unavoidable']:.2f} ({row['over_unavoidable_low']:.2f} to {row['over_unavoidable_high']:.2f})"
    numbers = f"{row['seconds']:.3f} | {over} | {row['over_unavoidable_minima']:.2f} | {row['faster']:.2f} | {row['peak_mib']:.1f}"
    return f"| {about} | {name} | {row['passes']} | {timed} | {numbers} |"


def study_model(
    bench: Bench, name: str, options: argparse.Namespace, device: torch.device, seconds: float
) -> Iterator[dict[str, Any]]:
    """Check and measure every study of one model; gives each when it is done, with the model's title."""
    shape = sweep_shapes.build(SHAPES[name], device)
    scene = Scene(shape)
    for kind, make in bench.make(scene, options.tools, options.studies, CELLS).items():
        study = make()
        rows = measure(study, device, seconds)
        told = {key: getattr(study, key) for key in ("name", "title", "reference", "loop", "unavoidable", "unable")}
        yield {**told, "model": shape.title, "rows": rows, "aims": aims(study, rows)}
        print(f"{name}, {kind}: done", file=sys.stderr, flush=True)
        del study
        gc.collect()


def added(order: Sequence[str], studies: Sequence[dict[str, Any]], one: dict[str, Any]) -> list[dict[str, Any]]:
    """A study among others, in the order of all: in the place of one of its name."""
    kept = [*(study for study in studies if study["name"] != one["name"]), one]
    return sorted(kept, key=lambda study: order.index("das" if study["name"].startswith("das-") else study["name"]))


def report(bench: Bench, about: dict[str, Any], tables: Sequence[str]) -> str:
    """The whole result as one markdown page."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    head = [
        f"# {bench.heading} on {about['device_name']}",
        "",
        f"{about['date']}, {about['clock']}, {about['threads']} thread(s), load average {about['load_average']}; {versions}.",
        "",
        f"`benchmarks/README.md` says how to read this page; `python benchmarks/{bench.name}.py` makes it.",
        "",
    ]
    return "\n".join(head) + "\n" + "\n".join(tables)


def parsed(bench: Bench, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=bench.about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--quick", action="store_true", help="small models and a few rounds; written only where --results says"
    )
    parser.add_argument("--shapes", nargs="+", choices=MODELS, help="which models")
    parser.add_argument(
        "--studies", nargs="+", choices=bench.studies, default=bench.studies, help="which studies (default: all)"
    )
    parser.add_argument("--tools", nargs="*", choices=PEERS, default=PEERS, help="which peers beside the naive loop")
    parser.add_argument("--seconds", type=float, help="wall time to spend on the rounds of each study")
    parser.add_argument("--add", action="store_true", help="keep the other studies that the files hold already")
    parser.add_argument("--results", type=Path, help="folder for the markdown and JSON files")
    return parser.parse_args(arguments)


def main(bench: Bench, arguments: list[str] | None = None) -> None:
    """Check, measure, print, and write the results after each study."""
    options = parsed(bench, arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch sees no CUDA device here; leave the option out to measure on the CPU.")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    import transformers

    transformers.logging.set_verbosity_error()
    seconds = options.seconds if options.seconds is not None else (1.0 if options.quick else 30.0)
    about, models = surroundings(device), {}
    folder = options.results or (None if options.quick else Path(__file__).parent / "results")
    stem = None if folder is None else folder / f"{bench.name}-{device.type}"
    if options.add and stem is not None and stem.with_suffix(".json").is_file():
        models = json.loads(stem.with_suffix(".json").read_text())["models"]
    with torch.no_grad():
        for name in options.shapes or (QUICK if options.quick else USUAL):
            for study in study_model(bench, name, options, device, seconds):
                model = models.setdefault(name, {"title": study["model"], "studies": []})
                model["studies"] = added(bench.studies, model["studies"], study)
                if stem is not None:
                    tables = [table(one["title"], one) for one in models.values()]
                    write_text(stem.with_suffix(".md"), report(bench, about, tables))
                    write_text(stem.with_suffix(".json"), json.dumps({**about, "models": models}, indent=1) + "\n")
            print(table(models[name]["title"], models[name]), flush=True)
