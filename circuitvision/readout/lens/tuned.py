"""Tuned lens: one affine map per layer that carries an early residual to where the tower's own head can read it.

``lens_l(h) = head(norm(h + h A_l + b_l))``; ``A_l`` and ``b_l`` start at zero, so an untrained tuned lens is the plain one. Each layer is
trained to minimise ``KL(output || lens_l)`` over the positions chosen, where ``output`` is the tower's own reading of its last residual at the
same position (the model's output wherever the tower feeds it). Outputs that are no distribution (action dimensions) are fitted by the mean
squared error.

The last layer's map stays the identity. A tuned lens says what could be read linearly, not what later layers do read; it needs inputs like
those it is used on. The loss on examples held out is kept per layer, beside that of the plain lens: whole examples, because the positions of
one example (patches of one image above all) are nearly copies of each other, and a map that knows the picture would look as good as one that
knows the layer. Of a single example positions are held out, which the result says. Not covered: training while the model streams from disk.

The residuals of all layers at the positions trained on are held in memory, outputs are not: they are read again from the last residual, some
positions at a time.

Reference: Belrose et al. 2023, arXiv 2303.08112.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.links import divergence
from circuitvision.model.positions import Positions, PositionsLike
from circuitvision.model.sites import SiteName
from circuitvision.progress import Progress
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.lens.run import LensRun
from circuitvision.readout.recorded import chosen_tower, inputs_of
from circuitvision.results import Result

if TYPE_CHECKING:
    from circuitvision.hooked import HookedModel
    from circuitvision.model.tower import Tower


def _nothing() -> Tensor:
    return torch.zeros(0)


@dataclass(frozen=True, eq=False)
class TunedLens(Result):
    """The trained maps of one tower: ``A`` is ``weight [layer d_model d_model]``, ``b`` is ``bias [layer d_model]``.

    ``values`` ``[lens layer]`` is the loss on what was held out (nats; squared error for actions) of the plain and of the tuned lens.
    ``held_out`` says what that was: ``"examples"``, or ``"positions"`` where there was a single example; ``positions`` counts those trained on
    and those held out.
    """

    tower: str = ""
    weight: Tensor = field(default_factory=_nothing)
    bias: Tensor = field(default_factory=_nothing)
    held_out: str = "examples"
    positions: list[int] = field(default_factory=list)

    def highlights(self) -> dict[str, str]:
        """What the loss was measured on, and where training helped most."""
        gain = self.values[0] - self.values[1]
        at = int(gain.nan_to_num(-float("inf")).argmax())
        plain, tuned = (float(value) for value in self.values[:, at])
        found = {"helps most": f"{self.axes['layer'][at]}: {plain:.3g} → {tuned:.3g}"}
        if len(self.positions) == 2:
            found["held out"] = f"whole examples ({self.positions[1]} positions)"
            if self.held_out == "positions":
                found["held out"] = f"{self.positions[1]} positions of the one example that it was trained on"
        return found

    def translate(self, value: Float[Tensor, "row pos d_model"], site: str | None) -> Float[Tensor, "row pos d_model"]:
        """A residual at a site of the stream (None: what enters block 0) as the last layer would write it.

        Raises InputError for a site that is not the stream between blocks, or of a layer without a map.
        """
        name = SiteName.parse(site or "tower.hook_input")
        after = {"hook_input": 0, "hook_resid_pre": 0, "hook_resid_post": 1}
        if name.site not in after:
            raise InputError(
                f"A tuned lens maps the stream between blocks (hook_input, resid_pre, resid_post), not {site}."
            )
        index = after[name.site] + (name.layer or 0)
        if index >= len(self.weight):
            raise InputError(f"This tuned lens covers {len(self.weight) - 1} layers; there is no map for {site}.")
        weight, bias = (part[index].to(value.device, torch.float32) for part in (self.weight, self.bias))
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        return (wide + wide @ weight.to(wide) + bias.to(wide)).to(value.dtype)

    @classmethod
    @with_provenance
    def train(
        cls,
        model: HookedModel,
        dataset: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        tower: str | None = None,
        *,
        positions: PositionsLike = None,
        held_out: float = 0.2,
        steps: int = 300,
        learning_rate: float = 1e-2,
        batch: int = 256,
        seed: int = 0,
    ) -> TunedLens:
        """Train one affine map per layer on the residuals of given inputs.

        Args:
            model: the hooked model; its weights are not touched.
            dataset: inputs of one run, or a list of them.
            tower: by default the language tower, or the only one.
            positions: which positions to train on, see :mod:`circuitvision.model.positions`; by default those the tower's head reads (all real
                ones, where it reads all).
            held_out: share of the examples (of a single example: of its positions) kept for the loss that is reported.
            steps: steps of Adam per layer.
            learning_rate: its step size, falling to zero linearly.
            batch: positions per step.
            seed: of the split and the order.

        Raises:
            InputError: a tower without a head, a vision tower behind a projector, too few positions, no such kind.
        """
        read_tower = chosen_tower(model, tower)
        data = _checked(read_tower, dataset, held_out, steps, learning_rate, batch)
        # Inference tensors cannot be tracked, whoever calls.
        with torch.inference_mode(False):
            seen = _Seen.collect(model, data, read_tower, positions)
            generator = torch.Generator().manual_seed(seed)
            train, held = seen.split(held_out, generator)
            fit = _Fit(seen, train, held, steps, learning_rate, batch, generator)
            with Progress(len(seen.residuals) * steps, f"tuned lens of {read_tower.name}") as bar:
                maps = [fit.layer(index, bar) for index in range(len(seen.residuals))]
        weights, biases, losses = zip(*maps, strict=True)
        how = f"steps={steps}, learning_rate={learning_rate}, batch={batch}, held_out={held_out}"
        return cls(
            values=torch.tensor(losses).T,
            axes={"lens": ["plain", "tuned"], "layer": ["input", *range(read_tower.cfg.n_layers)][: len(losses)]},
            provenance=describe(
                model,
                method=f"TunedLens.train(tower={read_tower.name}, {how})",
                inputs=tuple(data),
                seed=seed,
                positions=len(seen.numbers),
            ),
            tower=read_tower.name,
            weight=torch.stack(weights),
            bias=torch.stack(biases),
            held_out="examples" if seen.n_examples > 1 else "positions",
            positions=[len(train), len(held)],
        )


def _checked(
    read_tower: Tower, dataset: Any, held_out: float, steps: int, learning_rate: float, batch: int
) -> list[Mapping[str, Any]]:
    """The dataset as a list of inputs; InputError for what cannot be trained on, or with."""
    if read_tower.output_head.kind in ("hidden", "embedding") or read_tower.connector is not None:
        raise InputError(
            f"The {read_tower.name} tower's own head gives no prediction to train on. Train on a tower that the output is read from."
        )
    if not 0 < held_out < 1:
        raise InputError(
            f"held_out is a share between 0 and 1, not {held_out!r}: without it nothing says how good the lens is."
        )
    if steps < 0 or batch < 1 or not 0 <= learning_rate < float("inf"):
        raise InputError(
            f"Training needs steps from 0, a batch from 1 and a finite learning_rate from 0; got {steps}, {batch}, {learning_rate}."
        )
    data = [dataset] if isinstance(dataset, Mapping) else list(dataset)
    if not data:
        raise InputError("Give inputs to train on: those of one run, or a list of them.")
    if read_tower.output_head.compares and len(data) > 1:
        raise InputError(
            "A dual encoder's columns are the texts of the run: give the inputs of one run, with all images."
        )
    return data


@dataclass(frozen=True)
class _Seen:
    """What a lens is trained on: residuals ``[position d_model]`` of every layer, their positions' numbers and examples."""

    reader: LensRun
    residuals: list[Tensor]
    numbers: Int[Tensor, " position"]
    examples: Int[Tensor, " position"]

    @property
    def n_examples(self) -> int:
        """How many examples have a position here."""
        return len(self.examples.unique())

    @classmethod
    def collect(
        cls, model: HookedModel, data: Sequence[Mapping[str, Any]], read_tower: Tower, positions: PositionsLike
    ) -> _Seen:
        """Run the model on all inputs and keep the residuals at the positions chosen."""
        names = read_tower.stream_sites(inputs_of(data[0]))
        needed = names + [f"{name}.hook_readout" for name in model.towers if read_tower.output_head.compares]
        residuals: list[list[Tensor]] = [[] for _ in names]
        numbers: list[Tensor] = []
        examples: list[Tensor] = []
        reader = None
        for inputs in data:
            with torch.no_grad():
                cache = model.run_with_cache(inputs, names_filter=needed)[1]
            tokens = model.tokens(cache.inputs)[read_tower.name]
            mask = _mask(tokens, read_tower, positions)
            for kept, name in zip(residuals, names, strict=True):
                kept.append(cache[name][mask].cpu())
            numbers.append(torch.arange(mask.shape[1]).expand(mask.shape)[mask])
            before = int(examples[-1].max()) + 1 if examples else 0
            examples.append(before + torch.as_tensor(tokens.example)[:, None].expand(mask.shape)[mask])
            reader = reader or LensRun(model, read_tower, cache)
        assert reader is not None
        return cls(reader, [torch.cat(kept) for kept in residuals], torch.cat(numbers), torch.cat(examples))

    def split(self, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Numbers of the positions to train on and of those held out: whole examples, where there are several.

        Raises InputError if either would be empty.
        """
        names, unit = self.examples.unique(return_inverse=True)
        single = len(names) == 1
        count = len(self.numbers) if single else len(names)
        order = torch.randperm(count, generator=generator)
        kept = order[: max(1, round(count * share)) if count > 1 else 0]
        out = torch.zeros(count, dtype=torch.bool).index_fill(0, kept, True)
        out = out if single else out[unit]
        train, held = (~out).nonzero().flatten(), out.nonzero().flatten()
        if len(held) < 1 or len(train) < 2:
            raise InputError(
                f"There are {count} {'positions' if single else 'examples'} to train on, too few to hold out {share:.0%}; give more inputs."
            )
        return train, held


def _mask(tokens: Any, read_tower: Tower, positions: PositionsLike) -> Tensor:
    if positions is not None:
        mask = Positions.of(positions).resolve(tokens) & torch.from_numpy(tokens.present)
    else:
        there = {str(kind) for kind in set(tokens.kind.flatten())}
        kinds = [kind for kind in read_tower.output_head.table.reads if kind in there]
        mask = tokens.mask(kinds) if kinds else torch.from_numpy(tokens.present)
    if not bool(mask.any()):
        raise InputError(
            f"The {read_tower.name} tower has none of the positions {Positions.of(positions).text!r} in these inputs."
        )
    return mask


@dataclass
class _Fit:
    """How every layer's map is trained."""

    seen: _Seen
    train: Tensor
    held: Tensor
    steps: int
    learning_rate: float
    batch: int
    generator: torch.Generator

    def layer(self, index: int, bar: Progress) -> tuple[Tensor, Tensor, tuple[float, float]]:
        """The map of one layer, and the loss held out of the plain and of the tuned lens."""
        values = self.seen.residuals[index]
        device, width = self.seen.reader.model.device, values.shape[-1]
        weight = torch.zeros(width, width, device=device, requires_grad=True)
        bias = torch.zeros(width, device=device, requires_grad=True)
        plain = self._held_out(values, None)
        # The last layer is what the others are trained towards: its map is the identity, not Adam's noise around it.
        steps = 0 if index == len(self.seen.residuals) - 1 else self.steps
        optimizer = torch.optim.Adam([weight, bias], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
        size = min(self.batch, len(self.train))
        for _ in range(steps):
            chosen = self.train[torch.randint(len(self.train), (size,), generator=self.generator)]
            with torch.enable_grad():
                loss = self._distances(values, chosen, (weight, bias)).mean()
                weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
            optimizer.step()
            schedule.step()
            bar.advance()
        tuned = self._held_out(values, (weight, bias)) if steps else plain
        return weight.detach().cpu(), bias.detach().cpu(), (plain, tuned)

    def _held_out(self, values: Tensor, maps: tuple[Tensor, Tensor] | None) -> float:
        with torch.no_grad():
            found = [self._distances(values, part, maps) for part in self.held.split(self.seen.reader.vectors_at_once)]
        return float(torch.cat(found).double().mean())

    def _distances(
        self, values: Tensor, index: Tensor, maps: tuple[Tensor, Tensor] | None
    ) -> Float[Tensor, " position"]:
        """How far the lens of some positions is from the tower's output there: KL in nats; without a distribution the mean squared error."""
        reader, numbers = self.seen.reader, self.seen.numbers[index]
        device = reader.model.device
        x = values[index].to(device)
        if maps is not None:
            wide = x.float()
            x = wide + wide @ maps[0] + maps[1]
        said = reader.at(x, numbers).float()
        with torch.no_grad():
            output = reader.at(self.seen.residuals[-1][index].to(device), numbers).float()
        if reader.link == "none":
            return (said - output).pow(2).mean(-1)
        return divergence(output, said, reader.link)
