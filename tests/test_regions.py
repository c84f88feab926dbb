"""Positions and regions: every function that takes positions gives the same numbers for every spelling as for the explicit booleans."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import circuitvision as cv
from circuitvision import readout, regions
from circuitvision.errors import InputError
from circuitvision.model.positions import Positions
from circuitvision.model.regions import Others, RandomLike
from circuitvision.model.words import spans_of
from tests.readout.common import hooked

# name of a tiny model -> the tower that is read, and how its inputs are made
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava left": ("llava-clip-llama", "language", {"padding": "left", "images_per_prompt": 2}),
    "llava right": ("llava-clip-llama", "language", {"padding": "right"}),
    "vit": ("vit", "vision", {}),
    "clip images": ("clip", "vision", {}),
    "clip texts": ("clip", "text", {"padding": "right"}),
    "pi0": ("pi0", "language", {"padding": "right"}),
}


@cache
def run(name: str) -> tuple[Any, dict[str, Any], str, Any]:
    """Model, inputs of three examples, tower, and the tower's token map."""
    model_name, tower, options = RUNS[name]
    model, entry = hooked(model_name)
    inputs = entry.inputs(model.module, batch=3, **options)
    return model, inputs, tower, model.tokens(inputs)[tower]


@cache
def cached(name: str) -> Any:
    model, inputs, _, _ = run(name)
    with torch.no_grad():
        return model.run_with_cache(inputs)[1]


def box_of(tokens: Any, kind: str = "patch") -> regions.Region:
    """The box of one patch in every example but the last, which has none."""
    boxes: list[Any] = [None] * tokens.n_examples
    for example in range(tokens.n_examples - 1):
        row = int(np.flatnonzero(tokens.example == example)[0])
        here = np.flatnonzero((tokens.kind[row] == kind) & (tokens.image_number[row] == 0))
        boxes[example] = tuple(tokens.box[row, here[example % len(here)]])
    return regions.box(boxes)


def spellings(tokens: Any) -> Iterator[tuple[str, Any, Tensor]]:
    """Name, spelling, and the booleans ``[row pos]`` worked out here."""
    rows, width = tokens.kind.shape
    blank = torch.zeros(rows, width, dtype=torch.bool)
    real = torch.from_numpy(~np.isin(tokens.kind, ("padding", "dropped")))
    last = blank.clone()
    for row in range(rows):
        last[row, int(real[row].nonzero().max())] = True
    at = int(real.all(0).nonzero()[-2])

    def column(*numbers: int) -> Tensor:
        mask = blank.clone()
        mask[:, list(numbers)] = True
        return mask

    kinds = [kind for kind in ("patch", "text", "cls") if (tokens.kind == kind).any()]
    yield "number", at, column(at)
    yield "negative", at - width, column(at)
    yield "several", [at, at - 1], column(at, at - 1)
    yield "range", range(at - 1, at + 1), column(at, at - 1)
    yield "slice", slice(at - 1, at + 1), column(at, at - 1)
    yield "open slice", slice(at - width, at + 1), column(at)
    yield "last", "last", last
    yield "all", "all", real.clone()
    for kind in kinds:
        yield kind, kind, torch.from_numpy(tokens.kind == kind)
    yield "kinds", kinds, torch.from_numpy(np.isin(tokens.kind, kinds))
    yield "selection", tokens.select(kinds[0]), torch.from_numpy(tokens.kind == kinds[0])
    yield "selected in a tower", (tokens.tower, kinds[0]), torch.from_numpy(tokens.kind == kinds[0])
    yield "function", lambda t: t.kind == kinds[0], torch.from_numpy(tokens.kind == kinds[0])
    yield "function of a selection", lambda t: t.select(kinds[0]), torch.from_numpy(tokens.kind == kinds[0])
    yield "array", column(at).numpy(), column(at)
    own = [int(real[tokens.example == e].all(0).nonzero()[e]) for e in range(tokens.n_examples)]
    each = torch.arange(width) == torch.tensor(own)[torch.as_tensor(tokens.example)][:, None]
    yield "at", regions.at(own), each
    if (tokens.kind == "patch").any():
        wanted = blank.clone()
        for example in range(tokens.n_examples - 1):
            row = int(np.flatnonzero(tokens.example == example)[0])
            here = np.flatnonzero((tokens.kind[row] == "patch") & (tokens.image_number[row] == 0))
            wanted[row, here[example % len(here)]] = True
        yield "box", box_of(tokens), wanted
        other = torch.from_numpy((tokens.kind == "patch") & (tokens.image_number == 0)) & ~wanted
        other[torch.as_tensor(tokens.example == tokens.n_examples - 1)] = False
        yield "others", regions.others(box_of(tokens)), other


