"""The linear part of a read-out: equal to the read-out itself up to a denominator and a constant, in every family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision.model.norms import Norm
from circuitvision.readout.weights.unembedding import unembedding_matrix
from circuitvision.readout.weights.value_vectors import value_vectors
from tests.parts import module_of
from tests.readout.planted import close, denominator, hooked, options_for, uncapped
from tests.zoo import CASES


@pytest.mark.parametrize("name", list(CASES))
def test_with_gain_the_matrix_is_the_read_out_up_to_the_denominator_and_a_constant(name):
    """readout(x) - readout(0) = x @ matrix / scale(x), for every position of a stream that holds the same x everywhere."""
    model = hooked(name, double=True)
    for tower in model.towers.values():
        readout = tower.spec.readout
        if (
            readout is None
            or readout.finish == "contrast"
            or tower.connector is not None
            or "matrix" in options_for(tower)
        ):
            continue
        x = torch.randn(2, 1, tower.cfg.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        n_positions = max(tower.cfg.n_prefix + 3, int(getattr(tower.config_of_model, "chunk_size", 1)))
        stream = x.expand(-1, n_positions, -1)
        with torch.no_grad():
            change = uncapped(tower, tower.readout(stream)) - uncapped(tower, tower.readout(0 * stream))
        change = change.reshape(2, -1, change.shape[-1])[:, 0]
        parts = {"cls+mean_patch": ["cls", "patch"], "cls+distillation": ["cls", "distillation"]}.get(
            readout.pool, [None]
        )
        matrix = sum(unembedding_matrix(tower, part=part).matrix for part in parts)
        scale = denominator(tower.final_norm, x[:, 0]) if readout.normed else 1.0
        close(change, x[:, 0] @ matrix / scale, tower.final_norm if readout.normed else None)
        plain = sum(unembedding_matrix(tower, gain=False, part=part).matrix for part in parts)
        if readout.second_head is None and parts == [None]:
            assert torch.equal(plain, tower.W_U)
        assert plain.shape == matrix.shape


def test_a_norm_is_its_linear_part_over_its_denominator_plus_its_bias():
    for module, width in (
        (torch.nn.LayerNorm(9), 9),
        (module_of(hooked("paligemma2").language.blocks[0], "mlp_add"), 24),
    ):
        module = module.double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape))
            x = 1 + torch.randn(4, width, dtype=torch.float64)
            expected = module(x) - module(torch.zeros_like(x))
        close(Norm(module).linear(x) / denominator(module, x), expected, module)


@pytest.mark.parametrize("name", ["dinov2", "dinov2-registers", "deit-teacher"])
def test_parts_are_what_a_position_of_its_own_adds(name):
    model = hooked(name, double=True)
    tower = model.vision
    first, second = {"dinov2": ("cls", "patch")}.get(name[:6], ("cls", "distillation"))
    x = torch.randn(2, tower.cfg.d_model, dtype=torch.float64)
    stream = torch.zeros(2, tower.cfg.n_prefix + 4, tower.cfg.d_model, dtype=torch.float64)
    where = {"cls": [0], "distillation": [1], "patch": list(range(tower.cfg.n_prefix, stream.shape[1]))}
    for part in (first, second):
        written = stream.clone()
        written[:, where[part]] = x[:, None]
        with torch.no_grad():
            change = tower.readout(written) - tower.readout(stream)
        matrix = unembedding_matrix(tower, part=part).matrix
        torch.testing.assert_close(change, x @ matrix / denominator(tower.final_norm, x))
    default = unembedding_matrix(tower)
    assert default.part == ("cls" if name.startswith("dinov2") else "mean")
    if name == "deit-teacher":
        whole = unembedding_matrix(tower, part="cls").matrix + unembedding_matrix(tower, part="distillation").matrix
        torch.testing.assert_close(default.matrix, whole)


@pytest.mark.parametrize("name", ["clip", "clip-argmax", "siglip", "siglip2"])
def test_dual_encoders_are_read_by_prompts(name):
    """Column = what the embedding's product with a unit prompt gains, before the logit scale."""
    model = hooked(name, double=True)
    for tower in model.towers.values():
        readout, options = tower.spec.readout, options_for(tower)
        embeddings = torch.randn(4, len(options["prompts"]), dtype=torch.float64)
        x = torch.randn(3, tower.cfg.d_model, dtype=torch.float64)
        with torch.no_grad():
            if readout.pool == "attention":
                # Where every position holds the same, the pattern does not matter and pooling is its value path.
                pool = cv.model.spec.resolve(tower.module, readout.pool_module).attention
                probe = torch.randn(3, 1, tower.cfg.d_model, dtype=torch.float64)

                def head(y, pool=pool, probe=probe):
                    return pool(probe, y[:, None].expand(-1, 5, -1), y[:, None].expand(-1, 5, -1))[0][:, 0]

            else:
                head = cv.model.spec.resolve(tower.module, readout.head)
            change = head(tower.final_norm(x)) - head(tower.final_norm(0 * x))
        units = embeddings / embeddings.norm(dim=-1, keepdim=True)
        found = unembedding_matrix(tower, **{**options, "prompts": embeddings}).matrix
        torch.testing.assert_close(x @ found / denominator(tower.final_norm, x), change @ units.T)


@pytest.mark.parametrize("name", ["paligemma", "paligemma2", "pi0"])
def test_a_linear_projector_carries_on_into_the_language_towers_words(name):
    model = hooked(name, double=True)
    vision, language = model.vision, model.language
    x = torch.randn(3, 1, vision.cfg.d_model, dtype=torch.float64)
    with torch.no_grad():
        out, nothing = vision.readout(x), vision.readout(0 * x)
        logits, base = (uncapped(language, language.readout(y)) for y in (out, nothing))
    logits, base = (
        logits * denominator(language.final_norm, out),
        base * denominator(language.final_norm, nothing),
    )
    matrix = unembedding_matrix(vision).matrix
    expected = x[:, 0] @ matrix / denominator(vision.final_norm, x[:, 0])
    close((logits - base)[:, 0], expected, language.final_norm)
    bare = unembedding_matrix(vision, gain=False).matrix
    projector = vision.connector_module
    torch.testing.assert_close(bare, projector.linear.weight.T @ unembedding_matrix(language, gain=False).matrix)


def test_columns_have_the_names_of_classes_words_prompts_and_actions():
    vit = hooked("vit")
    outputs = unembedding_matrix(vit.vision)
    assert [outputs.label(i) for i in range(3)] == [vit.module.config.id2label[i] for i in range(3)]
    assert outputs.find([outputs.label(2), 1]) == [2, 1]
    pi0 = hooked("pi0")
    assert "2" in unembedding_matrix(pi0.action).label(2)
    llava = hooked("llava-clip-llama")
    assert unembedding_matrix(llava.language).label(llava.token("red")) == "red"
    own = unembedding_matrix(llava.vision, matrix=torch.eye(llava.vision.cfg.d_model)[:, :2], names=["a", "b"])
    assert own.find(["b"]) == [1]
    assert own.label(0) == "a"


def test_prompts_may_be_strings():
    model = cv.organisms.load("shapes-clip")
    prompts = ["red circle and blue square", "green cross and cyan diamond"]
    inputs = model.inputs(text=prompts)
    with torch.no_grad():
        found = model.module.get_text_features(**inputs)
    embeddings = found if isinstance(found, Tensor) else found.pooler_output
    words = value_vectors(model.vision, 2, prompts=prompts)
    numbers = value_vectors(model.vision, 2, prompts=embeddings)
    torch.testing.assert_close(words.values, numbers.values)
    assert set(words.labels.values()) == set(prompts)
