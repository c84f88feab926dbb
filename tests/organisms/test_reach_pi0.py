"""reach-pi0: it loads without torchvision, trains on what its processor makes, reaches, and its goal word steers it."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, PI0ForConditionalGeneration, PI0Processor

from circuitvision import metrics, organisms
from circuitvision.data import reach
from circuitvision.errors import InputError
from circuitvision.organisms import reach_pi0

GOAL_WORD = 16 + 2  # 16 image tokens, <bos>, "reach", then the colour


@pytest.fixture(scope="module")
def folder() -> Path:
    return organisms.path("reach-pi0")


@pytest.fixture(scope="module")
def model(folder: Path) -> PI0ForConditionalGeneration:
    return PI0ForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder: Path) -> PI0Processor:
    return AutoProcessor.from_pretrained(folder)


def test_both_ways_of_loading_the_processor_give_the_same_tensors(folder: Path, processor: PI0Processor) -> None:
    by_hand = reach_pi0.load_processor(folder)
    new = reach_pi0.build_processor()
    assert type(processor) is type(by_hand) is PI0Processor
    scenes = reach.sample_scenes(20, seed=0)
    expected = reach_pi0.model_inputs(new, scenes, actions=True)
    for other in (processor, by_hand):
        found = reach_pi0.model_inputs(other, scenes, actions=True)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_processor_without_torchvision_keeps_every_setting_that_was_saved(tmp_path: Path) -> None:
    board = reach.Board(size=5, cell_pixels=6)
    saved = reach_pi0.build_processor(board)
    saved.image_processor.image_mean = [0.1, 0.2, 0.3]
    saved.state_mean = [7.0, 8.0]
    saved.save_pretrained(tmp_path)
    reach_pi0.build_model(saved, board).config.save_pretrained(tmp_path)
    loaded = reach_pi0.load_processor(tmp_path)
    assert loaded.image_seq_length == 25
    assert json.loads(loaded.image_processor.to_json_string()) == json.loads(saved.image_processor.to_json_string())
    assert (loaded.state_mean, loaded.chunk_size, loaded.max_state_dim) == ([7.0, 8.0], 2, 2)
    assert loaded.tokenizer.get_vocab() == saved.tokenizer.get_vocab()
    with pytest.raises(InputError, match="save_pretrained"):
        reach_pi0.load_processor(tmp_path / "nowhere")


def test_the_training_inputs_are_those_of_the_processor(processor: PI0Processor) -> None:
    scenes = reach.sample_scenes(50, seed=3)
    slow = reach_pi0.model_inputs(processor, scenes, actions=True)
    fast = reach_pi0.fast_inputs(processor, scenes)
    length = fast["input_ids"].shape[1]
    assert slow["attention_mask"].sum(1).eq(length).all()
    assert torch.equal(slow["input_ids"][:, :length], fast["input_ids"])
    assert (slow["input_ids"] != processor.tokenizer.unk_token_id).all()
    goals = processor.tokenizer.convert_ids_to_tokens(fast["input_ids"][:, GOAL_WORD])
    assert [f"reach {goal}" for goal in goals] == scenes.instructions()
    for key in ("pixel_values", "pixel_attention_mask", "state", "actions"):
        torch.testing.assert_close(slow[key], fast[key], rtol=0, atol=1e-6)


def test_the_loss_that_runs_the_prefix_once_is_the_models_own(processor: PI0Processor) -> None:
    torch.manual_seed(0)
    model = reach_pi0.build_model(processor)
    batch = reach_pi0.fast_inputs(processor, reach.sample_scenes(6, seed=4))
    losses, gradients = [], []
    for loss in (lambda: reach_pi0.imitation_loss(model, batch, draws=1), lambda: model(**batch).loss):
        torch.manual_seed(1)
        model.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
    # With several draws every scene keeps its own prefix: repeating the batch by hand gives the same loss.
    torch.manual_seed(2)
    several = reach_pi0.imitation_loss(model, batch, draws=3)
    torch.manual_seed(2)
    repeated = model(**{key: value.repeat_interleave(3, dim=0) for key, value in batch.items()}).loss
    torch.testing.assert_close(several, repeated, rtol=1e-5, atol=1e-6)


def test_actions_do_not_depend_on_padding(model: PI0ForConditionalGeneration, processor: PI0Processor) -> None:
    scenes = reach.sample_scenes(10, seed=5)
    noise = torch.randn(10, 2, 2, generator=torch.Generator().manual_seed(0))
    short = reach_pi0.fast_inputs(processor, scenes)
    short.pop("actions")
    padded = model.sample_actions(**reach_pi0.model_inputs(processor, scenes), noise=noise)
    torch.testing.assert_close(padded, model.sample_actions(**short, noise=noise), rtol=0, atol=1e-4)


def test_it_reaches_the_goal_on_layouts_it_never_saw(
    model: PI0ForConditionalGeneration, processor: PI0Processor
) -> None:
    episodes = reach_pi0.closed_loop(model, processor, "test", count=200, seed=77)
    assert set(episodes.start.splits()) == {"test"}
    assert episodes.success_rate >= 0.95
    control = reach.run_episodes(reach.random_policy(0), episodes.start, reach_pi0.HORIZON)
    assert control.success_rate < 0.15


def test_only_what_matters_changes_the_action(model: PI0ForConditionalGeneration, processor: PI0Processor) -> None:
    """A new goal, goal cell or gripper cell gives the new expert's steps; the colour of another object changes nothing."""
    for change in ("goal", "object_cell", "gripper"):
        for scenes in reach.contrast_pairs(100, seed=6, change=change):
            steps = reach_pi0.to_steps(processor, reach_pi0.predict(model, processor, scenes))
            assert (steps == scenes.expert(2)).all(axis=(1, 2)).mean() >= 0.9, change
    scenes = reach.sample_scenes(100, seed=7, split="test")
    recoloured = reach.minimal_pairs(scenes, "object_color", seed=8)
    pair = [reach_pi0.to_steps(processor, reach_pi0.predict(model, processor, each)) for each in (scenes, recoloured)]
    assert (pair[0] == pair[1]).all(axis=(1, 2)).mean() >= 0.9


