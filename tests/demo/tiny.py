"""Tiny models for the tests of the demo pages."""

import math
from dataclasses import replace

import numpy as np
import torch
from transformers import CLIPImageProcessor, ViTImageProcessor

from hf_dl.data.caption_tokenizer import build_caption_tokenizer
from hf_dl.data.captions import COLORS, SHAPES
from hf_dl.demo.slots import make_explanation
from hf_dl.models.caption_processor import ImageCaptionerProcessor
from hf_dl.models.clip_segmenter import ClipSegmenterConfig, ClipSegmenterForImageSegmentation
from hf_dl.models.detection_processor import DetectionImageProcessor
from hf_dl.models.image_captioner import ImageCaptionerConfig, ImageCaptionerForConditionalGeneration
from hf_dl.models.norm_resnet import NormResNetConfig, NormResNetForImageClassification, image_processor
from hf_dl.models.slot_autoencoder import SlotAutoencoderConfig, SlotAutoencoderModel
from hf_dl.models.small_vit import SmallViTConfig, SmallViTForImageClassification, SmallViTImageProcessor
from hf_dl.pipelines.phrase_segmentation import PhraseSegmentationPipeline
from hf_dl.recipes.clip import make_tokenizer
from hf_dl.recipes.detection import METHODS

from ..pipelines.test_slot_diffusion import make_pipe

TINY_SLOTS = {
    "image_size": 16, "encoder_channels": [8], "encoder_strides": [2], "token_dim": 8, "num_slots": 4, "slot_dim": 8,
    "slot_mlp_dim": 8, "slot_init": "learned", "gradient": "bilevel", "decoder_type": "pixel_shuffle",
    "decoder_channels": [8], "decoder_size": 4,
}  # fmt: skip
TINY_VIT = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
TINY_DETECTORS = {
    "anchor_free": {"feature_size": 8},
    "yolo_v1": {"feature_size": 8, "grid_size": 4},
    "fast_rcnn": {"feature_size": 8, "hidden_size": 8, "roi_size": 2},
    "faster_rcnn": {"feature_size": 8, "hidden_size": 8, "roi_size": 2, "num_proposals": 20},
    "rcnn": {"feature_size": 8, "hidden_size": 8, "crop_size": 16},
    "sliding_window": {"widths": [4, 4, 4, 8], "hidden_size": 8, "window_sizes": [16, 31]},
}
SHAPE_NAMES = ["sphere", "cube", "cylinder", "cone"]
VIT_NAMES = ["cat", "dog", "bird", "fish", "cow", "hen", "fox"]


def make_slots(**options):
    torch.manual_seed(0)
    return SlotAutoencoderModel(SlotAutoencoderConfig(**{**TINY_SLOTS, **options})).eval()


def explain_perfectly(row, regions=None):
    """Explain a generated scene as a perfect model would: one slot for each region of its mask.

    Args:
        row: The scene.
        regions: For each slot, the values of the mask that it covers. By default, one for each value.
    """
    mask = torch.from_numpy(np.array(row["mask"]))
    regions = regions or [[value] for value in range(len(row["objects"]) + 1)]
    masks = torch.stack([torch.isin(mask, torch.tensor(values)) for values in regions]).float()
    slots = torch.randn(1, len(masks), 8, generator=torch.Generator().manual_seed(0))
    for slot, each in enumerate(masks):
        rows, columns = each.nonzero(as_tuple=True)
        slots[0, slot, -3:] = torch.tensor([columns.float().mean() / 192, rows.float().mean() / 192, 0.1])
    found = make_explanation(
        row["image"], slots=slots, masks=masks, contents=masks[:, None].expand(-1, 3, -1, -1), posterior=masks,
        reconstruction=None, made=("broadcast", None, None),
    )  # fmt: skip
    return replace(found, scene=row)


def make_slot_pipe():
    """Return a pipeline whose pictures depend on the slots more than with new weights."""
    pipe = make_pipe()
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "cross_attention" in name:
                parameter.mul_(100)
    return pipe


