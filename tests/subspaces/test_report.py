"""The illusion report on models: interventions are the edits they say, controls and units those of the component; words follow numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.metrics import logit_diff
from circuitvision.plots.subspaces import write_page
from circuitvision.subspaces import (
    DAS,
    IllusionReport,
    SitePairs,
    SubspaceSweep,
    illusion_report,
    random_basis,
    subspace_sweep,
)
from circuitvision.subspaces import illusion as il
from circuitvision.subspaces.behind import UnitsBehind, readers_of
from circuitvision.subspaces.report import AFTER, CLEAN, REDRAWN, SHUFFLED, SOURCE
from tests.subspaces.common import DOUBLE, acting, pairs_of

MLP, STREAM = "vision.blocks.0.mlp.hook_post", "vision.blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def tiny() -> Any:
    return pairs_of("vit", count=8, answers=[0] * 8, foils=[1] * 8)


def report_of(model: Any, pairs: Any, site: str, **options: Any) -> IllusionReport:
    with SitePairs(model, pairs[:1], site, allow_wrong=True, metric=options.get("metric")) as data:
        width = data.width
    settings = {"n_random": 2, "epochs": 1, "allow_wrong": True, "progress": False, **options}
    return illusion_report(model, pairs, site, random_basis(width, 2, seed=3), **settings)


def oriented(model: Any) -> list[int]:
    """Classes such that the source runs of the tiny pairs move towards the second."""
    _, pairs = pairs_of("vit", count=8, answers=[0] * 8, foils=[1] * 8)
    clean, corrupt = (
        [side(batch) for batch in pairs.batches(model)] for side in (lambda b: b.inputs, lambda b: b.other)
    )
    with torch.no_grad():
        moved = sum((model(one) - model(other)).sum(0) for one, other in zip(clean, corrupt, strict=True))
    return [int(moved.argmax()), int(moved.argmin())]


@pytest.fixture(scope="module")
def tiny_report() -> tuple[Any, Any, IllusionReport]:
    model, _ = pairs_of("vit", count=8, answers=[0] * 8, foils=[1] * 8)
    answer, foil = oriented(model)
    _, pairs = pairs_of("vit", count=8, answers=[answer] * 8, foils=[foil] * 8)
    return model, pairs, report_of(model, pairs, MLP, positions=0)


# -- interventions -----------------------------------------------------------------------------------------------------------------------------


def test_every_intervention_is_the_edit_that_it_says(tiny_report: Any) -> None:
    model, pairs, found = tiny_report
    test = pairs.at(found.examples)
    batch = next(test.batches(model))
    moved = model.run_with_cache(batch.other, names_filter=MLP)[1][MLP].detach()
    matrix, _ = readers_of(model, MLP, None)
    assert matrix is not None
    space = torch.linalg.svd(matrix, full_matrices=False)
    rows = space[0][:, space[1] > 1e-6 * space[1][0]]
    row = rows @ rows.T @ found.basis
    metric = logit_diff(*(int(one[0]) for one in (test.answers, test.foils)))
    wanted = {
        CLEAN: [], il.FULL: [edits.replace(MLP, moved, positions=0)], il.SUBSPACE: [edits.project(MLP, found.basis, moved, positions=0)],
        il.ROW: [edits.project(MLP, row, moved, positions=0)], il.NULL: [edits.project(MLP, found.basis - row, moved, positions=0)],
    }  # fmt: skip
    with torch.no_grad():
        for name, group in wanted.items():
            run = metric(model.run(batch.inputs, group), batch.inputs)
            torch.testing.assert_close(found.values[found.index_of("intervention", name)], run.double(), msg=name)
    torch.testing.assert_close(found.values[found.index_of("intervention", il.NULL)], found.values[0])


def test_effects_are_shares_of_what_the_source_run_does(tiny_report: Any) -> None:
    _, _, found = tiny_report
    assert found.of(CLEAN) == 0.0
    assert found.of(SOURCE) == pytest.approx(1.0)
    assert float(found.fldd[0]) == 0.0
    assert found.of(AFTER) == pytest.approx(found.of(AFTER))
    assert not set(found.train) & set(found.examples)
    assert found.flags["F6"] is not None
    assert {SHUFFLED, REDRAWN} <= set(found.axes["intervention"])


def test_readers_of_a_branch_are_what_it_adds_to_the_stream() -> None:
    for name, site, heads in (
        ("vit", MLP, None), ("vit", "vision.blocks.1.attn.hook_z", [1]), ("dinov2-swiglu", "vision.blocks.0.attn.hook_z", [0]),
        ("llava-clip-llama", "language.blocks.0.mlp.hook_post", None),
    ):  # fmt: skip
        model, _ = pairs_of(name, answers=[0] * 4, foils=[1] * 4)
        tower, leaf = site.split(".", 1)
        matrix, _ = readers_of(model, site, heads)
        assert matrix is not None
        shape = (2, 3, matrix.shape[0]) if heads is None else (2, 3, model.towers[tower].cfg.n_heads, matrix.shape[0])
        value, change = torch.randn(shape, dtype=DOUBLE), torch.zeros(shape, dtype=DOUBLE)
        step = torch.randn(matrix.shape[0], dtype=DOUBLE)
        if heads is None:
            change[:] = step
        else:
            change[:, :, heads[0]] = step
        written = model.towers[tower].written
        torch.testing.assert_close(
            written(leaf, value + change) - written(leaf, value), (step @ matrix).expand(2, 3, -1)
        )


def test_the_stream_has_no_kernel_and_chosen_heads_have_one() -> None:
    model, _ = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)
    assert readers_of(model, STREAM, None) == (None, "everything behind")
    matrix, called = readers_of(model, STREAM, None, ["vision L1H0", "vision L1H1"])
    assert matrix is not None
    assert matrix.shape == (model.vision.cfg.d_model, 2 * model.vision.cfg.d_head)
    assert "2 heads" in called
    # Readers behind a LayerNorm do not see a constant.
    torch.testing.assert_close(
        torch.ones(len(matrix), dtype=DOUBLE) / model.vision.blocks[1].attn.norm.weight @ matrix * 0, matrix[0] * 0
    )
    with pytest.raises(InputError):
        readers_of(model, STREAM, None, torch.zeros(3))


UNITS = ("mlp.hook_post", "attn.hook_pattern", "attn.hook_z")


def test_units_held_where_they_are_change_nothing_and_held_at_zero_are_ablated() -> None:
    model, pairs = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)
    with SitePairs(model, pairs, "vision.blocks.0.hook_mlp_out", positions=0, allow_wrong=True, batch_size=3) as data:
        units = UnitsBehind(data)
        assert {site.split(".", 3)[3] for site in units.sites} == set(UNITS)
        assert all(int(site.split(".")[2]) > 0 for site in units.sites)
        values = units.read(data.source)
        free = data.with_values([data.source])[0].difference
        wide = torch.full((values.shape[1],), 1e9, dtype=DOUBLE)
        # Eager attention takes its softmax in float32.
        torch.testing.assert_close(units.clamped(data.source, -wide, wide), free, rtol=1e-5, atol=1e-6)
        zero = torch.zeros(values.shape[1], dtype=DOUBLE)
        wanted = []
        for batch in pairs.batches(model, 3):
            moved = model.run_with_cache(batch.other, names_filter=data.site)[1][data.site].detach()
            # Attention rows of zeros change nothing more where every z there is 0.
            held = [edits.ablate(site, "zero", positions=0) for site in units.sites if "pattern" not in site]
            out = model.run(batch.inputs, [edits.replace(data.site, moved, positions=0), *held])
            wanted.append(logit_diff(0, 1)(out, batch.inputs).detach())
        torch.testing.assert_close(units.clamped(data.source, zero, zero), torch.cat(wanted), rtol=1e-5, atol=1e-6)


def test_units_are_neurons_attention_entries_and_norms_of_heads_of_natural_runs() -> None:
    model, pairs = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)
    with SitePairs(model, pairs, "vision.blocks.0.hook_mlp_out", positions=0, allow_wrong=True, batch_size=3) as data:
        units = UnitsBehind(data)
        wanted = []
        for part in data.parts:
            for inputs in (part.inputs, part.batch.other):
                cache = model.run_with_cache(inputs, names_filter=units.sites)[1]
                found = []
                for site in units.sites:
                    value = cache[site].detach()
                    if site.endswith("pattern"):
                        found.append(value[:, :, 0].flatten(1))
                    else:
                        found.append(value[:, 0] if site.endswith("post") else value[:, 0].norm(dim=-1))
                wanted.append(torch.cat(found, 1))
        natural = units.natural()
        torch.testing.assert_close(natural, torch.cat(wanted))
        base = [rows for number, rows in enumerate(wanted) if number % 2 == 0]
        # Eager attention takes its softmax in float32.
        torch.testing.assert_close(units.read(data.base), torch.cat(base), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "size"), [("attention", 0.05), ("norms", 0.2), ("neurons", 0.1)])
def test_one_kind_of_unit_is_held_as_plain_pytorch_would(kind: str, size: float) -> None:
    """The oracle: the first layer behind the site, its unit's value written into the run by hand."""
    model, pairs = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)
    with SitePairs(model, pairs, "vision.blocks.0.hook_mlp_out", positions=0, allow_wrong=True) as data:
        units = UnitsBehind(data)
        units.units = [one for one in units.units if one.kind == kind][:1]
        site = units.sites[0]
        free = units.read(data.source)
        low, high = torch.zeros(free.shape[1], dtype=DOUBLE), torch.full((free.shape[1],), size, dtype=DOUBLE)
        assert bool((free > high).any())
        (part,) = data.parts

        def write(value: torch.Tensor, hook: Any) -> torch.Tensor:
            value = value.clone()
            if kind == "attention":
                value[:, :, 0] = value[:, :, 0].clamp(0, size)
            elif kind == "norms":
                length = value[:, 0].norm(dim=-1, keepdim=True)
                value[:, 0] = value[:, 0] / length * length.clamp(0, size)
            else:
                value[:, 0] = value[:, 0].clamp(0, size)
            return value

        out = model.run_with_hooks(
            part.inputs,
            fwd_hooks=[(data.site, lambda value, hook: part.moved.where(place(value), value)), (site, write)],
        )
        wanted = logit_diff(0, 1)(out, part.inputs).detach()
        torch.testing.assert_close(units.clamped(data.source, low, high), wanted)


