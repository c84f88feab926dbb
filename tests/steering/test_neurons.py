"""Sets of neurons: what they promote, how they are written to, what they are compared with; clusters of value vectors."""

from __future__ import annotations

import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.steering import NeuronSet, promoting_neurons, random_neurons, value_vector_clusters


def test_a_flat_index_is_layer_times_width_plus_neuron(policy: cv.HookedModel) -> None:
    width = policy.language.cfg.d_mlp
    found = NeuronSet.from_flat(policy.language, [3, width + 5, 7])
    assert found.places == ((0, 3), (1, 5), (0, 7))
    assert found.flat == [3, width + 5, 7]
    assert found.layers == {0: [3, 7], 1: [5]}
    assert len(found) == 3


@pytest.mark.parametrize("places", [(), ((0, 1), (0, 1)), ((0, 10_000),), ((99, 0),), ((-1, 0),)])
def test_neurons_that_cannot_be_are_refused(policy: cv.HookedModel, places: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(InputError):
        NeuronSet.of(policy.language, places)


def test_every_method_writes_its_neurons_at_every_position_and_nothing_else(policy: cv.HookedModel) -> None:
    inputs = policy.inputs(state=torch.zeros(2, 2), text=["reach red"] * 2, images=[[torch.zeros(3, 16, 16)]] * 2)
    chosen = NeuronSet.of(policy.action, [(2, 5), (0, 1), (2, 3)])
    values = torch.tensor([2.0, -1.0, 0.5])
    sites = list(chosen.sites.values())
    for method in ("overwrite", "add", "scale"):
        made = chosen.edits(values, method)
        assert [edit.site for edit in made] == ["action.blocks.0.mlp.hook_post", "action.blocks.2.mlp.hook_post"]
        last = [made[1]]
        _, plain = policy.run_with_cache(inputs, sites[1])
        seen: list[torch.Tensor] = []
        with torch.no_grad():
            policy.run(inputs, [*last, edits.apply(sites[1], lambda value, hook: seen.append(value.clone()))])
        before, after = plain[sites[1]], seen[0]
        expected = before.clone()
        for neuron, value in ((5, 2.0), (3, 0.5)):
            own = before[..., neuron]
            expected[..., neuron] = {"overwrite": own * 0 + value, "add": own + value, "scale": own * value}[method]
        torch.testing.assert_close(after, expected, rtol=0, atol=0)
    with pytest.raises(InputError, match="overwrite"):
        chosen.edits(1.0, "set")
    with pytest.raises(InputError, match="3 neurons"):
        chosen.edits([1.0, 2.0])


def test_promoting_neurons_are_those_of_the_largest_products(policy: cv.HookedModel) -> None:
    tower = policy.language
    word, other = policy.token("red"), policy.token("blue")
    rows = torch.stack([tower.blocks[layer].W_out for layer in range(2)]).detach().flatten(0, 1)
    products = rows @ policy.module.model.vlm.language_model.embed_tokens.weight.detach().T
    found = promoting_neurons(tower, ["red"], 6)
    assert found.flat == products[:, word].topk(6).indices.tolist()
    assert promoting_neurons(tower, ["red"], 6, largest=False).flat == (-products[:, word]).topk(6).indices.tolist()
    away = promoting_neurons(tower, ["red"], 6, against=["blue"])
    assert away.flat == (products[:, word] - products[:, other]).topk(6).indices.tolist()
    # The last MLP of the prefix reaches nothing: its neurons are in no set.
    assert {layer for layer, _ in promoting_neurons(tower, ["red"], 2 * tower.cfg.d_mlp)} == {0, 1}
    with pytest.raises(InputError, match="output"):
        promoting_neurons(tower, ["red"], 3, layers=2)
    with pytest.raises(InputError, match="list"):
        promoting_neurons(tower, "red", 3)
    with pytest.raises(InputError, match="count"):
        promoting_neurons(tower, ["red"], 1000)


def test_random_sets_have_the_size_of_the_set_in_every_layer_and_none_of_its_neurons(policy: cv.HookedModel) -> None:
    chosen = promoting_neurons(policy.action, [1], 9)
    norms = torch.stack([block.W_out.detach().norm(dim=-1) for block in policy.action.blocks])
    for match in ("layer", "norm"):
        drawn = random_neurons(policy.action, chosen, 30, seed=3, match=match)
        assert [one.places for one in drawn] == [
            one.places for one in random_neurons(policy.action, chosen, 30, seed=3, match=match)
        ]
        assert len({one.places for one in drawn}) == 30
        for one in drawn:
            assert {layer: len(own) for layer, own in one.layers.items()} == {
                layer: len(own) for layer, own in chosen.layers.items()
            }
            assert not set(one.places) & set(chosen.places)
        size = torch.tensor([[float(norms[place]) for place in one] for one in drawn]).mean()
        own = torch.tensor([float(norms[place]) for place in chosen]).mean()
        gap = abs(float(size - own))
        # Chosen vectors are longer than most; sets matched by length are nearly as long.
        assert gap < 0.12 * float(own) if match == "norm" else gap > 0.12 * float(own)
    with pytest.raises(InputError, match="match"):
        random_neurons(policy.action, chosen, match="size")
    with pytest.raises(InputError, match="tower"):
        random_neurons(policy.language, chosen)
    with pytest.raises(InputError, match="other neurons"):
        random_neurons(policy.action, NeuronSet.of(policy.action, [(0, number) for number in range(60)]))


def test_clusters_find_planted_groups_and_their_words(policy: cv.HookedModel) -> None:
    """Value vectors planted along four words: each group is one cluster, named by its word, more cohesive than random vectors."""
    model = cv.organisms.load("reach-pi0")
    tower = model.language
    words = ["red", "green", "blue", "yellow"]
    embedding = model.module.model.vlm.language_model.embed_tokens.weight
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(0, 4, (2, tower.cfg.d_mlp), generator=generator)
    with torch.no_grad():
        for layer in range(2):
            columns = torch.stack([embedding[model.token(word)] for word in words])[group[layer]]
            noise = 0.1 * torch.randn(columns.shape, generator=generator) * columns.norm(dim=-1, keepdim=True) / 8
            model.module.model.vlm.language_model.layers[layer].mlp.down_proj.weight.copy_((columns + noise).T)
    for on in ("tokens", "vectors"):
        found = value_vector_clusters(tower, 4, on=on, top_k=3, draws=2)
        assert found.axes["layer"] == [0, 1]
        assert found.cohesive.all()
        for number in range(4):
            (cluster,) = set(found.values[group == number].tolist())
            assert found.words[cluster][0] == words[number]
            assert found.search([words[number]])[0] == cluster
            assert set(found.neurons(cluster).places) == {
                tuple(place) for place in (group == number).nonzero().tolist()
            }
        assert sum(found.sizes) == group.numel()
    assert list(found.table()["cluster"]) == [0, 1, 2, 3]


def test_random_value_vectors_have_no_cohesive_cluster() -> None:
    model = cv.organisms.load("reach-pi0")
    with torch.no_grad():
        for layer in range(3):
            weight = model.module.model.vlm.language_model.layers[layer].mlp.down_proj.weight
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer)))
    found = value_vector_clusters(model.language, 6, draws=8)
    assert int(found.cohesive.sum()) <= 1


