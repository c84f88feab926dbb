"""The benchmark scripts run and print what they promise; how fast anything is, is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "hooking.py"


def run_quick(results: Path, *tools: str) -> tuple[str, dict]:
    command = [sys.executable, str(SCRIPT), "--quick", "--seconds", "0", "--results", str(results), "--tools", *tools]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in results.iterdir()} == {"hooking-cpu.md", "hooking-cpu.json"}
    return done.stdout, json.loads((results / "hooking-cpu.json").read_text())


def check(results: Path, printed: str, found: dict, tools: dict[str, int]) -> None:
    rows = found["models"]["vit-small"]["rows"]
    for row in rows:
        assert row["ratio"] > 0
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert f"{row['ratio']:.3f} (" in printed
    page = (results / "hooking-cpu.md").read_text()
    assert found["device_name"] in page
    assert f"torch {found['versions']['torch']}" in page
    assert {tool: sum(row["tool"] == tool for row in rows) for tool in tools} == tools
    # Saving more holds more memory, and 36 residuals of 17 positions of width 64 in float32 are 0.15 MiB.
    peaks = {row["task"]: row["peak_mib"] for row in rows if row["tool"] == "circuitvision"}
    assert peaks["forward"] < peaks["outputs"] < peaks["residuals"]
    assert peaks["residuals"] - peaks["forward"] < 36 * 17 * 64 * 4 / 2**20


def test_hooking_quick_prints_ratios_for_our_library_and_plain_hooks(tmp_path: Path) -> None:
    printed, found = run_quick(tmp_path, "circuitvision", "plain-hooks")
    check(tmp_path, printed, found, {"bare": 1, "bare, again": 1, "circuitvision": 5, "plain hooks": 4})
    assert {aim["aim"].split(":")[0] for aim in found["models"]["vit-small"]["aims"]} >= {"no hooks"}


@pytest.mark.slow
def test_hooking_quick_runs_every_peer(tmp_path: Path) -> None:
    printed, found = run_quick(tmp_path, "circuitvision", "plain-hooks", "nnsight", "transformer-lens")
    check(tmp_path, printed, found, {"circuitvision": 5, "plain hooks": 4, "nnsight": 5, "TransformerLens bridge": 5})
