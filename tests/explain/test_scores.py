import pytest
import torch

from hf_dl.explain import pointing_game, share_inside


@pytest.fixture
def maps():
    maps = torch.zeros(2, 4, 4)
    maps[0, 1, 1], maps[0, 3, 3] = 3.0, 1.0
    maps[1, 0, 2], maps[1, 2, 2] = 1.0, 1.5
    return maps


def test_share_inside(maps):
    masks = torch.zeros(2, 4, 4, dtype=torch.int64)
    masks[0, :2, :2], masks[1, 0, 2] = 1, 7
    torch.testing.assert_close(share_inside(maps, masks), torch.tensor([0.75, 0.4]))
    constant = share_inside(torch.ones(2, 4, 4), masks)
    torch.testing.assert_close(constant, torch.tensor([4 / 16, 1 / 16]))
    assert share_inside(torch.zeros(1, 4, 4), masks[:1]).isnan().all()


def test_pointing_game(maps):
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, 1, 1] = masks[1, 0, 2] = True
    assert pointing_game(maps, masks).tolist() == [True, False]
    assert pointing_game(maps, masks, tolerance=1).tolist() == [True, False]
    assert pointing_game(maps, masks, tolerance=2).tolist() == [True, True]
    assert pointing_game(torch.ones(1, 4, 4), torch.ones(1, 4, 4)).tolist() == [False]


def test_what_does_not_fit_is_refused(maps):
    with pytest.raises(ValueError, match="masks has shape \\(4, 4\\) and maps \\(2, 4, 4\\). Expected the same shape"):
        share_inside(maps, torch.ones(4, 4))
    with pytest.raises(ValueError, match="tolerance=-1 must be at least 0"):
        pointing_game(maps, torch.ones(2, 4, 4), tolerance=-1)
