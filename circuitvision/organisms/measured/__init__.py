"""What a trained ``scenes-llava`` does inside, measured for its card.

``measure(folder)`` answers four questions, each in a module of its own, and says whether the two conditions that the model has to meet hold:

* ``answers``: what is left of the accuracy when the vision tower's attention is ablated, beside the best guess from the text;
* ``heads``: which single heads of either tower carry the answer of a minimal pair, and what groups of heads do together;
* ``depth``: what a logit lens and a linear probe read at an object's patches, layer by layer;
* ``regions``: how the answer changes when parts of the picture are replaced.

All of it goes through the library's own functions, over data sets drawn by seed. The result is plain numbers, text, lists and dicts; a number that is
undefined is NaN beside a ``reason``. :func:`~circuitvision.organisms.measured.tables.markdown` writes it as tables.

Not covered: other organisms than ``scenes-llava``, other seeds of the training run (measure each folder), what MLPs do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitvision.data.binding import TRAIN_PAIRS
from circuitvision.errors import InputError, checked_seed
from circuitvision.organisms import registry
from circuitvision.organisms.measured import answers, depth, heads, regions
from circuitvision.organisms.measured.drawing import paired
from circuitvision.progress import verbosity
from circuitvision.provenance import hash_weights, versions

if TYPE_CHECKING:
    from circuitvision.hooked import HookedModel

__all__ = ["measure"]


def measure(
    folder_or_name: str | Path | HookedModel,
    *,
    pairs: int = 200,
    questions: int = 400,
    reference: int = 600,
    texts: int = 20_000,
    scenes: int = 600,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a trained model; the result is ready for JSON.

    Args:
        folder_or_name: a ``from_pretrained`` folder with its processor, the name of an organism, or a model that is loaded already.
        pairs: how many minimal pairs of every kind of question, all of them answered right on both sides.
        questions: how many questions of every kind are answered.
        reference: over how many other scenes a mean goes that takes the place of an activation.
        texts: on how many other examples the guess from the text is fitted.
        scenes: how many scenes of trained pairs a probe is fitted on; it is tested on half as many of held-out pairs.
        seed: of all that is drawn.
        progress: whether progress is shown.

    Raises:
        InputError: no such folder or name, a number below 2, or fewer scenes than there are trained pairs.
    """
    counts = {"pairs": pairs, "questions": questions, "reference": reference, "texts": texts, "scenes": scenes}
    for name, count in counts.items():
        least = len(TRAIN_PAIRS) if name == "scenes" else 2
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise InputError(f"{name}={count!r} is not understood: a whole number from {least}.")
    checked_seed(seed)
    model = _loaded(folder_or_name)
    seconds: dict[str, float] = {}
    with nullcontext() if progress else verbosity("quiet"):
        with _timed(seconds, "answers"):
            told = answers.measure(model, questions, reference, texts, seed)
        with _timed(seconds, "heads"):
            asked = paired(model, pairs, seed)
            carried = heads.measure(model, asked)
        with _timed(seconds, "regions"):
            replaced = regions.measure(model, asked)
        with _timed(seconds, "depth"):
            read = depth.measure(model, scenes, min(questions, depth.ASKED), seed)
    found = {
        "model": {"weights_sha256": hash_weights(model.module), "versions": versions()},
        "settings": {**counts, "seed": seed},
        "answers": told,
        "heads": carried,
        "regions": replaced,
        "depth": read,
        "conditions": {"vision attention": answers.condition(told), "heads": heads.condition(carried)},
        "cpu_seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    return plain(found)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.process_time()
    yield
    seconds[name] = time.process_time() - started


def _loaded(given: Any) -> HookedModel:
    from circuitvision.hooked import HookedModel

    if isinstance(given, HookedModel):
        return given
    if isinstance(given, str) and given in registry.TABLE:
        return registry.load(given)
    folder = Path(given)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{given} is neither a model's folder nor an organism; organisms are {', '.join(registry.names())}."
        )
    return HookedModel.from_pretrained(folder)


def plain(value: Any) -> Any:
    """Nested numbers as builtins of four decimals."""
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    return round(float(value), 4) + 0.0
