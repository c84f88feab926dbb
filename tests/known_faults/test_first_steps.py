"""What somebody new gets wrong, or cannot read: each error names the way out, each value says what it is."""

from __future__ import annotations

import csv
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import circuitvision as cv
from circuitvision import edits
from circuitvision.data import Pairs
from circuitvision.errors import HookError, InputError, UnknownSiteError, UnsupportedModelError
from circuitvision.metric_set import MetricSet
from circuitvision.results import Result
from tests.zoo import case
from tests.zoo.images import picture

QUESTION = "USER: <image> what color is the circle ? ASSISTANT:"


@pytest.fixture(scope="module")
def llava() -> cv.HookedModel:
    return cv.organisms.load("shapes-llava")


@pytest.fixture(scope="module")
def vit() -> cv.HookedModel:
    return cv.organisms.load("shapes-vit")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), (128, 128, 128)).save(tmp_path / f"{name}.png")
    row = {"photo": "a.png", "edited": "b.png", "question": QUESTION, "answer": "red", "foil": "blue"}
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    return tmp_path


# -- tables --------------------------------------------------------------------------------------------------------------------------------------


def test_unknown_columns_are_told_all_names(folder: Path) -> None:
    with pytest.raises(InputError, match=r"corrupt_image.*text.*answer_id"):
        Pairs.from_folder(folder)
    with pytest.raises(InputError, match=r"(?s)'clean' is none of ours.*corrupt_image"):
        Pairs.from_folder(folder, columns={"clean": "photo"})


def test_a_mapping_the_wrong_way_round_is_told_the_right_one(folder: Path) -> None:
    with pytest.raises(InputError, match=r"\{'image': 'photo'\}"):
        Pairs.from_folder(folder, columns={"photo": "image", "edited": "corrupt_image"})
    right = Pairs.from_folder(folder, columns={"image": "photo", "corrupt_image": "edited", "text": "question"})
    assert right.clean.examples[0].text == QUESTION


