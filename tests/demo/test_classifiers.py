import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from hf_dl.demo.classifiers import Classifier, load_classifier

from ..spaces.pages import make_image

TINY = {
    "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "num_labels": 7,
}  # fmt: skip


def make_classifier(processor):
    config = ViTConfig(**TINY)
    return Classifier(ViTForImageClassification(config).eval(), processor, "tiny")


class TestLoadClassifier:
    def test_loads_model_and_processor(self, resnet):
        found = load_classifier(f" {resnet} ")
        assert not found.model.training and found.names == [f"LABEL_{i}" for i in range(6)]
        assert found.prepare(make_image()).shape == (1, 3, 16, 16)
        assert [list(x) for x in found.statistics] == [[0.5] * 3, [0.5] * 3]

    @pytest.mark.parametrize("name", ["/no/such/folder", "no-such-model", "nobody/no-such-model", "", "a/b/c", "<b>?"])
    def test_unknown(self, name, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="^The model .* (was not found|cannot be used)") as caught:
            load_classifier(name)
        assert "\n" not in str(caught.value)

    def test_another_kind(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(ValueError, match="model_type='bert', which is not an image classifier"):
            load_classifier(str(tmp_path))

    def test_without_a_head(self, tmp_path):
        ViTModel(ViTConfig(**TINY), add_pooling_layer=False).save_pretrained(tmp_path)
        ViTImageProcessor().save_pretrained(tmp_path)
        with pytest.raises(
            ValueError,
            match="is not a trained image classifier for this version of transformers and hf_dl: 2 of its tensors",
        ):
            load_classifier(str(tmp_path))

    def test_without_a_processor(self, resnet, tmp_path):
        shutil.copytree(resnet, tmp_path / "model")
        (tmp_path / "model" / "preprocessor_config.json").unlink()
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_classifier(str(tmp_path / "model"))

    def test_damaged(self, resnet, tmp_path):
        shutil.copytree(resnet, tmp_path / "model")
        weights = tmp_path / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_classifier(str(tmp_path / "model"))

    def test_nothing_is_unpickled(self, resnet, tmp_path):
        shutil.copytree(resnet, tmp_path / "model")
        weights = load_classifier(str(resnet)).model.state_dict()
        (tmp_path / "model" / "model.safetensors").unlink()
        torch.save(weights, tmp_path / "model" / "pytorch_model.bin")
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_classifier(str(tmp_path / "model"))

    def test_code_of_a_model_is_not_run(self, tmp_path):
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}})
        )
        (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
        with pytest.raises(ValueError, match="cannot be used"):
            load_classifier(str(tmp_path))
        assert not (tmp_path / "run").exists()


class TestClassifier:
    @pytest.mark.parametrize("size", [(60, 40), (40, 60), (384, 200), (16, 16)])
    def test_crop_is_what_a_center_crop_sees(self, size):
        found = make_classifier(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}))
        image = Image.linear_gradient("L").resize(size).rotate(0).convert("RGB")
        image.paste("red", (0, 0, size[0] // 2, size[1]))
        side = min(size)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        expected = image.crop((left, top, left + side, top + side)).resize((384, 384), Image.Resampling.BICUBIC)
        difference = np.abs(np.asarray(found.crop(image), int) - np.asarray(expected, int))
        assert difference.mean() < 6

    def test_crop_of_a_processor_that_squeezes(self):
        found = make_classifier(ViTImageProcessor(size={"height": 16, "width": 16}))
        image = make_image((60, 40))
        expected = np.asarray(image.resize((384, 384), Image.Resampling.BICUBIC), int)
        assert found.crop(image).size == (384, 384)
        assert np.abs(np.asarray(found.crop(image), int) - expected).mean() < 6

    def test_show_turns_the_input_back(self):
        found = make_classifier(ViTImageProcessor(size={"height": 16, "width": 16}))
        image = make_image((16, 16))
        assert np.asarray(found.show(found.prepare(image), (16, 16))).tolist() == np.asarray(image).tolist()

    @pytest.mark.parametrize(("side", "expected"), [(32, 384), (100, 400), (224, 448), (512, 512)])
    def test_pictures_are_multiples_of_the_input(self, side, expected):
        found = make_classifier(ViTImageProcessor(size={"height": side, "width": side}))
        assert found.crop(make_image()).size == (expected, expected)

    def test_find_class(self):
        found = make_classifier(ViTImageProcessor())
        assert found.find_class("LABEL_3") == found.find_class("3") == 3
        with pytest.raises(ValueError, match="label='7' is unknown. Choose one of: LABEL_0, .* or an index below 7"):
            found.find_class("7")

    def test_top(self):
        found = make_classifier(ViTImageProcessor())
        logits = torch.tensor([0.0, 5, 1, 2, 3, 4, -9])
        top = found.top(logits)
        assert [name for name, _ in top] == [f"LABEL_{i}" for i in (1, 5, 4, 3, 2)]
        assert top[0][1] == pytest.approx(logits.softmax(0)[1].item())
