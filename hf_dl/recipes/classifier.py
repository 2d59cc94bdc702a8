"""Image classification: the flags, data, models, evaluation and report that the scripts and Spaces share.

scripts/train_classifier.py trains one of `CLASSIFIERS`, scripts/evaluate_classifier.py scores a saved model, and
scripts/train_broken_heads.py trains faulty output layers. To add a classifier, write its config and model in
hf_dl/models and add one entry to `CLASSIFIERS`.
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageClassification, CLIPImageProcessor, PreTrainedConfig, PreTrainedModel

from hf_dl.data import labeled_images
from hf_dl.data.image_arrays import LabeledImages
from hf_dl.data.superclasses import superclasses
from hf_dl.metrics.classification import classification_scores, confusion_matrix, per_class_scores, top_k_hits
from hf_dl.models.classic_architectures import ARCHITECTURES
from hf_dl.models.classic_cnn import ClassicCNNConfig, ClassicCNNForImageClassification
from hf_dl.models.conv_classifier import ConvClassifierConfig, ConvClassifierForImageClassification
from hf_dl.models.layers_norm import NORMS
from hf_dl.models.layers_trees import cluster_classes
from hf_dl.models.norm_resnet import NormResNetConfig, NormResNetForImageClassification
from hf_dl.models.small_vit import SmallViTConfig, SmallViTForImageClassification
from hf_dl.progress import activity
from hf_dl.reporting.card import run_card
from hf_dl.reporting.plots import plot_run

from .evaluation import checked_config, hide_progress_bars, report_data, split_size
from .library_classifiers import is_library_model, make_library_model, pixel_statistics
from .output_heads import HEADS, HeadFlags, accepted_options, split_head


@dataclass(frozen=True)
class Classifier:
    """One kind of classifier.

    Attributes:
        config: Config class with `image_size`, `id2label` and the fields in `flags`. If `flags` has "head", the config
            also has `head_options`.
        model: Model class. Its `forward` accepts `pixel_values`, `labels`, `temperature` and `generator`; a model
            without noise ignores the last two.
        flags: Flags of the training script that set a config field of the same name.
        summary: First sentence of the model card.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    flags: tuple[str, ...]
    summary: str


CLASSIFIERS: dict[str, Classifier] = {
    "norm_resnet": Classifier(
        NormResNetConfig,
        NormResNetForImageClassification,
        ("n", "norm", "widths", "shortcut"),
        "An image classifier: a residual network with 6n+2 layers (He et al. 2015) and a choice of normalizations.",
    ),
    "small_vit": Classifier(
        SmallViTConfig,
        SmallViTForImageClassification,
        ("patch_size", "hidden_size", "num_hidden_layers", "head"),
        "An image classifier: a small vision transformer (Dosovitskiy et al. 2020).",
    ),
    "conv_classifier": Classifier(
        ConvClassifierConfig,
        ConvClassifierForImageClassification,
        ("norm", "widths", "hidden_size", "dropout", "head"),
        "An image classifier: three convolutions and two linear layers, with a choice of output layers (softmax, "
        "Gumbel, hierarchical, adaptive).",
    ),
    "classic_cnn": Classifier(
        ClassicCNNConfig,
        ClassicCNNForImageClassification,
        ("architecture", "width_multiplier", "small_stem", "auxiliary", "dropout"),
        "An image classifier: one of the classic convolutional networks, from LeNet-5 to ResNet-152.",
    ),
}

TREES = ("huffman", "balanced", "superclass", "two_level")
LIMITS = (
    "It assigns one of its classes to every image, including images that show none of them.",
    "It was trained at one resolution, on images with one object each. Larger images are resized first.",
)
CURVES = {
    name: {"training images": f"train_{key}", "validation images": f"val_{key}"}
    for name, key in (("loss", "loss"), ("error", "error"), ("macro F1", "macro_f1"))
}
WATCHED = ("loss", "error", "accuracy", "micro_f1", "macro_f1")  # scores that are logged during training
TOP_K = 5
BATCH_SIZE = 250  # images per batch during evaluation


# ---------------------------------------------------------------------------------------------------------------------
# Flags


