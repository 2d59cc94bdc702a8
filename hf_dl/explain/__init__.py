"""Explanations of image classifiers: maps of the evidence for a class, and tests that remove parts of the image.

- `grad_cam`: Grad-CAM for any network and several layers
- `attention`: CLS attention, rollout and gradient rollout of vision transformers
- `backprop`: gradient, deconvolution, guided backpropagation, integrated gradients and SmoothGrad
- `occlusion`: drop of a class logit if a window covers part of the image
- `masking`: predictions without some patches, removed as pixels, from the attention or as tokens; deletion curves
- `scores`: agreement of a map with the known mask of the object
- `calls`: shared code: calling a model, and the positions of its tokens

A model is any `nn.Module` that maps pixel values (batch, channels, height, width) to logits (batch, classes). It may
return the logits or an output of transformers with `logits`. Models run in evaluation mode, and their modes are
restored afterwards.
"""

from .attention import AttentionOutput, attention_maps, gradient_rollout, record_attention, rollout
from .backprop import (
    AttributionOutput,
    deconvolution,
    gradient,
    guided_backprop,
    integrated_gradients,
    smooth_grad,
)
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
from .occlusion import OcclusionOutput, occlusion
from .scores import pointing_game, share_inside

__all__ = [
    "PLACES",
    "WAYS",
    "AttentionOutput",
    "AttributionOutput",
    "CurveOutput",
    "GradCamOutput",
    "OcclusionOutput",
    "attention_maps",
    "center_patches",
    "class_logits",
    "curve",
    "deconvolution",
    "default_layers",
    "fill_patches",
    "find_blocks",
    "grad_cam",
    "gradient",
    "gradient_rollout",
    "guided_backprop",
    "integrated_gradients",
    "masked_logits",
    "masking_report",
    "normalize",
    "occlusion",
    "pointing_game",
    "random_patches",
    "ranked_patches",
    "record_attention",
    "rollout",
    "share_inside",
    "smooth_grad",
    "token_grid",
    "upsample",
]