def patched(name: str, spec: Any) -> Tensor:
    model, inputs, tower, _ = run(name)
    site = f"{tower}.blocks.0.hook_resid_post"
    with torch.no_grad():
        return model.run(inputs, cv.edits.replace(site, 0.5, positions=spec))


def attended(name: str, spec: Any) -> Tensor:
    model, _, tower, _ = run(name)
    return readout.attention_mass(model, cached(name), tower=tower, spans={"it": spec}, queries="all").values


def asked(name: str, spec: Any) -> Tensor:
    model, _, tower, _ = run(name)
    return readout.attention_maps(model, cached(name), tower=tower, query=spec).values


def peaks(name: str, spec: Any) -> Tensor:
    model, inputs, tower, _ = run(name)
    maps = readout.attention_maps(model, cached(name), tower=tower, query="last")
    return maps.peak_in(spec, among="all", tokens=model.tokens(inputs)).values


def probed(name: str, spec: Any) -> Tensor:
    model, inputs, tower, _ = run(name)
    site = f"{tower}.blocks.0.hook_resid_post"
    whole = readout.collect(model, inputs, site, positions=spec)[site]
    for_batches = readout.collect(model, inputs, site, positions=spec, batch_size=2)[site]
    torch.testing.assert_close(for_batches, whole, equal_nan=True, atol=1e-5, rtol=1e-4)
    return whole


def lensed(name: str, spec: Any) -> Tensor:
    model, _, tower, _ = run(name)
    return readout.logit_lens(model, cached(name), tower, targets={1: 1, 2: 2}, positions={"it": spec}).values


def attributed(name: str, spec: Any) -> Tensor:
    model, _, tower, _ = run(name)
    direction = torch.arange(model.towers[tower].cfg.d_model).float()
    return readout.direct_attribution(model, cached(name), direction, tower, position=spec).values


def occluded(name: str, spec: Any) -> Tensor:
    model, inputs, tower, _ = run(name)
    metric = cv.metrics.logit_diff(1, 2)
    return readout.occlusion(model, inputs, metric, tower=tower, regions=[spec], baseline="zero", progress=False).values


FUNCTIONS: dict[str, tuple[Callable[[str, Any], Tensor], tuple[str, ...]]] = {
    "edits": (patched, tuple(RUNS)),
    "attention spans": (attended, tuple(RUNS)),
    "attention queries": (asked, tuple(RUNS)),
    "attention peaks": (peaks, ("llava left", "vit")),
    "probes": (probed, ("llava left", "llava right", "vit", "pi0")),
    "lens": (lensed, ("llava left", "llava right", "vit")),
    "attribution": (attributed, ("llava left", "llava right", "vit")),
    "relevance": (occluded, ("llava right", "vit")),
}
CASES = [(function, name) for function, (_, names) in FUNCTIONS.items() for name in names]


@pytest.mark.parametrize(("function", "name"), CASES)
def test_every_spelling_gives_the_numbers_of_the_explicit_mask(function: str, name: str):
    measure, tokens = FUNCTIONS[function][0], run(name)[3]
    known: dict[bytes, Tensor] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for label, spec, mask in spellings(tokens):
            torch.testing.assert_close(Positions.of(spec).resolve(tokens), mask, msg=label)
            key = mask.numpy().tobytes()
            explicit = tokens.select()._with(mask.numpy(), "explicit")
            if key not in known:
                known[key] = measure(name, explicit)
            found = measure(name, spec)
            # Kinds that an example lacks get no attention; a mask that is empty there says nothing.
            empty = (
                known[key].isnan() & (found == 0)
                if label in ("patch", "text", "cls", "kinds", "last", "all")
                else False
            )
            torch.testing.assert_close(
                torch.where(torch.as_tensor(empty), float("nan"), found), known[key], equal_nan=True, msg=label
            )


