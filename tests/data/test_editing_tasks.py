import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as vision

from hf_dl.data import editing_tasks, scenes
from hf_dl.data.editing_tasks import KINDS
from hf_dl.metrics.editing import measure_edits
from tests.data.errors import failure

COUNT = 24


@pytest.fixture(scope="module", params=["plain", "textured"])
def style(request):
    return request.param


def load(kind, style):
    data = editing_tasks.load("test", kind=kind, style=style, num_scenes=COUNT)
    assert data.column_names == list(editing_tasks.FEATURES)
    return data


def stack(data, column):
    array = np.stack([np.asarray(image) for image in data[column]])
    return torch.from_numpy(array).movedim(-1, 1) if array.ndim == 4 else torch.from_numpy(array) > 0


def inputs(data):
    masks = {"masks_before": stack(data, "mask"), "masks_after": stack(data, "truth_mask")}
    return {"references": stack(data, "truth"), "images": stack(data, "image"), **masks}


@pytest.mark.parametrize("kind", KINDS)
def test_the_columns_show_the_edit(kind, style):
    data, rows = load(kind, style), scenes.load("test", style=style, num_scenes=COUNT)
    assert len(data) >= COUNT - 2
    by_image = {np.asarray(row["image"]).tobytes(): row for row in rows}
    for edit in data:
        before = by_image[np.asarray(edit["image"]).tobytes()]
        mask, truth_mask = np.asarray(edit["mask"]), np.asarray(edit["truth_mask"])
        old = [np.array_equal(mask, np.asarray(before["mask"]) == i + 1) for i in range(len(before["objects"]))]
        assert sum(old) == (kind != "insert") and mask.any() == (kind != "insert")
        names = sorted((item["color"], item["shape"]) for item in before["objects"])
        if kind != "insert":
            gone = before["objects"][old.index(True)]
            names.remove((gone["color"], gone["shape"]))
        kept = sorted((item["color"], item["shape"]) for item in edit["objects"] if not item["edited"])
        assert kept == names
        new = [item for item in edit["objects"] if item["edited"]]
        assert len(new) == truth_mask.any() == (kind != "remove")
        if kind == "remove":
            assert edit["other_image"] is None and edit["other_mask"] is None
            continue
        other = by_image[np.asarray(edit["other_image"]).tobytes()]
        other_mask = np.asarray(edit["other_mask"])
        (source,) = (
            item
            for i, item in enumerate(other["objects"])
            if np.array_equal(other_mask, np.asarray(other["mask"]) == i + 1)
        )
        assert (source["color"], source["shape"]) == (new[0]["color"], new[0]["shape"])
        # it has about the same place and size as in the other image
        assert (other_mask & truth_mask).sum() > 0.6 * (other_mask | truth_mask).sum()
        box = np.flatnonzero(truth_mask.any(0))
        assert new[0]["box"][0] == box[0] and new[0]["box"][2] == box[-1] + 1


@pytest.mark.parametrize("kind", KINDS)
def test_controls_of_the_metric(kind, style):
    """The thresholds of the metric accept the truth and its blur, and reject the unedited image and other edits."""
    data = inputs(load(kind, style))
    truths, images, count = data["references"], data["images"], len(data["images"])
    assert measure_edits(truths, **data)["success"].all()
    copy = measure_edits(images, **data)
    assert not copy["changed"].any() and copy["kept"].all()
    assert (copy["error"] == copy["change"]).all()
    blurred = measure_edits(vision.gaussian_blur(truths, 9, [1.0]), **data)
    assert blurred["success"].sum() >= count - 3
    masks = (data["masks_before"] | data["masks_after"])[:, None]
    shadow_stays = measure_edits(torch.where(masks, truths, images), **data)
    assert (shadow_stays["shadow_error"] == shadow_stays["shadow_change"]).all()
    assert shadow_stays["changed"].float().mean() > 0.8 and not shadow_stays["success"].all()


def test_the_loss_of_a_second_object_is_seen(style):
    data, rows = load("remove", style), scenes.load("test", style=style, num_scenes=COUNT)
    both, wrong = [], []
    for edit, row in zip(data, rows, strict=True):
        mask = np.asarray(edit["mask"]) > 0
        index = int(np.asarray(row["mask"])[mask][0]) - 1
        other = (index + 1) % len(row["objects"])
        both.append(scenes.counterfactual(row, remove=[index, other])["image"])
        wrong.append(scenes.counterfactual(row, remove=other)["image"])
    both, wrong = (
        measure_edits(
            torch.from_numpy(np.stack([np.asarray(image) for image in images])).movedim(-1, 1), **inputs(data)
        )
        for images in (both, wrong)
    )
    # on textured ground, some objects look like the ground
    assert both["kept"].sum() <= (0 if style == "plain" else 5) and both["changed"].float().mean() > 0.9
    assert not wrong["changed"].any()


def test_the_same_edits_in_a_longer_dataset_and_others_for_another_seed():
    short = editing_tasks.load("test", kind="remove", num_scenes=3)
    long = editing_tasks.load("test", kind="remove", num_scenes=COUNT)
    other = editing_tasks.load("test", kind="remove", num_scenes=3, seed=1)
    for number in range(3):
        pictures = [np.asarray(data[number]["truth"]) for data in (short, long, other)]
        assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


def test_wrong_arguments(private_cache):
    assert failure(lambda: editing_tasks.load(kind="turn")) == (
        "ValueError: kind='turn' is unknown; choose one of remove, swap, insert."
    )
    assert "source='web' is unknown" in failure(lambda: editing_tasks.load(source="web"))
    assert "kind='insert' is not possible in any of the 1 scenes" in failure(
        lambda: editing_tasks.load(kind="insert", num_scenes=1)
    )
