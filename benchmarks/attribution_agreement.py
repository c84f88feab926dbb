"""How well attribution patching agrees with activation patching, on small trained models: ranks, the strongest cells, and what is missed.

Every cell is patched exactly and estimated by AtP, by AtP with the QK fix (which differs at queries and keys alone), by AtP* (with GradDrop) and by
integrated gradients of the inputs. Cells are layer × head or layer × position of one site in all towers; a cell's score is the mean size of its
effect over pairs. The models are organisms of the package and, with ``--real``, a ViT that was trained by others on handwritten digits.

    python benchmarks/attribution_agreement.py --real FOLDER     # minutes on one CPU core; FOLDER holds vit_mnist/ and digits_256.npz
    python benchmarks/attribution_agreement.py --quick           # two sites of one organism, seconds
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import surroundings

import circuitvision as cv
from circuitvision.patching import activation_patch, agreement, attribution_patch

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, dict[str, Any]] = {
    "AtP": {"method": "atp"},
    "AtP + QK fix": {"method": "atp*", "grad_drop": False},
    "AtP*": {"method": "atp*"},
    "IG": {"method": "ig", "nodes": 8},
}
SITES = ("attn.hook_z", "attn.hook_q", "attn.hook_k", "attn.hook_v", "hook_mlp_out", "hook_resid_mid")
ORGANISMS = ("shapes-vit", "shapes-llava", "reach-pi0", "scenes-llava")
TOP = 10


def digits(folder: Path, count: int) -> tuple[cv.HookedModel, cv.data.Pairs]:
    """The digits ViT, and pairs of two different digits that it names right."""
    model = cv.HookedModel.from_pretrained(folder / "vit_mnist")
    held = np.load(folder / "digits_256.npz")
    pictures = torch.from_numpy(held["images"]).reshape(-1, 1, 28, 28).float()
    pixels = (pictures / 255 - 0.1307) / 0.3081
    labels = held["labels"].tolist()
    order = np.random.default_rng(0).permutation(len(labels)).tolist()
    chosen = [(a, b) for a, b in zip(order[::2], order[1::2], strict=False) if labels[a] != labels[b]]
    first, second = (torch.tensor(side) for side in zip(*chosen, strict=True))
    pairs = cv.data.Pairs(
        inputs={"pixel_values": pixels[first]},
        corrupt_inputs={"pixel_values": pixels[second]},
        answers=[labels[a] for a, _ in chosen],
        foils=[labels[b] for _, b in chosen],
    )
    return model, pairs.answered(model)[:count]


def organism(name: str, count: int) -> tuple[cv.HookedModel, cv.data.Pairs]:
    """An organism, and pairs of its own task that it answers (of an action model all)."""
    model = cv.organisms.load(name)
    if name == "reach-pi0":
        return model, cv.data.reach_pairs(count, seed=0)
    return model, cv.organisms.pairs(name, 3 * count).answered(model)[:count]


def metric_of(model: cv.HookedModel) -> Any:
    """The first coordinate of an action; elsewhere answer minus foil."""
    return cv.metrics.action_dim(0) if "action" in model.towers else "logit_diff"


def measure(model: cv.HookedModel, pairs: Any, sites: Any, bar: str) -> list[dict[str, Any]]:
    """One row per site, kind of cell and method."""
    rows = []
    metric = metric_of(model)
    for site in sites:
        for axis in ("head", "position") if site.startswith("attn.") else ("position",):
            given = {"sites": f"*.blocks.*.{site}", "axes": ("layer", axis), "progress": False}
            began = time.process_time()
            exact = activation_patch(model, pairs, metric, **given)
            seconds = {"exact": time.process_time() - began}
            for name, options in METHODS.items():
                if name == "AtP + QK fix" and not site.endswith(("_q", "_k")):
                    continue
                began = time.process_time()
                found = attribution_patch(model, pairs, metric, **given, **options)
                seconds[name] = time.process_time() - began
                cells = agreement(found, exact, 1).cells
                told = agreement(found, exact, min(TOP, max(1, cells // 4)))
                rows.append(
                    {"site": site, "cell": f"layer × {axis}", "method": name, "cells": told.cells, "k": told.k}
                    | {"spearman": told.spearman, "overlap": told.overlap, "false_negatives": told.false_negatives}
                    | {"faster": seconds["exact"] / max(seconds[name], 1e-9)}
                )
            print(f"{bar}: {site} by layer × {axis}", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one model as markdown."""
    lines = [
        "| site | cell | cells | k | method | Spearman | top-k shared | of the top k not in the first 2 k | × faster than patching |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['site']} | {row['cell']} | {row['cells']} | {row['k']} | {row['method']} | {row['spearman']:.2f} | {row['overlap']:.0%} | "
        f"{row['false_negatives']} | {row['faster']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def summary(models: dict[str, Any]) -> str:
    """The mean of every method over a model's sites, of queries and keys apart from the rest."""
    lines = [
        "| model | sites | method | Spearman | top-k shared | missed, of all top k |",
        "|---|---|---|---|---|---|",
    ]
    for name, model in models.items():
        for label, of_scores in (("queries and keys", True), ("the others", False)):
            for method in METHODS:
                rows = [r for r in model["rows"] if r["method"] == method and r["site"].endswith(("_q", "_k")) == of_scores]  # fmt: skip
                if rows:
                    means = [sum(row[key] for row in rows) / len(rows) for key in ("spearman", "overlap")]
                    missed, all_top = sum(row["false_negatives"] for row in rows), sum(row["k"] for row in rows)
                    lines.append(
                        f"| {name} | {label} | {method} | {means[0]:.2f} | {means[1]:.0%} | {missed} of {all_top} |"
                    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--models", nargs="*", default=list(ORGANISMS))
    parser.add_argument("--real", type=Path, help="a folder with vit_mnist/ and digits_256.npz")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    cv.set_verbosity("quiet")
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    count, sites = (4, SITES[:2]) if arguments.quick else (arguments.pairs, SITES)
    names = arguments.models[:1] if arguments.quick else arguments.models
    stem = arguments.results / "attribution_agreement-cpu"
    arguments.results.mkdir(exist_ok=True)
    models: dict[str, Any] = {}
    for name in [*(["digits ViT"] if arguments.real is not None else []), *names]:
        model, pairs = digits(arguments.real, count) if name == "digits ViT" else organism(name, count)
        models[name] = {"pairs": len(pairs), "rows": measure(model, pairs, sites, name)}
        # What is finished is written, whatever becomes of the rest.
        stem.with_suffix(".md").write_text(page(models))
        held = {"k": TOP, "methods": METHODS, "models": models, **surroundings(torch.device("cpu"))}
        stem.with_suffix(".json").write_text(json.dumps(held, indent=1) + "\n")
    print(page(models))


def page(models: dict[str, Any]) -> str:
    """All tables of the models as markdown."""
    text = (
        "# Attribution patching beside activation patching\n\nThe score of a cell is the mean size of its effect over pairs "
        "(patching clean values into the corrupt run; `logit_diff` of answer and foil, of reach-pi0 the first coordinate of the action). Ranks "
        f"are those of cells that have an effect. k is {TOP}, or a quarter of the cells where there are fewer than {4 * TOP}. IG has 8 nodes. "
        f"Times are of process CPU, on {surroundings(torch.device('cpu'))['device_name']}.\n\n{summary(models)}\n"
    )
    return text + "".join(
        f"\n## {name}, {model['pairs']} pairs\n\n{table(model['rows'])}\n" for name, model in models.items()
    )


if __name__ == "__main__":
    main()
