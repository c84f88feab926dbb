"""The table of organisms: names, folders, cards, and errors before anything is trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from circuitvision import organisms
from circuitvision.errors import InputError
from circuitvision.organisms import registry


def test_the_names() -> None:
    assert organisms.names() == [
        "shapes-vit",
        "shapes-clip",
        "shapes-llava",
        "scenes-vit",
        "spurious-vit",
        "scenes-clip",
        "scenes-llava",
        "reach-pi0",
    ]


@pytest.mark.parametrize("name", registry.TABLE)
def test_every_module_trains_and_evaluates(name: str) -> None:
    module = registry.module(name)
    assert callable(module.train)
    assert callable(module.evaluate)


@pytest.mark.parametrize("name", registry.TABLE)
def test_every_folder_is_complete_small_and_of_the_promised_class(name: str) -> None:
    folder = organisms.path(name)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [registry.TABLE[name].model_class]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_000_000
    assert organisms.card(name)
    assert (folder / "README.md").is_file()


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(InputError, match="shapes-llava"):
        organisms.path("shape-llava")
    with pytest.raises(InputError, match="reach-pi0"):
        organisms.train("reach_pi0", out="nowhere")
    assert not Path("nowhere").exists()


def test_training_refuses_to_replace_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("only copy")
    with pytest.raises(InputError, match="not a model folder"):
        organisms.train("shapes-vit", out=tmp_path, steps=1)
    assert (tmp_path / "thesis.txt").read_text() == "only copy"


def test_missing_weights_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "assets" / "organisms").mkdir(parents=True)
    monkeypatch.setattr(registry, "PACKAGE", tmp_path / "circuitvision")
    with pytest.raises(InputError, match="circuitvision organisms train shapes-vit"):
        organisms.path("shapes-vit")


def test_a_wheel_keeps_its_weights_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "circuitvision" / "_assets" / "organisms" / "shapes-vit"
    inside.mkdir(parents=True)
    (inside / "config.json").write_text("{}")
    monkeypatch.setattr(registry, "PACKAGE", tmp_path / "circuitvision")
    assert organisms.path("shapes-vit") == inside


def test_neither_place_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PACKAGE", tmp_path / "circuitvision")
    with pytest.raises(InputError, match="reinstall"):
        organisms.path("shapes-vit")


def test_listing_organisms_loads_no_model_library() -> None:
    code = "import sys, circuitvision.organisms as o; o.names(); assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line_names_the_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    from circuitvision.organisms.__main__ import main

    with pytest.raises(SystemExit):
        main(["shapes-vitt"])
    assert "shapes-vit" in capsys.readouterr().err
