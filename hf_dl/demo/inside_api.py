"""The API of the page that looks inside a classifier: one endpoint per kind of method."""

from typing import Annotated, Literal

from PIL import Image
from pydantic import Field

from ..explain import ATTACKS, MAP_METHODS
from . import inside
from .checkpoints import PageModels
from .classifiers import Classifier
from .endpoints import ImageFile, add_endpoint, list_scores, receive_image, send_image
from .inside import MAX_STEPS, PREDICTED, STEPS
from .pictures import draw_examples


def add_endpoints(models: PageModels) -> None:
    """Add the API of the page, which also serves MCP clients. Call this inside the page.

    Args:
        models: The models of the page.
    """

    def find(label: str | None) -> tuple[Classifier, int]:
        classifier = models.get()
        return classifier, PREDICTED if label is None else classifier.find_class(label)

    def explain(image: ImageFile, method: Literal[tuple(MAP_METHODS)] = "occlusion", label: str | None = None) -> dict:
        """Map the evidence for a class in an image.

        Args:
            image: The image file.
            method: Name of the method.
            label: Name or index of the class. Defaults to the predicted class.

        Returns:
            The most likely classes, the explained class, and the pictures as files.
        """
        classifier, number = find(label)
        found = inside.find_evidence(classifier, receive_image(image), method, number)
        pictures = {"overlay": send_image(found.overlay), "map": send_image(found.heat)}
        return {"top": list_scores(classifier.top(found.logits)), "label": found.label, "method": method, **pictures}

    def patches(layer: str | None = None, channel: Annotated[int, Field(ge=0)] = 0) -> dict:
        """Find the patches of generated scenes that activate a channel most.

        Args:
            layer: Name of the layer. Defaults to a layer in the middle.
            channel: Number of the channel, from 0.

        Returns:
            The layer, all layers with their numbers of channels, and the patches as files with their activations.
        """
        classifier = models.get()
        layers = inside.find_layers(classifier)
        layer, scenes = layer or inside.middle(layers), [each.image for each in draw_examples(0, inside.NUM_IMAGES)]
        found = inside.find_patches(classifier, layer, channel, scenes)
        results = [{"activation": value, "patch": send_image(patch)} for value, patch in found]
        return {"layer": layer, "channel": channel, "layers": layers, "results": results}

    def class_image(label: str, steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = STEPS) -> dict:
        """Make an image with a large logit of a class, by gradient ascent.

        Args:
            label: Name or index of the class.
            steps: Number of steps.

        Returns:
            The class, its logit, the most likely classes of the image, and the image as a file.
        """
        classifier, number = find(label)
        *_, last = inside.climb(classifier, Image.new("RGB", (64, 64), "gray"), number, steps)
        shown = {"label": last.label, "logit": last.score, "top": list_scores(last.top)}
        return {**shown, "image": send_image(last.picture)}

    def invert(
        image: ImageFile, layers: list[str] | None = None, steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = STEPS
    ) -> dict:
        """Make images with the features of an image in some layers.

        Args:
            image: The image file.
            layers: Names of layers, at most 12. Defaults to four layers at even distances.
            steps: Number of steps per layer.

        Returns:
            One result per layer: its name, the relative squared error of the features, and the picture as a file.
        """
        if len(layers or []) > inside.MAX_LAYERS:
            raise ValueError(f"There are {len(layers)} layers. Choose at most {inside.MAX_LAYERS}.")
        found = inside.invert(models.get(), receive_image(image), steps, layers or ())
        results = [{"layer": each.layer, "error": each.error, "image": send_image(each.picture)} for each in found]
        return {"steps": steps, "results": results}

    def attack(
        image: ImageFile, epsilon: float = 4, method: Literal[tuple(ATTACKS)] = "fgsm", label: str | None = None
    ) -> dict:
        """Change an image a little, so that its prediction changes.

        Args:
            image: The image file.
            epsilon: Largest change of a pixel, in steps of 1/255.
            method: Name of the attack.
            label: Name or index of the class to reach. Defaults to any other class.

        Returns:
            Whether the prediction changed, the most likely classes before and after, and the pictures as files.
        """
        classifier, number = find(label)
        found = inside.attack(classifier, receive_image(image), method, epsilon, number)
        before, after = list_scores(found.before), list_scores(found.after)
        pictures = {"change": send_image(found.change), "image": send_image(found.changed)}
        return {"flipped": found.flipped, "target": found.target, "before": before, "after": after, **pictures}

    def arithmetic(image: ImageFile) -> dict:
        """Compute sizes, parameters, multiply-adds, memory and receptive fields of each layer, with formulas.

        Args:
            image: An image file, which gives the size of the input.

        Returns:
            The totals and the rows.
        """
        return inside.count(models.get(), receive_image(image)).to_dict()

    for endpoint in (explain, patches, class_image, invert, attack, arithmetic):
        add_endpoint(endpoint, endpoint.__name__)
