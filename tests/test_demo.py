import json
import os
import shutil
import time

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from hf_dl import demo
from hf_dl.models.norm_resnet import NormResNetConfig, NormResNetForImageClassification, image_processor

from .spaces.pages import HOSTILE, make_image, write_hostile, write_huge_png

TINY = {
    "image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "num_labels": 7,
}  # fmt: skip


class TestOpenImage:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_refuses_in_a_sentence(self, kind, tmp_path):
        path = tmp_path / "image.png"
        write_hostile(kind, path)
        with pytest.raises(ValueError, match=HOSTILE[kind]):
            demo.open_image(path)

    def test_refuses_between_the_two_limits_of_pillow(self, tmp_path):
        write_huge_png(tmp_path / "large.png", side=10_000)  # Pillow itself would only warn
        with pytest.raises(ValueError, match="more than 50 million pixels"):
            demo.open_image(tmp_path / "large.png")

    def test_refuses_a_file_cut_short(self, tmp_path):
        path = tmp_path / "cut.png"
        make_image((200, 200)).save(path)
        path.write_bytes(path.read_bytes()[:150])
        with pytest.raises(ValueError, match="not an image that can be read"):
            demo.open_image(path)

    @pytest.mark.parametrize(
        ("mode", "value", "expected"),
        [
            ("RGB", (200, 100, 50), (200, 100, 50)),
            ("L", 100, (100, 100, 100)),
            ("1", 1, (255, 255, 255)),
            ("LA", (100, 255), (100, 100, 100)),
            ("LA", (100, 0), (255, 255, 255)),
            ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
            ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ],
    )
    def test_reads_png_of_any_mode(self, mode, value, expected, tmp_path):
        Image.new(mode, (30, 20), value).save(tmp_path / "a.png")
        image = demo.open_image(tmp_path / "a.png")
        assert (image.mode, image.size, image.getpixel((3, 4))) == ("RGB", (30, 20), expected)

    def test_reads_16_bits_without_clipping(self, tmp_path):
        values = np.linspace(0, 65535, 256).astype(np.uint16)
        Image.fromarray(np.tile(values, (8, 1))).save(tmp_path / "deep.png")
        read = np.asarray(demo.open_image(tmp_path / "deep.png"))
        assert np.abs(read[0, :, 0].astype(int) - np.arange(256)).max() <= 1

    def test_reads_floats(self, tmp_path):
        values = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)
        Image.fromarray(values).save(tmp_path / "float.tiff")
        assert np.asarray(demo.open_image(tmp_path / "float.tiff"))[0, :, 0].tolist() == [0, 128, 255, 0]

    def test_reads_cmyk(self, tmp_path):
        Image.new("CMYK", (30, 20), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
        red, green, blue = demo.open_image(tmp_path / "a.jpg").getpixel((3, 4))
        assert red > 230 and green < 30 and blue < 30

    @pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
    def test_reads_the_first_picture_of_an_animation(self, suffix, tmp_path):
        first, second = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (30, 20), "blue")
        first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
        red, green, blue = demo.open_image(tmp_path / f"a.{suffix}").getpixel((3, 4))
        assert red > 240 and green < 15 and blue < 15

    def test_turns_a_photo_upright(self, tmp_path):
        image = make_image((60, 40))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
        image.save(tmp_path / "photo.png", exif=exif)
        expected = image.transpose(Image.Transpose.ROTATE_270)
        assert demo.open_image(tmp_path / "photo.png").tobytes() == expected.tobytes()

    @pytest.mark.parametrize(
        ("size", "expected"), [((4000, 1000), (384, 96)), ((5000, 1), (384, 1)), ((9, 7), (9, 7))]
    )
    def test_makes_large_images_small(self, size, expected, tmp_path):
        Image.new("RGB", size).save(tmp_path / "a.png")
        assert demo.open_image(tmp_path / "a.png").size == expected


