"""Images as arrays for training: decode each image once, then load and augment whole batches."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch

from ..models.image_input import to_rgb

_SHARD = 512  # images that are decoded together


class ImageTensors(torch.utils.data.Dataset):
    """Images and masks of a dataset as uint8 tensors, decoded once and kept in memory.

    An image of 64x64 pixels takes 12 kB. Use `keep=False` for data that does not fit into memory: each row is then
    decoded at each access.

    Args:
        dataset: Rows with an `image`, all of the same size, and optionally a `mask` whose pixel values are object
            indices. Without masks, batches have the image only.
        keep: Whether to keep the decoded tensors in memory.

    Raises:
        ValueError: If a column is missing, or images differ in size.

    Example:
        ```python
        >>> data = ImageTensors(scenes.load("test", num_scenes=4))  # doctest: +SKIP
        >>> data.__getitems__([0, 2])["image"].shape  # doctest: +SKIP
        torch.Size([2, 3, 64, 64])

        ```
    """

    def __init__(self, dataset: datasets.Dataset, *, keep: bool = True):
        if "image" not in dataset.column_names:
            raise ValueError(
                f"The dataset has the columns {dataset.column_names}; 'image' is missing. Expected RGB images, and "
                "optionally a mask of object indices."
            )
        self.names = [name for name in ("image", "mask") if name in dataset.column_names]
        self.dataset = dataset.select_columns(self.names)
        self.kept = None
        if keep:
            chunks = [self._decode(range(i, min(i + 1000, len(dataset)))) for i in range(0, len(dataset), 1000)]
            self.kept = {name: torch.cat([chunk[name] for chunk in chunks]) for name in self.names}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return several rows: image (rows, 3, height, width) and any mask (rows, height, width), both uint8."""
        if self.kept is not None:
            index = torch.as_tensor(indices)
            return {name: tensor[index] for name, tensor in self.kept.items()}
        return self._decode(indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one row: image (3, height, width) and any mask (height, width)."""
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def _decode(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = self.dataset[indices]
        images = [np.asarray(to_rgb(image)) for image in rows["image"]]
        if len({image.shape for image in images}) > 1:
            sizes = sorted({image.shape[1::-1] for image in images})
            raise ValueError(f"The images have several sizes: {sizes[:3]}. Load them with one size.")
        batch = {"image": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)}
        if "mask" in self.names:
            batch["mask"] = torch.from_numpy(np.stack([np.asarray(mask) for mask in rows["mask"]]))
        return batch


class LabeledImages(torch.utils.data.Dataset):
    """Images of a dataset as one memory-mapped uint8 array, and their labels.

    The array is written once, next to the cache of `datasets`. Later processes open it without decoding any image. The
    operating system reads rows on demand, so the array may be larger than the memory.

    Attributes:
        pixels: uint8 (rows, channels, height, width), read-only.
        labels: int64 (rows,).
        names: Class names.

    Args:
        dataset: Result of `hf_dl.data.labeled_images.load`.
        channels: 3 for RGB, or 1 for gray (luma).

    Raises:
        ValueError: If a column is missing, images differ in size, or `channels` is not 1 or 3.

    Example:
        ```python
        >>> data = LabeledImages(load("test", num_images=50))  # doctest: +SKIP
        >>> data.__getitems__([0, 2])["image"].shape  # doctest: +SKIP
        torch.Size([2, 3, 64, 64])

        ```
    """

    def __init__(self, dataset: datasets.Dataset, *, channels: int = 3):
        if channels not in (1, 3):
            raise ValueError(f"channels={channels} is unknown; choose 1 (gray) or 3 (RGB).")
        missing = {"image", "label"} - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"The dataset has the columns {dataset.column_names}; {sorted(missing)[0]!r} is missing. Load it with "
                "hf_dl.data.labeled_images."
            )
        self.labels = torch.as_tensor(dataset.with_format("numpy")["label"][:]).long()
        self.names = list(dataset.features["label"].names)
        # the fingerprint identifies the rows: it depends on the generator's arguments and on all later steps
        name = dataset._fingerprint + ("_gray" if channels == 1 else "")
        path = Path(datasets.config.HF_DATASETS_CACHE) / "hf_dl_images" / f"{name}.npy"
        if not path.is_file():
            _write_pixels(dataset, path, channels=channels)
        self.pixels = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return several rows: image uint8 (rows, channels, height, width) and labels int64 (rows,)."""
        index = np.asarray(indices)
        return {"image": torch.from_numpy(np.asarray(self.pixels[index])), "labels": self.labels[index]}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one row: image (channels, height, width) and labels ()."""
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def channel_statistics(self, max_images: int = 5000) -> tuple[list[float], list[float]]:
        """Compute mean and standard deviation of each channel, in [0, 1], over the first `max_images` images."""
        pixels = torch.from_numpy(np.array(self.pixels[:max_images]))
        channels = [pixels[:, channel].double() / 255 for channel in range(pixels.shape[1])]
        # at least 0.01, because images are divided by the standard deviation
        return [round(c.mean().item(), 4) for c in channels], [max(round(c.std().item(), 4), 0.01) for c in channels]


def _write_pixels(dataset: datasets.Dataset, path: Path, *, channels: int = 3) -> None:
    """Write the images to a .npy file: first to a temporary file, so that nobody reads an incomplete one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = dataset[0]["image"].size
    shape, mode = (len(dataset), channels, size[1], size[0]), "RGB" if channels == 3 else "L"
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, delete=False) as file:
        try:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for start in range(0, len(dataset), _SHARD):
                for image in dataset[start : start + _SHARD]["image"]:
                    if image.size != size:
                        raise ValueError(
                            f"The images have several sizes: {size}, {image.size}. Load them with one size."
                        )
                    pixels = np.atleast_3d(np.asarray(to_rgb(image).convert(mode))).transpose(2, 0, 1)
                    file.write(np.ascontiguousarray(pixels).data)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def augment(
    images: torch.Tensor, *, padding: int = 4, flip: bool = True, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Shift and flip each image of a batch at random (He et al. 2015, section 4.2).

    A shift pads the image with zeros and crops it to its original size. Zero is the mean color of normalized images.

    Args:
        images: Images of any dtype, (batch, channels, height, width).
        padding: Largest shift in each direction, in pixels.
        flip: Whether to flip each image horizontally with probability 0.5.
        generator: Random number generator, on the device of the images.

    Returns:
        Augmented images of the same shape.

    Raises:
        ValueError: If `padding` is negative or not smaller than the images.

    Example:
        >>> augment(torch.ones(2, 3, 8, 8), padding=0, flip=True).sum().item()
        384.0
    """
    batch, channels, height, width = images.shape
    if not 0 <= padding < min(height, width):
        raise ValueError(f"padding={padding} must be at least 0 and below the image size {height}x{width}.")

    def draw(high: int) -> torch.Tensor:
        return torch.randint(high, (batch, 1), generator=generator, device=images.device)

    shifts = [draw(2 * padding + 1) for _ in range(2)]
    rows, columns = (
        torch.arange(side, device=images.device) + shift for side, shift in zip((height, width), shifts, strict=True)
    )
    if flip:
        columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    if padding:
        images = torch.nn.functional.pad(images, (padding,) * 4)
    flat = rows[:, :, None] * images.shape[3] + columns[:, None, :]
    index = flat.view(batch, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view(batch, channels, height, width)
