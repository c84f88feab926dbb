"""The processor's side of a wrapped model: making inputs, and translating between words and ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.data import pictures
from circuitvision.errors import InputError, nearest
from circuitvision.model.packing import laid_out

ACTION = "action "
"""How the words of tokens that say an action begin."""


class TextTools:
    """Mixed into Wrapped: everything that goes through the processor or tokenizer."""

    processor: Any
    config: Any
    family: Any
    towers: Any
    device: Any
    dtype: Any

    def inputs(self, images: Any = None, text: Any = None, seed: int = 0, **kwargs: Any) -> dict[str, Any]:
        """Model-ready tensors from images and text, through the model's processor, on its device and in its dtype.

        A picture is a file, an address, a PIL image, an array or a tensor, grey or RGB, of whole numbers 0…255 or floats 0…1 (rounded to 8 bits);
        ``images`` is one, a list, or a list per prompt; ``input_data_format`` says where arrays have their channels, if their shape does not.
        Tensors given as keywords are passed on as they are; anything else goes through the processor (a robot's state as an array is normalised by
        its statistics, a state tensor is taken as normalised). For PI0, ``noise`` and ``timestep`` are filled from ``seed`` unless given. Labels
        that a processor adds are left out: nothing here is trained. Raises InputError without a processor, for what is no picture that the model
        reads, and if the prompts do not hold an image token for each image.
        """
        from circuitvision.model.inputs import drawn

        for name, meant in _MISNAMED.items():
            if name in kwargs:
                raise InputError(f"model.inputs has no {name}=; it is {meant}=.")
        made: dict[str, Any] = {}
        if images is not None or text is not None:
            made = self._process(images, text, {k: v for k, v in kwargs.items() if not isinstance(v, Tensor)})
            kwargs = {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
        made.pop("labels", None)
        made.update(kwargs)
        made = laid_out(self, {name: self._placed(value) for name, value in made.items()})
        return drawn(self, made, seed)  # type: ignore[arg-type]

    def _placed(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)

    def _process(self, images: Any, text: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self.processor is None:
            raise InputError(
                "This model was wrapped without a processor; pass HookedModel(module, processor), or make the tensors by hand."
            )
        kwargs = dict(kwargs)
        _check_text(text)
        if images is not None:
            images = self._pictures(images, text, kwargs)
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None and not hasattr(self.processor, "image_processor"):
            if text is not None:
                raise InputError("This processor reads images only; leave text out.")
            return self._processed({"images": images, "return_tensors": "pt", **kwargs})
        options: dict[str, Any] = {"return_tensors": "pt"}
        if text is not None:
            longest = self.family.text_padding == "longest"
            options["padding"] = "longest" if longest else "max_length"
            if not longest:
                options["max_length"] = self.config.text_config.max_position_embeddings
            if tokenizer is not None and tokenizer.pad_token is None:
                options.pop("padding")
        image_processor = getattr(self.processor, "image_processor", self.processor)
        options.update(
            {name: getattr(image_processor, name) for name in self.family.image_settings if images is not None}
        )
        given = {key: value for key, value in (("images", images), ("text", text)) if value is not None}
        return self._processed({**given, **options, **kwargs})

    def _pictures(self, images: Any, text: Any, kwargs: dict[str, Any]) -> Any:
        """The pictures as every processor takes them; their number checked against the prompts."""
        tower = next((tower for tower in self.towers.values() if tower.stack.image), None)
        if tower is None:
            raise InputError(f"A {self.family.name} model reads no pictures; leave images out.")
        if "do_rescale" in kwargs:
            raise InputError("do_rescale is not needed: floats in 0…1 are taken as they are, whole numbers as 0…255.")
        channels = int(getattr(tower.config, "num_channels", 3))
        made = pictures.prepared(images, channels, kwargs.pop("input_data_format", None))
        self._check_counts(pictures.count(made), [text] if isinstance(text, str) else text)
        return made

    def _check_counts(self, given: list[int], prompts: Any) -> None:
        """Raise InputError if prompts that name their images name another number of them (a processor may add what they leave out)."""
        token = self.image_token
        if token is None or not prompts:
            return
        named = [str(prompt).count(token) for prompt in prompts]
        per_prompt = len(given) == len(named) and any(n != 1 for n in given)
        if any(named) and (given != named if per_prompt else sum(given) != sum(named)):
            each = ", ".join(map(str, named))
            raise InputError(
                f"There are {sum(given)} pictures ({', '.join(map(str, given))}), and the prompts name {sum(named)} ({each}): put {token} "
                "once for each picture into its prompt."
            )

    def _processed(self, options: dict[str, Any]) -> dict[str, Any]:
        try:
            return dict(self.processor(**options))
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, StopIteration) as error:
            text, token = options.get("text"), self.image_token
            prompts = [text] if isinstance(text, str) else text or []
            lost = token is not None and "images" in options and any(token not in str(prompt) for prompt in prompts)
            hint = f" Does each prompt hold {token} once per image?" if lost else ""
            raise InputError(f"The processor refused these inputs: {str(error).rstrip('.')}.{hint}") from error

    # -- words and ids -----------------------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None."""
        if hasattr(self.processor, "convert_ids_to_tokens"):
            return self.processor
        return getattr(self.processor, "tokenizer", None)

    @property
    def image_token_id(self) -> int | None:
        """The id that stands for one image position in prompts, or None."""
        for path in self.family.image_token:
            found: Any = self.config
            for part in path.split("."):
                found = getattr(found, part, None)
            if found is not None:
                return int(found)
        return None

    @property
    def image_token(self) -> str | None:
        """The text of the image token, where a tokenizer knows it."""
        token, tokenizer = self.image_token_id, self.tokenizer
        if token is None or tokenizer is None:
            return None
        found = tokenizer.convert_ids_to_tokens(token)
        return None if found is None else str(found)

    def token(self, word: str | int) -> int:
        """The id of a word: one token of the vocabulary, or a class name of a classifier; an int is returned as it is.

        Where tokens say actions, ``"action 0.5"`` is the one whose (normalised) value is nearest. Raises InputError if the word takes several tokens,
        or is unknown.
        """
        if isinstance(word, int):
            return word
        values = self.action_values
        if values and word.startswith(ACTION):
            return _nearest_action(word, values)
        labels = getattr(self.config, "label2id", None) or {}
        if self.tokenizer is None:
            if word in labels:
                return int(labels[word])
            raise InputError(
                f"{word!r} is no class of this model. Nearest: {', '.join(nearest(word, labels))}; a class is its name or its number."
            )
        candidates = [self.tokenizer.encode(form, add_special_tokens=False) for form in (" " + word, word)]
        unknown = self.tokenizer.unk_token_id
        for ids in candidates:
            if len(ids) == 1 and ids[0] != unknown:
                return int(ids[0])
        if all(unknown in ids for ids in candidates):
            raise InputError(
                f"{word!r} is not in the vocabulary. Nearest: {', '.join(nearest(word, self.tokenizer.get_vocab()))}."
            )
        pieces = self.tokenizer.convert_ids_to_tokens(candidates[-1])
        raise InputError(
            f"{word!r} takes {len(pieces)} tokens ({' '.join(pieces)}); name a one-token word, or give the id of the piece you mean."
        )

    @property
    def action_values(self) -> Mapping[int, float]:
        """The ids that say an action, with the normalised value of each; none where tokens are words alone."""
        return {} if self.family.action_values is None else self.family.action_values(self.config)

    def words(self, ids: Sequence[int]) -> list[str | None]:
        """The text piece of every id, ``"action +0.498"`` of one that says an action; None for those that have none."""
        actions = self.action_values
        pieces = [None] * len(ids) if self.tokenizer is None else self.tokenizer.convert_ids_to_tokens(list(ids))
        return [
            f"{ACTION}{actions[number]:+.3f}" if number in actions else piece
            for number, piece in zip(ids, pieces, strict=True)
        ]

    def pieces(self, ids: Tensor) -> list[list[str]] | None:
        """The text piece of every id, by row; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return [[str(piece) for piece in self.words(row)] for row in ids.tolist()]

    def to_str_tokens(self, what: Any) -> list[list[str]]:
        """The text pieces of inputs, ids ``[row pos]`` or ``[pos]``, or a text, by row; InputError without a tokenizer."""
        if self.tokenizer is None:
            raise InputError("This model has no tokenizer.")
        if isinstance(what, Mapping):
            what = what["input_ids"]
        if isinstance(what, str):
            what = torch.tensor([self.tokenizer.encode(what)])
        ids = torch.as_tensor(what)
        pieces = self.pieces(ids.reshape(1, -1) if ids.ndim < 2 else ids)
        assert pieces is not None
        return pieces


_MISNAMED = {
    "image": "images",
    "picture": "images",
    "pictures": "images",
    "texts": "text",
    "prompt": "text",
    "prompts": "text",
}
"""Words that a processor takes and drops, and what is meant."""


def _nearest_action(word: str, values: Mapping[int, float]) -> int:
    try:
        value = float(word.removeprefix(ACTION))
    except ValueError:
        value = float("nan")
    if not -1.0 <= value <= 1.0:
        raise InputError(f"{word!r} is no action: give a number from -1 to 1, as in 'action 0.5'.")
    # Two ids may say the same; the one that training uses is the last.
    return min(sorted(values, reverse=True), key=lambda number: abs(values[number] - value))


def _check_text(text: Any) -> None:
    """Raise InputError for a text that is no prompt, and for a list of prompts that holds none."""
    if text is None or isinstance(text, str):
        return
    if not isinstance(text, (list, tuple, np.ndarray)) or any(not isinstance(prompt, str) for prompt in text):
        raise InputError(f"text is one string, or a list of one per example, not {type(text).__name__}: {text!r:.80}.")
    if len(text) == 0:
        raise InputError("text holds no prompt; give one string, or one per example.")
