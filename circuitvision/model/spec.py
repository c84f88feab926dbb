"""What a family file may say: where the parts of an architecture live, and nothing else.

A *block layout* (``block_layout.py``) names the parts of one transformer block, a *stack* those of one transformer (embeddings, blocks, final
norm), and a *family* says which stacks a Hugging Face class holds under which tower names, what its output is and what its heads read. Everything
that hooks, reads, edits or documents a model derives from these tables: a method never asks which family it was given.

Paths are dotted attribute paths. A tuple of paths means "the first that exists", for layouts that moved between transformers versions.

Not covered: stacks whose streams are several (hyper-connections).
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from torch import nn

from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.model.block_layout import Layout, Writer
from circuitvision.model.flow import Connector, Flow, Path
from circuitvision.model.packing import Packing
from circuitvision.model.weights import computing

Runs = Literal["once", "per_token", "per_denoising_step"]


@dataclass(frozen=True)
class NormSpec:
    """How a normalisation module computes: ``out = x_hat * (offset + weight) + bias`` with ``x_hat = centre(x) / scale``.

    ``centred`` subtracts the mean (LayerNorm), ``eps`` names the attribute that holds epsilon, ``offset`` is what is added to the weight
    (1 for Gemma), ``upcast`` says that statistics are taken in float32 whatever the dtype, ``gain_upcast`` that the gain is applied there too.
    """

    eps: str
    centred: bool = False
    offset: float = 0.0
    upcast: bool = False
    gain_upcast: bool = False


@dataclass(frozen=True)
class Stack:
    """Paths inside one transformer, relative to its root module.

    Attributes:
        blocks: the ModuleList or Sequential of its blocks.
        block: the layout of a block, or a function that gives it for each (kinds of blocks may differ by layer).
        final_norm: the norm behind the last block; None for none.
        embed: the module whose output is the patch or token embedding, before positions are added.
        embeddings: the module that adds the position embedding; None where there is none, or none of its own.
        position: how it does that: a table of texts, or of patches (stretched to other sizes on request or always, or resized to every image);
            "rotary" where positions enter inside attention alone, and images may have any size. ``position_weight`` is the table: the name of the
            parameter or module (an ``nn.Embedding`` itself, without ``.weight``) that ``embeddings`` holds.
        prefix: kinds of the tokens before the patches; ``register`` is repeated ``num_register_tokens`` times.
        attention: which positions see which.
        image: whether it reads pictures.
        writers: what the tower's own code adds to the stream between blocks.
    """

    blocks: Path
    block: Layout
    final_norm: Path | None
    embed: Path
    embeddings: Path | None = None
    position: Literal["none", "table", "grid", "grid_always", "resized", "rotary"] = "none"
    position_weight: str | None = None
    prefix: tuple[str, ...] = ()
    attention: Literal["causal", "bidirectional", "by_mask"] = "bidirectional"
    image: bool = False
    writers: tuple[Writer, ...] = ()


@dataclass(frozen=True)
class Readout:
    """How a tower's final residual becomes the family's output.

    ``pool`` names the rule, ``norm_first`` says whether the final norm precedes pooling, ``normed`` whether it is applied at all. ``head`` is the
    module that reads the result (absolute path); ``finish`` is what follows it. ``reads`` lists the kinds of positions of the last live
    block that reach the output ("*" = all, empty = none).
    """

    pool: str = "none"
    head: Path | None = None
    finish: Literal["none", "softcap", "contrast", "mean_heads"] = "none"
    norm_first: bool = True
    normed: bool = True
    reads: tuple[str, ...] = ("*",)
    tied_lens: Path | None = None
    """An embedding whose transpose serves as a lens where the tower has no head of its own."""
    pool_module: Path | None = None
    second_head: Path | None = None


@dataclass(frozen=True)
class TowerSpec:
    """One tower of a family: its name, where it is, and how it is read out.

    Attributes:
        name: as in ``vision.blocks.0.attn.hook_z``.
        root: where it is in the module; "" is the module itself.
        config: where its config is in the module's; "" is the whole.
        readout: how its last residual becomes the output; None where another tower does that.
        stack: its layout, where the ``model_type`` of its config names none.
        feature_layers: which hidden states leave it, where it is not the last one: the attribute of its config that says it, or their numbers, where
            the code fixes them (0 is what enters block 0, −2 what leaves the second-to-last block).
        feature_select: the attribute of the config that says whether the class position leaves it.
        embed: the embedding module, where it is not inside the tower.
        attention: who sees whom, where that is not as its stack says.
        n_heads, n_kv_heads: how many there are, or what its config calls that (the first name it has; without a second one, as many as heads).
        runs: how often it runs in one call of the model: once, for each new token of ``generate``, or for each step of ``sample_actions``.
    """

    name: str
    root: Path = ""
    config: str = ""
    readout: Readout | None = None
    stack: Stack | None = None
    feature_layers: str | int | tuple[int, ...] | None = None
    feature_select: str | None = None
    runs: Runs = "once"
    n_heads: str | tuple[str, ...] | int = "num_attention_heads"
    n_kv_heads: str | tuple[str, ...] | int = "num_key_value_heads"
    embed: Path | None = None
    attention: Literal["causal", "bidirectional", "by_mask"] | None = None


@dataclass(frozen=True)
class Family:
    """One architecture family: which classes it serves, its towers, and the tensor ``model(inputs)`` returns; ``docs/families.md`` has examples.

    Attributes:
        name: of the family.
        classes: names of the module's class; subclasses are meant as well.
        towers: in the order in which they run.
        output: the entry of the forward's output that ``model(inputs)`` returns.
        connectors: how the towers feed each other, in the order in which they run; none where they are compared at the end.
        answer: the tower whose head gives the output; "" for the last.
        packing: how images become rows of the vision tower and positions of prompts.
        image_token: attributes of the config that may hold the id of the image token, the first that exists.
        required: inputs without which the forward would draw random numbers or fail.
        drawn: fills them in for inputs that lack them, of the config, the inputs and a generator; what it needs that is missing is an InputError.
        auto_class: the class of transformers that loads a checkpoint.
        suffix_kinds: of a config: the kinds of an action tower's positions.
        processor: how to load a checkpoint's processor, where AutoProcessor cannot.
        own_class: the class, where transformers ships none: it loads every checkpoint whose ``model_type`` is that of its ``config_class``.
        action_values: of a config: the ids of the output head that say an action, with the (normalised) value that each says.
        act: the actions ``[example step dim]`` of a wrapped model for inputs under edits, ``act(model, inputs, edits, **options)``, where it says
            them in tokens; models that sample actions need none.
        image_settings: settings of the image processor that its full processor forgets.
        text_padding: how the text tower expects short prompts to be filled up.
    """

    name: str
    classes: tuple[str, ...]
    towers: tuple[TowerSpec, ...]
    output: str
    connectors: tuple[Connector, ...] = ()
    answer: str = ""
    packing: Packing = field(default_factory=Packing)
    image_token: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    auto_class: str = "AutoModel"
    drawn: Callable[[Any, Mapping[str, Any], torch.Generator], Mapping[str, torch.Tensor]] | None = None
    suffix_kinds: Callable[[Any], Sequence[str]] | None = None
    processor: Callable[[str], Any] | None = None
    own_class: Callable[[], Any] | None = None
    action_values: Callable[[Any], Mapping[int, float]] | None = None
    act: Callable[..., Any] | None = None
    image_settings: tuple[str, ...] = ()
    text_padding: Literal["longest", "max_length"] = "longest"

    def tower_that_runs(self, runs: Runs) -> str:
        """The name of the first tower that runs so often; "" if there is none."""
        return next((tower.name for tower in self.towers if tower.runs == runs), "")

    @cached_property
    def flow(self) -> Flow:
        """The graph of towers and connectors."""
        return Flow([tower.name for tower in self.towers], self.connectors, self.answer)


FAMILIES: dict[str, Family] = {}
"""Class name of a Hugging Face module -> its family."""
STACKS: dict[str, Stack] = {}
"""model_type of a (sub-)config -> the stack it builds."""
DRAWS: dict[str, tuple[str, ...]] = {}
"""Class name of a module -> the entries of its config that make it draw random numbers in training mode, unless they are None."""
NORMS: dict[str, NormSpec] = {}
"""Class name of a normalisation module -> how it computes."""


def norm_spec(module: nn.Module) -> NormSpec:
    """How a normalisation module computes; raises UnsupportedModelError for a class no family file describes."""
    module = computing(module)
    for cls in type(module).__mro__:
        if cls.__name__ in NORMS:
            return NORMS[cls.__name__]
    if isinstance(module, nn.Identity):
        # Some classes put one in the place of a norm that another setting of their config would have.
        raise UnsupportedModelError(
            "An Identity stands where the table names a norm, so nothing is normalised there: name none (norm=None, final_norm=None), or the "
            "module that does normalise, wherever it is (a pooler)."
        )
    raise UnsupportedModelError(
        f"{type(module).__name__} is a norm that nobody described: circuitvision.register_norm(NormSpec(…), {type(module).__name__!r}). Known: "
        f"{', '.join(NORMS)}."
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a family file describes this module as a norm."""
    return type(computing(module)).__name__ in NORMS


