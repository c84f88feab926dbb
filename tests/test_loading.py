"""One reader for every file that the package writes, told apart by what is in it."""

from __future__ import annotations

import shutil

import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from circuitvision.circuits import export, schema
from circuitvision.errors import InputError
from circuitvision.readout.probes.collected import Collected
from tests.zoo import case, shared_model


@pytest.fixture
def result() -> cv.Result:
    return cv.Result(torch.randn(2, 3), {"layer": [0, 1], "example": [0, 1, 2]}, {"method": "test"})


def test_results(tmp_path, result):
    for suffix in (".npz", ".safetensors"):
        path = result.save(tmp_path / f"a{suffix}")
        other = shutil.copy(path, tmp_path / f"{path.name}.bin")
        for file in (path, other):
            assert torch.equal(cv.load(file).values, result.values)


def test_a_cache_with_its_edited_sites(tmp_path):
    model = cv.HookedModel(shared_model("vit"))
    inputs = case("vit").inputs(model.module, batch=2)
    with model.hooks([("vision.blocks.0.hook_mlp_out", lambda value, hook: value)]):
        _, cache = model.run_with_cache(inputs)
    path = cache.save(tmp_path / "run.safetensors")
    again = cv.load(path, model=model, inputs=inputs)
    assert isinstance(again, cv.ActivationCache)
    assert all(torch.equal(again[name], cache[name]) for name in cache)
    assert again.edited == cache.edited
    assert torch.equal(again["vision.blocks.0.attn.hook_result"], cache["vision.blocks.0.attn.hook_result"])
    assert cv.load(path).model is None
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
    with pytest.raises(InputError, match="safetensors"):
        cache.save(tmp_path / "run.npz")


def test_collected_vectors(tmp_path):
    vectors = Collected({"vision.hook_input": torch.randn(3, 4)}, "last", {"method": "collect"})
    again = cv.load(vectors.save(tmp_path / "v.safetensors"))
    assert isinstance(again, Collected)
    assert torch.equal(again["vision.hook_input"], vectors["vision.hook_input"])


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_edits(tmp_path, suffix):
    listed = [edits.ablate("vision.blocks.0.attn.hook_z", "zero"), edits.steer("vision.hook_input", torch.ones(4), 2.0)]
    path = edits.save(tmp_path / f"e{suffix}", listed)
    assert cv.load(path) == listed
    with pytest.raises(InputError, match=path.name):
        cv.load(tmp_path / "e.safetensors")


@pytest.mark.parametrize("suffix", [".graphml", ".json"])
def test_graphs(tmp_path, suffix):
    graph = schema.new_graph("head_importance", name="g")
    again = cv.load(export(graph, tmp_path / f"g{suffix}"))
    assert again.graph["name"] == "g"


def test_what_is_none_of_them_is_refused(tmp_path, result):
    from safetensors.torch import save_file

    with pytest.raises(InputError, match="no file"):
        cv.load(tmp_path / "none.npz")
    for name, content in {
        "a.npz": b"PK junk", "b.bin": b"\0\1\2\3", "c.txt": b"words", "d.json": b"[1]", "e.json": b"{}", "f.safetensors": b"",
        "g.safetensors": b"\x08\0\0\0\0\0\0\0{\"a\": 1}", "h.yaml": b"a: 1\n", "i.txt": b"\xff\xfe\xfa" * 9,
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError):
            cv.load(tmp_path / name)
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match="did not name"):
        cv.load(tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match="belong to a cache"):
        cv.load(result.save(tmp_path / "r.npz"), inputs={})
