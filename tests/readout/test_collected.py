"""One honest vector per example, from every family and any site."""

from __future__ import annotations

import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError, UnknownSiteError
from circuitvision.provenance import hash_inputs
from circuitvision.readout import (
    collect,
    linear_probe,
    max_activating_examples,
)
from circuitvision.readout.probes.collected import Collected
from circuitvision.regions import at
from tests.readout.common import hooked
from tests.zoo import case

# -- one vector per example ----------------------------------------------------------------------------------------------------------------


def by_hand(model, inputs, site, picked):
    """The mean over ``picked(tokens, row)`` of all rows of each example."""
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=site)
    tower = site.partition(".")[0]
    tokens = model.tokens(inputs)[tower]
    rows = [torch.stack([cache[site][row, p].flatten() for p in picked(tokens, row)]) for row in range(tokens.n_rows)]
    count = int(tokens.example.max()) + 1
    return torch.stack(
        [
            torch.cat([rows[row] for row in range(tokens.n_rows) if tokens.example[row] == e]).mean(0)
            for e in range(count)
        ]
    )


ROWS = [
    ("vit", "vision.blocks.0.hook_resid_post", "cls", lambda t, r: [0]),
    ("dinov2-registers", "vision.blocks.1.mlp.hook_post", "patch", lambda t, r: t.positions("patch", row=r)),
    ("siglip2-vision", "vision.blocks.0.hook_mlp_out", "last", lambda t, r: [t.last(r)]),
    ("llava-clip-llama", "language.blocks.1.attn.hook_z", "last", lambda t, r: [t.last(r)]),
    ("llava-next-mistral", "vision.blocks.0.hook_resid_mid", "patch", lambda t, r: t.positions("patch", row=r)),
    ("paligemma2", "language.blocks.0.attn.hook_k", 3, lambda t, r: [3]),
    ("pi0", "vision.blocks.0.hook_resid_post", "all", lambda t, r: range(t.n_positions)),
    ("pi0", "action.blocks.1.hook_resid_post", "state", lambda t, r: t.positions("state", row=r)),
]


@pytest.mark.parametrize(("name", "site", "positions", "picked"), ROWS)
def test_a_vector_is_the_mean_over_the_chosen_positions(name, site, positions, picked):
    model, entry = hooked(name)
    inputs = entry.inputs(model.module, batch=3)
    wanted = by_hand(model, inputs, site, picked)
    for batch_size in (1, 2, 8):
        found = collect(model, inputs, site, positions=positions, batch_size=batch_size)
        torch.testing.assert_close(found[site], wanted, atol=1e-5, rtol=1e-4)
    assert not model.engine.handles


def test_positions_may_be_functions_of_the_tokens_and_differ_from_example_to_example():
    model, entry = hooked("llava-clip-llama")
    inputs = entry.inputs(model.module, batch=4)
    site = "language.blocks.0.hook_resid_post"
    corner = collect(model, inputs, site, positions=lambda t: t.select("patch").patch(0, 0), batch_size=3)
    tokens = model.tokens(inputs)["language"]
    torch.testing.assert_close(corner[site], by_hand(model, inputs, site, lambda t, r: t.positions("patch", row=r)[:1]))
    own = [tokens.positions("patch", row=row)[row] for row in range(4)]
    one_each = by_hand(model, inputs, site, lambda t, r: [own[r]])
    for positions in (at(own), at(torch.tensor(own)), {"language": at(own)}):
        torch.testing.assert_close(collect(model, inputs, site, positions=positions, batch_size=3)[site], one_each)
    mask = torch.nn.functional.one_hot(torch.tensor(own), tokens.n_positions).bool()
    torch.testing.assert_close(collect(model, inputs, site, positions=mask, batch_size=3)[site], one_each)
    patches = tokens.select("patch")
    for positions in (patches, patches.tensor.numpy()):
        found = collect(model, inputs, site, positions=positions, batch_size=3)
        torch.testing.assert_close(found[site], collect(model, inputs, site, positions="patch")[site])
    with pytest.raises(InputError, match="3 examples for 4"):
        collect(model, inputs, site, positions=mask[:3])
    two = entry.inputs(model.module, batch=2, images_per_prompt=2)
    first = model.tokens(two)["vision"].select("patch").tensor[:2]
    by_kind = collect(model, two, "vision.blocks.0.hook_resid_post", positions="patch")
    # One row of a mask per example serves all of its images.
    by_mask = collect(model, two, "vision.blocks.0.hook_resid_post", positions=first)
    for site in by_kind:
        torch.testing.assert_close(by_mask[site], by_kind[site])
    numbered = []

    def chosen(tokens, examples):
        numbered.extend(examples)
        return tokens.select("patch")

    collect(model, inputs, site, positions=chosen, batch_size=3)
    assert numbered == [0, 1, 2, 3]


