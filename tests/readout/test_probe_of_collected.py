"""Probes of collected vectors take the labels and groups that stand beside them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from circuitvision.errors import InputError
from circuitvision.readout import Collected, linear_probe


def collected() -> Collected:
    """Twenty groups of four vectors each, nearly alike, whose labels are those of their groups and say nothing of the vectors."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(20).repeat_interleave(4)
    vectors = torch.randn(20, 30, generator=generator)[groups] + 1e-3 * torch.randn(80, 30, generator=generator)
    labels = ["red" if group % 2 else "blue" for group in groups.tolist()]
    return Collected({"a": vectors}, examples=list(range(80)), labels=labels, groups=groups.tolist())


def test_labels_and_groups_are_those_beside_the_vectors() -> None:
    vectors = collected()
    found = linear_probe(None, vectors, shuffles=2, penalty=1e-2)
    asked = linear_probe(None, dict(vectors), vectors.labels, groups=vectors.groups, shuffles=2, penalty=1e-2)
    assert found.classes == ["blue", "red"]
    assert torch.equal(found.predictions, asked.predictions)
    assert torch.equal(found.shuffled, asked.shuffled)
    held = {vectors.groups[number] for number in found.held_out.tolist()}
    assert not held & {vectors.groups[number] for number in set(range(80)) - set(found.held_out.tolist())}
    assert found.independent == len(held)


def test_labels_groups_and_held_out_examples_that_are_given_count() -> None:
    vectors = collected()
    numbers = linear_probe(None, vectors, [float(n) for n in range(80)], shuffles=0, penalty=1e-2)
    assert numbers.classes == []
    free = linear_probe(None, vectors, groups=list(range(80)), shuffles=0, penalty=1e-2)
    assert free.independent == len(free.held_out)
    assert float(free.values[0]) == 1.0
    named = linear_probe(None, vectors, held_out=[0, 1, 4, 9], shuffles=0, penalty=1e-2)
    assert named.held_out.tolist() == [0, 1, 4, 9]


def test_vectors_without_labels_are_refused() -> None:
    vectors = collected()
    for data in (dataclasses.replace(vectors, labels=[]), dict(vectors)):
        with pytest.raises(InputError, match="labels"):
            linear_probe(None, data)
