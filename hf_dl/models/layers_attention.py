"""Attention: additive (Bahdanau et al. 2015), and slots that compete for tokens (Locatello et al. 2020, Algorithm 1).

Slot attention follows the paper to the letter: three layer normalizations, softmax over the slots, weighted mean over
the tokens, GRU, residual MLP. Two things are done differently, neither of which changes the numbers:

- The key and value projections are absorbed on the side of the slots where that costs less. With k = x W_k and
  v = x W_v the logits q k^T are (q W_k^T) x^T, and the weighted mean A v is (A x) W_v, so nothing of the size of the
  tokens is projected.
- The iteration runs in float32 under autocast: epsilon = 1e-8 is zero in float16, and an empty slot is then 0 / 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

GRADIENTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "full": lambda slots, initial: slots,
    "implicit": lambda slots, initial: slots.detach(),
    "bilevel": lambda slots, initial: slots.detach() + initial - initial.detach(),
}
"""What the last iteration of slot attention starts from, given the slots so far and the initial slots, by name."""


def attention_masks(attention: torch.Tensor, size: Sequence[int], *, image_size: int) -> torch.Tensor:
    """Lay the attention over the image, interpolated bilinearly between the places that the tokens look at.

    Convolutions of stride s with odd kernels and half as much padding center token i on pixel s i, not on the middle
    of the s pixels from there, which is (s - 1) / 2 further on and where `F.interpolate` would put it. Beyond the last
    token its value goes on.

    Args:
        attention: (batch, slots, tokens), the tokens those of a square grid, row by row.
        size: Height and width of the masks.
        image_size: Height and width of the images that the tokens were made of, in pixels.

    Returns:
        (batch, slots, *size), float32 or finer, summing to 1 over the slots where the attention does.

    Raises:
        ValueError: If the tokens make no square grid.

    Example:
        ```python
        >>> attention_masks(torch.tensor([[[1.0, 0.0, 1.0, 0.0]]]), (1, 4), image_size=4)
        tensor([[[[1.0000, 0.5000, 0.0000, 0.0000]]]])

        ```
    """
    side = math.isqrt(attention.shape[-1])
    if side**2 != attention.shape[-1]:
        raise ValueError(f"attention has {attention.shape[-1]} tokens, expected those of a square grid.")
    maps = attention.to(torch.promote_types(attention.dtype, torch.float32)).unflatten(-1, (side, side))

    def weights(pixels: int) -> torch.Tensor:
        """(pixels, side): how much of each token's value a pixel has, 1 at its center and 0 at those beside it."""
        at = ((torch.arange(pixels, dtype=torch.float64) + 0.5) / pixels * image_size - 0.5) * side / image_size
        apart = at.clamp(0, side - 1)[:, None] - torch.arange(side)
        return (1 - apart.abs()).clamp_min(0).to(maps)

    with torch.autocast(maps.device.type, enabled=False):
        return weights(size[0]) @ maps @ weights(size[1]).T


