"""Images as arrays for training: decoded once, fetched and augmented by the batch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch

_SHARD = 512  # images that are decoded together


class ImageTensors(torch.utils.data.Dataset):
    """The images and masks of a dataset as uint8 tensors, each decoded once and kept in memory.

    64x64 images take 12 kB each. With `keep=False` nothing is kept and each row is decoded whenever it is asked for,
    for data that does not fit.

    Args:
        dataset: Rows with an `image`, all of one size, and a `mask` whose pixel values are object indices.
        keep: Whether to keep the decoded tensors.

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
        missing = {"image", "mask"} - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"The dataset has the columns {dataset.column_names}; {sorted(missing)} is missing: an RGB image and "
                "a "
                "mask of object indices are needed."
            )
        self.dataset = dataset.select_columns(["image", "mask"])
        self.kept = None
        if keep:
            chunks = [self._decode(range(i, min(i + 1000, len(dataset)))) for i in range(0, len(dataset), 1000)]
            self.kept = {name: torch.cat([chunk[name] for chunk in chunks]) for name in ("image", "mask")}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Several rows at once: image (rows, 3, height, width) and mask (rows, height, width), both uint8."""
        if self.kept is not None:
            index = torch.as_tensor(indices)
            return {name: tensor[index] for name, tensor in self.kept.items()}
        return self._decode(indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One row: image (3, height, width) and mask (height, width)."""
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def _decode(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        rows = self.dataset[indices]
        images = [np.asarray(image.convert("RGB")) for image in rows["image"]]
        if len({image.shape for image in images}) > 1:
            sizes = sorted({image.shape[1::-1] for image in images})
            raise ValueError(f"The images have several sizes ({sizes[:3]}); load them with one size.")
        masks = np.stack([np.asarray(mask) for mask in rows["mask"]])
        return {"image": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), "mask": torch.from_numpy(masks)}


class LabeledImages(torch.utils.data.Dataset):
    """The images of a dataset as one memory-mapped uint8 array, and their labels.

    The array is written once, beside the cache of `datasets`; every later process opens it at once and decodes
    nothing. Rows are read from it by the operating system as they are needed, so it may be larger than the memory.

    Attributes:
        pixels: uint8 (rows, channels, height, width), read-only.
        labels: int64 (rows,).
        names: The names of the classes.

    Args:
        dataset: What `load` returned.
        channels: 3, or 1 for the luma: of gray images that is what they are.

    Raises:
        ValueError: If a column is missing, images differ in size, or there are other channels.

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
                f"The dataset has the columns {dataset.column_names}; {sorted(missing)[0]!r} is missing: load it with "
                "hf_dl.data.labeled_images."
            )
        self.labels = torch.as_tensor(dataset.with_format("numpy")["label"][:]).long()
        self.names = list(dataset.features["label"].names)
        # the fingerprint names the rows: it follows from the arguments of the generator and from what came after it
        name = dataset._fingerprint + ("_gray" if channels == 1 else "")
        path = Path(datasets.config.HF_DATASETS_CACHE) / "hf_dl_images" / f"{name}.npy"
        if not path.is_file():
            _write_pixels(dataset, path, channels=channels)
        self.pixels = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Several rows at once: image uint8 (rows, channels, height, width) and labels int64 (rows,)."""
        index = np.asarray(indices)
        return {"image": torch.from_numpy(np.asarray(self.pixels[index])), "labels": self.labels[index]}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One row: image (channels, height, width) and labels ()."""
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def channel_statistics(self, max_images: int = 5000) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, in [0, 1], over the first images."""
        pixels = torch.from_numpy(np.array(self.pixels[:max_images]))
        channels = [pixels[:, channel].double() / 255 for channel in range(pixels.shape[1])]
        # a channel without contrast would be divided by 0
        return [round(c.mean().item(), 4) for c in channels], [max(round(c.std().item(), 4), 0.01) for c in channels]


def _write_pixels(dataset: datasets.Dataset, path: Path, *, channels: int = 3) -> None:
    """Write the images as a .npy file, aside and then renamed, so that a half-written one is never read."""
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
                            f"The images have several sizes ({size}, {image.size}); load them with one size."
                        )
                    pixels = np.atleast_3d(np.asarray(image.convert(mode))).transpose(2, 0, 1)
                    file.write(np.ascontiguousarray(pixels).data)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def augment(
    images: torch.Tensor, *, padding: int = 4, flip: bool = True, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Shift and mirror each image of a batch at random (He et al. 2015, section 4.2), in one gather.

    Cropping a random window out of an image with a border of zeros is a random shift. On normalized images the border
    has the mean color.

    Args:
        images: Images of any dtype, (batch, channels, height, width).
        padding: Width of the border: shifts are up to so many pixels in each direction.
        flip: Whether every second image is mirrored, by the toss of a coin.
        generator: Source of the shifts and tosses, on the images' device.

    Returns:
        The images, changed, in the shape they had.

    Raises:
        ValueError: If the padding is negative or not smaller than the images.

    Example:
        >>> augment(torch.ones(2, 3, 8, 8), padding=0, flip=True).sum().item()
        384.0
    """
    batch, channels, height, width = images.shape
    if not 0 <= padding < min(height, width):
        raise ValueError(f"padding={padding} is out of range; give 0 to less than the {height}x{width} of the images.")

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
