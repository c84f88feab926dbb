"""The zoo itself: every case builds the same model twice, runs, matters in every parameter, and survives a save."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests import zoo
from tests.zoo import Case, parametrize, primary, shared_model
from tests.zoo.anyres import SIZES, patch_grid
from tests.zoo.expected import SHAPES
from tests.zoo.text import FIRST_WORD, IMAGE, SPECIAL, WORDS, pad_rows, tokenizer, vocabulary


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return primary(model(**inputs))


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(torch.as_tensor(a[name]), torch.as_tensor(b[name])), name


def paddings(case: Case) -> list[str | None]:
    return [None, *(side for side in ("left", "right") if f"padding_{side}" in case.tags)]


@parametrize()
def test_runs_in_both_precisions_at_batch_one_and_three(case: Case, fresh_model: Callable[[Case], nn.Module]) -> None:
    model, double = shared_model(case.name), fresh_model(case).double()
    for batch in (1, 3):
        for padding in paddings(case):
            inputs = case.inputs(model, batch=batch, padding=padding)
            output = run(model, inputs)
            assert output.shape[0] == batch
            assert output.dtype == torch.float32
            assert output.isfinite().all()
            exact = run(double, case.inputs(double, batch=batch, padding=padding, dtype=torch.float64))
            assert exact.dtype == torch.float64
            torch.testing.assert_close(output.double(), exact, rtol=1e-3, atol=1e-3)


@parametrize()
def test_output_has_order_one_scale(case: Case) -> None:
    model = shared_model(case.name)
    output = run(model, case.inputs(model, batch=8))
    assert 0.1 < output.std() < 5
    # Examples must differ, or a hook that mixes rows up would pass.
    assert (output[0] - output[1]).abs().max() > 0.05


@parametrize()
def test_inputs_depend_on_the_seed_only(case: Case) -> None:
    model = shared_model(case.name)
    assert_same(case.inputs(model, batch=2, seed=5), case.inputs(model, batch=2, seed=5))
    one, other = (run(model, case.inputs(model, batch=2, seed=seed)) for seed in (5, 6))
    assert (one - other).abs().max() > 0.01


@parametrize()
def test_two_builds_are_bit_identical(case: Case) -> None:
    first, second = shared_model(case.name).state_dict(), case.build().state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_process_builds_the_same_weights() -> None:
    script = (
        "from tests.zoo import case\n"
        "for name in ('vit', 'paligemma', 'pi0'):\n"
        "    print(sum(p.double().abs().sum().item() for p in case(name).build().parameters()).hex())\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    here = [
        sum(p.double().abs().sum().item() for p in shared_model(name).parameters()).hex()
        for name in ("vit", "paligemma", "pi0")
    ]
    assert done.stdout.split() == here


@parametrize()
def test_every_parameter_matters_except_the_declared_ones(case: Case, fresh_model: Callable[[Case], nn.Module]) -> None:
    model = fresh_model(case).double()
    output = primary(model(**case.inputs(model, batch=3, dtype=torch.float64)))
    (output * torch.randn_like(output)).sum().backward()
    for name, parameter in model.named_parameters():
        influence = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
        # Without rotary embeddings a key bias adds the same score to every key of a query: the softmax ignores it.
        silent = re.search(case.unused, name) or (name.endswith("k_proj.bias") and "language_model" not in name)
        if silent:
            assert influence < 1e-10, f"{name} is declared unused but has gradient {influence}"
        else:
            assert influence > 1e-3, f"{name} has gradient {influence}"


TOWER_PATHS = {"vision_2": "vision_2.", "text": "text_model", "language": "language_model", "action": "model.dit"}


@parametrize()
def test_expected_shapes_are_those_of_the_weights(case: Case) -> None:
    expected = SHAPES[case.name]
    assert tuple(expected) == case.towers
    model = shared_model(case.name)
    for tower, shape in expected.items():
        others = [path for name, path in TOWER_PATHS.items() if name != tower]
        modules = {
            path: module
            for path, module in model.named_modules()
            if TOWER_PATHS.get(tower, "") in path and not (tower == "vision" and any(other in path for other in others))
        }
        queries = [module for path, module in modules.items() if path.endswith("q_proj")]
        keys = [module for path, module in modules.items() if path.endswith("k_proj")]
        outs = [module for path, module in modules.items() if path.endswith(("mlp.fc2", "mlp.down_proj"))]
        outs = outs[: shape.n_layers]
        assert len(queries) == len(keys) == len(outs) == shape.n_layers
        for query, key, out in zip(queries, keys, outs, strict=True):
            assert (query.in_features, query.out_features) == (shape.d_model, shape.n_heads * shape.d_head)
            assert key.out_features == shape.n_kv_heads * shape.d_head
            assert (out.in_features, out.out_features) == (shape.d_mlp, shape.d_model)


@parametrize()
def test_expected_positions_are_those_of_the_vision_tower(case: Case) -> None:
    shape, model = SHAPES[case.name]["vision"], shared_model(case.name)
    if shape.grid is None:
        assert "packed_patches" in case.tags
        return
    seen: list[Tensor] = []
    queries = [module for path, module in model.named_modules() if path.endswith("q_proj") and "dit" not in path]
    towers = [module for module in queries if module.in_features == shape.d_model]
    handles = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in towers]
    run(model, case.inputs(model, batch=1))
    for handle in handles:
        handle.remove()
    assert seen[0].shape[1] == shape.n_prefix + shape.grid[0] * shape.grid[1]


@parametrize()
def test_towers_differ_in_shape(case: Case) -> None:
    config = shared_model(case.name).config
    subs = [getattr(config, name, None) for name in ("vision_config", "vision_2_config", "text_config", "dit_config")]
    shapes = [
        (c.hidden_size, getattr(c, "intermediate_size", 0)) for c in subs if c is not None and hasattr(c, "hidden_size")
    ]
    assert len(set(shapes)) == len(shapes)


@parametrize("padding_right")
def test_padding_masks_something_and_leaves_one_full_row(case: Case) -> None:
    model = shared_model(case.name)
    for padding in paddings(case)[1:]:
        inputs = case.inputs(model, batch=3, padding=padding)
        ids = inputs["input_ids"]
        blank = ids == 0
        assert blank.any(1).tolist()[:3] != [False] * 3
        if "attention_mask" in inputs:
            mask = inputs["attention_mask"]
            assert torch.equal(mask == 0, blank)
            edge = mask[:, 0] if padding == "left" else mask[:, -1]
            assert (edge == 0).any()


@parametrize("generates")
def test_padding_does_not_change_real_positions(case: Case) -> None:
    """A padded row alone and in its batch agree where the mask is 1: the masks of the zoo are honoured."""
    model = shared_model(case.name)
    inputs = case.inputs(model, batch=3, padding="right")
    disturbed = dict(inputs)
    blank = inputs["attention_mask"] == 0
    disturbed["input_ids"] = inputs["input_ids"].masked_fill(blank, FIRST_WORD + 3)
    before, after = run(model, inputs), run(model, disturbed)
    assert (before - after)[~blank].abs().max() == 0
    assert blank.any()


@parametrize("two_images")
def test_several_images_per_prompt(case: Case) -> None:
    model = shared_model(case.name)
    inputs = case.inputs(model, batch=2, images_per_prompt=3)
    shape = inputs["pixel_values"].shape
    assert (shape[:2] == (2, 3)) if case.family == "pi0" else (shape[0] == 6)
    before = run(model, inputs)
    assert before.isfinite().all()
    inputs["pixel_values"] = inputs["pixel_values"].flip(1 if case.family == "pi0" else 0)
    assert (run(model, inputs) - before).abs().max() > 0.01, "the order of images must matter"


@parametrize("any_size")
def test_other_image_sizes(case: Case) -> None:
    model = shared_model(case.name)
    config = getattr(model.config, "vision_config", None) or model.config
    size = (3 * config.patch_size, 2 * config.patch_size)
    inputs = case.inputs(model, batch=2, image_size=size)
    assert run(model, inputs).isfinite().all()


@parametrize("tiles")
def test_tiled_prompts_count_unpadded_patches_and_newlines(case: Case) -> None:
    """The hand-made count of image tokens is the one the real processor makes, for every size."""
    model = shared_model(case.name)
    processor = case.processor()
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    for size in [*SIZES, (12, 48), (31, 9)]:
        rows, columns = patch_grid(model.config, size)
        image = zoo.images.picture(0, size)
        ids = processor(images=[image], text=["<image> red"], return_tensors="pt")["input_ids"]
        assert (ids == IMAGE).sum() == side**2 + rows * (columns + 1)


@parametrize("generates")
def test_generates(case: Case) -> None:
    model = shared_model(case.name)
    for padding in (None, "left"):
        inputs = case.inputs(model, batch=2, padding=padding)
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert generated.shape[1] > inputs["input_ids"].shape[1]
        expected = run(model, inputs)[:, -1].argmax(-1)
        if padding is None:
            assert torch.equal(generated[:, inputs["input_ids"].shape[1]], expected)


@parametrize("samples_actions")
def test_samples_actions(case: Case) -> None:
    model = shared_model(case.name)
    inputs = case.inputs(model, batch=2, padding="right")
    inputs.pop("timestep")
    actions = model.sample_actions(**inputs)
    assert actions.shape == inputs["noise"].shape
    assert torch.equal(actions, model.sample_actions(**inputs))
    assert (actions - inputs["noise"]).abs().max() > 0.1


def fill(case: Case, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Processor output completed to what forward needs: PI0's noise and time, and no labels."""
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    if case.family == "pi0":
        by_hand = case.inputs(model, batch=inputs["state"].shape[0])
        inputs |= {name: by_hand[name] for name in ("noise", "timestep")}
    return inputs


