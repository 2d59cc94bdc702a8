import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoTokenizer,
)

from hf_dl.data.surfaces import COLORS
from hf_dl.recipes import clip, clip_data

WORDS = ["a photo of red blue green cube sphere there is in this picture"]


def make_clip(tokenizer, seed=0):
    torch.manual_seed(seed)
    return clip.make_model(clip_flags(), tokenizer)


@pytest.fixture(scope="module")
def tokenizer():
    return clip.make_tokenizer(WORDS)


class TestTokenizer:
    def test_one_token_per_word_without_case_and_punctuation(self, tokenizer):
        ids = tokenizer("A Photo of a red-blue CUBE.")["input_ids"]
        names = tokenizer.convert_ids_to_tokens(ids)
        assert names == ["<start>", "a", "photo", "of", "a", "red", "blue", "cube", "<end>"]

    def test_an_unknown_word_is_one_token(self, tokenizer):
        assert tokenizer.convert_ids_to_tokens(tokenizer("a zebra")["input_ids"])[2] == "<unk>"

    def test_the_most_frequent_words_are_kept(self):
        small = clip.make_tokenizer(["b b b a c", "a c c c c"], vocab_size=2)
        assert set(small.get_vocab()) == {*clip.SPECIAL, "b", "c"}

    def test_it_is_saved_and_loaded_beside_a_model(self, tokenizer, tmp_path):
        make_clip(tokenizer).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        texts = ["a red cube", "a photo of a blue sphere, there"]
        expected = tokenizer(texts, padding=True)
        assert dict(loaded(texts, padding=True)) == dict(expected) and set(expected) == {"input_ids", "attention_mask"}
        assert loaded.model_max_length == 32 and loaded.eos_token_id == 3

    def test_long_texts_keep_the_end_token(self):
        short = clip.make_tokenizer(WORDS, max_length=4)
        ids = short("a photo of red cube", truncation=True)["input_ids"]
        assert len(ids) == 4 and ids[-1] == short.eos_token_id

    def test_texts_without_words_are_refused(self):
        with pytest.raises(ValueError, match="The captions have no words"):
            clip.make_tokenizer(["...", ""])


class TestModel:
    def test_text_features_are_read_at_the_end_token(self, tokenizer):
        """With an id of 2, CLIP would read them at the highest id, and words after the end token would count."""
        model = make_clip(tokenizer).eval()
        ids = tokenizer(["a red cube"], return_tensors="pt")["input_ids"]
        output = model.text_model(input_ids=ids)
        assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, -1])
        longer = torch.cat([ids, torch.full((1, 2), max(tokenizer.get_vocab().values()))], dim=1)
        features = [model.get_text_features(input_ids=each).pooler_output for each in (ids, longer)]
        assert torch.allclose(*features, atol=1e-6)

    def test_the_temperature_is_learned_or_fixed(self, tokenizer):
        args = clip_flags(temperature=None)
        learned = clip.make_model(args, tokenizer)
        assert learned.logit_scale.requires_grad and 1 / learned.logit_scale.exp().item() == pytest.approx(0.07)
        args.temperature = 0.5
        fixed = clip.make_model(args, tokenizer)
        assert not fixed.logit_scale.requires_grad and fixed.logit_scale.exp().item() == pytest.approx(2)

    def test_the_patch_embedding_is_frozen_if_asked(self, tokenizer):
        for freeze in (True, False):
            model = clip.make_model(clip_flags(freeze_patches=freeze), tokenizer)
            fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
            assert fixed == ({"vision_model.embeddings.patch_embedding.weight"} if freeze else set())

    def test_a_learned_temperature_is_clamped(self, tokenizer):
        model = clip.make_model(clip_flags(temperature=None), tokenizer)
        model.logit_scale.data.fill_(9.0)
        clip.clamp_temperature(model)
        assert model.logit_scale.exp().item() == pytest.approx(100)
        fixed = clip.make_model(clip_flags(temperature=0.001), tokenizer)
        clip.clamp_temperature(fixed)
        assert fixed.logit_scale.exp().item() == pytest.approx(1000, rel=1e-4)

    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [
            ({"patch_size": 5}, "image_size=32 must be a multiple of patch_size=5"),
            ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
            ({"hidden_size": 18, "num_heads": 4}, r"hidden size \(18\) is not a multiple"),
            ({"hidden_size": 8, "num_heads": 4}, "hidden_size=8 at least 8 and at least 4 x num_heads=4"),
            ({"patch_size": 32}, "image_size=32 must be at least 2 x patch_size=32"),
            ({"max_length": 2}, "max_length=2 must be at least 3"),
            ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ],
    )
    def test_sizes_that_do_not_fit_are_refused(self, flags, sentence):
        with pytest.raises(ValueError, match=sentence):
            clip.make_config(clip_flags(**flags), vocab_size=9)


