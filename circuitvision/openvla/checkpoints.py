"""From a released folder (or its name on the Hub) to the module: sizes, names and statistics are checked before a weight is placed.

``config.json`` of a released checkpoint points to remote code; that code is never run. Sizes that a config leaves to timm's ids are compared with the
weights. ``dataset_statistics.json``, which fine-tuning writes beside the weights, adds to the norm statistics of the config.

Not covered: pickled weights (``.bin``, ``.pt``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.openvla.configuration import OpenVLAConfig
from circuitvision.openvla.conversion import MASK_TOKEN, from_released, to_released

if TYPE_CHECKING:
    from circuitvision.openvla.modeling import OpenVLAForActionPrediction

_FILES = ["*.json", "*.safetensors", "tokenizer.model"]


def load(
    cls: type[OpenVLAForActionPrediction],
    name_or_folder: str | Path,
    *,
    config: OpenVLAConfig | None = None,
    dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> OpenVLAForActionPrediction:
    """A released checkpoint in eval mode; further keywords go to transformers' ``from_pretrained`` (``device_map``, ``attn_implementation`` …).

    Raises:
        InputError: a folder without weights, weights of other names or shapes than this config's.
    """
    folder = local(name_or_folder)
    config = read_config(folder) if config is None else config
    weights = from_released(read_weights(folder))
    check(cls, config, weights, folder)
    weights.setdefault(
        MASK_TOKEN, weights["vision.embeddings.cls_token"].new_zeros(1, config.vision_config.hidden_size)
    )
    if dtype is None or dtype == "auto":
        # As transformers does: what the config says, or what is stored.
        dtype = config.dtype or next(iter(weights.values())).dtype
    load_state: Any = super(cls, cls).from_pretrained
    module = load_state(None, config=config, state_dict=weights, dtype=dtype, **kwargs)
    module.name_or_path = str(name_or_folder)
    module.config._name_or_path = str(name_or_folder)
    return module.eval()


def local(name_or_folder: str | Path) -> Path:
    """The folder of a checkpoint; one of the Hub is fetched (weights and settings, no code)."""
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name_or_folder), allow_patterns=_FILES))


def read_config(folder: Path) -> OpenVLAConfig:
    """The config of a folder, with the norm statistics that lie beside it."""
    config = OpenVLAConfig.from_dict(json.loads((folder / "config.json").read_text()))
    beside = folder / "dataset_statistics.json"
    if beside.is_file():
        config.norm_stats = {**config.norm_stats, **json.loads(beside.read_text())}
    return config


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, by their names there. Raises InputError if it holds none."""
    from safetensors import safe_open

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no weights: no file model*.safetensors is in it.")
    out: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            out.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return out


def check(
    cls: type[OpenVLAForActionPrediction], config: OpenVLAConfig, weights: Mapping[str, Tensor], folder: Path
) -> None:
    """Raise InputError unless converted weights have the names and shapes that a config asks for."""
    with torch.device("meta"):
        wanted = {name: value for name, value in cls(config).state_dict().items() if name != MASK_TOKEN}
    missing, other = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys() - {MASK_TOKEN})
    layers = {name for name in (*missing, *other) if ".layer" in name or ".blocks." in name}
    if missing and len(missing) == len(wanted):
        raise InputError(
            f"{folder} holds no released OpenVLA: none of its {len(weights)} weights ({', '.join(other[:3])}, …) has a released name "
            f"({', '.join(list(to_released(wanted))[:2])}, …)."
        )
    sizes = [
        f"{name} {tuple(weights[name].shape)} for {tuple(wanted[name].shape)}"
        for name in wanted.keys() & weights.keys()
        if weights[name].shape != wanted[name].shape
    ]
    if sizes or (layers and len(layers) == len(missing) + len(other)):
        found = ", ".join(sorted(sizes)[:3]) or f"blocks too {'many' if other else 'few'} ({(other or missing)[0]})"
        raise InputError(
            f"The weights of {folder} have other sizes than its config says or timm's {' and '.join(config.timm_model_ids)} have: {found}. Say the "
            "sizes in its config.json, as vision_config and vision_2_config = {hidden_size, num_hidden_layers, num_attention_heads, …}."
        )
    if missing or other:
        raise InputError(
            f"The weights of {folder} are not those of a released OpenVLA: {len(missing)} are missing ({', '.join(missing[:3])}), "
            f"{len(other)} have other names ({', '.join(other[:3])})."
        )
