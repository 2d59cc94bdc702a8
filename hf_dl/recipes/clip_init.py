"""Initialize a vision transformer so that it starts as a convolutional network.

A small vision transformer learns the shapes of small objects slowly, because it first has to learn that neighboring
patches belong together. Zheng et al. (2025, https://arxiv.org/abs/2505.19985) give it this bias by its initial weights
only: each head attends to the patch at a fixed offset, so that a layer mixes neighbors like a convolution does.

Differences from the paper:

* The weights of queries and keys are written down instead of fitted by gradient descent.
* The class token averages all patches, so that it can be used for pooling.
* The patch embedding has two kinds of filters: random edges in gray, and random mixtures of the mean color. The first
  layers of trained networks have both kinds (Krizhevsky et al. 2012, figure 3). With these filters, a shape has
  the same features in all colors, also in a color that the training images do not show it in.

On n patches per axis, the position y has the channels sin(w y) and cos(w y) for w = pi / n * (1, 3, 5, ...). The query
of a head with the offset d has sin(w (y + d)) and cos(w (y + d)). Its product with the key of position z is the sum of
cos(w (y + d - z)) over w. The sum is n / 2 for z = y + d, and 0 for all other z.
"""

import math
from collections.abc import Sequence

import torch
from transformers import CLIPTextModel, CLIPVisionModel

# Offsets (rows, columns) of the heads: the sides and the corners in turn. The residual has the patch itself.
OFFSETS = (
    ((0, 1), (0, -1), (1, 0), (-1, 0)),
    ((1, 1), (1, -1), (-1, 1), (-1, -1)),
)
PEAK = 24.0  # attention logit of the patch at the offset; all others have at most half of it
POSITION_SCALE = 4.0  # amplitude of the position channels
PATCH_SCALE = 0.5  # scale of the content, low enough that LayerNorm keeps the position of colorful patches


@torch.no_grad()
def init_like_convolution(vision: CLIPVisionModel, *, generator: torch.Generator | None = None) -> None:
    """Set the weights of an image encoder so that its attention layers start as convolutions.

    The first channels, at most half of them, hold the position of a patch, and all others its content. Values and
    outputs of the attention use the content only.

    Args:
        vision: The image encoder of a `CLIPModel`, `model.vision_model`.
        generator: Random number generator of the random weights.

    Raises:
        ValueError: If a head has fewer than four channels, the encoder has fewer than eight, or an image has one
            patch.
    """
    config = vision.config
    size, grid = config.hidden_size, config.image_size // config.patch_size
    head = size // config.num_attention_heads
    if head < 4 or size < 8 or grid < 2:
        raise ValueError(
            f"hidden_size={size} with {config.num_attention_heads} heads has {head} channels per head, and an image "
            f"has {grid}x{grid} patches. Expected hidden_size of at least 8, at least 4 channels and 2x2 patches."
        )
    half = grid // 2
    count = min(head // 4, half, size // 8)
    frequencies = [math.pi / grid * (2 * (k * half // count) + 1) for k in range(count)]
    positions = 4 * count  # channels: the sine and cosine of rows and columns for each frequency
    rows, columns = (each.flatten() for each in torch.meshgrid(*[torch.arange(float(grid))] * 2, indexing="ij"))

    embeddings = vision.embeddings
    waves = [wave(w * axis) for w in frequencies for axis in (rows, columns) for wave in (torch.sin, torch.cos)]
    embeddings.position_embedding.weight.zero_()  # also of the class token, which then attends to all patches equally
    embeddings.position_embedding.weight[1:, :positions] = POSITION_SCALE * torch.stack(waves, dim=1)
    patches = embeddings.patch_embedding.weight
    # three quarters of the content are edges in gray, without the mean, and the rest is the mean color of a patch
    gray = torch.empty_like(patches[:, :1]).normal_(std=1 / math.sqrt(patches[0].numel()), generator=generator)
    color = torch.empty_like(patches[:, :, :1, :1]).normal_(std=1 / math.sqrt(3), generator=generator)
    first = size - (size - positions) // 4
    patches.copy_(PATCH_SCALE * (gray - gray.mean((2, 3), keepdim=True)))
    patches[first:] = PATCH_SCALE * color[first:] / patches[0, 0].numel()
    patches[:positions] = 0
    embeddings.class_embedding.normal_(std=PATCH_SCALE, generator=generator)[:positions] = 0

    # LayerNorm gives a patch without content the squared length `size`, and each query and key gets a part of it
    scale = math.sqrt(PEAK * math.sqrt(head) / size)
    for number, layer in enumerate(vision.encoder.layers):
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
            linear.weight.zero_()
            linear.bias.zero_()
        offsets = OFFSETS[number % len(OFFSETS)]
        for index in range(config.num_attention_heads):
            for pair in range(2 * count):  # the sine and cosine of one frequency and one axis
                angle = frequencies[pair // 2] * offsets[index % len(offsets)][pair % 2]
                turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
                out, into = slice(index * head + 2 * pair, index * head + 2 * pair + 2), slice(2 * pair, 2 * pair + 2)
                attention.q_proj.weight[out, into] = scale * turn
                attention.k_proj.weight[out, into] = scale * torch.eye(2)
        attention.v_proj.weight[:, positions:].normal_(std=(size - positions) ** -0.5, generator=generator)
        attention.out_proj.weight[positions:].normal_(std=0.7 * size**-0.5, generator=generator)


@torch.no_grad()
def init_like_word_average(
    text: CLIPTextModel, special_ids: Sequence[int], *, generator: torch.Generator | None = None
) -> None:
    """Set the embeddings of a text encoder so that the features of a text start as an average over its words.

    Two texts that differ by one word then have different features from the first step, and the difference is the same
    in all texts. With the default weights, the end token hides the words, and CLIP first learns the difference of two
    shapes for each color apart.

    Args:
        text: The text encoder of a `CLIPModel`, `model.text_model`.
        special_ids: Ids of the tokens that are not words. Their embeddings are zero.
        generator: Random number generator of the embeddings of the words.
    """
    words = text.embeddings.token_embedding.weight
    words.normal_(generator=generator)
    words[list(special_ids)] = 0
