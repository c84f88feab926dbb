"""Averages, draws and examples are taken over what is there: never over padding, empty cells of a grid, or cameras that are not there.

Compared with plain sums over the values that hooks on the raw modules see; which positions are real is read off the attention mask and the ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model import averages
from circuitvision.model.tokens import TokenMap
from circuitvision.readout.relevance.baselines import start_of
from circuitvision.readout.relevance.variables import AttributionInput
from tests.edits.common import block, wrapped
from tests.zoo import case, primary

DOUBLE = torch.float64
LANGUAGE = ("llava-clip-llama", "paligemma", "llava-next-mistral")
PADDED = [(name, side) for name in LANGUAGE for side in ("left", "right")]
SITE = "language.blocks.1.hook_resid_post"
EARLY, AFTER = "language.blocks.0.hook_resid_post", "language.blocks.1.hook_resid_pre"


def made(
    name: str, batch: int = 3, dtype: torch.dtype = DOUBLE, **options: Any
) -> tuple[cv.HookedModel, dict[str, Any]]:
    model = wrapped(name, dtype)
    return model, case(name).inputs(model.module, batch=batch, dtype=dtype, **options)


def seen(model: cv.HookedModel, inputs: dict[str, Any], tower: str = "language", layer: int = 1) -> Tensor:
    """What a block of the raw module writes."""
    found: list[Tensor] = []

    def look(module: Any, args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    handle = block(model, tower, layer).register_forward_hook(look)
    with torch.no_grad():
        model.module(**inputs)
    handle.remove()
    return found[0]


def written(
    model: cv.HookedModel,
    inputs: dict[str, Any],
    change: Callable[[Tensor], Tensor],
    tower: str = "language",
    layer: int = 1,
) -> Tensor:
    """The raw module's output with another value behind a block."""

    def write(module: Any, args: Any, output: Any) -> Any:
        new = change((output[0] if isinstance(output, tuple) else output).clone())
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = block(model, tower, layer).register_forward_hook(write)
    with torch.no_grad():
        out = primary(model.module(**inputs))
    handle.remove()
    return out


def kinds_by_hand(model: cv.HookedModel, inputs: dict[str, Any]) -> np.ndarray[Any, Any]:
    """ "image", "text" or "" (padding) from ids and mask alone."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    kinds = np.where((ids == model.image_token_id).numpy(), "image", "text")
    return np.where(mask.numpy(), kinds, "")


def longer(inputs: dict[str, Any], side: str, count: int = 5) -> dict[str, Any]:
    """The same prompts with more columns of padding."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    more = torch.zeros(len(ids), count, dtype=ids.dtype)
    order = (lambda a, b: (b, a)) if side == "left" else (lambda a, b: (a, b))
    out = {**inputs, "input_ids": torch.cat(order(ids, more), 1), "attention_mask": torch.cat(order(mask, more), 1)}
    if "token_type_ids" in inputs:
        out["token_type_ids"] = torch.cat(order(inputs["token_type_ids"], more), 1)
    return out


def near(got: Tensor, wanted: Tensor, by: float = 1e-9) -> None:
    torch.testing.assert_close(got, wanted, rtol=by, atol=by)


# -- means ---------------------------------------------------------------------------------------------------------------------------------


