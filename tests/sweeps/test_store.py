"""Sweeps that are ended and continued: nothing finished is lost, the whole has the bits of an undisturbed run, and no other study gets in."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.incremental.sweeps import store
from circuitvision.incremental.sweeps.store import Store
from circuitvision.metric_set import MetricSet
from tests.sweeps import long_study
from tests.sweeps.long_study import study
from tests.zoo import case, shared_model

ROOT = Path(__file__).parents[2]


def equal(one: cv.SweepResult, two: cv.SweepResult) -> bool:
    tensors = [(one.values, two.values), (one.clean, two.clean), (one.done, two.done)]
    return all(torch.equal(*both) for both in tensors) and one.plan == two.plan and one.axes == two.axes


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def test_a_study_that_is_killed_again_and_again_ends_with_the_bits_of_one_that_never_was(tmp_path: Path) -> None:
    folder, draw, seen = tmp_path / "study", random.Random(0), 0
    arguments = [sys.executable, "-m", "tests.sweeps.long_study", str(folder)]
    run = subprocess.Popen(
        arguments,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PAUSE": "0.04", "OMP_NUM_THREADS": "1"},
    )
    assert run.stdout is not None
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        child = int(run.stdout.readline())
        wanted, ends = seen + draw.randint(1, 3), time.monotonic() + 120
        while len(parts(folder)) < wanted and run.poll() is None and time.monotonic() < ends:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.1)
        before = len(parts(folder))
        os.kill(child, number)
        assert int(run.stdout.readline()) == code
        assert len(parts(folder)) >= before >= wanted
        seen = len(parts(folder))
    assert run.wait(60) == 0
    assert seen < 12
    kept = {path: path.stat().st_mtime_ns for path in parts(folder)}
    found = study(folder)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert bool(found.done.all())
    assert equal(found, study(tmp_path / "whole"))
    assert equal(found.of("accuracy"), study(None).of("accuracy"))


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[cv.SweepResult, int]:
    """A continued study, and how many metrics of runs it computed."""
    calls: list[int] = []
    original = MetricSet.__call__
    with monkeypatch.context() as patch:
        patch.setattr(MetricSet, "__call__", lambda self, *args: calls.append(1) or original(self, *args))
        return study(folder), len(calls)


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = study(tmp_path / "study")
    again, runs = measured(tmp_path / "study", monkeypatch)
    assert (runs, equal(again, whole)) == (0, True)
    for path in parts(tmp_path / "study")[::3]:
        path.unlink()
    again, runs = measured(tmp_path / "study", monkeypatch)
    assert equal(again, whole)
    # Four of twelve batches of three edits, and the unedited run.
    assert runs == 4 * 3 + 1


def test_another_batch_size_may_continue(tmp_path: Path) -> None:
    whole = study(tmp_path / "study")
    for path in parts(tmp_path / "study")[1:]:
        path.unlink()
    again = study(tmp_path / "study", batch_size=5)
    torch.testing.assert_close(again.values, whole.values)
    assert equal(study(tmp_path / "study"), again)


def other_weights(patch: pytest.MonkeyPatch) -> None:
    plain = long_study.model

    def changed() -> cv.HookedModel:
        made = plain()
        with torch.no_grad():
            next(made.parameters()).add_(1e-3)
        return made

    patch.setattr(long_study, "model", changed)


def other_metric(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cv.metrics, "accuracy", lambda answer: cv.metrics.prob(answer))


def other_edits(patch: pytest.MonkeyPatch) -> None:
    scale = edits.scale
    patch.setattr(edits, "scale", lambda site, factor, **given: scale(site, factor + 1, **given))


def other_inputs(patch: pytest.MonkeyPatch) -> None:
    randn = torch.randn
    patch.setattr(torch, "randn", lambda *shape, **given: randn(*shape, **given) + 1)


def other_order_of_metrics(patch: pytest.MonkeyPatch) -> None:
    of = MetricSet.of
    patch.setattr(
        MetricSet, "of", lambda given: of(dict(reversed(given.items())) if isinstance(given, dict) else given)
    )


OTHERS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "weights": other_weights,
    "metrics": other_metric,
    "edits": other_edits,
    "metrics ": other_order_of_metrics,
    "inputs": other_inputs,
}


def check_refused(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study(folder)
    parts(folder)[0].unlink()
    OTHERS[what](monkeypatch)
    monkeypatch.setattr(MetricSet, "__call__", lambda *args: pytest.fail("it ran"))
    with pytest.raises(InputError, match=what.strip()):
        study(folder)


@pytest.mark.parametrize("what", list(OTHERS))
def test_another_study_is_refused_before_anything_runs(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_refused(what, tmp_path / "study", monkeypatch)


def test_a_folder_is_continued_only_when_asked(tmp_path: Path) -> None:
    study(tmp_path / "study", resume=False)
    with pytest.raises(InputError, match="resume=True"):
        study(tmp_path / "study", resume=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give a folder"):
        study(tmp_path / "file")
    with pytest.raises(InputError, match="save_to=folder"):
        study(None, resume=True)


def test_a_mistake_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_size"):
        study(tmp_path / "study", batch_size=0)
    assert not (tmp_path / "study").exists()


def test_a_metric_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    model, inputs = shared_model("vit"), case("vit").inputs(shared_model("vit"), batch=2)
    listed = [edits.scale("vision.blocks.0.attn.hook_z", 0.5)]
    for there in (False, True):
        folder = tmp_path / f"study {there}"
        if there:
            folder.mkdir()
            (folder / "notes.txt").write_text("mine")
        for resume in (False, False):
            with pytest.raises(InputError, match="one number per example"):
                cv.HookedModel(model).sweep(
                    inputs, listed, lambda logits: logits.mean(), save_to=folder, resume=resume, progress=False
                )
        assert folder.exists() is there
        assert [path.name for path in folder.glob("*")] == ["notes.txt"] * there


def test_damaged_and_foreign_parts_are_named(tmp_path: Path) -> None:
    study(tmp_path / "study")
    first = parts(tmp_path / "study")[0]
    kept = first.read_bytes()
    first.write_bytes(kept[:50])
    with pytest.raises(InputError, match="delete it"):
        study(tmp_path / "study")
    first.write_bytes(kept)
    manifest = tmp_path / "study" / "manifest.json"
    held = manifest.read_text()
    manifest.write_text(held[:40])
    with pytest.raises(InputError, match="damaged"):
        study(tmp_path / "study")
    manifest.unlink()
    with pytest.raises(InputError, match=r"no manifest\.json"):
        study(tmp_path / "study")
    manifest.write_text(json.dumps({**json.loads(held), "format": "circuitvision.sweep/99"}))
    with pytest.raises(InputError, match="format"):
        study(tmp_path / "study")


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> None:
    with safe_open(path, framework="pt") as archive:
        header = json.loads(archive.metadata()["circuitvision_json"])
        tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(
        {n: t.contiguous() for n, t in tensors.items()}, path, metadata={"circuitvision_json": json.dumps(header)}
    )


@pytest.mark.parametrize("what", ["study", "batch", "examples", "groups", "plan", "values", "clean", "unedited"])
def test_a_part_that_lacks_something_is_damaged(what: str, tmp_path: Path) -> None:
    study(tmp_path / "study")
    first = parts(tmp_path / "study")[0]
    kept = first.read_bytes()

    def cut(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        if what in tensors:
            tensors[what] = tensors[what][..., :1]
        else:
            header[what] = []

    for change in (lambda header, tensors: (header if what in header else tensors).pop(what), cut):
        first.write_bytes(kept)
        rewritten(first, change)
        with pytest.raises(InputError, match=first.name):
            study(tmp_path / "study")


def test_a_folder_in_which_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = study(tmp_path / "study")

    def refused(*args: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "access", lambda *args, **named: False)
    monkeypatch.setattr(store, "open_lock", refused)
    monkeypatch.setattr(tempfile, "mkstemp", refused)
    assert equal(study(tmp_path / "study"), whole)
    monkeypatch.setattr(MetricSet, "__call__", lambda *args: pytest.fail("it ran"))
    parts(tmp_path / "study")[0].unlink()
    for folder in (tmp_path / "study", tmp_path / "new"):
        with pytest.raises(InputError, match="another folder"):
            study(folder)


def test_a_study_begun_between_the_look_and_the_first_part_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    with Store(folder, {"edits": "other"}, True) as late:
        study(folder)
        held = [path.read_bytes() for path in parts(folder)]
        with pytest.raises(InputError, match="meanwhile"):
            late.begin({})
    assert [path.read_bytes() for path in parts(folder)] == held
    assert bool(study(folder).done.all())


def test_examples_that_start_from_other_noise_are_another_study(tmp_path: Path) -> None:
    model = cv.HookedModel(shared_model("pi0"))
    given = case("pi0").inputs(model.module, batch=2, padding="right")
    rows = [{n: v[row : row + 1] for n, v in given.items() if n not in ("noise", "timestep")} for row in range(2)]
    data = cv.data.Side(inputs=[rows[0], rows[0], rows[1]])
    still = [edits.scale("action.blocks.0.hook_mlp_out", 0.5)]

    def run(part: cv.data.Side, folder: Path | None) -> torch.Tensor:
        options = {"save_to": folder, "resume": folder is not None, "progress": False}
        return model.sweep(part, still, cv.metrics.action_dim(0), **options).values

    assert data[[0, 2]].digest == data[[1, 2]].digest
    assert not torch.allclose(run(data[[0, 2]], None), run(data[[1, 2]], None))
    run(data[[0, 2]], tmp_path / "study")
    with pytest.raises(InputError, match="noise"):
        run(data[[1, 2]], tmp_path / "study")


def counted_twice(folder: Path) -> None:
    """A part under another name: its edits would be measured twice."""
    study(folder)
    first = parts(folder)[0]
    first.with_name("part-000000-9999999.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(InputError, match="another part"):
        study(folder)


def test_a_part_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    counted_twice(tmp_path / "study")


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    study(tmp_path / "study")
    held = json.loads((tmp_path / "study" / "manifest.json").read_text())["study"]
    with Store(tmp_path / "study", held, True), pytest.raises(InputError, match="Another process"):
        study(tmp_path / "study")
    assert bool(study(tmp_path / "study").done.all())


def test_sigterm_does_what_it_did_before_and_after_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(logits: Any) -> Any:
        handlers.append(signal.getsignal(signal.SIGTERM))
        return logits[:, 0]

    handlers: list[Any] = []
    monkeypatch.setattr(long_study, "slow", seen)
    before = signal.getsignal(signal.SIGTERM)
    study(tmp_path / "main")
    assert signal.getsignal(signal.SIGTERM) is before
    assert callable(handlers[0])
    assert handlers[0] is not before

    def own(number: int, frame: Any) -> None: ...

    try:
        signal.signal(signal.SIGTERM, own)
        study(tmp_path / "handled")
        assert handlers[-1] is own
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    thread = threading.Thread(target=study, args=(tmp_path / "thread",))
    thread.start()
    thread.join()
    assert len(parts(tmp_path / "thread")) == 12
    assert handlers[-1] is before


def test_an_interruption_with_partial_keeps_whole_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def broken(logits: Any) -> Any:
        if next(calls) == 8:
            raise KeyboardInterrupt
        return logits[:, 0] - logits[:, 1]

    monkeypatch.setattr(long_study, "slow", broken)
    with pytest.warns(UserWarning, match="after 7 of 36"):
        found = study(tmp_path / "study", partial=True)
    assert int(found.done.sum()) == 7
    assert len(parts(tmp_path / "study")) == 2
    assert equal(study(tmp_path / "study"), study(tmp_path / "whole"))


# -- mutants -------------------------------------------------------------------------------------------------------------------------------


def test_taking_every_part_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parts_of_all(self: Store) -> list[Any]:
        return [self._read(path) for path in sorted(self.folder.glob("part-*.safetensors"))]

    monkeypatch.setattr(store.Store, "parts", parts_of_all)
    with pytest.raises(pytest.fail.Exception):
        counted_twice(tmp_path / "study")


def test_an_ignored_manifest_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.Store, "_check", lambda self, manifest: None)
    monkeypatch.setattr(store, "of_json", lambda value: "the same")
    with pytest.raises(pytest.fail.Exception):
        check_refused("edits", tmp_path / "study", monkeypatch)


def test_parts_know_their_study_where_the_manifest_was_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study(tmp_path / "study")
    other_edits(monkeypatch)
    study(tmp_path / "other")
    (tmp_path / "study" / "manifest.json").write_text((tmp_path / "other" / "manifest.json").read_text())
    with pytest.raises(InputError, match="belongs to another study"):
        study(tmp_path / "study")
