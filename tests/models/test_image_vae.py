import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from hf_dl.models import ImageVaeConfig, ImageVaeModel, ImageVaeProcessor
from hf_dl.models.image_vae import gaussian_kl
from tests.models.contract import SAME_CODE, ModelContract

TINY = {"image_size": 8, "latent_size": 3, "hidden_sizes": (12,), "widths": (4, 6), "hidden_size": 10}
SMALL = {"image_size": 8, "latent_size": 4, "hidden_sizes": (32,), "widths": (8, 16), "hidden_size": 32}


class TestConv(ModelContract):
    model_class = ImageVaeModel
    processor_class = ImageVaeProcessor
    auto_classes = ("AutoModel",)
    output_key = "reconstruction"
    overfit_learning_rate = 1e-2
    overfit_ratio = 0.4  # to tell eight images apart costs log 8 nats of KL at least

    def config(self):
        return ImageVaeConfig(**SMALL)

    def inputs(self, batch):
        draw = torch.Generator().manual_seed(batch)
        # black and white, as the entropy of grays would be a floor of the loss
        return {"pixel_values": torch.rand(batch, 1, 8, 8, generator=draw).round()}


class TestMlp(TestConv):
    skipped = SAME_CODE

    def config(self):
        return ImageVaeConfig(**SMALL, architecture="mlp")


class TestGaussianOfColors(TestConv):
    skipped = SAME_CODE
    slow = {"compiles_to_the_same_numbers": "the classes above compile both architectures"}

    def config(self):
        return ImageVaeConfig(**SMALL, num_channels=3, likelihood="gaussian", pixel_std=0.25, num_blocks=0)

    def inputs(self, batch):
        draw = torch.Generator().manual_seed(batch)
        return {"pixel_values": torch.rand(batch, 3, 8, 8, generator=draw).round()}


def build(**fields):
    torch.manual_seed(0)
    return ImageVaeModel(ImageVaeConfig(**{**TINY, "architecture": "mlp", **fields})).eval()


@pytest.fixture
def images():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def moments(rows=4, size=3):
    draw = torch.randn(2, rows, size, generator=generator(2))
    return draw[0], draw[1]


# --- the two terms ---------------------------------------------------------------------------------------------------


def test_the_kl_is_that_of_torch_distributions():
    mean, log_variance = moments()
    posterior, prior = Normal(mean, (0.5 * log_variance).exp()), Normal(torch.zeros(4, 3), torch.ones(4, 3))
    torch.testing.assert_close(gaussian_kl(mean, log_variance), kl_divergence(posterior, prior))
    assert (gaussian_kl(torch.zeros(2), torch.zeros(2)) == 0).all()


def test_the_kl_is_the_mean_of_log_ratios_of_draws():
    mean, log_variance = moments()
    many = 40_000
    latents = ImageVaeModel.draw(mean.expand(many, -1, -1), log_variance.expand(many, -1, -1), generator=generator())
    posterior, prior = Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)
    ratios = posterior.log_prob(latents) - prior.log_prob(latents)
    error = ratios.std(dim=0) / many**0.5
    assert ((ratios.mean(dim=0) - gaussian_kl(mean, log_variance)).abs() < 5 * error).all()


def test_bernoulli_is_torch_s_binary_cross_entropy_summed_over_an_image(images):
    output = build()(images)
    expected = [
        F.binary_cross_entropy_with_logits(logits, image, reduction="sum")
        for logits, image in zip(output.logits, images, strict=True)
    ]
    torch.testing.assert_close(output.reconstruction_loss, torch.stack(expected))
    white = images.round()
    likelihood = Independent(Bernoulli(logits=output.logits), 3).log_prob(white)
    torch.testing.assert_close(build().log_likelihood(white, output.logits), likelihood)