@pytest.mark.parametrize("name", ["llava left", "llava right"])
def test_a_metric_reads_one_position_however_it_is_said(name: str):
    model, inputs, _, tokens = run(name)
    with torch.no_grad():
        logits = model(inputs)
    for label, spec, mask in spellings(tokens):
        counts = mask.sum(1)
        metric = cv.metrics.logit_diff(1, 2, position=spec).bind(model)
        if int(counts.max()) > 1:
            with pytest.raises(InputError, match="one position"):
                metric(logits, inputs)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = metric(logits, inputs)
        difference = logits[..., 1] - logits[..., 2]
        wanted = torch.where(counts > 0, (difference * mask).sum(1), float("nan"))
        torch.testing.assert_close(found, wanted, equal_nan=True, msg=label)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ranges_and_negative_numbers_count_as_python_counts(data: st.DataObject):
    tokens = run("llava left")[3]
    width = tokens.n_positions
    edge = st.none() | st.integers(-width, width)
    chosen = slice(data.draw(edge), data.draw(edge), data.draw(st.none() | st.integers(1, 4)))
    wanted = torch.zeros(width, dtype=torch.bool)
    wanted[chosen] = True
    assert torch.equal(Positions.of(chosen).resolve(tokens), wanted.expand(tokens.n_rows, -1))
    numbers = data.draw(st.lists(st.integers(-width, width - 1), min_size=1, max_size=6))
    wanted = torch.zeros(width, dtype=torch.bool)
    wanted[numbers] = True
    assert torch.equal(Positions.of(numbers).resolve(tokens), wanted.expand(tokens.n_rows, -1))
    outside = data.draw(st.integers(width, 2 * width) | st.integers(-2 * width, -width - 1))
    with pytest.raises(InputError, match="outside"):
        Positions.of(outside).resolve(tokens)


def test_empty_regions_have_no_value_and_one_warning_says_where():
    model, inputs, _tower, tokens = run("llava right")
    region = box_of(tokens).named("object")
    calls: dict[str, Callable[[], Tensor]] = {
        "mass": lambda: attended("llava right", region)[..., 2],
        "vectors": lambda: probed_once(region)[2],
        "lens": lambda: lensed("llava right", region)[..., 2],
        "metric": lambda: cv.metrics.logit_diff(1, 2, position=region).bind(model)(model(inputs), inputs)[2],
        "attribution": lambda: attributed_once(region)[..., 2],
    }
    for name, call in calls.items():
        with warnings.catch_warnings(record=True) as heard, torch.no_grad():
            warnings.simplefilter("always")
            assert bool(call().isnan().all()), name
        said = [str(one.message) for one in heard if "no value" in str(one.message)]
        assert len(said) == len(heard) == 1, (name, [str(one.message) for one in heard])
        assert "in 1" in said[0], name
        assert "3 examples" in said[0], name


def attributed_once(region: Any) -> Tensor:
    model, _, tower, _ = run("llava right")
    direction = torch.arange(model.towers[tower].cfg.d_model).float()
    return readout.direct_attribution(model, cached("llava right"), direction, tower, position=region).total


def probed_once(region: Any) -> Tensor:
    model, inputs, tower, _ = run("llava right")
    site = f"{tower}.blocks.0.hook_resid_post"
    return readout.collect(model, inputs, site, positions=region)[site]


def test_a_sweep_gives_no_number_where_a_region_is_empty():
    model, inputs, tower, tokens = run("llava right")
    region = box_of(tokens)
    swept = model.sweep(
        inputs,
        [cv.edits.replace(f"{tower}.blocks.0.hook_resid_post", 0.5, positions=region)],
        cv.metrics.logit_diff(1, 2),
        progress=False,
    )
    assert swept.values.isnan().tolist() == [[False, False, True]]


# -- where regions lie ---------------------------------------------------------------------------------------------------------------------


def test_a_share_of_the_patch_decides_and_the_threshold_is_exclusive():
    tokens = run("vit")[3]
    left, top, right, bottom = tokens.box[0, 1]
    half = (left, top, (left + right) / 2, bottom)
    for threshold, held in ((0.0, True), (0.49, True), (0.5, False), (0.9, False)):
        mask = Positions.of(regions.box(half, threshold=threshold)).resolve(tokens)
        assert bool(mask[:, 1].all()) == held
        assert int(mask.sum()) == held * tokens.n_rows
    # Beside the patch, not in it.
    assert not bool(Positions.of(regions.box((right, top, right + 1, bottom))).resolve(tokens)[:, 1].any())


