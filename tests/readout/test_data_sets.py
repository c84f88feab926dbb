"""Read-outs over data sets: in batches as all at once, whatever the lengths of prompts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision.data import Pairs, Side
from circuitvision.errors import InputError
from circuitvision.readout.probes.collected import Collected, collect
from tests.zoo import case
from tests.zoo.images import picture

TEXTS = ["<image> what color is the circle ?", "<image> red ?", "<image> is the square red ?", "<image> which shape ?"]
EXACT = {"atol": 1e-12, "rtol": 0.0}


def wrapped(name: str) -> cv.HookedModel:
    one = case(name)
    return cv.HookedModel(one.build().double().eval(), one.processor() if one.processor else None)


def side(family: str, count: int = 5, **changes: Any) -> Side:
    given: dict[str, Any] = {"images": [picture(number) for number in range(count)]}
    if family.startswith(("llava", "pali")):
        given["texts"] = [TEXTS[number % 4] for number in range(count)]
    return Side(**given | {"answers": [number % 2 for number in range(count)]} | changes)


# -- vectors ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sites", "positions"),
    [
        ("vit", "vision.blocks.*.hook_resid_post", None),
        ("llava-clip-llama", ["language.blocks.*.hook_resid_post", "vision.blocks.0.attn.hook_z"], "all"),
        ("llava-clip-llama", "language.blocks.*.attn.hook_z", "last"),
        ("paligemma", "language.blocks.*.mlp.hook_post", "text"),
        ("clip", "vision.blocks.*.hook_resid_post", "patch"),
    ],
)
def test_vectors_do_not_depend_on_the_batch(name: str, sites: Any, positions: Any) -> None:
    model, data = wrapped(name), side(name)
    if name == "clip":
        data = side(name, texts=[("red circle", "a cross"), ("blue",), ("red", "green"), ("red",), ("blue",)])
    whole = collect(model, data, sites, positions=positions, batch_size=5)
    for size in (1, 2):
        parts = collect(model, data, sites, positions=positions, batch_size=size)
        for site in whole:
            torch.testing.assert_close(parts[site], whole[site], **EXACT)
        assert parts.provenance["dataset_sha256"] == data.digest
    halves = Collected.concat([collect(model, part, sites, positions=positions) for part in (data[:2], data[2:])])
    assert halves.examples == whole.examples == list(range(5))
    assert halves.labels == whole.labels == [0, 1, 0, 1, 0]
    for site in whole:
        torch.testing.assert_close(halves[site], whole[site], **EXACT)


def test_vectors_are_those_of_single_runs() -> None:
    model, data = wrapped("llava-clip-llama"), side("llava-clip-llama")
    site = "language.blocks.1.hook_resid_post"
    found = collect(model, data, site, positions="last", batch_size=3)[site]
    for number, example in enumerate(data.examples):
        _, cache = model.run_with_cache(model.inputs(images=[example.image], text=[example.text]), site)
        torch.testing.assert_close(found[number], cache[site][0, -1], **EXACT)


def test_pairs_stand_for_their_clean_side() -> None:
    model, site = wrapped("vit"), "vision.blocks.1.hook_resid_post"
    pairs = Pairs([picture(number) for number in range(3)], corrupt_images=[picture(number + 9) for number in range(3)])
    assert torch.equal(collect(model, pairs, site)[site], collect(model, pairs.clean, site)[site])
    assert not torch.equal(collect(model, pairs, site)[site], collect(model, pairs.corrupt, site)[site])
    with pytest.raises(InputError, match="no example"):
        collect(model, pairs[:0], site)


def test_texts_are_examples_where_the_text_tower_is_read() -> None:
    model = wrapped("clip")
    texts = ["red circle", "a blue square here", "green"]
    data = Side([picture(number) for number in range(3)], texts)
    site = "text.blocks.1.hook_resid_post"
    found = collect(model, data, [site], positions="last", batch_size=2)
    for number, text in enumerate(texts):
        _, cache = model.run_with_cache(model.inputs(images=[picture(0)], text=[text]), site)
        torch.testing.assert_close(found[site][number], cache[site][0, -1], **EXACT)
    both = collect(model, data, [site, "vision.blocks.0.hook_resid_post"], positions={"text": "last", "vision": "cls"})
    torch.testing.assert_close(both[site], found[site], **EXACT)
    with pytest.raises(InputError, match="one text"):
        collect(model, Side([picture(0)], [("red", "blue")]), site)


# -- labels per position -----------------------------------------------------------------------------------------------------------------------


def test_every_position_has_its_label_and_its_example(tmp_path: Path) -> None:
    model, data = wrapped("llava-clip-llama"), side("llava-clip-llama", groups=[7, 7, 8, 8, 9])
    site = "language.blocks.0.hook_resid_post"

    def kinds(tokens: Any, batch: Any) -> np.ndarray:
        assert batch.data.groups == [data.groups[number] for number in batch.examples]
        return np.where(tokens.kind == "text", tokens.text, None)

    whole = collect(model, data, site, positions="all", labels=kinds, per_position=True, batch_size=5)
    parts = collect(model, data, site, positions="all", labels=kinds, per_position=True, batch_size=2)
    torch.testing.assert_close(parts[site], whole[site], **EXACT)
    for name in ("examples", "labels", "groups", "at"):
        assert getattr(parts, name) == getattr(whole, name)
    batches = list(data.batches(model, 1))
    wanted = [
        (number, piece, position)
        for number, batch in enumerate(batches)
        for position, piece in enumerate(model.tokens(batch.inputs)["language"].text[0])
        if model.tokens(batch.inputs)["language"].kind[0, position] == "text"
    ]
    assert [
        (number, piece, at[1]) for number, piece, at in zip(whole.examples, whole.labels, whole.at, strict=True)
    ] == wanted
    assert whole.groups == [data.groups[number] for number in whole.examples]  # type: ignore[index]
    _, cache = model.run_with_cache(batches[3].inputs, site)
    for vector, number, (row, position) in zip(whole[site], whole.examples, whole.at, strict=True):
        assert row == 0
        if number == 3:
            torch.testing.assert_close(vector, cache[site][0, position], **EXACT)
    back = Collected.load(whole.save(tmp_path / "vectors.safetensors"))
    assert (back.examples, back.labels, back.groups, back.at) == (whole.examples, whole.labels, whole.groups, whole.at)


def test_labels_in_lists_are_those_of_the_chosen_positions() -> None:
    model, data = wrapped("vit"), side("vit", 3)
    site = "vision.blocks.0.hook_resid_post"
    patches = model.tokens(next(data.batches(model)).inputs)["vision"].positions("patch")
    labels = [[number * 100 + at if at % 2 else None for at in range(len(patches))] for number in range(3)]
    found = collect(model, data, site, positions="patch", labels=labels, per_position=True, batch_size=2)
    assert found.labels == [label for own in labels for label in own if label is not None]
    assert [
        patches.index(position) + 100 * number for number, (_, position) in zip(found.examples, found.at, strict=True)
    ] == found.labels
    with pytest.raises(InputError, match="labels"):
        collect(model, data, site, positions="patch", labels=[[1, 2]] * 3, per_position=True)
    with pytest.raises(InputError, match="per_position"):
        collect(model, data, site, labels=lambda tokens, batch: tokens.kind)
    with pytest.raises(InputError, match="labels"):
        collect(model, data, site, labels=[1, 2])
    same = collect(model, data, site, positions="patch", labels=["a", "b", "c"], per_position=True)
    assert same.labels == [letter for letter in "abc" for _ in patches]
    sites = ["vision.blocks.0.hook_resid_post", "vision.hook_embed"]
    with pytest.raises(InputError, match=r"apart|lacks"):
        collect(model, data, sites, positions="all", per_position=True)


def test_a_probe_of_positions_keeps_examples_on_one_side() -> None:
    model = cv.organisms.load("shapes-vit")
    pairs = cv.data.largest_pairs(30, seed=0)
    site = "vision.blocks.1.hook_resid_post"

    def inside(tokens: Any, batch: Any) -> np.ndarray:
        left, top, right, bottom = np.array(batch.data.boxes).T[:, :, None]
        box = np.moveaxis(tokens.box, -1, 0)
        found = (box[0] < right) & (box[2] > left) & (box[1] < bottom) & (box[3] > top)
        return np.where(tokens.kind == "patch", found, None)

    found = collect(model, pairs, site, positions="patch", labels=inside, per_position=True, batch_size=8)
    result = cv.readout.linear_probe(model, found, found.labels, groups=found.groups, shuffles=2, penalty=1.0)
    assert float(result.values[0]) > 0.9
    held = {found.examples[index] for index in result.held_out.tolist()}
    kept = {found.examples[index] for index in set(range(len(found.examples))) - set(result.held_out.tolist())}
    assert held
    assert not held & kept


# -- means -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "site", "average"),
    [
        ("vit", "vision.blocks.*.attn.hook_z", "position"),
        ("vit", "vision.blocks.1.hook_mlp_out", "kind"),
        ("llava-clip-llama", "language.blocks.*.attn.hook_z", "text"),
        ("llava-clip-llama", "language.blocks.1.hook_attn_out", "kind"),
        ("llava-clip-llama", "language.blocks.1.hook_attn_out", "position"),
        ("clip", "vision.blocks.0.hook_resid_post", "all"),
    ],
)
def test_means_over_a_data_set_are_those_of_all_its_inputs(
    name: str, site: str, average: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from circuitvision import edits
    from circuitvision.data import batches

    model, texts = wrapped(name), {"clip": [("red", "a cross")] * 5}.get(name)
    data = side(name, **({"texts": texts} if texts else {}))
    if average == "position" and name.startswith("llava"):
        data = side(name, texts=TEXTS[0])
    inputs = [batch.inputs for batch in data.batches(model, 1)]
    run = inputs[0]
    wanted = model.run(run, edits.ablate(site, "mean", dataset=inputs, average=average))
    assert not torch.allclose(wanted, model(run))
    for budget in (2**29, 1):
        monkeypatch.setattr(batches, "BUDGET", budget)
        fresh = wrapped(name)
        found = fresh.run(run, edits.ablate(site, "mean", dataset=data, average=average))
        torch.testing.assert_close(found, wanted, **EXACT)


def test_a_data_set_is_run_once_for_its_means_and_again_after_the_weights_change() -> None:
    from circuitvision import edits

    model, data = wrapped("vit"), side("vit")
    run = next(iter(data.batches(model, 2))).inputs
    seen = []
    model.module.register_forward_pre_hook(lambda module, args, kwargs: seen.append(1), with_kwargs=True)
    group = [edits.ablate("vision.blocks.0.attn.hook_z", "mean", dataset=data, heads=head) for head in range(2)]
    model.run(run, group)
    assert len(seen) == 2
    model.run(run, group)
    assert len(seen) == 3
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    first = model.run(run, group)
    assert len(seen) == 5
    fresh = wrapped("vit")
    fresh.module.load_state_dict(model.module.state_dict())
    torch.testing.assert_close(fresh.run(run, group), first, **EXACT)


def test_a_mean_per_position_over_prompts_that_do_not_line_up_is_refused() -> None:
    from circuitvision import edits

    model = wrapped("llava-clip-llama")
    data = side("llava-clip-llama", texts=["<image> red", "red <image>", "<image> red", "<image> red", "<image> red"])
    run = next(iter(data.batches(model, 1))).inputs
    site = "language.blocks.0.hook_resid_post"
    with pytest.raises(InputError, match="line up"):
        model.run(run, edits.ablate(site, "mean", dataset=data))
    model.run(run, edits.ablate(site, "mean", dataset=data, average="kind"))
    with pytest.raises(InputError, match="no example"):
        edits.ablate(site, "mean", dataset=data[:0])


def test_an_edit_with_a_data_set_is_saved_by_its_name(tmp_path: Path) -> None:
    from circuitvision import edits

    model, data = wrapped("vit"), side("vit", name="reference")
    run = next(iter(data.batches(model, 2))).inputs
    edit = edits.ablate("vision.blocks.0.attn.hook_z", "mean", dataset=data)
    path = edits.save(tmp_path / "edits.yaml", [edit])
    (back,) = edits.load(path, objects={"reference": data})
    assert torch.equal(model.run(run, back), model.run(run, edit))
    with pytest.raises(InputError, match="reference"):
        edits.load(path)


def test_a_check_of_heads_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from circuitvision.circuits import ablation_check
    from circuitvision.data import batches

    found = []
    for budget, size in ((2**29, 6), (1, 4), (1, 1)):
        monkeypatch.setattr(batches, "BUDGET", budget)
        model = cv.HookedModel(
            cv.organisms.load("shapes-llava").module.double(), cv.organisms.load("shapes-llava").processor
        )
        pairs = cv.data.question_pairs(6, seed=2)
        found.append(ablation_check(model, pairs, ["language.L1H0", "vision.L0H1"], n_random=2, batch_size=size))
    for check in found[1:]:
        torch.testing.assert_close(check.values, found[0].values, **EXACT)
        torch.testing.assert_close(check.logit_diff, found[0].logit_diff, **EXACT)
    assert found[0].n_pairs == 6
    assert float(found[0].logit_diff[0].mean()) > 1
    with pytest.raises(InputError, match="foils"):
        ablation_check(model, Pairs.from_sides(pairs.clean._with(foils=None), pairs.corrupt), ["vision.L0H1"])


# -- lens and attribution --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tower", "positions", "targets"),
    [
        ("vit", "vision", None, None),
        ("llava-clip-llama", "language", None, None),
        ("llava-clip-llama", "language", "text", {"red": "red", "blue": "blue"}),
        ("llava-clip-llama", "vision", "patch", {"answer": [3, 4, 5, 6, 7]}),
        ("llava-next-mistral", "vision", "patch", {3: 3, 4: 4}),
    ],
)
def test_a_lens_over_a_data_set_is_that_of_single_runs(name: str, tower: str, positions: Any, targets: Any) -> None:
    model, data = wrapped(name), side(name, foils=[5] * 5, groups=list("aabbc"))
    if name == "vit":
        data = data._with(foils=(1,) * 5)
    found = cv.readout.logit_lens(model, data, tower, targets=targets, positions=positions, batch_size=2)
    whole = cv.readout.logit_lens(model, data, tower, targets=targets, positions=positions, batch_size=5)
    torch.testing.assert_close(found.values, whole.values, **EXACT)
    assert found.axes["example"] == list(range(5))
    assert found.groups == list("aabbc")
    for number, batch in enumerate(data.batches(model, 1)):
        own = targets
        if targets is None:
            own = {"answer": batch.answers, "foil": batch.foils}
        elif "answer" in targets:
            own = {"answer": targets["answer"][number : number + 1]}
        lens = cv.readout.logit_lens(model, batch.inputs, tower, targets=own)
        tokens = model.tokens(batch.inputs)[tower]
        first = lens.axes["position"][0]
        kept = [
            [at - first for at in tokens.positions(positions or ("cls" if name == "vit" else "text"), row=row)]
            for row in range(tokens.n_rows)
        ]
        kept = [own[-1:] if positions is None else own for own in kept]
        rows = lens.values.double().movedim(-1, 0)
        wanted = torch.stack([rows[row][:, at].mean(1) for row, at in enumerate(kept)]).mean(0)
        torch.testing.assert_close(found.values[..., number], wanted, **EXACT)


def test_shares_over_a_data_set_are_those_of_single_runs() -> None:
    model = wrapped("llava-clip-llama")
    data = side("llava-clip-llama", answers=[3, 4, 5, 6, 7], foils=[8] * 5)
    found = cv.readout.direct_attribution(model, data, batch_size=2)
    whole = cv.readout.direct_attribution(model, data, batch_size=5)
    said = cv.readout.direct_attribution(model, data, ([3, 4, 5, 6, 7], 8), batch_size=3)
    for other in (whole, said):
        torch.testing.assert_close(found.values, other.values, **EXACT)
    for number, batch in enumerate(data.batches(model, 1)):
        one = cv.readout.direct_attribution(model, batch.inputs, (number + 3, 8))
        torch.testing.assert_close(found.values[..., number], one.values[..., 0].double(), **EXACT)
    part = cv.readout.direct_attribution(model, data[2:4])
    assert part.axes["example"] == [2, 3]
    torch.testing.assert_close(part.values, found.values[..., 2:4], **EXACT)
    assert found.provenance["dataset_sha256"] == data.digest


WORDS = ["circle", "red", None, "shape", "circle"]
"""A word of each prompt's own; the third example has none."""


