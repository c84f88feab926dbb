"""Every mistake gets one clear error that names the fix, before or at the point of the mistake, and leaves nothing hooked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import circuitvision as cv
from circuitvision.errors import CircuitVisionError, HookError, InputError, UnknownSiteError, UnsupportedModelError
from tests.conformance.checks_model import hook_tables, implementations
from tests.conformance.setting import nothing
from tests.zoo import CASES, Case, parametrize, primary, shared_model

PATTERN = "vision.blocks.0.attn.hook_pattern"
RESID = "vision.blocks.0.hook_resid_post"


@pytest.fixture
def checked() -> Iterator[Callable[[str], tuple[cv.HookedModel, dict[str, Any]]]]:
    """A wrapped model and its inputs; afterwards nothing may be left on the module."""
    made: list[tuple[nn.Module, Any, Any]] = []

    def make(name: str) -> tuple[cv.HookedModel, dict[str, Any]]:
        case, module = CASES[name], copy.deepcopy(shared_model(name))
        inputs = case.inputs(module, batch=2)
        with torch.no_grad():
            module(**inputs)
        made.append((module, hook_tables(module), implementations(module)))
        return cv.HookedModel(module, case.processor() if case.processor else None), inputs

    yield make
    for module, hooks, attention in made:
        assert hook_tables(module) == hooks, "a mistake left hooks behind"
        assert implementations(module) == attention, "a mistake left another attention implementation"


# ---- names


@parametrize()
def test_a_misspelt_site_suggests_the_right_one(case: Case, checked: Any) -> None:
    model, inputs = checked(case.name)
    wrong = {
        "vision.blocks.0.attn.hook_patern": "vision.blocks.0.attn.hook_pattern",
        "vision.block.0.hook_resid_post": "vision.blocks.0.hook_resid_post",
        "vision.blocks.1.hook_residpost": "vision.blocks.1.hook_resid_post",
    }
    for name, right in wrong.items():
        for call in (
            lambda name=name: model.run_with_hooks(inputs, [(name, nothing)]),
            lambda name=name: model.run_with_cache(inputs, name),
            lambda name=name: model.run_with_cache(inputs, [RESID, name]),
            lambda name=name: model.add_hook(name, nothing),
        ):
            with pytest.raises(UnknownSiteError) as caught:
                call()
            assert right in str(caught.value)
            assert sum(site in str(caught.value) for site in model.sites()) >= 3


@pytest.mark.parametrize("names_filter", ["*.hook_nothing", lambda name: False, [], ["**.hook_absent"], [3]])
def test_a_filter_that_matches_nothing_raises(names_filter: Any, checked: Any) -> None:
    model, inputs = checked("vit")
    with pytest.raises(UnknownSiteError):
        model.run_with_cache(inputs, names_filter)


def test_a_name_missing_from_a_cache_raises(checked: Any) -> None:
    model, inputs = checked("clip")
    _, cache = model.run_with_cache(inputs, "vision.**")
    for key in (
        "text.blocks.0.attn.hook_z",
        "vision.blocks.0.attn.hook_zz",
        ("vision", "z", 17),
        ("audio", "z", 0),
        ("vision", "scale", 0),
    ):
        with pytest.raises(UnknownSiteError):
            cache[key]
        assert key not in cache


def test_an_unknown_tower_names_those_there_are(checked: Any) -> None:
    model, inputs = checked("clip")
    with pytest.raises(AttributeError, match="vision, text"):
        _ = model.language
    _, cache = model.run_with_cache(inputs)
    with pytest.raises(UnknownSiteError, match="vision, text"):
        cache.decompose_resid("language")
    with pytest.raises(InputError, match="vision, text"):
        model.run_with_cache(inputs, stop_at_layer=("language", 1))


@pytest.mark.parametrize("layer", [4, -4, 99])
def test_a_layer_that_does_not_exist(layer: int, checked: Any) -> None:
    model, inputs = checked("vit")
    with pytest.raises(InputError, match="3 layers"):
        model.run_with_cache(inputs, stop_at_layer=layer)


def test_an_unknown_keyword_is_not_swallowed(checked: Any) -> None:
    """Transformers accepts any keyword in silence; a misspelt option must not pass for one that worked."""
    for name in ("vit", "llava-clip-llama", "paligemma", "pi0", "clip"):
        model, inputs = checked(name)
        for call in (
            lambda model=model, inputs=inputs: model(inputs, remote=True),
            lambda model=model, inputs=inputs: model.run_with_cache(inputs, RESID, fwd_hooks=[(RESID, nothing)]),
            lambda model=model, inputs=inputs: model({**inputs, "pixel_value": inputs["pixel_values"]}),
        ):
            with pytest.raises((InputError, TypeError)):
                call()


# ---- hooks


@pytest.mark.parametrize(
    "site",
    [
        RESID,
        PATTERN,
        "vision.blocks.1.hook_resid_mid",
        "vision.blocks.1.attn.hook_result",
        "vision.blocks.1.ln1.hook_scale",
    ],
)
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda v: v[:1], "shape"),
        (lambda v: v.mean(), "shape"),
        (lambda v: v.double(), "float64"),
        (lambda v: v.to(torch.bfloat16), "bfloat16"),
        (lambda v: v.to("meta"), "meta"),
        (lambda v: v.tolist(), "list"),
        (lambda v: (v,), "tuple"),
    ],
)
def test_a_hook_that_answers_something_else(
    site: str, answer: Callable[[Tensor], Any], says: str, checked: Any
) -> None:
    model, inputs = checked("vit")
    with torch.no_grad():
        before = model(inputs)
        with pytest.raises(HookError) as caught:
            model.run_with_hooks(inputs, [(site, lambda v, hook: answer(v))])
        assert site in str(caught.value)
        assert says in str(caught.value)
        assert torch.equal(model(inputs), before)


@pytest.mark.parametrize(
    "entry",
    ["vision.hook_embed", ("vision.hook_embed",), ("vision.hook_embed", None), (nothing, "vision.hook_embed"), None],
)
def test_a_malformed_hook_entry(entry: Any, checked: Any) -> None:
    model, inputs = checked("vit")
    with pytest.raises(CircuitVisionError):
        model.run_with_hooks(inputs, [entry])


def test_an_error_inside_a_hook_passes_through_unchanged(checked: Any) -> None:
    model, inputs = checked("llava-clip-llama")

    def fail(value: Tensor, hook: Any) -> None:
        raise ZeroDivisionError(hook.name)

    for site in model.sites("*.blocks.0.**"):
        with pytest.raises(ZeroDivisionError, match=site):
            model.run_with_hooks(inputs, [(site, fail)])
    with pytest.raises(ZeroDivisionError), model.record("language.**"), model.hooks([(PATTERN, fail)]):
        model.generate(inputs, max_new_tokens=2)


# ---- tensors


@parametrize()
def test_tensors_of_another_device_or_dtype(case: Case, checked: Any) -> None:
    model, inputs = checked(case.name)
    for name in ("pixel_values", "input_ids", "attention_mask"):
        if name in inputs:
            with pytest.raises(InputError, match=name):
                model({**inputs, name: inputs[name].to("meta")})
    with torch.no_grad():
        expected = model(inputs)
        try:
            out = model({**inputs, "pixel_values": inputs["pixel_values"].double()})
        except InputError as error:
            assert "pixel_values" in str(error)  # noqa: PT017
        else:
            assert torch.equal(out, expected), "the model casts pixels to its own dtype"


@parametrize(without=("packed_patches",))
def test_images_of_another_size(case: Case, checked: Any) -> None:
    model, inputs = checked(case.name)
    pixels = inputs["pixel_values"]
    for cut in (pixels[..., :-1], pixels[..., :-1, :]):
        if case.family.startswith("dino"):
            # It takes any size, and leaves out what is no whole patch.
            with torch.no_grad():
                assert torch.equal(model({"pixel_values": cut}), primary(model.module(pixel_values=cut)))
            continue
        with pytest.raises(InputError):
            model({**inputs, "pixel_values": cut})
    with pytest.raises(InputError):
        model({**inputs, "pixel_values": pixels[..., :2, :, :]})
    with pytest.raises(InputError):
        model({**inputs, "pixel_values": pixels.flatten(0, -2)})


def test_the_error_of_an_image_says_both_sizes(checked: Any) -> None:
    model, _ = checked("vit-wide")
    with pytest.raises(InputError, match=r"20x12.*12x20"):
        model({"pixel_values": torch.zeros(1, 3, 20, 12)})
    with pytest.raises(InputError, match="channel"):
        model({"pixel_values": torch.zeros(1, 12, 20, 3)})


@parametrize("generates")
def test_prompts_and_images_must_agree(case: Case, checked: Any) -> None:
    model, inputs = checked(case.name)
    ids, token = inputs["input_ids"], model.image_token_id
    text_only = torch.where(ids == token, torch.full_like(ids, 9), ids)
    if case.family != "openvla":
        # There the model puts the patches into prompts that do not name them.
        with pytest.raises(InputError, match="image token"):
            model({**inputs, "input_ids": text_only})
    without = {name: value for name, value in inputs.items() if name not in ("pixel_values", "image_sizes")}
    with pytest.raises(InputError, match="pixel_values"):
        model(without)
    fewer = ids.clone()
    fewer[0, int((ids[0] == token).nonzero()[0])] = 9
    with pytest.raises(InputError, match="image token"):
        model({**inputs, "input_ids": fewer})


@parametrize("padding_right")
def test_a_mask_of_another_length(case: Case, checked: Any) -> None:
    model, inputs = checked(case.name)
    if "attention_mask" not in inputs:
        pytest.skip("this processor makes no mask")
    mask = inputs["attention_mask"]
    for wrong in (mask[:, :-1], torch.cat([mask, mask], 1), mask[:1]):
        with pytest.raises(InputError, match="attention_mask"):
            model({**inputs, "attention_mask": wrong})


def test_inputs_that_are_no_mapping(checked: Any) -> None:
    model, inputs = checked("llava-clip-llama")
    for wrong in (inputs["pixel_values"], [inputs], "a red circle", None, 3):
        with pytest.raises(InputError, match="mapping"):
            model(wrong)
    vit, inputs = checked("vit")
    with torch.no_grad():
        assert torch.equal(vit(inputs["pixel_values"]), vit(inputs))


def test_packed_patches_need_their_mask_and_shapes(checked: Any) -> None:
    model, inputs = checked("siglip2-vision")
    for missing in ("pixel_attention_mask", "spatial_shapes"):
        with pytest.raises(InputError, match=missing):
            model({name: value for name, value in inputs.items() if name != missing})


def test_a_glob_of_a_tower_that_did_not_run(checked: Any) -> None:
    model, inputs = checked("llava-clip-llama")
    ids = torch.where(inputs["input_ids"] == model.image_token_id, 9, inputs["input_ids"])
    text = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
    for names in ("vision.**", ["vision.blocks.*.attn.hook_z", "projector.*"], lambda name: name.startswith("vision")):
        with pytest.raises(HookError, match="vision"):
            model.run_with_cache(text, names)
    with pytest.raises(HookError, match="stop_at_layer"):
        model.run_with_cache(inputs, "language.blocks.1.**", stop_at_layer=("language", 0))
    assert len(model.run_with_cache(text, "**")[1])


# ---- options


def test_a_cache_is_no_input(checked: Any) -> None:
    model, inputs = checked("vit")
    _, cache = model.run_with_cache(inputs)
    metric = cv.metrics.logit_diff(0, 1)
    for call in (lambda: model(cache), lambda: cv.readout.legrad(model, cache, metric)):
        with pytest.raises(InputError, match=r"cache\.inputs"):
            call()


@pytest.mark.parametrize("case", [CASES["clip"], CASES["siglip"], CASES["siglip2"]], ids=lambda case: case.name)
def test_a_text_longer_than_the_table_of_positions(case: Case, checked: Any) -> None:
    model, inputs = checked(case.name)
    room = model.text.config.max_position_embeddings
    ids = inputs["input_ids"][:, :1].expand(-1, room + 1)
    with pytest.raises(InputError, match=rf"takes {room + 1} tokens.*room for {room}"):
        model({**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_lists_of_nothing_and_pictures_that_are_not_there(tmp_path: Path) -> None:
    model = cv.organisms.load("shapes-llava")
    prompt = "<image> what color is the circle ?"
    with pytest.raises(InputError, match="no prompt"):
        model.inputs(images=torch.zeros(3, 32, 32), text=[])
    for images in ("nowhere.png", [tmp_path / "nowhere.png"], [["nowhere.png"]]):
        with pytest.raises(InputError, match=r"no picture '.*nowhere\.png'"):
            model.inputs(images=images, text=prompt)
    with pytest.raises(InputError, match="Does each prompt hold <image> once per image"):
        model.inputs(images=torch.zeros(3, 32, 32), text="what color is the circle ?")
    with pytest.raises(InputError) as caught:
        model.inputs(images=[object()], text=prompt)
    assert "each prompt" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_a_gpu_that_is_not_there(device: Any, checked: Any) -> None:
    model, _ = checked("vit")
    with pytest.raises(InputError, match="no GPU for"):
        model.to(device)
    with pytest.raises(InputError, match="no GPU for"):
        model.to(device=device)
    with pytest.raises(InputError, match="no GPU for"):
        cv.organisms.load("shapes-vit", device=device)
    with pytest.raises(InputError, match="no device"):
        model.to("gpu")


def test_a_star_that_should_cross_dots(checked: Any) -> None:
    model, _ = checked("vit")
    with pytest.raises(UnknownSiteError, match=r"\*\* crosses dots: 'vision\.\*\*hook_resid_post' matches"):
        model.sites("vision.*hook_resid_post")


def test_gradients_need_a_differentiable_metric(checked: Any) -> None:
    model, inputs = checked("vit")
    with pytest.raises(InputError, match="metric"):
        model.run_with_cache(inputs, incl_bwd=True)
    for metric in (lambda logits: 3.0, lambda logits: logits.detach(), lambda logits: logits.argmax(-1)):
        with pytest.raises(InputError, match="metric"):
            model.run_with_cache(inputs, incl_bwd=True, metric=metric)


def test_removing_a_batch_of_two(checked: Any) -> None:
    model, inputs = checked("vit")
    with pytest.raises(InputError, match="one row"):
        model.run_with_cache(inputs, remove_batch_dim=True)


def test_words(checked: Any) -> None:
    model, _ = checked("llava-clip-llama")
    assert model.token("red") == model.tokenizer.convert_tokens_to_ids("red")
    with pytest.raises(InputError, match="red"):
        model.token("redd")
    with pytest.raises(InputError, match="2 tokens"):
        model.token("red circle")
    vit, _ = checked("vit")
    assert vit.token("label 3") == 3
    with pytest.raises(InputError, match="label 3"):
        vit.token("lable 3")


def test_a_model_without_a_processor_says_so() -> None:
    model = cv.HookedModel(shared_model("vit"))
    with pytest.raises(InputError, match="processor"):
        model.inputs(images=[torch.zeros(3, 16, 16)])
    with pytest.raises(InputError, match="tokenizer"):
        model.to_str_tokens("red")


def test_models_that_do_not_generate_or_act(checked: Any) -> None:
    vit, inputs = checked("vit")
    with pytest.raises(UnsupportedModelError, match="generate"):
        vit.generate(inputs)
    with pytest.raises(UnsupportedModelError, match="actions"):
        vit.sample_actions(inputs)
    pi0, inputs = checked("pi0")
    with pytest.raises(UnsupportedModelError, match="generate"):
        pi0.generate(inputs)


# ---- models


def test_unsupported_modules_say_what_was_looked_for_and_found() -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11)
    for module, found in ((nn.Linear(2, 2), "Linear"), (transformers.GPT2LMHeadModel(config), "gpt2")):
        with pytest.raises(UnsupportedModelError) as caught:
            cv.HookedModel(module)
        assert found in str(caught.value)
        assert "LlavaForConditionalGeneration" in str(caught.value)


def test_compiled_modules_are_refused() -> None:
    module = copy.deepcopy(shared_model("vit"))
    with pytest.raises(UnsupportedModelError, match="compile"):
        cv.HookedModel(torch.compile(module))  # type: ignore[arg-type]
    module.vit.compile()
    with pytest.raises(UnsupportedModelError, match="compile"):
        cv.HookedModel(module)


def test_folders_that_hold_no_supported_model(tmp_path: Path) -> None:
    with pytest.raises(CircuitVisionError):
        cv.HookedModel.from_pretrained(tmp_path)
    transformers.GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"gpt2|GPT2"):
        cv.HookedModel.from_pretrained(tmp_path)
    with pytest.raises((CircuitVisionError, OSError)):
        cv.HookedModel.from_pretrained(tmp_path / "absent")


def test_two_wrappers_of_one_module_do_not_mix_up_attention(checked: Any) -> None:
    model, inputs = checked("vit")
    other = cv.HookedModel(model.module)
    with (
        pytest.raises(HookError, match="one HookedModel"),
        model.hooks([(PATTERN, nothing)]),
        other.hooks([(PATTERN, nothing)]),
    ):
        pass
    with torch.no_grad():
        assert torch.equal(other(inputs), model(inputs))
