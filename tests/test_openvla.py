"""OpenVLA: equal to what the released code computes, its folders, its inputs and actions, and every edit against hooks written by hand."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
    model.config.norm_stats = zoo_config().norm_stats
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


# ---- where the patches stand


@pytest.fixture(scope="module")
def model() -> cv.HookedModel:
    return cv.HookedModel(case("openvla").build().double())


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_ids_that_name_the_patches_and_ids_that_do_not_are_the_same_run(
    model: cv.HookedModel, padding: str | None
) -> None:
    named = openvla_inputs(model, 3, dtype=torch.float64, padding=padding)
    plain = openvla_inputs(model, 3, dtype=torch.float64, padding=padding, named=False)
    assert plain["input_ids"].shape[1] + 9 == named["input_ids"].shape[1]
    with torch.no_grad():
        expected = model(named)
        assert torch.equal(model(plain), expected)
        assert torch.equal(model.module(**plain).logits, expected)
        _, cache = model.run_with_cache(plain)
    assert all(torch.equal(cache.inputs[name], named[name]) for name in named)
    maps = model.tokens(plain)
    assert np.array_equal(maps["language"].kind, model.tokens(named)["language"].kind)
    first = named["attention_mask"].argmax(1)
    for row, start in enumerate(first.tolist()):
        kinds = maps["language"].kind[row]
        assert kinds[start : start + 12].tolist() == ["text", *["patch"] * 9, "text", "text"]
        assert (kinds == "padding").tolist() == (named["attention_mask"][row] == 0).tolist()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_padded_row_is_what_it_is_alone(model: cv.HookedModel, padding: str) -> None:
    inputs = openvla_inputs(model, 3, dtype=torch.float64, padding=padding, named=False)
    with torch.no_grad():
        logits = model(inputs)
        for row in range(3):
            real = inputs["attention_mask"][row].bool()
            alone = model(
                {"input_ids": inputs["input_ids"][row, real][None], "pixel_values": inputs["pixel_values"][row, None]}
            )
            there = model.tokens(inputs)["language"].kind[row] != "padding"
            # Llama turns by angles, and measures lengths, in float32.
            torch.testing.assert_close(logits[row, there], alone[0], rtol=1e-5, atol=1e-5)


def silenced(model: cv.HookedModel) -> cv.HookedModel:
    """A copy whose vision blocks write nothing, so that patches do not mix."""
    module = case("openvla").build().double()
    for tower, out in (("vision", "o_proj"), ("vision_2", "out_proj")):
        for name, part in getattr(module, tower).named_modules():
            if name.endswith((out, "mlp.fc2")):
                nn.init.zeros_(part.weight)
                nn.init.zeros_(part.bias)
    return cv.HookedModel(module)


@pytest.mark.parametrize("channels", [slice(0, 3), slice(3, 6)])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_painting_a_patch_moves_the_positions_that_the_map_names(
    model: cv.HookedModel, padding: str, channels: slice
) -> None:
    quiet = silenced(model)
    inputs = openvla_inputs(quiet, 2, dtype=torch.float64, padding=padding, named=False)
    tokens = quiet.tokens(inputs)
    tower = tokens["vision" if channels.start == 0 else "vision_2"]
    site = "language.hook_input"
    with torch.no_grad():
        _, before = quiet.run_with_cache(inputs, site)
        for patch in range(9):
            row, column = divmod(patch, 3)
            painted = inputs["pixel_values"].clone()
            painted[1, channels, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
            _, after = quiet.run_with_cache({**inputs, "pixel_values": painted}, site)
            moved = (after[site] != before[site]).any(-1).numpy()
            language = tokens["language"]
            expected = (language.patch_row == row) & (language.patch_col == column) & (language.example == 1)[:, None]
            assert np.array_equal(moved, expected)
            at = tower.n_positions - 9 + patch
            assert tower.box[1, at].tolist() == [4 * column, 4 * row, 4 * column + 4, 4 * row + 4]
            assert language.box[1, moved[1]].tolist() == [tower.box[1, at].tolist()]


def test_pictures_of_another_size_run_where_positions_are_stretched(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 2, dtype=torch.float64, image_size=(16, 12), named=False)
    assert model.tokens(inputs)["language"].n_positions == 7 + 12
    with torch.no_grad():
        assert torch.equal(model(inputs), model.module(**inputs).logits)
    del inputs["interpolate_pos_encoding"]
    with pytest.raises(InputError, match="16x12"):
        model(inputs)


def test_inputs_that_cannot_be_are_refused(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 2, dtype=torch.float64, named=False)
    with pytest.raises(InputError, match="3 channels, the model reads 6"):
        model({**inputs, "pixel_values": inputs["pixel_values"][:, :3]})
    with pytest.raises(InputError, match="position_ids"):
        model({**inputs, "position_ids": torch.arange(7)[None]})
    with pytest.raises(InputError, match="attention_mask"):
        model({**inputs, "attention_mask": torch.ones(2, 16)})
    named = openvla_inputs(model, 2, dtype=torch.float64)
    short = {name: named[name][:, 2:] for name in ("input_ids", "attention_mask")}
    with pytest.raises(InputError, match="hold 16 image tokens"):
        model({**named, **short})
    with pytest.raises(InputError, match="pixel_values need input_ids"):
        model.module(inputs_embeds=torch.zeros(2, 7, 32, dtype=torch.float64), pixel_values=inputs["pixel_values"])


# ---- generating


@pytest.mark.parametrize("named", [True, False])
def test_generating_is_the_greedy_loop_with_and_without_a_cache(model: cv.HookedModel, named: bool) -> None:
    inputs = openvla_inputs(model, 3, dtype=torch.float64, padding="left", named=named)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        for _ in range(4):
            logits = model.module(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    calls: list[int] = []
    handle = model.module.vision.register_forward_hook(lambda *call: calls.append(1))
    for cached in (True, False):
        assert torch.equal(model.module.generate(**inputs, use_cache=cached, **options), ids)
    handle.remove()
    assert len(calls) == 1 + 4, "with a cache, pictures are read in the first step alone"
    assert torch.equal(model.generate(inputs, **options)[:, -4:], ids[:, -4:])
    beams = model.module.generate(**inputs, num_beams=2, **options)
    assert beams.shape == ids.shape
    assert torch.equal(beams[:, :-4], inputs["input_ids"])


def test_a_run_that_continues_a_cache_is_the_whole_run(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 2, dtype=torch.float64)
    width = inputs["input_ids"].shape[1]
    with torch.no_grad():
        whole = model(inputs)
        start = {
            "input_ids": inputs["input_ids"][:, : width - 2],
            "attention_mask": inputs["attention_mask"][:, : width - 2],
            "pixel_values": inputs["pixel_values"],
        }
        past = model.module(**start, use_cache=True).past_key_values
        rest = {"input_ids": inputs["input_ids"][:, -2:], "attention_mask": inputs["attention_mask"]}
        edit = edits.ablate("language.blocks.1.hook_mlp_out", positions=[width - 1])
        edited = model.run({**rest, "past_key_values": past}, [edit])
        torch.testing.assert_close(edited, model.run(inputs, [edit])[:, -2:], rtol=1e-9, atol=1e-10)
        past = model.module(**start, use_cache=True).past_key_values
        torch.testing.assert_close(model({**rest, "past_key_values": past}), whole[:, -2:], rtol=1e-9, atol=1e-10)


# ---- edits against hooks written by hand


IN_PLACE = 2
"""The input of a norm that the skip path reads as well: it is written where it stands."""


def parts(module: Any) -> Iterator[tuple[str, nn.Module, int, int]]:
    """Site, module, whether the module's input is the site (else its output), and heads of its last axis (0: none)."""
    towers = {
        "vision": (module.vision.encoder.layer, "norm2", "attention", "o_proj", 3, 3),
        "vision_2": (module.vision_2.encoder.layers, "layer_norm2", "self_attn", "out_proj", 5, 5),
        "language": (module.language_model.model.layers, "post_attention_layernorm", "self_attn", "o_proj", 4, 2),
    }
    for tower, (blocks, ln2, attention, out, heads, kv) in towers.items():
        block, prefix = blocks[1], f"{tower}.blocks.1"
        own = getattr(block, attention)
        yield f"{tower}.hook_input", blocks[0], True, 0
        yield f"{prefix}.hook_resid_pre", block, True, 0
        yield f"{prefix}.hook_resid_mid", getattr(block, ln2), IN_PLACE, 0
        yield f"{prefix}.hook_resid_post", block, False, 0
        yield f"{prefix}.attn.hook_q", own.q_proj, False, heads
        yield f"{prefix}.attn.hook_k", own.k_proj, False, kv
        yield f"{prefix}.attn.hook_v", own.v_proj, False, kv
        yield f"{prefix}.attn.hook_z", getattr(own, out), True, heads
        scale = tower == "vision"
        yield f"{prefix}.hook_attn_out", block.layer_scale1 if scale else getattr(own, out), False, 0
        yield f"{prefix}.hook_mlp_out", block.layer_scale2 if scale else block.mlp, False, 0
        down = block.mlp.down_proj if tower == "language" else block.mlp.fc2
        yield f"{prefix}.mlp.hook_post", down, True, 0
        first = block.mlp.gate_proj if tower == "language" else block.mlp.fc1
        yield f"{prefix}.mlp.hook_pre", first, False, 0
    yield "vision.hook_embed", module.vision.embeddings.patch_embeddings, False, 0
    yield "language.hook_embed", module.get_input_embeddings(), False, 0
    yield "language.blocks.1.mlp.hook_pre_linear", module.language_model.model.layers[1].mlp.up_proj, False, 0
    yield "projector.hook_in", module.projector, True, 0
    yield "projector.hook_out", module.projector, False, 0
    yield "language.hook_readout", module.language_model.lm_head, True, 0


