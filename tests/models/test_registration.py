"""The table of models in hf_dl.models and its registrations."""

import importlib
import inspect
import json
from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig

import hf_dl.models

ROWS = {config.model_type: (config, models, processor) for config, models, processor in hf_dl.models.REGISTERED}


@pytest.mark.parametrize("model_type", ROWS)
def test_each_row_is_found_by_its_auto_classes(model_type, tmp_path):
    config_class, models, processor = ROWS[model_type]
    config = config_class()
    config.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is config_class
    for auto_class, model in models.items():
        assert getattr(transformers, auto_class.__name__) is auto_class
        assert auto_class._model_mapping[config_class] is model and model.config_class is config_class
    if processor is not None:
        # The folder's config alone is enough to find the class.
        processor().save_pretrained(tmp_path)
        assert type(AutoImageProcessor.from_pretrained(tmp_path)) is processor


@pytest.mark.parametrize("model_type", ROWS)
def test_each_class_of_ours_saves_its_code(model_type):
    config, models, processor = ROWS[model_type]
    assert config._auto_class == "AutoConfig"
    assert all(model._auto_class == auto_class.__name__ for auto_class, model in models.items())
    if processor is not None and processor.__module__.startswith("hf_dl"):
        assert processor._auto_class == "AutoImageProcessor"


@pytest.mark.parametrize("model_type", [name for name, row in ROWS.items() if row[2]])
def test_a_pipeline_runs_no_remote_code_and_does_not_ask_for_it(model_type, tmp_path, monkeypatch):
    questions, errors = [], []
    monkeypatch.setattr("builtins.input", questions.append)
    monkeypatch.setattr(transformers.pipelines.base.logger, "error", errors.append)
    config_class, models, processor_class = ROWS[model_type]
    config = config_class()
    for model_class in models.values():  # a model for a task comes last
        model = model_class(config)
    model.save_pretrained(tmp_path)
    processor_class().save_pretrained(tmp_path)
    names = {
        "AutoModel": "image-feature-extraction",
        "AutoModelForImageClassification": "image-classification",
        "AutoModelForImageSegmentation": "image-segmentation",
        "AutoModelForObjectDetection": "object-detection",
    }
    task = names[[*models][-1].__name__]
    found = transformers.pipeline(task, str(tmp_path))
    assert type(found.model) is model_class and type(found.image_processor) is processor_class
    assert not questions and not errors


def test_no_config_is_missing_from_the_table():
    found = set()
    for path in Path(hf_dl.models.__file__).parent.glob("*.py"):
        module = importlib.import_module(f"hf_dl.models.{path.stem}")
        found |= {
            value
            for _, value in inspect.getmembers(module, inspect.isclass)
            if issubclass(value, PreTrainedConfig) and value.model_type and value.__module__ == module.__name__
        }
    assert found == {config for config, _, _ in ROWS.values()}
    assert all(hasattr(hf_dl.models, name) for name in hf_dl.models.__all__)


@pytest.mark.parametrize("model_type", ROWS)
def test_no_field_has_a_name_under_which_transformers_expects_a_config(model_type):
    config_class = ROWS[model_type][0]
    config = config_class()
    assert config.get_text_config() is config
    assert all(type(config.get_text_config(**{side: True})) is config_class for side in ("encoder", "decoder"))
    taken = {"encoder", "decoder", "generator", "text_config", "text_encoder", "vision_config", "audio_config"}
    assert not taken & set(config.to_dict())


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("slot_autoencoder", {"encoder": "resnet18", "decoder": "pixel_shuffle"}),
        ("program_seq2seq", {"encoder": "bert"}),
    ],
)
def test_a_checkpoint_with_the_former_names_of_fields_loads(model_type, fields, tmp_path):
    config_class = ROWS[model_type][0]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **fields}))
    config = AutoConfig.from_pretrained(tmp_path)
    for name, value in fields.items():
        assert getattr(config, f"{name}_type") == value and name not in config.to_dict()
    assert config_class.from_dict(config.to_dict()).to_dict() == config.to_dict()
