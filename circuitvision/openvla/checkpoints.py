"""From a released folder (or its name on the Hub) to the module: sizes, names and statistics are checked before a weight is placed.

``config.json`` of a released checkpoint points to remote code; that code is never run. Sizes that a config leaves to timm's ids are measured from the
weights; numbers of heads, which weights do not show, are those of timm's models where the sizes are. ``dataset_statistics.json``, which fine-tuning
writes beside the weights, adds to the norm statistics of the config.

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
from circuitvision.openvla.configuration import TIMM_IDS, OpenVLAConfig, backbone
from circuitvision.openvla.conversion import MASK_TOKEN, RELEASED, from_released, to_released

if TYPE_CHECKING:
    from circuitvision.openvla.modeling import OpenVLAForActionPrediction

_FILES = ["*.json", "*.safetensors", "tokenizer.model"]


def load(
    cls: type[OpenVLAForActionPrediction],
    name_or_folder: str | Path,
    *,
    config: OpenVLAConfig | None = None,
    vision_config: Mapping[str, Any] | None = None,
    vision_2_config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> OpenVLAForActionPrediction:
    """A released checkpoint in eval mode; further keywords go to transformers' ``from_pretrained`` (``device_map``, ``attn_implementation`` …).

    ``vision_config`` and ``vision_2_config`` say of the backbones what ``config.json`` does not, such as ``{"num_attention_heads": 2}``.

    Raises:
        InputError: a folder without weights, weights of other names or shapes than this config's, numbers of heads that nothing says.
    """
    folder = local(name_or_folder)
    released = read_weights(folder)
    config = read_config(folder, released, vision_config, vision_2_config) if config is None else config
    weights = from_released(released)
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


def read_config(
    folder: Path,
    weights: Mapping[str, Tensor],
    vision_config: Mapping[str, Any] | None = None,
    vision_2_config: Mapping[str, Any] | None = None,
) -> OpenVLAConfig:
    """The config of a folder with released weights, with the norm statistics that lie beside it, and the sizes of its backbones.

    Raises:
        InputError: numbers of heads that nothing says.
    """
    entries = json.loads((folder / "config.json").read_text())
    for index, (name, said) in enumerate((("vision_config", vision_config), ("vision_2_config", vision_2_config))):
        seen = _measured(weights, index)
        given = {**seen, **(entries.get(name) or {}), **(said or {})}
        if seen and "num_attention_heads" not in given:
            given["num_attention_heads"] = _heads(folder, name, seen, entries.get("timm_model_ids", TIMM_IDS)[index])
        if given:
            entries[name] = given
    config = OpenVLAConfig.from_dict(entries)
    beside = folder / "dataset_statistics.json"
    if beside.is_file():
        config.norm_stats = {**config.norm_stats, **json.loads(beside.read_text())}
    return config


def _heads(folder: Path, name: str, seen: Mapping[str, Any], timm_id: str) -> int:
    """The heads of a backbone that is the size of timm's; InputError for another one."""
    known = backbone(timm_id)
    if any(known.get(size) != seen[size] for size in ("hidden_size", "num_hidden_layers")):
        raise InputError(
            f"{folder} does not say how many heads its {name.removesuffix('_config')} backbone has ({seen['num_hidden_layers']} blocks of "
            f"{seen['hidden_size']}, which is no {timm_id}): give {name}={{'num_attention_heads': …}}, here or in its config.json."
        )
    return int(known["num_attention_heads"])


def _measured(weights: Mapping[str, Tensor], index: int) -> dict[str, Any]:
    """The sizes of a backbone that its released weights show; none where they are not there."""
    prefix = RELEASED[index]
    patches, wide = (weights.get(prefix + name) for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"))
    if patches is None or wide is None:
        return {}
    blocks = {name.removeprefix(prefix).split(".")[1] for name in weights if name.startswith(f"{prefix}blocks.")}
    width = patches.shape[0]
    sizes = {"hidden_size": width, "num_hidden_layers": len(blocks), "patch_size": patches.shape[-1]}
    if index == 1:
        return {**sizes, "intermediate_size": wide.shape[0]}
    registers = weights.get(f"{prefix}reg_token")
    return {
        **sizes,
        "mlp_ratio": wide.shape[0] // width,
        "num_register_tokens": 0 if registers is None else registers.shape[1],
    }


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
    if missing and len(missing) == len(wanted):
        raise InputError(
            f"{folder} holds no released OpenVLA: none of its {len(weights)} weights ({', '.join(other[:3])}, …) has a released name "
            f"({', '.join(list(to_released(wanted))[:2])}, …)."
        )
    both = wanted.keys() & weights.keys()
    sizes = [(name, tuple(weights[name].shape), tuple(wanted[name].shape)) for name in both]
    wrong = [f"{name} {found}, not {asked}" for name, found, asked in sorted(sizes) if found != asked]
    if wrong:
        raise InputError(
            f"The weights of {folder} have other shapes than its config asks for: {'; '.join(wrong[:3])}. Its text_config, image_sizes, "
            "vision_config and vision_2_config say them."
        )
    if missing or other:
        raise InputError(
            f"The weights of {folder} are not those of a released OpenVLA: {len(missing)} are missing ({', '.join(missing[:3])}), "
            f"{len(other)} have other names ({', '.join(other[:3])})."
        )
