"""Attention of vision transformers: attention of the CLS token, rollout over all layers, and gradient rollout.

The attention is computed from the queries and keys of `scaled_dot_product_attention`, so models do not need eager
attention. The CLS row alone needs O(tokens) memory. The gradient of the attention follows from the gradient of the
result: for O = A V, dy/dA = dy/dO V^T. For models with eager attention, the softmax is recorded. A `TorchFunctionMode`
records the calls, so all model classes work. Flash attention, flex attention and the fused `nn.MultiheadAttention` of
torch are not supported.

- Rollout (Abnar & Zuidema 2020): R = A'_L ... A'_1 with A' = (mean over heads of A + I) / 2, whose rows sum to 1.
- Gradient rollout (Chefer et al. 2021, "Generic Attention-model Explainability", equation 5 and 6): for a class with
  the logit y, R <- R + mean over heads of ReLU(A * dy/dA) R, from R = I.

CLS attention and rollout do not depend on a class. Gradient rollout does.
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
    """Return the numbers of heads and tokens if a call is self-attention (SDPA or eager softmax), or None."""
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
    """Records the attention of all self-attention calls, and with `gradients` the tensors for its gradient."""

    def __init__(self, batch: int, *, only_cls: bool, gradients: bool):
        super().__init__()
        self.batch, self.only_cls, self.gradients = batch, only_cls, gradients
        self.attentions: list[torch.Tensor] = []
        self.results: list[torch.Tensor] = []  # tensors to differentiate with respect to
        self.values: list[torch.Tensor | None] = []  # V of O = A V; None if the result is A itself

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
    """Output of `record_attention`.

    Attributes:
        attentions: Attention of each layer, (batch, heads, tokens, tokens), or (batch, heads, 1, tokens) for the CLS
            token alone. Rows sum to 1.
        gradients: Gradients of the class logits with respect to `attentions`, of the same shapes, or None.
        logits: Logits, (batch, classes).
        classes: Classes of the gradients, int64 (batch,).
        grid: Height and width of the grid of patches.
        num_prefix_tokens: Number of tokens before the patches: CLS, distillation, registers.
    """

    attentions: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor, ...] | None
    logits: torch.Tensor
    classes: torch.Tensor
    grid: tuple[int, int]
    num_prefix_tokens: int

    def to_grid(self, rows: torch.Tensor) -> torch.Tensor:
        """Arrange rows of attention (..., tokens) as (..., height, width), without the tokens before the patches."""
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
    """Run a vision transformer and record its attention.

    Args:
        model: Classifier. The CLS token is its first token, and the patches are its last tokens, row by row.
        pixel_values: Images, (batch, channels, height, width).
        only_cls: Whether to record the rows of the CLS token only.
        gradients: Whether to compute the gradients of the class logits. Not available with `only_cls`.
        classes: One class for all images or one for each image. Defaults to the predicted classes.
        patch_size: Height and width of the patches in pixels. Defaults to the patch size of the model.

    Returns:
        See `AttentionOutput`.

    Raises:
        ValueError: If no attention is recorded, or the layers differ in the number of tokens (windows, merged
            patches).
    """
    if only_cls and gradients:
        raise ValueError("only_cls=True with gradients=True is not supported. Gradient rollout needs all rows.")
    recorder = _Recorder(len(pixel_values), only_cls=only_cls, gradients=gradients)
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), evaluating(model):
        if gradients:  # because a frozen model would have no graph
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
            f"model={type(model).__name__} has attention over {sorted(tokens) or 'no'} tokens. Expected the same "
            "number in all layers, with scaled_dot_product_attention or eager attention."
        )
    grid, prefix = token_grid(tokens.pop(), tuple(pixel_values.shape[-2:]), patch_size or patch_size_of(model))
    return AttentionOutput(tuple(recorder.attentions), found, logits.detach(), picked, grid, prefix)


def rollout(attentions: Sequence[torch.Tensor], *, heads: str = "mean", discard: float = 0.0) -> torch.Tensor:
    """Follow the attention through all layers (Abnar & Zuidema 2020).

    Args:
        attentions: Attention of each layer, (batch, heads, tokens, tokens), from the first layer to the last.
        heads: Reduction over the heads: "mean", "max" or "min".
        discard: Share of the smallest entries of each layer to set to zero, at least 0 and below 1. Rows are
            normalized again.

    Returns:
        Shares of the input tokens in each token of the last layer, (batch, tokens, tokens). Rows sum to 1.

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
        # after max, min or discarding entries, rows do not sum to 1
        total = attention.sum(dim=-1, keepdim=True)
        attention = torch.where(total > 0, attention / total.clamp_min(1e-30), 0.0)
        attention = attention + identity
        joined = attention / attention.sum(dim=-1, keepdim=True) @ joined
    return joined


def gradient_rollout(attentions: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Follow the attention that increases a class logit through all layers (Chefer et al. 2021).

    Args:
        attentions: Attention of each layer, (batch, heads, tokens, tokens), from the first layer to the last.
        gradients: Gradients of the logit with respect to `attentions`, of the same shapes.

    Returns:
        Relevance, (batch, tokens, tokens), at least 0. It is not normalized and has the scale of the gradients.
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
    """Compute maps of the attention of the CLS token of a vision transformer.

    Args:
        model: Classifier with a CLS token.
        pixel_values: Images, (batch, channels, height, width).
        method: "cls" for the attention of one layer, "rollout", or "gradient_rollout" for a class.
        layer: Index of the layer for "cls". Negative indices count from the last layer.
        head: Index of the head for "cls". Defaults to the mean of all heads.
        classes: Classes for "gradient_rollout": one for all images or one for each image. Defaults to the predicted
            classes.
        patch_size: Height and width of the patches in pixels. Defaults to the patch size of the model.

    Returns:
        Maps (batch, height, width) on the grid of patches, and the recorded attention. The maps are not normalized:
        part of the attention goes to CLS and register tokens. Use `upsample` to resize them.

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
        raise ValueError(f"model={type(model).__name__} has no CLS token. Expected one before the patches.")
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
