"""The models, and their registration with the Auto classes, which importing this package does.

Models that are built on diffusers are imported on first use: importing transformers imports this file, and diffusers
imports transformers.
"""

import importlib
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageSegmentation,
    AutoModelForImageTextToText,
    AutoModelForKeypointDetection,
    AutoModelForObjectDetection,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoVideoProcessor,
    ViTImageProcessor,
)

from .caption_processor import ImageCaptionerProcessor
from .classic_cnn import ClassicCNNConfig, ClassicCNNForImageClassification, ClassicCNNModel
from .clip_segmenter import ClipSegmenterConfig, ClipSegmenterForImageSegmentation
from .conv_classifier import ConvClassifierConfig, ConvClassifierForImageClassification, ConvClassifierModel
from .dense_detector import DenseDetectorConfig, DenseDetectorForObjectDetection
from .detection_processor import DetectionImageProcessor
from .image_captioner import ImageCaptionerConfig, ImageCaptionerForConditionalGeneration
from .image_vae import ImageVaeConfig, ImageVaeModel, ImageVaeProcessor
from .localizer import LocalizerConfig, LocalizerForKeypointDetection, LocalizerForObjectDetection
from .norm_resnet import NormResNetConfig, NormResNetForImageClassification, NormResNetModel
from .program_seq2seq import ProgramSeq2SeqConfig, ProgramSeq2SeqForConditionalGeneration, beam_generate
from .rcnn import RcnnConfig, RcnnForObjectDetection
from .recurrent_classifier import (
    RecurrentClassifierConfig,
    RecurrentClassifierModel,
    RecurrentForSequenceClassification,
    RecurrentForTokenClassification,
)
from .recurrent_lm import RecurrentLMConfig, RecurrentLMForCausalLM, RecurrentLMModel
from .sliding_window import SlidingWindowConfig, SlidingWindowForObjectDetection
from .slot_autoencoder import (
    SlotAutoencoderConfig,
    SlotAutoencoderForImageSegmentation,
    SlotAutoencoderModel,
    SlotDecoderModel,
    SlotEncoderModel,
    SlotImageProcessor,
)
from .small_vit import SmallViTConfig, SmallViTForImageClassification, SmallViTImageProcessor, SmallViTModel
from .two_stage_detector import TwoStageDetectorConfig, TwoStageDetectorForObjectDetection

# One row per model type: the config, the model for each Auto class, and the image processor if it has one.
REGISTERED = [
    (
        SlotAutoencoderConfig,
        {AutoModel: SlotAutoencoderModel, AutoModelForImageSegmentation: SlotAutoencoderForImageSegmentation},
        SlotImageProcessor,
    ),
    (ImageVaeConfig, {AutoModel: ImageVaeModel}, ImageVaeProcessor),
    (
        SmallViTConfig,
        {AutoModel: SmallViTModel, AutoModelForImageClassification: SmallViTForImageClassification},
        SmallViTImageProcessor,
    ),
    (
        NormResNetConfig,
        {AutoModel: NormResNetModel, AutoModelForImageClassification: NormResNetForImageClassification},
        ViTImageProcessor,
    ),
    (
        ConvClassifierConfig,
        {AutoModel: ConvClassifierModel, AutoModelForImageClassification: ConvClassifierForImageClassification},
        ViTImageProcessor,
    ),
    # The image processor is the one of CLIP, a class of transformers that AutoImageProcessor finds by its name.
    (ClipSegmenterConfig, {AutoModelForImageSegmentation: ClipSegmenterForImageSegmentation}, None),
    (
        ClassicCNNConfig,
        {AutoModel: ClassicCNNModel, AutoModelForImageClassification: ClassicCNNForImageClassification},
        ViTImageProcessor,
    ),
    (
        LocalizerConfig,
        {
            AutoModelForKeypointDetection: LocalizerForKeypointDetection,
            AutoModelForObjectDetection: LocalizerForObjectDetection,
        },
        DetectionImageProcessor,
    ),
    (
        DenseDetectorConfig,
        {AutoModelForObjectDetection: DenseDetectorForObjectDetection},
        DetectionImageProcessor,
    ),
    # The processor holds an image processor and a tokenizer, see below.
    (ImageCaptionerConfig, {AutoModelForImageTextToText: ImageCaptionerForConditionalGeneration}, None),
    (RcnnConfig, {AutoModelForObjectDetection: RcnnForObjectDetection}, DetectionImageProcessor),
    (
        SlidingWindowConfig,
        {AutoModelForObjectDetection: SlidingWindowForObjectDetection},
        DetectionImageProcessor,
    ),
    (ProgramSeq2SeqConfig, {AutoModelForSeq2SeqLM: ProgramSeq2SeqForConditionalGeneration}, None),
    (RecurrentLMConfig, {AutoModel: RecurrentLMModel, AutoModelForCausalLM: RecurrentLMForCausalLM}, None),
    (
        TwoStageDetectorConfig,
        {AutoModelForObjectDetection: TwoStageDetectorForObjectDetection},
        DetectionImageProcessor,
    ),
    (
        RecurrentClassifierConfig,
        {
            AutoModel: RecurrentClassifierModel,
            AutoModelForSequenceClassification: RecurrentForSequenceClassification,
            AutoModelForTokenClassification: RecurrentForTokenClassification,
        },
        None,
    ),
]

