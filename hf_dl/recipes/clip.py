"""CLIP: the flags, data, model, tokenizer, evaluation and report of a training run.

scripts/train_clip.py trains the `CLIPModel` of transformers with a small config on image-caption pairs (Radford et al.
2021, https://arxiv.org/abs/2103.00020). zero_shot_classifier.py classifies images with the trained model.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hf_dl.data import captions, zero_shot
from hf_dl.data.image_arrays import ImageTensors
from hf_dl.data.surfaces import COLORS
from hf_dl.metrics.modality_gap import modality_gap_scores
from hf_dl.models.clip_features import encode_texts
from hf_dl.progress import activity
from hf_dl.reporting.card import run_card, usage_snippet
from hf_dl.reporting.plots import plot_run
from hf_dl.training.batches import mix_seed

from .clip_init import init_like_convolution, init_like_word_average
from .evaluation import checked_config, hide_progress_bars, report_data, split_size
from .phrase_mismatch import mismatch_scores
from .zero_shot_classifier import STYLES, classify, encode_images

SUMMARY = (
    "A small CLIP model (Radford et al. 2021): an image encoder and a text encoder whose features match for an image "
    "and its caption. It classifies images by text prompts."
)
LIMITS = (
    "It knows the words of its training captions only. Other words become one unknown token.",
    "It assigns one of the given prompts to every image, including images that match none of them.",
)
CURVES = {
    "loss": {"training": "loss", "validation pairs": "val_loss"},
    "zero-shot accuracy": {
        "seen combinations": "val_plain_seen_accuracy",
        "unseen combinations": "val_plain_unseen_accuracy",
    },
    "temperature": {"temperature": "temperature"},
}
COLOR_WORDS = (  # the basic color terms of Berlin & Kay (1969), and the other colors of scenes
    *("black", "white", "red", "green", "yellow", "blue", "brown", "purple", "pink", "orange", "gray", "grey"),
    *(color for color in COLORS if color not in ("red", "green", "yellow", "blue", "brown", "purple", "gray")),
)
SPECIAL = ("<pad>", "<start>", "<unk>", "<end>")  # CLIPTextModel pools at the wrong token if the id of <end> is 2
FIRST_TEMPERATURE = 0.07
LOWEST_TEMPERATURE = 0.01  # CLIP does not multiply cosines by more than 100
BATCH_SIZE = 128  # pairs per batch of the validation loss
RECALL_PAIRS = 1000  # candidates for recall at 1, which depends on their number


# ---------------------------------------------------------------------------------------------------------------------
# Flags


@dataclass
class PairFlags:
    """Flags that select the image-caption pairs."""

    source: str = field(
        default="synthetic",
        metadata={"help": "synthetic (generated scenes), a Hub dataset id, or a folder of images with captions."},
    )
    annotations: str = field(
        default="", metadata={"help": "File with the captions of a folder of images: COCO's JSON, or Flickr's CSV."}
    )
    detail: Literal["rich", "partial", "poor"] = field(
        default="rich", metadata={"help": "Information in the captions of synthetic scenes."}
    )
    style: Literal["plain", "textured"] = field(default="plain", metadata={"help": "Look of the synthetic scenes."})
    num_objects: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "Fewest and most objects per synthetic scene."}
    )
    image_size: int = field(default=64, metadata={"help": "Height and width of the images, in pixels."})
    num_train: int = field(
        default=0, metadata={"help": "Number of training images. 0 uses all images, 16000 for source=synthetic."}
    )
    num_test: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of validation images, and of test images. 0 uses all images. Defaults to all, and "
            "to at most half of num_train."
        },
    )
    holdout: float = field(
        default=0.1, metadata={"help": "Fraction of the training images that replaces a missing split."}
    )
    corrupt: Literal["refuse", "skip"] = field(
        default="refuse", metadata={"help": "Damaged images: refuse stops with an error, skip leaves them out."}
    )
    zero_shot: str = field(
        default="",
        metadata={
            "help": "Labeled images for the zero-shot accuracy: a Hub dataset id, or a folder. Defaults to scenes "
            "with one object if the pairs are synthetic, and else to no such evaluation."
        },
    )


@dataclass
class ModelFlags:
    """Flags that select the size of the model."""

    patch_size: int = field(default=8, metadata={"help": "Side of an image patch, in pixels."})
    hidden_size: int = field(default=64, metadata={"help": "Channels per patch and per word."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Number of transformer blocks of the image encoder."})
    text_layers: int = field(default=2, metadata={"help": "Number of transformer blocks of the text encoder."})
    num_heads: int = field(default=4, metadata={"help": "Attention heads per transformer block."})
    freeze_patches: bool = field(
        default=True,
        metadata={
            "help": "Keep the initial patch embedding: edges in gray and mean colors. The shape of an object is then "
            "read in the same way for all colors."
        },
    )
    projection_dim: int = field(default=64, metadata={"help": "Number of features of an image, and of a text."})
    vocab_size: int = field(
        default=8192, metadata={"help": "Largest number of words. The most frequent words of the captions are kept."}
    )
    max_length: int = field(
        default=32, metadata={"help": "Largest number of words of a caption, with the start and the end token."}
    )


@dataclass
class ContrastiveFlags:
    """Flags of the contrastive training; placed before `TrainingArgs`."""

    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Fixed temperature of the contrastive loss. By default, it is learned from 0.07, at least 0.01."
        },
    )
    shift: float = field(
        default=4.0, metadata={"help": "Maximum random shift of the training images in pixels. 0 disables it."}
    )
    zoom: float = field(
        default=0.2, metadata={"help": "Maximum random change of the size of the training images, as a fraction."}
    )
    jitter: float = field(
        default=0.4,
        metadata={"help": "Maximum random change of brightness, saturation and contrast, as a fraction."},
    )
    recolor: float = field(
        default=0.5,
        metadata={
            "help": "Probability that the hues of a training image change at random, and that the color words of its "
            "caption become the unknown token."
        },
    )
    word_dropout: float = field(
        default=0.1,
        metadata={
            "help": "Probability that a word of a training caption becomes the unknown token, from 0 to below 1."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0.")
        if not 0 <= self.shift < self.image_size:
            raise ValueError(f"shift={self.shift} must be at least 0 and below image_size={self.image_size}.")
        for name in ("zoom", "jitter", "recolor", "word_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")
        if self.accumulation > 1:
            raise ValueError(
                f"accumulation={self.accumulation} is not supported: the contrastive loss compares each image with "
                "all captions of its batch. Use a smaller batch_size, or more processes."
            )
        make_config(self, vocab_size=len(SPECIAL) + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and model


def make_tokenizer(texts: Iterable[str], *, vocab_size: int = 8192, max_length: int = 32) -> PreTrainedTokenizerFast:
    """Create a tokenizer with one token per word. Case and punctuation are ignored.

    Args:
        texts: The captions. The most frequent words become the vocabulary.
        vocab_size: Largest number of words, without the four special tokens.
        max_length: Largest number of tokens of a text, with the start and the end token.

    Returns:
        The tokenizer. The id of its end token is 3: with an id of 2, `CLIPTextModel` would pool at the highest id.

    Raises:
        ValueError: If the texts have no words.

    Example:
        >>> tokenizer = make_tokenizer(["a red cube", "a cone"])
        >>> tokenizer("A cube.")["input_ids"], tokenizer("a tree")["input_ids"]
        ([1, 4, 6, 3], [1, 4, 2, 3])
    """
    normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " ")]
    )
    counts = Counter(word for text in texts for word in normalizer.normalize_str(text).split())
    if not counts:
        raise ValueError("The captions have no words. Expected texts such as 'a red cube'.")
    words = sorted(counts, key=lambda word: (-counts[word], word))[:vocab_size]
    ids = {word: number for number, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(name, ids[name]) for name in ("<start>", "<end>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        **{"pad_token": "<pad>", "bos_token": "<start>", "unk_token": "<unk>", "eos_token": "<end>"},
    )


def make_config(args: Any, *, vocab_size: int) -> CLIPConfig:
    """Create the config of the model that the flags select.

    Args:
        args: Flags with the fields of `ModelFlags` and `image_size`.
        vocab_size: Number of tokens, with the special tokens.

    Raises:
        ValueError: If a size is not positive, or sizes do not fit each other.
    """
    for name in ("patch_size", "hidden_size", "num_hidden_layers", "text_layers", "num_heads", "projection_dim"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} must be at least 1.")
    if args.image_size % args.patch_size:
        raise ValueError(f"image_size={args.image_size} must be a multiple of patch_size={args.patch_size}.")
    if args.image_size < 2 * args.patch_size or args.hidden_size < max(8, 4 * args.num_heads):
        raise ValueError(
            f"image_size={args.image_size} must be at least 2 x patch_size={args.patch_size}, and "
            f"hidden_size={args.hidden_size} at least 8 and at least 4 x num_heads={args.num_heads}."
        )
    if args.max_length < 3:
        raise ValueError(f"max_length={args.max_length} must be at least 3: the start token, a word, the end token.")
    if args.vocab_size < 1:
        raise ValueError(f"vocab_size={args.vocab_size} must be at least 1.")
    both = {
        "hidden_size": args.hidden_size,
        "intermediate_size": 2 * args.hidden_size,
        "num_attention_heads": args.num_heads,
        "hidden_act": "gelu",  # one fused operation on CPUs, unlike quick_gelu
        "projection_dim": args.projection_dim,
    }
    pad, start, _, end = range(len(SPECIAL))
    text = {
        "vocab_size": vocab_size,
        "max_position_embeddings": args.max_length,
        "num_hidden_layers": args.text_layers,
    }
    text |= {"pad_token_id": pad, "bos_token_id": start, "eos_token_id": end}
    image = {"image_size": args.image_size, "patch_size": args.patch_size, "num_hidden_layers": args.num_hidden_layers}
    return checked_config(
        CLIPConfig, text_config=text | both, vision_config=image | both, projection_dim=args.projection_dim
    )


def make_model(args: Any, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """Create the model that the flags select.

    Args:
        args: Flags with the fields of `ModelFlags`, `image_size` and `temperature`.
        tokenizer: The tokenizer of the captions.

    Returns:
        The model. Its image encoder starts as a convolutional network. Its `logit_scale`, the logarithm of
        1 / temperature, is trainable if `temperature` is None.
    """
    model = CLIPModel(make_config(args, vocab_size=len(tokenizer)))
    init_like_convolution(model.vision_model)
    init_like_word_average(model.text_model, tokenizer.all_special_ids)
    model.vision_model.embeddings.patch_embedding.requires_grad_(not args.freeze_patches)
    with torch.no_grad():
        model.logit_scale.fill_(-math.log(args.temperature or FIRST_TEMPERATURE))
    model.logit_scale.requires_grad_(args.temperature is None)
    return model


@torch.no_grad()
def clamp_temperature(model: CLIPModel) -> None:
    """Keep the learned temperature at `LOWEST_TEMPERATURE` or above, as CLIP does after each step."""
    if model.logit_scale.requires_grad:
        model.logit_scale.clamp_(max=-math.log(LOWEST_TEMPERATURE))


def make_processor(train: "ImageCaptions", tokenizer: PreTrainedTokenizerFast) -> CLIPProcessor:
    """Create the processor to save with the model: an image processor and the tokenizer.

    Args:
        train: The training images, whose channel mean and standard deviation are used.
        tokenizer: The tokenizer.
    """
    mean, std = train.channel_statistics()
    size = train.pixels.shape[-1]
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=2,  # bilinear
        image_mean=mean,
        image_std=std,
    )
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Data


class ImageCaptions(torch.utils.data.Dataset):
    """Images as uint8 tensors in memory, and their captions.

    Attributes:
        pixels: uint8 (images, 3, height, width).
        captions: List of captions of each image.

    Args:
        dataset: Rows with `image` and `captions`, see `hf_dl.data.captions`.

    Raises:
        ValueError: If an image has no caption.
    """

    def __init__(self, dataset: datasets.Dataset):
        self.captions: list[list[str]] = list(dataset["captions"])
        empty = next((row for row, texts in enumerate(self.captions) if not texts), None)
        if empty is not None:
            raise ValueError(f"Row {empty} of the pairs has no caption. Remove the images without captions.")
        self.pixels = ImageTensors(dataset).kept["image"]

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def num_words(self) -> list[float]:
        """Mean number of words per caption of each image."""
        return [sum(len(text.split()) for text in texts) / len(texts) for texts in self.captions]

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return several rows: image uint8 (rows, 3, height, width) and index (rows,)."""
        index = torch.as_tensor(indices)
        return {"image": self.pixels[index], "index": index}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one row: image (3, height, width) and index ()."""
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def channel_statistics(self, max_images: int = 2000) -> tuple[list[float], list[float]]:
        """Compute mean and standard deviation of each channel, in [0, 1], over the first `max_images` images."""
        values = self.pixels[:max_images].transpose(0, 1).flatten(1).double() / 255
        # at least 0.01, because images are divided by the standard deviation
        return [round(m, 4) for m in values.mean(1).tolist()], [max(round(s, 4), 0.01) for s in values.std(1).tolist()]


def load_pairs(args: PairFlags, split: str) -> ImageCaptions:
    """Load one split of the image-caption pairs that the flags select.

    Args:
        args: The flags.
        split: "train", "validation" or "test".
    """
    hide_progress_bars()
    count = split_size(args, split, captions.SPLITS[split] if args.source == "synthetic" else None)
    data = captions.load(
        split,
        args.source,
        annotations=args.annotations or None,
        detail=args.detail,
        style=args.style,
        size=args.image_size,
        num_objects=tuple(args.num_objects),
        num_pairs=count,
        holdout=args.holdout,
        corrupt=args.corrupt,
    )
    report_data(data, split)
    return ImageCaptions(data)


def load_labeled(args: PairFlags, split: str) -> datasets.Dataset | None:
    """Load labeled images for the zero-shot accuracy of a training run.

    Args:
        args: The flags.
        split: "validation" or "test".

    Returns:
        Rows with `image`, `label` and `seen`, or None if the flags name no such images.
    """
    source = args.zero_shot or ("synthetic" if args.source == "synthetic" else "")
    if not source:
        return None
    count = split_size(args, split, zero_shot.SPLITS[split] if source == "synthetic" else None)
    options = {"size": args.image_size, "style": args.style, "corrupt": args.corrupt}
    return zero_shot.load(split, source, num_images=count, **options)


class CaptionTokens:
    """The tokens of all captions, so that a batch needs no tokenizer.

    Args:
        texts: Captions of each image, at least one.
        tokenizer: The tokenizer.
    """

    def __init__(self, texts: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerFast):
        self.counts = torch.tensor([len(each) for each in texts])
        self._first = self.counts.cumsum(0) - self.counts  # row of the first caption of each image
        flat = [text for each in texts for text in each]
        self._ids = tokenizer(flat, padding=True, truncation=True, return_tensors="pt")["input_ids"].int()
        self._pad, self._unknown = tokenizer.pad_token_id, tokenizer.unk_token_id
        vocabulary = tokenizer.get_vocab()
        self._colors = torch.tensor([vocabulary[word] for word in COLOR_WORDS if word in vocabulary])

    def pick(self, index: torch.Tensor, choice: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tokens of one caption per image.

        Args:
            index: Indices of the images (batch,).
            choice: Numbers in [0, 1) that select one of the captions of each image (batch,).

        Returns:
            `input_ids` and `attention_mask` (batch, length of the longest caption).
        """
        row = self._first[index] + (choice * self.counts[index]).long()
        ids = self._ids[row].long()
        mask = (ids != self._pad).long()
        longest = int(mask.sum(1).max())
        return {"input_ids": ids[:, :longest], "attention_mask": mask[:, :longest]}

    def drop_words(
        self, tokens: Mapping[str, torch.Tensor], rate: float, draws: torch.Tensor, *, recolored: torch.Tensor
    ) -> dict[str, Any]:
        """Replace words by the unknown token, so that unknown words in a prompt do little harm.

        Args:
            tokens: `input_ids` and `attention_mask`.
            rate: Probability of each word.
            draws: Uniform numbers in [0, 1), at least as many columns as words, (batch, words).
            recolored: Captions that lose all of their color words, bool (batch,).

        Returns:
            The tokens. The special tokens never change.
        """
        ids = tokens["input_ids"]
        dropped = (draws[:, : ids.shape[1]] < rate) & (ids >= len(SPECIAL))
        dropped |= recolored[:, None] & torch.isin(ids, self._colors)
        return {**tokens, "input_ids": ids.masked_fill(dropped, self._unknown)}