def at_words(data: Side) -> tuple[cv.HookedModel, torch.Tensor, list[int | None]]:
    """The logits of every example at its own word, from runs of the bare module on single examples."""
    model, rows, places = wrapped("llava-clip-llama"), [], []
    for example, word in zip(data.examples, WORDS, strict=True):
        inputs = model.inputs(images=[example.image], text=[example.text])
        with torch.no_grad():
            logits = model.module(**inputs).logits[0]
        if word is None:
            places.append(None)
            rows.append(torch.full_like(logits[0], torch.nan))
            continue
        places.append(inputs["input_ids"][0].tolist().index(model.token(word)))
        rows.append(logits[places[-1]])
    return model, torch.stack(rows), places


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.filterwarnings("ignore")
def test_positions_per_example_are_those_of_the_data_set(batch_size: int) -> None:
    data = side(
        "llava-clip-llama", texts=[TEXTS[n % 4] for n in range(5)], answers=[5, 6, 7, 8, 9], foils=[10, 11, 12, 13, 14]
    )
    model, logits, places = at_words(data)
    rows = torch.arange(5)
    wanted = logits[rows, torch.tensor(data.answers)] - logits[rows, torch.tensor(data.foils)]
    still = cv.edits.scale("language.blocks.0.hook_mlp_out", 1.0)
    for position in (cv.regions.at(places), cv.regions.words(WORDS)):
        swept = model.sweep(
            data, [still], cv.metrics.logit_diff(position=position), example_batch=batch_size, progress=False
        )
        shares = cv.readout.direct_attribution(model, data, tower="language", position=position, batch_size=batch_size)
        read = cv.metrics.logit_diff(list(data.answers), list(data.foils), position=position)
        of_metric = cv.readout.direct_attribution(model, data, read, tower="language", batch_size=batch_size)
        for found in (swept.values[0], shares.values.sum(0), of_metric.values.sum(0)):
            torch.testing.assert_close(found.double(), wanted, equal_nan=True, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_list_is_one_answer_per_example_in_batches_of_two(batch_size: int) -> None:
    model, data = wrapped("vit"), side("vit", 4, answers=[0, 1, 2, 3])
    with torch.no_grad():
        wanted = model(model.inputs(images=[one.image for one in data.examples]))[range(4), range(4)]
    for direction in (None, [0, 1, 2, 3], {"answer": [0, 1, 2, 3]}, {"answer": torch.arange(4)}):
        found = cv.readout.direct_attribution(model, data, direction, batch_size=batch_size)
        torch.testing.assert_close(found.values.sum(0), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="two ways"):
        cv.readout.direct_attribution(model, data[:2], [0, 1], batch_size=1)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_several_choices_of_positions_by_name_over_a_data_set(batch_size: int) -> None:
    model, data = wrapped("llava-clip-llama"), side("llava-clip-llama")
    region = cv.regions.box([(0, 0, 5, 5), None, (3, 3, 20, 20), (0, 0, 2, 2), (4, 4, 6, 6)], size=(64, 64))
    several = {"object": region, "rest": cv.regions.others(region), "words": "text"}
    site, targets = "language.blocks.*.hook_resid_post", [5, 6, 7, 8, 9]
    with pytest.warns(UserWarning, match="object in 1, rest in 1"):
        whole = cv.readout.logit_lens(
            model, data, sites=site, targets=targets, positions=several, batch_size=batch_size
        )
    assert whole.axes["position"] == list(several)
    assert list(whole.axes) == ["layer", "position", "target", "example"]
    for number, name in enumerate(several):
        alone = cv.readout.logit_lens(model, data, sites=site, targets=targets, positions=several[name], batch_size=5)
        torch.testing.assert_close(whole.values[:, number], alone.values, equal_nan=True, **EXACT)


def test_examples_without_an_answer_are_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llava-clip-llama")
    data = side("llava-clip-llama", answers=[5, None, 7, 8, None], foils=[9] * 5)
    pairs = Pairs.from_sides(data, data)
    still = [cv.edits.scale("language.blocks.0.hook_mlp_out", 1.0)]
    monkeypatch.setattr(type(model), "run_with_cache", lambda *args, **named: pytest.fail("it ran"))
    for call in (
        lambda: model.sweep(data, still, "logit_diff", progress=False),
        lambda: model.sweep(data, still, {"prob": "prob", "first": lambda logits: logits[:, -1, 0]}, progress=False),
        lambda: cv.patching.activation_patch(
            model, pairs, "prob", sites="language.blocks.*.attn.hook_z", progress=False
        ),
        lambda: cv.circuits.head_importance(model, pairs, "logit_diff", progress=False),
        lambda: cv.circuits.ablation_check(model, pairs, "language L1H0"),
        lambda: cv.readout.logit_lens(model, data),
        lambda: cv.readout.direct_attribution(model, data),
    ):
        with pytest.raises(InputError, match="2 of 5 examples have no answer"):
            call()
    monkeypatch.undo()
    assert model.sweep(data, still, cv.metrics.prob(5), progress=False).values.isfinite().all()
    assert len(pairs.answered(model)) == 0
    with pytest.raises(InputError, match="None"):
        model.sweep(data, still, cv.metrics.prob([5, None, 7, 8, 9]), progress=False)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("combine", ["mean", "joint"])
def test_a_check_of_heads_with_answers_of_several_tokens(combine: str, batch_size: int) -> None:
    """Right with any of the tokens; the margin is what the tokens become together."""
    model = wrapped("vit")
    images = [picture(number) for number in range(8)]
    with torch.no_grad():
        logits = model(model.inputs(images=images))
    top = logits.argmax(-1).tolist()
    other = [(number + 1) % logits.shape[1] for number in top]
    third = [(number + 2) % logits.shape[1] for number in top]
    answers: list[Any] = [[third[0], top[0]], top[1], [third[2], other[2]], [top[3], third[3]]]
    foils: list[Any] = [[top[4], third[4]], top[5], top[6], [third[7], other[7]]]
    pairs = Pairs(images[:4], corrupt_images=images[4:], answers=answers, foils=foils, combine=combine)
    found = cv.circuits.ablation_check(model, pairs, "vision L0H0", n_random=1, batch_size=batch_size)
    assert found.values[0].tolist() == [1.0, 1.0, 0.0, 0.0]
    scores = logits.log_softmax(-1) if combine == "joint" else logits

    def value(row: int, ids: Any) -> torch.Tensor:
        own = scores[row, ids if isinstance(ids, list) else [ids]]
        return own.sum() if combine == "joint" else own.mean()

    both = [
        (value(n, answers[n]) - value(n, foils[n]), value(n + 4, foils[n]) - value(n + 4, answers[n])) for n in range(4)
    ]
    torch.testing.assert_close(
        found.logit_diff[0], torch.stack([torch.stack(one).mean() for one in both]), atol=1e-6, rtol=1e-6
    )


@pytest.mark.filterwarnings("ignore")
def test_a_divergence_at_positions_per_example_in_batches() -> None:
    data = side("llava-clip-llama", texts=[TEXTS[n % 4] for n in range(5)])
    model, logits, places = at_words(data)
    halved = [cv.edits.scale("language.blocks.1.hook_mlp_out", 0.5)]
    metric = cv.metrics.kl(position=cv.regions.at(places))
    found = [model.sweep(data, halved, metric, example_batch=size, progress=False).values[0] for size in (1, 2, 5)]
    for other in found[:2]:
        torch.testing.assert_close(other, found[2], equal_nan=True, atol=1e-6, rtol=1e-5)
    assert found[2].isnan().tolist() == logits.isnan().all(-1).tolist()


def test_positions_of_another_number_of_examples_are_refused() -> None:
    model, data = wrapped("llava-clip-llama"), side("llava-clip-llama", foils=[1] * 5, answers=[0] * 5)
    seven = cv.regions.at([2] * 7)
    still = [cv.edits.scale("language.blocks.0.hook_mlp_out", 1.0)]
    for call in (
        lambda: cv.readout.logit_lens(model, data, targets=[5], positions=seven),
        lambda: cv.readout.direct_attribution(model, data, position=seven),
        lambda: collect(model, data, "language.hook_input", positions=seven),
        lambda: model.sweep(data, still, cv.metrics.logit_diff(position=seven), progress=False),
    ):
        with pytest.raises(InputError, match="7 examples for 5"):
            call()


def test_a_data_set_without_answers_wants_targets() -> None:
    model, data = wrapped("vit"), side("vit", answers=None)
    for read in (cv.readout.logit_lens, cv.readout.direct_attribution):
        with pytest.raises(InputError, match="answers"):
            read(model, data)
    with pytest.raises(InputError, match="top_k"):
        cv.readout.logit_lens(model, data, top_k=2)
    with pytest.raises(InputError, match="explained"):
        cv.readout.direct_attribution(model, next(iter(data.batches(model))).inputs)


def test_activations_of_a_data_set_are_not_kept() -> None:
    import weakref

    model, alive, most = wrapped("vit"), [], []

    def count(value: torch.Tensor, hook: Any) -> None:
        alive.append(weakref.ref(value))
        most.append(sum(one() is not None for one in alive))

    peaks = []
    with model.hooks([("vision.hook_input", count)]):
        for number in (6, 30):
            alive.clear()
            most.clear()
            cv.readout.direct_attribution(model, side("vit", number), 0, batch_size=2)
            collect(model, side("vit", number), "vision.blocks.*.hook_resid_post", batch_size=2)
            peaks.append(max(most))
    assert peaks[0] == peaks[1]


# -- draws -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "site", "positions"),
    [
        ("vit", "vision.blocks.0.attn.hook_z", None),
        ("llava-clip-llama", "language.blocks.1.hook_resid_post", "last"),
        ("llava-clip-llama", "language.blocks.0.attn.hook_v", lambda tokens: tokens.select("patch")),
        ("llava-clip-llama", "vision.blocks.0.hook_mlp_out", None),
    ],
)
def test_draws_from_a_data_set_do_not_depend_on_the_batch(name: str, site: str, positions: Any) -> None:
    from circuitvision import edits

    model, data = wrapped(name), side(name, 8)

    def drawn(batch: Any, seed: int) -> torch.Tensor:
        where = positions(model.tokens(batch.inputs)["language"]) if callable(positions) else positions
        edit = edits.ablate(site, "resample", dataset=data, seed=seed, positions=where)
        logits = model.run(batch.inputs, edit)
        return cv.metrics.at_position(logits, "last", batch.inputs)

    whole = next(drawn(batch, 3) for batch in data[:4].batches(model, 4))
    parts = torch.cat([drawn(batch, 3) for batch in data[:4].batches(model, 1)])
    torch.testing.assert_close(parts, whole, **EXACT)
    (batch,) = data[:4].batches(model, 4)
    assert not torch.allclose(drawn(batch, 4), whole)
    clean = cv.metrics.at_position(model(batch.inputs), "last", batch.inputs)
    assert bool(((whole - clean).abs().amax(1) > 1e-6).all())


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-next-llama", "llava-onevision"])
def test_no_example_of_several_images_is_its_own_donor(name: str) -> None:
    """Images of an example stand elsewhere in every batch, and tiles are filled up to the most that an image of the batch has."""
    from circuitvision import edits

    sizes = [(40, 40), (90, 30), (25, 60), (40, 40), (64, 20), (30, 30), (50, 52), (40, 40), (33, 70)]
    pictures = [picture(number).resize(size) for number, size in enumerate(sizes)]
    images = [pictures[:2], pictures[2:3], pictures[3:6], pictures[6:7], pictures[7:]]
    texts = ["<image> " * len(own) + "what color ?" for own in images]
    model, data = wrapped(name), Side(images=images, texts=texts)
    draw = [
        edits.ablate("language.blocks.0.hook_resid_post", "resample", dataset=data, seed=seed, positions="last")
        for seed in range(6)
    ]
    found = [
        model.sweep(data, draw, cv.metrics.logprob(7), example_batch=size, progress=False).values for size in (1, 2, 5)
    ]
    for other in found[:2]:
        torch.testing.assert_close(other, found[2], atol=1e-5, rtol=1e-5)
    clean = model.sweep(data, [edits.scale("language.hook_input", 1.0)], cv.metrics.logprob(7), progress=False).values
    assert float((found[2] - clean).abs().min()) > 1e-7


