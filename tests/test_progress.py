"""Progress bars: drawn for a person, silent in files and after ``set_verbosity("quiet")``, transformers' own bars with them."""

from __future__ import annotations

import io
import sys

import pytest
from transformers.utils import logging

import circuitvision as cv
from circuitvision import progress


class Screen(io.StringIO):
    """Standard error as a terminal or as a file."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def look(request, monkeypatch):
    """A function that puts the screen in place: capturing does so as well, between a test's phases."""

    def put() -> Screen:
        screen = Screen(request.param)
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
        return screen

    yield put
    cv.set_verbosity("normal")


def work() -> None:
    list(progress.track(range(3), "counting"))
    with progress.Progress(3, "counting") as bar:
        bar.advance(3)


def test_bars_are_drawn_on_terminals_only(look):
    screen = look()
    work()
    assert ("counting" in screen.getvalue()) == screen.terminal
    cv.set_verbosity("quiet")
    before = screen.getvalue()
    work()
    assert screen.getvalue() == before


def test_transformers_draws_where_we_do_and_gets_its_switch_back(look):
    screen = look()
    was = logging.is_progress_bar_enabled()
    try:
        logging.enable_progress_bar()
        with progress.match_verbosity():
            assert logging.is_progress_bar_enabled() == screen.terminal
        assert logging.is_progress_bar_enabled()
        with pytest.raises(KeyError), progress.match_verbosity():
            raise KeyError
        assert logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        with progress.match_verbosity():
            pass
        assert not logging.is_progress_bar_enabled()
    finally:
        (logging.enable_progress_bar if was else logging.disable_progress_bar)()