def scaled_by_hand(module: Any, inputs: dict[str, Any], part: nn.Module, enters: int, heads: int, place: Any) -> Tensor:
    """Logits where a value is scaled by −1.7 at one position, and in the last head alone where there are heads."""
    position, head = place

    def scale(value: Tensor) -> Tensor:
        value = value if enters == IN_PLACE else value.clone()
        chosen = value[:, position].unflatten(-1, (heads, -1))[:, head] if heads else value[:, position]
        chosen *= -1.7
        return value

    def before(own: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (scale(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: scale(kwargs[name])}

    def after(own: Any, args: Any, output: Any) -> Any:
        return (scale(output[0]), *output[1:]) if isinstance(output, tuple) else scale(output)

    # Before transformers records hidden states.
    handle = (
        part.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        if enters
        else part.register_forward_hook(after, prepend=True)
    )
    try:
        with torch.no_grad():
            return module(**inputs).logits
    finally:
        handle.remove()


def test_edits_in_all_towers_equal_hooks_by_hand_in_runs_and_sweeps(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 2, dtype=torch.float64, padding="left", named=False)
    groups, expected = [], []
    with torch.no_grad():
        plain = model(inputs)
    for site, part, enters, heads in parts(model.module):
        tower = site.partition(".")[0]
        row = {"vision": 4, "vision_2": 3, "language": 6, "projector": 5}[tower]
        # Two registers and the class token are left out on the way to the projector, and not there yet in an embedding.
        own = row - 3 if tower == "projector" or site == "vision.hook_embed" else row
        if site == "language.hook_embed":
            # A position of text: patches take the place of what is looked up there.
            row = own = plain.shape[1] - 2
        if site == "language.hook_readout":
            row = own = plain.shape[1] - 1
        head = heads - 1 if heads else None
        by_hand = scaled_by_hand(model.module, inputs, part, enters, heads, (own, head))
        assert not torch.allclose(by_hand, plain, atol=1e-6), site
        edit = edits.scale(site, -1.7, positions=[row], heads=None if head is None else [head])
        with torch.no_grad():
            torch.testing.assert_close(model.run(inputs, [edit]), by_hand, rtol=1e-9, atol=1e-10, msg=site)
        groups.append(edit)
        expected.append(by_hand[:, -1, 7])
    swept = model.sweep(inputs, groups, lambda logits: logits[:, -1, 7], progress=False)
    torch.testing.assert_close(swept.values, torch.stack(expected), rtol=1e-8, atol=1e-9)
    assert not any(plan.in_full for plan in swept.plan)


def test_both_backbones_together_are_swept_as_they_are_run(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 3, dtype=torch.float64)
    groups = [
        [edits.ablate("vision.blocks.1.hook_mlp_out"), edits.ablate("vision_2.blocks.0.hook_attn_out")],
        [
            edits.ablate("vision_2.blocks.2.attn.hook_z", heads=[1]),
            edits.scale("language.blocks.0.hook_resid_mid", 0.5),
        ],
        [edits.block_attention("language", queries="last", keys="patch", layers=[1])],
    ]

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1].logsumexp(-1)

    swept = model.sweep(inputs, groups, metric, progress=False)
    with torch.no_grad():
        looped = torch.stack([metric(model.run(inputs, group)) for group in groups])
    torch.testing.assert_close(swept.values, looped, rtol=1e-9, atol=1e-10)


def test_gradients_through_a_prepared_run_are_those_of_the_whole(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 2, dtype=torch.float64)
    found = []
    for prepared in (True, False):
        value = torch.full((20,), 0.3, dtype=torch.float64, requires_grad=True)
        edit = edits.steer("vision_2.blocks.1.hook_resid_post", value, 1.0)
        if prepared:
            with model.prepared(inputs, start="vision_2.blocks.1.hook_resid_post") as run:
                logits = run([edit])
        else:
            logits = model.run(inputs, [edit])
        (gradient,) = torch.autograd.grad(logits[:, -1, 5].sum(), value)
        found.append(gradient)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


# ---- reads


def test_lenses_and_attribution_run_or_say_why_not(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 2, dtype=torch.float64)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs)
        for tower in ("vision", "vision_2", "language"):
            lens = cv.readout.logit_lens(model, cache, tower=tower, targets=[5, 6])
            assert lens.values.isfinite().all()
        for tower, last in (("vision", 1), ("vision_2", 2)):
            read = model.towers[tower].readout(cache[f"{tower}.blocks.{last}.hook_resid_post"], context=cache)
            torch.testing.assert_close(read, cache["projector.hook_out"])
            assert model.is_dead(f"{tower}.blocks.{last + 1}.hook_mlp_out")
            assert not model.is_dead(f"{tower}.blocks.{last}.hook_mlp_out")
        attributed = cv.readout.direct_attribution(model, cache, (5, 6))
    assert attributed.values.isfinite().all()
    difference = logits[:, -1, 5] - logits[:, -1, 6]
    torch.testing.assert_close(attributed.values.flatten(0, -2).sum(0), difference, rtol=1e-5, atol=1e-5)


