"""Processor of MGM: image processor, tokenizer and the same number of placeholders for every image."""

from collections.abc import Sequence
from typing import Any

from transformers.models.auto.processing_auto import AutoProcessor
from transformers.processing_utils import MultiModalData, ProcessorMixin

from cal_train.models.mgm.configuration import MGMConfig


class MGMProcessor(ProcessorMixin):
    """Expand every ``<image>`` to the tokens of one image.

    Args:
        image_processor: An `MGMImageProcessor`.
        tokenizer: In which the image token is one special token.
        patch_size: Side in pixels of a patch of the first tower.
        image_token: The placeholder.
        chat_template: Jinja source.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 14,
        image_token: str = "<image>",
        chat_template: str | None = None,
    ):
        self.patch_size = patch_size
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def num_tiles(self) -> int:
        """Images that one image makes for the first tower."""
        return self.image_processor.image_grid**2 + int(self.image_processor.image_global)

    @property
    def num_image_tokens(self) -> int:
        """Tokens of one image, whatever its size."""
        return self.num_tiles * (self.image_processor.image_size // self.patch_size) ** 2

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Return what stands in the text for one image."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Return ``num_image_tokens`` and ``num_image_patches`` (tiles) of images of these (height, width)."""
        if image_sizes is None:
            return MultiModalData()
        num_images = len(image_sizes)
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens] * num_images, num_image_patches=[self.num_tiles] * num_images
        )


AutoProcessor.register(MGMConfig, MGMProcessor, exist_ok=True)
