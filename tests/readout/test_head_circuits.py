"""Circuits of heads: the model's own numbers follow from them, factored equals dense, planted structure is found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformer_lens import FactoredMatrix
from transformer_lens.utilities.matrix import composition_scores as peer_scores

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.model.spec import norm_spec
from circuitvision.readout.weights.head_circuits import (
    CompositionScores,
    SingularVectors,
    composition_scores,
    ov_circuit,
    qk_circuit,
    random_composition,
    singular_vectors,
)
from circuitvision.readout.weights.unembedding import unembedding_matrix
from tests.parts import module_of
from tests.readout.planted import close, hooked
from tests.zoo import Case, parametrize, shared_model


def kv_head(tower, head: int) -> int:
    return head * tower.cfg.n_kv_heads // tower.cfg.n_heads


SITES = ["**.hook_resid_pre", "**.attn.hook_pattern", "**.attn.hook_result", "**.attn.hook_attn_scores"]


def recorded(case: Case, model):
    inputs = case.inputs(model.module, dtype=torch.float64)
    with torch.no_grad():
        return model.run_with_cache(inputs, names_filter=SITES)[1]


# -- OV and QK against the model --------------------------------------------------------------------------------------------------------------


@parametrize()
def test_heads_write_pattern_times_stream_times_ov(case: Case):
    """result = pattern @ (x @ W_V W_O) + b_V W_O with x behind the norm; with gain=True x is the stream over the norm's scale."""
    model = hooked(case.name, double=True)
    cache = recorded(case, model)
    checked = 0
    for tower in model.towers.values():
        for layer in range(tower.cfg.n_layers):
            name = f"{tower.name}.blocks.{layer}"
            if f"{name}.attn.hook_result" not in cache:
                continue
            pattern, resid = cache[f"{name}.attn.hook_pattern"], cache[f"{name}.hook_resid_pre"]
            if pattern.shape[-1] != resid.shape[1]:
                continue  # keys of another tower's cache come first
            norm = module_of(tower.blocks[layer], "ln1")
            with torch.no_grad():
                x, base = norm(resid), norm(0 * resid)
            spec = norm_spec(norm)
            centred = resid - resid.mean(-1, keepdim=True) if spec.centred else resid
            scale = (centred.square().mean(-1, keepdim=True) + getattr(norm, spec.eps)).sqrt()
            for head in range(tower.cfg.n_heads):
                b_v = tower.b_V[layer, kv_head(tower, head)] @ tower.W_O[layer, head]
                plain = ov_circuit(tower, layer, head)
                # In float64, eager attention's rows sum to one as far as a float32 softmax lets them.
                moved = pattern[:, head] @ (x @ plain.AB) + pattern[:, head].sum(-1, keepdim=True) * b_v
                close(moved, cache[f"{name}.attn.hook_result"][..., head, :], norm)
                folded = ov_circuit(tower, layer, head, gain=True)
                close((resid @ folded.AB) / scale, (x - base) @ plain.AB, norm)
                scores = (resid @ qk_circuit(tower, layer, head, gain=True).AB @ resid.mT) / scale / scale.mT
                close(scores, (x - base) @ qk_circuit(tower, layer, head).AB @ (x - base).mT, norm)
                checked += 1
    assert checked


@parametrize(without=("softcap",))
def test_scores_of_a_position_with_itself_follow_from_qk(case: Case):
    """At distance zero rotary embeddings cancel: scores[i, i] = x_i @ W_Q W_K^T @ x_i times the model's own scale."""
    model = hooked(case.name, double=True)
    with torch.no_grad():
        for tower in model.towers.values():
            for block in tower.blocks:
                for part in ("q", "k"):
                    if module_of(block, part).bias is not None:
                        module_of(block, part).bias.zero_()
    cache = recorded(case, model)
    for tower in model.towers.values():
        for layer in range(tower.cfg.n_layers):
            name = f"{tower.name}.blocks.{layer}"
            if f"{name}.attn.hook_attn_scores" not in cache:
                continue
            scores, resid = cache[f"{name}.attn.hook_attn_scores"], cache[f"{name}.hook_resid_pre"]
            if scores.shape[-1] != resid.shape[1]:
                continue
            norm = module_of(tower.blocks[layer], "ln1")
            with torch.no_grad():
                x = norm(resid)
            for head in range(tower.cfg.n_heads):
                circuit = qk_circuit(tower, layer, head, scaled=True)
                whole = x @ circuit.AB @ x.mT
                diagonal = scores[:, head].diagonal(dim1=-2, dim2=-1)
                seen = diagonal > -1e30
                # Eager attention turns rotated queries in the dtype of its angles, which is float32.
                tolerance = 1e-5 if tower.cfg.rotary or norm_spec(norm).upcast else 1e-9
                found = whole.diagonal(dim1=-2, dim2=-1)
                torch.testing.assert_close(found[seen], diagonal[seen], rtol=tolerance, atol=tolerance)
                if not tower.cfg.rotary:
                    there = scores[:, head] > -1e30
                    torch.testing.assert_close(whole[there], scores[:, head][there], rtol=tolerance, atol=tolerance)


