"""Image-caption pairs for CLIP: flags, images in memory, tokens of captions, and random changes of both."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from hf_dl.data import captions, zero_shot
from hf_dl.data.image_arrays import ImageTensors
from hf_dl.data.surfaces import COLORS
from hf_dl.training.batches import mix_seed

from .evaluation import hide_progress_bars, report_data, split_size

SPECIAL = ("<pad>", "<start>", "<unk>", "<end>")  # CLIPTextModel pools at the wrong token if the id of <end> is 2
COLOR_WORDS = (  # the basic color terms of Berlin & Kay (1969), and the other colors of scenes
    *("black", "white", "red", "green", "yellow", "blue", "brown", "purple", "pink", "orange", "gray", "grey"),
    *(color for color in COLORS if color not in ("red", "green", "yellow", "blue", "brown", "purple", "gray")),
)


@dataclass
class PairFlags:
    """Flags that select the image-caption pairs."""

    source: str = field(
        default="synthetic",
        metadata={"help": "synthetic (generated scenes), a Hub dataset id, or a folder of images with captions."},
    )
    annotations: str = field(
        default="", metadata={"help": "File with the captions of a folder of images: COCO's JSON, or Flickr's CSV."}
    )
    detail: Literal["rich", "partial", "poor"] = field(
        default="rich", metadata={"help": "Information in the captions of synthetic scenes."}
    )
    style: Literal["plain", "textured"] = field(default="plain", metadata={"help": "Look of the synthetic scenes."})
    num_objects: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "Fewest and most objects per synthetic scene."}
    )
    image_size: int = field(default=64, metadata={"help": "Height and width of the images, in pixels."})
    num_train: int = field(
        default=0, metadata={"help": "Number of training images. 0 uses all images, 16000 for source=synthetic."}
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
    corrupt: Literal["refuse", "skip"] = field(
        default="refuse", metadata={"help": "Damaged images: refuse stops with an error, skip leaves them out."}
    )
    zero_shot: str = field(
        default="",
        metadata={
            "help": "Labeled images for the zero-shot accuracy: a Hub dataset id, or a folder. Defaults to scenes "
            "with one object if the pairs are synthetic, and else to no such evaluation."
        },
    )


class ImageCaptions(torch.utils.data.Dataset):
    """Images as uint8 tensors in memory, and their captions.

    Attributes:
        pixels: uint8 (images, 3, height, width).
        captions: List of captions of each image.

    Args:
        dataset: Rows with `image` and `captions`, see `hf_dl.data.captions`.

    Raises:
        ValueError: If an image has no caption.
    """

    def __init__(self, dataset: datasets.Dataset):
        self.captions: list[list[str]] = list(dataset["captions"])
        empty = next((row for row, texts in enumerate(self.captions) if not texts), None)
        if empty is not None:
            raise ValueError(f"Row {empty} of the pairs has no caption. Remove the images without captions.")
        self.pixels = ImageTensors(dataset).kept["image"]

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def num_words(self) -> list[float]:
        """Mean number of words per caption of each image."""
        return [sum(len(text.split()) for text in texts) / len(texts) for texts in self.captions]

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return several rows: image uint8 (rows, 3, height, width) and index (rows,)."""
        index = torch.as_tensor(indices)
        return {"image": self.pixels[index], "index": index}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one row: image (3, height, width) and index ()."""
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def channel_statistics(self, max_images: int = 2000) -> tuple[list[float], list[float]]:
        """Compute mean and standard deviation of each channel, in [0, 1], over the first `max_images` images."""
        values = self.pixels[:max_images].transpose(0, 1).flatten(1).double() / 255
        # at least 0.01, because images are divided by the standard deviation
        return [round(m, 4) for m in values.mean(1).tolist()], [max(round(s, 4), 0.01) for s in values.std(1).tolist()]


def load_pairs(args: PairFlags, split: str) -> ImageCaptions:
    """Load one split of the image-caption pairs that the flags select.

    Args:
        args: The flags.
        split: "train", "validation" or "test".
    """
    hide_progress_bars()
    count = split_size(args, split, captions.SPLITS[split] if args.source == "synthetic" else None)
    data = captions.load(
        split,
        args.source,
        annotations=args.annotations or None,
        detail=args.detail,
        style=args.style,
        size=args.image_size,
        num_objects=tuple(args.num_objects),
        num_pairs=count,
        holdout=args.holdout,
        corrupt=args.corrupt,
    )
    report_data(data, split)
    return ImageCaptions(data)


def load_labeled(args: PairFlags, split: str) -> datasets.Dataset | None:
    """Load labeled images for the zero-shot accuracy of a training run.

    Args:
        args: The flags.
        split: "validation" or "test".

    Returns:
        Rows with `image`, `label` and `seen`, or None if the flags name no such images.
    """
    source = args.zero_shot or ("synthetic" if args.source == "synthetic" else "")
    if not source:
        return None
    count = split_size(args, split, zero_shot.SPLITS[split] if source == "synthetic" else None)
    options = {"size": args.image_size, "style": args.style, "corrupt": args.corrupt}
    return zero_shot.load(split, source, num_images=count, **options)


class CaptionTokens:
    """The tokens of all captions, so that a batch needs no tokenizer.

    Args:
        texts: Captions of each image, at least one.
        tokenizer: The tokenizer.
    """

    def __init__(self, texts: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerFast):
        self.counts = torch.tensor([len(each) for each in texts])
        self._first = self.counts.cumsum(0) - self.counts  # row of the first caption of each image
        flat = [text for each in texts for text in each]
        self._ids = tokenizer(flat, padding=True, truncation=True, return_tensors="pt")["input_ids"].int()
        self._pad, self._unknown = tokenizer.pad_token_id, tokenizer.unk_token_id
        vocabulary = tokenizer.get_vocab()
        self._colors = torch.tensor([vocabulary[word] for word in COLOR_WORDS if word in vocabulary])

    def pick(self, index: torch.Tensor, choice: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tokens of one caption per image.

        Args:
            index: Indices of the images (batch,).
            choice: Numbers in [0, 1) that select one of the captions of each image (batch,).

        Returns:
            `input_ids` and `attention_mask` (batch, length of the longest caption).
        """
        row = self._first[index] + (choice * self.counts[index]).long()
        ids = self._ids[row].long()
        mask = (ids != self._pad).long()
        longest = int(mask.sum(1).max())
        return {"input_ids": ids[:, :longest], "attention_mask": mask[:, :longest]}

    def drop_words(
        self, tokens: Mapping[str, torch.Tensor], rate: float, draws: torch.Tensor, *, recolored: torch.Tensor
    ) -> dict[str, Any]:
        """Replace words by the unknown token, so that unknown words in a prompt do little harm.

        Args:
            tokens: `input_ids` and `attention_mask`.
            rate: Probability of each word.
            draws: Uniform numbers in [0, 1), at least as many columns as words, (batch, words).
            recolored: Captions that lose all of their color words, bool (batch,).

        Returns:
            The tokens. The special tokens never change.
        """
        ids = tokens["input_ids"]
        dropped = (draws[:, : ids.shape[1]] < rate) & (ids >= len(SPECIAL))
        dropped |= recolored[:, None] & torch.isin(ids, self._colors)
        return {**tokens, "input_ids": ids.masked_fill(dropped, self._unknown)}


