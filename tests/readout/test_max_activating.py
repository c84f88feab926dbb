"""The exemplar index equals a full sort, however the data set is cut, and never lets padding win."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuitvision as cv
from circuitvision.data.questions import sample_largest
from circuitvision.errors import InputError
from circuitvision.readout import max_activating_examples
from circuitvision.readout.probes.max_activating import MaxActivatingExamples
from circuitvision.readout.probes.strongest import Best, box_shares
from tests.readout.common import hooked

TENSORS = ("values", "example", "position", "places", "boxes")


def by_sorting(values, top_k):
    """(value, example) of the best per unit, equal values by example; ``values`` is ``[example unit]``."""
    table = []
    for unit in values.T.tolist():
        order = sorted(range(len(unit)), key=lambda example: (-unit[example], example))[:top_k]
        table.append([(unit[example], example) for example in order])
    return table


def pairs(index):
    return [
        list(zip(values, numbers, strict=True))
        for values, numbers in zip(index.values.tolist(), index.example.tolist(), strict=True)
    ]


def same(one: MaxActivatingExamples, two: MaxActivatingExamples) -> None:
    for name in TENSORS:
        torch.testing.assert_close(getattr(one, name), getattr(two, name), equal_nan=True, atol=1e-6, rtol=1e-5)
    for name in ("average", "maximum", "active", "class_means", "class_counts"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), equal_nan=True, atol=1e-6, rtol=1e-5)
    assert (one.tokens, one.ranges, one.count, one.n_positions) == (two.tokens, two.ranges, two.count, two.n_positions)


# -- the state -----------------------------------------------------------------------------------------------------------------------------


def part_of(values, first, last):
    """The state after some examples; every field tells its example."""
    own = values[first:last].T
    number = torch.arange(first, last).expand(len(own), -1)
    return Best(
        own, number, number % 7, number[..., None] * torch.ones(4, dtype=torch.long), number[..., None] / torch.ones(4),
        np.array([[f"piece {n}" for n in range(first, last)]] * len(own), dtype=object),
    )  # fmt: skip


@given(st.lists(st.integers(1, 999), max_size=12, unique=True), st.integers(1, 20), st.integers(0, 50), st.randoms())
def test_any_chunking_of_a_thousand_items_equals_a_full_sort(cuts, top_k, seed, order):
    # Few distinct values: most places in the list are decided between equals.
    values = torch.randint(0, 12, (1000, 3), generator=torch.Generator().manual_seed(seed)).float()
    edges = [0, *sorted(cuts), 1000]
    parts = [part_of(values, first, last) for first, last in itertools.pairwise(edges)]
    order.shuffle(parts)
    best = parts[0].first(top_k)
    for part in parts[1:]:
        best = best.merged(part, top_k)
    assert pairs(best) == by_sorting(values, top_k)
    assert torch.equal(best.position, best.example % 7)
    assert torch.equal(best.places[..., 0], best.example)
    assert torch.equal(best.boxes[..., 3], best.example.float())
    assert best.tokens[1][0] == f"piece {int(best.example[1, 0])}"


# -- through a model -----------------------------------------------------------------------------------------------------------------------


def activations(model, inputs, site):
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=site)
    return cache[site]


@pytest.mark.parametrize(("pool", "batch_size"), [("max", 1), ("max", 7), ("mean", 4), ("mean", 64)])
def test_neurons_of_a_vision_tower(pool, batch_size):
    model, entry = hooked("vit")
    inputs = entry.inputs(model.module, batch=20)
    site = "vision.blocks.0.mlp.hook_post"
    value = activations(model, inputs, site)
    pooled = value.max(1).values if pool == "max" else value.mean(1)
    found = max_activating_examples(model, inputs, site, top_k=6, pool=pool, batch_size=batch_size)
    wanted = by_sorting(pooled, 6)
    assert found.example.tolist() == [[example for _, example in unit] for unit in wanted]
    torch.testing.assert_close(found.values, torch.tensor([[v for v, _ in unit] for unit in wanted]))
    torch.testing.assert_close(found.average, pooled.double().mean(0))
    torch.testing.assert_close(found.maximum, pooled.double().max(0).values)
    torch.testing.assert_close(found.active, (value > 0).double().mean((0, 1)))
    assert (found.count, found.n_positions, found.unit_kind) == (20, 20 * 17, "neuron")
    tokens = model.tokens(inputs)["vision"]
    for unit in range(0, 40, 9):
        for rank in range(6):
            example, position = int(found.example[unit, rank]), int(found.position[unit, rank])
            assert position == int(value[example, :, unit].argmax())
            assert found.tokens[unit][rank] == tokens.labels(example)[position]
            assert found.places[unit, rank, 2:].tolist() == [
                tokens.patch_row[example, position], tokens.patch_col[example, position]
            ]  # fmt: skip
            assert bool(found.boxes[unit, rank].isnan().all()) == (position == 0)


def test_heads_are_ranked_by_the_length_of_what_they_write():
    model, entry = hooked("llava-siglip-qwen2")
    inputs = entry.inputs(model.module, batch=5)
    for site in ("language.blocks.1.attn.hook_z", "language.blocks.1.attn.hook_result"):
        found = max_activating_examples(model, inputs, site, top_k=3, batch_size=2, positions="text")
        value = activations(model, inputs, site).norm(dim=-1)
        text = model.tokens(inputs)["language"].mask("text")
        pooled = torch.stack([value[row, text[row]].max(0).values for row in range(5)])
        assert found.example.tolist() == [[example for _, example in unit] for unit in by_sorting(pooled, 3)]
        assert found.unit_kind == "head"
        assert (found.places == -1).any(-1).all()


def test_directions_and_encoders_make_units():
    model, entry = hooked("vit")
    inputs = entry.inputs(model.module, batch=6)
    site = "vision.blocks.1.hook_resid_post"
    directions = torch.randn(3, 24)
    by_direction = max_activating_examples(model, inputs, site, through=directions, top_k=4)
    by_encoder = max_activating_examples(
        model, inputs, site, through=SimpleNamespace(encode=lambda x: x @ directions.T), top_k=4
    )
    same(by_direction, by_encoder)
    layer = torch.nn.Linear(24, 3, bias=False)
    layer.weight.data = directions
    for through in (directions.numpy(), lambda x: x @ directions.T, layer):
        same(by_direction, max_activating_examples(model, inputs, site, through=through, top_k=4))
    assert (by_direction.unit_kind, by_encoder.unit_kind) == ("direction", "feature")
    plain = max_activating_examples(model, inputs, site, top_k=4)
    axis = max_activating_examples(model, inputs, site, through=torch.eye(24)[5], top_k=4)
    assert torch.equal(axis.example[0], plain.example[5])
    some = max_activating_examples(model, inputs, site, units=[5, 2], top_k=4)
    assert some.axes["unit"] == [5, 2]
    assert torch.equal(some.values[0], plain.values[5])
    assert plain.unit_kind == "coordinate"


def test_several_layers_in_one_pass():
    model, entry = hooked("vit")
    inputs = entry.inputs(model.module, batch=6)
    found = max_activating_examples(model, inputs, "vision.blocks.*.mlp.hook_post", top_k=3, units=[0, 7])
    assert found.axes["unit"] == [f"{layer}.{unit}" for layer in range(model.vision.cfg.n_layers) for unit in (0, 7)]
    alone = max_activating_examples(model, inputs, "vision.blocks.1.mlp.hook_post", top_k=3, units=[7])
    assert torch.equal(found.values[found.row("1.7")], alone.values[0])
    assert found.plot(units="1.7").data


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_a_thousand_pictures_equal_a_full_sort(pool):
    model, entry = hooked("vit")
    pixels = entry.inputs(model.module, batch=2)["pixel_values"]
    pixels = torch.randn(1000, *pixels.shape[1:], generator=torch.Generator().manual_seed(0))
    seen = []

    def coarse(x):
        # Few distinct values, so that most ranks are decided between equals.
        seen.append((x[:, :4] * 1.5).round())
        return seen[-1]

    found = max_activating_examples(
        model, {"pixel_values": pixels}, "vision.hook_embed", through=coarse, pool=pool, top_k=25, batch_size=64
    )
    values = torch.stack(seen)
    assert len(values) == 1000
    pooled = values.max(1).values if pool == "max" else values.sum(1) / values.shape[1]
    assert len(pooled.unique()) < 200
    assert pairs(found) == by_sorting(pooled, 25)
    for unit, row in enumerate(found.example.tolist()):
        # The site begins behind the class token.
        assert found.position[unit].tolist() == [1 + int(values[example, :, unit].argmax()) for example in row]


def test_max_and_mean_prefer_different_examples():
    model, entry = hooked("vit")
    inputs = entry.inputs(model.module, batch=2)
    weights = torch.randn(24)
    bright = (model.vision.W_E @ weights).view(3, 4, 4)
    pixels = torch.zeros(2, 3, 16, 16)
    pixels[0, :, 4:8, 8:12] = 10 * bright
    pixels[1] = 3 * bright.repeat(1, 4, 4)
    data = {**inputs, "pixel_values": pixels}
    once, everywhere = (
        max_activating_examples(model, data, "vision.hook_embed", through=weights, pool=pool, top_k=1)
        for pool in ("max", "mean")
    )
    assert once.example.tolist() == [[0]]
    assert everywhere.example.tolist() == [[1]]
    assert once.tokens == [["r1c2"]]
    assert once.boxes[0, 0].tolist() == [0.5, 0.25, 0.75, 0.5]


def test_the_first_of_equal_examples_wins():
    model, entry = hooked("vit")
    image = entry.inputs(model.module, batch=1)
    found = max_activating_examples(model, [image] * 9, "vision.blocks.0.mlp.hook_post", top_k=4, batch_size=1)
    assert (found.example == torch.arange(4)).all()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_never_wins(padding):
    model, entry = hooked("llava-clip-llama")
    inputs = entry.inputs(model.module, batch=4, padding=padding)
    tokens = model.tokens(inputs)["language"]
    padded = tokens.mask("padding")
    assert padded.any()
    site = "language.blocks.0.hook_resid_post"
    value = activations(model, inputs, site)
    # Directions along which a padding position would be far ahead.
    directions = value[padded] - value[~padded].mean(0)
    tempted = (value @ directions.T).flatten(0, 1).max(0).indices
    assert padded.flatten()[tempted].any()
    for pool in ("max", "mean"):
        found = max_activating_examples(model, inputs, site, through=directions, pool=pool, top_k=4)
        assert not padded[found.example, found.position].any()
        pooled = torch.stack(
            [
                part.max(0).values if pool == "max" else part.mean(0)
                for part in ((value[row, ~padded[row]] @ directions.T) for row in range(4))
            ]
        )
        torch.testing.assert_close(found.values, pooled.T.sort(dim=1, descending=True).values, atol=1e-5, rtol=1e-4)
        assert found.n_positions == int((~padded).sum())


@pytest.mark.parametrize("name", ["llava-next-mistral", "pi0", "llava-clip-llama"])
def test_rows_of_one_example_compete_and_boxes_are_shares_of_its_image(name):
    model, entry = hooked(name)
    inputs = entry.inputs(model.module, batch=3, **({"images_per_prompt": 2} if name == "llava-clip-llama" else {}))
    site = "vision.blocks.0.mlp.hook_post"
    tokens = model.tokens(inputs)["vision"]
    value = activations(model, inputs, site)
    assert len(value) > 3
    patches = tokens.mask("patch")
    pooled = torch.stack(
        [
            torch.cat([value[row, patches[row]] for row in range(len(value)) if tokens.example[row] == example])
            .max(0)
            .values
            for example in range(3)
        ]
    )
    found = max_activating_examples(model, inputs, site, top_k=2, positions="patch", batch_size=2)
    assert found.example.tolist() == [[example for _, example in unit] for unit in by_sorting(pooled, 2)]
    assert found.n_positions == int(patches.sum())
    own = [[row for row in range(len(value)) if tokens.example[row] == example] for example in range(3)]
    means = torch.stack([torch.cat([value[row, patches[row]] for row in rows]).mean(0) for rows in own])
    averaged = max_activating_examples(model, inputs, site, top_k=3, positions="patch", pool="mean", batch_size=2)
    torch.testing.assert_close(averaged.values, means.T.sort(dim=1, descending=True).values, atol=1e-5, rtol=1e-4)
    assert (found.places >= 0).all()
    shares = box_shares(tokens)
    whole = torch.from_numpy(tokens.tile == 0) & patches if name == "llava-next-mistral" else patches
    assert float(shares[whole].min()) == 0.0
    assert float(shares[whole].max()) == 1.0
    rows, columns = model.vision.cfg.grid
    for row, position in whole.nonzero().tolist()[::5]:
        r, c = tokens.patch_row[row, position], tokens.patch_col[row, position]
        torch.testing.assert_close(
            shares[row, position], torch.tensor([c / columns, r / rows, (c + 1) / columns, (r + 1) / rows]).float()
        )


def test_sites_without_positions_have_no_place():
    model, entry = hooked("clip-vision-projection")
    found = max_activating_examples(model, entry.inputs(model.module, batch=4), "vision.hook_readout", top_k=2)
    assert (found.position == -1).all()
    assert (found.places == -1).all()
    assert found.boxes.isnan().all()
    assert found.n_positions == 4


# -- halves, interruptions, labels ---------------------------------------------------------------------------------------------------------


def test_two_halves_merge_into_the_whole(tmp_path):
    model, entry = hooked("vit")
    inputs = entry.inputs(model.module, batch=16)
    pixels = inputs["pixel_values"]
    pixels[8:] = pixels[:8]
    labels = [["a", "b", "c"][n % 3] for n in range(8)] + ["d"] * 8
    site = "vision.blocks.0.mlp.hook_post"
    whole = max_activating_examples(model, inputs, site, labels=labels, top_k=5, batch_size=8)
    halves = [
        max_activating_examples(
            model, {"pixel_values": pixels[s : s + 8]}, site, labels=labels[s : s + 8], top_k=5, start=s, batch_size=8
        )
        for s in (0, 8)
    ]
    first = MaxActivatingExamples.load(halves[0].save(tmp_path / "half.npz"))
    for merged in (first.merge(halves[1]), halves[1].merge(first)):
        same(merged, whole)
        assert merged.classes == ["a", "b", "c", "d"]
        torch.testing.assert_close(merged.selectivity, whole.selectivity, equal_nan=True)
    with pytest.raises(InputError, match="start=8"):
        first.merge(first)
    with pytest.raises(InputError, match="differ in pool"):
        first.merge(max_activating_examples(model, inputs, site, labels=labels, top_k=5, pool="mean", start=20))
    with pytest.raises(InputError, match="only one of them has labels"):
        first.merge(max_activating_examples(model, inputs, site, top_k=5, start=20))


def test_an_interruption_keeps_what_was_seen():
    model, entry = hooked("vit")
    images = [entry.inputs(model.module, batch=1, seed=seed) for seed in range(6)]
    site = "vision.blocks.0.mlp.hook_post"

    def stopped(after):
        yield from images[:after]
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="stopped by hand after 3 examples"):
        part = max_activating_examples(model, stopped(4), site, top_k=3, batch_size=1)
    whole = max_activating_examples(model, images[:3], site, top_k=3, batch_size=1)
    same(part, whole)
    assert part.interrupted
    assert not whole.interrupted
    assert "stopped by hand" in part.plot().layout.title.text
    with pytest.raises(KeyboardInterrupt):
        max_activating_examples(model, stopped(0), site)
    assert not model.engine.stack
    assert not model.engine.handles


def test_an_interrupted_index_is_resumed_from_its_file(tmp_path):
    model, entry = hooked("vit")
    images = [entry.inputs(model.module, batch=1, seed=seed) for seed in range(9)]
    site = "vision.blocks.0.mlp.hook_post"

    def stopped():
        yield from images[:5]
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="stopped by hand after 4 examples"):
        part = max_activating_examples(model, stopped(), site, top_k=3, batch_size=2)
    part = MaxActivatingExamples.load(part.save(tmp_path / "part.safetensors"))
    first = part.ranges[-1][1]
    rest = max_activating_examples(model, images[first:], site, top_k=3, batch_size=2, start=first)
    whole = max_activating_examples(model, images, site, top_k=3, batch_size=2)
    same(part.merge(rest), whole)


def test_the_frame_says_which_example_and_where():
    model, entry = hooked("vit")
    inputs = entry.inputs(model.module, batch=6)
    found = max_activating_examples(model, inputs, "vision.blocks.0.mlp.hook_post", top_k=2, labels=["a", "b", "c"] * 2)
    frame = found.to_frame()
    row = frame[(frame["unit"] == 7) & (frame["rank"] == 2)].iloc[0]
    assert row["example"] == int(found.example[7, 1])
    assert row["position"] == int(found.position[7, 1])
    assert row["token"] == found.tokens[7][1]
    assert row["preferred"] == found.preferred[7]
    assert row["selectivity"] == pytest.approx(float(found.selectivity[7]), nan_ok=True)
    assert "6 examples, 102 positions" in found.highlights()["seen"]


def test_memory_does_not_grow_with_the_data_set():
    """What waits between batches is top_k rows of every unit, whatever came by."""
    model, entry = hooked("vit")
    site = "vision.blocks.0.mlp.hook_post"
    held = []
    original = Best.merged

    def watched(self, other, top_k):
        merged = original(self, other, top_k)
        held.append((self.values.shape[1], other.values.shape[1], merged.values.shape[1]))
        return merged

    images = (entry.inputs(model.module, batch=4, seed=seed) for seed in range(6))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Best, "merged", watched)
        max_activating_examples(model, images, site, top_k=3, batch_size=4)
    assert held == [(3, 3, 3)] * 5


def by_hand(class_means, counts):
    means = torch.tensor(class_means, dtype=torch.float64)
    units = means.shape[1]
    return MaxActivatingExamples(
        values=torch.zeros(units, 1), axes={"unit": list(range(units)), "rank": [1]},
        classes=["a", "b", "c"], class_means=means, class_counts=torch.tensor(counts),
    )  # fmt: skip


def test_selectivity_and_entropy_of_known_means():
    index = by_hand([[3.0, 2.0, 0.0, 1.0], [0.0, 2.0, 0.0, 0.5], [0.0, 2.0, 0.0, 0.5]], [4, 4, 4])
    assert index.selectivity.tolist() == pytest.approx([1.0, 0.0, math.nan, 1 / 3], nan_ok=True)
    half = -(0.5 * math.log(0.5) + 0.5 * math.log(0.25))
    assert index.class_entropy.tolist() == pytest.approx([0.0, math.log(3), math.nan, half], nan_ok=True)
    assert index.preferred[0] == "a"
    unseen = by_hand([[1.0], [math.nan], [3.0]], [2, 0, 2])
    assert unseen.selectivity.tolist() == [0.5]
    assert unseen.preferred == ["c"]
    with pytest.raises(InputError, match="labels"):
        _ = by_hand([[1.0], [1.0], [1.0]], [2, 0, 0]).selectivity


@pytest.fixture(scope="module")
def shapes():
    model = cv.organisms.load("shapes-vit")
    drawn = sample_largest(120, 5)
    pictures = [scene.pixels for scene, _ in drawn]
    return model, model.inputs(images=[scene.image for scene, _ in drawn]), pictures, [shape for _, shape in drawn]


def test_class_means_are_means_of_pooled_values_and_the_sheet_shows_them(shapes):
    model, inputs, pictures, labels = shapes
    site = "vision.blocks.1.mlp.hook_post"
    found = max_activating_examples(model, inputs, site, labels=labels, top_k=8, positions="cls")
    value = activations(model, inputs, site)[:, 0]
    for number, label in enumerate(found.classes):
        own = torch.tensor([other == label for other in labels])
        torch.testing.assert_close(
            found.class_means[number], value[own].double().clamp(min=0).mean(0), atol=1e-5, rtol=1e-4
        )
        assert int(found.class_counts[number]) == int(own.sum())
    assert float(found.selectivity.nan_to_num(0.0).max()) > 0.5
    patches = max_activating_examples(model, inputs, site, labels=labels, top_k=8, positions="patch")
    sheet = patches.plot(units=[3, 11], pictures=pictures, count=4)
    assert len(sheet.data) == 8
    assert len(sheet.layout.shapes) == 8
    assert len(patches.plot(pictures=pictures).data) == 3 * 8
    assert len(patches.plot(pictures=dict(enumerate(pictures)), units=3).data) == 8
    with pytest.raises(InputError, match="no picture of example"):
        patches.plot(units=3, pictures={})
    with pytest.raises(InputError, match="no unit"):
        patches.plot(units=999)
    with pytest.raises(InputError, match="count=0"):
        patches.plot(count=0)


def test_words_stand_in_for_patches():
    model = cv.organisms.load("shapes-llava")
    drawn = cv.data.sample_questions(6, seed=2)
    inputs = model.inputs(images=[s.image for s, _ in drawn], text=[q.prompt for _, q in drawn])
    found = max_activating_examples(model, inputs, "language.blocks.1.mlp.hook_post", positions="text", top_k=3)
    assert {piece for unit in found.tokens for piece in unit} <= {p for row in model.to_str_tokens(inputs) for p in row}
    sheet = found.plot(units=[0], pictures=[s.pixels for s, _ in drawn])
    assert not sheet.layout.shapes
    assert any(found.tokens[0][0].strip("<>") in (note.text or "") for note in sheet.layout.annotations)


@pytest.mark.parametrize(
    ("site", "options", "message"),
    [
        ("vision.blocks.0.mlp.hook_post", {"pool": "sum"}, "pool"),
        ("vision.blocks.0.mlp.hook_post", {"top_k": 0}, "top_k"),
        ("vision.blocks.0.mlp.hook_post", {"units": [0, 400]}, "not all among"),
        ("vision.blocks.0.mlp.hook_post", {"labels": ["a"]}, "1 labels"),
        ("vision.blocks.0.mlp.hook_post", {"labels": [0.5, 0.5]}, "float"),
        ("vision.blocks.0.mlp.hook_post", {"through": torch.randn(2, 5)}, "5 coordinates"),
        ("vision.blocks.0.mlp.hook_post", {"through": object()}, "encode"),
        ("vision.blocks.0.mlp.hook_post", {"top_k": 2.5}, "top_k"),
        ("vision.blocks.0.mlp.hook_post", {"start": 1.5}, "start"),
        ("vision.blocks.0.mlp.hook_post", {"units": []}, "at least one unit"),
        ("vision.blocks.0.mlp.hook_post", {"units": [3, 3]}, "each once"),
        ("vision.blocks.0.mlp.hook_post", {"threshold": math.nan}, "threshold"),
        ("vision.blocks.0.mlp.hook_post", {"through": lambda x: x[:, 0]}, "tensor \\[pos feature\\]"),
        ("vision.blocks.0.mlp.hook_post", {"through": lambda x: (x, x)}, "gave tuple"),
        ("vision.blocks.0.attn.hook_z", {"through": torch.randn(2, 5)}, "has heads"),
        ("vision.blocks.0.attn.hook_pattern", {}, "number per query"),
        ("vision.blocks.0.*", {}, "one kind"),
        ("vision.blocks.0.mlp.hook_post", {"positions": "text"}, "its kinds"),
        (
            "vision.blocks.0.mlp.hook_post",
            {"through": SimpleNamespace(encode=lambda x: x * torch.nan)},
            "not finite on example 0",
        ),
    ],
)
def test_meaningless_requests_are_refused(site, options, message):
    model, entry = hooked("vit")
    with pytest.raises(InputError, match=message):
        max_activating_examples(model, entry.inputs(model.module, batch=2), site, **options)