def load_tables() -> None:
    """Let the family files register themselves; the one place where the core reaches down, and it does so by name only."""
    importlib.import_module("circuitvision.families")


def register_family(family: Family) -> Family:
    """Add a family to the table, beside the shipped ones. Registered again under its name, it takes its own place; models wrapped before keep theirs.

    Raises InputError, which is a ValueError, if one of its classes is a shipped family's or another's, or if the table says what cannot be.
    """
    load_tables()
    _check_table(family)
    shipped: frozenset[str] = getattr(sys.modules.get("circuitvision.families"), "SHIPPED", frozenset())
    for cls in family.classes:
        if cls in FAMILIES and (cls in shipped or FAMILIES[cls].name != family.name):
            raise InputError(
                f"{cls} is already registered, by the {'shipped ' if cls in shipped else ''}family {FAMILIES[cls].name!r}; a family of "
                "one's own is put right by registering it again under the same name."
            )
    FAMILIES.update(dict.fromkeys(family.classes, family))
    return family


POOLS = (
    "none",
    "cls",
    "cls+mean_patch",
    "cls+distillation",
    "mean_patch",
    "mean",
    "last",
    "eos",
    "first_eos",
    "chunk",
    "attention",
)
"""Rules of pooling. "eos" is CLIP's: the highest id where the configured eos id is 2 (it was 2 by mistake once), else the first eos; "first_eos"
is MetaCLIP 2's, whatever the id."""


