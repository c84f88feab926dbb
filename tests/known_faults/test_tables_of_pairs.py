"""Tables of pairs: columns by what they are called here, text as it is written, and cells that mean nothing refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from circuitvision.data import Pairs
from circuitvision.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(random.integers(0, 255, (8, 10, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def read(folder: Path, header: str, cells: str, encoding: str = "utf-8", **columns: str | None) -> Pairs:
    text = f"image,corrupt_image,{header}\na.png,b.png,{cells}\n"
    (folder / "pairs.csv").write_bytes(text.encode(encoding))
    return Pairs.from_folder(folder, columns=columns or None)


def test_columns_are_read_by_their_own_names_and_others_left_alone(folder: Path) -> None:
    assert read(folder, "scene_id", "kitchen").groups is None
    assert read(folder, "scene_id", "kitchen", group="scene_id").groups == ("kitchen",)
    assert read(folder, "label", "3", answer_id="label").answers == (3,)
    assert read(folder, "where", "1 .5 5e0 6", box="where").boxes == ((1.0, 0.5, 5.0, 6.0),)


@pytest.mark.parametrize(
    ("header", "cells"), [("box", "1 2 5"), ("box", "none"), ("answer_id", "three"), ("mask", "a.png")]
)
def test_cells_without_a_meaning_are_refused(folder: Path, header: str, cells: str) -> None:
    with pytest.raises(InputError, match=f"Row 1.*{header}"):
        read(folder, header, cells)


def test_text_stays_as_it_is_written(folder: Path) -> None:
    row = {"image": "a.png", "corrupt_image": "b.png", "text": "où\u2028là\x85?"}
    (folder / "pairs.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8-sig")
    assert Pairs.from_folder(folder, "pairs.jsonl").clean.examples[0].text == row["text"]
    with pytest.raises(InputError, match="UTF-8"):
        read(folder, "text", "été", encoding="latin-1")


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([{"text": "a", "answer": "x"}, {"text": "b"}], "Row 2"),
        ({"text": ["a"]}, "rows"),
        (pd.DataFrame({"text": ["a"]}), "records"),
        ([{"text": "a", "mask": np.ones((2, 2, 3))}], "channel"),
    ],
)
def test_data_sets_of_another_make_are_refused(rows: Any, word: str) -> None:
    with pytest.raises(InputError, match=word):
        Pairs.from_dataset(rows)
    with pytest.raises(InputError, match="mapping"):
        Pairs.from_dataset([{"text": "a"}], columns=["text"])  # type: ignore[arg-type]


def test_an_example_without_a_mask_has_none() -> None:
    picture = np.zeros((4, 4, 3), dtype=np.uint8)
    row = {"image": picture, "corrupt_image": picture + 1, "mask": np.eye(4)}
    masks = Pairs.from_dataset([row, {**row, "mask": None}]).masks
    assert masks is not None
    assert masks[1] is None
    assert (masks[0] == np.eye(4, dtype=bool)).all()


def test_a_slip_in_the_name_of_a_column_is_refused(folder: Path) -> None:
    for slip, meant in (("corupt_txt", "corrupt_text"), ("anwser", "answer"), ("corrupt_masks", "corrupt_mask")):
        with pytest.raises(InputError, match=f"'{slip}' and no '{meant}'.*'{meant}': '{slip}'.*'{meant}': None"):
            read(folder, slip, "word")
    assert read(folder, "anwser", "word", answer="anwser").answers == ("word",)
    assert read(folder, "anwser", "word", answer=None).answers is None
    for kept in ("answers", "image2", "corrupt_image_b"):
        assert read(folder, f"answer,{kept}", "word,more").answers == ("word",)
    for kept in ("caption", "scene_id", "test", "corruption", "label"):
        assert read(folder, kept, "word").answers is None


def test_a_slip_in_any_row_is_refused(folder: Path) -> None:
    rows = [{"text": "a", "answer": "x"}, {"text": "b", "answer": "y", "corupt_text": "c"}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="'corupt_text' and no 'corrupt_text'"):
        Pairs.from_folder(folder, "pairs.jsonl")
    rows[1]["corrupt_text"] = rows[1].pop("corupt_text")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"Row 1 .*corrupt_text"):
        Pairs.from_folder(folder, "pairs.jsonl")
    with pytest.raises(InputError, match="'corupt_text' and no"):
        Pairs.from_dataset([{"text": "a", "corupt_text": "b"}])
