import pytest
import torch

from hf_dl.models.recurrent_seq2seq import draw_forced, sequence_loss


def test_draws_of_a_step_do_not_depend_on_later_steps():
    ids = torch.zeros(4, 9, dtype=torch.long)
    whole = draw_forced(ids, 0.5, torch.Generator().manual_seed(0))
    first = draw_forced(ids[:, :3], 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(whole[:, :3], first) and 0 < whole.sum() < whole.numel()
    assert draw_forced(ids, 1.0) is None and not draw_forced(ids, 0.0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_a_mean_over_the_labels_or_over_a_given_number(dtype):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5).to(dtype), torch.tensor([[1, 4, -100], [0, -100, -100]])
    picked = -logits.float().log_softmax(-1)[[0, 0, 1], [0, 1, 0], [1, 4, 0]]
    torch.testing.assert_close(sequence_loss(logits, labels), picked.mean())
    torch.testing.assert_close(sequence_loss(logits, labels, torch.tensor(12)), picked.sum() / 12)
