"""Flags and options of the output layers in `HEADS`, shared by image classifiers and language models.

A head is named "NAME" or "NAME:VARIANT", for example "adaptive" or "hierarchical:huffman". The head class lists its
options, so a new head needs its class and an entry in `HEADS`, and no change here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_dl.models.layers_heads import HEADS, check_options


@dataclass
class HeadFlags:
    """Flags for the options of the output layer; placed before `TrainingArgs`."""

    cutoffs: list[int] | None = field(
        default=None,
        metadata={"help": "head=adaptive: rising class counts where a tail begins. By default, the cheapest cutoffs."},
    )
    div_value: float = field(
        default=4.0, metadata={"help": "head=adaptive: each tail has this many times fewer channels than the last."}
    )
    temperature: float = field(
        default=0.5, metadata={"help": "head=gumbel: final temperature of the noise, which starts at 1."}
    )
    straight_through: bool = field(
        default=False, metadata={"help": "head=gumbel: train on sampled classes with a straight-through gradient."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be greater than 0 and finite.")


def split_head(head: str) -> tuple[str, str]:
    """Split the name of a head from its variant.

    Args:
        head: "NAME" or "NAME:VARIANT", with a key of `HEADS` as the name.

    Returns:
        The name, and the variant or "".

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> split_head("hierarchical:huffman")
        ('hierarchical', 'huffman')
    """
    name, _, variant = head.partition(":")
    check_options(name, None)
    return name, variant


def accepted_options(name: str, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Select the options that a head accepts. Options that are None are left out, so the head uses its default.

    Args:
        name: A key of `HEADS`.
        offered: Options by name.

    Returns:
        The selected options.
    """
    known = HEADS[name].option_names(offered)
    return {key: value for key, value in offered.items() if key in known and value is not None}
