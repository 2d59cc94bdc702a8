"""The API of the page of recurrent networks: one endpoint per tab, and one to write texts."""

from typing import Annotated, Any, Literal

from pydantic import Field

from ..explain.recurrent import PROPERTIES
from ..models.layers_recurrent import CELLS
from . import captioner, characters, gradients
from .captioner import BEAMS, MAX_BEAMS
from .characters import BUILT_IN, MAX_NEW, CharacterModels
from .checkpoints import PageModels
from .endpoints import ImageFile, add_endpoint, receive_image, send_image


def add_endpoints(models: PageModels, texts: CharacterModels) -> None:
    """Add the API of the page, which also serves MCP clients. Call this inside the page.

    Args:
        models: The captioners of the page.
        texts: The models of characters of the page.
    """

    def caption(image: ImageFile, num_beams: Annotated[int, Field(ge=1, le=MAX_BEAMS)] = BEAMS) -> dict[str, Any]:
        """Describe an image.

        Args:
            image: The image file.
            num_beams: Number of captions to keep and return.

        Returns:
            The best caption, its words with their probabilities and attention maps as files, and all captions.
        """
        picture = receive_image(image)
        beams = captioner.search(models.get(), picture, num_beams)
        best = beams[0]
        maps = [None] * len(best.words) if best.maps is None else best.maps
        words = [
            {
                "word": word,
                "probability": probability,
                "map": None if heat is None else send_image(captioner.draw_word(picture, heat)),
            }
            for word, probability, heat in zip(best.words, best.probabilities, maps, strict=True)
        ]
        found = [
            {"caption": each.text, "score": each.score, "log_probability": each.log_probability} for each in beams
        ]
        return {"caption": best.text, "words": words, "beams": found}

    def generate(
        prompt: str = "",
        cell: Literal[tuple(BUILT_IN)] = "lstm",
        length: Annotated[int, Field(ge=1, le=MAX_NEW)] = 300,
        temperature: Annotated[float, Field(ge=0)] = 0.7,
        top_k: Annotated[int, Field(ge=0)] = 0,
        top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Write a text with a small recurrent model of characters. Its first call trains the model, in about a minute.

        Args:
            prompt: Start of the text.
            cell: Recurrent cell of the model.
            length: Number of characters to write.
            temperature: Divides the log-probabilities. 0 takes the most probable character.
            top_k: Number of most probable characters to sample from. 0 for all.
            top_p: Probability of the most probable characters to sample from.
            seed: Seed of the samples.

        Returns:
            The text, which begins with the prompt.
        """
        options = {"length": length, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        return {"text": characters.write(texts.wait(cell), prompt, **options)}

    def cells(
        text: str,
        follows: Literal[tuple(PROPERTIES)] = "inside_quotes",
        cell: Literal[tuple(BUILT_IN)] = "lstm",
    ) -> dict[str, Any]:
        """Find the cell of a recurrent model that follows a property of a text best.

        Args:
            text: The text, which needs the property in both halves.
            follows: The property.
            cell: Recurrent cell of the model. Its first use trains the model, in about a minute.

        Returns:
            Layer and number of the cell, its correlation on the second half of the text, its activations, and the
            text in the colors of the cell as SVG.
        """
        layers = characters.read(texts.wait(cell), text)
        match = characters.search(layers, text, follows)
        values = characters.activations(layers, match.layer, match.unit)
        return {
            "layer": match.layer,
            "cell": match.unit,
            "correlation": match.correlation,
            "median_correlation": match.median,
            "activations": values.tolist(),
            "svg": characters.picture(layers, text, match.layer, match.unit),
        }

    def gradient_flow(
        cell: Literal[tuple(CELLS)] = "rnn",
        length: int = 60,
        spectral_radius: float | None = None,
        forget_bias: float | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Measure how much of the gradient of the last step reaches each earlier step of a new recurrent cell.

        Args:
            cell: The recurrent cell.
            length: Number of steps.
            spectral_radius: Largest absolute eigenvalue of the recurrent matrices. Defaults to the weights of torch.
            forget_bias: Bias of the forget gate of an LSTM. Defaults to the random one of torch.
            seed: Seed of the weights.

        Returns:
            The norm of the gradient for each distance from 0, relative to the last step, and a description.
        """
        options = {"spectral_radius": spectral_radius, "forget_bias": forget_bias, "seed": seed}
        curve = gradients.measure(cell, length, **options)
        return {"norms": list(curve), "description": gradients.describe(curve)}

    for endpoint in (caption, generate, cells, gradient_flow):
        add_endpoint(endpoint, endpoint.__name__)
