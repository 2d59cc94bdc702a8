"""Groups of similar classes, for hierarchical output layers."""

from __future__ import annotations

from collections.abc import Sequence

from .object_images import CLASSES

SUPERCLASSES = {  # the 20 coarse labels of CIFAR-100
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}


def superclasses(names: Sequence[str]) -> list[list[int]]:
    """Group the classes of CIFAR-100 or of the synthetic images by similarity, for hierarchical output layers.

    CIFAR-100 has 20 groups of 5 classes. The 100 synthetic classes are grouped by material and shape, the 25 by shape.

    Args:
        names: Class names in the order of their labels.

    Returns:
        Lists of labels. Each label occurs once.

    Raises:
        ValueError: If these classes have no known superclasses.

    Example:
        >>> superclasses(CLASSES[25])[0]
        [0, 1, 2, 3, 4]
    """
    number = {name: label for label, name in enumerate(names)}
    known = [members.split() for members in SUPERCLASSES.values()]
    if number.keys() == {name for members in known for name in members}:
        return [[number[name] for name in members] for members in known]
    for count, group in ((100, 4), (25, 5)):
        if tuple(names) == CLASSES[count]:
            return [list(range(first, first + group)) for first in range(0, count, group)]
    raise ValueError(
        f"The superclasses of these {len(names)} classes ({', '.join(list(names)[:3])}, ...) are unknown. Expected "
        "the classes of CIFAR-100 or of the synthetic images."
    )
