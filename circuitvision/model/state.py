"""The state a module is in: what makes runs under hooks wrong, or two equal runs differ, and can change at any time after wrapping.

* *Compiled*: hooks added after compilation never fire.
* *Gradient checkpointing*: the backward pass runs the blocks again, when hooks are gone, so gradients would be those of another run.
* *Dropout in training mode*: the same input gives another output each time; a single run may be meant that way, a comparison of runs never is.
* *inference_mode*: what is made there has no gradient, whatever is asked for.

A run must not pay for a walk through the module, so the list of its parts is renewed only when inputs are new, and each run looks at their flags.

Not covered: randomness that no attribute tells of (a forward that calls ``torch.rand``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat
from operator import contains, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from circuitvision.errors import HookError, InputError, UnsupportedModelError, warn
from circuitvision.model.spec import DRAWS

_COMPILED = "_compiled_call_impl"
_in_training = itemgetter("training")


class ModuleState:
    """What is looked at before each run of one module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._parts: list[dict[str, Any]] = []
        self._drawing: list[dict[str, Any]] = []
        self._warned = False
        self.renew()

    def __reduce__(self) -> tuple[type[ModuleState], tuple[nn.Module]]:
        # A copy looks at the copied module.
        return ModuleState, (self.module,)

    def renew(self) -> None:
        """Look again which parts the module has: adapters may have been added."""
        # Attributes of a module are several times slower to ask for than entries of its dictionary.
        parts = [part for part in self.module.modules() if "training" in vars(part)]
        self._parts = [vars(part) for part in parts]
        self._drawing = [vars(part) for part in parts if _may_draw(part)]

    def check(self, hooked: bool) -> None:
        """Raise where hooks would give wrong numbers; warn, once, where the same input gives another output each time."""
        if hooked and any(map(contains, self._parts, repeat(_COMPILED))):
            refuse_wrappers(self.module)
        if not any(map(_in_training, self._drawing)):
            self._warned = False
            return
        if hooked and torch.is_grad_enabled():
            self._refuse_checkpointing()
        if not self._warned:
            source = random_part(self.module)
            if source:
                self._warned = True
                warn(
                    f"{source} draws random numbers: the model is in training mode, and the same input gives another output each time. "
                    "Call model.eval()."
                )

    def _refuse_checkpointing(self) -> None:
        for name, part in self.module.named_modules():
            if part.training and getattr(part, "gradient_checkpointing", False) is True:
                raise HookError(
                    f"Gradient checkpointing is on in {name or type(part).__name__}: the backward pass would run it again without the hooks, and "
                    "its gradients would be wrong. Call model.module.gradient_checkpointing_disable() or model.eval(), or run under "
                    "torch.no_grad()."
                )


def _may_draw(part: nn.Module) -> bool:
    """Whether a module's training mode can matter: it may draw, be its rate 0 now, or can run its blocks again in the backward pass."""
    known = hasattr(part, "p") or hasattr(part, "gradient_checkpointing") or type(part).__name__ in DRAWS
    return known or any("drop" in name for name in vars(part))


def random_part(module: nn.Module) -> str:
    """The first part that draws random numbers in the module's present state, "" if none does: a rate of dropping above 0, or what a family says."""
    for name, part in module.named_modules():
        if part.training and (any(rate > 0 for rate in _rates(part)) or _draws(part)):
            return name or type(part).__name__
    return ""


def _draws(part: nn.Module) -> bool:
    names = DRAWS.get(type(part).__name__, ())
    return any(getattr(part.config, name, None) is not None for name in names)


def _rates(part: nn.Module) -> Iterator[float]:
    """Every rate at which a part drops: a dropout's own, and those that attention and stochastic depth keep as plain numbers."""
    if isinstance(part, nn.modules.dropout._DropoutNd):
        yield part.p
    for name, value in vars(part).items():
        if "drop" in name and type(value) in (float, int):
            yield value


def refuse_unwrapped(model: Any) -> None:
    """Raise InputError for anything but a wrapped model where an experiment takes one: it comes first, then the data."""
    if not hasattr(model, "towers"):
        raise InputError(
            f"The model comes first, as in (model, pairs, …): give a wrapped model, cv.HookedModel(module, processor), not a {type(model).__name__}."
        )


def refuse_random(module: nn.Module, what: str) -> None:
    """Raise InputError if the same input gives another output each time: ``what`` compares runs."""
    source = random_part(module)
    if source:
        raise InputError(
            f"{what} compares runs, and in training mode {source} makes each one different: call model.eval() first."
        )


def refuse_wrappers(module: nn.Module) -> None:
    """Raise UnsupportedModelError for a module whose calls pass by torch hooks: compiled, or run as copies on several devices."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UnsupportedModelError(
            f"{type(module).__name__} runs copies of the module, which carry no hooks of ours. Wrap the one inside: HookedModel(module.module)."
        )
    compiled = type(module).__name__ == "OptimizedModule" or any(
        getattr(part, _COMPILED, None) is not None for part in module.modules()
    )
    if compiled:
        raise UnsupportedModelError(
            "This module is compiled, and hooks added after compilation never fire. Wrap the plain module, compile nothing."
        )


def refuse_inference(module: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise InputError if gradients are asked for where there can be none: in inference_mode, or of tensors made there."""
    if torch.is_inference_mode_enabled():
        raise InputError("There are no gradients in torch.inference_mode(); leave it, or use torch.no_grad() instead.")
    made_there = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.is_inference()]
    if made_there:
        raise InputError(
            f"{made_there[0]} was made in torch.inference_mode(), and no gradient passes it: make it outside, or .clone() it here."
        )
    if any(parameter.is_inference() for parameter in module.parameters()):
        raise InputError("The model was made in torch.inference_mode(), and no gradient passes it: load it outside.")
