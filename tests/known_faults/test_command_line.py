"""Mistakes on the command line and in loading: one line that names the fix, exit code 2, and no switch left behind."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import circuitvision as cv
from circuitvision import cli, metrics, progress
from circuitvision.errors import CircuitVisionError, InputError, UnsupportedModelError
from circuitvision.organisms.registry import DEFAULT
from tests.zoo import CASES, shared_model


def switches() -> dict[str, Any]:
    """Everything that a command could leave behind."""
    logging = transformers.utils.logging
    return {
        "level": progress._state["level"],
        "transformers": (logging.get_verbosity(), logging.is_progress_bar_enabled()),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "random": torch.random.get_rng_state().sum().item(),
        "stdout": getattr(sys.stdout, "errors", None),
    }


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Transformers' bars on, and a terminal that is not utf-8, so that what the command switches can be seen."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.enable_progress_bar()
    logging.set_verbosity_info()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"))
    yield
    logging.disable_progress_bar()
    logging.set_verbosity(level)


COMMANDS = {
    "list": ["organisms", "list"],
    "card": ["organisms", "card", "shapes-vit"],
    "sites": ["sites", "shapes-vit"],
    "no sites": ["sites", "shapes-vit", "nothing.*"],
    "no folder": ["sites", "no/such/folder"],
    "no model": ["quickstart", "--dtype", "float17"],
}


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_no_switch_is_left_behind(command: list[str], quiet: bool, bars: Any) -> None:
    before = switches()
    cli.main([*(["--quiet"] if quiet else []), *command])
    assert switches() == before


def test_quiet_is_quiet_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cli, "_organisms_list", lambda options: seen.append(progress._state["level"]) or 0)
    assert cli.main(["--quiet", "organisms", "list"]) == 0
    assert cli.main(["organisms", "list"]) == 0
    assert seen == ["quiet", "normal"]


def test_mutant_the_switch_is_left_on(monkeypatch: pytest.MonkeyPatch, bars: Any) -> None:
    monkeypatch.setattr(progress, "verbosity", lambda level: progress.set_verbosity(level) or open("/dev/null"))  # noqa: SIM115
    with pytest.raises(AssertionError):
        test_no_switch_is_left_behind(["organisms", "list"], True, bars)
    progress.set_verbosity("normal")


@pytest.mark.parametrize(
    ("command", "model", "glob"),
    [
        ([], DEFAULT, "**"),
        (["shapes-vit"], "shapes-vit", "**"),
        (["some/folder", "vision.**"], "some/folder", "vision.**"),
        (["vision.**"], DEFAULT, "vision.**"),
        (["vision.blocks.0.attn.hook_z"], DEFAULT, "vision.blocks.0.attn.hook_z"),
        (["--model", "shapes-vit"], "shapes-vit", "**"),
        (["vision.**", "--model", "shapes-vit"], "shapes-vit", "vision.**"),
    ],
)
def test_sites_of_a_model(
    command: list[str], model: str, glob: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = []

    class Fake:
        def sites(self, glob: str) -> list[str]:
            asked.append(glob)
            return []

    def load(name: str) -> Any:
        asked.append(name)
        return Fake()

    monkeypatch.setattr("circuitvision.quickstart.load_model", load)
    assert cli.main(["sites", *command]) == 0
    assert asked == [model, glob]


def test_sites_of_an_organism_are_printed(capsys: Any) -> None:
    assert cli.main(["sites", "shapes-vit"]) == 0
    assert "vision.blocks.0.attn.hook_pattern" in capsys.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders and files with something wrong."""
    root = tmp_path_factory.mktemp("broken")
    case = CASES["vit"]
    shared_model("vit").save_pretrained(root / "whole")
    (root / "empty").mkdir()
    for name in ("no weights", "cut off", "foreign weights", "bad json", "unknown type", "no class", "another class"):
        shutil.copytree(root / "whole", root / name)
    (root / "no weights" / "model.safetensors").unlink()
    weights = root / "cut off" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (root / "foreign weights" / "model.safetensors").write_text("not weights")
    (root / "bad json" / "config.json").write_text("{")
    for name, change in {
        "unknown type": {"model_type": "perceptron", "architectures": ["PerceptronModel"]},
        "no class": {"architectures": None},
        "another class": {"architectures": ["ViTMAEForPreTraining"]},
    }.items():
        file = root / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    (root / "note.png").write_text("not a picture")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / "black.png")
    assert case.name == "vit"
    return root


