"""MGM and MGM-HD: two vision towers, patch info mining between them, a projector and a language model.

I images, T tiles of an image (the global image last on input, first in the sequence), P patches of a tile, W width of
the first tower, D of the language model.

Source: Li et al. 2024, Mini-Gemini, arXiv:2403.18814; released code dvlab-research/MGM at 769820c; class layout of
transformers 5 (its LLaVA).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForImageTextToText
from transformers.utils.generic import ModelOutput, can_return_tuple
from transformers.utils.import_utils import torch_compilable_check

from cal_train.models.mgm.configuration import MGMConfig
from cal_train.models.mgm.mining import PatchInfoMining


class MGMFeatures(NamedTuple):
    """What the towers make of the images: ``patches`` (I, T, P, W), and ``stages`` (I, C_k, H_k, H_k) each."""

    patches: Tensor
    stages: tuple[Tensor, ...]


@dataclass
class MGMModelOutputWithPast(BaseModelOutputWithPast):
    """Adds ``image_hidden_states``: the embeddings of all image tokens, (tokens, D)."""

    image_hidden_states: Tensor | None = None


@dataclass
class MGMCausalLMOutputWithPast(ModelOutput):
    """Loss, logits (B, S, V), cache, hidden states and attentions; ``image_hidden_states`` (tokens, D)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


class MGMPreTrainedModel(PreTrainedModel):
    """What both model classes have in common for transformers."""

    config: MGMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # pyright: ignore[reportAssignmentType]  (a tuple in all of transformers)
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["PatchInfoMining"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class MGMModel(MGMPreTrainedModel):
    """Everything but the output head."""

    def __init__(self, config: MGMConfig):
        # Not at the top: this module is imported when the Auto classes are, which LLaVA's module does halfway through.
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        super().__init__(config)
        vision: Any = config.vision_config
        aux: Any = config.aux_config
        self.vision_tower = AutoModel.from_config(vision)
        # it has no attention, and refuses every implementation but this if the whole model is asked for one
        self.vision_tower_aux = AutoModel.from_config(aux, attn_implementation="eager")
        self.vision_tower_aux.layernorm = nn.Identity()  # the norm behind the last stage, which mining does not read
        self.patch_info_mining = PatchInfoMining(vision.hidden_size, sum(aux.hidden_sizes), config.mining_chunk_size)
        self.multi_modal_projector = LlavaMultiModalProjector(config)  # pyright: ignore[reportArgumentType]
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def encode_images(self, pixel_values: Tensor, high_res_pixel_values: Tensor) -> MGMFeatures:
        """Return the features of both towers, without a graph where a tower is frozen.

        Args:
            pixel_values: Tiles of each image, row by row, the global image last: (I, T, C, h, w).
            high_res_pixel_values: The images at high resolution, (I, C, S, S).

        Raises:
            ValueError: If the inputs do not have the shapes that the configuration asks for.
        """
        config = self.config
        vision: Any = config.vision_config
        tiles = (config.num_tiles, *pixel_values.shape[2:3], vision.image_size, vision.image_size)
        if tuple(pixel_values.shape[1:]) != tiles:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, the model expects (images, *{tiles})"
            )
        high_res = (len(pixel_values), *pixel_values.shape[2:3], config.high_res_size, config.high_res_size)
        if tuple(high_res_pixel_values.shape) != high_res:
            raise ValueError(
                f"high_res_pixel_values has shape {tuple(high_res_pixel_values.shape)}, the model expects {high_res}"
            )
        with _graph_if_trained(self.vision_tower):
            outputs = self.vision_tower(pixel_values.flatten(0, 1), output_hidden_states=True)
            hidden = outputs.hidden_states[config.vision_feature_layer]
        patches = hidden[:, 1:] if config.vision_feature_select_strategy == "default" else hidden
        if patches.shape[1] != config.grid_side**2:
            raise ValueError(
                f"the vision tower makes {patches.shape[1]} patches of an image, not {config.grid_side} squared: "
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} does not fit it"
            )
        with _graph_if_trained(self.vision_tower_aux):
            # CLIP casts its pixels itself, ConvNeXt does not; the first hidden state is the stem's output
            high_res_pixel_values = high_res_pixel_values.to(self.vision_tower_aux.dtype)
            stages = self.vision_tower_aux(high_res_pixel_values, output_hidden_states=True).hidden_states[1:]
        return MGMFeatures(patches.unflatten(0, pixel_values.shape[:2]), stages)

    def embed_images(self, features: MGMFeatures) -> Tensor:
        """Return the embeddings of the image tokens, (I, T * P, D): the global image, then the tiles row by row."""
        config = self.config
        patches, side, grid = features.patches, config.grid_side, config.image_grid
        # tiles (rows and columns of the grid) and their patches become one raster, as the auxiliary tower sees it
        raster = patches[:, : grid**2].unflatten(2, (side, side)).unflatten(1, (grid, grid))
        raster = raster.transpose(2, 3).reshape(len(patches), grid * side, grid * side, -1)
        raster = raster + self.patch_info_mining(raster, features.stages)
        tiles = raster.unflatten(2, (grid, side)).unflatten(1, (grid, side)).transpose(2, 3)
        tokens = tiles.reshape(len(patches), grid**2 * side**2, -1)
        if config.image_global:
            whole = patches[:, -1].unflatten(1, (side, side))
            whole = whole + self.patch_info_mining(whole, features.stages, shrink=grid)
            tokens = torch.cat([whole.flatten(1, 2), tokens], dim=1)
        embeds = self.multi_modal_projector(tokens)
        # rounded as Gemma rounds the factor of its word embeddings
        return embeds * torch.tensor(config.image_feature_scale, dtype=embeds.dtype, device=embeds.device)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, high_res_pixel_values: Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Return the embeddings of each image's tokens (T * P, D) as a list, in ``pooler_output``.

        ``last_hidden_state`` holds the first tower's patches (I, T, P, W) before mining. Arguments as `encode_images`.
        """
        features = self.encode_images(pixel_values, high_res_pixel_values)
        embeds: Any = list(self.embed_images(features))
        return BaseModelOutputWithPooling(last_hidden_state=features.patches, pooler_output=embeds)  # pyright: ignore[reportArgumentType]

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """Return where image features (tokens, D) go, (B, S, 1) bool.

        Raises:
            ValueError: If there are more or fewer placeholders than features.
        """
        if input_ids is None:
            placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(placeholder)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        num_tokens = mask.sum()
        torch_compilable_check(
            num_tokens == image_features.shape[0],
            lambda: (
                f"the text has {int(num_tokens)} image tokens, the images make {image_features.shape[0]} features: "
                f"every image takes {self.config.num_image_tokens}"
            ),
        )
        return mask[..., None]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        high_res_pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> MGMModelOutputWithPast:
        """Return the last hidden states (B, S, D).

        Args:
            input_ids: Token ids (B, S) with one placeholder for every image token; or give ``inputs_embeds``.
            pixel_values: As `encode_images`; all images of the batch in reading order.
            high_res_pixel_values: As `encode_images`.
            attention_mask: (B, S).
            position_ids: (B, S).
            past_key_values: Cache of a generation.
            inputs_embeds: Embeddings (B, S, D) instead of ids.
            mm_encoder_outputs: ``{"image": output of get_image_features}`` instead of pixels.
            **kwargs: For the language model.

        Raises:
            ValueError: If not exactly one of ids and embeddings is given, only one of the pixel inputs, pixels together
                with encoder outputs, or placeholders and images do not match.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if (pixel_values is None) != (high_res_pixel_values is None):
            raise ValueError("pixel_values and high_res_pixel_values belong together: give both or none")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("give pixel_values or mm_encoder_outputs, not both")
        embeds: Tensor = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        images: Any = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and high_res_pixel_values is not None:
            images = self.get_image_features(pixel_values, high_res_pixel_values, return_dict=True)
        image_features = None
        if images is not None:
            image_features = torch.cat(list(images.pooler_output)).to(embeds.device, embeds.dtype)
            embeds = embeds.masked_scatter(self.get_placeholder_mask(input_ids, embeds, image_features), image_features)
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return MGMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
        )


