"""Actions: from the tokens that an OpenVLA says to the robot's units.

The last ``n_action_bins`` ids of the vocabulary (rows that fill it up are not counted) are the edges of ``linspace(−1, 1, n_action_bins)``, counted
from the end: id ``t`` is the centre number ``clip(n_words − t − 1, 0, n_action_bins − 2)``. A normalised action ``a`` is
``(a + 1) / 2 · (q99 − q01) + q01`` in the units of a data set, where that data set's mask says so, and itself elsewhere (a gripper). As the released
code computes it, in float64.

Not covered: continuous action heads (OpenVLA-OFT), compressed tokens (FAST).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.openvla.configuration import OpenVLAConfig

if TYPE_CHECKING:
    from circuitvision.edits import Edit

SPACE = 29871
"""The token of an empty piece, which stands before the first action token (Llama 2's tokenizer); prompts end with it."""


@dataclass(frozen=True)
class ActionTokens:
    """Which tokens are actions, and what they say."""

    n_words: int
    n_bins: int = 256

    @classmethod
    def of(cls, config: OpenVLAConfig) -> ActionTokens:
        """Those of a model."""
        return cls(config.n_words, int(config.n_action_bins))

    @property
    def ids(self) -> range:
        """The ids of the vocabulary that are bins; the highest one is the lowest action."""
        return range(self.n_words - self.n_bins, self.n_words)

    @property
    def centres(self) -> Float[np.ndarray, " bin"]:
        """The middle of every bin, ``[n_bins − 1]``."""
        edges = np.linspace(-1, 1, self.n_bins)
        return (edges[:-1] + edges[1:]) / 2.0

    def values(self, ids: Any) -> Float[np.ndarray, ...]:
        """The normalised action of every id; an id that is no bin counts as the nearest one, as in the released code."""
        numbers = np.clip(self.n_words - np.asarray(ids) - 1, 0, self.n_bins - 2)
        return self.centres[numbers]

    def of_values(self, actions: Any) -> Int[np.ndarray, ...]:
        """The id that says a normalised action, as in training: ``n_words − digitize(clip(a, −1, 1), edges)``."""
        return self.n_words - np.digitize(np.clip(np.asarray(actions), -1.0, 1.0), np.linspace(-1, 1, self.n_bins))


def statistics(config: OpenVLAConfig, unnorm_key: str | None = None) -> dict[str, Any]:
    """The statistics of a data set's actions (``q01``, ``q99``, ``mask``); None where the model has those of one data set alone.

    Raises:
        InputError: none for that data set; the known ones are listed.
    """
    known = config.norm_stats
    if not known:
        raise InputError(
            "This model holds no norm statistics, so actions have no units: set model.config.norm_stats = {data set: {'action': {'q01': …, "
            "'q99': …, 'mask': …}}}, or put dataset_statistics.json into its folder."
        )
    if unnorm_key is None and len(known) == 1:
        unnorm_key = next(iter(known))
    if unnorm_key not in known:
        asked = (
            "unnorm_key says whose statistics to take"
            if unnorm_key is None
            else f"No norm statistics of {unnorm_key!r}"
        )
        raise InputError(f"{asked}; this model knows {', '.join(sorted(known))}.")
    return known[unnorm_key]["action"]


def action_dim(config: OpenVLAConfig, unnorm_key: str | None = None) -> int:
    """How many numbers an action of a data set has. Raises InputError as :func:`statistics`."""
    return len(statistics(config, unnorm_key)["q01"])


def unnormalise(
    actions: Float[np.ndarray, "*batch dim"], config: OpenVLAConfig, unnorm_key: str | None = None
) -> Float[np.ndarray, "*batch dim"]:
    """Normalised actions in the units of a data set. Raises InputError as :func:`statistics`, and for actions of another width."""
    found = statistics(config, unnorm_key)
    low, high = np.array(found["q01"]), np.array(found["q99"])
    mask = np.array(found.get("mask", np.ones_like(low, dtype=bool)))
    if np.shape(actions)[-1] != len(low):
        raise InputError(f"The data set's actions have {len(low)} dimensions, these {np.shape(actions)[-1]}.")
    return np.where(mask, 0.5 * (actions + 1) * (high - low) + low, actions)


def decode_actions(
    ids: Int[Tensor, "*batch dim"], config: OpenVLAConfig, unnorm_key: str | None = None
) -> Float[np.ndarray, "*batch dim"]:
    """The actions of generated tokens in the units of a data set. Raises InputError as :func:`unnormalise`."""
    return unnormalise(ActionTokens.of(config).values(torch.as_tensor(ids).cpu().numpy()), config, unnorm_key)


def predict_action(
    model: Any,
    inputs: Mapping[str, Any],
    unnorm_key: str | None = None,
    *,
    edits: Edit | Sequence[Edit] = (),
    **kwargs: Any,
) -> Float[np.ndarray, "row dim"]:
    """Greedy actions ``[row, action_dim]`` in the units of a data set, ``model`` a wrapped model or the module itself.

    Prompts end with the token 29871 (the processor adds it), added here where it is missing. Under ``edits`` (of a wrapped model) actions are those
    of the edited runs. Further keywords go to ``generate``.

    Raises:
        InputError: no norm statistics for ``unnorm_key``; edits of a module that is not wrapped.
    """
    config = model.config
    count = action_dim(config, unnorm_key)
    wrapped = hasattr(model, "towers")
    if edits and not wrapped:
        raise InputError("Edits act in a wrapped model: predict_action(cv.HookedModel(module), …, edits=…).")
    given = ended(inputs, config)
    if wrapped:
        kwargs["edits"] = edits
        out = model.generate(given, max_new_tokens=count, min_new_tokens=count, do_sample=False, **kwargs)
    else:
        out = model.generate(**given, max_new_tokens=count, min_new_tokens=count, do_sample=False, **kwargs)
    return decode_actions(out[:, -count:], config, unnorm_key)


def ended(inputs: Mapping[str, Any], config: OpenVLAConfig) -> dict[str, Any]:
    """Inputs whose prompts all end with the empty piece before the first action: added where none of them does (a small vocabulary has none).

    Raises:
        InputError: some do and some do not, or they are filled up on the right.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is not None and not bool(mask[:, -1].bool().all()):
        raise InputError("Prompts that generate are filled up on the left; these have padding behind them.")
    if config.n_words <= SPACE:
        return dict(inputs)
    there = ids[:, -1] == SPACE
    if bool(there.all()):
        return dict(inputs)
    if bool(there.any()):
        raise InputError(
            f"Some of these prompts end with the token {SPACE} and some do not; let the processor make them."
        )
    more = ids.new_full((len(ids), 1), SPACE)
    made = {**inputs, "input_ids": torch.cat([ids, more], 1)}
    if mask is not None:
        made["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return made
