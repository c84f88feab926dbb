"""OpenVLA out of transformers' modules: two vision backbones side by side, a projector of three layers, a causal language model.

A picture enters as six channels, normalised for DINOv2 (0–2) and for SigLIP (3–5). What leaves the second-to-last block of each backbone (no final
norm, patches alone) is joined channel by channel and projected; the patches then stand behind the first token of the prompt, whose ids do not name
them. Ids that do name them, one ``config.image_token_id`` per patch (:meth:`OpenVLAForActionPrediction.with_image_positions`), give the same bits: in
that form ids, masks and what the model computes have the same positions. In a padded batch the patches stand behind each row's own first token, so
that every row is what it is alone (the released code runs one row at a time).

Reference: Kim et al. 2024, "OpenVLA: An Open-Source Vision-Language-Action Model" (arXiv 2406.09246); released at github.com/openvla/openvla.

Not covered: labels and training, pictures among ``inputs_embeds``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    Dinov2WithRegistersModel,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from circuitvision.errors import InputError
from circuitvision.openvla.configuration import OpenVLAConfig

FEATURE_LAYER = -2
"""The hidden state of both backbones that the projector reads: the output of the second-to-last block."""


class OpenVLAProjector(nn.Module):
    """Three linear layers with exact GELUs between: from both backbones' channels, four times as wide, to the language model's."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, out)
        self.fc3 = nn.Linear(out, out)
        self.act_fn1, self.act_fn2 = nn.GELU(), nn.GELU()

    def forward(self, image_features: Float[Tensor, "row patch width"]) -> Float[Tensor, "row patch d_model"]:
        """What the language model reads in place of the patches."""
        return self.fc3(self.act_fn2(self.fc2(self.act_fn1(self.fc1(image_features)))))