def test_the_cross_entropy_of_grays_is_the_mean_over_images_made_black_and_white(images):
    model = build()
    logits = model(images).logits
    many = 4000
    drawn = torch.bernoulli(images.expand(many, -1, -1, -1, -1), generator=generator())
    losses = Independent(Bernoulli(logits=logits), 3).log_prob(drawn).neg()
    error = losses.std(dim=0) / many**0.5
    assert ((losses.mean(dim=0) - model(images).reconstruction_loss).abs() < 5 * error).all()


@pytest.mark.parametrize("pixel_std, factor", [(0.5**0.5, 1.0), (1.0, 0.5)])
def test_gaussian_is_the_summed_squared_error_times_a_factor(images, pixel_std, factor):
    model = build(likelihood="gaussian", pixel_std=pixel_std)
    output = model(images)
    squares = (output.reconstruction - images).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(output.reconstruction_loss, factor * squares)
    density = Independent(Normal(output.reconstruction, pixel_std), 3).log_prob(images)
    torch.testing.assert_close(model.log_likelihood(images, output.logits), density)


def test_the_default_gaussian_loss_is_squared_error_plus_kl(images):
    output = build(likelihood="gaussian")(images, generator=generator())
    squares = (output.reconstruction - images).square().sum() / len(images)
    torch.testing.assert_close(output.loss, squares + output.kl.mean())


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_the_loss_adds_the_terms(images, beta):
    output = build(beta=beta)(images, generator=generator())
    torch.testing.assert_close(output.loss, (output.reconstruction_loss + beta * output.kl).mean())
    assert output.kl.shape == output.reconstruction_loss.shape == (5,)
    torch.testing.assert_close(output.kl, gaussian_kl(output.posterior_mean, output.posterior_log_variance).sum(dim=1))


# --- codes -----------------------------------------------------------------------------------------------------------


def test_gradients_pass_through_the_draw():
    mean, log_variance = (values.double().requires_grad_() for values in moments())
    latents = ImageVaeModel.draw(mean, log_variance, generator=generator(3))
    noise = torch.randn(4, 3, generator=generator(3), dtype=torch.float64)
    latents.square().sum().backward()
    torch.testing.assert_close(mean.grad, 2 * latents.detach())
    # d z / d log_variance = std * noise / 2
    torch.testing.assert_close(log_variance.grad, (latents * (0.5 * log_variance).exp() * noise).detach())


def test_codes_are_drawn_in_training_or_from_a_generator_and_else_the_mean(images):
    model = build()
    output = model(images)
    assert torch.equal(output.latents, output.posterior_mean)
    drawn = model(images, generator=generator(1)).latents
    assert torch.equal(drawn, model(images, generator=generator(1)).latents)
    assert not torch.equal(drawn, output.latents)
    assert not torch.equal(drawn, model(images, generator=generator(2)).latents)
    model.train()
    assert not torch.equal(model(images).latents, model(images).latents)


def test_encode_and_decode_are_the_two_halves(images):
    for architecture in ("mlp", "conv"):
        model = build(architecture=architecture)
        output = model(images)
        mean, log_variance = model.encode(images)
        assert torch.equal(mean, output.posterior_mean) and torch.equal(log_variance, output.posterior_log_variance)
        torch.testing.assert_close(model.decode(mean), output.reconstruction)
        torch.testing.assert_close(output.reconstruction, output.logits.sigmoid())


def test_samples_come_from_the_prior():
    model = build()
    samples = model.sample(6, generator=generator(4))
    codes = torch.randn(6, 3, generator=generator(4))
    torch.testing.assert_close(samples, model.decode(codes).detach())
    assert samples.shape == (6, 1, 8, 8) and not samples.requires_grad
    assert not torch.equal(samples, model.sample(6, generator=generator(5)))


def test_linear_interpolation_is_even():
    model = build()
    start, end = torch.zeros(2, 3), torch.tensor([[3.0, 0, 0], [0, 6.0, 3.0]])
    images = model.interpolate(start, end, 4)
    assert images.shape == (2, 4, 1, 8, 8)
    for step in range(4):
        torch.testing.assert_close(images[:, step], model.decode(end * step / 3).detach())


