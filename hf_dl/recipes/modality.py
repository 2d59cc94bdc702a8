"""Alignment of the embeddings of a CLIP model, and its effect on the zero-shot accuracy and on the modality gap.

An alignment is fitted on pairs of an image and a text, from one of three sources:

* "captions": scenes with one object that the model was not trained on, with captions as in training
* "classes": labeled training images, with the text of their class; of scenes, only classes that occur in training
* "test": labeled test images with the text of their class. This leak is made on purpose, to show its effect.

The scores on the images of the fit and on new test images stand side by side. They are means over several random
choices of the pairs, because the accuracy on 20 images differs a lot from one choice to the next.
"""

import json
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hf_dl.data import captions, zero_shot
from hf_dl.metrics.alignment import METHODS, Alignment, permuted_label_control
from hf_dl.metrics.modality_gap import modality_gap_scores
from hf_dl.metrics.paired import mcnemar
from hf_dl.models.clip_features import encode_texts

from . import zero_shot_classifier
from .evaluation import hide_progress_bars
from .phrase_mismatch import UNRELATED, mismatch_scores

SOURCES = ("captions", "classes", "test")
NEW_SCENES = 1  # seed of captioned scenes that no model was trained on
DRAWS = 50  # random choices of the pairs to fit on
GAP_PAIRS = 1000  # captioned test images for the modality gap
POINTS = 300  # pairs in the picture


@dataclass
class LabeledFlags:
    """Flags that select the labeled images and the captions."""

    source: str = field(
        default="synthetic",
        metadata={"help": "Labeled images: synthetic (generated scenes), a Hub dataset id, or a folder of classes."},
    )
    detail: Literal["rich", "partial", "poor"] = field(
        default="rich", metadata={"help": "Information in the captions of synthetic scenes."}
    )
    style: Literal["plain", "textured"] = field(default="plain", metadata={"help": "Look of the synthetic scenes."})
    image_size: int = field(default=64, metadata={"help": "Height and width of the synthetic scenes, in pixels."})
    num_test: int = field(default=1600, metadata={"help": "Number of labeled test images. 0 uses all images."})


@dataclass
class AlignmentFlags:
    """Flags of the alignment."""

    method: Literal[tuple(METHODS)] = field(default="rotation", metadata={"help": "How to align images and texts."})
    fit_on: Literal[SOURCES] = field(
        default="captions",
        metadata={
            "help": "Pairs to fit on: images with captions, training images with the text of their class, or the test "
            "images themselves, which is a leak."
        },
    )
    num_fit: list[int] = field(
        default_factory=lambda: [20, 100, 300, 1000],
        metadata={"help": "Numbers of pairs to fit on, one fit for each."},
    )
    prompts: str = field(
        default="plain", metadata={"help": "Prompt style of the classes, or a template such as 'a photo of {a}'."}
    )


@dataclass
class Embeddings:
    """Embeddings of images with one text each.

    Attributes:
        ids: Id of each image.
        images: Features of length 1 (images, dim).
        texts: Features of the text of each image (images, dim).
        labels: Class of each image (images,).
        seen: Whether the class occurs in the training of the model, bool (images,).
    """

    ids: list[str]
    images: Tensor
    texts: Tensor
    labels: Tensor
    seen: Tensor

    def pick(self, rows: Sequence[int] | Tensor) -> "Embeddings":
        """Return some of the images, in the given order."""
        rows = torch.as_tensor(rows)
        ids = [self.ids[row] for row in rows.tolist()]
        return Embeddings(ids, self.images[rows], self.texts[rows], self.labels[rows], self.seen[rows])

    def without(self, ids: Collection[str]) -> "Embeddings":
        """Return the images whose id is not among the given ids."""
        return self.pick([row for row, name in enumerate(self.ids) if name not in ids])


def embed_labeled(
    model: Any, processor: Any, tokenizer: Any, args: Any, split: str, num_images: int | None
) -> tuple[Embeddings, Tensor, list[str]]:
    """Embed labeled images and the texts of their classes.

    Args:
        model: A CLIP or SigLIP model.
        processor: Its image processor.
        tokenizer: Its tokenizer.
        args: Flags with the fields of `LabeledFlags`, and `prompts`.
        split: "train", "validation" or "test".
        num_images: Number of images. None: all images.

    Returns:
        The images with the texts of their classes, the features of the classes (classes, dim), and their names.
    """
    hide_progress_bars()
    options = {"size": args.image_size, "style": args.style} if args.source == "synthetic" else {}
    data = zero_shot.load(split, args.source, num_images=num_images, **options)
    names = zero_shot.clean_names(data.features["label"].names)
    classes = embed_classes(model, tokenizer, args, names)
    images, labels = (
        zero_shot_classifier.encode_images(model, data["image"], processor),
        torch.tensor(data["label"][:]),
    )
    seen = torch.tensor(data["seen"][:]) if "seen" in data.column_names else torch.ones_like(labels, dtype=torch.bool)
    ids = [f"{split} {row}" for row in range(len(labels))]
    return Embeddings(ids, images, classes[labels], labels, seen), classes, names


