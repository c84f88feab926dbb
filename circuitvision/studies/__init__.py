"""Studies of methods themselves, on networks whose answer is known."""

from __future__ import annotations

from circuitvision.studies.benchmark import CircuitBenchmark, circuit_benchmark

__all__ = ["CircuitBenchmark", "circuit_benchmark"]
