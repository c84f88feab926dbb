"""The configuration of a released OpenVLA, with the sizes of its two vision backbones beside it.

A released config names its backbones by their timm ids and says nothing of their sizes; :data:`BACKBONES` holds the sizes of the released ones. What
is saved here says them in full (``vision_config``, ``vision_2_config``), and holds everything that was released as well.

Not covered: backbones alone (``use_fused_vision_backbone=False``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import Dinov2WithRegistersConfig, LlamaConfig, PretrainedConfig, SiglipVisionConfig

from circuitvision.errors import UnsupportedModelError

BACKBONES: dict[str, dict[str, Any]] = {
    "vit_large_patch14_reg4_dinov2": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "num_register_tokens": 4,
    },
    "vit_so400m_patch14_siglip": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}
"""Sizes of timm's models, by the start of their ids."""

TIMM_IDS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
# timm computes the exact GELU and adds 1e-6 to variances; its SigLIP here has no pooling head.
_DINO: dict[str, Any] = {"hidden_act": "gelu", "layer_norm_eps": 1e-6}
_SIGLIP: dict[str, Any] = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "vision_use_head": False}


class OpenVLAConfig(PretrainedConfig):
    """A released OpenVLA config (``model_type`` "openvla"), plus the sizes of its backbones.

    ``norm_stats[data_set]["action"]`` holds ``q01``, ``q99`` and ``mask`` of every action dimension. ``image_token_id`` stands for one patch in ids
    that name them; released ids do not.

    Raises:
        UnsupportedModelError: one backbone alone, and backbones whose sizes neither the config nor the table of timm's ids says.
    """

    model_type = "openvla"
    sub_configs: ClassVar[dict[str, Any]] = {
        "vision_config": Dinov2WithRegistersConfig,
        "vision_2_config": SiglipVisionConfig,
        "text_config": LlamaConfig,
    }

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        vision_2_config: Any = None,
        norm_stats: Mapping[str, Any] | None = None,
        n_action_bins: int = 256,
        timm_model_ids: Sequence[str] = TIMM_IDS,
        timm_override_act_layers: Sequence[str | None] = (None, None),
        image_sizes: Sequence[int] = (224, 224),
        image_resize_strategy: str = "resize-naive",
        use_fused_vision_backbone: bool = True,
        pad_token_id: int = 32000,
        pad_to_multiple_of: int = 64,
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not use_fused_vision_backbone or len(timm_model_ids) != 2:
            raise UnsupportedModelError(
                f"This OpenVLA sees with {', '.join(timm_model_ids)} alone; those that are described see with DINOv2 and SigLIP side by side."
            )
        self.timm_model_ids, self.timm_override_act_layers = list(timm_model_ids), list(timm_override_act_layers)
        self.image_sizes, self.image_resize_strategy = list(image_sizes), image_resize_strategy
        self.use_fused_vision_backbone = True
        self.text_config = _config(LlamaConfig, text_config or {"vocab_size": 32000 + pad_to_multiple_of})
        self.vision_config = self._backbone(0, Dinov2WithRegistersConfig, vision_config, _DINO)
        self.vision_2_config = self._backbone(1, SiglipVisionConfig, vision_2_config, _SIGLIP)
        self.norm_stats = dict(norm_stats or {})
        self.n_action_bins, self.pad_to_multiple_of = n_action_bins, pad_to_multiple_of
        # No token of the vocabulary: what the model says is never taken for a picture.
        self.image_token_id = self.text_config.vocab_size if image_token_id is None else image_token_id
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        self.pad_token_id = pad_token_id

    def _backbone(self, index: int, kind: type, given: Any, fixed: Mapping[str, Any]) -> Any:
        if given is not None and not isinstance(given, Mapping):
            return given
        entries = {**fixed, "image_size": self.image_sizes[index], **(given or {})}
        override = self.timm_override_act_layers[index]
        if override is not None:
            entries["hidden_act"] = override
        if "hidden_size" not in entries:
            name = self.timm_model_ids[index]
            sizes = backbone(name)
            if not sizes:
                raise UnsupportedModelError(
                    f"The sizes of the vision backbone {name!r} are not known; known: {', '.join(BACKBONES)}. Say them in the config, as "
                    f"vision{'_2' * index}_config={{'hidden_size': …, 'num_hidden_layers': …, 'num_attention_heads': …, 'patch_size': …}}."
                )
            entries = {**sizes, **entries}
        return _config(kind, entries)

    @property
    def n_words(self) -> int:
        """The size of the tokenizer's own vocabulary, which ends with the action bins: rows that fill the embedding up are not counted."""
        return int(self.text_config.vocab_size) - int(self.pad_to_multiple_of)

    @property
    def n_patches(self) -> int:
        """How many prompt positions the picture takes."""
        config = self.vision_config
        return (config.image_size // config.patch_size) ** 2


def backbone(name: str) -> dict[str, Any]:
    """The sizes of a timm model by its id; none for an unknown one."""
    return next((sizes for start, sizes in BACKBONES.items() if name.startswith(start)), {})


def _config(kind: Any, given: Any) -> Any:
    return (
        kind(**{key: value for key, value in given.items() if key != "model_type"})
        if isinstance(given, Mapping)
        else given
    )
