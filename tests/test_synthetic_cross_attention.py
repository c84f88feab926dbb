"""A language tower that attends to a vision tower: sites of the cross-attention, edits of both towers and sweeps, as by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.families import Connector
from tests.synthetic_cross import D_HEAD, HEADS, Crossing, by_hand, register

pytestmark = pytest.mark.usefixtures("tables")
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def built(projects: bool = False, connectors: Any = None) -> tuple[Crossing, cv.HookedModel, dict[str, Tensor]]:
    register(projects, connectors)
    torch.manual_seed(0)
    module = Crossing(projects).double().eval()
    for parameter in module.parameters():
        parameter.data += 0.4 * torch.randn_like(parameter)
    inputs = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]),
        "pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64),
    }
    return module, cv.HookedModel(module), inputs


def test_every_site_of_the_language_tower_reads_and_writes_as_by_hand() -> None:
    module, model, inputs = built()
    with torch.no_grad():
        expected, values = by_hand(module, inputs)
        torch.testing.assert_close(model(inputs), expected, **EXACT)
        _, cache = model.run_with_cache(inputs, list(values))
        for site, value in values.items():
            torch.testing.assert_close(cache[site], value, **EXACT, msg=lambda text, site=site: f"{site}: {text}")

            def changed(value: Tensor, *where: Any) -> Tensor:
                out = value.clone()
                out[1, 1] = out[1, 1] * 0.7 + 0.1
                return out

            edited, _ = by_hand(module, inputs, {site: changed})
            found = model.run_with_hooks(inputs, [(site, changed)])
            torch.testing.assert_close(found, edited, **EXACT, msg=lambda text, site=site: f"{site}: {text}")
            assert not torch.equal(edited, expected), site
    assert set(values) == set(model.sites("language.blocks.**"))
    assert cache["language.blocks.2.cross_attn.hook_k"].shape == (2, 5, HEADS, D_HEAD)
    assert cache["language.blocks.2.cross_attn.hook_pattern"].shape == (2, HEADS, 4, 5)
    assert not [site for site in model.sites("language.blocks.1.**") if ".attn." in site]


@pytest.mark.parametrize("projects", [False, True])
def test_edits_of_either_tower_by_position_and_key(projects: bool) -> None:
    module, model, inputs = built(projects)
    key = "language.blocks.1.cross_attn.hook_k"
    value, pattern = "language.blocks.2.cross_attn.hook_v", "language.blocks.2.cross_attn.hook_attn_scores"
    patches = [1, 3]

    def at(rows: list[int], number: float) -> Any:
        def change(value: Tensor) -> Tensor:
            out = value.clone()
            out[:, rows] = number
            return out

        return change

    hidden = torch.finfo(torch.float64).min

    def hide(scores: Tensor) -> Tensor:
        out = scores.clone()
        out[:, 1, 2:, patches] = hidden
        return out

    with torch.no_grad():
        tokens = model.tokens(inputs)["vision"]
        # The first patch is position 1, the third one position 3: said in the vision tower's own words.
        ways: list[tuple[Any, dict[str, Any]]] = [
            (edits.replace(key, 0.5, positions=patches), {key: at(patches, 0.5)}),
            (edits.replace(key, 0.5, positions=tokens.select("patch")), {key: at([1, 2, 3, 4], 0.5)}),
            (edits.replace(value, -1.0, positions=[0]), {value: at([0], -1.0)}),
            (
                edits.block_attention("language", queries=[2, 3], keys=("vision", patches), heads=1, layers=[2]),
                {pattern: hide},
            ),
        ]
        groups = [[edit] for edit, _ in ways]
        expected = [by_hand(module, inputs, change)[0] for _, change in ways]
        for group, right in zip(groups, expected, strict=True):
            torch.testing.assert_close(model.run(inputs, group), right, **EXACT)
        swept = model.sweep(inputs, groups, lambda logits: logits[:, -1, 3], progress=False)
        torch.testing.assert_close(swept.values, torch.stack([one[:, -1, 3] for one in expected]), **EXACT)
        assert not any(plan.in_full for plan in swept.plan)


@pytest.mark.parametrize("projects", [False, True])
def test_a_sweep_over_both_towers_is_the_loop_and_keeps_the_blocks_before_the_first_that_attends(
    projects: bool,
) -> None:
    module, model, inputs = built(projects)
    sites = [site for site in model.sites("*.blocks.*.**") if "scale" not in site and not model.is_dead(site)]
    sites += ["projector.hook_out"] if projects else []
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        single = [[edits.replace(site, cache[site] * 1.3 + 0.1, positions=[1])] for site in sites]
        named = dict(zip(sites, single, strict=True))
        vision, language = named["vision.blocks.1.hook_mlp_out"], named["language.blocks.0.hook_mlp_out"]
        groups = [*single, [*vision, *language], [*vision, *named["language.blocks.2.hook_attn_out"]]]
        calls: list[int] = []
        handle = module.decoder.layers[0].mlp.register_forward_hook(lambda *given: calls.append(1))
        swept = model.sweep(inputs, groups, lambda logits: logits[:, -1, 3], progress=False)
        handle.remove()
        for number, group in enumerate(groups):
            own = model.run(inputs, group)[:, -1, 3]
            torch.testing.assert_close(
                swept.values[number], own, **EXACT, msg=lambda text, group=group: f"{group}: {text}"
            )
        assert not any(plan.in_full for plan in swept.plan)
        before = len(calls)
        calls.clear()
        handle = module.decoder.layers[0].mlp.register_forward_hook(lambda *given: calls.append(1))
        model.sweep(inputs, [vision], lambda logits: logits[:, -1, 3], progress=False)
        handle.remove()
    assert len(calls) == 1, "an edit of the vision tower runs block 0 once, in the unedited run"
    assert before > 1


def test_hidden_pictures_are_what_no_cross_attention_sees() -> None:
    module, model, inputs = built()
    with torch.no_grad():
        found = model.run(inputs, [edits.block_attention("language", keys=("vision", slice(1, None)))])
        scores = [f"language.blocks.{layer}.cross_attn.hook_attn_scores" for layer in (1, 2)]

        def hide(value: Tensor) -> Tensor:
            out = value.clone()
            out[..., 1:] = torch.finfo(out.dtype).min
            return out

        torch.testing.assert_close(found, by_hand(module, inputs, dict.fromkeys(scores, hide))[0], **EXACT)
    with pytest.raises(InputError, match="block 0 of the language tower does not look at the vision tower"):
        model.run(inputs, [edits.block_attention("language", keys=("vision", [1]), layers=[0])])
    with pytest.raises(InputError, match="block_attention"):
        model.run(inputs, [edits.delete_tokens("vision", [1])])


def test_gradients_reach_the_vision_tower_and_the_terms_add_up() -> None:
    _, model, inputs = built()
    sites = [
        "vision.blocks.0.hook_resid_post",
        "language.blocks.1.hook_cross_attn_out",
        "language.blocks.2.cross_attn.hook_k",
    ]
    _, cache = model.run_with_cache(inputs, sites, incl_bwd=True, metric=lambda logits: logits[:, -1, 3].sum())
    for site in sites:
        shift = torch.zeros_like(cache[site])
        shift[0, 1] = 1e-6

        def moved(value: Tensor, where: Any, shift: Tensor = shift) -> Tensor:
            return value + shift

        with torch.no_grad():
            up = model.run_with_hooks(inputs, [(site, moved)])[:, -1, 3].sum()
            down = model.run_with_hooks(inputs, [(site, lambda value, where, shift=shift: value - shift)])[
                :, -1, 3
            ].sum()
        expected = cache[f"{site}_grad"][0, 1].sum()
        torch.testing.assert_close((up - down) / 2e-6, expected, rtol=1e-5, atol=1e-7)
    _, whole = model.run_with_cache(inputs)
    found = cv.readout.direct_attribution(model, whole, 3, by="component", position=-1)
    assert {"language L1.cross_attn", "language L2.cross_attn", "language L2.attn"} <= set(found.axes["term"])
    torch.testing.assert_close(found.values.sum(0).double(), model(inputs)[:, -1, 3], rtol=1e-5, atol=1e-6)


def test_a_table_that_does_not_say_whom_blocks_attend_to_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="via='cross'"):
        built(True, (Connector(("vision",), "language", "projector"),))