def check_means(name: str, side: str) -> None:
    model, inputs = made(name, padding=side)
    data = case(name).inputs(model.module, batch=4, seed=5, dtype=DOUBLE, padding=side)
    run_kind, real = kinds_by_hand(model, inputs), inputs["attention_mask"].bool()
    for dataset, source in ((None, inputs), (data, data)):
        values, kind = seen(model, source), kinds_by_hand(model, source)
        for average, chosen in (("all", kind != ""), ("text", kind == "text"), (["patch", "newline"], kind == "image")):
            mean = values[torch.from_numpy(chosen)].mean(0)
            wanted = written(model, inputs, lambda x, mean=mean: mean.expand_as(x).clone())
            edit = edits.ablate(SITE, "mean", dataset=dataset, average=average)
            near(model.run(inputs, [edit])[real], wanted[real])
        if "newline" in model.tokens(inputs)["language"].kind:
            continue
        own = torch.zeros_like(values[:1, :1]).expand(*run_kind.shape, -1).clone()
        for one in ("image", "text"):
            own[torch.from_numpy(run_kind == one)] = values[torch.from_numpy(kind == one)].mean(0)
        wanted = written(model, inputs, lambda x, own=own: torch.where(real[..., None], own, x))
        near(model.run(inputs, [edits.ablate(SITE, "mean", dataset=dataset, average="kind")])[real], wanted[real])


@pytest.mark.parametrize(("name", "side"), PADDED)
def test_means_are_sums_over_what_is_there(name: str, side: str) -> None:
    check_means(name, side)


def check_position(name: str) -> None:
    """Right padding: real positions line up, and each gets the mean over the rows that have it."""
    model, inputs = made(name, padding="right")
    real = inputs["attention_mask"].bool()
    data = case(name).inputs(model.module, batch=4, seed=5, dtype=DOUBLE, padding="right")
    there = data["attention_mask"].bool()
    values = seen(model, data)
    mean = (values * there[..., None]).sum(0) / there.sum(0).clamp_min(1)[:, None]
    wanted = written(model, inputs, lambda x: torch.where(real[..., None], mean, x))
    for dataset in (data, [data], longer(data, "right")):
        near(model.run(inputs, [edits.ablate(SITE, "mean", dataset=dataset)])[real], wanted[real])
    # Two parts of other lengths are one data set.
    ends = there.sum(1)
    short = {
        k: v[:, : int(ends[0])] if k in ("input_ids", "attention_mask", "token_type_ids") else v
        for k, v in data.items()
    }
    first = {k: v[:1] for k, v in short.items()}
    rest = {k: v[1:] for k, v in data.items()}
    near(model.run(inputs, [edits.ablate(SITE, "mean", dataset=[first, rest])])[real], wanted[real])
    # The run's own mean, where two rows have the position.
    shared = torch.from_numpy((real.sum(0) >= 2).numpy())
    own = seen(model, inputs)
    mean = (own * real[..., None]).sum(0) / real.sum(0).clamp_min(1)[:, None]
    wanted = written(model, inputs, lambda x: torch.where((real & shared)[..., None], mean, x))
    near(model.run(inputs, [edits.ablate(SITE, "mean", positions=shared)])[real], wanted[real])


@pytest.mark.parametrize("name", ["llava-clip-llama", "paligemma"])
def test_a_mean_per_position_is_over_the_rows_that_have_it(name: str) -> None:
    check_position(name)


def check_columns(name: str, side: str) -> None:
    """More columns of padding, in the run or in the data set, change nothing at real positions."""
    model, inputs = made(name, padding=side)
    data = case(name).inputs(model.module, batch=4, seed=5, dtype=DOUBLE, padding=side)
    real, wide = inputs["attention_mask"].bool(), longer(inputs, side)
    # Rotary angles are float32, and columns on the left move every position.
    by = 1e-9 if side == "right" else 2e-5
    for average in ("all", "patch", "kind", "position"):
        if average == "position" and (side == "left" or "newline" in model.tokens(inputs)["language"].kind):
            continue
        for site in (SITE, "language.blocks.0.attn.hook_z"):
            edit = edits.ablate(site, "mean", dataset=data, average=average)
            clean = model.run(inputs, [edit])[real]
            near(
                model.run(inputs, [edits.ablate(site, "mean", dataset=longer(data, side), average=average)])[real],
                clean,
                by,
            )
            near(model.run(wide, [edit])[wide["attention_mask"].bool()], clean, by)
            if average != "position":
                own = [edits.ablate(site, "mean", average=average)]
                near(model.run(wide, own)[wide["attention_mask"].bool()], model.run(inputs, own)[real], by)