PICTURES = ["--prompt", "<image> what", "--answer", "red", "--foil", "blue"]


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (["sites", "{}/empty"], "config.json"),
        (["sites", "{}/absent"], "config.json"),
        (["sites", "{}/no weights"], "no weights"),
        (["sites", "{}/cut off"], "cut off"),
        (["sites", "{}/foreign weights"], "foreign weights"),
        (["sites", "{}/bad json"], "bad json"),
        (["sites", "{}/unknown type"], "unknown type"),
        (["sites", "{}/no class"], "architectures"),
        (["sites", "{}/another class"], "ViTMAEForPreTraining"),
        (["sites", "shapes-vitt"], "shapes-vit"),
        (["sites", "shapes-vit", "vision.blocks.9.*"], "vision.blocks."),
        (["sites", "shapes-vit", "vision.**", "language.**"], "quote"),
        (["quickstart", "--dtype", "float17"], "float16"),
        (["quickstart", "--dtype", "int8"], "float32"),
        (["quickstart", "--device", "gpu"], "cpu"),
        (["quickstart", "--model", "reach-pi0"], "actions"),
        (["quickstart", "--clean", "{}/absent.png", "--corrupt", "{}/black.png", *PICTURES], "absent.png"),
        (["quickstart", "--clean", "{}/black.png", "--corrupt", "{}/note.png", *PICTURES], "note.png"),
        (["quickstart", "--clean", "{}", "--corrupt", "{}/note.png", *PICTURES], "picture"),
        (["quickstart", "--out", "{}/note.png"], "note.png"),
        (["organisms", "train", "shapes"], "shapes-vit"),
        (["organisms", "train", "shapes-vit", "--out", "{}/note.png"], "note.png"),
    ],
)
@pytest.mark.filterwarnings("ignore:No processor could be loaded")
def test_mistakes_are_one_line_and_code_two(command: list[str], names: str, broken: Path, capsys: Any) -> None:
    assert cli.main([part.format(broken) for part in command]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("circuitvision: ")]
    assert len(lines) == 1
    assert names in lines[0]
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "command",
    [
        ["quickstart", "--seed", "-1"],
        ["quickstart", "--seed", "one"],
        ["quickstart", "--top-k", "0"],
        ["organisms", "train", "shapes-vit", "--seed", "-1"],
        ["organisms", "train", "shapes-vit", "--steps", "0"],
        ["organisms"],
        [],
        ["site"],
    ],
)
def test_arguments_that_mean_nothing(command: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupt(options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_organisms_list", interrupt)
    assert cli.main(["--quiet", "organisms", "list"]) == 130
    assert capsys.readouterr().err == "circuitvision: stopped\n"
    assert progress._state["level"] == "normal"


def test_a_reader_that_has_seen_enough() -> None:
    command = f"{sys.executable} -m circuitvision.cli organisms list | head -c 5"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert "BrokenPipe" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None, True])
def test_seeds_that_are_none(seed: Any, tmp_path: Path) -> None:
    from circuitvision.quickstart import quickstart

    for call in (
        lambda: quickstart(seed=seed, out=tmp_path),
        lambda: cv.data.sample_question_pairs(1, seed=seed),
        lambda: cv.organisms.train("shapes-vit", seed=seed, out=tmp_path / "out", steps=1),
    ):
        with pytest.raises(InputError, match="seed"):
            call()


# ---- wrapping and loading from Python


def test_what_is_wrapped_by_mistake(broken: Path) -> None:
    module = shared_model("vit")
    for wrong, names in (
        (str(broken / "whole"), "from_pretrained"),
        (broken / "whole", "from_pretrained"),
        ("google/vit-base-patch16-224", "from_pretrained"),
        (cv.HookedModel(module), "already"),
        (type(module), "ViTForImageClassification"),
        (module.state_dict(), "OrderedDict"),
        (None, "NoneType"),
        (module.config, "ViTConfig"),
    ):
        with pytest.raises(CircuitVisionError) as caught:
            cv.HookedModel(wrong)
        assert names in str(caught.value)


