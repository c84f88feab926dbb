"""Every promise for every model of the zoo; the whole product of precisions, grad modes, first runs and batches is marked slow."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.conformance.promises import EXACT, PROMISES, applies, setting_for
from tests.conformance.setting import Setting, product
from tests.zoo import CASES

CELLS = [
    pytest.param(setting_for(promise, case), promise, id=f"{case}-{promise.replace(' ', '_')}")
    for case in CASES.values()
    for promise in PROMISES
    if applies(promise, case)
]
FULL = [
    pytest.param(setting, promise, id=f"{setting}-{promise.replace(' ', '_')}")
    for case in CASES.values()
    for setting in product(case)
    for promise in PROMISES
    if applies(promise, case) and not (promise in EXACT and (setting.dtype == torch.float32 or not setting.grad))
]
CHEAP = ("2 equations", "2 stream sum", "4 grad mode", "read-out")
OTHER = [
    pytest.param(Setting(case, torch.float64, True, False, 1), promise, id=f"{case}-{promise.replace(' ', '_')}")
    for case in CASES.values()
    for promise in CHEAP
]


def run(setting: Setting, promise: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PROMISES[promise](setting)


@pytest.mark.parametrize(("setting", "promise"), CELLS)
def test_promise(setting: Setting, promise: str) -> None:
    run(setting, promise)


@pytest.mark.parametrize(("setting", "promise"), OTHER)
def test_promise_in_float64_with_grad_in_a_first_run_of_one(setting: Setting, promise: str) -> None:
    run(setting, promise)


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "promise"), FULL)
def test_promise_in_every_setting(setting: Setting, promise: str) -> None:
    run(setting, promise)
