"""Labeled images and prompts for zero-shot classification with CLIP and similar models.

A zero-shot classifier compares an image with one text per class, such as "a photo of a red cube". `load` returns the
images and the class names, and `prompts` writes the texts (Radford et al. 2021, https://arxiv.org/abs/2103.00020).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

import datasets

from . import labeled_images
from .captions import COMBINATIONS, HELD_OUT, OBJECT_SCALE, recombine
from .generation import counted, row_bar
from .object_crops import CLASSES
from .png import encode_png
from .raycast import chunk_size, shade
from .raycast_geometry import SceneBatch
from .scenes import check_arguments, run_chunks, visible_scenes
from .splits import Rows, Source

SPLITS = {"train": 3200, "validation": 640, "test": 1600}  # default numbers of generated images

VERSION = 2  # increase it when pixels or columns change: `datasets` caches by arguments, not by code


def load(
    split: str = "test",
    source: Source = "synthetic",
    *,
    size: int | None = None,
    num_images: int | None = None,
    style: str = "plain",
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    corrupt: str = "refuse",
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load labeled images for zero-shot classification.

    Args:
        split: "train", "validation" or "test".
        source: "synthetic" means generated scenes with one object. The 32 classes are its color and shape, such as
            "red cube", in equal numbers. Other sources are read by `hf_dl.data.labeled_images.load`: Hub ids such as
            `tanganke/stl10`, binary or parquet files of STL-10 and CIFAR, and class folders of images.
        size: Width and height of the images in pixels. Real images are cropped to a centered square and resized.
            Defaults to 64 for generated scenes, and to whole images in their own size otherwise.
        num_images: Number of images. Defaults to all, and to the count in `SPLITS` for generated scenes.
        style: Style of generated scenes, "plain" or "textured".
        seed: Seed of the generated images, and of the choice and order of real ones.
        image_column: As in `hf_dl.data.labeled_images.load`, like `label_column` and `corrupt`.
        label_column: Column of the labels.
        corrupt: Handling of images that cannot be decoded.
        streaming: Render or decode while iterating, instead of once into the cache of `datasets`.

    Returns:
        A dataset with the columns `image` (RGB), `label` (`ClassLabel` with the class names) and `seen`. `seen` is
        False for the combinations in `hf_dl.data.captions.HELD_OUT`, which training scenes do not contain. It is True
        for all other classes.

    Raises:
        FileNotFoundError: If the folder or file does not exist.
        ValueError: If an argument, a column or a label is invalid, or an image cannot be read.

    Example:
        >>> from hf_dl.data import zero_shot
        >>> dataset = zero_shot.load("test", num_images=8)
        >>> dataset.features["label"].names[5]
        'red cube'
    """
    if not isinstance(source, str) or source != "synthetic":
        options = {"image_column": image_column, "label_column": label_column, "corrupt": corrupt, "seed": seed}
        rows = labeled_images.load(split, source, size=size, num_images=num_images, streaming=streaming, **options)
        return _mark_seen(rows)
    count = SPLITS.get(split, 1) if num_images is None else num_images
    size = 64 if size is None else size
    if count < 1:
        raise ValueError(f"num_images={num_images} must be at least 1.")
    check_arguments(split, style=style, size=size, num_objects=(1, 1), num_scenes=count)
    arguments = {
        "shards": [(start, min(start + 256, count)) for start in range(0, count, 256)],
        "split": split,
        "style": style,
        "size": size,
        "seed": seed,
        "version": VERSION,
    }
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    options = {"features": features, "gen_kwargs": arguments, "split": datasets.NamedSplit(split)}
    if streaming:
        return _mark_seen(datasets.IterableDataset.from_generator(_render, **options))
    with row_bar(count, f"Rendering {split} images"):
        return _mark_seen(datasets.Dataset.from_generator(_render, **options))