@parametrize()
def test_processor_output_runs(case: Case) -> None:
    if case.processor is None:
        pytest.skip("no processor can say an image token outside the vocabulary")
    model, processor = shared_model(case.name), case.processor()
    for batch in (1, 3):
        made = fill(case, model, dict(processor(**case.raw(batch=batch), return_tensors="pt")))
        assert run(model, made).shape[0] == batch
        assert made.keys() == case.inputs(model, batch=batch).keys()


@parametrize("two_images")
def test_processor_takes_two_images(case: Case) -> None:
    if case.processor is None:
        pytest.skip("no processor can say an image token outside the vocabulary")
    model = shared_model(case.name)
    raw = case.raw(batch=2, images_per_prompt=2)
    made = fill(case, model, dict(case.processor()(**raw, return_tensors="pt")))
    assert run(model, made).isfinite().all()


@parametrize()
def test_reload_is_bit_identical(case: Case, folder_of: Callable[[Case], Path]) -> None:
    folder, model = folder_of(case), shared_model(case.name)
    inputs = case.inputs(model, batch=2)
    loader = getattr(transformers, zoo.saved_class(folder), type(model))
    again = loader.from_pretrained(folder, **zoo.loading_options(case))
    assert type(again) is type(model)
    assert torch.equal(run(again, inputs), run(model, inputs))