def _check_table(family: Family) -> None:
    """Raise InputError for a table that would be misread without a word: a word for a tuple, a rule or a kind that there is not."""
    from circuitvision.model.tokens import KINDS

    where = f"In the table of the {family.name} family, "

    def need_tuple(name: str, value: Any, kind: type) -> None:
        if not (isinstance(value, tuple) and all(isinstance(entry, kind) for entry in value)):
            raise InputError(f"{where}{name}={value!r} is no tuple of {kind.__name__}; one alone is written (…,).")

    need_tuple("classes", family.classes, str)
    need_tuple("towers", family.towers, TowerSpec)
    need_tuple("connectors", family.connectors, Connector)
    try:
        _ = family.flow
    except InputError as error:
        raise InputError(f"{where}{error}") from None
    answer = next((tower for tower in family.towers if tower.name == family.flow.answer), None)
    if family.packing.in_sequence and not family.connectors and answer is not None and answer.readout is not None:
        raise InputError(
            f"{where}packing={family.packing!r} runs all images in one sequence, and a head that reads it image by image is not covered: leave the "
            f"readout of {answer.name} out (edits and sweeps need none)."
        )
    for stack in (tower.stack for tower in family.towers if tower.stack is not None):
        need_tuple("prefix", stack.prefix, str)
        if not set(stack.prefix) <= set(KINDS):
            raise InputError(f"{where}prefix={stack.prefix!r}; give kinds of positions: {', '.join(KINDS)}.")
    for readout in (tower.readout for tower in family.towers if tower.readout is not None):
        need_tuple("reads", readout.reads, str)
        if readout.pool not in POOLS:
            raise InputError(f"{where}pool={readout.pool!r} is no rule; the rules are {', '.join(POOLS)}.")
        if readout.reads not in (("*",), ("eos",), ("last",)) and not set(readout.reads) <= set(KINDS):
            raise InputError(
                f"{where}reads={readout.reads!r}; give ('*',), ('eos',), ('last',) or kinds of positions: {', '.join(KINDS)}."
            )


def register_stack(stack: Stack, *model_types: str) -> Stack:
    """Add a stack under one or several ``model_type`` values of its config; it takes the place of a shipped one."""
    load_tables()
    for model_type in model_types:
        STACKS[model_type] = stack
    return stack


def register_norm(norm: NormSpec, *classes: str) -> NormSpec:
    """Say how normalisation modules compute, by the names of their classes; InputError for what is no description of one."""
    load_tables()
    if not isinstance(norm, NormSpec) or not classes or not all(isinstance(name, str) for name in classes):
        raise InputError('A norm is registered by the names of its classes: register_norm(NormSpec("eps"), "MyNorm").')
    NORMS.update(dict.fromkeys(classes, norm))
    return norm


def family_of(module: nn.Module) -> Family:
    """The family of a Hugging Face module, by its class or a base class of it.

    Raises UnsupportedModelError, naming what was found and what is known.
    """
    load_tables()
    for cls in type(module).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise unsupported([type(module).__name__], getattr(module, "config", None))


