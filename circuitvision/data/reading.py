"""Pairs from what lies on disk: a folder of pictures with a CSV or JSONL table, or a Hugging Face data set.

A table has one row per pair, and these columns (``columns={"image": "photo"}`` says what another table calls them):

======================================  ====================================================================================================
``image``, ``corrupt_image``            the pictures; what has no ``corrupt_`` column is the same on both sides
``text``, ``corrupt_text``              the prompts; a list of texts to compare the image with (JSONL and data sets)
``answer``, ``foil``                    words; in a CSV, ids stand in columns ``answer_id`` and ``foil_id``, because a word may be a digit
``group``                               what belongs together
``box``, ``corrupt_box``                left, top, right, bottom in pixels (four numbers in a CSV)
``mask``, ``corrupt_mask``              pictures of one channel, above 0 inside
======================================  ====================================================================================================

Pictures are opened when they are needed. Columns of other names are left alone; one whose name is close to one of ours that the table lacks
(``corupt_image``) is taken for a slip and refused, unless ``columns={"corrupt_image": None}`` says that there is none.

Not covered: pictures inside archives, and data sets that stream (they have no length).
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from circuitvision.data.pairs import Pairs
from circuitvision.data.sides import Stored, opened
from circuitvision.errors import InputError

SHARED = {"answer": "answers", "foil": "foils", "group": "groups"}
OF_A_SIDE = {"image": "images", "text": "texts", "box": "boxes", "mask": "masks"}
_CLOSE = 0.8
"""From which share of common letters on a column's name is taken for a slip of one of ours."""
NAMES = (*(side + name for name in OF_A_SIDE for side in ("", "corrupt_")), *SHARED, "answer_id", "foil_id")


def from_folder(folder: Any, table: str = "pairs.csv", columns: Mapping[str, str | None] | None = None) -> Pairs:
    """Pairs from a folder with a table, see the module for its columns.

    Raises:
        InputError: no such file, another suffix, a slip in the name of a column, a row that cannot be read, a picture that is not there.
    """
    path = Path(folder).expanduser() / table
    if not path.is_file():
        raise InputError(f"There is no file {path}; a folder of pairs holds a table pairs.csv or pairs.jsonl.")
    rows = _csv(path) if path.suffix == ".csv" else _jsonl(path) if path.suffix == ".jsonl" else None
    if rows is None:
        raise InputError(f"{path.name} is no table that is read here: give a .csv or .jsonl file.")
    if not rows:
        raise InputError(f"{path} holds no row.")
    names = _names({name: None for row in rows for name in row}, columns)
    found = {
        name: [_cell(row, own, path.name, number) for number, row in enumerate(rows, 1)] for name, own in names.items()
    }
    for name, column in found.items():
        if name.endswith("image"):
            found[name] = [_located(path.parent, one, number) for number, one in enumerate(column, 1)]
        elif name.endswith("mask"):
            found[name] = [_mask(_located(path.parent, one, number), number) for number, one in enumerate(column, 1)]
        elif name.endswith("_id"):
            found[name] = [_id(one, name, number) for number, one in enumerate(column, 1)]
        elif name.endswith("box"):
            found[name] = [_box(one, name, number) for number, one in enumerate(column, 1)]
    return _pairs(found)


def from_dataset(dataset: Any, columns: Mapping[str, str | None] | None = None) -> Pairs:
    """Pairs from a data set with a length whose items are mappings, see the module; its pictures are fetched when they are needed.

    Raises:
        InputError: a data set without a length, without the columns named, or with a slip in the name of one.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(
            f"A {type(dataset).__name__} has no length or no items by number; load it whole (streaming=False)."
        )
    if isinstance(dataset, Mapping) or hasattr(dataset, "iloc"):
        raise InputError(
            f"A {type(dataset).__name__} is a table by columns; give a list of rows (of a data frame: frame.to_dict('records'))."
        )
    if not len(dataset):
        raise InputError("The data set holds no row.")
    known = getattr(dataset, "column_names", None)
    first = dict.fromkeys(known) if isinstance(known, list) else dataset[0]
    if not isinstance(first, Mapping):
        raise InputError(f"The items of a data set are mappings of columns, not {type(first).__name__}.")
    names = _names(first, columns)
    pictures = {name: own for name, own in names.items() if name.endswith("image")}
    others = {name: own for name, own in names.items() if name not in pictures}
    # Reading a row decodes all its pictures, unless the columns are chosen before.
    plain = dataset.select_columns(list(others.values())) if hasattr(dataset, "select_columns") and others else dataset
    rows = range(len(dataset))
    found: dict[str, list[Any]] = {name: [Stored(dataset, row, own) for row in rows] for name, own in pictures.items()}
    table = [plain[row] for row in rows] if others else []
    for name, own in others.items():
        column = [_entry(row, own, number) for number, row in enumerate(table, 1)]
        if name.endswith("mask"):
            column = [None if one is None else _mask(one, number) for number, one in enumerate(column, 1)]
        found[name] = column
    return _pairs(found)


def _names(row: Mapping[str, Any], columns: Mapping[str, str | None] | None) -> dict[str, str]:
    """Our name of every column that is read, and the table's."""
    columns = {} if columns is None else columns
    if not isinstance(columns, Mapping):
        raise InputError(
            f"columns is a mapping of our names to the table's, such as {{'image': 'photo'}}, not {columns!r:.80}."
        )
    for name, own in columns.items():
        if name not in NAMES:
            turned = f" It is a column of the table: write columns={{{own!r}: {name!r}}}." if own in NAMES else ""
            raise InputError(
                f"columns maps our names to the table's, and {name!r} is none of ours: {', '.join(NAMES)}.{turned}"
            )
        if own is not None and own not in row:
            raise InputError(f"The table has no column {own!r}; it has {', '.join(map(str, row))}.")
    found = {name: own for name in NAMES if (own := columns.get(name, name)) is not None and own in row}
    _check_slips(row, found, [name for name in NAMES if name not in found and name not in columns])
    if "image" not in found and "text" not in found:
        raise InputError(
            f"The table has neither an image nor a text column, but {', '.join(map(str, row))}: say which are which with "
            f"columns={{'image': …, 'corrupt_image': …}}. The names that are read: {', '.join(NAMES)}."
        )
    return found