def test_the_help_names_the_columns() -> None:
    from circuitvision.data.reading import NAMES

    assert all(name in str(Pairs.from_folder.__doc__) for name in NAMES)
    page = (Path(__file__).parents[2] / "docs" / "how_to.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in NAMES if not name.startswith(("corrupt_box", "corrupt_mask")))


# -- what a model says ---------------------------------------------------------------------------------------------------------------------------


def test_what_was_left_out_says_what_the_model_gave(llava: cv.HookedModel, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = cv.data.question_pairs(4, seed=0)
    wrong = Pairs(
        [one.image for one in pairs.clean.examples],
        [one.text for one in pairs.clean.examples],
        corrupt_images=[one.image for one in pairs.corrupt.examples],
        answers=list(pairs.foils or ()),
        foils=list(pairs.answers or ()),
    )
    left = wrong.answered(llava)
    assert len(left) == 0
    given = left.tally.given["clean wrong"]
    assert sum(given.values()) == 4
    assert set(given) == {str(answer) for answer in pairs.answers or ()}
    assert next(iter(given)) in capsys.readouterr().out


def test_answers_of_several_tokens_name_the_way(llava: cv.HookedModel, capsys: pytest.CaptureFixture[str]) -> None:
    grey = [Image.new("RGB", (64, 64), (shade,) * 3) for shade in (100, 128)]
    pairs = Pairs(grey[:1], QUESTION, corrupt_images=grey[1:], answers="circle red", foils="blue")
    assert pairs.answered(llava).tally.counts == {"answer or foil is not one token": 1}
    assert "combine=" in capsys.readouterr().out


def test_a_row_of_ids_is_one_row_of_words(llava: cv.HookedModel) -> None:
    inputs = llava.inputs(images=Image.new("RGB", (64, 64)), text=QUESTION)
    (row,) = llava.to_str_tokens(inputs)
    assert llava.to_str_tokens(inputs["input_ids"][0]) == [row]
    assert llava.to_str_tokens(inputs["input_ids"][0].tolist()) == [row]
    assert row[-1] == "ASSISTANT:"


@pytest.mark.parametrize("name", ["image", "prompt", "texts"])
def test_misnamed_inputs_are_not_dropped(llava: cv.HookedModel, name: str) -> None:
    with pytest.raises(InputError, match=f"no {name}=; it is (images|text)="):
        llava.inputs(**{name: "x"})


def test_a_batch_prints_shapes_and_no_numbers(llava: cv.HookedModel) -> None:
    batch = next(cv.data.question_pairs(2, seed=0).batches(llava))
    said = repr(batch)
    assert len(said) < 300
    assert "2 examples" in said
    assert f"pixel_values {list(batch.inputs['pixel_values'].shape)}" in said
    assert "tensor(" not in said


# -- orders and names ----------------------------------------------------------------------------------------------------------------------------


def test_experiments_say_that_the_model_comes_first(llava: cv.HookedModel) -> None:
    pairs: Any = cv.data.question_pairs(2, seed=0)
    calls = [
        lambda: cv.circuits.head_importance(pairs, llava, "logit_diff"),
        lambda: cv.patching.activation_patch(pairs, llava, "logit_diff", sites="language.blocks.*.attn.hook_z"),
        lambda: cv.circuits.ablation_check(pairs, llava, "language L1H1"),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"model comes first.*Pairs"):
            call()


def test_a_data_set_in_place_of_inputs_names_its_batches(llava: cv.HookedModel) -> None:
    pairs: Any = cv.data.question_pairs(2, seed=0)
    for call in (llava.run, llava.run_with_cache, llava.generate):
        with pytest.raises(InputError, match=r"batches\(model\)"):
            call(pairs)


def test_edits_in_place_of_the_metric_are_recognised() -> None:
    with pytest.raises(InputError, match="edits come before the metric"):
        MetricSet.of([edits.ablate("vision L0H0")])


def test_too_many_random_sets_name_how_many_there_are(llava: cv.HookedModel) -> None:
    pairs = cv.data.question_pairs(2, seed=0)
    with pytest.raises(InputError, match="n_random=19"):
        cv.circuits.ablation_check(llava, pairs, "language L1H1")
    assert len(cv.circuits.ablation_check(llava, pairs, "language L1H1", n_random=19).random) == 19


def test_short_names_need_no_tower_where_there_is_one(vit: cv.HookedModel, llava: cv.HookedModel) -> None:
    _, cache = vit.run_with_cache(vit.inputs(images=Image.new("RGB", (64, 64))))
    assert torch.equal(cache["z", 1], cache["vision", "z", 1])
    assert torch.equal(cache["scale", 1, "ln1"], cache["vision", "scale", 1, "ln1"])
    _, cache = llava.run_with_cache(llava.inputs(images=Image.new("RGB", (64, 64)), text=QUESTION))
    with pytest.raises(UnknownSiteError, match=r"\('language', 'z', 1\)"):
        cache["z", 1]
    with pytest.raises(UnknownSiteError, match="Nearest"):
        cache["vison", "z", 1]


def test_an_organism_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(InputError, match=r"organisms\.load\('shapes-llava'\)"):
        cv.HookedModel.from_pretrained("shapes-llava")


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "circuitvision", "--version"], capture_output=True, text=True, check=True
    )
    assert cv.__version__ in done.stdout


# -- actions -------------------------------------------------------------------------------------------------------------------------------------


def test_answers_that_are_actions_name_their_metric() -> None:
    with pytest.raises(InputError, match="action_dim"):
        cv.metrics.logit_diff(-1.0, 1.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"action_dim\(0\)"):
        cv.metrics.by_name("action_dim")
    with pytest.raises(InputError, match=", ".join(cv.metrics.NAMES)):
        cv.metrics.by_name("logitdiff")


def test_a_model_that_acts_says_how(llava: cv.HookedModel) -> None:
    pi0 = cv.organisms.load("reach-pi0")
    with pytest.raises(UnsupportedModelError, match="sample_actions"):
        pi0.generate({})
    with pytest.raises(UnsupportedModelError, match="generate"):
        llava.sample_actions({})


# -- regions and results -------------------------------------------------------------------------------------------------------------------------


