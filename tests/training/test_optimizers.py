import pytest
import torch
from torch import nn

from hf_dl.training.optimizers import JoinedOptimizer


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear = nn.Embedding(6, 4, sparse=True), nn.Linear(4, 3)

    def optimizers(self):
        return [
            torch.optim.AdamW(self.linear.parameters(), lr=0.1, weight_decay=0.1),
            torch.optim.SparseAdam(self.embedding.parameters(), lr=0.1),
        ]

    def loss(self, step):
        return self.linear(self.embedding(torch.tensor([step % 6, 2]))).square().sum()


def test_it_steps_as_its_parts_do_also_after_a_reload_and_with_another_rate():
    one, other, third = Pair(), Pair(), Pair()
    parts, joined = one.optimizers(), JoinedOptimizer(other.optimizers())
    for step in range(8):
        for optimizer in (*parts, joined):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (1 + step)
        one.loss(step).backward()
        other.loss(step).backward()
        for optimizer in (*parts, joined):
            optimizer.step()
        if step == 3:  # a fresh optimizer continues from the saved state
            state, weights = joined.state_dict(), other.state_dict()
            third.load_state_dict(weights)
            other, joined = third, JoinedOptimizer(third.optimizers())
            joined.load_state_dict(state)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.linear.weight, Pair().linear.weight)
    assert len(joined.state) == 3 and joined.state is joined.optimizers[1].state


def test_a_closure_is_called_and_its_loss_returned():
    pair = Pair()
    joined = JoinedOptimizer(pair.optimizers())
    before = pair.linear.weight.clone()

    def closure():
        loss = pair.loss(0)
        loss.backward()
        return loss

    assert joined.step(closure).item() > 0 and not torch.equal(pair.linear.weight, before)


def test_parts_must_be_and_be_disjoint():
    pair = Pair()
    with pytest.raises(ValueError, match="optimizers is empty"):
        JoinedOptimizer([])
    with pytest.raises(ValueError, match="more than one parameter group"):
        JoinedOptimizer([*pair.optimizers(), torch.optim.SGD(pair.linear.parameters(), lr=0.1)])