# `register_for_auto_class` saves the code of a class with each checkpoint, so that the checkpoint loads with
# trust_remote_code=True where hf_dl is not installed. ViTImageProcessor is part of transformers and needs no code.
for _config, _models, _processor in REGISTERED:
    AutoConfig.register(_config.model_type, _config)
    _config.register_for_auto_class()
    for _auto_class, _model in _models.items():
        _auto_class.register(_config, _model)
        _model.register_for_auto_class(_auto_class.__name__)
    if _processor is not None:
        AutoImageProcessor.register(_config, image_processor_classes={"torchvision": _processor})
        if _processor is not ViTImageProcessor:
            _processor.register_for_auto_class("AutoImageProcessor")
            # Every pipeline looks for a video processor, too. Without this entry, transformers expects one in the code
            # of the image processor, and asks at the terminal whether to run this code.
            AutoVideoProcessor.register(_config, None)

AutoProcessor.register(ImageCaptionerConfig, ImageCaptionerProcessor)
ImageCaptionerProcessor.register_for_auto_class("AutoProcessor")

_WITH_DIFFUSERS = {
    "SlotUNetModel": "slot_unet",
    "decode_latents": "latent_autoencoder",
    "encode_latents": "latent_autoencoder",
    "make_autoencoder": "latent_autoencoder",
}


def __getattr__(name: str) -> Any:
    """Import a name of `_WITH_DIFFUSERS` on first use."""
    if name in _WITH_DIFFUSERS:
        return getattr(importlib.import_module(f".{_WITH_DIFFUSERS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ClassicCNNConfig",
    "ClassicCNNForImageClassification",
    "ClassicCNNModel",
    "ClipSegmenterConfig",
    "ClipSegmenterForImageSegmentation",
    "ConvClassifierConfig",
    "ConvClassifierForImageClassification",
    "ConvClassifierModel",
    "DenseDetectorConfig",
    "DenseDetectorForObjectDetection",
    "DetectionImageProcessor",
    "ImageCaptionerConfig",
    "ImageCaptionerForConditionalGeneration",
    "ImageCaptionerProcessor",
    "ImageVaeConfig",
    "ImageVaeModel",
    "ImageVaeProcessor",
    "LocalizerConfig",
    "LocalizerForKeypointDetection",
    "LocalizerForObjectDetection",
    "NormResNetConfig",
    "NormResNetForImageClassification",
    "NormResNetModel",
    "ProgramSeq2SeqConfig",
    "ProgramSeq2SeqForConditionalGeneration",
    "RcnnConfig",
    "RcnnForObjectDetection",
    "RecurrentClassifierConfig",
    "RecurrentClassifierModel",
    "RecurrentForSequenceClassification",
    "RecurrentForTokenClassification",
    "RecurrentLMConfig",
    "RecurrentLMForCausalLM",
    "RecurrentLMModel",
    "SlidingWindowConfig",
    "SlidingWindowForObjectDetection",
    "SlotAutoencoderConfig",
    "SlotAutoencoderForImageSegmentation",
    "SlotAutoencoderModel",
    "SlotDecoderModel",
    "SlotEncoderModel",
    "SlotImageProcessor",
    "SlotUNetModel",
    "SmallViTConfig",
    "SmallViTForImageClassification",
    "SmallViTImageProcessor",
    "SmallViTModel",
    "TwoStageDetectorConfig",
    "TwoStageDetectorForObjectDetection",
    "beam_generate",
    "decode_latents",
    "encode_latents",
    "make_autoencoder",
]
