"""The studies of ``causal.py``, each in every tool that has it: attribution patching, AtP*, path patching, a step of DAS, a causal trace.

Every study checks its tools against each other before anything is timed. Loops and peers that run the model once per cell are timed on a few cells
per round; :attr:`Arm.share` extrapolates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import causal_tools as tools
import torch
from causal_tools import LENS, OURS, PYVENE, Arm, CausalStudy, Scene, check
from operations import of_forward, unavoidable
from sweep_tools import CannotError, _import_pyvene
from sweeps import in_turn, slices
from torch import Tensor

import circuitvision as cv
from circuitvision.patching import attribution_patch, causal_trace, path_patch

CHECKED = 5
RANK = 8
EXACT, HAND = "loop of plain hooks", "plain hooks, by hand"
NO_OWN = "it has no implementation of its own"


def model_of(scene: Scene) -> Any:
    return cv.HookedModel(scene.module)


def _has_aims(scene: Scene) -> bool:
    """Whether a model is as wide as those in use: on small ones a forward is mostly Python."""
    return any(study.faster for study in scene.shape.studies)


def _add_peers(study: CausalStudy, wanted: Sequence[str], **makers: Callable[[], Arm] | str) -> None:
    """The peers' arms, by the tools' names; a text says why there is none."""
    titles = {"transformer-lens": LENS, "pyvene": PYVENE}
    for tool in wanted:
        if tool not in titles:
            continue
        make = makers[tool.replace("-", "_")]
        if isinstance(make, str):
            study.unable[titles[tool]] = make
            continue
        try:
            study.arms[titles[tool]] = make()
        except CannotError as error:
            study.unable[titles[tool]] = str(error)


def _sampled(
    value: Callable[[Any], Tensor], cells: Sequence[Any], size: int, passes: str = "1 forward per cell"
) -> Arm:
    """An arm that runs the model once per cell, on the next few of all cells every time."""
    size = min(size, len(cells))
    return Arm(
        in_turn(lambda some: torch.stack([value(cell) for cell in some]), cells, size), size / len(cells), passes
    )  # type: ignore[arg-type]


def _some(cells: Sequence[Any]) -> list[Any]:
    return slices(cells, min(CHECKED, len(cells)), seed=1)()


# -- attribution patching --------------------------------------------------------------------------------------------------------------------------


def attribution(scene: Scene, wanted: Sequence[str], size: int) -> CausalStudy:
    """AtP of every head's z: two forwards and one backward."""
    model, places = model_of(scene), scene.each_layer("z")
    heads = [(layer, head) for layer in range(scene.n_layers) for head in range(scene.n_heads)]

    def ours() -> Tensor:
        return attribution_patch(
            model,
            clean=scene.source,
            corrupt=scene.base,
            metric=scene.metric,
            sites=f"{scene.tower}.blocks.*.attn.hook_z",
            progress=False,
        ).values[..., 0]

    def by_hand() -> Tensor:
        with torch.no_grad():
            _, there = scene.reading(places, scene.source)
        with torch.enable_grad():
            logits, here = scene.reading(places, scene.base)
            gradients = torch.autograd.grad(scene.metric(logits).sum(), list(here.values()))
        parts = [(there[layer] - here[layer]) * one for layer, one in zip(here, gradients, strict=True)]
        return torch.stack([one.unflatten(-1, (scene.n_heads, -1)).sum((0, 1, 3)) for one in parts]).detach()

    def bare() -> None:
        with torch.no_grad():
            scene.module(**scene.source)
        with torch.enable_grad():
            logits, here = scene.reading({0: places[0]}, scene.base)
            torch.autograd.grad(scene.metric(logits).sum(), [here[0]])

    def lens() -> Arm:
        from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient

        bridge = scene.bridge()
        # Its usual set of sites is read (z, MLPs, embeddings): with z alone it finds no gradient for the first layer's.
        names = [f"blocks.{layer}.attn.hook_z" for layer in range(scene.n_layers)]

        def metric(logits: Tensor) -> Tensor:
            return scene.metric(logits).sum()

        def run() -> Tensor:
            with torch.no_grad():
                there = cache_activation_and_gradient(
                    bridge, scene.tokens(scene.source), metric, compute_gradient=False
                )
            with torch.enable_grad():
                here = cache_activation_and_gradient(bridge, scene.tokens(scene.base), metric)
            parts = [(there.activations[name] - here.activations[name]) * here.gradients[name] for name in names]
            return torch.stack([one.sum((0, 1, 3)) for one in parts])

        check("attribution", LENS, run(), expected, largest)
        return Arm(run, passes="2 forwards + 1 backward (its gradient cache)")

    expected = by_hand()
    largest = float(scene.metric(scene.module(**scene.base).logits).abs().max())
    check("attribution", OURS, ours(), expected, largest)
    study = CausalStudy(
        "attribution",
        f"AtP of {len(heads)} heads",
        "2 forwards + 1 backward",
        {
            "2 forwards + 1 backward": Arm(bare),
            OURS: Arm(ours, passes="2 forwards + 1 backward"),
            HAND: Arm(by_hand, passes="2 forwards + 1 backward"),
            EXACT: _sampled(_head_values(scene, "z"), heads, size),
        },
        EXACT,
        aim=1.2 if _has_aims(scene) else None,
    )
    _add_peers(study, wanted, transformer_lens=lens, pyvene=NO_OWN)
    return study