def test_boxes_as_shares_are_refused_and_pixels_are_not() -> None:
    with pytest.raises(InputError, match="shares of the picture"):
        cv.regions.box([(0.1, 0.2, 0.5, 0.6)] * 2, size=(64, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cv.regions.box([(0, 0, 1, 1)] * 2, size=(64, 64))
        cv.regions.box([(-0.5, 0, 64.5, 64), None], size=(64, 64))
        cv.regions.box([(0, 0, 100, 50)], size=(50, 100))
        cv.regions.box((0, 0, 100, 50), size=[(50, 100), (60, 100)])


def test_boxes_outside_their_pictures_warn() -> None:
    with pytest.warns(UserWarning, match="1 of 2 boxes.*36 pixels"):
        cv.regions.box([(0, 0, 100, 50), (0, 0, 10, 10)], size=(64, 64))
    with pytest.warns(UserWarning, match="1 of 1 boxes"):
        cv.regions.box((0, 0, 100, 50), size=[(50, 100), (50, 60)])


def test_a_data_set_says_where_its_pictures_are() -> None:
    pairs: Any = cv.data.question_pairs(2, seed=0)
    for held, where in ((pairs, r"data\.clean\.examples"), (pairs.clean, r"data\.examples")):
        for name in ("images", "texts"):
            with pytest.raises(AttributeError, match=where):
                getattr(held, name)
        assert not hasattr(held, "nothing")


def test_a_data_set_is_no_picture(llava: cv.HookedModel) -> None:
    side = cv.data.question_pairs(2, seed=0).clean
    with pytest.raises(InputError, match="not a data set"):
        cv.boxes_in_pictures(llava, side, next(side.batches(llava)).inputs)


def test_the_mean_frame_holds_what_the_methods_give() -> None:
    values = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[0, 1, 2] = float("nan")
    result = Result(values, {"layer": [0, 1], "head": [0, 1, 2], "example": range(8)})  # type: ignore[dict-item]
    frame = result.mean_frame()
    assert list(frame) == ["layer", "head", "mean", "error", "low", "high", "n"]
    assert frame[["layer", "head"]].to_numpy().tolist() == [[a, b] for a in (0, 1) for b in (0, 1, 2)]
    low, high = result.interval()
    for name, held in {"mean": result.mean(), "error": result.error(), "low": low, "high": high}.items():
        torch.testing.assert_close(torch.from_numpy(frame[name].to_numpy(copy=True)), held.flatten(), rtol=0, atol=0)
    assert frame["n"].tolist() == [8, 7, 8, 8, 8, 8]
    grouped = result.mean_frame(group=[0, 0, 0, 0, 1, 1, 2, 2])
    assert grouped["n"].tolist() == [3] * 6
    assert grouped["mean"].tolist() == result.mean(group=[0, 0, 0, 0, 1, 1, 2, 2]).flatten().tolist()
    with pytest.raises(InputError, match="no examples"):
        Result(torch.zeros(2), {"layer": [0, 1]}).mean_frame()


def test_a_result_says_its_metric_and_its_groups(llava: cv.HookedModel) -> None:
    pairs = cv.data.question_pairs(2, seed=0)
    found = cv.patching.activation_patch(llava, pairs, "prob", sites="language.blocks.*.attn.hook_z", progress=False)
    assert "prob" in repr(found)
    several = cv.patching.activation_patch(
        llava, pairs, ["prob"], sites="language.blocks.*.attn.hook_z", progress=False
    )
    assert "metric 1" in repr(several)
    with pytest.raises(InputError, match=r"pairs\.groups"):
        found.interval(group="scene")
    swept = llava.sweep(pairs, [edits.ablate("language L1H1")], "logit_diff", progress=False)
    assert "from language" in repr(swept.plan)


# -- classes of one's own ------------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden)))


class OwnBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))


class PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 8, 8)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class OwnViT(nn.Module):
    """Laid out as timm's, with projections of their own; nothing of it is transformers'."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        if config is not None:
            self.config = config
        self.patch_embed = PatchEmbed(16)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.blocks = nn.Sequential(OwnBlock(16, 2), OwnBlock(16, 2))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.patch_embed(pixel_values)
        hidden = torch.cat([self.cls_token.expand(len(hidden), -1, -1), hidden], 1) + self.pos_embed
        return {"logits": self.head(self.norm(self.blocks(hidden))[:, 0])}


def described(**changes: Any) -> Any:
    attention = cv.families.Attention("attn", q="attn.q", k="attn.k", v="attn.v", o="attn.proj")
    mlp = cv.families.MLP("mlp", fc_in="mlp.fc1", fc_out="mlp.fc2")
    parts = cv.BlockLayout((cv.families.Branch(attention, norm="norm1"), cv.families.Branch(mlp, norm="norm2")))
    given: dict[str, Any] = {"blocks": "blocks", "block": parts, "final_norm": "norm", "embed": "patch_embed"}
    stack = cv.Stack(**{**given, "prefix": ("cls",), "image": True, **changes})
    readout = cv.families.Readout(pool="cls", head="head", reads=("cls",))
    return cv.register_family(
        cv.Family("own", ("OwnViT",), (cv.TowerSpec("vision", stack=stack, readout=readout),), output="logits")
    )


@pytest.fixture
def own() -> Any:
    from transformers import ViTConfig

    from circuitvision.model.spec import FAMILIES

    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    try:
        torch.manual_seed(0)
        yield OwnViT(ViTConfig(intermediate_size=32, **sizes)).double().eval()  # type: ignore[arg-type]
    finally:
        FAMILIES.pop("OwnViT", None)


def test_a_class_without_any_part_of_transformers(own: nn.Module) -> None:
    described()
    model, inputs = cv.HookedModel(own), {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64)}
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, ["**.hook_resid_*", "**.hook_attn_out"])
        assert torch.equal(logits, own(**inputs)["logits"])
    for layer in (0, 1):
        at = f"vision.blocks.{layer}"
        torch.testing.assert_close(
            cache[f"{at}.hook_resid_pre"] + cache[f"{at}.hook_attn_out"], cache[f"{at}.hook_resid_mid"]
        )
    heads = [edits.ablate(f"L{layer}H{head}") for layer in (0, 1) for head in (0, 1)]
    swept = model.sweep(inputs, heads, lambda out: out[:, 0], progress=False)
    with torch.no_grad():
        torch.testing.assert_close(swept.values, torch.stack([model.run(inputs, one)[:, 0] for one in heads]))
        handle = own.blocks[1].attn.proj.register_forward_pre_hook(  # type: ignore[index,union-attr]
            lambda module, args: (args[0] * torch.tensor([0.0] * 8 + [1.0] * 8, dtype=torch.float64),)
        )
        expected = own(**inputs)["logits"]
        handle.remove()
        torch.testing.assert_close(model.run(inputs, edits.ablate("L1H0")), expected)


def test_attention_of_ones_own_says_why_there_is_no_pattern(own: nn.Module) -> None:
    described()
    model, inputs = cv.HookedModel(own), {"pixel_values": torch.randn(1, 3, 32, 32, dtype=torch.float64)}
    with pytest.raises(HookError, match="attention functions"):
        model.run_with_cache(inputs, "**.hook_pattern")


def test_tables_that_are_wrong_are_refused(own: nn.Module) -> None:
    with pytest.raises(InputError, match=r"prefix=\('class',\).*cls"):
        described(prefix=("class",))
    described(final_norm="nrm")
    with pytest.raises(UnsupportedModelError, match=r"'nrm'.*norm, head"):
        cv.HookedModel(own)
    described(final_norm=None)
    cv.HookedModel(own)
    with pytest.raises(UnsupportedModelError, match="no config"):
        cv.HookedModel(OwnViT())
    assert "object at" not in repr(described())


@pytest.mark.parametrize("table", [cv.Family, cv.TowerSpec, cv.Stack, cv.BlockLayout])
def test_help_describes_every_entry_of_a_table(table: Any) -> None:
    import dataclasses
    import re

    listed = re.findall(r"^        ([a-z0-9_, ]+):", str(table.__doc__), re.MULTILINE)
    described = {name for line in listed for name in line.split(", ")}
    entries = {entry.name for entry in dataclasses.fields(table)}
    assert entries - described <= {"position_weight"}
    assert described <= entries


def test_a_run_of_one_half_of_a_dual_encoder_names_the_other() -> None:
    tiny = case("clip")
    model = cv.HookedModel(tiny.build().eval())
    inputs = tiny.inputs(model.module, batch=1)
    for name in ("pixel_values", "input_ids"):
        with pytest.raises(InputError, match=f"{name} is missing.*takes both"):
            model({key: value for key, value in inputs.items() if key != name})


def test_relevance_of_a_data_set_names_its_batches() -> None:
    model = cv.HookedModel(case("vit").build().eval())
    data = cv.data.Side(images=[picture(0)], answers=[0])
    for read in (cv.readout.gradient_times_activation, cv.readout.occlusion):
        with pytest.raises(InputError, match="batches"):
            read(model, data, "logit_diff")
