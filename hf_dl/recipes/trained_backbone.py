"""Trained classifiers of ours as the backbone of another model: detectors and captioners."""

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from hf_dl.models.detection_backbone import CLASSIFIERS
from hf_dl.pipelines.model_loading import check_not_runs


def load_backbone(folder: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Load a trained classifier of ours as a backbone.

    Args:
        folder: The folder of the classifier.

    Returns:
        The classifier, the fields `backbone` and `backbone_options` of a config, and the mean and standard deviation
        of the pixels for the image processor.

    Raises:
        ValueError: If the folder has no classifier of ours.
    """
    check_not_runs(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"backbone={folder!r} is a folder without a model. Train a classifier first.") from error
    if config.model_type not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS)
        raise ValueError(f"backbone={folder!r} has a model of type {config.model_type!r}. Expected one of: {known}.")
    options = {name: getattr(config, name) for name in type(config).__annotations__ if name != "model_type"}
    processor = AutoImageProcessor.from_pretrained(folder)
    statistics = {"image_mean": list(processor.image_mean), "image_std": list(processor.image_std)}
    classifier = AutoModelForImageClassification.from_pretrained(folder)
    return classifier, {"backbone": config.model_type, "backbone_options": options}, statistics
