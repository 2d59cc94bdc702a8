"""Evaluate an image classifier: scores, a confusion matrix, and precision and recall of each class.

    scripts/run python scripts/evaluate_classifier.py --model runs/train_classifier

Writes confusion.png, classes.csv and evaluation.json into the model's folder; a few seconds on two cores. The model is
any `AutoModelForImageClassification` whose classes are those of the data, by folder or Hub id.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification, CLIPImageProcessor, HfArgumentParser

from hf_dl.data import labeled_images
from hf_dl.data.collate import as_is
from hf_dl.data.image_arrays import LabeledImages
from hf_dl.data.superclasses import superclasses
from hf_dl.metrics.classification import classification_scores, confusion_matrix, per_class_scores, top_k_hits
from hf_dl.models.conv_classifier import ConvClassifierConfig, ConvClassifierForImageClassification
from hf_dl.models.layers_trees import cluster_classes
from hf_dl.models.norm_resnet import NormResNetConfig, NormResNetForImageClassification
from hf_dl.models.small_vit import SmallViTConfig, SmallViTForImageClassification
from hf_dl.reporting.card import run_card
from hf_dl.reporting.experiment import portable
from hf_dl.reporting.plots import plot_run

MODELS = {  # config, model, and which of the script's flags are fields of the config
    "norm_resnet": (NormResNetConfig, NormResNetForImageClassification, ("n", "norm", "widths", "shortcut")),
    "small_vit": (
        SmallViTConfig,
        SmallViTForImageClassification,
        ("patch_size", "hidden_size", "num_hidden_layers", "head"),
    ),
    "conv_classifier": (
        ConvClassifierConfig,
        ConvClassifierForImageClassification,
        ("norm", "widths", "hidden_size", "dropout", "head"),
    ),
}
TREES = ("huffman", "balanced", "superclass", "two_level")
SUMMARIES = {
    "norm_resnet": "A residual network of 6n+2 layers (He et al. 2015) with a choice of normalizations: it names what "
    "an image shows.",
    "small_vit": "A small vision transformer (Dosovitskiy et al. 2020): it names what an image shows.",
    "conv_classifier": "Three convolutions and two linear layers, with a choice of output layers (softmax, Gumbel, "
    "hierarchical, adaptive): it names what an image shows.",
}
LIMITS = (
    "It gives every image one of its own classes, also one that shows none of them.",
    "It was trained at one size on images of one object each; large photographs are reduced to that size first.",
)
CURVES = {
    name: {"training images": f"train_{key}", "validation images": f"val_{key}"}
    for name, key in (("loss", "loss"), ("error", "error"), ("macro F1", "macro_f1"))
}
WATCHED = ("loss", "error", "accuracy", "micro_f1", "macro_f1")  # while it trains
TOP_K = 5


@dataclass
class ImageData:
    """Flags that say which images, shared with the training script."""

    source: str = field(
        default="synthetic", metadata={"help": "synthetic, a Hub id, or a folder of images or parquet."}
    )
    image_size: int = field(default=32, metadata={"help": "Height and width of the images, in pixels."})
    num_classes: Literal[25, 100] = field(default=25, metadata={"help": "Classes of synthetic images."})
    num_train: int = field(default=0, metadata={"help": "Training images; 0: all, which is 10000 synthetic ones."})
    num_test: int = field(default=0, metadata={"help": "Validation and test images, at most, each; 0: all."})
    holdout: float = field(default=0.1, metadata={"help": "Part of the training images that a missing split takes."})
    label_column: str = field(default="", metadata={"help": "Column of the labels; empty: the usual one."})
    corrupt: Literal["refuse", "skip"] = field(default="refuse", metadata={"help": "What to do with damaged files."})


@dataclass
class ModelFlags:
    """Flags that say which network; what is not given has the model's own default."""

    model: Literal["norm_resnet", "small_vit", "conv_classifier"] = field(
        default="norm_resnet", metadata={"help": "Kind of network."}
    )
    n: int | None = field(default=None, metadata={"help": "norm_resnet: it has 6n+2 layers."})
    norm: str | None = field(
        default=None, metadata={"help": "norm_resnet, conv_classifier: normalization, such as batch or group."}
    )
    widths: list[int] | None = field(
        default=None, metadata={"help": "norm_resnet, conv_classifier: channels of the three stages."}
    )
    shortcut: str | None = field(default=None, metadata={"help": "norm_resnet: identity or projection."})
    patch_size: int | None = field(default=None, metadata={"help": "small_vit: side of a patch, in pixels."})
    hidden_size: int | None = field(
        default=None, metadata={"help": "small_vit, conv_classifier: width of the tokens, of the last hidden layer."}
    )
    num_hidden_layers: int | None = field(default=None, metadata={"help": "small_vit: number of blocks."})
    dropout: float | None = field(default=None, metadata={"help": "conv_classifier: of the last hidden layer."})
    head: str | None = field(
        default=None,
        metadata={
            "help": "small_vit, conv_classifier: output layer: softmax, gumbel, hierarchical or adaptive; "
            "hierarchical:TREE sets the tree too; adaptive:superclass keeps superclasses together."
        },
    )
    tree: str = field(
        default="huffman",
        metadata={
            "help": f"head=hierarchical: {', '.join(TREES)}, or the folder of a trained classifier of the same "
            "classes, to learn it from its output layer."
        },
    )
    cutoffs: list[int] | None = field(
        default=None, metadata={"help": "head=adaptive: classes up to each cutoff; those that cost least by default."}
    )
    div_value: float = field(default=4.0, metadata={"help": "head=adaptive: how much smaller each tail is."})
    temperature: float = field(
        default=0.5, metadata={"help": "head=gumbel: what the temperature of the noise falls to, from 1."}
    )
    straight_through: bool = field(
        default=False, metadata={"help": "head=gumbel: sample classes, with the gradient of the relaxed sample."}
    )


