"""hf_dl: the classic deep-learning systems, Hugging Face-native."""

__version__ = "0.1.0"