def test_a_drawn_value_is_that_of_an_example_of_the_data_set() -> None:
    from circuitvision import edits

    model, data = wrapped("vit"), side("vit", 4)
    site = "vision.blocks.0.hook_resid_post"
    inputs = next(iter(data.batches(model, 4))).inputs
    _, clean = model.run_with_cache(inputs, site)
    seen = {}
    with model.hooks([("vision.blocks.1.hook_resid_pre", lambda value, hook: seen.setdefault("value", value.clone()))]):
        model.run(inputs, edits.ablate(site, "resample", dataset=data))
    for number in range(4):
        same = [torch.allclose(seen["value"][number], clean[site][other], atol=1e-12) for other in range(4)]
        assert sum(same) == 1
        assert not same[number]
    with pytest.raises(InputError, match="larger"):
        model.run(inputs, edits.ablate(site, "resample", dataset=data[:1]))
    with pytest.raises(InputError, match="raw"):
        edits.ablate(site, "resample", dataset=[inputs])


# -- lists ---------------------------------------------------------------------------------------------------------------------------------


def test_a_list_that_fits_a_batch_by_accident_is_refused() -> None:
    model, data = wrapped("vit"), side("vit", answers=[1, 2, 3, 1, 2])
    with pytest.raises(InputError, match="2 for 5 examples"):
        cv.readout.logit_lens(model, data, targets=[1, 2], batch_size=2)
    with pytest.raises(InputError, match="2 for 5 examples"):
        cv.readout.direct_attribution(model, data, [1, 2], batch_size=2)
    for read, option in ((cv.readout.logit_lens, "targets"), (cv.readout.direct_attribution, "direction")):
        own = read(model, data, batch_size=2)
        given = read(model, data, batch_size=2, **{option: [1, 2, 3, 1, 2]})
        torch.testing.assert_close(given.values, own.values, **EXACT)


