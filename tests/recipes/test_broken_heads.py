import pytest
import torch

from hf_dl.models.layers_heads import make_head
from hf_dl.recipes.broken_heads import MISTAKES, find_mistake


@pytest.fixture(scope="module")
def landings():
    """Accuracy of each mistake after a short training on classes that are easy to tell apart; chance is 0.01."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(100, 256, generator=generator)

    def draw(count):
        labels = torch.randint(100, (count,), generator=generator)
        return 0.3 * (centers[labels] + 1.5 * torch.randn(count, 256, generator=generator)).relu(), labels

    hidden, labels = draw(6000)
    test, truth = draw(1000)
    found = {}
    for name, mistake in MISTAKES.items():
        torch.manual_seed(0)
        options = {"cutoffs": [20, 60], "div_value": 1.0} if mistake.head == "adaptive" else {}
        wrong = mistake.make(make_head(mistake.head.partition(":")[0], 256, 100, **options)).train()
        optimizer = torch.optim.Adam(wrong.parameters(), lr=2e-3)
        for first in [*range(0, 6000, 128)] * 2:
            optimizer.zero_grad()
            wrong(hidden[first : first + 128], labels[first : first + 128]).backward()
            optimizer.step()
        with torch.no_grad():
            found[name] = (wrong.eval().log_prob(test).argmax(1) == truth).double().mean().item()
    return found


@pytest.mark.filterwarnings("ignore:hidden looks like probabilities")
def test_mistakes_land_where_they_are_said_to(landings):
    right = {name.removeprefix("none_"): value for name, value in landings.items() if name.startswith("none_")}
    assert min(right.values()) > 0.5
    for name in ("softmax_before_hierarchical", "softmax_before_adaptive", "all_nodes", "permuted_labels"):
        assert landings[name] < 0.06, name
    assert landings["mean_over_path"] > 0.8 * right["hierarchical"]
    assert landings["sampled_evaluation"] < 0.8 * right["gumbel"]
    assert landings["starved_ranks"] < 0.7 * right["adaptive"]
    assert landings["sample_into_cross_entropy"] < 0.7 * right["gumbel"]


def test_an_unknown_mistake_is_an_error():
    with pytest.raises(ValueError, match="mistake='all_leaves' is unknown. Choose one of: none_softmax, none_gumbel"):
        find_mistake("all_leaves")