def _head_values(scene: Scene, which: str) -> Callable[[tuple[int, int]], Tensor]:
    """Exact patching of one head's z or q by plain hooks: the metric of the base run with the source's values."""
    places = scene.each_layer(which)
    with torch.no_grad():
        _, source = scene.reading(places, scene.source)

    def value(cell: tuple[int, int]) -> Tensor:
        layer, head = cell

        def write(given: Tensor) -> Tensor:
            given = given.clone()
            given[..., scene.columns(head)] = source[layer][..., scene.columns(head)]
            return given

        with torch.no_grad():
            return scene.under([(*places[layer], write)])

    return value


def attribution_star(scene: Scene, wanted: Sequence[str], size: int) -> CausalStudy:
    """AtP* of every head's queries: the QK fix, and a backward pass for every layer that is dropped."""
    model = model_of(scene)
    layers = scene.n_layers
    cells = [(layer, head) for layer in range(scene.n_layers) for head in range(scene.n_heads)]
    first = {0: (scene.attention(0, scene.eager).q_proj, "out")}
    passes = f"3 forwards + {1 + layers} backwards"

    def ours() -> Tensor:
        return attribution_patch(
            model,
            clean=scene.source,
            corrupt=scene.base,
            metric=scene.metric,
            sites=f"{scene.tower}.blocks.*.attn.hook_q",
            method="atp*",
            progress=False,
        ).values[..., 0]

    def bare() -> None:
        with torch.no_grad():
            scene.module(**scene.source)
            scene.eager(**scene.base)
        with torch.enable_grad():
            logits, here = scene.reading(first, scene.base, scene.eager)
            value = scene.metric(logits).sum()
            for _ in range(1 + layers):
                torch.autograd.grad(value, [here[0]], retain_graph=True)

    if not bool((ours().abs() > 0).any()):
        raise RuntimeError("attribution_star: nothing has an effect.")
    study = CausalStudy(
        "attribution-star",
        f"AtP* of the queries of {len(cells)} heads",
        passes,
        {passes: Arm(bare), OURS: Arm(ours, passes=passes), EXACT: _sampled(_head_values(scene, "q"), cells, size)},
        EXACT,
    )
    _add_peers(study, wanted, transformer_lens=NO_OWN, pyvene=NO_OWN)
    return study


# -- path patching ---------------------------------------------------------------------------------------------------------------------------------


