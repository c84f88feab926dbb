"""What every measurement returns: a tensor with named axes, and where it came from.

A result is a frozen dataclass. ``values`` holds the numbers, ``axes`` names each dimension and labels every index of it, and ``provenance`` says
which model, data, metric and versions made it. Subclasses add fields; tensors among them are stored as tensors, everything else as JSON, so
``Result.load`` gives back the subclass that was saved without unpickling anything (:mod:`circuitvision.storage`).

Examples
    The axis of examples is called ``example`` and stands last in ``values``. Its labels are the numbers of the examples. A method that measures
    rows (several images, tiles or cameras of one example) has one entry per row, and the label repeats: rows of one example are not independent,
    so they are averaged before examples are compared (:mod:`circuitvision.statistics`). Results about weights have no such axis.

NaN
    A value that was not measured is NaN. It is left out of the mean of its example, and an example without any value is left out of everything
    that is said over examples: it never counts as 0. Frames and files keep it, as an empty cell in CSV.

Not covered: intervals of anything but means; weights of examples; results too large for memory.
"""

from __future__ import annotations

import dataclasses
import html
import importlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.digests import of_json, plain
from circuitvision.errors import InputError, nearest
from circuitvision.files import reading
from circuitvision.provenance import hash_inputs, hash_tensors, with_provenance, without_dates
from circuitvision.statistics import bootstrap_interval, by_example, standard_error
from circuitvision.storage import (
    FORMAT,
    HELD,
    INPUTS,
    as_builtin,
    read,
    restored,
    stored,
    stored_as,
    write,
    write_table,
)

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

ResultType = TypeVar("ResultType", bound="Result")
Groups = str | Mapping[Any, Any] | Sequence[Any] | Tensor | None
"""What groups examples: a field of the result, a mapping of examples to groups, or one group per row or per example."""
EXAMPLE = "example"


