"""Which organisms exist, where their weights lie, and how each is loaded, trained and scored.

An *organism* is a small model of a real transformers class, trained on a synthetic task whose ground truth is known. :data:`TABLE` is the
single list: a name maps to a module that is imported when it is first needed, so listing names costs nothing. Such a module offers

``train(seed: int, out_dir: Path, *, steps: int | None = None, progress: bool = True) -> dict``
    trains from scratch, writes a ``from_pretrained`` folder to ``out_dir`` and returns what :func:`evaluate` returns for it;
``evaluate(folder: Path, *, count: int = ..., seed: int = ...) -> dict``
    scores the model in ``folder`` on examples it never saw; every key is a plain string and every value a plain number or string;
``pairs(count: int, seed: int, **options) -> Pairs`` (may be left out)
    draws minimal pairs of its own task about compositions that it never saw in training, with answers and foils in the model's own terms.

``steps`` shortens a training run (tests do that); without it the recipe of the card runs.

Adding an organism is one row of :data:`TABLE` plus its module and its folder under ``assets/organisms``.
Not covered: downloading. The weights of every organism are a part of the package.
"""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from circuitvision.errors import InputError, checked_seed, nearest

if TYPE_CHECKING:
    from circuitvision.data import Pairs
    from circuitvision.hooked import HookedModel


@dataclass(frozen=True)
class Organism:
    """One row of the table: the module that trains and scores the organism, its transformers class, and its task."""

    module: str
    model_class: str
    task: str


TABLE: dict[str, Organism] = {
    "shapes-vit": Organism(
        "circuitvision.organisms.shapes_vit",
        "ViTForImageClassification",
        "name the shape of the largest object",
    ),
    "shapes-clip": Organism(
        "circuitvision.organisms.shapes_clip",
        "CLIPModel",
        "match a scene with the caption that describes it",
    ),
    "shapes-llava": Organism(
        "circuitvision.organisms.shapes_llava",
        "LlavaForConditionalGeneration",
        "answer questions about colour, shape and position of the objects in a scene",
    ),
    "scenes-vit": Organism(
        "circuitvision.organisms.scenes_vit",
        "ViTForImageClassification",
        "name the shape of the one large object",
    ),
    "spurious-vit": Organism(
        "circuitvision.organisms.spurious_vit",
        "ViTForImageClassification",
        "name the shape of an object, on pictures whose background went with the label in training",
    ),
    "scenes-clip": Organism(
        "circuitvision.organisms.scenes_clip",
        "CLIPModel",
        "match a scene with the caption that describes two of its three objects",
    ),
    "scenes-llava": Organism(
        "circuitvision.organisms.scenes_llava",
        "LlavaForConditionalGeneration",
        "answer questions about colour, shape, relation and number of the objects in a scene",
    ),
    "reach-pi0": Organism(
        "circuitvision.organisms.reach_pi0",
        "PI0ForConditionalGeneration",
        "reach the object that the instruction names, in closed loop",
    ),
}

DEFAULT = "scenes-llava"
"""The organism that is meant where none is named."""
PACKAGE = Path(__file__).resolve().parent.parent


def names() -> list[str]:
    """The names of all organisms, in the order of the table."""
    return list(TABLE)


def entry(name: str) -> Organism:
    """The table row of ``name``.

    Raises:
        InputError: no organism has that name (the nearest names are given).
    """
    if name not in TABLE:
        raise InputError(f"no organism is called {name!r}; nearest: {', '.join(nearest(name, TABLE))}")
    return TABLE[name]


def module(name: str) -> ModuleType:
    """The module that trains and scores ``name``, imported on first use."""
    return importlib.import_module(entry(name).module)


