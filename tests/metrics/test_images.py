import hashlib
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image, ImageFilter

import hf_dl.metrics.images as images_module
from hf_dl.metrics.images import (
    FeatureStatistics,
    InceptionFeatures,
    RandomConvFeatures,
    default_features,
    extract,
    fid,
    frechet_distance,
    resize,
)
from hf_dl.metrics.images_metric import FrechetDistance


def random_covariance(dim, seed, rank=None):
    factor = np.random.default_rng(seed).normal(size=(dim, rank or 2 * dim))
    return factor @ factor.T / factor.shape[1]


def frechet_distance_of_clean_fid(mu1, sigma1, mu2, sigma2):
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    return np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    mu1, mu2, a, b = rng.normal(size=5), rng.normal(size=5), rng.random(5), rng.random(5)
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(mu1, np.diag(a), mu2, np.diag(b)) == pytest.approx(expected, abs=1e-12)


def test_frechet_distance_equals_the_matrix_square_root():
    rng = np.random.default_rng(1)
    mu1, mu2 = rng.normal(size=(2, 40))
    sigma1, sigma2 = random_covariance(40, 2), random_covariance(40, 3)
    expected = frechet_distance_of_clean_fid(mu1, sigma1, mu2, sigma2)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_exact_for_singular_covariances():
    mu, sigma = np.zeros(200), random_covariance(200, 0, rank=20) * 1e4
    assert abs(frechet_distance(mu, sigma, mu, sigma)) < 1e-7
    # All variance in one of 200 dimensions: (3 - 1)^2.
    line = np.zeros((200, 200))
    line[0, 0] = 1
    assert frechet_distance(mu, 9 * line, mu, line) == pytest.approx(4, abs=1e-12)
    assert frechet_distance(mu, np.zeros((200, 200)), mu, line) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), r"mu2 has shape \(3,\). Expected \(2,\)"),
        ((np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)), r"sigma1 has shape \(3, 3\). Expected \(2, 2\)"),
        ((np.zeros((1, 2)), np.eye(2), np.zeros(2), np.eye(2)), r"mu1 has shape \(1, 2\)"),
        ((np.zeros(2), np.eye(2), np.array([np.nan, 0]), np.eye(2)), "mu2 has values that are not finite"),
    ],
)
def test_wrong_statistics_get_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(*arguments)


def test_streamed_statistics_equal_numpy_at_a_large_offset():
    features = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = features * torch.linspace(0.1, 3, 7) + 1e7
    statistics = FeatureStatistics()
    for batch in features.split([1, 300, 0, 699]):
        statistics.update(batch)
    assert statistics.count == 1000
    np.testing.assert_allclose(statistics.mean, features.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.numpy(), rowvar=False), atol=1e-7)


def test_statistics_refuse_what_does_not_fit():
    statistics = FeatureStatistics()
    statistics.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"The covariance needs at least 2 images; got 1"):
        _ = statistics.covariance
    with pytest.raises(ValueError, match=r"features has shape \(2, 4\). Expected \(batch, 3\)"):
        statistics.update(torch.zeros(2, 4))


@pytest.mark.parametrize(("shape", "size"), [((64, 64), 299), ((200, 100), 64), ((64, 64), 64)])
def test_resize_is_that_of_clean_fid(shape, size):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    ours = resize(image, size)
    assert ours.dtype == np.float32 and ours.shape == (size, size, 3)
    for channel in range(3):
        pil = Image.fromarray(image[:, :, channel].astype(np.float32))
        assert pil.mode == "F"
        np.testing.assert_array_equal(ours[:, :, channel], np.asarray(pil.resize((size, size), Image.BICUBIC)))


