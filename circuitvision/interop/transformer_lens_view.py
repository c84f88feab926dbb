"""The TransformerLens view of one tower: ``patching``, ``tools.analysis.interchange`` and ``ActivationCache`` on any tower of any model.

These tools are duck-typed: they ask for ``cfg``, ``run_with_cache``, ``run_with_hooks``, ``hooks``, ``to_tokens`` and
weights, and name sites without a tower (``blocks.0.hook_resid_pre``). The view answers with our own hooks, so nothing
is converted, replaced or folded, and every edit reaches the output. It never builds a ``TransformerBridge``.

*Tokens.* ``tokens = view.to_tokens(inputs)`` has one entry per position of **this tower** and stands for the whole
inputs, pixels included: see :mod:`circuitvision.interop.examples`.

*Names* are TransformerLens 4.3's, and one means something else than ours. Its decompositions start from
``hook_embed``, what enters the stream; here that is our ``hook_input`` (CLS token, positions, projected patches and
the norm before block 0 are in it), and there is no ``hook_pos_embed``. ``attn.hook_q_input`` is our ``hook_q_input``,
likewise k and v. ``attn.hook_result`` is left out where LayerScale or a norm follows the output projection, and
``ln_final.*`` where the final norm follows pooling: the tools would take these for something they are not.

*Folding.* TransformerLens expects the gain of the final norm inside ``W_U``. Nothing is folded here, so
``tokens_to_residual_directions`` gives ``gain · W_U[:, token]``: ``logit_attrs`` then equals ours.
``apply_ln_to_stack`` divides by the scale and applies no gain; ``accumulated_resid(apply_ln=True)`` applies the norm
itself.

Not covered: what needs a bridge (generation, compatibility mode, ``boot_transformers``), gradients through
``run_with_cache(incl_bwd=True)``, and pooling heads. Hooks must return what they change, as everywhere in
circuitvision.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitvision.errors import InputError, UnknownAttributeError, UnsupportedModelError
from circuitvision.hooked import HookedModel
from circuitvision.interop.examples import Examples
from circuitvision.interop.lens_blocks import BlockView
from circuitvision.model.registrations import HookPoint
from circuitvision.model.sites import NamesFilter, SiteName, matching
from circuitvision.model.spec import norm_spec
from circuitvision.model.tower import Tower
from circuitvision.model.weights import computing, in_width, norm_weights, out_width

if TYPE_CHECKING:
    from transformer_lens import ActivationCache
    from transformer_lens.config import TransformerLensConfig

HookList = Sequence[tuple[Any, Callable[..., Any]]]
THEIRS = {
    "hook_input": "hook_embed",
    "hook_q_input": "attn.hook_q_input",
    "hook_k_input": "attn.hook_k_input",
    "hook_v_input": "attn.hook_v_input",
}
"""Our site -> its name in TransformerLens, where the two differ."""
OURS_ALONE = ("hook_embed", "hook_pos_embed")
"""Sites whose names mean something else in TransformerLens: the patches before CLS and positions, the placeholders under an image."""


@dataclass
class LensPoint:
    """What a hook gets as ``hook``: the name without the tower, a ``ctx`` that is kept from run to run, and the number of the pass."""

    name: str
    ctx: dict[str, Any] = field(default_factory=dict)
    step: int = 0

    def layer(self) -> int:
        """The layer of a site in a block; InputError for a site outside the blocks."""
        found = SiteName.parse(f"tower.{self.name}").layer
        if found is None:
            raise InputError(f"{self.name} is in no block, so it has no layer.")
        return found


def transformer_lens(owner: Tower | HookedModel, tower: str | None = None) -> TowerView:
    """A view of one tower for TransformerLens's tools: ``transformer_lens(model.vision)`` or ``transformer_lens(model, tower="vision")``.

    ``tokens = view.to_tokens(inputs)`` ``[example, pos]`` counts positions in tokens of this tower and carries all inputs along.
    Raises InputError where the tower is not named or its model is gone.

    Source: Nanda and Bloom 2022, TransformerLens 4.3 (github.com/TransformerLensOrg/TransformerLens).
    """
    if isinstance(owner, Tower):
        if tower not in (None, owner.name):
            raise InputError(f"Asked for the tower {tower!r} of the tower {owner.name!r}; leave tower= out.")
        return TowerView(_model_of(owner), owner)
    if tower is None and len(owner.towers) == 1:
        tower = next(iter(owner.towers))
    if tower not in owner.towers:
        raise InputError(f"Which tower? Give one of {', '.join(owner.towers)}, e.g. transformer_lens(model.vision).")
    return TowerView(owner, owner.towers[tower])


def _model_of(tower: Tower) -> HookedModel:
    model = getattr(tower, "owner", None)
    model = model() if isinstance(model, weakref.ref) else model
    if not isinstance(model, HookedModel):
        raise InputError(
            f"This {tower.name} tower no longer knows the model it belongs to. Keep the HookedModel in a variable, or give it: "
            f'transformer_lens(model, tower="{tower.name}").'
        )
    return model


class TowerView:
    """One tower behind the interface of a TransformerLens model; made by :func:`transformer_lens`."""

    def __init__(self, model: HookedModel, tower: Tower) -> None:
        self.model, self.tower = model, tower
        self.examples = Examples(model, tower)
        self.names = {_their_name(full): full for full in model.sites(f"{tower.name}.**") if _has_meaning(tower, full)}
        self.hook_dict = {name: LensPoint(name) for name in self.names}
        self.blocks = [BlockView(block) for block in tower.blocks]
        self.cfg = _config(model, tower)
        if tower.final_norm is not None:
            self.ln_final = tower.final_norm
        if _reads_positions(tower):
            self.unembed = _head(tower)

    # -- running -----------------------------------------------------------------------------------------------------------------------------

    def to_tokens(self, inputs: Any) -> Int[Tensor, "example pos"]:
        """Tokens that stand for ``inputs`` (a mapping of everything the model reads; a lone tensor of images for an image model).

        One row per example, one entry per position of this tower. Rows may be indexed, repeated and reordered; positions may not be cut.
        Raises InputError for inputs that do not run this tower.
        """
        if isinstance(inputs, Tensor):
            if not all(tower.stack.image for tower in self.model.towers.values()):
                raise InputError(
                    "One tensor is not all this model reads; give the mapping that model.inputs(images=…, text=…) makes."
                )
            inputs = {"pixel_values": inputs}
        if not isinstance(inputs, Mapping):
            raise InputError(f"Inputs must be a mapping of tensors, got {type(inputs).__name__}.")
        return self.examples.tokens(inputs)

    def __call__(self, tokens: Any, return_type: str | None = "logits") -> Tensor:
        """One forward pass of the whole model; returns its output tensor, as ``model(inputs)`` does."""
        _check_return_type(return_type)
        return self.model(self.examples.inputs(tokens))

    def run_with_hooks(
        self,
        tokens: Any,
        return_type: str | None = "logits",
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Tensor:
        """One forward pass with hooks ``[(name, glob or predicate, fn(value, hook=point))]``; hooks never outlive the run.

        Raises UnknownSiteError for a name this tower does not have, InputError for ``reset_hooks_end=False``.
        """
        _check_return_type(return_type)
        if not reset_hooks_end:
            raise InputError("Hooks of this view end with the run; to keep them over several runs use view.hooks(...).")
        with self.hooks(fwd_hooks, bwd_hooks, clear_contexts=clear_contexts):
            return self(tokens)

    @contextlib.contextmanager
    def hooks(
        self,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[TowerView]:
        """Hooks for every run inside the block."""
        if not reset_hooks_end:
            raise InputError("Hooks of this view end with the block; model.add_hook adds hooks that stay.")
        try:
            with self.model.hooks(self._ours(fwd_hooks, _forward), self._ours(bwd_hooks, _backward)):
                yield self
        finally:
            if clear_contexts:
                for point in self.hook_dict.values():
                    point.ctx.clear()

    def run_with_cache(
        self,
        tokens: Any,
        return_type: str | None = "logits",
        names_filter: NamesFilter = None,
        remove_batch_dim: bool = False,
        device: torch.device | str | None = None,
        return_cache_object: bool = True,
        stop_at_layer: int | None = None,
        incl_bwd: bool = False,
    ) -> tuple[Tensor, ActivationCache | dict[str, Tensor]]:
        """One forward pass, and the activations of this tower as a ``transformer_lens.ActivationCache`` (a plain dict if asked).

        ``names_filter=None`` keeps all sites but the derived ones; scores and pattern make it the model's eager run.
        ``stop_at_layer`` ends the pass before that block of this tower. As there, values stay on the autograd path.
        Raises UnknownSiteError, and InputError for ``incl_bwd``.
        """
        from transformer_lens import ActivationCache

        _check_return_type(return_type)
        if incl_bwd:
            raise InputError(
                "This view caches no gradients; use model.run_with_cache(inputs, incl_bwd=True, metric=fn)."
            )
        chosen = self._match(names_filter)
        stop = None if stop_at_layer is None else (self.tower.name, stop_at_layer)
        logits, found = self.model.run_with_cache(
            self.examples.inputs(tokens),
            [self.names[name] for name in chosen],
            device=device,
            stop_at_layer=stop,
            keep_graph=True,
        )
        kept = set(found)
        values = {name: found[self.names[name]] for name in chosen if self.names[name] in kept}
        cache = ActivationCache(values, self)
        if remove_batch_dim:
            cache.remove_batch_dim(batch_size=next(iter(values.values())).shape[0])
        return logits, cache if return_cache_object else cache.cache_dict

    def _match(self, names_filter: NamesFilter) -> list[str]:
        if names_filter is None:
            wanted = set(matching(None, self.names.values()))
            return [name for name, full in self.names.items() if full in wanted]
        return matching(names_filter, self.names)

    def _ours(self, hooks: HookList, adapt: Callable[..., Any]) -> list[tuple[str, Callable[..., Any]]]:
        pairs = []
        for names_filter, fn in hooks:
            pairs += [(self.names[name], adapt(fn, self.hook_dict[name])) for name in self._match(names_filter)]
        return pairs

    # -- what the tools ask of a model -----------------------------------------------------------------------------------------------------------

    @property
    def original_model(self) -> nn.Module:
        """The module, where the tools look for parts in training mode."""
        return self.model.module

    def parameters(self) -> Iterator[nn.Parameter]:
        """The module's parameters."""
        return self.model.parameters()

    def requires_grad_(self, requires_grad: bool = True) -> TowerView:
        """Set ``requires_grad`` of every parameter; returns the view."""
        self.model.module.requires_grad_(requires_grad)
        return self

    def eval(self) -> TowerView:
        """Put the module into eval mode; returns the view."""
        self.model.eval()
        return self

    def set_use_split_qkv_input(self, use: bool) -> None:
        """Remember the flag; ``attn.hook_q_input`` and its like are always there and cost nothing unless asked for."""
        self.cfg.use_split_qkv_input = use

    def set_use_attn_result(self, use: bool) -> None:
        """Remember the flag; ``attn.hook_result`` costs nothing unless asked for."""
        self.cfg.use_attn_result = use

    def to_single_token(self, word: str) -> int:
        """The id of a one-piece word; InputError if it is none."""
        return self.model.token(word)

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape d_model"]:
        """Direction in the normalised stream that raises an output's logit: ``gain · W_U[:, token]``, the final norm's gain in it.

        Raises UnsupportedModelError for a tower without an unembedding of single positions.
        """
        if self.cfg.d_vocab < 0:
            raise UnsupportedModelError(
                f"The {self.tower.name} tower has no unembedding of single positions, so no output has a direction in its stream. "
                "Multiply the stack with a direction of your own, such as the gradient of the output you mean."
            )
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        directions = self.W_U[:, torch.as_tensor(ids, device=self.model.device)].movedim(0, -1)
        norm: Any = self.tower.final_norm
        if norm is None or not self.tower.output_head.table.normed:
            return directions
        gain, _ = norm_weights(norm)
        return directions if gain is None else directions * (norm_spec(norm).offset + gain.detach())

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of what the output biases of the blocks before ``layer`` add to the stream (with ``mlp_input``, of its attention as well)."""
        total = torch.zeros(self.cfg.d_model, dtype=self.model.dtype, device=self.model.device)
        for block in self.blocks[: layer + int(mlp_input)]:
            total = total + block.attn.b_O
        for block in self.blocks[:layer] if include_mlp_biases else ():
            total = total + block.mlp.b_out
        return total

    def __getattr__(self, name: str) -> Tensor:
        if name in ("W_O", "b_O"):
            return torch.stack([getattr(block.attn, name) for block in self.blocks])
        if name in ("W_out", "b_out"):
            return torch.stack([getattr(block.mlp, name) for block in self.blocks])
        if name.startswith(("W_", "b_")):
            return getattr(self.tower, name)
        raise UnknownAttributeError(f"The view of the {self.__dict__['tower'].name} tower has no attribute {name!r}.")

    def __repr__(self) -> str:
        return f"TowerView({self.tower!r}, {len(self.names)} sites)"


def _has_meaning(tower: Tower, full: str) -> bool:
    """Whether TransformerLens's tools would take this site for what it is."""
    site = SiteName.parse(full)
    if site.layer is None:
        table = tower.output_head.table
        after_pooling = table.normed and not table.norm_first
        return site.site not in OURS_ALONE and not (after_pooling and site.site.startswith("ln_final"))
    return site.site != "attn.hook_result" or not tower.blocks[site.layer].attn.layout.then


