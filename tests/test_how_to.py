"""The page of short answers: every block runs as it stands, in order, and gives what its comments say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = (Path(__file__).parent.parent / "docs" / "how_to.md").read_text()
README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that the page's blocks define, run one after another."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.chdir(tmp_path_factory.mktemp("how_to"))
        patch.setenv("CIRCUITVISION_PNG", "0")
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(block, found)
    return found


def test_the_readme_names_every_question() -> None:
    for question in re.findall(r"^## … (.*)$", PAGE, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", question.lower()).replace(" ", "-")
        assert f"docs/how_to.md#-{anchor}" in README, question


def test_what_is_resumed_equals_what_ran_at_once(names: dict[str, Any]) -> None:
    again = names["model"].sweep(names["pairs"], **{**names["study"], "save_to": None})
    torch.testing.assert_close(again.values, names["result"].values, rtol=0, atol=0)


def test_answers_have_the_axes_that_the_page_says(names: dict[str, Any]) -> None:
    assert list(names["traced"].axes) == ["metric", "layer", "position", "example"]
    assert list(names["seen"].axes) == ["region", "example"]
    assert list(names["result"].axes) == ["metric", "layer", "example"]
    assert len(names["heads"]) == 3
    assert names["graph"].number_of_edges() > 0


def test_hiding_the_object_costs_more_than_hiding_as_many_other_patches(names: dict[str, Any]) -> None:
    hidden, _, random = names["seen"].mean().tolist()
    assert hidden < random


def test_steering_moves_the_output(names: dict[str, Any]) -> None:
    model, inputs = names["model"], names["source"]
    plain = model(inputs)
    for recipe in (names["vista"], names["vti"], [names["adaptvis"]]):
        assert not torch.allclose(model.run(inputs, recipe), plain)


def test_a_policy_is_steered_injected_and_told(names: dict[str, Any]) -> None:
    assert names["response"].slope > 0
    assert float(names["injected"].mean()[:, 0].min()) > 0.95
    beta = dict(zip(names["heard"].axes["condition"], names["heard"].mean().tolist(), strict=True))
    assert beta["right"] > 0.9 > 0.1 > beta["other object"]
    rate = names["episodes"].success_rate
    assert rate[0] > 0.9
    assert rate[1] < rate[0]
