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


def test_long_work_in_a_file_says_how_fast_it_is_and_how_long_it_takes(look, monkeypatch):
    screen, now = look(), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress(1000, "sweep") as bar:
        bar.advance(400, measured=False)  # an earlier run did these
        for _ in range(3):
            now[0] += 20
            bar.advance(10)
    lines = [line for line in screen.getvalue().splitlines() if "per second" in line or "seconds each" in line]
    if screen.terminal:
        assert lines == []
        return
    # After 40 seconds; the next would come 30 seconds later.
    assert lines == ["sweep: 420 of 1000 (42%), 2 seconds each, 19 min 20 s left"]


def test_lines_are_written_for_long_work_only_and_not_when_quiet(look, monkeypatch):
    screen, now = look(), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.verbosity("quiet"), progress.Progress(10, "sweep") as bar:
        now[0] = 100.0
        bar.advance()
    with progress.Progress(10, "hidden", shown=False) as bar:
        now[0] = 200.0
        bar.advance()
    assert "sweep" not in screen.getvalue()
    assert "hidden" not in screen.getvalue()
    with progress.Progress(0, "endless") as bar:
        now[0] = 300.0
        bar.advance(500)
    assert ("endless: 500, 5 per second" in screen.getvalue()) != screen.terminal
