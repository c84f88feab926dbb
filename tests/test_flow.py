"""The graph of towers and connectors, and a model of two backbones behind one projector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.model import spec
from circuitvision.model.flow import Connector, Flow
from tests.known_faults.test_refused_models import TwoEyes, TwoEyesConfig, two_eyes

CHAIN = Flow(("vision", "language"), (Connector(("vision",), "language", "p"),))
EYES = Flow(("vision", "vision_2", "language"), (Connector(("vision", "vision_2"), "language", "p"),))
PREFIX = Flow(
    ("vision", "language", "action"),
    (Connector(("vision",), "language", "p"), Connector(("language",), "action", via="cache")),
)
DUAL = Flow(("vision", "text"), (), "vision")

pytestmark = pytest.mark.usefixtures("tables")


def test_what_reaches_what() -> None:
    assert EYES.stages == ("vision", "vision_2", "projector", "language")
    assert PREFIX.stages == ("vision", "projector", "language", "action")
    assert [EYES.reaches(one, "language") for one in EYES.stages] == [True, True, True, False]
    assert not EYES.reaches("vision", "vision_2")
    assert not EYES.reaches("language", "projector")
    assert PREFIX.reaches("projector", "action")
    assert not DUAL.reaches("vision", "text")
    assert EYES.first_of(["language", "vision_2", "vision"]) == ["vision", "vision_2"]
    assert EYES.first_of(["language", "projector"]) == ["projector"]
    assert DUAL.first_of(["text", "vision"]) == ["vision", "text"]


def test_what_follows_from_the_list() -> None:
    assert DUAL.is_dual
    assert not any(flow.is_dual for flow in (CHAIN, EYES, PREFIX, Flow(("vision",), ())))
    assert [PREFIX.feeds_cache(tower) for tower in PREFIX.towers] == [False, True, False]
    assert PREFIX.cache_of("action") == "language"
    assert CHAIN.cache_of("language") == ""
    assert EYES.tower_of("projector") == "vision"
    assert EYES.tower_of("language") == "language"
    assert CHAIN.answer == "language"
    assert DUAL.answer == "vision"


def test_every_shipped_tower_reaches_the_answer_or_is_compared() -> None:
    for family in spec.FAMILIES.values():
        flow = family.flow
        assert set(flow.towers) <= set(flow.stages)
        assert all(flow.is_dual or one == flow.answer or flow.reaches(one, flow.answer) for one in flow.stages)


@pytest.mark.parametrize(
    ("connectors", "answer", "says"),
    [
        ((Connector("vision", "language", "p"),), "", "sources is a tuple"),  # type: ignore[arg-type]
        ((Connector((), "language", "p"),), "", "sources is a tuple"),
        ((Connector(("visoin",), "language", "p"),), "", "'visoin' is no tower"),
        ((Connector(("vision",), "langage", "p"),), "", "'langage' is no tower"),
        ((Connector(("language",), "vision", "p"),), "", "does not run after"),
        ((Connector(("vision",), "language"),), "", "path is missing"),
        ((Connector(("vision",), "language", "p", name="vision_2"),), "", "'vision_2' is taken"),
        (
            (Connector(("vision",), "language", "p"), Connector(("vision_2",), "language", "q")),
            "",
            "'projector' is taken",
        ),
        (
            (Connector(("vision",), "language", "p"), Connector(("vision",), "language", "q", name="r")),
            "",
            "vision is read by another",
        ),
        ((Connector(("vision",), "language", "p", via="cache"),), "", "without a module"),
        ((Connector(("vision", "vision_2"), "language", via="cache"),), "", "one source"),
        ((Connector(("vision",), "language", "p", via="steam"),), "", "neither"),  # type: ignore[arg-type]
        ((), "lang", "answer='lang' is no tower"),
    ],
)
def test_connectors_that_cannot_be_are_refused(connectors: Any, answer: str, says: str) -> None:
    with pytest.raises(cv.errors.InputError, match=says):
        Flow(EYES.towers, connectors, answer)


def test_a_table_with_a_wrong_connector_names_its_family(tables: None) -> None:
    with pytest.raises(cv.errors.InputError, match=r"two_eyes family.*no_such.* is no tower"):
        two_eyes("no_such")


# ---- two backbones


@pytest.fixture
def eyes(tables: None) -> tuple[TwoEyes, cv.HookedModel, dict[str, Tensor]]:
    two_eyes("vision", "vision_2")
    torch.manual_seed(0)
    module = TwoEyes(TwoEyesConfig()).double().eval()
    ids = torch.tensor([[1] + [60] * 16 + [3, 4], [1, 5] + [60] * 16 + [6]])
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return module, cv.HookedModel(module), inputs


def by_hand(module: TwoEyes, inputs: dict[str, Tensor], part: Any, position: Any, value: float) -> Tensor:
    """The logits where ``position`` of what a module returns is set to a value."""

    def write(module: Any, args: Any, output: Any) -> Any:
        changed = output.clone()
        changed[:, position] = value
        return changed

    handle = part.register_forward_hook(write)
    try:
        return module(**inputs).logits
    finally:
        handle.remove()


def test_edits_in_both_backbones_reach_the_answer_in_runs_and_sweeps(eyes: Any) -> None:
    module, model, inputs = eyes
    blocks = {name: model.towers[name].blocks[0].module for name in ("vision", "vision_2", "language")}
    sites = {f"{name}.blocks.0.hook_resid_post": block for name, block in blocks.items()}
    sites["projector.hook_out"] = module.model.projector
    # A projector's positions are those of the tower it reads first, which has a class token before its patches.
    at = {"vision": 3, "vision_2": 2, "language": 5, "projector": 3}
    groups, expected = [], []
    with torch.no_grad():
        for site, part in sites.items():
            tower = site.split(".")[0]
            groups.append(edits.overwrite(site, range(32), 0.7, positions=at[tower]))
            row = at[tower] - (tower == "projector")
            expected.append(by_hand(module, inputs, part, row, 0.7)[:, -1, 0])
            torch.testing.assert_close(model.run(inputs, [groups[-1]])[:, -1, 0], expected[-1], rtol=1e-10, atol=1e-12)
        swept = model.sweep(inputs, groups, lambda logits: logits[:, -1, 0], progress=False)
        torch.testing.assert_close(swept.values, torch.stack(expected), rtol=1e-9, atol=1e-11)
        assert not any(plan.in_full for plan in swept.plan)
        both = model.sweep(inputs, [groups[:2]], lambda logits: logits[:, -1, 0], progress=False)
        together = model.run(inputs, groups[:2])[:, -1, 0]
    torch.testing.assert_close(both.values[0], together, rtol=1e-9, atol=1e-11)
    assert str(both.plan[0]) == "from vision block 0 (its end), vision_2 block 0 (its end)"


def test_tokens_of_both_backbones_name_the_same_patches(eyes: Any) -> None:
    _, model, inputs = eyes
    maps = model.tokens(inputs)
    assert maps["vision"].kind[0, 0] == "cls"
    assert maps["vision_2"].kind[0, 0] == "patch"
    for tower in ("vision", "vision_2", "language"):
        assert (maps[tower].kind == "patch").sum(1).tolist() == [16, 16]
    assert model.positions("projector.hook_out", inputs) == list(range(1, 17))


def test_a_lens_of_one_backbone_reads_with_the_other_from_the_run(eyes: Any) -> None:
    _module, model, inputs = eyes
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        for tower in ("vision", "vision_2"):
            resid = cache[f"{tower}.blocks.{model.towers[tower].cfg.n_layers - 1}.hook_resid_post"]
            said = model.towers[tower].readout(resid, context=cache)
            torch.testing.assert_close(said, cache["projector.hook_out"])
        with pytest.raises(cv.errors.InputError, match="context=cache"):
            model.vision.readout(resid)