def _check_slips(row: Mapping[str, Any], found: Mapping[str, str], lacking: Sequence[str]) -> None:
    """Raise InputError for a column that is not read and whose name is close to one that the table lacks."""
    lacking = [name for name in lacking if name.removesuffix("_id") not in found]
    for own in row:
        meant = difflib.get_close_matches(own, lacking, n=1, cutoff=_CLOSE) if isinstance(own, str) else []
        if meant and own not in found.values():
            raise InputError(
                f"The table has a column {own!r} and no {meant[0]!r}: if it is that, rename it or say columns={{{meant[0]!r}: {own!r}}}; if it is "
                f"something else, columns={{{meant[0]!r}: None}}."
            )


def _csv(path: Path) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(_read(path), newline="")))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not written in UTF-8 ({error}); save it in that encoding.") from error


def _id(value: Any, name: str, row: int) -> Any:
    """A whole number, or several where a table can hold them."""
    if isinstance(value, list):
        return [_id(one, name, row) for one in value]
    try:
        return int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        raise InputError(f"Row {row}: {name} is {value!r}, no whole number.") from None


def _box(value: Any, name: str, row: int) -> Any:
    """Four numbers, written in one cell; what a table holds as numbers stays as it is."""
    if not isinstance(value, str):
        return value
    words = re.split(r"[\s,;]+", value.strip(" \t()[]"))
    try:
        found = [float(word) for word in words]
    except ValueError:
        found = []
    if len(found) != 4:
        raise InputError(f"Row {row}: {name} is {value!r}, and a box is four numbers: left, top, right, bottom.")
    return found


def _mask(picture: Any, row: int) -> np.ndarray:
    """Truth values ``[height width]``."""
    found = np.asarray(opened(picture))
    if found.ndim != 2:
        raise InputError(f"Row {row}: a mask is a picture of one channel (convert('L')), not {list(found.shape)}.")
    return found > 0


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"Line {number} of {path.name} is no JSON: {error}.") from error
            if not isinstance(row, dict):
                raise InputError(f"Line {number} of {path.name} is no mapping of columns: {line!r:.60}.")
            rows.append(row)
    return rows


def _cell(row: Mapping[str, Any], name: str, table: str, number: int) -> Any:
    value = row.get(name)
    if value is None or value == "":
        raise InputError(f"Row {number} of {table} has no {name}; every row has one.")
    return value


def _entry(row: Mapping[str, Any], name: str, number: int) -> Any:
    if name not in row:
        raise InputError(
            f"Row {number} of the data set has no column {name}; every row has it, None where there is nothing."
        )
    return row[name]


def _located(folder: Path, names: Any, row: int) -> Any:
    if isinstance(names, list):
        return [_located(folder, one, row) for one in names]
    path = folder / str(names)
    if not path.is_file():
        raise InputError(f"Row {row} names the picture {str(names)!r}, and there is no file {path}.")
    return path


def _pairs(found: Mapping[str, Sequence[Any]]) -> Pairs:
    given: dict[str, Any] = {}
    for name, column in found.items():
        plain = name.removesuffix("_id").removeprefix("corrupt_")
        key = SHARED.get(plain) or OF_A_SIDE[plain]
        key = f"corrupt_{key}" if name.startswith("corrupt_") else key
        if key in given:
            raise InputError(f"The table has both {plain} and {plain}_id; give one of them.")
        given[key] = [tuple(one) if plain in ("text", "box") and isinstance(one, list) else one for one in column]
    return Pairs(**given)
