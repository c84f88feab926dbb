"""OpenVLA: equal to what the released code computes, its folders, its inputs and its actions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import circuitvision as cv
from circuitvision import edits, openvla
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.openvla import actions, conversion
from circuitvision.openvla.processing import prompt
from tests.zoo import case, shared_model
from tests.zoo.openvla import config as zoo_config
from tests.zoo.openvla import openvla_inputs
from tests.zoo.text import BOS, tokenizer

FIXTURE = Path(__file__).parent / "fixtures" / "openvla_tiny.npz"
"""A tiny OpenVLA with released names, two inputs, and what the released code (openvla/openvla at c8f03f48) computes for them."""
BINS = slice(31744, 32000)
HEADS: dict[str, Any] = {
    "vision_config": {"num_attention_heads": 2},
    "vision_2_config": {"num_attention_heads": 2},
}
"""The released config names timm's big backbones; the fixture's are small, and weights do not show heads."""


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    with np.load(FIXTURE) as file:
        return {name: file[name] for name in file.files}


def released_weights(stored: dict[str, Any]) -> dict[str, Tensor]:
    return {name[2:]: torch.from_numpy(value) for name, value in stored.items() if name.startswith("w.")}


def write_folder(folder: Path, stored: dict[str, Any], **changes: Any) -> Path:
    """A folder as OpenVLA is released: weights in two files, a config that points to remote code."""
    weights = released_weights(stored)
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: weights[name].clone() for name in part}, folder / f"model-0000{number}-of-00002.safetensors")
    remote = {
        "AutoConfig": "configuration_prismatic.OpenVLAConfig",
        "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
    }
    config = {**json.loads(str(stored["config"])), "architectures": ["OpenVLAForActionPrediction"], "auto_map": remote}
    (folder / "config.json").write_text(json.dumps({**config, **HEADS, **changes}))
    return folder


@pytest.fixture(scope="module")
def folder(stored: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_folder(tmp_path_factory.mktemp("openvla"), stored)
    openvla.OpenVLAProcessor(openvla.OpenVLAImageProcessor(), tokenizer("bos")).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def released(folder: Path) -> cv.HookedModel:
    return cv.HookedModel.from_pretrained(folder)


def fixture_inputs(stored: dict[str, Any], number: int) -> dict[str, Tensor]:
    return {
        "input_ids": torch.from_numpy(stored[f"in{number}.input_ids"]),
        "pixel_values": torch.from_numpy(stored[f"in{number}.pixel_values"]).float(),
    }


# ---- the released code's numbers


@pytest.mark.parametrize("number", [0, 1])
def test_a_released_folder_gives_the_released_numbers(
    released: cv.HookedModel, stored: dict[str, Any], number: int
) -> None:
    inputs = fixture_inputs(stored, number)
    with torch.no_grad():
        logits, cache = released.run_with_cache(inputs, "projector.hook_in")
    if number == 0:
        torch.testing.assert_close(
            cache["projector.hook_in"], torch.from_numpy(stored["out0.vision"]), rtol=0, atol=1e-5
        )
    assert logits.shape == (1, 261, 32064)
    torch.testing.assert_close(logits[:, -1], torch.from_numpy(stored[f"out{number}.logits_last"]), rtol=0, atol=1e-5)
    of_actions = torch.from_numpy(stored[f"out{number}.logits_actions"])
    torch.testing.assert_close(logits[:, stored["rows"], BINS], of_actions, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", [0, 1])
def test_actions_are_the_released_ones_exactly(released: cv.HookedModel, stored: dict[str, Any], number: int) -> None:
    inputs, expected = fixture_inputs(stored, number), stored[f"out{number}.action"]
    for model in (released, released.module):
        assert np.array_equal(openvla.predict_action(model, inputs, "toy"), expected[None])
    with_token = {**inputs, "input_ids": inputs["input_ids"][:, :-1]}
    assert np.array_equal(openvla.predict_action(released, with_token), expected[None]), "29871 is added"
    ids = released.module.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert ids.shape == (1, 8), "ids that do not name the patches come back without them"
    assert np.array_equal(openvla.decode_actions(ids[:, 5:], released.config, "toy"), expected[None])


def test_names_go_over_and_back(stored: dict[str, Any]) -> None:
    weights = released_weights(stored)
    back = conversion.to_released(conversion.from_released(weights))
    unread = {name for name in weights if ".attn_pool." in name}
    assert unread
    assert back.keys() == weights.keys() - unread
    assert all(torch.equal(back[name], weights[name]) for name in back)


def test_a_class_token_with_a_position_is_saved_as_their_sum(folder: Path, tmp_path: Path) -> None:
    module = openvla.OpenVLAForActionPrediction.from_pretrained(folder)
    embeddings: Any = module.vision.embeddings
    with torch.no_grad():
        embeddings.position_embeddings[:, 0] = torch.randn(24, generator=torch.Generator().manual_seed(0))
    module.save_pretrained(tmp_path)
    again = openvla.OpenVLAForActionPrediction.from_pretrained(tmp_path)
    pixels = torch.randn(1, 6, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(again.vision_features(pixels), module.vision_features(pixels), rtol=1e-5, atol=1e-5)


def test_what_is_saved_has_released_names_and_loads_again(
    released: cv.HookedModel, stored: dict[str, Any], tmp_path: Path
) -> None:
    released.module.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    weights = released_weights(stored)
    assert saved.keys() <= weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in saved)
    again = openvla.OpenVLAForActionPrediction.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert again.config.norm_stats == released.config.norm_stats


def test_the_released_sizes_are_known() -> None:
    config = openvla.OpenVLAConfig()
    with torch.device("meta"):
        module = openvla.OpenVLAForActionPrediction(config)
    names = conversion.to_released(module.state_dict())
    assert names["projector.fc1.weight"].shape == (8704, 2176)
    assert names["vision_backbone.featurizer.blocks.23.attn.qkv.weight"].shape == (3072, 1024)
    assert names["vision_backbone.fused_featurizer.blocks.26.mlp.fc1.weight"].shape == (4304, 1152)
    assert names["language_model.lm_head.weight"].shape == (32064, 4096)
    # The released file has 982 tensors: 13 of the pooling head, which nothing reads.
    assert len(names) == 982 - 13
    assert config.n_patches == 256
    assert config.n_words == 32000


# ---- what is refused


def test_weights_that_are_no_released_ones_are_refused(stored: dict[str, Any], tmp_path: Path) -> None:
    write_folder(tmp_path, stored)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match="holds no weights"):
        cv.HookedModel.from_pretrained(tmp_path)
    weights = released_weights(stored)
    foreign = {f"model.{name}": value for name, value in weights.items() if ".attn_pool." not in name}
    save_file(foreign, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"no released OpenVLA.*vision_backbone"):
        cv.HookedModel.from_pretrained(tmp_path)
    weights["projector.linear.weight"] = weights.pop("projector.fc3.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"fc3\.weight.*projector\.linear\.weight"):
        cv.HookedModel.from_pretrained(tmp_path)


def test_heads_that_nothing_says_are_asked_for(stored: dict[str, Any], tmp_path: Path) -> None:
    write_folder(tmp_path, stored, vision_config=None, vision_2_config=None)
    with pytest.raises(InputError, match=r"3 blocks of 24.*vision_config=\{'num_attention_heads'"):
        cv.HookedModel.from_pretrained(tmp_path)
    module = openvla.OpenVLAForActionPrediction.from_pretrained(tmp_path, **HEADS)
    with torch.no_grad():
        logits = module(**fixture_inputs(stored, 0)).logits
    torch.testing.assert_close(logits[:, -1], torch.from_numpy(stored["out0.logits_last"]), rtol=0, atol=1e-5)
    write_folder(tmp_path, stored, image_sizes=[28, 28])
    with pytest.raises(InputError, match=r"position_embedding.*image_sizes"):
        cv.HookedModel.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="vit_huge"):
        openvla.OpenVLAConfig(timm_model_ids=("vit_huge", "vit_so400m_patch14_siglip_224"))
    with pytest.raises(UnsupportedModelError, match="alone"):
        openvla.OpenVLAConfig(timm_model_ids=("vit_so400m_patch14_siglip_224",), use_fused_vision_backbone=False)


def test_unknown_data_sets_are_refused_and_the_known_ones_listed(stored: dict[str, Any]) -> None:
    model = cv.HookedModel(shared_model("openvla"))
    inputs = openvla_inputs(model)
    with pytest.raises(InputError, match=r"bridge.*desk, floor"):
        openvla.predict_action(model, inputs, "bridge")
    with pytest.raises(InputError, match="desk, floor"):
        openvla.predict_action(model, inputs)
    with pytest.raises(InputError, match="norm_stats"):
        actions.statistics(openvla.OpenVLAConfig(), "bridge")
    with pytest.raises(InputError, match="3 dimensions"):
        actions.unnormalise(np.zeros((1, 2)), zoo_config(), "desk")


def test_statistics_beside_the_weights_are_added(stored: dict[str, Any], tmp_path: Path) -> None:
    write_folder(tmp_path, stored)
    own = {"kitchen": {"action": {"q01": [0.0], "q99": [1.0]}}}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(own))
    module = openvla.OpenVLAForActionPrediction.from_pretrained(tmp_path)
    assert set(module.config.norm_stats) == {"toy", "kitchen"}
    assert actions.action_dim(module.config, "kitchen") == 1


# ---- actions


def test_bins_are_centres_counted_from_the_end() -> None:
    bins = actions.ActionTokens(32000)
    assert bins.ids == range(31744, 32000)
    assert bins.values([31999, 31998, 31745, 31744, 5])[:4].tolist() == [
        *bins.centres[[0, 1]].tolist(),
        *[bins.centres[254]] * 2,
    ]
    torch.testing.assert_close(
        torch.tensor(bins.values(list(bins.ids))).float(), cv.families.action_bins(torch.tensor(bins.ids), 32000)
    )
    spoken = bins.of_values(bins.centres)
    assert np.array_equal(bins.values(spoken), bins.centres), "what is said is read back"


def test_actions_are_in_the_units_of_the_data_set() -> None:
    made = actions.unnormalise(np.array([[-1.0, 1.0, 0.25]]), zoo_config(), "desk")
    np.testing.assert_allclose(made, [[-1.0, 2.5, 0.25]])
    made = actions.unnormalise(np.array([[0.0, -1.0]]), zoo_config(), "floor")
    np.testing.assert_allclose(made, [[0.0, 0.0]])


def test_edits_change_actions_as_they_change_logits() -> None:
    model = cv.HookedModel(shared_model("openvla"))
    inputs = openvla_inputs(model, batch=2)
    inputs = {**inputs, "input_ids": inputs["input_ids"].clone()}
    plain = model.generate(inputs, max_new_tokens=3, do_sample=False)
    edit = edits.overwrite("vision_2.blocks.1.hook_resid_post", range(20), 1.5)
    steered = model.generate(inputs, edits=[edit], max_new_tokens=3, do_sample=False)
    assert not torch.equal(plain, steered)
    with torch.no_grad():
        assert torch.equal(model.run(inputs, [edit])[:, -1].argmax(-1), steered[:, -3])


def test_actions_of_a_batch_are_those_of_its_rows() -> None:
    model = cv.HookedModel(case("openvla").build())
    inputs = openvla_inputs(model, 3, padding="left", named=False)
    together = openvla.predict_action(model, inputs, "desk")
    assert together.shape == (3, 3)
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = {"input_ids": inputs["input_ids"][row, real][None], "pixel_values": inputs["pixel_values"][row, None]}
        np.testing.assert_array_equal(openvla.predict_action(model.module, alone, "desk")[0], together[row])
    with pytest.raises(InputError, match="left"):
        openvla.predict_action(model, openvla_inputs(model, 3, padding="right", named=False), "desk")
    with pytest.raises(InputError, match="wrapped"):
        openvla.predict_action(model.module, inputs, "desk", edits=[edits.ablate("vision.hook_input")])


def test_prompts_that_end_differently_are_refused(released: cv.HookedModel, stored: dict[str, Any]) -> None:
    one = fixture_inputs(stored, 0)
    two = {name: torch.cat([value, value]) for name, value in one.items()}
    two["input_ids"] = two["input_ids"].clone()
    two["input_ids"][1, -1] = 7
    with pytest.raises(InputError, match="29871"):
        openvla.predict_action(released, two)


# ---- the processor


def test_a_picture_is_resized_by_pillow_and_normalised_twice() -> None:
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (37, 51, 3), dtype=np.uint8))
    made = openvla.OpenVLAImageProcessor()(picture)["pixel_values"]
    assert made.shape == (1, 6, 224, 224)
    resized = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC)).astype(np.float64) / 255
    imagenet = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    both = np.concatenate([imagenet, (resized - 0.5) / 0.5], -1)
    np.testing.assert_allclose(made[0].permute(1, 2, 0), both, atol=1e-6)
    again = openvla.OpenVLAImageProcessor()(np.moveaxis(np.asarray(picture), -1, 0))["pixel_values"]
    assert torch.equal(made, again)


def test_prompts_end_with_the_empty_piece_and_are_filled_up() -> None:
    assert prompt("Pick up the SPOON") == "In: What action should the robot take to pick up the spoon?\nOut:"

    class Words:
        pad_token_id, padding_side = 32000, "right"

        def __len__(self) -> int:
            return 32001

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, *(100 + len(word) for word in text.split())]}

    processor = openvla.OpenVLAProcessor(openvla.OpenVLAImageProcessor(), Words())
    made = processor(text=["a bb", "ccc"])
    assert made["input_ids"].tolist() == [[1, 101, 102, 29871], [1, 103, 29871, 32000]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    made = processor(text=["a bb", "ccc"], padding_side="left")
    assert made["input_ids"].tolist() == [[1, 101, 102, 29871], [32000, 1, 103, 29871]]
    with pytest.raises(InputError, match="pictures and 1 prompts"):
        processor(text="a", images=[Image.new("RGB", (8, 8))] * 2)


def test_inputs_made_by_the_model_name_every_position(released: cv.HookedModel) -> None:
    assert released.processor is not None
    inputs = released.inputs(images=Image.new("RGB", (30, 20), "red"), text=prompt("reach the red circle"))
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    tokens = released.tokens(inputs)["language"]
    assert tokens.kind[0, :2].tolist() == ["text", "patch"]
    assert inputs["input_ids"][0, 0] == BOS
    assert tokens.labels()[1] == "r0c0"
    assert tokens.labels()[256] == "r15c15"
