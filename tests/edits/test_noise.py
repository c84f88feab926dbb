"""Gaussian noise as an edit: the same for an example in every batch, of the asked size, nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from tests.zoo import case, shared_model


@pytest.mark.parametrize(
    ("name", "tower"),
    [("llava-clip-llama", "language"), ("vit", "vision"), ("paligemma", "language"), ("pi0", "language")],
)
def test_noise_is_that_of_the_example_in_every_batch(name: str, tower: str) -> None:
    model = cv.HookedModel(shared_model(name))
    inputs = case(name).inputs(model.module, batch=3)
    edit = edits.add_noise(f"{tower}.hook_input", 0.5)
    whole = model.run(inputs, [edit])
    assert not torch.allclose(whole, model(inputs))
    assert torch.equal(whole, model.run(inputs, [edit]))
    assert not torch.allclose(whole, model.run(inputs, [edits.add_noise(f"{tower}.hook_input", 0.5, seed=1)]))
    order = [2, 0]
    part = {k: v[order] if torch.is_tensor(v) and v.ndim and len(v) == 3 else v for k, v in inputs.items()}
    assert torch.allclose(model.run(part, [edit]), whole[order], atol=1e-4)


def test_sizes_and_positions_by_hand() -> None:
    model = cv.HookedModel(shared_model("vit"))
    inputs = case("vit").inputs(model.module, batch=4)
    site = "vision.hook_input"
    clean = model.run_with_cache(inputs, names_filter=[site])[1][site]
    seen: list[torch.Tensor] = []

    def watch(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        seen.append(tensor.detach().clone())
        return tensor

    group = [edits.add_noise(site, 0.25, positions=[1, 2]), edits.apply(site, watch)]
    model.run(inputs, group)
    added = seen[0] - clean
    assert not added[:, [0, *range(3, added.shape[1])]].any()
    assert float(added[:, 1:3].std()) == pytest.approx(0.25, rel=0.2)
    assert len({float(one) for one in added[:, 1:3].flatten()}) == added[:, 1:3].numel()
    model.run(inputs, [edits.add_noise(site, 0.5, positions=[2]), edits.apply(site, watch)])
    # Twice the scale is twice the noise of the same draw.
    assert torch.allclose(seen[1][:, 2] - clean[:, 2], 2 * added[:, 2], atol=1e-6)


def test_filling_up_prompts_on_either_side_changes_nothing() -> None:
    model = cv.organisms.load("shapes-llava")
    pairs = cv.data.question_pairs(3, seed=1)
    edit = edits.add_noise("language.hook_embed", 3.0, positions="text")
    (batch,) = pairs.batches(model, 3)
    plain = model.run(batch.inputs, [edit])
    inputs = {**batch.inputs}
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.cat([torch.zeros_like(inputs[name][:, :2]), inputs[name]], 1)
    padded = model.run(inputs, [edit])
    there = batch.inputs["attention_mask"].bool()
    assert torch.allclose(padded[:, 2:][there], plain[there], atol=1e-3)


def test_a_sweep_over_a_data_set_gives_what_single_runs_give() -> None:
    model = cv.organisms.load("shapes-llava")
    pairs = cv.data.question_pairs(5, seed=3)
    noise = edits.add_noise("language.hook_embed", 10 * cv.data.embedding_std(model, pairs), positions="text")
    restored = edits.replace("language.blocks.0.hook_resid_post", pairs.clean)
    swept = model.sweep(pairs, [[], [noise], [noise, restored]], "logit_diff", example_batch=2, progress=False)
    for row in range(5):
        (batch,) = pairs[row].batches(model, 1)
        logits = model.run(batch.inputs, [noise])[0, -1]
        assert batch.answers is not None
        assert batch.foils is not None
        expected = logits[batch.answers[0]] - logits[batch.foils[0]]
        assert float(swept.values[1, row]) == pytest.approx(float(expected), abs=1e-3)
    assert (swept.values[1] - swept.values[0]).abs().mean() > 1
    # A stream restored after the first block is the clean run.
    assert torch.allclose(swept.values[2], swept.values[0], atol=1e-3)


def test_it_is_a_value_and_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    edit = edits.add_noise("vision.hook_input", 0.5, seed=3, positions=[1])
    assert edit == edits.add_noise("vision.hook_input", 0.5, seed=3, positions=[1])
    assert edit != edits.add_noise("vision.hook_input", 0.5, seed=4, positions=[1])
    assert edits.load(edits.save(tmp_path / "edits.yaml", [edit])) == [edit]
    model = cv.HookedModel(shared_model("vit"))
    inputs = case("vit").inputs(model.module, batch=2)
    assert torch.equal(model.run(inputs, [edits.add_noise("vision.hook_input", 0.0)]), model(inputs))
    for site in ("vision.blocks.0.attn.hook_z", "vision.hook_readout", "vision.blocks.0.attn.hook_pattern"):
        with pytest.raises(InputError):
            model.run(inputs, [edits.add_noise(site, 1.0)])
    for scale, seed in ((-1.0, 0), (float("nan"), 0), (True, 0), (1.0, -1), (1.0, 0.5)):
        with pytest.raises(InputError):
            edits.add_noise("vision.hook_input", scale, seed=seed)  # type: ignore[arg-type]


def test_images_and_texts_of_a_dual_encoder_have_noise_of_their_own() -> None:
    model = cv.HookedModel(shared_model("clip"))
    inputs = case("clip").inputs(model.module, batch=2)
    for tower in ("vision", "text"):
        edit = edits.add_noise(f"{tower}.hook_input", 0.5)
        out = model.run(inputs, [edit])
        assert not torch.allclose(out, model(inputs))


def test_the_standard_deviation_is_that_of_all_coordinates_that_are_there() -> None:
    model = cv.organisms.load("shapes-llava")
    pairs = cv.data.question_pairs(4, seed=5)
    weight = model.towers["language"].W_E
    ids = [
        one
        for row in range(4)
        for batch in pairs[row].batches(model, 1)
        for one in batch.inputs["input_ids"][0].tolist()
    ]
    expected = float(weight[ids].double().std(correction=0))
    for size in (1, 3, None):
        assert cv.data.embedding_std(model, pairs, size=size) == pytest.approx(expected, rel=1e-6)
    text = [one for one in ids if one != model.image_token_id]
    assert cv.data.embedding_std(model, pairs.clean, positions="text") == pytest.approx(
        float(weight[text].double().std(correction=0)), rel=1e-6
    )
    with pytest.raises(InputError, match="No position"):
        cv.data.embedding_std(model, pairs, positions="state")
    for other in (3, [3, 4], "last", slice(2)):
        with pytest.raises(InputError, match=r"Positions\.of"):
            cv.data.embedding_std(model, pairs, positions=other)
