"""The embedded scenes against geometry computed in another way, and their annotations against the mask."""

import numpy as np
import pytest

from hf_dl.data import scenes


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_boxes_and_counts_come_from_the_mask():
    for row in scenes.load("validation", num_scenes=40):
        mask = np.asarray(row["mask"])
        assert mask.dtype == np.uint8 and mask.shape == (64, 64)
        assert set(np.unique(mask)) == set(range(len(row["objects"]) + 1))
        for i, record in enumerate(row["objects"], start=1):
            rows, columns = np.nonzero(mask == i)
            assert record["visible_pixels"] == len(rows)
            assert record["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
