"""The main job: a case is read, its lenses and the effects of all heads are measured, the strongest heads are checked, and the files are written."""

from __future__ import annotations

import dataclasses
import difflib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from circuitvision import metrics
from circuitvision.circuits import AblationCheck, HeadImportance, ablation_check, head_importance, live_heads
from circuitvision.data import Batch, Pairs
from circuitvision.errors import InputError, checked_seed
from circuitvision.links import Link, probabilities
from circuitvision.organisms.registry import DEFAULT
from circuitvision.plots.quickstart import write
from circuitvision.quickstart.cases import CAPTIONS, PARTS, Case, case_of, given_pair, kind_of, opened, reached_towers
from circuitvision.quickstart.circuit import PAIRS, edge_circuit
from circuitvision.quickstart.result import Quickstart, Reading
from circuitvision.readout import logit_lens
from circuitvision.readout.lens.result import LensResult

DEFAULT_OUT = "circuitvision-quickstart"
FIND_PAIRS = 32
"""On how many of an organism's own pairs the heads are found; the first of them is the case."""
CHECK_PAIRS = 200
"""On how many others they are checked."""


def quickstart(
    model: str | Path | Any = DEFAULT,
    *,
    clean: str | Path | Image.Image | None = None,
    corrupt: str | Path | Image.Image | None = None,
    prompt: str | None = None,
    answer: str | int | None = None,
    foil: str | int | None = None,
    out: str | Path = DEFAULT_OUT,
    top_k: int = 4,
    circuit: bool = False,
    seed: int = 0,
    **options: Any,
) -> Quickstart:
    """Find the heads that carry an answer from the image to the output, and write the files that show it.

    Without a case an organism draws pairs of its own: the effects of heads are means over :data:`FIND_PAIRS`, of which the first is shown, and
    :data:`CHECK_PAIRS` others check the heads that were found.

    Args:
        model: name of an organism, name or folder of a checkpoint, or a wrapped model.
        clean: image (or its file) for which ``answer`` is right.
        corrupt: image of the same size for which ``foil`` is right.
        prompt: of models that answer in words, the question, image token included.
        answer: a one-piece word; of a classifier a class, by name or number (if left out, its first choice on ``clean``); of a dual encoder
            a caption.
        foil: likewise (of a classifier, if left out, its first choice on ``corrupt``).
        out: folder for the files; made if missing.
        top_k: how many heads of each tower enter the graph.
        circuit: whether a circuit of edges is found as well, and what it claims is tested on pairs that the search did not see, beside random
            circuits: minutes, of an organism's own pairs alone (:mod:`circuitvision.quickstart.circuit`).
        seed: which pairs are drawn when none is given, and the random heads of the check.
        options: dtype, device and whatever else ``HookedModel.from_pretrained`` takes.

    Raises:
        InputError: an incomplete case, a file that is no image, images or answers that do not fit the model, a pair that the model does not tell
            apart, a model without pairs of its own and no case, or an ``out`` that is a file.
        UnsupportedModelError: a model that the library cannot wrap, or one that answers with neither words, classes nor captions.
    """
    started = time.perf_counter()
    checked_seed(seed)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder as out.")
    given = opened(clean, corrupt, prompt=prompt, answer=answer, foil=foil)
    if given is None:
        _check_own_pairs(model)
    elif circuit:
        raise InputError(
            "A circuit is tested on pairs that its search did not see, and here is one pair: circuit=False."
        )
    hooked = load_model(model, **options)
    kind_of(hooked)
    pairs = _own_pairs(model, FIND_PAIRS + CHECK_PAIRS, seed) if given is None else given_pair(hooked, given)
    case, batch = case_of(hooked, pairs), next(iter(pairs[:1].batches(hooked)))
    assert batch.other is not None
    runs, ids = {"clean": batch.inputs, "corrupt": batch.other}, _ids(batch)
    # Random heads stand beside these in the check, on other pairs.
    importance = head_importance(
        hooked, pairs[:FIND_PAIRS], metrics.logit_diff(), top_k=top_k, towers=reached_towers(hooked), n_random=0
    )
    found = Quickstart(
        case,
        importance,
        _graph(importance, case),
        {name: _lenses(hooked, inputs, case, ids) for name, inputs in runs.items()},
        _check(hooked, pairs[FIND_PAIRS:], importance, seed) if given is None else None,
        {name: _read(hooked, inputs, case, ids) for name, inputs in runs.items()},
        _read_through(hooked),
    )
    files = write(found, folder)
    if circuit:
        edges = edge_circuit(hooked, pairs[:PAIRS], pairs[FIND_PAIRS : FIND_PAIRS + PAIRS], seed)
        found, files = dataclasses.replace(found, edges=edges), [*files, *edges.write(folder)]
    return dataclasses.replace(found, files=files, seconds=time.perf_counter() - started)


