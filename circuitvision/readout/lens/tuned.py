"""Tuned lens: one affine map per layer that carries an early residual to where the tower's own head can read it.

``lens_l(h) = head(norm(h + h A_l + b_l))``; ``A_l`` and ``b_l`` start at zero, so an untrained tuned lens is the plain one. Each layer is
trained to minimise ``KL(output || lens_l)`` over the positions chosen, where ``output`` is the tower's own reading of its last residual at the
same position (the model's output wherever the tower feeds it). Outputs that are no distribution (action dimensions) are fitted by the mean
squared error.

The last layer's map stays the identity. A tuned lens says what could be read linearly, not what later layers do read; it needs inputs like
those it is used on. The KL on positions held out is kept per layer, beside that of the plain lens. Not covered: training while the model streams
from disk.

Reference: Belrose et al. 2023, arXiv 2303.08112.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.sites import SiteName
from circuitvision.progress import Progress
from circuitvision.provenance import describe
from circuitvision.readout.lens.sites import lens_sites
from circuitvision.readout.targets import output_kind
from circuitvision.results import Result

if TYPE_CHECKING:
    from circuitvision.model.hooked import HookedModel


def _nothing() -> Tensor:
    return torch.zeros(0)


@dataclass(frozen=True, eq=False)
class TunedLens(Result):
    """The trained maps of one tower: ``A`` is ``weight [layer d_model d_model]``, ``b`` is ``bias [layer d_model]``.

    ``values`` ``[lens layer]`` is the loss on the positions held out (nats; squared error for actions) of the plain and of the tuned lens.
    """

    tower: str = ""
    weight: Tensor = field(default_factory=_nothing)
    bias: Tensor = field(default_factory=_nothing)

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
    def train(
        cls,
        model: HookedModel,
        dataset: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        tower: str | None = None,
        *,
        positions: str | Sequence[str] | None = None,
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
            positions: kinds of positions to train on; by default those the tower's head reads (all real ones, where it reads all).
            held_out: share of positions kept for the loss that is reported.
            steps: steps of Adam per layer.
            learning_rate: its step size, falling to zero linearly.
            batch: positions per step.
            seed: of the split and the order.

        Raises:
            InputError: a tower without a head, a vision tower behind a projector, too few positions, no such kind.
        """
        from circuitvision.readout.lens.logit import lens_tower
        from circuitvision.readout.lens.reader import LensReader

        owner = lens_tower(model, tower)
        if output_kind(owner) in ("hidden", "embedding") or (
            owner.spec.readout and owner.spec.readout.finish == "projector"
        ):
            raise InputError(
                f"The {owner.name} tower's own head gives no prediction to train on. Train on a tower that the output is read from."
            )
        data = [dataset] if isinstance(dataset, Mapping) else list(dataset)
        if output_kind(owner) in ("texts", "images") and len(data) > 1:
            raise InputError(
                "A dual encoder's columns are the texts of the run: give the inputs of one run, with all images."
            )
        residuals, outputs, numbers = _residuals(model, data, owner.name, positions, LensReader)
        count = outputs.shape[0]
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(count, generator=generator)
        kept = round(count * held_out)
        if kept < 1 or count - kept < 2:
            raise InputError(
                f"There are {count} positions to train on, too few to hold out {held_out:.0%}; give more inputs."
            )
        split = (order[kept:], order[:kept])
        reader = LensReader(model, owner, _cache_of(model, data[0], owner.name))
        losses, weights, biases = [], [], []
        with Progress(len(residuals) * steps, f"tuned lens of {owner.name}") as bar:
            for index, values in enumerate(residuals):
                # The last layer is what the others are trained towards: its map is the identity, not Adam's noise around it.
                count_of_steps = 0 if index == len(residuals) - 1 else steps
                found = _fit(
                    reader, values, outputs, numbers, split, count_of_steps, learning_rate, batch, generator, bar
                )
                weights.append(found[0])
                biases.append(found[1])
                losses.append(found[2])
        labels = ["input", *range(owner.cfg.n_layers)]
        return cls(
            values=torch.tensor(losses).T,
            axes={"lens": ["plain", "tuned"], "layer": labels[: len(losses)]},
            provenance=describe(
                model,
                method=f"TunedLens.train(tower={owner.name}, steps={steps}, learning_rate={learning_rate}, batch={batch})",
                inputs=tuple(data),
                seed=seed,
                positions=count,
            ),
            tower=owner.name,
            weight=torch.stack(weights),
            bias=torch.stack(biases),
        )