def draw_for_batch(run: Any, columns: int) -> torch.Tensor:
    """Draw uniform numbers for the examples of this process, the same for any number of processes.

    `run.generator` differs between processes. These numbers depend on the seed, the step and the place of an example
    in the whole batch.

    Args:
        run: The `TrainingRun`.
        columns: Numbers per example.

    Returns:
        Numbers in [0, 1), (examples of this process, columns), on the CPU.
    """
    generator = torch.Generator().manual_seed(mix_seed(run.args.seed, "clip", run.restarts, run.steps))
    draws = torch.rand(run.args.batch_size, columns, generator=generator)
    return draws.chunk(run.accelerator.num_processes)[run.accelerator.process_index]


def vary_images(
    images: torch.Tensor,
    draws: torch.Tensor,
    *,
    shift: float = 0.0,
    zoom: float = 0.0,
    jitter: float = 0.0,
    recolored: torch.Tensor | None = None,
) -> torch.Tensor:
    """Shift and zoom each image, and change its brightness, saturation, contrast, and on request its hues.

    Args:
        images: Images (batch, 3, height, width) of any dtype.
        draws: Uniform numbers in [0, 1) (batch, 7): for both shifts, the zoom, the three changes of color and the hue.
        shift: Largest shift in each direction, in pixels. The border is repeated.
        zoom: Largest change of the size, as a fraction.
        jitter: Largest change of brightness, saturation and contrast, as a fraction.
        recolored: Images whose hues are rotated by any angle, bool (batch,). Gray stays gray.

    Returns:
        Float images of the same shape, which may exceed the range of the originals.

    Example:
        >>> image = torch.tensor([[[[1, 2, 3]]]]).expand(1, 3, 1, 3)
        >>> vary_images(image, torch.tensor([[0.5, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]]), shift=1)[0, 0]
        tensor([[2., 3., 3.]])
    """
    images, draws = images.float(), 2 * draws.to(images.device) - 1
    size = torch.tensor(images.shape[:1:-1], device=images.device)  # width, height
    if shift or zoom:
        affine = torch.zeros(len(images), 2, 3, device=images.device)
        affine[:, 0, 0] = affine[:, 1, 1] = 1 + zoom * draws[:, 2]
        affine[:, :, 2] = 2 * shift * draws[:, [1, 0]] / size
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    if jitter:
        brightness, saturation, contrast = (1 + jitter * draws[:, 3:6, None, None, None]).unbind(1)
        images = images * brightness
        gray = images.mean(1, keepdim=True)
        images = gray + saturation * (images - gray)
        mean = images.mean((1, 2, 3), keepdim=True)
        images = mean + contrast * (images - mean)
    if recolored is not None and recolored.any():
        angle = math.pi * draws[:, 6, None, None] * recolored.to(images.device)[:, None, None]
        # rotation of RGB around the axis of the grays, by Rodrigues' formula
        across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=images.device) / math.sqrt(3)
        turn = torch.eye(3, device=images.device) + angle.sin() * across + (1 - angle.cos()) * across @ across
        images = torch.einsum("bij,bjhw->bihw", turn, images)
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Features of several processes


