"""Zero-shot classification: images are classified by text prompts, with any CLIP or SigLIP model.

A text prompt describes each class. The class of an image is the prompt whose features have the highest cosine
similarity to the features of the image (Radford et al. 2021, https://arxiv.org/abs/2103.00020).
scripts/evaluate_zero_shot.py, training runs of CLIP and the alignment of features use these functions.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedModel

from hf_dl.data import zero_shot
from hf_dl.models.clip_features import as_features, check_tokenizer, encode_texts

from .evaluation import load_model

STYLES = ("plain", "photo", "descriptive")  # the prompt styles of a training run, and the default of the evaluation
BATCH_SIZE = 128  # images per batch


@torch.no_grad()
def encode_images(
    model: PreTrainedModel, images: Iterable[Any], processor: Any, *, batch_size: int = BATCH_SIZE
) -> torch.Tensor:
    """Compute the features of images in batches.

    Args:
        model: A CLIP or SigLIP model. It is set to evaluation mode.
        images: PIL images, or uint8 tensors (3, height, width), such as the rows of an image column.
        processor: Its image processor, or a processor that has one.
        batch_size: Images per batch.

    Returns:
        Features of length 1, float32 (images, dim), on the CPU.
    """
    model.eval()
    process = getattr(processor, "image_processor", processor)
    features = []
    for batch in _in_batches(images, batch_size):
        inputs = process(images=batch, return_tensors="pt").to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        features.append(as_features(model.get_image_features(**inputs)).float().cpu())
    if not features:
        raise ValueError("The list is empty. Expected at least one image to encode.")
    return F.normalize(torch.cat(features), dim=1)


def _in_batches(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch = []
    for value in values:
        batch.append(value)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def class_features(model: PreTrainedModel, prompts: Sequence[Sequence[str]], tokenizer: Any) -> torch.Tensor:
    """Compute the features of classes: the mean of the features of their prompts, scaled to length 1.

    Args:
        model: A CLIP or SigLIP model.
        prompts: The prompts of each class, see `hf_dl.data.zero_shot.prompts`. All classes have the same number.
        tokenizer: Its tokenizer, or a processor that has one.

    Returns:
        Features (classes, dim).
    """
    features = encode_texts(model, [text for each in prompts for text in each], tokenizer)
    return F.normalize(features.unflatten(0, (len(prompts), -1)).mean(dim=1), dim=1)


def find_templates(style: str) -> tuple[str, ...]:
    """Return the templates of a prompt style.

    Args:
        style: A key of `hf_dl.data.zero_shot.PROMPTS`, or a template such as "a drawing of {a}". Several of them,
            joined by "+", form an ensemble.

    Raises:
        ValueError: If a name is unknown.

    Example:
        >>> find_templates("plain+a drawing of {a}")
        ('{}', 'a drawing of {a}')
    """
    found: list[str] = []
    for part in style.split("+"):
        name = part.strip()
        if "{" not in name and name not in zero_shot.PROMPTS:
            raise ValueError(
                f"prompts={style!r} has the unknown part {name!r}. Choose from {', '.join(zero_shot.PROMPTS)}, or "
                "write a template such as 'a drawing of {a}'."
            )
        found += [name] if "{" in name else zero_shot.PROMPTS[name]
    return tuple(dict.fromkeys(found))


@dataclass
class ZeroShotResult:
    """Predictions of a zero-shot classifier for several prompt styles.

    Attributes:
        names: Names of the classes.
        labels: True class of each image (images,).
        seen: Whether the class of each image occurred in training, bool (images,).
        predictions: Predicted class of each image for each style.
        top_5: Whether the true class is among the five best ones, for each style.
        cosines: Cosine of each image and each class (images, classes), for each style.
    """

    names: list[str]
    labels: torch.Tensor
    seen: torch.Tensor
    predictions: dict[str, torch.Tensor]
    top_5: dict[str, torch.Tensor]
    cosines: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def correct(self) -> dict[str, torch.Tensor]:
        """Whether each image is classified correctly, for each style."""
        return {style: predicted == self.labels for style, predicted in self.predictions.items()}

    def scores(self) -> dict[str, float]:
        """Compute the accuracies.

        Returns:
            For each style `{style}_accuracy`, and with more than five classes `{style}_top_5_accuracy`. If some
            classes did not occur in training, also `{style}_seen_accuracy` and `{style}_unseen_accuracy`. Then the
            numbers of `images` and of `unseen_images`.
        """
        scores, unseen = {}, ~self.seen
        for style, right in self.correct.items():
            right = right.double()
            scores[f"{style}_accuracy"] = right.mean().item()
            if self.seen.any() and unseen.any():
                scores[f"{style}_seen_accuracy"] = right[self.seen].mean().item()
                scores[f"{style}_unseen_accuracy"] = right[unseen].mean().item()
            if len(self.names) > 5:
                scores[f"{style}_top_5_accuracy"] = self.top_5[style].double().mean().item()
        return scores | {"images": float(len(self.labels)), "unseen_images": float(unseen.sum())}

    def class_rows(self) -> list[dict[str, Any]]:
        """Compute the accuracy of each class.

        Returns:
            One row per class: its name, whether it is unseen, its number of images, and its accuracy for each style.
            "mistaken for" is the most frequent wrong prediction of the first style.
        """
        rows, first = [], next(iter(self.predictions.values()))
        for label, name in enumerate(self.names):
            mine = self.labels == label
            count = int(mine.sum())
            wrong = first[mine & (first != label)].bincount(minlength=len(self.names))
            row: dict[str, Any] = {"class": name, "unseen": "yes" if (mine & ~self.seen).any() else "no"}
            row["images"] = count
            row |= {style: round(right[mine].double().mean().item(), 4) if count else "" for style, right in
                    self.correct.items()}  # fmt: skip
            rows.append(row | {"mistaken for": self.names[int(wrong.argmax())] if wrong.any() else ""})
        return rows


def classify(
    model: PreTrainedModel, processor: Any, data: datasets.Dataset, styles: Sequence[str], *, tokenizer: Any = None
) -> ZeroShotResult:
    """Classify images by text prompts, once per prompt style.

    Args:
        model: A CLIP or SigLIP model.
        processor: Its processor, or its image processor.
        data: Rows with `image`, `label` and optionally `seen`, see `hf_dl.data.zero_shot`.
        styles: Prompt styles, see `find_templates`.
        tokenizer: Its tokenizer. Defaults to the tokenizer of the processor.

    Raises:
        ValueError: If a style is unknown.
    """
    templates = {style: find_templates(style) for style in styles}
    features = encode_images(model, data["image"], processor)
    names = list(data.features["label"].names)
    predictions, top_5, cosines = {}, {}, {}
    labels = torch.tensor(data["label"][:])
    for style, texts in templates.items():
        prompts = zero_shot.prompts(names, texts)
        similarity = features @ class_features(model, prompts, tokenizer or processor).T
        cosines[style], predictions[style] = similarity, similarity.argmax(dim=1)
        top_5[style] = (similarity.topk(min(5, len(names))).indices == labels[:, None]).any(dim=1)
    seen = torch.tensor(data["seen"][:]) if "seen" in data.column_names else torch.ones(len(labels), dtype=torch.bool)
    names = zero_shot.clean_names(names)
    return ZeroShotResult(names, labels, seen, predictions, top_5, cosines)


def load_clip(name: str | Path) -> tuple[PreTrainedModel, Any, Any]:
    """Load a CLIP or SigLIP model with its image processor and tokenizer.

    Args:
        name: Folder or Hub id.

    Returns:
        The model, on the GPU if there is one, the image processor and the tokenizer.

    Raises:
        ValueError: If the model cannot be loaded, it has no features of images and texts, or the tokenizer belongs to
            another model.
    """
    model = load_model(AutoModel, name)
    if not all(hasattr(model, method) for method in ("get_image_features", "get_text_features")):
        raise ValueError(
            f"model={str(name)!r} is a {type(model).__name__}. Expected a model of images and texts, such as "
            "openai/clip-vit-base-patch32, google/siglip-base-patch16-224, or a folder of scripts/train_clip.py."
        )
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    image_processor, tokenizer = load_model(AutoImageProcessor, name), load_model(AutoTokenizer, name)
    check_tokenizer(tokenizer, model.config.get_text_config(), reads_end=model.config.model_type == "clip")
    return model, image_processor, tokenizer


def scene_size(model: PreTrainedModel) -> int:
    """Return the size of the images of a model, within the limits of generated scenes, in pixels."""
    size = getattr(model.config.vision_config, "image_size", 224)
    return min(max(size if isinstance(size, int) else max(size), 32), 256)


def write_classes(result: ZeroShotResult, folder: Path) -> list[list[str]]:
    """Write the accuracy of each class to classes.csv, and return its rows as text, the header first."""
    rows = result.class_rows()
    with open(folder / "classes.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
