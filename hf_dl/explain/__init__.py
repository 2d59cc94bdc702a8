"""Explanations of image classifiers: maps of evidence, pictures made from layers, and tests of the explanations.

`explain(model, image, method=..., target=...)` calls each method of `METHODS`. The methods by file:

- `grad_cam`: Grad-CAM for any network and several layers
- `attention`: CLS attention, rollout and gradient rollout of vision transformers
- `backprop`: gradient, deconvolution, guided backpropagation, integrated gradients and SmoothGrad
- `occlusion`: drop of a class logit if a window covers part of the image
- `optimization`: images of a class or a neuron, and images with the same features
- `adversarial`: adversarial examples by FGSM and PGD, with success rates
- `filters`: raw filters of the first layer
- `patches`: patches of a data set that activate a channel most, cut out by the receptive field
- `codes`: map of a data set by the codes of a layer, and nearest neighbors
- `masking`: predictions without some patches, removed as pixels, from the attention or as tokens; deletion curves
- `sanity`: comparison of maps with the maps of random networks
- `scores`: agreement of a map with the known mask of the object
- `arithmetic`: sizes, parameters, multiply-adds, memory and receptive fields of any network, with their formulas
- `calls`, `layer_reader`, `backward_rules`: shared code: calling a model, reading a layer, other backward passes

A model is any `nn.Module` that maps pixel values (batch, channels, height, width) to logits (batch, classes). It may
return the logits or an output of transformers with `logits`. Models run in evaluation mode, and their modes are
restored afterwards.
"""

from .adversarial import ATTACKS, AdversarialOutput, fgsm, pgd
from .arithmetic import Arithmetic, Row, arithmetic
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
from .layer_reader import LayerReader, spread_layers
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
from .methods import MAP_METHODS, METHODS, Explanation, Method, explain
from .occlusion import OcclusionOutput, occlusion
from .optimization import (
    Ascent,
    OptimizedOutput,
    activation_maximization,
    class_model,
    class_score,
    feature_inversion,
)
from .patches import PatchesOutput, receptive_fields, top_patches
from .sanity import SanityOutput, sanity_check
from .scores import pointing_game, share_inside

__all__ = [
    "ATTACKS",
    "MAP_METHODS",
    "METHODS",
    "PLACES",
    "WAYS",
    "AdversarialOutput",
    "Ascent",
    "Arithmetic",
    "AttentionOutput",
    "AttributionOutput",
    "CodesOutput",
    "CurveOutput",
    "Explanation",
    "FiltersOutput",
    "GradCamOutput",
    "LayerReader",
    "Method",
    "OcclusionOutput",
    "OptimizedOutput",
    "PatchesOutput",
    "SanityOutput",
    "activation_maximization",
    "Row",
    "arithmetic",
    "attention_maps",
    "center_patches",
    "class_logits",
    "class_model",
    "class_score",
    "collect_codes",
    "curve",
    "deconvolution",
    "default_layers",
    "explain",
    "feature_inversion",
    "fgsm",
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
    "pgd",
    "pointing_game",
    "project_codes",
    "random_patches",
    "ranked_patches",
    "raw_filters",
    "receptive_fields",
    "record_attention",
    "rollout",
    "sanity_check",
    "share_inside",
    "smooth_grad",
    "spread_layers",
    "thumbnail_map",
    "token_grid",
    "top_patches",
    "upsample",
]
