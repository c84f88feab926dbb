"""A family described by a user: put right by registering it again, refused where its table would be misread without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import circuitvision as cv
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.families import Family, Readout, TowerSpec
from circuitvision.model import spec


class Leaves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"image_size": 12, "patch_size": 6, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        self.backbone = ViTModel(ViTConfig(intermediate_size=16, **sizes))
        self.config, self.head = self.backbone.config, nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor, **options: Any) -> dict[str, Tensor]:
        return {"logits": self.head(self.backbone(pixel_values, **options).last_hidden_state[:, 0])}


def table(name: str = "leaves", root: str = "backbone", readout: dict[str, Any] | None = None, **fields: Any) -> Family:
    read = Readout(**{"pool": "cls", "head": "head", "reads": ("cls",), **(readout or {})})
    towers = (TowerSpec("vision", root=root, readout=read),)
    return Family(**{"name": name, "classes": ("Leaves",), "output": "logits", "towers": towers, **fields})


@pytest.fixture(autouse=True)
def _tables_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    spec.load_tables()
    monkeypatch.setattr(spec, "FAMILIES", dict(spec.FAMILIES))


PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 12 * 12).reshape(1, 3, 12, 12)}


def test_a_table_is_put_right_by_registering_it_again() -> None:
    cv.register_family(table(root="backbon"))
    with pytest.raises(UnsupportedModelError, match="backbon"):
        cv.HookedModel(Leaves().eval())
    for _ in range(2):  # a cell that is run twice
        cv.register_family(table())
    module = Leaves().eval()
    torch.testing.assert_close(cv.HookedModel(module)(PIXELS), module(**PIXELS)["logits"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("classes", "name"), [("ViTForImageClassification", "vit"), ("ViTModel", "mine"), ("Leaves", "other")]
)
def test_no_family_takes_the_place_of_a_shipped_one_or_of_another(classes: str, name: str) -> None:
    cv.register_family(table())
    with pytest.raises(InputError, match="already registered"):
        cv.register_family(table(name, classes=(classes,)))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: table(classes="Leaves"),
        lambda: table(towers=TowerSpec("vision", root="backbone")),
        lambda: table(readout={"reads": "cls"}),
        lambda: table(readout={"reads": ("class",)}),
        lambda: table(readout={"pool": "class"}),
    ],
)
def test_a_table_that_would_be_misread_is_refused(wrong: Callable[[], Family]) -> None:
    with pytest.raises(InputError, match="In the table of the leaves family"):
        cv.register_family(wrong())


def test_an_output_that_the_forward_does_not_return_is_named() -> None:
    cv.register_family(table(output="scores"))
    with pytest.raises(UnsupportedModelError, match=r"'scores'.*logits"):
        cv.HookedModel(Leaves().eval())(PIXELS)


def test_an_attribution_by_a_wrong_readout_blames_the_table_too() -> None:
    cv.register_family(table(readout={"pool": "mean_patch", "reads": ("patch",)}))
    model = cv.HookedModel(Leaves().eval())
    _, cache = model.run_with_cache(PIXELS)
    with pytest.raises(InputError, match="table of the leaves family"):
        cv.readout.direct_attribution(model, cache, 0)


def test_inputs_of_nothing_are_refused() -> None:
    model = cv.organisms.load("shapes-vit")
    with pytest.raises(InputError, match="hold no tensor"):
        model(model.inputs())


@pytest.mark.parametrize("spelled", ["vision.l1h2", "Vision.L1H2", "vision.layer1.head2"])
def test_a_head_spelled_as_no_table_spells_it_is_answered_with_the_spelling(spelled: str) -> None:
    model = cv.organisms.load("shapes-vit")
    with pytest.raises(cv.errors.UnknownSiteError, match="L1H2, behind its tower"):
        model.sites(spelled)


def test_a_name_in_place_of_an_edit_is_quoted_whole() -> None:
    model = cv.organisms.load("shapes-vit")
    inputs = {"pixel_values": torch.zeros(1, 3, 64, 64)}
    with pytest.raises(InputError, match=r"'vision\.L1H2' is not an edit"):
        model.run(inputs, "vision.L1H2")
