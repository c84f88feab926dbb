"""Edits as values: immutable, compared and hashed by content, printed in one line, saved and loaded; positions in every form; selections as sets."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model.positions import Positions, PositionWindow
from circuitvision.model.selection import Selection
from tests.edits.common import Dictionary, block, inputs_of, random, run_and_see, same, wrapped

SITE = "vision.blocks.1.hook_resid_post"
TINY = Dictionary(6, 9)


def double(tensor: Tensor, hook: Any) -> Tensor:
    """A function with an import path."""
    return 2 * tensor


# ---- random edits

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False) | st.sampled_from([0.0, 1e-5, -2.5e-12, 3e20, 1.0])
SOURCES = NUMBERS | st.tuples(
    st.sampled_from([(), (1,), (4,), (2, 3), (2, 3, 4)]),
    st.integers(0, 5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
).map(lambda t: random(*t[0], seed=t[1], dtype=t[2]))
MASKS = st.sampled_from([(5,), (2, 5)]).flatmap(
    lambda shape: st.integers(0, 9).map(lambda seed: random(*shape, seed=seed) > 0)
)
BOUND = st.none() | st.integers(-9, 9)
POSITIONS = (
    st.none()
    | st.just("last")
    | st.integers(-30, 30)
    | st.lists(st.integers(-30, 30), max_size=12)
    | st.builds(slice, BOUND, BOUND, st.none() | st.integers(1, 4))
    | MASKS
)
HEADS = st.none() | st.integers(0, 11) | st.lists(st.integers(-3, 11), min_size=1, max_size=5)
STEPS = st.none() | st.sampled_from(["prefill", "decode"]) | st.lists(st.integers(0, 50), min_size=1, max_size=4)
SITES = st.sampled_from([SITE, "language.blocks.*.attn.hook_z", "**.hook_mlp_out"])
WHERE = st.fixed_dictionaries({"positions": POSITIONS, "steps": STEPS})
WITH_HEADS = st.fixed_dictionaries({"positions": POSITIONS, "steps": STEPS, "heads": HEADS})
LAYERS = st.none() | st.just("pool") | st.integers(0, 30) | st.lists(st.integers(0, 30), min_size=1, max_size=4)
EDGES = st.fixed_dictionaries({"layers": LAYERS, "heads": HEADS, "renormalise": st.booleans(), "steps": STEPS})
ORDERS = st.integers(0, 6).flatmap(lambda n: st.permutations(range(n)))
DATASETS = st.lists(
    st.integers(0, 9).map(lambda s: {"pixel_values": random(1, 2, seed=s), "flag": True}), min_size=1, max_size=3
)
EDITS = st.one_of(
    st.builds(lambda s, v, w: edits.replace(s, v, **w), SITES, SOURCES, WITH_HEADS),
    st.builds(
        lambda s, v, w: edits.ablate(s, v, **w), SITES, SOURCES | st.sampled_from(["zero", "resample"]), WITH_HEADS
    ),
    st.builds(
        lambda s, d, a, w: edits.ablate(s, "mean", dataset=d, average=a, **w),
        SITES,
        st.none() | DATASETS,
        st.sampled_from(["position", "all"]),
        WITH_HEADS,
    ),
    st.builds(
        lambda s, x, m, w: edits.steer(s, random(4), x, mode=m, **w),
        SITES,
        NUMBERS,
        st.sampled_from(["add", "norm_preserving", "project_out"]),
        WITH_HEADS,
    ),
    st.builds(
        lambda s, f, c, w: edits.scale(s, f, clip=c, **w),
        SITES,
        SOURCES,
        st.none() | st.tuples(NUMBERS, NUMBERS),
        WITH_HEADS,
    ),
    st.builds(
        lambda s, n, v, d, w: edits.overwrite(s, n, v, dictionary=d, **w),
        SITES,
        st.lists(st.integers(0, 8), max_size=4),
        SOURCES,
        st.sampled_from([None, TINY]),
        WITH_HEADS,
    ),
    st.builds(lambda s, k, v, w: edits.project(s, random(4, k), v, **w), SITES, st.integers(1, 4), SOURCES, WITH_HEADS),
    st.builds(lambda q, k, e: edits.block_attention("vision", q, k, **e), POSITIONS, POSITIONS, EDGES),
    st.builds(lambda q, k, f, e: edits.scale_attention("language", q, k, f, **e), POSITIONS, POSITIONS, NUMBERS, EDGES),
    st.builds(
        lambda q, k, b, e: edits.add_attention_bias("action", q, k, b, **e), POSITIONS, POSITIONS, SOURCES, EDGES
    ),
    st.builds(lambda s, w: edits.freeze(s, "vision.hook_input", **w), SITES, WITH_HEADS),
    st.builds(
        lambda p, n, r, s: edits.delete_tokens("vision", p, start=n, reindex=r, steps=s),
        POSITIONS,
        st.integers(0, 5),
        st.booleans(),
        STEPS,
    ),
    st.builds(lambda s, o, w: edits.permute(s, o, **w), SITES, ORDERS, WHERE),
    st.builds(lambda s, n, w: edits.renormalise(s, n, **w), SITES, NUMBERS, WITH_HEADS),
    st.builds(lambda s, w: edits.apply(s, double, **w), SITES, WITH_HEADS),
)
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@MANY
@given(EDITS)
def test_every_edit_compares_hashes_and_prints_by_what_it_is(edit: edits.Edit) -> None:
    twin = dataclasses.replace(edit)
    assert edit == twin
    assert hash(edit) == hash(twin)
    assert {edit: 1}[twin] == 1
    assert edit != dataclasses.replace(edit, site="other")
    assert "\n" not in repr(edit)
    assert len(repr(edit)) < 200
    assert repr(edit).startswith(edit.kind)


@MANY
@given(
    st.lists(EDITS | st.lists(EDITS, min_size=1, max_size=3), max_size=4), st.sampled_from([".yaml", ".yml", ".json"])
)
def test_edits_and_groups_survive_files(tmp_path_factory: Any, listed: list[Any], suffix: str) -> None:
    path = tmp_path_factory.mktemp("edits") / f"some{suffix}"
    assert edits.save(path, listed) == path
    assert edits.load(path, {"tiny": TINY}) == listed


@MANY
@given(EDITS)
def test_edits_survive_dictionaries_of_plain_types(edit: edits.Edit) -> None:
    tensors: dict[str, Tensor] = {}
    data = edits.to_dict(edit, tensors)
    assert edits.from_dict(yaml.safe_load(yaml.safe_dump(data)), tensors, {"tiny": TINY}) == edit


# ---- values


def test_edits_cannot_be_changed() -> None:
    edit = edits.steer(SITE, random(24))
    for name in ("site", "scale", "positions", "new_name"):
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
            setattr(edit, name, 3)


def test_edits_made_from_equal_tensors_are_equal_and_others_are_not() -> None:
    one, same_content = edits.replace(SITE, random(24)), edits.replace(SITE, random(24))
    assert one == same_content
    assert hash(one) == hash(same_content)
    others = [
        edits.replace(SITE, random(24, seed=1)),
        edits.replace(SITE, random(24, dtype=torch.float32)),
        edits.replace(SITE, random(24)[None]),
        edits.replace(SITE, random(24), positions=3),
        edits.replace(SITE, random(24), positions=torch.tensor([True, False])),
        edits.replace(SITE, random(24), steps=0),
        edits.ablate(SITE, random(24)),
    ]
    assert len({one, *others}) == 1 + len(others)
    assert all(other != one for other in others)


def test_equal_ways_to_say_where_give_equal_edits() -> None:
    assert edits.scale(SITE, 2.0, positions=[3, 4]) == edits.scale(SITE, 2.0, positions=range(3, 5))
    assert edits.scale(SITE, 2.0, positions=3) == edits.scale(SITE, 2.0, positions=torch.tensor([3]))
    assert edits.scale(SITE, 2.0, positions=3) == edits.scale(SITE, 2.0, positions=np.int64(3))
    assert edits.scale(SITE, 2.0, heads=1) == edits.scale(SITE, 2.0, heads=[1, 1])
    assert (
        edits.overwrite(SITE, 3, 1.0)
        == edits.overwrite(SITE, np.array([3]), 1.0)
        == edits.overwrite(SITE, np.int64(3), 1.0)
    )
    assert edits.block_attention("vision", layers=1) == edits.block_attention("vision", layers=np.int64(1))
    assert edits.scale(SITE, 2.0, clip=(0, 1)) == edits.scale(SITE, 2.0, clip=[0.0, 1.0])
    assert edits.scale(SITE, 2.0, steps=[2, 1, 2]) == edits.scale(SITE, 2.0, steps=[1, 2])


def test_a_source_written_into_afterwards_is_refused() -> None:
    model = wrapped("vit", torch.float64)
    inputs = inputs_of("vit", model)
    source = random(24)
    edit = edits.replace(SITE, source)
    model.run(inputs, [edit])
    source[3] = 7.0
    for call in (lambda: model.run(inputs, [edit]), lambda: edits.to_dict(edit, {})):
        with pytest.raises(InputError, match="changed in place"):
            call()
    mask = torch.zeros(17, dtype=torch.bool)
    edit = edits.scale(SITE, 2.0, positions=mask)
    mask[4] = True
    with pytest.raises(InputError, match="changed in place"):
        model.run(inputs, [edit])


def test_a_numpy_source_is_copied() -> None:
    source, mask = np.ones(24), np.zeros(17, bool)
    edit = edits.replace(SITE, source, positions=mask)
    twin = edits.replace(SITE, np.ones(24), positions=np.zeros(17, bool))
    source[:], mask[:] = 5.0, True
    assert edit == twin


def test_long_edits_still_print_in_one_short_line() -> None:
    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

        def encode(self, x: Tensor) -> Tensor:
            return x

        def decode(self, features: Tensor) -> Tensor:
            return features

    selection = inputs_and_tokens()[1].image(0)
    for _ in range(6):
        selection = selection | selection
    for edit in (
        edits.ablate(SITE, positions=range(576)),
        edits.overwrite(SITE, range(0, 4000, 3), 1.0),
        edits.overwrite(SITE, 3, 1.0, dictionary=Big()),
        edits.permute(SITE, range(575, -1, -1)),
        edits.block_attention("language", range(600), range(0, 600, 2), layers=range(80), heads=range(64)),
        edits.ablate(SITE, "mean", dataset=[{"pixel_values": random(1)} for _ in range(64)]),
        edits.scale(SITE, 2.0, positions=selection),
        edits.scale(SITE, 2.0, steps=range(500)),
    ):
        assert "\n" not in repr(edit)
        assert len(repr(edit)) < 200


def test_edits_survive_copying_and_pickling() -> None:
    edit = edits.replace(SITE, random(24), heads=[1], positions=[3, 4])
    assert copy.deepcopy(edit) == edit
    assert pickle.loads(pickle.dumps(edit)) == edit


# ---- files


def test_a_tensor_that_many_edits_hold_is_stored_once(tmp_path: Path) -> None:
    source, mask = random(2, 17, 24), random(17) > 0
    listed = [
        edits.replace(SITE, source, positions=mask),
        [edits.replace(SITE, source.clone(), heads=h) for h in range(4)],
    ]
    edits.save(tmp_path / "many.yaml", listed)
    stored = load_file(tmp_path / "many.safetensors")
    assert sorted(value.shape for value in stored.values()) == [(2, 17, 24), (17,)]
    assert edits.load(tmp_path / "many.yaml") == listed


def test_a_file_without_its_tensors_says_what_is_missing(tmp_path: Path) -> None:
    path = edits.save(tmp_path / "alone.yaml", [edits.replace(SITE, random(24))])
    (tmp_path / "alone.safetensors").unlink()
    with pytest.raises(InputError, match=r"\.safetensors"):
        edits.load(path)
    # Without tensors no such file is written or asked for.
    path = edits.save(tmp_path / "plain.json", [edits.ablate(SITE)])
    assert not (tmp_path / "plain.safetensors").exists()
    assert edits.load(path) == [edits.ablate(SITE)]


def test_dictionaries_are_saved_by_name_and_given_back_by_the_reader(tmp_path: Path) -> None:
    edit = edits.overwrite(SITE, 3, 1.0, dictionary=TINY)
    path = edits.save(tmp_path / "spliced.yaml", [edit])
    with pytest.raises(InputError, match="'tiny'"):
        edits.load(path)
    (loaded,) = edits.load(path, objects={"tiny": TINY})
    assert loaded == edit
    assert loaded.dictionary is TINY
    nameless = Dictionary(6)
    nameless.name = ""
    with pytest.raises(InputError, match="name"):
        edits.save(tmp_path / "nameless.yaml", [edits.overwrite(SITE, 3, 1.0, dictionary=nameless)])


def test_functions_are_saved_by_import_path_and_lambdas_refused(tmp_path: Path) -> None:
    path = edits.save(tmp_path / "function.yaml", [edits.apply(SITE, double)])
    assert "tests.edits.test_values:double" in path.read_text()
    assert edits.load(path) == [edits.apply(SITE, double)]

    def inner(tensor: Tensor, hook: Any) -> Tensor:
        return tensor

    for function in (lambda tensor, hook: tensor, inner):
        with pytest.raises(InputError, match="import path"):
            edits.save(tmp_path / "not.yaml", [edits.apply(SITE, function)])
    assert not (tmp_path / "not.yaml").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("just words", "format"),
        ("{format: other, edits: []}", "format"),
        ("{format: circuitvision.edits/1, edits: [{edit: nonsense, site: a}]}", "nonsense"),
        ("{format: circuitvision.edits/1, edits: [{edit: scale, site: a, colour: red}]}", "colour"),
        ("{format: circuitvision.edits/1, edits: [{edit: replace, site: a, source: {tensor: abc}}]}", "abc"),
        ("{format: circuitvision.edits/1, edits: [{edit: replace, site: a, source: {what: 3}}]}", "what"),
    ],
)
def test_a_text_that_is_no_list_of_edits_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        edits.parse(text, {})


def test_files_of_other_kinds_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.yaml or \.json"):
        edits.save(tmp_path / "edits.pickle", [])
    with pytest.raises(InputError, match="no file"):
        edits.load(tmp_path / "absent.yaml")


def test_a_loaded_edit_runs_as_the_saved_one(tmp_path: Path) -> None:
    model = wrapped("vit", torch.float64)
    inputs = inputs_of("vit", model)
    patches = model.tokens(inputs)["vision"].image(0).box(4, 4, 12, 12)
    listed = [
        edits.replace("vision.blocks.0.attn.hook_z", random(2, 17, 4, 6), heads=[0, 2], positions=patches),
        edits.block_attention("vision", 0, patches, layers=[1, 2]),
        edits.overwrite(SITE, 3, 1e-5, dictionary=Dictionary(24)),
    ]
    for suffix in ("yaml", "json"):
        loaded = edits.load(edits.save(tmp_path / f"e.{suffix}", listed), {"tiny": Dictionary(24)})
        same(model.run(inputs, loaded), model.run(inputs, listed))


# ---- positions

WINDOW = PositionWindow("vision", rows=2, first=0, length=6, prompt=6)
DECODING = PositionWindow("language", rows=2, first=8, length=1, prompt=6)


def chosen(spec: Any, window: PositionWindow = WINDOW) -> list[int]:
    """The positions a choice selects in a window."""
    places = torch.zeros(window.rows, window.length)
    found = Positions.of(spec).choose(window, window.rows, "cpu")
    if isinstance(found, tuple):
        places[found] = 1
    else:
        places[:, slice(None) if found is None else found] = 1
    assert (places == places[0]).all()
    return (places[0].nonzero().flatten() + window.first).tolist()


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        (2, [2]),
        (-1, [5]),
        ([4, 1, 4], [1, 4]),
        ([-6, 5], [0, 5]),
        ([], []),
        ((0, 3), [0, 3]),
        (range(1, 6, 2), [1, 3, 5]),
        (slice(2, None), [2, 3, 4, 5]),
        (slice(-2, None), [4, 5]),
        (slice(None, -4), [0, 1]),
        (slice(1, 100, 3), [1, 4]),
        (slice(4, 2), []),
        ("last", [5]),
        (np.array([1, 2]), [1, 2]),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor([True, False, False, True, False, False]), [0, 3]),
        (np.array([False, True, False, False, False, False]), [1]),
        (torch.tensor([[True, False, False, True, False, False]] * 2), [0, 3]),
    ],
)
def test_every_form_of_positions_selects_what_python_would(spec: Any, wanted: list[int]) -> None:
    assert chosen(spec) == wanted


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [(None, [8]), (8, [8]), (7, []), (-1, []), (slice(6, None), [8]), (slice(None, 8), []), (slice(0, None, 4), [8])],
)
def test_positions_count_on_while_tokens_are_generated(spec: Any, wanted: list[int]) -> None:
    assert chosen(spec, DECODING) == wanted
    assert chosen("last", DECODING) == []
    assert chosen(torch.ones(6, dtype=torch.bool), DECODING) == []


@given(start=BOUND, stop=BOUND, step=st.none() | st.integers(1, 4))
def test_a_slice_of_positions_is_a_slice(start: int | None, stop: int | None, step: int | None) -> None:
    assert chosen(slice(start, stop, step)) == list(range(6))[slice(start, stop, step)]


@pytest.mark.parametrize(
    "spec", ["first", True, [True, False], 2.5, [1.5], torch.tensor([0.5]), torch.ones(1, 2, 3) > 0, {"a"}]
)
def test_what_is_no_choice_of_positions_is_refused(spec: Any) -> None:
    with pytest.raises(InputError, match="position"):
        edits.scale(SITE, 2.0, positions=spec)


def test_a_mask_per_example_reaches_every_image_of_the_example() -> None:
    # Two prompts of two images: four rows in the vision tower.
    model = wrapped("llava-clip-llama", torch.float64)
    inputs = inputs_of("llava-clip-llama", model, images_per_prompt=2)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, [1, 4]] = mask[1, 7] = True
    site, place = "vision.blocks.0.hook_resid_post", block(model, "vision", 0)
    clean = run_and_see(model, inputs, [], place)
    per_row = mask.repeat_interleave(2, dim=0)
    for positions in (mask, per_row):
        got = run_and_see(model, inputs, [edits.scale(site, 3.0, positions=positions)], place)
        same(got, torch.where(per_row[..., None], 3.0 * clean, clean))
    with pytest.raises(InputError, match="rows"):
        model.run(inputs, [edits.scale(site, 3.0, positions=torch.eye(3, 10) > 0)])


def test_an_image_of_the_prompt_is_its_own_rows_in_the_vision_tower() -> None:
    model = wrapped("llava-clip-llama", torch.float64)
    inputs = inputs_of("llava-clip-llama", model, images_per_prompt=2)
    tokens = model.tokens(inputs)
    site, place = "vision.blocks.0.hook_resid_post", block(model, "vision", 0)
    clean = run_and_see(model, inputs, [], place)
    got = run_and_see(model, inputs, [edits.scale(site, 3.0, positions=tokens["vision"].image(1))], place)
    same(got, torch.where(torch.tensor([False, True] * 2)[:, None, None], 3.0 * clean, clean))


def test_the_last_position_is_the_last_that_is_not_padding() -> None:
    model = wrapped("llava-clip-llama", torch.float32)
    for padding in ("left", "right"):
        inputs = inputs_of("llava-clip-llama", model, padding=padding, batch=3)
        place = block(model, "language", 0)
        clean = run_and_see(model, inputs, [], place)
        got = run_and_see(
            model, inputs, [edits.ablate("language.blocks.0.hook_resid_post", 9.0, positions="last")], place
        )
        mask = inputs["attention_mask"]
        last = [int(row.nonzero().max()) for row in mask]
        wanted = clean.clone()
        wanted[range(3), last] = 9.0
        same(got, wanted)


def test_a_selection_works_at_embeddings_that_lack_the_class_token() -> None:
    model = wrapped("vit", torch.float64)
    inputs = inputs_of("vit", model)
    patch = model.tokens(inputs)["vision"].select().patch(row=2, col=1)
    assert patch.positions() == [1 + 2 * 4 + 1]
    with model.hooks():
        got = model.run(inputs, [edits.ablate("vision.hook_embed", positions=patch)])
    same(got, model.run(inputs, [edits.ablate("vision.hook_embed", positions=10)]))


# ---- selections


def inputs_and_tokens(name: str = "vit", tower: str = "vision", **options: Any) -> tuple[dict[str, Any], Any]:
    model = wrapped(name)
    inputs = inputs_of(name, model, **options)
    return inputs, model.tokens(inputs)[tower]


SETS = st.sets(st.integers(0, 16))


@given(SETS, SETS)
def test_selections_are_sets(one: set[int], other: set[int]) -> None:
    _, tokens = inputs_and_tokens()

    def select(positions: set[int]) -> Selection:
        mask = np.zeros((2, 17), bool)
        mask[:, list(positions)] = True
        return Selection(tokens, mask)

    a, b, everything = select(one), select(other), set(range(17))
    for found, wanted in (
        (a | b, one | other),
        (a & b, one & other),
        (a - b, one - other),
        (~a, everything - one),
        (~(a | b), everything - one - other),
    ):
        assert found == select(wanted)
        assert set(found.positions(1)) == wanted
        assert len(found) == 2 * len(wanted)


def test_selections_of_other_towers_or_runs_do_not_combine() -> None:
    _, vision = inputs_and_tokens("llava-clip-llama", "vision")
    _, language = inputs_and_tokens("llava-clip-llama", "language")
    _, larger = inputs_and_tokens("llava-clip-llama", "language", batch=3)
    for other in (vision, larger):
        with pytest.raises(InputError, match="same tower"):
            language.image(0) | other.image(0)


def patch_box(row: int, col: int) -> tuple[int, int, int, int]:
    return 4 * col, 4 * row, 4 * col + 4, 4 * row + 4


@pytest.mark.parametrize(("row", "col", "count"), [(1, 2, 9), (0, 2, 6), (2, 3, 6), (0, 0, 4), (3, 3, 4)])
def test_a_box_of_one_patch_has_one_patch_and_its_buffer_the_neighbours(row: int, col: int, count: int) -> None:
    _, tokens = inputs_and_tokens()
    image = tokens.image(0)
    assert image.box(*patch_box(row, col)).positions() == [1 + 4 * row + col]
    grown = image.box(*patch_box(row, col), buffer=1)
    assert len(grown.positions()) == count
    near = {(r, c) for r in range(4) for c in range(4) if abs(r - row) <= 1 and abs(c - col) <= 1}
    assert set(grown.positions()) == {1 + 4 * r + c for r, c in near}
    assert len(image.box(*patch_box(row, col), buffer=9).positions()) == 16


def test_boxes_count_the_patches_they_overlap() -> None:
    _, tokens = inputs_and_tokens()
    image = tokens.image(0)
    assert len(image.box(0, 0, 16, 16).positions()) == 16
    assert len(image.box(3.9, 4, 8.1, 8).positions()) == 3
    assert len(image.box(100, 100, 120, 120).positions()) == 0
    # A box within a smaller selection, and a buffer that does not leave it.
    row = image.patch(row=1)
    assert row.box(*patch_box(1, 2), buffer=1).positions() == [6, 7, 8]


def test_kinds_grids_and_ends_of_a_selection() -> None:
    _, tokens = inputs_and_tokens("dinov2-registers")
    everything = tokens.select()
    assert everything.kind("cls").positions() == [0]
    assert everything.kind(["cls", "register"]).positions() == [0, 1, 2, 3]
    assert everything.patch(row=0).positions() == [4, 5, 6, 7]
    assert everything.patch(col=0).positions() == [4, 8, 12, 16]
    assert everything.last().positions() == [19]
    assert tokens.select("patch").last() == everything.last()


def test_no_selection_holds_padding_and_its_complement_does_not_either() -> None:
    inputs, tokens = inputs_and_tokens("llava-clip-llama", "language", padding="left", batch=3)
    real = inputs["attention_mask"].bool()
    image = tokens.image(0)
    assert torch.equal(tokens.select().tensor, real)
    assert torch.equal((~image).tensor, real & ~image.tensor)
    assert len(image) == 27
    _, vision = inputs_and_tokens("siglip2-classifier", batch=3)
    assert (~vision.select("patch")).positions() == []


def test_a_selection_keeps_its_own_numbers() -> None:
    _, tokens = inputs_and_tokens()
    selection = tokens.image(0).patch(row=0)
    edit = edits.scale(SITE, 2.0, positions=selection)
    selection.tensor[:] = True
    assert edit == edits.scale(SITE, 2.0, positions=tokens.image(0).patch(row=0))
    assert "image(0)" in repr(edit)
