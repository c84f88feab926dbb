"""Bad input of every causal method: one error that names what is wrong, before anything long runs, and nothing left hooked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision import edits, metrics
from circuitvision.data import Pairs
from circuitvision.errors import InputError
from circuitvision.patching import activation_patch, interactions
from tests.causal_methods import (
    COUNT,
    DEAD_STREAM,
    LIVE_STREAM,
    METHODS,
    ONE_RUN,
    SUBSPACES,
    TWO_RUNS,
    Asked,
    counted,
    setting,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def asked(**changes: Any) -> Asked:
    model, pairs = setting()
    return Asked(model, pairs, **changes)


def refused(method: str, request: Asked, match: str, most: int) -> None:
    """Refused by one of the library's own errors, after at most so many runs."""
    with counted(request.model) as runs, pytest.raises(InputError, match=match):
        METHODS[method](request)
    assert runs.count <= most, f"{method} ran {runs.count} times before it refused"


@pytest.mark.parametrize("method", list(METHODS))
def test_a_request_that_can_be_granted_is_granted(method: str) -> None:
    """The other tests of this file change one thing in it."""
    request = asked()
    with counted(request.model) as runs:
        METHODS[method](request)
    assert runs.count > 6


# -- pairs of unequal length ---------------------------------------------------------------------------------------------------------------


def of_other_lengths(pairs: Pairs, maps: bool = False) -> Pairs:
    """The same pairs, the last of which has one more token on the corrupt side."""
    names = ("pixel_values", "input_ids")
    clean, corrupt = (
        [{name: one.tensors[name] for name in names} for one in side.examples] for side in (pairs.clean, pairs.corrupt)
    )
    ids = corrupt[-1]["input_ids"]
    corrupt[-1]["input_ids"] = torch.cat([ids, ids[:, -1:]], 1)
    own = [{"language": [*range(ids.shape[1] - 1), ids.shape[1]]}] * len(pairs) if maps else None
    return Pairs(inputs=clean, corrupt_inputs=corrupt, answers=pairs.answers, foils=pairs.foils, maps=own)


@pytest.mark.parametrize("method", [*TWO_RUNS, *SUBSPACES])
def test_pairs_of_unequal_length_without_a_position_map(method: str) -> None:
    """The last of four pairs: none of the others runs first."""
    request = asked(allow_wrong=True)
    request.pairs = of_other_lengths(request.pairs)
    refused(method, request, "Example 3 has .* text positions.*one by one", 0)


@pytest.mark.parametrize("method", list(ONE_RUN))
def test_the_other_side_does_not_matter_where_one_side_runs(method: str) -> None:
    request = asked()
    plain = METHODS[method](request)
    request.pairs = of_other_lengths(request.pairs)
    torch.testing.assert_close(METHODS[method](request).values, plain.values)


@pytest.mark.parametrize("method", ["activation_patch", "attribution_patch", "interactions"])
def test_raw_prompts_of_unequal_length(method: str) -> None:
    model = cv.organisms.load("shapes-llava")
    pairs = cv.organisms.pairs("shapes-llava", 5, 3)
    texts = [one.text for one in pairs.clean.examples]
    longer = [*texts[:4], texts[4].replace("the", "the the")]
    assert longer != texts
    images = [one.image for one in pairs.clean.examples]
    unequal = Pairs(images, texts, corrupt_texts=longer, answers=pairs.answers, foils=pairs.foils)
    refused(method, Asked(model, unequal), "Example 4 has", 0)


def test_a_position_map_says_which_positions_belong_together() -> None:
    request = asked()
    request.pairs = of_other_lengths(request.pairs, maps=True)
    found = activation_patch(request.model, request.pairs, "logit_diff", sites=request.z, mode="noise", progress=False)
    assert bool(torch.isfinite(found.values).all())


# -- answers of several tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["answers", "foils"])
@pytest.mark.parametrize("method", list(METHODS))
def test_answers_of_several_tokens_without_a_rule(method: str, column: str) -> None:
    """The last of four: found before any of them runs."""
    request = asked(allow_wrong=True)
    several = (*getattr(request.pairs, column)[:-1], (1, 2))
    sides = {name: getattr(request.pairs, name)._with(**{column: several}) for name in ("clean", "corrupt")}
    request.pairs = request.pairs._with(**sides)
    refused(method, request, "Example 3.*combine=", 0)


def test_a_word_of_several_tokens_is_named_with_its_example() -> None:
    model = cv.organisms.load("shapes-llava")
    pairs = cv.organisms.pairs("shapes-llava", 3, 3)
    answers = (*(pairs.answers or ())[:2], "red circle")
    wrong = pairs._with(clean=pairs.clean._with(answers=answers))
    with counted(model) as runs, pytest.raises(InputError, match=r"Example 2.*red circle"):
        model.sweep(wrong.clean, [edits.scale("language.blocks.0.attn.hook_z", 0.0)], "logit_diff", progress=False)
    assert runs.count == 0


# -- a clean run the model gets wrong --------------------------------------------------------------------------------------------------------