def place(value: torch.Tensor) -> torch.Tensor:
    """Where the first position is."""
    found = torch.zeros(value.shape[:2], dtype=torch.bool)
    found[:, 0] = True
    return found[..., None]


def test_attention_entries_are_left_out_where_positions_differ_from_run_to_run() -> None:
    model, _ = pairs_of("llava-clip-llama", answers=[0] * 4, foils=[1] * 4)
    from tests.sweeps.drawing import inputs_of

    clean, corrupt = (inputs_of("llava-clip-llama", DOUBLE, 3, "left", 1, seed) for seed in (0, 1))
    pairs = cv.data.Pairs(inputs=clean, corrupt_inputs=corrupt, answers=0, foils=1)
    with SitePairs(model, pairs, "language.blocks.0.hook_mlp_out", positions="last", allow_wrong=True) as data:
        units = UnitsBehind(data)
        kinds = {one.kind for one in units.units}
        assert kinds == {"neurons", "norms"}
        assert len(units.natural()) == 2 * len(pairs)


@pytest.mark.parametrize(
    ("name", "site", "positions", "heads"),
    [
        ("dinov2-swiglu", "vision.blocks.0.attn.hook_z", 0, [1]),
        ("clip", "vision.blocks.0.mlp.hook_post", 0, None),
        ("llava-clip-llama", "language.blocks.0.mlp.hook_post", "last", None),
        ("paligemma", "language.blocks.1.hook_resid_pre", "last", None),
    ],
)
def test_every_family_is_reported_on(name: str, site: str, positions: Any, heads: Any) -> None:
    model, _ = pairs_of(name, answers=[0] * 4, foils=[1] * 4)

    def metric(logits: torch.Tensor, inputs: Any) -> torch.Tensor:
        return cv.metrics.at_position(logits, "last", inputs)[:, 0]

    _, pairs = pairs_of(name, answers=[0] * 4, foils=[1] * 4)
    found = report_of(model, pairs, site, positions=positions, heads=heads, metric=metric)
    assert torch.isfinite(found.effect).all()
    assert found.of(SOURCE) == pytest.approx(1.0)
    assert (model.engine.handles, model.engine.stack) == ([], [])


