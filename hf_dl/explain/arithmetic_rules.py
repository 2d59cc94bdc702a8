"""How each function of torch changes the receptive fields, see arithmetic_fields.py.

`RULES` has one entry per function. Elementwise functions need no entry, because torch tags them. A function without
an entry is assumed to mix all positions of its inputs.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .arithmetic_fields import Field, Part, combine, join
from .arithmetic_formulas import ATTENTION, CONVOLUTIONS, POOLS, PRODUCTS, Call, window_of

FACTORIES = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
"""Functions that use only the shape of their input, as do those whose name starts with "new_"."""

Find = Callable[[Any], Field | None]  # from a tensor to its field, None if it does not depend on the image
Found = Field | None | list[Field | None]


def propagate(call: Call, inputs: list[torch.Tensor], find: Find, *, pointwise: bool) -> list[Field | None]:
    """Return the field of each output of a call.

    Args:
        call: The call.
        inputs: Its tensors.
        find: Returns the field of a tensor.
        pointwise: Whether the function is elementwise.
    """
    fields = [find(tensor) for tensor in inputs]
    if not call.outputs or all(field is None for field in fields):
        return [None] * len(call.outputs)
    if call.name.startswith(ATTENTION):
        found = _attention(call, find)
    elif call.name in RULES:
        found = RULES[call.name](call, find)
    elif pointwise:
        found = combine(fields, call.outputs[0].shape)
    else:
        found = combine([None if field is None else _flat(field) for field in fields], ())
    found = found if isinstance(found, list) else [found] * len(call.outputs)
    return [_fit(field, out) for field, out in zip(found, call.outputs, strict=True)]


def _flat(field: Field) -> Field:
    return replace(field.mix(), dims=())


def _fit(field: Field | None, out: torch.Tensor) -> Field | None:
    """Mix a field if its dimensions differ from the tensor, as for statistics and unknown functions."""
    if field is None or tuple(math.prod(part.size for part in dim) for dim in field.dims) == tuple(out.shape):
        return field
    return replace(field.mix(), dims=tuple((Part(size),) for size in out.shape))


def _same(call: Call, find: Find) -> Found:
    return find(call.image)


def _elementwise(call: Call, find: Find) -> Found:
    tensors = [value for value in call.arguments.values() if isinstance(value, torch.Tensor)]
    return combine([find(tensor) for tensor in tensors], call.outputs[0].shape)


def _reshape(call: Call, find: Find) -> Found:
    return find(call.image).reshape(call.outputs[0].shape)


def _expand(call: Call, find: Find) -> Found:
    return combine([find(call.image)], call.outputs[0].shape)


def _permute(call: Call, find: Find) -> Found:
    field, rank = find(call.image), call.image.ndim
    order = list(range(rank))
    if call.name == "permute":
        order = [dim % rank for dim in call.arguments["dims"]]
    else:
        first, second = (call.arguments.get("dim0", 0), call.arguments.get("dim1", 1)) if rank > 1 else (0, 0)
        order[first], order[second] = order[second], order[first]
    return field.permute(order)


def _slice(call: Call, find: Find) -> Found:
    values, dim = call.arguments, call.arguments["dim"]
    start, size = values["start"] or 0, call.image.shape[dim]
    start = max(start + size, 0) if start < 0 else min(start, size)
    return find(call.image).cut(dim, start, values["step"], call.outputs[0].shape[dim])


def _select(call: Call, find: Find) -> Found:
    return find(call.image).select(call.arguments["dim"], call.arguments["index"])


def _unbind(call: Call, find: Find) -> Found:
    field, dim = find(call.image), call.arguments["dim"]
    return [field.select(dim, index) for index in range(len(call.outputs))]


def _split(call: Call, find: Find) -> Found:
    field, dim, start, found = find(call.image), call.arguments["dim"], 0, []
    for out in call.outputs:
        found.append(field.cut(dim, start, 1, out.shape[dim]))
        start += out.shape[dim]
    return found


def _cat(call: Call, find: Find) -> Found:
    tensors, dim = call.arguments["tensors"], call.arguments["dim"]
    return join([find(t) for t in tensors], [t.shape[dim] for t in tensors], dim, call.outputs[0].shape)


def _stack(call: Call, find: Find) -> Found:
    shape, dim = list(call.outputs[0].shape), call.arguments["dim"]
    shape[dim] = 1
    fields = [find(tensor) for tensor in call.arguments["tensors"]]
    fields = [None if field is None else field.reshape(shape) for field in fields]
    return join(fields, [1] * len(fields), dim, call.outputs[0].shape)


def _pad(call: Call, find: Find) -> Found:
    field = find(call.image)
    padding = call.arguments.get("pad") or call.arguments["padding"]
    for index in range(len(padding) // 2):
        if padding[2 * index] or padding[2 * index + 1]:
            dim = call.image.ndim - 1 - index
            field = field.cut(dim, -padding[2 * index], 1, call.outputs[0].shape[dim])
    return field


def _reduce(call: Call, find: Find) -> Found:
    dims = call.arguments.get("dim")
    rank = call.image.ndim
    chosen = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    chosen = {dim % rank for dim in chosen}
    field = find(call.image).mix(sorted(chosen))
    keep = call.arguments.get("keepdim", False)
    dims = [((Part(1),) if i in chosen else dim) for i, dim in enumerate(field.dims) if keep or i not in chosen]
    return replace(field, dims=tuple(dims))


def _mix_dim(call: Call, find: Find) -> Found:
    return find(call.image).mix([call.arguments["dim"]])


def _layer_norm(call: Call, find: Find) -> Found:
    return find(call.image).mix(range(-len(call.arguments["normalized_shape"]), 0))


def _group_norm(call: Call, find: Find) -> Found:
    return find(call.image).mix(range(1, call.image.ndim))


def _scatter(call: Call, find: Find) -> Found:
    field = find(call.image)
    return field.scatter(call.arguments.get("dims") or range(call.image.ndim))


def _window(call: Call, find: Find) -> Found:
    window, field = window_of(call), find(call.image)
    if window is None:  # adaptive pooling whose windows have different sizes
        sizes = call.outputs[0].shape[-2:]
        reach = max(math.ceil(n / m) for n, m in zip(call.image.shape[-2:], sizes, strict=True))
        return field.resize(sizes, reach=2 * reach)
    sizes = call.outputs[0].shape[-len(window.kernel) :]
    channel = -len(window.kernel) - 1 if call.name in CONVOLUTIONS else None
    field = field.slide(window, sizes, channel=channel)
    if channel is not None:
        field = replace(
            field, dims=(*field.dims[:channel], (Part(call.outputs[0].shape[channel]),), *field.dims[channel + 1 :])
        )
    return field


def _resize(call: Call, find: Find) -> Found:
    return find(call.image).resize(call.outputs[0].shape[-2:], reach=0 if "nearest" in call.name else 2)


def _product(call: Call, find: Find) -> Found:
    shape = call.outputs[0].shape
    first, second = (find(call.arguments[name]) for name in PRODUCTS[call.name])
    first = None if first is None else first.mix([-1])
    second = None if second is None else second.mix([-2])
    if first is not None and second is not None:  # such as query * key: each value depends on two positions
        first, second = first.mix([-2]), second.mix([-1])
    fields = []
    if first is not None:
        fields.append(replace(first, dims=(*first.dims[:-1], (Part(shape[-1]),))))
    if second is not None:
        fields.append(replace(second, dims=(*second.dims[:-2], (Part(shape[-2]),), second.dims[-1])))
    bias = call.arguments.get("self") if call.name in ("addmm", "baddbmm") else None
    return combine([*fields, find(bias)], shape)


def _attention(call: Call, find: Find) -> Found:
    shape = call.outputs[0].shape
    query, *others = (find(call.arguments[name]) for name in ("query", "key", "value"))
    fields = [None if query is None else query.mix([-1])] + [None if f is None else f.mix([-2, -1]) for f in others]
    resized = [
        None if f is None else replace(f, dims=(*f.dims[:-2], dim, (Part(shape[-1]),)))
        for f, dim in zip(fields, [query.dims[-2] if query else None, *[(Part(shape[-2]),)] * 2], strict=True)
    ]
    return [combine(resized, shape), *[None] * (len(call.outputs) - 1)]


RULES: dict[str, Callable[[Call, Find], Found]] = {
    **dict.fromkeys((*CONVOLUTIONS, *POOLS, "_adaptive_avg_pool2d", "adaptive_max_pool2d"), _window),
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(
        ("view", "_unsafe_view", "_reshape_alias", "reshape", "unsqueeze", "squeeze", "squeeze_"), _reshape
    ),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    **dict.fromkeys(("clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous", "native_dropout"), _same),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "var_mean", "linalg_vector_norm"), _reduce),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "sort"), _mix_dim),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _layer_norm),
    **dict.fromkeys(("constant_pad_nd", "reflection_pad2d", "replication_pad2d"), _pad),
    **dict.fromkeys(("roll", "flip"), _scatter),
    **dict.fromkeys(
        (
            "native_batch_norm",
            "_native_batch_norm_legit_no_training",
            "_native_batch_norm_legit",
            "_batch_norm_with_update",
            "_batch_norm_no_update",
            "cudnn_batch_norm",
        ),
        _same,
    ),
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"), _resize),
    **dict.fromkeys(("copy_", "where", "masked_fill", "bernoulli_", "dropout"), _elementwise),
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    "split": _split,
    "split_with_sizes": _split,
    "cat": _cat,
    "stack": _stack,
    "native_group_norm": _group_norm,
}
"""The rule of each function."""
