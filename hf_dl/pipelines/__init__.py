"""Pipelines from raw input to final answer, for tasks without a pipeline in transformers or diffusers."""
