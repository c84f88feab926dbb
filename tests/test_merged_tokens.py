"""A connector that merges 2×2 patches into one prompt position: geometry, edits and sweeps, against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.model import packing
from tests import synthetic

pytestmark = pytest.mark.usefixtures("tables")
KINDS = [synthetic.Merging, synthetic.MergingBefore]
FIRST = 2
"""Where the first image token stands in a prompt of ``synthetic.prompts``."""


def exact(cls: type[synthetic.Synthetic], **options: Any) -> tuple[Any, cv.HookedModel, dict[str, Any]]:
    """The bare module, the wrapped one, and inputs in float64."""
    synthetic.register(cls)
    module = synthetic.build(cls).double()
    return module, cv.HookedModel(module), synthetic.CASES[cls.__name__].inputs(module, dtype=torch.float64, **options)


def by_hand(module: Any, part: Any, change: Callable[[Tensor], None], inputs: dict[str, Any]) -> Tensor:
    """The logits where ``change`` writes into a copy of what a module returns."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        change(changed)
        return changed

    handle = part.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return module(**inputs).logits
    finally:
        handle.remove()


# ---- geometry


@pytest.mark.parametrize("cls", KINDS)
def test_a_prompt_position_holds_its_block_of_patches(cls: type[synthetic.Synthetic]) -> None:
    """4×6 patches of 4×4 pixels, merged 2×2: position (R, C) of 2×3 holds rows 2R, 2R + 1 and columns 2C, 2C + 1."""
    _, model, inputs = exact(cls, batch=2, images_per_prompt=2)
    maps = model.tokens(inputs)
    assert list(maps) == ["vision", "projector", "language"]
    for example in (0, 1):
        for image in (0, 1):
            for number, (down, across) in enumerate(np.ndindex(2, 3)):
                position = FIRST + image * 7 + number
                row = 2 * example + image
                held = [(row, 2 * down + r, 2 * across + c, 0.25) for r in (0, 1) for c in (0, 1)]
                box = [8.0 * across, 8.0 * down, 8.0 * across + 8, 8.0 * down + 8]
                for tower, at in (("language", (example, position)), ("projector", (row, number))):
                    tokens = maps[tower]
                    assert tokens.patches.of(*at) == held
                    assert tokens.box[at].tolist() == box
                    assert tokens.tensor_box[at].tolist() == box
                    assert tokens.kind[at] == "patch"
                    assert tokens.patch_row[at] == tokens.patch_col[at] == -1
                    assert (tokens.image_number[at], tokens.tile[at]) == (image, 0)
    assert maps["projector"].example.tolist() == [0, 0, 1, 1]
    assert maps["language"].kind[0].tolist() == ["text"] * 2 + ["patch"] * 6 + ["text"] + ["patch"] * 6 + ["text"] * 3


def test_regions_are_the_positions_whose_block_they_meet() -> None:
    """One pixel at (x 9, y 3) is in block (0, 1); a box over x 6…17 meets all three columns of blocks."""
    _, model, inputs = exact(synthetic.Merging, batch=1)
    maps = model.tokens(inputs)
    for tower, first in (("language", FIRST), ("projector", 0)):
        assert maps[tower].in_box(9, 3, 10, 4) == [first + 1]
        assert maps[tower].in_box(6, 8, 17, 9) == [first + 3, first + 4, first + 5]
        found = cv.model.positions.Positions.of(cv.regions.box((6, 8, 17, 9))).resolve(maps[tower])
        assert found[0].nonzero().flatten().tolist() == [first + 3, first + 4, first + 5]
    assert maps["vision"].in_box(9, 3, 10, 4) == [2]
    assert model.positions("projector.hook_out", inputs) == list(range(6))
    assert model.positions("projector.hook_in", inputs) == list(range(24))
    _, before, _ = exact(synthetic.MergingBefore)
    assert before.positions("projector.hook_in", inputs) == list(range(6))


def silent(name: str = "vision") -> list[tuple[str, Any]]:
    """Hooks under which positions of a tower do not mix."""
    zero = lambda value, hook: torch.zeros_like(value)  # noqa: E731
    return [(f"{name}.blocks.*.hook_attn_out", zero)]


def changed_positions(
    model: cv.HookedModel, one: dict[str, Any], other: dict[str, Any], site: str
) -> set[tuple[int, int]]:
    found = []
    for inputs in (one, other):
        with torch.no_grad(), model.hooks(silent()):
            found.append(model.run_with_cache(inputs, site)[1][site])
    return {(int(row), int(at)) for row, at in (found[0] != found[1]).any(-1).nonzero()}