class MGMForConditionalGeneration(MGMPreTrainedModel, GenerationMixin):
    """MGM with its output head. Pixels are dropped after the prefill by transformers' own list of inputs."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MGMConfig):
        super().__init__(config)
        text: Any = config.text_config
        self.model = MGMModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head."""
        return self.lm_head

    def get_image_features(
        self, pixel_values: Tensor, high_res_pixel_values: Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See `MGMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, high_res_pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        high_res_pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> MGMCausalLMOutputWithPast:
        """Return logits, and the loss if labels are given.

        Args:
            input_ids: As `MGMModel.forward`, like all that is not named here.
            pixel_values: Tiles (I, T, C, h, w).
            high_res_pixel_values: Images (I, C, S, S).
            attention_mask: (B, S).
            position_ids: (B, S).
            past_key_values: Cache of a generation.
            inputs_embeds: Embeddings (B, S, D) instead of ids.
            labels: (B, S), not shifted, -100 where there is no loss.
            logits_to_keep: How many logits from the end, or which; 0 is all.
            mm_encoder_outputs: Encoded images instead of pixels.
            **kwargs: For the language model and the loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            high_res_pixel_values=high_res_pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            vocab_size = self.config.get_text_config().vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return MGMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


def _graph_if_trained(tower: nn.Module) -> torch.set_grad_enabled:
    # Activation checkpointing makes even a frozen tower's input require gradients: it must not record a graph.
    return torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters()))


AutoModel.register(MGMConfig, MGMModel, exist_ok=True)
AutoModelForImageTextToText.register(MGMConfig, MGMForConditionalGeneration, exist_ok=True)
