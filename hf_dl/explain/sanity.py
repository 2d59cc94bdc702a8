"""The sanity check of Adebayo et al. 2018: does a map change if the weights of the network become random?

The layers are randomized one after another, from the logits down to the pixels (cascading randomization). A map that
stays similar does not depend on training. The similarity is Spearman's rank correlation of the pixels of two maps.

Differences from the paper: New weights are normal with the mean and standard deviation of the old weights, for all
kinds of layers. Only some stages of the cascade are computed, which saves time.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from .calls import modules_in_order, pick_classes
from .methods import METHODS, explain

PASSES_BELOW = 0.5  # largest rank correlation with a random network of a method that passes


@dataclass
class SanityOutput:
    """Output of `sanity_check`.

    Attributes:
        layers: Number of randomized layers in each stage.
        names: Name of the lowest randomized layer in each stage.
        correlations: Rank correlation of each map with the map of the trained network, (stages, batch), from -1 to 1.
            It is 0 if a map is constant.
        maps: Maps of the trained network, and of each stage, (1 + stages, batch, height, width).
    """

    layers: list[int]
    names: list[str]
    correlations: torch.Tensor
    maps: torch.Tensor

    @property
    def final(self) -> float:
        """Return the mean rank correlation after all layers are randomized."""
        return self.correlations[-1].mean().item()

    @property
    def passed(self) -> bool:
        """Return whether the maps of the random network differ: `final` is below 0.5."""
        return self.final < PASSES_BELOW


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute Spearman's rank correlation of maps (batch, height, width), (batch,). Constant maps have 0.

    Example:
        ```python
        >>> rank_correlation(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 4.0, 9.0]]])).item()
        1.0

        ```
    """
    ranks = [rankdata(x.detach().flatten(1).double().cpu().numpy(), axis=1) for x in (a, b)]
    ranks = [x - x.mean(axis=1, keepdims=True) for x in ranks]
    norm = np.sqrt((ranks[0] ** 2).sum(axis=1) * (ranks[1] ** 2).sum(axis=1))
    products = (ranks[0] * ranks[1]).sum(axis=1)
    return torch.from_numpy(np.divide(products, norm, out=np.zeros_like(norm), where=norm > 0))


def _layers_in_order(model: nn.Module, pixel_values: torch.Tensor) -> list[str]:
    """Return the names of the modules that have parameters of their own, in the order in which they run."""
    names = {module: name for name, module in model.named_modules()}
    own = [module for module in names if any(True for _ in module.parameters(recurse=False))]
    order = dict.fromkeys(modules_in_order(model, pixel_values, own))
    # heads that are not called as modules run last
    return [names[module] for module in (*order, *(module for module in own if module not in order))]


@torch.no_grad()
def _randomize(module: nn.Module, draw: torch.Generator) -> None:
    for parameter in module.parameters(recurse=False):
        noise = torch.randn(parameter.shape, generator=draw).to(parameter)
        spread = parameter.std() if parameter.numel() > 1 else parameter.abs().sum()
        parameter.copy_(parameter.mean() + spread * noise)


def sanity_check(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    method: str = "gradient",
    target: int | Sequence[int] | torch.Tensor | None = None,
    stages: int = 4,
    seed: int = 0,
    **options: Any,
) -> SanityOutput:
    """Compare the maps of a network with the maps of copies whose layers are randomized from the top.

    Args:
        model: Classifier. It is not changed.
        pixel_values: Images, (batch, channels, height, width).
        method: A map in `METHODS`.
        target: Class, or classes of the batch. Defaults to the classes predicted by the trained network.
        stages: Number of stages. The first stage randomizes the last layer, and the last stage all layers.
        seed: Seed of the random weights.
        **options: Options of the method, see `explain`.

    Returns:
        See `SanityOutput`.

    Raises:
        ValueError: If the method is not a map, or an argument is unknown or out of range.

    Example:
        ```python
        >>> from torchvision.models import resnet18
        >>> output = sanity_check(resnet18(num_classes=5), torch.randn(2, 3, 32, 32), method="gradient", stages=2)
        >>> output.names, output.correlations.shape
        (['fc', 'conv1'], torch.Size([2, 2]))

        ```
    """
    maps = [name for name, known in METHODS.items() if known.kind == "map"]
    if method not in maps:
        raise ValueError(f"method={method!r} is not a map; choose one of {', '.join(maps)}.")
    if stages < 1:
        raise ValueError(f"stages={stages} must be at least 1.")
    first = explain(model, pixel_values, method=method, target=target, **options)
    target = pick_classes(first.logits, target)
    names = _layers_in_order(model, pixel_values)[::-1]
    counts = sorted({round(n) for n in np.linspace(1, len(names), stages)}) if stages > 1 else [len(names)]
    changed, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    found, correlations, done = [first.maps], [], 0
    for count in counts:
        for name in names[done:count]:
            _randomize(changed.get_submodule(name), draw)
        done = count
        found.append(explain(changed, pixel_values, method=method, target=target, **options).maps)
        correlations.append(rank_correlation(first.maps, found[-1]))
    return SanityOutput(counts, [names[count - 1] for count in counts], torch.stack(correlations), torch.stack(found))