def turned(pairs: Pairs, count: int) -> Pairs:
    """The same pairs, the last ``count`` with answer and foil exchanged."""
    own = {name: list(getattr(pairs, name)) for name in ("answers", "foils")}
    for row in range(len(pairs) - count, len(pairs)):
        own["answers"][row], own["foils"][row] = own["foils"][row], own["answers"][row]
    columns = {name: tuple(held) for name, held in own.items()}
    return pairs._with(clean=pairs.clean._with(**columns), corrupt=pairs.corrupt._with(**columns))


@pytest.mark.parametrize("method", [*TWO_RUNS, *ONE_RUN, *SUBSPACES])
def test_clean_runs_that_the_model_gets_wrong(method: str) -> None:
    request = asked()
    request.pairs = turned(request.pairs, COUNT)
    refused(method, request, "allow_wrong", 5 if method in ONE_RUN or method in TWO_RUNS else 2 * COUNT + 2)
    if method not in SUBSPACES:
        request.allow_wrong = True
        METHODS[method](request)


@pytest.mark.parametrize("mode", ["denoise", "noise"])
@pytest.mark.parametrize("method", list(TWO_RUNS))
def test_single_wrong_ones_are_counted_in_a_warning(method: str, mode: str) -> None:
    request = asked(more={"mode": mode, "example_batch": COUNT})
    request.pairs = turned(request.pairs, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TWO_RUNS[method](request)
    said = [str(one.message) for one in caught if "does not give the answer" in str(one.message)]
    assert len(said) == 1
    assert "1 of 4" in said[0]
    assert "example 3" in said[0]


def test_answers_given_by_hand_may_be_any() -> None:
    request = asked()
    by_hand = metrics.logit_diff(list(request.pairs.foils or ()), list(request.pairs.answers or ()))
    activation_patch(request.model, request.pairs, by_hand, sites=request.z, progress=False)
    request.pairs = turned(request.pairs, COUNT)
    for metric in ("prob", "accuracy", "kl"):
        activation_patch(request.model, request.pairs, metric, sites=request.z, progress=False)


def test_a_permuted_pairing_is_not_taken_for_wrong_answers() -> None:
    request = asked()
    interactions(
        request.model, request.pairs, "logit_diff", components=request.heads(0, 1), permutations=2, progress=False
    )


# -- metrics that are no vector --------------------------------------------------------------------------------------------------------------


SCALARS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a mean": lambda logits: logits.mean(),
    "a number": lambda logits: 0.5,
    "a matrix": lambda logits: logits[:, -1],
}


@pytest.mark.parametrize("metric", SCALARS.values(), ids=SCALARS)
@pytest.mark.parametrize("method", list(METHODS))
def test_metrics_that_return_no_number_per_example(method: str, metric: Any) -> None:
    refused(method, asked(metric=metric), "one number per example", 5)


# -- subspaces -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(SUBSPACES))
def test_more_dimensions_than_pairs(method: str) -> None:
    refused(method, asked(k=3), "3 dimensions", 0)


def test_more_dimensions_than_pairs_are_reported_on_without_controls() -> None:
    request = asked(k=3, more={"controls": False})
    assert METHODS["illusion_report"](request).k == 3


def deficient(model: Any) -> torch.Tensor:
    column = torch.ones(model.language.cfg.d_model)
    return torch.stack([column, -2 * column], 1)


def test_a_basis_without_full_rank_is_refused_wherever_one_is_given() -> None:
    request = asked()
    basis = deficient(request.model)
    refused("illusion_report", asked(basis=basis), "independent", 0)
    with counted(request.model) as runs:
        for source in (request.pairs.corrupt, torch.zeros(1)):
            with pytest.raises(InputError, match="independent"):
                edits.project(LIVE_STREAM, basis, source)
        with pytest.raises(InputError, match="independent"):
            cv.subspaces.interchanged(torch.zeros(2, len(basis)), torch.ones(2, len(basis)), basis)
    assert runs.count == 0


# -- what the output cannot depend on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(METHODS))
def test_a_site_the_output_cannot_depend_on(method: str) -> None:
    refused(method, asked(dead=True, allow_wrong=True), "cannot depend on vision.blocks.2", 0)


def test_some_dead_sites_among_live_ones_are_no_mistake() -> None:
    request = asked()
    found = activation_patch(
        request.model, request.pairs, "logit_diff", sites="vision.blocks.*.hook_resid_post", axes=("layer",), progress=False
    )  # fmt: skip
    assert found.dead == [DEAD_STREAM]
    assert bool((found.values[2] == 0).all())
    assert bool((found.values[0] != 0).any())


def test_a_dead_component_beside_a_live_one_is_named() -> None:
    request = asked()
    with counted(request.model) as runs, pytest.raises(InputError, match=r"vision\.blocks\.2\.attn\.hook_z"):
        interactions(
            request.model, request.pairs, "logit_diff", components=["language L0H0", "vision L2H0"], progress=False
        )
    assert runs.count == 0
