"""The activation cache: what a run's sites held, under their names, with TransformerLens's methods per tower.

Derived sites (one head's share of the output, what one head reads of the stream) are not stored: they are computed when they are read. Runs with
several passes (``generate``, ``sample_actions``) give every site a leading ``step`` axis, or a list where the lengths differ.

Decompositions start from ``hook_input``, what really enters block 0: at the image positions of a VLM that is the projected patch, not the
placeholder's embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from circuitvision.digests import plain
from circuitvision.errors import InputError, UnknownSiteError, nearest
from circuitvision.files import format_of, reading, write_tensors
from circuitvision.model.names import head_name
from circuitvision.model.norms import Norm
from circuitvision.model.sites import SiteName, expand_short

if TYPE_CHECKING:
    from circuitvision.model.tower import Tower
    from circuitvision.model.wrapped import Wrapped


CACHE_FORMAT = "circuitvision.cache/1"


@dataclass(frozen=True)
class Recipe:
    """How a cache was recorded: what a provenance says of it as long as nobody wrote into its tensors or inputs."""

    names: tuple[str, ...]
    settings: dict[str, Any]
    """What came with the call, and the hooks and mode of the model; plain values."""
    versions: dict[str, int]
    """Versions of the input tensors."""

    @classmethod
    def of(cls, model: Wrapped, inputs: Mapping[str, Any], names: Sequence[str], **given: Any) -> Recipe:
        """Look at a run that is about to be recorded; what can change later is read now."""
        settings = {name: plain(value) for name, value in given.items() if value}
        settings |= {name: plain(value) for name, value in inputs.items() if not isinstance(value, Tensor)}
        active = model.engine.active()
        if active:
            settings["active_hooks"] = plain(active)
        if model.module.training:
            settings["training"] = plain(torch.get_rng_state())
        return cls(tuple(names), settings, _versions(inputs))


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _versions(values: Mapping[str, Any]) -> dict[str, int]:
    """How often each tensor was written into; 0 for what does not say."""
    try:
        # Every cached run asks this of every site, and of plain tensors it is one attribute.
        return {name: value._version for name, value in values.items()}
    except (AttributeError, RuntimeError):
        return {name: _version(value) for name, value in values.items()}


class ActivationCache(Mapping[str, Any]):
    """Activations of one run by site name; ``cache["vision", "z", 3]`` is short for ``cache["vision.blocks.3.attn.hook_z"]``.

    It knows the model and the inputs of its run by reference: a copy knows the same, a pickled cache neither (``save`` and ``load`` write files).
    """

    def __init__(
        self,
        values: dict[str, Any],
        model: Wrapped | None = None,
        inputs: Mapping[str, Any] | None = None,
        has_batch_dim: bool = True,
        recipe: Recipe | None = None,
    ) -> None:
        self._values = values
        self._recipe = recipe
        self._written = _versions(values) if recipe else {}
        self.model = model
        self.inputs: dict[str, Any] = dict(inputs or {})
        self.has_batch_dim = has_batch_dim
        self.edited: frozenset[str] = frozenset()
        """Sites that had hooks or edits in the runs recorded, whether or not they changed anything."""

    def __getstate__(self) -> dict[str, Any]:
        return {
            "_values": self._values,
            "_recipe": None,
            "_written": {},
            "model": None,
            "inputs": {},
            "has_batch_dim": self.has_batch_dim,
            "edited": self.edited,
        }

    def __copy__(self) -> ActivationCache:
        return ActivationCache(dict(self._values), self.model, self.inputs, self.has_batch_dim)

    def __deepcopy__(self, memo: dict[int, Any]) -> ActivationCache:
        return self.map(lambda value: value.clone())

    # -- mapping ---------------------------------------------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Any:
        name = expand_short(key, self._known()) if isinstance(key, tuple) else key
        if name in self._values:
            return self._values[name]
        site = SiteName.parse(name)
        if site.is_derived and self.model is not None and name in self.model.sites():
            return self._derive(site)
        near = ", ".join(nearest(str(name), self._values))
        raise UnknownSiteError(f"{name!r} is not in this cache. Nearest: {near}. Was it asked for in names_filter?")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        try:
            self[key]
        except UnknownSiteError:
            return False
        return True

    def __repr__(self) -> str:
        towers = sorted({SiteName.parse(name).tower for name in self._values})
        size = sum(v.nbytes for v in self._values.values() if isinstance(v, Tensor))
        return f"ActivationCache({len(self)} sites of {', '.join(towers)}; {size / 2**20:.1f} MiB)"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>{name}</code></td><td>{tuple(value.shape) if isinstance(value, Tensor) else f'{len(value)} steps'}</td></tr>"
            for name, value in list(self._values.items())[:40]
        )
        more = f"<p>… and {len(self) - 40} more</p>" if len(self) > 40 else ""
        return f"<b>{self!r}</b><table>{rows}</table>{more}"

    def names(self) -> list[str]:
        """The sites that can be read: those that were recorded, and those that follow from them."""
        return self._known()

    def _known(self) -> list[str]:
        names = list(self._values)
        if self.model is not None:
            names += [
                name for name in self.model.sites() if SiteName.parse(name).is_derived and name not in self._values
            ]
        return names

    def _derive(self, site: SiteName) -> Any:
        assert self.model is not None
        assert site.layer is not None
        tower = self.model.towers[site.tower]
        source, of = tower.blocks[site.layer].derived(site.site)
        value = self[source]
        with tower.hooks_disabled():
            return [of(part) for part in value] if isinstance(value, list) else of(value)

    def one_pass(self, name: str, step: int | None = None) -> Tensor:
        """A site as ``[row …]``, of one pass, whatever recorded it.

        Raises InputError if the cache does not hold it, or holds several passes (``generate``, ``sample_actions``) and ``step`` does not say
        which.
        """
        if name not in self:
            raise InputError(f"The cache does not hold {name}; add it to names_filter, or record all sites.")
        value = self[name]
        ndim = (4 if SiteName.parse(name).has_heads else 3) - (not self.has_batch_dim)
        pooled = SiteName.parse(name).may_be_pooled and isinstance(value, Tensor) and value.ndim == ndim - 1
        if not pooled and (isinstance(value, list) or value.ndim == ndim + 1):
            if step is None:
                raise InputError("This cache holds several passes; say which with step=, counted from 0.")
            if not -len(value) <= step < len(value):
                raise InputError(f"There is no step {step}; this cache holds {len(value)} passes.")
            value = value[step]
        return value if self.has_batch_dim else value[None]

    def __provenance__(self) -> dict[str, Any]:
        """The run that recorded it, or else a digest of every value."""
        recipe = self._recipe
        if recipe is None or _versions(self._values) != self._written or _versions(self.inputs) != recipe.versions:
            return {"cache": {"values": self._values, "inputs": self.inputs}}
        inputs = {name: value for name, value in self.inputs.items() if isinstance(value, Tensor)}
        return {"cache": {"inputs": inputs, "sites": list(recipe.names), **recipe.settings}}

    # -- moving and keeping ----------------------------------------------------------------------------------------------------------------

    def map(self, fn: Callable[[Tensor], Tensor]) -> ActivationCache:
        """A cache with ``fn`` applied to every tensor."""
        values = {
            name: [fn(v) for v in value] if isinstance(value, list) else fn(value)
            for name, value in self._values.items()
        }
        cache = ActivationCache(values, self.model, self.inputs, self.has_batch_dim)
        cache.edited = self.edited
        return cache

    def to(self, target: torch.device | str | torch.dtype) -> ActivationCache:
        """A cache on another device or in another dtype; the model's weights stay where they are."""
        return self.map(lambda value: value.to(target))

    def detach(self) -> ActivationCache:
        """A cache without autograd history."""
        return self.map(lambda value: value.detach())

    def remove_batch_dim(self) -> ActivationCache:
        """A cache of a single row, without the leading row axis; raises InputError if a site has more than one row."""
        wide = [name for name, value in self._values.items() if not isinstance(value, Tensor) or value.shape[0] != 1]
        if wide:
            raise InputError(
                f"remove_batch_dim needs one row everywhere; {wide[0]} has more. Run one example (and one image) at a time."
            )
        cache = self.map(lambda value: value[0])
        cache.has_batch_dim = False
        return cache

    def save(self, path: str | Path) -> Path:
        """Write the tensors to a ``.safetensors`` file, complete or not at all; read with :meth:`load` or ``cv.load``.

        Raises:
            InputError: another suffix.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise InputError(f"Caches are saved as .safetensors, not {path.suffix or 'without a suffix'!r}.")
        flat: dict[str, Tensor] = {}
        steps: dict[str, int] = {}
        for name, value in self._values.items():
            if isinstance(value, list):
                steps[name] = len(value)
                flat.update({f"{name}@{step}": part for step, part in enumerate(value)})
            else:
                flat[name] = value
        metadata = {
            "format": CACHE_FORMAT,
            "steps": json.dumps(steps),
            "has_batch_dim": json.dumps(self.has_batch_dim),
            "edited": json.dumps(sorted(self.edited)),
        }
        write_tensors(path, flat, metadata)
        return path

    @classmethod
    def load(
        cls, path: str | Path, model: Wrapped | None = None, inputs: Mapping[str, Any] | None = None
    ) -> ActivationCache:
        """Read what :meth:`save` wrote; ``model`` and ``inputs`` give back derived sites and read-outs.

        Raises:
            InputError: no file of a cache.
        """
        from safetensors import safe_open

        path = Path(path)
        if format_of(path) != "safetensors":
            raise InputError(f"{path} is no cache: caches are .safetensors files, and this is none, or a damaged one.")
        values: dict[str, Any] = {}
        with reading(path, "a cache"), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != CACHE_FORMAT:
                raise InputError(f"{path} is no cache of format {CACHE_FORMAT!r}; cv.load(path) reads other files.")
            steps = json.loads(metadata["steps"])
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if "@" not in name:
                    values[name] = file.get_tensor(name)
            for name, count in steps.items():
                values[name] = [file.get_tensor(f"{name}@{step}") for step in range(count)]
            cache = cls(values, model, inputs, bool(json.loads(metadata["has_batch_dim"])))
            cache.edited = frozenset(json.loads(metadata["edited"]))
        return cache

    # -- TransformerLens's methods, per tower ----------------------------------------------------------------------------------------------

    def _tower(self, tower: str) -> Tower:
        if self.model is None:
            raise InputError("This cache has no model; pass model= when loading it.")
        if tower not in self.model.towers:
            raise UnknownSiteError(f"No tower {tower!r}; this model has {', '.join(self.model.towers)}.")
        return self.model.towers[tower]

    def decompose_resid(
        self, tower: str, layer: int | None = None, mlp_input: bool = False, return_labels: bool = False
    ) -> Any:
        """The additive parts of the stream before ``layer`` (None: after the last): input, then what the branches of each block add.

        Shape ``[component row pos d_model]``; the sum over components is ``resid_pre[layer]`` (with ``mlp_input``: what the MLP of ``layer``
        reads). In post-norm blocks the parts pass the norms of later sums as well, at the denominators of this run.
        """
        owner = self._tower(tower)
        layer = owner.cfg.n_layers if layer is None else layer
        labels, parts = ["input"], [self[f"{tower}.hook_input"]]
        for block in owner.blocks[: layer + int(mlp_input)]:
            before = block.branches if block.layer < layer else block.branches_before(block.branch("mlp"))
            for branch in before:
                labels.append(f"{block.layer}_{branch.name}_out")
                parts.append(self[f"{block.prefix}.{branch.added}"])
                if branch.sum_norm is not None:
                    parts, offset = self._through_sum_norm(
                        owner, branch.sum_norm, f"{block.prefix}.ln{branch.number + 1}", parts
                    )
                    labels += [f"{block.layer}_ln{branch.number + 1}_bias"] if len(offset) else []
                    parts += offset
            for site in owner.writers.get(block.layer, ()) if block.layer < layer else ():
                labels.append(f"{block.layer}_{site.rpartition('.')[2].removeprefix('hook_')}")
                parts.append(self[f"{tower}.{site}"])
        stack = torch.stack(parts)
        return (stack, labels) if return_labels else stack

    def _through_sum_norm(
        self, tower: Tower, module: Any, name: str, parts: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The parts of a sum behind the norm that the sum passes, its denominator held; and what the norm's bias adds."""
        norm, scale = Norm(module), self[f"{name}.hook_scale"]
        with tower.hooks_disabled():
            bias = norm.bias(parts[0])
            behind = [norm.linear(part, scale) for part in parts]
            return behind, [] if bias is None else [bias.expand_as(parts[0])]

    def accumulated_resid(
        self,
        tower: str,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The stream itself before each block up to ``layer`` (None: and after the last), ``[component row pos d_model]``."""
        owner = self._tower(tower)
        n_layers = owner.cfg.n_layers
        layer = n_layers if layer is None else layer
        labels, parts = [], []
        for index in range(min(layer, n_layers - 1) + 1):
            labels.append(f"{index}_pre")
            parts.append(self[f"{tower}.blocks.{index}.hook_resid_pre"])
            streams = dict.fromkeys(branch.stream for branch in owner.blocks[index].branches[1:])
            for site in streams if incl_mid and index < layer else ():
                if site != "hook_resid_pre":
                    labels.append(f"{index}_{site.removeprefix('hook_resid_')}")
                    parts.append(self[f"{tower}.blocks.{index}.{site}"])
        if layer >= n_layers:
            labels.append("final_post")
            parts.append(self[f"{tower}.blocks.{n_layers - 1}.hook_resid_post"])
        stack = torch.stack(parts)
        stack = self.apply_ln_to_stack(stack, tower) if apply_ln else stack
        return (stack, labels) if return_labels else stack

    def stack_head_results(self, tower: str, layer: int | None = None, return_labels: bool = False) -> Any:
        """What each head of the blocks before ``layer`` adds to the stream: ``[layer·head row pos d_model]``, output biases left out.

        LayerScale is included; sandwich norms divide by what they divided by in this run, so that heads add up. Raises InputError if the
        cache does not hold what those denominators follow from.
        """
        owner = self._tower(tower)
        layer = owner.cfg.n_layers if layer is None else layer
        parts, labels = [], []
        for index in range(layer):
            site = f"{tower}.blocks.{index}.attn.hook_result"
            parts.append(rearrange(owner.written(site, self[site], frozen=self), "... head m -> head ... m"))
            labels += [head_name(index, head) for head in range(owner.cfg.n_heads)]
        stack = torch.cat(parts)
        return (stack, labels) if return_labels else stack

    def apply_ln_to_stack(
        self,
        stack: Float[Tensor, "component row pos d_model"],
        tower: str,
        layer: int | None = None,
        mlp_input: bool = False,
        bias: bool = False,
    ) -> Float[Tensor, "component row pos d_model"]:
        """Apply a norm with the scale frozen at its value in this run: centre, divide, multiply by the gain (and add the bias if asked).

        ``layer=None`` is the final norm. Linear in the stack, so parts that sum to the stream sum to the normed stream, up to the bias.
        Where the final norm follows pooling (CLIP) the stack must be ``[component row d_model]``.
        """
        owner = self._tower(tower)
        if layer is None:
            norm, name = owner.final_norm, f"{tower}.ln_final"
        else:
            branch = owner.blocks[layer].branch("mlp" if mlp_input else "attn")
            norm, name = branch.norm, f"{tower}.blocks.{layer}.{branch.norm_name}"
        if norm is None:
            return stack
        scale = self[f"{name}.hook_scale"]
        if scale.ndim != stack.ndim - 1:
            raise InputError(
                f"{name} acts on shape {tuple(scale.shape[:-1])}; take the pooled position of the stack first."
            )
        with owner.hooks_disabled():
            return Norm(norm).held(stack, scale) if bias else Norm(norm).linear(stack, scale)

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "component row pos d_model"],
        tower: str,
        answer: int,
        foil: int | None = None,
    ) -> Float[Tensor, "component row pos"]:
        """Contribution of each part of the stream to the logit of ``answer`` (minus that of ``foil``), with the final norm's scale frozen.

        Summed over all parts (plus the norm's bias and ``b_U``) it is the logit, before any soft cap.
        """
        w_u = self._tower(tower).W_U.to(residual_stack.dtype)
        direction = w_u[:, answer] - (w_u[:, foil] if foil is not None else 0)
        return self.apply_ln_to_stack(residual_stack, tower) @ direction


def collected(values: dict[str, list[Tensor]], multi_pass: bool) -> dict[str, Any]:
    """What a recorder saw, as a cache stores it: one tensor, or with several passes a step axis (a list where shapes differ)."""
    out: dict[str, Any] = {}
    for name, passes in values.items():
        if not multi_pass and len(passes) == 1:
            out[name] = passes[0]
        elif len({part.shape for part in passes}) == 1:
            out[name] = torch.stack(passes)
        else:
            out[name] = passes
    return out
