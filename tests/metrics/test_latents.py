import pytest
import torch

from hf_dl.metrics.latents import active_units, posterior_collapse


def test_active_units_are_those_whose_means_vary():
    means = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.2, 0.05, 0.0])
    assert active_units(means + 1000.0).tolist() == [True, True, False, False]  # far from 0, as near it
    assert active_units(means, threshold=0.001).tolist() == [True, True, True, False]
    assert active_units(means, threshold=0.5).tolist() == [True, False, False, False]


def test_one_image_has_no_variance():
    with pytest.raises(ValueError, match=r"means has shape \(1, 4\). Expected \(images, latents\) of at least two"):
        active_units(torch.zeros(1, 4))


@pytest.mark.parametrize(
    "active, sentence",
    [(0, "has collapsed: none of the 20 latents"), (4, "4 of 20 latents depend"), (5, None), (20, None)],
)
def test_a_collapse_is_a_sentence(active, sentence):
    found = posterior_collapse(active, 20)
    assert found is None if sentence is None else sentence in found
