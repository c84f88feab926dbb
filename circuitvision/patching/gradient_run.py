"""One run whose activations stay on the autograd path, and gradients of a metric per example at its sites.

Examples of a run do not see each other, so one backward pass of the metric's sum gives every example its own gradient. The rows of a dual encoder
that serve all examples (the texts that images are compared with) are the exception: there each example takes a backward pass of its own.

*Dropped layers.* While :attr:`GradientRun.dropped` names a layer, no gradient passes through what its branches add to the residual stream; the skip
path and, where keys and values reach another tower through the cache, that path stay. A layer that no gradient comes to (:meth:`GradientRun.reaches`)
is before all of the sites, and nothing changes where it is dropped.

Not covered: runs of several passes (``generate``, ``sample_actions``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.axes import map_of
from circuitvision.model.cache import collected
from circuitvision.model.edits.applying import edited
from circuitvision.model.edits.base import Edit
from circuitvision.model.edits.binding import EditCompiler
from circuitvision.model.registrations import HookPoint, Recorder, Registration
from circuitvision.model.sites import SiteName
from circuitvision.patching.estimates import Term

Layer = tuple[str, int]
"""Tower and number of a block."""


class GradientRun:
    """The output of one run under edits, and the values of sites in it, all with a graph.

    ``layers`` are those that can be dropped from the backward pass, with the sites of what they add; of the sites ``read`` only the values are
    wanted, without a graph. Raises HookError if a site did not fire.
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        sites: Sequence[str],
        edits: Sequence[Edit] = (),
        layers: Mapping[Layer, Sequence[str]] | None = None,
        read: Sequence[str] = (),
    ) -> None:
        self.model, self.inputs = model, model._checked(inputs)
        self.dropped: Layer | None = None
        self._reached: set[Layer] = set()
        recorder, names = Recorder(needs_grad=True), frozenset(sites)
        reader, others = Recorder(), frozenset(read) - names
        backward = {site: [self._dropper(layer)] for layer, added in (layers or {}).items() for site in added}
        with torch.enable_grad(), contextlib.ExitStack() as stack:
            if edits:
                compiler = EditCompiler(model, self.inputs)
                (bound,) = compiler.bind([tuple(edits)])
                stack.enter_context(edited(compiler, bound))
            if backward:
                stack.enter_context(model.engine.registered(Registration(backward=backward)))
            stack.enter_context(model.engine.registered(Registration(recorder=recorder, recorded=names, exact=names)))
            if others:
                stack.enter_context(
                    model.engine.registered(Registration(recorder=reader, recorded=others, exact=others))
                )
            self.output = model(self.inputs)
        held = {name: (reader if name in others else recorder).values[name] for name in dict.fromkeys([*sites, *read])}
        self.values: dict[str, Tensor] = collected(held, multi_pass=False)

    def _dropper(self, layer: Layer) -> Any:
        def drop(gradient: Tensor, hook: HookPoint) -> Tensor | None:
            self._reached.add(layer)
            return torch.zeros_like(gradient) if self.dropped == layer else None

        return drop

    def reaches(self, layer: Layer) -> bool:
        """Whether a gradient of any site came through what a layer adds, in the backward passes so far."""
        return layer in self._reached

    def estimates(
        self, terms: Mapping[str, Sequence[Term]], metric: Float[Tensor, " example"], keep_graph: bool = True
    ) -> dict[str, Float[Tensor, "example ..."]]:
        """For each name the sum of its terms, by example; the graph is let go with ``keep_graph=False``."""
        watched = list(dict.fromkeys(term.watched for listed in terms.values() for term in listed))
        found: dict[str, Tensor] = {}
        for gradients, example in self.gradients(watched, metric, keep_graph):
            for name, value in self._summed(terms, gradients, len(metric), example).items():
                found[name] = found[name] + value if name in found else value
        return found

    def gradients(
        self,
        sites: Sequence[str],
        metric: Float[Tensor, " example"],
        keep_graph: bool = True,
        forget: Sequence[str] = (),
    ) -> Iterator[tuple[dict[str, Tensor], int | None]]:
        """The gradients of the metric at sites: where rows are examples' all at once (beside None), elsewhere of one example after another.

        The values of ``forget`` are let go once their last gradient is there, if the graph is.
        """
        shared = self._shared(len(metric))
        own = [site for site in sites if SiteName.parse(site).tower not in shared]
        others = [site for site in sites if site not in own]
        if own:
            found = self._gradients(metric, torch.ones_like(metric), own, keep_graph or bool(others))
            if not keep_graph:
                self._let_go(set(forget) & set(own))
            yield found, None
            del found
        for example in range(len(metric) if others else 0):
            last = not keep_graph and example == len(metric) - 1
            one = torch.zeros_like(metric)
            one[example] = 1
            yield self._gradients(metric, one, others, not last), example

    def _let_go(self, sites: Iterable[str]) -> None:
        for site in sites:
            del self.values[site]

    def _gradients(self, metric: Tensor, of: Tensor, sites: Sequence[str], keep_graph: bool) -> dict[str, Tensor]:
        """The gradients of the metric, weighted by example."""
        inputs = [self.values[site] for site in sites]
        found = torch.autograd.grad(metric, inputs, of, retain_graph=keep_graph, allow_unused=True)
        return {
            site: torch.zeros_like(self.values[site]) if gradient is None else gradient
            for site, gradient in zip(sites, found, strict=True)
        }

    def _summed(
        self, terms: Mapping[str, Sequence[Term]], gradients: Mapping[str, Tensor], count: int, example: int | None
    ) -> dict[str, Tensor]:
        """The terms that read these gradients: by each row's example, or all for one example."""
        found: dict[str, Tensor] = {}
        for name, term in ((name, term) for name, listed in terms.items() for term in listed):
            if term.watched not in gradients:
                continue
            rows = term.of(gradients[term.watched].detach())
            into = (
                rows_of(self.model, self.inputs, term.watched, len(rows), count)
                if example is None
                else torch.full((len(rows),), example)
            )
            total = rows.new_zeros(count, *rows.shape[1:]).index_add_(0, into.to(rows.device), rows)
            found[name] = found[name] + total if name in found else total
        return found

    def _shared(self, count: int) -> list[str]:
        """The towers whose rows every example's metric depends on: of a dual encoder that which is not counted."""
        if not self.model.is_dual:
            return []
        images = [name for name, tower in self.model.towers.items() if tower.stack.image]
        tokens = self.model.tokens(self.inputs)
        counted = all(tokens[name].n_rows == count for name in images if name in tokens)
        return [name for name in self.model.towers if (name in images) != counted]


def rows_of(model: Any, inputs: Mapping[str, Any], site: str, length: int, count: int) -> Tensor:
    """Which of ``count`` examples each of ``length`` rows of a site belongs to.

    Raises:
        InputError: rows that are neither the tower's nor the examples.
    """
    tokens = model.tokens(inputs).get(map_of(model, SiteName.parse(site)))
    if tokens is not None and len(tokens.example) == length:
        return torch.as_tensor(tokens.example, dtype=torch.long)
    if length == count:
        return torch.arange(count)
    raise InputError(f"{site} has {length} rows for {count} examples, and nothing says which belong together.")


def values_under(model: Any, inputs: Mapping[str, Any], edits: Sequence[Edit], sites: Sequence[str]) -> dict[str, Tensor]:  # fmt: skip
    """The values of sites in one run under edits, without a graph."""
    with torch.no_grad(), model.record(list(sites)) as cache:
        model.run(inputs, edits)
    return {site: cache[site] for site in sites}
