"""The main job in one call: from a pair of images to a circuit, as files to look at and graphs to compute with.

Two images and a question whose answers differ give: the lens of the answer over layers and image patches, the effect
of patching every head of both towers, the graph of the strongest heads across vision tower, projector and language
tower, and a report that shows all of it. With the model that ships with the library the pair is drawn from the scene
generator, and the heads found on that one pair are then ablated over other pairs, beside random ones.

Not covered: models without a vision and a language tower, several images in one prompt, answers of several tokens.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from circuitvision import metrics
from circuitvision.circuits import (
    AblationCheck,
    HeadImportance,
    PairBatch,
    ablation_check,
    export,
    head_importance,
    parse_id,
)
from circuitvision.errors import InputError, UnsupportedModelError, checked_seed
from circuitvision.links import probabilities
from circuitvision.model import pictures
from circuitvision.model.names import spelled
from circuitvision.readout import LensResult, lens_sites, logit_lens

if TYPE_CHECKING:
    import networkx as nx

    from circuitvision.data.questions import QuestionPair

DEFAULT_MODEL = "shapes-llava"
DEFAULT_OUT = "circuitvision-quickstart"
CHECK_PAIRS = 64
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Case:
    """One question about two images; ``answer`` is right for ``clean``, ``foil`` for ``corrupt``."""

    clean: Image.Image
    corrupt: Image.Image
    prompt: str
    answer: str
    foil: str


@dataclass(frozen=True)
class Reading:
    """What the model makes of one image: the word it says, and how likely it finds that, the answer and the foil."""

    says: str
    probability: float
    answer: float
    foil: float

    def __str__(self) -> str:
        return f"the model says {self.says} ({self.probability:.0%})"


@dataclass(frozen=True)
class Quickstart:
    """What the main job found, and the files it wrote."""

    case: Case
    importance: HeadImportance
    graph: nx.MultiDiGraph
    lenses: dict[str, list[LensResult]]
    check: AblationCheck | None
    readings: dict[str, Reading]
    files: list[Path] = field(default_factory=list)
    seconds: float = 0.0

    def table(self, count: int = 8) -> list[tuple[str, str, str]]:
        """The strongest heads as (name, where, share restored), strongest first."""
        rows = []
        for name, share, _ in self.importance.ranking()[:count]:
            node = parse_id(name)
            rows.append((spelled(name), f"{node.tower} layer {node.layer}, head {node.head}", _percent(share)))
        return rows

    def finding(self) -> str:
        """The result in a few sentences."""
        best, share = self.importance.best()
        selected = len(self.importance.selected)
        swing = self.importance.metric_clean - self.importance.metric_corrupt
        said = (
            f"Swapping one image for the other moves the logit of {self.case.answer!r} against {self.case.foil!r} by {swing:.1f}. "
            f"Putting the clean value of one head, {spelled(best)}, into the other run restores {_percent(share)} of that; the "
            f"{selected} heads in the graph together restore {_percent(self.importance.joint)}."
        )
        vision = [(name, share) for name, share, _ in self.importance.ranking() if parse_id(name).tower == "vision"]
        past = sum(
            e["score"] for e in self.importance.edges if (e["sender"], e["receiver"]) == ("v.input", "x.projector")
        )
        if vision and swing and max(abs(share) for _, share in vision) < 0.05:
            frozen = sum(parse_id(name).tower == "vision" for name in self.importance.selected)
            said += (
                f" No single head of the vision tower moves 5%: with its {frozen} strongest heads held at the corrupt run's "
                f"values, {_percent(past / swing)} of the image's effect still reaches the answer through the projector."
            )
        return said

    def cautions(self) -> list[str]:
        """What a reader should know before believing the result; empty when all is as asked."""
        said = []
        for name, wanted in (("clean", self.case.answer), ("corrupt", self.case.foil)):
            if self.readings[name].says != wanted:
                said.append(
                    f"On the {name} image the model's own answer is {self.readings[name].says!r}, not {wanted!r}."
                )
        if self.importance.metric_clean < self.importance.metric_corrupt:
            said.append(
                f"The model leans more to {self.case.answer!r} on the corrupt image than on the clean one, so what is restored here "
                f"is its leaning to {self.case.foil!r}; swap the images or the words."
            )
        return said


def quickstart(
    model: str | Path | Any = DEFAULT_MODEL,
    *,
    clean: str | Path | Image.Image | None = None,
    corrupt: str | Path | Image.Image | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    foil: str | None = None,
    out: str | Path = DEFAULT_OUT,
    top_k: int = 4,
    seed: int = 0,
    **options: Any,
) -> Quickstart:
    """Find the heads that carry an answer from the image to the output, and write the files that show it.

    Args:
        model: name of an organism, name or folder of a checkpoint, or a wrapped model.
        clean: image (or its file) for which ``answer`` is right.
        corrupt: image of the same size for which ``foil`` is right.
        prompt: the question, image token included.
        answer: one-piece word.
        foil: one-piece word.
        out: folder for the files; made if missing.
        top_k: how many heads of each tower enter the graph.
        seed: which pair is drawn when none is given, and the random heads of the check.
        options: dtype, device and whatever else ``HookedModel.from_pretrained`` takes.

    Raises:
        InputError: an incomplete case, a file that is no image, images or words that do not fit the model, a pair
        that the model does
            not tell apart, or an ``out`` that is a file.
        UnsupportedModelError: a model that the library cannot wrap, or one without both towers.
    """
    started = time.perf_counter()
    checked_seed(seed)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder as out.")
    given = _given_case(clean, corrupt, prompt, answer, foil)
    hooked = load_model(model, **options)
    _check_towers(hooked)
    pairs = [] if given is not None else _draw_pairs(model, 1 + CHECK_PAIRS, seed)
    case = given if given is not None else _case_of(pairs[0])
    runs = {
        "clean": hooked.inputs(images=case.clean, text=case.prompt),
        "corrupt": hooked.inputs(images=case.corrupt, text=case.prompt),
    }
    metric = metrics.logit_diff(case.answer, case.foil).bind(hooked)
    readings = {name: _read(hooked, inputs, case) for name, inputs in runs.items()}
    lenses = {name: _lenses(hooked, inputs, case) for name, inputs in runs.items()}
    importance = head_importance(hooked, runs["clean"], runs["corrupt"], metric, top_k=top_k)
    check = _check(hooked, pairs[1:], importance, seed) if pairs else None
    found = Quickstart(case, importance, importance.to_networkx(), lenses, check, readings)
    files = write(found, folder)
    return Quickstart(case, importance, found.graph, lenses, check, readings, files, time.perf_counter() - started)


def write(found: Quickstart, folder: str | Path) -> list[Path]:
    """Write ``circuit.graphml``, ``circuit.json``, ``heads.html``, ``lens.html`` and ``report.html``; returns the paths."""
    from circuitvision.plots import graph as graph_figures
    from circuitvision.plots import heads as head_figures
    from circuitvision.plots import report as reports
    from circuitvision.plots import style

    folder = Path(folder)
    case = found.case
    heads = head_figures.head_importance(found.importance)
    lens = _lens_figure(found)
    circuit = graph_figures.circuit(found.graph)
    title = f"What makes {_short(found.importance.provenance['model_id'])} say {case.answer!r}?"
    sections = [
        reports.Section("Which heads restore the answer", _TEXTS["heads"], heads),
        reports.Section("How they pass it on", _TEXTS["circuit"], circuit),
        reports.Section("Where the answer can be read", _lens_text(found), lens),
    ]
    if found.check is not None:
        figure = head_figures.ablation(found.check)
        sections.append(reports.Section("Whether these heads carry the answer", found.check.summary(), figure))
    pictures = [
        reports.Picture(case.clean, f"clean: {found.readings['clean']}"),
        reports.Picture(case.corrupt, f"corrupt: {found.readings['corrupt']}"),
    ]
    page = reports.Report(
        title,
        found.finding(),
        case.prompt,
        pictures,
        sections,
        ("head", "where", "restores"),
        found.table(),
        found.cautions(),
        found.importance.provenance,
    )
    return [
        export(found.graph, folder / "circuit.graphml"),
        export(found.graph, folder / "circuit.json"),
        style.write_figures(folder / "heads.html", title, [heads], _TEXTS["heads"]),
        style.write_figures(folder / "lens.html", title, [lens], _lens_text(found)),
        reports.write(page, folder / "report.html"),
    ]


_TEXTS = {
    "heads": "One head at a time takes its clean value, at all positions, in the run on the corrupt image. 0% leaves the corrupt answer as "
    "it is, 100% restores the clean one. Effects overlap, so they need not add up to 100%.",
    "circuit": "Disk area is what patching the head restores on its own. A line is the part of that effect which reaches its right end "
    "without passing another drawn node; the lines that leave a node add up to its effect.",
}


def _lens_text(found: Quickstart) -> str:
    case = found.case
    paint = (
        "in the colour it says"
        if _answer_colors(case)
        else f"orange where it says {case.answer}, blue where it says {case.foil}"
    )
    return (
        f"What each patch would answer if the model stopped there: painted {paint}, and fainter the less it leans to "
        "either. The vision tower is read through the projector and the language tower's own output layer. The box marks "
        "the pixels that differ; under the language maps, the same reading at the prompt's last word, where the answer is."
    )


def _answer_colors(case: Case) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    """The colours that the foil and the answer name, where they are names of colours."""
    from circuitvision.data.scenes import COLORS

    return (COLORS[case.foil], COLORS[case.answer]) if {case.answer, case.foil} <= set(COLORS) else None


def _lens_figure(found: Quickstart) -> Any:
    from circuitvision.plots.lens_rows import LensRow, lens_rows

    case = found.case
    rows = [
        LensRow(name, np.asarray(image.convert("RGB")), found.lenses[name])
        for name, image in (("clean", case.clean), ("corrupt", case.corrupt))
    ]
    return lens_rows(rows, lens_finding(found), changed_box(case.clean, case.corrupt), _answer_colors(case))


def lens_finding(found: Quickstart) -> str:
    """From which layer on the last word says the answer (half of the final difference), and whether any patch ever does."""
    swing = found.importance.metric_clean - found.importance.metric_corrupt
    clean, corrupt = found.lenses["clean"], found.lenses["corrupt"]
    apart = {
        one.tower: (one.values - other.values)[:, ..., 0] / swing for one, other in zip(clean, corrupt, strict=True)
    }
    last = apart["language"][:, 0, -1]
    layers = clean[1].axes["layer"]
    first = next((layer for layer, share in zip(layers, last.tolist(), strict=True) if share >= 0.5), layers[-1])
    patches = torch.cat([apart[one.tower][:, one.places[..., 0] >= 0].flatten() for one in clean])
    where = (
        "at the last word from the input on" if first == "input" else f"at the last word from language layer {first} on"
    )
    also = "also at image patches" if float(patches.max()) >= 0.5 else "at no image patch"
    return f"{found.case.answer!r} or {found.case.foil!r} can be read {where}, {also}"


def changed_box(clean: Image.Image, corrupt: Image.Image) -> Box | None:
    """The smallest box (left, top, right, bottom, as shares of the image) around all pixels that differ.

    None for images of different sizes, equal images, and where the box is most of the image and would say nothing.
    """
    first, second = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (clean, corrupt))
    if first.shape != second.shape:
        return None
    rows, columns = np.nonzero(np.abs(first - second).max(-1))
    if len(rows) == 0:
        return None
    height, width = first.shape[:2]
    box = (columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height)
    return None if (box[2] - box[0]) * (box[3] - box[1]) > 0.5 else tuple(float(edge) for edge in box)  # type: ignore[return-value]


def _given_case(clean: Any, corrupt: Any, prompt: str | None, answer: str | None, foil: str | None) -> Case | None:
    parts = {"clean": clean, "corrupt": corrupt, "prompt": prompt, "answer": answer, "foil": foil}
    missing = [name for name, value in parts.items() if value is None]
    if len(missing) == len(parts):
        return None
    if missing:
        raise InputError(
            f"A case of your own needs clean, corrupt, prompt, answer and foil; missing: {', '.join(missing)}."
        )
    return Case(_open(clean), _open(corrupt), str(prompt), str(answer), str(foil))


def _open(image: str | Path | Image.Image) -> Image.Image:
    return pictures.prepared(image, channels=3)


def load_model(model: str | Path | Any, **options: Any) -> Any:
    """A wrapped model from the name of an organism, the name or folder of a checkpoint, or itself."""
    from circuitvision import organisms
    from circuitvision.model import HookedModel

    if not isinstance(model, str | Path):
        return model
    name, known = str(model), organisms.names()
    if name in known:
        return organisms.load(name, **options)
    meant = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if meant and not Path(name).exists():
        raise InputError(f"{name} is neither a folder nor a model that comes with circuitvision; is {meant[0]} meant?")
    return HookedModel.from_pretrained(model, **options)


def _check_towers(model: Any) -> None:
    if not {"vision", "language"} <= set(model.towers) or model.family.output != "logits":
        raise UnsupportedModelError(
            f"The quickstart needs a vision tower, a language tower and logits; a {model.family.name} model has "
            f"{', '.join(model.towers)} and returns {model.family.output}. Call circuitvision.circuits.head_importance for it instead."
        )


def _draw_pairs(model: str | Path | Any, count: int, seed: int) -> list[QuestionPair]:
    if str(model) != DEFAULT_MODEL:
        raise InputError(
            "Only shapes-llava comes with questions of its own; give clean, corrupt, prompt, answer and foil."
        )
    return held_out_pairs(count, seed)


def held_out_pairs(count: int, seed: int, kind: str = "color") -> list[QuestionPair]:
    """Pairs about objects of colour-shape pairs that the shapes models never saw in training, each pair equally often."""
    from circuitvision.data.questions import sample_question_pairs
    from circuitvision.data.scenes import TEST_PAIRS, TRAIN_PAIRS

    each = -(-count // len(TEST_PAIRS))
    rows = [
        sample_question_pairs(
            each, seed * len(TEST_PAIRS) + number, kind=kind, subjects=[subject], distractors=TRAIN_PAIRS
        )
        for number, subject in enumerate(TEST_PAIRS)
    ]
    return [pair for column in zip(*rows, strict=True) for pair in column][:count]


def _case_of(pair: QuestionPair) -> Case:
    return Case(pair.clean.image, pair.corrupt.image, pair.prompt, pair.answer, pair.foil)


def _read(model: Any, inputs: Mapping[str, Any], case: Case) -> Reading:
    with torch.no_grad():
        logits = model(inputs)
    shares = probabilities(metrics.at_position(logits, "last", inputs)[0], model.link)
    best = int(shares.argmax())
    word = str(model.tokenizer.decode([best])).strip() or model.pieces(torch.tensor([[best]]))[0][0]
    return Reading(word, float(shares[best]), *(float(shares[model.token(w)]) for w in (case.answer, case.foil)))


def _lenses(model: Any, inputs: Mapping[str, Any], case: Case) -> list[LensResult]:
    """The lens of both towers, answer against foil."""
    names = [name for tower in ("vision", "language") for name in lens_sites(model, tower)]
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=names)
    found = [
        logit_lens(model, cache, tower=tower, targets=[case.answer, case.foil]) for tower in ("vision", "language")
    ]
    return [lens.contrast(case.answer, case.foil) for lens in found]


def _check(model: Any, pairs: list[QuestionPair], importance: HeadImportance, seed: int) -> AblationCheck:
    return ablation_check(model, question_batches(model, pairs), leading_heads(importance), n_random=20, seed=seed)


def leading_heads(importance: HeadImportance, floor: float = 0.05, least: int = 2, most: int = 4) -> list[str]:
    """The heads worth ablating together: those that restore at least ``floor`` of the answer, between ``least`` and ``most``."""
    restoring = [(name, share) for name, share, _ in importance.ranking() if share > 0]
    return [name for number, (name, share) in enumerate(restoring[:most]) if number < least or share >= floor]


def question_batches(model: Any, pairs: list[QuestionPair], size: int = 64) -> list[PairBatch]:
    """Pairs of the scene generator as batches for :func:`circuitvision.circuits.ablation_check`."""
    batches = []
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        prompts = [pair.prompt for pair in some]
        batches.append(
            PairBatch(
                model.inputs(images=[pair.clean.image for pair in some], text=prompts),
                model.inputs(images=[pair.corrupt.image for pair in some], text=prompts),
                [pair.answer for pair in some],
                [pair.foil for pair in some],
            )
        )
    return batches


def _percent(share: float) -> str:
    from circuitvision.plots.style import signed_percent

    return signed_percent(share)


def _short(model_id: str) -> str:
    return Path(model_id).name or model_id
