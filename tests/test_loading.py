"""One reader for every file that the package writes, told apart by what is in it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from circuitvision.circuits import export, schema
from circuitvision.errors import InputError
from circuitvision.metrics import prob
from circuitvision.model.names import parse_id
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


def written(folder: Path) -> list[Path]:
    """One file of every kind."""
    model = cv.HookedModel(shared_model("vit"))
    inputs = case("vit").inputs(model.module, batch=2)
    steer = edits.steer("vision.blocks.0.hook_resid_post", torch.ones(model.vision.cfg.d_model), 2.0)
    swept = model.sweep(inputs, [steer], {"prob": prob(1)}, progress=False)
    cache = model.run_with_cache(inputs, "vision.blocks.0.attn.hook_z")[1]
    vectors = Collected({"vision.hook_input": torch.randn(3, 4)}, "last", {"method": "collect"}, labels=["a", "b", "c"])
    graph = schema.new_graph("head_importance", name="g")
    schema.add_node(graph, parse_id("v.a0.h1"))
    return [
        *(swept.save(folder / f"swept{suffix}") for suffix in (".npz", ".safetensors", ".csv")),
        cache.save(folder / "cache.safetensors"),
        vectors.save(folder / "vectors.safetensors"),
        *(edits.save(folder / f"e{suffix}", steer) for suffix in (".yaml", ".json")),
        *(export(graph, folder / f"g{suffix}") for suffix in (".graphml", ".json")),
    ]


@pytest.mark.filterwarnings("ignore:No key type")
def test_damage_is_one_error_whatever_reader_meets_it(tmp_path):
    draw = random.Random(0)
    for path in written(tmp_path):
        whole = path.read_bytes()
        assert cv.load(path) is not None
        damaged = [whole[:length] for length in (0, 1, 7, 9, 60, len(whole) // 2, len(whole) - 2)]
        for _ in range(40):
            changed = bytearray(whole)
            changed[draw.randrange(min(len(whole), 4000))] ^= 1 << draw.randrange(8)
            damaged.append(bytes(changed))
        foreign = [
            b"PAR1 none",
            b"[" * 100_000,
            b"\xe4\xf6",
            b"format: circuitvision.edits/1\n",
            b"format: circuitvision.edits/1\n- {a",
        ]
        foreign += [b'{"format": "circuitvision.edits/1"}', b'{"links": 1}', b'{"links": [], "nodes": [5]}']
        refused = 0
        for content in damaged + foreign:
            path.write_bytes(content)
            try:
                cv.load(path)
            except InputError:
                refused += 1
        assert refused >= 7, path
        path.write_bytes(whole)


@pytest.mark.parametrize("wrong", ["[]", "5", "", "null", '{"format": 3}', '{"format": "circuitvision.result/1"}'])
def test_headers_of_other_programs_and_versions(tmp_path, wrong):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"circuitvision_json": wrong})
    with pytest.raises(InputError, match=r"a\.safetensors"):
        cv.load(tmp_path / "a.safetensors")


def test_no_file_takes_the_place_of_the_tensors_of_edits(tmp_path, result):
    steer = [edits.steer("vision.hook_input", torch.full((4,), float(n)), 2.0) for n in range(3)]
    yaml, json = edits.save(tmp_path / "a.yaml", steer[0]), edits.save(tmp_path / "a.json", steer[1])
    assert (cv.load(yaml), cv.load(json)) == ([steer[0]], [steer[1]])
    assert cv.load(edits.save(yaml, steer[2])) == [steer[2]]
    assert cv.load(json) == [steer[1]]
    with pytest.raises(InputError, match="another name"):
        result.save(tmp_path / "a.safetensors")
    assert cv.load(yaml) == [steer[2]]
    result.save(tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="another name"):
        edits.save(tmp_path / "b.yaml", steer)
    assert torch.equal(cv.load(tmp_path / "b.safetensors").values, result.values)
    assert not (tmp_path / "b.yaml").exists()
    assert torch.equal(cv.load(result.save(tmp_path / "b.safetensors")).values, result.values)
