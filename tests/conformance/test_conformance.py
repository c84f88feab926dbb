"""Every promise for every model of the zoo and every synthetic family.

The whole product of precisions, grad modes, first runs and batches is marked slow.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.conformance.cases import EVERY
from tests.conformance.promises import EXACT, PROMISES, applies, hold, setting_for
from tests.conformance.setting import HALF, Setting, product
from tests.zoo import CASES

CELLS = [
    pytest.param(setting_for(promise, case), promise, id=f"{case}-{promise.replace(' ', '_')}")
    for case in EVERY.values()
    for promise in PROMISES
    if applies(promise, case)
]
FULL = [
    pytest.param(setting, promise, id=f"{setting}-{promise.replace(' ', '_')}")
    for case in EVERY.values()
    for setting in product(case)
    for promise in PROMISES
    if applies(promise, case) and not (promise in EXACT and (setting.dtype == torch.float32 or not setting.grad))
]
CHEAP = ("2 equations", "2 stream sum", "4 grad mode", "read-out")
OTHER = [
    pytest.param(Setting(case, torch.float64, True, False, 1), promise, id=f"{case}-{promise.replace(' ', '_')}")
    for case in EVERY.values()
    for promise in CHEAP
]
QUICK = (
    "2 equations",
    "2 stream sum",
    "2 resid_mid",
    "4 grad mode",
    "5 fires once",
    "bare output",
    "weights",
    "read-out",
)
FIRST = {case.family: case for case in reversed(CASES.values())}
HALVES = [
    pytest.param(
        Setting(case, dtype, batch=2),
        promise,
        id=f"{case}-{str(dtype).removeprefix('torch.')}-{promise.replace(' ', '_')}",
        marks=[] if promise in QUICK else pytest.mark.slow,
    )
    for case in FIRST.values()
    for dtype in HALF
    for promise in PROMISES
    # Finite differences need float64; in bfloat16, edits too small for its eight bits are lost on the way to the output.
    if applies(promise, case) and promise not in EXACT and (promise, dtype) != ("1 edits reach", torch.bfloat16)
]


def run(setting: Setting, promise: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hold(promise, setting)


@pytest.mark.parametrize(("setting", "promise"), CELLS)
def test_promise(setting: Setting, promise: str) -> None:
    run(setting, promise)


@pytest.mark.parametrize(("setting", "promise"), OTHER)
def test_promise_in_float64_with_grad_in_a_first_run_of_one(setting: Setting, promise: str) -> None:
    run(setting, promise)


@pytest.mark.parametrize(("setting", "promise"), HALVES)
def test_promise_in_half_precision(setting: Setting, promise: str) -> None:
    """A model of each shipped family. What is promised bit by bit is checked bit by bit; the rest to a few roundings (``setting.ROUNDINGS``)."""
    run(setting, promise)


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "promise"), FULL)
def test_promise_in_every_setting(setting: Setting, promise: str) -> None:
    run(setting, promise)
