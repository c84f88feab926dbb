"""What a sweep computes and what it does not, what it leaves behind, and how it fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.incremental.resume import Resumer
from circuitvision.incremental.sweeps.plan import Plan
from tests.parts import module_of
from tests.sweeps.drawing import metric
from tests.zoo import CASES, case, parametrize, shared_model


def wrapped(name: str, batch: int = 1, **options: Any) -> tuple[cv.HookedModel, dict[str, Any]]:
    model = cv.HookedModel(shared_model(name))
    return model, CASES[name].inputs(model.module, batch=batch, **options)


def noise(model: cv.HookedModel, tower: str, seed: int = 0) -> Tensor:
    return torch.randn(model.towers[tower].cfg.d_model, generator=torch.Generator().manual_seed(seed))


def steered(model: cv.HookedModel, site: str) -> edits.Edit:
    return edits.steer(site, noise(model, site.partition(".")[0]))


@contextmanager
def counted(model: cv.HookedModel, part: str = "q") -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """Shapes of what enters one linear map of every block, by ``tower.layer``, in the order of the calls."""
    seen: dict[str, list[tuple[int, ...]]] = {}
    handles = []
    for name, tower in model.towers.items():
        for block in tower.blocks:

            def note(module: nn.Module, args: Any, key: str = f"{name}.{block.layer}") -> None:
                seen.setdefault(key, []).append(tuple(args[0].shape))

            handles.append(module_of(block, part).register_forward_pre_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def test_text_edits_behind_an_image_compute_neither_the_vision_tower_nor_earlier_positions_nor_earlier_blocks() -> None:
    model, inputs = wrapped("llava-clip-llama")
    length = inputs["input_ids"].shape[1]
    edit = edits.steer("language.blocks.1.hook_resid_mid", noise(model, "language"), positions=length - 2)
    with counted(model) as attention, counted(model, "mlp_in") as mlp:
        result = model.sweep(inputs, [edit], metric, progress=False)
    # Once for the unedited run; the edit itself needs the last block's MLP at two positions.
    assert [len(calls) for calls in attention.values()] == [1] * len(attention)
    assert mlp["language.0"] == [(1, length, model.language.cfg.d_model)]
    assert mlp["language.1"][1:] == [(1, 2, model.language.cfg.d_model)]
    assert [key for key, calls in mlp.items() if len(calls) > 1] == ["language.1"]
    assert result.plan == [Plan("language", 1, "attn", length - 2)]
    assert str(result.plan[0]) == f"from language block 1 (attn), positions {length - 2}…"


def test_edits_of_one_place_run_in_one_batch_and_late_positions_do_not_pay_for_early_ones() -> None:
    model, inputs = wrapped("llava-clip-llama")
    length, width = inputs["input_ids"].shape[1], model.language.cfg.d_model
    places = range(length - 4, length)
    listed = [edits.steer("language.blocks.0.hook_resid_mid", noise(model, "language"), positions=p) for p in places]
    with counted(model, "mlp_in") as together:
        model.sweep(inputs, listed, metric, progress=False)
    assert together["language.1"][1:] == [(4, 4, width)]
    with counted(model, "mlp_in") as alone:
        model.sweep(inputs, listed, metric, batch_size=1, progress=False)
    assert alone["language.1"][1:] == [(1, size, width) for size in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", ["paligemma", "pi0", "llava-clip-mistral-sliding", "clip", "siglip"])
def test_the_suffix_follows_the_mask_of_the_run(name: str) -> None:
    """Bidirectional prefixes have no suffix; causal towers, with or without a window, have one at every position."""
    model, inputs = wrapped(name)
    tower = "text" if "text" in model.towers else "language"
    causal = name in ("llava-clip-mistral-sliding", "clip")
    length = inputs["input_ids"].shape[1]
    edit = edits.steer(f"{tower}.blocks.0.hook_resid_post", noise(model, tower), positions=length - 2)
    with counted(model) as seen:
        result = model.sweep(inputs, [edit], metric, progress=False)
    again = seen[f"{tower}.1"][1]
    assert again[1] == (2 if causal else length)
    assert (result.plan[0].first > 0) == causal


def test_paddings_of_other_rows_do_not_stop_the_suffix() -> None:
    model, inputs = wrapped("llava-clip-llama", batch=3, padding="left")
    edit = edits.steer("language.blocks.0.hook_resid_post", noise(model, "language"), positions=-2)
    result = model.sweep(inputs, [edit], metric, progress=False)
    assert result.plan[0].first > 0


def test_the_action_expert_hands_back_blocks_that_read_unchanged_keys_and_values() -> None:
    model, inputs = wrapped("pi0")
    last = model.language.cfg.n_layers - 2
    edit = edits.steer(f"language.blocks.{last}.hook_resid_mid", noise(model, "language"))
    with counted(model) as seen:
        model.sweep(inputs, [edit], metric, progress=False)
    calls = {key: len(shapes) for key, shapes in seen.items() if key.startswith("action")}
    assert calls == {f"action.{layer}": 1 + (layer > last) for layer in range(model.action.cfg.n_layers)}


@pytest.mark.parametrize(("name", "tower"), [("pi0", "language"), ("llava-clip-llama", "vision")])
def test_what_no_output_reads_hands_back_unless_it_is_edited(name: str, tower: str) -> None:
    """A prefix's last MLP, and the blocks behind the feature layer."""
    model, inputs = wrapped(name)
    last = model.towers[tower].cfg.n_layers - 1
    first, dead = (
        steered(model, f"{tower}.blocks.0.hook_resid_mid"),
        edits.scale(f"{tower}.blocks.{last}.mlp.hook_pre", 2.0),
    )
    for group, again in (([first], 0), ([first, dead], 1)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with counted(model, "mlp_in") as seen:
                result = model.sweep(inputs, [group], metric, progress=False)
            torch.testing.assert_close(result.values[0], metric(model.run(inputs, group)), rtol=1e-4, atol=1e-5)
        assert len(seen[f"{tower}.{last}"]) == 1 + again
        assert len(seen[f"{tower}.0"]) == 2
        assert not result.plan[0].in_full


def test_the_other_tower_of_a_dual_encoder_hands_back() -> None:
    model, inputs = wrapped("clip", batch=2)
    listed = [edits.ablate("vision.blocks.0.attn.hook_z", heads=head) for head in (0, 1, 2)]
    with counted(model) as seen:
        result = model.sweep(inputs, listed, lambda logits: logits[:, 1], progress=False)
    assert {len(calls) for key, calls in seen.items() if key.startswith("text")} == {1}
    naive = torch.stack([model.run(inputs, [edit])[:, 1] for edit in listed])
    torch.testing.assert_close(result.values, naive, rtol=1e-5, atol=1e-5)


@parametrize()
def test_nothing_is_left_in_the_model(case: Any) -> None:
    """Also where the sweep breaks off: no hook of ours, no replaced forward, the same implementation of attention."""
    model, inputs = wrapped(case.name)
    model(inputs)
    tower = list(model.towers)[-1]
    before = [
        (dict(module.__dict__), len(module._forward_pre_hooks), len(module._forward_hooks))
        for module in model.module.modules()
    ]
    kernels = [m.config._attn_implementation for m in model.module.modules() if hasattr(m, "config")]
    listed = [edits.ablate(f"{tower}.blocks.0.attn.hook_z", heads=0), edits.block_attention(tower, -1, 0, layers=0)]

    def broken(logits: Tensor) -> Tensor:
        raise RuntimeError("the metric broke")

    model.sweep(inputs, listed, metric, progress=False)
    with pytest.raises(RuntimeError, match="the metric broke"):
        model.sweep(inputs, listed, broken, progress=False)
    after = [
        (module.__dict__, len(module._forward_pre_hooks), len(module._forward_hooks))
        for module in model.module.modules()
    ]
    for (old, *counts), (new, *now) in zip(before, after, strict=True):
        assert "forward" not in new or new["forward"] is old.get("forward")
        assert counts == now
    assert kernels == [m.config._attn_implementation for m in model.module.modules() if hasattr(m, "config")]
    assert (model.engine.handles, model.engine.stack) == ([], [])


def interrupting(after: int, error: BaseException) -> Callable[[Tensor], Tensor]:
    """A metric that raises on its call number ``after`` (the unedited run's is number 0)."""
    calls = iter(range(1000))

    def measure(logits: Tensor) -> Tensor:
        if next(calls) == after:
            raise error
        return metric(logits)

    return measure


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("of the metric")])
def test_an_interrupted_sweep_returns_what_is_done(error: BaseException) -> None:
    model, inputs = wrapped("vit", batch=2)
    listed = [edits.ablate("vision.blocks.0.attn.hook_z", heads=head) for head in range(model.vision.cfg.n_heads)]
    whole = model.sweep(inputs, listed, metric, progress=False)
    with pytest.warns(UserWarning, match="after 2 of"):
        part = model.sweep(inputs, listed, interrupting(3, error), partial=True, progress=False)
    assert part.done.tolist() == [True, True] + [False] * (len(listed) - 2)
    assert part.interrupted.startswith(type(error).__name__)
    torch.testing.assert_close(part.values[:2], whole.values[:2])
    assert bool(part.values[2:].isnan().all())
    assert model.engine.handles == []
    with pytest.raises(type(error)):
        model.sweep(inputs, listed, interrupting(3, error), progress=False)


