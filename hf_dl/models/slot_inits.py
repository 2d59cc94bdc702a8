"""Initial slots of slot attention: draws from a learned Gaussian, or learned vectors.

The parameters belong to the model itself, so each class consists of functions of the model. To add an initialization,
subclass `SlotInit` and add the class to `SLOT_INITS`.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init


class FixedNoise:
    """Random numbers that are the same in every call, for evaluation.

    The usual numbers are drawn at once. `torch.export` then finds a constant, where it could not trace a generator.

    Args:
        draw: `torch.randn` or `torch.rand`.
        shape: The usual shape of a draw.
        num_draws: The usual maximum number of draws.

    Example:
        ```python
        >>> noise = FixedNoise(torch.randn, (5, 64), 8)
        >>> noise((5, 64), 2).shape, torch.equal(noise((5, 64), 2), noise((5, 64), 2))
        (torch.Size([2, 5, 64]), True)

        ```
    """

    def __init__(self, draw: Callable[..., torch.Tensor], shape: Sequence[int], num_draws: int):
        self._draw = draw
        self._usual = self._make(tuple(shape), num_draws)

    def __call__(self, shape: Sequence[int], num_draws: int) -> torch.Tensor:
        """Return the first draws of a shape, (num_draws, *shape), on the CPU."""
        if self._usual.shape[1:] == tuple(shape) and num_draws <= self._usual.shape[0]:
            return self._usual[:num_draws]
        return self._make(tuple(shape), num_draws)

    def _make(self, shape: tuple[int, ...], num_draws: int) -> torch.Tensor:
        options = {"generator": torch.Generator().manual_seed(0), "device": "cpu", "dtype": torch.float32}
        return torch.stack([self._draw(shape, **options) for _ in range(num_draws)])


class SlotInit:
    """Base class of the initializations.

    Attributes:
        parameters: Names of the parameters that the initialization adds to the model. With `gradient="implicit"` no
            gradient reaches them, and they are frozen.
        random: Whether two draws differ. Evaluation tries several draws only if they do.
    """

    parameters: tuple[str, ...] = ()
    random = False

    @staticmethod
    def add_parameters(model: PreTrainedModel) -> None:
        """Add the parameters to the model, without values."""
        raise NotImplementedError

    @staticmethod
    def init_weights(model: PreTrainedModel) -> None:
        """Initialize the parameters of the model in place."""
        raise NotImplementedError

    @staticmethod
    def draw(
        model: PreTrainedModel, batch: int, num_slots: int, num_draws: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Return slots without frames, (batch, num_draws * num_slots, appearance_dim), one draw after the other."""
        raise NotImplementedError


class GaussianSlots(SlotInit):
    """Slots drawn from one learned Gaussian; any number of slots works at inference.

    In evaluation without a `generator`, all images and all calls get the same draws.
    """

    parameters = ("slot_mean", "slot_log_std")
    random = True

    @staticmethod
    def add_parameters(model: PreTrainedModel) -> None:
        """Add mean and logarithm of the standard deviation, one value per channel."""
        model.slot_mean = nn.Parameter(torch.empty(model.config.appearance_dim))
        model.slot_log_std = nn.Parameter(torch.empty(model.config.appearance_dim))
        model.slot_noise = FixedNoise(
            torch.randn, (model.config.num_slots, model.config.appearance_dim), model.config.num_draws
        )

    @staticmethod
    def init_weights(model: PreTrainedModel) -> None:
        """Draw the mean from a Glorot uniform distribution times `slot_std`; set all deviations to `slot_std`."""
        scale, bound = model.config.slot_std, (6 / (1 + model.config.appearance_dim)) ** 0.5
        init.uniform_(model.slot_mean, -bound * scale, bound * scale)
        # One deviation for all channels: with Glorot draws as in the original code, fewer runs find the objects.
        init.constant_(model.slot_log_std, math.log(scale))

    @staticmethod
    def draw(
        model: PreTrainedModel, batch: int, num_slots: int, num_draws: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Draw slots; see `SlotInit.draw`."""
        shape = (num_slots, model.config.appearance_dim)
        if generator is None and not model.training:
            noise = model.slot_noise(shape, num_draws).flatten(0, 1)[None]
        else:
            device = model.slot_mean.device if generator is None else generator.device
            draws = [torch.randn((batch, *shape), generator=generator, device=device) for _ in range(num_draws)]
            noise = torch.cat(draws, dim=1)
        slots = model.slot_mean + model.slot_log_std.exp() * noise.to(model.slot_mean)
        return slots.expand(batch, -1, -1)


class LearnedSlots(SlotInit):
    """One learned vector per slot; at inference, at most `config.num_slots` slots."""

    parameters = ("slot_vectors",)

    @staticmethod
    def add_parameters(model: PreTrainedModel) -> None:
        """Add one vector per slot."""
        model.slot_vectors = nn.Parameter(torch.empty(model.config.num_slots, model.config.appearance_dim))

    @staticmethod
    def init_weights(model: PreTrainedModel) -> None:
        """Draw the vectors from the standard normal distribution."""
        init.normal_(model.slot_vectors, std=1.0)

    @staticmethod
    def draw(
        model: PreTrainedModel, batch: int, num_slots: int, num_draws: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Return the first `num_slots` vectors for each image.

        Raises:
            ValueError: If the model has learned fewer slots.
        """
        if num_slots > model.config.num_slots:
            raise ValueError(
                f"num_slots={num_slots} is more than the {model.config.num_slots} slots this model has learned; "
                "use fewer, or train with slot_init='gaussian', which takes any number."
            )
        return model.slot_vectors[:num_slots].expand(batch, -1, -1)


SLOT_INITS: dict[str, type[SlotInit]] = {"gaussian": GaussianSlots, "learned": LearnedSlots}
"""The initializations by name."""