@dataclass(frozen=True, eq=False)
class Result:
    """Numbers with named axes.

    ``axes`` has one entry per dimension of ``values``, in order; its labels are strings, whole numbers, floats or booleans. The axis ``example``,
    where there is one, is the last.

    Raises:
        InputError: the axes do not describe the shape of ``values``, ``example`` is not the last, or another axis has a label twice.
    """

    values: Tensor
    axes: dict[str, list[Any]]
    provenance: dict[str, Any] = field(default_factory=dict)

    _classes: ClassVar[dict[str, type[Result]]] = {}
    _per_example: ClassVar[dict[str, int]] = {}
    """Further fields with an entry for each label of ``example``, or for each example, and the dimension that they have it in (of lists: 0)."""
    _of_first: ClassVar[tuple[str, ...]] = ()
    """Fields that describe the first examples: of results that are joined those of the first."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        Result._classes[cls.__name__] = cls
        if "__repr__" not in cls.__dict__:
            # A dataclass would print every tensor it holds.
            cls.__repr__ = Result.__repr__  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        axes = {str(name): [as_builtin(label) for label in labels] for name, labels in self.axes.items()}
        shape = tuple(len(labels) for labels in axes.values())
        if shape != tuple(self.values.shape):
            raise InputError(
                f"{type(self).__name__}: values have shape {tuple(self.values.shape)} but the axes "
                f"{', '.join(f'{name} ({len(labels)})' for name, labels in axes.items())} describe {shape}."
            )
        if EXAMPLE in axes and list(axes)[-1] != EXAMPLE:
            raise InputError(f"{type(self).__name__}: the axis of examples is the last, not of {', '.join(axes)}.")
        check_labels(axes)
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "provenance", as_builtin(dict(self.provenance)))

    def __repr__(self) -> str:
        said = [getattr(self, field, None) for field in ("tower", "site", "measure")]
        if "metric" not in self.axes:
            said.append(self.provenance.get("metric"))
        where = ", ".join(word for word in said if isinstance(word, str) and word)
        axes = " × ".join(f"{name} {len(labels)}" for name, labels in self.axes.items())
        return f"{type(self).__name__}({where}{': ' if where else ''}{axes})"

    def __provenance__(self) -> dict[str, Any]:
        """What it holds as a digest, and where that came from."""
        held = {
            entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name != "provenance"
        }
        return {"result": type(self).__name__, "sha256": of_json(plain(held)), "from": without_dates(self.provenance)}

    # -- over examples -------------------------------------------------------------------------------------------------------------------------

    @property
    def examples(self) -> list[Any]:
        """The examples, each once, in the order in which they were measured.

        Raises:
            InputError: a result without examples.
        """
        if EXAMPLE not in self.axes:
            raise InputError(
                f"A {type(self).__name__} has no examples (its axes are {', '.join(self.axes)}), so nothing to average over."
            )
        return list(dict.fromkeys(self.axes[EXAMPLE]))

    def mean(self, group: Groups = None, *, quantity: str = "values") -> Float[Tensor, "*axes"]:
        """The mean over examples, in float64: within each example first, then over those that have a value (NaN if none has).

        Args:
            group: then the mean of the groups' means: one group per example or per row, a mapping of examples to groups, or the name of a field
                that holds them (scenes, subjects: what is independent where examples are not).
            quantity: another field whose last dimension is that of examples, instead of ``values``.

        Raises:
            InputError: no examples, groups that do not fit, or no such quantity.
        """
        return self._units(group, quantity).nanmean(-1)

    def error(self, group: Groups = None, *, quantity: str = "values") -> Float[Tensor, "*axes"]:
        """The standard error of :meth:`mean` over examples (over groups): ``sd / √n`` with ``n − 1`` degrees of freedom; NaN for fewer than two."""
        return standard_error(self._units(group, quantity))

    def interval(
        self,
        level: float = 0.95,
        group: Groups = None,
        draws: int = 2000,
        seed: int = 0,
        *,
        quantity: str = "values",
    ) -> Tensor:
        """Low and high end ``[2 *axes]`` of a bootstrap interval of :meth:`mean`, whole examples (whole groups) drawn again; NaN for fewer than two.

        See :func:`bootstrap_interval`. All cells share their draws.
        """
        return bootstrap_interval(self._units(group, quantity), level, draws, seed)

    def _units(self, group: Groups = None, quantity: str = "values") -> Float[Tensor, "*axes unit"]:
        """What is independent: a quantity per example or per group, in float64."""
        examples, labels = self.examples, self.axes[EXAMPLE]
        found = getattr(self, quantity, None)
        if not isinstance(found, Tensor) or found.ndim == 0 or found.shape[-1] != len(labels):
            raise InputError(
                f"A {type(self).__name__} has no {quantity!r} with one entry per example in its last axis."
            )
        values = by_example(found.detach().cpu().double(), labels)
        if group is None:
            return values
        named = getattr(self, group, None) if isinstance(group, str) else group
        if named is None:
            raise InputError(
                f"A {type(self).__name__} has no field {group!r} that could group its examples: give one group per example (pairs.groups), a "
                f"mapping, or the name of a field{_fields_of_examples(self)}."
            )
        if isinstance(named, Mapping):
            missing = [example for example in examples if example not in named]
            if missing:
                raise InputError(f"group= names no group for example {missing[0]!r}.")
            return by_example(values, [as_builtin(named[example]) for example in examples])
        own = [as_builtin(one) for one in named]
        if len(own) == len(labels):
            pairs = dict.fromkeys(zip(labels, own, strict=True))
            if len(pairs) != len(examples):
                raise InputError("group= puts rows of one example into different groups.")
            own = [one for _, one in pairs]
        if len(own) != len(examples):
            raise InputError(f"group= has {len(own)} entries for {len(examples)} examples; give one per example.")
        return by_example(values, own)

    @with_provenance
    def take(self: ResultType, entries: int | Sequence[int]) -> ResultType:
        """Some entries of the axis ``example`` alone, counted from 0, with all that belongs to them (of an example: :meth:`entries`).

        Raises:
            InputError: no examples, or no such entry.
        """
        count = len(self.axes[EXAMPLE]) if self.examples else 0
        asked = [entries] if isinstance(entries, int) else entries
        chosen = [self._entry_number(entry) for entry in asked]
        if not chosen:
            raise InputError(f"take() needs at least one of the {count} entries.")
        labels = [self.axes[EXAMPLE][entry] for entry in chosen]
        kept = [self.examples.index(example) for example in dict.fromkeys(labels)]
        fields: dict[str, Any] = {}
        for name, value, dim in self._along_examples():
            size = value.shape[dim] if isinstance(value, Tensor) else len(value)
            own = chosen if size == count else kept
            fields[name] = (
                value.index_select(dim, torch.tensor(own, device=value.device))
                if isinstance(value, Tensor)
                else [value[number] for number in own]
            )
        axes = {**self.axes, EXAMPLE: labels}
        return dataclasses.replace(self, axes=axes, **fields)

    def entries(self, example: Any = None) -> list[int]:
        """Where an example stands on its axis (None: the first): in several places, where it has several images, tiles or cameras.

        Raises:
            InputError: no examples, or no such one.
        """
        label = self.axes[EXAMPLE][self.index_of(EXAMPLE, self.examples[0] if example is None else example)]
        return [number for number, own in enumerate(self.axes[EXAMPLE]) if own == label]

    def _entry_number(self, entry: int) -> int:
        """The same number, if there is such an entry on the axis ``example``; InputError if not."""
        count = len(self.axes.get(EXAMPLE, []))
        if isinstance(entry, bool) or not isinstance(entry, int | np.integer) or not 0 <= entry < count:
            raise InputError(
                f"There is no entry {entry!r} in this {type(self).__name__}; it has {count}, counted from 0."
            )
        return int(entry)

    def _along_examples(self) -> list[tuple[str, Any, int]]:
        """The fields with an entry per label of ``example``, or per example, that are not empty: name, value, and dimension."""
        found = [(name, getattr(self, name), dim) for name, dim in {"values": -1, **self._per_example}.items()]
        return [
            (name, value, dim) for name, value, dim in found if (value.numel() if isinstance(value, Tensor) else value)
        ]

    @classmethod
    @with_provenance
    def concat(cls: type[ResultType], results: Sequence[ResultType]) -> ResultType:
        """One result over the examples of several, in their order; the provenance of each is kept in ``provenance["parts"]``.

        Parts hold different examples. Where their numbers overlap (every part counts from 0), they are counted on.

        Raises:
            InputError: nothing to join; parts of other classes, models, methods, metrics, axes or settings; the same data twice.
        """
        from circuitvision.joining import joined

        return joined(cls, list(results))

    # -- tables and files ----------------------------------------------------------------------------------------------------------------------

    def to_frame(self, by_example: bool = False) -> pd.DataFrame:
        """One row per value: a column for each axis and the column ``value`` (long form, in row-major order). NaN is kept.

        With ``by_example`` one row per example: the column ``example``, and one for each component with the mean of the example's values.

        Raises:
            InputError: ``by_example`` of a result without examples.
        """
        if not by_example:
            return self._long_frame()
        import pandas as pd

        inner = [name for name in self.axes if name != EXAMPLE]
        tower = str(getattr(self, "tower", ""))
        columns = [
            component_name(inner, labels, tower) for labels in itertools.product(*(self.axes[name] for name in inner))
        ]
        values = self._units().reshape(len(columns), -1).T.numpy()
        frame = pd.DataFrame(values, columns=pd.Index([name or "value" for name in columns]))
        frame.insert(0, EXAMPLE, self.examples)
        return frame

    def mean_frame(self, group: Groups = None, level: float = 0.95, *, quantity: str = "values") -> pd.DataFrame:
        """One row per cell: a column for each axis, then ``mean``, ``error``, the ends ``low`` and ``high`` of the interval, and ``n``, how many
        examples (groups) have a value there.

        Raises:
            InputError: as of :meth:`mean` and :meth:`interval`.
        """
        import pandas as pd

        inner = {name: labels for name, labels in self.axes.items() if name != EXAMPLE}
        low, high = self.interval(level, group, quantity=quantity).reshape(2, -1).numpy()
        frame = pd.DataFrame(list(itertools.product(*inner.values())), columns=pd.Index(list(inner)))
        return frame.assign(
            mean=self.mean(group, quantity=quantity).flatten().numpy(),
            error=self.error(group, quantity=quantity).flatten().numpy(),
            low=low,
            high=high,
            n=(~self._units(group, quantity).isnan()).sum(-1).flatten().numpy(),
        )

    def _long_frame(self) -> pd.DataFrame:
        """The long form; subclasses add columns."""
        import pandas as pd

        places = np.indices(self.values.shape).reshape(self.values.ndim, -1)
        columns = {
            name: pd.Series(labels, dtype=None if labels else object).take(own).reset_index(drop=True)
            for (name, labels), own in zip(self.axes.items(), places, strict=True)
        }
        flat = self.values.detach().cpu()
        flat = flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat
        return pd.DataFrame({**columns, "value": flat.reshape(-1).numpy()})

    def plot(self, **keywords: Any) -> go.Figure:
        """The Plotly figure made for this kind of result; keywords go to it (a wrong one raises an InputError that lists them)."""
        from circuitvision import plots

        return plots.plot(self, **keywords)

    def save(
        self,
        path: str | Path,
        *,
        sources: bool = True,
        inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    ) -> Path:
        """Write this result to one ``.npz`` or ``.safetensors`` file, complete or not at all; returns the path.

        Edits are written as edits. The tensors that they hold come with them, once each; without ``sources`` only their digests do, and
        :func:`circuitvision.edits.restore` puts them back. Inputs are not kept by a result, only their digests: give them again to have them in the
        file (:func:`circuitvision.storage.inputs_of` reads them).

        A ``.csv`` or ``.parquet`` file (the latter needs pyarrow) holds the long form of :meth:`to_frame` for other programs, and not the result:
        Parquet keeps the provenance in its metadata, CSV has no place for it.

        Raises:
            InputError: another suffix, or inputs that are not those of this result.
        """
        path = Path(path)
        if path.suffix in (".csv", ".parquet"):
            if inputs is not None:
                raise InputError("A table holds values alone; save inputs with a .npz or .safetensors file.")
            return write_table(self.to_frame(), path, self.provenance)
        tensors, others = _split_fields(self, sources)
        given = [] if inputs is None else [inputs] if isinstance(inputs, Mapping) else list(inputs)
        if given and hash_inputs(*given) != self.provenance.get("dataset_sha256"):
            raise InputError("These are not the inputs that this result was measured on (in the order of the call).")
        for number, one in enumerate(given):
            named = {f"{INPUTS}{number}.{name}": v for name, v in one.items() if isinstance(v, Tensor)}
            tensors |= {name: tensor.detach().cpu() for name, tensor in named.items()}
        header = {
            "inputs": [{name: as_builtin(v) for name, v in one.items() if not isinstance(v, Tensor)} for one in given],
            "module": type(self).__module__,
            "format": FORMAT,
            "class": type(self).__name__,
            "dtypes": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
            "fields": others,
        }
        write(path, tensors, header)
        return path

    @classmethod
    def load(cls: type[ResultType], path: str | Path, objects: Mapping[str, Any] | None = None) -> ResultType:
        """Read what :meth:`save` wrote, as the class that was saved. Nothing is unpickled, and no function imported before it is used.

        ``objects`` gives back the dictionaries (SAEs, transcoders) that edits name.

        Raises:
            InputError: not a result file, or one of a class that is not a ``cls``.
        """
        path = Path(path)
        tensors, header = read(path)
        if header.get("format") != FORMAT:
            raise InputError(f"{path} is of format {header.get('format')!r}; this version reads {FORMAT!r}.")
        with reading(path, "a result"):
            found = _class_of(header["class"], str(header.get("module", "")))
            if found is None:
                raise InputError(f"{path} holds a {header['class']}; import the module that defines it before loading.")
            if not issubclass(found, cls):
                raise InputError(
                    f"{path} holds a {found.__name__}, not a {cls.__name__}; load it with {found.__name__}.load."
                )
            tensors = {name: tensor.to(getattr(torch, header["dtypes"][name])) for name, tensor in tensors.items()}
            held = {name.removeprefix(HELD): t for name, t in tensors.items() if name.startswith(HELD)}
            own: dict[str, Any] = {name: t for name, t in tensors.items() if not name.startswith((HELD, INPUTS))}
            fields = {name: restored(value, held, objects or {}) for name, value in header["fields"].items()}
            return found(**own, **fields)

    # -- labels and notebooks ------------------------------------------------------------------------------------------------------------------

    def index_of(self, axis: str, label: Any) -> int:
        """Where a label stands on an axis. A label that is not there is never taken for a place.

        Raises:
            InputError: no such axis or label; the nearest labels are named.
        """
        if axis not in self.axes:
            raise InputError(f"A {type(self).__name__} has no axis {axis!r}; its axes are {', '.join(self.axes)}.")
        labels, label = self.axes[axis], as_builtin(label)
        for number, known in enumerate(labels):
            if known == label and isinstance(known, bool) == isinstance(label, bool):
                return number
        raise InputError(
            f"There is no {axis} {label!r} in this {type(self).__name__}; {_nearest_labels(label, labels)}."
        )

    def component_scores(self) -> tuple[Tensor, tuple[str, ...]]:
        """What a ranking of components reads: one number per component and example, with this result's axes, and which of these are no components.

        Results with a baseline give the difference from it.

        Raises:
            InputError: a result without components.
        """
        return self.values, (EXAMPLE, "position", "step")

    def highlights(self) -> dict[str, str]:
        """What a reader wants to see first, by name, for the table that notebooks show; nothing by default."""
        return {}

    def _repr_html_(self) -> str:
        """A short table for notebooks: shape, range, highlights, and provenance without its hashes."""
        finite = self.values[torch.isfinite(self.values)]
        span = f"{finite.min():.4g} … {finite.max():.4g}" if finite.numel() else "no finite value"
        known = {key: value for key, value in self.provenance.items() if isinstance(value, str | int | float)}
        rows = {
            "axes": " × ".join(f"{name} {len(labels)}" for name, labels in self.axes.items()),
            "range": span,
            **self.highlights(),
            **{key: value for key, value in known.items() if value != "" and not key.endswith("sha256")},
        }
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(str(key))}</th><td style='text-align:left'>"
            f"{html.escape(str(value))}</td></tr>"
            for key, value in rows.items()
        )
        return f"<table><caption>{html.escape(type(self).__name__)}</caption>{cells}</table>"


# -- parts ---------------------------------------------------------------------------------------------------------------------------------------


def check_labels(axes: Mapping[str, Sequence[Any]]) -> None:
    """Raise InputError for a label that stands twice on an axis: it would name two entries. An example may have several rows."""
    for name, labels in axes.items():
        seen = Counter(map(repr, labels))
        if name != EXAMPLE and len(seen) < len(labels):
            twice = next(label for label, count in seen.items() if count > 1)
            raise InputError(f"The axis {name!r} has the label {twice} twice; every label names one entry.")


def component_name(axes: Sequence[str], labels: Sequence[Any], tower: str = "") -> str:
    """A component by its labels: "vision L1H3" for a head, "vision L2N118" for a neuron, the label alone of a single axis, else
    "layer 1, position 4".

    The tower is the label of an axis ``tower``, else the one given.
    """
    from circuitvision.model.names import head_name, spelled, unit_id

    found = {"tower": tower, **dict(zip(axes, labels, strict=True))}
    tower, parts = str(found.pop("tower")), []
    if {"layer", "head"} <= found.keys():
        parts.append(head_name(found.pop("layer"), found.pop("head"), tower))
    elif {"layer", "unit"} <= found.keys() and tower:
        parts.append(spelled(unit_id(tower, int(found.pop("layer")), found.pop("unit"))))
    elif {"layer", "neuron"} <= found.keys():
        parts.append(f"{tower} L{found.pop('layer')}N{found.pop('neuron')}".lstrip())
    elif len(found) == 1:
        return str(labels[0])
    return ", ".join([*parts, *(f"{axis} {label}" for axis, label in found.items())])


def _fields_of_examples(result: Result) -> str:
    """The fields that hold one word or number per entry of the axis of examples, in brackets."""
    count, found = len(result.axes[EXAMPLE]), []
    for entry in dataclasses.fields(result):
        value = getattr(result, entry.name)
        if isinstance(value, list | tuple) and len(value) == count:
            found.append(entry.name)
    return f" ({', '.join(found)})" if found else ""


def _nearest_labels(label: Any, labels: list[Any], count: int = 5) -> str:
    """Labels like one that is missing, in words."""
    if len(labels) <= count:
        return f"there are {', '.join(map(repr, labels))}" if labels else "there are none"
    numbers = [known for known in labels if isinstance(known, int | float) and not isinstance(known, bool)]
    if isinstance(label, int | float) and numbers:
        near = sorted(numbers, key=lambda known: abs(known - label))[:count]
    else:
        words = {str(known): known for known in labels}
        near = [words[word] for word in nearest(str(label), words, count)]
    return f"nearest of {len(labels)}: {', '.join(map(repr, near))}"


def _split_fields(result: Result, sources: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a result, those that its edits hold among them, and its other fields in JSON form."""
    tensors: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for entry in dataclasses.fields(result):
        value = getattr(result, entry.name)
        if isinstance(value, Tensor):
            tensors[entry.name] = value.detach().cpu()
        else:
            others[entry.name] = stored(value, held, sources)
    tensors |= {f"{HELD}{name}": tensor.detach().cpu() for name, tensor in held.items()}
    return tensors, others