def patched_steps(
    model: PI0ForConditionalGeneration,
    processor: PI0Processor,
    clean: reach.ReachScenes,
    donor: reach.ReachScenes,
    layer: int,
    positions: slice,
) -> np.ndarray:
    """The steps for ``clean`` when the prefix's residual stream entering ``layer`` is the donor's at ``positions``."""
    block = model.model.vlm.language_model.layers[layer]
    kept: list[torch.Tensor] = []

    def read(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        kept.append(args[0].clone())

    def write(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        mixed = args[0].clone()
        mixed[:, positions] = kept[0][:, positions]
        return (mixed, *args[1:])

    for hook, scenes in ((read, donor), (write, clean)):
        handle = block.register_forward_pre_hook(hook)
        try:
            actions = reach_pi0.predict(model, processor, scenes)
        finally:
            handle.remove()
    assert len(kept) == 1, "the prefix runs once however many denoising steps follow"
    return reach_pi0.to_steps(processor, actions)


def test_patching_the_goal_word_gives_the_donors_action(
    model: PI0ForConditionalGeneration, processor: PI0Processor
) -> None:
    clean, donor = reach.contrast_pairs(150, seed=10, change="goal")
    own, other = clean.expert(2), donor.expert(2)

    def share(steps: np.ndarray, wanted: np.ndarray) -> float:
        return float((steps == wanted).all(axis=(1, 2)).mean())

    goal_word = patched_steps(model, processor, clean, donor, 0, slice(GOAL_WORD, GOAL_WORD + 1))
    assert share(goal_word, other) >= 0.95
    assert share(goal_word, own) <= 0.02
    # The same patch at the word "reach" moves nothing: it is equal in both runs.
    verb = patched_steps(model, processor, clean, donor, 0, slice(GOAL_WORD - 1, GOAL_WORD))
    assert share(verb, own) >= 0.95
    # One layer further every position carries the donor's goal, or some earlier keys and values would not be clean.
    everything = patched_steps(model, processor, clean, donor, 0, slice(None))
    assert (everything == goal_word).all()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("change", ["object_cell", "goal", "gripper"])
def test_its_pairs_differ_in_one_thing_and_the_clean_step_is_the_larger(change: str, dim: int) -> None:
    pairs = organisms.pairs("reach-pi0", 40, seed=0, change=change, dim=dim)
    assert len(pairs) == 40
    assert pairs.records is not None
    for record, answer, foil in zip(pairs.records, pairs.answers or (), pairs.foils or (), strict=True):
        one, other = record.clean, record.corrupt
        assert (answer, foil) == (record.steps[0][dim], record.steps[1][dim])
        assert answer > foil
        differ = {"goal": one.instruction != other.instruction, "gripper": one.gripper_cell != other.gripper_cell}
        assert [name for name, changed in differ.items() if changed] == [name for name in differ if name == change]
        moved = [first for first, second in zip(one.objects, other.objects, strict=True) if first != second]
        assert moved == ([one.goal] if change == "object_cell" else [])
    again = organisms.pairs("reach-pi0", 40, seed=0, change=change, dim=dim)
    assert again.digest == pairs.digest
    assert organisms.pairs("reach-pi0", 40, seed=1, change=change, dim=dim).digest != pairs.digest


def test_it_answers_its_pairs_and_the_mean_over_them_does_not_cancel() -> None:
    model = organisms.load("reach-pi0")
    for dim in (0, 1):
        metric = metrics.action_estimate(dim)
        pairs = organisms.pairs("reach-pi0", 40, seed=2, dim=dim)
        assert len(pairs.answered(model, metric)) >= 38
        (batch,) = pairs.batches(model, 40)
        clean, corrupt = (metric.bind(model)(model(side), side) for side in (batch.inputs, batch.other))
        assert float((clean - corrupt).detach().mean()) > 0.9
        # One step of denoising heads for the action that all of them reach.
        acted = metric.bind(model).of_marked()(model.sample_actions(batch.inputs))
        assert float((clean - acted).detach().abs().mean()) < 0.15


def test_options_that_pairs_do_not_have_are_refused() -> None:
    with pytest.raises(InputError, match="change"):
        organisms.pairs("reach-pi0", 2, split="train")
    with pytest.raises(InputError, match="dimension"):
        organisms.pairs("reach-pi0", 2, dim=2)
    with pytest.raises(InputError, match="none"):
        organisms.pairs("scenes-vit", 2, dim=1)


def test_a_short_run_writes_a_folder_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach_pi0, "evaluate", functools.partial(reach_pi0.evaluate, count=20))
    scores = organisms.train("reach-pi0", seed=3, out=tmp_path / "organism", steps=2, progress=False)
    assert 0 <= scores["held_out"] <= 1
    again = organisms.train("reach-pi0", seed=3, out=tmp_path / "again", steps=2, progress=False)
    spent = {"minutes": 0, "cpu_minutes": 0}
    assert {**scores, **spent} == {**again, **spent}
    first, second = (PI0ForConditionalGeneration.from_pretrained(tmp_path / name) for name in ("organism", "again"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    AutoProcessor.from_pretrained(tmp_path / "organism")


def test_the_card_ships_the_best_validation_run_and_it_is_good_enough(folder: Path) -> None:
    card = organisms.card("reach-pi0")
    assert len({run["seed"] for run in card["seeds"]}) >= 3
    shipped = next(run for run in card["seeds"] if run["seed"] == card["ships"])
    assert shipped["validation"] == max(run["validation"] for run in card["seeds"])
    assert card["held_out"] == shipped["held_out"] >= 0.95
    assert shipped["held_out_episodes"] >= 500
    assert shipped["cpu_minutes"] < 20
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert card["command"] in readme
    assert f"{shipped['held_out']:.1%}" in readme


@pytest.mark.slow
def test_the_scores_on_the_card_are_measured_again() -> None:
    card = organisms.card("reach-pi0")
    shipped = next(run for run in card["seeds"] if run["seed"] == card["ships"])
    scores = organisms.evaluate("reach-pi0")
    assert scores.keys() >= {"held_out", "validation", "trained", "held_out_actions", "random_policy"}
    for key, value in scores.items():
        assert value == pytest.approx(shipped[key], abs=0.005), key
