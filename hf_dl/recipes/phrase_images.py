"""Images with phrases and masks: flags, data in memory, the cached tokens of a frozen CLIP, and support images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import CLIPProcessor

from hf_dl.data import phrasecut
from hf_dl.data.image_arrays import ImageTensors
from hf_dl.models.clip_segmenter import ClipSegmenterForImageSegmentation
from hf_dl.pipelines.phrase_segmentation import highlight

from .classifier import to_pixel_values
from .evaluation import hide_progress_bars, report_data, split_size

BATCH_IMAGES = 16  # images per batch during evaluation


@dataclass
class PhraseFlags:
    """Flags that select the images and phrases. The training and the evaluation script share them."""

    source: str = field(
        default="synthetic",
        metadata={"help": "synthetic (generated scenes), or a folder or Hub id that hf_dl.data.phrasecut reads."},
    )
    style: Literal["plain", "textured"] = field(default="plain", metadata={"help": "Look of the synthetic scenes."})
    num_objects: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "Fewest and most objects per synthetic scene."}
    )
    image_size: int = field(
        default=64, metadata={"help": "Height and width to which images and masks are resized, in pixels."}
    )
    num_train: int = field(
        default=4000, metadata={"help": "Maximum number of training images. 0 uses all images of the source."}
    )
    num_test: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of validation images, and of test images. 0 uses all images. Defaults to all, and "
            "to at most half of num_train."
        },
    )
    negatives: float = field(
        default=0.2, metadata={"help": "Share of the phrases that are false of their image, from 0 to below 1."}
    )


class PhraseImages(torch.utils.data.Dataset):
    """Images with their phrases and masks. One item is one image with all its masks.

    Images are uint8 tensors in memory, and a mask takes one bit per pixel. Data that does not fit into `max_gb` is
    decoded at each access; use `num_workers` then.

    Attributes:
        first: Row of the first phrase of each image, and the number of rows, int (images + 1,).
        phrases: The different phrases.
        phrase_index: For each row, the index of its phrase in `phrases`, int (rows,).
        subsets: For each row, the names of its subsets, with "seen" or "unseen".
        size: Height and width of the images.
        features: Tokens of all images, float16 (images, layers, 1 + patches, channels), or None; see `cache`.

    Args:
        dataset: Rows with `image_id`, `image`, `phrase`, `mask` and optionally `seen` and `subsets`. The rows of an
            image follow each other, see `hf_dl.data.phrasecut`.
        max_gb: Memory for decoded images and masks, in GB.

    Raises:
        ValueError: If the dataset is empty, or images or masks differ in size.
    """

    def __init__(self, dataset: datasets.Dataset, *, max_gb: float = 8.0):
        if not len(dataset):
            raise ValueError("The data has no phrase. Expected at least one image with a phrase.")
        ids = list(dataset["image_id"])
        starts = [row for row, name in enumerate(ids) if not row or name != ids[row - 1]]
        self.first = torch.tensor([*starts, len(ids)])
        texts = list(dataset["phrase"])
        self.phrases = list(dict.fromkeys(texts))
        number = {phrase: index for index, phrase in enumerate(self.phrases)}
        self.phrase_index = torch.tensor([number[text] for text in texts])
        self.subsets = name_subsets(dataset)
        images = dataset.select(starts).select_columns(["image"])
        self._masks = dataset.select_columns(["mask"])
        self.size: tuple[int, int] = images[0]["image"].size[::-1]
        pixels = math.prod(self.size)
        keep = pixels * (3 * len(images) + len(ids) / 8) <= max_gb * 1e9
        self._images = ImageTensors(images, keep=keep)
        self._bits = np.stack([self._pack(mask) for mask in self._masks["mask"]]) if keep else None
        self.features: torch.Tensor | None = None

    def _pack(self, mask: Any) -> np.ndarray:
        """Return a mask with eight pixels per byte."""
        inside = np.asarray(mask) > 0
        if inside.shape != self.size:
            raise ValueError(f"A mask has shape {inside.shape}. Expected the size of the images, {self.size}.")
        return np.packbits(inside)

    def __len__(self) -> int:
        return len(self.first) - 1

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Return the rows of images, one image after the other, int (rows,)."""
        return torch.cat([torch.arange(self.first[i], self.first[i + 1]) for i in index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return several images.

        Returns:
            `index` (images,), `image` uint8 (images, 3, height, width), and `masks` uint8 (phrases, height, width) for
            all phrases of the images, with the values 0 and 1.
        """
        index = torch.as_tensor(indices)
        rows = self.rows(index).numpy()
        if self._bits is None:
            bits = np.stack([self._pack(mask) for mask in self._masks[rows]["mask"]])
        else:
            bits = self._bits[rows]
        masks = np.unpackbits(bits, axis=1, count=math.prod(self.size)).reshape(-1, *self.size)
        return {"index": index, **self._images.__getitems__(indices), "masks": torch.from_numpy(masks)}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one image with its masks."""
        found = self.__getitems__([index])
        return {"index": found["index"][0], "image": found["image"][0], "masks": found["masks"]}

    def pick(
        self, batch: Mapping[str, torch.Tensor], draws: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose phrases for a batch of images: successive ones from a random one on, so that they differ.

        Args:
            batch: The images, from `__getitems__`.
            draws: Uniform numbers in [0, 1), (images,).
            count: Phrases per image. An image with fewer phrases repeats them.

        Returns:
            Three tensors on the device of the batch. The first two are the index in `phrases` and the position of the
            image in the batch, int (images * count,). The third has the masks, float32 (images * count, height,
            width).
        """
        index, device = batch["index"].cpu(), batch["masks"].device
        number = self.first[index + 1] - self.first[index]
        chosen = ((draws * number).long()[:, None] + torch.arange(count)) % number[:, None]
        place = ((number.cumsum(0) - number)[:, None] + chosen).flatten()  # in the masks of the batch
        phrases = self.phrase_index[self.rows(index)[place]]
        position = torch.arange(len(index)).repeat_interleave(count)
        return phrases.to(device), position.to(device), batch["masks"][place.to(device)].float()

    @torch.no_grad()
    def cache(self, model: ClipSegmenterForImageSegmentation, processor: CLIPProcessor, *, max_gb: float) -> bool:
        """Compute the tokens of all images, if they fit into `max_gb` of memory.

        Returns:
            Whether the tokens are in memory.
        """

        def encode(places: range) -> torch.Tensor:
            pixels = self._images.__getitems__(places)["image"]
            return model.encode_images(to_pixel_values(pixels, processor.image_processor, model.device))

        one = encode(range(1))
        if 2 * one.numel() * len(self) > max_gb * 1e9:
            return False
        features = torch.empty(len(self), *one.shape[1:], dtype=torch.float16)
        for start in range(0, len(self), BATCH_IMAGES):
            features[start : start + BATCH_IMAGES] = encode(range(start, min(start + BATCH_IMAGES, len(self)))).cpu()
        self.features = features
        return True

    def vision_inputs(
        self, batch: Mapping[str, torch.Tensor], processor: CLIPProcessor, device: torch.device
    ) -> dict[str, Any]:
        """Return the arguments of the model for the images of a batch: tokens from the cache, or pixels."""
        if self.features is not None:
            features = self.features[batch["index"].cpu()].to(device).float()
            return {"vision_features": features, "image_size": self.size}
        return {"pixel_values": to_pixel_values(batch["image"], processor.image_processor, device)}


class SupportImages:
    """Embedded objects of the training images, to mix with the phrases in training (Lüddecke & Ecker 2022, section 3).

    Each object is cut out by `highlight`. The support image of a phrase can come from the same image as its mask.

    Attributes:
        embeds: Embeddings, (objects, projection_dim). The objects of a phrase follow each other.
        counts: Number of objects of each phrase, int (phrases,). 0 for phrases that are false of all images.

    Args:
        model: The model.
        processor: Its processor.
        data: The training images.
    """

    def __init__(self, model: ClipSegmenterForImageSegmentation, processor: CLIPProcessor, data: PhraseImages):
        side = model.clip.config.vision_config.image_size
        options = {"size": {"height": side, "width": side}, "return_tensors": "pt"}
        embeds, found = [], []
        for index in range(len(data)):
            item = data[index]
            rows = data.rows(torch.tensor([index]))
            image = Image.fromarray(item["image"].permute(1, 2, 0).numpy())
            true = item["masks"].amax(dim=(1, 2)) > 0
            if not true.any():
                continue
            objects = [highlight(image, mask) for mask in item["masks"][true].numpy()]
            pixels = processor.image_processor(images=objects, **options)["pixel_values"].to(model.device)
            with torch.no_grad():
                embeds.append(model.encode_prompts(conditional_pixel_values=pixels))
            found.append(data.phrase_index[rows[true]])
        if not found:
            raise ValueError("All masks are empty. Expected at least one object for --support.")
        phrase = torch.cat(found)
        self.embeds = torch.cat(embeds)[phrase.argsort(stable=True).to(model.device)]
        self.counts = phrase.bincount(minlength=len(data.phrases))
        self._first = self.counts.cumsum(0) - self.counts

    def mix(
        self, prompt_embeds: torch.Tensor, phrases: torch.Tensor, draws: torch.Tensor, probability: float
    ) -> torch.Tensor:
        """Mix embedded phrases t with random support images s: w t + (1 - w) s, with a uniform weight w.

        Args:
            prompt_embeds: Embedded phrases, (batch, projection_dim).
            phrases: Indices of the phrases, int (batch,).
            draws: Uniform numbers in [0, 1), (batch, 3): for the choice of phrases to mix, the object, and w.
            probability: Probability of each phrase to be mixed. Phrases without an object never are.

        Returns:
            (batch, projection_dim).
        """
        phrases = phrases.cpu()
        count = self.counts[phrases]
        mixed = (draws[:, 0] < probability) & (count > 0)
        row = (self._first[phrases] + (draws[:, 1] * count).long()).clamp(max=len(self.embeds) - 1)
        weight = draws[:, 2].where(mixed, 1.0)[:, None].to(prompt_embeds)
        return weight * prompt_embeds + (1 - weight) * self.embeds[row.to(self.embeds.device)]


def load_rows(args: PhraseFlags, split: str, *, size: int | None) -> datasets.Dataset:
    """Load the rows of one split, one per image and phrase.

    Args:
        args: The flags.
        split: "train", "validation", "test", or "miniv" of PhraseCut.
        size: Height and width of images and masks in pixels. None keeps their sizes.
    """
    hide_progress_bars()
    synthetic = args.source == "synthetic"
    count = split_size(args, split, phrasecut.SPLITS.get(split) if synthetic else None)
    options = {"style": args.style, "num_objects": tuple(args.num_objects)} if synthetic else {}
    data = phrasecut.load(split, args.source, max_images=count, size=size, negatives=args.negatives, **options)
    report_data(data, split)
    return data


def load_phrases(args: PhraseFlags, split: str) -> PhraseImages:
    """Load one split of the images and phrases that the flags select, resized to `image_size`.

    Args:
        args: The flags.
        split: "train", "validation", "test", or "miniv" of PhraseCut.
    """
    return PhraseImages(load_rows(args, split, size=args.image_size))


def name_subsets(data: datasets.Dataset) -> list[list[str]]:
    """Return the names of the subsets of each row, with "seen" or "unseen"."""
    seen = data["seen"][:] if "seen" in data.column_names else [True] * len(data)
    named = data["subsets"][:] if "subsets" in data.column_names else [[]] * len(data)
    return [[*names, "seen" if each else "unseen"] for names, each in zip(named, seen, strict=True)]
