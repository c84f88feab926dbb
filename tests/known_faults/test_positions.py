"""Positions at every site, said in every way: those of the tower, mapped to what the site holds, or refused before the run."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model import axes
from tests.edits.common import apart, inputs_of, near, same, wrapped
from tests.known_faults.site_positions import Cell, cells, fault_of, held, hooked, paddings, place_of, run_of, write
from tests.zoo import CASES, case, primary

SPECIAL = ("projector.", ".hook_embed", ".hook_readout", ".ln_final.", ".pool.", ".hook_pos_embed")
"""Sites whose axis may not be the tower's."""


def sample(name: str) -> list[Cell]:
    """A few cells of one case: some of every special kind of site, and some others."""
    draw = random.Random(name)
    padding = draw.choice(paddings(case(name)))
    found = list(cells(case(name), padding))
    special = [cell for cell in found if any(mark in cell.site for mark in SPECIAL)]
    return draw.sample(special, min(7, len(special))) + draw.sample(found, 4)


@pytest.mark.parametrize("name", list(CASES))
def test_a_sample_of_sites_and_ways(name: str) -> None:
    faults = {str(cell): fault for cell in sample(name) if (fault := fault_of(cell))}
    assert not faults


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_every_site_and_every_way(name: str) -> None:
    faults = {
        str(cell): fault
        for padding in paddings(case(name))
        for cell in cells(case(name), padding)
        if (fault := fault_of(cell))
    }
    assert not faults


# ---- more than one way to be elsewhere


def mutated(cells: list[Cell]) -> bool:
    """Whether the check notices anything in these cells."""
    found = []
    for cell in cells:
        try:
            found.append(fault_of(cell))
        except Exception as error:
            found.append(str(error))
    return any(found)


