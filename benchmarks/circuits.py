"""What scores of edges cost: EAP and EAP-IG of every edge, and exact patching of single edges, beside a copy of the stream per head and a loop.

    python benchmarks/circuits.py                   # ViT-B/16 and a LLaVA of 600 positions, about half an hour on one free CPU core
    python benchmarks/circuits.py --quick           # two small models, a few rounds
    python benchmarks/circuits.py --device cuda --shapes vit-b16 llava-7b

Prints, for each model, one row per study and way: what it runs, seconds for the whole study, time over the time of what cannot be avoided, how many
times faster than the reference, and peak memory. Every way is checked against another before it is timed. Tables and numbers go to
``benchmarks/results``.
"""

from __future__ import annotations

import contextlib
import os

os.environ.update(PIP_NO_INDEX="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

from circuit_studies import STUDIES, studies_of
from study_tables import Bench, main

BENCH = Bench(str(__doc__), "circuits", "The cost of edges", STUDIES, studies_of)

if __name__ == "__main__":
    # A closed pipe (… | head) is no error of the benchmark.
    with contextlib.suppress(BrokenPipeError):
        main(BENCH)