def test_answers_at_the_last_position_are_read_from_prompts_that_do_not_name_patches(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 3, dtype=torch.float64, padding="right", named=False)
    metric = cv.metrics.logit_diff(5, 6)
    swept = model.sweep(inputs, [edits.ablate("language.blocks.0.hook_mlp_out")], metric, progress=False)
    with torch.no_grad():
        logits = model(inputs)
    last = model.tokens(inputs)["language"].last()
    rows = torch.stack([logits[row, position] for row, position in enumerate(last)])
    torch.testing.assert_close(swept.clean, rows[:, 5] - rows[:, 6], rtol=1e-9, atol=1e-10)


def test_pairs_of_prompts_that_do_not_name_patches_run_in_batches(model: cv.HookedModel) -> None:
    def examples(seed: int) -> list[dict[str, Tensor]]:
        made = openvla_inputs(model, 3, seed, torch.float64, "left", named=False)
        rows = [{name: value[row, None] for name, value in made.items()} for row in range(3)]
        real = [row["attention_mask"][0].bool() for row in rows]
        return [
            {name: value if name == "pixel_values" else value[:, keep] for name, value in row.items()}
            for row, keep in zip(rows, real, strict=True)
        ]

    clean, corrupt = examples(0), examples(1)
    pairs = cv.data.Pairs(inputs=clean, corrupt_inputs=corrupt, answers=[5, 6, 7], foils=[8, 9, 8])
    sites = ["vision_2.blocks.1.hook_mlp_out", "language.blocks.1.attn.hook_z"]
    swept = model.sweep(pairs, [edits.replace(site, pairs.corrupt) for site in sites], "logit_diff", progress=False)
    with torch.no_grad():
        for row in range(3):
            answer, foil = pairs.clean.answers[row], pairs.clean.foils[row]
            for number, site in enumerate(sites):
                _, cache = model.run_with_cache(corrupt[row], site)
                logits = model.run(clean[row], [edits.replace(site, cache)])[0, -1]
                torch.testing.assert_close(
                    swept.values[number, row], logits[answer] - logits[foil], rtol=1e-5, atol=1e-5
                )