def test_a_policy_is_reported_on_by_its_metric() -> None:
    model, pairs = acting(count=6)
    found = report_of(model, pairs, "action.blocks.0.hook_resid_post", metric=cv.metrics.action_dim(0))
    assert found.of(SOURCE) == pytest.approx(1.0)
    assert math.isnan(found.numbers["row norm"]) or found.numbers["row norm"] == 1.0
    rows = [found.index_of("intervention", name) for name in (CLEAN, SOURCE)]
    edges = torch.quantile(found.values[rows].flatten(), torch.linspace(0, 1, 5, dtype=DOUBLE))
    assert found.numbers["target bin width"] == pytest.approx(float(edges.diff().max()))


# -- what cannot be meant ----------------------------------------------------------------------------------------------------------------------


def test_requests_that_cannot_be_meant(tiny: Any) -> None:
    model, pairs = tiny
    width = model.vision.cfg.d_mlp
    for direction, match in (
        (torch.ones(width, 2), "independent"),
        (torch.ones(3), "coordinates"),
        (torch.zeros(width), "independent"),
    ):
        with pytest.raises(InputError, match=match):
            illusion_report(model, pairs, MLP, direction, positions=0, allow_wrong=True, progress=False)
    with pytest.raises(InputError, match="wrong"):
        illusion_report(model, pairs, MLP, torch.ones(width), positions=0, progress=False)
    assert (model.engine.handles, model.engine.stack) == ([], [])


