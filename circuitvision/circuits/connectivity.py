"""Which edges of a circuit lie on a path from what enters the model to its output, and random circuits made of such paths.

A path alternates: an edge ``[sender slot]`` leads from what writes to what reads it, and ``reads`` ``[slot sender]`` from what is read to what is
made of it. Senders that are made of nothing (what enters a tower) begin paths, slots that no sender is made of (what the output is read from) end
them. An edge that lies on no path of its circuit carries nothing to the answer that depends on the circuit alone; :func:`pruned` takes such edges
away until none is left.

:func:`random_circuit` is a union of random paths with exactly as many edges as asked for, wherever paths of that size exist: the controls of tests
that compare a circuit with others of its size. Where random paths no longer add an edge, as of circuits that are nearly the whole model, single edges
between nodes of the paths that were drawn are added. Reference: Shi et al. 2024 (arXiv 2410.13032).

Not covered: how much a path carries.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitvision.errors import InputError

TRIES, STARTS = 100, 10
"""How many random paths are drawn in a row that would make a circuit too large before it is begun again, and how often it is begun."""

Edges = Bool[Tensor, "sender slot"]
Reads = Bool[Tensor, "slot sender"]


def sources(reads: Reads) -> Bool[Tensor, " sender"]:
    """The senders that are made of nothing that is read: what enters the towers."""
    return ~reads.any(0)


def outputs(reads: Reads) -> Bool[Tensor, " slot"]:
    """The slots that no sender is made of: what the output is read from."""
    return ~reads.any(1)


def pruned(mask: Edges, reads: Reads) -> Edges:
    """The edges of a mask that lie on a path from a source to an output, within the mask."""
    mask, first, last = mask.cpu().bool(), sources(reads), outputs(reads)
    # Whole numbers, because products of booleans are not defined for matrices.
    into, made = mask.float(), reads.float()
    begun = _fixed(first, lambda begun: first | (((into.T @ begun.float()) > 0).float() @ made > 0))
    led = _fixed(last, lambda led: last | (made @ (into @ led.float() > 0).float() > 0))
    return mask & begun[:, None] & led[None, :]


def _fixed(start: Tensor, step) -> Tensor:  # type: ignore[no-untyped-def]
    """Repeat a growing step until it adds nothing."""
    while True:
        grown = step(start)
        if bool((grown == start).all()):
            return start
        start = grown


def random_path(edges: Edges, reads: Reads, generator: torch.Generator) -> list[tuple[int, int]]:
    """The edges of a path from a source to an output, drawn step by step from the output backwards, every step alike.

    Raises:
        InputError: no path leads to an output.
    """
    useful = pruned(edges, reads)
    ends = (outputs(reads) & useful.any(0)).nonzero().flatten()
    if not len(ends):
        raise InputError("No path leads from what enters the model to its output along these edges.")
    return _walk(useful, reads, ends, sources(reads), generator)


def _walk(
    useful: Edges, reads: Reads, ends: Tensor, first: Tensor, generator: torch.Generator
) -> list[tuple[int, int]]:
    slot, found = _any(ends, generator), []
    while True:
        sender = _any(useful[:, slot].nonzero().flatten(), generator)
        found.append((sender, slot))
        if bool(first[sender]):
            return found[::-1]
        slot = _any((reads[:, sender] & useful.any(0)).nonzero().flatten(), generator)


def _any(choices: Tensor, generator: torch.Generator) -> int:
    return int(choices[torch.randint(len(choices), (1,), generator=generator)])


def random_circuit(edges: Edges, reads: Reads, n_edges: int, generator: torch.Generator) -> Edges:
    """A union of random paths with ``n_edges`` edges: fewer only where none was found.

    Raises:
        InputError: fewer edges lie on paths than are asked for, or none is asked for.
    """
    useful = pruned(edges, reads)
    if not 0 < n_edges <= int(useful.sum()):
        raise InputError(
            f"A random circuit of {n_edges} edges cannot be drawn: {int(useful.sum())} edges lie on paths from what enters the model to its output."
        )
    ends, first = (outputs(reads) & useful.any(0)).nonzero().flatten(), sources(reads)
    best = torch.zeros_like(useful)
    for _ in range(STARTS):
        found, grown = torch.zeros_like(useful), True
        while grown and int(found.sum()) < n_edges:
            before, missed = int(found.sum()), 0
            while missed < TRIES and int(found.sum()) < n_edges:
                path = found.clone()
                for edge in _walk(useful, reads, ends, first, generator):
                    path[edge] = True
                fits = found.sum() < path.sum() <= n_edges
                found, missed = (path, 0) if fits else (found, missed + 1)
            if int(found.sum()) < n_edges:
                found = _filled(found, useful, reads, n_edges, generator)
            grown = int(found.sum()) > before
        best = found if found.sum() > best.sum() else best
        if int(best.sum()) == n_edges:
            break
    return best


def _filled(found: Edges, useful: Edges, reads: Reads, n_edges: int, generator: torch.Generator) -> Edges:
    """Paths with up to ``n_edges`` edges: more of them from senders to slots that the paths pass already, so that each lies on a path too."""
    begun, led = found.any(1) | (sources(reads) & found.any()), found.any(0) | (outputs(reads) & found.any())
    places = (useful & ~found & begun[:, None] & led[None, :]).nonzero()
    chosen = places[torch.randperm(len(places), generator=generator)[: n_edges - int(found.sum())]]
    filled = found.clone()
    filled[tuple(chosen.T)] = True
    return filled