def test_the_scale_is_the_models_own():
    model = hooked("paligemma2", double=True)
    tower = model.language
    scaled, plain = qk_circuit(tower, 0, 1, scaled=True), qk_circuit(tower, 0, 1)
    scaling = tower.config.query_pre_attn_scalar**-0.5
    assert scaling != tower.cfg.d_head**-0.5
    torch.testing.assert_close(scaled.AB, plain.AB * scaling)


def test_written_circuits_include_what_follows_the_output_projection():
    model = hooked("dinov2", double=True)
    tower = model.vision
    plain, written = ov_circuit(tower, 1, 2), ov_circuit(tower, 1, 2, written=True)
    torch.testing.assert_close(written.AB, plain.AB * module_of(tower.blocks[1], "attn_add").lambda1)


def test_the_full_circuit_goes_from_tokens_to_outputs():
    model = hooked("llava-clip-gemma", double=True)
    tower = model.language
    found = ov_circuit(tower, 1, 2, tokens=True, gain=False)
    dense = tower.W_E @ tower.W_V[1, 0] @ tower.W_O[1, 2] @ tower.W_U
    torch.testing.assert_close(found.AB, dense)
    assert found.mdim == tower.cfg.d_head
    gained = ov_circuit(tower, 1, 2, tokens=True).AB
    gain = 1 + module_of(tower.blocks[1], "ln1").weight
    torch.testing.assert_close(
        gained, (tower.W_E * gain) @ tower.W_V[1, 0] @ tower.W_O[1, 2] @ unembedding_matrix(tower).matrix
    )


# -- singular vectors -------------------------------------------------------------------------------------------------------------------------


def test_singular_vectors_rebuild_the_matrix_and_have_one_sign():
    model = hooked("llava-clip-llama", double=True)
    tower = model.language
    circuit = ov_circuit(tower, 1, 3)
    outputs = unembedding_matrix(tower)
    result = singular_vectors(circuit, 99, project_into=outputs, top_k=4)
    assert len(result.values) == tower.cfg.d_head
    torch.testing.assert_close(result.left * result.values @ result.right.T, circuit.AB)
    assert float(result.shares.sum()) == pytest.approx(1.0)
    for side in (result.left, result.right):
        torch.testing.assert_close(side.T @ side, torch.eye(tower.cfg.d_head, dtype=torch.float64))
    torch.testing.assert_close(result.values, torch.linalg.svdvals(circuit.AB)[: tower.cfg.d_head])
    dense = singular_vectors(circuit.AB, 3, project_into=outputs, read_with=outputs)
    torch.testing.assert_close(dense.values, result.values[:3])
    torch.testing.assert_close(dense.right, result.right[:, :3])
    torch.testing.assert_close(dense.left, result.left[:, :3])
    read = dense.left.T @ outputs.matrix
    torch.testing.assert_close(dense.input_values, read.topk(10, dim=-1).values)
    logits = result.right.T @ outputs.matrix
    assert (logits.max(-1).values >= -logits.min(-1).values).all(), "the largest output is positive"
    torch.testing.assert_close(result.top_values, logits.topk(4, dim=-1).values)
    flipped = singular_vectors(FactoredMatrix(-circuit.A, -circuit.B), 2, project_into=outputs)
    torch.testing.assert_close(flipped.right, result.right[:, :2])
    bare = singular_vectors(circuit, 2)
    assert (bare.right.gather(0, bare.right.abs().argmax(0, keepdim=True)) > 0).all()
    assert bare.outputs(0) == []


def test_a_head_that_turns_one_word_into_another_shows_in_its_singular_vectors(tmp_path):
    model = hooked("llava-clip-llama", double=True)
    tower = model.language
    red, blue = model.token("red"), model.token("blue")
    source, target = tower.W_E[red], tower.W_U[:, blue]
    circuit = FactoredMatrix(source[:, None] / source.norm(), 5 * target[None] / target.norm())
    outputs = unembedding_matrix(tower, gain=False)
    embedding = unembedding_matrix(tower, gain=False, matrix=tower.W_E.T, names=[outputs.label(i) for i in range(58)])
    result = singular_vectors(circuit, 1, project_into=outputs, read_with=embedding, top_k=3)
    assert float(result.values[0]) == pytest.approx(5.0)
    assert float(result.right[:, 0] @ target) > 0
    assert float(result.left[:, 0] @ source) > 0
    assert blue in result.top_ids[0].tolist()
    assert red in result.input_ids[0].tolist()
    again = SingularVectors.load(result.save(tmp_path / "vectors.npz"))
    assert again.outputs(0) == result.outputs(0)
    assert again.sources(0) == result.sources(0)