def test_masks_and_boxes_of_one_thing_agree():
    tokens = run("llava left")[3]
    height, width = (int(n) for n in tokens.views.size[0])
    generator = np.random.default_rng(0)
    for _ in range(10):
        left, top = generator.integers(0, width - 2), generator.integers(0, height - 2)
        right, bottom = generator.integers(left + 1, width), generator.integers(top + 1, height)
        drawn = np.zeros((height, width), bool)
        drawn[top:bottom, left:right] = True
        threshold = float(generator.choice([0.0, 0.3, 0.7]))
        box = regions.box((left, top, right, bottom), threshold=threshold, size=(height, width))
        mask = regions.mask(drawn, threshold=threshold)
        assert torch.equal(Positions.of(box).resolve(tokens), Positions.of(mask).resolve(tokens))
        assert np.array_equal(box.drawn(0).numpy(), drawn)
        two = regions.box([[(left, top, right, bottom)] * 2] * 3, threshold=threshold, size=(height, width))
        assert torch.equal(Positions.of(two).resolve(tokens), Positions.of(box).resolve(tokens))


def test_pictures_are_counted_before_the_processor_cuts_them():
    _model, _entry = hooked("llava-clip-llama")
    inputs, tokens = run("llava right")[1], run("llava right")[3]
    # Of a picture twice as wide as high the middle half is cut out, and its height becomes that of the tensor.
    size = (2 * int(tokens.views.size[0][0]), 4 * int(tokens.views.size[0][1]))
    pixel = size[1] / 4 / 2
    first = tokens.positions("patch", row=0)[0]
    step = tokens.box[0, first, 2] * 2
    inside = Positions.of(regions.box((2 * pixel, 0, 2 * pixel + step, step), size=size, threshold=0.9)).resolve(tokens)
    assert inside[0].nonzero().flatten().tolist() == [first]
    cut_away = Positions.of(regions.box((0, 0, 2 * pixel, size[0]), size=size)).resolve(tokens)
    assert not bool(cut_away.any())
    assert inputs["pixel_values"].shape[-1] == int(tokens.views.size[0][1])


def test_a_box_beyond_the_picture_says_that_its_size_is_missing():
    tokens = run("vit")[3]
    with pytest.raises(InputError, match="size="):
        Positions.of(regions.box((900, 900, 910, 910))).resolve(tokens)


def test_others_and_random_controls_have_the_kind_and_size_of_the_region():
    for name in ("llava left", "vit", "pi0"):
        tokens = run(name)[3]
        region = box_of(tokens)
        inside = Positions.of(region).resolve(tokens)
        rest = Positions.of(regions.others(region)).resolve(tokens)
        assert not bool((inside & rest).any())
        assert set(tokens.kind[rest.numpy()].tolist()) == {"patch"}
        draws = [Positions.of(regions.random_like(region, seed)).resolve(tokens) for seed in range(6)]
        for drawn in draws:
            assert drawn.sum(1).tolist() == inside.sum(1).tolist()
            assert not bool((drawn & ~rest).any())
        assert torch.equal(draws[0], Positions.of(regions.random_like(region, 0)).resolve(tokens))
        assert any(not torch.equal(draws[0], other) for other in draws[1:])


def test_random_controls_do_not_depend_on_batches():
    model, inputs, _, tokens = run("llava right")
    control = Positions.of(regions.random_like(box_of(tokens), 3))
    whole = control.resolve(tokens)
    one = {key: value[1:2] for key, value in inputs.items()}
    alone = control.taken([1]).resolve(model.tokens(one)["language"])
    assert torch.equal(alone[0], whole[1])


def test_a_region_that_leaves_no_room_has_no_control():
    tokens = run("vit")[3]
    height, width = (int(n) for n in tokens.views.size[0])
    everything = regions.mask([np.ones((height, width), bool)] * 3)
    assert not bool(Positions.of(regions.random_like(everything)).resolve(tokens).any())


