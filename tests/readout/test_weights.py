"""Value vectors: planted rows are found, and what is projected is what is written."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.families.action_tokens import action_bins
from circuitvision.model.spec import norm_spec
from circuitvision.readout.weights.rows import written_rows
from circuitvision.readout.weights.unembedding import unembedding_matrix
from circuitvision.readout.weights.value_vectors import ValueVectors, value_vectors
from tests.parts import has_part, module_of
from tests.readout.planted import close, hooked, options_for, plant
from tests.zoo import Case, parametrize, shared_model

# -- what is projected ---------------------------------------------------------------------------------------------------------------------

PLANTED = ["vit", "deit-teacher", "dinov2", "dinov2-swiglu", "clip", "siglip", "siglip-classifier", "llava-clip-llama"]
PLANTED += ["llava-clip-gemma", "paligemma", "paligemma2", "pi0"]


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("gain", [False, True])
def test_a_row_set_to_an_output_direction_reads_as_that_output_with_value_one(name, gain):
    model = hooked(name)
    for tower in model.towers.values():
        options = options_for(tower)
        matrix = unembedding_matrix(tower, gain=gain, **options).matrix
        # Of all directions, the longest: no other column can have a larger product with it.
        target = int(matrix.norm(dim=0).argmax())
        plant(tower, 1, 5, matrix[:, target] / matrix[:, target].square().sum())
        result = value_vectors(tower, 3, gain=gain, **options)
        assert int(result.ids[1, 5, 0]) == target
        assert float(result.values[1, 5, 0]) == pytest.approx(1.0, abs=1e-5)
        cosines = value_vectors(tower, 1, gain=gain, measure="cosine", targets=[target], **options).values[..., 0]
        assert float(cosines[1, 5]) == pytest.approx(1.0, abs=1e-5)
        others = cosines.flatten()[torch.arange(cosines.numel()) != cosines[0].numel() + 5]
        assert float(others.max()) < 0.95, "a random row has no such cosine"


def test_search_finds_the_planted_neurons_by_name_and_their_flat_index():
    model = hooked("llava-clip-llama")
    tower = model.language
    red, blue = (model.token(word) for word in ("red", "blue"))
    both = tower.W_U[:, red] / tower.W_U[:, red].norm() + tower.W_U[:, blue] / tower.W_U[:, blue].norm()
    plant(tower, 1, 7, 9 * both)
    plant(tower, 0, 3, 40 * tower.W_U[:, red])
    found = value_vectors(tower, 2).search(["red", "blue"])
    assert found.iloc[0][["layer", "neuron", "flat", "found"]].tolist() == [1, 7, 1 * tower.cfg.d_mlp + 7, 2]
    assert set(found.iloc[0]["outputs"].split()) == {"red", "blue"}
    assert (found["found"].diff().dropna() <= 0).all()
    streamed = value_vectors(tower, targets=["blue", "red"]).search(["red"])
    assert streamed.iloc[0][["layer", "neuron", "output"]].tolist() == [0, 3, "red"]
    assert streamed["value"].is_monotonic_decreasing
    share = value_vectors(tower, 2).share(["red", "blue"])
    assert share.shape == (tower.cfg.n_layers, tower.cfg.d_mlp)
    assert float(share[1, 7]) == 1.0


def test_numbers_of_any_kind_are_targets_and_fractions_are_refused():
    model = hooked("vit")
    result = value_vectors(model.vision, 2)
    ids = [int(column) for column in result.ids[0, 0]]
    known = result.search(ids)
    assert len(known)
    for same in (list(np.array(ids)), torch.tensor(ids), [torch.tensor(column) for column in ids]):
        assert result.search(same).equals(known)
        assert torch.equal(
            value_vectors(model.vision, targets=same).values, value_vectors(model.vision, targets=ids).values
        )
    assert result.plot(targets=np.array(ids)).layout.title.text == result.plot(targets=ids).layout.title.text
    for wrong in (3.7, True, None):
        with pytest.raises(InputError, match="whole numbers or names"):
            value_vectors(model.vision, targets=[wrong])
        with pytest.raises(InputError, match="whole numbers or names"):
            result.search([wrong])


def test_the_lowest_outputs_are_the_highest_of_the_opposite_vector():
    model = hooked("vit")
    lowest = value_vectors(model.vision, 3, largest=False)
    with torch.no_grad():
        for block in model.vision.blocks:
            module_of(block, "mlp_out").weight.neg_()
    highest = value_vectors(model.vision, 3)
    assert torch.equal(lowest.ids, highest.ids)
    torch.testing.assert_close(lowest.values, -highest.values)
    best = lowest.search([int(lowest.ids[0, 0, 0])], count=3)
    assert best["value"].is_monotonic_increasing


# -- what is written -----------------------------------------------------------------------------------------------------------------------


@parametrize()
def test_value_vectors_add_up_to_what_the_layer_writes(case: Case):
    """In float64: sum_i post_i v_i + b_out = mlp_out, and the channels' z_d v_d = the heads' results, as written to the stream."""
    model = hooked(case.name, double=True)
    inputs = case.inputs(model.module, dtype=torch.float64)
    sites = ["**.hook_mlp_out", "**.mlp.hook_post", "**.hook_attn_out", "**.attn.hook_z", "**.*_post.hook_scale"]
    offered = [glob for glob in sites if model.sites(glob)] if "sandwich" in case.tags else sites[:4]
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=offered)
    for tower in model.towers.values():
        for layer, block in enumerate(tower.blocks):
            name = f"{tower.name}.blocks.{layer}"
            for of, key, site, add, norm, bias in (
                ("mlp", "mlp.hook_post", "hook_mlp_out", "mlp_add", "ln2_post", block.b_out),
                ("ov", "attn.hook_z", "hook_attn_out", "attn_add", "ln1_post", block.b_O),
            ):
                if f"{name}.{key}" not in cache or f"{name}.{site}" not in cache:
                    continue
                keys = cache[f"{name}.{key}"]
                keys = keys if of == "mlp" else keys.flatten(-2)
                after = module_of(block, add) if has_part(block, add) else None
                if after is not None:
                    gain = after.lambda1 if hasattr(after, "lambda1") else norm_spec(after).offset + after.weight
                    bias = bias * gain
                total = keys @ written_rows(tower, layer, of) + bias.detach()
                if after is not None and not hasattr(after, "lambda1"):
                    total = total / cache[f"{name}.{norm}.hook_scale"]
                    close(total, cache[f"{name}.{site}"], after)
                else:
                    close(total, cache[f"{name}.{site}"])
        result = value_vectors(tower, 1, matrix=torch.eye(tower.cfg.d_model))
        assert result.normed == ("sandwich" in case.tags and tower.name == "language")


def test_rows_of_the_ov_circuit_are_what_a_unit_coordinate_becomes():
    model = hooked("llava-clip-llama", double=True)
    tower = model.language
    rows = written_rows(tower, 1, "ov_circuit").unflatten(0, (tower.cfg.n_heads, -1))
    for head in range(tower.cfg.n_heads):
        kv = head // (tower.cfg.n_heads // tower.cfg.n_kv_heads)
        torch.testing.assert_close(rows[head], tower.W_V[1, kv] @ tower.W_O[1, head])
    result = value_vectors(tower, 2, component="ov_circuit", layers=[1])
    assert list(result.axes) == ["layer", "head", "coordinate", "rank"]
    assert result.flat(1, 2, 3) == tower.cfg.n_heads * tower.cfg.d_model + 2 * tower.cfg.d_model + 3


# -- the result ----------------------------------------------------------------------------------------------------------------------------


def test_batches_targets_and_layers_agree_with_one_dense_product():
    model = hooked("llava-clip-gemma")
    tower = model.language
    dense = torch.stack([written_rows(tower, layer) for layer in range(2)]) @ tower.W_U
    whole = value_vectors(tower, 4)
    best = dense.topk(4, dim=-1)
    torch.testing.assert_close(whole.values, best.values)
    assert torch.equal(whole.ids, best.indices)
    for batch_size in (1, 7, 10_000):
        assert torch.equal(value_vectors(tower, 4, batch_size=batch_size).ids, whole.ids)
    chosen = value_vectors(tower, targets=[5, 3], layers=[1])
    torch.testing.assert_close(chosen.values[0], dense[1][:, [5, 3]])
    assert chosen.axes["layer"] == [1]
    assert torch.equal(value_vectors(tower, targets=[5, 3], layers=[-1]).values, chosen.values)
    assert chosen.place(chosen.flat(1, 6)) == (1, 6)
    cosines = value_vectors(tower, targets=[5], measure="cosine").values[..., 0]
    rows = torch.stack([written_rows(tower, layer) for layer in range(2)])
    torch.testing.assert_close(cosines, torch.cosine_similarity(rows, tower.W_U[:, 5], dim=-1))


@settings(max_examples=25)
@given(st.integers(0, 2), st.integers(0, 4), st.integers(0, 5))
def test_flat_indices_count_layers_then_rows(layer, head, channel):
    model = cv.HookedModel(shared_model("deit"))
    result = value_vectors(model.vision, 1, component="ov")
    flat = result.flat(layer, head, channel)
    assert flat == layer * 30 + head * 6 + channel
    assert result.place(flat) == (layer, head, channel)


def test_dead_vectors_have_no_cosine_and_do_not_win_a_ranking():
    model = hooked("vit")
    with torch.no_grad():
        module_of(model.vision.blocks[0], "mlp_out").weight[:, 2] = 0
        model.module.classifier.weight[1] = 0
    result = value_vectors(model.vision, 2, measure="cosine")
    assert result.values[0, 2].isnan().all()
    assert result.values[0, 3].isfinite().all()
    assert not bool((result.ids[0, 3] == 1).any())
    lowest = value_vectors(model.vision, 2, measure="cosine", largest=False)
    assert lowest.values[0, 3].isfinite().all()
    assert not bool((lowest.ids[0, 3] == 1).any())


def test_results_are_saved_and_framed(tmp_path):
    model = hooked("llava-clip-llama")
    for result in (value_vectors(model.language, 2), value_vectors(model.language, targets=["red"])):
        again = ValueVectors.load(result.save(tmp_path / "value_vectors.npz"))
        assert again.search(["red"]).equals(result.search(["red"]))
        frame = again.to_frame()
        assert frame["output"].tolist() == [again.label(i) for i in frame["id"]]
        assert len(frame) == result.values.numel()


def test_bfloat16_weights_are_read_in_float32_and_nothing_is_changed():
    model = hooked("vit")
    model.to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    with torch.inference_mode():
        result = value_vectors(model.vision, 2, gain=True)
    assert result.values.dtype == torch.float32
    assert not result.values.requires_grad
    assert not value_vectors(model.vision, 2).values.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.module.parameters())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit-headless", {}, "matrix="),
        ("clip", {}, "prompts="),
        ("clip", {"prompts": torch.ones(2, 3)}, "must be"),
        ("clip", {"prompts": "a circle"}, "list"),
        ("siglip", {}, "value_path"),
        ("llava-clip-llama", {}, "not linear"),
        ("vit", {"prompts": ["a"]}, "leave prompts out"),
        ("vit", {"part": "cls"}, "no parts"),
        ("dinov2", {"part": "register"}, "cls, patch"),
        ("vit", {"layers": [3]}, "layers of 0 to 2"),
        ("vit", {"layers": []}, "layers of 0 to 2"),
        ("vit", {"layers": 1.0}, "give numbers"),
        ("vit", {"layers": "all"}, "give numbers"),
        ("vit", {"top_k": 2.5}, "whole number"),
        ("vit", {"batch_size": 1.5}, "whole number"),
        ("vit", {"component": "neurons"}, "choose one of"),
        ("vit", {"measure": "length"}, "cosine"),
        ("vit", {"top_k": 0}, "at least 1"),
        ("vit", {"batch_size": 0}, "at least 1"),
        ("vit", {"targets": ["no such class"]}, "no such class"),
        ("vit", {"targets": [99]}, "outside"),
        ("vit", {"targets": []}, "list"),
        ("vit", {"matrix": torch.ones(3, 2)}, "n_out"),
    ],
)
def test_meaningless_requests_are_refused(name, options, message):
    model = cv.HookedModel(shared_model(name))
    with pytest.raises(InputError, match=message):
        value_vectors(model.vision, **options)


def test_results_refuse_what_they_do_not_hold():
    model = hooked("llava-clip-llama")
    result = value_vectors(model.language, 2)
    with pytest.raises(InputError, match="is not"):
        result.flat(0, 1000)
    with pytest.raises(InputError, match="list"):
        result.search("red")
    kept = value_vectors(model.language, targets=["red"])
    with pytest.raises(InputError, match="this result holds red"):
        kept.search(["blue"])
    with pytest.raises(InputError, match="ranked"):
        kept.share(["red"])
    with pytest.raises(InputError, match="keep it in a variable"):
        value_vectors(cv.HookedModel(copy.deepcopy(shared_model("vit"))).vision)


def test_action_bins_count_from_the_end_of_the_vocabulary():
    ids = torch.tensor([31999, 31998, 31745, 31744, 31743, 32000])
    centres = action_bins(ids, 32000)
    assert centres[0] == pytest.approx(-1 + 1 / 255)
    assert centres[1] - centres[0] == pytest.approx(2 / 255, abs=1e-6)
    assert centres[2] == centres[3] == pytest.approx(1 - 1 / 255)
    assert centres[4:].isnan().all()
    other = action_bins(torch.tensor([9, 8, 5, 4]), 10, n_bins=5, low=0.0, high=8.0)
    assert other[:3].tolist() == [1.0, 3.0, 7.0]
    assert other[3].isnan()
    for n_bins in (1, 11):
        with pytest.raises(InputError, match="edges"):
            action_bins(torch.tensor([3]), 10, n_bins=n_bins)


def test_concepts_and_actions_are_read_off_the_neurons_of_a_policys_language_tower():
    """The first step of steering by value vectors: neurons that promote a group of words by flat index, and their share of action tokens."""
    model = hooked("pi0")
    tower = model.language
    table = tower.W_U / tower.W_U.norm(dim=0)
    fast, n_vocab = ["red", "green"], tower.W_U.shape[1]
    words = [model.token(word) for word in fast]
    plant(tower, 1, 4, 50 * table[:, words].sum(1))
    plant(tower, 2, 9, 70 * table[:, words].sum(1))
    action = n_vocab - 1
    plant(tower, 0, 2, 60 * table[:, action])
    result = value_vectors(tower, 10, measure="cosine")
    found = result.search(fast, 2)
    assert sorted(found["flat"]) == [tower.cfg.d_mlp + 4, 2 * tower.cfg.d_mlp + 9]
    assert found["found"].tolist() == [2, 2]
    moved = action_bins(result.ids, n_vocab, n_bins=16)
    assert moved.shape == result.ids.shape
    assert float(moved[0, 2, 0]) == pytest.approx(-1 + 1 / 15)
    share = moved.isfinite().double().mean(-1)
    torch.testing.assert_close(share, result.share(range(n_vocab - 16, n_vocab)).double())


# -- figures -------------------------------------------------------------------------------------------------------------------------------


def heading(figure) -> str:
    return figure.layout.title.text.split("<br>")[0]


def cells(figure) -> list[str]:
    return [word for trace in figure.data if trace.meta == "words" for word in trace.text]


def test_figures_of_value_vectors_say_the_finding_and_need_no_model(tmp_path):
    model = hooked("llava-clip-llama")
    plant(model.language, 1, 7, 40 * model.language.W_U[:, model.token("red")])
    result = ValueVectors.load(value_vectors(model.language, 3).save(tmp_path / "vectors.npz"))
    whole = result.plot(count=4)
    assert "language L1N7 promotes red most strongly" in heading(whole)
    assert len(cells(whole)) == 12
    found = result.plot(targets=["red"], count=2)
    assert heading(found).startswith("1 of the 1 outputs asked for are among the 3 highest of language L1N7")
    coloured = np.isfinite(np.asarray(found.data[0].z))
    assert coloured[0][0]
    assert coloured[0].sum() == 1
    kept = value_vectors(model.language, targets=["red", "blue"]).plot(count=3)
    assert list(kept.layout.xaxis.ticktext) == ["red", "blue"]
    against = value_vectors(model.language, 2, largest=False).plot(count=1)
    assert "\N{MINUS SIGN}" in heading(against)
    assert "No value vector" in result.plot(targets=["no such word"]).layout.title.text
    markup = value_vectors(model.language, 1, matrix=torch.eye(32)[:, :1]).plot(count=1)
    assert cells(markup) == ["0"]