def save_resnet(folder, **options):
    torch.manual_seed(0)
    config = NormResNetConfig(n=1, widths=[4, 8, 8], image_size=16, num_labels=6, **options)
    NormResNetForImageClassification(config).save_pretrained(folder)
    image_processor(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return save_resnet(tmp_path_factory.mktemp("resnet"))


def make_classifier(processor):
    config = ViTConfig(**TINY)
    return demo.Classifier(ViTForImageClassification(config).eval(), processor, "tiny")


class TestLoadClassifier:
    def test_loads_model_and_processor(self, resnet):
        found = demo.load_classifier(f" {resnet} ")
        assert not found.model.training and found.names == [f"LABEL_{i}" for i in range(6)]
        assert found.prepare(make_image()).shape == (1, 3, 16, 16)
        assert [list(x) for x in found.statistics] == [[0.5] * 3, [0.5] * 3]

    @pytest.mark.parametrize("name", ["/no/such/folder", "no-such-model", "nobody/no-such-model", "", "a/b/c", "<b>?"])
    def test_unknown(self, name, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="^The model .* (was not found|cannot be used)") as caught:
            demo.load_classifier(name)
        assert "\n" not in str(caught.value)

    def test_another_kind(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(ValueError, match="is a 'bert', which is no image classifier"):
            demo.load_classifier(str(tmp_path))

    def test_without_a_head(self, tmp_path):
        ViTModel(ViTConfig(**TINY), add_pooling_layer=False).save_pretrained(tmp_path)
        ViTImageProcessor().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is no trained image classifier of this version: 2 of its tensors"):
            demo.load_classifier(str(tmp_path))

    def test_without_a_processor(self, resnet, tmp_path):
        shutil.copytree(resnet, tmp_path / "model")
        (tmp_path / "model" / "preprocessor_config.json").unlink()
        with pytest.raises(ValueError, match="cannot be loaded"):
            demo.load_classifier(str(tmp_path / "model"))

    def test_damaged(self, resnet, tmp_path):
        shutil.copytree(resnet, tmp_path / "model")
        weights = tmp_path / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        with pytest.raises(ValueError, match="cannot be loaded"):
            demo.load_classifier(str(tmp_path / "model"))

    def test_nothing_is_unpickled(self, resnet, tmp_path):
        shutil.copytree(resnet, tmp_path / "model")
        weights = demo.load_classifier(str(resnet)).model.state_dict()
        (tmp_path / "model" / "model.safetensors").unlink()
        torch.save(weights, tmp_path / "model" / "pytorch_model.bin")
        with pytest.raises(ValueError, match="cannot be loaded"):
            demo.load_classifier(str(tmp_path / "model"))

    def test_code_of_a_model_is_not_run(self, tmp_path):
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}})
        )
        (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
        with pytest.raises(ValueError, match="cannot be used"):
            demo.load_classifier(str(tmp_path))
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

    def test_top(self):
        found = make_classifier(ViTImageProcessor())
        logits = torch.tensor([0.0, 5, 1, 2, 3, 4, -9])
        top = found.top(logits)
        assert [name for name, _ in top] == [f"LABEL_{i}" for i in (1, 5, 4, 3, 2)]
        assert top[0][1] == pytest.approx(logits.softmax(0)[1].item())


class TestNewestRun:
    def test_newest_of_the_kinds(self, resnet, tmp_path):
        assert demo.newest_run(tmp_path, ["norm_resnet"]) is None
        for age, name in enumerate(["new", "old", "new/best", "new/checkpoints/step_1"], start=-2):
            shutil.copytree(resnet, tmp_path / "runs" / name)
            then = time.time() + 1000 * age
            if "/" not in name:
                then = time.time() - 1000 * (age + 5)
            os.utime(tmp_path / "runs" / name / "model.safetensors", (then, then))
        assert demo.newest_run(tmp_path, ["norm_resnet"]) == str(tmp_path / "runs" / "new")
        assert demo.newest_run(tmp_path, ["small_vit"]) is None
        for broken in ("[]", "{", '"text"', "{}"):
            (tmp_path / "runs" / "new" / "config.json").write_text(broken)
            assert demo.newest_run(tmp_path, ["norm_resnet"]) == str(tmp_path / "runs" / "old")

    def test_a_part_of_a_pipeline_is_no_run(self, resnet, tmp_path):
        shutil.copytree(resnet, tmp_path / "runs" / "pipeline" / "encoder")
        (tmp_path / "runs" / "pipeline" / "model_index.json").write_text("{}")
        assert demo.newest_run(tmp_path, ["norm_resnet"]) is None

    @pytest.mark.parametrize("written", ['"Drawer"', '["drawer", "Drawer"]'])
    def test_newest_pipeline(self, written, tmp_path):
        assert demo.newest_pipeline(tmp_path, "Drawer") is None
        indices = dict.fromkeys(("new", "old", "new/best", "new/checkpoints/1"), f'{{"_class_name": {written}}}')
        indices |= {"other": '{"_class_name": "drawer"}', "broken": "{", "list": "[]", "empty": "{}"}
        for age, (name, text) in enumerate(indices.items()):
            path = tmp_path / "runs" / name / "model_index.json"
            path.parent.mkdir(parents=True)
            path.write_text(text)
            then = time.time() - 1000 * (age if age < 2 else -age)
            os.utime(path, (then, then))
        assert demo.newest_pipeline(tmp_path, "Drawer") == str(tmp_path / "runs" / "new")


class TestShelf:
    def make(self, root, check=lambda classifier: None):
        training = demo.Training("train_classifier.py", "x", scores={}, minutes="a minute", root=root)
        return demo.Shelf(["norm_resnet"], training, check)

    def test_environment_comes_first(self, resnet, tmp_path, monkeypatch):
        save_resnet(tmp_path / "runs" / "mine")
        monkeypatch.setenv("HF_DL_MODEL", str(resnet))
        shelf = self.make(tmp_path)
        assert shelf.ready and shelf.get().name == shelf.get("").name == str(resnet)
        monkeypatch.delenv("HF_DL_MODEL")
        assert self.make(tmp_path).get().name == str(tmp_path / "runs" / "mine")

    def test_none(self, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_DL_MODEL", raising=False)
        shelf = self.make(tmp_path)
        assert not shelf.ready and not shelf.problem and not shelf.can_train
        with pytest.raises(ValueError, match="There is no model yet"):
            shelf.get()

    def test_a_default_that_does_not_fit(self, resnet, tmp_path, monkeypatch):
        def refuse(classifier):
            raise ValueError("It is too small.")

        monkeypatch.setenv("HF_DL_MODEL", str(resnet))
        shelf = self.make(tmp_path, refuse)
        assert not shelf.ready and shelf.problem.endswith("does not fit this page (It is too small).")

    def test_keeps_the_default_and_the_latest_two(self, resnet, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_DL_MODEL", str(resnet))
        shelf = self.make(tmp_path)
        first = shelf.get()
        folders = [str(shutil.copytree(resnet, tmp_path / name)) for name in "abc"]
        models = [shelf.get(folder) for folder in folders]
        assert shelf.get() is first and shelf.get(folders[2]) is models[2] and shelf.get(folders[1]) is models[1]
        assert shelf.get(folders[0]) is not models[0]


class TestPieces:
    def test_a_message_is_no_html(self):
        def refuse():
            raise ValueError("<b>bold</b>")

        with pytest.raises(gr.Error, match="&lt;b&gt;") as caught:
            demo.event(refuse)()
        assert caught.value.print_exception is False

    def test_a_generator_is_shown_step_by_step(self):
        def count():
            yield from (1, 2)
            raise ValueError("There is no 3.")

        steps = demo.event(count, lambda number: number * 10)()
        assert (next(steps), next(steps)) == (10, 20)
        with pytest.raises(gr.Error, match="There is no 3") as caught:
            next(steps)
        assert caught.value.print_exception is False

    def test_a_generator_without_a_step_leaves_the_page_as_it_is(self):
        assert list(demo.event(lambda: (yield from ()))()) == [gr.skip()]

    def test_bars_are_no_html_of_the_model(self):
        text = demo.show_bars("Top", [("<img src=x onerror='y'>", 0.5), ("cat", 0.25)], "cat")
        assert "<img" not in text and "onerror='" not in text
        assert "width: 50.00%" in text and text.count("marked") == 1

    def test_names_are_no_markdown(self):
        assert demo.plain("a_b *c* <d>") == "a&#95;b &#42;c&#42; &#60;d&#62;"

    def test_examples_are_functions_of_the_seed(self):
        first, again, other = (demo.draw_examples.__wrapped__(seed, 2) for seed in (1, 1, 2))
        assert [x.image.tobytes() for x in first] == [x.image.tobytes() for x in again]
        assert first[0].image.tobytes() != other[0].image.tobytes()
        assert len({x.truth for x in first}) == 2 and first[0].image.size == (192, 192)

    def test_overlay_is_bright_where_the_map_is(self):
        heat = demo.resize_heat(np.array([[0.0, 1.0]]), (40, 40), smooth=False)
        picture = np.asarray(demo.overlay(Image.new("RGB", (40, 40), "gray"), heat)).mean(axis=-1)
        assert heat.shape == (40, 40) and picture[:, :20].max() < 100 < 150 < picture[:, 20:].min()
