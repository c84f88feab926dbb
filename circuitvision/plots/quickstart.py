"""The files of the main job: the graph, the figures, and the report that puts what a reader must know first above all of it.

Titles and texts are made from findings (:mod:`circuitvision.findings`): what the model does not do is not affirmed anywhere on the page.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitvision.circuits import export
from circuitvision.plots import graph as graph_figures
from circuitvision.plots import heads as head_figures
from circuitvision.plots import report as reports
from circuitvision.plots import style
from circuitvision.plots.lens_rows import LensRow, lens_rows

if TYPE_CHECKING:
    from PIL import Image

    from circuitvision.quickstart import Case, Quickstart

Box = tuple[float, float, float, float]


def write(found: Quickstart, folder: str | Path) -> list[Path]:
    """Write ``circuit.graphml``, ``circuit.json``, ``heads.html``, ``lens.html`` and ``report.html``; returns the paths."""
    folder = Path(folder)
    case = found.case
    lens = _lens_figure(found)
    findings, name = found.findings(), _short(found.importance.provenance["model_id"])
    lead = html.escape(found.head_finding())
    heads = head_figures.head_importance(found.importance, lead)
    asked = " and ".join(map(repr, case.names))
    verb = case.kind.says.removesuffix("s")
    title = f"What makes {name} {verb} {case.answer!r}?" if findings["answers"].holds else f"{name} on {asked}"
    circuit = graph_figures.circuit(
        found.graph, None if findings["heads"].holds else f"Effects on {asked} and their ways"
    )
    count = found.importance.n_examples
    over = "" if count == 1 else f" Means over {count} pairs, of which the first is shown."
    texts = {name: text + over for name, text in _TEXTS.items()}
    sections = [
        reports.Section("What every head does on its own", texts["heads"], heads),
        reports.Section("Which way the effects go", texts["circuit"], circuit),
        reports.Section(f"Where {asked} are told apart", _lens_text(found), lens),
    ]
    if found.check is not None:
        figure = head_figures.ablation(found.check)
        text = f"{found.check.summary()} {findings['carries']}"
        sections.append(reports.Section("What ablating these heads together costs", text, figure))
    pictures = [
        reports.Picture(case.clean, f"clean: {found.readings['clean']}"),
        reports.Picture(case.corrupt, f"corrupt: {found.readings['corrupt']}"),
    ]
    page = reports.Report(
        title,
        found.finding(cautions=False),
        _asked(case),
        pictures,
        sections,
        ("head", "tower", "share moved"),
        found.table(),
        found.cautions(),
        found.importance.provenance,
    )
    return [
        export(found.graph, folder / "circuit.graphml"),
        export(found.graph, folder / "circuit.json"),
        style.write_figures(folder / "heads.html", title, [heads], texts["heads"]),
        style.write_figures(folder / "lens.html", title, [lens], _lens_text(found)),
        reports.write(page, folder / "report.html"),
    ]


_TEXTS = {
    "heads": "One head at a time takes its clean value, at all positions, in the run on the corrupt image. 0% leaves the metric as it "
    "is there, 100% is the clean run's, more is beyond it. Effects overlap, so they need not add up to 100%.",
    "circuit": "Disk area is what patching the head moves on its own. A line is the part of that effect which reaches its right end "
    "without passing another drawn node; the lines that leave a node add up to its effect.",
}


def _asked(case: Case) -> tuple[str, str]:
    """What the model is asked beside the images, and what that is called; empty where it is asked nothing."""
    if case.kind.prompted:
        return "prompt", case.prompt
    return (case.kind.plural, f"{case.answer}\n{case.foil}") if case.kind.needs else ("", "")


def _lens_text(found: Quickstart) -> str:
    case, last = found.case, found.lenses["clean"][-1]
    first, second = case.names
    paint = (
        f"in the colour of the higher {case.kind.noun}"
        if _answer_colors(case)
        else f"orange for {first}, blue for {second}"
    )
    through = [f"The {tower} tower is read through {ways}." for tower, ways in found.read_through.items()]
    read = (
        "of the pooled output, which gives the answer"
        if last.pooled.numel()
        else "at the prompt's last word, where the answer is read"
    )
    said = [
        f"Which of {first!r} and {second!r} stands higher at each patch if the model stopped there: {paint}, fainter the less they are apart.",
        f"The {case.kind.plural} need not be what the model answers.",
        *through,
        f"The box marks the pixels that differ; under the {last.tower} maps, the same reading {read}.",
    ]
    return " ".join(said)


def _answer_colors(case: Case) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    """The colours that the foil and the answer name, where they are names of colours."""
    from circuitvision.data.scenes import COLORS

    answer, foil = case.names
    return (COLORS[foil], COLORS[answer]) if {answer, foil} <= set(COLORS) else None


def _lens_figure(found: Quickstart) -> Any:
    case = found.case
    rows = [
        LensRow(name, np.asarray(image.convert("RGB")), found.lenses[name])
        for name, image in (("clean", case.clean), ("corrupt", case.corrupt))
    ]
    return lens_rows(rows, found.lens_finding(), changed_box(case.clean, case.corrupt), _answer_colors(case))


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


def _short(model_id: str) -> str:
    return Path(model_id).name or model_id