def single(entry, model, seed):
    """One example; of a dual encoder one image and one text."""
    inputs = entry.inputs(model.module, batch=1, seed=seed)
    texts = ("input_ids", "attention_mask")
    return {name: value[:1] if name in texts else value for name, value in inputs.items()}


@pytest.mark.parametrize("name", ["vit", "llava-clip-llama", "llava-next-llama", "llava-onevision", "pi0", "siglip2"])
def test_one_mapping_a_list_and_a_generator_give_the_same(name):
    model, entry = hooked(name)
    site = f"{list(model.towers)[-1]}.blocks.0.hook_resid_post"
    singles = [single(entry, model, seed) for seed in range(4)]
    one_by_one = collect(model, iter(singles), site, positions="all", batch_size=1)
    in_batches = collect(model, singles, site, positions="all", batch_size=3)
    torch.testing.assert_close(in_batches[site], one_by_one[site], atol=1e-5, rtol=1e-4)
    assert in_batches.provenance["dataset_sha256"] == one_by_one.provenance["dataset_sha256"]
    shapes = {tuple(v.shape for v in inputs.values() if isinstance(v, torch.Tensor)) for inputs in singles}
    if len(shapes) > 1:
        return
    tensors = {k: torch.cat([s[k] for s in singles]) for k, v in singles[0].items() if isinstance(v, torch.Tensor)}
    whole = {**singles[0], **tensors}
    in_pieces = collect(model, whole, site, positions="all", batch_size=3)
    torch.testing.assert_close(in_pieces[site], one_by_one[site], atol=1e-5, rtol=1e-4)
    assert in_pieces.provenance["dataset_sha256"] == hash_inputs(whole)


def test_several_images_go_with_their_example():
    model, entry = hooked("llava-clip-llama")
    inputs = entry.inputs(model.module, batch=3, images_per_prompt=2)
    site = "vision.blocks.0.hook_resid_post"
    whole = collect(model, inputs, site, positions="patch", batch_size=8)[site]
    assert whole.shape[0] == 3
    torch.testing.assert_close(collect(model, inputs, site, positions="patch", batch_size=1)[site], whole)
    torch.testing.assert_close(whole, by_hand(model, inputs, site, lambda t, r: t.positions("patch", row=r)))


def test_examples_of_a_dual_encoder_are_those_of_the_tower_asked_for():
    model, entry = hooked("clip")
    inputs = entry.inputs(model.module, batch=3)
    assert len(inputs["input_ids"]) == 4
    for tower, count in (("vision", 3), ("text", 4)):
        site = f"{tower}.blocks.1.hook_resid_post"
        found = collect(model, inputs, site, positions="last", batch_size=2)[site]
        torch.testing.assert_close(found, by_hand(model, inputs, site, lambda t, r: [t.last(r)]), atol=1e-5, rtol=1e-4)
        assert len(found) == count
    with pytest.raises(InputError, match="3 images and 4 texts"):
        collect(model, inputs, ["vision.blocks.0.hook_resid_post", "text.blocks.0.hook_resid_post"])


def test_sites_a_tower_has_pooled_and_sites_without_the_first_positions():
    model, entry = hooked("llava-clip-llama")
    inputs = entry.inputs(model.module, batch=2)
    out = collect(model, inputs, "projector.hook_out", positions="patch")["projector.hook_out"]
    _, cache = model.run_with_cache(inputs, names_filter="projector.hook_out")
    torch.testing.assert_close(out, cache["projector.hook_out"].mean(1).detach())
    for positions in ("all", "patch"):
        found = collect(model, inputs, "projector.hook_out", positions=positions)["projector.hook_out"]
        torch.testing.assert_close(found, out)
    strongest = max_activating_examples(model, inputs, "projector.hook_out", top_k=2)
    torch.testing.assert_close(
        strongest.values, cache["projector.hook_out"].detach().max(1).values.T.sort(dim=1, descending=True).values
    )
    assert int(strongest.position.min()) >= 1
    with pytest.raises(InputError, match="lacks the first 1"):
        collect(model, inputs, "projector.hook_out", positions="cls")
    siglip, entry = hooked("siglip")
    inputs = entry.inputs(siglip.module, batch=2)
    pooled = collect(siglip, inputs, ["vision.hook_readout", "vision.pool.attn.hook_z"])
    assert {len(value) for value in pooled.values()} == {2}


