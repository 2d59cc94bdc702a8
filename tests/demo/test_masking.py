import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_dl.demo import masking
from hf_dl.demo.classifiers import Classifier
from hf_dl.explain import WAYS, attention_maps, fill_patches, ranked_patches

from ..spaces.pages import make_image
from .tiny import TINY_VIT, VIT_NAMES


class TestPatches:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [("", []), ("1", [0]), ("1-4, 9", [0, 1, 2, 3, 8]), ("9 2 - 3,3", [1, 2, 8]), ("16,,15", [14, 15])],
    )
    def test_parse(self, text, expected):
        assert masking.parse_patches(text, 16) == expected

    @pytest.mark.parametrize("text", ["0", "17", "4-2", "1-17"])
    def test_out_of_range(self, text):
        with pytest.raises(ValueError, match="is out of range. The patches are numbered from 1 to 16"):
            masking.parse_patches(text, 16)

    @pytest.mark.parametrize("text", ["x", "1;2", "-3", "1.5", "__import__('os')", "9" * 9])
    def test_no_patches(self, text):
        with pytest.raises(ValueError, match="is not a patch number. Write numbers and ranges"):
            masking.parse_patches(text, 16)

    @pytest.mark.parametrize("indices", [[], [0], [0, 1, 2], [0, 2, 3, 7, 14, 15], list(range(16))])
    def test_format_turns_parse_back(self, indices):
        assert masking.parse_patches(masking.format_patches(indices), 16) == indices

    def test_format(self):
        assert masking.format_patches([0, 1, 2, 3, 8]) == "1-4, 9"

    @pytest.mark.parametrize(("x", "y", "expected"), [(0, 0, 0), (99, 0, 4), (100, 50, 9), (20, 49, 6), (-1, -1, 0)])
    def test_patch_at(self, x, y, expected):
        assert masking.patch_at(x, y, (100, 50), (2, 5)) == expected


class TestChoice:
    attention = torch.arange(16.0).view(4, 4)

    @pytest.mark.parametrize(
        ("place", "expected"), [("top", [13, 14, 15]), ("bottom", [0, 1, 2]), ("chosen", [4]), ("center", [5, 6, 9])]
    )
    def test_mask(self, place, expected):
        mask = masking.Choice(place=place, count=3, patches="5").mask(self.attention)
        assert mask.flatten().nonzero()[:, 0].tolist() == expected

    def test_random_is_a_function_of_the_seed(self):
        first, again, other = (masking.Choice("random", 5, seed).mask(self.attention) for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other) and first.sum() == 5

    def test_refuses(self):
        with pytest.raises(ValueError, match="place='left' is unknown"):
            masking.Choice("left").mask(self.attention)
        with pytest.raises(ValueError, match="count=17 must be from 0 to 16"):
            masking.Choice("top", 17).mask(self.attention)


class TestCompare:
    def test_before_is_the_models_answer(self, vit):
        image = make_image()
        found = masking.compare(vit, image, masking.Choice())
        with torch.no_grad():
            logits = vit.model(vit.prepare(image)).logits[0]
        assert found.before[0][0] == VIT_NAMES[int(logits.argmax())]
        assert [p for _, p in found.before] == pytest.approx([p for _, p in vit.top(logits)])

    @pytest.mark.parametrize("way", WAYS)
    def test_nothing_taken_changes_nothing(self, vit, way):
        found = masking.compare(vit, make_image(), masking.Choice(way=way))
        assert [name for name, _ in found.after] == [name for name, _ in found.before]
        assert [p for _, p in found.after] == pytest.approx([p for _, p in found.before], abs=1e-6)
        assert found.rank == 1 and found.kl == pytest.approx(0, abs=1e-6) and found.patches == []

    def test_takes_the_most_attended(self, vit):
        image = make_image()
        for layer, head in ((1, masking.MEAN_HEAD), (3, 2)):
            found = masking.compare(vit, image, masking.Choice("top", 5, layer=layer, head=head))
            maps, _ = attention_maps(
                vit.model, vit.prepare(image), layer=layer - 1, head=None if head < 0 else head - 1
            )
            expected = ranked_patches(maps[0], 5).flatten().nonzero()[:, 0].tolist()
            assert found.patches == expected

    def test_after_is_the_answer_to_the_filled_image(self, vit):
        image, choice = make_image(), masking.Choice("center", 6, seed=3, way="noise")
        found = masking.compare(vit, image, choice)
        pixel_values = vit.prepare(image)
        mask = choice.mask(torch.zeros(4, 4))
        filled = fill_patches(pixel_values, mask, "noise", generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            logits = vit.model(filled).logits[0]
        assert dict(found.after)[found.before[0][0]] == pytest.approx(
            logits.softmax(-1)[VIT_NAMES.index(found.before[0][0])].item(), abs=1e-5
        )
        # and the picture shows the pixels and the noise that the model was given
        assert found.given.tobytes() == vit.show(filled, (384, 384)).tobytes()
        pixels = np.asarray(found.given)
        assert np.array_equal(pixels, pixels[::24, ::24].repeat(24, 0).repeat(24, 1))

    def test_hidden_and_dropped_are_the_same(self, vit):
        image = make_image()
        hidden, dropped = (
            masking.compare(vit, image, masking.Choice("top", 7, way=way)) for way in ("attention", "tokens")
        )
        assert [p for _, p in hidden.after] == pytest.approx([p for _, p in dropped.after], abs=1e-6)
        assert hidden.kl > 1e-4
        assert hidden.given.tobytes() == dropped.given.tobytes()
        visible = np.ones((4, 4), dtype=bool)
        visible.flat[hidden.patches] = False
        seen = visible.repeat(96, 0).repeat(96, 1)
        pixels = np.asarray(vit.show(vit.prepare(image), (384, 384)))
        assert np.array_equal(np.asarray(hidden.given)[seen], pixels[seen])

    @pytest.mark.parametrize("way", WAYS)
    def test_all_taken(self, vit, way):
        found = masking.compare(vit, make_image(), masking.Choice("bottom", 16, way=way))
        assert len(found.patches) == 16 and np.isfinite(found.kl)

    def test_the_former_label_is_always_listed(self, vit):
        for seed in range(20):
            found = masking.compare(vit, make_image(seed=seed), masking.Choice("random", 12, seed, way="black"))
            assert found.before[0][0] in dict(found.after)
            assert (found.rank == 1) == (found.after[0][0] == found.before[0][0])

    @pytest.mark.parametrize("size", [(60, 40), (16, 16), (1, 1)])
    def test_pictures_have_one_size(self, vit, size):
        found = masking.compare(vit, make_image(size), masking.Choice("top", 4))
        assert found.image.size == found.attention.size == found.given.size == (384, 384)

    def test_refuses(self, vit):
        for choice, message in (
            (masking.Choice(way="magic"), "way='magic' is unknown"),
            (masking.Choice(layer=9), "layer=8 must be"),
            (masking.Choice(head=3), "head=2 must be"),
        ):
            with pytest.raises(ValueError, match=message):
                masking.compare(vit, make_image(), choice)

    def test_a_vit_of_transformers(self):
        model = ViTForImageClassification(ViTConfig(**TINY_VIT, intermediate_size=24, num_labels=7)).eval()
        tiny = Classifier(model, ViTImageProcessor(size={"height": 16, "width": 16}), "vit")
        assert masking.sizes(tiny) == (3, 2, 16)
        assert len(masking.compare(tiny, make_image(), masking.Choice("top", 4, way="tokens")).patches) == 4
