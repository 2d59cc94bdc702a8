"""Image classifiers of transformers and timm, for `--model` of scripts/train_classifier.py.

A name with a slash is a folder, or the id of a model on the Hub: "timm/resnet18.a1_in1k",
"google/vit-base-patch16-224" or "runs/train_classifier". The model gets an output layer for the classes of the data.
Without pretrained weights, a model of timm needs no download. timm is imported on first use.
"""

import difflib
from collections.abc import Sequence
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
)

from hf_dl.pipelines.model_loading import check_not_runs

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def is_library_model(name: str) -> bool:
    """Return whether a name is a folder or the id of a model on the Hub."""
    return "/" in name


def make_library_model(name: str, *, pretrained: bool, image_size: int, names: Sequence[str]) -> PreTrainedModel:
    """Create an image classifier of transformers or timm for the classes of the data.

    Args:
        name: Id on the Hub, or folder.
        pretrained: Whether to start from the weights of that id. The output layer is always new.
        image_size: Height and width of the images in pixels.
        names: Names of the classes.

    Returns:
        The model.

    Raises:
        ValueError: If the model is unknown, cannot be loaded, or needs images of another size.

    Example:
        ```python
        >>> model = make_library_model("timm/resnet18.a1_in1k", pretrained=False, image_size=32, names=["cat", "dog"])
        >>> model.config.id2label
        {0: 'cat', 1: 'dog'}

        ```
    """
    labels = {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}
    of_timm = name.startswith("timm/")
    check_not_runs(name)
    try:
        if pretrained:
            model = AutoModelForImageClassification.from_pretrained(
                name, **labels, ignore_mismatched_sizes=True, use_safetensors=True
            )
        elif of_timm:
            model = _make_timm_model(name, image_size, labels)
        else:
            model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(name, **labels))
    except (OSError, ValueError) as error:
        download = " Set --pretrained false to start from random weights without a download." if of_timm else ""
        raise ValueError(
            f"model={name!r} cannot be loaded. Expected a folder, or the id of an image classifier on a Hub that can "
            f"be reached.{download if pretrained else ''} The reason was: {' '.join(str(error).split())}"
        ) from error
    _check_size(model, name, image_size)
    return model


def _make_timm_model(name: str, image_size: int, labels: dict[str, Any]) -> PreTrainedModel:
    import timm  # here, because this import takes a second
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification  # they import timm

    architecture = name.removeprefix("timm/").split(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        hint = f" Similar names: {', '.join(close)}." if close else ""
        raise ValueError(f"timm has no model {architecture!r}.{hint}")
    published = timm.get_pretrained_cfg(architecture)
    options = {"img_size": image_size} if published is not None and published.fixed_input_size else None
    config = TimmWrapperConfig(architecture=architecture, model_args=options, **labels)
    return TimmWrapperForImageClassification(config)


def _check_size(model: PreTrainedModel, name: str, image_size: int) -> None:
    """Raise ValueError if the model accepts images of another size only."""
    published = getattr(model.config, "pretrained_cfg", None) or {}
    sizes = {getattr(model.config, "image_size", None)}
    if published.get("fixed_input_size") and not (model.config.model_args or {}).get("img_size"):
        sizes.add(published["input_size"][-1])
    expected = next((size for size in sizes if isinstance(size, int) and size != image_size), None)
    if expected is not None:
        raise ValueError(
            f"image_size={image_size} does not fit model={name!r}, which expects {expected}x{expected} pixels. Add "
            f"--image_size {expected}."
        )


def pixel_statistics(name: str, model: PreTrainedModel) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and standard deviation of each channel that a pretrained model expects, in [0, 1].

    Args:
        name: Id on the Hub, or folder.
        model: The model.

    Returns:
        The statistics of its image processor; without one, the statistics of ImageNet.
    """
    published = getattr(model.config, "pretrained_cfg", None) or {}
    if "mean" in published:
        return published["mean"], published["std"]
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        return IMAGENET
    return processor.image_mean, processor.image_std
