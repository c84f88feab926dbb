"""A step of distributed alignment search in each tool: the interchange inside a trained subspace of what enters a layer, at all positions.

``plain blocks`` is the model's own blocks from the layer on, called by hand on recorded streams, with the same orthogonal parametrisation and
Adam: the share of the model behind the layer, and the rotation that nobody can avoid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from causal_tools import OURS, Scene
from sweep_tools import CannotError, _first_line, _import_pyvene
from torch import Tensor

import circuitvision as cv
from circuitvision.subspaces.fitting import OrthonormalBasis
from circuitvision.subspaces.pairs import SitePairs


class Steps:
    """One layer's step in every tool; each trains a basis of its own from the same start."""

    PLAIN, WHOLE, LAST = "plain blocks behind the layer", "loop of plain hooks", f"{OURS}, last position"

    def __init__(self, scene: Scene, model: Any, layer: int, rank: int) -> None:
        self.scene, self.model, self.layer, self.rank = scene, model, layer, rank
        self.site = f"{scene.tower}.blocks.{layer}.hook_resid_pre"
        self.base, self.source = dict(scene.base), dict(scene.source)
        self.foils = torch.zeros(1, dtype=torch.long, device=model.device)
        self.keywords: dict[str, Any] = {}
        place = {0: (scene.block(layer), "in")}
        handle = scene.block(layer).register_forward_pre_hook(self._look, with_kwargs=True)
        with torch.no_grad():
            self.stream = scene.reading(place, self.base)[1][0]
            handle.remove()
            self.moved = scene.reading(place, self.source)[1][0]
        self.pairs = self._pairs(None)
        self.last = self._pairs("last") if scene.causal else None

    def _look(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.keywords = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if "past_key_values" in self.keywords:
            self.keywords["past_key_values"] = None

    def _pairs(self, positions: Any) -> SitePairs:
        answers = (1 - self.foils).tolist()
        pairs = cv.data.Pairs(inputs=self.base, corrupt_inputs=self.source, answers=answers, foils=self.foils.tolist())
        return SitePairs(self.model, pairs, self.site, positions=positions, allow_wrong=True)

    # -- the ways ------------------------------------------------------------------------------------------------------------------------------

    def _rows_of(self, logits: Tensor) -> Tensor:
        return logits[:, -1] if self.scene.text else logits

    def _cross_entropy(self, logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(self._rows_of(logits).float(), self.foils)

    def _interchanged(self, basis: Tensor, stream: Tensor) -> Tensor:
        return stream + (self.moved - stream) @ basis @ basis.T

    def _plain(self, basis: Tensor) -> Tensor:
        stream = self._interchanged(basis, self.stream)
        for layer in range(self.layer, self.scene.n_layers):
            out = self.scene.block(layer)(stream, **self.keywords)
            stream = out[0] if isinstance(out, tuple) else out
        return self._cross_entropy(self.scene.tail(stream))

    def _whole(self, basis: Tensor) -> Tensor:
        change = [(self.scene.block(self.layer), "in", lambda given: self._interchanged(basis, given))]
        with self.scene.writing(change):
            return self._cross_entropy(self.scene.module(**self.base).logits)

    @staticmethod
    def _ours(data: SitePairs) -> Callable[[Tensor], Tensor]:
        (part,) = data.parts
        return lambda basis: data.loss(
            part, data._rows(part.run([data.projection(part, basis)]), part.inputs, part.batch)
        )

    def _objective(self, way: str) -> Callable[[Tensor], Tensor]:
        if way == self.LAST:
            assert self.last is not None
            return self._ours(self.last)
        return {self.PLAIN: self._plain, self.WHOLE: self._whole, OURS: self._ours(self.pairs)}[way]

    def _basis(self) -> OrthonormalBasis:
        return OrthonormalBasis(self.stream.shape[-1], self.rank, seed=3, device=self.model.device)

    def loss(self, way: str) -> Tensor:
        """The loss at the start."""
        with torch.enable_grad():
            return self._objective(way)(self._basis().weight).detach()

    def step(self, way: str) -> Callable[[], None]:
        """A function that takes one step."""
        held, objective = self._basis(), self._objective(way)
        optimizer = torch.optim.Adam(held.parameters(), lr=1e-4)
        trained = list(held.parameters())
        if way in (OURS, self.LAST):
            from circuitvision.subspaces.fitting import _step

            return self._with_graph(lambda: _step(optimizer, objective(held.weight)))

        def take() -> None:
            optimizer.zero_grad(set_to_none=True)
            objective(held.weight).backward(inputs=trained)
            optimizer.step()

        return self._with_graph(take)

    @staticmethod
    def _with_graph(run: Callable[[], Any]) -> Callable[[], None]:
        def graphed() -> None:
            with torch.enable_grad():
                run()

        return graphed

    # -- pyvene --------------------------------------------------------------------------------------------------------------------------------

    def pyvene(self) -> Callable[[], None]:
        """pyvene's low-rank rotated interchange."""
        pv = _import_pyvene()
        rotated = pv.LowRankRotatedSpaceIntervention(
            embed_dim=self.stream.shape[-1], low_rank_dimension=self.rank, keep_last_dim=True
        )
        model = self.scene.intervenable([(self.layer, rotated, self.scene.length)])
        with torch.no_grad():
            rotated.rotate_layer.weight = self._basis().weight.detach()
        trained = list(rotated.parameters())
        optimizer = torch.optim.Adam(trained, lr=1e-4)
        where = [[list(range(self.scene.length))]]

        def loss() -> Tensor:
            _, output = model(
                self.base,
                unit_locations={"sources->base": (where, where)},
                source_representations={model.sorted_keys[0]: self.moved.clone()},
            )
            return self._cross_entropy(output.logits)

        def take() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            optimizer.step()

        self.pyvene_loss = loss
        try:
            with torch.no_grad():
                loss()
                loss()
        except IndexError as error:
            message = f"it removes transformers' own hooks, and the bare model then raises {_first_line(error)}"
            raise CannotError(message) from error
        return self._with_graph(take)
