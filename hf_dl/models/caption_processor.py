"""The processor of the captioner: images to tensors, captions to words, and words to captions."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin


class ImageCaptionerProcessor(ProcessorMixin):
    """An image processor and a tokenizer with the tokens for padding, start and end.

    Args:
        image_processor: Makes `pixel_values`, such as a `ViTImageProcessor`.
        tokenizer: Splits captions into words. Its beginning-of-sequence token starts a caption.

    Example:
        `processor(images=image, text="a red cube")` gives the inputs of `generate`, which continues the text. The
        pipeline does the same: `pipe(image, text="")`.
    """

    def __init__(self, image_processor: Any = None, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Prepare the inputs of `generate`.

        Args:
            images: One image or a list of images.
            text: Start of the caption, one for all images or one per image. Defaults to an empty start.
            **kwargs: Options of the image processor. `padding` is ignored, because all starts have the same length.

        Returns:
            `pixel_values`, and `decoder_input_ids` with the start token and the words of `text`.

        Raises:
            ValueError: If images are missing, or the starts have different numbers of words.
        """
        if images is None:
            raise ValueError("images is missing. Pass an image or a list of images; a pipeline needs text='' as well.")
        for name in ("padding", "truncation", "max_length"):
            kwargs.pop(name, None)
        kwargs["return_tensors"] = "pt"
        pixel_values = self.image_processor(images, **kwargs)["pixel_values"]
        texts = [text or ""] if text is None or isinstance(text, str) else list(text)
        ids = [[self.tokenizer.bos_token_id, *row] for row in self._words(texts)]
        lengths = sorted({len(row) - 1 for row in ids})
        if len(lengths) > 1:
            raise ValueError(
                f"text has starts of {', '.join(map(str, lengths))} words. Expected the same number of words in each "
                "start of a batch; caption the images one by one."
            )
        start = torch.tensor(ids)
        if len(ids) == 1:
            start = start.expand(len(pixel_values), -1).clone()
        elif len(ids) != len(pixel_values):
            raise ValueError(f"Got {len(ids)} texts for {len(pixel_values)} images. Expected one text per image.")
        return BatchFeature({"pixel_values": pixel_values, "decoder_input_ids": start})

    def make_labels(self, captions: Sequence[str], *, max_length: int | None = None) -> torch.Tensor:
        """Convert captions to labels for training.

        Args:
            captions: The captions.
            max_length: Maximum number of words, including the end token. Longer captions lose their end.

        Returns:
            Word ids that end with the end token, padded with -100, int64 (captions, words).
        """
        rows = [torch.tensor([*row, self.tokenizer.eos_token_id][:max_length]) for row in self._words(list(captions))]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)

    def _words(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]