@pytest.mark.parametrize("cls", KINDS)
def test_paint_on_a_patch_changes_the_positions_that_claim_it(cls: type[synthetic.Synthetic]) -> None:
    _, model, inputs = exact(cls, batch=2)
    maps = model.tokens(inputs)
    for example, r, c in ((0, 0, 2), (0, 3, 5), (1, 1, 4), (1, 2, 1)):
        painted = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
        painted["pixel_values"][example, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] += 1.0
        assert changed_positions(model, inputs, painted, "vision.hook_embed") == {(example, 6 * r + c)}
        for site, tower in (("projector.hook_out", "projector"), ("language.hook_input", "language")):
            tokens = maps[tower]
            claimed = {
                (row, at)
                for row, at in np.ndindex(*tokens.kind.shape)
                if (example, r, c, 0.25) in tokens.patches.of(row, at)
            }
            assert len(claimed) == 1
            assert changed_positions(model, inputs, painted, site) == claimed


def test_mutant_that_numbers_positions_as_if_nothing_were_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = packing.Flat._blocks

    def in_order(self: Any, run: Any, image: int) -> Any:
        found = blocks(self, run, image)
        return packing.ImageTokens(
            found.newline, np.sort(found.position), found.source_row, np.arange(24), found.weight
        )

    monkeypatch.setattr(packing.Flat, "_blocks", in_order)
    with pytest.raises(AssertionError):
        test_paint_on_a_patch_changes_the_positions_that_claim_it(synthetic.Merging)
    with pytest.raises(AssertionError):
        test_regions_are_the_positions_whose_block_they_meet()


# ---- edits


@pytest.mark.parametrize("cls", KINDS)
def test_edits_behind_the_merge_count_merged_positions(cls: type[synthetic.Synthetic]) -> None:
    module, model, inputs = exact(cls, batch=2)
    merger, blocks = module.merger, module.language_model.layers

    def write(rows: Any, positions: Any) -> Callable[[Tensor], None]:
        return lambda value: value.__setitem__((rows, positions), 0.7)

    every, cases = slice(None), []
    cases.append((edits.overwrite("projector.hook_out", range(16), 0.7, positions=4), merger, write(every, 4)))
    box = cv.regions.box((6, 8, 17, 9))
    cases.append(
        (edits.overwrite("projector.hook_out", range(16), 0.7, positions=box), merger, write(every, [3, 4, 5]))
    )
    site = "language.blocks.0.hook_resid_post"
    cases.append((edits.overwrite(site, range(16), 0.7, positions=box), blocks[0], write(every, [5, 6, 7])))
    one = model.tokens(inputs)["projector"].select("patch").box(0, 0, 1, 1)
    cases.append((edits.overwrite("projector.hook_out", range(16), 0.7, positions=one), merger, write(every, 0)))
    with torch.no_grad():
        for edit, part, change in cases:
            assert torch.equal(model.run(inputs, edit), by_hand(module, part, change, inputs)), edit


@pytest.mark.parametrize("cls", KINDS)
def test_what_enters_the_connector_is_merged_only_where_the_table_says_so(cls: type[synthetic.Synthetic]) -> None:
    module, model, inputs = exact(cls, batch=2)
    position = 2 if cls is synthetic.MergingBefore else 7

    def write(part: Any, args: tuple[Tensor]) -> Tensor:
        changed = args[0].clone()
        changed[:, position, :12] = 0.7
        return changed

    handle = module.merger.register_forward_pre_hook(write)
    with torch.no_grad():
        expected = module(**inputs).logits
        handle.remove()
        found = model.run(inputs, edits.overwrite("projector.hook_in", range(12), 0.7, positions=position))
    assert torch.equal(found, expected)


def test_positions_of_the_tower_are_not_those_behind_the_merge() -> None:
    _, model, inputs = exact(synthetic.Merging)
    chosen = model.tokens(inputs)["vision"].select("patch")
    with pytest.raises(InputError, match="vision"):
        model.run(inputs, edits.ablate("projector.hook_out", positions=chosen))
    with pytest.raises(InputError, match="6"):
        model.run(inputs, edits.ablate("projector.hook_out", positions=20))


