"""Rows of a tower are not examples: images, tiles, cameras and texts belong to the example that the token map says, whatever their number.

Compared with hooks on the raw modules; which image belongs to which prompt is counted off the image tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.incremental.sweeps import run, study
from circuitvision.model.positions import Positions
from circuitvision.readout import ranks
from circuitvision.results import Result
from circuitvision.statistics import by_example, standard_error
from tests.edits.common import wrapped
from tests.known_faults.test_averages import DOUBLE, made, near, written
from tests.zoo import case
from tests.zoo.llava import features_per_image
from tests.zoo.text import BOS, IMAGE, pad_rows

VISION, LANGUAGE = "vision.blocks.0.hook_resid_post", "language.blocks.0.hook_resid_post"


def prompts(counts: tuple[int, ...], side: str = "right", seed: int = 0) -> tuple[cv.HookedModel, dict[str, Any]]:
    """LLaVA prompts with so many images each."""
    model = wrapped("llava-clip-llama", DOUBLE)
    config = model.module.config
    generator = torch.Generator().manual_seed(seed)
    size, vision = features_per_image(config), config.vision_config
    rows = []
    for count in counts:
        row = [BOS, 20]
        for _ in range(count):
            row += [IMAGE] * size + [30]
        rows.append(row + torch.randint(10, 50, (4,), generator=generator).tolist())
    ids, mask = pad_rows(rows, max(map(len, rows)), side)
    shape = (sum(counts), vision.num_channels, vision.image_size, vision.image_size)
    pixels = torch.randn(shape, generator=generator, dtype=DOUBLE)
    return model, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def last(logits: Tensor, inputs: dict[str, Any]) -> Tensor:
    ends = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(1).argmax(1)
    return logits[torch.arange(len(logits)), ends, 7].double()


def check_masks(counts: tuple[int, ...]) -> None:
    """A mask per example reaches every image of the example."""
    model, inputs = prompts(counts)
    owner = torch.tensor([example for example, count in enumerate(counts) for _ in range(count)])
    assert model.tokens(inputs)["vision"].example.tolist() == owner.tolist()
    length = model.tokens(inputs)["vision"].n_positions
    mask = torch.rand(len(counts), length, generator=torch.Generator().manual_seed(1)) < 0.5
    wanted = written(model, inputs, lambda x: torch.where(mask[owner][..., None], 0.0, x), "vision", 0)
    real = inputs["attention_mask"].bool()
    near(model.run(inputs, [edits.ablate(VISION, positions=mask)])[real], wanted[real])


@pytest.mark.parametrize("counts", [(1, 3), (3, 1), (2, 2, 1)])
def test_a_mask_per_example_is_laid_on_its_images(counts: tuple[int, ...]) -> None:
    check_masks(counts)


def test_as_many_rows_as_examples_in_another_order_need_a_selection() -> None:
    model, inputs = prompts((0, 2))
    tokens = model.tokens(inputs)["vision"]
    assert tokens.example.tolist() == [1, 1]
    assert tokens.n_examples == 2
    mask = torch.ones(2, tokens.n_positions, dtype=torch.bool)
    with pytest.raises(InputError, match="give a selection"):
        model.run(inputs, [edits.ablate(VISION, positions=mask)])
    with pytest.raises(InputError, match="boxes may be one per example or one per row"):
        tokens.image(0).box([(0, 0, 4, 4)] * 2)
    wanted = written(model, inputs, lambda x: torch.zeros_like(x), "vision", 0)
    real = inputs["attention_mask"].bool()
    near(model.run(inputs, [edits.ablate(VISION, positions=tokens.select())])[real], wanted[real])
    with pytest.raises(InputError, match="3 rows"):
        model.run(inputs, [edits.ablate(VISION, positions=torch.ones(3, tokens.n_positions, dtype=torch.bool))])


def test_sources_and_masks_follow_beams() -> None:
    model, inputs = prompts((1, 1), "left")
    tokens = model.tokens(inputs)["language"]
    mask = torch.zeros(2, tokens.n_positions, dtype=torch.bool)
    mask[1, -3:] = True
    source = torch.randn(
        2, tokens.n_positions, model.language.cfg.d_model, generator=torch.Generator().manual_seed(2)
    ).double()
    got: list[Tensor] = []
    with model.hooks(fwd_hooks=[("language.blocks.1.hook_resid_pre", lambda x, hook: got.append(x.clone()))]):
        model.generate(
            inputs,
            edits=[edits.replace(LANGUAGE, source, positions=mask, steps="prefill")],
            num_beams=3,
            max_new_tokens=2,
            do_sample=False,
        )
    near(got[0][3:, -3:], source[1, -3:].expand(3, -1, -1))
    assert not torch.isclose(got[0][:3, -3:], source[0, -3:]).any()


def check_draws_of_other_examples(counts: tuple[int, ...]) -> None:
    model, inputs = prompts(counts)
    owner = torch.tensor([example for example, count in enumerate(counts) for _ in range(count)])
    for seed in range(4):
        got: list[Tensor] = []
        hooks = [
            (VISION, lambda x, hook, got=got: got.append(x.clone())),
            ("vision.blocks.1.hook_resid_pre", lambda x, hook, got=got: got.append(x.clone())),
        ]
        with model.hooks(fwd_hooks=hooks[:1]):
            model(inputs)
        with model.hooks(fwd_hooks=hooks[1:]):
            model.run(inputs, [edits.ablate(VISION, "resample", seed=seed)])
        clean, new = got[0], got[-1]
        for row in range(len(owner)):
            (donor,) = (clean == new[row]).flatten(1).all(1).nonzero().flatten().tolist()
            assert owner[donor] != owner[row]


@pytest.mark.parametrize("counts", [(1, 3), (2, 2), (1, 2, 1)])
def test_draws_come_from_other_examples(counts: tuple[int, ...]) -> None:
    check_draws_of_other_examples(counts)


def test_several_images_of_one_example_have_no_other_example() -> None:
    model, inputs = prompts((3,))
    with pytest.raises(InputError, match="only one example, of 3 rows"):
        model.run(inputs, [edits.ablate(VISION, "resample")])


def test_both_sides_of_a_dual_encoder_are_examples_of_their_own() -> None:
    model = wrapped("clip", DOUBLE)
    inputs = case("clip").inputs(model.module, batch=4, dtype=DOUBLE)
    inputs |= {name: value[:4] for name, value in inputs.items()}
    for count in (3, 4, 2):
        few = {**inputs, "pixel_values": inputs["pixel_values"][:count]}
        maps = model.tokens(few)
        assert maps["vision"].n_examples == count
        assert maps["text"].n_examples == len(inputs["input_ids"]) == 4
        run = model.run(few, [edits.ablate("text.blocks.0.hook_resid_post", "mean", average="all")])
        assert tuple(run.shape) == (count, 4)


# -- errors by example ---------------------------------------------------------------------------------------------------------------------


def check_errors(counts: tuple[int, ...]) -> None:
    """A ranking of attention in a vision tower: the error is that of the examples' means, not of the rows."""
    model, inputs = prompts(counts)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter="vision.blocks.*.attn.hook_pattern")
    mass = cv.readout.attention_mass(model, cache, tower="vision").span("patch")
    owner = np.array([example for example, count in enumerate(counts) for _ in range(count)])
    found = cv.readout.rank_components(mass)
    for name, value, error in zip(found.axes["component"], found.mean().tolist(), found.error().tolist(), strict=True):
        layer, head = (int(part) for part in name.split(" L")[1].split("H"))
        rows = mass.values[mass.axes["layer"].index(layer), head].double().numpy()
        means = np.array([rows[owner == example].mean() for example in range(len(counts))])
        assert value == pytest.approx(means.mean())
        assert error == pytest.approx(means.std(ddof=1) / math.sqrt(len(counts)))