def draw_for_batch(run: Any, columns: int) -> torch.Tensor:
    """Draw uniform numbers for the examples of this process, the same for any number of processes.

    `run.generator` differs between processes. These numbers depend on the seed, the step and the place of an example
    in the whole batch.

    Args:
        run: The `TrainingRun`.
        columns: Numbers per example.

    Returns:
        Numbers in [0, 1), (examples of this process, columns), on the CPU.
    """
    generator = torch.Generator().manual_seed(mix_seed(run.args.seed, "clip", run.restarts, run.steps))
    draws = torch.rand(run.args.batch_size, columns, generator=generator)
    return draws.chunk(run.accelerator.num_processes)[run.accelerator.process_index]


def vary_images(
    images: torch.Tensor,
    draws: torch.Tensor,
    *,
    shift: float = 0.0,
    zoom: float = 0.0,
    jitter: float = 0.0,
    recolored: torch.Tensor | None = None,
) -> torch.Tensor:
    """Shift and zoom each image, and change its brightness, saturation, contrast, and on request its hues.

    Args:
        images: Images (batch, 3, height, width) of any dtype.
        draws: Uniform numbers in [0, 1) (batch, 7): for both shifts, the zoom, the three changes of color and the hue.
        shift: Largest shift in each direction, in pixels. The border is repeated.
        zoom: Largest change of the size, as a fraction.
        jitter: Largest change of brightness, saturation and contrast, as a fraction.
        recolored: Images whose hues are rotated by any angle, bool (batch,). Gray stays gray.

    Returns:
        Float images of the same shape, which may exceed the range of the originals.

    Example:
        >>> image = torch.tensor([[[[1, 2, 3]]]]).expand(1, 3, 1, 3)
        >>> vary_images(image, torch.tensor([[0.5, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]]), shift=1)[0, 0]
        tensor([[2., 3., 3.]])
    """
    images, draws = images.float(), 2 * draws.to(images.device) - 1
    size = torch.tensor(images.shape[:1:-1], device=images.device)  # width, height
    if shift or zoom:
        affine = torch.zeros(len(images), 2, 3, device=images.device)
        affine[:, 0, 0] = affine[:, 1, 1] = 1 + zoom * draws[:, 2]
        affine[:, :, 2] = 2 * shift * draws[:, [1, 0]] / size
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    if jitter:
        brightness, saturation, contrast = (1 + jitter * draws[:, 3:6, None, None, None]).unbind(1)
        images = images * brightness
        gray = images.mean(1, keepdim=True)
        images = gray + saturation * (images - gray)
        mean = images.mean((1, 2, 3), keepdim=True)
        images = mean + contrast * (images - mean)
    if recolored is not None and recolored.any():
        angle = math.pi * draws[:, 6, None, None] * recolored.to(images.device)[:, None, None]
        # rotation of RGB around the axis of the grays, by Rodrigues' formula
        across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=images.device) / math.sqrt(3)
        turn = torch.eye(3, device=images.device) + angle.sin() * across + (1 - angle.cos()) * across @ across
        images = torch.einsum("bij,bjhw->bihw", turn, images)
    return images
