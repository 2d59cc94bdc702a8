"""Everything that travels with a checkpoint, and the one list of it: importing this registers the Auto classes.

What is built on diffusers is imported when it is first asked for: this file is part of importing transformers, which
diffusers imports in its turn.
"""

import importlib
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    ViTImageProcessor,
)

from .conv_classifier import ConvClassifierConfig, ConvClassifierForImageClassification, ConvClassifierModel
from .image_vae import ImageVaeConfig, ImageVaeModel, ImageVaeProcessor
from .norm_resnet import NormResNetConfig, NormResNetForImageClassification, NormResNetModel
from .program_seq2seq import ProgramSeq2SeqConfig, ProgramSeq2SeqForConditionalGeneration, beam_generate
from .recurrent_lm import RecurrentLMConfig, RecurrentLMForCausalLM, RecurrentLMModel
from .slot_autoencoder import (
    SlotAutoencoderConfig,
    SlotAutoencoderModel,
    SlotDecoderModel,
    SlotEncoderModel,
    SlotImageProcessor,
)
from .small_vit import SmallViTConfig, SmallViTForImageClassification, SmallViTImageProcessor, SmallViTModel

_WITH_DIFFUSERS = {
    "SlotUNetModel": "slot_unet",
    "decode_latents": "latent_autoencoder",
    "encode_latents": "latent_autoencoder",
    "make_autoencoder": "latent_autoencoder",
}


def __getattr__(name: str) -> Any:
    """Import what needs diffusers."""
    if name in _WITH_DIFFUSERS:
        return getattr(importlib.import_module(f".{_WITH_DIFFUSERS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


AutoConfig.register("slot_autoencoder", SlotAutoencoderConfig)
AutoModel.register(SlotAutoencoderConfig, SlotAutoencoderModel)
AutoImageProcessor.register(SlotAutoencoderConfig, image_processor_classes={"torchvision": SlotImageProcessor})

AutoConfig.register("image_vae", ImageVaeConfig)
AutoModel.register(ImageVaeConfig, ImageVaeModel)
AutoImageProcessor.register(ImageVaeConfig, image_processor_classes={"torchvision": ImageVaeProcessor})

AutoConfig.register("small_vit", SmallViTConfig)
AutoModel.register(SmallViTConfig, SmallViTModel)
AutoModelForImageClassification.register(SmallViTConfig, SmallViTForImageClassification)
AutoImageProcessor.register(SmallViTConfig, image_processor_classes={"torchvision": SmallViTImageProcessor})

AutoConfig.register("norm_resnet", NormResNetConfig)
AutoModel.register(NormResNetConfig, NormResNetModel)
AutoModelForImageClassification.register(NormResNetConfig, NormResNetForImageClassification)
AutoImageProcessor.register(NormResNetConfig, image_processor_classes={"torchvision": ViTImageProcessor})

AutoConfig.register("conv_classifier", ConvClassifierConfig)
AutoModel.register(ConvClassifierConfig, ConvClassifierModel)
AutoModelForImageClassification.register(ConvClassifierConfig, ConvClassifierForImageClassification)
AutoImageProcessor.register(ConvClassifierConfig, image_processor_classes={"torchvision": ViTImageProcessor})

AutoConfig.register("program_seq2seq", ProgramSeq2SeqConfig)
AutoModelForSeq2SeqLM.register(ProgramSeq2SeqConfig, ProgramSeq2SeqForConditionalGeneration)

AutoConfig.register("recurrent_lm", RecurrentLMConfig)
AutoModel.register(RecurrentLMConfig, RecurrentLMModel)
AutoModelForCausalLM.register(RecurrentLMConfig, RecurrentLMForCausalLM)

# Checkpoints carry their own code, so that they load with trust_remote_code=True where hf_dl is not installed.
SlotAutoencoderConfig.register_for_auto_class()
SlotAutoencoderModel.register_for_auto_class("AutoModel")
SlotImageProcessor.register_for_auto_class("AutoImageProcessor")
ImageVaeConfig.register_for_auto_class()
ImageVaeModel.register_for_auto_class("AutoModel")
ImageVaeProcessor.register_for_auto_class("AutoImageProcessor")
SmallViTConfig.register_for_auto_class()
SmallViTModel.register_for_auto_class("AutoModel")
SmallViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
SmallViTImageProcessor.register_for_auto_class("AutoImageProcessor")
NormResNetConfig.register_for_auto_class()
NormResNetModel.register_for_auto_class("AutoModel")
NormResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ConvClassifierConfig.register_for_auto_class()
ConvClassifierModel.register_for_auto_class("AutoModel")
ConvClassifierForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ProgramSeq2SeqConfig.register_for_auto_class()
ProgramSeq2SeqForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
RecurrentLMConfig.register_for_auto_class()
RecurrentLMModel.register_for_auto_class("AutoModel")
RecurrentLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "ConvClassifierConfig",
    "ConvClassifierForImageClassification",
    "ConvClassifierModel",
    "ImageVaeConfig",
    "ImageVaeModel",
    "ImageVaeProcessor",
    "NormResNetConfig",
    "NormResNetForImageClassification",
    "NormResNetModel",
    "ProgramSeq2SeqConfig",
    "ProgramSeq2SeqForConditionalGeneration",
    "RecurrentLMConfig",
    "RecurrentLMForCausalLM",
    "RecurrentLMModel",
    "SlotAutoencoderConfig",
    "SlotAutoencoderModel",
    "SlotDecoderModel",
    "SlotEncoderModel",
    "SlotImageProcessor",
    "SlotUNetModel",
    "SmallViTConfig",
    "SmallViTForImageClassification",
    "SmallViTImageProcessor",
    "SmallViTModel",
    "beam_generate",
    "decode_latents",
    "encode_latents",
    "make_autoencoder",
]
