"""From a checkpoint name or folder to a Hugging Face module and its processor.

The class is the one the checkpoint's config names, so the family table decides what is supported before weights are read. A family may name its own
way to the processor, where the automatic one needs torchvision.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from circuitvision.errors import InputError, UnsupportedModelError, nearest, warn
from circuitvision.model.spec import FAMILIES, family_of, load_tables, unsupported
from circuitvision.model.tree import base_of, refuse_adapters
from circuitvision.progress import match_verbosity

ADAPTER = "adapter_config.json"


def load_module(
    name: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """The Hugging Face module of a checkpoint, in eval mode.

    Raises InputError if a local folder does not exist or holds no config, UnsupportedModelError if no family describes its class.
    """
    import transformers

    load_tables()
    name = str(name)
    looks_local = name.startswith((".", "/", "~")) or Path(name).exists()
    folder = Path(name).expanduser()
    is_adapter = looks_local and (folder / ADAPTER).is_file()
    if looks_local and not is_adapter and not (folder / "config.json").is_file():
        raise InputError(f"{name} is not a folder with a config.json; save one with model.save_pretrained(folder).")
    if device is not None and device_map is not None:
        raise InputError("Give device or device_map, not both.")
    check_device(device)
    check_dtype(dtype)
    if is_adapter:
        return _with_adapter(str(folder), dtype, device, device_map, **kwargs)
    if not looks_local and name in organism_names():
        raise InputError(
            f"{name} is an organism that ships with circuitvision: circuitvision.organisms.load({name!r})."
        )
    place = str(folder) if looks_local else name
    own = _own_class(place)
    if own is not None:
        return _loaded(own, place, dtype, device, device_map, **kwargs)
    try:
        config = transformers.AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        if not looks_local and _holds_adapter(name):
            return _with_adapter(name, dtype, device, device_map, **kwargs)
        if looks_local:
            raise UnsupportedModelError(
                f"The config.json of {name} cannot be read by transformers {transformers.__version__}: {_first_line(error)}"
            ) from error
        raise InputError(
            f"{name} is neither a folder here nor a checkpoint that could be fetched: {_first_line(error)}"
        ) from error
    class_names = list(getattr(config, "architectures", None) or ())
    class_name = next((cls for cls in class_names if cls in FAMILIES), None)
    if class_name is None:
        raise unsupported(class_names, config, name)
    loader: Any = getattr(transformers, class_name, None)
    if loader is None:
        raise InputError(
            f"{class_name} is no class of transformers: load it yourself and wrap it, HookedModel({class_name}.from_pretrained({name!r}))."
        )
    return _loaded(loader, place, dtype, device, device_map, **kwargs)


def _own_class(place: str) -> Any:
    """The class of this package that reads a checkpoint, where transformers ships none; None for others. Remote code is never asked for."""
    from transformers.utils import cached_file

    try:
        found = cached_file(place, "config.json")
        model_type = json.loads(Path(str(found)).read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    own = {family.own_class for family in FAMILIES.values() if family.own_class is not None}
    return next((cls for cls in (make() for make in own) if cls.config_class.model_type == model_type), None)


def _loaded(
    loader: Any, place: str, dtype: Any, device: torch.device | str | None, device_map: Any, **kwargs: Any
) -> nn.Module:
    """What a class loads from a checkpoint, in eval mode."""
    options = {
        key: value for key, value in {"dtype": dtype, "device_map": device_map, **kwargs}.items() if value is not None
    }
    try:
        with match_verbosity():
            module = loader.from_pretrained(place, **options)
    except Exception as error:
        # A missing, cut off or foreign file of weights, a missing package: safetensors raises a type of its own.
        if isinstance(error, (OSError, ImportError, RuntimeError)) or "safetensors" in type(error).__module__:
            raise InputError(f"The weights of {place} could not be loaded: {_first_line(error)}") from error
        raise
    if device is not None:
        module = module.to(device)
    return module.eval()


def _holds_adapter(name: str) -> bool:
    """Whether a checkpoint of the Hub is an adapter."""
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name) is not None
    except (OSError, ValueError):
        return False


def _with_adapter(name: str, *args: Any, **kwargs: Any) -> nn.Module:
    """The model that an adapter was made for, with the adapter on it (``peft.PeftModel``)."""
    try:
        import peft
    except ImportError as error:
        raise InputError(
            f"{name} holds an adapter ({ADAPTER}), not a whole model; loading it needs peft: pip install peft."
        ) from error
    config = peft.PeftConfig.from_pretrained(name)
    refuse_adapters({name: config})
    base = config.base_model_name_or_path
    if not base:
        raise InputError(
            f"{name} holds an adapter that does not say for which model (base_model_name_or_path). Load the model, put the adapter on it with "
            "peft.PeftModel.from_pretrained(model, folder), and wrap the result: HookedModel(model)."
        )
    with match_verbosity():
        return peft.PeftModel.from_pretrained(load_module(base, *args, **kwargs), name).eval()


def organism_names() -> list[str]:
    """The names of what ships with the package, which no hub knows; looked up by name, for the core stands above the organisms."""
    return list(importlib.import_module("circuitvision.organisms.registry").names())


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def refuse_no_module(module: Any) -> None:
    """Raise InputError for what is wrapped by mistake: a name, a folder, a wrapped model, a class."""
    if isinstance(module, (str, Path)):
        raise InputError(
            f"HookedModel wraps a module; a name or folder is loaded by HookedModel.from_pretrained({str(module)!r})."
        )
    if isinstance(getattr(module, "module", None), nn.Module) and hasattr(module, "towers"):
        raise InputError(
            "This model is wrapped already; use it as it is, or wrap its module: HookedModel(model.module)."
        )
    if not isinstance(module, nn.Module):
        kind = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
        raise InputError(
            f"HookedModel wraps a Hugging Face module, not {kind}; HookedModel.from_pretrained(folder) loads one."
        )


def check_dtype(dtype: Any) -> None:
    """Raise InputError for a dtype that no model computes in; None and "auto" pass."""
    known = {name: value for name in FLOATS if isinstance(value := getattr(torch, name), torch.dtype)}
    if dtype is None or dtype == "auto" or dtype in known.values():
        return
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, str) or name not in known:
        raise InputError(
            f"dtype={name!r} is not one that models compute in: {', '.join(nearest(name, known, len(known)))}."
        )


FLOATS = ("float32", "bfloat16", "float16", "float64")


def check_device(device: Any) -> None:
    """Raise InputError for a device that PyTorch does not know, or a GPU that is not there; anything that is no device passes."""
    if not isinstance(device, (str, torch.device)):
        return
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"{device!r} is no device; give 'cpu', 'cuda' or 'cuda:0'.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"There is no GPU for {device!r} here, or this PyTorch was built without CUDA; use 'cpu'.")


def load_processor(name: str | Path, module: nn.Module) -> Any:
    """The processor of a checkpoint, or its image processor or tokenizer alone, or None with a warning."""
    import transformers

    errors = []
    family = family_of(base_of(module))
    names = [str(name)]
    if (Path(name).expanduser() / ADAPTER).is_file() or base_of(module) is not module:
        # An adapter is seldom saved with a processor: its model's serves.
        configs: Any = getattr(module, "peft_config", {})
        names += [config.base_model_name_or_path for config in configs.values() if config.base_model_name_or_path]
    attempts: list[Any] = [transformers.AutoProcessor, transformers.AutoImageProcessor, transformers.AutoTokenizer]
    if len(family.towers) == 1 and not family.image_token:
        # AutoProcessor makes up a tokenizer for some image-only checkpoints, or forgets their image settings.
        attempts = [transformers.AutoImageProcessor]
    if family.processor is not None:
        attempts = [family.processor]
    for attempt, place in [(attempt, place) for place in names for attempt in attempts]:
        try:
            load = getattr(attempt, "from_pretrained", attempt)
            return load(place)
        except (
            Exception
        ) as error:  # transformers raises OSError, ValueError, ImportError, KeyError … for a missing piece
            reason = (str(error) or type(error).__name__).splitlines()[0]
            errors.append(f"{getattr(attempt, '__name__', attempt)}: {reason}")
    warn(
        f"No processor could be loaded from {name}; model.inputs(images=…, text=…) is not available, tensors made by hand "
        f"work. ({'; '.join(errors)})"
    )
    return None