def test_resize_filters_when_it_shrinks():
    # One-pixel stripes average out; without the anti-aliasing filter they would alias to black or white.
    stripes = np.zeros((128, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize(stripes, 32)[8:-8, 8:-8] - 127.5).max() < 3


def test_random_conv_has_fixed_weights():
    features = RandomConvFeatures()
    digest = hashlib.sha256(b"".join(layer.weight.numpy().tobytes() for layer in features.layers)).hexdigest()
    assert digest.startswith("ba2bcf577c9dbc6b"), (
        "the numbers of fid_random_conv_v1 are no longer comparable: rename it"
    )
    assert not any(p.requires_grad for p in features.parameters())
    torch.manual_seed(1)
    assert torch.equal(features.layers[2].weight, RandomConvFeatures().layers[2].weight)
    assert torch.get_rng_state().equal(torch.manual_seed(1).get_state())


def blobs(n, seed, radius=(6, 12)):
    """Draw images of two colored circles on gray."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64]
    out = np.full((n, 64, 64, 3), 110, dtype=np.uint8)
    for image in out:
        for _ in range(2):
            (cy, cx), r = rng.integers(8, 56, 2), rng.integers(*radius)
            image[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = rng.integers(0, 256, 3)
    return out


def as_tensor(array):
    return torch.from_numpy(array.clip(0, 255).round().astype(np.uint8)).permute(0, 3, 1, 2)


def test_random_conv_ranks_damage_below_a_held_out_set():
    features = RandomConvFeatures()
    real, held_out = blobs(300, 0), blobs(300, 1)
    noise = np.random.default_rng(2).normal(size=held_out.shape)
    pil = [Image.fromarray(image) for image in held_out]

    def score(images):
        return fid(as_tensor(real), images, features=features)["fid_random_conv_v1"]

    good = score(as_tensor(held_out))
    worse = {
        "blur": score([image.filter(ImageFilter.GaussianBlur(1.5)) for image in pil]),
        "more blur": score([image.filter(ImageFilter.GaussianBlur(3)) for image in pil]),
        "noise": score(as_tensor(held_out + 15 * noise)),
        "more noise": score(as_tensor(held_out + 40 * noise)),
        "double exposure": score(as_tensor((held_out.astype(float) + held_out[::-1]) / 2)),
        "other sizes": score(as_tensor(blobs(300, 3, radius=(2, 5)))),
    }
    assert all(value > 1.5 * good for value in worse.values()), (good, worse)
    assert worse["more blur"] > worse["blur"] and worse["more noise"] > worse["noise"]


def test_fid_of_identical_sets_is_zero_and_states_the_numbers_of_images():
    images = as_tensor(blobs(20, 0))
    scores = fid(images, images, features=RandomConvFeatures())
    assert scores == {"fid_random_conv_v1": pytest.approx(0, abs=1e-9), "real_images": 20, "fake_images": 20}
    assert fid(images, images[:9], features=RandomConvFeatures())["fake_images"] == 9


def test_fid_is_that_of_numpy_statistics_of_all_features():
    features = RandomConvFeatures()
    sets = [as_tensor(blobs(n, seed)) for n, seed in ((150, 0), (70, 1))]
    values = [torch.cat(list(extract(images, features, batch_size=1000))).double().numpy() for images in sets]
    real, fake = [(x.mean(0), np.cov(x, rowvar=False)) for x in values]
    assert fid(*sets, features=features)["fid_random_conv_v1"] == pytest.approx(
        frechet_distance(*real, *fake), abs=1e-6
    )


def test_images_are_tensors_or_pil_of_any_mode_and_size():
    array = blobs(3, 0)
    features = RandomConvFeatures()
    expected = next(extract(as_tensor(array), features))
    pil = [Image.fromarray(image) for image in array]
    torch.testing.assert_close(next(extract(pil, features)), expected)
    torch.testing.assert_close(next(extract((image.convert("RGBA") for image in pil), features)), expected)
    sizes = [pil[0].resize((200, 90)), pil[1].convert("L")]
    assert next(extract(sizes, features)).shape == (2, 224)
    assert [len(batch) for batch in extract(as_tensor(blobs(10, 0)), features, batch_size=4)] == [4, 4, 2]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(4, 3, 64, 64), r"images has dtype torch.float32 and .* Expected uint8 \(n, 3, height, width\)"),
        (torch.zeros(4, 1, 64, 64, dtype=torch.uint8), r"shape \(4, 1, 64, 64\)"),
        (["a.png"], "images has a str. Expected PIL images"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "needs at least 2 images"),
        ([], "needs at least 2 images"),
    ],
)
def test_wrong_images_get_a_sentence(images, message):
    with pytest.raises(ValueError, match=message):
        fid(images, images, features=RandomConvFeatures())


def inception_stand_in(path):
    """A TorchScript file with the one attribute of the published one that is used."""

    class Layers(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.adaptive_avg_pool2d(x, 2)

    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = Layers()

        def forward(self, x):
            return self.layers(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and the published file is in its format
        torch.jit.save(torch.jit.script(Base()), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_inception_reads_the_weight_file_and_scales_as_clean_fid_does(tmp_path, monkeypatch):
    path = tmp_path / "inception-2015-12-05.pt"
    monkeypatch.setattr(images_module, "INCEPTION_SHA256", inception_stand_in(path))
    features = InceptionFeatures(path)
    white, black = torch.full((1, 3, 299, 299), 255.0), torch.zeros(1, 3, 299, 299)
    assert features(white).shape == (1, 12)
    assert features(white).unique().tolist() == [127 / 128] and features(black).unique().tolist() == [-1]
    assert "fid_inception" in fid(as_tensor(blobs(3, 0)), as_tensor(blobs(3, 1)), features=features)


def test_inception_is_never_downloaded_unasked_and_never_run_unchecked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("downloads"))
    with pytest.raises(FileNotFoundError, match="inception.pt' does not exist. Expected the Inception weights"):
        InceptionFeatures(tmp_path / "inception.pt")
    inception_stand_in(tmp_path / "inception.pt")
    with pytest.raises(ValueError, match="has SHA-256 .* Delete the file and use download=True"):
        InceptionFeatures(tmp_path / "inception.pt")


def test_default_features_are_inception_where_the_file_is_present(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "INCEPTION_PATH", tmp_path / "absent.pt")
    assert default_features().name == "random_conv_v1"
    monkeypatch.setattr(images_module, "INCEPTION_PATH", tmp_path / "present.pt")
    monkeypatch.setattr(images_module, "INCEPTION_SHA256", inception_stand_in(tmp_path / "present.pt"))
    assert default_features().name == "inception"


def test_evaluate_metric(tmp_path):
    metric = FrechetDistance(cache_dir=str(tmp_path))
    real, fake = blobs(6, 0), blobs(6, 1)
    metric.add_batch(predictions=list(fake[:4]), references=[Image.fromarray(x) for x in real[:4]])
    metric.add_batch(predictions=list(fake[4:]), references=list(real[4:]))
    expected = fid(as_tensor(real), as_tensor(fake), features=RandomConvFeatures())
    assert metric.compute(features=RandomConvFeatures()) == pytest.approx(expected)
    metric.add_batch(predictions=list(fake), references=list(real))
    assert metric.compute(features="random_conv_v1") == pytest.approx(expected)
    with pytest.raises(ValueError, match="features='resnet' is unknown. Choose one of: inception, random_conv_v1"):
        metric.compute(predictions=list(fake), references=list(real), features="resnet")


@pytest.mark.gpu
def test_cuda_gives_the_numbers_of_the_cpu():
    sets = [as_tensor(blobs(100, seed)) for seed in (0, 1)]
    cpu = fid(*sets, features=RandomConvFeatures())
    assert fid(*sets, features=RandomConvFeatures().cuda()) == pytest.approx(cpu, rel=1e-2)