def test_singular_vectors_refuse_what_they_cannot_read():
    circuit = FactoredMatrix(torch.randn(6, 2), torch.randn(2, 6))
    with pytest.raises(InputError, match="must be"):
        singular_vectors(circuit, project_into=torch.randn(5, 3))
    with pytest.raises(InputError, match="one matrix"):
        singular_vectors(FactoredMatrix(torch.randn(3, 6, 2), torch.randn(3, 2, 6)))
    with pytest.raises(InputError, match="k ≥ 1"):
        singular_vectors(circuit, 0)
    with pytest.raises(InputError, match="k ≥ 1"):
        singular_vectors(circuit, 2.5)
    with pytest.raises(InputError, match="one matrix"):
        singular_vectors(None)


# -- composition ------------------------------------------------------------------------------------------------------------------------------


def dense_reading(tower, layer: int, head: int, kind: str, gain: bool) -> Tensor:
    if kind == "V":
        return ov_circuit(tower, layer, head, gain=gain, written=True).AB
    qk = qk_circuit(tower, layer, head, gain=gain).AB
    return qk if kind == "Q" else qk.T


@pytest.mark.parametrize("name", ["vit", "dinov2", "llava-clip-llama", "llava-clip-mistral", "paligemma2"])
@pytest.mark.parametrize("kind", ["Q", "K", "V"])
@pytest.mark.parametrize("gain", [True, False])
def test_composition_equals_the_dense_formula(name, kind, gain):
    model = hooked(name)
    for tower in model.towers.values():
        found = composition_scores(tower, kind, gain=gain, above_random=False)
        assert found.random_mean == 0.0
        layers, heads = tower.cfg.n_layers, tower.cfg.n_heads
        for early in range(layers):
            for late in range(layers):
                if early >= late:
                    assert found.values[early, :, late].isnan().all()
                    continue
                for a in range(heads):
                    source = ov_circuit(tower, early, a, written=True).AB
                    for b in range(heads):
                        reading = dense_reading(tower, late, b, kind, gain)
                        expected = (source @ reading).norm() / source.norm() / reading.norm()
                        assert float(found.values[early, a, late, b]) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition_equals_transformer_lens(kind):
    model = hooked("llava-clip-mistral")
    tower = model.language
    group = tower.cfg.n_heads // tower.cfg.n_kv_heads
    value, key = (weight.repeat_interleave(group, dim=1) for weight in (tower.W_V, tower.W_K))
    left = FactoredMatrix(value, tower.W_O)
    right = {"V": left, "Q": FactoredMatrix(tower.W_Q, key.mT), "K": FactoredMatrix(key, tower.W_Q.mT)}[kind]
    theirs = peer_scores(left, right)
    ours = composition_scores(tower, kind, gain=False, above_random=False).values
    there = ours.isfinite()
    assert int(there.sum()) == 3 * tower.cfg.n_heads**2
    torch.testing.assert_close(ours[there], theirs[there], rtol=1e-4, atol=1e-5)


def test_random_heads_compose_as_much_as_one_over_the_root_of_the_width():
    mean, spread = random_composition(64, 16, draws=64)
    assert mean == pytest.approx(64**-0.5, rel=0.02)
    assert 0 < spread < 0.2 * mean
    assert random_composition(64, 16, draws=64) == (mean, spread)
    assert random_composition(64, 16, draws=64, seed=1) != (mean, spread)
    # Whatever the spectra: over random rotations of the first, the mean square is exactly 1 / d_model.
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(12, 12, generator=generator) @ torch.diag(torch.logspace(0, -3, 12)) for _ in range(2))
    squares = []
    for _ in range(4000):
        rotation, upper = torch.linalg.qr(torch.randn(12, 12, generator=generator))
        rotation = rotation * upper.diagonal().sign()
        squares.append(((first @ rotation @ second).norm() / first.norm() / second.norm()).square())
    assert float(torch.stack(squares).mean()) == pytest.approx(1 / 12, rel=0.05)


def test_a_head_built_to_read_another_has_the_highest_score(tmp_path):
    model = hooked("vit")
    tower = model.vision
    width = tower.cfg.d_head
    with torch.no_grad():
        # Head 1 of layer 2 reads, as value, exactly the subspace that head 3 of layer 0 writes to.
        basis = torch.linalg.qr(tower.W_O[0, 3].T)[0]
        ln1 = module_of(tower.blocks[2], "ln1")
        ln1.weight.fill_(1.0)
        module_of(tower.blocks[2], "v").weight[width : 2 * width] = basis.T
    found = composition_scores(tower, "V")
    assert found.top(1)[0][:2] == ("vision L0H3", "vision L2H1")
    # The whole of what is written is read: only how evenly keeps the score from 1 / sqrt(d_head).
    assert found.top(1)[0][2] + found.random_mean == pytest.approx(width**-0.5, rel=0.15)
    assert found.top(1)[0][2] > 1.5 * found.top(2)[1][2]
    assert composition_scores(tower, "Q").top(1)[0][:2] != ("vision L0H3", "vision L2H1")
    raw = composition_scores(tower, "V", above_random=False)
    torch.testing.assert_close(found.values + found.random_mean, raw.values, equal_nan=True)
    again = CompositionScores.load(found.save(tmp_path / "scores.npz"))
    assert again.top(3) == found.top(3)
    assert len(found.top(10_000)) == 3 * tower.cfg.n_heads**2