def _cache_of(model: HookedModel, inputs: Mapping[str, Any], tower: str) -> Any:
    names = list(lens_sites(model, tower))
    if output_kind(model.towers[tower]) in ("texts", "images"):
        names += [f"{name}.hook_readout" for name in model.towers]
    with torch.no_grad():
        return model.run_with_cache(inputs, names_filter=names)[1]


def _residuals(
    model: HookedModel,
    data: Sequence[Mapping[str, Any]],
    tower: str,
    positions: str | Sequence[str] | None,
    reader_class: Any,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The residuals ``[position d_model]`` of every layer at the positions chosen, the tower's own output there, and their numbers."""
    owner = model.towers[tower]
    per_layer: list[list[Tensor]] = []
    outputs: list[Tensor] = []
    numbers: list[Tensor] = []
    for inputs in data:
        cache = _cache_of(model, inputs, tower)
        mask = _mask(model.tokens(cache.inputs)[tower], owner, positions, cache.inputs)
        values = [cache[name][mask].float().cpu() for name in lens_sites(model, tower)]
        reader = reader_class(model, owner, cache)
        at = torch.arange(mask.shape[1]).expand(mask.shape)[mask]
        numbers.append(at)
        last = cache[lens_sites(model, tower)[-1]][mask]
        with torch.no_grad():
            said = [reader.at(last[part], at[part]) for part in torch.arange(len(at)).split(1024)]
        outputs.append(torch.cat(said).float().cpu())
        per_layer = per_layer or [[] for _ in values]
        for layer, value in enumerate(values):
            per_layer[layer].append(value)
    return [torch.cat(layer) for layer in per_layer], torch.cat(outputs), torch.cat(numbers)


def _mask(tokens: Any, owner: Any, positions: str | Sequence[str] | None, inputs: Mapping[str, Any]) -> Tensor:
    if positions is not None:
        mask = tokens.mask(positions)
    else:
        reads = owner.spec.readout.reads
        kinds = [kind for kind in reads if kind in {str(k) for k in set(tokens.kind.flatten())}]
        mask = tokens.mask(kinds) if kinds else torch.from_numpy(tokens.kind != "padding")
    if not bool(mask.any()):
        raise InputError(f"The {owner.name} tower has no position of the kind {positions!r} in these inputs.")
    return mask


def _fit(
    reader: Any,
    values: Tensor,
    outputs: Tensor,
    numbers: Tensor,
    split: tuple[Tensor, Tensor],
    steps: int,
    learning_rate: float,
    batch: int,
    generator: torch.Generator,
    bar: Progress,
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """The map of one layer, and the loss held out of the plain and of the tuned lens."""
    device = reader.model.device
    width = values.shape[-1]
    weight = torch.zeros(width, width, device=device, requires_grad=True)
    bias = torch.zeros(width, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(steps, 1))
    train, held = split

    def loss(index: Tensor, mapped: bool) -> Tensor:
        x = values[index].to(device)
        x = x + x @ weight + bias if mapped else x
        return _distance(reader.at(x, numbers[index]).float(), outputs[index].to(device), reader.kind)

    with torch.no_grad():
        plain = float(loss(held, False))
    with torch.enable_grad():
        for _ in range(steps):
            index = train[torch.randint(len(train), (min(batch, len(train)),), generator=generator)]
            gradients = torch.autograd.grad(loss(index, True), [weight, bias])
            weight.grad, bias.grad = gradients
            optimizer.step()
            schedule.step()
            bar.advance()
    with torch.no_grad():
        tuned = float(loss(held, True))
    return weight.detach().cpu(), bias.detach().cpu(), (plain, tuned)


def _distance(said: Tensor, output: Tensor, kind: str) -> Tensor:
    if kind == "actions":
        return (said - output).pow(2).mean()
    wanted = output.log_softmax(-1)
    return (wanted.exp() * (wanted - said.log_softmax(-1))).sum(-1).mean()
