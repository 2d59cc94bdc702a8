"""Image captions: the flags, data, model, evaluation, figures and report that the scripts share.

scripts/train_captioner.py trains an `ImageCaptionerForConditionalGeneration`, and scripts/evaluate_captioner.py scores
a saved model. All scores are free-running: the model reads its own words, never the true ones.
"""

import copy
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoProcessor, CLIPImageProcessor

from hf_dl.data import captions, scenes
from hf_dl.data.caption_tokenizer import build_caption_tokenizer, extend_caption_tokenizer
from hf_dl.data.image_arrays import ImageTensors
from hf_dl.data.scene_captions import parse_caption, scene_captions
from hf_dl.metrics.caption_objects import ATTRIBUTES, caption_object_scores, match_objects
from hf_dl.metrics.captions import caption_scores
from hf_dl.models.caption_decoder import ATTENTIONS, CONDITIONINGS
from hf_dl.models.caption_processor import ImageCaptionerProcessor
from hf_dl.models.detection_backbone import load_classifier_weights, load_published_weights
from hf_dl.models.image_captioner import ImageCaptionerConfig, ImageCaptionerForConditionalGeneration, word_maps
from hf_dl.models.layers_recurrent import CELLS
from hf_dl.progress import activity
from hf_dl.reporting.card import LOCAL_ID, run_card
from hf_dl.reporting.grids import color_heat, image_grid
from hf_dl.reporting.plots import plot_run

from .evaluation import checked_config, hide_progress_bars, load_model, split_size
from .trained_backbone import load_backbone

SPLITS = {"train": "train", "val": "validation", "test": "test"}  # from the prefix of the metrics to the split
SCENES = {"train": 10_000, "validation": 500, "test": 500}  # default numbers of generated scenes
CONFIG_FIELDS = (  # flags that are fields of the model's config
    "backbone", "freeze_encoder", "conditioning", "feature_size", "embedding_size", "cell", "decoder_hidden_size",
    "attention_size", "dropout", "image_size",
)  # fmt: skip
CHANGEABLE = ("freeze_encoder", "dropout")  # fields that may differ from the saved captioner
BATCH_SIZE = 100  # images per batch during evaluation
TOLERANCE = 4  # pixels between the point of an attention map and the object; half a cell of the feature map
SUMMARY = (
    "An image captioner: a convolutional network makes a feature map, and a recurrent network describes it word by "
    "word (Vinyals et al. 2015; Xu et al. 2015)."
)
LIMITS = (
    "It describes images like its training images, with the words of its training captions.",
    "It also describes images without any known object, and then names objects that are not there.",
    "After a short training, many objects that it names are not in the image. `test_hallucinated` is their share.",
)
USAGE = f"""\
from transformers import pipeline

pipe = pipeline("image-text-to-text", "{LOCAL_ID}", trust_remote_code=True)
print(pipe("image.png", text=""))  # text is the start of the caption"""
CURVES = {
    "loss": {"training": "loss", "validation": "val_loss"},
    "words": {"BLEU-4": "val_bleu_4", "ROUGE-L": "val_rouge_l"},
    "objects": {
        "attributes right": "val_attribute_accuracy",
        "hallucinated": "val_hallucinated",
        "all right": "val_all_right",
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# Flags


@dataclass
class CaptionFlags:
    """Flags that select the images and captions, for training and for evaluation."""

    source: str = field(
        default="synthetic",
        metadata={
            "help": "synthetic (generated scenes), a folder of COCO or Flickr, a folder with images and a table of "
            "captions, or a Hub dataset id."
        },
    )
    annotations: str = field(
        default="", metadata={"help": "File of the captions, if source is a folder of images without one."}
    )
    image_column: str = field(default="", metadata={"help": "Column of the images. Defaults to the first one."})
    caption_column: str = field(default="", metadata={"help": "Column of the captions. Defaults to a known name."})
    image_size: int = field(
        default=64, metadata={"help": "Height and width in pixels, a multiple of 8. Real images are cropped."}
    )
    num_train: int = field(
        default=0, metadata={"help": "Number of training images. 0 uses all, 10000 for source=synthetic."}
    )
    num_test: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of validation images, and of test images. 0 uses all. Defaults to all, 500 for "
            "source=synthetic, and to at most half of num_train."
        },
    )
    num_references: int = field(
        default=5, metadata={"help": "source=synthetic: number of references per image for the scores."}
    )


