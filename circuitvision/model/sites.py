"""Site names: ``{tower}.blocks.{layer}.{site}``, ``{tower}.{site}``, ``projector.{site}``; globs and short forms.

``*`` matches inside one dotted part, ``**`` across dots. The short form ``("vision", "z", 3)`` stands for ``vision.blocks.3.attn.hook_z`` and
``("vision", "scale", 3, "ln1")`` for ``vision.blocks.3.ln1.hook_scale``. ``blocks.3.attn.hook_z``, without a tower, is a name in models of one
tower, as TransformerLens writes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from circuitvision.errors import UnknownSiteError, nearest

_DERIVED = ("hook_result", "hook_q_input", "hook_k_input", "hook_v_input")
_PATTERNS = ("hook_attn_scores", "hook_pattern")
_EAGER = (*_PATTERNS, "hook_rot_q", "hook_rot_k")
_PER_HEAD = frozenset(
    f"hook_{stage}" for stage in ("q", "k", "v", "rot_q", "rot_k", "z", "result", "q_input", "k_input", "v_input")
)
_HEAD_NORM = re.compile(r"\b[qkv]_norm\.")
_KEY_HEADS = ("hook_k", "hook_v", "hook_rot_k", "hook_k_input", "hook_v_input")
_POOLED = ("hook_readout", "ln_final.hook_scale", "ln_final.hook_normalized")

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


@dataclass(frozen=True)
class SiteName:
    """A full site name, taken apart."""

    tower: str
    layer: int | None
    site: str

    @staticmethod
    @lru_cache(maxsize=100_000)
    def parse(name: str) -> SiteName:
        """Split a full name; the inverse of ``str``."""
        tower, _, rest = name.partition(".")
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", rest)
        return SiteName(tower, int(match[1]), match[2]) if match else SiteName(tower, None, rest)

    @property
    def stage(self) -> str:
        """The last part of the name, e.g. ``hook_pattern``."""
        return self.site.rpartition(".")[2]

    @property
    def has_heads(self) -> bool:
        """Whether the site has a head axis."""
        return self.is_pattern or self.stage in _PER_HEAD or bool(_HEAD_NORM.search(self.site))

    @property
    def is_pattern(self) -> bool:
        """Whether the site is ``[row head query key]``: scores and patterns."""
        return self.stage in _PATTERNS

    @property
    def is_derived(self) -> bool:
        """Whether its value follows exactly from others, so that a cache computes it when it is read: shares of heads, what slots read."""
        return self.layer is not None and (
            self.stage in _DERIVED or re.fullmatch(r"hook_\w+_in", self.site) is not None
        )

    @property
    def branch(self) -> str:
        """The branch of a block whose attention holds it, as in ``cross_attn.hook_z``; "" for sites of no branch."""
        return self.site.partition(".")[0] if self.layer is not None and "." in self.site else ""

    @property
    def counts_key_heads(self) -> bool:
        """Whether the head axis counts key/value heads, of which there may be fewer."""
        return (
            self.stage in _KEY_HEADS or "k_norm." in self.site or "v_norm." in self.site
        ) and not self.site.startswith("pool.")

    @property
    def may_be_pooled(self) -> bool:
        """Whether the site lacks a position axis in towers that pool before it."""
        return self.layer is None and self.site in _POOLED

    @property
    def is_eager(self) -> bool:
        """Whether reading or writing the site switches the run to eager attention."""
        return self.layer is not None and self.stage in _EAGER

    def __str__(self) -> str:
        return f"{self.tower}.{self.site}" if self.layer is None else f"{self.tower}.blocks.{self.layer}.{self.site}"


@lru_cache(maxsize=10_000)
def _pattern(glob: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*|\?)", glob)
    table = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return re.compile("".join(table.get(part, re.escape(part)) for part in parts))


def is_glob(name: str) -> bool:
    """Whether a name holds a wildcard."""
    return any(mark in name for mark in "*?")


def matches(glob: str, name: str) -> bool:
    """Whether a glob selects a site name."""
    return _pattern(glob).fullmatch(name) is not None


def matching(names_filter: NamesFilter, sites: Iterable[str]) -> list[str]:
    """The sites that a name, glob, list of either, or predicate selects, in the order of ``sites``.

    Raises UnknownSiteError, with the nearest names, for a name or glob that selects nothing.
    """
    sites = list(sites)
    if names_filter is None:
        return [name for name in sites if not SiteName.parse(name).is_derived]
    if callable(names_filter):
        chosen = [name for name in sites if names_filter(name)]
        if not chosen:
            raise UnknownSiteError("names_filter selects no site of this model; model.sites() lists them.")
        return chosen
    known = set(sites)
    globs = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    if not globs:
        raise UnknownSiteError(
            "names_filter is empty; give a site name, a glob such as '*.blocks.*.attn.hook_z', or None."
        )
    chosen_set: set[str] = set()
    for glob in globs:
        if not isinstance(glob, str):
            raise UnknownSiteError(f"names_filter holds {glob!r}; give site names or globs as strings.")
        if glob in known:
            chosen_set.add(glob)
            continue
        pattern = _pattern(_with_tower(glob, sites))
        found = [name for name in sites if pattern.fullmatch(name)]
        if not found:
            raise UnknownSiteError(f"No site of this model matches {glob!r}. {_hint(glob, sites)}")
        chosen_set.update(found)
    return [name for name in sites if name in chosen_set]


def _with_tower(glob: str, sites: Iterable[str]) -> str:
    """A name or glob that leaves out the tower, with it; UnknownSiteError where several towers have blocks."""
    if not glob.startswith("blocks."):
        return glob
    towers = list(dict.fromkeys(site.tower for name in sites if (site := SiteName.parse(name)).layer is not None))
    if len(towers) > 1:
        ways = ", ".join(f"{tower}.{glob}" for tower in towers)
        raise UnknownSiteError(f"{glob!r} names no tower; write one of {ways}.")
    return ".".join([*towers, glob])


def _hint(glob: str, sites: Iterable[str]) -> str:
    """What was meant by a glob that selects nothing: one that crosses dots, or a name like it."""
    wider = re.sub(r"\*+", "**", glob)
    if wider != glob and any(_pattern(wider).fullmatch(name) for name in sites):
        return f"* stays inside one dotted part and ** crosses dots: {wider!r} matches."
    spelling = re.search(r"[Ll](?:ayer)?\s*\.?(\d+)\W*[Hh](?:ead)?\s*\.?(\d+)$", glob)
    head = f" A head is written L{spelling[1]}H{spelling[2]}, behind its tower's name." if spelling else ""
    return f"Nearest: {', '.join(nearest(glob, sites))}.{head}"


def exact_names(names_filter: NamesFilter, names: Iterable[str]) -> frozenset[str]:
    """Those of ``names`` that the filter spells out (rather than matching them by a glob)."""
    if isinstance(names_filter, str):
        return frozenset((names_filter,)).intersection(names)
    if isinstance(names_filter, (list, tuple, set, frozenset)):
        return frozenset(names_filter).intersection(names)
    return frozenset()


def expand_short(key: tuple[object, ...], sites: Iterable[str]) -> str:
    """The full name of a short form ``(tower, site)``, ``(tower, site, layer)`` or ``(tower, site, layer, part)``.

    Raises UnknownSiteError if there is no such site, or if the short form fits several.
    """
    sites = list(sites)
    towers = dict.fromkeys(SiteName.parse(name).tower for name in sites if not name.startswith("projector."))
    if key[0] not in (*towers, "projector") and not (len(key) > 1 and isinstance(key[1], str)):
        if len(towers) != 1:
            forms = " or ".join(str((tower, *key)) for tower in towers)
            raise UnknownSiteError(f"{key!r} names no tower; write {forms}.")
        key = (*towers, *key)
    tower, short, *rest = key
    layer = rest[0] if rest else None
    part = rest[1] if len(rest) > 1 else None
    layers = sorted({n.layer for s in sites if (n := SiteName.parse(s)).tower == tower and n.layer is not None})
    if isinstance(layer, int) and layer < 0 and layers:
        layer = layers[-1] + 1 + layer
    stem = str(short).removeprefix("hook_")
    stem = {"scores": "attn_scores", "attn": "pattern", "post": "post", "normalized": "normalized"}.get(stem, stem)
    wanted = []
    for name in sites:
        site = SiteName.parse(name)
        if site.tower != tower or site.layer != layer:
            continue
        *parents, last = site.site.split(".")
        if last.removeprefix("hook_") == stem and (part is None or ".".join(parents) == part):
            wanted.append((len(parents), name))
    wanted.sort()
    if not wanted or (len(wanted) > 1 and wanted[0][0] == wanted[1][0]):
        full = (
            f"{tower}."
            + (f"blocks.{layer}." if layer is not None else "")
            + (f"{part}." if part else "")
            + f"hook_{stem}"
        )
        what = "fits several sites; name the part, e.g. 'ln1'" if wanted else "is no site of this cache or model"
        near = ", ".join(nearest(full, sites))
        raise UnknownSiteError(f"{key!r} {what}. Nearest: {near}.")
    return wanted[0][1]