@pytest.mark.parametrize(("name", "side"), PADDED)
def test_columns_of_padding_change_no_mean(name: str, side: str) -> None:
    check_columns(name, side)


def naflex(extra: int = 0, seed: int = 0) -> dict[str, Any]:
    """Pictures of other grids, as flattened patches with empty cells behind them."""
    model = wrapped("siglip2-vision", DOUBLE)
    width = model.module.config.num_channels * model.module.config.patch_size**2
    grids = ((2, 4), (3, 2), (1, 5))
    room = max(a * b for a, b in grids) + extra
    generator = torch.Generator().manual_seed(seed)
    pixels, mask = torch.zeros(3, room, width, dtype=DOUBLE), torch.zeros(3, room, dtype=torch.long)
    for row, (down, across) in enumerate(grids):
        mask[row, : down * across] = 1
        pixels[row, : down * across] = torch.randn(down * across, width, generator=generator, dtype=DOUBLE)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(grids)}


def test_empty_cells_of_a_grid_are_in_no_mean() -> None:
    model, inputs, data = wrapped("siglip2-vision", DOUBLE), naflex(), naflex(seed=3)
    site, real = "vision.blocks.0.hook_resid_post", inputs["pixel_attention_mask"].bool()
    mean = seen(model, data, "vision", 0)[data["pixel_attention_mask"].bool()].mean(0)
    wanted = written(model, inputs, lambda x: mean.expand_as(x).clone(), "vision", 0)
    for dataset in (data, naflex(4, 3), [data, naflex(2, 3)]):
        got = model.run(inputs, [edits.ablate(site, "mean", dataset=dataset, average="patch")])
        near(got[real] if got.ndim == 3 else got, wanted[real] if got.ndim == 3 else wanted)
    with pytest.raises(InputError, match="would mix them"):
        model.run(inputs, [edits.ablate(site, "mean", dataset=data)])


def calls_of(model: cv.HookedModel, call: Callable[[], Any], message: str) -> None:
    """One error of this message, and the module never ran."""
    ran: list[int] = []
    handle = model.module.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(InputError, match=message):
            call()
    finally:
        handle.remove()
    assert not ran


def test_positions_that_do_not_line_up_are_refused_before_anything_runs() -> None:
    model, inputs = made("llava-clip-llama", padding="left")
    short = {k: v[:, :12] if k != "pixel_values" else v for k, v in inputs.items()}
    short = {**short, **case("llava-clip-llama").inputs(model.module, batch=2, dtype=DOUBLE)}
    cut = {k: v[:, :-3] if k != "pixel_values" else v for k, v in short.items()}
    calls_of(model, lambda: model.run(inputs, [edits.ablate(SITE, "mean")]), "would mix them|one row has")
    calls_of(model, lambda: model.run(short, [edits.ablate(SITE, "mean", dataset=cut)]), "no row of the data set")
    calls_of(
        model,
        lambda: model.run(short, [edits.ablate(SITE, "mean", dataset=cut, positions="last")]),
        "no row of the data set",
    )
    text = {k: v for k, v in short.items() if k != "pixel_values"}
    text["input_ids"] = text["input_ids"].clamp_min(9)
    calls_of(
        model,
        lambda: model.run(short, [edits.ablate(SITE, "mean", dataset=text, average="kind")]),
        "no position of the kind 'patch'",
    )
    # Patches line up where words do not.
    right = made("llava-clip-llama", padding="right")[1]
    model.run(right, [edits.ablate(SITE, "mean", positions=model.tokens(right)["language"].select("patch"))])