def assets_root() -> Path:
    """The folder that holds every organism's folder.

    An installed wheel carries it inside the package (``circuitvision/_assets``); in a checkout it is ``assets`` beside the package.

    Raises:
        InputError: neither exists, so the package was installed without its data files.
    """
    candidates = [PACKAGE / "_assets" / "organisms", PACKAGE.parent / "assets" / "organisms"]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise InputError(
        f"the organisms' weights are missing: looked for {' and '.join(map(str, candidates))}; "
        "reinstall circuitvision from a wheel or from a complete clone"
    )


def path(name: str) -> Path:
    """The folder with the weights, configuration, processor and card of ``name``, for any ``from_pretrained``.

    Raises:
        InputError: unknown name, or the weights are missing (the message gives the command that trains them).
    """
    entry(name)
    folder = assets_root() / name
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{name} has no weights in {folder}; train them: circuitvision organisms train {name} --out {folder}"
        )
    return folder


def card(name: str) -> dict[str, Any]:
    """What the card beside the weights records: data, seeds, held-out and trained accuracy, command, minutes.

    Raises:
        InputError: unknown name, or no card beside the weights.
    """
    file = path(name) / "card.json"
    if not file.is_file():
        raise InputError(f"{name} has no card.json beside its weights in {file.parent}")
    return json.loads(file.read_text(encoding="utf-8"))


def load(name: str, **options: Any) -> HookedModel:
    """The organism as a :class:`~circuitvision.model.HookedModel`, with its processor, ready to run.

    ``options`` (dtype, device, ...) go to ``HookedModel.from_pretrained``. Scene questions and captions for it come from
    :mod:`circuitvision.data`.

    Raises:
        InputError: unknown name, or the weights are missing.
    """
    folder = path(name)
    from circuitvision.hooked import HookedModel

    return HookedModel.from_pretrained(folder, **options)


def has_pairs(name: str) -> bool:
    """Whether ``name`` comes with pairs of its own."""
    return hasattr(module(name), "pairs")


def pairs(name: str, count: int, seed: int = 0, **options: Any) -> Pairs:
    """Minimal pairs of the organism's own task, about compositions that it never saw in training.

    ``options`` go to the organism's own ``pairs``: ``change`` and ``dim`` of reach-pi0 (what differs, and along which dimension of the action).

    Raises:
        InputError: unknown name, an organism without pairs of its own, or an option that they do not have.
    """
    if not has_pairs(name):
        with_pairs = ", ".join(filter(has_pairs, TABLE))
        raise InputError(f"{name} comes with no pairs of its own; those that do: {with_pairs}.")
    own = module(name).pairs
    known = [key for key in inspect.signature(own).parameters if key not in ("count", "seed")]
    if unknown := [key for key in options if key not in known]:
        raise InputError(f"The pairs of {name} have no option {unknown[0]!r}; {', '.join(known) or 'they have none'}.")
    return own(count, checked_seed(seed), **options)


def train(
    name: str, seed: int = 0, out: str | Path | None = None, steps: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Train ``name`` from scratch and return its scores; the folder is written only when training has finished.

    Args:
        seed: of the initial weights and of the training stream.
        out: folder to write; ``./{name}-seed{seed}`` if not given. An existing organism there is replaced.
        steps: a shorter run than the recipe's, for trying things out.
        progress: show a progress bar and print the held-out scores at the end.

    Raises:
        InputError: unknown name, a seed or a number of steps below 0, or ``out`` is a file or a folder that holds something else than a model.
    """
    trainer = module(name)
    checked_seed(seed)
    if steps is not None and steps < 1:
        raise InputError(f"steps={steps} trains nothing; give 1 or more, or leave it out.")
    target = Path(out) if out is not None else Path(f"{name}-seed{seed}")
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file()):
        raise InputError(f"{target} exists and is not a model folder; give another folder as out")
    return trainer.train(seed, target, steps=steps, progress=progress)


def evaluate(name: str, folder: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Score ``name`` on held-out examples: the shipped weights, or those in ``folder``.

    ``options`` (``count``, ``seed``) go to the organism's own ``evaluate``.
    """
    return module(name).evaluate(Path(folder) if folder is not None else path(name), **options)