@pytest.mark.parametrize("dtype", ["float17", "float8", "int8", torch.int8, torch.bool, 32, float, "", "complex64"])
def test_dtypes_that_no_model_computes_in(dtype: Any, broken: Path) -> None:
    with pytest.raises(InputError) as caught:
        cv.HookedModel.from_pretrained(broken / "whole", dtype=dtype)
    assert "float16" in str(caught.value)


@pytest.mark.filterwarnings("ignore:No processor could be loaded")
@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "auto", torch.float16, None])
def test_dtypes_that_models_compute_in(dtype: Any, broken: Path) -> None:
    model = cv.HookedModel.from_pretrained(broken / "whole", dtype=dtype)
    wanted = {"auto": torch.float32, None: torch.float32}.get(dtype, dtype)
    assert str(model.dtype).endswith(str(wanted).removeprefix("torch."))


def test_a_metric_of_something_else_than_the_output() -> None:
    model, case = cv.HookedModel(shared_model("vit")), CASES["vit"]
    inputs = case.inputs(model.module, batch=2)
    with torch.no_grad():
        logits, named = model(inputs), model.module(**inputs)
    for metric in (
        metrics.logit_diff(0, 1),
        metrics.prob(0),
        metrics.kl(logits),
        metrics.action_dim(0),
        metrics.rank(1),
    ):
        for wrong, names in ((inputs, "model(inputs)"), (named, "logits"), ([1.0], "list"), (None, "NoneType")):
            with pytest.raises(InputError) as caught:
                metric(wrong)
            assert names in str(caught.value)
    assert torch.equal(metrics.logit_diff(0, 1)(logits.numpy()), metrics.logit_diff(0, 1)(logits))
    for wrong in ({"answer": 0}, "logit_diff", 3):
        with pytest.raises(InputError, match="metric"):
            model.sweep(inputs, [cv.edits.scale("vision.hook_input", 0.5)], wrong)


# ---- models that no family describes


def config_of(name: str, **settings: Any) -> Any:
    return getattr(transformers, name)(**settings)


@pytest.mark.parametrize(
    ("class_name", "config", "near"),
    [
        ("BeitForImageClassification", "BeitConfig", "DeiTForImageClassification"),
        ("ViTMSNForImageClassification", "ViTMSNConfig", "ViTForImageClassification"),
        ("ViTMSNModel", "ViTMSNConfig", "ViTModel"),
        ("Dinov2Backbone", "Dinov2Config", "Dinov2Model"),
        ("VideoLlavaForConditionalGeneration", "VideoLlavaConfig", "LlavaForConditionalGeneration"),
        ("VipLlavaForConditionalGeneration", "VipLlavaConfig", "LlavaForConditionalGeneration"),
    ],
)
def test_unsupported_classes_name_the_nearest(class_name: str, config: str, near: str, tmp_path: Path) -> None:
    settings = config_of(config)
    settings.architectures = [class_name]
    settings.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError) as caught:
        cv.HookedModel.from_pretrained(tmp_path)
    first, _, rest = str(caught.value).partition("All described classes")
    assert class_name in first
    assert near in first
    assert "register_family" in first
    assert near in rest


def test_parts_that_are_described_are_named(tmp_path: Path) -> None:
    config = config_of("Idefics3Config")
    config.architectures = ["Idefics3ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError) as caught:
        cv.HookedModel.from_pretrained(tmp_path)
    assert "text_config 'llama' is described" in str(caught.value)
    assert "vision_config 'idefics3_vision' is not" in str(caught.value)


def test_a_class_of_ones_own_is_not_loaded_by_name(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from circuitvision.model.spec import FAMILIES, load_tables

    load_tables()
    monkeypatch.setitem(FAMILIES, "LeafClassifier", FAMILIES["ViTForImageClassification"])
    shutil.copytree(broken / "whole", tmp_path / "leaves")
    file = tmp_path / "leaves" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["LeafClassifier"]}))
    with pytest.raises(InputError, match=r"LeafClassifier\.from_pretrained"):
        cv.HookedModel.from_pretrained(tmp_path / "leaves")