def test_spherical_interpolation_keeps_the_distance_from_the_origin():
    model = build()
    seen = []
    model.decoder.register_forward_pre_hook(lambda _, codes: seen.append(codes[0]))
    start, end = torch.tensor([[2.0, 0, 0], [1.0, 1, 1]]), torch.tensor([[0, 2.0, 0], [2.0, 2, 2]])
    model.interpolate(start, end, 3, mode="spherical")
    first, second = seen[0].unflatten(0, (2, 3))
    half = 2.0**0.5
    torch.testing.assert_close(first, torch.tensor([[2.0, 0, 0], [half, half, 0], [0, 2.0, 0]]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second, torch.tensor([[1.0] * 3, [1.5] * 3, [2.0] * 3]))  # parallel: linear


# --- the importance-weighted bound -----------------------------------------------------------------------------------


def test_the_bound_of_one_sample_is_the_elbo(images):
    model = build(likelihood="gaussian")
    many = images[:1].expand(4000, -1, -1, -1)
    bounds = model.importance_weighted_bound(many, 1, generator=generator())
    output = model(many, generator=generator(1))
    elbos = model.log_likelihood(many, output.logits) - output.kl
    error = ((bounds.var() + elbos.var()) / 4000) ** 0.5
    assert abs(bounds.mean() - elbos.mean()) < 5 * error


def test_the_bound_comes_to_log_p_of_a_model_that_can_be_integrated():
    """One latent: p(x) is an integral over a line."""
    model = build(latent_size=1)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(3)
    image = torch.rand(1, 1, 8, 8, generator=generator(1)).round()
    line = torch.linspace(-8, 8, 4001).view(-1, 1)
    with torch.no_grad():
        joint = model.log_likelihood(image.expand(4001, -1, -1, -1), model.decoder(line)) + Normal(0.0, 1.0).log_prob(
            line
        ).squeeze(1)
    truth = torch.logsumexp(joint, 0) + math.log(16 / 4000)
    bounds = [
        torch.cat([model.importance_weighted_bound(image, k, generator=generator(s)) for s in range(20)]).mean()
        for k in (1, 30, 1000)
    ]
    assert bounds[0] < bounds[1] < truth + 0.02
    assert abs(bounds[2] - truth) < 0.02


# --- sizes, range, processor -----------------------------------------------------------------------------------------


def test_the_mlp_is_784_400_20():
    model = ImageVaeModel(ImageVaeConfig(architecture="mlp"))
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    assert shapes == [(400, 784), (40, 400), (400, 20), (784, 400)]


def test_the_weights_begin_as_torch_s_own():
    model = build(architecture="conv", image_size=16, widths=(16, 24), hidden_size=40)
    for module in model.modules():
        if hasattr(module, "weight"):
            reference = module.weight[0].numel() ** -0.5
            assert module.weight.abs().max() <= reference and module.bias.abs().max() <= reference
            assert module.weight.std().item() == pytest.approx(reference / 3**0.5, rel=0.2)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"image_size": 30}, "image_size=30 must be a multiple of 4: it is halved for each of widths"),
        ({"num_channels": 2}, "num_channels=2 must be 1"),
        ({"latent_size": 0}, "latent_size=0 must be at least 1"),
        ({"hidden_sizes": []}, r"hidden_sizes=\[\] must be one or more numbers"),
        ({"widths": [8, 0]}, r"widths=\[8, 0\] must be one or more numbers, each at least 1"),
        ({"num_blocks": -1}, "num_blocks=-1 must be at least 0"),
        ({"pixel_std": 0.0}, "pixel_std=0.0 must be above 0"),
        ({"beta": -1.0}, "beta=-1.0 must be at least 0"),
        ({"likelihood": "poisson"}, "poisson"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, sentence):
    with pytest.raises((StrictDataclassError, ValueError), match=sentence):
        ImageVaeConfig(**fields)


