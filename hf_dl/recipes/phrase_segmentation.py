"""Segmentation from phrases: the flags, data, model, evaluation and report that the scripts and Spaces share.

A frozen CLIP encodes images and phrases, and a decoder draws a mask for each phrase; see
`hf_dl.models.clip_segmenter`. The training loop is in scripts/train_phrase_segmentation.py. Because CLIP is frozen,
its tokens are computed once and kept in memory, if they fit.
"""

import copy
import csv
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from hf_dl.data import phrasecut
from hf_dl.data.image_arrays import ImageTensors
from hf_dl.metrics.phrase_segmentation import PhraseCounts, best_threshold, phrase_segmentation_scores
from hf_dl.models.clip_decoders import DECODERS
from hf_dl.models.clip_features import knows_a_word
from hf_dl.models.clip_segmenter import ClipSegmenterForImageSegmentation
from hf_dl.models.image_input import to_rgb
from hf_dl.pipelines.phrase_segmentation import PhraseSegmentationPipeline, draw_heat_map, highlight
from hf_dl.progress import activity
from hf_dl.reporting.card import run_card, usage_snippet
from hf_dl.reporting.grids import image_grid
from hf_dl.reporting.plots import plot_run

from .classifier import to_pixel_values
from .evaluation import checked_config, hide_progress_bars, report_data, split_size
from .zero_shot_classifier import load_clip

CLIP_FOLDER = "runs/train_clip"
SUMMARY = (
    "A model that segments an image from phrases such as 'red cube' (Lüddecke & Ecker 2022, CLIPSeg): a frozen CLIP "
    "and a small trained decoder."
)
LIMITS = (
    "It knows the words that its CLIP knows.",
    "A phrase that is partly true of an object, such as a wrong color, sometimes gets a mask.",
)
CURVES = {
    "loss": {"training": "loss"},
    "mean IoU": {"validation": "val_miou"},
    "average precision": {"validation": "val_ap"},
    "area of absent phrases": {"validation": "val_false_area"},
}
BATCH_IMAGES = 16  # images per batch during evaluation


# ---------------------------------------------------------------------------------------------------------------------
# Flags


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


@dataclass
class ModelFlags:
    """Flags that select CLIP and the decoder."""

    clip: str = field(default=CLIP_FOLDER, metadata={"help": "Folder or Hub id of a CLIPModel."})
    untrained_clip: bool = field(
        default=False, metadata={"help": "Replace the weights of CLIP by random ones, as a control."}
    )
    decoder_type: Literal[tuple(DECODERS)] = field(default="unet", metadata={"help": "Kind of decoder."})
    refined: bool = field(
        default=False, metadata={"help": "clipseg and deconv: draw a patch in two steps instead of one."}
    )
    layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "Blocks of the image encoder that the decoder reads, from 0. Defaults to 0 1 3 for four blocks, "
            "and else to one quarter, half and three quarters of the depth: 3 6 9 for ViT-B. The paper uses 3 7 9."
        },
    )
    reduce_dim: int = field(default=64, metadata={"help": "Channels of the decoder."})
    num_attention_heads: int = field(default=4, metadata={"help": "clipseg: attention heads per block."})
    intermediate_size: int = field(
        default=256, metadata={"help": "clipseg: hidden units of the MLP of a block. The paper uses 2048."}
    )