def said_of(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if "every example" in str(one.message)]


def test_numbers_that_may_be_one_per_example_are_announced_once() -> None:
    model, data = wrapped("llava-clip-llama"), side("llava-clip-llama", answers=[3, 4, 5, 6, 7])
    site = "language.blocks.0.hook_resid_post"
    reads = {
        "collect": lambda at: collect(model, data, site, positions=at, batch_size=2),
        "by tower": lambda at: collect(model, data, site, positions={"language": at}, batch_size=2),
        "probe": lambda at: cv.readout.linear_probe(
            model, data, [0, 1, 0, 1, 1], sites=site, positions=at, test_share=0.4, shuffles=0, penalty=1.0
        ),
        "examples": lambda at: cv.readout.max_activating_examples(model, data, site, positions=at, units=[0]),
        "shares": lambda at: cv.readout.direct_attribution(model, data, position=at, batch_size=2),
    }
    for name, read in reads.items():
        (message,) = said_of(lambda read=read: read([1, 2, 3, 4, 5]))
        assert all(spelling in message for spelling in ("{1, 2, 3, 4, 5}", "cv.regions.at([1, 2, 3, 4, 5])")), name
        for at in ({1, 2, 3, 4, 5}, cv.regions.at([1, 2, 3, 4, 5]), range(1, 6), [3] * 5, [1, 2], 3):
            assert not said_of(lambda read=read, at=at: read(at)), (name, at)
    listed, shared = (collect(model, data, site, positions=at) for at in ([1, 2, 3, 4, 5], {5, 4, 3, 2, 1}))
    assert torch.equal(listed[site], shared[site])
    assert listed.positions == shared.positions
    each = collect(model, data, site, positions=cv.regions.at([1, 2, 3, 4, 5]))
    for number in range(5):
        one = collect(model, data[number : number + 1], site, positions=number + 1)
        torch.testing.assert_close(each[site][number], one[site][0], **EXACT)


