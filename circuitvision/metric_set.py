"""Several metrics of one run: ``metric={"logit_diff": "logit_diff", "accuracy": "accuracy"}``, or a list of names.

Every run happens once, and each metric reads its output. A mapping or list, also of a single metric, gives results a leading axis ``metric``; a
metric on its own does not. All metrics of a set must count the same examples; numbers of different types are widened to one that holds all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import metrics
from circuitvision.errors import InputError
from circuitvision.provenance import describe_metric


class MetricSet:
    """One metric, or several by name, as a method measures them."""

    def __init__(self, members: Mapping[str, Any], several: bool) -> None:
        self.members, self.several = dict(members), several

    @classmethod
    def of(cls, metric: Any) -> MetricSet:
        """The set of what a caller gave as ``metric=``.

        Raises:
            InputError: no metric, names that are no words, a list of something other than names, an unknown name.
        """
        if isinstance(metric, MetricSet):
            return metric
        several = isinstance(metric, Mapping | list | tuple)
        if isinstance(metric, list | tuple):
            if any(hasattr(name, "site") for name in metric):
                raise InputError(
                    "These are edits, not metrics: edits come before the metric, as in sweep(inputs, edits, metric)."
                )
            if not all(isinstance(name, str) for name in metric):
                raise InputError("A list of metrics holds their names; metrics themselves need one: {'name': metric}.")
            if len(set(metric)) != len(metric):
                raise InputError(f"A metric is named twice in {list(metric)}.")
            metric = {name: name for name in metric}
        if several and not (metric and all(isinstance(name, str) and name for name in metric)):
            raise InputError("Several metrics are a mapping of names to metrics, with one entry at least.")
        given = metric if several else {"": metric}
        return cls({name: metrics.by_name(one) for name, one in given.items()}, several)

    def bind(self, model: Any, answers: Any = None, foils: Any = None, combine: str | None = None) -> MetricSet:
        """Every metric bound to a model, and to the answers of a data set."""
        return self._each(lambda metric: metrics.bind(metric, model, answers, foils, combine))

    def against(self, output: Tensor) -> MetricSet:
        """Those that compare with another run, and were given none, compare with this output."""
        return self._each(lambda metric: metric.against(output) if isinstance(metric, metrics.Metric) else metric)

    def take(self, examples: Sequence[int], count: int) -> MetricSet:
        """The same metrics for some of ``count`` examples."""
        return self._each(lambda metric: metric.take(examples, count) if isinstance(metric, metrics.Metric) else metric)

    def of_marked(self) -> MetricSet:
        """The same metrics, which take from each output itself what its numbers are: it need not be what the model's head gives."""
        return self._each(lambda metric: metric.of_marked() if isinstance(metric, metrics.Metric) else metric)

    def _each(self, change: Any) -> MetricSet:
        return MetricSet({name: change(metric) for name, metric in self.members.items()}, self.several)

    @property
    def names(self) -> list[str]:
        """The labels of the axis ``metric``."""
        return list(self.members)

    @property
    def axis(self) -> dict[str, list[str]]:
        """The leading axis of results; empty for a metric on its own."""
        return {"metric": self.names} if self.several else {}

    @property
    def name(self) -> str:
        """What a provenance calls it."""
        return ", ".join(self.names) if self.several else describe_metric(self.members[""])

    @property
    def units(self) -> str:
        """The unit, where all metrics share one."""
        found = {str(getattr(metric, "units", "")) for metric in self.members.values()}
        return found.pop() if len(found) == 1 else ""

    @property
    def compares(self) -> bool:
        """Whether some metric still lacks the run that it compares with."""
        return any(
            isinstance(metric, metrics.Comparison) and metric.reference is None for metric in self.members.values()
        )

    def asks(self) -> list[str]:
        """Which columns of a data set ("answers", "foils") some metric takes what it was not given from."""
        own = [metric for metric in self.members.values() if isinstance(metric, metrics.Metric)]
        return sorted({f"{name}s" for metric in own for name in metric._answers if getattr(metric, name) is None})

    @property
    def reads_only(self) -> bool:
        """Whether none can write into the output it gets: the library's own metrics do not."""
        return all(metrics.is_own(metric) for metric in self.members.values())

    def kept(self) -> Any:
        """The metric, or the mapping, as a result keeps it."""
        found = {name: metrics.kept(metric) for name, metric in self.members.items()}
        return found if self.several else found[""]

    def __provenance__(self) -> Any:
        return dict(self.members) if self.several else self.members[""]

    def __call__(self, logits: Tensor, inputs: Mapping[str, Any] | None = None) -> Float[Tensor, "metric example"]:
        """Every metric of one output, each of which may write into what it gets.

        Raises:
            InputError: a metric that gives no number per example, or metrics that count different examples.
        """
        found = {}
        for name, metric in self.members.items():
            own = logits if metrics.is_own(metric) or len(self.members) == 1 else _copied(logits)
            found[name] = metrics.evaluate(metric, own, inputs).detach().cpu()
        lengths = {name: len(values) for name, values in found.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"The metrics count different examples ({lengths}): measure them apart.")
        dtype = torch.float16
        for values in found.values():
            dtype = torch.promote_types(dtype, values.dtype)
        if len(found) == 1:
            return next(iter(found.values()))[None].clone()
        return torch.stack([values.to(dtype) for values in found.values()])


def _copied(logits: Tensor) -> Tensor:
    from circuitvision.links import link_of, marked

    return marked(logits.clone(), link_of(logits))