def paths(scene: Scene, wanted: Sequence[str], size: int) -> CausalStudy:
    """The direct paths from one head to the queries of every later head."""
    model, layer = model_of(scene), 3 * scene.n_layers // 4 - 1
    cells = [(later, head) for later in range(layer + 1, scene.n_layers) for head in range(scene.n_heads)]
    with torch.no_grad():
        _, z_source = scene.reading(scene.each_layer("z"), scene.source)
        logits, z_base = scene.reading(scene.each_layer("z"), scene.base)
        _, stream = scene.reading(scene.each_layer("stream"), scene.base)
        clean = scene.metric(logits)

    def ours() -> Tensor:
        found = path_patch(
            model,
            clean=scene.source,
            corrupt=scene.base,
            metric=scene.metric,
            senders=f"{scene.tower} L{layer}H0",
            receivers=f"{scene.tower}.blocks.*.hook_q_input",
            progress=False,
        )
        return found.values[0, :, 0]

    def value_from(sender: int) -> Callable[[tuple[int, int]], Tensor]:
        @functools.cache
        def query(later: int) -> Tensor:
            own = scene.columns(0)
            change = (z_source[sender] - z_base[sender])[..., own] @ scene.output(sender).weight[:, own].T
            return scene.attention(later).q_proj(scene.norm(later)(stream[later] + change))

        def value(cell: tuple[int, int]) -> Tensor:
            later, head = cell
            arrives = query(later)[..., scene.columns(head)]

            def write(given: Tensor) -> Tensor:
                given = given.clone()
                given[..., scene.columns(head)] = arrives
                return given

            with torch.no_grad():
                return scene.under([(scene.attention(later).q_proj, "out", write)])

        return value

    def lens() -> Arm:
        from transformer_lens.patching import get_act_patch_direct_path

        bridge, sender = scene.bridge(), scene.n_layers - 2
        name = f"blocks.{sender}.attn.hook_z"
        caches = [{name: found[sender].unflatten(-1, (scene.n_heads, -1))} for found in (z_source, z_base)]

        def run() -> Tensor:
            with torch.no_grad():
                return get_act_patch_direct_path(
                    bridge,
                    scene.tokens(scene.base),
                    *caches,
                    lambda found: scene.metric(found).sum(),
                    sender,
                    0,
                    "q",
                    verbose=False,
                )

        last = [(scene.n_layers - 1, head) for head in range(scene.n_heads)]
        right = torch.cat([value_from(sender)(cell) for cell in last[:CHECKED]]) - clean
        try:
            found = run()[-1, :CHECKED]
        except (ValueError, NotImplementedError, TypeError, AttributeError, RuntimeError) as error:
            raise CannotError(tools._first_line(error)) from error
        check("paths", LENS, found - clean, right, float(clean.abs().max()))
        return Arm(run, len(last) / len(cells), "1 forward per cell (into the last layer)")

    values, some = value_from(layer), _some(cells)
    right = torch.cat([values(cell) for cell in some]) - clean
    found = ours()
    check("paths", OURS, torch.stack([found[cells.index(cell)] for cell in some]), right, float(clean.abs().max()))
    study = CausalStudy(
        "paths",
        f"direct paths from one head to the queries of {len(cells)} later ones",
        "bare forward",
        {
            "bare forward": Arm(lambda: scene.module(**scene.base), passes="1 forward"),
            OURS: Arm(ours, passes=f"2 forwards + {len(cells)} from the receiver on"),
            EXACT: _sampled(values, cells, size),
        },
        EXACT,
        unavoidable=_forwards(scene, [(later, 0, scene.length, True) for later, _ in cells]),
    )
    _add_peers(study, wanted, transformer_lens=lens, pyvene=NO_OWN)
    return study


def _forwards(scene: Scene, cells: Sequence[tuple[int, int, int, bool]]) -> float:
    """The unavoidable operations of cells ``(layer, first position, end, one head)``, in forwards."""
    whole = of_forward(scene.eager, scene.base)
    return sum(unavoidable(scene.shape.network, *cell) for cell in cells) / whole


# -- a step of distributed alignment search --------------------------------------------------------------------------------------------------------