# -- a trained model ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes() -> Any:
    model = cv.organisms.load("shapes-vit")
    with cv.progress.verbosity("quiet"):
        return model, cv.organisms.pairs("shapes-vit", 80, seed=3).answered(model)


@pytest.fixture(scope="module")
def faithful(shapes: Any) -> IllusionReport:
    model, pairs = shapes
    site = "vision.blocks.2.hook_resid_pre"
    trained = DAS(4, site, positions=0).fit(model, pairs, epochs=6, rate=0.1, held_out=0.5, progress=False)
    return illusion_report(model, pairs, site, trained, positions=0, n_random=3, epochs=6, rate=0.1, progress=False)


def test_a_subspace_of_the_stream_of_a_trained_model_is_faithful(faithful: IllusionReport) -> None:
    assert faithful.label == il.FAITHFUL
    assert faithful.of(il.SUBSPACE, "accuracy") > 0.7
    assert "mediated here" in faithful.sentence
    assert faithful.flags["F1"] is False
    assert faithful.numbers["rho"] < 0.5


def test_a_random_direction_finds_nothing(shapes: Any) -> None:
    model, pairs = shapes
    found = illusion_report(
        model,
        pairs,
        "vision.blocks.2.hook_resid_pre",
        random_basis(64),
        positions=0,
        n_random=2,
        controls=False,
        units=False,
        progress=False,
    )
    assert found.label == il.NOTHING
    assert {"F6", "F9"} <= {name for name, value in found.flags.items() if value is None}