def embed_classes(model: Any, tokenizer: Any, args: Any, names: Sequence[str]) -> Tensor:
    """Embed the prompts of classes.

    Args:
        model: A CLIP or SigLIP model.
        tokenizer: Its tokenizer.
        args: Flags with `prompts`.
        names: Names of the classes.

    Returns:
        Features of length 1 (classes, dim).
    """
    prompts = zero_shot.prompts(names, zero_shot_classifier.find_templates(args.prompts))
    return zero_shot_classifier.class_features(model, prompts, tokenizer)


def embed_captioned(model: Any, processor: Any, tokenizer: Any, args: Any, split: str, num_images: int) -> Embeddings:
    """Embed scenes with one object and the first of their captions.

    Args:
        model: A CLIP or SigLIP model.
        processor: Its image processor.
        tokenizer: Its tokenizer.
        args: Flags with the fields of `LabeledFlags`.
        split: "train", "validation" or "test". Scenes of the training split have combinations of training only.
        num_images: Number of images.

    Raises:
        ValueError: If the source is not "synthetic".
    """
    if args.source != "synthetic":
        raise ValueError(f"source={args.source!r} has no captions. Use fit_on=classes, or source=synthetic.")
    hide_progress_bars()
    options = {"detail": args.detail, "style": args.style, "size": args.image_size}
    # With the seed of train_clip.py, about half of these scenes would be training scenes of CLIP.
    seed = NEW_SCENES if split == "train" else 0
    data = captions.load(split, num_objects=(1, 1), num_pairs=num_images, seed=seed, **options)
    pairs = [(each[0]["color"], each[0]["shape"]) for each in data["objects"]]
    images = zero_shot_classifier.encode_images(model, data["image"], processor)
    texts = encode_texts(model, [each[0] for each in data["captions"]], tokenizer)
    labels = torch.tensor([captions.COMBINATIONS.index(pair) for pair in pairs])
    seen = torch.tensor([pair not in captions.HELD_OUT for pair in pairs])
    return Embeddings(list(data["image_id"]), images, texts, labels, seen)


def accuracy(images: Tensor, classes: Tensor, labels: Tensor) -> Tensor:
    """Return whether each image is most similar to its class, (images,) bool."""
    return (images @ classes.T).argmax(dim=1) == labels


def score_alignment(
    fit: Any, pairs: Embeddings, test: Embeddings, classes: Tensor, gap_pairs: Embeddings, *, labeled: bool
) -> tuple[dict[str, float], Alignment]:
    """Fit an alignment, and score it on the images of the fit and on new images.

    Args:
        fit: A value of `hf_dl.metrics.alignment.METHODS`.
        pairs: The pairs to fit on.
        test: Labeled test images. Those of the fit are left out.
        classes: Features of the classes (classes, dim).
        gap_pairs: Pairs for the modality gap after the alignment. Those of the fit are left out.
        labeled: Whether the texts of `pairs` are the texts of the classes. Then labels are permuted as a control.

    Returns:
        The scores and the alignment. `accuracy` is over new images, `unseen_accuracy` over new images of classes that
        were not in training, and `fit_accuracy` over the images of the fit. Each has a `..._before` without alignment,
        and a gain, the difference. `p_value` is McNemar's test of the gain on new images. `standard_error` is
        the standard error of one accuracy. The scores of the modality gap are over `gap_pairs`, and
        the scores of unseen classes are left out if all classes were in training.
    """
    alignment = fit(pairs.images, pairs.texts, ids=pairs.ids)
    new, gap_pairs = (each.without(alignment.fit_ids) for each in (test, gap_pairs))
    before = accuracy(new.images, classes, new.labels)
    after = accuracy(*alignment.apply(new.images, classes, ids=new.ids), new.labels)
    own_before = accuracy(pairs.images, classes, pairs.labels)
    own = alignment.apply(pairs.images, classes, ids=pairs.ids, allow_overlap=True)
    own_after = accuracy(*own, pairs.labels)

    scores = {}
    groups = [("", before, after), ("fit_", own_before, own_after)]
    if not new.seen.all():
        groups.append(("unseen_", before[~new.seen], after[~new.seen]))
    for name, without, with_it in groups:
        scores[f"{name}accuracy"] = with_it.double().mean().item()
        scores[f"{name}accuracy_before"] = without.double().mean().item()
        scores[f"{name}gain"] = scores[f"{name}accuracy"] - scores[f"{name}accuracy_before"]
    scores["p_value"] = mcnemar(int((before & ~after).sum()), int((after & ~before).sum()))
    scores["standard_error"] = (scores["accuracy"] * (1 - scores["accuracy"]) / len(new.ids)) ** 0.5
    scores["new_images"] = float(len(new.ids))
    gap = modality_gap_scores(*alignment.apply(gap_pairs.images, gap_pairs.texts, ids=gap_pairs.ids))
    scores |= {name: value for name, value in gap.items() if name != "pairs"}
    if labeled:
        control = permuted_label_control(fit, pairs.images, pairs.labels, classes)
        scores |= {"permuted_gain": control["permuted_gain"], "permuted_p_value": control["p_value"]}
    return scores, alignment