def test_a_run_ends_when_the_last_site_was_read_and_leaves_nothing():
    model, entry = hooked("llava-clip-llama")
    inputs = entry.inputs(model.module, batch=2)
    seen = []
    layers = [block.module for block in model.language.blocks]
    handles = [layer.register_forward_pre_hook(lambda *_: seen.append(1)) for layer in layers]
    site = "vision.blocks.0.hook_resid_post"
    first = collect(model, inputs, site)
    assert not seen
    for handle in handles:
        handle.remove()
    assert not model.engine.stack
    assert not model.engine.handles
    logits = model(inputs)
    assert logits.requires_grad
    with torch.no_grad(), model.hooks([(site, lambda value, hook: value * 0)]):
        assert not collect(model, inputs, site)[site].any()
    torch.testing.assert_close(collect(model, inputs, site)[site], first[site], atol=0, rtol=0)
    assert not first[site].requires_grad
    assert (
        first.provenance["dataset_sha256"] == cv.provenance.hash_inputs(inputs) if hasattr(cv, "provenance") else True
    )


def test_collected_vectors_keep(tmp_path):
    model, entry = hooked("vit")
    vectors = collect(model, entry.inputs(model.module, batch=3), model.vision.stream_sites(), positions="patch")
    again = Collected.load(vectors.save(tmp_path / "vectors.safetensors"))
    assert list(again) == list(vectors)
    assert all(torch.equal(again[site], vectors[site]) for site in vectors)
    assert (again.positions, again.provenance) == (vectors.positions, vectors.provenance)
    result = linear_probe(
        None, {site: x.repeat(16, 1) for site, x in again.items()}, [0, 1, 1] * 16, shuffles=0, penalty=1.0
    )
    with pytest.raises(InputError, match="safetensors"):
        vectors.save(tmp_path / "vectors.npz")
    with pytest.raises(InputError, match="no file"):
        Collected.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    for path in (result.save(tmp_path / "probe.safetensors"), tmp_path / "text.safetensors"):
        with pytest.raises(InputError, match="collected vectors"):
            Collected.load(path)


def test_bfloat16_becomes_float32_and_float64_stays(fresh_model):
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = cv.HookedModel(fresh_model(case("vit")).to(dtype))
        inputs = case("vit").inputs(model.module, batch=2, dtype=dtype)
        assert collect(model, inputs, "vision.hook_input")["vision.hook_input"].dtype == wanted


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ("middle", "not understood"),
        ("register", "its kinds: cls, patch"),
        (99, "outside"),
        (-99, "outside"),
        (at([0, 1, 2]), "positions of 3 examples for 2"),
        (lambda tokens: [0.5], "not understood"),
        ({"language": "last"}, "names language"),
    ],
)
def test_positions_that_make_no_sense_are_refused(positions, message):
    model, entry = hooked("vit")
    with pytest.raises(InputError, match=message):
        collect(model, entry.inputs(model.module, batch=2), "vision.hook_input", positions=positions)


def test_padding_is_refused_and_last_is_never_padding():
    model, entry = hooked("llava-clip-llama")
    inputs = entry.inputs(model.module, batch=2, padding="right")
    tokens = model.tokens(inputs)["language"]
    assert (tokens.kind == "padding").any()
    site = "language.blocks.0.hook_resid_post"
    wanted = by_hand(model, inputs, site, lambda t, r: [t.last(r)])
    torch.testing.assert_close(collect(model, inputs, site, positions="last")[site], wanted)
    with pytest.raises(InputError, match="padding"):
        collect(model, inputs, site, positions=tokens.n_positions - 1)


def test_data_sets_that_make_no_sense_are_refused():
    model, entry = hooked("vit")
    inputs = entry.inputs(model.module, batch=2)
    site = "vision.hook_input"
    with pytest.raises(InputError, match="no example"):
        collect(model, [], site)
    with pytest.raises(InputError, match="no example"):
        collect(model, iter([]), site)
    with pytest.raises(InputError, match="batch_size"):
        collect(model, inputs, site, batch_size=0)
    with pytest.raises(InputError, match="number per query"):
        collect(model, inputs, "vision.blocks.0.attn.hook_pattern")
    with pytest.raises(InputError, match="2 examples and there are 3 labels"):
        linear_probe(model, inputs, [0, 1, 0])
    with pytest.raises(UnknownSiteError):
        collect(model, inputs, "vision.blocks.9.hook_resid_post")
    vlm, entry = hooked("llava-clip-llama")
    with pytest.raises(InputError, match="vision, language"):
        linear_probe(vlm, entry.inputs(vlm.module, batch=2), [0, 1])
    odd = {**inputs, "bool_masked_pos": torch.zeros(5, 16, dtype=torch.bool)}
    with pytest.raises(InputError, match="cannot be cut"):
        collect(model, odd, site, batch_size=1)
