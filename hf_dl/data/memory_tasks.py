"""Tasks that need a memory: remember the first symbol, or add two marked numbers, over a sequence of any length.

Hochreiter & Schmidhuber 1997, sections 5.2 and 5.4, in short versions:

- "copy": the first step shows one of 8 symbols. Afterwards, the input is the same blank symbol. At the end, the model
  names the first symbol. Chance is 1 / 8.
- "adding": each step has a number in [0, 1) and a mark. Two steps are marked, one in each half. At the end, the model
  gives the sum of both marked numbers. The best constant, 1, has a mean squared error of 1 / 6.
"""

from dataclasses import dataclass

import torch

SYMBOLS = 8
SPLIT_SEEDS = {"train": 1, "validation": 2, "test": 3}


@dataclass(frozen=True)
class Task:
    """A row of `TASKS`.

    Args:
        features: Channels of the input.
        num_labels: Number of classes, or 1 for a number.
    """

    features: int
    num_labels: int


TASKS = {
    "copy": Task(features=9, num_labels=SYMBOLS),  # the symbols and the blank
    "adding": Task(features=2, num_labels=1),  # the number and the mark
}
"""The tasks by name."""


class MemoryTask(torch.utils.data.Dataset):
    """Random examples of a task. Each example depends on the arguments and its index only.

    Args:
        task: A key of `TASKS`.
        split: "train", "validation" or "test".
        length: Number of steps, at least 2.
        num_rows: Number of examples.
        seed: Seed of the examples.

    Raises:
        ValueError: If an argument is invalid.

    Example:
        ```python
        >>> example = MemoryTask("copy", "train", length=5, num_rows=10)[0]
        >>> example["inputs_embeds"].shape, example["labels"].shape
        (torch.Size([5, 9]), torch.Size([]))

        ```
    """

    def __init__(self, task: str, split: str = "train", *, length: int, num_rows: int, seed: int = 0):
        for name, value, known in (("task", task, TASKS), ("split", split, SPLIT_SEEDS)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown. Choose one of: {', '.join(known)}.")
        for name, value, least in (("length", length, 2), ("num_rows", num_rows, 1)):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        self.task, self.length = task, length
        generator = torch.Generator().manual_seed(10 * seed + SPLIT_SEEDS[split])
        if task == "copy":
            self.labels = torch.randint(SYMBOLS, (num_rows,), generator=generator)
        else:
            self.numbers = torch.rand(num_rows, length, generator=generator)
            half = length // 2
            first = torch.randint(half, (num_rows,), generator=generator)
            second = torch.randint(half, length, (num_rows,), generator=generator)
            self.marked = torch.stack([first, second], dim=1)
            self.labels = self.numbers.gather(1, self.marked).sum(1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        inputs = torch.zeros(self.length, TASKS[self.task].features)
        if self.task == "copy":
            inputs[0, self.labels[index]] = 1
            inputs[1:, SYMBOLS] = 1
        else:
            inputs[:, 0] = self.numbers[index]
            inputs[self.marked[index], 1] = 1
        return {"inputs_embeds": inputs, "labels": self.labels[index]}

    def fingerprint_data(self) -> list[torch.Tensor]:
        """Return the labels, which a resumed run compares with the labels of the original run."""
        return [self.labels]
