"""What a vision transformer attends to: its CLS token's attention, and what of each patch flows into that token.

The attention is rebuilt from the queries and keys that the model hands to `scaled_dot_product_attention`, so that a
model need not be switched to eager attention, and for the CLS row alone it costs O(tokens) memory. Its gradient is
rebuilt from what flows back into the result: of O = A V, dy/dA = dy/dO V^T. A model that runs eager attention is read
at its softmax. Calls are seen through a `TorchFunctionMode`, so no class of model is known here by name; flash and
flex attention, and torch's fused `nn.MultiheadAttention`, are not seen.

- Rollout (Abnar & Zuidema 2020): R = A'_L ... A'_1 with A' = (mean over heads of A + I) / 2, whose rows sum to 1.
- Gradient rollout (Chefer et al. 2021, "Generic Attention-model Explainability", equation 5 and 6): for a class with
  the logit y, R <- R + mean over heads of ReLU(A * dy/dA) R, from R = I.

Attention knows no class; it says what was read, not what it was read for. Gradient rollout asks for a class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .calls import class_logits, evaluating, patch_size_of, pick_classes, token_grid

METHODS = ("cls", "rollout", "gradient_rollout")
HEADS = ("mean", "max", "min")
_SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)


def self_attention_shape(func: Any, args: tuple, kwargs: dict, batch: int) -> tuple[int, int] | None:
    """Heads and tokens if a call is the self-attention of a batch, by SDPA or an eager softmax; else None."""
    if func is F.scaled_dot_product_attention:
        query, key = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
        causal = kwargs.get("is_causal") or (len(args) > 5 and args[5])
        if query.ndim == 4 and len(query) == batch and query.shape[-2] == key.shape[-2] and not causal:
            return query.shape[1], query.shape[2]
    elif func in _SOFTMAX:
        logits = args[0] if args else kwargs["input"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if logits.ndim == 4 and len(logits) == batch and logits.shape[-1] == logits.shape[-2] and dim in (-1, 3):
            return logits.shape[1], logits.shape[2]
    return None


class _Recorder(TorchFunctionMode):
    """Keeps the attention of every self-attention, and with `gradients` what its gradient is made of."""

    def __init__(self, batch: int, *, only_cls: bool, gradients: bool):
        super().__init__()
        self.batch, self.only_cls, self.gradients = batch, only_cls, gradients
        self.attentions: list[torch.Tensor] = []
        self.results: list[torch.Tensor] = []  # what the gradient is taken of
        self.values: list[torch.Tensor | None] = []  # V of O = A V; None where the result is A itself

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self_attention_shape(func, args, kwargs, self.batch) is not None:
            if func is F.scaled_dot_product_attention:
                given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False), **kwargs)
                attention, value = self._rebuild(**given), given["value"]
            else:
                attention, value = result.detach()[:, :, : 1 if self.only_cls else None].float(), None
            self.attentions.append(attention)
            if self.gradients:
                self.results.append(result)
                self.values.append(value)
        return result

    @torch.no_grad()
    def _rebuild(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
        **_: Any,
    ) -> torch.Tensor:
        if self.only_cls:
            query = query[:, :, :1]
            attn_mask = attn_mask if attn_mask is None or attn_mask.shape[-2] == 1 else attn_mask[..., :1, :]
        if key.shape[1] != query.shape[1]:  # grouped queries
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = (query @ key.transpose(-1, -2)).float() * scale
        if attn_mask is not None:
            logits = (
                logits.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else logits + attn_mask
            )
        return logits.softmax(dim=-1)


@dataclass
class AttentionOutput:
    """What `record_attention` returns.

    Attributes:
        attentions: For each layer (batch, heads, tokens, tokens), or (batch, heads, 1, tokens) of CLS alone; rows sum
            to 1.
        gradients: Of the classes' logits by `attentions`, of their shape; None unless asked for.
        logits: (batch, classes).
        classes: Those that `gradients` belong to, int64 (batch,).
        grid: Height and width of the grid of patches.
        num_prefix_tokens: Tokens before the patches: CLS, distillation, registers.
    """

    attentions: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor, ...] | None
    logits: torch.Tensor
    classes: torch.Tensor
    grid: tuple[int, int]
    num_prefix_tokens: int

    def to_grid(self, rows: torch.Tensor) -> torch.Tensor:
        """Lay rows of attention (..., tokens) out as (..., height, width), without the tokens that have no place."""
        return rows[..., self.num_prefix_tokens :].unflatten(-1, self.grid)


def record_attention(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    only_cls: bool = False,
    gradients: bool = False,
    classes: int | Sequence[int] | torch.Tensor | None = None,
    patch_size: tuple[int, int] | None = None,
) -> AttentionOutput:
    """Run a vision transformer and keep its attention.

    Args:
        model: A classifier whose patches come after its other tokens, row by row, CLS first of all.
        pixel_values: (batch, channels, height, width).
        only_cls: Whether to keep only the rows of the CLS token.
        gradients: Whether to give the gradients of the classes' logits too; not with `only_cls`.
        classes: One for all images or one for each; the predicted ones when not given.
        patch_size: Height and width of the patches in pixels; the model's own when not given.

    Returns:
        See `AttentionOutput`.

    Raises:
        ValueError: If no attention is seen, or its layers have different tokens (windows, merged patches).
    """
    if only_cls and gradients:
        raise ValueError("only_cls=True with gradients=True is not supported; rollout needs the rows of all tokens.")
    recorder = _Recorder(len(pixel_values), only_cls=only_cls, gradients=gradients)
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), evaluating(model):
        if gradients:  # a frozen model would have no graph at all
            pixel_values = pixel_values.detach().clone().requires_grad_()
        with recorder:
            logits = class_logits(model, pixel_values)
        picked = pick_classes(logits.detach(), classes)
        found = None
        if gradients and recorder.results:
            score = logits.gather(1, picked[:, None]).sum()
            flowing = torch.autograd.grad(score, recorder.results)
            found = tuple(
                (g if value is None else g @ value.detach().transpose(-1, -2)).float()
                for g, value in zip(flowing, recorder.values, strict=True)
            )
    tokens = {attention.shape[-1] for attention in recorder.attentions}
    if len(tokens) != 1:
        raise ValueError(
            f"model={type(model).__name__} shows attention over {sorted(tokens) or 'no'} tokens, expected one number "
            "in all layers, by scaled_dot_product_attention or eager attention."
        )
    grid, prefix = token_grid(tokens.pop(), tuple(pixel_values.shape[-2:]), patch_size or patch_size_of(model))
    return AttentionOutput(tuple(recorder.attentions), found, logits.detach(), picked, grid, prefix)


def rollout(attentions: Sequence[torch.Tensor], *, heads: str = "mean", discard: float = 0.0) -> torch.Tensor:
    """Follow the attention through all layers (Abnar & Zuidema 2020).

    Args:
        attentions: For each layer (batch, heads, tokens, tokens), first layer first.
        heads: How the heads are joined: "mean", "max" or "min".
        discard: Part of each layer's joined attention, the smallest entries, that is set to zero, at least 0 and
            below 1; rows are normalized again.

    Returns:
        (batch, tokens, tokens), rows summing to 1: how much of each token of the image is in each of the last layer.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        ```python
        >>> rollout([torch.full((1, 2, 4, 4), 0.25)]).sum(-1)
        tensor([[1., 1., 1., 1.]])

        ```
    """
    if heads not in HEADS:
        raise ValueError(f"heads={heads!r} is unknown; choose one of {', '.join(HEADS)}.")
    if not 0 <= discard < 1:
        raise ValueError(f"discard={discard} must be at least 0 and below 1.")
    joined = identity = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    for attention in attentions:
        attention = attention.mean(dim=1) if heads == "mean" else getattr(attention, f"a{heads}")(dim=1)
        count = int(discard * attention.shape[-1] * attention.shape[-2])
        if count:
            flat = attention.flatten(1)
            smallest = flat.topk(count, dim=1, largest=False).indices
            attention = flat.scatter(1, smallest, 0.0).view_as(attention)
        # Joined by max, min or with entries discarded, the rows no longer sum to 1 of themselves.
        total = attention.sum(dim=-1, keepdim=True)
        attention = torch.where(total > 0, attention / total.clamp_min(1e-30), 0.0)
        attention = attention + identity
        joined = attention / attention.sum(dim=-1, keepdim=True) @ joined
    return joined


def gradient_rollout(attentions: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Follow through all layers the attention that raises a class's logit (Chefer et al. 2021).

    Args:
        attentions: For each layer (batch, heads, tokens, tokens), first layer first.
        gradients: Of the logit by them, of the same shapes.

    Returns:
        Relevance, (batch, tokens, tokens), not negative, not normalized: its scale is that of the gradients.
    """
    relevance = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    relevance = relevance.expand(len(attentions[0]), -1, -1)
    for attention, gradient in zip(attentions, gradients, strict=True):
        relevance = relevance + (attention * gradient).relu().mean(dim=1) @ relevance
    return relevance