def _mark_seen(rows: Rows) -> Rows:
    """Add the column `seen`."""
    label, kind = rows.features["label"], datasets.Value("bool")
    seen = [tuple(name.split()) not in HELD_OUT for name in label.names]
    if isinstance(rows, datasets.Dataset):
        marks = [seen[number] for number in rows.with_format("numpy")["label"][:]]
        description = rows.info.description
        rows = rows.add_column("seen", marks, feature=kind)
        rows.info.description = description
        return rows
    features = datasets.Features({**rows.features, "seen": kind})
    # undecoded, so that the images are not encoded again
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    return undecoded.map(lambda row: {"seen": seen[row["label"]]}).cast(features)


def _label(index: int, split: str, seed: int) -> int:
    """Return the class of an image. Each class occurs once in every 32 images."""
    block, place = divmod(index, len(CLASSES))
    rng = random.Random(f"hf_dl.zero_shot order {seed} {split} {block}")
    return sorted(range(len(CLASSES)), key=lambda _: rng.random())[place]


def _make_rows(indices: range, split: str, style: str, size: int, seed: int) -> list[dict]:
    labels = {index: _label(index, split, seed) for index in indices}
    drawn = visible_scenes(
        indices,
        split,
        style,
        size,
        (1, 1),
        seed,
        adapt=lambda index, scene: recombine(scene, {0: COMBINATIONS[labels[index]]}),
        object_scale=OBJECT_SCALE,
    )
    images = shade(SceneBatch([scene for scene, _ in drawn], size, "cpu")).numpy()
    return [{"image": encode_png(image), "label": label} for image, label in zip(images, labels.values(), strict=True)]


@counted
def _render(shards: list[tuple[int, int]], version: int, **arguments) -> Iterator[dict]:
    step = chunk_size(arguments["size"])
    chunks = [range(i, min(i + step, last)) for first, last in shards for i in range(first, last, step)]
    yield from run_chunks(_make_rows, chunks, **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts

PROMPTS: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "photo": ("a photo of {a}",),
    "descriptive": (
        "an image that clearly shows {a}",
        "there is {a} in this picture",
        "{a} in front of a plain background",
        "in the middle of the scene we can see {a}",
    ),
    "openai": (  # for CIFAR, from the repository of CLIP
        "a photo of {a}.",
        "a blurry photo of {a}.",
        "a black and white photo of {a}.",
        "a low contrast photo of {a}.",
        "a high contrast photo of {a}.",
        "a bad photo of {a}.",
        "a good photo of {a}.",
        "a photo of a small {}.",
        "a photo of a big {}.",
        "a photo of the {}.",
        "a blurry photo of the {}.",
        "a black and white photo of the {}.",
        "a low contrast photo of the {}.",
        "a high contrast photo of the {}.",
        "a bad photo of the {}.",
        "a good photo of the {}.",
        "a photo of the small {}.",
        "a photo of the big {}.",
    ),
}

_PLACEHOLDER = re.compile(r"\{(.*?)\}")
_ARTICLES = ("a", "an", "the")
_PLURALS = {"people", "children", "cattle", "men", "women", "mice", "geese", "teeth", "feet"}
_SINGULARS = {"atlas", "canvas", "christmas", "gas", "lens", "pancreas", "rhinoceros", "series", "species"}
_SINGULAR_ENDINGS = ("ss", "us", "is")
# words that are written with a vowel and spoken with a consonant, such as "unicorn" and "one-way sign"
_CONSONANT = re.compile(r"eu|ewe|on(e|ce)\b|u(ni(?![dmn])|s[ae]|t[eio]|fo|k|ran|bi|rin)", re.IGNORECASE)
# numbers and words that are written with a consonant and spoken with a vowel
_VOWEL = re.compile(r"8|1[18]\b|x\b|hour|honest|heir", re.IGNORECASE)
_SPELLED = re.compile(r"[AEFHILMNORSX][A-Z]{1,3}\b")  # letters such as MRI and SUV


