"""A fingerprint of the training data, so that a resumed run notices another set of examples or classes."""

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

_MOST_BYTES = 256 * 2**20  # of examples that are hashed; larger data is hashed in part, evenly spread
_MOST_ROWS = 1000  # of data without `__getitems__`, whose rows may be files that have to be decoded


def fingerprint(data: Any, model: nn.Module) -> dict[str, Any]:
    """Describe the training data and the classes of a model.

    Args:
        data: A map-style dataset, or an iterable one, whose examples are not read. A method `fingerprint_data` may
            return other data to hash instead, such as the images that a network turned into latents.
        model: The model. Its config has the names of the classes, if there are any.

    Returns:
        `examples`, the number of examples or None; `classes`, their names in order, or None; and `content`, a hash of
        the examples in order, or None.

    Example:
        >>> fingerprint([1.0, 2.0], nn.Linear(1, 1))["examples"]
        2
    """
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    classes = [names[number] for number in sorted(names)]
    if classes == [f"LABEL_{number}" for number in range(len(classes))]:  # the default of transformers
        classes = None
    count = len(data) if hasattr(data, "__len__") else None
    content = data.fingerprint_data() if hasattr(data, "fingerprint_data") else data if count else []
    return {"examples": count, "classes": classes, "content": _hash_examples(content) if len(content) else None}


def describe_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say what differs between two fingerprints; an empty text if nothing does.

    Example:
        >>> describe_change({"examples": 5, "classes": ["a"]}, {"examples": 6, "classes": ["a"]})
        '6 training examples instead of 5'
    """
    found = []
    if before["examples"] != now["examples"]:
        found.append(f"{now['examples']} training examples instead of {before['examples']}")
    old, new = before["classes"] or [], now["classes"] or []
    if set(old) != set(new):
        parts = (("new", [n for n in new if n not in old]), ("missing", [n for n in old if n not in new]))
        found += [f"{kind} classes: {', '.join(names[:5])}" for kind, names in parts if names]
    elif old != new:
        place = next(place for place, names in enumerate(zip(old, new, strict=True)) if len(set(names)) > 1)
        found.append(f"class {place} is {new[place]!r} instead of {old[place]!r}")
    if not found and before["content"] != now["content"]:
        found.append("other content or another order of the training examples")
    return "; ".join(found)


def _hash_examples(data: Any) -> str:
    """Hash examples, evenly spread over the data if not all of them. The states of the generators are kept."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        fetch = getattr(data, "__getitems__", None)
        size = _Digest()
        size.add(fetch([0]) if fetch else data[0])
        most = min(_MOST_BYTES // max(1, size.bytes), len(data) if fetch else _MOST_ROWS)
        step = -(-len(data) // max(1, most))
        digest, rows = _Digest(), range(0, len(data), step)
        for start in range(0, len(rows), 256):
            part = rows[start : start + 256]
            digest.add(fetch(list(part)) if fetch else [data[index] for index in part])
        return digest.hash.hexdigest()
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class _Digest:
    """A hash of nested examples. Objects of unknown types count by their type."""

    def __init__(self):
        self.hash, self.bytes = hashlib.blake2b(digest_size=16), 0

    def add(self, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value, key=str):
                self.add(str(key))
                self.add(value[key])
        elif isinstance(value, list | tuple):
            self.add(f"{len(value)} items")
            for item in value:
                self.add(item)
        elif isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous()
            self._feed(f"{value.dtype} {tuple(value.shape)}".encode())
            self._feed(value.flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, np.ndarray):
            self._feed(f"{value.dtype} {value.shape}".encode())
            self._feed(np.ascontiguousarray(value).tobytes())
        elif value is None or isinstance(value, str | bytes | int | float | bool):
            self._feed(repr(value).encode())
        elif hasattr(value, "tobytes"):  # an image of PIL
            self._feed(value.tobytes())
        else:
            self._feed(type(value).__name__.encode())

    def _feed(self, data: Any) -> None:
        self.hash.update(data)
        self.bytes += len(data)
