"""Explanations of image classifiers: maps of the evidence for a class, and tests that remove parts of the image.

- `grad_cam`: Grad-CAM for any network and several layers
- `attention`: CLS attention, rollout and gradient rollout of vision transformers
- `backprop`: gradient, deconvolution, guided backpropagation, integrated gradients and SmoothGrad
- `occlusion`: drop of a class logit if a window covers part of the image
- `filters`: raw filters of the first layer
- `patches`: patches of a data set that activate a channel most, cut out by the receptive field
- `codes`: map of a data set by the codes of a layer, and nearest neighbors
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
from .codes import CodesOutput, collect_codes, nearest_neighbors, project_codes, thumbnail_map
from .filters import FiltersOutput, raw_filters
from .grad_cam import GradCamOutput, grad_cam
from .layer_reader import LayerReader
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
from .patches import PatchesOutput, receptive_fields, top_patches
from .scores import pointing_game, share_inside

__all__ = [
    "PLACES",
    "WAYS",
    "AttentionOutput",
    "AttributionOutput",
    "CodesOutput",
    "CurveOutput",
    "FiltersOutput",
    "GradCamOutput",
    "LayerReader",
    "OcclusionOutput",
    "PatchesOutput",
    "attention_maps",
    "center_patches",
    "class_logits",
    "collect_codes",
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
    "nearest_neighbors",
    "normalize",
    "occlusion",
    "pointing_game",
    "project_codes",
    "random_patches",
    "ranked_patches",
    "raw_filters",
    "receptive_fields",
    "record_attention",
    "rollout",
    "share_inside",
    "smooth_grad",
    "thumbnail_map",
    "token_grid",
    "top_patches",
    "upsample",
]