def test_a_mean_over_a_selection_of_the_data_set_and_its_file(tmp_path: Any) -> None:
    model, inputs = made("llava-clip-llama", padding="left")
    data = case("llava-clip-llama").inputs(model.module, batch=4, seed=5, dtype=DOUBLE, padding="left")
    chosen = model.tokens(data)["language"].image(0).patch(0)
    values = seen(model, data)
    mean = values[chosen.tensor].mean(0)
    wanted = written(model, inputs, lambda x: mean.expand_as(x).clone())
    real = inputs["attention_mask"].bool()
    listed = [
        edits.ablate(SITE, "mean", dataset=data, average=chosen),
        edits.ablate(SITE, "mean", dataset=data, average=["patch", "text"]),
        edits.ablate(SITE, "mean", average="patch"),
        edits.ablate(SITE, "mean", average="kind"),
    ]
    near(model.run(inputs, listed[:1])[real], wanted[real])
    assert edits.load(edits.save(tmp_path / "means.yaml", listed)) == listed
    assert "average=['patch', 'text']" in repr(listed[1]) or "average=('patch', 'text')" in repr(listed[1])
    assert "average='patch'" in repr(listed[2])
    for average in ("rows", ["patch", "padding"], [], 3):
        with pytest.raises(InputError, match="average="):
            edits.ablate(SITE, "mean", average=average)
    with pytest.raises(InputError, match="selection of 4 rows"):
        model.run(inputs, [edits.ablate(SITE, "mean", average=chosen)])
    with pytest.raises(InputError, match="vision tower, not of language"):
        model.run(inputs, [edits.ablate(SITE, "mean", average=model.tokens(inputs)["vision"].select("patch"))])


# -- draws ---------------------------------------------------------------------------------------------------------------------------------


def check_draws(name: str, side: str, positions: Any) -> None:
    """Every drawn value is another row's, at a real position of the same kind."""
    model, inputs = made(name, batch=4, padding=side)
    kind, values = kinds_by_hand(model, inputs), seen(model, inputs, layer=0)
    for seed in range(3):
        got: list[Tensor] = []
        edit = edits.ablate(EARLY, "resample", positions=positions, seed=seed)
        hooks = [(AFTER, lambda x, hook, got=got: got.append(x.clone()))]
        with model.hooks(fwd_hooks=hooks):
            model.run(inputs, [edit])
        new = got[-1]
        changed = 0
        for row, position in zip(*(kind != "").nonzero(), strict=True):
            if torch.equal(new[row, position], values[row, position]):
                continue
            changed += 1
            same = (values == new[row, position]).all(-1).nonzero().tolist()
            assert same, "a value that no row has"
            assert any(other != row and kind[other, at] == kind[row, position] for other, at in same)
        assert changed >= len(kind)
        near(new[torch.from_numpy(kind == "")], values[torch.from_numpy(kind == "")])


@pytest.mark.parametrize(
    ("name", "side"), [("llava-clip-llama", "left"), ("llava-clip-llama", "right"), ("paligemma", "left")]
)
def test_draws_are_real_positions_of_the_same_kind(name: str, side: str) -> None:
    check_draws(name, side, "last")
    # The longest row has words that no other has: its second word, which all have, can be drawn.
    model, inputs = made(name, batch=4, padding=side)
    kind = kinds_by_hand(model, inputs)
    words = np.zeros_like(kind, dtype=bool)
    for row in range(len(kind)):
        words[row, np.flatnonzero(kind[row] == "text")[1]] = True
    check_draws(name, side, torch.from_numpy(words))


def test_the_last_word_takes_another_rows_last_word() -> None:
    model, inputs = made("llava-clip-llama", batch=4, padding="right")
    values, ends = seen(model, inputs, layer=0), inputs["attention_mask"].sum(1) - 1
    got: list[Tensor] = []
    with model.hooks(fwd_hooks=[(AFTER, lambda x, hook: got.append(x.clone()))]):
        model.run(inputs, [edits.ablate(EARLY, "resample", positions="last")])
    rows = torch.arange(4)
    lasts = values[rows, ends]
    taken = [(lasts == new).all(-1).nonzero().flatten().tolist() for new in got[-1][rows, ends]]
    assert sorted(donor for (donor,) in taken) == [0, 1, 2, 3]
    assert all(donor != row for row, (donor,) in enumerate(taken))


