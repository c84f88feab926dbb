"""Hand-built networks: every edge has the effect that is listed for it, by path patching and by plain PyTorch, and confused parts are noticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.organisms import handbuilt
from circuitvision.organisms.handbuilt import vit
from circuitvision.patching import path_patch

NAMES = handbuilt.names()
VITS = [name for name in NAMES if name != "crossing"]
# RMS norms of Llama compute in float32 whatever they are given.
TOLERANCE = {"crossing": 1e-6}


@cache
def built(name: str) -> handbuilt.HandBuilt:
    return handbuilt.build(name)


# -- every edge, by path patching --------------------------------------------------------------------------------------------------------------------


def exact(known: handbuilt.HandBuilt, **options: Any) -> dict[str, float]:
    """The effect of every edge of the graph, corrupt into clean: senders are inputs, heads, MLPs and connectors."""
    tower = {"vision": "v", "language": "l"}
    senders, receivers = {}, {}
    for name, one in known.model.towers.items():
        letter = tower[name]
        for layer in range(one.cfg.n_layers):
            for head in range(one.cfg.n_heads):
                part = f"{letter}.a{layer}.h{head}"
                senders[part] = part
                receivers |= {f"{part}<{slot}>": f"{part}<{slot}>" for slot in "qkv"}
            senders[f"{letter}.m{layer}"] = receivers[f"{letter}.m{layer}"] = f"{letter}.m{layer}"
    senders["v.input"] = "v.input"
    last = tower[list(known.model.towers)[-1]]
    receivers[f"{last}.logits"] = "output"
    if last == "l":
        senders["x.projector"], receivers["x.projector"] = "x.projector", "projector"
    found = path_patch(
        known.model,
        known.pairs,
        known.metric,
        senders={name: [part] for name, part in senders.items()},
        receivers={name: [part] for name, part in receivers.items()},
        mode="noise",
        progress=False,
        **options,
    )
    means = found.mean()
    cells = {
        f"{sender}->{receiver}": float(means[row, column])
        for row, sender in enumerate(found.axes["sender"])
        for column, receiver in enumerate(found.axes["receiver"])
    }
    # A connector's edges lead on; the language tower is reached through it alone.
    return {edge: value for edge, value in cells.items() if value == value and not ("v." in edge and "->l." in edge)}


@pytest.mark.parametrize("name", NAMES)
def test_every_edge_has_the_effect_that_is_listed_and_the_others_have_none(name):
    known = built(name)
    found = exact(known)
    assert known.edges <= set(found)
    assert len(found) > 10
    tolerance = TOLERANCE.get(name, 1e-12)
    for edge, value in found.items():
        assert value == pytest.approx(known.effects.get(edge, 0.0), abs=tolerance), edge


@pytest.mark.parametrize("name", NAMES)
def test_the_metric_of_both_runs_is_what_is_listed(name):
    known = built(name)
    for side, expected in ((known.pairs.clean, known.clean), (known.pairs.corrupt, known.corrupt)):
        (batch,) = side.batches(known.model, 99)
        with torch.no_grad():
            found = known.metric(known.model(batch.inputs))
        assert found.mean().item() == pytest.approx(expected, abs=TOLERANCE.get(name, 1e-12))


# -- by plain PyTorch --------------------------------------------------------------------------------------------------------------------------------


class Plain:
    """A vision transformer of transformers, run on its own modules with a stream of its own for every slot."""

    def __init__(self, module: Any) -> None:
        self.vit, self.classifier = module.vit, module.classifier
        self.heads = module.config.num_attention_heads
        self.letters = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}

    def slots(self) -> list[str]:
        found = []
        for layer in range(len(self.vit.layers)):
            found += [f"v.a{layer}.h{head}<{slot}>" for head in range(self.heads) for slot in "qkv"]
            found.append(f"v.m{layer}")
        return [*found, "v.logits"]

    def run(
        self, pixels: Tensor, changes: Mapping[str, Mapping[str, Tensor]], leaves: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict]:
        """The answer and what every sender writes; ``changes[slot][sender]`` is added to what the slot reads of a sender."""
        sent: dict[str, Tensor] = {"v.input": self.vit.embeddings(pixels)}

        def read(slot: str) -> Tensor:
            stream = torch.stack(list(sent.values())).sum(0)
            for change in changes.get(slot, {}).values():
                stream = stream + change
            if leaves is not None:
                leaves[slot] = stream = stream + torch.zeros_like(stream, requires_grad=True)
                stream.retain_grad()
            return stream

        for layer, block in enumerate(self.vit.layers):
            written = {}
            for head in range(self.heads):
                written[f"v.a{layer}.h{head}"] = self._head(
                    block, head, {slot: read(f"v.a{layer}.h{head}<{slot}>") for slot in "qkv"}
                )
            sent |= written
            hidden = block.mlp.fc1(block.layernorm_after(read(f"v.m{layer}"))).relu()
            sent[f"v.m{layer}"] = block.mlp.fc2(hidden)
        logits = self.classifier(self.vit.layernorm(read("v.logits"))[:, 0])
        return logits[:, 1] - logits[:, 0], sent

    def _head(self, block: Any, head: int, streams: dict[str, Tensor]) -> Tensor:
        size = block.attention.q_proj.out_features // self.heads
        own = slice(head * size, (head + 1) * size)
        q, k, v = (
            getattr(block.attention, self.letters[slot])(block.layernorm_before(stream))[..., own]
            for slot, stream in streams.items()
        )
        pattern = (q @ k.transpose(-1, -2) / size**0.5).softmax(-1)
        return pattern @ v @ block.attention.o_proj.weight[:, own].T + block.attention.o_proj.bias / self.heads


def sides(known: handbuilt.HandBuilt) -> list[Tensor]:
    return [
        next(iter(side.batches(known.model, 99))).inputs["pixel_values"]
        for side in (known.pairs.clean, known.pairs.corrupt)
    ]


@pytest.mark.parametrize("name", VITS)
def test_plain_pytorch_finds_the_same_effects(name):
    known = built(name)
    plain = Plain(known.model.module)
    clean, corrupt = sides(known)
    with torch.no_grad():
        base, sent = plain.run(clean, {})
        _, other = plain.run(corrupt, {})
        for edge, value in known.effects.items():
            sender, receiver = edge.split("->")
            patched, _ = plain.run(clean, {receiver: {sender: other[sender] - sent[sender]}})
            assert (patched - base).mean().item() == pytest.approx(value, abs=1e-12), edge
        unused = [slot for slot in plain.slots() if slot.split("<")[0] != "v.input"]
        for slot in unused:
            if f"v.input->{slot}" not in known.edges:
                patched, _ = plain.run(clean, {slot: {"v.input": other["v.input"] - sent["v.input"]}})
                assert (patched - base).abs().max().item() < 1e-12, slot


def first_order(name: str) -> dict[str, float]:
    """What the gradient at the clean run says of the circuit's edges: ``⟨corrupt − clean, ∂metric / ∂slot⟩``."""
    known = built(name)
    plain = Plain(known.model.module)
    clean, corrupt = sides(known)
    leaves: dict[str, Tensor] = {}
    answer, sent = plain.run(clean, {}, leaves)
    answer.sum().backward()
    with torch.no_grad():
        _, other = plain.run(corrupt, {})
    found = {}
    for edge in known.effects:
        sender, receiver = edge.split("->")
        gradient = leaves[receiver].grad
        assert gradient is not None
        found[edge] = ((other[sender] - sent[sender]) * gradient).sum().item() / len(clean)
    return found


