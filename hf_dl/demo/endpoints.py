"""API endpoints of the pages, which are also tools for clients of the Model Context Protocol (MCP)."""

import functools
import inspect
import reprlib
from collections.abc import Callable
from typing import Any, Literal

import gradio as gr
import pydantic
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from .page import event
from .uploads import open_image


class _Mark(TypedDict):
    """Marks the description of a file. Gradio checks that such a file was uploaded, or downloads it from its URL."""

    _type: Literal["gradio.FileData"]


class ImageFile(TypedDict):
    """An uploaded image file: `handle_file("photo.jpg")` of gradio_client."""

    path: str
    meta: _Mark


def add_endpoint(function: Callable[..., dict[str, Any]], name: str) -> None:
    """Add an endpoint to the API of a page. Call this inside the page.

    Args:
        function: Returns a dict of JSON values and of files from `send_image`. Its docstring and the annotations of
            its parameters describe the endpoint. Arguments of another type raise an error.
        name: Name of the endpoint and of the MCP tool.
    """
    parameters, checked = list(inspect.signature(function).parameters), pydantic.validate_call(function)

    @functools.wraps(function)
    def endpoint(*inputs: Any) -> dict[str, Any]:
        try:
            return checked(**dict(zip(parameters, inputs, strict=True)))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise ValueError(_explain(first["loc"][0], first["input"], first["msg"])) from None

    endpoint.__name__ = name
    gr.api(event(endpoint), api_name=name, concurrency_id="model", concurrency_limit=1)


def _explain(parameter: str | int, value: Any, problem: str) -> str:
    if parameter == "image":
        problem = "Pass an uploaded file: handle_file('photo.jpg') of gradio_client, or a URL from an MCP client"
    return f"{parameter}={reprlib.repr(value)} is invalid. {problem}."


def receive_image(image: ImageFile) -> Image.Image:
    """Open an image that a client uploaded; see `open_image`."""
    return open_image(image["path"])


def send_image(picture: Image.Image) -> dict[str, Any]:
    """Save a picture as a PNG file that clients can download, and return its description."""
    path = save_pil_to_cache(picture, cache_dir=get_upload_folder(), name="picture", format="png")
    return gr.FileData(path=path, mime_type="image/png").model_dump()


def list_scores(top: list[tuple[str, float]]) -> list[dict[str, str | float]]:
    """Return classes with their probabilities as the image classification pipeline of transformers does."""
    return [{"label": name, "score": probability} for name, probability in top]