@dataclass
class ImageFlags:
    """Flags that select the images, for training and for evaluation."""

    source: str = field(
        default="synthetic",
        metadata={"help": "synthetic (generated, no download), a Hub dataset id, or a folder of images or parquet."},
    )
    image_size: int = field(default=32, metadata={"help": "Height and width of the images in pixels."})
    num_classes: Literal[25, 100] = field(default=25, metadata={"help": "source=synthetic: number of classes."})
    num_train: int = field(
        default=0, metadata={"help": "Number of training images. 0 uses all images, 10000 for source=synthetic."}
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
    label_column: str = field(
        default="", metadata={"help": "Column with the labels. By default, common names are tried."}
    )
    corrupt: Literal["refuse", "skip"] = field(
        default="refuse", metadata={"help": "Damaged image files: refuse stops with an error, skip leaves them out."}
    )


@dataclass
class ModelFlags(HeadFlags):
    """Flags that select the network. A flag without a value uses the default of the model's config."""

    model: str = field(
        default="norm_resnet",
        metadata={
            "help": f"Kind of network. Choose one of: {', '.join(CLASSIFIERS)}; or a folder, or the Hub id of a "
            "classifier of transformers or timm, such as timm/resnet18.a1_in1k."
        },
    )
    pretrained: bool = field(
        default=True, metadata={"help": "Models of transformers and timm: start from the weights of the Hub id."}
    )
    n: int | None = field(default=None, metadata={"help": "norm_resnet: depth; the network has 6n+2 layers."})
    norm: str | None = field(
        default=None,
        metadata={"help": f"norm_resnet, conv_classifier: normalization. Choose one of: {', '.join(NORMS)}."},
    )
    widths: list[int] | None = field(
        default=None, metadata={"help": "norm_resnet, conv_classifier: channels of each stage."}
    )
    shortcut: str | None = field(
        default=None,
        metadata={"help": "norm_resnet: shortcut between stages, identity or projection; none for a plain network."},
    )
    patch_size: int | None = field(default=None, metadata={"help": "small_vit: side of a patch in pixels."})
    hidden_size: int | None = field(
        default=None, metadata={"help": "small_vit: channels per token. conv_classifier: size of the hidden layer."}
    )
    num_hidden_layers: int | None = field(default=None, metadata={"help": "small_vit: number of transformer blocks."})
    dropout: float | None = field(
        default=None, metadata={"help": "conv_classifier, classic_cnn: dropout probability of the hidden layers."}
    )
    architecture: str | None = field(
        default=None, metadata={"help": f"classic_cnn: network. Choose one of: {', '.join(ARCHITECTURES)}."}
    )
    width_multiplier: float | None = field(
        default=None, metadata={"help": "classic_cnn: factor for the channels of all layers except the last."}
    )
    small_stem: bool | None = field(
        default=None,
        metadata={"help": "classic_cnn: first convolution 3x3 with stride 1, for images of about 32x32 pixels."},
    )
    auxiliary: bool | None = field(
        default=None, metadata={"help": "classic_cnn: train the auxiliary classifiers of GoogLeNet with the network."}
    )
    head: str | None = field(
        default=None,
        metadata={
            "help": f"small_vit, conv_classifier: output layer. Choose one of: {', '.join(HEADS)}. hierarchical:TREE "
            "also sets the tree. adaptive:superclass numbers the classes of a superclass in a row."
        },
    )
    tree: str = field(
        default="huffman",
        metadata={
            "help": f"head=hierarchical: the tree. Choose one of: {', '.join(TREES)}; or the folder of a classifier "
            "of the same classes, to cluster the weights of its output layer."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        config_fields(self)


@dataclass
class ImageTrainingFlags:
    """Flags for image augmentation and for scaling the learning rate; placed before `TrainingArgs`."""

    crop_padding: int = field(
        default=4, metadata={"help": "Maximum random shift of the training images in pixels. 0 disables it."}
    )
    flip: bool = field(default=True, metadata={"help": "Flip each training image horizontally with probability 0.5."})
    base_batch_size: int = field(
        default=0,
        metadata={
            "help": "Multiply learning_rate by batch_size / base_batch_size (Goyal et al. 2017). 0 disables it."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("crop_padding", "base_batch_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or greater.")
        if self.base_batch_size:
            self.learning_rate *= self.batch_size / self.base_batch_size
            self.base_batch_size = 0  # results.json then holds the learning rate that was used


def find_classifier(name: str) -> Classifier:
    """Return the entry of `CLASSIFIERS` with a name.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in CLASSIFIERS:
        raise ValueError(
            f"model={name!r} is unknown. Choose one of: {', '.join(CLASSIFIERS)}; or a folder or Hub id with a slash, "
            "such as timm/resnet18.a1_in1k."
        )
    return CLASSIFIERS[name]


def config_fields(args: Any) -> dict[str, Any]:
    """Collect the config fields of the selected model from the flags.

    Flags without a value are set to the default of the config, in `args` too, so that results.json lists them.

    Args:
        args: Flags with the fields of `ModelFlags` and `ImageFlags`.

    Returns:
        The fields of the config, without labels and without the options of the output layer.

    Raises:
        ValueError: If a flag has an invalid value or belongs to another model.
    """
    library = is_library_model(args.model)
    flags = () if library else find_classifier(args.model).flags
    for name in {name for other in CLASSIFIERS.values() for name in other.flags} - set(flags):
        if getattr(args, name) is not None:
            accepted = ", ".join(("pretrained",) if library else flags)
            raise ValueError(
                f"{name}={getattr(args, name)} is not a flag of model={args.model!r}, which accepts: {accepted}."
            )
    if library:
        return {}
    kind = find_classifier(args.model)
    defaults = kind.config()
    for name in kind.flags:
        if getattr(args, name) is None:
            default = getattr(defaults, name)
            setattr(args, name, list(default) if isinstance(default, tuple) else default)
    fields = {name: getattr(args, name) for name in kind.flags}
    fields |= {"image_size": args.image_size, "num_channels": 3}
    if "head" in fields:
        fields["head"] = check_head(args)
    checked_config(kind.config, **fields)
    return fields


def check_head(args: Any) -> str:
    """Check the flags `head` and `tree`.

    Args:
        args: Flags with the fields of `ModelFlags`.

    Returns:
        The name of the head, a key of `HEADS`.

    Raises:
        ValueError: If the head or its tree is unknown.
    """
    name, variant = split_head(args.head)
    options, tree = HEADS[name].option_names({}), variant or args.tree
    if "tree" in options:
        if tree not in TREES and not Path(tree).is_dir():
            raise ValueError(
                f"tree={tree!r} is unknown. Choose one of: {', '.join(TREES)}; or the folder of a classifier."
            )
    elif variant and (variant != "superclass" or "groups" not in options):
        known = f"{name} or {name}:superclass" if "groups" in options else name
        raise ValueError(f"head={args.head!r} is unknown. Use {known}.")
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Data and model


def load_images(args: ImageFlags, split: str) -> LabeledImages:
    """Load one split of the images that the flags select, decoded and resized.

    Args:
        args: The flags.
        split: "train", "validation" or "test".

    Returns:
        Images of shape (3, image_size, image_size) and labels.
    """
    hide_progress_bars()
    options = {"size": args.image_size, "num_classes": args.num_classes, "holdout": args.holdout}
    count = split_size(args, split, labeled_images.SPLITS[split] if args.source == "synthetic" else None)
    columns = {"label_column": args.label_column or None, "corrupt": args.corrupt}
    data = labeled_images.load(split, args.source, num_images=count, **options, **columns)
    report_data(data, split)
    return LabeledImages(data)


def make_model(args: Any, train: LabeledImages) -> PreTrainedModel:
    """Create the model that the flags select, for the classes of the training images.

    Args:
        args: Flags with the fields of `ModelFlags` and `ImageFlags`.
        train: The training images. Some output layers depend on the number of images per class.

    Returns:
        The model, in channels-last memory format because its convolutions are faster in it.
    """
    if is_library_model(args.model):
        model = make_library_model(
            args.model, pretrained=args.pretrained, image_size=args.image_size, names=train.names
        )
        return model.to(memory_format=torch.channels_last)
    kind = find_classifier(args.model)
    fields = config_fields(args) | {
        "id2label": dict(enumerate(train.names)),
        "label2id": {name: label for label, name in enumerate(train.names)},
    }
    if "head" in fields:
        fields["head_options"] = head_options(args, train.names, train.labels)
    return kind.model(checked_config(kind.config, **fields)).to(memory_format=torch.channels_last)


def head_options(args: Any, names: Sequence[str], labels: torch.Tensor) -> dict[str, Any]:
    """Compute the options of the output layer that the flags select.

    Args:
        args: Flags with the fields of `ModelFlags`.
        names: Names of the classes.
        labels: Labels of the training images, int (images,). Their counts decide the tree or the cutoffs.

    Returns:
        Keyword arguments of the head.

    Raises:
        ValueError: If the tree needs superclasses that are unknown, or a classifier of other classes.
    """
    name, variant = split_head(args.head)
    counts = labels.bincount(minlength=len(names)).tolist()
    if "tree" in HEADS[name].option_names({}):
        return tree_options(variant or args.tree, names, counts)
    offered = {
        "straight_through": args.straight_through,
        "cutoffs": args.cutoffs,
        "div_value": args.div_value,
        "class_counts": counts,
        "groups": superclasses(names) if variant == "superclass" else None,
    }
    return accepted_options(name, offered)


def tree_options(tree: str, names: Sequence[str], class_counts: Sequence[int]) -> dict[str, Any]:
    """Compute the options of a hierarchical head.

    Args:
        tree: One of `TREES`, or the folder of a trained classifier. Its classes are then clustered by the weights of
            its output layer.
        names: Names of the classes.
        class_counts: Number of training images per class.

    Returns:
        Keyword arguments of the head.

    Raises:
        ValueError: If the superclasses are unknown, or the classifier has other classes or no weights per class.
    """
    if tree in ("huffman", "balanced"):
        return {"tree": tree, "class_counts": class_counts}
    if tree in ("superclass", "two_level"):
        return {"tree": tree.replace("superclass", "given"), "groups": superclasses(names)}
    trained = AutoModelForImageClassification.from_pretrained(tree)
    if [trained.config.id2label[label] for label in range(trained.config.num_labels)] != list(names):
        raise ValueError(f"tree={tree!r} is a classifier of other classes. Use a classifier of the same classes.")
    layer = trained.head if hasattr(trained, "head") else trained.classifier
    if getattr(layer, "weight", None) is None or len(layer.weight) != len(names):
        raise ValueError(f"tree={tree!r} has no weights per class. Use a classifier with head=softmax.")
    return {"tree": "given", "groups": cluster_classes(layer.weight)}


def make_processor(args: Any, train: LabeledImages, model: PreTrainedModel) -> CLIPImageProcessor:
    """Create the image processor to save with the model.

    For any image, it computes the same pixel values as `load_images` followed by `to_pixel_values`.

    Args:
        args: Flags with the fields of `ModelFlags`.
        train: The training images, whose channel mean and standard deviation are used.
        model: The model. A pretrained model of another library keeps its mean and standard deviation.

    Returns:
        The processor.
    """
    if is_library_model(args.model) and args.pretrained:
        mean, std = pixel_statistics(args.model, model)
    else:
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
    """Normalize images with the mean and standard deviation of the processor.

    Args:
        pictures: uint8 images (batch, 3, height, width).
        processor: Has `image_mean` and `image_std`.
        device: Device of the result.

    Returns:
        float32 pixel values of the same shape.
    """
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) * 255
        for values in (processor.image_mean, processor.image_std)
    )
    return (pictures.to(device).float() - mean) / std


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    processor: Any,
    *,
    gather: Callable[[Any], Any] = lambda values: values,
) -> tuple[dict[str, float], torch.Tensor]:
    """Compute the scores and the confusion matrix of a classifier.

    Args:
        model: The model. It is set to evaluation mode.
        batches: Batches with `image`, uint8 (batch, 3, height, width), and `labels`, int (batch,).
        processor: Has the mean and standard deviation of the pixels.
        gather: Joins tensors of all processes.

    Returns:
        The scores, and the confusion matrix (true class, predicted class). The scores are `loss` (cross-entropy),
        `accuracy`, `error`, `micro_f1`, `macro_f1`, `macro_precision`, `macro_recall` and `images` (number of
        images). With more than 5 classes, `top_5_accuracy` is added.
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


def evaluate_splits(
    run: Any, loaders: Mapping[str, Iterable[Mapping[str, torch.Tensor]]], processor: Any
) -> tuple[dict[str, float], torch.Tensor]:
    """Compute the scores of the model of a training run on several splits.

    Args:
        run: The `TrainingRun`. Its averaged weights are used if it has them.
        loaders: Batches per split, see `evaluate`.
        processor: Has the mean and standard deviation of the pixels.

    Returns:
        The scores, with keys such as `val_accuracy`; and the confusion matrix of the last split.
    """
    metrics, confusion = {}, torch.empty(0)
    with run.averaged():
        for split, batches in loaders.items():
            scores, confusion = evaluate(run.model, batches, processor, gather=run.gather)
            metrics |= {f"{split}_{name}": value for name, value in scores.items()}
    return metrics, confusion


def watch(run: Any, loaders: Mapping[str, Iterable[Mapping[str, torch.Tensor]]], processor: Any) -> dict[str, float]:
    """Compute the scores in `WATCHED` per split, to log them during training. See `evaluate_splits`."""
    metrics, _ = evaluate_splits(run, loaders, processor)
    return {f"{split}_{name}": metrics[f"{split}_{name}"] for split in loaders for name in WATCHED}


# ---------------------------------------------------------------------------------------------------------------------
# Report


def confusion_record(confusion: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Convert a confusion matrix into the form that results.json holds.

    Args:
        confusion: Counts (true class, predicted class).
        names: Names of the classes.

    Returns:
        `classes`, `counts`, and the sizes of `groups` of related classes. Classes are sorted by superclass if the
        superclasses are known; otherwise they keep their order and form one group.
    """
    try:
        groups = superclasses(names)
    except ValueError:
        groups = [list(range(len(names)))]
    order = [label for group in groups for label in group]
    counts = confusion[order][:, order].tolist()
    return {"classes": [names[label] for label in order], "groups": [len(group) for group in groups], "counts": counts}


def draw_confusion(confusion: torch.Tensor, names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix, as fractions of each true class.

    Args:
        confusion: Counts (true class, predicted class).
        names: Names of the classes.
        path: The image file to write.
    """
    from matplotlib.figure import Figure  # here, because this import takes most of a second

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
    figure.colorbar(picture, ax=axes, shrink=0.5, label="fraction of the true class")
    figure.savefig(path, metadata={"Software": None})


def class_rows(confusion: torch.Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Compute precision, recall, F1, number of images and most frequent confusion for each class.

    Args:
        confusion: Counts (true class, predicted class).
        names: Names of the classes.

    Returns:
        One row per class.
    """
    scores = per_class_scores(confusion)
    wrong = confusion - torch.diag(confusion.diagonal())
    return [
        {
            "class": name,
            **{key: round(scores[key][label].item(), 4) for key in ("precision", "recall", "f1")},
            "images": int(scores["support"][label]),
            "mistaken for": names[int(wrong[label].argmax())] if wrong[label].any() else "",
        }
        for label, name in enumerate(names)
    ]


def write_classes(confusion: torch.Tensor, names: Sequence[str], folder: Path) -> None:
    """Write classes.csv (one row per class) and confusion.png (the matrix as a picture) into a folder."""
    rows = class_rows(confusion, names)
    with open(folder / "classes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw_confusion(confusion, names, folder / "confusion.png")


@activity("Writing the report")
def write_report(folder: Path, model: str) -> None:
    """Write the learning curves and the model card of a finished run, and print where they are.

    Args:
        folder: The folder of the run.
        model: A key of `CLASSIFIERS`, or the name of a model of another library.
    """
    library = is_library_model(model)
    plot_run(folder, folder / "curves.png", CURVES)
    card = run_card(
        folder,
        summary=f"An image classifier: {model}." if library else CLASSIFIERS[model].summary,
        limits=LIMITS,
        tags=[*(("timm",) if model.startswith("timm/") else () if library else (model,)), "vision"],
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
