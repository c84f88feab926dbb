"""One reader for every file that this package writes: it looks at the file and hands it to the class that wrote it.

Results (``.npz``, ``.safetensors``), caches, vectors collected for probes, edits (``.yaml``, ``.json``), circuit graphs (``.json``, ``.graphml``),
and tables of results (``.csv``, ``.parquet``), which come back as frames: a table holds the values of a result and not the result. What a file holds
is read from its content; its name only tells tables and graphs in text form apart. Nothing is unpickled.

Not covered: models and data sets, which have loaders of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitvision.errors import InputError
from circuitvision.files import format_of, reading

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped

_READS = "results, caches, collected vectors, edits, graphs and tables"


def load(
    path: str | Path,
    *,
    model: Wrapped | None = None,
    inputs: Mapping[str, Any] | None = None,
    objects: Mapping[str, Any] | None = None,
) -> Any:
    """What a file holds: a result, an :class:`ActivationCache`, ``Collected`` vectors, a list of edits, a graph, or a frame.

    Args:
        path: the file. Of edits the text; the ``.safetensors`` file beside it belongs to it.
        model: of a cache, which then gives derived sites and read-outs.
        inputs: of a cache, those of its run.
        objects: name → dictionary (SAE, transcoder), for edits and for results that hold some.

    Raises:
        InputError: no such file, a file of nothing that this package writes, or an argument that this file has no use for.
    """
    path = Path(path)
    kind = format_of(path)
    if kind == "safetensors":
        kind = _kind_of_tensors(path)
    elif kind == "text":
        kind = _kind_of_text(path)
    if kind != "cache" and (model is not None or inputs is not None):
        raise InputError(f"model= and inputs= belong to a cache; {path.name} holds {kind or 'none'}.")
    if kind == "cache":
        from circuitvision.model.cache import ActivationCache

        return ActivationCache.load(path, model, inputs)
    if kind in ("npz", "result"):
        from circuitvision.results import Result

        return Result.load(path, objects)
    if kind == "collected":
        from circuitvision.readout.probes.collected import Collected

        return Collected.load(path)
    if kind == "edits":
        from circuitvision.model.edits import files

        return files.load(path, objects)
    if kind == "graph":
        from circuitvision.circuits.export import load as load_graph

        return load_graph(path)
    if kind in ("csv", "parquet"):
        import pandas as pd

        with reading(path, "a table"):
            return pd.read_csv(path) if kind == "csv" else pd.read_parquet(path)
    raise InputError(f"{path} is none of the files that circuitvision writes: {_READS}.")


def _kind_of_tensors(path: Path) -> str:
    from safetensors import safe_open

    with reading(path, "tensors of circuitvision"), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        told = str(metadata.get("format") or json.loads(metadata.get("circuitvision_json", "{}")).get("format"))
    for name in ("result", "cache", "collected"):
        if told.startswith(f"circuitvision.{name}/"):
            return name
    text = [beside for suffix in (".yaml", ".yml", ".json") if (beside := path.with_suffix(suffix)).is_file()]
    hint = f" It may belong to the edits of {text[0].name}; load that file." if text else ""
    raise InputError(f"{path} holds tensors that circuitvision did not name.{hint}")


def _kind_of_text(path: Path) -> str:
    if path.suffix == ".csv":
        return "csv"
    if path.suffix == ".graphml":
        return "graph"
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        with path.open(encoding="utf-8") as file:
            return "edits" if any(line.startswith("format: circuitvision.edits/") for line in file) else ""
    except (UnicodeDecodeError, RecursionError):
        return ""
    if not isinstance(data, dict):
        return ""
    return (
        "edits"
        if str(data.get("format", "")).startswith("circuitvision.edits/")
        else "graph"
        if "links" in data
        else ""
    )
