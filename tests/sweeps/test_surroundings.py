"""Sweeps among other people's hooks, metrics that do more than read, and inputs that ask for more: still one naive run per edit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from tests.parts import module_of
from tests.sweeps.drawing import inputs_of, metric, model_of, source_of
from tests.zoo import shared_model


def fresh(name: str) -> cv.HookedModel:
    return cv.HookedModel(copy.deepcopy(shared_model(name)).double().eval())


def inputs(name: str, batch: int = 2) -> dict[str, Any]:
    return dict(inputs_of(name, torch.float64, batch, None, 1))


def steered(model: cv.HookedModel, site: str, **where: Any) -> edits.Edit:
    tower = site.partition(".")[0]
    direction = torch.randn(model.towers[tower].cfg.d_model, generator=torch.Generator().manual_seed(0))
    return edits.steer(site, direction, **where)


def compare(model: cv.HookedModel, given: dict[str, Any], groups: list[Any], measure: Any = metric) -> cv.SweepResult:
    """The result of a sweep that equals the loop."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        naive = torch.stack([cv.metrics.evaluate(measure, model.run(given, group), given) for group in groups])
        result = model.sweep(given, groups, measure, progress=False)
    torch.testing.assert_close(result.values, naive.to(result.values), rtol=1e-9, atol=1e-9, equal_nan=True)
    return result


HOOKS: dict[str, tuple[str, Callable[[Any, Any], Any], bool]] = {
    "scales what the output projection reads": ("vision.0.o", lambda module, args: (args[0] * 1.5,), True),
    "writes into a block's output": ("language.0", lambda module, args, out: (out.mul_(1.5), None)[1], False),
    "changes one position": (
        "language.0",
        lambda module, args, out: torch.cat([out[:, :-3], out[:, -3:] * 2], dim=1),
        False,
    ),
    "changes one row": ("vision.0", lambda module, args, out: torch.cat([out[:1], out[1:] * 2]), False),
}


@pytest.mark.parametrize("what", list(HOOKS))
def test_hooks_of_others_that_change_the_run(what: str) -> None:
    place, hook, before = HOOKS[what]
    model, given = fresh("llava-clip-llama"), inputs("llava-clip-llama")
    tower, layer, *part = place.split(".")
    block = model.towers[tower].blocks[int(layer)]
    module = module_of(block, part[0]) if part else block.module
    handle = (module.register_forward_pre_hook if before else module.register_forward_hook)(hook)
    groups = [
        [edits.ablate("vision.blocks.0.attn.hook_z", heads=0)],
        [steered(model, "language.blocks.0.hook_resid_post", positions=-1)],
        [steered(model, "language.blocks.1.hook_resid_mid", positions=-2)],
    ]
    result = compare(model, given, groups)
    assert all("not ours" in plan.reason for plan in result.plan)
    handle.remove()
    assert not any(plan.in_full for plan in compare(model, given, groups).plan)


def test_hooks_of_others_that_only_look_stay_fast() -> None:
    model, given = fresh("llava-clip-llama"), inputs("llava-clip-llama")
    seen: list[Any] = []
    for block in model.language.blocks:
        block.module.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    result = compare(model, given, [[steered(model, "language.blocks.1.hook_resid_mid", positions=-2)]])
    assert not result.plan[0].in_full


def test_another_wrapper_of_the_same_module() -> None:
    model, given = fresh("vit"), inputs("vit")
    other = cv.HookedModel(model.module)
    with other.hooks([("vision.blocks.0.hook_mlp_out", lambda value, hook: value * 2)]):
        compare(model, given, [[edits.ablate("vision.blocks.1.attn.hook_z", heads=0)]])


@pytest.mark.parametrize("kept", [1, 3])
def test_outputs_of_fewer_positions(kept: int) -> None:
    model, given = model_of("llava-clip-llama", torch.float64), {**inputs("llava-clip-llama"), "logits_to_keep": kept}
    compare(
        model, given, [[steered(model, "language.blocks.0.hook_resid_post", positions=-1)]], lambda out: out[:, -1, 5]
    )


def test_one_row_of_positions_for_all_examples_and_lists_that_are_no_rows() -> None:
    model, given = model_of("llava-clip-llama", torch.float64), inputs("llava-clip-llama")
    given["position_ids"] = torch.arange(given["input_ids"].shape[1])[None] + 2
    given["vision_feature_layer"] = [-2]
    groups = [[edits.ablate("vision.blocks.0.attn.hook_z", heads=head)] for head in (0, 1)]
    result = compare(model, given, [*groups, [steered(model, "language.hook_embed", positions=0)]])
    assert not any(plan.in_full for plan in result.plan)


def test_inference_mode() -> None:
    model, given = fresh("llava-clip-llama"), inputs("llava-clip-llama")
    groups = [[steered(model, "language.blocks.0.hook_resid_post", positions=p)] for p in (-1, -2)]
    with torch.inference_mode():
        compare(model, given, groups)