def test_batches_are_halved_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = wrapped("vit", batch=2)
    listed = [edits.ablate("vision.blocks.1.attn.hook_z", heads=head % 4, positions=head // 4) for head in range(12)]
    expected = model.sweep(inputs, listed, metric, progress=False)
    sizes, run = [], Resumer.run

    def small(self: Resumer, route: Any, copies: int, first: int) -> Tensor:
        sizes.append(copies)
        if copies > 2:
            raise torch.OutOfMemoryError("not enough")
        return run(self, route, copies, first)

    monkeypatch.setattr(Resumer, "run", small)
    result = model.sweep(inputs, listed, metric, batch_size=12, progress=False)
    assert sizes[:4] == [12, 6, 3, 1]
    torch.testing.assert_close(result.values, expected.values)


def test_one_group_that_does_not_fit_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("not enough")

    model, inputs = wrapped("vit")
    monkeypatch.setattr(Resumer, "run", never)
    with pytest.raises(torch.OutOfMemoryError):
        model.sweep(inputs, [edits.ablate("vision.blocks.1.hook_mlp_out")], metric, progress=False)


def test_other_hooks_and_training_mode_run_in_full_and_say_why() -> None:
    model, inputs = wrapped("vit")
    edit = edits.ablate("vision.blocks.1.attn.hook_z", heads=1)
    with model.hooks([("vision.blocks.0.hook_mlp_out", lambda value, hook: value * 2)]):
        result = model.sweep(inputs, [edit], metric, progress=False)
        assert result.plan[0].in_full
        assert result.plan[0].reason.startswith("other hooks")
        torch.testing.assert_close(result.values[0], metric(model.run(inputs, [edit])))
    model.train()
    try:
        assert model.sweep(inputs, [edit], metric, progress=False).plan == [
            Plan(reason="the model is in training mode")
        ]
    finally:
        model.eval()


def test_blocks_called_in_an_unknown_way_run_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cv.HookedModel(case("llava-clip-llama").build())
    inputs = case("llava-clip-llama").inputs(model.module)
    block = model.language.blocks[1].module
    plain = block.forward
    root = model.language.root
    before = type(root).forward

    def with_more(self: Any, *args: Any, **kwargs: Any) -> Any:
        return before(self, *args, mystery=torch.zeros(3), **kwargs)

    monkeypatch.setattr(type(root), "forward", with_more)
    edit = edits.steer("language.blocks.0.hook_resid_post", noise(model, "language"), positions=-1)
    result = model.sweep(inputs, [edit], metric, progress=False)
    assert result.plan == [Plan(reason="blocks of the language tower are called with 'mystery'")]
    torch.testing.assert_close(result.values[0], metric(model.run(inputs, [edit])))
    assert block.forward == plain
    assert "forward" not in root.__dict__


def test_means_over_a_data_set_are_computed_once() -> None:
    model, inputs = wrapped("vit", batch=2)
    data = [case("vit").inputs(model.module, batch=2, seed=seed) for seed in (1, 2)]
    listed = [edits.ablate("vision.blocks.*.attn.hook_z", "mean", dataset=data, heads=head) for head in range(3)]
    with counted(model) as seen:
        model.sweep(inputs, listed, metric, batch_size=3, progress=False)
    # Two batches of data, the unedited run, one batch of edits (which begins after the first block's queries).
    assert (len(seen["vision.0"]), len(seen["vision.1"])) == (3, 4)


def test_the_metric_sees_one_whole_run_at_a_time() -> None:
    model, inputs = wrapped("llava-clip-llama", batch=2)
    shape = model(inputs).shape
    seen: list[Any] = []

    def look(logits: Tensor, given: Any) -> Tensor:
        seen.append((logits.shape, given["input_ids"] is inputs["input_ids"], logits.clone()))
        logits.zero_()
        return torch.zeros(len(logits))

    listed = [
        edits.steer("language.blocks.0.hook_resid_post", noise(model, "language", p), positions=p) for p in (-3, -2, -1)
    ]
    model.sweep(inputs, listed, look, progress=False)
    assert {entry[:2] for entry in seen} == {(shape, True)}
    # What one metric call does to its logits is not what the next one gets.
    for edit, (_, _, logits) in zip(reversed(listed), seen[1:], strict=True):
        torch.testing.assert_close(logits, model.run(inputs, [edit]), rtol=1e-4, atol=1e-5)


def test_metrics_with_one_answer_per_example() -> None:
    model, inputs = wrapped("vit", batch=3)
    listed = [edits.ablate("vision.blocks.1.attn.hook_z", heads=head) for head in range(4)]
    measure = cv.metrics.logit_diff([0, 1, 2], [1, 2, 0])
    result = model.sweep(inputs, listed, measure, progress=False)
    torch.testing.assert_close(result.values, torch.stack([measure(model.run(inputs, [e])) for e in listed]))
    torch.testing.assert_close(result.clean, measure(model(inputs)))
    torch.testing.assert_close(result.effect, result.values - result.clean)


def test_results_name_their_edits_and_survive_a_file(tmp_path: Any) -> None:
    model, inputs = wrapped("vit", batch=2)
    same = edits.ablate("vision.blocks.1.attn.hook_z", heads=0)
    result = model.sweep(inputs, [same, [same], []], metric, progress=False)
    assert result.axes["edit"] == [repr(same), f"{same!r} #2", "no edit"]
    assert str(result.plan[2]) == "nothing changes"
    torch.testing.assert_close(result.values[2], result.clean, rtol=0, atol=0)
    again = cv.SweepResult.load(result.save(tmp_path / "sweep.npz"))
    assert again.axes == result.axes
    assert again.plan == result.plan
    assert torch.equal(again.clean, result.clean)
    assert len(result.to_frame()) == 6
    assert result.top(1)[0][0] == {"edit": repr(same)}
    assert result.provenance["method"] == "sweep"


def test_axes_arrange_the_edits_as_a_grid(tmp_path: Any) -> None:
    model, inputs = wrapped("vit", batch=2)
    layers, heads = range(model.vision.cfg.n_layers), range(model.vision.cfg.n_heads)
    listed = [edits.ablate(f"vision.blocks.{layer}.attn.hook_z", heads=head) for layer in layers for head in heads]
    grid = model.sweep(inputs, listed, metric, axes={"layer": layers, "head": heads}, progress=False)
    flat = model.sweep(inputs, listed, metric, progress=False)
    assert grid.axes == {"layer": list(layers), "head": list(heads), "example": [0, 1]}
    assert torch.equal(grid.values.flatten(0, 1), flat.values)
    assert grid.labels == flat.axes["edit"] == flat.labels == list(map(repr, flat.edits))
    cells = [{"layer": layer, "head": head} for layer in layers for head in heads]
    assert [(cells.index(c), v) for c, v in grid.top(3)] == [(flat.labels.index(c["edit"]), v) for c, v in flat.top(3)]
    frame = grid.to_frame()
    assert list(frame.columns) == ["layer", "head", "example", "value", "clean", "effect"]
    assert abs(frame["effect"].to_numpy() - grid.effect.flatten().numpy()).max() < 1e-5
    again = cv.SweepResult.load(grid.save(tmp_path / "grid.safetensors"))
    assert again.done.shape == (len(layers), len(heads))
    with pytest.raises(InputError, match="axes describe"):
        model.sweep(inputs, listed[1:], metric, axes={"layer": layers, "head": heads}, progress=False)


@pytest.mark.parametrize(
    ("listed", "options", "words"),
    [
        ([], {}, "no edit"),
        (edits.ablate("vision.hook_input"), {}, "list of edits"),
        ([edits.ablate("vision.hook_input")], {"batch_size": 0}, "batch_size"),
        ([edits.ablate("vision.hook_input")], {"batch_size": "large"}, "batch_size"),
        ([edits.ablate("vision.blocks.0.attn.hook_z", heads=99)], {}, "head 99"),
        ([edits.ablate("vision.hook_input", positions=99)], {}, "position 99"),
    ],
)
def test_mistakes_are_named_before_anything_runs(listed: Any, options: dict[str, Any], words: str) -> None:
    model, inputs = wrapped("vit")
    with counted(model) as seen, pytest.raises(InputError, match=words):
        model.sweep(inputs, listed, metric, progress=False, **options)
    assert seen == {}


def test_dead_sites_warn_and_change_nothing() -> None:
    model, inputs = wrapped("llava-clip-llama")
    dead = next(name for name in model.sites("vision.blocks.*.hook_mlp_out") if model.is_dead(name))
    with pytest.warns(UserWarning, match="cannot reach the output"):
        result = model.sweep(inputs, [edits.ablate(dead)], metric, progress=False)
    torch.testing.assert_close(result.values[0], result.clean)


def test_half_precision() -> None:
    model = cv.HookedModel(case("llava-clip-llama").build().to(torch.bfloat16))
    inputs = case("llava-clip-llama").inputs(model.module, batch=2, dtype=torch.bfloat16)
    listed = [edits.steer("language.blocks.0.hook_resid_post", noise(model, "language"), positions=p) for p in (-2, -1)]
    read = cv.metrics.logit_diff(3, 4)
    result = model.sweep(inputs, listed, read, progress=False)
    naive = torch.stack([read(model.run(inputs, [edit])) for edit in listed])
    torch.testing.assert_close(result.values, naive, rtol=0.05, atol=0.05)


@pytest.mark.cuda
def test_sweeps_on_a_gpu() -> None:
    model = cv.HookedModel(case("llava-clip-llama").build().cuda())
    inputs = {
        k: v.cuda() if isinstance(v, Tensor) else v for k, v in case("llava-clip-llama").inputs(model.module).items()
    }
    listed = [edits.steer("language.blocks.0.hook_resid_post", noise(model, "language"), positions=p) for p in (-3, -1)]
    result = model.sweep(inputs, listed, metric, progress=False)
    naive = torch.stack([metric(model.run(inputs, [edit])).cpu() for edit in listed])
    torch.testing.assert_close(result.values, naive, rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_a_run_under_edits() -> None:
    model, inputs = wrapped("vit")
    direction = torch.zeros(model.vision.cfg.d_model, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric(model.run(inputs, [edits.steer("vision.blocks.1.hook_resid_post", direction)])).sum().backward()
    assert direction.grad is not None
    assert float(direction.grad.abs().max()) > 0
    model.module.zero_grad(set_to_none=True)
