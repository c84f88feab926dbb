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

import torch
from PIL import Image

from circuitvision import findings, metrics
from circuitvision.circuits import (
    AblationCheck,
    HeadImportance,
    ablation_check,
    head_importance,
    parse_id,
)
from circuitvision.data.generated import of_questions
from circuitvision.errors import InputError, UnsupportedModelError, checked_seed
from circuitvision.findings import Finding
from circuitvision.links import probabilities
from circuitvision.model import pictures
from circuitvision.model.names import head_name
from circuitvision.plots.quickstart import changed_box, write
from circuitvision.plots.style import signed_percent
from circuitvision.readout import logit_lens
from circuitvision.readout.lens.result import LensResult

if TYPE_CHECKING:
    import networkx as nx

    from circuitvision.data.questions import QuestionPair

__all__ = [
    "Case",
    "Quickstart",
    "Reading",
    "changed_box",
    "held_out_pairs",
    "leading_heads",
    "lens_finding",
    "quickstart",
    "write",
]

DEFAULT_MODEL = "shapes-llava"
DEFAULT_OUT = "circuitvision-quickstart"
CHECK_PAIRS = 64


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
    chance: float = 0.0
    """The probability of each word if all were alike."""

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
        """The strongest heads as (head, tower, share moved), strongest first; "–" where the swing is too small for shares."""
        rows, told = [], findings.has_shares(self.importance)
        for name, share, _ in self.importance.ranking()[:count]:
            node = parse_id(name)
            rows.append((head_name(node.layer, node.head), node.tower, signed_percent(share) if told else "–"))
        return rows

    def findings(self) -> dict[str, Finding]:
        """What was found, as values with their numbers: whether the model gives the answers asked about, how far the metric swings, what the best
        head and all selected heads move, where the words are told apart, and whether ablating the heads costs the answer.
        """
        case, words = self.case, (self.case.answer, self.case.foil)
        asked = findings.answers(self.readings["clean"], self.readings["corrupt"], case.answer, case.foil)
        clean, corrupt = self.lenses["clean"], self.lenses["corrupt"]
        found = {
            "answers": asked,
            "swing": findings.swing(self.importance),
            "head": findings.best_head(self.importance, asked),
            "heads": findings.together(self.importance, asked),
            "past vision": findings.past_vision(self.importance, asked),
            "last word": findings.read_at_last_word(clean[-1], corrupt[-1], asked, words),
            "patches": findings.read_at_patches(clean, corrupt, asked, words),
        }
        return found if self.check is None else {**found, "carries": findings.carries(self.check)}

    def finding(self, cautions: bool = True) -> str:
        """The result in a few sentences, what must be known first in front; without ``cautions`` where those already stand above."""
        found, said = self.findings(), ("answers", "swing", "head", "heads", "past vision")
        told = [] if cautions else self.cautions()
        return " ".join(text for text in (str(found[name]) for name in said) if text and text not in told)

    def lens_finding(self) -> str:
        """From which layer on the last word tells answer and foil apart, and whether any patch does."""
        found = self.findings()
        return f"{found['last word']}, {found['patches']}" if found["last word"].holds else str(found["last word"])

    def cautions(self) -> list[str]:
        """What a reader should know before believing the result; empty when all is as asked."""
        found = self.findings()
        said = [str(found[name]) for name in ("answers", "swing") if not found[name].holds]
        if found["swing"].value < 0:
            said.append(
                f"The model leans more to {self.case.answer!r} on the corrupt image than on the clean one, so what moves here is its "
                f"leaning to {self.case.foil!r}; swap the images or the words."
            )
        said += [str(found[name]) for name in ("head", "heads") if "overshoots" in found[name].reason]
        return said


def lens_finding(found: Quickstart) -> str:
    """See :meth:`Quickstart.lens_finding`."""
    return found.lens_finding()


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
    importance = head_importance(hooked, metric=metric, clean=runs["clean"], corrupt=runs["corrupt"], top_k=top_k)
    check = _check(hooked, pairs[1:], importance, seed) if pairs else None
    found = Quickstart(case, importance, importance.to_networkx(), lenses, check, readings)
    files = write(found, folder)
    return Quickstart(case, importance, found.graph, lenses, check, readings, files, time.perf_counter() - started)


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
    from circuitvision.hooked import HookedModel

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
    said = str(model.tokenizer.decode([best])).strip() or model.pieces(torch.tensor([[best]]))[0][0]
    answer, foil = (float(shares[model.token(word)]) for word in (case.answer, case.foil))
    return Reading(said, float(shares[best]), answer, foil, 1.0 / len(shares))


def _lenses(model: Any, inputs: Mapping[str, Any], case: Case) -> list[LensResult]:
    """The lens of both towers, answer against foil."""
    names = [name for tower in ("vision", "language") for name in model.towers[tower].stream_sites()]
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=names)
    contrast = (case.answer, case.foil)
    found = [logit_lens(model, cache, tower=tower, targets=contrast) for tower in ("vision", "language")]
    return [lens for lens in found if isinstance(lens, LensResult)]


def _check(model: Any, pairs: list[QuestionPair], importance: HeadImportance, seed: int) -> AblationCheck:
    return ablation_check(model, of_questions(pairs), leading_heads(importance), n_random=20, seed=seed)


def leading_heads(importance: HeadImportance, floor: float = 0.05, least: int = 2, most: int = 4) -> list[str]:
    """The heads worth ablating together: those that restore at least ``floor`` of the answer, between ``least`` and ``most``."""
    restoring = [(name, share) for name, share, _ in importance.ranking() if share > 0]
    return [name for number, (name, share) in enumerate(restoring[:most]) if number < least or share >= floor]
