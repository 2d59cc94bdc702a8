import pytest

from hf_dl.data.object_images import CLASSES
from hf_dl.data.superclasses import SUPERCLASSES, superclasses


def test_superclasses():
    fine = sorted(name for members in SUPERCLASSES.values() for name in members.split())  # as CIFAR-100 numbers them
    assert len(fine) == len(set(fine)) == 100
    groups = superclasses(fine)
    assert [fine[label] for label in groups[1]] == ["aquarium_fish", "flatfish", "ray", "shark", "trout"]
    assert sorted(label for group in groups for label in group) == list(range(100))
    assert {len(group) for group in groups} == {5}
    assert [CLASSES[100][label] for label in superclasses(CLASSES[100])[1]] == [
        f"{color} striped sphere" for color in ("red", "green", "blue", "yellow")
    ]
    assert {CLASSES[25][label].split()[1] for label in superclasses(CLASSES[25])[4]} == {"disc"}
    with pytest.raises(ValueError, match="superclasses of these 2 classes .cat, dog, .... are unknown"):
        superclasses(["cat", "dog"])