def test_a_run_announces_numbers_that_may_be_one_per_row() -> None:
    model, data = wrapped("llava-clip-llama"), side("llava-clip-llama")
    inputs = next(iter(data[:2].batches(model, 2))).inputs
    assert len(said_of(lambda: cv.readout.direct_attribution(model, inputs, (3, 4), position=[5, 6]))) == 1
    assert not said_of(lambda: cv.readout.direct_attribution(model, inputs, (3, 4), position={5, 6}))


def test_shares_at_a_position_of_each_example_do_not_depend_on_the_batch() -> None:
    model, data = wrapped("llava-clip-llama"), side("llava-clip-llama")
    at = [8, 9, 10, 9, 8]
    found = cv.readout.direct_attribution(model, data, (3, 4), position=cv.regions.at(at), batch_size=2)
    for number, position in enumerate(at):
        one = cv.readout.direct_attribution(model, data[number : number + 1], (3, 4), position=position)
        torch.testing.assert_close(found.values[..., number], one.values[..., 0], **EXACT)


def test_contrasts_of_each_example_do_not_depend_on_the_batch() -> None:
    model, data = wrapped("vit"), side("vit")
    pairs = [(1, 2), (0, 3), (2, 1), (3, 4), (0, 1)]
    for read, option in ((cv.readout.logit_lens, "targets"), (cv.readout.direct_attribution, "direction")):
        found = read(model, data, batch_size=2, **{option: pairs})
        for number, pair in enumerate(pairs):
            one = read(model, data[number : number + 1], **{option: pair})
            torch.testing.assert_close(found.values[..., number], one.values[..., 0], **EXACT)


