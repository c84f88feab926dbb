"""The nnsight view: ``with nn.trace(**inputs): nn.vision.blocks[2].attn.hook_z[:, :, 3] = 0``.

An NNsight over the model's own module whose aliases and sites are generated from the family table. *Aliases*
(nnsight's ``rename``) name the modules: ``nn.vision.blocks[2].attn.o`` is the output projection whatever the
checkpoint calls it. *Sites* are attributes ``hook_…`` of these envoys; reading and writing one runs the very point
(``circuitvision.model.points``) that our own hooks run, so a read equals ``run_with_cache`` and an edit equals
``run_with_hooks`` bit for bit. A site read is a tensor of its own: what is changed in place, or assigned, goes back
into the model when the block moves on.

nnsight puts a controller of its own in front of every module's ``forward`` and leaves it there, inert outside traces;
weights, class and hooks of the module stay as they were.

Not offered: scores, pattern and rotated queries and keys, which exist only inside eager attention; a trace cannot
switch that on, and a run with our hooks can. The input of block 0 is not offered where a feature list reads it:
transformers records it before nnsight sees it, so an edit would be lost on that way. ``nn.sites()`` lists what is
offered, ``nn.reason(site)`` says why another one is not.

In memory means local. A model on NDIF is found by its Hub name, so ``remote=True`` raises here, where plain NNsight
would hand the keyword to the model, which swallows it. The *portable* subset (aliases, and ``read``/``write`` of
:mod:`circuitvision.interop.portable`) is what a server without circuitvision can run; ``remote="local"`` rehearses
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from circuitvision.errors import UnknownSiteError, nearest
from circuitvision.interop.portable import Place
from circuitvision.model.block_layout import MLP, Attention
from circuitvision.model.block_points import Between, GatedOutput, ReadInput
from circuitvision.model.points import AttentionStage, BranchInput, Input, Output, Point, SharedInput, StreamInput
from circuitvision.model.sites import NamesFilter, SiteName, matching
from circuitvision.model.spec import resolve

if TYPE_CHECKING:
    from circuitvision.model import Tower
    from circuitvision.model.block import Block
    from circuitvision.model.branches import Branch
    from circuitvision.model.wrapped import Wrapped

ATTENTION_REASON = (
    "it exists only inside eager attention, which a trace cannot switch on; use model.run_with_cache or run_with_hooks"
)
LATER_REASON = (
    "it is read at one module and written at another, which a trace cannot tie together; use model.run_with_hooks"
)
RECORDED_REASON = (
    "transformers records the input of block 0 for the projector before nnsight sees it, so an edit would be lost "
    "on that way; use model.run_with_hooks"
)


def nnsight(model: Wrapped, *, portable: bool = False) -> Any:
    """An NNsight over ``model.module`` under our names: ``nn.vision.blocks[2].attn.hook_z``, ``nn.projector.hook_out``.

    ``nn.sites(glob)`` lists the sites. One trace reads them in the order of the pass, which is that of the list within a tower; a language tower's
    ``hook_embed`` may come before the vision tower. With ``portable=True`` the
    envoys are nnsight's own plus aliases, sites are reached with :func:`~circuitvision.interop.portable.read` and ``write``, and
    ``trace(..., remote="local")`` rehearses a server that has no circuitvision; this registers ``"circuitvision"`` with nnsight, so that
    the source of these functions is sent along.

    Traces raise InputError for ``remote=True`` (and for ``remote="local"`` without ``portable``), UnknownSiteError for a site that is not
    offered, and HookError for a value of another shape, dtype or device than its site.

    Source: Fiotto-Kaufman et al. 2024 (arXiv 2407.14561).
    """
    import nnsight as library

    from circuitvision.interop.envoys import build

    if portable:
        library.register("circuitvision")
    return build(model, nnsight_names(model), portable)


def nnsight_names(model: Wrapped) -> dict[str, list[str]]:
    """The aliases of a model, as nnsight's ``rename`` takes them: native path -> names.

    They serve any nnsight wrapper of the same architecture, one on a server among them:
    ``nnsight.VisionLanguageModel(hub_name, rename=cv.interop.nnsight_names(model))``.
    """
    paths = {id(module): path for path, module in model.module.named_modules()}
    names: dict[str, list[str]] = {}
    relative: dict[str, set[str]] = {}
    for tower in model.towers.values():
        for block in tower.blocks:
            for key, alias in _block_aliases(block):
                relative.setdefault(key, set()).add(alias)
    for tower in model.towers.values():
        for key, alias in _tower_aliases(tower, paths):
            _add(names, key, alias)
        for block in tower.blocks:
            prefix = paths[id(block.module)]
            for key, alias in _block_aliases(block):
                # Two towers may give one path two meanings; then it is named from the root, block by block.
                clash = len(relative[key]) > 1
                _add(names, *((f"{prefix}.{key}", f"{prefix}.{alias}") if clash else (key, alias)))
    for connector in model.flow.modules:
        module = resolve(_base(model), connector.path)
        if module is not None:
            _add(names, paths[id(module)], connector.name)
    return names


def nnsight_places(model: Wrapped, names_filter: NamesFilter = "**") -> dict[str, Place]:
    """The portable sites: name -> the plain tuple that :func:`~circuitvision.interop.portable.read` and ``write`` take.

    Raises UnknownSiteError if the filter selects no portable site.
    """
    paths = {id(module): path for path, module in model.module.named_modules()}
    found = {name: _place(point, paths) for name, point in offered(model).items() if type(point) in _SIDES}
    return {name: found[name] for name in matching(names_filter, found)}


_SIDES: dict[type[Point], str] = {Input: "input", BranchInput: "input", SharedInput: "shared", Output: "output"}


def _place(point: Point, paths: dict[int, str]) -> Place:
    n_heads, keyword = getattr(point, "n_heads", None), getattr(point, "keyword", "hidden_states")
    return paths[id(point.module)], _SIDES[type(point)], n_heads, keyword


def offered(model: Wrapped) -> dict[str, Point]:
    """The sites a trace can read and write, with their points, in forward order."""
    points = {name: point for name, point in model.engine.points.items() if reason(model, name) is None}
    return {name: _served(model, point) for name, point in points.items()}


def _served(model: Wrapped, point: Point) -> Point:
    """The point without hooks of ours: what a block reads, where the block before leaves it, or at its own input where something is added between."""
    if not isinstance(point, StreamInput):
        return point
    name = SiteName.parse(point.name)
    written = (name.layer or 0) - 1 in model.towers[name.tower].writers
    return Input(point.name, point.module, "pre") if written else point.as_output()


def reason(model: Wrapped, name: str) -> str | None:
    """Why a trace cannot offer a site of the model; None if it can. Raises UnknownSiteError for a name the model does not have."""
    point = model.engine.points.get(name)
    if point is None:
        raise UnknownSiteError(
            f"No site of this model is called {name!r}. Nearest: {', '.join(nearest(name, model.sites()))}."
        )
    if isinstance(point, AttentionStage):
        return ATTENTION_REASON
    if isinstance(point, (Between, GatedOutput, ReadInput)):
        return LATER_REASON
    if model.engine.sequences.holds(name):
        return "its module computes all images in one sequence, which is no site [row pos …]; use model.hooks"
    tower = model.towers.get(SiteName.parse(name).tower)
    enters = point.phase == "pre" and tower is not None and point.module is tower.blocks[0].module
    return RECORDED_REASON if enters and tower is not None and 0 in tower.feature_layers_in() else None


def hosts(model: Wrapped) -> dict[str, nn.Module]:
    """The module whose envoy carries the sites under each prefix: ``vision.blocks.2.attn`` -> the attention module of that block."""
    found: dict[str, nn.Module] = {}
    for name, point in model.engine.points.items():
        prefix = name.rpartition(".")[0]
        tower = model.towers.get(SiteName.parse(name).tower)
        if prefix not in found:
            found[prefix] = point.module if tower is None else _host(tower, name, point)
    return found


def _host(tower: Tower, name: str, point: Point) -> nn.Module:
    site = SiteName.parse(name)
    part = site.site.rpartition(".")[0]
    if site.layer is None:
        return tower.root if not part else point.module
    block = tower.blocks[site.layer]
    if not part:
        return block.module
    on_block = {path: module for path, module, _ in _on_block(block)}
    return on_block.get(part, point.module)


def _base(model: Wrapped) -> nn.Module:
    """The module the table's paths start from; an adapter's wrapper is not part of them."""
    return next(iter(model.towers.values())).module


def _tower_aliases(tower: Tower, paths: dict[int, str]) -> Iterator[tuple[str, str]]:
    root = paths[id(tower.root)]
    if root:
        yield root, tower.name
    parts = {
        "blocks": resolve(tower.root, tower.stack.blocks),
        "embed": None if tower.spec.embed is not None else resolve(tower.root, tower.stack.embed),
        "ln_final": tower.final_norm,
        "pool": resolve(tower.module, tower.output_head.table.pool_module),
    }
    for alias, module in parts.items():
        path = "" if module is None else paths[id(module)]
        if path.startswith(f"{root}.") or (path and not root):
            yield path, f"{root}.{alias}" if root else alias
            if alias == "pool":
                yield f"{path}.attention", f"{path}.attn"


def _block_aliases(block: Block) -> Iterator[tuple[str, str]]:
    """Paths relative to the block, and what each part is called: ``self_attn.out_proj`` -> ``self_attn.o``."""
    for name, _, path in _on_block(block):
        yield path, name
    for branch in block.branches:
        for alias, path in _inside(branch):
            holder, _, _ = path.rpartition(".")
            yield path, f"{holder}.{alias}" if holder else alias
        for part in branch.layout.then:
            if isinstance(part, str):
                module = resolve(block.module, part)
                yield part, branch.post_name if module is branch.post_norm else f"{branch.name}_add"


def _on_block(block: Block) -> Iterator[tuple[str, nn.Module, str]]:
    """Parts that are named directly on their block, with their modules and paths; the others are named on the part that holds them."""
    for branch in block.branches:
        if branch.norm is not None and not branch.shares_norm:
            yield branch.norm_name, branch.norm, branch.layout.norm or ""
        if branch.sum_norm is not None:
            yield f"ln{branch.number + 1}", branch.sum_norm, branch.layout.sum_norm or ""
        yield branch.name, branch.module, branch.core.module


def _inside(branch: Branch) -> Iterator[tuple[str, str]]:
    """Names and paths of the projections of a branch."""
    core = branch.core
    if isinstance(core, Attention):
        yield from ((letter, getattr(core, letter)) for letter in "qkv" if getattr(core, letter))
        if core.qkv is not None:
            yield "qkv", core.qkv.path
        yield "o", core.o
    elif isinstance(core, MLP):
        yield from ((f"mlp_{part}", path) for part, path in (("in", core.fc_in), ("out", core.fc_out)) if path)
        if core.gate or core.fused:
            yield "mlp_gate", core.gate or (core.fused.path if core.fused else "")


def _add(names: dict[str, list[str]], key: str, alias: str) -> None:
    # A part that is called by its own name already needs no alias.
    if key != alias and alias not in names.setdefault(key, []):
        names[key].append(alias)
    if not names.get(key, True):
        del names[key]
