"""Norms and scales as affine maps: what a module of a block does to a vector of the stream, with its denominator as the run has it or held.

A norm computes ``out = gain · centre(x) / denominator(x) + bias``. With the denominator held it is affine in ``x``, so parts that add up to ``x``
go through it one by one and add up again, the bias aside. A scale (LayerScale) is ``out = gain · x``; its gain is measured, so nothing here
knows what the module calls its parameter. A gate is a parameter of the block itself. :class:`Identity` stands where nothing follows, a
:class:`Chain` for several.

Held maps are computed in float32 at least and returned in the precision of what they are given.

Not covered: norms over several axes, norms whose statistics are buffers (BatchNorm), scales that mix coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import UnsupportedModelError
from circuitvision.model.block_layout import Gate
from circuitvision.model.spec import is_norm, norm_spec
from circuitvision.model.weights import computing, main_device, main_dtype, norm_weights, parameter


def upcast(value: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if that is what it is."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


class Identity:
    """Nothing: what is given is what comes out."""

    normed = False
    """Whether the length of what comes out depends on the input: a denominator is needed to make the map linear."""

    def __call__(self, value: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The module's own output."""
        return value

    def gained(self, value: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """``gain · value``: what a norm makes of a normalised value, without the bias."""
        return value

    def denominator(self, value: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"] | None:
        """What a norm divides ``value`` by; None for all that is no norm."""
        return None

    def linear(
        self, value: Float[Tensor, "... d_model"], denominator: Float[Tensor, "... 1"] | None = None
    ) -> Float[Tensor, "... d_model"]:
        """``gain · centre(value) / denominator``, without the bias; without a denominator nothing is divided."""
        return value

    def transposed(
        self, gradient: Float[Tensor, "... d_model"], denominator: Float[Tensor, "... 1"] | None = None
    ) -> Float[Tensor, "... d_model"]:
        """The transpose of :meth:`linear`: the gradient at the input, of one at the output, with the denominator held."""
        return gradient

    def bias(self, like: Tensor) -> Float[Tensor, " d_model"] | None:
        """What comes out beside :meth:`linear`, in the place and precision of ``like``; None where nothing does."""
        return None

    def held(
        self, value: Float[Tensor, "... d_model"], denominator: Float[Tensor, "... 1"] | None
    ) -> Float[Tensor, "... d_model"]:
        """The affine map with the denominator held: :meth:`linear` plus the bias."""
        out, bias = self.linear(value, denominator), self.bias(value)
        return out if bias is None else out + bias


class Scale(Identity):
    """A module that multiplies each coordinate with a number of its own (LayerScale).

    Raises:
        UnsupportedModelError: the module does something else, when its gain is asked for.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, value: Tensor) -> Tensor:
        return self.module(value)

    def gain(self, width: int) -> Float[Tensor, " d_model"]:
        """What each of ``width`` coordinates is multiplied with: what the module makes of ones."""
        module: Any = computing(self.module)
        ones = torch.ones(1, 1, width, dtype=main_dtype(module), device=main_device(module))
        gain = module.forward(ones)[0, 0]
        probe = torch.arange(1, width + 1, device=ones.device).mul(2.4).sin().to(ones)
        with torch.no_grad():
            found, expected = module.forward(probe[None, None])[0, 0].float(), (gain * probe).float()
            if float((found - expected).norm()) > 0.01 * float(expected.norm()):
                raise UnsupportedModelError(
                    f"{type(module).__name__} follows a branch and is neither a norm that is described (circuitvision.register_norm) "
                    "nor a scale of each coordinate."
                )
        return gain

    def gained(self, value: Tensor) -> Tensor:
        wide = upcast(value)
        return (wide * self.gain(value.shape[-1]).to(wide)).to(value.dtype)

    def linear(self, value: Tensor, denominator: Tensor | None = None) -> Tensor:
        return self.gained(value)

    def transposed(self, gradient: Tensor, denominator: Tensor | None = None) -> Tensor:
        return self.gained(gradient)


class Norm(Identity):
    """A norm that a family file describes; UnsupportedModelError for another."""

    normed = True

    def __init__(self, module: nn.Module) -> None:
        self.module, self.spec = module, norm_spec(module)

    def __call__(self, value: Tensor) -> Tensor:
        return self.module(value)

    def bias(self, like: Tensor) -> Tensor | None:
        _, bias = norm_weights(self.module)
        return None if bias is None else bias.to(like)

    def centred(self, value: Tensor) -> Tensor:
        """The value without its mean, where the norm takes it away."""
        return value - value.mean(-1, keepdim=True) if self.spec.centred else value

    def denominator(self, value: Tensor) -> Tensor:
        eps = getattr(computing(self.module), self.spec.eps)
        return (self.centred(upcast(value)).pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def gained(self, value: Tensor) -> Tensor:
        wide = upcast(value)
        weight, _ = norm_weights(self.module)
        return value if weight is None else (wide * (self.spec.offset + weight.to(wide))).to(value.dtype)

    def linear(self, value: Tensor, denominator: Tensor | None = None) -> Tensor:
        out = self.centred(upcast(value))
        return self.gained(out if denominator is None else out / denominator.to(out)).to(value.dtype)

    def transposed(self, gradient: Tensor, denominator: Tensor | None = None) -> Tensor:
        out = self.gained(upcast(gradient))
        return self.centred(out if denominator is None else out / denominator.to(out)).to(gradient.dtype)

    def held(self, value: Tensor, denominator: Tensor | None) -> Tensor:
        wide = upcast(value)
        out, bias = self.linear(wide, denominator), self.bias(wide)
        return (out if bias is None else out + bias).to(value.dtype)


class Gated(Identity):
    """A parameter that the block multiplies a branch with, ``λ · value`` or ``tanh(λ) · value``."""

    def __init__(self, block: nn.Module, gate: Gate) -> None:
        self.block, self.gate = block, gate

    def factor(self, like: Tensor) -> Tensor:
        """What the branch is multiplied with."""
        holder = self.block
        *parents, name = self.gate.parameter.split(".")
        for parent in parents:
            holder = getattr(holder, parent)
        value = parameter(holder, name)
        return (value.tanh() if self.gate.tanh else value).to(like.device)

    def __call__(self, value: Tensor) -> Tensor:
        return self.factor(value) * value

    def gained(self, value: Tensor) -> Tensor:
        wide = upcast(value)
        return (wide * self.factor(wide).to(wide)).to(value.dtype)

    def linear(self, value: Tensor, denominator: Tensor | None = None) -> Tensor:
        return self.gained(value)

    def transposed(self, gradient: Tensor, denominator: Tensor | None = None) -> Tensor:
        return self.gained(gradient)


class Chain(Identity):
    """Several maps, one after the other; one of them at most is a norm, whose denominator is the chain's."""

    def __init__(self, maps: Sequence[Identity]) -> None:
        self.maps = tuple(maps)
        norms = [number for number, one in enumerate(maps) if one.normed]
        if len(norms) > 1:
            raise UnsupportedModelError("Two norms follow one branch; one of them at most can be held.")
        self.norm = norms[0] if norms else None
        self.normed = bool(norms)  # type: ignore[misc]

    def __call__(self, value: Tensor) -> Tensor:
        for one in self.maps:
            value = one(value)
        return value

    def gained(self, value: Tensor) -> Tensor:
        for one in self.maps if self.norm is None else self.maps[self.norm :]:
            value = one.gained(value)
        return value

    def denominator(self, value: Tensor) -> Tensor | None:
        if self.norm is None:
            return None
        for one in self.maps[: self.norm]:
            value = one(value)
        return self.maps[self.norm].denominator(value)

    def linear(self, value: Tensor, denominator: Tensor | None = None) -> Tensor:
        for one in self.maps:
            value = one.linear(value, denominator if one.normed else None)
        return value

    def transposed(self, gradient: Tensor, denominator: Tensor | None = None) -> Tensor:
        for one in reversed(self.maps):
            gradient = one.transposed(gradient, denominator if one.normed else None)
        return gradient

    def bias(self, like: Tensor) -> Tensor | None:
        if self.norm is None:
            return None
        bias = self.maps[self.norm].bias(like)
        if bias is None:
            return None
        for one in self.maps[self.norm + 1 :]:
            bias = one.linear(bias)
        return bias


def following(block: nn.Module, then: Sequence[nn.Module | Gate]) -> Identity:
    """What follows a branch of a block does: modules (norms or scales) and gates, in order."""
    maps: list[Identity] = []
    for one in then:
        if isinstance(one, Gate):
            maps.append(Gated(block, one))
        else:
            maps.append(Norm(one) if is_norm(one) else Scale(one))
    return maps[0] if len(maps) == 1 else Chain(maps) if maps else Identity()


def frozen_norm(norm: nn.Module, value: Tensor, reference: Tensor) -> Tensor:
    """A norm whose denominator is the one it has at ``reference``: affine in ``value``, and equal to the norm where both are equal."""
    found = Norm(norm)
    return found.held(value, found.denominator(reference.detach()))
