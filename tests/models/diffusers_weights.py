"""Copy weights of blocks of diffusers into our blocks, to compare the two."""

import torch


def copy(ours, theirs):
    """Copy a layer that both have."""
    ours.load_state_dict(theirs.state_dict())


def copy_residual(ours, theirs):
    for mine, name in (("norm1", "norm1"), ("time", "time_emb_proj"), ("norm2", "norm2"), ("conv2", "conv2")):
        copy(getattr(ours, mine), getattr(theirs, name))
    if ours.conv1 is not None:
        copy(ours.conv1, theirs.conv1)
    if theirs.conv_shortcut is not None:
        copy(ours.skip, theirs.conv_shortcut)


@torch.no_grad()
def copy_attention(ours, theirs):
    copy(ours.to_q, theirs.to_q)
    ours.to_kv.weight.copy_(torch.cat([theirs.to_k.weight, theirs.to_v.weight]))
    copy(ours.to_out, theirs.to_out[0])


def copy_block(ours, theirs):
    copy_attention(ours.self_attention, theirs.attn1)
    copy_attention(ours.cross_attention, theirs.attn2)
    for mine, other in (
        (ours.norm1, theirs.norm1),
        (ours.norm2, theirs.norm2),
        (ours.norm3, theirs.norm3),
        (ours.feed_in, theirs.ff.net[0].proj),
        (ours.feed_out, theirs.ff.net[2]),
    ):
        copy(mine, other)


def copy_transformer(ours, theirs):
    copy(ours.norm, theirs.norm)
    copy(ours.project_in, theirs.proj_in)
    copy(ours.project_out, theirs.proj_out)
    for mine, other in zip(ours.blocks, theirs.transformer_blocks, strict=True):
        copy_block(mine, other)


def copy_unet(ours, theirs):
    """Copy a `UNet2DConditionModel` of one level: with more, its resampling has no counterpart."""
    copy(ours.conv_in, theirs.conv_in)
    copy(ours.time_embedding.linear_1, theirs.time_embedding.linear_1)
    copy(ours.time_embedding.linear_2, theirs.time_embedding.linear_2)
    copy(ours.norm_out, theirs.conv_norm_out)
    copy(ours.conv_out, theirs.conv_out)
    for layers, block in (
        (ours.down_layers, theirs.down_blocks[0]),
        (ours.middle_layers, theirs.mid_block),
        (ours.up_layers, theirs.up_blocks[0]),
    ):
        for layer, residual in zip(layers, block.resnets, strict=True):
            copy_residual(layer.residual, residual)
        for layer, transformer in zip(layers, block.attentions, strict=False):  # the middle block has one layer less
            copy_transformer(layer.transformer, transformer)