def test_wrong_input_is_a_sentence(images):
    model = build()
    with pytest.raises(ValueError, match=r"has shape \(5, 8, 8\), expected \(batch, 1, 8, 8\); prepare images"):
        model(images[:, 0])
    with pytest.raises(ValueError, match=r"values from -1 to 1, expected \[0, 1\]"):
        model(images.round() * 2 - 1)
    with pytest.raises(ValueError, match=r"values from nan to nan"):
        model(images * float("nan"))
    with pytest.raises(ValueError, match=r"latents has shape \(2, 4\), expected \(batch, 3\)"):
        model.decode(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        model.sample(0)
    with pytest.raises(ValueError, match="num_steps=1 must be at least 2"):
        model.interpolate(torch.zeros(1, 3), torch.ones(1, 3), 1)
    with pytest.raises(ValueError, match="mode='cubic' is unknown; choose one of linear, spherical"):
        model.interpolate(torch.zeros(1, 3), torch.ones(1, 3), mode="cubic")
    with pytest.raises(ValueError, match=r"end has shape \(2, 3\), expected the shape of start, \(1, 3\)"):
        model.interpolate(torch.zeros(1, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="num_samples=0 must be at least 1"):
        model.importance_weighted_bound(images, 0)


def test_the_processor_makes_gray_as_pillow_does():
    colors = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(colors)
    processor = ImageVaeProcessor(size={"height": 8, "width": 8})
    gray = np.asarray(picture.convert("L")).astype(np.float32) / 255
    for given in (picture, colors, torch.from_numpy(colors).permute(2, 0, 1)):
        pixel_values = processor(given, return_tensors="pt")["pixel_values"]
        assert pixel_values.shape == (1, 1, 8, 8) and pixel_values.dtype == torch.float32
        assert np.allclose(pixel_values[0, 0].numpy(), gray)
    # gray images do not change
    for given in (picture.convert("L"), picture.convert("L").convert("RGB")):
        assert np.allclose(processor(given, return_tensors="pt")["pixel_values"][0, 0].numpy(), gray)
    with pytest.raises(ValueError, match="An image has 4 channels. Expected 1 or 3; convert it to RGB."):
        processor(np.zeros((4, 8, 8), np.uint8), input_data_format="channels_first", do_convert_rgb=False)
    color = ImageVaeProcessor(size={"height": 8, "width": 8}, do_grayscale=False)
    pixel_values = color(picture, return_tensors="pt")["pixel_values"]
    assert np.allclose(pixel_values[0].permute(1, 2, 0).numpy(), colors / 255)


def test_the_processor_resizes_and_keeps_its_settings(tmp_path):
    processor = ImageVaeProcessor(size={"height": 8, "width": 8}, do_grayscale=False)
    processor.save_pretrained(tmp_path)
    loaded = ImageVaeProcessor.from_pretrained(tmp_path)
    picture = Image.new("RGBA", (20, 30), (10, 20, 30, 255))
    pixel_values = loaded(picture, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 8, 8)
    assert torch.allclose(pixel_values[0, :, 0, 0], torch.tensor([10, 20, 30]) / 255)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_methods_run_in_half_precision(dtype, images):
    model, images = build(likelihood="gaussian").to(dtype), images.to(dtype)
    mean, _ = model.encode(images)
    assert mean.dtype == torch.float32
    assert model.sample(3, generator=generator()).dtype == model.decode(mean).dtype == dtype
    assert model.interpolate(mean[:1], mean[1:2]).isfinite().all()
    bound = model.importance_weighted_bound(images, 3, generator=generator())
    expected = model.float().importance_weighted_bound(images.float(), 3, generator=generator())
    torch.testing.assert_close(bound, expected, rtol=0.02, atol=0.5)
