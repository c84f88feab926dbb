"""Positions at every site, said in every way: those of the tower, mapped to what the site holds, or refused before the run."""

from __future__ import annotations

import random

import pytest

from tests.known_faults.site_positions import Cell, cells, fault_of, paddings
from tests.zoo import CASES, case

SPECIAL = ("projector.", ".hook_embed", ".hook_readout", ".ln_final.", ".pool.", ".hook_pos_embed")
"""Sites whose axis may not be the tower's."""


def sample(name: str) -> list[Cell]:
    """A few cells of one case: some of every special kind of site, and some others."""
    draw = random.Random(name)
    padding = draw.choice(paddings(case(name)))
    found = list(cells(case(name), padding))
    special = [cell for cell in found if any(mark in cell.site for mark in SPECIAL)]
    return draw.sample(special, min(7, len(special))) + draw.sample(found, 4)


@pytest.mark.parametrize("name", list(CASES))
def test_a_sample_of_sites_and_ways(name: str) -> None:
    faults = {str(cell): fault for cell in sample(name) if (fault := fault_of(cell))}
    assert not faults


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_every_site_and_every_way(name: str) -> None:
    faults = {
        str(cell): fault
        for padding in paddings(case(name))
        for cell in cells(case(name), padding)
        if (fault := fault_of(cell))
    }
    assert not faults
