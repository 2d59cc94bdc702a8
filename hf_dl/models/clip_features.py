"""Features of CLIP and SigLIP models as plain tensors, for every version of transformers.

`get_image_features` and `get_text_features` return a tensor in transformers 4, and an output with `pooler_output` in
transformers 5. `as_features` accepts both.
"""

from typing import Any

from torch import Tensor


def as_features(output: Any) -> Tensor:
    """Return the features of `get_image_features` or `get_text_features` as a tensor.

    Args:
        output: A tensor, as in transformers 4, or an output with `pooler_output`, as in transformers 5.

    Returns:
        Projected features (examples, dim), as the model returns them: they are not normalized.

    Raises:
        ValueError: If the output has no features of this shape.

    Example:
        >>> import torch
        >>> from transformers.modeling_outputs import BaseModelOutputWithPooling
        >>> as_features(BaseModelOutputWithPooling(pooler_output=torch.ones(1, 2)))
        tensor([[1., 1.]])
    """
    features = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = f" of shape {tuple(features.shape)}" if isinstance(features, Tensor) else ""
        raise ValueError(
            f"output is a {type(output).__name__}{shape} without features (examples, dim). Pass the result of "
            "get_image_features or get_text_features."
        )
    return features