class _GatherFeatures(torch.autograd.Function):
    """Concatenate the features of all processes. The gradient of each process reaches the features it came from."""

    @staticmethod
    def forward(ctx, features: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(features) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, features.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def gather_features(features: torch.Tensor) -> torch.Tensor:
    """Concatenate the features of all processes, in their order. Gradients flow back to each of them.

    Args:
        features: Features (batch, dim); every process has the same number.

    Returns:
        Features (batch * processes, dim). With one process, the same tensor.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return _GatherFeatures.apply(features) if several and torch.distributed.get_world_size() > 1 else features


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation during training, and the report


def pair_scores(image_features: torch.Tensor, text_features: torch.Tensor, scale: float) -> dict[str, float]:
    """Compute the scores of image-caption pairs.

    Args:
        image_features: Features of length 1 (pairs, dim).
        text_features: Features of one caption per image, (pairs, dim).
        scale: 1 / temperature.

    Returns:
        `loss`, the contrastive loss of batches of `BATCH_SIZE` pairs, and the scores of
        `hf_dl.metrics.modality_gap.modality_gap_scores`.
    """
    losses = []
    for images, texts in zip(image_features.split(BATCH_SIZE), text_features.split(BATCH_SIZE), strict=True):
        logits, targets = scale * images @ texts.T, torch.arange(len(images))
        each = F.cross_entropy(logits, targets, reduction="none") + F.cross_entropy(
            logits.T, targets, reduction="none"
        )
        losses.append(each / 2)
    return {"loss": torch.cat(losses).mean().item(), **modality_gap_scores(image_features, text_features)}


def image_recall(image_features: torch.Tensor, text_features: torch.Tensor, texts: Sequence[str]) -> float:
    """Compute the recall at 1: the share of images whose most similar caption, of at most 1000, is their own.

    Args:
        image_features: Features of length 1 (pairs, dim).
        text_features: Features of one caption per image, (pairs, dim).
        texts: The captions. The same caption of another image counts as correct.
    """
    nearest = (image_features[:RECALL_PAIRS] @ text_features[:RECALL_PAIRS].T).argmax(dim=1).tolist()
    return sum(texts[i] == texts[j] for i, j in enumerate(nearest)) / len(nearest)


def evaluate(
    model: PreTrainedModel, processor: Any, pairs: ImageCaptions, labeled: datasets.Dataset | None, *, split: str
) -> dict[str, float]:
    """Compute the scores of a CLIP model on one split. Every process computes the same scores.

    Args:
        model: The model.
        processor: Its processor.
        pairs: Image-caption pairs.
        labeled: Labeled images for the zero-shot accuracy, or None.
        split: Prefix of the scores.

    Returns:
        Scores such as `val_loss`, `val_recall_at_1`, `val_centroid_distance` and `val_plain_accuracy`; see
        `pair_scores`, `ZeroShotResult.scores` and `hf_dl.recipes.phrase_mismatch`.
    """
    texts = [each[0] for each in pairs.captions]
    images, captioned = encode_images(model, pairs.pixels, processor), encode_texts(model, texts, processor)
    scores = pair_scores(images, captioned, model.logit_scale.exp().item())
    scores["recall_at_1"] = image_recall(images, captioned, texts)
    if labeled is not None:
        result = classify(model, processor, labeled, STYLES)
        threshold = getattr(model.config, "match_threshold", None)
        cosines = result.cosines[STYLES[0]]
        scores |= result.scores() | mismatch_scores(cosines, result.labels, result.names, threshold=threshold)
    return {f"{split}_{name}": value for name, value in scores.items()}


def usage(folder: Path) -> str:
    """Return Python code that loads a trained model and compares an image with prompts."""
    calls = (
        'prompts = ["a photo of a red cube", "a photo of a blue sphere"]\n'
        'inputs = processor(text=prompts, images=Image.open("image.png"), padding=True, truncation=True, '
        'return_tensors="pt")\n'
        "print(model(**inputs).logits_per_image.softmax(dim=-1))"
    )
    return usage_snippet(folder, "CLIPModel", calls=calls)


@activity("Writing the report")
def write_report(folder: Path) -> None:
    """Write the learning curves and the model card of a finished run, and print where they are."""
    plot_run(folder, folder / "curves.png", CURVES)
    card = run_card(folder, summary=SUMMARY, usage=usage(folder), limits=LIMITS, tags=("clip", "zero-shot"))
    card.save(folder / "README.md")
    print(f"checkpoint  {folder}  (CLIPModel.from_pretrained, AutoProcessor.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