GROUPS = [
    edits.ablate("vision.blocks.0.attn.hook_z", heads=1, positions=[3, 9]),
    edits.ablate("vision.blocks.1.hook_mlp_out", positions=cv.regions.box((0, 0, 9, 9))),
    edits.scale("vision.hook_embed", 0.5, positions=5),
    edits.ablate("projector.hook_in"),
    edits.ablate("projector.hook_out", positions=cv.regions.box((0, 0, 9, 9))),
    edits.ablate("projector.hook_out", "mean", positions=[1, 4]),
    edits.ablate("language.blocks.0.hook_attn_out", positions=cv.regions.box((16, 8, 24, 16))),
    edits.scale("language.hook_embed", 2.0, positions="text"),
]


@pytest.mark.parametrize("cls", KINDS)
def test_a_sweep_is_the_loop_and_each_example_has_its_own_value(cls: type[synthetic.Synthetic]) -> None:
    _, model, inputs = exact(cls, batch=3, images_per_prompt=2)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 3]

    with torch.no_grad():
        swept = model.sweep(inputs, GROUPS, metric, progress=False)
        naive = torch.stack([metric(model.run(inputs, group)) for group in GROUPS])
        torch.testing.assert_close(swept.values, naive, rtol=1e-10, atol=1e-12)
        assert not any(plan.in_full for plan in swept.plan), swept.plan
        assert (naive - metric(model(inputs))).abs().min() > 1e-6
        # Examples are three prompts, and taken out of the batch each gives the number it has in it.
        alone = [model.family.packing.take(model, inputs, [number]) for number in range(3)]
        own = [group for group in GROUPS if "mean" not in repr(group)]
        apart = torch.cat([model.sweep(one, own, metric, progress=False).values for one in alone], 1)
    kept = [number for number, group in enumerate(GROUPS) if "mean" not in repr(group)]
    torch.testing.assert_close(apart, naive[kept], rtol=1e-6, atol=1e-8)


# ---- dead sites


def test_embeddings_under_images_are_dead_and_nothing_else() -> None:
    _, model, inputs = exact(synthetic.Merging)
    dead = model.dead_positions("language.hook_embed", inputs)
    assert dead is not None
    assert dead[0].nonzero().flatten().tolist() == list(range(FIRST, FIRST + 6))
    assert not any(model.is_dead(site, inputs) for site in model.sites())


# ---- what cannot be merged


def test_grids_that_do_not_fall_into_blocks_are_refused_before_the_run() -> None:
    _, model, inputs = exact(synthetic.Merging)
    odd = {**inputs, "pixel_values": torch.zeros(1, 3, 12, 24, dtype=torch.float64)}
    with pytest.raises(InputError):
        model(odd)
    synthetic.register(synthetic.Merging, packing.Flat(merge=4))
    model = cv.HookedModel(synthetic.build(synthetic.Merging).double())
    with pytest.raises(InputError, match="4x6 patches does not fall into blocks of 4x4"):
        model(inputs)


def test_a_prompt_with_a_token_per_patch_is_refused() -> None:
    _, model, inputs = exact(synthetic.Merging)
    with pytest.raises(InputError, match="24 image tokens"):
        model({**inputs, **synthetic.prompts([[24]])})


# ---- read-outs


def test_the_lens_of_the_tower_reads_merged_positions() -> None:
    """What the connector makes of a layer, read by the language model's head: labels are those of the positions behind the merge."""
    module, model, inputs = exact(synthetic.Merging, batch=2)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        lens = cv.readout.logit_lens(model, cache, "vision", targets={3: 3, 4: 4})
        stream = cache["vision", "resid_post", 0]
        merged = module.language_model.norm(module.merger(module.eye.norm(stream)))
        expected = module.lm_head(merged)[..., 3].T
        box = cv.readout.logit_lens(model, cache, "vision", targets={3: 3}, positions=cv.regions.box((6, 8, 17, 9)))
        torch.testing.assert_close(
            model.vision.readout(cache["vision", "resid_post", 1], cache), cache["projector.hook_out"]
        )
    torch.testing.assert_close(lens.values[1, :, 0].double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(box.values[1, 0, 0].double(), expected[3:].mean(0), rtol=1e-6, atol=1e-6)
    assert lens.axes["position"] == list(range(6))
    assert lens.words[0] == ["[patches]"] * 6
    assert lens.shares[0, 4].tolist() == pytest.approx([8 / 24, 0.5, 16 / 24, 1.0])
    for call in (lambda: cv.readout.unembedding_matrix(model.vision), lambda: model.vision.connector_module):
        with pytest.raises((InputError, UnsupportedModelError), match="merges patches"):
            call()
