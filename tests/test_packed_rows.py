"""Images of different sizes in one sequence without an axis of rows: geometry, edits and sweeps, against values worked out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import HookError, InputError
from circuitvision.families import Family, Readout, TowerSpec
from circuitvision.model import packing, spec
from circuitvision.model.packing import sequences
from tests import synthetic
from tests.synthetic import GRIDS, MERGE, PATCH
from tests.test_merged_tokens import FIRST, by_hand, changed_positions, exact
from tests.zoo.weights import randomise

pytestmark = pytest.mark.usefixtures("tables")
LENGTHS = [rows * columns for rows, columns in GRIDS]
"""24, 8, 12 and 16 patches; 6, 2, 3 and 4 merged positions."""


def two_prompts() -> tuple[Any, cv.HookedModel, dict[str, Any]]:
    """Two prompts of two images each: grids 4×6 and 2×4, then 6×2 and 4×4."""
    return exact(synthetic.Packing, batch=2, images_per_prompt=2)


def alone(module: Any, inputs: dict[str, Any], image: int) -> Any:
    """What the tower makes of one image by itself, ``[position width]``."""
    first = sum(LENGTHS[:image])
    return module.eye(inputs["pixel_values"][first : first + LENGTHS[image]], [GRIDS[image]])


# ---- rows


def test_hooks_see_a_row_per_image() -> None:
    """Every row is what the tower computes of that image alone; what fills up is 0."""
    module, model, inputs = two_prompts()
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, ["projector.*", "vision.blocks.1.*", "vision.blocks.1.attn.*"])
        seen = cache["projector.hook_in"]
        assert seen.shape == (4, 24, 12)
        assert cache["projector.hook_out"].shape == (4, 6, 16)
        for image, length in enumerate(LENGTHS):
            own = alone(module, inputs, image)
            torch.testing.assert_close(seen[image, :length], own, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(
                cache["projector.hook_out"][image, : length // 4], module.merger(own), rtol=1e-10, atol=1e-12
            )
            pattern = cache["vision.blocks.1.attn.hook_pattern"][image]
            torch.testing.assert_close(pattern[:, :length, :length].sum(-1), torch.ones(3, length).double())
            for site, value in cache.items():
                rest = value[image, length // (4 if site == "projector.hook_out" else 1) :]
                if "pattern" in site or "scores" in site:
                    rest = torch.cat([value[image, :, length:].flatten(), value[image, :, :, length:].flatten()])
                    rest = rest - (torch.finfo(value.dtype).min if "scores" in site else 0.0)
                assert not rest.any(), site


def test_the_token_map_names_rows_images_and_examples() -> None:
    _, model, inputs = two_prompts()
    maps = model.tokens(inputs)
    vision, projector, language = maps["vision"], maps["projector"], maps["language"]
    assert vision.example.tolist() == projector.example.tolist() == [0, 0, 1, 1]
    assert vision.views.image.tolist() == [0, 1, 0, 1]
    assert [(vision.kind[row] == "patch").sum() for row in range(4)] == LENGTHS
    assert [(vision.kind[row] == "padding").sum() for row in range(4)] == [24 - length for length in LENGTHS]
    # The processor cuts block by block: the third patch of a row is the first of the second line of the first block.
    assert (vision.patch_row[0, :9].tolist(), vision.patch_col[0, :9].tolist()) == (
        [0, 0, 1, 1, 0, 0, 1, 1, 0],
        [0, 1, 0, 1, 2, 3, 2, 3, 4],
    )
    assert vision.box[2, 6].tolist() == [0, 12, 4, 16]
    assert (vision.patch_row[2, 6], vision.patch_col[2, 6]) == (3, 0)
    assert language.kind[1].tolist() == ["text"] * 2 + ["patch"] * 3 + ["text"] + ["patch"] * 4 + ["text"] * 3 + [
        "padding"
    ]
    assert language.patches.of(1, FIRST + 2) == [(2, 4, 0, 0.25), (2, 4, 1, 0.25), (2, 5, 0, 0.25), (2, 5, 1, 0.25)]
    assert language.box[1, FIRST + 2].tolist() == [0, 16, 8, 24]
    assert projector.box[3, 3].tolist() == [8, 8, 16, 16]
    assert projector.kind[2].tolist() == ["patch"] * 3 + ["padding"] * 3


def test_paint_on_a_patch_changes_the_positions_that_claim_it() -> None:
    _, model, inputs = two_prompts()
    maps = model.tokens(inputs)
    sets = maps["vision"].patches
    for image, r, c in ((0, 0, 2), (0, 3, 5), (1, 1, 1), (2, 5, 0), (3, 2, 3)):
        entry = np.flatnonzero((sets.row == image) & (sets.patch_row == r) & (sets.patch_col == c))
        assert len(entry) == 1
        painted = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
        # Where the patch is in the sequence: blocks row by row, cells of a block row by row.
        columns = GRIDS[image][1] // MERGE
        at = ((r // MERGE) * columns + c // MERGE) * MERGE**2 + (r % MERGE) * MERGE + c % MERGE
        painted["pixel_values"][sum(LENGTHS[:image]) + at] += 1.0
        assert changed_positions(model, inputs, painted, "vision.hook_embed") == {(image, int(sets.position[entry[0]]))}
        for site, tower in (("projector.hook_out", "projector"), ("language.hook_input", "language")):
            claimed = {
                (row, at)
                for row, at in np.ndindex(*maps[tower].kind.shape)
                if (image, r, c, 0.25) in maps[tower].patches.of(row, at)
            }
            assert len(claimed) == 1
            assert changed_positions(model, inputs, painted, site) == claimed


def test_the_same_pictures_give_what_the_model_with_rows_gives() -> None:
    """Equal pictures, equal weights: packed or not, the towers agree, position by position of the grid."""
    synthetic.register(synthetic.Merging)
    rows, inputs = synthetic.build(synthetic.Merging).double(), synthetic.merged_inputs(None, 2, dtype=torch.float64)
    module, model, _ = two_prompts()
    held = {name: value for name, value in rows.state_dict().items() if name != "eye.patches.weight"}
    module.load_state_dict({**held, "eye.patches.weight": rows.eye.patches.weight.flatten(1)})
    same = {**inputs, **synthetic.packed(list(inputs["pixel_values"]))}
    with torch.no_grad():
        torch.testing.assert_close(model(same), rows(**inputs).logits, rtol=1e-9, atol=1e-11)
        site = "vision.blocks.1.hook_resid_post"
        other = cv.HookedModel(rows).run_with_cache(inputs, site)[1][site]
        found = model.run_with_cache(same, site)[1][site]
    tokens = model.tokens(same)["vision"]
    at = tokens.patch_row * 6 + tokens.patch_col
    torch.testing.assert_close(found, other.take_along_dim(torch.from_numpy(at)[..., None], 1), rtol=1e-9, atol=1e-11)


# ---- mutants


def test_mutant_that_takes_rows_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    there = sequences._there
    monkeypatch.setattr(sequences, "_there", lambda lengths, device: there(list(lengths)[::-1], device))
    with pytest.raises(AssertionError):
        test_hooks_see_a_row_per_image()


def test_mutant_that_counts_patches_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.Packed, "order", packing.Packing.order)
    with pytest.raises(AssertionError):
        test_paint_on_a_patch_changes_the_positions_that_claim_it()


def test_mutant_that_gives_every_image_to_the_first_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.Packed, "owners", lambda self, run: [0] * len(run.tiles))
    with pytest.raises((AssertionError, InputError)):
        test_the_token_map_names_rows_images_and_examples()


# ---- edits


def row_of(image: int, positions: Any = slice(None), lengths: list[int] = LENGTHS) -> Any:
    """Where positions of an image stand in the sequence."""
    return sum(lengths[:image]) + torch.arange(lengths[image])[positions]


def test_edits_by_image_region_and_patch_hit_the_right_rows() -> None:
    module, model, inputs = two_prompts()
    vision = model.tokens(inputs)["vision"]
    block = module.eye.blocks[0]
    site = "vision.blocks.0.hook_resid_post"

    def write(entries: Any) -> Callable[[Tensor], None]:
        return lambda value: value.__setitem__(entries, 0.7)

    second = torch.cat([row_of(1), row_of(3)])
    # The box over x 0…8, y 0…4 meets the first two patches of every first image: cells 0 and 1 of block 0.
    box = torch.cat([row_of(0, [0, 1]), row_of(2, [0, 1])])
    # Patch (3, 0): cell 2 of block (1, 0), which is block 3 of three columns, 1 of one column, 2 of two.
    patch = torch.cat([row_of(0, [3 * 4 + 2]), row_of(2, [1 * 4 + 2]), row_of(3, [2 * 4 + 2])])
    cases: list[tuple[Any, Any]] = [
        (vision.image(1), second),
        (cv.regions.box((0, 0, 8, 4)), box),
        (vision.select("patch").patch(3, 0), patch),
        (5, torch.cat([row_of(image, [5]) for image in range(4)])),
        (9, torch.cat([row_of(image, [9]) for image in (0, 2, 3)])),
        (None, torch.arange(sum(LENGTHS))),
    ]
    with torch.no_grad():
        for positions, entries in cases:
            found = model.run(inputs, edits.overwrite(site, range(12), 0.7, positions=positions))
            assert torch.equal(found, by_hand(module, block, write(entries), inputs)), positions
        merged = [length // 4 for length in LENGTHS]
        entries = torch.cat([row_of(1, slice(None), merged), row_of(3, slice(None), merged)])
        images = model.tokens(inputs)["projector"].image(1)
        found = model.run(inputs, edits.overwrite("projector.hook_out", range(16), 0.7, positions=images))
        assert torch.equal(found, by_hand(module, module.merger, write(entries), inputs))


def test_edits_of_patterns_and_of_attention_stay_inside_their_image() -> None:
    module, model, inputs = two_prompts()
    site = "vision.blocks.1.attn.hook_pattern"
    attention = module.eye.blocks[1].attn
    with torch.no_grad():
        clean = model(inputs)
        assert torch.equal(model.run_with_hooks(inputs, [(site, lambda value, hook: value.clone())]), clean)
        # Looking at the first patch alone: z is that patch's value, image by image.
        values = [attention.v(module.eye.blocks[1].norm1(alone_stream(module, inputs, image))) for image in range(4)]
        one = torch.cat([value[:1].expand(len(value), -1) for value in values])
        handle = attention.o.register_forward_pre_hook(lambda part, args: one)
        expected = module(**inputs).logits
        handle.remove()

        def first(value: Tensor, hook: Any) -> Tensor:
            return torch.zeros_like(value).index_fill_(-1, torch.tensor(0), 1.0)

        torch.testing.assert_close(model.run_with_hooks(inputs, [(site, first)]), expected, rtol=1e-10, atol=1e-12)
        # Nothing may look at the first patch: as if its score were the lowest number there is.
        hidden = lambda value, hook: value.index_fill(-1, torch.tensor(0), torch.finfo(value.dtype).min)  # noqa: E731
        expected = model.run_with_hooks(inputs, [("vision.blocks.1.attn.hook_attn_scores", hidden)])
        blocked = model.run(inputs, edits.block_attention("vision", keys=0, layers=[1]))
        torch.testing.assert_close(blocked, expected, rtol=1e-10, atol=1e-12)
        assert (blocked - clean).abs().max() > 1e-3


def alone_stream(module: Any, inputs: dict[str, Any], image: int) -> Tensor:
    """What enters block 1 of the tower, of one image by itself."""
    kept: list[Tensor] = []
    handle = module.eye.blocks[1].register_forward_pre_hook(lambda part, args: kept.append(args[0]))
    alone(module, inputs, image)
    handle.remove()
    return kept[0]


GROUPS = [
    edits.ablate("vision.blocks.0.attn.hook_z", heads=1, positions=[3, 7]),
    edits.ablate("vision.blocks.1.hook_mlp_out", positions=cv.regions.box((0, 0, 9, 9))),
    edits.scale("vision.hook_embed", 0.5, positions=5),
    edits.ablate("vision.blocks.0.hook_resid_mid", "mean", positions="patch", average="patch"),
    edits.scale_attention("vision", keys=cv.regions.box((0, 0, 9, 9)), factor=0.25, layers=[1]),
    edits.ablate("projector.hook_in", positions=2),
    edits.ablate("projector.hook_out", positions=cv.regions.box((0, 0, 9, 9))),
    edits.ablate("language.blocks.0.hook_attn_out", positions=cv.regions.box((0, 0, 9, 9))),
]


@pytest.mark.parametrize("batch_size", ["auto", 1, 3])
def test_a_sweep_is_the_loop_and_results_align_by_example(batch_size: Any) -> None:
    _, model, inputs = exact(synthetic.Packing, batch=3, images_per_prompt=2, seed=1)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -2, 3]

    with torch.no_grad():
        swept = model.sweep(inputs, GROUPS, metric, progress=False, batch_size=batch_size)
        naive = torch.stack([metric(model.run(inputs, group)) for group in GROUPS])
        torch.testing.assert_close(swept.values, naive, rtol=1e-8, atol=1e-10)
        assert not any(plan.in_full for plan in swept.plan), swept.plan
        assert (naive - metric(model(inputs))).abs().min() > 1e-6
        own = [group for group in GROUPS if "mean" not in repr(group)]
        kept = [number for number, group in enumerate(GROUPS) if "mean" not in repr(group)]
        width = inputs["input_ids"].shape[1]
        for example in range(3):
            one = model.family.packing.take(model, inputs, [example])
            assert one["input_ids"].shape == (1, width)
            found = model.sweep(one, own, metric, progress=False).values[:, 0]
            torch.testing.assert_close(found, naive[kept, example], rtol=1e-6, atol=1e-8)


def test_inputs_are_taken_apart_by_the_patches_of_an_example() -> None:
    _, model, inputs = two_prompts()
    taken = model.family.packing.take(model, inputs, [1])
    assert torch.equal(taken["pixel_values"], inputs["pixel_values"][32:])
    assert taken["image_grid_thw"].tolist() == [[1, 6, 2], [1, 4, 4]]
    twice = model.family.packing.take(model, inputs, [1, 0, 1])
    assert model.tokens(twice)["vision"].example.tolist() == [0, 0, 1, 1, 2, 2]
    with torch.no_grad():
        torch.testing.assert_close(model(twice), model(inputs)[[1, 0, 1]], rtol=1e-9, atol=1e-11)


def test_data_sets_and_gradients_of_packed_rows() -> None:
    """Examples made by hand run in batches, a value per patch keeps its example, and gradients reach the rows they belong to."""
    _, model, inputs = two_prompts()
    parts = [model.family.packing.take(model, inputs, [number]) for number in (0, 1)]
    site = "vision.blocks.0.hook_resid_post"
    with torch.no_grad():
        found = cv.readout.collect(model, parts, [site], positions="patch", per_position=True, batch_size=2)
        _, cache = model.run_with_cache(inputs, site)
    there = torch.from_numpy(model.tokens(inputs)["vision"].kind == "patch")
    torch.testing.assert_close(found[site].double(), cache[site][there], rtol=1e-5, atol=1e-6)
    _, graded = model.run_with_cache(inputs, site, incl_bwd=True, metric=lambda logits: logits[0, -1, 3])
    slope = graded[f"{site}_grad"]
    assert slope.shape == (4, 24, 12)
    assert not slope[2:].any()
    assert not slope[~there].any()
    assert (slope[:2][there[:2]].abs().sum(-1) > 0).all()


def test_what_is_written_to_cells_that_fill_up_is_dropped() -> None:
    _, model, inputs = two_prompts()
    there = torch.from_numpy(model.tokens(inputs)["vision"].kind == "patch")
    with torch.no_grad():
        clean = model(inputs)
        for site in ("hook_resid_pre", "attn.hook_q", "hook_resid_mid", "ln2.hook_scale", "attn.hook_result"):

            def write(value: Tensor, hook: Any) -> Tensor:
                mask = there.view(*there.shape, *[1] * (value.ndim - 2))
                return torch.where(mask, value, torch.full_like(value, 5.0))

            assert torch.equal(model.run_with_hooks(inputs, [(f"vision.blocks.1.{site}", write)]), clean), site


def test_generation_and_copies_of_the_wrapper() -> None:
    """A copy tells the lengths of its own runs, and text alone runs without the tower."""
    _, model, inputs = two_prompts()
    twin = copy.deepcopy(model)
    site = "vision.blocks.0.hook_resid_post"
    with torch.no_grad():
        _, cache = twin.run_with_cache(inputs, site)
        assert torch.equal(cache[site], model.run_with_cache(inputs, site)[1][site])
        text = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        assert list(model.tokens(text)) == ["language"]
        assert model(text).shape == (1, 3, synthetic.VOCABULARY)


# ---- a tower by itself


class PackedEye(PreTrainedModel):
    config_class = synthetic.EyeConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.eye, self.head = synthetic.Eye(config, True), nn.Linear(synthetic.WIDTH, 5)
        self.post_init()

    def forward(self, pixel_values: Any = None, image_grid_thw: Any = None, **_: Any) -> Any:
        grids = [(int(rows), int(columns)) for _, rows, columns in image_grid_thw.tolist()]
        parts = self.eye(pixel_values, grids).split([rows * columns for rows, columns in grids])
        return {"logits": self.head(torch.stack([part.mean(0) for part in parts]))}


def register_eye(readout: Readout | None) -> None:
    spec.register_family(
        Family(
            name="packed_eye",
            classes=("PackedEye",),
            output="logits",
            packing=packing.Packed(merge=MERGE),
            towers=(TowerSpec("vision", root="eye", stack=synthetic.STACK, readout=readout),),
        )
    )


def test_a_tower_by_itself_is_swept_image_by_image() -> None:
    """A classifier that pools every image for itself: an example is an image."""
    register_eye(None)
    model = cv.HookedModel(randomise(PackedEye(synthetic.EyeConfig()), "eye").double().eval())
    given = synthetic.packed_inputs(None, batch=4, dtype=torch.float64)
    inputs = {name: given[name] for name in ("pixel_values", "image_grid_thw")}

    def metric(logits: Tensor) -> Tensor:
        return logits[:, 2]

    groups = [edits.ablate(f"L{layer}H{head}") for layer in (0, 1) for head in range(3)]
    groups.append(edits.ablate("vision.blocks.1.hook_resid_pre", positions=model.tokens(inputs)["vision"].last()))
    with torch.no_grad():
        swept = model.sweep(inputs, groups, metric, progress=False)
        naive = torch.stack([metric(model.run(inputs, group)) for group in groups])
        alone = model.family.packing.take(model, inputs, [2])
        one = model.sweep(alone, groups[:6], metric, progress=False)
    torch.testing.assert_close(swept.values, naive, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(one.values[:, 0], naive[:6, 2], rtol=1e-8, atol=1e-10)
    assert not any(plan.in_full for plan in swept.plan), swept.plan


def test_mutant_that_repeats_the_sequence_inside_the_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps images apart knows nothing of the copies."""
    monkeypatch.setattr(packing.Packed, "rows_alone", True)
    with pytest.raises(HookError, match=r"180, 3, 4.*60 positions"):
        test_a_tower_by_itself_is_swept_image_by_image()


