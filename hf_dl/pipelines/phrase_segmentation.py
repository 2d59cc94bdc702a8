"""From an image and phrases to one mask per phrase, with a probability map and a heat map.

The model (`hf_dl.models.clip_segmenter`) encodes the image once for all phrases. The result has the format of
`pipeline("image-segmentation")`: a list of {score, label, mask}. It has an entry for each phrase, also for a phrase
without any pixel above the threshold, which is "not in the image".

Images keep their aspect ratio by default: they are resized to about the number of pixels that the image processor
asks for, and nothing is cropped. A support image with the mask of an object can take the place of a phrase, or be
added to it. As in Lüddecke & Ecker 2022, the background of the object is darkened and blurred, and the image is
cropped to the object.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from transformers import AutoImageProcessor, AutoTokenizer, BaseImageProcessor, PreTrainedTokenizerBase

from ..models.clip_features import check_tokenizer, knows_a_word
from ..models.clip_segmenter import ClipSegmenterForImageSegmentation
from ..models.image_input import open_image, to_rgb
from .model_loading import load_config, one_line

NOT_FOUND = "not in the image"
MAX_CHARACTERS = 1000  # of a phrase
_EXAMPLE = "'a red cube'"


def highlight(
    image: Image.Image,
    mask: Image.Image | np.ndarray,
    *,
    blur: float = 3.0,
    background: float = 0.1,
    context: float = 0.1,
) -> Image.Image:
    """Prepare a support image: darken and blur the background, and crop the image to the object.

    The defaults are the values in the training code of CLIPSeg.

    Args:
        image: The image.
        mask: Mask of the object, of the size of the image. Values above 0 belong to the object.
        blur: Standard deviation of the Gaussian blur of the background, in pixels.
        background: Brightness of the background, as a fraction.
        context: Margin around the object, as a fraction of its height and width.

    Returns:
        A square RGB image. The shorter side is padded with black.

    Raises:
        ValueError: If the mask is empty or has another size than the image.

    Example:
        >>> mask = np.zeros((40, 60))
        >>> mask[10:20, 5:35] = 1
        >>> highlight(Image.new("RGB", (60, 40)), mask).size
        (36, 36)
    """
    image = to_rgb(image)
    inside = np.asarray(mask.convert("L") if isinstance(mask, Image.Image) else mask) > 0
    if inside.shape != (image.height, image.width):
        raise ValueError(
            f"The mask has shape {inside.shape}. Expected the height and width of its image, "
            f"{(image.height, image.width)}."
        )
    if not inside.any():
        raise ValueError("The mask of a support image is empty. Mark at least one pixel of the object.")
    dark = image.filter(ImageFilter.GaussianBlur(blur)).point(lambda value: value * background)
    image = Image.composite(image, dark, Image.fromarray(inside.astype(np.uint8) * 255))
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    extra_y, extra_x = context * (bottom - top), context * (right - left)
    box = (
        max(0, int(left - extra_x)),
        max(0, int(top - extra_y)),
        min(image.width, int(right + extra_x)),
        min(image.height, int(bottom + extra_y)),
    )
    crop = image.crop(box)
    side = max(crop.size)
    square = Image.new("RGB", (side, side))
    square.paste(crop, ((side - crop.width) // 2, (side - crop.height) // 2))
    return square


def draw_heat_map(image: Image.Image, probability: np.ndarray, *, strength: float = 0.6) -> Image.Image:
    """Draw probabilities over an image, from dark red over yellow to white.

    Args:
        image: The image.
        probability: Probabilities of its pixels in [0, 1], (height, width).
        strength: Weight of the colors against the image.

    Returns:
        An RGB image of the same size.

    Example:
        >>> draw_heat_map(Image.new("RGB", (2, 1)), np.array([[0.0, 1.0]]), strength=1.0).getpixel((1, 0))
        (255, 255, 255)
    """
    ramp = (
        np.clip(3 * probability[..., None] - np.arange(3, dtype=np.float32), 0, 1) * 255
    )  # red rises first, then green, then blue
    mixed = (1 - strength) * np.asarray(to_rgb(image), dtype=np.float32) + strength * ramp
    return Image.fromarray(mixed.round().astype(np.uint8))


def describe(result: Mapping[str, Any]) -> str:
    """Describe the result of a phrase in one line.

    Args:
        result: An entry of the result of `PhraseSegmentationPipeline`.

    Example:
        >>> describe({"label": "a cat", "score": 0.12, "found": False, "area": 0.0, "known": True})
        'a cat: not in the image (highest probability 12%)'
    """
    if not result["known"]:
        return f"{result['label']}: {NOT_FOUND} (the model knows no word of it)"
    if not result["found"]:
        return f"{result['label']}: {NOT_FOUND} (highest probability {result['score']:.0%})"
    return f"{result['label']}: {result['area']:.1%} of the image (highest probability {result['score']:.0%})"


class PhraseSegmentationPipeline:
    """Segment an image by phrases, support images, or both.

    Args:
        model: The model.
        tokenizer: The tokenizer of its CLIP.
        image_processor: The image processor that it was trained with.

    Raises:
        ValueError: If the tokenizer belongs to another model.

    Example:
        >>> pipeline = PhraseSegmentationPipeline.from_pretrained("runs/phrases")  # doctest: +SKIP
        >>> for result in pipeline("scene.png", ["red cube", "ring"]):  # doctest: +SKIP
        ...     print(describe(result))
        red cube: 7.1% of the image (highest probability 98%)
        ring: not in the image (highest probability 4%)
    """

    def __init__(
        self,
        model: ClipSegmenterForImageSegmentation,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
    ):
        text_config = model.clip.config.text_config
        check_tokenizer(tokenizer, text_config, reads_end=True)
        self.model, self.tokenizer, self.image_processor = model.eval(), tokenizer, image_processor
        self.patch_size = model.clip.config.vision_config.patch_size
        self.max_tokens = text_config.max_position_embeddings

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, *, device: str | torch.device | None = None
    ) -> "PhraseSegmentationPipeline":
        """Load model, tokenizer and image processor.

        Args:
            name_or_path: A folder or a Hub id of a model of this package, or of a CLIPSeg of transformers such as
                "CIDAS/clipseg-rd64-refined". Weights must be safetensors for the former. Code in the repository is
                not run.
            device: Device of the model. Defaults to the GPU if one is available.

        Raises:
            ValueError: If the model is missing, damaged, or of another kind.
        """
        name = str(name_or_path)
        config = load_config(name, ["clip_segmenter", "clipseg"])
        try:
            if config.model_type == "clipseg":
                model = ClipSegmenterForImageSegmentation.from_clipseg(name)
            else:
                model, info = ClipSegmenterForImageSegmentation.from_pretrained(
                    name, config=config, use_safetensors=True, output_loading_info=True
                )
                if info["missing_keys"]:
                    raise ValueError(f"{len(info['missing_keys'])} tensors are missing; save it again")
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            image_processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # the type of the error depends on the library that reads the damaged file
            raise ValueError(f"The model {name!r} cannot be loaded ({one_line(error)}).") from error
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), tokenizer, image_processor)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Save model, tokenizer and image processor to a folder."""
        for part in (self.model, self.tokenizer, self.image_processor):
            part.save_pretrained(folder)

    def choose_size(self, width: int, height: int) -> tuple[int, int]:
        """Return height and width in pixels to which an image is resized.

        The aspect ratio is kept, up to the rounding to whole patches. The number of pixels is about the same as in the
        images that the image processor makes by default.
        """
        size = dict(self.image_processor.size)
        pixels = size["shortest_edge"] ** 2 if size.get("shortest_edge") else size["height"] * size["width"]
        scale = math.sqrt(pixels / (width * height))
        rows, columns = (max(1, round(side * scale / self.patch_size)) for side in (height, width))
        return rows * self.patch_size, columns * self.patch_size

    def prepare(self, image: Image.Image, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Resize and normalize an image for the model.

        Args:
            image: The image.
            size: Height and width in pixels, multiples of the patch size. Defaults to `choose_size`.

        Returns:
            (1, channels, height, width).
        """
        height, width = size or self.choose_size(*image.size)
        if min(height, width) < 1:
            raise ValueError(f"size={size} must be a height and width in pixels, multiples of {self.patch_size}.")
        options = {"do_resize": True, "size": {"height": height, "width": width}, "do_center_crop": False}
        return self.image_processor(images=image, return_tensors="pt", **options)["pixel_values"]

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | str | os.PathLike,
        phrases: str | Sequence[str] | None = None,
        *,
        threshold: float | None = None,
        support: Sequence[tuple[Image.Image, Image.Image | np.ndarray]] | None = None,
        text_weight: float = 0.5,
        size: tuple[int, int] | None = None,
        batch_size: int = 32,
    ) -> list[dict[str, Any]]:
        """Segment an image.

        Args:
            image: The image, or the path of a file.
            phrases: One phrase or several, such as "red cube". Optional with `support`.
            threshold: Probability above which a pixel belongs to the mask. Defaults to the `threshold` of the
                config, which the training script chooses on validation images.
            support: Pairs of an image and the mask of an object in it, one per phrase; see `highlight`.
            text_weight: Weight of the phrase if there is also a support image, from 0 to 1.
            size: Height and width in pixels to which the image is resized, multiples of the patch size. Defaults to
                `choose_size`, which keeps the aspect ratio.
            batch_size: Number of phrases that the decoder processes at once.

        Returns:
            One dict per phrase, in order. `label` is the phrase, and `score` the highest probability of a pixel.
            `mask` is an 8-bit image of the size of the image, with 255 inside the mask. `found` is whether the mask
            has a pixel, and `area` the fraction of the image that it covers. `probability` is float32 (height, width).
            `heat_map` is an RGB image. `known` is False if the tokenizer knows no word of the phrase. Its probability
            is then 0, because the model cannot tell it from other such phrases.

        Raises:
            ValueError: If phrases are missing, or a phrase or another argument is invalid.
        """
        image = to_rgb(image) if isinstance(image, Image.Image) else open_image(image)
        labels, texts = self._check_phrases(phrases, support)
        threshold = self.model.config.threshold if threshold is None else threshold
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold} must be above 0 and below 1.")
        if not 0 <= text_weight <= 1:
            raise ValueError(f"text_weight={text_weight} must be from 0 to 1.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        device = self.model.device
        pixel_values = self.prepare(image, size).to(device)
        features = self.model.encode_images(pixel_values)
        prompt = {name: tensor.to(device) for name, tensor in texts.items()}
        if support is not None:
            side = (self.model.clip.config.vision_config.image_size,) * 2
            examples = torch.cat([self.prepare(highlight(to_rgb(each), mask), side) for each, mask in support])
            prompt |= {"conditional_pixel_values": examples.to(device), "text_weight": text_weight}
        embeds = self.model.encode_prompts(**prompt)
        results: list[dict[str, Any]] = []
        for start in range(0, len(labels), batch_size):
            logits = self.model(
                vision_features=features,
                image_size=tuple(pixel_values.shape[-2:]),
                prompt_embeds=embeds[start : start + batch_size],
            ).logits
            # one phrase at a time: at the size of a photograph, a batch would take gigabytes
            for label, scores in zip(labels[start:], logits.float(), strict=False):
                scores = F.interpolate(scores[None, None], (image.height, image.width), mode="bilinear")[0, 0]
                visual = support is not None and (phrases is None or text_weight < 1)
                known = visual or knows_a_word(label, self.tokenizer)
                probability = scores.sigmoid() if known else torch.zeros_like(scores)
                results.append(_make_result(image, label, probability.cpu().numpy(), threshold) | {"known": known})
        return results

    def _check_phrases(
        self, phrases: str | Sequence[str] | None, support: Sequence[tuple[Any, Any]] | None
    ) -> tuple[list[str], dict[str, torch.Tensor]]:
        """Return a label per result, and the tokens of the phrases."""
        if phrases is None:
            if not support:
                raise ValueError(f"The phrases are missing. Pass phrases such as {_EXAMPLE}, or support images.")
            return [f"support image {number}" for number in range(1, len(support) + 1)], {}
        phrases = [phrases] if isinstance(phrases, str) else list(phrases)
        if not phrases:
            raise ValueError(f"phrases={phrases} is empty. Pass at least one, such as {_EXAMPLE}.")
        for phrase in phrases:
            if not isinstance(phrase, str) or not phrase.strip():
                raise ValueError(f"The phrase {phrase!r} is empty. Expected words such as {_EXAMPLE}.")
            if len(phrase) > MAX_CHARACTERS:
                raise ValueError(f"A phrase has {len(phrase)} characters. The limit is {MAX_CHARACTERS}.")
        if support is not None and len(support) != len(phrases):
            raise ValueError(
                f"There are {len(support)} support images and {len(phrases)} phrases. Pass one support image per "
                "phrase."
            )
        tokens = self.tokenizer(phrases, padding=True, return_tensors="pt", return_attention_mask=True)
        lengths = tokens["attention_mask"].sum(dim=1)
        if lengths.max() > self.max_tokens:
            longest = phrases[int(lengths.argmax())]
            raise ValueError(
                f"The phrase {longest[:40]!r}... has {lengths.max()} tokens. The limit of the model is "
                f"{self.max_tokens}; write a shorter phrase."
            )
        return phrases, {name: tokens[name] for name in ("input_ids", "attention_mask")}


def _make_result(image: Image.Image, label: str, probability: np.ndarray, threshold: float) -> dict[str, Any]:
    inside = probability > threshold
    return {
        "score": float(probability.max()),
        "label": label,
        "mask": Image.fromarray(inside.astype(np.uint8) * 255),
        "found": bool(inside.any()),
        "area": float(inside.mean()),
        "probability": probability,
        "heat_map": draw_heat_map(image, probability),
    }
