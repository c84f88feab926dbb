"""A prepared run equals the whole one, in values and in gradients, computes only what is behind its start, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError, UnknownSiteError
from circuitvision.incremental import resume, resumed_run
from circuitvision.incremental.replay import BaseRun
from circuitvision.model.edits.applying import EditApplier
from tests.parts import module_of
from tests.sweeps.drawing import inputs_of, metric, model_of, sweeps
from tests.sweeps.test_engine import counted
from tests.zoo import case

DOUBLE = torch.float64
FAMILIES = ("vit", "dinov2", "clip", "siglip", "llava-clip-llama", "paligemma", "pi0")
KINDS = ("hook_resid_mid", "attn.hook_z", "mlp.hook_post", "hook_resid_post", "hook_resid_pre")


def noise(width: int, seed: int = 0) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.fixture
def llava() -> Any:
    """A LLaVA of its own, whose parameters a test may freeze or change, and its inputs."""
    model = cv.HookedModel(case("llava-clip-llama").build().to(DOUBLE))
    return model, case("llava-clip-llama").inputs(model.module, batch=2, dtype=DOUBLE)


def steered(model: cv.HookedModel, site: str, positions: Any = None, seed: int = 0) -> edits.Edit:
    return edits.steer(site, noise(model.towers[site.partition(".")[0]].cfg.d_model, seed), positions=positions)


# -- values ------------------------------------------------------------------------------------------------------------------------------------


@given(sweeps(DOUBLE))
@settings(
    deadline=None,
    derandomize=True,
    print_blob=False,
    max_examples=80,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_a_prepared_run_equals_the_whole_one(drawn: Any) -> None:
    model, inputs, groups = drawn
    mask = inputs.get("attention_mask", inputs.get("pixel_attention_mask"))

    def close(found: Tensor, wanted: Tensor) -> None:
        assert found.shape == wanted.shape
        gap = found - wanted
        if mask is not None and gap.ndim == 3 and mask.shape == gap.shape[:2]:
            gap, wanted = gap[mask.bool()], wanted[mask.bool()]
        assert torch.equal(gap.isnan(), wanted.isnan()), run.plan
        assert float((gap.abs() / wanted.abs().clamp_min(1.0)).nan_to_num(0.0).max()) < 1e-12, run.plan

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        naive = [model.run(inputs, group) for group in groups]
        sites = sorted({site for group in groups for edit in group for site in edit.sites(model)})
        with model.prepared(inputs, sites) as run:
            together = run([list(group) for group in groups])
            assert "in full" not in run.plan or "changes the inputs" in run.plan
            for number, group in enumerate(groups):
                alone = run(list(group))
                close(alone, naive[number])
                close(together[number], naive[number])
                if "positions" not in run.plan:
                    assert torch.equal(alone.nan_to_num(0.0), naive[number].nan_to_num(0.0)), "other bits"
    assert (model.engine.handles, model.engine.stack) == ([], [])


# -- gradients ---------------------------------------------------------------------------------------------------------------------------------


def gradient_gap(name: str, frozen: bool = True) -> float:
    """The largest difference between gradients of the whole run and of the prepared one, at places of every tower."""
    model, inputs = model_of(name, DOUBLE), inputs_of(name, DOUBLE, 2, None, 1)
    weights = list(model.module.parameters())
    gaps = []
    try:
        model.module.requires_grad_(not frozen)
        for tower in model.tokens(inputs):
            for kind in KINDS:
                site = f"{tower}.blocks.1.{kind}"
                if not model.is_dead(site, inputs):
                    gaps.append(_gap_at(model, inputs, site, weights))
    finally:
        model.module.requires_grad_(True)
    return max(gaps)


def _gap_at(model: cv.HookedModel, inputs: Any, site: str, weights: list[Any]) -> float:
    cfg = model.towers[site.partition(".")[0]].cfg
    width = {"hook_z": cfg.d_head, "hook_post": cfg.d_mlp}.get(site.rpartition(".")[2], cfg.d_model)
    vector, factor = noise(width).requires_grad_(), torch.tensor(1.3, dtype=DOUBLE, requires_grad=True)
    groups = [[edits.steer(site, vector, factor, positions=[-2, -1])], [edits.scale(site, factor)], []]
    count = len(model.towers[site.partition(".")[0]].blocks)
    behind = model.towers[site.partition(".")[0]].blocks[1 if kindless(site) else 2 : count]
    asked = [vector, factor, *(p for block in behind for p in block.module.parameters() if p.requires_grad)]

    def gradients(outputs: Any) -> list[Tensor]:
        loss = sum((number + 1) * metric(output, inputs).sum() for number, output in enumerate(outputs))
        found = torch.autograd.grad(loss, asked, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(asked, found, strict=True)]

    wanted = gradients([model.run(inputs, group) for group in groups])
    with model.prepared(inputs, site) as run:
        found = [gradients([run(group) for group in groups]), gradients(run(groups))]
        assert "in full" not in run.plan
    pairs = [(one, two) for gotten in found for one, two in zip(gotten, wanted, strict=True)]
    return max(float((one - two).abs().max() / two.abs().max().clamp_min(1.0)) for one, two in pairs)


def kindless(site: str) -> bool:
    """Whether all of the block behind a site runs again."""
    return site.endswith("hook_resid_pre")


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_the_whole_run(name: str) -> None:
    assert gradient_gap(name) < 1e-10


def test_parameters_behind_the_start_get_theirs_and_those_before_get_none(llava: Any) -> None:
    assert gradient_gap("llava-clip-llama", frozen=False) < 1e-10
    model, inputs = llava
    edit = steered(model, "language.blocks.1.hook_resid_pre", positions=-1)
    with model.prepared(inputs, ("language", 1)) as run:
        metric(run([edit]), inputs).sum().backward()
        # Earlier positions give parameters a share of their gradient, so all are computed.
        assert "positions" not in run.plan
    without = {name for name, p in model.module.named_parameters() if p.grad is None}
    assert {name for name in without if "vision_tower" in name or "projector" in name or "layers.0." in name}
    assert not {name for name in without if "language_model.layers.1." in name or "lm_head" in name}
    assert all(p.grad is None for block in model.language.blocks[:1] for p in block.module.parameters())
    assert all(p.grad is None for p in model.vision.root.parameters())


def test_frozen_weights_let_a_suffix_of_positions_be_trained(llava: Any) -> None:
    model, inputs = llava
    model.module.requires_grad_(False)
    edit, length = steered(model, "language.blocks.0.hook_resid_post", positions=[-2]), inputs["input_ids"].shape[1]
    with model.prepared(inputs, "language.blocks.0.hook_resid_post") as run:
        assert run([edit]).shape == model(inputs).shape
        assert f"positions {length - 2}" in run.plan


def test_edits_alone_are_trained_on_a_suffix_although_weights_require_gradients(llava: Any) -> None:
    model, inputs = llava
    site, length = "language.blocks.0.hook_resid_post", inputs["input_ids"].shape[1]
    vector = noise(model.language.cfg.d_model).requires_grad_()
    edit = edits.steer(site, vector, positions=[-2])
    (wanted,) = torch.autograd.grad(metric(model.run(inputs, [edit]), inputs).sum(), [vector])
    with model.prepared(inputs, site) as run:
        run.follows_weights = False
        (found,) = torch.autograd.grad(metric(run([edit]), inputs).sum(), [vector])
        assert f"positions {length - 2}" in run.plan
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-8)


def graph_leaves(output: Tensor) -> set[int]:
    """Ids of the tensors that a backward pass from an output would give gradients to."""
    seen: set[Any] = set()
    waiting, leaves = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting += [child for child, _ in node.next_functions]
    return leaves


def has_graph_below(name: str = "llava-clip-llama") -> bool:
    """Whether the graph of a prepared run reaches a parameter before its start."""
    model, inputs = model_of(name, DOUBLE), inputs_of(name, DOUBLE, 2, None, 1)
    before = [*model.vision.root.parameters(), *model.language.blocks[0].module.parameters()]
    with model.prepared(inputs, ("language", 1)) as run:
        leaves = graph_leaves(run([steered(model, "language.blocks.1.hook_resid_mid")]))
    return bool(leaves & set(map(id, before)))


def test_what_lies_before_the_start_has_no_graph() -> None:
    assert not has_graph_below()


# -- mutants -----------------------------------------------------------------------------------------------------------------------------------


def doubled(self: Any, overrides: Any, module: Any, last: Any, first: int, block: Any) -> None:
    """Give what a replayed module hands back twice its gradient, and its own value."""
    ORIGINAL(self, overrides, module, last, first, block)
    inner = module.__dict__["forward"]

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        twice = [value + (value - value.detach()) if isinstance(value, Tensor) else value for value in out]
        return tuple(twice) if isinstance(out, tuple) else out + (out - out.detach())

    module.__dict__["forward"] = forward


def exchanged(self: EditApplier, value: Tensor, hook: Any) -> Any:
    """Give every group the rows of another."""
    self.groups.reverse()
    out = WRITE(self, value, hook)
    self.groups.reverse()
    return out


ORIGINAL, WRITE = resumed_run.ResumedRun._replay, EditApplier._hook


def test_a_recorded_value_with_a_graph_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume.Resumer, "_recording", staticmethod(torch.enable_grad))
    assert has_graph_below()


@pytest.mark.parametrize("mutant", [("_replay", doubled), ("_hook", exchanged)])
def test_wrong_gradients_are_noticed(mutant: tuple[str, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    name, function = mutant
    monkeypatch.setattr(EditApplier if name == "_hook" else resumed_run.ResumedRun, name, function)
    assert gradient_gap("vit") > 1e-3


# -- where it starts ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "first"),
    [
        ("language.blocks.1.hook_resid_mid", "language block 1 (attn)"),
        (("language", 1), "language block 0 (its end)"),
        (-1, "language block 0 (its end)"),
        ("language.L1H0", "language block 1 (after attention's pattern)"),
        (["vision.blocks.0.hook_resid_post", ("language", 1)], "language block 0 (its end)"),
    ],
)
def test_a_start_is_a_site_a_component_a_layer_or_several(start: Any, first: str) -> None:
    model, inputs = model_of("llava-clip-llama", DOUBLE), inputs_of("llava-clip-llama", DOUBLE, 2, None, 1)
    with torch.no_grad(), model.prepared(inputs, start) as run:
        run([steered(model, "language.blocks.1.hook_resid_post")])
        assert run.plan.startswith(f"from {first}")


@pytest.mark.parametrize(
    ("start", "error"),
    [
        ("language.blocks.9.hook_resid_mid", UnknownSiteError),
        (("language", 9), InputError),
        (("words", 0), InputError),
        ([], InputError),
        (2.5, InputError),
    ],
)
def test_a_start_that_is_not_there_is_an_error(start: Any, error: type[Exception]) -> None:
    model, inputs = model_of("llava-clip-llama", DOUBLE), inputs_of("llava-clip-llama", DOUBLE, 2, None, 1)
    with pytest.raises(error), model.prepared(inputs, start):
        pass


@pytest.mark.parametrize(
    ("name", "start", "site"),
    [
        ("llava-clip-llama", "language.blocks.1.hook_resid_mid", "language.blocks.1.attn.hook_z"),
        ("llava-clip-llama", ("language", 1), "vision.blocks.0.hook_resid_post"),
        ("clip", "vision.blocks.0.hook_resid_post", "text.blocks.1.hook_resid_post"),
        ("pi0", "action.blocks.0.hook_resid_post", "language.blocks.1.hook_resid_pre"),
    ],
)
def test_edits_before_the_start_are_refused_by_name(name: str, start: Any, site: str) -> None:
    model, inputs = model_of(name, DOUBLE), inputs_of(name, DOUBLE, 2, None, 1)
    edit = edits.scale(site, 2.0)
    with model.prepared(inputs, start) as run, torch.no_grad():
        with pytest.raises(InputError) as caught:
            run([edit])
        assert site in str(caught.value)
        assert repr(edit) in str(caught.value)
    with model.prepared(inputs, [start, site]) as run, torch.no_grad():
        torch.testing.assert_close(run([edit]), model.run(inputs, [edit]), rtol=0, atol=0)


def test_values_from_before_the_start_and_means_are_those_of_the_whole_run() -> None:
    model, inputs = model_of("vit", DOUBLE), inputs_of("vit", DOUBLE, 3, None, 1)
    frozen = edits.freeze("vision.blocks.1.hook_resid_post", "vision.blocks.0.hook_resid_mid", positions=[0, 2])
    mean = edits.ablate("vision.blocks.1.attn.hook_z", "mean", heads=0)
    groups = [[frozen], [mean], [frozen, edits.block_attention("vision", 0, 1, layers=1)]]
    with torch.no_grad(), model.prepared(inputs, ("vision", 1)) as run:
        found = run(groups)
        for number, group in enumerate(groups):
            torch.testing.assert_close(found[number], model.run(inputs, group), rtol=0, atol=1e-12)


# -- what it costs, and what it leaves ---------------------------------------------------------------------------------------------------------


def test_only_what_is_behind_the_start_is_computed() -> None:
    model, inputs = model_of("llava-clip-llama", DOUBLE), inputs_of("llava-clip-llama", DOUBLE, 2, None, 1)
    edit = steered(model, "language.blocks.1.hook_resid_pre")
    with counted(model) as seen, model.prepared(inputs, ("language", 1)) as run:
        run([edit])
        run([[edit], [edit], []])
    rows, length = inputs["input_ids"].shape
    assert [len(calls) for key, calls in seen.items() if key != "language.1"] == [1] * (len(seen) - 1)
    assert [shape[:2] for shape in seen["language.1"]] == [(rows, length), (rows, length), (3 * rows, length)]


def kept_by(run: Any) -> list[weakref.ref[Tensor]]:
    (resumer,) = run._resumers.values()
    clean: BaseRun = resumer.clean
    return [weakref.ref(t) for value in clean.results.values() for t in ([value] if isinstance(value, Tensor) else [])]


@pytest.mark.parametrize("broken", [False, True])
def test_everything_is_released_at_the_end_also_on_an_error(broken: bool) -> None:
    model, inputs = model_of("llava-clip-llama", DOUBLE), inputs_of("llava-clip-llama", DOUBLE, 2, None, 1)
    edit = steered(model, "language.blocks.1.hook_resid_post")

    def fail(value: Tensor, hook: Any) -> Tensor:
        raise KeyError("of the edit")

    model(inputs)
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.module.modules()]
    edit = edits.apply("language.blocks.1.hook_resid_post", fail) if broken else edit
    kept: list[weakref.ref[Tensor]] = []
    with torch.no_grad(), contextlib.suppress(KeyError), model.prepared(inputs, ("language", 1)) as run:
        kept = kept_by(run)
        run([edit])
        assert not broken
    gc.collect()
    assert kept
    assert not [ref for ref in kept if ref() is not None]
    after = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.module.modules()]
    assert before == after
    assert (model.engine.handles, model.engine.stack) == ([], [])
    with pytest.raises(InputError, match="over"):
        run([edit])
    with pytest.raises(InputError, match="over"):
        _ = run.output


def test_other_hooks_make_it_run_in_full_and_say_why() -> None:
    model, inputs = model_of("vit", DOUBLE), inputs_of("vit", DOUBLE, 2, None, 1)
    edit = edits.ablate("vision.blocks.1.attn.hook_z", heads=1)
    hooks = [("vision.blocks.0.hook_mlp_out", lambda value, hook: value * 2)]
    with torch.no_grad(), model.prepared(inputs, ("vision", 1)) as run:
        plain = run([edit])
        with model.hooks(hooks):
            torch.testing.assert_close(run([edit]), model.run(inputs, [edit]), rtol=0, atol=0)
            assert run.plan.startswith("in full: other hooks")
            torch.testing.assert_close(run([[edit], []])[1], model(inputs), rtol=0, atol=0)
        assert torch.equal(run([edit]), plain)
        assert run.plan.startswith("from")
    with torch.no_grad(), model.hooks(hooks), model.prepared(inputs, ("vision", 1)) as run:
        torch.testing.assert_close(run([edit]), model.run(inputs, [edit]), rtol=0, atol=0)
        assert torch.equal(run.output, model(inputs))
        assert not run._resumers


def test_what_was_recorded_must_stay_true(llava: Any) -> None:
    model, inputs = llava
    edit = steered(model, "language.blocks.1.hook_resid_post")
    start = ("language", 1)
    with model.prepared(inputs, start) as run, torch.no_grad():
        # Weights behind the start may be trained, which what earlier positions left does not know.
        late = steered(model, "language.blocks.1.hook_resid_post", positions=-1)
        run([late])
        assert "positions" in run.plan
        module_of(model.language.blocks[1], "mlp_in").weight.mul_(1.1)
        for one in (edit, late):
            torch.testing.assert_close(run([one]), model.run(inputs, [one]), rtol=0, atol=0)
            assert run.plan.startswith("from")
        # A torch hook that comes later makes it record anew.
        handle = module_of(model.language.blocks[0], "mlp_in").register_forward_hook(lambda m, a, out: out * 0.5)
        try:
            torch.testing.assert_close(run([edit]), model.run(inputs, [edit]), rtol=0, atol=0)
        finally:
            handle.remove()
        torch.testing.assert_close(run([edit]), model.run(inputs, [edit]), rtol=0, atol=0)
        module_of(model.language.blocks[0], "mlp_in").weight.mul_(1.1)
        with pytest.raises(InputError, match="Weights"):
            run([edit])
    with model.prepared(inputs, start) as run:
        inputs["pixel_values"].mul_(2.0)
        with pytest.raises(InputError, match="inputs"):
            run([edit])
    inputs["pixel_values"].requires_grad_()
    with model.prepared(inputs, start) as run, pytest.raises(InputError, match="pixel_values requires a gradient"):
        run([edit])


def test_forms_of_groups_and_the_unedited_output() -> None:
    model, inputs = model_of("clip", DOUBLE), inputs_of("clip", DOUBLE, 2, None, 1)
    edit = steered(model, "vision.blocks.1.hook_resid_post")
    with torch.no_grad(), model.prepared(inputs, ["vision.blocks.1.hook_resid_post", ("text", 1)]) as run:
        clean, one = model(inputs), model.run(inputs, [edit])
        assert torch.equal(run.output, clean)
        assert torch.equal(run([]), clean)
        assert torch.equal(run(edit), one)
        assert run([[edit]]).shape == (1, *clean.shape)
        both = [edit, steered(model, "text.blocks.1.hook_resid_mid")]
        many = run([[edit], [], both])
        for found, wanted in zip(many, (one, clean, model.run(inputs, both)), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        with pytest.raises(InputError, match="not both"):
            run([edit, [edit]])


def test_training_mode_with_dropout_is_refused(llava: Any) -> None:
    model, inputs = llava
    model.language.config.attention_dropout = 0.5
    for block in model.language.blocks:
        module_of(block, "attn").attention_dropout = 0.5
    model.train()
    with pytest.raises(InputError, match=r"model\.eval"), model.prepared(inputs, 0):
        pass