def _class_of(name: str, module: str) -> type[Result] | None:
    """The class of a result by its name; None where its module was not imported."""
    if module.startswith("circuitvision."):
        # By its name: a class may be at home in another module than when the file was written.
        getattr(importlib.import_module("circuitvision"), name, None)
    return Result._classes.get(name, Result if name == "Result" else None)


def _write_inner(value: Result, tensors: dict[str, Tensor], sources: bool) -> dict[str, Any]:
    """A result that another one holds."""
    fields = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    own = {name: held for name, held in fields.items() if isinstance(held, Tensor)}
    names = {name: hash_tensors({name: held}) for name, held in own.items()}
    tensors |= {names[name]: held for name, held in own.items()}
    others = {name: stored(held, tensors, sources) for name, held in fields.items() if name not in own}
    return {"class": type(value).__name__, "module": type(value).__module__, "tensors": names, "fields": others}


def _read_inner(data: Mapping[str, Any], tensors: Mapping[str, Tensor], objects: Mapping[str, Any]) -> Result:
    """Raises InputError where the module that defines its class was not imported."""
    found = _class_of(data["class"], data["module"])
    if found is None:
        raise InputError(f"It holds a {data['class']}; import the module that defines it before loading.")
    own: dict[str, Any] = {name: tensors[key] for name, key in data["tensors"].items()}
    return found(**own, **{name: restored(value, tensors, objects) for name, value in data["fields"].items()})


stored_as("result", Result, _write_inner, _read_inner)
