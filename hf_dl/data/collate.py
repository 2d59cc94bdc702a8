"""The collate function for datasets that return whole batches."""

import torch


def as_is(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the batch unchanged: for datasets whose `__getitems__` returns a batch, such as `ImageTensors`."""
    return batch