class OpenVLAForActionPrediction(PreTrainedModel, GenerationMixin):
    """OpenVLA: pictures and an instruction in, action tokens out. Loads and saves released checkpoints."""

    config_class = OpenVLAConfig
    config: OpenVLAConfig
    main_input_name = "input_ids"
    base_model_prefix = ""
    input_modalities: Any = ("image", "text")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement: Any = ("past_key_values",)

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        self.vision = Dinov2WithRegistersModel(config.vision_config)
        self.vision_2 = SiglipVisionModel(config.vision_2_config)
        width = config.vision_config.hidden_size + config.vision_2_config.hidden_size
        self.projector = OpenVLAProjector(width, config.text_config.hidden_size)
        self.language_model = LlamaForCausalLM(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another token embedding in its place."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The unembedding."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Put another unembedding in its place."""
        self.language_model.set_output_embeddings(value)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, *args: Any, **kwargs: Any) -> OpenVLAForActionPrediction:  # type: ignore[override]
        """Load a released checkpoint, see :func:`circuitvision.openvla.checkpoints.load`."""
        from circuitvision.openvla import checkpoints

        return checkpoints.load(cls, name_or_folder, *args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, state_dict: Any = None, **kwargs: Any) -> None:  # type: ignore[override]
        """Save as released: config and weights under the released names (the pooling head of SigLIP, which nothing reads, is not written)."""
        from circuitvision.openvla.conversion import to_released

        super().save_pretrained(save_directory, state_dict=to_released(state_dict or self.state_dict()), **kwargs)

    # -- running -----------------------------------------------------------------------------------------------------------------------------

    def vision_features(
        self, pixel_values: Float[Tensor, "row 6 height width"], interpolate_pos_encoding: bool = False
    ) -> Float[Tensor, "row patch width"]:
        """What the projector reads: the patches behind the second-to-last block of both backbones, joined channel by channel.

        With ``interpolate_pos_encoding`` pictures may have another size than the configured one (DINOv2 always stretches its positions).
        """
        skipped = 1 + self.config.vision_config.num_register_tokens
        first = self.vision(pixel_values[:, :3], output_hidden_states=True).hidden_states[FEATURE_LAYER][:, skipped:]
        stretched = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
        second = self.vision_2(pixel_values[:, 3:], output_hidden_states=True, **stretched).hidden_states[FEATURE_LAYER]
        return torch.cat([first, second], dim=-1)

    def with_image_positions(
        self,
        input_ids: Int[Tensor, "row pos"],
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> tuple[Int[Tensor, "row whole"], Tensor | None]:
        """Ids and mask with a position for every patch: image tokens behind the first token of each row that is not padding.

        As many as ``pixel_values`` has patches; without them as the config says, ``config.n_patches``.

        Raises:
            InputError: a mask that is not one number per id.
        """
        ids = input_ids
        if attention_mask is None:
            first = ids.new_zeros(len(ids))
        elif attention_mask.shape != ids.shape:
            raise InputError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(ids.shape)}: give one number per id; "
                "the patches' are added."
            )
        else:
            first = attention_mask.int().argmax(1)
        count = self.config.n_patches
        if pixel_values is not None:
            patch = self.config.vision_config.patch_size
            count = (pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch)
        at = torch.arange(ids.shape[1], device=ids.device)
        at = at + count * (at > first[:, None])
        shape = (len(ids), ids.shape[1] + count)
        whole = ids.new_full(shape, self.config.image_token_id).scatter_(1, at, ids)
        mask = None if attention_mask is None else attention_mask.new_ones(shape).scatter_(1, at, attention_mask)
        return whole, mask

    def _embedded(self, ids: Tensor, pixel_values: Tensor | None, stretched: bool) -> Tensor:
        here = ids == self.config.image_token_id
        # The image token may lie outside the vocabulary.
        embeds = self.get_input_embeddings()(ids.masked_fill(here, self.config.pad_token_id))
        if pixel_values is None:
            return embeds
        features = self.projector(self.vision_features(pixel_values, stretched)).to(embeds)
        if int(here.sum()) != features.shape[0] * features.shape[1]:
            raise InputError(
                f"The prompts hold {int(here.sum())} image tokens, and {len(features)} pictures make {features.shape[0] * features.shape[1]}."
            )
        return embeds.masked_scatter(here[..., None], features)

    def forward(
        self,
        input_ids: Int[Tensor, "row pos"] | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Float[Tensor, "row 6 height width"] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "row pos d_model"] | None = None,
        use_cache: bool | None = None,
        interpolate_pos_encoding: bool = False,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every position, those of the patches included.

        Raises:
            InputError: pictures without ids, and ids that hold some image tokens but not one per patch.
        """
        if pixel_values is not None and input_ids is None:
            raise InputError("Patches stand behind the first id of a prompt: pixel_values need input_ids.")
        if input_ids is not None:
            if pixel_values is not None and not bool((input_ids == self.config.image_token_id).any()):
                if position_ids is not None:
                    raise InputError("position_ids count the patches too: give them with ids that hold image tokens.")
                input_ids, attention_mask = self.with_image_positions(input_ids, attention_mask, pixel_values)
            inputs_embeds = self._embedded(input_ids, pixel_values, interpolate_pos_encoding)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    # -- generating --------------------------------------------------------------------------------------------------------------------------

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The pictures enter with the prompt, and again in every pass only where there is no cache."""
        pixels = kwargs.pop("pixel_values", None)
        parent: Any = super()
        made: dict[str, Any] = parent.prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True):
            made["pixel_values"] = pixels
        return made

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As transformers' ``generate``; ids that do not name the patches come back without them."""
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        pixels, mask = kwargs.get("pixel_values"), kwargs.pop("attention_mask", None)
        parent: Any = super()
        if ids is None or pixels is None or bool((ids == self.config.image_token_id).any()):
            given = {"input_ids": ids, "attention_mask": mask}
            return parent.generate(**{key: value for key, value in given.items() if value is not None}, **kwargs)
        whole, mask = self.with_image_positions(ids, mask, pixels)
        out = parent.generate(input_ids=whole, **({} if mask is None else {"attention_mask": mask}), **kwargs)
        sequences = out if isinstance(out, Tensor) else out.sequences
        # Beams and several samples of a prompt are rows of their own.
        prompts, new = sequences[:, : whole.shape[1]], sequences[:, whole.shape[1] :]
        text = torch.cat([prompts[prompts != self.config.image_token_id].view(len(sequences), -1), new], dim=1)
        if isinstance(out, Tensor):
            return text
        out.sequences = text
        return out
