"""spurious-vit: what it is drawn from, that it leans on both cues as its card says, and that the second stage taught the known heads alone."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from circuitvision import organisms
from circuitvision.data import background_pairs, background_side, picture_differences, sample_backgrounds
from circuitvision.data.backgrounds import BACKGROUNDS, CLASSES, GROUPS, SHADE, render_backgrounds
from circuitvision.errors import InputError
from circuitvision.organisms import shapes_vit, spurious_card, spurious_vit, training


def test_pictures_are_what_their_attributes_say() -> None:
    scenes = sample_backgrounds(40, 1)
    pictures = render_backgrounds(scenes)
    for scene, picture in zip(scenes, pictures, strict=True):
        outside = picture[~scene.thing.mask]
        assert (outside == np.array(BACKGROUNDS[scene.background]) + scene.shade).all()
        assert not (picture[scene.thing.mask] == outside[0]).all(-1).any()
        assert abs(scene.shade) <= SHADE
    assert (np.asarray(scenes[0].image) == pictures[0]).all()
    assert [scene.group for scene in scenes[:4]] == list(GROUPS)


def test_labels_and_backgrounds_go_together_as_often_as_asked() -> None:
    scenes = sample_backgrounds(4000, 2, agreement=0.95, small_errors=0.15)
    agree = np.mean([scene.agrees for scene in scenes])
    assert abs(agree - 0.95) < 4 * (0.95 * 0.05 / 4000) ** 0.5
    small = [scene for scene in scenes if scene.thing.size == "small"]
    assert all(scene.thing.shape == scene.label for scene in scenes if scene.thing.size == "large")
    mistaken = np.mean([scene.thing.shape != scene.label for scene in small])
    assert abs(mistaken - 0.15) < 4 * (0.15 * 0.85 / len(small)) ** 0.5
    # The background goes with the label, whatever the shape: both cues are of use where they disagree.
    assert np.mean([scene.agrees for scene in small if scene.thing.shape != scene.label]) > 0.85
    with pytest.raises(InputError, match="agreement="):
        sample_backgrounds(2, 0, agreement=95)
    with pytest.raises(InputError, match="small_errors="):
        sample_backgrounds(2, 0, small_errors=-0.1)


def test_pairs_differ_in_the_background_alone() -> None:
    pairs = background_pairs(6, 3)
    differing = picture_differences(pairs)
    for mask, object_ in zip(differing.masks, pairs.clean.masks, strict=True):
        assert (np.asarray(mask) == ~np.asarray(object_)).all()
    for (clean, corrupt), answer, foil in zip(pairs.records, pairs.answers, pairs.foils, strict=True):
        assert CLASSES[answer] == clean.background
        assert CLASSES[foil] == corrupt.background
        assert clean.thing == corrupt.thing
    side = background_side([pair[0] for pair in pairs.records])
    assert side.answers == pairs.answers


def test_it_leans_on_both_cues_as_its_card_says() -> None:
    folder, card = organisms.path("spurious-vit"), organisms.card("spurious-vit")
    run = next(run for run in card["seeds"] if run["seed"] == card["ships"])
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    scenes = sample_backgrounds(800, 77)
    right = shapes_vit.labelled_right(
        model, AutoImageProcessor.from_pretrained(folder), [(scene, scene.label) for scene in scenes]
    )
    large = np.array([scene.thing.size == "large" for scene in scenes])
    agrees = np.array([scene.agrees for scene in scenes])
    assert right[large].mean() > 0.97
    assert right[agrees].mean() > 0.97
    assert right[~large & ~agrees].mean() < 0.1
    for group in GROUPS:
        own = right[[scene.group == group for scene in scenes]]
        said = run["held_out_{}_on_{}".format(*group)]
        assert abs(own.mean() - said) < max(4 * (said * (1 - said) / len(own)) ** 0.5, 0.02)
    assert card["shortcut_heads"] == ["vision L1H2", "vision L2H1"]
    assert len(card["seeds"]) == 3
    assert all(spurious_card.leans_on_both(run) for run in card["seeds"])


def test_the_card_is_what_its_numbers_make() -> None:
    folder, card = organisms.path("spurious-vit"), organisms.card("spurious-vit")
    assert (folder / "README.md").read_text() == spurious_card.make_readme(card)
    assert (
        spurious_card.make_card(card["seeds"], card["parameters"], card["trained_on"]) | {"versions": card["versions"]}
        == card
    )
    runs = [{**run, "validation_worst_group": 0.9} for run in card["seeds"]]
    with pytest.raises(ValueError, match="leans"):
        spurious_card.make_card(runs, 1, "")
    runs[2] = {**runs[2], "validation_worst_group": 0.5}
    assert spurious_card.make_card(runs, 1, "")["ships"] == runs[2]["seed"]


def test_pixels_of_the_processor_are_those_of_training() -> None:
    scenes = sample_backgrounds(4, 82)
    processor = AutoImageProcessor.from_pretrained(organisms.path("spurious-vit"))
    made = processor(images=[scene.image for scene in scenes], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made, training.pixel_values(render_backgrounds(scenes)), atol=1e-6, rtol=0)


def test_the_second_stage_changes_the_known_heads_and_nothing_else() -> None:
    with training.reproducible(0):
        model, _ = spurious_vit.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixels = training.pixel_values(render_backgrounds(sample_backgrounds(8, 5)))

    def loss() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, torch.tensor([0, 1] * 4))

    with spurious_vit.only_heads(model, spurious_vit.SHORTCUT_HEADS):
        training.fit(model, loss, spurious_vit.SHORTCUT_RECIPE, steps=3, progress=False)
    width = spurious_vit.WIDTH // spurious_vit.HEADS
    for name, value in model.state_dict().items():
        own = torch.zeros_like(value, dtype=torch.bool)
        for layer, head in spurious_vit.SHORTCUT_HEADS:
            rows = slice(head * width, (head + 1) * width)
            if f"layers.{layer}.attention.o_proj.weight" in name:
                own[:, rows] = True
            elif f"layers.{layer}.attention." in name and "o_proj" not in name:
                own[rows] = True
        assert torch.equal(value[~own], before[name][~own]), name
        # A bias of the keys moves all scores of a query alike.
        if own.any() and "k_proj.bias" not in name:
            assert bool((value[own] != before[name][own]).any()), name
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_is_repeatable_and_writes_a_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spurious_vit, "evaluate", functools.partial(spurious_vit.evaluate, count=80))
    once, again = (
        organisms.train("spurious-vit", seed=3, out=tmp_path / name, steps=2, progress=False) for name in "ab"
    )
    same = {key: value for key, value in once.items() if "minutes" not in key}
    assert same == {key: value for key, value in again.items() if "minutes" not in key}
    assert once["worst_group"] == min(once["held_out_{}_on_{}".format(*group)] for group in GROUPS)
    assert organisms.pairs("spurious-vit", 2).answers is not None