def test_the_numbers_of_the_marker_pointer():
    """−1.9755 exactly and −0.102 to first order: softmax of a score 6 among five tokens."""
    assert round(built("marker-pointer").effects["v.input->v.a0.h0<k>"], 4) == -1.9755
    found = first_order("marker-pointer")
    p, q = (2.718281828459045**6 / (2.718281828459045**6 + 4), 1 / (2.718281828459045**6 + 4))
    expected = -6 * p * (1 - (p - q)) - 6 * q * (1 + (p - q))
    assert found["v.input->v.a0.h0<k>"] == pytest.approx(expected, abs=1e-12)
    assert round(expected, 3) == -0.102
    assert found["v.a0.h0->v.logits"] == pytest.approx(built("marker-pointer").effects["v.a0.h0->v.logits"], abs=1e-12)


def test_where_gradients_tell_nothing():
    assert abs(first_order("saturated-keys")["v.input->v.a0.h0<k>"]) < 1e-12
    assert all(abs(value) < 1e-12 for edge, value in first_order("or").items() if edge != "v.m0->v.logits")
    assert all(abs(value) < 1e-12 for edge, value in first_order("xor").items() if edge != "v.m0->v.logits")
    assert first_order("and") == pytest.approx(dict(built("and").effects), abs=1e-12)


