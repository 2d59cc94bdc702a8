import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_dl.data.object_crops import CLASSES, crop_objects
from hf_dl.recipes import object_probe
from hf_dl.recipes.object_probe import ObjectProbe


class FixedConfig(PreTrainedConfig):
    model_type = "fixed_classifier"


class Fixed(PreTrainedModel):
    """Gives the class k of `logits` to a crop whose mean is k."""

    config_class = FixedConfig

    def __init__(self, config, logits):
        super().__init__(config)
        self.logits = nn.Parameter(logits)

    def forward(self, pixel_values):
        index = ((pixel_values + 1) * 127.5).mean((1, 2, 3)).round().long()
        return ImageClassifierOutput(logits=self.logits[index])


def make_probe(logits, names=CLASSES):
    config = FixedConfig(id2label=dict(enumerate(names)), label2id={name: k for k, name in enumerate(names)})
    _, processor = object_probe.make_model()
    return ObjectProbe(Fixed(config, logits), processor)


def plain(*shades):
    return torch.tensor(shades, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)


def test_the_color_is_the_sum_over_the_shapes():
    logits = torch.full((2, 32), -30.0)
    for name, probability in (("red cube", 0.4), ("blue cone", 0.3), ("blue sphere", 0.3)):
        logits[0, CLASSES.index(name)] = torch.tensor(probability).log()
    logits[1, CLASSES.index("gray cylinder")] = 0
    probe = make_probe(logits)
    boxes = torch.tensor([[10, 10, 20, 30], [0, 0, 8, 8]])
    assert probe(plain(0, 1), boxes) == {"color": ["blue", "gray"], "shape": ["cube", "cylinder"]}
    crops = crop_objects(plain(0, 1), boxes, size=32)
    assert probe.read(crops) == probe(plain(0, 1), boxes)


def test_the_accuracy_of_color_and_shape():
    probe = make_probe(torch.eye(32)[[CLASSES.index(name) for name in ("red cube", "red cone", "gray cone")]] * 50)
    labels = torch.tensor([CLASSES.index(name) for name in ("red cube", "red sphere", "blue cone")])
    batches = [{"image": plain(0, 1), "labels": labels[:2]}, {"image": plain(2), "labels": labels[2:]}]
    scores = object_probe.measure_accuracy(probe, batches)
    third = pytest.approx(1 / 3)
    assert scores == {
        "color_accuracy": pytest.approx(2 / 3), "shape_accuracy": pytest.approx(2 / 3), "color_error": third,
        "shape_error": third, "images": 3,
    }  # fmt: skip


def test_the_model_has_the_classes_of_the_crops(tmp_path):
    model, processor = object_probe.make_model()
    assert [model.config.id2label[number] for number in range(32)] == list(CLASSES)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = object_probe.load_probe(tmp_path)(plain(3), torch.tensor([[1, 1, 9, 9]]))
    assert found == ObjectProbe(model, processor)(plain(3), torch.tensor([[1, 1, 9, 9]]))


def test_other_classifiers_are_no_probes(tmp_path):
    with pytest.raises(ValueError, match="A class of the probe is 'cat'. Expected a color and a shape"):
        make_probe(torch.eye(2), names=("red cube", "cat"))
    with pytest.raises(ValueError, match="is not a folder, and cannot be loaded"):
        object_probe.load_probe(tmp_path / "nothing")


def test_a_missing_probe_is_trained_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = []

    def train(command):
        commands.append(command)
        for part in object_probe.make_model():
            part.save_pretrained(object_probe.FOLDER)

    monkeypatch.setattr(object_probe, "run_training", train)
    for _ in range(2):
        assert object_probe.find_probe("", tmp_path / "scripts").values["shape"] == [
            "cone", "cube", "cylinder", "sphere",
        ]  # fmt: skip
    script = str(tmp_path / "scripts" / "train_probe.py")
    assert commands == [["accelerate", "launch", script, "--output_dir", "runs/train_probe"]]
    assert "Training the probe of objects in runs/train_probe" in capsys.readouterr().err
    assert object_probe.find_probe("runs/train_probe", tmp_path).values.keys() == {"color", "shape"}