class AdditiveAttention(nn.Module):
    """Attention by a small network: softmax over the memory of v^T tanh(W q + U m).

    Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning to Align and Translate", appendix A.1.2. U m
    is computed once for a memory, by `project`; any number of queries then looks at the same memory.

    Args:
        query_dim: Channels of the queries.
        memory_dim: Channels of the memory.
        attention_dim: Channels of W q and U m.

    Example:
        ```python
        >>> attention = AdditiveAttention(16, 32, attention_dim=8)
        >>> memory, keep = torch.randn(2, 7, 32), torch.ones(2, 7, dtype=torch.bool)
        >>> scores = attention(torch.randn(2, 3, 16), attention.project(memory), keep)
        >>> context = scores.softmax(-1) @ memory
        >>> scores.shape, context.shape
        (torch.Size([2, 3, 7]), torch.Size([2, 3, 32]))

        ```
    """

    def __init__(self, query_dim: int, memory_dim: int, *, attention_dim: int):
        super().__init__()
        self.query = nn.Linear(query_dim, attention_dim)
        self.key = nn.Linear(memory_dim, attention_dim, bias=False)
        self.energy = nn.Linear(attention_dim, 1, bias=False)

    def project(self, memory: torch.Tensor) -> torch.Tensor:
        """U m: memory (batch, length, memory_dim) to keys (batch, length, attention_dim)."""
        return self.key(memory)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Score the memory.

        Args:
            queries: (batch, queries, query_dim).
            keys: What `project` made of the memory, (batch, length, attention_dim).
            keep: Where there is memory, bool (batch, length), at least one in each row; None: all.

        Returns:
            Scores before the softmax, (batch, queries, length), -inf where masked.
        """
        # (batch, queries, length, attention_dim), the largest tensor by far; in place, since the sum is not needed.
        hidden = (self.query(queries)[:, :, None] + keys[:, None]).tanh_()
        scores = self.energy(hidden).squeeze(-1)
        return scores if keep is None else scores.masked_fill(~keep[:, None], float("-inf"))


class SlotAttention(nn.Module):
    """Iterative attention in which `num_slots` vectors bind to parts of a set of tokens.

    Locatello et al. 2020, "Object-Centric Learning with Slot Attention", Algorithm 1.

    The gradient reaches the iterations in one of three ways:

    - "full": through all of them, as in the paper.
    - "implicit": through the last one only, from detached slots; the fixed point is differentiated to first order
      (Chang et al. 2022, "Object Representations as Fixed Points"). Nothing of the earlier iterations is kept in
      memory, and no gradient reaches the initial slots.
    - "bilevel": as "implicit", and the initial slots take the gradient of the last iteration's input straight
      through (Jia et al. 2023, "Improving Object-centric Learning with Query Optimization").

    Args:
        input_dim: Channels of the tokens.
        slot_dim: Channels of a slot.
        mlp_dim: Hidden units of the residual MLP.
        epsilon: Added to the attention before it is normalized over the tokens; 1e-8 in the paper.
        qkv_bias: Whether the three projections have a bias: not in the paper, but in some of its ports.

    Example:
        ```python
        >>> attention = SlotAttention(input_dim=64, slot_dim=64, mlp_dim=128)
        >>> slots, attentions = attention(torch.randn(2, 256, 64), torch.randn(2, 5, 64), num_iterations=3)
        >>> slots.shape, len(attentions), attentions[-1].shape
        (torch.Size([2, 5, 64]), 3, torch.Size([2, 5, 256]))

        ```
    """

    def __init__(self, input_dim: int, slot_dim: int, *, mlp_dim: int, epsilon: float = 1e-8, qkv_bias: bool = False):
        super().__init__()
        self.epsilon = epsilon
        self.scale = slot_dim**-0.5
        self.norm_inputs = nn.LayerNorm(input_dim)
        self.norm_slots = nn.LayerNorm(slot_dim)
        self.norm_mlp = nn.LayerNorm(slot_dim)
        self.to_q = nn.Linear(slot_dim, slot_dim, bias=qkv_bias)
        self.to_k = nn.Linear(input_dim, slot_dim, bias=qkv_bias)
        self.to_v = nn.Linear(input_dim, slot_dim, bias=qkv_bias)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        self.mlp = nn.Sequential(nn.Linear(slot_dim, mlp_dim), nn.ReLU(), nn.Linear(mlp_dim, slot_dim))

    def forward(
        self, inputs: torch.Tensor, slots: torch.Tensor, *, num_iterations: int = 3, gradient: str = "full"
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Bind the slots to the tokens.

        Args:
            inputs: Tokens, (batch, tokens, input_dim).
            slots: Initial slots, (batch, slots, slot_dim).
            num_iterations: T, at least 1.
            gradient: One of "full", "implicit", "bilevel"; see the class.

        Returns:
            The slots, (batch, slots, slot_dim), and for each iteration the attention, (batch, slots, tokens): the
            softmax over the slots, before it is normalized over the tokens, so it sums to 1 at every token.

        Raises:
            ValueError: If `num_iterations` is below 1 or `gradient` is unknown.
        """
        if num_iterations < 1:
            raise ValueError(f"num_iterations={num_iterations} must be at least 1.")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient={gradient!r} is unknown; choose one of {', '.join(GRADIENTS)}.")
        with torch.autocast(inputs.device.type, enabled=False):
            # Half precision is widened; float64 stays, so that oracles can be met to the last digit.
            if inputs.dtype in (torch.float16, torch.bfloat16):
                inputs = inputs.float()
            inputs, initial = self.norm_inputs(inputs), slots.to(inputs.dtype)
            absorb = self._absorbing_is_cheaper(inputs.shape[1], slots.shape[1], num_iterations)
            keys, values = (inputs, inputs) if absorb else (self.to_k(inputs), self.to_v(inputs))
            slots, attentions = initial, []
            for iteration in range(num_iterations):
                last = iteration == num_iterations - 1
                if last:
                    slots = GRADIENTS[gradient](slots, initial)
                with torch.set_grad_enabled(torch.is_grad_enabled() and (last or gradient == "full")):
                    slots, attention = self._iterate(keys, values, slots, absorb)
                attentions.append(attention)
        return slots, tuple(attentions)

    def _absorbing_is_cheaper(self, tokens: int, slots: int, iterations: int) -> bool:
        slot_dim, input_dim = self.to_k.weight.shape
        project_once = tokens * input_dim * slot_dim + iterations * slots * tokens * slot_dim
        absorb = iterations * slots * (tokens * input_dim + input_dim * slot_dim)
        return absorb <= project_once

    def _iterate(
        self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, absorb: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, num_slots, slot_dim = slots.shape
        queries = self.to_q(self.norm_slots(slots)) * self.scale  # (batch, slots, slot_dim)
        logits = 0.0
        if absorb:
            if self.to_k.bias is not None:
                logits = (queries @ self.to_k.bias)[:, :, None]
            queries = queries @ self.to_k.weight  # (batch, slots, input_dim)
        logits = logits + queries @ keys.transpose(1, 2)
        attention = torch.softmax(logits, dim=1)  # (batch, slots, tokens)
        weights = attention + self.epsilon
        updates = weights @ values / weights.sum(dim=-1, keepdim=True)  # weighted mean over the tokens
        if absorb:
            updates = self.to_v(updates)  # (batch, slots, slot_dim)
        slots = self.gru(updates.reshape(-1, slot_dim), slots.reshape(-1, slot_dim)).view(batch, num_slots, slot_dim)
        return slots + self.mlp(self.norm_mlp(slots)), attention
