"""Everything that travels with a checkpoint, and the one list of it: importing this registers the Auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from .slot_autoencoder import SlotAutoencoderConfig, SlotAutoencoderModel, SlotImageProcessor

AutoConfig.register("slot_autoencoder", SlotAutoencoderConfig)
AutoModel.register(SlotAutoencoderConfig, SlotAutoencoderModel)
AutoImageProcessor.register(SlotAutoencoderConfig, image_processor_classes={"torchvision": SlotImageProcessor})

# Checkpoints carry their own code, so that they load with trust_remote_code=True where hf_dl is not installed.
SlotAutoencoderConfig.register_for_auto_class()
SlotAutoencoderModel.register_for_auto_class("AutoModel")
SlotImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["SlotAutoencoderConfig", "SlotAutoencoderModel", "SlotImageProcessor"]