@dataclass
class SegmentationFlags:
    """Flags of the training; placed before `TrainingArgs`."""

    phrases_per_image: int = field(
        default=2, metadata={"help": "Number of phrases of each image of a batch. All share one pass of CLIP."}
    )
    dice_weight: float = field(
        default=0.0, metadata={"help": "Weight of the Dice loss, which is added to the binary cross-entropy."}
    )
    support: float = field(
        default=0.0,
        metadata={
            "help": "Probability that a phrase is mixed with a support image: an object with the same phrase. "
            "The paper uses 1. 0 disables it."
        },
    )
    cache_gb: float = field(
        default=2.0,
        metadata={
            "help": "Memory for the tokens of all training images, in GB. If they need more, each step encodes its "
            "images. 0 disables the cache."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.phrases_per_image < 1:
            raise ValueError(f"phrases_per_image={self.phrases_per_image} must be at least 1.")
        if not 0 <= self.negatives < 1:
            raise ValueError(f"negatives={self.negatives} must be at least 0 and below 1.")
        if not 0 <= self.support <= 1:
            raise ValueError(f"support={self.support} must be from 0 to 1.")
        if not self.cache_gb >= 0:
            raise ValueError(f"cache_gb={self.cache_gb} must be at least 0.")
        if not (self.dice_weight >= 0 and math.isfinite(self.dice_weight)):
            raise ValueError(f"dice_weight={self.dice_weight} must be at least 0.")


# ---------------------------------------------------------------------------------------------------------------------
# Model


def make_model(args: Any) -> tuple[ClipSegmenterForImageSegmentation, CLIPProcessor]:
    """Create the model that the flags select, with an untrained decoder.

    Args:
        args: Flags with the fields of `ModelFlags` and `image_size`.

    Returns:
        The model and its processor, which resizes images to `image_size` and crops nothing.

    Raises:
        ValueError: If CLIP is missing or not a CLIPModel, or a flag is invalid.
    """
    if args.clip == CLIP_FOLDER and not Path(args.clip).is_dir():
        raise ValueError(
            f"clip={args.clip!r} does not exist. Train it with `scripts/run accelerate launch scripts/train_clip.py`, "
            "or name the folder or Hub id of another CLIP with --clip."
        )
    clip, image_processor, tokenizer = load_clip(args.clip)
    if not isinstance(clip, CLIPModel):
        raise ValueError(f"clip={args.clip!r} is a {type(clip).__name__}. Expected a CLIPModel.")
    if args.untrained_clip:
        clip = CLIPModel(clip.config)
    names = ("decoder_type", "refined", "layers", "reduce_dim", "num_attention_heads", "intermediate_size")
    fields = {name: getattr(args, name) for name in (*names, "dice_weight") if hasattr(args, name)}
    fields["layers"] = choose_layers(args.layers, clip.config.vision_config.num_hidden_layers)
    model = checked_config(ClipSegmenterForImageSegmentation.from_clip, clip=clip, **fields)
    model._grid((args.image_size, args.image_size))  # before any data is loaded
    image_processor = copy.deepcopy(image_processor)
    image_processor.size = {"height": args.image_size, "width": args.image_size}
    image_processor.do_center_crop = False
    return model, CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def choose_layers(layers: list[int] | None, depth: int) -> list[int] | None:
    """Return the blocks of CLIP to read. None selects the default of the config.

    The CLIP of scripts/train_clip.py has four blocks. The tokens of its first block have the sharpest edges, and the
    tokens of its last block know the most about the image.

    Args:
        layers: The flag, or None.
        depth: Number of blocks of the image encoder.

    Example:
        >>> choose_layers(None, 4), choose_layers(None, 12), choose_layers([3, 7, 9], 12)
        ([0, 1, 3], None, [3, 7, 9])
    """
    return [0, 1, 3] if layers is None and depth == 4 else layers


@torch.no_grad()
def embed_phrases(
    model: ClipSegmenterForImageSegmentation, tokenizer: Any, phrases: Sequence[str], *, batch_size: int = 256
) -> torch.Tensor:
    """Embed phrases in batches. Long phrases are truncated.

    Args:
        model: The model.
        tokenizer: The tokenizer of its CLIP.
        phrases: The phrases.
        batch_size: Phrases per batch.

    Returns:
        (phrases, projection_dim), on the device of the model.
    """
    longest = model.clip.config.text_config.max_position_embeddings
    options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
    embeds = []
    for start in range(0, len(phrases), batch_size):
        tokens = tokenizer(list(phrases[start : start + batch_size]), **options).to(model.device)
        embeds.append(model.encode_prompts(tokens["input_ids"], tokens["attention_mask"]))
    return torch.cat(embeds)


def find_known(tokenizer: Any, phrases: Sequence[str]) -> torch.Tensor:
    """Return 1 for phrases with a word that the tokenizer knows, else 0, as float32 (phrases,).

    The pipeline finds nothing for a phrase without a known word, so its probabilities count as 0 in the scores too.
    """
    return torch.tensor([float(knows_a_word(phrase, tokenizer)) for phrase in phrases])


# ---------------------------------------------------------------------------------------------------------------------
# Data


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
            Three tensors, on the device of the batch: the index in `phrases` and the position of the image in the
            batch, int (images * count,) each, and the masks, float32 (images * count, height, width).
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


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def predict(
    model: ClipSegmenterForImageSegmentation,
    processor: CLIPProcessor,
    data: PhraseImages,
    *,
    num_images: int | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Predict the masks of images in batches.

    Args:
        model: The model.
        processor: Its processor.
        data: The images and phrases.
        num_images: Number of images, from the first one on. Defaults to all.

    Yields:
        For each batch `rows` (phrases,), `probabilities` float32 (phrases, height, width), `image` and `masks`, see
        `PhraseImages`. All are on the CPU.
    """
    model.eval()
    embeds = embed_phrases(model, processor.tokenizer, data.phrases)
    known = find_known(processor.tokenizer, data.phrases)
    count = len(data) if num_images is None else min(num_images, len(data))
    for start in range(0, count, BATCH_IMAGES):
        batch = data.__getitems__(range(start, min(start + BATCH_IMAGES, count)))
        index = batch["index"]
        rows = data.rows(index)
        image_index = torch.arange(len(index)).repeat_interleave(data.first[index + 1] - data.first[index])
        logits = model(
            prompt_embeds=embeds[data.phrase_index[rows].to(embeds.device)],
            image_index=image_index.to(embeds.device),
            **data.vision_inputs(batch, processor, model.device),
        ).logits
        probabilities = logits.float().sigmoid().cpu() * known[data.phrase_index[rows], None, None]
        yield {**batch, "rows": rows, "probabilities": probabilities}


def count_pixels(
    model: ClipSegmenterForImageSegmentation, processor: CLIPProcessor, data: PhraseImages
) -> PhraseCounts:
    """Count the pixels from which all scores are computed. Every process counts all phrases."""
    counts = PhraseCounts()
    for batch in predict(model, processor, data):
        subsets = [data.subsets[row] for row in batch["rows"].tolist()]
        counts.update(batch["probabilities"], batch["masks"], subsets=subsets)
    return counts


@torch.no_grad()
def count_original_pixels(pipeline: PhraseSegmentationPipeline, data: datasets.Dataset, side: int) -> PhraseCounts:
    """Count the pixels at the original size of each image, as the evaluation of PhraseCut does.

    Args:
        pipeline: The pipeline.
        data: Rows with images and masks of any size, see `hf_dl.data.phrasecut`.
        side: Height and width to which the images are resized for the model. The logits are interpolated back.
    """
    counts, model = PhraseCounts(), pipeline.model
    ids, phrases = list(data["image_id"]), list(data["phrase"])
    subsets = name_subsets(data)
    for _, group in itertools.groupby(range(len(ids)), key=ids.__getitem__):
        rows = list(group)
        pixel_values = pipeline.prepare(to_rgb(data[rows[0]]["image"]), (side, side)).to(model.device)
        embeds = embed_phrases(model, pipeline.tokenizer, [phrases[row] for row in rows])
        logits = model(pixel_values, prompt_embeds=embeds).logits.float()
        masks = torch.from_numpy(np.stack([np.asarray(mask) > 0 for mask in data[rows]["mask"]]))
        logits = F.interpolate(logits[:, None], masks.shape[1:], mode="bilinear")[:, 0]
        known = find_known(pipeline.tokenizer, [phrases[row] for row in rows])
        counts.update(logits.sigmoid().cpu() * known[:, None, None], masks, subsets=[subsets[row] for row in rows])
    return counts


def name_subsets(data: datasets.Dataset) -> list[list[str]]:
    """Return the names of the subsets of each row, with "seen" or "unseen"."""
    seen = data["seen"][:] if "seen" in data.column_names else [True] * len(data)
    named = data["subsets"][:] if "subsets" in data.column_names else [[]] * len(data)
    return [[*names, "seen" if each else "unseen"] for names, each in zip(named, seen, strict=True)]


def scores(counts: PhraseCounts, *, threshold: float | None = None, all_subsets: bool = False) -> dict[str, float]:
    """Compute the scores of `hf_dl.metrics.phrase_segmentation`, with the conventions of CLIPSeg.

    Args:
        counts: The counts of one split.
        threshold: Threshold of the masks. Defaults to the best one of these counts; use this on validation data only.
        all_subsets: Whether to score all subsets. By default, these are phrases of seen and unseen combinations.

    Returns:
        The scores that are defined. `seen` and `unseen` are left out if they have no phrases.
    """
    threshold = best_threshold(counts) if threshold is None else threshold
    found = phrase_segmentation_scores(counts, threshold=threshold, compat="clipseg")
    overall = {"miou", "cum_iou", "ap", "pr", "false", "absent", "phrases", "threshold", "clipseg"}
    several = found.get("unseen_phrases", 0) and found.get("seen_phrases", 0)
    kept = overall | ({"seen", "unseen"} if several else set())
    return {
        name: value
        for name, value in found.items()
        if math.isfinite(value) and (all_subsets or name.split("_")[0] in kept or name == "cum_iou")
    }


# ---------------------------------------------------------------------------------------------------------------------
# Report


def draw_examples(
    model: ClipSegmenterForImageSegmentation,
    processor: CLIPProcessor,
    data: PhraseImages,
    path: Path,
    *,
    num_images: int = 5,
) -> Path:
    """Draw images with their phrases: the image, the true mask, the probabilities and the predicted mask.

    Each image is shown with its longest phrase of at most 14 characters, and with a false phrase if it has one.

    Args:
        model: The model, whose config has the threshold.
        processor: Its processor.
        data: The images. The first ones are drawn.
        path: The PNG file to write.
        num_images: Number of images.

    Returns:
        The path.
    """
    rows, labels = [], []
    for batch in predict(model, processor, data, num_images=num_images):
        texts = [data.phrases[number] for number in data.phrase_index[batch["rows"]].tolist()]
        begin = 0
        for index, pixels in zip(batch["index"].tolist(), batch["image"], strict=True):
            mine = range(begin, begin + int(data.first[index + 1] - data.first[index]))
            begin = mine.stop
            present = [row for row in mine if batch["masks"][row].any()]
            short = [row for row in present if len(texts[row]) <= 14] or present[:1]
            absent = [row for row in mine if row not in present][:1]
            for row in [*([max(short, key=lambda row: len(texts[row]))] if short else []), *absent]:
                picture, probability = pixels.permute(1, 2, 0).numpy(), batch["probabilities"][row].numpy()
                heat = np.asarray(draw_heat_map(Image.fromarray(picture), probability))
                true, predicted = batch["masks"][row].numpy() > 0, probability > model.config.threshold
                rows.append([picture, _cut_out(picture, true), heat, _cut_out(picture, predicted)])
                labels.append(texts[row][:16])
    titles = ["image", "true mask", "probability", "predicted"]
    return image_grid(rows, path, titles=titles, labels=labels, cell=1.1)


def _cut_out(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Keep the pixels of a mask, and make the others light gray."""
    return np.where(mask[..., None], picture, np.uint8(225))


def write_subsets(found: Mapping[str, float], folder: Path) -> list[list[str]]:
    """Write the scores of all subsets to subsets.csv, and return its rows as text, the header first."""
    names = ("phrases", "miou", "cum_iou", "pr_50", "pr_70", "pr_90", "ap")
    subsets = [name.removesuffix("_miou") for name in found if name.endswith("_miou") and name != "clipseg_miou"]
    rows = [["all", *(found.get(name, "") for name in names)]]
    rows += [[subset, *(found.get(f"{subset}_{name}", "") for name in names)] for subset in subsets]
    lines = [["subset", *names], *([row[0], str(int(row[1])), *(f"{value:.4f}" for value in row[2:])] for row in rows)]
    with open(folder / "subsets.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    return lines


def usage(folder: Path) -> str:
    """Return Python code that loads a trained model and segments an image."""
    calls = (
        'phrases = ["red cube", "blue sphere"]\n'
        'inputs = processor(text=phrases, images=Image.open("image.png"), padding=True, truncation=True, '
        'return_tensors="pt")\n'
        "masks = model(**inputs).logits.sigmoid() > model.config.threshold  # (phrases, height, width)"
    )
    return usage_snippet(folder, "ClipSegmenterForImageSegmentation", calls=calls)


@activity("Writing the report")
def write_report(folder: Path) -> None:
    """Write the learning curves and the model card of a finished run into its folder, and print the paths."""
    plot_run(folder, folder / "curves.png", CURVES)
    tags = ("clip", "clipseg", "image-segmentation", "phrase-segmentation")
    card = run_card(folder, summary=SUMMARY, usage=usage(folder), limits=LIMITS, tags=tags)
    card.save(folder / "README.md")
    print(f"checkpoint  {folder}  (PhraseSegmentationPipeline.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
    print(f"pictures    {folder / 'examples.png'}, curves.png")
