"""Mask patches of an image, and compare the predictions of a vision transformer before and after."""

import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..explain import attention_maps, center_patches, fill_patches, masked_logits, random_patches, ranked_patches
from ..explain.masking import FILLS, WAYS
from .classifiers import Classifier
from .pictures import overlay, resize_heat

PLACES = {
    "top": "most attended",
    "bottom": "least attended",
    "center": "center",
    "random": "random",
    "chosen": "the ones I click",
}
MEAN_HEAD = -1  # stands for the mean of all heads


def parse_patches(text: str, total: int) -> list[int]:
    """Parse patch numbers such as "1-4, 9", counted from 1 row by row, to sorted indices from 0.

    Args:
        text: Numbers and ranges, separated by commas or spaces.
        total: Number of patches in the image.

    Raises:
        ValueError: If the text is malformed or a number is out of range.
    """
    found: set[int] = set()
    for part in re.sub(r"\s*-\s*", "-", text).replace(",", " ").split():
        if not (match := re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)):
            raise ValueError(f"{part!r} is not a patch number. Write numbers and ranges such as 1-4, 9.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= total:
            raise ValueError(f"{part!r} is out of range. The patches are numbered from 1 to {total}, row by row.")
        found |= set(range(first - 1, last))
    return sorted(found)


def format_patches(indices: list[int]) -> str:
    """Format sorted patch indices from 0 as text that `parse_patches` reads, such as "1-4, 9"."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first + 1) if first == last else f"{first + 1}-{last + 1}" for first, last in runs)


def patch_at(x: float, y: float, size: tuple[int, int], grid: tuple[int, int]) -> int:
    """Return the index of the patch at a position of a picture.

    Args:
        x: Pixels from the left.
        y: Pixels from the top.
        size: Width and height of the picture.
        grid: Numbers of rows and columns of patches.
    """
    column, row = (min(int(at * n / side), n - 1) for at, n, side in zip((x, y), grid[::-1], size, strict=True))
    return max(row, 0) * grid[1] + max(column, 0)


@dataclass
class Choice:
    """The patches to mask, and the way to mask them.

    Attributes:
        place: How to select the patches; a key of `PLACES`.
        count: Number of patches. Ignored if `place` is "chosen".
        seed: Seed of random patches and of noise.
        patches: Patch numbers for "chosen"; see `parse_patches`.
        way: How to mask the patches; one of `WAYS`.
        layer: Layer, from 1, whose attention is shown and ranks the patches.
        head: Attention head, from 1, or `MEAN_HEAD` for the mean over all heads.
    """

    place: str = "top"
    count: int = 0
    seed: int = 0
    patches: str = ""
    way: str = "gray"
    layer: int = 1
    head: int = MEAN_HEAD

    def mask(self, attention: torch.Tensor) -> torch.Tensor:
        """Select the patches to mask.

        Args:
            attention: Attention of the CLS token to each patch, (rows, columns).

        Returns:
            Boolean tensor (rows, columns), True for masked patches.

        Raises:
            ValueError: If `place` is unknown, or `count` or `patches` is out of range.
        """
        grid, count = tuple(attention.shape), int(self.count)
        if self.place == "chosen":
            mask = torch.zeros(attention.numel(), dtype=torch.bool)
            mask[parse_patches(self.patches, attention.numel())] = True
            return mask.view(grid)
        if self.place == "center":
            return center_patches(grid, count)
        if self.place == "random":
            return random_patches(grid, count, generator=torch.Generator().manual_seed(int(self.seed)))
        if self.place in ("top", "bottom"):
            return ranked_patches(attention, count, largest=self.place == "top")
        raise ValueError(f"place={self.place!r} is unknown. Choose one of: {', '.join(PLACES)}.")


@dataclass
class Comparison:
    """Predictions for an image with and without some patches.

    Attributes:
        image: The part of the image that the model sees, with the patch borders and the masked patches marked.
        attention: Attention of the CLS token, drawn over the image.
        given: The pixels that the model gets after masking. Patches that it does not get are hatched.
        grid: Numbers of rows and columns of patches.
        patches: Indices of the masked patches.
        before: Most likely classes with probabilities for the whole image.
        after: Most likely classes with probabilities for the masked image. The original prediction is appended if it
            is no longer among them.
        rank: Rank, from 1, of the original prediction for the masked image.
        kl: KL divergence between the two distributions, in nats.
    """

    image: Image.Image
    attention: Image.Image
    given: Image.Image
    grid: tuple[int, int]
    patches: list[int]
    before: list[tuple[str, float]]
    after: list[tuple[str, float]]
    rank: int
    kl: float


def compare(classifier: Classifier, image: Image.Image, choice: Choice) -> Comparison:
    """Classify an image with and without some of its patches.

    Args:
        classifier: A vision transformer.
        image: An RGB image of any size.
        choice: The patches to mask, and the way to mask them.

    Raises:
        ValueError: If a value of `choice` is invalid, or the model does not return the attention of a CLS token.
    """
    if choice.way not in WAYS:
        raise ValueError(f"way={choice.way!r} is unknown. Choose one of: {', '.join(WAYS)}.")
    pixel_values = classifier.prepare(image)
    head = None if choice.head == MEAN_HEAD else int(choice.head) - 1
    maps, output = attention_maps(classifier.model, pixel_values, layer=int(choice.layer) - 1, head=head)
    attention = maps[0].float().cpu()
    mask = choice.mask(attention)
    options = dict(zip(("image_mean", "image_std"), classifier.statistics, strict=True))
    noise = {"generator": torch.Generator().manual_seed(int(choice.seed))}
    logits = masked_logits(classifier.model, pixel_values, mask, by=choice.way, **options, **noise)
    before, after = (x[0].detach().double().log_softmax(dim=-1).cpu() for x in (output.logits, logits))
    label = int(before.argmax())
    after_top = classifier.top(after)
    if classifier.names[label] not in dict(after_top):
        after_top.append((classifier.names[label], after[label].exp().item()))

    seen = classifier.crop(image)
    if choice.way in FILLS:
        noise["generator"].manual_seed(int(choice.seed))  # the same noise as in the model's input
        given = classifier.show(fill_patches(pixel_values, mask, choice.way, **options, **noise), seen.size)
    else:
        given = classifier.show(pixel_values, seen.size)
        given.paste(_hatching(seen.size), mask=_enlarge(mask, seen.size))
    stretched = (attention - attention.min()) / (attention.max() - attention.min()).clamp_min(1e-12)
    return Comparison(
        image=draw_patches(seen, mask),
        attention=overlay(seen, resize_heat(stretched.numpy(), seen.size, smooth=False)),
        given=given,
        grid=tuple(mask.shape),
        patches=mask.flatten().nonzero()[:, 0].tolist(),
        before=classifier.top(before),
        after=after_top,
        rank=int((after > after[label]).sum()) + 1,
        kl=(before.exp() * (before - after)).sum().item(),
    )


def _enlarge(mask: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    squares = Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 255)
    return squares.resize(size, Image.Resampling.NEAREST)


def _hatching(size: tuple[int, int]) -> Image.Image:
    """Draw white with diagonal lines, which marks patches that the model does not receive."""
    x, y = np.arange(size[0]), np.arange(size[1])[:, None]
    return Image.fromarray(np.where((x + y) % 12 < 2, 200, 255).astype(np.uint8)).convert("RGB")


def draw_patches(image: Image.Image, mask: torch.Tensor) -> Image.Image:
    """Draw the borders of the patches over an image, and cross out the masked patches."""
    image, (rows, columns) = image.copy(), mask.shape
    draw = ImageDraw.Draw(image, "RGBA")
    xs = [image.width * i / columns for i in range(columns + 1)]
    ys = [image.height * i / rows for i in range(rows + 1)]
    for x in xs[1:-1]:
        draw.line([(x, 0), (x, image.height)], fill=(255, 255, 255, 110))
    for y in ys[1:-1]:
        draw.line([(0, y), (image.width, y)], fill=(255, 255, 255, 110))
    for row, column in mask.nonzero().tolist():
        box = (xs[column], ys[row], xs[column + 1], ys[row + 1])
        draw.rectangle(box, fill=(30, 27, 75, 140), outline=(165, 180, 252, 255), width=2)
        draw.line(box, fill=(165, 180, 252, 255), width=2)
    return image


def check(classifier: Classifier) -> None:
    """Raise an error if a classifier does not return the attention of a CLS token."""
    compare(classifier, Image.new("RGB", (64, 64), "gray"), Choice())


def sizes(classifier: Classifier) -> tuple[int, int, int]:
    """Return the numbers of layers, heads and patches of a vision transformer."""
    blank = classifier.prepare(Image.new("RGB", (64, 64), "gray"))
    maps, output = attention_maps(classifier.model, blank)
    return len(output.attentions), output.attentions[-1].shape[1], maps[0].numel()
