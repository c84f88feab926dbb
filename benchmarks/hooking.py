"""What reading and editing a model costs: the bare forward pass against circuitvision, plain hooks, nnsight and TransformerLens's bridge.

    python benchmarks/hooking.py                     # everything, a few minutes on one CPU thread
    python benchmarks/hooking.py --quick             # the smallest model, a few rounds
    python benchmarks/hooking.py --device cuda

Prints, for each model, one row per tool and task: the ratio to the bare forward of the same round (median and quartiles), the milliseconds a run
costs on top, and the peak memory of one run beyond weights and inputs. The row "bare, again" is the noise of the measurement. The table and the
numbers behind it are written to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Nothing may be installed or downloaded while the peers load, and one thread makes process time mean something.
os.environ.update(PIP_NO_INDEX="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import torch
from hooking_tools import TASKS, TOOLS, Variant, variants_of
from measuring import Timing, interleaved, peak_bytes, surroundings
from shapes import SHAPES, Shape

from circuitvision.files import write_text

BARE = ("bare", "forward")


def measure(
    shape: Shape, tools: list[str], device: torch.device, seconds: float, min_rounds: int
) -> list[dict[str, Any]]:
    """One row per variant of one model, as plain values."""
    variants = variants_of(shape, tools)
    runs = {f"{v.tool}|{v.task}": v.run for v in variants if v.run is not None}
    reference = "|".join(BARE)
    timings = interleaved(runs, reference, device, seconds, min_rounds)
    peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
    rows = [_row(variant, timings, peaks) for variant in variants]
    noise = {
        "tool": "bare, again",
        "task": "forward",
        "note": "",
        "peak_mib": rows[0]["peak_mib"],
        **asdict(timings["reference again"]),
    }
    return [rows[0], noise, *rows[1:]]


def _row(variant: Variant, timings: dict[str, Timing], peaks: dict[str, int]) -> dict[str, Any]:
    name = f"{variant.tool}|{variant.task}"
    row = {"tool": variant.tool, "task": variant.task, "note": variant.note}
    if variant.run is None:
        return row
    return {**row, "peak_mib": peaks[name] / 2**20, **asdict(timings[name])}


def aims(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What this library promises itself about its own cost, beside what was measured.

    The noise is the wider of the distance of "bare, again" from one and half its quartile range; an aim that fails by less than it is undecided.
    """
    found = {(row["tool"], row["task"]): row for row in rows if "ratio" in row}
    again = found["bare, again", "forward"]
    noise = max(abs(again["ratio"] - 1), (again["ratio_high"] - again["ratio_low"]) / 2)
    noise_ms = noise * found[BARE]["ms"]
    checks = []

    def check(what: str, measured: float, limit: float, tolerance: float, unit: str) -> None:
        verdict = (
            "met" if measured <= limit else "undecided: inside the noise" if measured <= limit + tolerance else "missed"
        )
        checks.append(
            {"aim": what, "measured": measured, "limit": limit, "noise": tolerance, "unit": unit, "verdict": verdict}
        )

    if ("circuitvision", "forward") not in found:
        return []
    check("no hooks: ratio 1.00", found["circuitvision", "forward"]["ratio"], 1.0, noise, "")
    if not name.endswith("small"):
        for task in ("outputs", "residuals"):
            check(f"{TASKS[task]}: ratio 1.02", found["circuitvision", task]["ratio"], 1.02, noise, "")
        return checks
    for task in ("outputs", "residuals", "patch", "patterns"):
        if ("plain hooks", task) in found:
            extra = found["circuitvision", task]["added_ms"] - found["plain hooks", task]["added_ms"]
            check(f"{TASKS[task]}: plain hooks + 0.10 ms", extra, 0.1, noise_ms, " ms")
    return checks


def table(shape: Shape, rows: list[dict[str, Any]], checks: list[dict[str, Any]]) -> str:
    """The rows of one model, and how its aims fared, as markdown."""
    bare = rows[0]
    lines = [
        f"### {shape.title}",
        "",
        f"Bare forward {bare['ms']:.2f} ms, {bare['rounds']} rounds.",
        "",
        "| task | tool | ratio to bare (quartiles) | added ms | wall ratio | peak MiB |",
        "|---|---|---|---|---|---|",
    ]
    order = {task: position for position, task in enumerate(TASKS)}
    for row in sorted(rows, key=lambda row: order[row["task"]]):
        start = f"| {TASKS[row['task']]} | {row['tool']}"
        if "ratio" not in row:
            lines.append(f"{start} | cannot: {row['note']} | | | |")
            continue
        ratio = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"
        note = f", {row['note']}" if row["note"] else ""
        lines.append(
            f"{start}{note} | {ratio} | {row['added_ms']:+.3f} | {row['wall_ratio']:.3f} | {row['peak_mib']:.2f} |"
        )
    if checks:
        lines += ["", "| aim | measured | noise | verdict |", "|---|---|---|---|"]
        lines += [
            f"| {c['aim']} | {c['measured']:+.3f}{c['unit']} | {c['noise']:.3f}{c['unit']} | {c['verdict']} |"
            for c in checks
        ]
    return "\n".join(lines) + "\n"


def report(about: dict[str, Any], tables: list[str]) -> str:
    """The whole result as one markdown page."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    head = [
        f"# The cost of hooking on {about['device_name']}",
        "",
        f"{about['date']}, {about['clock']}, {about['threads']} thread(s), load average {about['load_average']}; {versions}.",
        "",
        'Ratios are medians over interleaved rounds, quartiles in brackets; "bare, again" is the noise. Peak memory is what tensors of one run',
        "hold at once, beyond weights and inputs. `python benchmarks/hooking.py` makes this page.",
        "",
    ]
    return "\n".join(head) + "\n" + "\n".join(tables)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--quick", action="store_true", help="the smallest model and a few rounds; written only where --results says"
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, help="which models (default: all; with --quick the smallest)"
    )
    parser.add_argument(
        "--tools", nargs="+", choices=TOOLS, default=list(TOOLS), help="which tools beside the bare model"
    )
    parser.add_argument("--seconds", type=float, help="wall time to spend on the rounds of each model")
    parser.add_argument("--results", type=Path, help="folder for the markdown and JSON files")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch sees no CUDA device here; leave the option out to measure on the CPU.")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    import transformers

    transformers.logging.set_verbosity_error()
    seconds = options.seconds if options.seconds is not None else (1.0 if options.quick else 30.0)
    min_rounds = 3
    names = options.shapes or (["vit-small"] if options.quick else list(SHAPES))
    about, tables, models = surroundings(device), [], {}
    with torch.no_grad():
        for name in names:
            shape = SHAPES[name]()
            shape.module.to(device)
            shape.inputs.update({key: value.to(device) for key, value in shape.inputs.items()})
            rows = measure(shape, options.tools, device, seconds, min_rounds)
            checks = aims(name, rows)
            models[name] = {"title": shape.title, "rows": rows, "aims": checks}
            tables.append(table(shape, rows, checks))
            print(tables[-1], flush=True)
    folder = options.results or (None if options.quick else Path(__file__).parent / "results")
    if folder is not None:
        stem = f"hooking-{device.type}"
        write_text(folder / f"{stem}.md", report(about, tables))
        write_text(folder / f"{stem}.json", json.dumps({**about, "models": models}, indent=1) + "\n")
        print(f"Written to {folder / stem}.md and .json")


if __name__ == "__main__":
    # A closed pipe (… | head) is no error of the benchmark.
    with contextlib.suppress(BrokenPipeError):
        main()