def _their_name(full: str) -> str:
    site = SiteName.parse(full)
    theirs = THEIRS.get(site.site, site.site)
    return theirs if site.layer is None else f"blocks.{site.layer}.{theirs}"


def _forward(fn: Callable[..., Any], point: LensPoint) -> Callable[..., Any]:
    def hook(value: Tensor, where: HookPoint) -> Tensor | None:
        point.step = where.step
        return fn(value, hook=point)

    return hook


def _backward(fn: Callable[..., Any], point: LensPoint) -> Callable[..., Any]:
    def hook(grad: Tensor, where: HookPoint) -> Tensor | None:
        point.step = where.step
        out = fn(grad, hook=point)
        return out[0] if isinstance(out, tuple) else out

    return hook


def _check_return_type(return_type: str | None) -> None:
    if return_type not in (None, "logits"):
        raise InputError(
            f"return_type={return_type!r} is not available: this view returns the model's output; compute the loss from it."
        )


def _head(tower: Tower) -> Any:
    """The module that reads single positions of this tower as outputs, or None: a projection into a shared space is none."""
    head = tower.output_head
    if head.weight_name != "W_U" or head.module is None:
        return None
    return head.module if in_width(head.module) == tower.cfg.d_model else None


def _reads_positions(tower: Tower) -> bool:
    """Whether the output is exactly the head on the normed stream, at the positions that are read: what a logit lens takes for granted."""
    table = tower.output_head.table
    if table.head is None or _head(tower) is None or tower.final_norm is None:
        return False
    return table.finish == "none" and table.normed and table.norm_first


