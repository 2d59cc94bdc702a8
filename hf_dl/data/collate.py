"""The collate function of datasets that make whole batches themselves."""

import torch


def as_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The collate function of data whose `__getitems__` makes batches itself, as that of `ImageTensors` does."""
    return batch
