"""Around every test of edits: no gradients unless the test asks for them, and no model left hooked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.edits.common import MADE


@pytest.fixture(autouse=True)
def _nothing_left_hooked() -> Iterator[None]:
    with torch.no_grad():
        yield
    for model in MADE:
        assert model.engine.handles == [], "an edit left torch hooks behind"
        assert model.engine.stack == [], "an edit left a registration behind"
