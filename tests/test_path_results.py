"""What path patching returns over data sets, how it is saved and drawn, how ends are spelled, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision.data import Pairs
from circuitvision.errors import InputError
from circuitvision.patching import PathPatching, path_patch
from tests.synthetic_blocks import SHAPES, Own, inputs_by_hand, register
from tests.test_path_patch import EXACT, models, patched
from tests.zoo import case

pytestmark = [pytest.mark.filterwarnings("ignore:The two runs do not differ"), pytest.mark.usefixtures("tables")]


def stream_of_pairs() -> tuple[Any, Any, list[Any]]:
    found = case("llava-clip-llama")
    module = found.build().double().eval()
    examples = []
    for seed in (1, 2):
        whole = found.inputs(module, batch=3, seed=seed, dtype=torch.float64)
        examples.append([{name: value[row : row + 1] for name, value in whole.items()} for row in range(3)])
    for one, other in zip(*examples, strict=True):
        other["input_ids"] = one["input_ids"]
    return (
        cv.HookedModel(module),
        Pairs(inputs=examples[0], corrupt_inputs=examples[1], answers=[5, 6, 7], foils=[8, 9, 8]),
        examples,
    )


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_pairs_in_batches_give_the_numbers_of_each_pair_and_what_is_interrupted_goes_on(tmp_path, mode):
    model, pairs, examples = stream_of_pairs()
    options: dict[str, Any] = {
        "senders": ["vision L0H1", "language L0.mlp"], "receivers": ["language L1H2.q", "output"], "mode": mode, "progress": False,
        "metric": {"logit_diff": "logit_diff", "prob": "prob"},
    }  # fmt: skip
    found = path_patch(model, pairs, example_batch=2, save_to=tmp_path, **options)
    assert found.values.shape == (2, 2, 2, 3)
    assert found.metrics == ["logit_diff", "prob"]
    again = path_patch(model, pairs, example_batch=2, save_to=tmp_path, resume=True, **options)
    assert torch.equal(again.values, found.values)
    for number in range(3):
        metric = {"logit_diff": cv.metrics.logit_diff(pairs.clean.answers[number], pairs.clean.foils[number])}
        single = path_patch(
            model, clean=examples[0][number], corrupt=examples[1][number], **{**options, "metric": metric}
        )
        torch.testing.assert_close(found.values[0, ..., number], single.values[0, ..., 0], **EXACT)
    with pytest.raises(InputError):
        path_patch(
            model,
            pairs,
            example_batch=2,
            save_to=tmp_path,
            resume=True,
            **{**options, "through": "language L0.mlp", "senders": "vision L0H1"},
        )


def test_a_result_is_saved_drawn_and_listed(tmp_path):
    model, _, clean, corrupt = models("vit")
    found = patched(
        model, clean, corrupt, senders={"early heads": ["vision L0H0", "vision L0H1"], "image": "v.input"},
        receivers=["vision L1H1", "vision L2.mlp", "v.logits"], through="vision L1.mlp",
    )  # fmt: skip
    assert found.axes["sender"] == ["early heads", "image"]
    assert found.axes["receiver"] == ["vision L1H1", "vision L2.mlp", "output"]
    assert found.through == ["vision L1.mlp"]
    assert {"sender", "receiver", "value"} <= set(found.to_frame().columns)
    found.save(tmp_path / "paths.npz")
    loaded = cv.load(tmp_path / "paths.npz")
    assert isinstance(loaded, PathPatching)
    assert torch.equal(loaded.values, found.values)
    assert loaded.through == found.through
    figure = found.plot()
    assert "early heads" in str(figure.to_dict())
    assert "output" in str(figure.to_dict())


def test_what_cannot_reach_the_output_is_zero_without_a_run_and_earlier_receivers_of_a_grid_are_no_cells():
    model, _, clean, corrupt = models("llava-clip-llama")
    found = patched(
        model, clean, corrupt, senders=["vision L0H0", "vision L2H0"], receivers=["vision L1.mlp", "language L0.mlp"]
    )
    assert found.values[1, 0].isnan().all()
    assert (found.values[1, 1] == 0).all()
    assert "vision.blocks.2.attn.hook_z" in found.dead
    assert found.values[0].abs().min() > 1e-9


@pytest.mark.parametrize("name", ["vit", "llava-clip-llama"])
def test_bfloat16_and_padding_stay_close_to_the_same_in_float32(name):
    found = case(name)
    options = {"padding": "left"} if "padding_left" in found.tags else {}
    numbers = []
    for dtype in (torch.float32, torch.bfloat16):
        module = found.build().to(dtype).eval()
        clean, corrupt = (found.inputs(module, batch=2, seed=seed, dtype=dtype, **options) for seed in (1, 2))
        corrupt = {key: value if key == "pixel_values" else clean[key] for key, value in corrupt.items()}
        numbers.append(
            patched(
                cv.HookedModel(module), clean, corrupt, senders="vision L0.attn", receivers="output"
            ).values.double()
        )
    assert numbers[0].abs().max() > 1e-2
    torch.testing.assert_close(numbers[1], numbers[0], rtol=0.2, atol=0.2)


WRONG = {
    "backwards": {"senders": "vision L2H0", "receivers": "vision L1H0.q"},
    "one layer": {"senders": "vision L1H0", "receivers": "vision L1H1.v"},
    "after the language": {"senders": "language L0H0", "receivers": "vision L1H0.q"},
    "one of two": {"senders": ["vision L0H0", "language L1H0"], "receivers": "language L1H0.q"},
    "no such head": {"senders": "vision L0H9", "receivers": "output"},
    "no sender": {"senders": [], "receivers": "output"},
    "no stream": {"senders": "vision.blocks.0.attn.hook_q", "receivers": "output"},
    "no reader": {"senders": "vision L0H0", "receivers": "vision.blocks.1.attn.hook_q"},
    "a group's keys": {"senders": "vision L0H0", "receivers": "language L1H2.k"},
    "through a connector": {"senders": "vision L0H0", "receivers": "output", "through": "projector"},
    "off every path": {"senders": "vision L1H0", "receivers": "output", "through": "vision L0.mlp"},
    "twice": {
        "senders": "vision L0H0",
        "receivers": ["vision L1H0.q", "language L1H0.q"],
        "axes": (),
        "through": "vision L1H0",
    },
    "held output": {"senders": "vision L0H0", "receivers": ["vision L1H0.q", "output"], "axes": (), "joint": "hold"},
    "axes": {"senders": "vision L0H0", "receivers": "output", "axes": ("layer",)},
    "joint": {"senders": "vision L0H0", "receivers": "output", "joint": "both"},
    "same label": {"senders": ["vision L0H0", "v.a0.h0"], "receivers": "output"},
    "positions": {"senders": "vision L0H0", "receivers": "output", "positions": 99},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_cannot_be_meant_is_refused_before_anything_is_left_behind(wrong):
    model, _, clean, corrupt = models("llava-clip-llama")
    with pytest.raises(InputError):
        patched(model, clean, corrupt, **wrong)
    assert not model.engine.stack


def test_attention_reaches_the_mlp_of_its_layer_where_one_follows_the_other():
    model, _, clean, corrupt = models("vit")
    assert patched(model, clean, corrupt, senders="vision L1H0", receivers="vision L1.mlp").values.abs().min() > 1e-9
    register()
    parallel = cv.HookedModel(Own(SHAPES["parallel"]).double().eval())
    pictures = [inputs_by_hand(None, 2, seed, torch.float64) for seed in (1, 2)]
    with pytest.raises(InputError, match="no path"):
        patched(parallel, *pictures, senders="vision L1H0", receivers="vision L1.mlp")


def test_every_spelling_of_an_end_is_the_same_end():
    model, _, clean, corrupt = models("vit")
    first = patched(model, clean, corrupt, senders="vision L0H1", receivers="vision L2H3.q")
    for sender, receiver in (
        ("v.a0.h1", "v.a2.h3<q>"),
        (("vision", 0, 1), "vision.blocks.2.hook_q_input[3]"),
        ("L0H1", ("L2H3", "q")),
    ):
        found = patched(model, clean, corrupt, senders=sender, receivers=receiver)
        assert found.axes == first.axes
        assert torch.equal(found.values, first.values)