def test_cohesion_is_the_mean_cosine_between_two_members(policy: cv.HookedModel) -> None:
    found = value_vector_clusters(policy.action, 5, on="vectors", draws=1)
    rows = torch.cat([block.W_out.detach() for block in policy.action.blocks]).double()
    rows = rows / rows.norm(dim=-1, keepdim=True)
    for number in range(5):
        own = rows[found.values.flatten() == number]
        cosines = (own @ own.T)[~torch.eye(len(own), dtype=torch.bool)]
        assert float(found.cohesion[number]) == pytest.approx(float(cosines.mean()), abs=1e-6)
    with pytest.raises(InputError, match="cluster"):
        found.neurons(5)
    with pytest.raises(InputError, match="on="):
        value_vector_clusters(policy.action, 5, on="words")
    with pytest.raises(InputError, match="n_clusters"):
        value_vector_clusters(policy.action, 1)


def test_a_set_in_the_place_of_edits_and_a_target_in_the_place_of_a_list_say_what_is_meant(
    policy: cv.HookedModel,
) -> None:
    inputs = policy.inputs(state=torch.zeros(1, 2), text=["reach red"], images=[[torch.zeros(3, 16, 16)]], seed=0)
    chosen = NeuronSet.of(policy.action, [(0, 1), (2, 3)])
    for given in (chosen, [chosen]):
        with pytest.raises(InputError, match=r"A NeuronSet is no edit: .*neurons\.edits"):
            policy.run(inputs, given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a list of outputs, one at least, such as \[1\]"):
        promoting_neurons(policy.action, 1, 2)  # type: ignore[arg-type]
