"""The command: what it prints, what it writes, and one clear line with exit code 2 for a mistake."""

from __future__ import annotations

import subprocess
import sys

import pytest

import circuitvision
from circuitvision import organisms
from circuitvision.cli import main
from tests.zoo import case


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert circuitvision.__version__ in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["quickstart", "--help"])
    assert "--corrupt" in capsys.readouterr().out


def test_organisms_are_listed(capsys):
    assert main(["organisms", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in organisms.names())


def test_sites_of_a_folder(folder_of, capsys):
    folder = str(folder_of(case("llava-clip-llama")))
    assert main(["sites", "*.blocks.*.attn.hook_z", "--model", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "vision.blocks.0.attn.hook_z" in lines
    assert "vision.blocks.2.attn.hook_z   (cannot reach the output)" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["organisms", "card", "shapes-lava"], "shapes-llava"),
        (["sites", "--model", "no/such/folder"], "no/such/folder"),
        (["quickstart", "--answer", "red"], "missing"),
    ],
)
def test_mistakes_are_one_line_and_code_two(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("circuitvision: ")
    assert message in captured.err
    assert captured.out == ""


def test_importing_the_command_loads_nothing_heavy():
    code = "import sys, circuitvision, circuitvision.cli; print([m for m in ('torch','plotly','pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
