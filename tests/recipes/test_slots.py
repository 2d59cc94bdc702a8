import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import adjusted_rand_score

from hf_dl.data.image_arrays import ImageTensors
from hf_dl.metrics import perceptual
from hf_dl.metrics.images import default_features, fid
from hf_dl.models.slot_autoencoder import SlotAutoencoderConfig, SlotAutoencoderModel
from hf_dl.models.slot_library import SlotLibrary
from hf_dl.recipes import slots
from hf_dl.recipes.scene_images import to_pixel_values

TINY = {
    "encoder_channels": [8], "encoder_strides": [2], "token_dim": 8, "num_slots": 4, "slot_dim": 8, "slot_mlp_dim": 8,
    "decoder_channels": [8], "decoder_size": 4, "prune_error": 0.0, "num_iterations": 3,
}  # fmt: skip


def make_model(size=16, **options):
    torch.manual_seed(0)
    model = SlotAutoencoderModel(SlotAutoencoderConfig(image_size=size, **{**TINY, **options}))
    with torch.no_grad():  # masks of a new model are nearly uniform, so the largest one depends on rounding
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def make_batches(sizes=(4, 4, 3), size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for count in sizes:
        image = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
        mask = torch.randint(0, 4, (count, 4, 4), generator=generator, dtype=torch.uint8)
        batches.append({"image": image, "mask": mask.repeat_interleave(4, 1).repeat_interleave(4, 2)})
    batches[0]["mask"][1] = batches[0]["mask"][1].clamp(max=1)  # a single object: no foreground ARI
    return batches


class TestEvaluate:
    def test_scores_against_loops(self):
        model, batches = make_model(frames=False, decoder_type="pixel_shuffle"), make_batches()
        scores, masks = slots.evaluate(model, batches, prune=False)  # random masks: one slot alone explains the most
        images = torch.cat([batch["image"] for batch in batches]).numpy() / 127.5 - 1
        truth = torch.cat([batch["mask"] for batch in batches]).numpy()
        with torch.no_grad():
            output = model.eval()(torch.tensor(images, dtype=torch.float32), prune=False)
            posterior = model.posterior(torch.tensor(images, dtype=torch.float32), output).argmax(1).numpy()
        segments = {"posterior": posterior, "decoder": output.masks.argmax(1).numpy(), "attention": []}
        pixels, centers = np.arange(16), 2 * np.arange(8)  # of a convolution of stride 2
        for attention in output.attentions[-1].numpy():
            rows = [[np.interp(pixels, centers, row) for row in slot.reshape(8, 8)] for slot in attention]
            maps = [np.stack([np.interp(pixels, centers, c) for c in np.stack(r).T], axis=1) for r in rows]
            segments["attention"].append(np.float32(maps).argmax(0))  # half of 1 and half of 1e-9 count as equal
        for name, found in segments.items():
            every = [adjusted_rand_score(t.ravel(), p.ravel()) for t, p in zip(truth, found, strict=True)]
            objects = [
                adjusted_rand_score(t[t > 0], p[t > 0])
                for t, p in zip(truth, found, strict=True)
                if len(np.unique(t[t > 0])) > 1
            ]
            assert scores[f"{name}_ari"] == pytest.approx(np.mean(every), abs=1e-9)
            assert scores[f"{name}_fg_ari"] == pytest.approx(np.mean(objects), abs=1e-9)
            assert len(objects) == 10
        assert len({len(np.unique(p)) for p in segments["decoder"]} - {1}) > 0  # more than one slot owns pixels
        assert (scores["images"], scores["images_without_fg_ari"]) == (11, 1)
        loss = ((output.reconstruction.numpy() - images) ** 2).mean()
        assert scores["loss"] == pytest.approx(loss, rel=1e-5)
        variance = ((images - images.mean((0, 2, 3), keepdims=True)) ** 2).mean()
        assert scores["explained_variance"] == pytest.approx(1 - loss / variance, rel=1e-4)
        with torch.no_grad():
            pixel_values = to_pixel_values(batches[0]["image"])  # rounded as in `evaluate`
            one_draw = model(pixel_values, num_draws=1, prune=False).masks
        torch.testing.assert_close(masks, one_draw, rtol=0, atol=1e-5)

    def test_a_perfect_and_a_constant_reconstruction(self):
        """Explained variance is 1 for the images themselves, 0 for their mean color."""
        model, batches = make_model(), make_batches()
        images = torch.cat([batch["image"] for batch in batches]) / 127.5 - 1
        mean = images.mean((0, 2, 3), keepdim=True)
        for rate, expected in ((0.0, 1.0), (1.0, 0.0), (0.5, 0.75)):
            handle = model.register_forward_hook(
                lambda _, inputs, output, rate=rate: output.__setitem__(
                    "reconstruction", inputs[0].lerp(mean.expand_as(inputs[0]), rate)
                )
            )
            scores, _ = slots.evaluate(model, batches)
            handle.remove()
            assert scores["explained_variance"] == pytest.approx(expected, abs=1e-5)

    def test_the_scores_do_not_depend_on_the_batches(self):
        model = make_model()
        whole = {name: torch.cat([batch[name] for batch in make_batches()]) for name in ("image", "mask")}
        one, _ = slots.evaluate(model, [whole])
        three, _ = slots.evaluate(model, make_batches())
        assert three == pytest.approx(one, rel=1e-5)

    def test_all_that_it_uses_is_gathered(self):
        model, batches = make_model(), make_batches()
        alone, masks = slots.evaluate(model, batches)

        def twice(values):
            return torch.cat([values, values]) if isinstance(values, torch.Tensor) else tuple(map(twice, values))

        scores, gathered = slots.evaluate(model, batches, gather=twice)
        assert scores["images"] == 22
        assert scores["decoder_fg_ari"] == pytest.approx(alone["decoder_fg_ari"])
        assert scores["explained_variance"] == pytest.approx(alone["explained_variance"], rel=1e-5)
        # all processes have to judge alike whether the slots have bound
        assert torch.equal(gathered, torch.cat([masks, masks]))

    def test_options_reach_the_model(self):
        model, batches = make_model(), make_batches()
        _, masks = slots.evaluate(model, batches, num_slots=6, num_iterations=1)
        assert masks.shape[1] == 6
        longer, _ = slots.evaluate(model, batches, num_iterations=5)
        assert longer["loss"] != slots.evaluate(model, batches)[0]["loss"]

    def test_it_is_an_evaluation(self):
        model = make_model().train()
        first, _ = slots.evaluate(model, make_batches())
        assert not model.training
        assert slots.evaluate(model, make_batches())[0] == first


class TestPictures:
    def test_draw_slots(self, tmp_path):
        batch = make_batches()[0]
        path = slots.draw_slots(make_model(), batch["image"], tmp_path / "slots.png")
        sheet = Image.open(path)
        assert sheet.size == (round((3 + 4) * 1.1 * 120), round((4 * 1.1 + 0.25) * 120))
        red, green, blue = batch["image"][2, :, 8, 8].tolist()  # a pixel of the third input, 16 of them on 0.97 * 132
        x, y = int(8.5 / 16 * 128), int(30 + 2 * 132 + 8.5 / 16 * 128)
        assert sheet.convert("RGB").getpixel((x, y)) == (red, green, blue)

    def test_compose(self, tmp_path):
        model = make_model()
        train, test = (self.tensors(count, seed) for count, seed in ((70, 1), (12, 2)))
        metrics = slots.compose(model, train, test, tmp_path)
        (name,) = {key.removeprefix("reconstruction_") for key in metrics if key.startswith("reconstruction_fid")}
        assert metrics.keys() == {f"{way}_{name}" for way in ("reconstruction", "per_cluster", "background_aware")} | {
            "composed_images",
            "reconstruction_perceptual",
        }
        assert metrics["composed_images"] == 12
        images = test.__getitems__(range(12))["image"]
        with torch.no_grad():
            painted = model(images / 127.5 - 1).reconstruction
        painted = ((painted / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        expected = fid(images, painted, features=default_features())[name]
        assert metrics[f"reconstruction_{name}"] == pytest.approx(expected, rel=1e-3)
        distance = perceptual.load("random")(painted / 127.5 - 1, images / 127.5 - 1)
        assert metrics["reconstruction_perceptual"] == pytest.approx(distance.mean().item(), rel=1e-3)
        library = SlotLibrary.from_pretrained(tmp_path / "slot_library")
        assert len(library.background_clusters) == 4
        assert int(library.object_counts.sum()) == 70  # every training image is counted
        with Image.open(tmp_path / "compositions.png") as sheet:  # real, reconstructed, and two ways to compose
            assert sheet.size == (round((8 * 1.1 + 0.25) * 120), round((4 * 1.1 + 0.02) * 120))
        assert slots.compose(model, train, test, tmp_path) == pytest.approx(metrics)  # seeded

    @staticmethod
    def tensors(count, seed):
        (batch,) = make_batches((count,), seed=seed)
        rows = {
            "image": [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch["image"]],
            "mask": [Image.fromarray(mask.numpy()) for mask in batch["mask"]],
        }
        features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
        return ImageTensors(datasets.Dataset.from_dict(rows, features))
