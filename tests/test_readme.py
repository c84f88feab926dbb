"""The README's examples of edits and of other libraries run as they stand there, on a shipped organism."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import circuitvision as cv

README = (Path(__file__).parent.parent / "README.md").read_text()


def block_with(words: str) -> str:
    """The Python block of the README that holds these words."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return next(block for block in blocks if words in block)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the examples take for granted: a model, inputs, and the cache of another run."""
    monkeypatch.chdir(tmp_path)
    model = cv.organisms.load("shapes-llava")
    pair = cv.data.sample_question_pairs(1, seed=3)[0]
    inputs = model.inputs(images=pair.corrupt.image, text=pair.prompt)
    clean = model.inputs(images=pair.clean.image, text=pair.prompt)
    with torch.no_grad():
        yield {"cv": cv, "model": model, "inputs": inputs, "source_cache": model.run_with_cache(clean)[1]}


def test_edits(names: dict[str, Any]) -> None:
    exec(block_with("edits.save("), names)
    assert names["edits"].load("study.yaml") == [names["patch"], names["blind"]]
    assert not torch.allclose(names["logits"], names["model"](names["inputs"]))
    assert len(names["result"].values) == len(names["every_place"])
    assert names["words"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_training_a_direction(names: dict[str, Any]) -> None:
    exec("import torch\nfrom circuitvision import edits", names)
    exec(block_with("model.prepared("), names)
    assert float(names["direction"].grad.norm()) > 0
    steered = names["edits"].steer("language.blocks.1.hook_resid_post", names["direction"], 1.0, positions="last")
    whole = names["model"].run(names["inputs"], [steered])
    torch.testing.assert_close(names["logits"].detach(), whole.detach())


def test_data_sets(names: dict[str, Any]) -> None:
    exec("from circuitvision import edits", names)
    exec(block_with("save_to="), names)
    found = names["found"]
    assert list(found.axes) == ["metric", "edit", "example"]
    assert found.axes["metric"] == ["logit difference", "right"]
    assert len(found.axes["example"]) == len(names["pairs"])


def test_read_outs(names: dict[str, Any]) -> None:
    names["image"] = cv.data.sample_question_pairs(1, seed=3)[0].corrupt.image
    names["cache"] = names["model"].run_with_cache(names["inputs"])[1]
    exec(block_with("cv.readout.logit_lens"), names)
    shares = names["shares"]
    torch.testing.assert_close(shares.values.sum(0), shares.total, atol=1e-4, rtol=1e-4)
    assert len(names["best"]) == 3


def test_other_libraries(names: dict[str, Any]) -> None:
    # nnsight reads the source of a trace back from its file.
    file = Path("example.py")
    file.write_text(block_with("cv.interop.nnsight"))
    exec(compile(file.read_text(), str(file.resolve()), "exec"), names)
    assert names["view"].cfg.n_layers == names["model"].vision.cfg.n_layers