# What AutoProcessor does on a saved folder, where that is not "the same processor again".
RELOADS_WITH: dict[str, str] = {
    "clip-classifier": "AutoImageProcessor",
    "siglip-classifier": "AutoImageProcessor",
    "siglip2-classifier": "AutoImageProcessor",
    # A model_type of siglip2 makes AutoTokenizer rebuild the tokenizer as Gemma's BPE, whatever was saved.
    "siglip2": "differs",
    # transformers knows no image processor for it.
    "openvla": "own",
    # A video processor is looked for, and every video processor needs torchvision.
    "llava-onevision": "fails",
    "llava-onevision-resampled": "fails",
}


@parametrize()
def test_processor_reloads(case: Case, folder_of: Callable[[Case], Path]) -> None:
    if case.processor is None:
        pytest.skip("no processor can say an image token outside the vocabulary")
    how = RELOADS_WITH.get(case.name, "AutoProcessor")
    if case.family == "pi0" and transformers.__version__.startswith("5.20."):
        pytest.skip("this version does not save the statistics of states and actions")
    folder, processor = folder_of(case), case.processor()
    if how == "fails":
        with pytest.raises((OSError, ImportError)):
            transformers.AutoProcessor.from_pretrained(folder)
        return
    loader = transformers.AutoProcessor if how == "differs" else getattr(transformers, how, type(processor))
    again = loader.from_pretrained(folder)
    raw = case.raw(batch=2)
    one, two = (dict(p(**raw, return_tensors="pt")) for p in (processor, again))
    if how == "differs":
        assert not torch.equal(one.pop("input_ids"), two.pop("input_ids"))
        one.pop("attention_mask"), two.pop("attention_mask")
    assert_same(one, two)


def test_tokenizer_has_one_token_per_word() -> None:
    for eos_last in (False, True):
        ids, made = vocabulary(eos_last), tokenizer("plain", eos_last)
        assert len(made) == len(ids) == len(SPECIAL) + len(WORDS)
        for word in WORDS:
            assert made(word)["input_ids"] == [ids[word]]
        assert made("<image>")["input_ids"] == [ids["<image>"]]
    assert vocabulary(eos_last=True)["<eos>"] == max(vocabulary(eos_last=True).values())


def test_rows_of_unequal_length_need_a_side() -> None:
    with pytest.raises(ValueError, match="padding"):
        pad_rows([[1, 2], [1]], 2, None)
    ids, mask = pad_rows([[1, 2], [3]], 2, "left")
    assert ids.tolist() == [[1, 2], [0, 3]]
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_selection_by_tags() -> None:
    assert all("gqa" in c.tags and c.family == "llava" for c in zoo.cases("gqa", family="llava"))
    assert not zoo.cases("gqa", without=("gqa",))
    with pytest.raises(ValueError, match="no case"):
        parametrize("gqa", without=("gqa",))
    with pytest.raises(KeyError, match="llava-clip-llama"):
        zoo.case("llava")
    with pytest.raises(ValueError, match="unknown tags"):
        Case("x", "vit", nn.Identity, zoo.case("vit").inputs, ("vision",), tags=frozenset({"gpa"}))
