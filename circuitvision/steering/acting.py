"""What a policy does: its actions under edits, whatever way it says them, and data as the inputs that it acts on.

:func:`act` (of :mod:`circuitvision.model.run_functions`) is the one call that every recipe of this room makes. A policy that denoises acts through
``model.sample_actions`` (edits of its action tower at every denoising step unless they name some), one that says its actions as tokens through what
its family registers (edits at the prompt and at every decoding step).

Not covered: batches of prompts of different lengths for policies that say tokens, whose prompts may not be filled up on the right; run one example at
a time (``example_batch=1``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.edits.base import taken
from circuitvision.model.run_functions import RunFunction, act, refuse_still
from circuitvision.model.sites import SiteName
from circuitvision.model.state import refuse_random, refuse_unwrapped

if TYPE_CHECKING:
    from circuitvision.edits import Edit

Policy = RunFunction
"""``(model, inputs, edits)`` → actions ``[example step dim]``."""


def policy_of(model: Any, policy: Policy | None) -> Policy:
    """The policy of a recipe: the one given, or :func:`act`.

    Raises:
        InputError: something that is no wrapped model, or dropout in training mode.
        UnsupportedModelError: no policy given, and a model that does not act.
    """
    refuse_unwrapped(model)
    refuse_random(model.module, "Steering")
    if policy is None:
        refuse_still(model)
    return act if policy is None else policy


class Part:
    """Some examples of the data: inputs, of pairs also those of the corrupt side, and which examples they are."""

    def __init__(self, inputs: Mapping[str, Any], labels: Sequence[Any], rows: Sequence[int], count: int, batch: Any):
        self.inputs, self.labels, self.rows, self.count, self.batch = inputs, list(labels), list(rows), count, batch

    def own(self, edits: Edit | Sequence[Edit]) -> list[Edit]:
        """The same edits for these examples: positions given per example of the data are theirs."""
        listed = list(edits) if isinstance(edits, Sequence) else [edits]
        return listed if len(self.rows) == self.count else list(taken(listed, self.rows, self.count))


def parts(model: Any, data: Any, size: int | None = None, seed: int = 0) -> Iterator[Part]:
    """Inputs as they are, or a data set (a side, or pairs) in batches.

    Raises:
        InputError: something that is neither, or a data set without examples.
    """
    if hasattr(data, "batches"):
        rows = {number: row for row, number in enumerate(data.numbers)}
        for batch in data.batches(model, size, seed=seed):
            yield Part(batch.inputs, batch.examples, [rows[one] for one in batch.examples], len(data), batch)
    elif isinstance(data, Mapping):
        count = n_examples(data)
        yield Part(data, range(count), range(count), count, None)
    else:
        raise InputError(
            f"A policy acts on inputs (model.inputs(…)) or on a data set (cv.data.Side; of boards cv.data.reach_side(boards)), not a "
            f"{type(data).__name__}."
        )


def passes(recorded: Tensor | Sequence[Tensor], site: str) -> list[Tensor]:
    """What was recorded at a site, one value per pass of its tower; a policy may run the model once, which has no axis of passes."""
    several = not isinstance(recorded, Tensor) or recorded.ndim > (4 if SiteName.parse(site).has_heads else 3)
    return list(recorded) if several else [recorded]  # type: ignore[list-item]


def n_examples(inputs: Mapping[str, Any]) -> int:
    """How many examples inputs hold: the length of their prompts."""
    for name in ("input_ids", "inputs_embeds", "state"):
        if isinstance(inputs.get(name), Tensor):
            return len(inputs[name])
    raise InputError(
        f"These inputs hold no prompt, so their examples cannot be counted; they hold {', '.join(inputs)}."
    )


__all__ = ["Part", "Policy", "act", "n_examples", "parts", "passes", "policy_of", "refuse_still"]
