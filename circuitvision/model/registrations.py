"""What is asked of a run: hooks and recorders by site, and what a hook may answer.

Rules every chain enforces:

* a hook gets its own tensor and may keep it; changing it in place without returning it raises, because the change would be lost;
* a returned tensor must have the shape, dtype and device of the site;
* a recorder gets the value that continues through the model: detached, unless it was asked to keep the graph.

Not covered: what a hook does to other tensors than the one it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from circuitvision.errors import HookError
from circuitvision.model.memory import compact

Hook = Callable[[Tensor, "HookPoint"], "Tensor | None"]


@dataclass(frozen=True)
class HookPoint:
    """What a hook is told about the place it was called from."""

    name: str
    """Full site name, e.g. ``vision.blocks.3.attn.hook_z``."""
    tower: str
    layer: int | None
    site: str
    """The name without tower and layer, e.g. ``attn.hook_z``."""
    step: int = 0
    """Number of the pass of this site in the current run: 0, then 1, 2, … in ``generate`` and ``sample_actions``."""


class Recorder:
    """Stores the value of each site it is given, one entry per pass.

    ``keeps_graph``: values stay on the autograd path. ``needs_grad``: they do, and values that require no gradient are made to.
    """

    def __init__(
        self, device: torch.device | str | None = None, needs_grad: bool = False, keeps_graph: bool = False
    ) -> None:
        self.values: dict[str, list[Tensor]] = {}
        self.device = device
        self.needs_grad = needs_grad
        self.keeps_graph = keeps_graph or needs_grad

    def record(self, name: str, value: Tensor) -> None:
        """Keep ``value`` (moved to the recorder's device) as the next pass of site ``name``."""
        kept = value if self.device is None else value.to(self.device)
        if not self.keeps_graph:
            # A copy of a view would leave the autograd path.
            kept = compact(kept)
        self.values.setdefault(name, []).append(kept)


@dataclass(eq=False)
class Registration:
    """One set of hooks: forward hooks, backward hooks or a recorder, by full site name. ``exact`` names must fire, ``optional`` ones need not."""

    forward: Mapping[str, list[Hook]] = field(default_factory=dict)
    backward: Mapping[str, list[Hook]] = field(default_factory=dict)
    recorder: Recorder | None = None
    recorded: frozenset[str] = frozenset()
    exact: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()

    @cached_property
    def names(self) -> frozenset[str]:
        """Every site this registration asks for."""
        return self.recorded.union(self.forward, self.backward)

    @property
    def only_reads(self) -> bool:
        """Whether it can change nothing: a recorder of detached values, and no hook."""
        return self.recorder is not None and not (self.recorder.keeps_graph or self.forward or self.backward)

    def touches(self, name: str) -> bool:
        """Whether it may put another tensor in the place of this site's value: by a hook, or to follow its gradient."""
        recorder = self.recorder
        followed = recorder is not None and recorder.keeps_graph and name in self.recorded
        return followed or name in self.forward or name in self.backward


def run_hook(hook: Hook, value: Tensor, where: HookPoint, tracked: bool) -> tuple[Tensor, bool]:
    """The value to go on with, and whether it may be another one; a ``tracked`` value goes on as the tensor that the hook got."""
    handed = value.clone()
    version = None if handed.is_inference() else handed._version
    returned = hook(handed, where)
    if torch._C._functorch.is_functorch_wrapped_tensor(handed):
        # Batched tensors count no versions and compare to no bool, so whatever comes back may be changed.
        touched = returned is not None
    elif version is None:
        touched = not torch.equal(handed, value)
    else:
        touched = handed._version != version
    if returned is None:
        if touched:
            raise HookError(
                f"The hook at {where.name} changed its tensor in place and returned None; return the tensor."
            )
        return (handed, False) if tracked else (value, False)
    returned = checked(returned, handed, where)
    if returned is handed and not touched:
        return (handed, False) if tracked else (value, False)
    return returned, True


def checked(returned: Any, expected: Tensor, where: HookPoint) -> Any:
    """The hook's answer, or HookError if it is not a tensor of the site's shape, dtype and device."""
    if returned is None:
        return None
    if not isinstance(returned, Tensor):
        raise HookError(f"The hook at {where.name} returned {type(returned).__name__}; return a tensor or None.")
    if returned.shape != expected.shape:
        raise HookError(
            f"The hook at {where.name} returned shape {tuple(returned.shape)}; the site has shape {tuple(expected.shape)}."
        )
    if returned.dtype != expected.dtype:
        raise HookError(f"The hook at {where.name} returned {returned.dtype}; convert it with .to({expected.dtype}).")
    if returned.device != expected.device:
        raise HookError(
            f"The hook at {where.name} returned a tensor on {returned.device}; move it with .to('{expected.device}')."
        )
    return returned