def load_model(model: str | Path | Any, **options: Any) -> Any:
    """A wrapped model from the name of an organism, the name or folder of a checkpoint, or itself."""
    from circuitvision import organisms
    from circuitvision.hooked import HookedModel

    if not isinstance(model, str | Path):
        return model
    _refuse_misspelt(model)
    if str(model) in organisms.names():
        return organisms.load(str(model), **options)
    return HookedModel.from_pretrained(model, **options)


def _refuse_misspelt(model: str | Path) -> None:
    """Raise InputError for what is nearly the name of an organism."""
    from circuitvision import organisms

    name, known = str(model), organisms.names()
    meant = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if meant and name not in known and not Path(name).exists():
        raise InputError(f"{name} is neither a folder nor a model that comes with circuitvision; is {meant[0]} meant?")


def _own_pairs(model: str | Path | Any, count: int, seed: int) -> Pairs:
    from circuitvision import organisms

    return organisms.pairs(str(model), count, seed)


def _check_own_pairs(model: str | Path | Any) -> None:
    """Raise InputError, before anything is loaded, where there is no case and a model cannot draw one."""
    from circuitvision.organisms import registry

    if isinstance(model, str | Path):
        _refuse_misspelt(model)
        if str(model) in registry.TABLE:
            return
    own = ", ".join(filter(registry.has_pairs, registry.TABLE))
    raise InputError(
        f"Only organisms draw pairs of their own ({own}); for another model give a case: {', '.join(PARTS)} (a classifier needs the two images "
        "alone, a dual encoder two captions as answer and foil, and no prompt)."
    )


def _ids(batch: Batch) -> tuple[int, int]:
    """The columns of answer and foil."""
    assert batch.answers is not None
    assert batch.foils is not None
    return int(batch.answers[0]), int(batch.foils[0])


def _graph(importance: HeadImportance, case: Case) -> Any:
    """The graph, with answer and foil of a single pair by name on its last node."""
    graph = importance.to_networkx()
    names = case.names if importance.n_examples == 1 else ("answer", "foil")
    for _, data in graph.nodes(data=True):
        if data["kind"] == "logit":
            data["label"] = f"logit_diff({' - '.join(names)})"
    return graph


def _read(model: Any, inputs: Mapping[str, Any], case: Case, ids: tuple[int, int]) -> Reading:
    with torch.no_grad():
        row = metrics.at_position(model(inputs), "last", inputs)[0]
    # Captions are a choice between two, whatever a single one's probability is.
    link: Link = "softmax" if case.kind is CAPTIONS else model.link
    shares = probabilities(row, link)
    best = int(shares.argmax())
    own = dict(zip(ids, (case.answer, case.foil), strict=True))
    said = own.get(best) or model.towers[model.flow.answer].output_head.names([best])[str(best)].strip()
    answer, foil = (float(shares[number]) for number in ids)
    chance = 0.5 if link == "sigmoid" else 1.0 / len(shares)
    return Reading(said, float(shares[best]), answer, foil, chance, case.kind.says)


def _lenses(model: Any, inputs: Mapping[str, Any], case: Case, ids: tuple[int, int]) -> list[LensResult]:
    """The lens of every tower that the images reach and that is read in the answer's own columns, answer against foil."""
    columns = dict(zip(case.names, ids, strict=True))
    found = []
    for name in _readable(model):
        lens = logit_lens(model, inputs, name, targets=columns)
        assert isinstance(lens, LensResult)
        found.append(lens.contrast(*case.names))
    return found


def _readable(model: Any) -> list[str]:
    kind = model.towers[model.flow.answer].output_head.kind
    return [name for name in reached_towers(model) if model.towers[name].output_head.kind == kind]


def _read_through(model: Any) -> dict[str, str]:
    """For each tower that is read behind a connector, that connector and the tower whose output head follows it."""
    towers = {name: model.towers[name] for name in _readable(model)}
    return {
        name: f"the {tower.connector.name} and the {tower.reader.name} tower's output head"
        for name, tower in towers.items()
        if tower.connector is not None
    }


def _check(model: Any, pairs: Pairs, importance: HeadImportance, seed: int) -> AblationCheck | None:
    """The leading heads ablated over the other pairs, beside up to 20 random sets; None where no head restores anything, or too few are left."""
    heads = leading_heads(importance)
    possible = math.comb(len({*live_heads(model)} - {*heads}), len(heads)) if heads else 0
    return ablation_check(model, pairs, heads, n_random=min(20, possible), seed=seed) if possible else None


def leading_heads(importance: HeadImportance, floor: float = 0.05, least: int = 2, most: int = 4) -> list[str]:
    """The heads worth ablating together, strongest first, between ``least`` and ``most``: those that restore at least ``floor`` of the answer, and
    where those do not add up to 90 % of what the heads in the graph restore together (they back each other up), the next ones.
    """
    heads: list[str] = []
    added = 0.0
    for name, share, _ in importance.ranking():
        wanted = len(heads) < least or share >= floor or added < 0.9 * importance.joint
        if share > 0 and wanted and len(heads) < most:
            heads, added = [*heads, name], added + share
    return heads