def das_step(scene: Scene, wanted: Sequence[str], size: int, layer: int) -> CausalStudy:
    """A step of DAS at what enters a layer: interchange in a rotated subspace at all positions, backward to the basis, Adam."""
    from causal_das import Steps

    steps = Steps(scene, model_of(scene), layer, RANK)
    losses = {name: float(steps.loss(name)) for name in (steps.PLAIN, OURS, EXACT)}
    wrong = {name: loss for name, loss in losses.items() if abs(loss - losses[EXACT]) > 1e-3 * abs(losses[EXACT])}
    if wrong:
        raise RuntimeError(f"das-{layer}: the first losses differ: {losses}.")
    study = CausalStudy(
        f"das-{layer}",
        f"a step of DAS at the input of layer {layer} of {scene.n_layers}, {RANK} dimensions, {scene.length} positions",
        steps.PLAIN,
        {
            steps.PLAIN: Arm(steps.step(steps.PLAIN), passes="forward + backward of the blocks behind, rotation"),
            OURS: Arm(steps.step(OURS), passes="forward + backward of the blocks behind, rotation"),
            EXACT: Arm(steps.step(EXACT), passes="1 forward + 1 backward"),
        },
        EXACT,
        aim=1.15 if _has_aims(scene) else None,
    )
    if scene.causal:
        study.arms[f"{OURS}, last position"] = Arm(steps.step(steps.LAST), passes="the same, of the last position")

    def pyvene() -> Arm:
        run = steps.pyvene()
        loss = float(steps.pyvene_loss())
        if abs(loss - losses[EXACT]) > 1e-3 * abs(losses[EXACT]):
            raise RuntimeError(f"das-{layer}, {PYVENE}: a loss of {loss} where {losses[EXACT]} is right.")
        return Arm(run, passes="1 forward + 1 backward")

    _add_peers(study, wanted, transformer_lens=NO_OWN, pyvene=pyvene)
    return study


# -- a causal trace --------------------------------------------------------------------------------------------------------------------------------


def trace(scene: Scene, wanted: Sequence[str], size: int) -> CausalStudy:
    """Noise on the image, one sample of it, and the clean stream put back: every layer × row of patches, or × word behind an image."""
    model, sigma = model_of(scene), 0.5
    behind = scene.text and int((scene.base["input_ids"] == scene.module.config.image_token_id).nonzero()[-1, 1]) + 1  # type: ignore[union-attr]
    if scene.text:
        groups = {str(at): (at, at + 1) for at in range(int(behind), scene.length)}
    else:
        side = round((scene.length - 1) ** 0.5)
        groups = {str(row): (1 + row * side, 1 + (row + 2) * side) for row in range(0, side, 2)}
    cells = [(layer, *group) for layer in range(scene.n_layers) for group in groups.values()]
    image = list(range(1, int(behind) if scene.text else scene.length))
    noisy = cv.edits.add_noise(f"{scene.tower}.hook_input", sigma, seed=0, positions=image)
    entering = f"{scene.tower}.blocks.0.hook_resid_pre"
    with torch.no_grad():
        _, clean = scene.reading(scene.each_layer("stream"), scene.base)
        with model.record([entering]) as held:
            model.run(scene.base, [noisy])
        noise = held[entering] - clean[0]

    def ours() -> Tensor:
        return causal_trace(
            model,
            scene.base,
            scene.metric,
            subject=image,
            sites=f"{scene.tower}.blocks.*.hook_resid_pre",
            axes=("layer", "region"),
            regions={label: list(range(*group)) for label, group in groups.items()},
            noise=1.0,
            sigma=sigma,
            samples=1,
            progress=False,
        ).values[..., 0]

    def corrupt(given: Tensor) -> Tensor:
        return given + noise

    def value(cell: tuple[int, int, int]) -> Tensor:
        layer, first, end = cell

        def restore(given: Tensor) -> Tensor:
            given = given.clone()
            given[:, first:end] = clean[layer][:, first:end]
            return given

        return scene.under([(scene.block(0), "in", corrupt), (scene.block(layer), "in", restore)])

    def lens() -> Arm:
        from pandas import DataFrame
        from transformer_lens.patching import generic_activation_patch

        bridge = scene.bridge([("blocks.0.hook_resid_pre", lambda given, hook: given + noise)])
        cache = {f"blocks.{layer}.hook_resid_pre": value for layer, value in clean.items()}

        def setter(given: Tensor, index: Sequence[int], there: Tensor) -> Tensor:
            given[:, index[1] : index[2]] = there[:, index[1] : index[2]]
            return given

        def some(chosen: Sequence[Any]) -> Tensor:
            return generic_activation_patch(
                bridge,
                scene.tokens(scene.base),
                cache,
                lambda logits: scene.metric(logits).sum(),
                setter,
                "resid_pre",
                index_df=DataFrame(chosen, columns=["layer", "first", "end"]),
            )

        check("trace", LENS, some(asked) - base, right, largest)
        count = min(size, len(cells))
        return Arm(in_turn(some, cells, count), count / len(cells), "1 forward per cell")  # type: ignore[arg-type]

    def pyvene() -> Arm:
        value = _pyvene_trace(scene, noise, clean)
        try:
            found = torch.cat([value(cell) for cell in asked])
        except IndexError as error:
            raise CannotError(
                f"it removes transformers' own hooks, and the bare model then raises {tools._first_line(error)}"
            ) from error
        check("trace", PYVENE, found - base, right, largest)
        return _sampled(value, cells, size)

    asked = _some(cells)
    with torch.no_grad():
        base = scene.under([(scene.block(0), "in", corrupt)])
        right = torch.cat([value(cell) for cell in asked]) - base
    largest = float(base.abs().max())
    found = ours().flatten()
    check("trace", OURS, torch.stack([found[cells.index(cell)] for cell in asked]), right, largest)
    limits = {"faster": 25.0 if scene.text else 1.8, "aim": None if scene.text else 1.25}
    study = CausalStudy(
        "trace",
        f"trace of noise on the image: {scene.n_layers} layers × {len(groups)} {'words' if scene.text else 'bands of two rows of patches'}",
        "bare forward",
        {
            "bare forward": Arm(lambda: scene.module(**scene.base), passes="1 forward"),
            OURS: Arm(ours, passes=f"2 forwards + {len(cells)} from the cell on"),
            EXACT: _sampled(value, cells, size),
        },
        EXACT,
        unavoidable=_forwards(scene, [(layer, first, end, False) for layer, first, end in cells]),
        **(limits if _has_aims(scene) else {}),  # type: ignore[arg-type]
    )
    _add_peers(study, wanted, transformer_lens=lens, pyvene=pyvene)
    return study