def test_a_draw_that_no_row_can_give_is_refused() -> None:
    model, inputs = made("llava-clip-llama", batch=3, padding="right")
    calls_of(model, lambda: model.run(inputs, [edits.ablate(EARLY, "resample")]), "more positions of the kind")


# -- cameras that are not there --------------------------------------------------------------------------------------------------------------


def robots() -> tuple[cv.HookedModel, dict[str, Any]]:
    """Three examples of two cameras, the last example with one."""
    model = wrapped("pi0", DOUBLE)
    return model, case("pi0").inputs(model.module, batch=3, padding="right", dtype=DOUBLE)


def test_a_camera_that_is_not_there_is_no_patch() -> None:
    model, inputs = robots()
    tokens = model.tokens(inputs)["vision"]
    visible = inputs["pixel_attention_mask"].flatten().numpy()
    assert (tokens.kind[~visible] == "dropped").all()
    assert (tokens.kind[visible] == "patch").all()
    assert not tokens.select().mask[~visible].any()
    assert not tokens.select("patch").mask[~visible].any()
    assert (~tokens.select("patch")).mask.sum() == 0
    assert tokens.example.tolist() == [0, 0, 1, 1, 2, 2]


def check_cameras() -> None:
    model, inputs = robots()
    site = "vision.blocks.0.hook_resid_post"
    visible = inputs["pixel_attention_mask"].flatten()
    values = seen(model, inputs, "vision", 0)
    for average, mean in (("all", values[visible].mean((0, 1))), ("position", values[visible].mean(0))):
        wanted = written(model, inputs, lambda x, mean=mean: mean.expand_as(x).clone(), "vision", 0)
        near(model.run(inputs, [edits.ablate(site, "mean", average=average)]), wanted)
    # Draws come from other examples, and from cameras that are there.
    got: list[Tensor] = []
    with model.hooks(fwd_hooks=[("vision.blocks.1.hook_resid_pre", lambda x, hook: got.append(x.clone()))]):
        model.run(inputs, [edits.ablate(site, "resample")])
    for row in visible.nonzero().flatten().tolist():
        (donor,) = (values == got[-1][row]).flatten(1).all(1).nonzero().flatten().tolist()
        assert bool(visible[donor])
        assert donor // 2 != row // 2
    # One vector per example: the mean over the cameras that are there.
    vectors = cv.readout.collect(model, inputs, site, positions="patch")[site]
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    near(vectors, torch.stack([values[visible & (owner == e)].flatten(0, 1).mean(0) for e in range(3)]))
    best = cv.readout.max_activating_examples(model, inputs, site, top_k=3, positions="all")
    places = best.example * 2 + best.places[..., 0]
    assert bool(visible[places].all())


def test_cameras_that_are_not_there_count_nowhere() -> None:
    check_cameras()


def test_baselines_leave_out_what_is_not_there_and_the_examples_own_images() -> None:
    model, inputs = robots()
    variable = AttributionInput(model, inputs, lambda logits: logits[:, 0, 0], "vision.hook_input")
    start, visible = start_of(variable, "mean"), inputs["pixel_attention_mask"].flatten()
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    for row in visible.nonzero().flatten().tolist():
        near(start[row], variable.value[visible & (owner != owner[row])].mean(0))
    near(start_of(variable, inputs)[visible], variable.value[visible].mean(0).expand(int(visible.sum()), -1, -1))
    # A data set of longer prompts lines up where its prompts begin alike.
    llava, prompts = made("llava-clip-llama", padding="right")
    words = AttributionInput(llava, prompts, cv.metrics.logit_diff(5, 7), "language.hook_input")
    real = prompts["attention_mask"].bool()
    near(start_of(words, longer(prompts, "right"))[real], start_of(words, prompts)[real])


# -- read-outs -----------------------------------------------------------------------------------------------------------------------------


