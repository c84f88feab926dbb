"""How many groups of edits run at once, by memory and by how many positions a batch computes, and which examples a group leaves unedited.

Beyond a few thousand rows a matrix product gets no faster. Groups of one route are ordered by their first position and cut into batches that share a
suffix, so that late positions do not pay for early ones.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from circuitvision.incremental.routes import ResumePlan, rows_serve_all
from circuitvision.model.edits.base import Edit
from circuitvision.model.edits.binding import EditCompiler

POSITIONS_PER_BATCH = {"cpu": 1024, "cuda": 16384}
"""How many positions an automatic batch computes: what keeps the device busy."""
SPARE_POSITIONS = 64
"""How many positions a batch may compute for groups that begin later than its first; another run costs about as much."""
LARGE_SHARE = 0.5
"""Share of the free memory that a single run of all examples may take before a sweep warns."""
SHARE_OF_MEMORY = 0.4
"""Share of the free memory of a GPU that a batch's activations may take."""


def count_fitting(device: torch.device, size: tuple[int, int, int], firsts: Sequence[int]) -> int:
    """How many of the waiting groups, latest first position first, run in the next batch; ``size`` as of :func:`size_of_route`."""
    rows, length, width = size
    positions = POSITIONS_PER_BATCH.get(device.type, POSITIONS_PER_BATCH["cpu"])
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        positions = min(positions, int(SHARE_OF_MEMORY * free / width))
    count, needed = 1, 0
    for number, first in enumerate(firsts, start=1):
        computed = rows * (length - first) * number
        needed += rows * (length - first)
        if computed > positions or computed - needed > max(SPARE_POSITIONS, needed // 4):
            break
        count = number
    return count


def size_of_route(binder: EditCompiler, route: ResumePlan) -> tuple[int, int, int]:
    """Rows, positions and bytes per position of the largest tower a route computes."""
    found = []
    model, maps = binder.model, binder.windows.maps
    starts = [start.tower for start in route.starts]
    for name, tower in model.towers.items():
        # A connector costs no more than the tower it reads.
        runs = name in (*starts, *map(model.flow.tower_of, starts)) or model.flow.is_reached(name, starts)
        if runs and name in maps:
            cfg, tokens = tower.cfg, maps[name]
            bytes_each = 2 if model.dtype in (torch.bfloat16, torch.float16) else 4
            width = bytes_each * (12 * cfg.d_model + 3 * cfg.d_mlp + 2 * cfg.n_heads * tokens.n_positions)
            found.append((tokens.n_rows, tokens.n_positions, width))
    return max(found, key=lambda size: size[0] * size[1] * size[2])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def halved(size: int, error: BaseException) -> int:
    """How many runs to take where memory ran out for ``size`` of them; raises the error again where that was one."""
    if size == 1:
        raise error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return size // 2


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else None
    except (AttributeError, OSError, ValueError):
        return None


def unedited_examples(binder: EditCompiler, group: Sequence[Edit]) -> Tensor | None:
    """The examples in which no edit of a group selects a position, ``[example]``; None where some edit is of positions that every example has."""
    found: Tensor | None = None
    for edit in group:
        chosen = [one for one in (edit.positions, getattr(edit, "keys", None)) if one is not None and one.may_be_empty]
        if not chosen:
            return None
        for name in edit.sites(binder.model):
            window = binder.windows.of(name)
            if window is None or window.tokens is None or rows_serve_all(binder.model, window.tower):
                return None
            acts = torch.ones(window.rows, dtype=torch.bool)
            for one in chosen:
                if one.tower in ("", window.tower):
                    acts &= one.covers(window).any(1)
            edited = torch.zeros(window.tokens.n_examples, dtype=torch.bool)
            edited[torch.as_tensor(window.tokens.example)[acts]] = True
            found = edited if found is None else found | edited
    return None if found is None else ~found