# ---- actions as words and as numbers


def test_tokens_that_say_actions_have_words(model: cv.HookedModel) -> None:
    wrapped = cv.HookedModel(model.module, case("openvla").processor())  # type: ignore[misc]
    bins = actions.ActionTokens.of(model.config)
    for one in (model, wrapped):
        values = bins.values(bins.ids)
        for number, value in zip(bins.ids, values, strict=True):
            found = one.token(f"action {value:+.3f}")
            assert found == number or bins.values(found) == value
        assert one.token("action 1") == bins.of_values(0.99)
        with pytest.raises(InputError, match="from -1 to 1"):
            one.token("action 7")
        with pytest.raises(InputError, match="from -1 to 1"):
            one.token("action left")
    ids = torch.tensor([[bins.ids[0], bins.ids[-1], 7]])
    assert wrapped.to_str_tokens(ids) == [["action +0.933", "action -0.933", ":"]]
    inputs = openvla_inputs(model, 2, dtype=torch.float64)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs)
    lens = cv.readout.logit_lens(model, cache, tower="language", targets=["action 0.5", "action -0.5"])
    difference = logits[:, -1, bins.of_values(0.5)] - logits[:, -1, bins.of_values(-0.5)]
    found = cv.metrics.logit_diff("action 0.5", "action -0.5").bind(model)(logits, inputs)
    torch.testing.assert_close(found, difference)
    assert lens.values.isfinite().all()
    value_vectors = cv.readout.value_vectors(model.language, 4)
    said = cv.families.action_bins(value_vectors.ids, model.config.n_words, n_bins=16)
    assert bool(said.isfinite().any())