@pytest.mark.parametrize(
    ("word", "pieces", "spans"),
    [
        ("circle", ["▁the", "▁cir", "cle", "▁is"], [(1, 2)]),
        ("Circle", ["Ġa", "Ġcircle", ",", "Ġcircles"], [(1, 1)]),
        ("circle", ["a</w>", "cir", "cle</w>"], [(1, 2)]),
        ("red circle", ["▁red", "▁cir", "cle"], [(0, 2)]),
        ("cle", ["▁cir", "cle"], []),
        ("circle", ["three", "circle", "top"], [(1, 1)]),
        ("what", ["user", "Ġ", "<image>", "Ċ", "What", "Ġis"], [(4, 4)]),
        ("dog", ["ĠA", "Ġdog", "âĢĻ", "s", "ĊĊ", "dogs"], [(1, 1)]),
        ("café", ["Ġca", "fÃ", "©", "Ġcafe"], [(0, 2)]),
        ("café", ["Ġle", "Ġcafé", "Ġnoir"], [(1, 1)]),
        ("red circle", ["a", "red", "cir", "##cle", "."], [(1, 3)]),
        ("cat", ["▁the", "\0", "cat"], [(2, 2)]),
        ("the cat", ["▁the", "\0", "▁cat"], []),
        ("the cat", ["the", "\0", "cat"], []),
    ],
)
def test_words_are_found_whole_in_subword_tokens(word: str, pieces: list[str], spans: list[tuple[int, int]]):
    assert spans_of(word, pieces) == spans


def test_words_stand_elsewhere_in_each_row():
    tokens = run("llava left")[3]
    texts = [
        [str(t) for t, kind in zip(*row, strict=True) if kind == "text"]
        for row in zip(tokens.text, tokens.kind, strict=True)
    ]
    chosen = [row[-1 - number] for number, row in enumerate(texts)]
    mask = Positions.of(regions.words(chosen)).resolve(tokens)
    for row, word in enumerate(chosen):
        assert [str(t) for t in tokens.text[row, mask[row].numpy()]] == [word] * int(mask[row].sum())
        assert int(mask[row].sum()) == texts[row].count(word)
    once = Positions.of(regions.words(chosen, which=-1)).resolve(tokens)
    assert once.sum(1).tolist() == [1, 1, 1]
    assert not bool((once & ~mask).any())


def test_no_word_reaches_over_an_image():
    tokens = run("llava left")[3]
    kinds, text = np.array([["text", "text", "patch", "text", "text"]]), np.array([["▁a", "▁red", "", "circle", "s"]])
    own = dataclasses.replace(tokens, kind=kinds, text=text, example=np.array([0]), n_examples=1)
    for word, wanted in (("circles", [3, 4]), ("red", [1]), ("red circles", []), ("redcircles", []), ("circle", [])):
        mask = regions.words(word).where(own, [0])
        assert np.flatnonzero(mask[0]).tolist() == wanted, word


def test_high_norm_tokens_are_those_with_a_high_norm():
    _model, _inputs, _tower, tokens = run("vit")
    site = "vision.blocks.1.hook_resid_post"
    norms = cached("vit")[site].norm(dim=-1).detach()
    limit = float(norms[:, 1:].median()) * 1.2
    region = regions.high_norm(site, cached("vit"), threshold=limit)
    wanted = (norms > limit) & torch.from_numpy(tokens.kind == "patch")
    assert torch.equal(Positions.of(region).resolve(tokens), wanted)
    assert region.counts == tuple(wanted.sum(1).tolist())
    assert region.threshold == limit
    assert torch.equal(
        Positions.of(regions.high_norm(site, norms, tokens=tokens, threshold=limit)).resolve(tokens), wanted
    )
    two = regions.high_norm(site, cached("vit"), count=2)
    assert two.counts == (2, 2, 2)
    embed = regions.high_norm("vision.hook_embed", cached("vit"), count=1)
    assert not bool(Positions.of(embed).resolve(tokens)[:, 0].any())
    with pytest.raises(InputError, match="not in language"):
        Positions.of(region).resolve(run("llava left")[3])


def test_regions_are_values_that_files_keep(tmp_path: Path):
    tokens = run("vit")[3]
    box = box_of(tokens)
    made = [
        box,
        regions.box((0, 0, 3, 3), size=(8, 8), threshold=0.5, image=None),
        regions.mask([np.ones((4, 4), bool), None, np.zeros((4, 4), bool)]).named("thing"),
        regions.words(["a", None, ("b", "c")], which=0),
        regions.at([1, None, -2]),
        regions.others(box),
        regions.random_like(regions.others(box), 4),
        regions.high_norm("vision.blocks.1.hook_resid_post", cached("vit"), count=1),
    ]
    group = [
        cv.edits.replace("vision.blocks.0.hook_resid_post", 0.0, positions=spec)
        for spec in (*made, "patch", ["cls", "patch"], "all")
    ]
    again = cv.edits.load(cv.edits.save(tmp_path / "edits.yaml", group))
    assert again == group
    assert [str(one) for one in again] == [str(one) for one in group]
    assert len({one.digest for one in made}) == len(made)
    assert [edit.positions.region.digest for edit in again[: len(made)]] == [one.digest for one in made]
    assert all(len(repr(one)) < 120 for one in made)
    assert box.named("object").digest == box.digest
    assert box.named("object") == box