@dataclass
class ModelFlags:
    """Flags that select the model."""

    model: str = field(
        default="",
        metadata={
            "help": "Captioner to train further, a folder or Hub id. Its vocabulary gets the new words. Flags of the "
            "network must fit it; freeze_encoder and dropout may change."
        },
    )
    backbone: str = field(
        default="small_captioner",
        metadata={
            "help": "Network of the images: small_captioner, small, norm_resnet, conv_classifier, classic_cnn, "
            "small_vit, the folder of a trained classifier of ours, or timm/NAME."
        },
    )
    pretrained: bool = field(default=False, metadata={"help": "backbone=timm/NAME: start from its published weights."})
    freeze_encoder: bool = field(
        default=False,
        metadata={"help": "Do not train the network of the backbone. It needs weights from a model or a classifier."},
    )
    conditioning: str = field(
        default="attention",
        metadata={"help": f"How the recurrent cell reads the image. Choose one of: {', '.join(CONDITIONINGS)}."},
    )
    feature_size: int = field(default=96, metadata={"help": "Channels of the feature map."})
    embedding_size: int = field(default=64, metadata={"help": "Channels of the word embeddings."})
    cell: str = field(
        default="lstm", metadata={"help": f"Recurrent cell of the decoder. Choose one of: {', '.join(CELLS)}."}
    )
    decoder_hidden_size: int = field(default=256, metadata={"help": "Channels of the recurrent cell."})
    attention_size: int = field(default=64, metadata={"help": "Channels of the additive attention."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability of embeddings and features."})
    min_count: int = field(
        default=1, metadata={"help": "Minimum number of occurrences of a word in the vocabulary. Use 5 for COCO."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.freeze_encoder and not (self.model or self.pretrained or Path(self.backbone).is_dir()):
            raise ValueError(
                f"freeze_encoder would leave the random weights of backbone={self.backbone!r} untrained. Use it with "
                "model, with the folder of a trained classifier as backbone, or with pretrained."
            )
        if self.model and self.pretrained:
            raise ValueError(f"pretrained replaces the backbone of model={self.model!r}. Remove one of the two flags.")
        if self.model and Path(self.model).resolve() == Path(self.output_dir).resolve():
            raise ValueError(
                f"model={self.model!r} is also output_dir, so the run would replace the model. Choose another "
                "output_dir."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Data and model


class CaptionedImages(torch.utils.data.Dataset):
    """Images with captions. `__getitems__` returns the images as uint8 and their indices.

    Attributes:
        images: The images, and their masks if the scenes have them.
        references: The correct captions of each image.
        scenes: The rows of generated scenes with `objects`, `caption` and `scene`. Empty for real images.

    Args:
        dataset: Rows of `hf_dl.data.scenes` or `hf_dl.data.captions`, with images of one size.
        num_references: Number of references per generated scene.

    Raises:
        ValueError: If an image has no caption.
    """

    def __init__(self, dataset: datasets.Dataset, *, num_references: int = 5):
        self.images, self.scenes = ImageTensors(dataset), []
        if "scene" in dataset.column_names:
            self.scenes = dataset.select_columns(["objects", "caption", "scene"]).to_list()
            self.references = [scene_captions(row, num_references) for row in self.scenes]
        else:
            self.references = dataset["captions"][:]
        empty = [row for row, texts in enumerate(self.references) if not texts]
        if empty:  # a batch would mix up the captions of its images
            raise ValueError(f"The image in row {empty[0]} has no caption. Expected at least one caption per image.")

    def __len__(self) -> int:
        return len(self.references)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return a batch: `image`, uint8 (rows, 3, height, width), and `index`, int64 (rows,)."""
        return {"image": self.images.__getitems__(indices)["image"], "index": torch.as_tensor(indices)}

    def draw_captions(self, indices: torch.Tensor, count: int, *, seed: int) -> list[str]:
        """Draw captions to train on: new ones for generated scenes, and random references for real images.

        Args:
            indices: Indices of the images, int64 (rows,).
            count: Number of captions per image.
            seed: Seed of the choice. Use another one in each step.

        Returns:
            The captions. All captions of an image are adjacent.
        """
        drawn: list[str] = []
        for index in indices.tolist():
            if self.scenes:
                drawn += scene_captions(self.scenes[index], count, seed=seed)
            else:
                texts = self.references[index]
                rng = random.Random(f"hf_dl.captioner {seed} {index}")
                shuffled = sorted(texts, key=lambda _: rng.random())  # noqa: B023
                drawn += list(itertools.islice(itertools.cycle(shuffled), count))
        return drawn


def load_data(args: CaptionFlags, split: str, *, num_references: int | None = None) -> CaptionedImages:
    """Load one split of the images and captions that the flags select.

    Args:
        args: The flags.
        split: "train", "validation" or "test".
        num_references: Captions per scene; defaults to `args.num_references`.
    """
    hide_progress_bars()
    generated = args.source == "synthetic"
    count = split_size(args, split, SCENES[split] if generated else None)
    if generated:
        data = scenes.load(split, size=args.image_size, num_scenes=count or SCENES[split])
    else:
        data = captions.load(
            split,
            args.source,
            annotations=args.annotations or None,
            image_column=args.image_column or None,
            caption_column=args.caption_column or None,
            size=args.image_size,
            num_pairs=count,
        )
    return CaptionedImages(data, num_references=num_references or args.num_references)


@dataclass
class SavedCaptioner:
    """A captioner to train further.

    Attributes:
        model: The model.
        processor: Its processor.
    """

    model: ImageCaptionerForConditionalGeneration
    processor: ImageCaptionerProcessor


def load_saved(args: Any) -> SavedCaptioner | None:
    """Load the captioner that `args.model` names.

    Args:
        args: Flags with the fields of `ModelFlags` and `CaptionFlags`. Flags of the network that the user did not
            give are set to the values of the saved captioner.

    Returns:
        The captioner, or None without a name.

    Raises:
        ValueError: If it cannot be loaded, or a flag does not fit it.
    """
    if not args.model:
        return None
    model = load_model(ImageCaptionerForConditionalGeneration, args.model)
    processor = load_model(AutoProcessor, args.model)
    if not isinstance(processor, ImageCaptionerProcessor):
        raise ValueError(
            f"model={args.model!r} has a {type(processor).__name__}. Expected an ImageCaptionerProcessor, which "
            "train_captioner.py saves with the model."
        )
    if len(processor.tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"model={args.model!r} has {model.config.vocab_size} words, but its tokenizer has "
            f"{len(processor.tokenizer)}. Expected the tokenizer that was saved with the model."
        )
    for name in CONFIG_FIELDS:
        value = getattr(model.config, name)
        if name not in (args.given or {}):
            setattr(args, name, value)
        elif getattr(args, name) != value and name not in CHANGEABLE:
            raise ValueError(
                f"{name}={getattr(args, name)!r} does not fit model={args.model!r}, which has {name}={value!r}. "
                "Remove the flag."
            )
    return SavedCaptioner(model, processor)


def make_processor(args: Any, train: CaptionedImages, saved: SavedCaptioner | None = None) -> ImageCaptionerProcessor:
    """Create the processor: images of the right size, and the words of the training captions.

    Args:
        args: Flags with the fields of `CaptionFlags` and `ModelFlags`.
        train: The training images. Generated scenes have new captions in each step, so more of them are written here.
        saved: The captioner to train further. Its vocabulary is extended, and images are prepared in the same way.

    Raises:
        ValueError: If a flag has an invalid value.
    """
    texts = [text for row in train.references for text in row]
    if train.scenes:
        rows = range(min(len(train), 500))
        texts += [text for seed in range(4) for text in train.draw_captions(torch.tensor([*rows]), 2, seed=seed)]
    if saved is not None:
        tokenizer = extend_caption_tokenizer(saved.processor.tokenizer, texts, min_count=args.min_count)
        return ImageCaptionerProcessor(saved.processor.image_processor, tokenizer)
    mean, std = [0.5] * 3, [0.5] * 3
    if args.backbone.startswith("timm/"):
        from timm.models import get_pretrained_cfg  # here, because other backbones do not need timm

        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet
        published = get_pretrained_cfg(args.backbone.removeprefix("timm/")) if args.pretrained else None
        mean, std = (published.mean, published.std) if published else (mean, std)
    elif Path(args.backbone).is_dir():
        _, _, statistics = load_backbone(args.backbone)
        mean, std = statistics["image_mean"], statistics["image_std"]
    # Photos are cropped to a centered square, as in training.
    images = CLIPImageProcessor(
        size={"shortest_edge": args.image_size},
        crop_size={"height": args.image_size, "width": args.image_size},
        resample=2,  # bilinear
        image_mean=[*mean],
        image_std=[*std],
    )
    return ImageCaptionerProcessor(images, build_caption_tokenizer(texts, min_count=args.min_count))


def make_model(
    args: Any, processor: ImageCaptionerProcessor, saved: SavedCaptioner | None = None
) -> ImageCaptionerForConditionalGeneration:
    """Create the model that the flags select.

    Args:
        args: Flags with the fields of `CaptionFlags` and `ModelFlags`.
        processor: The processor, for the size of the vocabulary.
        saved: The captioner to train further. The words that it does not know get new weights.

    Raises:
        ValueError: If a flag has an invalid value.
    """
    tokenizer = processor.tokenizer
    fields = {name: getattr(args, name) for name in CONFIG_FIELDS} | {"vocab_size": len(tokenizer)}
    if saved is not None:
        config = copy.deepcopy(saved.model.config)
        for name, value in fields.items():
            setattr(config, name, value)
        model = ImageCaptionerForConditionalGeneration(config)
        model.generation_config = saved.model.generation_config
        copy_weights(saved.model, model)
        return model
    classifier = None
    if Path(args.backbone).is_dir():
        classifier, backbone, _ = load_backbone(args.backbone)
        fields |= backbone
    if args.pretrained and not args.backbone.startswith("timm/"):
        raise ValueError(f"pretrained=True needs a backbone of timm, such as timm/resnet18, not {args.backbone!r}.")
    config = checked_config(
        ImageCaptionerConfig,
        **fields,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
    )
    model = ImageCaptionerForConditionalGeneration(config)
    if classifier is not None:
        load_classifier_weights(model.encoder.backbone, classifier)
    if args.pretrained:
        load_published_weights(model.encoder.backbone, args.backbone)
    return model


@torch.no_grad()
def copy_weights(
    source: ImageCaptionerForConditionalGeneration, target: ImageCaptionerForConditionalGeneration
) -> None:
    """Copy all weights to a captioner that may have more words. The rows of the other words keep their values.

    Args:
        source: The captioner to copy from.
        target: A captioner with the same configuration, except for a larger vocabulary.
    """
    values = target.state_dict()
    for name, old in source.state_dict().items():
        (values[name][: len(old)] if old.ndim else values[name]).copy_(old)


def to_pixel_values(
    images: torch.Tensor, processor: ImageCaptionerProcessor, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Normalize images of the right size as the processor does.

    Args:
        images: uint8 (batch, 3, height, width).
        processor: Processor of the model.
        device: Device of the result.
    """
    mean, std = (
        torch.tensor(values, device=device)[:, None, None]
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    return (images.to(device).float() / 255 - mean) / std


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def write_captions(
    model: ImageCaptionerForConditionalGeneration,
    processor: ImageCaptionerProcessor,
    images: torch.Tensor,
    *,
    num_beams: int = 1,
) -> tuple[list[str], torch.Tensor]:
    """Describe images.

    Args:
        model: The model, in evaluation mode.
        processor: Its processor.
        images: uint8 (batch, 3, height, width).
        num_beams: Number of hypotheses; 1 is greedy search.

    Returns:
        The captions, with `<unk>` for unknown words, and their word ids with the end token and padding, int64 (batch,
        words).
    """
    pixel_values = to_pixel_values(images, processor, model.device)
    sequences = model.beam_search(pixel_values, num_beams=num_beams).sequences[:, 0]
    tokenizer = processor.tokenizer
    outside = {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id}
    words = [[word for word in row if word not in outside] for row in sequences.tolist()]
    return tokenizer.batch_decode(words), sequences


@torch.no_grad()
def read_attention(
    model: ImageCaptionerForConditionalGeneration,
    processor: ImageCaptionerProcessor,
    images: torch.Tensor,
    sequences: torch.Tensor,
) -> torch.Tensor:
    """Return where the model looked when it wrote each word.

    Args:
        model: A model with attention.
        processor: Its processor.
        images: uint8 (batch, 3, height, width).
        sequences: The words from `write_captions`, (batch, words).

    Returns:
        Maps of the size of the images, (batch, words, height, width), which sum over the cells to 1.
    """
    start = F.pad(sequences[:, :-1], (1, 0), value=model.config.decoder_start_token_id)
    pixel_values = to_pixel_values(images, processor, model.device)
    attention = model(pixel_values, start, output_attentions=True).cross_attentions[0][:, 0]
    return word_maps(attention.cpu(), images.shape[-2:])


def evaluate(
    model: ImageCaptionerForConditionalGeneration,
    processor: ImageCaptionerProcessor,
    data: CaptionedImages,
    *,
    num_beams: int = 1,
    complete: bool = True,
) -> dict[str, float]:
    """Compute all scores of a captioner.

    Args:
        model: The model, in evaluation mode.
        processor: Its processor.
        data: The images.
        num_beams: Number of hypotheses; 1 is greedy search.
        complete: Also compute the scores of forced relations and of the attention maps.

    Returns:
        BLEU, ROUGE-L and CIDEr-D; `ended` and `distinct`, the fractions of captions that end and that differ from all
        earlier ones. For generated scenes also the scores of `caption_object_scores`, `forced_relation_accuracy`
        and, with attention, the scores of `Pointing`. Scores without a case are left out.
    """
    texts: list[str] = []
    ended = 0
    pointing = Pointing()
    for start in range(0, len(data), BATCH_SIZE):
        rows = range(start, min(start + BATCH_SIZE, len(data)))
        batch = data.images.__getitems__(rows)
        written, sequences = write_captions(model, processor, batch["image"], num_beams=num_beams)
        ended += int((sequences == model.config.eos_token_id).any(dim=1).sum())
        texts += written
        if complete and data.scenes and model.config.conditioning in ATTENTIONS:
            maps = read_attention(model, processor, batch["image"], sequences)
            for row, text, seen, mask in zip(rows, written, maps, batch["mask"], strict=True):
                pointing.add(text, seen, mask, data.scenes[row]["objects"])
    scores = caption_scores(texts, data.references)
    scores |= {"ended": ended / len(data), "distinct": len(set(texts)) / len(texts)}
    if data.scenes:
        truth = [row["objects"] for row in data.scenes]
        scores |= caption_object_scores([parse_caption(text) for text in texts], truth)
        if complete:
            scores |= {"forced_relation_accuracy": forced_relations(model, processor, data), **pointing.scores()}
    return {name: value for name, value in scores.items() if math.isfinite(value)}


@torch.no_grad()
def forced_relations(
    model: ImageCaptionerForConditionalGeneration, processor: ImageCaptionerProcessor, data: CaptionedImages
) -> float:
    """Return how often a relation is right that the model must name.

    Captions may avoid relations. Here each caption starts with "A large red metal cube stands", the name of a random
    object of the scene, and the model continues it.

    Args:
        model: The model, in evaluation mode.
        processor: Its processor.
        data: Generated scenes. Scenes with one object are skipped.

    Returns:
        The fraction of captions whose relation holds. A caption without a relation counts as wrong. NaN if all scenes
        have one object.
    """
    rows = [row for row, scene in enumerate(data.scenes) if len(scene["objects"]) > 1]
    right = 0.0
    for start in range(0, len(rows), BATCH_SIZE):
        part = rows[start : start + BATCH_SIZE]
        starts = []
        for row in part:
            objects = data.scenes[row]["objects"]
            first = random.Random(f"hf_dl.captioner relation {row}").choice(objects)
            starts.append(f"a {' '.join(first[name] for name in ATTRIBUTES)} stands")
        images = to_pixel_values(data.images.__getitems__(part)["image"], processor, model.device)
        words = torch.tensor(processor.tokenizer(starts, add_special_tokens=False)["input_ids"])
        prefix = F.pad(words, (1, 0), value=model.config.decoder_start_token_id).to(model.device)
        found = model.generate(images, decoder_input_ids=prefix, num_beams=1, do_sample=False)
        parsed = [parse_caption(text) for text in processor.batch_decode(found, skip_special_tokens=True)]
        scores = caption_object_scores(parsed, [data.scenes[row]["objects"] for row in part])
        if scores["relations_said"]:
            right += scores["relation_accuracy"] * scores["relations_said"] * len(part)
    return right / len(rows) if rows else float("nan")


class Pointing:
    """The pointing game: is the brightest pixel of a word's attention map on the object that the word names?

    Zhang et al., "Top-down neural attention by excitation backprop", ECCV 2016. Only words of objects that are named
    without a mistake count, because other words have no true object. `pointing` also counts pixels within `TOLERANCE`
    of the object, and `pointing_exact` only pixels of the object.
    """

    def __init__(self):
        self.hits: dict[str, list[bool]] = {"pointing": [], "pointing_exact": []}
        self.areas: dict[str, list[float]] = {"pointing": [], "pointing_exact": []}

    def add(self, text: str, maps: torch.Tensor, mask: torch.Tensor, objects: Sequence[Mapping[str, Any]]) -> None:
        """Add the words of one caption.

        Args:
            text: The caption.
            maps: One map per word, (words, height, width).
            mask: 0 on the ground and i on objects[i - 1], (height, width).
            objects: The objects of the scene.
        """
        parsed = parse_caption(text)
        targets: dict[tuple[int, ...], list[int]] = {}
        for i, j in match_objects(parsed.objects, objects):
            if all(objects[j][name] == value for name, value in parsed.objects[i].items()):
                targets.setdefault(parsed.words[i], []).append(j + 1)
        for words, labels in targets.items():
            exact = torch.isin(mask.int(), torch.tensor(labels, dtype=torch.int32))
            near = F.max_pool2d(exact.float()[None, None], 2 * TOLERANCE + 1, stride=1, padding=TOLERANCE)[0, 0] > 0
            for word in words[1:]:  # the first word is the article or the number
                if word < len(maps):
                    for name, target in (("pointing", near), ("pointing_exact", exact)):
                        self.hits[name].append(bool(target.flatten()[maps[word].argmax()]))
                        self.areas[name].append(target.float().mean().item())

    def scores(self) -> dict[str, float]:
        """Return `pointing` and `pointing_exact`, each also as `..._chance` for a random pixel; NaN without words."""
        found = self.hits | {f"{name}_chance": areas for name, areas in self.areas.items()}
        return {name: float(np.mean(values)) if values else float("nan") for name, values in found.items()}


@torch.no_grad()
def caption_loss(
    model: ImageCaptionerForConditionalGeneration, processor: ImageCaptionerProcessor, data: CaptionedImages
) -> float:
    """Return the mean cross-entropy per word of the first reference of each image, in nats."""
    total = words = 0.0
    for start in range(0, len(data), BATCH_SIZE):
        rows = range(start, min(start + BATCH_SIZE, len(data)))
        images = to_pixel_values(data.images.__getitems__(rows)["image"], processor, model.device)
        labels = processor.make_labels([data.references[row][0] for row in rows], max_length=longest(model))
        count = int((labels != -100).sum())
        total += model(images, labels=labels.to(model.device)).loss.item() * count
        words += count
    return total / words


def longest(model: ImageCaptionerForConditionalGeneration) -> int:
    """Return the maximum number of words of a caption in training."""
    return model.config.max_caption_length


def watch(
    run: Any, processor: ImageCaptionerProcessor, data: Mapping[str, CaptionedImages], **options: Any
) -> dict[str, float]:
    """Compute the scores of the model of a training run on several splits.

    Args:
        run: The `TrainingRun`. Its averaged weights are used if it has them.
        processor: Processor of the model.
        data: The images by prefix of the metrics.
        **options: Arguments of `evaluate`.

    Returns:
        The scores, with keys such as `val_bleu_4`.
    """
    metrics = {}
    with run.averaged():
        model = run.unwrapped.eval()
        for prefix, part in data.items():
            scores = {"loss": caption_loss(model, processor, part), **evaluate(model, processor, part, **options)}
            metrics |= {f"{prefix}_{name}": value for name, value in scores.items()}
    return metrics


def chance_scores(prefix: str, data: CaptionedImages) -> dict[str, float]:
    """Return the scores of a true caption of the next image, and of another true caption of the same image.

    Args:
        prefix: Prefix of the metrics.
        data: The images.

    Returns:
        Scores with keys such as `test_bleu_4_chance`, and `test_bleu_4_truth` for images with two references or more.
    """
    first, found = [texts[0] for texts in data.references], {}
    rows = {"chance": (first[1:] + first[:1], data.references)}
    if min(map(len, data.references)) > 1:
        rows["truth"] = (first, [texts[1:] for texts in data.references])
    for name, (said, references) in rows.items():
        scores = caption_scores(said, references)
        if data.scenes:
            parsed = [parse_caption(text) for text in said]
            scores |= caption_object_scores(parsed, [row["objects"] for row in data.scenes])
        names = ("bleu_4", "rouge_l", "cider_d", "attribute_accuracy", "hallucinated")
        found |= {f"{prefix}_{key}_{name}": scores[key] for key in names if math.isfinite(scores.get(key, math.nan))}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Report


def draw_captions(
    model: ImageCaptionerForConditionalGeneration,
    processor: ImageCaptionerProcessor,
    data: CaptionedImages,
    path: Path,
    *,
    count: int = 4,
    most_words: int = 14,
) -> Path:
    """Draw images with their captions. With attention, each word has an image of where the model looked.

    Args:
        model: The model, in evaluation mode.
        processor: Its processor.
        data: The images, of which the first ones are drawn.
        path: The figure to write.
        count: Number of images.
        most_words: Maximum number of words per image. Articles and punctuation are left out.

    Returns:
        The path.
    """
    images = data.images.__getitems__(range(min(count, len(data))))["image"]
    texts, sequences = write_captions(model, processor, images)
    pictures = images.permute(0, 2, 3, 1).numpy()
    rows, labels = [[picture] for picture in pictures], [[text] for text in texts]
    if model.config.conditioning in ATTENTIONS:
        maps = read_attention(model, processor, images, sequences)
        labels = [[""] for _ in texts]
        left_out = {"a", ",", ".", "and", *processor.tokenizer.all_special_tokens} - {processor.tokenizer.unk_token}
        for number, sequence in enumerate(sequences.tolist()):
            tokens = processor.tokenizer.convert_ids_to_tokens(sequence)
            for i, word in [(i, token) for i, token in enumerate(tokens) if token not in left_out][:most_words]:
                heat = maps[number, i]
                light = color_heat((heat / heat.max()).numpy())
                rows[number].append((0.45 * pictures[number] + 0.55 * light).astype(np.uint8))
                labels[number].append(word)
    return image_grid(rows, path, captions=labels, cell=1.0 if model.config.conditioning in ATTENTIONS else 3.0)


@activity("Writing the report")
def write_report(folder: Path) -> None:
    """Write the learning curves and the model card of a finished run, and print where they are.

    Args:
        folder: The folder of the run.
    """
    plot_run(folder, folder / "curves.png", CURVES)
    tags = ["image-captioning", json.loads((folder / "config.json").read_text(encoding="utf-8"))["cell"]]
    card = run_card(folder, summary=SUMMARY, usage=USAGE, limits=LIMITS, tags=tags, task="image-text-to-text")
    card.save(folder / "README.md")
    print(f"checkpoint  {folder}  (AutoModelForImageTextToText.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