# -- figures ---------------------------------------------------------------------------------------------------------------------------------


def test_a_reading_of_a_data_set_is_drawn_with_its_means_and_intervals() -> None:
    model, data = wrapped("llava-clip-llama"), side("llava-clip-llama", foils=[5] * 5)
    lens = cv.readout.logit_lens(model, data, "language", positions={"image": "patch", "end": "last"})
    mean, (low, high) = lens.mean(), lens.interval()
    lines = [trace for trace in lens.plot().data if trace.name == "foil"]
    assert len(lines) == 2
    for place, trace in enumerate(lines):
        np.testing.assert_allclose(trace.y, mean[:, place, 1])
        np.testing.assert_allclose(trace.error_y.array, (high - mean)[:, place, 1].clamp(min=0))
        np.testing.assert_allclose(trace.error_y.arrayminus, (mean - low)[:, place, 1].clamp(min=0))
    terms = cv.readout.direct_attribution(model, data)
    drawn = [value for trace in terms.plot(count=3).data for value in trace.x]
    assert drawn == pytest.approx(sorted(terms.mean().tolist(), key=abs, reverse=True)[:3])


def test_a_term_is_affirmed_only_where_its_interval_leaves_zero_out() -> None:
    def title(values: list[list[float]]) -> str:
        axes: dict[str, list[Any]] = {"term": ["a", "b"], "example": list(range(8))}
        reading = cv.DataReading(torch.tensor(values, dtype=torch.float64), axes, {}, tower="t", measure="m")
        return reading.plot().layout.title.text

    small = [0.1, -0.1] * 4
    assert title([[3.0, 3.1, 2.9, 3.2, 3.0, 3.1, 2.8, 3.0], small]).startswith("a adds most")
    assert title([small, [-3.0, -3.1, -2.9, -3.2, -3.0, -3.1, -2.8, -3.0]]).startswith("b takes most")
    assert title([[-9.0, 9.0] * 4, small]).startswith("No term")
