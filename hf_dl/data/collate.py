"""The few ways from rows of a dataset to batches that more than one script uses."""

from collections.abc import Sequence

import datasets
import numpy as np
import torch


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


def as_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The collate function of data whose `__getitems__` makes batches itself, as that of `ImageTensors` does."""
    return batch
