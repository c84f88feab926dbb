"""Means of a data set's activations, for ablation: one pass over it in batches, kept for the next run that asks for them.

What is kept of a batch are sums and which things stand at which position, so memory does not grow with the data set. Means are kept by the data set's
digest and the weights that they were measured with, unless hooks act on the model.

Not covered: data sets whose batches have different towers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor

from circuitvision.data.sides import Side
from circuitvision.model.averages import Average, Layout, Seen, Tally
from circuitvision.model.axes import axis_of
from circuitvision.model.sites import SiteName
from circuitvision.progress import Progress
from circuitvision.provenance import hash_weights

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped

MOST = 256
"""How many means of a model are kept."""
Key = tuple[str, Average]
_known: WeakKeyDictionary[Any, OrderedDict[Any, tuple[Tally, Seen]]] = WeakKeyDictionary()


def data_means(
    model: Wrapped,
    side: Side,
    keys: Sequence[Key],
    clean: Callable[[Mapping[str, Any], Sequence[str]], Mapping[str, Tensor]],
    check: Callable[[Key, Seen], None] | None = None,
) -> dict[Key, tuple[Tally, Seen]]:
    """The mean of every (site, average) over a data set, and what its positions hold.

    ``clean`` runs inputs and gives the values of sites; ``check`` is told, before each batch runs, what the data set holds so far.
    """
    known = OrderedDict() if model.engine.stack else _known.setdefault(model, OrderedDict())
    stamp = (side.digest, hash_weights(model.module), model.dtype, model.module.training)
    found = {key: known[stamp, key] for key in keys if (stamp, key) in known}
    missing = [key for key in keys if key not in found]
    made = {key: (Tally(*key), Seen()) for key in missing}
    if missing:
        sites = sorted({site for site, _ in missing})
        with Progress(len(side), "mean over the data set", shown=len(side) > 1) as bar:
            rows = {number: row for row, number in enumerate(side.numbers)}
            for batch in side.batches(model):
                examples = [rows[number] for number in batch.examples]
                maps = model.tokens(batch.inputs)
                for key, (_, seen) in made.items():
                    _note(model, seen, key[0], maps, batch.inputs)
                    if check is not None:
                        check(key, seen)
                values = clean(batch.inputs, sites)
                for (site, _), (tally, _) in made.items():
                    tally.add(
                        values[site],
                        Layout.of(model, maps, site, values[site].shape, batch.inputs),
                        examples,
                        len(side),
                    )
                bar.advance(len(batch))
    for key, value in made.items():
        known[stamp, key] = value
    while len(known) > MOST:
        known.popitem(last=False)
    return found | made


def _note(model: Wrapped, seen: Seen, site: str, maps: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    name = SiteName.parse(site)
    tower = model.towers.get(name.tower)
    if tower is None or name.tower not in maps:
        return
    tokens = maps[name.tower]
    axis = axis_of(tower, name, tokens, inputs)
    if not axis.absent:
        seen.add(Layout.of_tokens(tokens, axis.held))
