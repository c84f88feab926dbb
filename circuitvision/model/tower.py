"""A tower: one transformer of the model, with its configuration, weights, sites and read-out, whatever family it belongs to.

Weights follow TransformerLens: row vectors, so ``q = x @ W_Q[layer, head] + b_Q[layer, head]``. They are what the model holds: nothing is folded or
centred. ``tower.W_Q`` stacks copies over layers; ``tower.blocks[3].W_Q`` is a live view of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuitvision.errors import InputError, UnknownAttributeError, UnsupportedModelError
from circuitvision.model import branches
from circuitvision.model.block import Block
from circuitvision.model.flow import Connector
from circuitvision.model.output_head import OutputHead, model_of
from circuitvision.model.packing.run import ImageRun
from circuitvision.model.packing.sequences import as_rows, as_sequence
from circuitvision.model.patches import PatchEmbedding
from circuitvision.model.settings import hidden_states, setting
from circuitvision.model.slots import SlotGradients, slot_sites
from circuitvision.model.spec import (
    Family,
    TowerSpec,
    require,
    resolve,
    stack_for,
    sub_config,
)
from circuitvision.model.tower_config import measured, number_of_heads
from circuitvision.model.weights import (
    embedding_weight,
    main_dtype,
    parameter,
)

if TYPE_CHECKING:
    from circuitvision.model.cache import ActivationCache
    from circuitvision.model.wrapped import Wrapped


def _nobody() -> None:
    return None


class Tower:
    """One transformer of a wrapped model, e.g. ``model.vision``."""

    def __init__(
        self, module: nn.Module, config: Any, family: Family, spec: TowerSpec, siblings: dict[str, Tower]
    ) -> None:
        self.module = module
        self.family = family
        self.spec = spec
        self.siblings = siblings
        self.name = spec.name
        self.config_of_model = config
        self.config: Any = sub_config(config, spec.config)
        self.stack = stack_for(spec, self.config)
        self.find()
        self.hooks_disabled: Callable[[], AbstractContextManager[None]] = nullcontext
        """Keeps hooks from firing while modules are called for a read-out alone; set by the wrapper."""
        self.owner: Callable[[], Wrapped | None] = _nobody
        """The wrapped model this tower belongs to; set by the wrapper, which a tower does not keep alive."""

    def find(self) -> None:
        """Look up the tower's modules, when the model is wrapped and whenever one of them was replaced."""
        self.root = require(self.module, self.spec.root, f"{self.name} tower")
        self.n_heads = number_of_heads(self)
        """How many heads queries have, and keys and values."""
        blocks = resolve_list(self.root, self.stack.blocks, self.name)
        layout = self.stack.block
        self.blocks = [
            Block(self, layer, block, layout(block) if callable(layout) else layout)
            for layer, block in enumerate(blocks)
        ]
        self.final_norm = resolve(self.root, self.stack.final_norm)
        if self.final_norm is None and self.spec.stack is not None and self.stack.final_norm is not None:
            # Shipped stacks serve classes with and without one; one of somebody's own that is not there is a mistake.
            require(self.root, self.stack.final_norm, f"final norm of the {self.name} tower")
        self.cfg = measured(self)

    def __getstate__(self) -> dict[str, Any]:
        # The copy of a wrapper tells its towers whose they are.
        return {**self.__dict__, "owner": _nobody}

    def __provenance__(self) -> dict[str, Any]:
        return {"tower": self.name, "of": self.owner()}

    @property
    def patch_embedding(self) -> PatchEmbedding | None:
        """How the tower cuts pictures into patches: kernel and stride of its embedding; None where it reads no pictures."""
        if not self.stack.image:
            return None
        return PatchEmbedding.of(require(self.root, self.stack.embed, "patch embedding"), self.config)

    @property
    def prefix_kinds(self) -> tuple[str, ...]:
        """Kinds of the positions before the first patch."""
        registers = int(getattr(self.config, "num_register_tokens", 0) or 0)
        kinds: list[str] = []
        for kind in self.stack.prefix:
            kinds += [kind] * (registers if kind == "register" else 1)
        return tuple(kinds)

    @property
    def connector(self) -> Connector | None:
        """The connector that reads the tower; None where no other tower's stream is made of what it gives."""
        return self.family.flow.connector_of(self.name)

    @property
    def connector_module(self) -> nn.Module:
        """The module of that connector (a projector), as a map of single positions.

        Raises UnsupportedModelError if there is none, or if it merges positions.
        """
        connector = self.connector
        if connector is not None and self.family.packing.merges("hook_out"):
            raise UnsupportedModelError(
                f"{connector.name} merges patches of the {self.name} tower, so it is no map of single positions: read what it makes of them at "
                f"{connector.name}.hook_out, or with the logit lens."
            )
        return require(self.module, (connector and connector.path) or "", "projector")

    def connected(
        self, value: Float[Tensor, "row pos width"], inputs: Mapping[str, Any] | None
    ) -> Float[Tensor, "row pos_out d_model"]:
        """What the connector's module makes of what its sources give, all positions of every row.

        Raises InputError where the rows are one sequence, and no ``inputs`` say how long each is; UnsupportedModelError where the model's own code
        merges patches on the way to the connector, which no table describes.
        """
        connector, owner = self.connector, self.owner()
        assert connector is not None
        if self.family.packing.merges("hook_in"):
            raise UnsupportedModelError(
                f"The model's own code merges patches before {connector.name} reads them, so nothing but a run says what it makes of a stream of "
                f"the {self.name} tower: read {connector.name}.hook_out, or a site behind it."
            )
        module = require(self.module, connector.path or "", "projector")
        if not self.family.packing.in_sequence:
            return module(value)
        if owner is None or not inputs:
            raise InputError(
                f"{connector.name} reads all images in one sequence; give context=cache, whose inputs say how long each is."
            )
        lengths = self.family.packing.sequences(ImageRun(owner, inputs))
        entering, leaving = (lengths[f"{connector.name}.{site}"] for site in ("hook_in", "hook_out"))
        return as_rows(module(as_sequence(value, entering)), leaving)

    @property
    def reader(self) -> Tower:
        """The tower whose output head reads what leaves this one: itself, or the one behind its connector."""
        return self if self.connector is None else self.siblings[self.connector.target]

    @property
    def feeds_cache(self) -> bool:
        """Whether the tower reaches what follows through its keys and values alone (PI0's prefix)."""
        return self.family.flow.feeds_cache(self.name)

    # -- what leaves the tower -------------------------------------------------------------------------------------------------------------

    def feature_layers_in(self, inputs: Mapping[str, Any] | None = None) -> list[int]:
        """Which hidden states leave the tower in a run: 0 is the input of block 0, ``l + 1`` the output of block ``l``.

        Raises InputError if the call names a hidden state that does not exist.
        """
        count = self.cfg.n_layers
        named = self.spec.feature_layers
        if named is None:
            return [count]
        return hidden_states(setting(self.module, inputs, named) if isinstance(named, str) else named, count + 1)

    def n_dropped_in(self, inputs: Mapping[str, Any] | None = None) -> int:
        """How many first positions are left out on the way to the connector in a run: of a family without a setting for it, those of no patch."""
        if self.connector is not None and self.connector.via == "cross":
            return 0
        select = self.spec.feature_select
        return self.cfg.n_prefix if select is None else int(setting(self.module, inputs, select) == "default")

    @property
    def dtype(self) -> torch.dtype:
        """The precision the tower computes in, whatever its weights are stored as."""
        return main_dtype(self.root)

    def sliding_window(self, layer: int) -> int | None:
        """How many positions a block's queries look back at, their own included; None where its attention has no such window."""
        window = getattr(self.config, "sliding_window", None)
        types = getattr(self.config, "layer_types", None)
        return None if window is None or (types is not None and "sliding" not in types[layer]) else int(window)

    def stream_sites(self, inputs: Mapping[str, Any] | None = None) -> list[str]:
        """The residual stream: what enters block 0 and what leaves every block that can reach the output.

        ``inputs`` matter where a call can say which layers those are (``vision_feature_layer``).
        """
        model = model_of(self)
        names = [
            f"{self.name}.hook_input",
            *(f"{self.name}.blocks.{n}.hook_resid_post" for n in range(self.cfg.n_layers)),
        ]
        offered = set(model.sites(f"{self.name}.**"))
        return [name for name in names if name in offered and not model.is_dead(name, inputs)]

    @property
    def writers(self) -> dict[int, list[str]]:
        """Sites of what the tower's code adds to the stream behind a block, by the block's number."""
        found: dict[int, list[str]] = {}
        for writer in self.stack.writers:
            for layer in writer.layers_in(self.config):
                found.setdefault(layer, []).append(f"blocks.{layer}.{writer.site}")
        return found

    @property
    def crossed_towers(self) -> list[str]:
        """The towers that its blocks attend to beside itself (cross-attention)."""
        found = [attention.core.keys_of for block in self.blocks for attention in block.attentions]
        return [name for name in dict.fromkeys(found) if name]

    def layers_that_see(self, tower: str) -> list[int]:
        """The blocks with an attention whose keys are another tower's positions; "" for this tower's own."""
        return [n for n, block in enumerate(self.blocks) if any(one.core.keys_of == tower for one in block.attentions)]

    @property
    def reads_beside_stream(self) -> bool:
        """Whether its blocks are given more of other towers than their stream: keys and values, or what is written between them."""
        return bool(self.crossed_towers or self.stack.writers)

    def added_in(self, layer: int) -> list[str]:
        """The sites of everything that is added to the stream in a block and behind it, without the tower's name."""
        own = [f"blocks.{layer}.{branch.added}" for branch in self.blocks[layer].branches]
        return [*own, *self.writers.get(layer, [])]

    def residual_name(self, hidden_state: int) -> str:
        """The site of a hidden state: 0 is ``hook_input``, ``l + 1`` is ``blocks.l.hook_resid_post``."""
        return (
            f"{self.name}.hook_input" if hidden_state == 0 else f"{self.name}.blocks.{hidden_state - 1}.hook_resid_post"
        )

    def read_sites(self, inputs: Mapping[str, Any] | None = None) -> list[str]:
        """The sites of the hidden states that a read-out of this tower may take from a run: its feature layers, and those of towers that its
        connector reads beside it."""
        names = (self.name,) if self.connector is None else self.connector.sources
        towers = [self.siblings[name] for name in names]
        return [tower.residual_name(layer) for tower in towers for layer in tower.feature_layers_in(inputs)]

    def readout(self, resid: Float[Tensor, "row pos d_model"], context: ActivationCache | None = None) -> Tensor:
        """The family's output computed from a residual stream of this tower (final norm, pooling rule, head, in the family's order).

        At the last layer (LLaVA's vision tower: the feature layer) it equals what the model returns (there: ``projector.hook_out``).
        ``context`` is the run's cache, needed where the output depends on more than this residual: CLIP's other tower, where its
        text ends.
        Raises InputError if ``context`` is missing there, UnsupportedModelError for a tower without a read-out.
        """
        with self.hooks_disabled():
            return self.output_head.in_run(context).read(resid)

    @property
    def output_head(self) -> OutputHead:
        """What turns the residual stream into the family's output: its columns and their weights, and reads of a run (``in_run``)."""
        return OutputHead(self)

    # -- what branches add -------------------------------------------------------------------------------------------------------------------

    def head_results(self, z: Float[Tensor, "... head d_head"], layer: int) -> Float[Tensor, "... head d_model"]:
        """``z_h W_O^h`` for every head of one layer: before the output bias, and before what follows the branch (see :meth:`written`)."""
        with self.hooks_disabled():
            return self.blocks[layer].attn.head_results(z)

    def head_tangents(
        self,
        layer: int,
        z: Float[Tensor, "... head d_head"],
        change: Float[Tensor, "... head d_head"],
        name: str = "attn",
    ) -> Float[Tensor, "... head d_model"]:
        """What a small change of each head of one layer adds to the stream by itself, to first order: the derivative of :meth:`written` at ``z``.

        Where no norm follows the branch, it is the share of ``change`` exactly; where one does, heads add up to the derivative of all together.
        """
        with self.hooks_disabled():
            return self.blocks[layer].branch(name).head_tangents(z, change)

    def written(
        self, site: str, value: Tensor, frozen: ActivationCache | None = None, step: int | None = None
    ) -> Float[Tensor, "... d_model"]:
        """What a value of a site adds to the residual stream, through all that follows its branch: output projection, LayerScale, sandwich norm.

        Without ``frozen`` it is what the block would add if the site had this value, biases included: ``written("blocks.3.attn.hook_z", z)`` is
        ``hook_attn_out``. With the cache of a run as ``frozen``, norms behind the branch divide by what they divide by in that run, and biases are
        left out: a map that is linear in ``value``, whose head axis stays, ``[row pos head d_model]``. Heads then add up,
        ``written(site, z, frozen=cache).sum(-2) + written_bias(site, frozen=cache) = hook_attn_out``.

        Args:
            site: ``blocks.L.`` and ``attn.hook_z``, ``attn.hook_result``, ``mlp.hook_post``, ``hook_attn_out``, ``hook_mlp_out`` (or those of
                another branch), or the ``hook_normalized`` of a norm behind a branch; with or without the tower's name.
            value: in the shape of the site; of all heads.
            frozen: the run whose denominators hold. It needs ``ln1_post.hook_scale`` or ``attn.hook_z`` (of MLPs, ``ln2_post.hook_scale``
                or ``mlp.hook_post``) where a norm follows, nothing otherwise.
            step: which pass of ``frozen``, where it holds several.

        Raises:
            UnknownSiteError: a site that is no part of a branch behind its nonlinearity.
            InputError: a value of another shape, a cache that does not hold the denominators.
        """
        return branches.written(self, site, value, frozen, step)

    def written_bias(
        self, site: str, frozen: ActivationCache | None = None, step: int | None = None
    ) -> Float[Tensor, "... d_model"]:
        """What a branch adds beside the linear :meth:`written` of a site: its output bias and that of a norm behind it, ``[d_model]``.

        Where a norm follows it depends on the run, ``[row pos d_model]``; InputError without ``frozen`` there, and for what is added itself.
        """
        return branches.written_bias(self, site, frozen, step)

    def slot_gradients(self, cache: ActivationCache) -> SlotGradients:
        """Gradients at ``hook_q_input``, ``hook_k_input``, ``hook_v_input`` and ``hook_mlp_in``, from a cache recorded with ``incl_bwd``.

        A mapping by full site name, layer by layer, ``[row pos head d_model]`` (``hook_mlp_in``: ``[row pos d_model]``); see
        :class:`~circuitvision.model.slots.SlotGradients`. Equal to what recording the slots gives, without keeping them all at once.
        Raises InputError for a cache without what they follow from (:meth:`slot_sites`).
        """
        return SlotGradients(self, cache)

    def slot_sites(self, layers: Sequence[int] | None = None) -> list[str]:
        """The sites to record for :meth:`slot_gradients`, of these layers (None: all)."""
        return slot_sites(self, layers)

    # -- weights ---------------------------------------------------------------------------------------------------------------------------

    def _stacked(self, name: str) -> Tensor:
        branch = "mlp" if name.lower()[2:] in ("in", "out", "gate") else "attn"
        without = [block.layer for block in self.blocks if not block.has(branch)]
        if without:
            raise UnknownAttributeError(
                f"Block {without[0]} of the {self.name} tower has no {branch}, so there is no {name} of all layers; take "
                f"tower.blocks[layer].{name} of those that have."
            )
        with self.hooks_disabled(), torch.no_grad():
            return torch.stack([getattr(block, name).detach() for block in self.blocks])

    def __getattr__(self, name: str) -> Tensor:
        if name in _STACKED:
            return self._stacked(name)
        raise UnknownAttributeError(f"Tower has no attribute {name!r}.")

    @property
    def W_E(self) -> Float[Tensor, "n_in d_model"]:
        """The token embedding ``[vocab d_model]``, or the patch projection ``[channels·patch·patch d_model]`` (copy)."""
        module: Any = require(self.root, self.stack.embed, "embedding")
        module = getattr(module, "projection", module)
        with self.hooks_disabled(), torch.no_grad():
            return embedding_weight(module, self.dtype).detach().clone()

    @property
    def W_pos(self) -> Float[Tensor, "pos d_model"]:
        """The learned position table (copy); AttributeError where positions are rotary."""
        if self.stack.position_weight is None:
            raise UnknownAttributeError(f"The {self.name} tower has no learned position embedding.")
        embeddings, name = require(self.root, self.stack.embeddings or "", "embeddings"), self.stack.position_weight
        table = getattr(embeddings, name)
        with self.hooks_disabled(), torch.no_grad():
            if isinstance(table, nn.Module):
                return embedding_weight(table, self.dtype).detach().clone()
            return parameter(embeddings, name)[0].detach().clone()

    @property
    def W_U(self) -> Float[Tensor, "d_model n_out"]:
        """The unembedding: classifier, language-model head or action head (copy); AttributeError where the tower has none."""
        return self.output_head.matrix("W_U").clone()

    @property
    def b_U(self) -> Float[Tensor, " n_out"]:
        """The bias of the unembedding, zeros where it has none."""
        head = self.output_head
        bias = None if head.weight_name is None else head.bias()
        return self.W_U.new_zeros(self.W_U.shape[1]) if bias is None else bias.clone()

    @property
    def W_proj(self) -> Float[Tensor, "d_model d_shared"]:
        """The projection into the space shared with the other tower (CLIP, SigLIP text); AttributeError elsewhere."""
        return self.output_head.matrix("W_proj").clone()

    def __repr__(self) -> str:
        c = self.cfg
        grid = f", grid {c.grid[0]}x{c.grid[1]} + {c.n_prefix}" if c.grid else ""
        widths = f"d_model {c.d_model}, d_head {c.d_head}, d_mlp {c.d_mlp}"
        return f"Tower({self.name}: {c.n_layers} layers, {c.n_heads} heads ({c.n_kv_heads} kv), {widths}{grid})"


_STACKED = frozenset(
    {"W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_gate", "b_Q", "b_K", "b_V", "b_O", "b_in", "b_out"}
)


def resolve_list(root: nn.Module, path: Any, tower: str) -> nn.ModuleList | nn.Sequential:
    """The list of blocks at ``path``; raises UnsupportedModelError if it is no non-empty ModuleList or Sequential."""
    found = require(root, path, f"blocks of the {tower} tower")
    if not isinstance(found, nn.ModuleList | nn.Sequential) or len(found) == 0:
        raise UnsupportedModelError(
            f"The blocks of the {tower} tower are a {type(found).__name__}; a non-empty ModuleList or Sequential was expected."
        )
    return found