def _pyvene_trace(scene: Scene, noise: Tensor, clean: dict[int, Tensor]) -> Callable[[tuple[int, int, int]], Tensor]:
    """pyvene's causal trace: noise added at the first block, the clean stream put back at another; one configured model per layer."""
    pv = _import_pyvene()
    width = noise.shape[-1]

    @functools.cache
    def configured(layer: int, count: int) -> Any:
        added = pv.AdditionIntervention(embed_dim=width)
        back = pv.VanillaIntervention(embed_dim=width)
        return scene.intervenable([(0, added, scene.length), (layer, back, count)])

    def value(cell: tuple[int, int, int]) -> Tensor:
        layer, first, end = cell
        model = configured(layer, end - first)
        where = [[list(range(scene.length))], [list(range(first, end))]]
        given = dict(zip(model.sorted_keys, (noise, clean[layer][:, first:end].clone()), strict=True))
        _, output = model(scene.base, unit_locations={"sources->base": (where, where)}, source_representations=given)
        return scene.metric(output.logits)

    return value


def studies_of(
    scene: Scene, wanted: Sequence[str], chosen: Sequence[str], size: int
) -> dict[str, Callable[[], CausalStudy]]:
    """The studies that were asked for, each made when it is its turn."""
    early, late = scene.n_layers // 4, 3 * scene.n_layers // 4
    made: dict[str, dict[str, Callable[[], CausalStudy]]] = {
        "attribution": {"attribution": lambda: attribution(scene, wanted, size)},
        "attribution-star": {"attribution-star": lambda: attribution_star(scene, wanted, size)},
        "paths": {"paths": lambda: paths(scene, wanted, size)},
        "das": {f"das-{layer}": lambda layer=layer: das_step(scene, wanted, size, layer) for layer in (early, late)},  # type: ignore[misc]
        "trace": {"trace": lambda: trace(scene, wanted, size)},
    }
    return {name: make for kind in chosen for name, make in made[kind].items()}


STUDIES = ("attribution", "attribution-star", "paths", "das", "trace")
