"""Attention: additive (Bahdanau et al. 2015), and slots that compete for tokens (Locatello et al. 2020, Algorithm 1).

Slot attention follows the paper exactly: three layer normalizations, softmax over the slots, weighted mean over the
tokens, GRU, residual MLP. Two details of the implementation differ without changing the results:

- If it is cheaper, the key and value projections are applied to the slots instead of the tokens. With k = x W_k and
  v = x W_v, the logits q k^T equal (q W_k^T) x^T, and the weighted mean A v equals (A x) W_v. No projection of all
  tokens is then needed.
- The iterations run in the precision of the weights, also under autocast. The softmax and the weighted mean use
  float32 at least. In float16, epsilon = 1e-8 is zero, and an empty slot would be 0 / 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from .layers_precision import reference_parameter

GRADIENTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "full": lambda slots, initial: slots,
    "implicit": lambda slots, initial: slots.detach(),
    "bilevel": lambda slots, initial: slots.detach() + initial - initial.detach(),
}
"""The input of the last iteration, given the slots so far and the initial slots, by name."""


def attention_masks(attention: torch.Tensor, size: Sequence[int], *, image_size: int) -> torch.Tensor:
    """Interpolate attention bilinearly to the size of an image.

    Convolutions of stride s with odd kernels and matching padding center token i on pixel s i. `F.interpolate` would
    place the token (s - 1) / 2 pixels further on, in the middle of its s pixels. Beyond the last token, its value is
    repeated.

    Args:
        attention: (batch, slots, tokens); the tokens are the cells of a square grid in row-major order.
        size: Height and width of the result.
        image_size: Height and width in pixels of the images that the tokens were computed from.

    Returns:
        (batch, slots, *size), float32 or float64. It sums to 1 over the slots if the attention does.

    Raises:
        ValueError: If the number of tokens is not a square.

    Example:
        ```python
        >>> attention_masks(torch.tensor([[[1.0, 0.0, 1.0, 0.0]]]), (1, 4), image_size=4)
        tensor([[[[1.0000, 0.5000, 0.0000, 0.0000]]]])

        ```
    """
    side = math.isqrt(attention.shape[-1])
    if side**2 != attention.shape[-1]:
        raise ValueError(f"attention has {attention.shape[-1]} tokens, expected a square number.")
    maps = attention.to(torch.promote_types(attention.dtype, torch.float32)).unflatten(-1, (side, side))

    def weights(pixels: int) -> torch.Tensor:
        """Return (pixels, side): the weight of each token in each pixel, 1 at its center and 0 at the next tokens."""
        at = ((torch.arange(pixels, dtype=torch.float64) + 0.5) / pixels * image_size - 0.5) * side / image_size
        apart = at.clamp(0, side - 1)[:, None] - torch.arange(side)
        return (1 - apart.abs()).clamp_min(0).to(maps)

    with torch.autocast(maps.device.type, enabled=False):
        return weights(size[0]) @ maps @ weights(size[1]).T


class AdditiveAttention(nn.Module):
    """Attention by a small network: softmax over the memory of v^T tanh(W q + U m).

    Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning to Align and Translate", appendix A.1.2.
    `project` computes U m once per memory, and any number of queries can then attend to the same memory.

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
        """Compute the keys U m, (batch, length, attention_dim), of a memory (batch, length, memory_dim)."""
        return self.key(memory)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Score the memory.

        Args:
            queries: (batch, queries, query_dim).
            keys: The keys of the memory, from `project`, (batch, length, attention_dim).
            keep: The part of the memory to attend to, bool (batch, length), at least one per row. Defaults to all.

        Returns:
            Scores before the softmax, (batch, queries, length), -inf for masked positions.
        """
        # (batch, queries, length, attention_dim), the largest tensor by far: tanh runs in place to save memory.
        hidden = (self.query(queries)[:, :, None] + keys[:, None]).tanh_()
        scores = self.energy(hidden).squeeze(-1)
        return scores if keep is None else scores.masked_fill(~keep[:, None], float("-inf"))


class SlotAttention(nn.Module):
    """Iterative attention in which `num_slots` vectors bind to parts of a set of tokens.

    Locatello et al. 2020, "Object-Centric Learning with Slot Attention", Algorithm 1.

    `GRADIENTS` lists the ways in which the gradient reaches the iterations:

    - "full": through all iterations, as in the paper.
    - "implicit": through the last iteration only, from detached slots. This is the first-order gradient of the fixed
      point (Chang et al. 2022, "Object Representations as Fixed Points"). Earlier iterations need no memory for the
      backward pass, and the initial slots get no gradient.
    - "bilevel": as "implicit", but the initial slots also get the gradient of the last iteration's input (Jia et al.
      2023, "Improving Object-centric Learning with Query Optimization").

    Args:
        input_dim: Channels of the tokens.
        slot_dim: Channels of a slot.
        mlp_dim: Hidden units of the residual MLP.
        epsilon: Added to the attention before it is normalized over the tokens; 1e-8 in the paper.
        qkv_bias: Whether the three projections have a bias. The paper has no bias, but some reimplementations do.

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
        self.input_dim, self.slot_dim = input_dim, slot_dim
        self.epsilon = epsilon
        self.scale = slot_dim**-0.5
        self.gradient_checkpointing = False  # whether each iteration is computed again in the backward pass
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
            gradient: A key of `GRADIENTS`; see the class.

        Returns:
            The slots, (batch, slots, slot_dim), and the attention of each iteration, (batch, slots, tokens): the
            softmax over the slots before the normalization over the tokens, which sums to 1 at every token.

        Raises:
            ValueError: If `num_iterations` is below 1 or `gradient` is unknown.
        """
        if num_iterations < 1:
            raise ValueError(f"num_iterations={num_iterations} must be at least 1.")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient={gradient!r} is unknown; choose one of {', '.join(GRADIENTS)}.")
        with torch.autocast(inputs.device.type, enabled=False):
            dtype = reference_parameter(self).dtype
            inputs, initial = self.norm_inputs(inputs.to(dtype)), slots.to(dtype)
            absorb = self._absorbing_is_cheaper(inputs.shape[1], slots.shape[1], num_iterations)
            keys, values = (inputs, inputs) if absorb else (self.to_k(inputs), self.to_v(inputs))
            slots, attentions = initial, []
            for iteration in range(num_iterations):
                last = iteration == num_iterations - 1
                if last:
                    slots = GRADIENTS[gradient](slots, initial)
                with torch.set_grad_enabled(torch.is_grad_enabled() and (last or gradient == "full")):
                    slots, attention = self._run_iteration(keys, values, slots, absorb)
                attentions.append(attention)
        return slots, tuple(attentions)

    def _run_iteration(self, *args: torch.Tensor | bool) -> tuple[torch.Tensor, torch.Tensor]:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self._iterate, *args)
        return self._iterate(*args)

    def _absorbing_is_cheaper(self, tokens: int, slots: int, iterations: int) -> bool:
        # Adapters, quantization, hooks and offloading replace or extend the layer, which must then be called.
        layer = self.to_k
        if type(layer) is not nn.Linear or layer.weight.is_meta or layer._forward_hooks or layer._forward_pre_hooks:
            return False
        slot_dim, input_dim = self.slot_dim, self.input_dim
        project_once = tokens * input_dim * slot_dim + iterations * slots * tokens * slot_dim
        absorb = iterations * slots * (tokens * input_dim + input_dim * slot_dim)
        return absorb <= project_once

    def _iterate(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        absorb: bool,
        bias: torch.Tensor | float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, num_slots, slot_dim = slots.shape
        queries = self.to_q(self.norm_slots(slots)) * self.scale  # (batch, slots, slot_dim)
        if absorb:
            if self.to_k.bias is not None:
                bias = bias + (queries @ self.to_k.bias)[:, :, None]
            queries = queries @ self.to_k.weight  # (batch, slots, input_dim)
        logits = bias + queries @ keys.transpose(1, 2)
        precise = torch.promote_types(slots.dtype, torch.float32)
        attention = torch.softmax(logits, dim=1, dtype=precise)  # (batch, slots, tokens)
        weights = attention + self.epsilon
        updates = weights @ values.to(precise) / weights.sum(dim=-1, keepdim=True)  # weighted mean over the tokens
        updates = updates.to(slots.dtype)
        if absorb:
            updates = self.to_v(updates)  # (batch, slots, slot_dim)
        slots = self.gru(updates.reshape(-1, slot_dim), slots.reshape(-1, slot_dim)).view(batch, num_slots, slot_dim)
        return slots + self.mlp(self.norm_mlp(slots)), attention