@pytest.mark.parametrize("counts", [(1, 3), (2, 2, 2), (1, 1, 1)])
def test_errors_are_over_examples(counts: tuple[int, ...]) -> None:
    check_errors(counts)


def test_rows_that_hold_no_number_are_in_no_mean() -> None:
    values = torch.tensor([[1.0, 3.0, float("nan"), 5.0], [float("nan")] * 4])
    assert by_example(values, [0, 0, 1, 2]).nan_to_num(-1.0).tolist() == [[2.0, -1.0, 5.0], [-1.0] * 3]
    assert by_example(values, [0, 1, 2, 3]) is values
    errors = standard_error(values)
    assert float(errors[0]) == pytest.approx(float(torch.tensor([1.0, 3.0, 5.0]).std() / math.sqrt(3)))
    assert bool(errors[1].isnan())
    assert bool(standard_error(torch.ones(2, 1)).isnan().all())


# -- sweeps where an edit selects nothing ----------------------------------------------------------------------------------------------------


def words(model: cv.HookedModel, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
    """A selection of the last image token of the first example's prompt alone."""
    tokens = model.tokens(inputs)["language"]
    mask = np.zeros_like(tokens.kind, dtype=bool)
    mask[0, np.flatnonzero(tokens.kind[0] == "patch")[-1]] = True
    return cv.model.selection.Selection(tokens, mask, "one"), torch.from_numpy(mask)


def check_sweep() -> None:
    model, inputs = prompts((1, 2, 1))
    chosen, mask = words(model, inputs)
    other = torch.zeros_like(mask)
    other[1:, 0] = True
    groups = [
        edits.ablate(LANGUAGE, positions=chosen),
        edits.ablate(LANGUAGE, positions=mask),
        edits.ablate(LANGUAGE, positions=0),
        [edits.ablate(LANGUAGE, positions=mask), edits.ablate("language.blocks.1.hook_resid_post", positions=other)],
        [],
        edits.block_attention("language", "last", chosen, layers=0),
    ]
    with pytest.warns(UserWarning, match=r"3 of 6 edits select no position in some of the 3 examples.*in 2\."):
        result = model.sweep(inputs, groups, last, progress=False)
    lost = result.values.isnan()
    assert lost.tolist() == [
        [False, True, True],
        [False, True, True],
        [False] * 3,
        [False] * 3,
        [False] * 3,
        [False, True, True],
    ]
    first = last(written(model, inputs, lambda x: torch.where(mask[..., None], 0.0, x), layer=0), inputs)
    near(result.values[0, :1], first[:1])
    assert float(result.effect[0].nanmean()) == pytest.approx(float(first[0] - result.clean[0]))
    assert {cell["edit"]: value for cell, value in result.top(6)}[result.labels[0]] == pytest.approx(
        float(first[0] - result.clean[0])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = model.sweep(inputs, groups, last, empty="clean", progress=False)
    near(kept.values[0, 1:], result.clean[1:])
    assert float(cv.readout.rank_components(result).scores.abs().max()) > 0


def test_an_example_that_was_not_edited_is_in_no_mean() -> None:
    check_sweep()


def test_images_of_one_example_count_together() -> None:
    model, inputs = prompts((1, 3))
    tokens = model.tokens(inputs)["vision"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = model.sweep(inputs, [edits.ablate(VISION, positions=tokens.image(0))], last, progress=False)
    assert bool(result.values.isfinite().all())
    with pytest.warns(UserWarning, match="select no position in some of the 2 examples"):
        result = model.sweep(inputs, [edits.ablate(VISION, positions=tokens.image(2))], last, progress=False)
    assert result.values.isnan().tolist() == [[True, False]]
    with pytest.raises(InputError, match="empty="):
        model.sweep(inputs, [edits.ablate(VISION)], last, empty="zero", progress=False)


def test_texts_of_a_dual_encoder_serve_every_image() -> None:
    model = wrapped("clip", DOUBLE)
    inputs = case("clip").inputs(model.module, batch=3, dtype=DOUBLE)
    mask = torch.zeros(model.tokens(inputs)["text"].kind.shape, dtype=torch.bool)
    mask[1, 0] = True
    result = model.sweep(
        inputs, [edits.ablate("text.hook_input", positions=mask)], lambda out: out[:, 1], progress=False
    )
    assert bool(result.values.isfinite().all())


def check_boxes() -> None:
    """One box for each row, or for each example, whose images all get it."""
    model, inputs = prompts((1, 2))
    tokens = model.tokens(inputs)["vision"]
    size = int(np.nanmax(tokens.box))
    cell = size / model.vision.cfg.grid[0]
    boxes = [(0, 0, cell, cell), None, (size - cell, size - cell, size, size)]
    chosen = tokens.select("patch").box(boxes)
    patches = [np.flatnonzero(tokens.kind[row] == "patch") for row in range(3)]
    assert chosen.positions(0) == [patches[0][0]]
    assert chosen.positions(1) == []
    assert chosen.positions(2) == [patches[2][-1]]
    per_example = tokens.select("patch").box(np.array([boxes[0], boxes[2]]))
    assert [per_example.positions(row) for row in range(3)] == [[patches[0][0]], [patches[1][-1]], [patches[2][-1]]]
    again = tokens.select("patch").box(torch.tensor([boxes[0], boxes[2]]))
    assert again == per_example
    one = tokens.select("patch").box(0, 0, cell, cell)
    assert [one.positions(row) for row in range(3)] == [[patches[row][0]] for row in range(3)]
    grown = tokens.select("patch").box(boxes, buffer=1)
    assert len(grown.positions(0)) == 4
    assert grown.positions(1) == []


def test_boxes_per_row() -> None:
    check_boxes()
    model, inputs = prompts((1, 2))
    tokens = model.tokens(inputs)["vision"]
    for wrong in ([(0, 0, 1, 1)] * 4, [(0, 0, 1)] * 3, [3, 4, 5], [(4, 0, 1, 1)] * 3):
        with pytest.raises(InputError, match=r"[Bb]ox"):
            tokens.image(0).box(wrong)
    for wrong in ((1, 2), ([(0, 0, 1, 1)] * 3, 1, 2, 3)):
        with pytest.raises(InputError, match="box"):
            tokens.image(0).box(*wrong)


# -- gradients, and spellings that could be read two ways ----------------------------------------------------------------------------------


def test_a_tensor_that_asks_for_a_gradient_gets_one() -> None:
    model, inputs = made("llava-clip-llama", batch=2)
    width = model.language.cfg.d_model
    basis = torch.randn(width, 2, dtype=DOUBLE, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edits.project(LANGUAGE, basis, 0.0)
    vector = torch.rand(width, dtype=DOUBLE) + 0.5
    number = torch.tensor(0.4, dtype=DOUBLE)
    kinds: dict[str, tuple[Tensor, Callable[[Tensor], edits.Edit]]] = {
        "replace": (vector, lambda v: edits.replace(LANGUAGE, v, positions="last")),
        "ablate": (vector, lambda v: edits.ablate(LANGUAGE, v)),
        "steer": (vector, lambda v: edits.steer(LANGUAGE, v, 0.7)),
        "norm_preserving": (vector, lambda v: edits.steer(LANGUAGE, v, mode="norm_preserving")),
        "project_out": (vector, lambda v: edits.steer(LANGUAGE, v, 0.5, mode="project_out")),
        "scale": (vector, lambda v: edits.scale(LANGUAGE, v)),
        "overwrite": (number, lambda v: edits.overwrite(LANGUAGE, [0, 3], v)),
        "basis": (basis.detach(), lambda v: edits.project(LANGUAGE, v, 0.0)),
        "project": (vector, lambda v: edits.project(LANGUAGE, basis.detach(), v)),
        "bias": (number, lambda v: edits.add_attention_bias("language", keys=0, bias=v)),
        "bias of a pattern": (
            number,
            lambda v: edits.add_attention_bias("language", keys=0, bias=v, renormalise=False),
        ),
    }
    for name, (value, make) in kinds.items():

        def score(value: Tensor, make: Any = make) -> Tensor:
            return model.run(inputs, [make(value)])[:, -1, :9].pow(2).sum()

        leaf = value.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(score(leaf), [leaf])
        step = torch.randn(value.shape, generator=torch.Generator().manual_seed(3), dtype=DOUBLE) * 1e-3
        with torch.no_grad():
            change = score(value + step) - score(value - step)
        torch.testing.assert_close(
            change, 2 * (slope * step).sum(), rtol=2e-2, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_list_of_two_with_two_examples_is_refused() -> None:
    model, inputs = made("llava-clip-llama", batch=2)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    with pytest.raises(InputError, match=r"tuple.*one answer per example"):
        cv.readout.direct_attribution(model, cache, [6, 9])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for direction in ((6, 9), {"answer": [6, 9]}, [6, 6], 6):
            cv.readout.direct_attribution(model, cache, direction)


def test_default_questions_do_not_tell_colour_by_shape() -> None:
    pairs = cv.data.sample_question_pairs(400, seed=0)
    assert len({(pair.answer, pair.question.subject.shape) for pair in pairs}) == 40
    few = cv.data.sample_question_pairs(16, seed=0)
    assert len({pair.answer for pair in few}) == 8
    assert len({pair.question.subject.shape for pair in few}) == 5
    asked = cv.data.sample_questions(240, seed=0, kinds=["color"])
    assert len({question.subject.pair for _, question in asked}) == 40


def test_a_sweep_over_more_examples_than_fit_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = made("llava-clip-llama", batch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sweep(inputs, [edits.ablate(LANGUAGE)], last_of_all, progress=False)
    monkeypatch.setattr(run, "free_memory", lambda device: 1000)
    with pytest.warns(UserWarning, match="give a data set"):
        model.sweep(inputs, [edits.ablate(LANGUAGE)], last_of_all, progress=False)


def last_of_all(logits: Tensor) -> Tensor:
    return logits[:, -1, 7]


# -- mutants -------------------------------------------------------------------------------------------------------------------------------


def rows_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks repeated as often as rows are more than they."""

    def rows_of(self: Positions, mask: Tensor, tokens: Any) -> Tensor:
        return mask.repeat_interleave(tokens.n_rows // mask.shape[0], dim=0)

    monkeypatch.setattr(Positions, "_rows_of", rows_of)


def any_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from circuitvision.model import averages

    monkeypatch.setattr(
        averages,
        "other_examples",
        lambda layout, seed: [[(row + 1) % len(layout.example)] for row in range(len(layout.example))],
    )


def errors_over_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row an example of its own."""
    monkeypatch.setattr(ranks, "by_example", lambda values, example: values)
    monkeypatch.setattr(Result, "examples", property(lambda self: list(range(len(self.axes["example"])))))


def unedited_rows_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "unedited_examples", lambda binder, group: None)


def examples_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from circuitvision.model.selection import Selection

    monkeypatch.setattr(
        Selection,
        "_of_rows",
        lambda self, boxes: np.array([boxes[row % len(boxes)] for row in range(self.tokens.n_rows)], dtype=float),
    )


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], None]]] = {
    "masks by number": (rows_by_number, lambda: check_masks((3, 1))),
    "draws by row": (any_other_row, lambda: check_draws_of_other_examples((1, 3))),
    "errors over rows": (errors_over_rows, lambda: check_errors((2, 2, 2))),
    "unedited examples": (unedited_rows_count, check_sweep),
    "boxes by number": (examples_by_row, check_boxes),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, check = MUTANTS[name]
    check()
    mutate(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check()