def attention_maps(
    model: nn.Module,
    pixel_values: torch.Tensor,
    *,
    method: str = "cls",
    layer: int = -1,
    head: int | None = None,
    classes: int | Sequence[int] | torch.Tensor | None = None,
    patch_size: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, AttentionOutput]:
    """Map what the CLS token of a vision transformer reads.

    Args:
        model: The classifier, with a CLS token.
        pixel_values: (batch, channels, height, width).
        method: "cls", the attention of one layer; "rollout"; or "gradient_rollout", for a class.
        layer: Of "cls": which layer, from 0, or from the last one, -1.
        head: Of "cls": which head, from 0; the mean of all when not given.
        classes: Of "gradient_rollout": one for all images or one for each; the predicted ones when not given.
        patch_size: Height and width of the patches in pixels; the model's own when not given.

    Returns:
        Maps (batch, height, width) of the grid of patches, as they are: CLS keeps what is missing from a sum of 1 for
        itself and the registers. `upsample` enlarges them. And what they were made from.

    Raises:
        ValueError: If an argument is out of range, or the model has no CLS token.

    Example:
        ```python
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> model = ViTForImageClassification(ViTConfig(num_hidden_layers=2))
        >>> maps, output = attention_maps(model, torch.randn(1, 3, 224, 224), method="rollout")
        >>> maps.shape
        torch.Size([1, 14, 14])

        ```
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}.")
    output = record_attention(
        model,
        pixel_values,
        only_cls=method == "cls",
        gradients=method == "gradient_rollout",
        classes=classes,
        patch_size=patch_size,
    )
    if output.num_prefix_tokens == 0:
        raise ValueError(f"model={type(model).__name__} has no CLS token, expected one before the patches.")
    if method == "rollout":
        rows = rollout(output.attentions)[:, 0]
    elif method == "gradient_rollout":
        rows = gradient_rollout(output.attentions, output.gradients)[:, 0]
    else:
        layers = len(output.attentions)
        if not -layers <= layer < layers:
            raise ValueError(f"layer={layer} must be from {-layers} to {layers - 1}.")
        rows = output.attentions[layer][:, :, 0]
        if head is not None and not 0 <= head < rows.shape[1]:
            raise ValueError(f"head={head} must be from 0 to {rows.shape[1] - 1}.")
        rows = rows.mean(dim=1) if head is None else rows[:, head]
    return output.to_grid(rows), output
