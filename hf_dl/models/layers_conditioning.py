"""How one input steers another: feature-wise linear modulation (FiLM) and multi-head attention.

- FiLM, Perez et al. 2018, "FiLM: Visual Reasoning with a General Conditioning Layer", equations 1 and 2. A vector
  scales and shifts each channel.
- Attention, Vaswani et al. 2017, "Attention Is All You Need", section 3.2. Queries read from a memory. If the memory
  is another sequence, this is cross-attention. If it is the queries themselves, this is self-attention.
"""

import torch
import torch.nn.functional as F
from torch import nn


class FiLM(nn.Module):
    """Scale and shift each channel by linear functions of a condition vector c.

        y = (W_mul c + b_mul) * x + (W_add c + b_add)

    Args:
        condition_dim: Channels of the condition.
        channels: Channels of the features.

    Example:
        ```python
        >>> FiLM(512, 64)(torch.randn(2, 485, 64), torch.randn(2, 512)).shape
        torch.Size([2, 485, 64])

        ```
    """

    def __init__(self, condition_dim: int, channels: int):
        super().__init__()
        self.multiply = nn.Linear(condition_dim, channels)
        self.add = nn.Linear(condition_dim, channels)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Modulate features.

        Args:
            x: Features, (batch, tokens, channels).
            condition: One vector per row of the batch, (batch, condition_dim).

        Returns:
            (batch, tokens, channels).
        """
        return self.multiply(condition)[:, None] * x + self.add(condition)[:, None]


class MultiHeadAttention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(head_dim)) v per head, from queries to a memory.

    Args:
        channels: Channels of the queries and of the result, a multiple of `num_heads`.
        num_heads: Number of heads.
        memory_dim: Channels of the memory. Defaults to `channels`.

    Example:
        ```python
        >>> attention = MultiHeadAttention(64, 4, memory_dim=32)
        >>> attention(torch.randn(2, 9, 64), torch.randn(2, 5, 32)).shape
        torch.Size([2, 9, 64])

        ```
    """

    def __init__(self, channels: int, num_heads: int, *, memory_dim: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels if memory_dim is None else memory_dim, 2 * channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, queries: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Read from the memory.

        Args:
            queries: (batch, queries, channels).
            memory: (batch, length, memory_dim). Pass `queries` again for self-attention.

        Returns:
            (batch, queries, channels).
        """
        query = (
            self.query(queries).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        )  # (batch, heads, queries, head)
        pair = self.key_value(memory).unflatten(-1, (2, self.num_heads, -1))
        key, value = pair.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).flatten(2))
