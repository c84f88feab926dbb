"""Whether an edit ever meets a position it selects: worked out before a run from the passes it may have, and after it from those it had.

An edit that never acts changes nothing, and a study that takes the unedited value for its effect is wrong without a word. What can be known before
the run is an error that names the fix (a step or position that no pass reaches); an empty choice only warns, and so does a generation that ended
sooner than it might have.
"""

from __future__ import annotations

import dataclasses

from circuitvision.model.edits.attention import AttentionEdit, DeleteTokens
from circuitvision.model.edits.base import Edit
from circuitvision.model.positions import UNBOUNDED, Positions, PositionWindow, is_empty


def met_windows(edit: Edit, window: PositionWindow, passes: int | None, repeats: bool) -> list[PositionWindow]:
    """The windows of the passes in which an edit acts, later ones in one; ``repeats`` where passes add positions to the prompt's."""
    met = [window] if edit.steps.acts(0) or not repeats else []
    count = UNBOUNDED if passes is None else passes
    if not repeats or count <= 1:
        return met
    if edit.steps.kind == "numbers":
        numbers = [step for step in edit.steps.numbers if 0 < step < count]
        return met + [dataclasses.replace(window, first=window.prompt + step - 1, length=1) for step in numbers]
    if edit.steps.kind != "prefill":
        named = [edit.positions, getattr(edit, "keys", edit.positions)]
        ends = [n for positions in named for n in (*positions.ints, *positions.bounds[:2]) if n is not None]
        met.append(dataclasses.replace(window, first=window.prompt, length=min(count - 1, max([1, *ends]) + 1)))
    return met


def key_window(edit: Edit, window: PositionWindow) -> tuple[Positions, PositionWindow] | None:
    """The keys an edit names and the positions they are taken from: the tower's own, or those of the prefix before them."""
    if not isinstance(edit, AttentionEdit):
        return None
    keys = edit.positions if isinstance(edit, DeleteTokens) else edit.keys
    foreign = window.prefix is not None and (window.crossed or keys.tower == window.prefix.tower)
    return keys, window.prefix if foreign and window.prefix is not None else window.of_all()


def meets(edit: Edit, window: PositionWindow, passes: int | None, repeats: bool) -> bool:
    """Whether an edit comes to a position it selects, in the prompt or in one of so many passes."""
    windows = met_windows(edit, window, passes, repeats)
    found, queries = key_window(edit, window), edit.positions
    if found is not None:
        keys, where = found
        ends = [window.prefix is not where and one.first + one.length for one in windows]
        seen = [dataclasses.replace(where, first=0, length=end) if end else where for end in ends]
        if not any(_selects(keys, one) for one in seen):
            return False
        queries = Positions() if isinstance(edit, DeleteTokens) else queries
    return any(_selects(queries, one) for one in windows)


def _selects(positions: Positions, window: PositionWindow) -> bool:
    """Whether a window has a position that is selected, and held by the site."""
    if positions.kind == "all":
        return window.axis.absent != "" or window.count > 0
    return not is_empty(positions.choose(window, window.rows, "cpu"))


def rows_without_selection(edit: Edit, window: PositionWindow) -> list[int]:
    """The rows of the batch in which an edit selects no position of the prompt; none where its choice is the same in every row.

    A row of the batch is an example: an image tower may take several rows for it, and one with a selection is enough.
    """
    if window.axis.absent:
        return []
    found = key_window(edit, window)
    chosen = [] if found is None else [found]
    if not isinstance(edit, DeleteTokens):
        chosen.append((edit.positions, window))
    without: set[int] = set()
    for positions, where in chosen:
        covered = positions.covers(where) if positions.may_be_empty else None
        if covered is not None and len(covered) == where.rows > 1:
            examples = range(where.rows) if where.tokens is None else where.tokens.example.tolist()
            without |= set(examples) - {example for example, row in zip(examples, covered.any(1), strict=True) if row}
    return sorted(without)
