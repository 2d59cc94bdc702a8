import csv
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig, SiglipImageProcessor, SiglipModel

from hf_dl.data import zero_shot
from hf_dl.models.clip_features import encode_texts
from hf_dl.recipes import zero_shot_classifier
from hf_dl.recipes.clip import make_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(["a photo of red blue green cube sphere there is in this picture"])


def make_images(count=6, size=32):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def image_processor(kind=CLIPImageProcessor):
    size = {"shortest_edge": 32} if kind is CLIPImageProcessor else {"height": 32, "width": 32}
    crop = {"crop_size": {"height": 32, "width": 32}} if kind is CLIPImageProcessor else {}
    return kind(size=size, **crop)


def make_family(name, tokenizer):
    torch.manual_seed(0)
    text, image = SIZES | {"vocab_size": len(tokenizer)}, SIZES | {"image_size": 32, "patch_size": 16}
    if name == "clip":
        config = CLIPConfig(text_config=text | {"eos_token_id": 3}, vision_config=image, projection_dim=8)
        return CLIPModel(config), image_processor()
    text |= {"max_position_embeddings": 12}
    return SiglipModel(SiglipConfig(text_config=text, vision_config=image)), image_processor(SiglipImageProcessor)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def family(request, tokenizer):
    return make_family(request.param, tokenizer)


class TestFeatures:
    def test_features_equal_the_embeddings_of_the_model(self, family, tokenizer):
        model, processor = family
        images, texts = make_images(5), ["a red cube", "a photo of a blue sphere"]
        siglip = isinstance(model, SiglipModel)
        padding = {"padding": "max_length", "max_length": 12} if siglip else {"padding": True}
        tokens = tokenizer(texts, return_tensors="pt", **padding)
        if siglip:
            tokens.pop("attention_mask")
        with torch.no_grad():
            output = model.eval()(**tokens, **processor(images=images, return_tensors="pt"))
        found = zero_shot_classifier.encode_images(model, images, processor, batch_size=2)
        assert torch.allclose(found, output.image_embeds, atol=1e-5)
        assert torch.allclose(encode_texts(model, texts, tokenizer), output.text_embeds, atol=1e-5)
        assert torch.allclose(found.norm(dim=1), torch.ones(5))

    def test_a_text_has_the_same_features_in_any_batch(self, family, tokenizer):
        model, _ = family
        texts = ["cube", "a photo of a blue sphere", "there is a red cube in this picture"]
        alone = torch.cat([encode_texts(model, [text], tokenizer) for text in texts])
        assert torch.allclose(encode_texts(model, texts, tokenizer), alone, atol=1e-5)

    def test_the_features_of_a_class_are_the_mean_of_its_prompts(self, family, tokenizer):
        model, _ = family
        prompts = [["cube", "a cube"], ["a red sphere", "sphere"]]
        found = zero_shot_classifier.class_features(model, prompts, tokenizer)
        for features, texts in zip(found, prompts, strict=True):
            mean = encode_texts(model, texts, tokenizer).mean(0)
            assert torch.allclose(features, F.normalize(mean, dim=0), atol=1e-6)

    def test_nothing_to_encode_is_refused(self, family, tokenizer):
        with pytest.raises(ValueError, match="The list is empty"):
            encode_texts(family[0], [], tokenizer)


class TestZeroShot:
    def test_styles_are_names_templates_and_ensembles(self):
        assert zero_shot_classifier.find_templates("photo") == zero_shot.PROMPTS["photo"]
        both = zero_shot_classifier.find_templates("plain+photo + a drawing of {a}")
        assert both == (*zero_shot.PROMPTS["plain"], *zero_shot.PROMPTS["photo"], "a drawing of {a}")
        with pytest.raises(ValueError, match="unknown part 'foto'. Choose from plain, photo"):
            zero_shot_classifier.find_templates("plain+foto")

    def test_scores_and_class_rows(self, tmp_path):
        result = zero_shot_classifier.ZeroShotResult(
            names=["cat", "dog", "owl"],
            labels=torch.tensor([0, 0, 1, 1]),
            seen=torch.tensor([True, True, False, False]),
            predictions={"plain": torch.tensor([0, 1, 2, 2]), "photo": torch.tensor([0, 0, 1, 2])},
            top_5={"plain": torch.ones(4), "photo": torch.ones(4)},
        )
        assert result.scores() == {
            **{"plain_accuracy": 0.25, "plain_seen_accuracy": 0.5, "plain_unseen_accuracy": 0.0},
            **{"photo_accuracy": 0.75, "photo_seen_accuracy": 1.0, "photo_unseen_accuracy": 0.5},
            **{"images": 4.0, "unseen_images": 2.0},
        }
        rows = zero_shot_classifier.write_classes(result, tmp_path)
        assert rows == [
            ["class", "unseen", "images", "plain", "photo", "mistaken for"],
            ["cat", "no", "2", "0.5", "1.0", "dog"],
            ["dog", "yes", "2", "0.0", "0.5", "owl"],
            ["owl", "no", "0", "", "", ""],
        ]
        with open(tmp_path / "classes.csv", newline="") as file:
            assert list(csv.reader(file)) == rows

    def test_the_nearest_prompt_wins(self, tokenizer):
        model, processor = make_family("clip", tokenizer)
        images = make_images(4)
        names = datasets.ClassLabel(names=["red_cube", "blue_sphere"])
        features = datasets.Features(image=datasets.Image(), label=names)
        data = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1, 0]}, features=features)
        result = zero_shot_classifier.classify(model, processor, data, ["photo"], tokenizer=tokenizer)
        prompts = ["a photo of a red cube", "a photo of a blue sphere"]
        nearest = (
            zero_shot_classifier.encode_images(model, images, processor) @ encode_texts(model, prompts, tokenizer).T
        )
        assert torch.equal(result.predictions["photo"], nearest.argmax(1))
        assert result.names == ["red cube", "blue sphere"] and result.seen.all()
        assert list(result.scores()) == ["photo_accuracy", "images", "unseen_images"]


class TestLoading:
    def test_a_model_without_texts_is_refused(self, tmp_path):
        from hf_dl.models.image_vae import ImageVaeConfig, ImageVaeModel

        ImageVaeModel(ImageVaeConfig(image_size=8, hidden_sizes=[4], latent_size=2)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is a ImageVaeModel. Expected a model of images and texts"):
            zero_shot_classifier.load_clip(tmp_path)
        with pytest.raises(ValueError, match="is not a folder, and cannot be loaded"):
            zero_shot_classifier.load_clip(tmp_path / "missing")

    def test_a_tokenizer_of_another_model_is_refused(self, tokenizer, tmp_path):
        make_family("clip", tokenizer)[0].save_pretrained(tmp_path)
        CLIPImageProcessor().save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        zero_shot_classifier.load_clip(tmp_path)
        make_tokenizer([" ".join(f"word{i}" for i in range(99))]).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="The tokenizer has 103 tokens, but the model only"):
            zero_shot_classifier.load_clip(tmp_path)

    @pytest.mark.parametrize(("size", "expected"), [(64, 64), (224, 224), (16, 32), (336, 256), ([48, 64], 64)])
    def test_scenes_are_rendered_at_the_size_of_the_model(self, size, expected):
        config = SimpleNamespace(vision_config=SimpleNamespace(image_size=size))
        assert zero_shot_classifier.scene_size(SimpleNamespace(config=config)) == expected
