"""The parts of figures over images: words that fit their patches, whatever the words are."""

from __future__ import annotations

import pytest
import torch

from circuitvision.plots import kit, patches, style


def written(words: list[list[str]], panels: int):
    figure = kit.panels(1, panels)
    patches.add_words(figure, torch.zeros(len(words), len(words[0])), words, style.legible(), 0, 1, 1, panels)
    return figure.data[0]


def test_long_words_are_cut_and_marks_stay_marks():
    trace = written([["red", "ASSISTANT:"], ["&lt;/s&gt;", "&lt;image_pad&gt;"]], 1)
    assert list(trace.text) == ["red", "ASSISTA…", "&lt;/s&gt;", "&lt;image_…"]


@pytest.mark.parametrize("panels", [1, 3, 5, 8])
def test_words_are_as_large_as_their_cells_allow(panels):
    short, long = written([["red"] * 4] * 4, panels).textfont.size, written([["diamond"] * 4] * 4, panels).textfont.size
    assert 6 <= long <= short <= 13
    room = 900 / panels / 4
    assert long == 6 or 7 * 0.55 * long < room
    same = {written([[word] * 4] * 4, panels).textfont.size for word in ("purple", "orange", "yellow")}
    assert len(same) == 1
