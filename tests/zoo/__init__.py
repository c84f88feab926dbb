"""Tiny random models of every supported family. See `registry` for the table and `cases` to select from it."""

from __future__ import annotations

from . import anyres, dual, llava, openvla, paligemma, pi0, vision  # noqa: F401  (each import fills the table)
from .expected import SHAPES, Shape
from .registry import (
    CASES,
    TAGS,
    Case,
    case,
    cases,
    loading_options,
    parametrize,
    primary,
    saved_class,
    saved_folder,
    shared_model,
)

__all__ = [
    "CASES",
    "SHAPES",
    "TAGS",
    "Case",
    "Shape",
    "case",
    "cases",
    "loading_options",
    "parametrize",
    "primary",
    "saved_class",
    "saved_folder",
    "shared_model",
]
