"""The benchmark scripts run and print what they promise; how fast anything is, is not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run_quick(script: str, results: Path, *arguments: str) -> tuple[str, dict]:
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--quick", "--seconds", "0", "--results", str(results)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in results.iterdir()} == {f"{script}-cpu.md", f"{script}-cpu.json"}
    return done.stdout, json.loads((results / f"{script}-cpu.json").read_text())


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
    printed, found = run_quick("hooking", tmp_path, "--tools", "circuitvision", "plain-hooks")
    check(tmp_path, printed, found, {"bare": 1, "bare, again": 1, "circuitvision": 5, "plain hooks": 4})
    assert {aim["aim"].split(":")[0] for aim in found["models"]["vit-small"]["aims"]} >= {"no hooks"}


@pytest.mark.slow
def test_hooking_quick_runs_every_peer(tmp_path: Path) -> None:
    printed, found = run_quick("hooking", tmp_path)
    check(tmp_path, printed, found, {"circuitvision": 5, "plain hooks": 4, "nnsight": 5, "TransformerLens bridge": 5})


def check_sweeps(results: Path, printed: str, found: dict) -> None:
    page = (results / "sweeps-cpu.md").read_text()
    assert found["device_name"] in page
    for model in found["models"].values():
        assert model["title"] in page
        for study in model["studies"]:
            assert 0 < study["unavoidable_forwards"] < 1
            for row in study["rows"]:
                assert row["over_unavoidable"] > 0
                assert row["peak_mib"] > 0
                assert row["faster_low"] <= row["faster"] <= row["faster_high"]
                assert f"{row['faster']:.2f} (" in printed or row["tool"] in ("bare forward", "reference again")


def tools_of(model: dict) -> list[set[str]]:
    return [{row["tool"] for row in study["rows"]} for study in model["studies"]]


@pytest.mark.slow
def test_sweeps_quick_compares_our_sweep_with_the_loop(tmp_path: Path) -> None:
    tools = ("--tools", "circuitvision", "plain-hooks")
    printed, found = run_quick("sweeps", tmp_path, "--shapes", "vit-small", *tools)
    check_sweeps(tmp_path, printed, found)
    (heads, residual) = found["models"]["vit-small"]["studies"]
    assert (heads["edits"], residual["edits"]) == (6 * 4, 6 * 17)
    assert (
        tools_of(found["models"]["vit-small"])
        == [{"bare forward", "reference again", "circuitvision", "loop of plain hooks"}] * 2
    )


@pytest.mark.slow
def test_sweeps_quick_runs_every_peer(tmp_path: Path) -> None:
    printed, found = run_quick("sweeps", tmp_path)
    check_sweeps(tmp_path, printed, found)
    models = found["models"]
    assert list(models) == ["vit-small", "llava-small", "pi0-small"]
    always = {"circuitvision", "loop of plain hooks", "nnsight"}
    for name, peer in (("vit-small", "TransformerLens bridge"), ("llava-small", "TransformerLens bridge")):
        assert all(tools >= always | {peer} for tools in tools_of(models[name]))
    assert all(tools >= always for tools in tools_of(models["pi0-small"]))
    assert "TransformerLens bridge" in models["pi0-small"]["unable"]
    assert "pyvene" in models["llava-small"]["unable"]


@pytest.mark.slow
def test_prepared_quick_measures_a_step_in_every_way(tmp_path: Path) -> None:
    printed, found = run_quick("prepared", tmp_path, "--layers", "11", "--rounds", "2")
    assert list(found["models"]) == ["language", "llava"]
    for model in found["models"].values():
        rows = {row["way"]: row for row in model["rows"]}
        assert {"plain blocks", "prepared", "prepared, last position", "whole model", "recording, once"} < set(rows)
        assert all(row["ratio"] > 0 for row in rows.values())
        # What lies before the start holds no graph, and a suffix less than all positions.
        peaks = {way: row["peak_mib"] for way, row in rows.items()}
        assert peaks["prepared, last position"] < peaks["prepared"] < 1.5 * peaks["plain blocks"]
        assert f"{model['worst']:.3f}" in printed


def test_sweeps_refuses_a_tool_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sweep_shapes
    import sweep_tools

    with torch.no_grad():
        shape = sweep_shapes.build(sweep_shapes.small_vit, torch.device("cpu"))
        edits = shape.studies[0].edits[:3]
        loop = sweep_tools.plain_hooks(shape)
        clean = shape.metric(shape.module(**shape.runs[0]).logits).expand(3, 1)
        sweep_tools.check({"loop": loop}, loop(edits), clean, edits, exact=True)
        with pytest.raises(RuntimeError, match="lazy: off by"):
            sweep_tools.check({"lazy": lambda edits: clean}, loop(edits), clean, edits, exact=True)
        with pytest.raises(RuntimeError, match="change nothing"):
            sweep_tools.check({}, clean, clean, edits, exact=True)


def test_counted_operations_are_those_pytorch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import operations
    import sweep_shapes

    def tower(layers: int, width: int, mlp: int, length: int) -> int:
        seen, read = sweep_shapes.seen(length), sweep_shapes.only(length, range(length))
        return operations.everything(operations.Blocks(layers, width, 4, 4, width // 4, mlp, False, seen, read))

    patches = 16 * 2 * (3 * 8 * 8) * 64
    around = {
        "vit-small": patches + 2 * 64 * 2,
        "llava-small": patches + tower(2, 64, 256, 17) + 16 * 2 * (2 * 64 * 64) + 25 * 2 * 64 * 1000,
        "pi0-small": 2 * (patches + tower(2, 64, 128, 16) + 16 * 2 * 64 * 64)
        + 2 * 32 * 32 * (1 + 4 * 5),  # state; action in, time (two in, one out), action out
    }
    with torch.no_grad():
        for name, rest in around.items():
            shape = sweep_shapes.build(sweep_shapes.SHAPES[name], torch.device("cpu"))
            network = shape.network
            count = rest + operations.everything(network.swept)
            if network.reader is not None:
                count += operations.everything(network.reader, len(network.swept.read))
            assert count == operations.of_forward(shape.twin("eager"), shape.runs[0])


def test_unavoidable_operations_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import operations
    import sweep_shapes

    with torch.no_grad():
        vit, llava, pi0 = (
            sweep_shapes.build(sweep_shapes.SHAPES[name], torch.device("cpu")).network for name in sweep_shapes.QUICK
        )
    square, mlp = 2 * 64 * 64, 2 * 2 * 64 * 256
    # A head of a ViT's last block reaches the output at the class token only: its output projection, its feed-forward, the classifier.
    assert operations.unavoidable(vit, 5, 0, 17, True) == square + mlp + vit.readout
    # One patch that enters the last block: its keys and values, the class token's row of attention, and the same again.
    one_row = 4 * 64 * 17
    assert operations.unavoidable(vit, 5, 9, 10, False) == 2 * square + one_row + square + mlp + vit.readout
    # The block before it changes every position; the last block needs all their keys and values, and one query.
    before = 3 * square + 17 * (one_row + square + mlp)
    last = 17 * 2 * square + square + one_row + square + mlp
    assert operations.unavoidable(vit, 4, 9, 10, False) == before + last + vit.readout
    # Text at the end of a causal prompt changes itself only, and sees every position.
    one_block = 4 * square + 4 * 64 * 25 + 2 * 3 * 64 * 172
    assert operations.unavoidable(llava, 2, 24, 25, False) == 2 * one_block + llava.readout
    # What enters PI0's last prefix block is read as keys and values by the four actions of the expert's last block; the state is read by nobody.
    keys, queries, expert_mlp = 2 * 2 * 64 * 16, 2 * 32 * 64, 2 * 3 * 32 * 128
    actions = 4 * (4 * 64 * (40 + 5) + queries + expert_mlp + pi0.readout)
    assert operations.unavoidable(pi0, 3, 32, 40, False) == 8 * keys + actions


def test_lens_quick_holds_less_than_all_logits(tmp_path: Path) -> None:
    printed, found = run_quick("lens", tmp_path)
    peaks = {name: reader["peak_mib"] for name, reader in found["readers"].items()}
    assert peaks["circuitvision, two targets with ranks"] < peaks["all logits"]
    assert all(name in printed for name in peaks)


@pytest.mark.slow
def test_memory_of_sweeps_quick_prints_a_row_for_every_number_of_pairs(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "sweep_memory.py"), "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "sweep_memory-cpu.json").read_text())["rows"]
    assert [(row["way"], row["pairs"]) for row in rows] == [
        (way, count) for count in (4, 8, 16) for way in ("in batches", "all at once")
    ]
    assert done.stdout.strip() in (tmp_path / "sweep_memory-cpu.md").read_text()


@pytest.mark.slow
def test_causal_quick_measures_every_study_beside_the_loop(tmp_path: Path) -> None:
    printed, found = run_quick("causal", tmp_path, "--tools", "transformer-lens")
    assert list(found["models"]) == ["vit-small", "llava-small"]
    names = ["attribution", "attribution-star", "paths", "das-1", None, "trace"]
    for model in found["models"].values():
        assert len(model["studies"]) == len(names)
        assert all(name in (None, study["name"]) for name, study in zip(names, model["studies"], strict=True))
        for study in model["studies"]:
            rows = {row["way"]: row for row in study["rows"]}
            assert {study["reference"], study["loop"], "circuitvision", "reference again"} <= set(rows)
            assert study["unavoidable"] > 0
            for row in rows.values():
                assert 0 < row["over_unavoidable_low"] <= row["over_unavoidable"] <= row["over_unavoidable_high"]
                assert 0 < row["share"] <= 1
                assert row["peak_mib"] > 0
            # What is timed on some of its cells is told as the time of all of them.
            assert rows[study["loop"]]["faster"] == pytest.approx(1.0)
        assert model["title"] in printed
    page = (tmp_path / "causal-cpu.md").read_text()
    assert found["device_name"] in page
    assert all(study["title"] in page for model in found["models"].values() for study in model["studies"])


def test_causal_refuses_a_tool_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import causal_tools

    right = torch.tensor([1.0, -0.01, 1e-7])
    causal_tools.check("study", "tool", right + torch.tensor([5e-4, -5e-4, 1e-5]), right, 1.0)
    with pytest.raises(RuntimeError, match="study, lazy"):
        causal_tools.check("study", "lazy", torch.zeros(3), right, 1.0)
    with pytest.raises(RuntimeError, match="study, close"):
        causal_tools.check("study", "close", right + torch.tensor([0.0, 2e-3, 0.0]), right, 1.0)
    with pytest.raises(RuntimeError, match="nothing has an effect"):
        causal_tools.check("study", "tool", torch.zeros(3), torch.zeros(3), 1.0)


def test_causal_extrapolates_and_compares_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("PIP_NO_INDEX", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        # The scripts set these for themselves when they are imported.
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    import study_tables
    from causal_tools import OURS, Arm, CausalStudy
    from measuring import AGAIN

    arms = {"bare": Arm(print), OURS: Arm(print), "loop": Arm(print, share=0.25)}
    study = CausalStudy("s", "s", "bare", arms, "loop", unavoidable=3.0, aim=1.2, faster=2.0)
    # The second round is twice as slow for all; the third disturbs ours alone.
    seconds = {"bare": [1, 2, 1], AGAIN: [1, 2, 1], OURS: [3.3, 6.6, 6], "loop": [2, 4, 2]}
    samples = {name: [(one, one) for one in taken] for name, taken in seconds.items()}
    rows = [study_tables._row(study, name, samples, 2**20) for name in samples]
    ours = next(row for row in rows if row["way"] == OURS)
    assert ours["over_unavoidable"] == pytest.approx(1.1)
    assert ours["over_unavoidable_minima"] == pytest.approx(1.1)
    assert ours["faster"] == pytest.approx(8 / 3.3)
    assert ours["peak_mib"] == 1.0
    assert [check["verdict"] for check in study_tables.aims(study, rows)] == ["met", "met"]
    slower = CausalStudy("s", "s", "bare", arms, "loop", unavoidable=2.0, aim=1.2, faster=5.0)
    rows = [study_tables._row(slower, name, samples, 2**20) for name in samples]
    assert [check["verdict"] for check in study_tables.aims(slower, rows)][1] == "missed"
