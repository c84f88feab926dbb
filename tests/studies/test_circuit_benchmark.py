"""The benchmark of circuits: known circuits are found where they must be, and the command writes its table."""

from __future__ import annotations

import pytest

from circuitvision.cli import main
from circuitvision.errors import InputError
from circuitvision.organisms import handbuilt
from circuitvision.studies import circuit_benchmark


def test_every_method_finds_what_it_must():
    found = circuit_benchmark(
        ["marker-colour", "or", "saturated-keys"],
        ["eap", "eap-ig", "mask-ig", "exact", "acdc", "random"],
        organisms=[],
        noises=[0.0],
        progress=False,
    ).to_frame()
    table = found.pivot_table(index="network", columns="method", values="auroc")
    assert (table.loc["marker-colour", ["eap", "eap-ig", "mask-ig", "exact", "acdc"]] >= 0.99).all()
    assert (table.loc["or", ["eap-ig", "mask-ig"]] >= 0.99).all()
    assert table.loc["or", "exact"] <= 0.65
    assert table.loc["saturated-keys", "exact"] >= 0.99
    passes = found.groupby("method").passes.first()
    assert passes["eap"] == 3
    # Of a circuit that is ranked first, a small share of the edges keeps the answer; of the wrong ones it does not.
    first = found[found.network == "marker-colour"].set_index("method")
    assert first.log_area["exact"] > first.log_area["random"]


def test_what_is_not_there_is_refused():
    with pytest.raises(InputError, match="marker-pointer"):
        circuit_benchmark(["marker-painter"], organisms=[])
    with pytest.raises(InputError, match="method"):
        circuit_benchmark(["and"], ["guess"], organisms=[])


def test_the_command_writes_its_table(tmp_path, capsys):
    out = tmp_path / "table.md"
    code = main(
        ["benchmark", "circuits", "--networks", "and", "--methods", "eap", "random", "--organisms", "--out", str(out)]
    )
    assert code == 0
    text = out.read_text()
    assert "| and | 0.001 | eap |" in text
    assert "auroc" in capsys.readouterr().out


@pytest.mark.slow
def test_all_networks_and_organisms():
    found = circuit_benchmark(methods=["eap", "random"], organisms=["shapes-llava"], pairs=8, progress=False).to_frame()
    assert set(found.network) == {*handbuilt.names(), "shapes-llava"}
    own = found[found.network == "shapes-llava"].set_index("method")
    assert own.auroc.isna().all()
    assert own.log_area["eap"] > own.log_area["random"]