def save_resnet(folder, names=None, **options):
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(names))} if names else {"num_labels": 6}
    config = NormResNetConfig(n=1, widths=[4, 8, 8], image_size=16, **labels, **options)
    NormResNetForImageClassification(config).save_pretrained(folder)
    image_processor(config).save_pretrained(folder)
    return folder


def save_vit(folder):
    torch.manual_seed(0)
    labels = dict(enumerate(VIT_NAMES))
    config = SmallViTConfig(**TINY_VIT, intermediate_size=24, initializer_range=0.5, id2label=labels)
    SmallViTForImageClassification(config).save_pretrained(folder)
    SmallViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def save_detector(folder, method="anchor_free", names=SHAPE_NAMES, seed=0):
    """Save a detector of the ladder whose untrained scores differ between boxes."""
    torch.manual_seed(seed)
    step = METHODS[method]
    model = step.model(step.config(**step.fields, **TINY_DETECTORS[method], id2label=dict(enumerate(names))))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "output" in name and parameter.ndim == 4:
                parameter.mul_(20)
    model.save_pretrained(folder)
    count = 10 if step.num_proposals else 0
    DetectionImageProcessor(size={"height": 32, "width": 32}, num_proposals=count).save_pretrained(folder)
    return folder


def save_phrase_model(folder, seed=0, **fields):
    """Save a model of phrases that knows the words of scenes. Its probabilities differ between phrases and pixels."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer([" ".join(("a an", *COLORS, *SHAPES))], max_length=8)
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1}
    clip = {
        "projection_dim": 8,
        "text_config": {**tower, **text, "eos_token_id": 3},
        "vision_config": {**tower, "image_size": 16, "patch_size": 4},
    }
    options = {"layers": [0, 1], "reduce_dim": 16, "num_attention_heads": 2, "intermediate_size": 16, **fields}
    model = ClipSegmenterForImageSegmentation(ClipSegmenterConfig(clip=clip, **options))
    with torch.no_grad():
        model.clip.logit_scale.fill_(math.log(20))
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    PhraseSegmentationPipeline(model, tokenizer, CLIPImageProcessor(**size)).save_pretrained(folder)
    return folder


def make_gap(details=("rich", "poor"), temperatures=("learned", "0.5")):
    """Make recorded points of the modality gap, without (rich, 0.5)."""
    cells = []
    for detail in details:
        for temperature in temperatures:
            if (detail, temperature) == ("rich", "0.5"):
                continue
            views = {
                name: {
                    "scores": {"centroid_distance": size, "rmg": 0.5, "separability": 0.9, "accuracy": 0.75},
                    "images": [size, 0.1, size, -0.1],
                    "texts": [-size, 0.2, -size, 0.0],
                }
                for name, size in (("none", 0.8), ("centering", 0.1), ("rotation", 0.2), ("centered_rotation", 0.0))
            }
            scores = {"centroid_distance": [0.8, 0.01], "plain_accuracy": [0.7, 0.02]}
            cells.append(
                {"detail": detail, "temperature": temperature, "seeds": 3, "seed": 0, "scores": scores, "views": views}
            )
    return {"script": "train_clip.py", "commit": "0123456", "fitted_on": "5 <scenes>", "cells": cells}


def save_captioner(folder, **options):
    """Save a captioner with the words of generated scenes. Its attention and its captions depend on the image."""
    torch.manual_seed(0)
    captions = [
        "a large red metal cube and two small blue rubber spheres stand on a gray floor.",
        "a small green rubber cone stands to the left of a large purple metal cylinder, with a cyan cube nearby.",
    ]
    tokenizer = build_caption_tokenizer(captions)
    fields = {"feature_size": 8, "embedding_size": 8, "decoder_hidden_size": 16, "attention_size": 8, **options}
    config = ImageCaptionerConfig(vocab_size=len(tokenizer), image_size=32, max_caption_length=8, **fields)
    model = ImageCaptionerForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(2)
    model.save_pretrained(folder)
    ImageCaptionerProcessor(ViTImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder
