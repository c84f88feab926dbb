"""What causal methods cost: attribution and path patching, a step of DAS, a causal trace, beside naive loops, peers and what is unavoidable.

    python benchmarks/causal.py                     # ViT-B/16 and a LLaVA of 600 positions, about half an hour on one free CPU core
    python benchmarks/causal.py --quick             # two small models, a few rounds
    python benchmarks/causal.py --device cuda
    python benchmarks/causal.py --shapes vit-b16 --studies das trace --tools pyvene --seconds 60

Prints, for each model, one row per study and tool: what it runs, seconds for the whole study, time over the time of what cannot be avoided, how many
times faster than the naive loop, and peak memory. Loops and peers that run the model once per cell are timed on a few random cells in every round and
extrapolated. All tools run in turn in every round, so that drift cancels. Tables and numbers go to ``benchmarks/results``.
"""

from __future__ import annotations

import contextlib
import os

os.environ.update(PIP_NO_INDEX="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

from causal_studies import STUDIES, studies_of
from study_tables import Bench, main

BENCH = Bench(str(__doc__), "causal", "The cost of causal methods", STUDIES, studies_of)

if __name__ == "__main__":
    # A closed pipe (… | head) is no error of the benchmark.
    with contextlib.suppress(BrokenPipeError):
        main(BENCH)
