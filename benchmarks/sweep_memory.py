"""How much memory a sweep over pairs takes as the pairs become more: it must stay what one batch takes.

    python benchmarks/sweep_memory.py               # 50, 200 and 800 pairs of a small ViT on one CPU thread, about two minutes
    python benchmarks/sweep_memory.py --quick       # 4, 8 and 16 pairs

Every row is a process of its own. Its number is the most memory that process ever held (``resource.getrusage``), less what it held when model and
pairs were there and one pair had been swept; "all at once" sweeps over the same examples as inputs in memory, which grows with them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

WAYS = ("in batches", "all at once")


def measure(way: str, count: int, batch: int) -> dict[str, Any]:
    """One sweep in this process: peak memory above the start, and seconds."""
    import time

    import torch
    from transformers import ViTConfig, ViTForImageClassification

    import circuitvision as cv

    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = ViTConfig(image_size=16, patch_size=2, num_labels=10, **sizes)
    model = cv.HookedModel(ViTForImageClassification(config).eval())
    clean, corrupt = (torch.randn(count, 3, 16, 16) for _ in range(2))
    pairs = cv.data.Pairs(inputs={"pixel_values": clean}, corrupt_inputs={"pixel_values": corrupt}, answers=1, foils=2)
    sites = [f"vision.blocks.{layer}.attn.hook_z" for layer in (2, 3)]

    def sweep(some: cv.data.Pairs, way: str) -> None:
        source: Any = some.clean
        data: Any = some.corrupt
        metric: Any = "logit_diff"
        if way == "all at once":
            inputs = {"pixel_values": clean[: len(some)]}
            _, source = model.run_with_cache(inputs, sites)
            data, metric = {"pixel_values": corrupt[: len(some)]}, cv.metrics.logit_diff(1, 2)
        groups = [cv.edits.replace(site, source, heads=head) for site in sites for head in range(2)]
        settings = {"example_batch": batch} if way == "in batches" else {}
        model.sweep(data, groups, metric, progress=False, **settings)

    with torch.no_grad():
        sweep(pairs[:1], way)
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        sweep(pairs, way)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    unit = 1 if sys.platform == "darwin" else 1024
    return {"way": way, "pairs": count, "mib": peak * unit / 2**20, "seconds": time.perf_counter() - started}


def table(rows: list[dict[str, Any]], batch: int) -> str:
    """The rows as markdown: one line per number of pairs."""
    lines = [f"| pairs | in batches of {batch}, MiB | all at once, MiB |", "| ---: | ---: | ---: |"]
    for count in sorted({row["pairs"] for row in rows}):
        found = {row["way"]: row["mib"] for row in rows if row["pairs"] == count}
        lines.append(f"| {count} | {found[WAYS[0]]:.0f} | {found[WAYS[1]]:.0f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure every row in a process of its own, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[50, 200, 800], help="numbers of pairs")
    parser.add_argument("--batch", type=int, default=50, help="how many examples run together")
    parser.add_argument("--quick", action="store_true", help="4, 8 and 16 pairs in batches of 4")
    parser.add_argument("--results", type=Path, help="folder for the markdown and JSON files")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "PAIRS", "BATCH"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(measure(given.one[0], int(given.one[1]), int(given.one[2]))))
        return
    counts, batch = ([4, 8, 16], 4) if given.quick else (given.counts, given.batch)
    rows = []
    for count in counts:
        for way in WAYS:
            command = [sys.executable, __file__, "--one", way, str(count), str(batch)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    page = table(rows, batch)
    print(page)
    from circuitvision.files import write_text

    folder = given.results or Path(__file__).parent / "results"
    write_text(
        folder / "sweep_memory-cpu.md", f"# Memory of a sweep over pairs\n\n{__doc__.split(chr(10))[0]}\n\n{page}\n"
    )
    write_text(folder / "sweep_memory-cpu.json", json.dumps({"batch": batch, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
