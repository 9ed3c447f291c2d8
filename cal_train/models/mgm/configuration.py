"""Configuration of MGM and MGM-HD.

Source: Li et al. 2024, Mini-Gemini, arXiv:2403.18814.
"""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

_CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_CONVNEXT_L = {"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3], "image_size": 320}


@strict
class MGMConfig(PreTrainedConfig):
    """Two vision towers, patch info mining between them, a projector and a language model.

    Attributes:
        text_config: Of the language model.
        vision_config: Of the tower whose patches become image tokens.
        aux_config: Of the ConvNeXt tower that reads the image at high resolution.
        image_token_index: Id of the image placeholder.
        image_grid: The image is cut into ``image_grid ** 2`` tiles for the first tower (MGM: 1, MGM-HD: 2).
        image_global: Whether the whole image goes through the first tower besides its tiles (MGM-HD).
        high_res_size: Side in pixels of the high-resolution image (MGM: 768, MGM-HD: 1536).
        aux_drop_path: Stochastic depth of the auxiliary tower in training mode. The original keeps it on even though
            the tower is frozen; 0 turns it off.
        image_feature_scale: Factor of the image features. Default: the square root of the width for Gemma, whose word
            embeddings carry the same factor, else 1.
        mining_chunk_size: Image tokens mined at once: the memory of mining grows with it, its result does not change.

    Raises:
        ValueError: If the patch grid of the first tower and the feature map of the auxiliary tower do not fit.
    """

    model_type = "mgm"
    attribute_map: ClassVar[dict[str, str]] = {"image_token_id": "image_token_index"}
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="clip_vision_model", init_kwargs=_CLIP_L_336
        ),
        "aux_config": SubConfigSpec(config_class=AutoConfig, model_type="convnext", init_kwargs=_CONVNEXT_L),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    aux_config: dict | PreTrainedConfig | None = None
    image_token_index: int = 32000
    image_grid: int = 1
    image_global: bool = False
    high_res_size: int = 768
    aux_drop_path: float = 0.1
    image_feature_scale: float | None = None
    mining_chunk_size: int = 192
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        text: Any = self.text_config
        aux: Any = self.aux_config
        # as in transformers' LlavaConfig: language models keep this flag in their own configuration
        self.tie_word_embeddings = self.tie_word_embeddings or text.tie_word_embeddings
        aux.drop_path_rate = self.aux_drop_path
        if self.image_feature_scale is None:
            self.image_feature_scale = text.hidden_size**0.5 if text.model_type.startswith("gemma") else 1.0
        self._require_fit()

    @property
    def grid_side(self) -> int:
        """Patches along one side of a tile."""
        vision: Any = self.vision_config
        return vision.image_size // vision.patch_size

    @property
    def num_tiles(self) -> int:
        """Images that one image makes for the first tower."""
        return self.image_grid**2 + int(self.image_global)

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one image, whatever its size."""
        return self.num_tiles * self.grid_side**2

    @property
    def aux_map_side(self) -> int:
        """Side of the auxiliary tower's first and largest feature map."""
        aux: Any = self.aux_config
        return self.high_res_size // aux.patch_size

    def _require_fit(self) -> None:
        vision: Any = self.vision_config
        aux: Any = self.aux_config
        if self.image_grid < 1 or (self.image_global and self.image_grid == 1):
            raise ValueError(
                f"image_grid={self.image_grid} with image_global={self.image_global}: use image_grid 1 without, or "
                "image_grid 2 with the global image"
            )
        towers = (
            f"the vision tower makes {self.image_grid} x {self.grid_side} patches a side "
            f"(image_size {vision.image_size}, patch_size {vision.patch_size}, image_grid {self.image_grid}), the "
            f"auxiliary tower a map of {self.high_res_size} / {aux.patch_size} cells a side "
            f"(high_res_size {self.high_res_size})"
        )
        stride = aux.patch_size * 2 ** (len(aux.depths) - 1)
        if vision.image_size % vision.patch_size:
            raise ValueError(f"{towers}: make image_size a multiple of patch_size")
        if self.high_res_size % stride:
            raise ValueError(f"{towers}: make high_res_size a multiple of {stride}, the auxiliary tower's stride")
        if self.aux_map_side % (self.image_grid * self.grid_side):
            raise ValueError(
                f"{towers}: every patch needs the same whole number of cells, so make high_res_size a multiple of "
                f"{aux.patch_size * self.image_grid * self.grid_side}"
            )


AutoConfig.register("mgm", MGMConfig, exist_ok=True)