def test_regions_label_the_axes_of_results():
    model, inputs, tower, tokens = run("llava right")
    region = box_of(tokens)
    named = {"object": region, "rest": regions.others(region)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lens = readout.logit_lens(model, inputs, tower, targets=[1], positions=named)
        mass = readout.attention_mass(model, cached("llava right"), spans=named)
    assert lens.axes["position"] == mass.axes["span"] == ["object", "rest"]
    assert set(lens.to_frame()["position"]) == {"object", "rest"}
    figure = lens.plot()
    assert [line.name for line in figure.data] == ["object", "rest"]
    torch.testing.assert_close(
        torch.tensor(figure.data[0].y, dtype=torch.float64),
        lens.values[:, 0, 0].double().nanmean(-1),
        atol=1e-6,
        rtol=1e-6,
    )
    alone = readout.logit_lens(model, inputs, tower, targets=[1], positions="last")
    assert alone.axes["position"] == ["last"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: regions.box((3, 0, 1, 4)), "left < right"),
        (lambda: regions.box([(0, 0, 1)]), "four numbers"),
        (lambda: regions.box((0, 0, 1, 1), threshold=1.0), "share"),
        (lambda: regions.box((0, 0, 1, 1), size=3.5), "height, width"),
        (lambda: regions.mask([np.ones(3)]), "height width"),
        (lambda: regions.mask([]), "no mask"),
        (lambda: regions.words([""]), "takes text"),
        (lambda: regions.at([1.5]), "whole number"),
        (lambda: regions.others("patch"), "cv.regions"),
        (lambda: regions.random_like(regions.at([1]), seed=-1), "seed"),
        (lambda: Positions.of(regions.at([1, 2])).resolve(run("vit")[3]), "of 2 examples"),
        (lambda: Positions.of({"a": 1}), "with names"),
        (lambda: Positions.of(lambda t: lambda u: 1).resolve(run("vit")[3]), "returns a function"),
    ],
)
def test_what_is_no_region_is_refused(call: Callable[[], Any], message: str):
    with pytest.raises(InputError, match=message):
        call()


# -- mutants -------------------------------------------------------------------------------------------------------------------------------


def check_spellings() -> None:
    for name in ("llava left", "vit"):
        tokens = run(name)[3]
        cv.model.positions._resolved.clear()
        for _, spec, mask in spellings(tokens):
            assert torch.equal(Positions.of(spec).resolve(tokens), mask)


def check_controls() -> None:
    cv.model.positions._resolved.clear()
    test_others_and_random_controls_have_the_kind_and_size_of_the_region()


def off_by_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    of_region = Positions._of_region
    monkeypatch.setattr(Positions, "_of_region", lambda self, tokens: of_region(self, tokens).roll(1, dims=1))


def padding_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    last = torch.tensor([True])
    monkeypatch.setattr(
        "circuitvision.model.tokens.TokenMap.present",
        property(lambda self: np.ones(self.kind.shape, bool) & last.numpy()),
    )


def another_example(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Positions._numbers
    monkeypatch.setattr(Positions, "_numbers", lambda self, tokens: list(reversed(numbers(self, tokens))))


def region_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    where = Others.where
    monkeypatch.setattr(
        Others,
        "where",
        lambda self, tokens, examples: where(self, tokens, examples) | self.region.where(tokens, examples),
    )


def controls_of_other_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    def where(self: Any, tokens: Any, examples: Any) -> np.ndarray:
        found = self.region.where(tokens, examples)
        return np.roll(found, -int(found[0].argmax()), axis=1)

    monkeypatch.setattr(RandomLike, "where", where)


@pytest.mark.parametrize(
    ("mutate", "check"),
    [
        (off_by_prefix, check_spellings),
        (padding_counted, check_spellings),
        (another_example, check_spellings),
        (region_among_others, check_controls),
        (controls_of_other_kinds, check_controls),
    ],
)
def test_mutants_are_noticed(mutate: Any, check: Any, monkeypatch: pytest.MonkeyPatch):
    check()
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check()
    monkeypatch.undo()
    cv.model.positions._resolved.clear()
