"""Words in a text that a tokenizer has cut: which of its tokens they are.

Vocabularies mark where words begin (``▁`` of SentencePiece, ``Ġ`` of byte-level ones), where they end (``</w>``), or where they go on (``##``).
Tokens are read back as text, and a word is found in it where no letter or digit touches it. Byte-level vocabularies write each byte as a visible
character (a newline as ``Ċ``, ``’`` as ``âĢĻ``) and are decoded; a character that several tokens share belongs to all of them.

Not covered: languages that put no space between words, of which a word is found only where something else than a letter stands beside it.

Source: ``bytes_to_unicode``, Radford et al., "Language models are unsupervised multitask learners" (GPT-2).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from functools import cache

import numpy as np

_APART = "\0"
"""Stands between tokens that something else stands between, such as an image: no word reaches over it."""
_MARKS = ("▁", "Ġ", "</w>", " ", "##")
"""What tokenizers write for the beginning or the end of a word."""


def in_a_row(at: np.ndarray, text: np.ndarray) -> tuple[list[int], list[str]]:
    """Positions and their tokens, with a mark wherever the next one does not follow."""
    places: list[int] = []
    pieces: list[str] = []
    for position in at.tolist():
        if places and position != places[-1] + 1:
            places.append(places[-1])
            pieces.append(_APART)
        places.append(position)
        pieces.append(str(text[position]))
    return places, pieces


def spans_of(word: str, pieces: Sequence[str]) -> list[tuple[int, int]]:
    """The first and last subword token of every place where a word stands in a text; upper case counts as lower."""
    text, first, last = _as_read(pieces)
    # Markers of tokens may double a space.
    body = r"\s+".join(re.escape(part) for part in word.split())
    found = re.finditer(rf"(?<!\w){body}(?!\w)", text, flags=re.IGNORECASE)
    spans = [(first[match.start()], last[match.end() - 1]) for match in found]
    if spans or not any(pieces) or any(mark in piece for piece in pieces for mark in _MARKS):
        return spans
    # A tokenizer without marks of spaces: every token is a word of its own.
    parts = [piece.lower() for piece in pieces]
    wanted = word.lower().split()
    starts = range(len(parts) - len(wanted) + 1)
    return [(start, start + len(wanted) - 1) for start in starts if parts[start : start + len(wanted)] == wanted]


def _as_read(pieces: Sequence[str]) -> tuple[str, list[int], list[int]]:
    """Subword tokens as the text that they stand for, with the first and the last token of every character."""
    if any(mark in piece for piece in pieces for mark in ("Ġ", "Ċ", "</w>")):
        marks = _byte_characters()
        marked = [piece.removesuffix("</w>") + "Ġ" * piece.endswith("</w>") for piece in pieces]
        spelled = [b"".join(marks.get(mark, mark.encode()) for mark in piece) for piece in marked]
        with contextlib.suppress(UnicodeDecodeError):
            text = b"".join(spelled).decode()
            owner = [number for number, piece in enumerate(spelled) for _ in piece]
            ends = np.cumsum([len(character.encode()) for character in text]).tolist()
            return text, [owner[start] for start in [0, *ends[:-1]] if ends], [owner[end - 1] for end in ends]
        # Letters beyond ASCII stand for themselves.
        shown = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in marked]
    elif any(piece.startswith("##") for piece in pieces):
        shown = [piece[2:] if piece.startswith("##") else f" {piece}" for piece in pieces]
    else:
        shown = [piece.replace("▁", " ") for piece in pieces]
    numbers = [number for number, piece in enumerate(shown) for _ in piece]
    return "".join(shown), numbers, numbers


@cache
def _byte_characters() -> dict[str, bytes]:
    """Byte-level vocabularies write every byte as a visible character: a space as Ġ, a newline as Ċ; see ``bytes_to_unicode`` of GPT-2."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): bytes([byte]) for byte in visible} | {
        chr(256 + number): bytes([byte]) for number, byte in enumerate(others)
    }
