"""hf_dl: the classic deep-learning systems, Hugging Face-native.

Where things are; each layer imports only what is named behind it:

- `hf_dl.models`: everything that travels with a checkpoint, one file a family (nothing of hf_dl but siblings)
- `hf_dl.data`: `load(split, source, ...)` for each kind of data, synthetic or real (`programs`)
- `hf_dl.metrics`: pure functions and `evaluate` metrics (`programs`)
- `hf_dl.explain`: what an image classifier looked at, and what it says without it (nothing)
- `hf_dl.pipelines`: from what a person has to what a person wants: a word problem to its answer, an image to an edited
  one (`models`, `programs`)
- `hf_dl.training`: the flags and the loop's surroundings that all training scripts share (nothing)
- `hf_dl.reporting`: tables, plots and model cards from the files that runs leave (nothing)
- `hf_dl.demo`: what the pages under spaces/ have in common (`data`)

The programs that use them are in `scripts/` and `spaces/` of the repository.

After `import hf_dl`, the Auto classes of transformers know its models, without remote code and whichever of the two is
imported first:

    import hf_dl
    from transformers import AutoModel

    model = AutoModel.from_pretrained("runs/train_slots")

Importing hf_dl alone loads neither torch nor transformers: the models are registered when transformers is there.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

__version__ = "0.1.0"


class _RegisterWithTransformers(importlib.abc.MetaPathFinder):
    """Lets the other finders find transformers, and has `hf_dl.models` imported once it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "transformers":
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                importlib.import_module("hf_dl.models")

            spec.loader.exec_module = load_and_register
        return spec


if "transformers" in sys.modules:
    importlib.import_module("hf_dl.models")
else:
    sys.meta_path.insert(0, _RegisterWithTransformers())
