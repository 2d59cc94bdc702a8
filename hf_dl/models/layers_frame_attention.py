"""Slot attention with slot-centric reference frames: Biza et al. 2023, "Invariant Slot Attention".

The logits of a slot also depend on where a token is in the frame of the slot. Differences from the paper:

- The paper embeds the position of each token in the frame of each slot and adds it to keys and values. Here four
  functions of the position are added to the logits, with weights that depend on the slot. This costs no matrix product
  per slot and token. With the initial weights, slots prefer near tokens.
- Values have no positions. `FrameReadout` reads the shape once, after the last iteration.
"""

import torch
from torch import nn

from .layers_attention import SlotAttention
from .slot_frames import FRAME_DIM, attention_frames, cell_centers, token_side

_NEAR = 0.02  # squared distance, as a fraction of the image, at which the second kernel is half way


class PlaceWeights(nn.Linear):
    """The weights of the four functions of a token's place. At the start, slots prefer near tokens."""

    def __init__(self, slot_dim: int):
        super().__init__(slot_dim, 4)


class FrameSlotAttention(SlotAttention):
    """Slot attention in which each slot has a frame, which follows its attention.

    It has the arguments of `SlotAttention`. `slot_dim` does not include the frame. Let d be the position of a token
    relative to the center of a slot, and s the size of the slot. With the weights w = W norm(slot) + b, the logit of
    the token also has the terms

        - w_1 log(1 + |d|^2 / 2s^2) - w_2 log(1 + |d|^2 / 0.02) + (w_3, w_4) . (d / s) / sqrt(1 + (d / s)^2)

    The first kernel is near 0 for slots that are as large as the image, such as a background.

    Example:
        ```python
        >>> attention = FrameSlotAttention(input_dim=64, slot_dim=61, mlp_dim=128)
        >>> slots, attentions = attention(torch.randn(2, 256, 64), torch.rand(2, 5, 64), num_iterations=3)
        >>> slots.shape, attentions[-1].shape
        (torch.Size([2, 5, 64]), torch.Size([2, 5, 256]))

        ```
    """

    def __init__(self, input_dim: int, slot_dim: int, *, mlp_dim: int, epsilon: float = 1e-8, qkv_bias: bool = False):
        super().__init__(input_dim, slot_dim, mlp_dim=mlp_dim, epsilon=epsilon, qkv_bias=qkv_bias)
        self.place_weights = PlaceWeights(slot_dim)

    def _iterate(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        absorb: bool,
        bias: torch.Tensor | float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slots, frames = slots.split([slots.shape[-1] - FRAME_DIM, FRAME_DIM], dim=-1)
        bias = bias + self._place_logits(slots, frames, keys.shape[1])
        slots, attention = super()._iterate(keys, values, slots, absorb, bias)
        frames = attention_frames(attention, epsilon=self.epsilon).to(slots.dtype)
        return torch.cat([slots, frames], dim=-1), attention

    def _place_logits(self, slots: torch.Tensor, frames: torch.Tensor, tokens: int) -> torch.Tensor:
        """Return the part of the logits that depends on positions, (batch, slots, tokens)."""
        frames = frames.to(torch.promote_types(frames.dtype, torch.float32))
        center, size = frames[:, :, None, :2], frames[:, :, None, 2:]
        offset = cell_centers(token_side(tokens), frames) - center  # d, (batch, slots, tokens, 2)
        scaled = offset / size
        kernels = torch.stack(
            [
                -torch.log1p(scaled.square().sum(-1) / 2),
                -torch.log1p(offset.square().sum(-1) / _NEAR),
                *(scaled * (1 + scaled.square()).rsqrt()).unbind(-1),
            ],
            dim=-1,
        )  # (batch, slots, tokens, 4)
        weights = self.place_weights(self.norm_slots(slots)).to(kernels.dtype)
        return (kernels @ weights[..., None]).squeeze(-1)