def unsupported(class_names: Sequence[str], config: Any, checkpoint: str = "") -> UnsupportedModelError:
    """The error for a class that no family describes: what was found, the nearest that are described, and the way to describe one's own."""
    found = ", ".join(class_names) or "no class at all (its config names no architectures)"
    model_type = getattr(config, "model_type", None)
    kind = "" if model_type is None else f" (model_type {model_type!r})"
    parts = {
        name: getattr(getattr(config, name, None), "model_type", None) for name in ("vision_config", "text_config")
    }
    known = [f"{name} {kind!r} is{'' if kind in STACKS else ' not'} described" for name, kind in parts.items() if kind]
    of_parts = f" Of its parts, {', '.join(known)}." if known else ""
    near = ", ".join(_nearest_classes(class_names[0] if class_names else str(model_type), model_type))
    return UnsupportedModelError(
        f"No family describes {found}{kind}{f', the class of {checkpoint}' if checkpoint else ''}. The nearest that are described: {near}.{of_parts} "
        "A model built from described parts (a head of one's own on a ViT) is described in a few lines: circuitvision.register_family, see "
        f"docs/families.md. All described classes: {', '.join(sorted(FAMILIES))}."
    )


def _nearest_classes(name: str, model_type: str | None, count: int = 3) -> list[str]:
    """Described classes most like a class: of the same task first, then by the rest of the name and the model type."""

    def stem_and_task(cls: str) -> tuple[str, str]:
        match = re.fullmatch(r"(.*?)(For[A-Z]\w*|(?:Vision)?Model\w*|LMHeadModel|)", cls)
        return (match[1], match[2]) if match else (cls, "")

    def likeness(cls: str) -> tuple[bool, float]:
        own, task = stem_and_task(cls)
        stem, wanted = stem_and_task(name)
        ways = [stem, str(model_type or stem).replace("_", "")]
        return task == wanted, max(difflib.SequenceMatcher(None, own.lower(), way.lower()).ratio() for way in ways)

    return sorted(FAMILIES, key=likeness, reverse=True)[:count]


def resolve(root: nn.Module, path: Path | None) -> nn.Module | None:
    """The sub-module at ``path`` (the first that exists, for a tuple of paths), or None."""
    if path is None:
        return None
    for candidate in (path,) if isinstance(path, str) else path:
        found: object = root
        for part in candidate.split(".") if candidate else ():
            found = getattr(found, part, None)
        if isinstance(found, nn.Module):
            return found
    return None


def require(root: nn.Module, path: Path, what: str) -> nn.Module:
    """Like :func:`resolve`, but raises UnsupportedModelError that says what was looked for and what is there."""
    found = resolve(root, path)
    if found is None:
        children = ", ".join(name for name, _ in root.named_children()) or "no sub-modules"
        raise UnsupportedModelError(
            f"{type(root).__name__} has no {what}: looked for {path!r}, found {children}. The layout of this transformers version is not "
            "known, or the table of the family is wrong."
        )
    return found


def sub_config(config: object, path: str) -> object:
    """The nested config at a dotted path ("" is the config itself)."""
    for part in path.split(".") if path else ():
        if not hasattr(config, part):
            raise UnsupportedModelError(
                f"A {type(config).__name__} has no {part!r}: the family's config={path!r} is wrong, or this is another kind of model."
            )
        config = getattr(config, part)
    return config


def stack_for(spec: TowerSpec, config: object) -> Stack:
    """The stack of a tower: the one its spec names, or the one registered for the model_type of its config."""
    if spec.stack is not None:
        return spec.stack
    model_type = getattr(config, "model_type", None)
    if model_type not in STACKS:
        raise UnsupportedModelError(
            f"The {spec.name} tower is built from a config of type {model_type!r}, which no stack describes. Known: {', '.join(sorted(STACKS))}. "
            "Blocks of one's own are described by a Stack: TowerSpec(stack=…) or circuitvision.register_stack, see docs/families.md."
        )
    return STACKS[model_type]


def saved_settings(folder: str) -> dict[str, Any]:
    """The plain settings that a folder's ``processor_config.json`` keeps for its processor: statistics, strategies, counts."""
    path = FilePath(folder) / "processor_config.json"
    saved = json.loads(path.read_text()) if path.is_file() else {}
    parts = ("processor_class", "image_processor", "video_processor", "tokenizer", "auto_map")
    return {key: value for key, value in saved.items() if key not in parts}
