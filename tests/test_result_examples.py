"""Results over examples: cut and joined bit for bit, as frames and tables, and what they refuse."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.results import Result


@dataclass(frozen=True, eq=False)
class Measured(Result):
    uniform: Tensor = field(default_factory=lambda: torch.zeros(0))
    places: Tensor = field(default_factory=lambda: torch.zeros(0))
    words: list[list[str]] = field(default_factory=list)
    measure: str = ""

    _per_example: ClassVar[dict[str, int]] = {"uniform": -1, "places": 0, "words": 0}


ORIGIN = {"method": "test", "metric": "logit", "weights_sha256": "abc", "dataset_sha256": "data"}


def result(rows: int = 6, seed: int = 0, **changed) -> Measured:
    values = torch.randn(2, 3, rows, generator=torch.Generator().manual_seed(seed))
    values[0, 1, 2] = float("nan")
    given = {
        "values": values,
        "axes": {"layer": [0, 1], "head": [0, 1, 2], "example": [row // 2 for row in range(rows)]},
        "provenance": ORIGIN,
        "uniform": values[:, 0].clone(),
        "places": torch.arange(rows * 4).reshape(rows, 4),
        "words": [[f"w{row}"] for row in range(rows)],
        "measure": "mass",
    }
    return Measured(**{**given, **changed})


def same(one: Measured, two: Measured) -> bool:
    tensors = ("values", "uniform", "places")
    equal = all(torch.equal(getattr(one, n).nan_to_num(9), getattr(two, n).nan_to_num(9)) for n in tensors)
    return equal and (one.axes, one.words, one.measure) == (two.axes, two.words, two.measure)


def test_the_axis_of_examples_is_the_last():
    with pytest.raises(InputError, match="last"):
        Result(torch.zeros(2, 3), {"example": [0, 1], "layer": [0, 1, 2]})
    weights = Result(torch.zeros(2), {"layer": [0, 1]})
    for call in (weights.mean, weights.error, weights.interval, lambda: weights.to_frame(by_example=True)):
        with pytest.raises(InputError, match="no examples"):
            call()
    with pytest.raises(InputError, match="no examples"):
        Result.concat([weights, weights])


def test_halves_joined_are_the_whole_bit_for_bit():
    whole = result()
    halves = [whole.take([0, 1, 2, 3]), whole.take([4, 5])]
    halves = [
        Measured(**{**vars(half), "provenance": {**ORIGIN, "dataset_sha256": name}})
        for half, name in zip(halves, "ab", strict=True)
    ]
    joined = Measured.concat(halves)
    assert same(joined, whole)
    assert torch.equal(joined.mean(), whole.mean())
    assert torch.equal(joined.interval(), whole.interval())
    assert joined.provenance["parts"] == [half.provenance for half in halves]
    assert joined.provenance["method"] == "test"
    assert "dataset_sha256" not in joined.provenance


def test_parts_that_each_count_from_0_are_counted_on():
    parts = [
        result(seed=0, provenance={**ORIGIN, "dataset_sha256": "a"}),
        result(seed=1, rows=4, provenance={**ORIGIN, "dataset_sha256": "b"}),
    ]
    joined = Result.concat(parts)
    assert joined.axes["example"] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len(joined.examples) == 5
    assert joined.words == parts[0].words + parts[1].words


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"axes": {"layer": [0, 2], "head": [0, 1, 2], "example": [0, 0, 1, 1, 2, 2]}}, "layer"),
        ({"provenance": {**ORIGIN, "metric": "prob", "dataset_sha256": "b"}}, "metric"),
        ({"provenance": {**ORIGIN, "method": "other", "dataset_sha256": "b"}}, "method"),
        ({"provenance": {**ORIGIN, "weights_sha256": "x", "dataset_sha256": "b"}}, "weights"),
        ({"measure": "entropy"}, "measure"),
        ({}, "twice"),
    ],
)
def test_what_does_not_belong_together_is_not_joined(changed, said):
    with pytest.raises(InputError, match=said):
        Measured.concat([result(), result(**changed)])


def test_other_classes_are_not_joined():
    plain = Result(torch.zeros(1), {"example": [0]})
    with pytest.raises(InputError, match="Measured"):
        Result.concat([plain, result()])
    with pytest.raises(InputError, match="nothing"):
        Result.concat([])


def test_take_refuses_what_is_not_there():
    assert result().take(3).axes["example"] == [1]
    for wrong in (6, -1, True, [0, 9], []):
        with pytest.raises(InputError):
            result().take(wrong)


def test_frames_have_one_row_per_value_or_per_example():
    long = result().to_frame()
    assert list(long.columns) == ["layer", "head", "example", "value"]
    assert len(long) == 36
    assert int(long["value"].isna().sum()) == 1
    wide = result().to_frame(by_example=True)
    assert list(wide.columns) == ["example", "L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"]
    assert wide["example"].tolist() == [0, 1, 2]
    assert np.allclose(wide["L1H2"], result().values[1, 2].double().reshape(3, 2).mean(1))
    assert wide["L0H1"][1] == pytest.approx(float(result().values[0, 1, 3]))
    single = Result(torch.tensor([1.0, 2.0]), {"example": ["a", "b"]}).to_frame(by_example=True)
    assert single.to_dict("list") == {"example": ["a", "b"], "value": [1.0, 2.0]}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_hold_the_long_form(tmp_path, suffix):
    path = result().save(tmp_path / f"deep/table{suffix}")
    frame = cv.load(path)
    pd.testing.assert_frame_equal(frame, result().to_frame(), check_dtype=False, rtol=1e-6)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    if suffix == ".parquet":
        assert frame.attrs["provenance"] == ORIGIN
    with pytest.raises(InputError, match="inputs"):
        result().save(path, inputs={"x": torch.zeros(1)})


def test_labels_of_two_types_fit_a_column_of_parquet(tmp_path):
    mixed = Result(torch.zeros(2, 1), {"layer": ["input", 0], "example": [0]})
    assert cv.load(mixed.save(tmp_path / "m.parquet"))["layer"].tolist() == ["input", "0"]


def test_without_pyarrow_one_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        result().save(tmp_path / "m.parquet")
    assert not list(tmp_path.iterdir())


def test_a_result_with_repeated_examples_is_read_back(tmp_path):
    for suffix in (".npz", ".safetensors"):
        read = cv.load(result().save(tmp_path / f"r{suffix}"))
        assert type(read) is Measured
        assert same(read, result())
