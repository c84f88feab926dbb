"""Which sites a lens reads where a user names them by kind, name or glob (by default the stream: ``tower.stream_sites()``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from circuitvision.errors import InputError, UnknownSiteError, nearest
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped

_HEAD = "holds vectors of a head's own width; read attn.hook_result, each head's share of the stream (through W_O)"
_NEURONS = "holds neurons; value_vectors says what each writes, direct_attribution(…, by='neuron') what it did"
_ATTENTION = "holds attention, not vectors of the stream; attention_mass and attention_maps read it"
_BEHIND = "lies behind the final norm, which the lens would apply once more; read the last hook_resid_post"
_NO_VECTORS = {
    "attn.hook_z": _HEAD,
    "attn.hook_q": _HEAD,
    "attn.hook_k": _HEAD,
    "attn.hook_v": _HEAD,
    "attn.hook_rot_": _HEAD,
    "mlp.hook_": _NEURONS,
    "attn.hook_pattern": _ATTENTION,
    "attn.hook_attn_scores": _ATTENTION,
    "ln_final.": _BEHIND,
    "hook_readout": _BEHIND,
    "pool.": _BEHIND,
    "ln1.hook_scale": "holds denominators, not vectors",
    "ln2.hook_scale": "holds denominators, not vectors",
}
"""Sites, by how their names within a block or tower begin, that hold no vectors of the stream, and what reads them instead."""


def ordered_sites(model: Wrapped, tower: str, sites: str | Sequence[str]) -> list[str]:
    """The sites of a tower that kinds ("resid_post", "attn_out", "attn.hook_result"), names or globs select, in the order of a forward pass.

    Raises:
        UnknownSiteError: nothing of that name in the tower. InputError: a site of another tower, or one that holds no vectors of the stream.
    """
    requested = [sites] if isinstance(sites, str) else list(sites) if isinstance(sites, Sequence) else [sites]
    if not all(isinstance(entry, str) for entry in requested):
        raise InputError(f"Sites are kinds, names or globs, such as 'attn_out'; got {sites!r}.")
    known = model.sites(f"{tower}.**")
    chosen: set[str] = set()
    for entry in requested:
        forms = [entry, f"{tower}.{entry}", f"{tower}.blocks.*.{entry}", f"{tower}.blocks.*.hook_{entry}"]
        forms += [f"{tower}.blocks.*.attn.hook_{entry}", f"{tower}.hook_{entry}"]
        found: list[str] = []
        for form in forms:
            try:
                found = list(model.sites(form))
            except UnknownSiteError:
                continue
            if found:
                break
        if not found:
            kinds = sorted({name.split(".", 3)[3] for name in known if ".blocks." in name} | set(known))
            near = ["attn.hook_result"] if entry in ("head", "heads") else nearest(entry, kinds)
            raise UnknownSiteError(f"{entry!r} is no site of the {tower} tower. Nearest: {', '.join(near)}.")
        foreign = [name for name in found if not name.startswith(f"{tower}.")]
        if foreign:
            raise InputError(f"{foreign[0]} is not a site of the {tower} tower; read one tower at a time.")
        chosen |= set(found)
    if not chosen:
        raise InputError("Name at least one site.")
    names = [name for name in known if name in chosen]
    for name in names:
        site = SiteName.parse(name).site
        for start, reason in _NO_VECTORS.items():
            if site.startswith(start):
                raise InputError(f"{name} {reason}.")
    return names