def average_draws(
    fit: Any,
    pool: Embeddings,
    draws: Sequence[Tensor],
    test: Embeddings,
    classes: Tensor,
    gap_pairs: Embeddings,
    *,
    labeled: bool,
) -> tuple[dict[str, float], Alignment]:
    """Score an alignment for several choices of the pairs to fit on.

    Args:
        fit: A value of `hf_dl.metrics.alignment.METHODS`.
        pool: The pairs to choose from.
        draws: Rows of the pool, one tensor (pairs,) per choice. If the pairs are all of the pool, one choice is used.
        test: See `score_alignment`, as the other arguments.
        classes: Features of the classes (classes, dim).
        gap_pairs: Pairs for the modality gap after the alignment.
        labeled: Whether the texts of the pairs are the texts of the classes.

    Returns:
        The means of the scores of `score_alignment`, and the number of choices as `draws`. The p-values and the
        alignment belong to the first choice.
    """
    draws = draws[:1] if len(draws[0]) == len(pool.ids) else draws
    options = {"labeled": labeled}
    found = [score_alignment(fit, pool.pick(rows), test, classes, gap_pairs, **options) for rows in draws]
    first, alignment = found[0]
    # A choice may leave no image of an unseen class.
    names = dict.fromkeys(name for scores, _ in found for name in scores)
    means = {name: statistics.fmean(scores[name] for scores, _ in found if name in scores) for name in names}
    means |= {name: value for name, value in first.items() if name.endswith("p_value")}
    return means | {"draws": float(len(draws))}, alignment