def summaries(model: cv.HookedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Numbers per example or row that must not know of padding."""
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter="language.**")
    sites = ["language.blocks.0.hook_resid_post", SITE]
    vectors = cv.readout.collect(model, inputs, sites, positions="all")
    lens = cv.readout.logit_lens(model, cache, targets={6: 6, 9: 9})
    found = {
        "mass": cv.readout.attention_mass(model, cache, tower="language", queries="all").values,
        "uniform": cv.readout.attention_mass(model, cache, tower="language", queries="all").uniform,
        "entropy": cv.readout.attention_entropy(model, cache, tower="language", queries="all").values,
        "collected": vectors[SITE],
        "cka": cv.readout.cka(vectors).values,
        "rates": lens.change_rate().values,
        "identifiability": lens.identifiability().values,
        "ranking": cv.readout.rank_components(lens).values,
        "strongest": cv.readout.max_activating_examples(model, inputs, SITE, top_k=2, positions="all").values,
        "mean of units": cv.readout.max_activating_examples(
            model, inputs, SITE, top_k=2, positions="all", pool="mean"
        ).values,
    }
    with torch.no_grad():
        _, whole = model.run_with_cache(inputs)
    found["ranking of sources"] = cv.readout.rank_components(cv.readout.source_attribution(model, whole, (6, 9))).values
    by_head = cv.readout.gradient_times_activation(
        model, inputs, cv.metrics.logit_diff(6, 9), site="language.blocks.0.attn.hook_z"
    )
    found["ranking of relevance"] = cv.readout.rank_components(by_head).values
    for baseline in ("own", "zero"):
        options = {"tower": "language", "kinds": "patch", "baseline": baseline, "progress": False}
        values = cv.readout.occlusion(model, inputs, cv.metrics.logit_diff(5, 7), **options).values
        found[baseline] = torch.stack([row[~row.isnan()] for row in values.T])
    return found


def check_summaries(side: str) -> None:
    # Eager attention in float64 makes NaN of columns on the left.
    model, inputs = made("llava-clip-llama", padding=side, dtype=torch.float32)
    one, other = summaries(model, inputs), summaries(model, longer(inputs, side))
    for name, value in one.items():
        torch.testing.assert_close(
            other[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_columns_of_padding_change_no_summary(side: str) -> None:
    check_summaries(side)


# -- mutants -------------------------------------------------------------------------------------------------------------------------------


def everything_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averages, "present", lambda kind: np.ones(kind.shape, dtype=bool))
    monkeypatch.setattr(TokenMap, "present", property(lambda self: np.ones(self.kind.shape, dtype=bool)))


def donors_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same position of another row, whatever stands there."""
    monkeypatch.setattr(averages, "match", lambda kind, needed, other, from_end: np.flatnonzero(needed))


def rows_for_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    real = averages.Layout.of_tokens.__func__

    def of_tokens(cls: Any, tokens: TokenMap, shift: int = 0) -> averages.Layout:
        layout = real(cls, tokens, shift)
        object.__setattr__(layout, "example", np.arange(len(layout.example)))
        return layout

    monkeypatch.setattr(averages.Layout, "of_tokens", classmethod(of_tokens))


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], None]]] = {
    "padding in means": (everything_counts, lambda: check_means("llava-clip-llama", "left")),
    "padding in means per position": (everything_counts, lambda: check_position("llava-clip-llama")),
    "columns of padding": (everything_counts, lambda: check_columns("llava-clip-llama", "right")),
    "padding in summaries": (everything_counts, lambda: check_summaries("right")),
    "cameras that are not there": (everything_counts, check_cameras),
    "donors from padding": (donors_by_row, lambda: check_draws("llava-clip-llama", "right", "last")),
    "rows for examples": (rows_for_examples, check_cameras),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, check = MUTANTS[name]
    check()
    mutate(monkeypatch)
    with pytest.raises((AssertionError, InputError)):
        check()
