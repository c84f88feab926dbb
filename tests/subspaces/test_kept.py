"""A search that is interrupted keeps what it did, and continued gives the numbers of one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.subspaces import DAS, BoundlessDAS, CouplingMap, fit_basis, illusion_report, subspace_sweep
from circuitvision.subspaces.kept import KeptRun
from circuitvision.subspaces.pairs import SitePairs
from tests.subspaces.common import DOUBLE, pairs_of

SITE = "vision.blocks.1.hook_resid_pre"
FAST: dict[str, Any] = {"batch_size": 3, "allow_wrong": True, "progress": False}


@pytest.fixture(scope="module")
def tiny() -> Any:
    return pairs_of("vit", count=8, answers=[0, 1] * 4, foils=[1, 0] * 4)


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int, call: Any) -> None:
    """Run with Ctrl-C in the loss of the step behind ``after``."""
    own, count = SitePairs.loss, [0]

    def loss(self: Any, part: Any, rows: Any) -> Any:
        count[0] += 1
        if count[0] > after:
            raise KeyboardInterrupt
        return own(self, part, rows)

    with monkeypatch.context() as patch:
        patch.setattr(SitePairs, "loss", loss)
        with pytest.raises(KeyboardInterrupt):
            call()


SEARCHES = {
    "linear": (DAS(2, SITE, positions=0), {}),
    "boundless": (BoundlessDAS(3, SITE, positions=0), {}),
    "map": (DAS(2, SITE, positions=0, map=lambda d: CouplingMap(d, 2, 8)), {"control": True}),
    "joint, close": (DAS(2, SITE, positions=[0, 1], joint=True), {"closeness": 0.5}),
}


@pytest.mark.parametrize("name", list(SEARCHES))
def test_a_continued_search_is_the_whole_one(name: str, tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model, pairs = tiny
    search, more = SEARCHES[name]
    options = {"epochs": 3, "seeds": (0, 1), "rate": 0.05, **FAST, **more}
    whole = search.fit(model, pairs, **options)
    # Six training pairs are two steps an epoch: seed 0 is done after six, seed 1 has one epoch at eight.
    interrupted(monkeypatch, 9, lambda: search.fit(model, pairs, save_to=tmp_path / "das", **options))
    assert (model.engine.handles, model.engine.stack) == ([], [])
    assert {path.name for path in (tmp_path / "das").glob("fit-*")} == {
        "fit-seed-0.safetensors",
        "fit-seed-1.safetensors",
    }
    again = search.fit(model, pairs, save_to=tmp_path / "das", resume=True, **options)
    torch.testing.assert_close(again.basis, whole.basis, rtol=0, atol=0)
    assert torch.equal(again.loss, whole.loss)
    assert torch.equal(again.reported, whole.reported)
    assert torch.equal(again.values, whole.values)
    assert torch.equal(again.control, whole.control)


def test_what_is_done_is_not_trained_again(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model, pairs = tiny
    search, options = DAS(1, SITE, positions=0), {"epochs": 2, **FAST, "save_to": tmp_path}
    first = search.fit(model, pairs, **options)
    steps, own = [], SitePairs.loss
    monkeypatch.setattr(SitePairs, "loss", lambda self, part, rows: steps.append(1) or own(self, part, rows))
    again = search.fit(model, pairs, resume=True, **options)
    assert not steps
    assert torch.equal(again.basis, first.basis)
    # One more seed trains that one alone.
    search.fit(model, pairs, resume=True, seeds=(0, 5), **options)
    assert len(steps) == 4


def test_a_folder_of_another_search_or_without_resume_is_refused(tiny: Any, tmp_path: Path) -> None:
    model, pairs = tiny
    search, options = DAS(1, SITE, positions=0), {"epochs": 1, **FAST}
    search.fit(model, pairs, save_to=tmp_path / "one", **options)
    before = {path: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    for other, more, match in (
        (search, {}, "resume=True"),
        (search, {"resume": True, "rate": 0.5}, "another study"),
        (DAS(2, SITE, positions=0), {"resume": True}, "another study"),
        (BoundlessDAS(1, SITE, positions=0), {"resume": True}, "another study"),
        (DAS(1, SITE, positions=1), {"resume": True}, "another study"),
    ):
        with pytest.raises(InputError, match=match):
            other.fit(model, pairs, save_to=tmp_path / "one", **{**options, **more})
    with pytest.raises(InputError, match="another study"):
        search.fit(model, pairs[1:], save_to=tmp_path / "one", resume=True, **options)
    assert {path: path.read_bytes() for path in (tmp_path / "one").iterdir()} == before
    with pytest.raises(InputError, match="save_to"):
        search.fit(model, pairs, resume=True, **options)


def test_a_mistake_leaves_no_folder(tiny: Any, tmp_path: Path) -> None:
    model, pairs = tiny
    for search in (DAS(1, SITE, heads=[0]), DAS(10_000, SITE), DAS(1, "vision.blocks.2.hook_resid_post", positions=2)):
        with pytest.raises(InputError):
            search.fit(model, pairs, save_to=tmp_path / "none", **FAST)
    assert not (tmp_path / "none").exists()


def test_a_file_of_another_search_is_refused(tiny: Any, tmp_path: Path) -> None:
    model, pairs = tiny
    DAS(1, SITE, positions=0).fit(model, pairs, epochs=1, save_to=tmp_path / "one", **FAST)
    DAS(1, SITE, positions=1).fit(model, pairs, epochs=1, save_to=tmp_path / "two", **FAST)
    file = "fit-seed-0.safetensors"
    (tmp_path / "two" / file).write_bytes((tmp_path / "one" / file).read_bytes())
    with pytest.raises(InputError, match="another search"):
        DAS(1, SITE, positions=1).fit(model, pairs, epochs=1, save_to=tmp_path / "two", resume=True, **FAST)


def test_sweeps_and_reports_keep_their_training(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model, pairs = tiny

    def metric(output: torch.Tensor) -> torch.Tensor:
        return output[:, 0]

    def sweep(**more: Any) -> Any:
        sites = ["vision.blocks.0.hook_mlp_out", "vision.blocks.1.hook_mlp_out"]
        return subspace_sweep(model, pairs, sites, [1, 2], positions=0, epochs=2, metric=metric, **FAST, **more)

    def report(**more: Any) -> Any:
        return illusion_report(
            model, pairs, "vision.blocks.0.mlp.hook_post", torch.ones(model.vision.cfg.d_mlp), positions=0, epochs=2, n_random=1,
            metric=metric, **FAST, **more,
        )  # fmt: skip

    for name, call, after in (("sweep", sweep, 5), ("report", report, 3)):
        interrupted(monkeypatch, after, lambda call=call, name=name: call(save_to=tmp_path / name))
        assert list((tmp_path / name).glob("fit-*"))
        again = call(save_to=tmp_path / name, resume=True)
        torch.testing.assert_close(again.values, call().values, rtol=0, atol=0, equal_nan=True)


def test_a_basis_of_any_objective_is_continued(tmp_path: Path) -> None:
    a = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)

    def objective(basis: torch.Tensor, step: int) -> torch.Tensor:
        if step == stop:
            raise KeyboardInterrupt
        return -(a @ basis).square().sum()

    stop = -1
    whole = fit_basis(objective, 6, 2, steps=20, rate=0.1, dtype=DOUBLE)
    stop = 11
    with pytest.raises(KeyboardInterrupt):
        fit_basis(objective, 6, 2, steps=20, rate=0.1, dtype=DOUBLE, kept=KeptRun(tmp_path / "fit.npz"))
    stop = -1
    again = fit_basis(objective, 6, 2, steps=20, rate=0.1, dtype=DOUBLE, kept=KeptRun(tmp_path / "fit.npz"))
    assert torch.equal(again.basis, whole.basis)
    assert torch.equal(again.loss, whole.loss)


def test_continued_results_know_that_they_are_the_same(tiny: Any, tmp_path: Path) -> None:
    model, pairs = tiny
    search, options = DAS(1, SITE, positions=0), {"epochs": 1, **FAST}
    kept, plain = search.fit(model, pairs, save_to=tmp_path, **options), search.fit(model, pairs, **options)
    assert kept.provenance["call"] == plain.provenance["call"]
    kept.save(tmp_path / "das.npz")
    assert torch.equal(cv.load(tmp_path / "das.npz").basis, plain.basis)