def test_chosen_layers_and_heads_of_zeros():
    model = hooked("vit")
    tower = model.vision
    whole = composition_scores(tower, "K", above_random=False)
    some = composition_scores(tower, "K", layers=[2, 0], above_random=False)
    assert some.axes["source_layer"] == [0, 2]
    torch.testing.assert_close(some.values[0, :, 1], whole.values[0, :, 2])
    torch.testing.assert_close(
        composition_scores(tower, "K", layers=[0, -1], above_random=False).values, some.values, equal_nan=True
    )
    assert some.top(1)[0][0].startswith("vision L0")
    assert some.top(1)[0][1].startswith("vision L2")
    with torch.no_grad():
        module_of(tower.blocks[0], "o").weight[:, : tower.cfg.d_head] = 0
    dead = composition_scores(tower, "K", above_random=False)
    assert dead.values[0, 0].isnan().all()
    assert dead.values[0, 1, 1:].isfinite().all()
    assert all(not source.startswith("vision L0H0") for source, _, _ in dead.top(999))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tower: ov_circuit(tower, 3, 0), "no L3H0"),
        (lambda tower: qk_circuit(tower, 0, 4), "no L0H4"),
        (lambda tower: ov_circuit(tower, 0, -5), "no L0H-5"),
        (lambda tower: ov_circuit(tower, 0.5, 1), "no component"),
        (lambda tower: ov_circuit(tower, 0, 0, tokens=True), "no tokens"),
        (lambda tower: composition_scores(tower, "O"), "Q, K, V"),
        (lambda tower: composition_scores(tower, layers=[5]), "layers of 0 to 2"),
        (lambda tower: composition_scores(tower, draws=0), "at least 1"),
    ],
)
def test_meaningless_requests_are_refused(call, message):
    model = cv.HookedModel(shared_model("vit"))
    with pytest.raises(InputError, match=message):
        call(model.vision)


def test_bfloat16_weights_are_computed_in_float32_and_left_alone():
    model = hooked("llava-clip-llama")
    model.to(torch.bfloat16)
    circuit = ov_circuit(model.language, 0, 1)
    assert circuit.A.dtype == circuit.B.dtype == torch.float32
    assert not circuit.A.requires_grad
    with torch.inference_mode():
        assert composition_scores(model.language, "Q").values.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in model.module.parameters())


# -- figures ----------------------------------------------------------------------------------------------------------------------------------


def test_figures_say_which_heads_and_which_words(tmp_path):
    model = hooked("llava-clip-mistral")
    tower = model.language
    scores = CompositionScores.load(composition_scores(tower, "Q").save(tmp_path / "scores.npz"))
    figure = scores.plot()
    source, target, value = scores.top(1)[0]
    assert figure.layout.title.text.startswith("No pair stands out from random heads in Q-composition")
    assert f"the first is {source} → {target}, {value:+.2f}" in figure.layout.title.text.replace("<br>", " ")
    scores.values[0, 1, 1, 2] = 0.5
    assert scores.plot().layout.title.text.startswith(
        "language L0H1 → language L1H2 composes most through Q: +0.50 above random heads"
    )
    heads = tower.cfg.n_heads
    assert figure.data[0].z.shape == (2 * heads, 2 * heads)
    assert "two layers" in composition_scores(tower, layers=[1]).plot().layout.title.text
    assert "above random" not in composition_scores(tower, above_random=False).plot().layout.title.text
    outputs = unembedding_matrix(tower)
    vectors = singular_vectors(ov_circuit(tower, 1, 0), 3, project_into=outputs)
    figure = vectors.plot(count=2)
    assert vectors.outputs(0)[0][0].replace("<", "&lt;").replace(">", "&gt;") in figure.layout.title.text
    assert len(figure.layout.annotations) == 3
    assert "circuit" in singular_vectors(ov_circuit(tower, 1, 0), 2).plot().layout.title.text
    zeros = singular_vectors(FactoredMatrix(torch.zeros(4, 2), torch.zeros(2, 4)), 2)
    assert zeros.shares.isnan().all()
    assert "zeros" in zeros.plot().layout.title.text