def prompts(names: Sequence[str], templates: Sequence[str] | str) -> list[list[str]]:
    """Write the prompts of each class.

    Underscores become spaces. If all names start with a capital letter, the words become lower case, except words in
    capital letters such as "MRI". Otherwise, names whose first and last word start with a capital letter are proper
    names, and have no article.

    Args:
        names: Names of the classes.
        templates: Texts with `{}` for the name or `{a}` for the name with its article, or a key of `PROMPTS`.

    Returns:
        One list per class, with one text per template.

    Raises:
        ValueError: If a name is empty, or a template is unknown or has no placeholder.

    Example:
        >>> prompts(["airplane", "sea_lion"], ["{}", "a photo of {a}"])
        [['airplane', 'a photo of an airplane'], ['sea lion', 'a photo of a sea lion']]
    """
    if isinstance(templates, str):
        if templates not in PROMPTS:
            raise ValueError(
                f"templates={templates!r} is unknown. Choose one of {', '.join(PROMPTS)}, or give a list of texts."
            )
        templates = PROMPTS[templates]
    if not templates:
        raise ValueError("templates is empty. Expected texts with {} or {a}, such as 'a photo of {a}'.")
    for template in templates:
        found = _PLACEHOLDER.findall(template)
        if not found or set(found) - {"", "a"}:
            raise ValueError(f"The template {template!r} must contain {{}} or {{a}}, and no other words in braces.")
    cleaned = clean_names(names)
    fillers = [{"": name, "a": add_article(name)} for name in cleaned]
    return [[_PLACEHOLDER.sub(lambda m, f=f: f[m[1]], template) for template in templates] for f in fillers]


def clean_names(names: Sequence[str]) -> list[str]:
    """Return class names as words: without underscores, and in lower case except for proper names and acronyms.

    Args:
        names: Names of the classes, such as names of folders.

    Raises:
        ValueError: If a name is empty, or two names differ only by case, spaces or underscores.

    Example:
        >>> clean_names(["Sea_Lion", "MRI_scan"]), clean_names(["Paris", "beach"])
        (['sea lion', 'MRI scan'], ['Paris', 'beach'])
    """
    spaced = [" ".join(name.replace("_", " ").split()) for name in names]
    if "" in spaced:
        raise ValueError(f"names[{spaced.index('')}] is empty. Expected a name for each class.")
    first: dict[str, str] = {}
    for name, words in zip(names, spaced, strict=True):
        if (key := words.casefold()) in first:
            raise ValueError(
                f"The classes {first[key]!r} and {name!r} have the same prompt. Rename one, or join them."
            )
        first[key] = name
    if not all(name[0].isupper() or not name[0].isalpha() for name in spaced):
        return spaced
    return [" ".join(word if word.isupper() and len(word) > 1 else word.lower() for word in n.split()) for n in spaced]


def add_article(name: str) -> str:
    """Put "a" or "an" before a name, and nothing before plurals and proper names, as far as they can be recognized.

    Args:
        name: A name of a class, see `clean_names`.

    Example:
        >>> [add_article(name) for name in ("hour glass", "unicorn", "MRI scan", "scissors", "Paris")]
        ['an hour glass', 'a unicorn', 'an MRI scan', 'scissors', 'Paris']
    """
    first, last = name.split()[0], name.split()[-1]
    # "Golden Gate Bridge" is a proper name, but "Persian cat" and "T-shirt" are not
    proper = all(word[0].isupper() and word[1:2].islower() for word in (first, last))
    last = last.lower()
    plural = last in _PLURALS or (last.endswith("s") and not last.endswith(_SINGULAR_ENDINGS))
    if first.lower() in _ARTICLES or proper or (plural and last not in _SINGULARS):
        return name
    if first.isupper() and len(first) > 1:
        return f"an {name}" if _SPELLED.match(first) else f"a {name}"
    vowel = _VOWEL.match(first) or (first[0].lower() in "aeiou" and not _CONSONANT.match(first))
    return f"an {name}" if vowel else f"a {name}"