def evaluate(
    model: Any, processor: Any, tokenizer: Any, args: Any
) -> tuple[dict[str, float], dict[str, tuple[Tensor, Tensor]]]:
    """Fit alignments on increasing numbers of pairs, and score each of them.

    Args:
        model: A CLIP or SigLIP model.
        processor: Its image processor.
        tokenizer: Its tokenizer.
        args: Flags with the fields of `LabeledFlags` and `AlignmentFlags`, and `seed`.

    Returns:
        The scores of `average_draws` over `DRAWS` choices of the pairs, with the number of pairs as suffix, such as
        `accuracy_20`. For the most pairs, also the scores of `hf_dl.recipes.phrase_mismatch` for the first choice.
        Then image and text embeddings of new pairs, without alignment and with the alignment of the most pairs.

    Raises:
        ValueError: If a number of pairs is not positive, or exceeds the number of images.
    """
    sizes, most = sorted(set(args.num_fit)), max(args.num_fit, default=0)
    if not sizes or sizes[0] < 1:
        raise ValueError(f"num_fit={args.num_fit} must be at least one number of pairs above 0.")
    synthetic, parts = args.source == "synthetic", (model, processor, tokenizer, args)
    test, classes, names = embed_labeled(*parts, "test", args.num_test or None)
    pool = test
    if args.fit_on == "captions":
        pool = embed_captioned(*parts, "train", most)
    elif args.fit_on == "classes":
        seen = 1 - len(captions.HELD_OUT) / len(captions.COMBINATIONS)
        count = int(most / seen) + len(captions.COMBINATIONS) if synthetic else most
        pool, _, _ = embed_labeled(*parts, "train", count)
        pool = pool.pick(pool.seen.nonzero().flatten())
    if most > len(pool.ids) - (pool is test):
        raise ValueError(f"num_fit={most} needs more than the {len(pool.ids)} images of fit_on={args.fit_on}.")

    generator = torch.Generator().manual_seed(args.seed)
    orders = [torch.randperm(len(pool.ids), generator=generator) for _ in range(DRAWS)]
    gap_pairs = embed_captioned(*parts, "test", GAP_PAIRS) if synthetic else test
    metrics, labeled = {}, args.fit_on != "captions"
    for size in sizes:
        draws = [each[:size] for each in orders]
        scores, alignment = average_draws(METHODS[args.method], pool, draws, test, classes, gap_pairs, labeled=labeled)
        metrics |= {f"{name}_{size}": value for name, value in scores.items()}
    # Phrases that do not match, with the alignment of the most pairs.
    new, gap_pairs = (each.without(alignment.fit_ids) for each in (test, gap_pairs))
    phrases = torch.cat([classes, embed_classes(model, tokenizer, args, UNRELATED)])
    images, phrases = alignment.apply(new.images, phrases, ids=new.ids)
    cosines, unrelated = (images @ phrases.T).split([len(classes), len(UNRELATED)], dim=1)
    metrics |= mismatch_scores(cosines, new.labels, names, unrelated)
    shown = gap_pairs.pick(range(min(POINTS, len(gap_pairs.ids))))
    aligned = alignment.apply(shown.images, shown.texts, ids=shown.ids)
    return metrics, {"without alignment": (shown.images, shown.texts), "with alignment": aligned}


def project(panels: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Project images and texts on the first two principal components of the first panel, so that panels compare.

    Args:
        panels: Title, and embeddings of images (images, dim) and texts (texts, dim).

    Returns:
        Coordinates of the images (images, 2) and of the texts (texts, 2), for each title.

    Example:
        >>> project({"pairs": (torch.tensor([[1.0, 0.0], [1.0, 0.1]]), torch.tensor([[-1.0, 0.0]]))})["pairs"][0].shape
        torch.Size([2, 2])
    """
    first = torch.cat(next(iter(panels.values()))).double()
    center = first.mean(0)
    axes = torch.linalg.svd(first - center, full_matrices=False).Vh[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # the sign of an axis is arbitrary
    return {
        title: tuple(((points.double() - center) @ axes.T).float() for points in pair)
        for title, pair in panels.items()
    }


def write_points(panels: dict[str, tuple[Tensor, Tensor]], path: str | Path) -> Path:
    """Write the points of `draw_pairs` as JSON, with the scores of the modality gap, for pages that draw them.

    Args:
        panels: Title, and embeddings of images and texts.
        path: The file to write.

    Returns:
        The path.
    """
    found = {}
    for (title, pair), points in zip(panels.items(), project(panels).values(), strict=True):
        images, texts = ([[round(x, 3) for x in point] for point in each.tolist()] for each in points)
        scores = {name: round(value, 4) for name, value in modality_gap_scores(*pair).items()}
        found[title] = {"images": images, "texts": texts, "scores": scores}
    path = Path(path)
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return path


def draw_pairs(panels: dict[str, tuple[Tensor, Tensor]], path: str | Path) -> Path:
    """Draw images and texts in two dimensions, one panel per alignment, with a line for each pair.

    Args:
        panels: Title, and embeddings of images and texts.
        path: The picture to write.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure  # here, because this import takes most of a second

    figure = Figure(figsize=(4.2 * len(panels), 4), layout="constrained")
    for axes, (title, (left, right)) in zip(
        figure.subplots(1, len(panels), squeeze=False).ravel(), project(panels).items(), strict=True
    ):
        for first, second in zip(left.tolist(), right.tolist(), strict=True):
            axes.plot(*zip(first, second, strict=True), color="#bbbbbb", linewidth=0.3, zorder=1)
        axes.scatter(*left.T.tolist(), s=7, color="#0072B2", label="images", zorder=2)
        axes.scatter(*right.T.tolist(), s=7, color="#D55E00", label="captions", zorder=2)
        axes.set_title(title)
        axes.set_xlim(-1.2, 1.2)
        axes.set_ylim(-1.2, 1.2)
        axes.set_aspect("equal")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(loc="lower right", frameon=False, fontsize=9)
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path