def clip_flags(**changes):
    known = {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "text_layers": 1, "num_heads": 2}
    known |= {"projection_dim": 8, "image_size": 32, "max_length": 8, "vocab_size": 9, "temperature": None}
    known |= {"freeze_patches": True}
    return SimpleNamespace(**(known | changes))


class TestBatches:
    def test_each_image_gets_one_of_its_own_captions(self, tokenizer):
        texts = [["a red cube"], ["a blue sphere", "sphere", "a photo of a blue sphere"]]
        tokens = clip_data.CaptionTokens(texts, tokenizer)
        for index, choice, text in ((0, 0.99, "a red cube"), (1, 0.0, "a blue sphere"), (1, 0.5, "sphere")):
            found = tokens.pick(torch.tensor([index]), torch.tensor([choice]))
            assert {name: value.tolist() for name, value in found.items()} == dict(tokenizer([text]))
        both = tokens.pick(torch.tensor([1, 0]), torch.tensor([0.999, 0.0]))
        expected = tokenizer([texts[1][2], texts[0][0]], padding=True)
        assert {name: value.tolist() for name, value in both.items()} == dict(expected)

    def test_words_are_dropped_and_special_tokens_are_not(self, tokenizer):
        tokens = clip_data.CaptionTokens([["a red cube"], ["sphere"]], tokenizer)
        batch = tokens.pick(torch.tensor([0, 1]), torch.zeros(2))
        draws, kept = torch.tensor([[0.9, 0.1, 0.6, 0.1, 0.1, 0.3], [0.0] * 6]), torch.tensor([False, False])
        dropped = tokens.drop_words(batch, 0.5, draws, recolored=kept)
        names = [tokenizer.convert_ids_to_tokens(row) for row in dropped["input_ids"].tolist()]
        assert names == [
            ["<start>", "<unk>", "red", "<unk>", "<end>"],
            ["<start>", "<unk>", "<end>", "<pad>", "<pad>"],
        ]
        assert torch.equal(dropped["attention_mask"], batch["attention_mask"])

    def test_a_recolored_image_loses_the_color_words(self, tokenizer):
        tokens = clip_data.CaptionTokens([["a red cube"], ["a blue sphere"]], tokenizer)
        batch = tokens.pick(torch.tensor([0, 1]), torch.zeros(2))
        dropped = tokens.drop_words(batch, 0.0, torch.rand(2, 8), recolored=torch.tensor([True, False]))
        names = [tokenizer.convert_ids_to_tokens(row) for row in dropped["input_ids"].tolist()]
        assert names == [["<start>", "a", "<unk>", "cube", "<end>"], ["<start>", "a", "blue", "sphere", "<end>"]]
        assert set(COLORS) <= set(clip_data.COLOR_WORDS)

    def test_hues_rotate_and_grays_stay(self):
        pixels = torch.tensor([[200.0, 40, 30], [120, 120, 120]]).T[None, :, :, None].repeat(3, 1, 1, 1)
        draws = torch.full((3, 7), 0.5)
        draws[:, 6] = torch.tensor([0.5, 5 / 6, 0.5])  # by 0, by 120 degrees, and not asked for
        found = clip_data.vary_images(pixels, draws, recolored=torch.tensor([True, True, False]))
        assert torch.allclose(found[:, :, 1], pixels[:, :, 1], atol=1e-3)
        assert torch.allclose(found[0], pixels[0], atol=1e-3) and torch.equal(found[2], pixels[2])
        assert torch.allclose(found[1, :, 0, 0], torch.tensor([30.0, 200, 40]), atol=1e-3)  # red became green

    def test_shifts_move_each_image_and_repeat_its_border(self):
        image = torch.arange(9.0).view(1, 1, 3, 3).repeat(3, 3, 1, 1)
        draws = torch.full((3, 7), 0.5)
        draws[1, :2], draws[2, :2] = torch.tensor([0.0, 0.5]), torch.tensor([1.0, 1.0])
        same, down, corner = clip_data.vary_images(image, draws, shift=1)
        assert torch.allclose(same, image[0], atol=1e-5)
        expected = torch.tensor([[0.0, 1, 2], [0, 1, 2], [3, 4, 5]])
        assert torch.allclose(down, expected.expand(3, 3, 3), atol=1e-5)
        assert torch.allclose(corner[0], torch.tensor([[4.0, 5, 5], [7, 8, 8], [7, 8, 8]]), atol=1e-5)

    def test_the_zoom_changes_the_size(self):
        image = torch.zeros(2, 3, 16, 16)
        image[:, :, 4:12, 4:12] = 1
        draws = torch.full((2, 7), 0.5)
        draws[:, 2] = torch.tensor([0.0, 1.0])  # the zoom is 1 - 0.5 and 1 + 0.5
        large, small = clip_data.vary_images(image, draws, zoom=0.5).mean((1, 2, 3)).tolist()
        assert large == pytest.approx(1.0, abs=0.1) and small == pytest.approx(1 / 9, abs=0.02)

    def test_colors_keep_their_hue(self):
        color = torch.tensor([173.0, 35, 35]).view(1, 3, 1, 1)
        image = torch.cat([color.expand(1, 3, 2, 4), torch.full((1, 3, 2, 4), 180.0)], dim=2).repeat(64, 1, 1, 1)
        draws = torch.rand(64, 7, generator=torch.Generator().manual_seed(0))
        red, green, blue = clip_data.vary_images(image, draws, jitter=0.5)[:, :, 0, 0].T
        assert torch.allclose(green, blue, atol=1e-3) and (red > green).all()
        assert red.std() > 20 and torch.equal(clip_data.vary_images(image, draws), image)

    def test_the_draws_are_the_same_for_any_number_of_processes(self):
        def draws(processes, index):
            place = SimpleNamespace(num_processes=processes, process_index=index)
            args = SimpleNamespace(seed=1, batch_size=8)
            return clip_data.draw_for_batch(SimpleNamespace(args=args, accelerator=place, steps=3, restarts=0), 4)

        assert torch.equal(torch.cat([draws(2, 0), draws(2, 1)]), draws(1, 0))
        assert draws(1, 0).unique().numel() == 32


class TestPairScores:
    def test_the_loss_of_perfect_and_of_equal_features(self):
        perfect = clip.pair_scores(torch.eye(4), torch.eye(4), 100.0)
        assert perfect["loss"] < 1e-6 and perfect["centroid_distance"] == 0
        equal = F.normalize(torch.ones(4, 8) + 1e-6 * torch.eye(4, 8), dim=1)
        assert clip.pair_scores(equal, equal, 1.0)["loss"] == pytest.approx(math.log(4), abs=1e-4)

    def test_the_same_caption_counts_as_found(self):
        images, texts = torch.eye(3), torch.eye(3)[[1, 0, 2]]
        assert clip.image_recall(images, texts, ["a", "b", "c"]) == pytest.approx(1 / 3)
        assert clip.image_recall(images, texts, ["a", "a", "c"]) == 1