def test_metrics_that_are_whole_numbers() -> None:
    model, given = model_of("vit", torch.float64), inputs("vit")
    groups = [[edits.ablate("vision.blocks.1.attn.hook_z", heads=head)] for head in range(3)]
    result = compare(model, given, groups, lambda out: out.argmax(-1))
    assert result.values.dtype == torch.float64


def test_metrics_that_keep_what_they_get() -> None:
    model, given = model_of("llava-clip-llama", torch.float64), inputs("llava-clip-llama")
    groups = [[steered(model, "language.blocks.0.hook_resid_post", positions=p)] for p in (-1, -2)]
    kept: list[Tensor] = []

    def keep(out: Tensor) -> Tensor:
        kept.append(out)
        return out[:, 0, 0]

    model.sweep(given, groups, keep, progress=False)
    for out, group in zip(kept[1:], groups, strict=True):
        torch.testing.assert_close(out, model.run(given, group))


def test_metrics_that_run_the_model_see_it_unedited() -> None:
    model, given = fresh("vit"), inputs("vit")
    model.module.train()
    model.module.eval()
    groups = [[edits.ablate("vision.blocks.0.attn.hook_z", heads=0)]]
    with model.hooks([("vision.blocks.0.hook_mlp_out", lambda value, hook: value)]):
        compare(model, given, groups, lambda out: (out - model(given))[:, 0])
    compare(model, given, groups, lambda out: model.sweep(given, groups[0], metric, progress=False).values[0])


def test_what_a_freeze_holds_is_found_in_every_window() -> None:
    model, given = model_of("clip", torch.float64), inputs("clip", batch=3)
    text = steered(model, "text.blocks.0.hook_mlp_out", positions=1)
    groups = [
        [
            edits.freeze("vision.blocks.1.hook_resid_post", "vision.blocks.0.hook_resid_mid", positions=0),
            edits.scale("vision.blocks.1.hook_mlp_out", 1.01),
            steered(model, "text.blocks.0.hook_resid_post", positions=2),
        ],
        [text, edits.freeze("text.ln_final.hook_normalized", "text.blocks.0.hook_resid_post", positions=4)],
        [text, edits.freeze("text.blocks.1.hook_resid_post", "text.blocks.0.hook_resid_post", positions=[0, 4])],
    ]
    compare(model, given, groups)


def test_groups_of_a_batch_do_not_take_each_others_writes_for_known() -> None:
    model, given = model_of("llava-clip-llama", torch.float64), inputs("llava-clip-llama")
    same = steered(model, "vision.blocks.0.hook_resid_post")
    held = edits.freeze("language.blocks.1.hook_resid_pre", "language.hook_input", positions=-1)
    compare(model, given, [[same, edits.scale("language.hook_embed", 1.3)], [same, held]])


def test_a_freeze_of_other_positions_is_refused() -> None:
    model, given = model_of("vit", torch.float64), inputs("vit")
    with pytest.raises(InputError, match="other positions"):
        model.run(given, [edits.freeze("vision.blocks.0.hook_resid_post", "vision.hook_embed", positions=5)])


def test_a_source_of_fewer_rows_is_refused() -> None:
    model, given = model_of("llava-clip-llama", torch.float64), inputs("llava-clip-llama", batch=2)
    source = source_of("llava-clip-llama", torch.float64, 1, None, 1)["projector.hook_out"]
    wide = torch.cat([source] * 3)
    with pytest.raises(InputError):
        model.run(given, [edits.replace("projector.hook_out", wide)])


def test_inputs_that_no_two_runs_can_share() -> None:
    model, given = model_of("llava-clip-llama", torch.float64), inputs("llava-clip-llama")
    with pytest.raises(InputError, match="past_key_values"):
        model.sweep({**given, "past_key_values": object()}, [edits.ablate("language.hook_input")], metric)
    with pytest.raises(InputError, match="return_dict"):
        model.run({**given, "return_dict": False}, [])


def test_passes_of_several_positions_are_refused() -> None:
    model, given = model_of("llava-clip-llama", torch.float64), inputs("llava-clip-llama", batch=1)
    edit = steered(model, "language.blocks.0.hook_resid_post", positions=given["input_ids"].shape[1])
    with pytest.raises(InputError, match="count positions by the cache"):
        model.generate({**given, "use_cache": False}, edits=[edit], max_new_tokens=3, do_sample=False)
    with pytest.raises(InputError, match="count positions by the cache"):
        model.generate(given, edits=[edit], max_new_tokens=3, do_sample=False, prefill_chunk_size=5)
    assert model.engine.handles == []


def test_a_run_takes_one_edit_or_one_list() -> None:
    model, given = model_of("vit", torch.float64), inputs("vit")
    edit = edits.ablate("vision.blocks.0.attn.hook_z", heads=0)
    assert torch.equal(model.run(given, edit), model.run(given, [edit]))
    with pytest.raises(InputError, match="one list of edits"):
        model.run(given, [[edit], [edit]])