def test_an_action_dimension_is_the_mean_over_bins_where_the_prompt_has_come_to_it(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 3, dtype=torch.float64, padding="left", named=False)
    bins = actions.ActionTokens.of(model.config)
    first, end = bins.ids[0], bins.ids[-1] + 1
    # Prompts of this zoo are words, and the last sixteen words are the bins: none at the end of these.
    inputs["input_ids"][:, -1] = 7
    spoken = torch.tensor([[first + 3, first + 9]]).expand(3, 2)
    both = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], spoken], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(3, 2, dtype=torch.long)], 1),
    }
    with torch.no_grad():
        logits = model(both)
    for dim in range(3):
        metric = cv.metrics.action_dim(dim)
        rows = logits[:, -3 + dim, first:end].softmax(-1)
        expected = rows @ torch.tensor(bins.values(range(first, end)))
        swept = model.sweep(both, [edits.ablate("vision_2.blocks.0.hook_mlp_out")], metric, progress=False)
        torch.testing.assert_close(swept.clean, expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(InputError, match="behind 1 action tokens"):
        model.sweep(inputs, [edits.ablate("vision.blocks.0.hook_mlp_out")], cv.metrics.action_dim(1), progress=False)
    written = dict(cv.metrics.action_dim(1).bind(model).__provenance__())
    assert "bins" not in written


def test_methods_take_prompts_that_do_not_name_patches(model: cv.HookedModel) -> None:
    clean, corrupt = (openvla_inputs(model, 3, seed, torch.float64, "right", named=False) for seed in (0, 1))
    named = [openvla_inputs(model, 3, seed, torch.float64, "right") for seed in (0, 1)]
    metric, sites = cv.metrics.logit_diff(5, 6), "vision_2.blocks.*.attn.hook_z"

    def patched(clean: Any, corrupt: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = cv.patching.activation_patch(
                model, metric=metric, clean=clean, corrupt=corrupt, sites=sites, progress=False
            )
        return found.values

    torch.testing.assert_close(patched(clean, corrupt), patched(*named), rtol=0, atol=0, equal_nan=True)
    for method in (cv.readout.occlusion, cv.readout.chefer_relevance):
        found = (
            method(model, clean, metric, tower="vision_2")
            if method is cv.readout.chefer_relevance
            else method(model, clean, metric)
        )
        assert found.values[-9:].isfinite().all()
    relevance = cv.readout.legrad(model, clean, lambda out: out.flatten(1).sum(1), tower="vision_2", score="output")
    assert relevance.values.shape == (9, 3)
    with torch.no_grad():
        fresh = cv.readout.logit_lens(model, clean, tower="vision_2", targets=[5])
        _, cache = model.run_with_cache(clean)
        kept = cv.readout.logit_lens(model, cache, tower="vision_2", targets=[5])
    # Patterns, which the cache holds, are those of eager attention.
    torch.testing.assert_close(fresh.values, kept.values, rtol=1e-4, atol=1e-5)
    # A tower's own read-out has positions of patches, not the output's: a metric of the output cannot read it.
    with pytest.raises(InputError, match="read-out has the shape"):
        cv.readout.legrad(model, clean, metric, tower="vision_2")
