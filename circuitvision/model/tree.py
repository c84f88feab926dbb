"""Whether the modules that carry sites are still the ones the model runs.

Adapters are put into a model by replacing modules in place: a projection that was found when the model was wrapped is afterwards the layer inside
an adapter, and computes another value. A :class:`ModuleTree` keeps where every module on the way to a site sits, and tells in microseconds whether
one was replaced since.

Adapters whose effect is no property of the modules are refused: prompts add positions that no token has, and mixtures weigh their parts by input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import eq
from typing import Any

from torch import nn

from circuitvision.errors import UnsupportedModelError

_BY_INPUT = ("POLY", "XLORA")
"""Kinds of adapters whose layers differ from example to example."""


class ModuleTree:
    """Where the ``wanted`` modules, and every module on the way to them, sit under ``root``."""

    def __init__(self, root: nn.Module, wanted: Iterable[nn.Module]) -> None:
        self._tables: list[dict[str, nn.Module | None]] = []
        self._found: list[dict[str, nn.Module | None]] = []
        self._wanted = {id(module) for module in wanted}
        self._walk(root)
        del self._wanted

    def _walk(self, parent: nn.Module) -> bool:
        # Every child is walked: what carries a site may lie deeper in any of them.
        carry = [child is not None and self._walk(child) for child in parent._modules.values()]
        if any(carry):
            self._tables.append(parent._modules)
            self._found.append(dict(parent._modules))
        return any(carry) or id(parent) in self._wanted

    def intact(self) -> bool:
        """Whether every one of them, and what stands beside it, is still where it was."""
        # Modules are equal only to themselves, and tables are compared faster than their entries are looked up.
        return all(map(eq, self._tables, self._found))


def base_of(module: nn.Module) -> Any:
    """The model inside an adapter's wrapper, or the model itself; UnsupportedModelError for adapters that add positions or weigh by input."""
    outer: Any = module
    configs = getattr(outer, "peft_config", None)
    refuse_adapters(configs if isinstance(configs, dict) else {})
    unwrap = getattr(outer, "get_base_model", None)
    return outer if unwrap is None else unwrap()


def refuse_adapters(configs: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for adapters that are not weights: prompts, and mixtures that depend on the input."""
    for name, config in configs.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
            raise UnsupportedModelError(
                f"The adapter {name!r} ({kind}) puts learned prompts into the model: positions and keys that no token stands for. "
                "Wrap the model without it (model.get_base_model()), or use an adapter of weights, such as LoRA."
            )
        if kind in _BY_INPUT or getattr(config, "alora_invocation_tokens", None):
            raise UnsupportedModelError(
                f"The adapter {name!r} ({kind}) gives its layers other weights for other inputs, so they have no one weight. "
                "Wrap the model without it (model.get_base_model()), or use an adapter of weights, such as LoRA."
            )
