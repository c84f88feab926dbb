"""Results: round trips that keep every bit, files that are complete or absent, axes that fit, provenance hashes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from circuitvision import files, provenance
from circuitvision.errors import InputError
from circuitvision.results import Result
from circuitvision.storage import as_builtin, read, write


@dataclass(frozen=True, eq=False)
class TwoTensors(Result):
    extra: Tensor = field(default_factory=lambda: torch.zeros(0))
    note: str = ""
    layers: list = field(default_factory=list)


def example(dtype: torch.dtype = torch.float32) -> TwoTensors:
    values = torch.tensor([[1.0, float("nan")], [-2.5, 0.1]]).to(dtype)
    return TwoTensors(
        values, {"layer": [0, 1], "head": ["a", "b"]}, {"seed": 3, "versions": {"torch": "x"}},
        extra=torch.arange(3), note="café", layers=[1, "two"],
    )  # fmt: skip


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_save_and_load_return_the_same_class_bits_and_labels(tmp_path, suffix, dtype):
    before = example(dtype)
    path = before.save(tmp_path / f"deep/r{suffix}")
    after = Result.load(path)
    assert type(after) is TwoTensors
    assert after.values.dtype == dtype
    assert torch.equal(after.values.nan_to_num(9), before.values.nan_to_num(9))
    assert torch.equal(after.extra, before.extra)
    assert after.extra.dtype == torch.int64
    assert (after.axes, after.note, after.layers, after.provenance) == (
        before.axes,
        "café",
        [1, "two"],
        before.provenance,
    )
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_previous_file_and_no_other(tmp_path):
    path = tmp_path / "r.npz"
    example().save(path)
    before = path.read_bytes()

    def interrupted() -> None:
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        interrupted()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.npz"]


def test_load_refuses_what_is_not_a_result(tmp_path):
    with pytest.raises(InputError, match="no file"):
        Result.load(tmp_path / "missing.npz")
    for name in ("junk.npz", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"junk")
        with pytest.raises(InputError, match="not a result"):
            Result.load(tmp_path / name)
    np.savez(tmp_path / "other.npz", values=np.zeros(2))
    with pytest.raises(InputError, match="not a result"):
        Result.load(tmp_path / "other.npz")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match="neither"):
        Result.load(tmp_path / "a.csv")
    with pytest.raises(InputError, match=r"\.npz or \.safetensors"):
        example().save(tmp_path / "a.pkl")


def test_load_as_a_narrower_class_is_checked(tmp_path):
    path = Result(torch.zeros(1), {"x": [0]}).save(tmp_path / "r.npz")
    assert type(Result.load(path)) is Result
    with pytest.raises(InputError, match="holds a Result"):
        TwoTensors.load(path)


def test_a_file_names_a_class_that_may_have_moved(tmp_path):
    """What was saved while its class stood in another module is read, also where neither module was imported before."""
    path = Result(torch.zeros(1), {"x": [0]}).save(tmp_path / "r.npz")
    tensors, header = read(path)
    write(path, tensors, {**header, "module": "circuitvision.model.gone", "class": "ValueVectors"})
    code = f"import circuitvision as cv; print(type(cv.Result.load({str(path)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ValueVectors", done.stderr[-2000:]
    write(path, tensors, {**header, "module": "circuitvision.model.gone", "class": "NoSuchResult"})
    with pytest.raises(InputError, match="NoSuchResult"):
        Result.load(path)


def test_an_object_array_is_never_unpickled(tmp_path):
    path = tmp_path / "evil.npz"
    header = {
        "format": "circuitvision.result/1",
        "class": "Result",
        "dtypes": {"values": "float32"},
        "fields": {"axes": {"x": [0]}},
    }
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez(path, values=np.array([{"a": 1}], dtype=object), circuitvision_json=text)
    with pytest.raises(InputError):
        Result.load(path)


def test_axes_must_describe_the_values():
    with pytest.raises(InputError, match="shape"):
        Result(torch.zeros(2, 3), {"layer": [0, 1], "head": [0, 1]})


def test_results_are_frozen():
    with pytest.raises(AttributeError):
        example().note = "changed"


def test_to_frame_is_long_and_in_order():
    frame = example().to_frame()
    assert list(frame.columns) == ["layer", "head", "value"]
    assert frame["head"].tolist() == ["a", "b", "a", "b"]
    assert frame["value"][2] == -2.5
    assert example(torch.bfloat16).to_frame()["value"][2] == -2.5


def test_html_escapes_what_it_shows():
    text = Result(torch.zeros(1), {"x": [0]}, {"model_id": "<script>"})._repr_html_()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_as_builtin_converts_and_refuses():
    assert type(as_builtin(np.float64(1.5))) is float
    assert type(as_builtin(np.bool_(True))) is bool
    assert as_builtin((1, torch.tensor(2), {"a": {3}})) == [1, 2, {"a": [3]}]
    with pytest.raises(InputError):
        as_builtin(object())


def test_weight_hash_sees_every_change_and_only_changes():
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    first = provenance.hash_weights(module)
    assert provenance.hash_weights(module) == first
    with torch.no_grad():
        module.bias[0] += 1e-6
    second = provenance.hash_weights(module)
    assert second != first
    twin = nn.Linear(3, 2)
    twin.load_state_dict(module.state_dict())
    assert provenance.hash_weights(twin) == second
    assert provenance.hash_weights(nn.Linear(3, 2, device="meta")) == "unavailable"


def test_input_hash_depends_on_values_names_and_order():
    a, b = {"x": torch.zeros(2)}, {"x": torch.ones(2)}
    assert provenance.hash_inputs(a, b) != provenance.hash_inputs(b, a)
    assert provenance.hash_inputs(a) == provenance.hash_inputs({"x": torch.zeros(2)})
    assert provenance.hash_inputs(a) != provenance.hash_inputs({"y": torch.zeros(2)})


def test_a_label_that_names_two_entries_is_refused() -> None:
    for axes in ({"layer": ["a", "b", "a"]}, {"layer": [0, 1, 0]}):
        with pytest.raises(InputError, match=r"'layer' has the label .* twice"):
            Result(torch.zeros(3), axes)
    assert Result(torch.zeros(3), {"layer": [1, "1", 1.0]}).axes["layer"] == [1, "1", 1.0]
    assert Result(torch.zeros(3), {"example": [4, 4, 5]}).examples == [4, 5]