def test_pooling_of_a_sequence_is_refused_when_the_table_is_registered() -> None:
    with pytest.raises(InputError, match="is not covered"):
        register_eye(Readout(pool="mean"))


# ---- what is refused


def test_attention_called_for_every_image_has_no_pattern_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2-VL's way: the stream, q, k, v and z are as ever; scores and pattern are refused, not given for one image."""
    _, model, inputs = two_prompts()
    with torch.no_grad():
        clean, cache = model.run_with_cache(inputs, "vision.blocks.*.attn.hook_z")
        monkeypatch.setattr(synthetic.Attention, "calls_per_image", True)
        found, apart = model.run_with_cache(inputs, "vision.blocks.*.attn.hook_z")
        torch.testing.assert_close(found, clean, rtol=1e-9, atol=1e-11)
        for name in cache:
            torch.testing.assert_close(apart[name], cache[name], rtol=1e-9, atol=1e-11)
        for name in ("hook_pattern", "hook_attn_scores"):
            with pytest.raises(HookError, match="no pattern of all"):
                model.run_with_cache(inputs, f"vision.blocks.0.attn.{name}")
    assert not model.engine.handles


def test_a_table_that_calls_rows_a_sequence_is_noticed_in_the_first_run() -> None:
    """The wrong way round: the tower has an axis of images, and the packing says that it has none."""

    class Wrong(packing.Packed):
        def check_layout(self, run: Any) -> None:
            pass

        def grid(self, run: Any, row: int) -> tuple[int, int]:
            return 4, 6

        def tiles(self, run: Any) -> list[int]:
            return [1] * len(run.pixels)

    synthetic.register(synthetic.Merging, Wrong(merge=2))
    model = cv.HookedModel(synthetic.build(synthetic.Merging))
    inputs = synthetic.merged_inputs(model, 2)
    with torch.no_grad(), pytest.raises(HookError, match="does not say what the tower computes"):
        model.run_with_cache(inputs, "vision.blocks.0.hook_resid_post")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_grid_thw": None}, "image_grid_thw"),
        ({"image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 4], [1, 6, 2]])}, "60 patches.*44 of 3"),
        ({"image_grid_thw": torch.tensor([[2, 2, 6], [1, 2, 4], [1, 6, 2], [1, 4, 4]])}, "videos"),
        ({"image_grid_thw": torch.tensor([[1, 3, 8], [1, 2, 4], [1, 6, 2], [1, 4, 4]])}, "3x8 patches does not fall"),
        ({"pixel_values": torch.zeros(4, 3, 16, 24).double()}, "patch of all images"),
        ({"image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4], [1, 6, 2], [1, 4, 6]])}, "image tokens"),
    ],
)
def test_grids_that_do_not_fit_are_refused_before_the_run(change: dict[str, Any], says: str) -> None:
    _, model, inputs = two_prompts()
    given = {name: value for name, value in {**inputs, **change}.items() if value is not None}
    with pytest.raises(InputError, match=says):
        model(given)
    assert synthetic.SIZE[0] == PATCH * 4


# ---- read-outs


def test_the_tower_is_read_image_by_image() -> None:
    module, model, inputs = two_prompts()
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        last = cache["vision", "resid_post", 1]
        torch.testing.assert_close(model.vision.readout(last, cache), cache["projector.hook_out"])
        lens = cv.readout.logit_lens(model, cache, "vision", targets={3: 3})
        head = module.lm_head(module.language_model.norm(module.merger(alone(module, inputs, 2))))
        torch.testing.assert_close(lens.values[2, :3, 0, 2].double(), head[:, 3], rtol=1e-6, atol=1e-6)
        with pytest.raises(InputError, match="context=cache"):
            model.vision.readout(last)
    assert lens.kinds[2] == ["patch"] * 3 + ["padding"] * 3


def test_sites_of_a_sequence_are_not_those_of_a_module_alone() -> None:
    """nnsight reads modules as they are, so sites that are rows here are not offered there; those of the language tower are."""
    from circuitvision.interop.nnsight_view import nnsight_places

    _, model, _ = two_prompts()
    offered = nnsight_places(model)
    assert "language.blocks.0.attn.hook_z" in offered
    assert not [name for name in offered if name.startswith(("vision.", "projector."))]


@pytest.mark.parametrize("cls", synthetic.CLASSES, ids=lambda cls: cls.__name__)
def test_the_check_of_a_table_finds_nothing_wrong(cls: type[synthetic.Synthetic]) -> None:
    _, model, inputs = exact(cls, batch=2, images_per_prompt=2)
    found = cv.check_model(model, inputs, progress=False)
    assert found.ok, str(found)
