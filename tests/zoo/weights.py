"""Random weights of order one for any transformers module.

Default initialisations (standard deviation 0.02) make every component's effect vanish, so that a broken hook would pass
an approximate test. Here each matrix keeps the scale of its input, norms have uneven gains, biases are not zero, and
attention patterns are far from uniform.

Every parameter is drawn from its own generator, seeded by the CRC of the case's name and the parameter's path: the
values do not depend on the order of modules, on the process, or on the hash seed.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Parameters that belong to no standard layer: path ending -> (mean, standard deviation).
BARE: dict[str, tuple[float, float]] = {
    "logit_scale": (2.0, 0.0),
    "logit_bias": (-0.7, 0.0),
    "lambda1": (0.6, 0.2),
    "in_proj_bias": (0.0, 0.3),
}


def generator_for(*parts: str) -> torch.Generator:
    """A CPU generator whose seed depends on the text of `parts` only."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(parts).encode()))


def _mean_and_std(model: Any, module: nn.Module, name: str, parameter: Tensor) -> tuple[float, float]:
    if name in BARE:
        return BARE[name]
    if isinstance(module, nn.Embedding):
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        tied = head is not None and head.weight is parameter
        # A tied table is also the unembedding: its rows must not be longer than the output scale asks for.
        return 0.0, 1.2 / math.sqrt(parameter.shape[1]) if tied or hasattr(module, "embed_scale") else 0.8
    if name == "bias":
        return 0.0, 0.3
    if parameter.ndim == 1 and name == "weight":
        # Gemma's norms multiply by 1 + weight, all others by weight.
        return (0.0 if "Gemma" in type(module).__name__ else 1.0), 0.3
    if isinstance(module, nn.Linear | nn.Conv2d) or name == "in_proj_weight":
        return 0.0, 1.3 / math.sqrt(parameter[0].numel())
    return 0.0, 0.8


def randomise(model: ModuleT, name: str) -> ModuleT:
    """`model` in eval mode with seeded weights; tied parameters stay tied, buffers stay as they are."""
    seen: set[int] = set()
    with torch.no_grad():
        for path, module in model.named_modules():
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                mean, std = _mean_and_std(model, module, parameter_name, parameter)
                noise = torch.randn(parameter.shape, generator=generator_for(name, path, parameter_name))
                parameter.copy_(mean + std * noise)
    return model.eval()
