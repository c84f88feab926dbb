"""Data sets as HTML: the first examples with small pictures beside their texts, answers and foils."""

from __future__ import annotations

import base64
import html as markup
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from circuitvision.data.sides import Side, Stored, opened
from circuitvision.errors import InputError

SHOWN = 4
"""How many examples are drawn."""
EDGE = 96
"""Pixels of a picture's longer edge."""


def described(image: Any) -> str | None:
    """A picture in a word: a file's name, or what it is."""
    if image is None:
        return None
    if isinstance(image, (list, tuple)):
        return ", ".join(str(described(one)) for one in image)
    if isinstance(image, (str, Path)):
        return Path(str(image)).name if len(str(image)) < 200 else "picture"
    if isinstance(image, Stored):
        return f"{image.column}[{image.row}]"
    size = f"{image.width}x{image.height}" if isinstance(image, Image.Image) else "x".join(map(str, image.shape))
    return f"{type(image).__name__} {size}"


def html(sides: Sequence[Side]) -> str:
    """A table of the first examples, one column per side."""
    first = sides[0]
    titles = [side.name for side in sides]
    facts = [key for key in ("answers", "foils", "groups") if getattr(first, key) is not None]
    head = "".join(f"<th>{markup.escape(word)}</th>" for word in ("", *titles, *(key[:-1] for key in facts)))
    body = ""
    for row in range(min(SHOWN, len(first))):
        cells = [f"<td>{first.numbers[row]}</td>"]
        cells += [f"<td style='vertical-align:top'>{_example(side.examples[row])}</td>" for side in sides]
        cells += [f"<td>{markup.escape(str(getattr(first, key)[row]))}</td>" for key in facts]
        body += f"<tr>{''.join(cells)}</tr>"
    more = len(first) - SHOWN
    rest = f"<div>and {more} more</div>" if more > 0 else ""
    name = "pairs" if len(sides) == 2 else "examples"
    return f"<b>{len(first)} {name}</b><table><tr>{head}</tr>{body}</table>{rest}"


def _example(example: Any) -> str:
    images = example.image if isinstance(example.image, (list, tuple)) else [example.image]
    drawn = "".join(_picture(one) for one in images if one is not None)
    texts = (example.text,) if isinstance(example.text, str) else example.text or ()
    words = "".join(f"<div>{markup.escape(text)}</div>" for text in texts)
    if example.tensors is not None:
        held = (f"{name} {list(v.shape)}" for name, v in example.tensors.items() if hasattr(v, "shape"))
        words += f"<div>{markup.escape(', '.join(held))}</div>"
    settings = ", ".join(f"{name}={_short(value)}" for name, value in example.settings.items())
    return drawn + words + (f"<div>{markup.escape(settings)}</div>" if settings else "")


def _short(value: Any) -> str:
    found = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value
    return f"{found!s:.60}"


def _picture(image: Any) -> str:
    """A picture as an image tag, or its name where it cannot be drawn."""
    try:
        found = opened(image)
        if not isinstance(found, Image.Image):
            array = found.detach().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
            if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
                array = np.moveaxis(array, 0, -1)
            scale = 255 if array.dtype.kind == "f" and float(array.max()) <= 1 else 1
            array = (array * scale).clip(0, 255).astype(np.uint8)
            found = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)
    except (InputError, TypeError, ValueError):
        return f"<span>[{markup.escape(str(described(image)))}]</span>"
    made = found.convert("RGB")
    longest = max(made.size)
    if longest < EDGE:
        factor = max(1, EDGE // longest)
        made = made.resize((made.width * factor, made.height * factor), Image.Resampling.NEAREST)
    else:
        made.thumbnail((EDGE, EDGE))
    stream = io.BytesIO()
    made.save(stream, "PNG")
    return f"<img src='data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}' style='margin:1px'/>"
