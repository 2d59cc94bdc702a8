"""What an image classifier looked at: maps of where its evidence is, and tests of them by taking evidence away.

- `grad_cam`: Grad-CAM of any network, several layers at once
- `attention`: CLS attention, rollout and gradient rollout of vision transformers, from their queries and keys
- `masking`: patches taken away as pixels, from the attention or as tokens; what the label becomes; deletion curves
- `scores`: how well a map agrees with the known mask of the object
- `calls`: what these have in common: how a model is called, and where its tokens lie

Models are any `nn.Module` from pixel values (batch, channels, height, width) to logits (batch, classes), bare or in an
output of transformers with `logits`. They are explained in evaluation mode and left in the mode they were in.
"""

from .attention import AttentionOutput, attention_maps, gradient_rollout, record_attention, rollout
from .calls import class_logits, default_layers, find_blocks, normalize, token_grid, upsample
from .grad_cam import GradCamOutput, grad_cam
from .masking import (
    PLACES,
    WAYS,
    CurveOutput,
    center_patches,
    curve,
    fill_patches,
    masked_logits,
    masking_report,
    random_patches,
    ranked_patches,
)
from .scores import pointing_game, share_inside

__all__ = [
    "PLACES",
    "WAYS",
    "AttentionOutput",
    "CurveOutput",
    "GradCamOutput",
    "attention_maps",
    "center_patches",
    "class_logits",
    "curve",
    "default_layers",
    "fill_patches",
    "find_blocks",
    "grad_cam",
    "gradient_rollout",
    "masked_logits",
    "masking_report",
    "normalize",
    "pointing_game",
    "random_patches",
    "ranked_patches",
    "record_attention",
    "rollout",
    "share_inside",
    "token_grid",
    "upsample",
]
