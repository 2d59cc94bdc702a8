"""Autograd functions of hierarchical softmax: they compute only the weight rows that the labels of a batch need.

All functions take the picks of a batch: pick i is the product of the weight row nodes[i] and the hidden state rows[i].
The picks of a row are consecutive, and starts[r] is the first pick of row r.
"""

from typing import Any

import torch
import torch.nn.functional as F

from .layers_output_head import at_least_float32


def _pick(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, nodes: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """Compute z_i = weight[node_i] . hidden[row_i] + bias[node_i], (picks,).

    Let bag_r = sum_i p_i weight[node_i] over the picks of row r. The derivative of bag_r . hidden[r] with respect to
    p_i is weight[node_i] . hidden[r]. Both the sum and its derivative are fused operations that copy no weight row.
    """
    with torch.enable_grad():
        parts = torch.zeros(len(nodes), dtype=weight.dtype, device=weight.device, requires_grad=True)
        bags = F.embedding_bag(nodes, weight.detach(), starts, mode="sum", per_sample_weights=parts)
    (z,) = torch.autograd.grad(bags, parts, hidden.detach())
    return z.add_(bias.index_select(0, nodes))


def _pick_backward(
    dz: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    nodes: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    sparse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute dhidden[row_i] += dz_i weight[node_i], dweight[node_i] += dz_i hidden[row_i], dbias[node_i] += dz_i."""
    dhidden = F.embedding_bag(nodes, weight, starts, mode="sum", per_sample_weights=dz)
    values = hidden.index_select(0, rows).mul_(dz[:, None])
    if sparse:
        return dhidden, *(
            torch.sparse_coo_tensor(nodes[None], each, (len(weight), *each.shape[1:]), check_invariants=False)
            for each in (values, dz)
        )
    return (
        dhidden,
        torch.zeros_like(weight).index_add_(0, nodes, values),
        weight.new_zeros(len(weight)).index_add_(0, nodes, dz),
    )


class RowScores(torch.autograd.Function):
    """The scores of the picks. The time depends on the number of picks only, not on the number of weight rows.

    With sparse gradients, the same is true for the backward pass. Each row of `hidden` needs at least one pick.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        nodes: torch.Tensor,
        rows: torch.Tensor,
        starts: torch.Tensor,
        sparse: bool,
    ) -> torch.Tensor:
        """Compute z, (picks,)."""
        ctx.save_for_backward(hidden, weight, nodes, rows, starts)
        ctx.sparse = sparse
        return _pick(hidden, weight, bias, nodes, starts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of hidden, weight and bias."""
        return *_pick_backward(dz, *ctx.saved_tensors, ctx.sparse), None, None, None, None


class PathLosses(torch.autograd.Function):
    """The losses of the paths: loss_r = sum_i softplus(-s_i z_i) over the picks of row r.

    The derivative with respect to z_i is -s_i sigmoid(-s_i z_i).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        signs: torch.Tensor,
        nodes: torch.Tensor,
        rows: torch.Tensor,
        starts: torch.Tensor,
        sparse: bool,
    ) -> torch.Tensor:
        """Compute the losses, (batch,)."""
        against = at_least_float32(_pick(hidden, weight, bias, nodes, starts)).mul_(signs).neg_()  # -s z
        ctx.save_for_backward(against, signs, hidden, weight, nodes, rows, starts)
        ctx.sparse = sparse
        return against.new_zeros(len(hidden)).index_add_(0, rows, F.softplus(against))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlosses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradients of hidden, weight and bias."""
        against, signs, hidden, *picks = ctx.saved_tensors
        dz = against.sigmoid().mul_(signs).mul_(dlosses.index_select(0, picks[2])).neg_().to(hidden.dtype)
        return *_pick_backward(dz, hidden, *picks, ctx.sparse), None, None, None, None, None
