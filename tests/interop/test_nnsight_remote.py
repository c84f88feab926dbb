"""What may travel to a server, and the keyword that must not be swallowed."""

from __future__ import annotations

import pytest
import torch
from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES

from circuitvision import interop
from circuitvision.errors import InputError, UnknownSiteError
from circuitvision.interop.portable import read, write
from tests.conformance.setting import noise, same
from tests.interop.common import MAIN, adding, wrapped
from tests.parts import module_of
from tests.zoo import CASES

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot reach the output")
SERVERS = [True, "https://example.org"]


def test_plain_nnsight_swallows_the_keyword_so_the_tests_below_can_fail() -> None:
    import nnsight

    model, inputs = wrapped("llava-clip-llama")
    plain = nnsight.NNsight(model.module)
    with torch.no_grad(), plain.trace(**inputs, remote=True):
        logits = plain.output.logits.save()
    same(logits, model(inputs).detach(), "a 'remote' run")


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("server", SERVERS)
def test_remote_raises_wherever_it_can_be_written(server: bool | str, portable: bool) -> None:
    model, inputs = wrapped("llava-clip-llama")
    nn = interop.nnsight(model, portable=portable)
    ran: list[int] = []
    handle = model.module.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(InputError, match="Hub name"), nn.trace(**inputs, remote=server):
        nn.output.logits.save()
    with pytest.raises(InputError, match="Hub name"), nn.vision.trace(inputs["pixel_values"], remote=server):
        nn.vision.output.save()
    with pytest.raises(InputError, match="Hub name"), nn.session(remote=server):
        pass
    with pytest.raises(InputError, match="swallows"), nn.trace() as tracer:  # noqa: SIM117 (nnsight reads each block's source)
        with tracer.invoke(**inputs, remote=server):
            nn.output.logits.save()
    with pytest.raises(InputError, match="swallows"):
        nn(**inputs, remote=server)
    with pytest.raises(InputError, match="swallows"):
        nn.interleave("__call__", **inputs, remote=server)
    with pytest.raises(InputError, match="Hub name"):
        nn.trace(**inputs, remote=server, trace=False)
    handle.remove()
    assert ran == [], "something ran here although a server was asked for"


def test_a_rehearsal_needs_the_portable_view() -> None:
    model, inputs = wrapped("vit")
    nn = interop.nnsight(model)
    with pytest.raises(InputError, match="portable=True"), nn.trace(**inputs, remote="local"):
        nn.vision.blocks[0].attn.hook_z.save()
    portable = interop.nnsight(model, portable=True)
    with pytest.raises(UnknownSiteError, match=r"read\(nn, place\)"), portable.trace(**inputs):
        portable.vision.blocks[0].attn.hook_z.save()
    with pytest.raises(UnknownSiteError, match=r"read\(nn, place\)"), portable.trace(**inputs):
        portable.vision.blocks[0].attn.hook_z = 0


@pytest.mark.parametrize("name", MAIN)
def test_portable_sites_read_and_write_in_a_rehearsal(name: str) -> None:
    model, inputs = wrapped(name)
    nn = interop.nnsight(model, portable=True)
    places = interop.nnsight_places(model)
    assert nn.sites() == list(places)
    kinds = {site.rpartition(".")[2] for site in places}
    assert {
        "hook_resid_pre",
        "hook_resid_mid",
        "hook_resid_post",
        "hook_q",
        "hook_z",
        "hook_attn_out",
        "hook_post",
    } <= kinds
    assert "hook_scale" not in kinds
    one_each = {site.rpartition(".")[2]: site for site in places if not model.is_dead(site)}
    with torch.no_grad():
        clean, cache = model.run_with_cache(inputs, list(places))
        for site in one_each.values():
            place, draw = places[site], noise(cache[site], site)
            expected = model.run_with_hooks(inputs, [(site, adding(draw))])
            with nn.trace(**inputs, remote="local"):
                value = read(nn, place)
                kept = value.save()
                write(nn, place, value + draw)
                output = nn.output.save()
            same(kept, cache[site], f"{site}, read")
            same(output[model.family.output], expected, f"{site}, written")
            assert not torch.equal(expected, clean), site


@pytest.mark.parametrize("name", list(CASES))
def test_portable_reads_equal_the_cache_in_every_family(name: str) -> None:
    model, inputs = wrapped(name)
    nn = interop.nnsight(model, portable=True)
    places = interop.nnsight_places(model, [s for s in nn.sites() if ".blocks." not in s or ".blocks.0." in s])
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, list(places))
        for site, place in places.items():
            with nn.trace(**inputs):
                value = read(nn, place).save()
            same(value, cache[site], site)


def test_the_rehearsal_hides_circuitvision() -> None:
    """Without the registration the functions' source does not travel, and the simulated server must notice."""
    model, inputs = wrapped("vit")
    nn = interop.nnsight(model, portable=True)
    place = interop.nnsight_places(model)["vision.blocks.0.attn.hook_z"]
    _PICKLE_BY_VALUE_MODULES.discard("circuitvision")
    try:
        with pytest.raises(ModuleNotFoundError, match="circuitvision"), nn.trace(**inputs, remote="local"):
            read(nn, place).save()
    finally:
        _PICKLE_BY_VALUE_MODULES.add("circuitvision")


def test_what_arrives_is_plain_nnsight_and_works_there() -> None:
    import nnsight
    from nnsight.intervention.serialization import dumps, loads

    model, inputs = wrapped("llava-clip-llama")
    nn = interop.nnsight(model, portable=True)
    arrived = loads(dumps(nn), nn._remoteable_persistent_objects())
    assert {type(envoy) for envoy in arrived.modules()} == {nnsight.NNsight, nnsight.Envoy}
    place = interop.nnsight_places(model)["vision.blocks.1.attn.hook_z"]
    with torch.no_grad():
        with arrived.trace(**inputs):
            write(arrived, place, read(arrived, place) * 2)
            by_alias = arrived.language.blocks[0].attn.o.input.save()
            output = arrived.output.logits.save()
        with model.hooks([("vision.blocks.1.attn.hook_z", lambda value, hook: value * 2)]):
            expected, cache = model.run_with_cache(inputs, "language.blocks.0.attn.hook_z")
    same(output, expected, "edited on arrival")
    same(by_alias, cache["language", "z", 0].flatten(-2), "by alias")


def test_aliases_fit_nnsights_own_wrapper() -> None:
    """What a remote user builds: nnsight's class for the checkpoint, with our names."""
    import nnsight

    model, inputs = wrapped("llava-clip-llama")
    wrapper = nnsight.NNsight(model.module, rename=interop.nnsight_names(model))
    place = interop.nnsight_places(model)["vision.blocks.1.attn.hook_z"]
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, "vision.blocks.1.attn.hook_z")
        with wrapper.trace(**inputs):
            value = read(wrapper, place).save()
    same(value, cache["vision", "z", 1], "z")
    assert wrapper.vision.blocks[1].attn.o._module is module_of(model.vision.blocks[1], "o")
