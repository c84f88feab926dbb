"""Several heads, and several positions, as one entry: what is written, what reads it, and what cannot be put side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.metrics import logit_diff
from circuitvision.subspaces import DAS, SitePairs, illusion_report, orthonormal, random_basis
from circuitvision.subspaces import illusion as il
from circuitvision.subspaces.behind import readers_of
from tests.subspaces.common import DOUBLE, pairs_of
from tests.sweeps.drawing import inputs_of

PLACES = [
    ("vit", "vision.blocks.1.hook_resid_pre", [0, 2, 3], None),
    ("vit", "vision.blocks.0.attn.hook_z", 0, [0, 2]),
    ("dinov2-swiglu", "vision.blocks.0.attn.hook_z", [0, 1], None),
    ("clip", "vision.blocks.1.hook_resid_pre", [0, 1], None),
    ("llava-clip-llama", "language.blocks.1.attn.hook_v", "last", None),
    ("llava-clip-llama", "projector.hook_out", None, None),
    ("paligemma", "language.blocks.0.hook_resid_post", "text", None),
]


@pytest.mark.parametrize(("name", "site", "positions", "heads"), PLACES)
def test_the_interchange_is_that_of_entries_laid_side_by_side(name: str, site: str, positions: Any, heads: Any) -> None:
    """The oracle: a plain hook that lays the chosen entries out by hand, and interchanges inside the span."""
    model, pairs = pairs_of(name, answers=[0] * 4, foils=[1] * 4)
    where = {"positions": positions, "heads": heads, "joint": True, "allow_wrong": True}
    with SitePairs(model, pairs, site, batch_size=2, **where) as data:
        assert len(data.base) == len(pairs)
        basis = random_basis(data.width, 3, seed=2)
        found, whole = data.under(basis), data.under(torch.eye(data.width, dtype=DOUBLE))
        columns, wanted, all_of_it = orthonormal(basis), [], []
        for part in data.parts:
            mask = torch.zeros_like(part.values, dtype=torch.bool)
            mask[part.index] = True
            source = part.moved

            def write(value: torch.Tensor, hook: Any, mask: Any = mask, source: Any = source) -> torch.Tensor:
                value = value.clone()
                for row in range(len(value)):
                    own, other = value[row][mask[row]], source[row][mask[row]]
                    value[row][mask[row]] = own + columns @ (columns.T @ (other - own))
                return value

            out = model.run_with_hooks(part.inputs, fwd_hooks=[(site, write)])
            wanted.append(logit_diff(0, 1)(out, part.inputs).detach())
            full = edits.replace(site, source, positions=part.positions, heads=data.heads)
            all_of_it.append(logit_diff(0, 1)(model.run(part.inputs, [full]), part.inputs).detach())
    torch.testing.assert_close(found.difference, torch.cat(wanted).double())
    torch.testing.assert_close(whole.difference, torch.cat(all_of_it).double())


def test_a_basis_that_is_the_same_in_every_entry_is_the_one_they_share() -> None:
    model, pairs = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)
    site, one = "vision.blocks.1.hook_resid_pre", random_basis(model_width(model), 2, seed=1)
    with SitePairs(model, pairs, site, positions=[0, 3], allow_wrong=True) as shared:
        by_entry = shared.under(one)
    with SitePairs(model, pairs, site, positions=[0, 3], joint=True, allow_wrong=True) as side_by_side:
        together = side_by_side.under(torch.block_diag(one, one))
        torch.testing.assert_close(side_by_side.gradients().flatten(), shared.gradients().flatten())
    torch.testing.assert_close(together.difference, by_entry.difference)


def model_width(model: Any) -> int:
    return int(model.vision.cfg.d_model)


def test_a_direction_over_heads_can_do_what_none_of_them_can_alone() -> None:
    """Training over two heads is at least as good as sharing one basis among them: it contains every shared basis of half its size."""
    model, pairs = pairs_of("vit", count=8, answers=[0, 1] * 4, foils=[1, 0] * 4)
    options: dict[str, Any] = {"epochs": 40, "rate": 0.1, "held_out": 0.25, "allow_wrong": True, "progress": False}
    site = "vision.blocks.1.attn.hook_z"
    shared = DAS(1, site, positions=0, heads=[0, 1]).fit(model, pairs, **options)
    joint = DAS(2, site, positions=0, heads=[0, 1], joint=True).fit(model, pairs, **options)
    assert joint.joint
    assert joint.basis.shape == (2 * shared.basis.shape[0], 2)
    assert float(joint.loss[0, -1]) < float(shared.loss[0, -1]) + 1e-3


@pytest.mark.parametrize("name", ["vit", "dinov2-swiglu"])
def test_readers_of_several_heads_and_positions_are_what_all_of_them_add(name: str) -> None:
    model, _ = pairs_of(name, answers=[0] * 4, foils=[1] * 4)
    cfg, heads, places = model.vision.cfg, [0, 2], 2
    matrix, _ = readers_of(model, "vision.blocks.0.attn.hook_z", heads, joint=True, places=places)
    assert matrix is not None
    assert matrix.shape == (places * len(heads) * cfg.d_head, places * cfg.d_model)
    value = torch.randn(1, places, cfg.n_heads, cfg.d_head, dtype=DOUBLE)
    step = torch.randn(places, len(heads), cfg.d_head, dtype=DOUBLE)
    moved = value.clone()
    moved[0, :, heads] += step
    written = model.vision.written
    change = written("blocks.0.attn.hook_z", moved) - written("blocks.0.attn.hook_z", value)
    torch.testing.assert_close(step.flatten() @ matrix, change.flatten())
    # What one head adds another can take back: over heads the kernel is larger than that of each.
    rank = int(torch.linalg.matrix_rank(matrix))
    assert rank == places * min(len(heads) * cfg.d_head, cfg.d_model)


def test_a_basis_that_heads_share_is_read_where_any_of_them_reads_it() -> None:
    model, _ = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)
    site = "vision.blocks.0.attn.hook_z"
    one, two = (readers_of(model, site, [head])[0] for head in (0, 2))
    shared, _ = readers_of(model, site, [0, 2])
    assert one is not None
    assert two is not None
    torch.testing.assert_close(shared, torch.cat([one, two], 1))
    torch.testing.assert_close(readers_of(model, site, [0, 2], joint=True)[0], torch.cat([one, two], 0))


def test_readers_that_are_heads_read_every_position() -> None:
    model, _ = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)
    alone, _ = readers_of(model, "vision.blocks.1.hook_resid_pre", None, ["vision L1H0"])
    both, _ = readers_of(model, "vision.blocks.1.hook_resid_pre", None, ["vision L1H0"], joint=True, places=2)
    assert alone is not None
    torch.testing.assert_close(both, torch.block_diag(alone, alone))


@pytest.mark.parametrize(
    ("name", "site", "positions", "heads"),
    [
        ("vit", "vision.blocks.0.attn.hook_z", [0, 1], [0, 2]),
        ("vit", "vision.blocks.0.mlp.hook_post", [0, 2], None),
        ("llava-clip-llama", "language.blocks.0.attn.hook_z", "last", None),
    ],
)
def test_a_report_is_about_several_heads_and_positions_at_once(
    name: str, site: str, positions: Any, heads: Any
) -> None:
    model, pairs = pairs_of(name, count=6, answers=[0] * 6, foils=[1] * 6)

    def metric(logits: torch.Tensor, inputs: Any) -> torch.Tensor:
        return cv.metrics.at_position(logits, "last", inputs)[:, 0]

    trained = DAS(2, site, positions=positions, heads=heads, metric=metric, joint=True).fit(
        model, pairs, epochs=2, held_out=0.5, progress=False
    )
    found = illusion_report(
        model,
        pairs,
        site,
        trained,
        positions=positions,
        heads=heads,
        metric=metric,
        n_random=1,
        epochs=1,
        progress=False,
    )
    assert found.of("source run") == pytest.approx(1.0)
    assert il.FULL in found.axes["intervention"]
    assert torch.isfinite(found.effect).all()
    assert found.numbers["row norm"] ** 2 + found.numbers["null norm"] ** 2 == pytest.approx(1.0)
    assert (model.engine.handles, model.engine.stack) == ([], [])


def test_examples_with_other_numbers_of_positions_are_not_laid_side_by_side() -> None:
    name = "llava-clip-llama"
    model, _ = pairs_of(name, answers=[0] * 4, foils=[1] * 4)
    clean, corrupt = (inputs_of(name, DOUBLE, 3, "left", 1, seed) for seed in (0, 1))
    pairs = cv.data.Pairs(inputs=clean, corrupt_inputs=corrupt, answers=0, foils=1)
    for size in (None, 1):
        with pytest.raises(InputError, match="as many chosen positions"):
            SitePairs(
                model,
                pairs,
                "language.blocks.1.hook_resid_pre",
                positions="text",
                joint=True,
                allow_wrong=True,
                batch_size=size,
            )
    assert (model.engine.handles, model.engine.stack) == ([], [])


def test_readers_of_another_width_are_refused() -> None:
    model, pairs = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)
    width = model.vision.cfg.d_model
    with pytest.raises(InputError, match="coordinates"):
        illusion_report(
            model, pairs, "vision.blocks.1.hook_resid_pre", torch.ones(width), positions=0, readers=torch.ones(3, 2), allow_wrong=True,
            progress=False,
        )  # fmt: skip
