import json
import sys

import pytest
import torch

from hf_dl.models import slot_library
from hf_dl.models.slot_library import SlotLibrary
from tests.loopback_hub import LoopbackHub

DIM, SIZE = 8, 32


def scenes(images=60, num_slots=5, seed=0):
    """Slots of images with one background and 1 to 3 objects in random order; vector[0] names the kind of thing."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randn(images, num_slots, DIM, generator=generator) * 0.1
    masks = torch.zeros(images, num_slots, SIZE, SIZE)
    counts = torch.randint(1, 4, (images,), generator=generator)
    for i, count in enumerate(counts.tolist()):
        order = torch.randperm(num_slots, generator=generator)
        slots[i, order[0], 0] += 100
        masks[i, order[0]] = 1
        for j in order[1 : count + 1].tolist():
            y, x = torch.randint(0, SIZE - 8, (2,), generator=generator).tolist()
            slots[i, j, 0] += 10 * (1 + int(torch.randint(0, 3, (1,), generator=generator)))
            masks[i, :, y : y + 8, x : x + 8] = 0
            masks[i, j, y : y + 8, x : x + 8] = 1
    return slots, masks, (masks.mean((2, 3)) >= 0.005).sum(1) - 1


@pytest.fixture(scope="module")
def library():
    slots, masks, _ = scenes()
    return SlotLibrary().fit(slots, masks, num_clusters=4, seed=0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_fit_keeps_the_slots_with_a_mask_and_finds_the_background(library):
    slots, masks, counts = scenes()
    areas = masks.mean((2, 3))
    kept = areas >= 0.005
    assert len(library) == kept.sum() < kept.numel()
    torch.testing.assert_close(library.vectors, slots[kept])
    torch.testing.assert_close(library.areas, areas[kept])
    assert library.background_clusters.sum() == 1
    assert torch.equal(library.background_clusters[library.clusters], library.vectors[:, 0] > 90)
    assert torch.equal(library.object_counts, counts.bincount())


def test_fit_stores_where_the_masks_are():
    masks = torch.zeros(1, 2, 20, 40)
    masks[0, 0, 0:10, 20:40] = 1
    masks[0, 1] = 1 - masks[0, 0]
    library = SlotLibrary(mask_size=4).fit(torch.randn(1, 2, DIM), masks, num_clusters=2, seed=0)
    torch.testing.assert_close(library.centers[0], torch.tensor([0.75, 0.25]))
    assert library.masks[0].tolist() == [[0, 0, 255, 255]] * 2 + [[0] * 4] * 2


def test_background_split_between_two_clusters_is_all_background():
    slots, masks = torch.zeros(30, 3, DIM), torch.zeros(30, 3, 16, 16)
    slots[:, :, 0] = torch.tensor([0.0, 10.0, 20.0])
    masks[:, 0, :8], masks[:, 1, 8:] = 1, 1
    masks[:, 2, :3, :3], masks[:, 0, :3, :3] = 1, 0
    library = SlotLibrary().fit(slots + torch.randn(30, 3, DIM, generator=generator()) * 0.1, masks, num_clusters=3,
                                seed=0)  # fmt: skip
    assert library.background_clusters.sum() == 2
    assert library.object_counts.tolist() == [0, 30]
    slots, keep = library.sample(10, generator=generator())
    assert keep.all() and slots.shape == (10, 2, DIM)
    assert (slots[:, 0, 0] < 15).all() and (slots[:, 1, 0] > 15).all()


def test_per_cluster_takes_one_slot_of_every_cluster(library):
    slots, keep = library.sample(50, generator=generator(), mode="per_cluster")
    assert slots.shape == (50, 4, DIM) and keep.all()
    torch.testing.assert_close(slots[:, :, 0].sort(1).values.mean(0), torch.tensor([10.0, 20, 30, 100]), atol=0.5,
                               rtol=0)  # fmt: skip


def test_background_aware_takes_one_background_and_as_many_objects_as_the_images_have(library):
    slots, keep = library.sample(4000, generator=generator())
    stored = {tuple(v) for v in library.vectors.tolist()}
    assert all(tuple(v) in stored for v in slots[keep][:200].tolist())
    background = slots[:, :, 0] > 90
    assert background[:, 0].all() and not background[:, 1:].any()
    drawn = (keep.sum(1) - 1).bincount() / 4000
    expected = library.object_counts / library.object_counts.sum()
    torch.testing.assert_close(drawn, expected, atol=0.03, rtol=0)
    assert (slots[~keep] == 0).all()


def test_num_objects_and_the_generator_fix_the_sample(library):
    slots, keep = library.sample(6, generator=generator(3), num_objects=5)
    assert slots.shape == (6, 6, DIM) and keep.all()
    again, _ = library.sample(6, generator=generator(3), num_objects=5)
    other, _ = library.sample(6, generator=generator(4), num_objects=5)
    assert torch.equal(slots, again) and not torch.equal(slots, other)


def overlaps(library, slots):
    """Largest IoU between the masks of two objects of each image."""
    index = {tuple(v): i for i, v in enumerate(library.vectors.tolist())}
    worst = []
    for image in slots:
        a = torch.stack([library.masks[index[tuple(v)]] for v in image[1:].tolist()]).flatten(1).double() / 255
        iou = torch.minimum(a[:, None], a).sum(2) / torch.maximum(a[:, None], a).sum(2)
        worst.append((iou - torch.eye(len(a))).max().item())
    return torch.tensor(worst)


def test_max_iou_keeps_objects_apart(library):
    free, _ = library.sample(40, generator=generator(), num_objects=3)
    apart, _ = library.sample(40, generator=generator(), num_objects=3, max_iou=0.0)
    assert (overlaps(library, free) > 0.05).sum() > 5
    assert overlaps(library, apart).max() <= 0


def test_max_iou_takes_the_least_overlap_when_there_is_no_room(library):
    slots, keep = library.sample(3, generator=generator(), num_objects=30, max_iou=0.0)
    assert keep.all() and slots.shape[1] == 31


def test_many_slots_use_mini_batches_and_find_the_same_clusters(monkeypatch, library):
    monkeypatch.setattr(slot_library, "_MANY_SLOTS", 10)
    slots, masks, _ = scenes()
    other = SlotLibrary().fit(slots, masks, num_clusters=4, seed=0)
    pairs = {(int(a), int(b)) for a, b in zip(library.clusters, other.clusters, strict=True)}
    assert len(pairs) == 4
    assert torch.equal(library.object_counts, other.object_counts)


def test_fit_is_the_same_for_the_same_seed_and_takes_bfloat16(library):
    slots, masks, _ = scenes()
    again = SlotLibrary().fit(slots, masks, num_clusters=4, seed=0)
    assert torch.equal(again.clusters, library.clusters)
    assert SlotLibrary().fit(slots.bfloat16(), masks.bfloat16(), num_clusters=4, seed=0).vectors.dtype == torch.float32


def test_save_and_load(library, tmp_path):
    library.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"slot_library.safetensors", "config.json", "README.md"}
    assert json.loads((tmp_path / "config.json").read_text()) == {"min_area": 0.005, "mask_size": 16}
    loaded = SlotLibrary.from_pretrained(tmp_path)
    for name in slot_library._TENSORS:
        a, b = getattr(library, name), getattr(loaded, name)
        assert a.dtype == b.dtype and torch.equal(a, b)
    for a, b in zip(library.sample(9, generator=generator(), max_iou=0.1), loaded.sample(9, generator=generator(),
                    max_iou=0.1), strict=True):  # fmt: skip
        assert torch.equal(a, b)
    library.save_pretrained(tmp_path)  # over itself
    assert "SlotLibrary.from_pretrained" in (tmp_path / "README.md").read_text()


def test_save_refuses_the_folder_of_a_model(library, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "slot_autoencoder"}')
    with pytest.raises(ValueError, match="has the config.json of another model; use a separate folder"):
        library.save_pretrained(tmp_path)
    assert "slot_autoencoder" in (tmp_path / "config.json").read_text()


def test_load_of_damaged_files_gets_a_sentence(library, tmp_path):
    library.save_pretrained(tmp_path)
    path = tmp_path / "slot_library.safetensors"
    content = path.read_bytes()
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="slot_library.safetensors' is truncated or damaged"):
            SlotLibrary.from_pretrained(tmp_path)
    slot_library.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is not a slot library; expected the tensors vectors, "):
        SlotLibrary.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="expected a folder that save_pretrained wrote"):
        SlotLibrary.from_pretrained(tmp_path)


def test_unfitted_library_gets_a_sentence(tmp_path):
    for use in (lambda x: x.sample(1, generator=generator()), lambda x: x.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="this SlotLibrary is empty; call fit"):
            use(SlotLibrary())
    assert len(SlotLibrary()) == 0


@pytest.mark.parametrize(
    ("slots", "masks", "num_clusters", "message"),
    [
        (torch.zeros(4, DIM), torch.zeros(4, 3, 8, 8), 2, r"slots has shape \(4, 8\) and masks \(4, 3, 8, 8\)"),
        (torch.zeros(4, 3, DIM), torch.zeros(4, 2, 8, 8), 2, r"expected \(images, slots, dim\)"),
        (torch.full((4, 3, DIM), torch.nan), torch.ones(4, 3, 8, 8), 2, "slots has values that are not finite"),
        (torch.zeros(4, 3, DIM), torch.ones(4, 3, 8, 8) * 2, 2, r"masks has values outside \[0, 1\]"),
        (torch.zeros(4, 3, DIM), torch.full((4, 3, 8, 8), torch.nan), 2, r"masks has values outside \[0, 1\]"),
        (torch.zeros(1, 3, DIM), torch.ones(1, 3, 8, 8), 4, "num_clusters=4 does not fit 3 slots"),
        (torch.zeros(1, 3, DIM), torch.zeros(1, 3, 8, 8), 1, "num_clusters=1 does not fit 0 slots"),
        (torch.zeros(1, 3, DIM), torch.ones(1, 3, 8, 8), 0, "num_clusters=0 does not fit"),
    ],
)
def test_wrong_input_of_fit_gets_a_sentence(slots, masks, num_clusters, message):
    with pytest.raises(ValueError, match=message):
        SlotLibrary().fit(slots, masks, num_clusters=num_clusters, seed=0)


def test_wrong_arguments_get_a_sentence(library):
    for message, arguments in {
        "mode='bakground' is unknown; choose one of background_aware, per_cluster": {"mode": "bakground"},
        "num_objects=2 has no meaning with mode='per_cluster'": {"mode": "per_cluster", "num_objects": 2},
        "num_objects=-1 cannot be drawn": {"num_objects": -1},
    }.items():
        with pytest.raises(ValueError, match=message):
            library.sample(2, generator=generator(), **arguments)
    with pytest.raises(ValueError, match="n=0 is too small; expected at least 1 image"):
        library.sample(0, generator=generator())
    with pytest.raises(ValueError, match="min_area=1.5 is not a fraction"):
        SlotLibrary(min_area=1.5)
    with pytest.raises(ValueError, match="mask_size=0 is too small"):
        SlotLibrary(mask_size=0)
    one = SlotLibrary().fit(torch.zeros(1, 3, DIM), torch.ones(1, 3, 8, 8) / 3, num_clusters=1, seed=0)
    assert one.sample(2, generator=generator())[0].shape == (2, 1, DIM)
    with pytest.raises(ValueError, match="num_objects=2 cannot be drawn from 0 object slots"):
        one.sample(2, generator=generator(), num_objects=2)


PUSH_AND_LOAD = """
import torch
from hf_dl.models.slot_library import SlotLibrary

library = SlotLibrary.from_pretrained("library")
library.push_to_hub("me/library")
assert torch.equal(SlotLibrary.from_pretrained("me/library").vectors, library.vectors)
"""


def test_push_to_the_hub_and_load_from_it(library, tmp_path, start_fresh):
    library.save_pretrained(tmp_path / "library")
    with LoopbackHub() as hub:
        environment = hub.env(tmp_path / "home") | {"PYTHONPATH": ":".join(sys.path)}
        done = start_fresh(PUSH_AND_LOAD, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        files = hub.files("me/library")
    assert {"slot_library.safetensors", "config.json", "README.md"} <= files.keys()
    assert "library.sample(8, " in files["README.md"].decode()
