"""CLIP: the flags, model, tokenizer, evaluation and report of a training run. clip_data.py has the data.

scripts/train_clip.py trains the `CLIPModel` of transformers with a small config on image-caption pairs (Radford et al.
2021, https://arxiv.org/abs/2103.00020). zero_shot_classifier.py classifies images with the trained model.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

from hf_dl.metrics.modality_gap import modality_gap_scores
from hf_dl.metrics.paired import Comparison, compare, comparison_scores
from hf_dl.models.clip_features import encode_texts
from hf_dl.progress import activity
from hf_dl.reporting.card import run_card, usage_snippet
from hf_dl.reporting.experiment import read_results
from hf_dl.reporting.plots import plot_run

from .clip_data import SPECIAL, ImageCaptions
from .clip_init import init_like_convolution, init_like_word_average
from .evaluation import checked_config
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
FIRST_TEMPERATURE = 0.07
LOWEST_TEMPERATURE = 0.01  # CLIP does not multiply cosines by more than 100
BATCH_SIZE = 128  # pairs per batch of the validation loss
RECALL_PAIRS = 1000  # candidates for recall at 1, which depends on their number


# ---------------------------------------------------------------------------------------------------------------------
# Flags


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


def make_processor(train: ImageCaptions, tokenizer: PreTrainedTokenizerFast) -> CLIPProcessor:
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
) -> tuple[dict[str, float], list[Comparison]]:
    """Compute the scores of a CLIP model on one split. Every process computes the same scores.

    Args:
        model: The model.
        processor: Its processor.
        pairs: Image-caption pairs.
        labeled: Labeled images for the zero-shot accuracy, or None.
        split: Prefix of the scores.

    Returns:
        Scores such as `val_loss`, `val_recall_at_1`, `val_centroid_distance` and `val_plain_accuracy`; see
        `pair_scores`, `ZeroShotResult.scores` and `hf_dl.recipes.phrase_mismatch`. Then the comparisons of the prompt
        styles with each other, none without labeled images.
    """
    texts = [each[0] for each in pairs.captions]
    images, captioned = encode_images(model, pairs.pixels, processor), encode_texts(model, texts, processor)
    scores = pair_scores(images, captioned, model.logit_scale.exp().item())
    scores["recall_at_1"] = image_recall(images, captioned, texts)
    comparisons: list[Comparison] = []
    if labeled is not None:
        result = classify(model, processor, labeled, STYLES)
        threshold = getattr(model.config, "match_threshold", None)
        cosines = result.cosines[STYLES[0]]
        scores |= result.scores() | mismatch_scores(cosines, result.labels, result.names, threshold=threshold)
        comparisons = compare(result.correct)
    return {f"{split}_{name}": value for name, value in scores.items()}, comparisons


def style_scores(comparisons: Sequence[Comparison], *, split: str) -> dict[str, float]:
    """Return the differences between prompt styles as scores such as `test_photo_minus_plain_p_value`."""
    return {f"{split}_{name}": value for name, value in comparison_scores(comparisons, STYLES).items()}


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
    lines = [f"- {each['sentence']}" for each in read_results(folder).get("comparisons", [])]
    notes = "\n".join(["Prompt styles on the same test images:", "", *lines]) if lines else None
    options = {"summary": SUMMARY, "usage": usage(folder), "limits": LIMITS, "tags": ("clip", "zero-shot")}
    card = run_card(folder, notes=notes, **options)
    card.save(folder / "README.md")
    print(f"checkpoint  {folder}  (CLIPModel.from_pretrained, AutoProcessor.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