@dataclass
class Recipe:
    """Flags of the training that no other script has; mixed in before `TrainingArgs`."""

    crop_padding: int = field(default=4, metadata={"help": "Images are shifted by up to so many pixels; 0: not."})
    flip: bool = field(default=True, metadata={"help": "Mirror half of the training images."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Part of the label that all classes share."})
    base_batch_size: int = field(
        default=0, metadata={"help": "Batch size that learning_rate is for: others scale it in proportion; 0: not."}
    )
    eval_train: int = field(default=1000, metadata={"help": "Training images that each epoch is scored on."})

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 1.")
        for name, least in (("crop_padding", 0), ("base_batch_size", 0), ("eval_train", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be {least} or above.")
        if self.base_batch_size:  # linear scaling, Goyal et al. 2017
            self.learning_rate *= self.batch_size / self.base_batch_size
            self.base_batch_size = 0  # results.json holds the rate that was used


@dataclass
class Args(ImageData):
    """Flags of the evaluation."""

    model: str = field(default="runs/train_classifier", metadata={"help": "Folder or Hub id of the model."})
    split: Literal["train", "validation", "test"] = field(default="test", metadata={"help": "Which images."})
    output_dir: str = field(default="", metadata={"help": "Where to write; default: the model's folder."})


def load_images(args: ImageData, split: str) -> LabeledImages:
    """Load a split of the source that the flags name, decoded and resized."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    options = {"size": args.image_size, "num_classes": args.num_classes, "holdout": args.holdout}
    count = (args.num_train if split == "train" else args.num_test) or None
    columns = {"label_column": args.label_column or None, "corrupt": args.corrupt}
    return LabeledImages(labeled_images.load(split, args.source, num_images=count, **options, **columns))


def config_fields(args: Any) -> dict[str, Any]:
    """Pick the flags that are fields of the chosen model's config; refuse those that only other models have.

    A flag that was not given is None and becomes the model's own default in `args`, so that results.json tells it.
    """
    kind, _, own = MODELS[args.model]
    for name in {name for *_, names in MODELS.values() for name in names} - set(own):
        if getattr(args, name) is not None:
            raise ValueError(
                f"{name}={getattr(args, name)} is no part of model={args.model!r}, which has {', '.join(own)}."
            )
    for name in own:
        if getattr(args, name) is None:
            default = getattr(kind(), name)
            setattr(args, name, list(default) if isinstance(default, tuple) else default)
    fields = {name: getattr(args, name) for name in own} | {"image_size": args.image_size}
    if "head" in own:
        fields["head"] = args.head.partition(":")[0]
        if fields["head"] == "hierarchical" and tree_of(args) not in TREES and not Path(tree_of(args)).is_dir():
            raise ValueError(
                f"tree={tree_of(args)!r} is unknown; choose one of {', '.join(TREES)}, or the folder of a classifier."
            )
        if fields["head"] == "adaptive" and args.head not in ("adaptive", "adaptive:superclass"):
            raise ValueError(f"head={args.head!r} is unknown; write adaptive or adaptive:superclass.")
    if not 0 < args.temperature < float("inf"):
        raise ValueError(f"temperature={args.temperature} must be above 0.")
    checked(kind, **fields)
    return fields


def tree_of(args: Any) -> str:
    """The tree that the flags name, be it in `head` or in `tree`."""
    return args.head.partition(":")[2] or args.tree


def head_options(args: Any, names: Sequence[str], labels: torch.Tensor) -> dict[str, Any]:
    """Pick the options of the output layer that the flags name; class counts are those of the training images."""
    counts = labels.bincount(minlength=len(names)).tolist()
    head = args.head.partition(":")[0]
    if head == "gumbel":
        return {"straight_through": args.straight_through}
    if head == "adaptive":
        options = {"cutoffs": args.cutoffs, "div_value": args.div_value, "class_counts": counts}
        return options | ({"groups": superclasses(names)} if args.head == "adaptive:superclass" else {})
    if head != "hierarchical":
        return {}
    tree = tree_of(args)
    if tree in ("huffman", "balanced"):
        return {"tree": tree, "class_counts": counts}
    if tree in ("superclass", "two_level"):
        return {"tree": tree.replace("superclass", "given"), "groups": superclasses(names)}
    trained = AutoModelForImageClassification.from_pretrained(tree)
    if [trained.config.id2label[label] for label in range(trained.config.num_labels)] != list(names):
        raise ValueError(f"tree={tree!r} is a classifier of other classes; train one on these.")
    layer = trained.head if hasattr(trained, "head") else trained.classifier
    if getattr(layer, "weight", None) is None or len(layer.weight) != len(names):
        raise ValueError(f"tree={tree!r} has no weights for each class; train a classifier with a softmax.")
    return {"tree": "given", "groups": cluster_classes(layer.weight)}


def checked(make: Callable[..., Any], **fields: Any) -> Any:
    """Make a config, and turn its refusal into a ValueError of one sentence."""
    try:
        return make(**fields)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def make_model(args: Any, train: LabeledImages) -> torch.nn.Module:
    """Make the model that the flags name, for the classes of the training images.

    Its convolutions keep channels last, in which they are faster on CPUs and GPUs.
    """
    kind, model, own = MODELS[args.model]
    names = train.names
    fields = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    if "head" in own:
        fields["head_options"] = head_options(args, names, train.labels)
    return model(checked(kind, **config_fields(args), **fields)).to(memory_format=torch.channels_last)


def smoothed(output: Any, smoothing: float) -> torch.Tensor:
    """Take a part of the loss from the mean of -log P over all classes (Szegedy et al. 2016, section 7).

    With a softmax it is the cross-entropy with label smoothing; it is defined by log P alone, so all heads have it.
    """
    if not smoothing:
        return output.loss
    return (1 - smoothing) * output.loss - smoothing * output.logits.float().log_softmax(1).mean()


def make_processor(train: LabeledImages) -> CLIPImageProcessor:
    """Make the processor that does to any image what `load_images` and `to_pixel_values` do."""
    mean, std = train.channel_statistics()
    size = train.pixels.shape[-1]
    return CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=2,  # bilinear
        image_mean=mean,
        image_std=std,
    )


def to_pixel_values(pictures: torch.Tensor, processor: Any, device: torch.device | str = "cpu") -> torch.Tensor:
    """Normalize uint8 images (batch, 3, height, width) with the processor's mean and standard deviation."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) * 255
        for values in (processor.image_mean, processor.image_std)
    )
    return (pictures.to(device).float() - mean) / std


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[dict],
    processor: Any,
    *,
    gather: Callable[[Any], Any] = lambda values: values,
) -> tuple[dict[str, float], torch.Tensor]:
    """Score a classifier.

    Args:
        model: The model, wrapped or not.
        batches: With `image`, uint8, and `labels`.
        processor: Knows the mean and standard deviation of the pixels.
        gather: Joins what several processes computed.

    Returns:
        `loss` (cross-entropy), `accuracy`, `error`, `micro_f1`, `macro_f1`, `macro_precision`, `macro_recall`,
        `top_5_accuracy`, `images`; and the confusion matrix (true class, predicted class).
    """
    model.eval()
    device = next(model.parameters()).device
    columns = []
    for batch in batches:
        logits = model(to_pixel_values(batch["image"], processor, device)).logits.float()
        labels = batch["labels"].to(device)
        losses = F.cross_entropy(logits, labels, reduction="none")
        columns.append(gather((losses, logits.argmax(1), labels, top_k_hits(logits, labels, k=TOP_K))))
    losses, predictions, labels, hits = (torch.cat(column).cpu() for column in zip(*columns, strict=True))
    confusion = confusion_matrix(predictions, labels, num_classes=logits.shape[1])
    top = {f"top_{TOP_K}_accuracy": hits.double().mean().item()} if logits.shape[1] > TOP_K else {}
    return {"loss": losses.double().mean().item(), **classification_scores(confusion), **top}, confusion


def watch(run: Any, loaders: dict[str, Iterable[dict]], processor: Any) -> dict[str, float]:
    """Score several sets of images while a run goes on; keys are such as `val_accuracy`."""
    metrics = {}
    with run.averaged():
        for split, batches in loaders.items():
            scores, _ = evaluate(run.model, batches, processor, gather=run.gather)
            metrics |= {f"{split}_{name}": scores[name] for name in WATCHED}
    return metrics


def conclude(run: Any, loaders: dict[str, Iterable[dict]], names: Sequence[str], processor: Any) -> dict[str, float]:
    """Score the best weights on several sets of images, write what the last of these says of each class, and end."""
    if run.args.monitor:
        run.load_best()
    metrics = {}
    for split, batches in loaders.items():
        scores, confusion = evaluate(run.model, batches, processor, gather=run.gather)
        metrics |= {f"{split}_{name}": value for name, value in scores.items()}
    if run.is_main:
        write_classes(confusion, names, run.folder)
    return run.finish(metrics, confusion=plain_confusion(confusion, names))


def plain_confusion(confusion: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Give a confusion matrix for results.json: `classes`, `counts`, and the sizes of `groups` of neighbors.

    Classes that are alike stand together where it is known which those are, or in their own order in one group.
    """
    try:
        groups = superclasses(names)
    except ValueError:
        groups = [list(range(len(names)))]
    order = [label for group in groups for label in group]
    counts = confusion[order][:, order].tolist()
    return {"classes": [names[label] for label in order], "groups": [len(group) for group in groups], "counts": counts}


def draw_confusion(confusion: torch.Tensor, names: Sequence[str], path: Path) -> Path:
    """Draw which class was taken for which, as parts of the true class."""
    count = len(names)
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(12.0, max(4.0, 1.8 + 0.24 * count))
    figure = Figure(figsize=(side, side), layout="constrained", dpi=150)
    axes = figure.subplots()
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    size = 7 if count <= 40 else 3.6
    axes.set_xticks(range(count), names, rotation=90, fontsize=size)
    axes.set_yticks(range(count), names, fontsize=size)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(picture, ax=axes, shrink=0.5, label="part of the true class")
    figure.savefig(path, metadata={"Software": None})
    return path


def class_rows(confusion: torch.Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Give precision, recall, F1, the number of images, and what it is most often mistaken for, of each class."""
    scores = per_class_scores(confusion)
    mistakes = confusion - torch.diag(confusion.diagonal())
    return [
        {
            "class": name,
            **{key: round(scores[key][number].item(), 4) for key in ("precision", "recall", "f1")},
            "images": int(scores["support"][number]),
            "mistaken for": names[int(mistakes[number].argmax())] if mistakes[number].any() else "",
        }
        for number, name in enumerate(names)
    ]


def write_classes(confusion: torch.Tensor, names: Sequence[str], folder: Path) -> None:
    """Write classes.csv and confusion.png into the folder."""
    rows = class_rows(confusion, names)
    with open(folder / "classes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw_confusion(confusion, names, folder / "confusion.png")


def write_report(folder: Path, kind: str) -> None:
    """Write the learning curves and the model card of a finished run into its folder, and say where everything is."""
    plot_run(folder, folder / "curves.png", CURVES)
    card = run_card(
        folder, summary=SUMMARIES[kind], limits=LIMITS, pipeline_tag="image-classification", tags=[kind, "vision"]
    )
    with open(folder / "classes.csv", newline="", encoding="utf-8") as file:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in csv.reader(file)]
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    card.text += (
        "\n\n## Classes, on the test split\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    )
    card.save(folder / "README.md")
    print(f"checkpoint  {folder}  (AutoModelForImageClassification.from_pretrained)")
    print(f"report      {folder / 'README.md'}")
    print(f"picture     {folder / 'confusion.png'}")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate the model that the flags name, and write what was found beside it."""
    args = Args(**vars(HfArgumentParser(Args, allow_abbrev=False).parse_args(argv)))
    model = AutoModelForImageClassification.from_pretrained(args.model)
    processor = AutoImageProcessor.from_pretrained(args.model)
    folder = Path(args.output_dir or args.model)
    folder.mkdir(parents=True, exist_ok=True)
    args.image_size = getattr(model.config, "image_size", args.image_size)
    data = load_images(args, args.split)
    known = [model.config.id2label[number] for number in range(model.config.num_labels)]
    if known != data.names:
        raise ValueError(
            f"source={args.source!r} has {len(data.names)} classes ({', '.join(data.names[:3])}, ...), but the model "
            f"knows {len(known)} ({', '.join(known[:3])}, ...); evaluate it on the classes that it was trained on."
        )
    scores, confusion = evaluate(model, DataLoader(data, 250, collate_fn=as_is), processor)
    metrics = {f"{args.split}_{name}".replace("validation", "val"): value for name, value in scores.items()}
    write_classes(confusion, data.names, folder)
    found = {"args": portable(asdict(args)), "metrics": metrics}
    (folder / "evaluation.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, value in metrics.items():
        print(f"{name:40s} {value:.4f}")
    print(f"confusion.png, classes.csv and evaluation.json are in {folder}.")
    return metrics


if __name__ == "__main__":
    main()