def test_branches_of_an_or_count_together():
    known = built("or")
    plain = Plain(known.model.module)
    clean, corrupt = sides(known)
    with torch.no_grad():
        base, sent = plain.run(clean, {})
        _, other = plain.run(corrupt, {})
        both = {f"v.a0.h{head}": other[f"v.a0.h{head}"] - sent[f"v.a0.h{head}"] for head in (0, 1)}
        patched, _ = plain.run(clean, {"v.m0": both})
    assert (patched - base).mean().item() == pytest.approx(-1.0, abs=1e-12)


# -- confusions --------------------------------------------------------------------------------------------------------------------------------------


def renamed(scores: Mapping[str, float], exchange: tuple[str, str], end: int) -> dict[str, float]:
    """Scores in which two names stand for each other at the sender (0) or at the receiver (1) of every edge."""
    first, second = exchange

    def other(name: str) -> str:
        return name.replace(first, "?").replace(second, first).replace("?", second)

    found = dict(scores)
    for edge in scores:
        ends = edge.split("->")
        ends[end] = other(ends[end])
        found[edge] = scores.get("->".join(ends), 0.0)
    return found


CONFUSIONS = {
    "head of the sender": (("h0", "h1"), 0),
    "head of the receiver": (("h0", "h1"), 1),
    "query and key": (("<q>", "<k>"), 1),
    "value and key": (("<v>", "<k>"), 1),
}


@pytest.mark.parametrize("confusion", CONFUSIONS)
def test_confused_parts_are_noticed_in_several_networks(confusion):
    noticed = []
    for name in NAMES:
        known = built(name)
        scores = {edge: known.effects.get(edge, 0.0) for edge in all_edges(name)}
        mistaken = renamed(scores, *CONFUSIONS[confusion])
        if any(abs(mistaken[edge] - value) > 1e-3 for edge, value in scores.items()):
            noticed.append(name)
    assert len(noticed) >= 2, noticed


@cache
def all_edges(name: str) -> tuple[str, ...]:
    known = built(name)
    if name == "crossing":
        return tuple(exact(known))
    senders, found = ["v.input"], []
    for slot in Plain(known.model.module).slots():
        part = slot.split("<")[0]
        layer = part.split(".")[1][1:] if part != "v.logits" else "9"
        before = [one for one in senders if one == "v.input" or one[3] < layer or (one[2] == "a" and part[2] == "m")]
        found += [f"{one}->{slot}" for one in before]
        if part not in senders:
            senders.append(part)
    return tuple(found)


@pytest.mark.parametrize("positions", ["patches alone", "all but the last"])
def test_dropped_positions_are_noticed_in_several_networks(positions):
    noticed = []
    for name in ("marker-pointer", "and", "q-composition", "crossing"):
        known = built(name)
        last = 6 if name == "crossing" else 5
        kept = list(range(1, 5)) if positions == "patches alone" else list(range(last - 1))
        sender, receiver = (
            ("l.a0.h0", "output")
            if name == "crossing"
            else ("v.input", "v.a0.h0<k>" if name != "and" else "v.a0.h0<v>")
        )
        if positions == "patches alone" and name != "crossing":
            sender, receiver = next(edge for edge in known.edges if edge.endswith("v.logits")).split("->")[0], "output"
        found = path_patch(
            known.model,
            known.pairs,
            known.metric,
            senders=sender,
            receivers=receiver,
            positions=kept,
            mode="noise",
            progress=False,
        )
        edge = next(
            edge for edge in known.edges if edge.startswith(sender) and (receiver in edge or receiver == "output")
        )
        if abs(found.mean().item() - known.effects[edge]) > 1e-3:
            noticed.append(name)
    assert len(noticed) >= 2, noticed


# -- AUROC, noise, files -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("marker-pointer", 1.0, 1.0), ("and", 1.0, 1.0), ("or", 0.6, 0.6), ("crossing", 1.0, 1.0)],
)
def test_exact_edges_find_the_circuit_but_not_the_branches_of_an_or(name, least, most):
    found = {edge: round(value, 9) for edge, value in exact(built(name)).items()}
    assert least <= built(name).auroc(found) <= most


def test_auroc_asks_for_every_edge():
    known = built("and")
    assert known.auroc({edge: known.effects.get(edge, 0.0) for edge in all_edges("and")}) == 1.0
    assert known.auroc({edge: -known.effects.get(edge, 0.0) for edge in all_edges("and")}) == 1.0
    with pytest.raises(InputError, match="no score"):
        known.auroc({"v.a0.h0->v.m0": 1.0, "v.a0.h2->v.m0": 0.0})
    with pytest.raises(InputError, match="one kind"):
        known.auroc(known.effects)