@pytest.mark.parametrize(
    ("name", "site", "fault"),
    [
        ("llava-clip-llama", "projector.hook_out", "unmapped"),
        ("vit", "vision.hook_embed", "unmapped"),
        ("pi0", "action.hook_readout", "unmapped"),
        ("clip", "vision.ln_final.hook_normalized", "pooled taken for positions"),
        ("siglip", "vision.pool.attn.hook_q", "pooled taken for positions"),
        ("llava-clip-llama", "projector.hook_in", "numbers not checked"),
    ],
)
def test_a_mutant_is_noticed(name: str, site: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [cell for cell in cells(case(name), None) if cell.site == site]
    assert not mutated(found)
    if fault == "unmapped":
        monkeypatch.setattr(axes.Axis, "columns", lambda self, first, length, prompt: None)
    elif fault == "numbers not checked":
        monkeypatch.setattr("circuitvision.model.positions.Positions._check_held", lambda self, window: None)
    else:
        whole = axes.axis_of
        monkeypatch.setattr(
            "circuitvision.model.edits.windows.axis_of",
            lambda *args: axes.Axis(site=whole(*args).site) if whole(*args).absent else whole(*args),
        )
    assert mutated(found)


def test_every_kind_of_site_that_holds_other_positions_is_in_the_product() -> None:
    seen = {
        cell.site.partition(".")[0] + "." + cell.site.rpartition(".")[2]
        for name in ("vit", "clip", "siglip", "llava-clip-llama", "pi0")
        for cell in cells(case(name), None)
        if held(case(name), cell.site, cell.way.mask.shape[1]) != list(range(cell.way.mask.shape[1]))
    }
    assert {
        "vision.hook_embed",
        "projector.hook_in",
        "projector.hook_out",
        "vision.hook_readout",
        "text.hook_readout",
    } <= seen
    assert {"action.hook_readout", "vision.hook_pattern", "vision.hook_q", "vision.hook_scale"} <= seen


KEPT: list[tuple[Any, list[int]]] = [
    (0, list(range(16))),
    (1, [15]),
    (4, [12, 13, 14, 15]),
    (torch.tensor([3, 9]), [3, 9]),
    (torch.tensor([9, -1, 3]), [9, 15, 3]),
]


@pytest.mark.parametrize(("kept", "positions"), KEPT, ids=str)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_head_that_reads_some_positions(kept: Any, positions: list[int], padding: str) -> None:
    model = wrapped("llava-clip-llama")
    inputs = inputs_of("llava-clip-llama", model, padding=padding)
    site = "language.hook_readout"
    chosen = [positions[0], positions[-1]]
    mask = torch.zeros(2, len(positions), dtype=torch.bool)
    mask[:, [0, -1]] = True
    for given, more in (({**inputs, "logits_to_keep": kept}, {}), (inputs, {"logits_to_keep": kept})):
        with hooked(model.module.lm_head, "pre", lambda value: write(value, mask, 1), "input"), torch.no_grad():
            wanted = primary(model.module(**inputs, logits_to_keep=kept))
        with torch.no_grad():
            same(model.run(given, [edits.replace(site, 0.4, positions=chosen)], **more), wanted)
            every = torch.zeros(16, dtype=torch.bool)
            every[chosen] = True
            same(model.run(given, [edits.replace(site, 0.4, positions=every)], **more), wanted)
            missing = next((p for p in range(16) if p not in positions), None)
            if missing is not None:
                with pytest.raises(InputError, match=f"position {missing} of the language tower is not at {site}"):
                    model.run(given, [edits.replace(site, 0.4, positions=missing)], **more)
    assert model.positions(site, {**inputs, "logits_to_keep": kept}) == positions
    if padding == "right" and 1 < len(positions) < 16 and 15 in positions:
        with pytest.raises(InputError, match="the last one of row"):
            model.run({**inputs, "logits_to_keep": 1}, [edits.replace(site, 0.4, positions="last")])


def test_the_strategy_of_the_call_says_what_the_projector_holds() -> None:
    model = wrapped("llava-clip-llama")
    inputs = inputs_of("llava-clip-llama", model)
    site = "projector.hook_out"
    assert model.positions(site, inputs) == list(range(1, 10))
    assert model.positions(site, {**inputs, "vision_feature_select_strategy": "full"}) == list(range(10))
    assert model.positions(
        "vision.hook_readout" if "vision.hook_readout" in model.sites() else "vision.hook_embed", inputs
    ) == list(range(1, 10))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_of_a_generation(padding: str) -> None:
    model = wrapped("llava-clip-llama")
    inputs = inputs_of("llava-clip-llama", model, padding=padding)
    n, new = inputs["input_ids"].shape[1], 4
    said: dict[str, Any] = {
        "max_new_tokens": new,
        "min_new_tokens": new,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }

    def logits(out: Any) -> torch.Tensor:
        return torch.stack(out.logits, 1)

    def by_hand(module: Any, phase: str, where: dict[int, list[int]], keyword: str) -> torch.Tensor:
        """``where``: pass -> entries of that pass."""
        passes: list[int] = []

        def fn(value: torch.Tensor) -> torch.Tensor:
            value, step = value.clone(), len(passes)
            passes.append(step)
            value[:, where.get(step, [])] = 0.4
            return value

        with hooked(module, phase, fn, keyword):
            return logits(model.module.generate(**inputs, **said))

    clean = logits(model.module.generate(**inputs, **said))
    head, first = model.module.lm_head, model.language.blocks[0].module
    resid, readout = "language.blocks.0.hook_resid_post", "language.hook_readout"
    for positions, where in (
        ([3, n - 1, n + 1], {0: [3, n - 1], 2: [0]}),
        (slice(n - 2, n + 1), {0: [n - 2, n - 1], 1: [0]}),
        (-2, {0: [n - 2]}),
    ):
        wanted = by_hand(first, "post", where, "hidden_states")
        near(
            logits(model.generate(inputs, edits=[edits.replace(resid, 0.4, positions=positions)], **said)), wanted, 1e-5
        )
        apart(wanted, clean)
    for positions, where in (
        ([n - 1, n + 1], {0: [0], 2: [0]}),
        (slice(n - 4, n + 1), {0: [0], 1: [0]}),
        (slice(n, None), {1: [0], 2: [0], 3: [0]}),
        (None, {0: [0], 1: [0], 2: [0], 3: [0]}),
    ):
        wanted = by_hand(head, "pre", where, "input")
        near(
            logits(model.generate(inputs, edits=[edits.replace(readout, 0.4, positions=positions)], **said)),
            wanted,
            1e-5,
        )
    with pytest.raises(
        InputError, match=f"position 3 of the language tower is not at {readout}, which holds position {n - 1}"
    ):
        model.generate(inputs, edits=[edits.replace(readout, 0.4, positions=3)], **said)
    if padding == "right":
        with pytest.raises(InputError, match="the last one of row 0"):
            model.generate(inputs, edits=[edits.replace(readout, 0.4, positions="last")], **said)
    wanted = by_hand(head, "pre", {0: [0], 1: [0], 2: [0]}, "input")
    kept = {**said, "logits_to_keep": 3}
    with pytest.raises(InputError, match=f"which holds positions {n - 3}…{n - 1}"):
        model.generate(inputs, edits=[edits.replace(readout, 0.4, positions=3)], **kept)
    near(
        logits(model.generate(inputs, edits=[edits.replace(readout, 0.4, positions=[n - 1, n, n + 1])], **kept)),
        wanted,
        1e-5,
    )


def test_positions_of_every_denoising_step() -> None:
    model = wrapped("pi0")
    inputs = inputs_of("pi0", model)
    given = {name: value for name, value in inputs.items() if name != "timestep"}
    head = model.module.action_out_proj
    steps: list[int] = []

    def fn(value: torch.Tensor) -> torch.Tensor:
        value, step = value.clone(), len(steps)
        steps.append(step)
        if step in (0, 2):
            value[:, [0, 3]] = 0.4
        return value

    with hooked(head, "pre", fn, "input"):
        wanted = model.module.sample_actions(**given, num_steps=3)
    said = edits.replace("action.hook_readout", 0.4, positions=[1, 4], steps=[0, 2])
    same(model.sample_actions(inputs, num_steps=3, edits=[said]), wanted)
    with pytest.raises(
        InputError, match=r"position 0 of the action tower is not at action\.hook_readout, which holds positions 1…4"
    ):
        model.sample_actions(inputs, edits=[edits.replace("action.hook_readout", 0.4, positions=0)])


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-next-mistral", "paligemma", "pi0", "siglip", "vit"])
def test_a_sweep_maps_positions_as_a_run_does(name: str) -> None:
    model, inputs = run_of(case(name), paddings(case(name))[-1])
    chosen = [
        cell
        for cell in cells(case(name), paddings(case(name))[-1])
        if any(mark in cell.site for mark in SPECIAL)
        and held(case(name), cell.site, cell.way.mask.shape[1]) is not None
    ]
    groups = []
    for cell in random.Random(name).sample(chosen, min(14, len(chosen))):
        try:
            groups.append(edits.scale(cell.site, 1.3, positions=cell.way.positions))
            model.run(inputs, [groups[-1]])
        except InputError:
            groups.pop()
    alone = torch.stack([model.run(inputs, [edit]).flatten(1).sum(1) for edit in groups])
    near(model.sweep(inputs, groups, lambda out: out.flatten(1).sum(1), progress=False).values, alone, 1e-5)
    kept = {**inputs, "logits_to_keep": 3}
    if "language.hook_readout" in model.sites():
        last = [edits.scale("language.hook_readout", 1.3, positions=p) for p in (-1, slice(-2, None), -3)]
        alone = torch.stack([model.run(kept, [edit]).flatten(1).sum(1) for edit in last])
        near(model.sweep(kept, last, lambda out: out.flatten(1).sum(1), progress=False).values, alone, 1e-5)


def test_masks_of_examples_reach_the_rows_of_their_images() -> None:
    """A prompt with two images, and one with one: the projector's rows are images."""
    model = wrapped("llava-clip-llama")
    two = inputs_of("llava-clip-llama", model, batch=1, images_per_prompt=2, padding=None)
    one = inputs_of("llava-clip-llama", model, batch=1, seed=5)
    gap = two["input_ids"].shape[1] - one["input_ids"].shape[1]
    pad = torch.zeros(1, gap, dtype=torch.long)
    inputs = {
        "input_ids": torch.cat([two["input_ids"], torch.cat([pad, one["input_ids"]], 1)]),
        "attention_mask": torch.cat([two["attention_mask"], torch.cat([pad, one["attention_mask"]], 1)]),
        "pixel_values": torch.cat([two["pixel_values"], one["pixel_values"]]),
    }
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[1, [2, 7]] = True
    where = torch.zeros(3, 9, dtype=torch.bool)
    where[2, [1, 6]] = True
    place = place_of(model, "projector.hook_out")
    assert place is not None
    with hooked(place[0], "post", lambda value: write(value, where, 1), ""), torch.no_grad():
        wanted = primary(model.module(**inputs))
    with torch.no_grad():
        same(model.run(inputs, [edits.replace("projector.hook_out", 0.4, positions=mask)]), wanted)
        selection = model.tokens(inputs)["vision"].image(0).patch(row=1, col=1)
        where = torch.zeros(3, 9, dtype=torch.bool)
        where[[0, 2], 4] = True
        with hooked(place[0], "post", lambda value: write(value, where, 1), ""):
            wanted = primary(model.module(**inputs))
        same(model.run(inputs, [edits.replace("projector.hook_out", 0.4, positions=selection)]), wanted)


def test_patching_by_position_names_the_towers_positions() -> None:
    import circuitvision as cv

    model = wrapped("llava-clip-llama")
    clean, corrupt = (
        inputs_of("llava-clip-llama", model, batch=1),
        inputs_of("llava-clip-llama", model, batch=1, seed=7),
    )
    corrupt = {**corrupt, "input_ids": clean["input_ids"]}
    metric = cv.metrics.logit_diff(5, 9)
    result = cv.patching.activation_patch(
        model, metric=metric, clean=clean, corrupt=corrupt, sites="projector.hook_out", axes=("site", "position")
    )
    assert result.axes["position"] == list(range(1, 10))
    _, cache = model.run_with_cache(clean, names_filter="projector.hook_out")
    base, source = metric(model(corrupt)), metric(model(clean))

    def fn(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, 4] = cache["projector.hook_out"][:, 4]
        return value

    place = place_of(model, "projector.hook_out")
    assert place is not None
    with hooked(place[0], "post", fn, ""):
        patched = metric(primary(model.module(**corrupt)))
    near(result.restored[0, 4].float(), ((patched - base) / (source - base)).mean(), 1e-4)
    vit = wrapped("vit")
    pair = inputs_of("vit", vit), inputs_of("vit", vit, seed=4)
    with pytest.raises(InputError, match="leave 'position' out"):
        cv.patching.activation_patch(
            vit,
            metric=lambda out: out[:, 0],
            clean=pair[0],
            corrupt=pair[1],
            sites="vision.hook_readout",
            axes=("site", "position"),
        )
