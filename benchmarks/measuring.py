"""Timing and memory that stay right on a busy machine.

Time: all variants run in turn, in a new random order each round, and each is divided by the reference *of the same round*, so that slow drift
(clock, temperature, neighbours) cancels. On a CPU the time is that of the process, which other processes do not inflate; on CUDA it is wall
time between synchronisations. The median over rounds is reported, with its quartiles. The reference is timed twice per round; the ratio of the
two is the noise of the measurement itself.

Memory: the largest number of bytes that tensors held at once during one run beyond what was there before it (weights and inputs are not
counted, what the run returns is). On a CPU PyTorch's profiler reports every allocation; on CUDA the allocator keeps the number.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """One variant: median and quartiles of its ratio to the reference, and what it adds to a run, in milliseconds."""

    ratio: float
    ratio_low: float
    ratio_high: float
    added_ms: float
    ms: float
    wall_ratio: float
    rounds: int


def _sample(run: Run, repeats: int, device: torch.device) -> tuple[float, float]:
    """Seconds per run: process time (wall time on CUDA), and wall time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return (wall if device.type == "cuda" else cpu) / repeats, wall / repeats


Samples = dict[str, list[tuple[float, float]]]
"""Seconds on the clock and of wall time, per variant and round."""

AGAIN = "reference again"


def samples_in_rounds(
    runs: Mapping[str, Run], reference: str, device: torch.device, seconds: float, min_rounds: int, seed: int = 0
) -> Samples:
    """Seconds of every run in rounds until ``seconds`` of wall time are spent (at least ``min_rounds``); ``AGAIN`` is the reference once more.

    Every run must have run before, so that nothing is timed that only the first run does.
    """
    runs = {**runs, AGAIN: runs[reference]}
    single, _ = _sample(runs[reference], 1, device)
    repeats = max(1, round(0.02 / single))
    order = list(runs)
    shuffle = random.Random(seed).shuffle
    samples: Samples = {name: [] for name in runs}
    # What lives as long as the benchmark is not searched for garbage again and again; what the runs leave behind is.
    gc.collect()
    gc.freeze()
    started = time.perf_counter()
    while len(samples[reference]) < min_rounds or time.perf_counter() - started < seconds:
        shuffle(order)
        for name in order:
            samples[name].append(_sample(runs[name], repeats, device))
    gc.unfreeze()
    return samples


def interleaved(
    runs: Mapping[str, Run], reference: str, device: torch.device, seconds: float, min_rounds: int
) -> dict[str, Timing]:
    """Time every run in rounds, as :func:`samples_in_rounds` does; ``AGAIN`` is the noise."""
    samples = samples_in_rounds(runs, reference, device, seconds, min_rounds)
    return {name: _timing(values, samples[reference]) for name, values in samples.items()}


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def _timing(values: Sequence[tuple[float, float]], reference: Sequence[tuple[float, float]]) -> Timing:
    pairs = list(zip(values, reference, strict=True))
    ratios = [mine[0] / theirs[0] for mine, theirs in pairs]
    middle, low, high = spread(ratios)
    return Timing(
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
        added_ms=1e3 * statistics.median(mine[0] - theirs[0] for mine, theirs in pairs),
        ms=1e3 * statistics.median(mine[0] for mine in values),
        wall_ratio=statistics.median(mine[1] / theirs[1] for mine, theirs in pairs),
        rounds=len(pairs),
    )


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Nothing on standard error, from C++ either: PyTorch's profiler announces every start and stop there."""
    kept = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def peak_bytes(run: Run, device: torch.device) -> int:
    """Most bytes held at once by tensors that one run made, its results included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak


def device_name(device: torch.device) -> str:
    """The processor or GPU, as the system names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def surroundings(device: torch.device) -> dict[str, Any]:
    """What a number depends on besides the code: device, threads, load and versions."""
    import importlib.metadata

    packages = ("circuitvision", "torch", "transformers", "transformer_lens", "nnsight", "pyvene")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "clock": "wall time" if device.type == "cuda" else "process CPU time",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
    }
