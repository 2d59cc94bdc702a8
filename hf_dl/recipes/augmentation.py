"""Augmentation of timm for batches: RandAugment, Mixup, CutMix and random erasing.

timm draws from the global generators, which a training run seeds before each step. It is imported on first use.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


@dataclass
class AugmentationFlags:
    """Flags for the augmentation of timm; placed before `TrainingArgs`. By default, all of it is off."""

    rand_augment: str = field(
        default="",
        metadata={"help": "RandAugment of timm: a policy such as rand-m9-n2-mstd0.5. Empty disables it."},
    )
    mixup: float = field(default=0.0, metadata={"help": "Mixup of timm: alpha, such as 0.2. 0 disables it."})
    cutmix: float = field(default=0.0, metadata={"help": "CutMix of timm: alpha, such as 1.0. 0 disables it."})
    random_erasing: float = field(
        default=0.0, metadata={"help": "Random erasing of timm: probability per image. 0 disables it."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or greater.")
        if not 0 <= self.random_erasing <= 1:
            raise ValueError(f"random_erasing={self.random_erasing} must be from 0 to 1.")
        if self.rand_augment and not self.rand_augment.startswith("rand"):
            raise ValueError(
                f"rand_augment={self.rand_augment!r} is no policy of timm. Expected, for example, rand-m9-n2-mstd0.5."
            )
        if (self.mixup or self.cutmix) and self.batch_size // self.accumulation % 2:
            raise ValueError(
                f"batch_size={self.batch_size} with accumulation={self.accumulation} gives an odd number of images, "
                "but mixup and cutmix need an even number. Change batch_size."
            )


class Augmentation:
    """The augmentation that the flags select.

    Args:
        flags: The flags.
        num_classes: Number of classes.

    Raises:
        ValueError: If timm does not know the policy of RandAugment.
    """

    def __init__(self, flags: AugmentationFlags, num_classes: int):
        self.num_classes = num_classes
        self._policy = self._mixup = self._erasing = None
        if flags.rand_augment:
            from timm.data.auto_augment import rand_augment_transform

            try:
                self._policy = rand_augment_transform(flags.rand_augment, {"translate_const": 4})
            except (AssertionError, ValueError, KeyError) as error:
                raise ValueError(
                    f"rand_augment={flags.rand_augment!r} is no policy of timm. Expected, for example, "
                    "rand-m9-n2-mstd0.5."
                ) from error
        if flags.mixup or flags.cutmix:
            from timm.data import Mixup

            self._mixup = Mixup(flags.mixup, flags.cutmix, label_smoothing=0.0, num_classes=num_classes)
        if flags.random_erasing:
            from timm.data.random_erasing import RandomErasing

            self._erasing = RandomErasing(flags.random_erasing, mode="pixel", device="cpu")

    def change_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """Apply RandAugment to uint8 images (batch, 3, height, width)."""
        if self._policy is None:
            return pictures
        rows = pictures.permute(0, 2, 3, 1).cpu().numpy()
        changed = [np.array(self._policy(Image.fromarray(row))) for row in rows]
        return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2)

    def mix(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Erase rectangles, and mix pairs of images.

        Args:
            pixel_values: Normalized images (batch, 3, height, width).
            labels: Classes, int (batch,).

        Returns:
            The changed images, and the probabilities of the classes, (batch, classes).
        """
        if self._erasing is not None:
            pixel_values = self._erasing(pixel_values.cpu()).to(pixel_values.device)
        if self._mixup is None:
            return pixel_values, F.one_hot(labels, self.num_classes).to(pixel_values.dtype)
        return self._mixup(pixel_values, labels)
