"""Promises 1, 3, 5 and 6: every site can be read and edited or is declared dead, looking changes nothing, sites fire once, and no others exist."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import circuitvision as cv
from circuitvision.errors import HookError, UnknownSiteError
from tests.conformance.oracle import expected_sites
from tests.conformance.setting import (
    Setting,
    close,
    disturb,
    groups,
    needs_eager,
    noise,
    nothing,
    one_layer_each,
    position_axis,
    same,
    stem,
    vision_of,
)
from tests.parts import module_of

LIVE_BATCH = 8


class Liveness:
    """Edits one position per example and compares the output of that example with the clean run."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.model = setting.model()
        self.inputs = setting.inputs(self.model, batch=max(setting.batch, LIVE_BATCH) if setting.batch > 1 else 1)
        self.tokens = self.model.tokens(self.inputs)
        self.n_examples = max(int(self.tokens[name].example.max()) + 1 for name in self.tokens)
        with setting.mode():
            fused = [name for name in self.model.sites() if not needs_eager(name)]
            self.clean, cache = self.model.run_with_cache(self.inputs, fused)
            self.clean_eager, self.cache = self.model.run_with_cache(self.inputs, "**")
        assert set(self.cache) == set(self.model.sites())
        assert set(cache) == set(fused)
        self.visible = {
            name: (self.cache[name] > torch.finfo(self.cache[name].dtype).min / 4).sum(-1)
            for name in self.cache
            if stem(name) == "hook_attn_scores"
        }

    def run(self, site: str, where: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Clean output and output with the site edited at `where`; checks that a cache inside the edit sees it."""
        seen: list[Tensor] = []
        written: list[Tensor] = []

        def edit(value: Tensor, hook: Any) -> Tensor:
            seen.append(value.detach())
            written.append(disturb(where=where)(value, hook))
            return written[-1]

        with self.setting.mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with self.model.hooks([(site, edit)]):
                out, cache = self.model.run_with_cache(self.inputs, site)
        if needs_eager(site):
            same(seen[0], self.cache[site].detach(), f"{site}: what a hook gets and what a cache holds")
        else:
            close(seen[0], self.cache[site], f"{site}: what a hook gets and what a cache of an eager run holds")
        same(cache[site], written[0], f"{site}: what a cache inside the edit sees")
        return (self.clean_eager if needs_eager(site) else self.clean).detach(), out.detach()

    def changes(self, site: str, clean: Tensor, out: Tensor) -> Tensor:
        """Largest change of the output of each example (texts of a dual encoder are columns)."""
        assert torch.isfinite(out).all(), f"{site}: editing made the output not finite"
        gap = (out - clean).abs()
        if "dual" in self.setting.case.tags and site.startswith("text."):
            gap = gap.T
        return gap.flatten(1).amax(1) if gap.ndim > 1 else gap

    def examples(self, site: str) -> Tensor:
        """The example of every row of a site."""
        return torch.from_numpy(self.tokens[vision_of(site, self.tokens)].example)

    def declared(self, site: str, shape: torch.Size) -> Tensor:
        """Declared dead: bool [row pos] for this site's rows and positions."""
        axis = position_axis(site)
        rows, positions = shape[0], shape[axis]
        if self.model.is_dead(site):
            return torch.ones(rows, positions, dtype=torch.bool)
        dead = self.model.dead_positions(site, self.inputs)
        if dead is None:
            return torch.zeros(rows, positions, dtype=torch.bool)
        assert dead.shape == (rows, positions), f"{site}: dead_positions has shape {tuple(dead.shape)}"
        return dead

    def excepted(self, site: str, shape: torch.Size) -> Tensor:
        """Padding positions, and queries whose scores row has a single key (adding to it is adding a constant): bool [row pos]."""
        axis = position_axis(site)
        skip = torch.zeros(shape[0], shape[axis], dtype=torch.bool)
        tower = vision_of(site, self.tokens)
        if skip.shape == self.tokens[tower].kind.shape:
            skip |= torch.from_numpy(self.tokens[tower].kind == "padding")
        elif tower == "vision" and "spatial_shapes" in self.inputs:
            skip |= self.inputs["pixel_attention_mask"][:, : shape[axis]] == 0 if shape[axis] > 1 else False
        keys = self.visible.get(site)
        return skip if keys is None else skip | (keys == 1).all(1)


def chosen_positions(live: Liveness, site: str, shape: torch.Size, dead: Tensor, skip: Tensor) -> Iterator[int]:
    """Positions worth a run: all of them if there are few, else the first and last of every class and others between."""
    positions = shape[position_axis(site)]
    if positions <= live.n_examples or live.setting.thorough:
        yield from range(positions)
        return
    kinds = live.tokens[vision_of(site, live.tokens)].kind
    classes: dict[Any, list[int]] = {}
    for position in range(positions):
        kind = kinds[0, position] if kinds.shape[1] == positions else ""
        classes.setdefault((str(kind), bool(dead[0, position])), []).append(position)
    picked = {edge for members in classes.values() for edge in (members[0], members[-1])}
    generator = torch.Generator().manual_seed(positions)
    others = [p for p in torch.randperm(positions, generator=generator).tolist() if p not in picked]
    yield from sorted(picked | set(others[: max(0, live.n_examples - len(picked))]))


def edits_reach_the_output_unless_declared_dead(setting: Setting) -> None:
    """Declared dead ⇔ measured exactly 0.0, per site and position; what a hook reads is what a cache reads."""
    live = Liveness(setting)
    wrong = []
    for site in live.model.sites() if setting.every_site else one_layer_each(live.model):
        shape = live.cache[site].shape
        if len(shape) == 2:
            wrong += _check_pooled(live, site)
            continue
        dead, skip = live.declared(site, shape), live.excepted(site, shape)
        wrong += _check_positions(live, site, shape, dead, skip)
    assert not wrong, f"{len(wrong)} claims differ from what was measured: " + "; ".join(wrong[:8])


def _check_pooled(live: Liveness, site: str) -> list[str]:
    clean, out = live.run(site, lambda value: torch.ones_like(value, dtype=torch.bool))
    moved = live.changes(site, clean, out)
    alive = not live.model.is_dead(site)
    return [] if bool(((moved > 0) == alive).all()) else [f"{site} pooled changes {moved.tolist()}, alive {alive}"]


def _check_positions(live: Liveness, site: str, shape: torch.Size, dead: Tensor, skip: Tensor) -> list[str]:
    """Each example gets an edit at a position of its own; further runs until every chosen position was edited."""
    wrong, axis, owner = [], position_axis(site), live.examples(site)
    todo = list(chosen_positions(live, site, shape, dead, skip))
    for start in range(0, len(todo), live.n_examples):
        at = {example: todo[(start + example) % len(todo)] for example in range(live.n_examples)}
        position = torch.tensor([at[int(example)] for example in owner])
        chosen = torch.nn.functional.one_hot(position, shape[axis]).bool()

        def where(value: Tensor, chosen: Tensor = chosen) -> Tensor:
            view = [1] * value.ndim
            view[0], view[axis] = chosen.shape
            return chosen.view(view).expand_as(value)

        clean, out = live.run(site, where)
        moved = live.changes(site, clean, out)
        for example in range(live.n_examples):
            mine = owner == example
            rows_dead = (
                (dead | skip)[mine, at[example]] if not bool(dead[mine, at[example]].all()) else dead[mine, at[example]]
            )
            if bool(skip[mine, at[example]].all()) and not bool(dead[mine, at[example]].any()):
                continue
            alive = not bool(rows_dead.all())
            if (float(moved[example]) > 0) != alive:
                wrong.append(
                    f"{site} position {at[example]} changes {float(moved[example]):.3g}, declared {'live' if alive else 'dead'}"
                )
    return wrong


def editing_a_dead_site_warns(setting: Setting) -> None:
    """By its exact name a dead site warns; live sites, and globs, do not."""
    model = setting.model()
    inputs = setting.inputs(model)
    with setting.mode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alive = [name for name in model.sites() if not model.is_dead(name)]
        model.run_with_hooks(inputs, [("**", nothing), *((name, nothing) for name in alive)])
    ours = [w for w in caught if "cannot reach the output" in str(w.message)]
    assert not ours, f"a live site warned: {ours[0].message}"
    for name in model.sites():
        if model.is_dead(name):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with model.hooks([(name, nothing)]):
                    pass
            assert any(name in str(w.message) for w in caught), f"editing {name} gave no warning"


def returning_the_tensor_changes_nothing(setting: Setting) -> None:
    """Returning the value, or a clone, leaves every bit of the output and of every other site; some kinds at a time, and all at once."""
    model = setting.model()
    inputs = setting.inputs(model)
    by_kind = list(groups(model).values())
    if not setting.thorough:
        by_kind = [[name for names in by_kind[start::8] for name in names] for start in range(8)]
    for key, names in [("**", ["**"]), *((names[0], names) for names in by_kind)]:
        with setting.mode():
            expected = model.run_with_hooks(inputs, [(name, nothing) for name in names])
            ways = [("a clone", lambda v, hook: v.clone())]
            if key == "**" or setting.thorough:
                ways.append(("itself", lambda v, hook: v))
            for what, fn in ways:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    out = model.run_with_hooks(inputs, [(name, fn) for name in names])
                same(out, expected, f"{key}: output after returning {what}")
    with setting.mode():
        _, clean = model.run_with_cache(inputs, "**")
        with model.hooks([("**", lambda v, hook: v.clone())]):
            _, cache = model.run_with_cache(inputs, "**")
    for name in clean:
        same(cache[name], clean[name], f"{name} after returning clones everywhere")


def hooks_own_their_tensor(setting: Setting) -> None:
    """A changed tensor that is not returned raises; a hook may keep what it got: nothing writes to it later."""
    model = setting.model()
    inputs = setting.inputs(model)
    kept: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        kept[hook.name], copies[hook.name] = value, value.detach().clone()

    def rewrite(value: Tensor, hook: Any) -> Tensor:
        return value.mul_(1.25)

    def forget(value: Tensor, hook: Any) -> None:
        value.mul_(2.0)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with model.hooks([("**", keep), ("**", rewrite)]):
            model(inputs)
        for name in model.sites():
            same(kept[name].detach(), copies[name], f"{name}: a kept tensor was written to")
        for name in model.sites() if setting.thorough else [names[-1] for names in groups(model).values()]:
            _raises(HookError, name, lambda name=name: model.run_with_hooks(inputs, [(name, forget)]))
    assert not model.engine.handles, "handles are left after an exception in a hook"


def _raises(kind: type[Exception], naming: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except kind as error:
        assert naming in str(error), f"the error does not name {naming}: {error}"  # noqa: PT017
        return
    raise AssertionError(f"{kind.__name__} naming {naming} was expected")


def sites_fire_once_per_pass(setting: Setting) -> None:
    """Every site fires exactly once in a forward; a block that runs a part twice, or never, makes the run raise and name the site."""
    model = cv.HookedModel(setting.copy())
    inputs = setting.inputs(model)
    fired: Counter[str] = Counter()

    def count(value: Tensor, hook: Any) -> None:
        fired[hook.name] += 1
        assert hook.step == 0, f"{hook.name} is in step {hook.step} of a single forward"
        assert hook.name.startswith(hook.tower)
        assert hook.name.endswith(hook.site)

    with setting.mode():
        model.run_with_hooks(inputs, [("**", count)])
        assert fired == Counter(dict.fromkeys(model.sites(), 1)), (
            fired - Counter(model.sites())
        ) or "some site did not fire"
        for name, tower in model.towers.items():
            mlp, site = module_of(tower.blocks[-1], "mlp"), f"{name}.blocks.{tower.cfg.n_layers - 1}.mlp.hook_post"
            original = mlp.forward
            for replacement in (lambda x, f=original: f(x) + 0 * f(x), lambda x: torch.zeros_like(x)):
                mlp.forward = replacement  # type: ignore[method-assign]
                _raises(HookError, site, lambda site=site: model.run_with_hooks(inputs, [(site, nothing)]))
                _raises(HookError, "mlp.hook_post", lambda: model.run_with_cache(inputs, "**.mlp.hook_post"))
                del mlp.forward
        model.run_with_hooks(inputs, [("**", nothing)])


def exactly_the_expected_sites_exist(setting: Setting) -> None:
    """The site list is the architecture's, written down by hand; every other name raises with the nearest names."""
    model = setting.model()
    expected, listed = expected_sites(setting.case), model.sites()
    assert len(listed) == len(set(listed)), "a site is listed twice"
    missing, extra = sorted(expected - set(listed)), sorted(set(listed) - expected)
    assert not missing + extra, f"missing {missing[:5]}, unexpected {extra[:5]}"
    last = model.towers["vision"].cfg.n_layers
    known = set(listed)
    for absent in (
        f"vision.blocks.{last}.hook_resid_pre",
        "vision.blocks.0.attn.hook_rot_z",
        "vision.blocks.0.cross_attn.hook_q",
        "vision.blocks.0.hook_z",
        "vision.blocks.0.attn.hook_zz",
        "decoder.blocks.0.attn.hook_z",
        "",
    ):
        for call in (
            lambda name=absent: model.sites(name),
            lambda name=absent: model.hooks([(name, nothing)]).__enter__(),
            lambda name=absent: model.run_with_cache(setting.inputs(model), name),
        ):
            try:
                call()
            except UnknownSiteError as error:
                near = [name for name in known if name in str(error)]
                assert len(near) >= 3 or len(known) < 3, f"{absent}: fewer than three names in {error}"  # noqa: PT017
            else:
                raise AssertionError(f"{absent!r} did not raise UnknownSiteError")
    assert not model.engine.handles, "an unknown site left handles"
    assert noise(torch.ones(2, 2), "hook_z").std() > 0