def test_what_a_subspace_was_trained_on_is_not_what_it_is_judged_on(faithful: IllusionReport, shapes: Any) -> None:
    assert not set(faithful.train) & set(faithful.examples)
    assert len(faithful.train) + len(faithful.examples) == len(shapes[1])


def test_table_figure_page_and_file(faithful: IllusionReport, tmp_path: Path) -> None:
    table = faithful.table()
    assert set(table["intervention"]) >= {"clean", "subspace", "full component", "random", "matched random", "gradient"}
    assert len(faithful.to_frame()) == faithful.values.numel()
    assert {"accuracy", "two_way", "effect"} <= set(faithful.to_frame().columns)
    figure = faithful.plot()
    shown = dict(zip(figure.data[0].y, figure.data[0].x, strict=True))
    assert shown["subspace"] == pytest.approx(faithful.of(il.SUBSPACE))
    text = write_page(faithful, tmp_path / "page.html").read_text()
    assert faithful.sentence in text
    assert all(name in text for name in il.FLAGS)
    assert "http://" not in text.split("</script>")[-1]
    faithful.save(tmp_path / "report.npz")
    again = cv.load(tmp_path / "report.npz")
    assert again.flags == faithful.flags
    assert again.numbers.keys() == faithful.numbers.keys()


def test_a_sweep_shows_where_a_part_does_more_than_the_whole(shapes: Any) -> None:
    model, pairs = shapes
    found = subspace_sweep(
        model,
        pairs[:40],
        ["vision.blocks.1.hook_resid_pre", "vision.blocks.*.hook_mlp_out"],
        [1, 2],
        positions=0,
        epochs=1,
        progress=False,
    )
    assert found.axes["layer"] == [0, 1, 2]
    assert found.axes["component"] == ["hook_resid_pre", "hook_mlp_out"]
    assert found.values.isnan().all(-1)[0, 0].all()
    assert not found.values.isnan()[1].any()
    gaps = found.exceeds()
    assert all(gap > 0 for _, gap in gaps)
    assert found.plot().layout.title.text


def swept(gap: float) -> SubspaceSweep:
    values = torch.zeros(2, 1, 1, 2, 5, dtype=DOUBLE)
    values[1, ..., 0, :] = gap
    axes = {
        "layer": [0, 1],
        "component": ["mlp.hook_post"],
        "k": [1],
        "intervention": ["subspace", "full"],
        "example": list(range(5)),
    }
    return SubspaceSweep(values, axes, tower="vision")


def test_the_title_of_a_sweep_names_a_site_only_where_it_exceeds_the_whole() -> None:
    assert "layer 1" in swept(0.6).plot().layout.title.text
    assert "No subspace" in swept(0.1).plot().layout.title.text
    assert swept(0.6).exceeds() == [({"layer": 1, "component": "mlp.hook_post", "k": 1}, pytest.approx(0.6))]


@pytest.mark.slow
def test_a_middle_mlp_of_a_trained_model_is_not_taken_for_the_stream(faithful: IllusionReport, shapes: Any) -> None:
    """The search: MLPs of all layers. A subspace does more than the whole in the middle one, but by less than F1 asks, and is no mediator."""
    model, pairs = shapes
    search = subspace_sweep(
        model,
        pairs,
        "vision.blocks.*.mlp.hook_post",
        4,
        positions=0,
        held_out=0.5,
        epochs=10,
        rate=0.05,
        progress=False,
    )
    places = search.exceeds()
    assert places
    assert all(gap < 0.2 for _, gap in places)
    site = "vision.blocks.1.mlp.hook_post"
    trained = DAS(4, site, positions=0).fit(model, pairs, epochs=10, rate=0.05, held_out=0.5, progress=False)
    found = illusion_report(model, pairs, site, trained, positions=0, n_random=3, epochs=6, rate=0.1, progress=False)
    assert found.label not in (il.FAITHFUL, il.ILLUSION)
    assert found.flags["F1"] is False
    assert found.of(il.FULL) < 0.5 < faithful.of(il.FULL)