@pytest.mark.parametrize("name", ["marker-pointer", "and", "or", "backup-heads", "crossing"])
def test_noise_gives_every_edge_a_score_and_leaves_the_circuit(name):
    known = handbuilt.build(name, noise=1e-3, seed=3)
    found = exact(known)
    if name in ("and", "or", "marker-pointer"):
        # What the class token starts with is the same in both runs, and it alone asks, is computed on, and read out.
        unchanged = {edge for edge in found if edge.startswith("v.input") and not edge.endswith(("<k>", "<v>"))}
        assert {edge for edge, value in found.items() if value == 0} == unchanged
    for edge, value in found.items():
        assert value == pytest.approx(known.effects.get(edge, 0.0), abs=0.05), edge
    if name in ("marker-pointer", "and", "crossing"):
        assert known.auroc(found) >= 0.99
    if name == "or":
        assert max(abs(found[f"v.a0.h{head}->v.m0"]) for head in (0, 1)) < 1e-4


def parameters(known: handbuilt.HandBuilt) -> dict[str, Tensor]:
    return dict(known.model.module.named_parameters())


def test_noise_is_seeded_and_spares_norms_and_embeddings():
    before, first, again, second = (
        parameters(handbuilt.build("crossing", noise=noise, seed=seed))
        for noise, seed in ((0.0, 0), (1e-3, 0), (1e-3, 0), (1e-3, 1))
    )
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        spared = "norm" in name or "embed" in name
        assert torch.equal(value, before[name]) == spared, name
        assert torch.equal(value, second[name]) == spared, name
    added = torch.cat(
        [
            (value - before[name]).flatten()
            for name, value in first.items()
            if "norm" not in name and "embed" not in name
        ]
    )
    assert added.std().item() == pytest.approx(1e-3, rel=0.1)


@pytest.mark.filterwarnings("ignore:No processor")
@pytest.mark.parametrize("name", ["q-composition", "crossing"])
def test_they_are_models_like_any_other(tmp_path, name):
    known = built(name)
    known.model.module.save_pretrained(tmp_path)
    loaded = cv.HookedModel.from_pretrained(tmp_path, dtype="float64")
    (batch,) = known.pairs.clean.batches(known.model, 99)
    with torch.no_grad():
        assert torch.equal(loaded(batch.inputs), known.model(batch.inputs))


def test_the_feature_that_is_brought_has_its_closed_form():
    """``activation · pattern · (W_dec W_OV w_enc) = ½``, for the feature that is read and not for the one that fires beside it."""
    tower = built("mlp-features").model.towers["vision"]
    carried = tower.W_out[0][:2] @ tower.W_V[1, 0] @ tower.W_O[1, 0] @ tower.W_in[1][:, 0]
    assert (carried / 5).tolist() == pytest.approx([0.5, 0.0], abs=1e-12)
    _, cached = built("mlp-features").model.run_with_cache({"pixel_values": sides(built("mlp-features"))[0]})
    assert cached["vision.blocks.0.mlp.hook_post"][0, 1, :2].tolist() == [1.0, 1.0]


def test_norms_do_nothing_to_the_last_bit():
    known = built("backup-heads")
    (clean, _) = sides(known)
    _, cached = known.model.run_with_cache({"pixel_values": clean})
    block = known.model.module.vit.layers[1]
    stream = cached["vision.blocks.1.hook_resid_pre"]
    assert torch.equal(block.layernorm_before(stream), stream)


def test_building_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    handbuilt.build("and", noise=1e-3)
    handbuilt.build("crossing")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("marker-ponter", {}, "marker-pointer"),
        ("and", {"noise": -1.0}, "noise"),
        ("and", {"noise": float("nan")}, "noise"),
        ("and", {"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_built_is_refused(name, options, said):
    with pytest.raises(InputError, match=said):
        handbuilt.build(name, **options)


def test_gates_are_what_their_names_say():
    tables = {"and": {0: 0, 1: 0, 2: 1}, "or": {0: 0, 1: 1, 2: 1}, "xor": {0: 0, 1: 1, 2: 0}}
    for kind, table in tables.items():
        known = built(kind)
        for bits in ((0, 0), (0, 1), (1, 0), (1, 1)):
            picture = torch.zeros(1, 3, 4, dtype=torch.float64)
            picture[0, :2, 1] = torch.tensor(bits, dtype=torch.float64)
            with torch.no_grad():
                found = known.metric(known.model({"pixel_values": picture.reshape(1, 3, 2, 2)}))
            assert found.item() == pytest.approx(table[sum(bits)], abs=1e-12), (kind, bits)
    assert vit.SATURATED == 40.0
    assert dataclasses.is_dataclass(built("and"))