def _config(model: HookedModel, tower: Tower) -> TransformerLensConfig:
    from transformer_lens.config import TransformerLensConfig

    c = tower.cfg
    config: Any = tower.config
    head = _head(tower)
    n_grid = None if c.grid is None else c.n_prefix + c.grid[0] * c.grid[1]
    norm: Any = tower.blocks[0].attn.norm
    return TransformerLensConfig(
        d_model=c.d_model,
        d_head=c.d_head,
        n_layers=c.n_layers,
        n_ctx=n_grid or int(getattr(config, "max_position_embeddings", 0) or -1),
        n_heads=c.n_heads,
        d_mlp=c.d_mlp,
        d_vocab=-1 if head is None else out_width(head),
        device=str(model.device),
        n_key_value_heads=c.n_kv_heads,
        gated_mlp=c.gated_mlp,
        uses_rms_norm=c.norm == "RMSNorm",
        final_rms=c.norm == "RMSNorm",
        normalization_type="RMS" if c.norm == "RMSNorm" else "LN",
        positional_embedding_type="rotary" if c.rotary else "standard",
        eps=0.0 if norm is None else float(getattr(computing(norm), norm_spec(norm).eps)),
        act_fn=c.act,
        default_prepend_bos=False,
        dtype=model.dtype,
    )
