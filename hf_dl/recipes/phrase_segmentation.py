"""Segmentation from phrases: the flags, model, evaluation and report that the scripts share.

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

from hf_dl.metrics.phrase_segmentation import PhraseCounts, best_threshold, phrase_segmentation_scores
from hf_dl.models.clip_decoders import DECODERS
from hf_dl.models.clip_features import knows_a_word
from hf_dl.models.clip_segmenter import ClipSegmenterForImageSegmentation
from hf_dl.models.image_input import to_rgb
from hf_dl.pipelines.phrase_segmentation import PhraseSegmentationPipeline, draw_heat_map
from hf_dl.progress import activity
from hf_dl.reporting.card import run_card, usage_snippet
from hf_dl.reporting.grids import image_grid
from hf_dl.reporting.plots import plot_run

from .evaluation import checked_config
from .phrase_images import BATCH_IMAGES, PhraseImages, name_subsets
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


# ---------------------------------------------------------------------------------------------------------------------
# Flags


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
        if self.accumulation > 1:
            raise ValueError(
                f"accumulation={self.accumulation} is not supported: the phrases of a step are drawn for the whole "
                "batch. Use a smaller batch_size, or more processes."
            )
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
