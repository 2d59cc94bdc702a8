"""hf_dl: the classic deep-learning systems, with the tools of Hugging Face.

The parts of the package. The names in parentheses are the other parts that a part may import:

- `hf_dl.models`: all code that a checkpoint needs, one file per family
- `hf_dl.programs`: the program language of MathQA
- `hf_dl.data`: `load(split, source, ...)` for each kind of data, generated or real (`programs`)
- `hf_dl.metrics`: functions on tensors, and metrics for `evaluate` (`programs`)
- `hf_dl.explain`: Grad-CAM, attention maps and masking for any image classifier
- `hf_dl.training`: the flags, the loop and the checkpoints that all training scripts share
- `hf_dl.reporting`: tables, plots and model cards from the result files of runs
- `hf_dl.pipelines`: from raw input to final answer (`models`, `programs`)
- `hf_dl.recipes`: code that the scripts and the demo page of a family share (all of the above)
- `hf_dl.demo`: code that the demo pages share (all of the above)
- `hf_dl.publishing`: checks, and the upload of models, Spaces and metrics to the Hub (all of the above)
- `hf_dl.progress`: progress bars, which every part may use
- `hf_dl.systems`: the list of all systems with their main results
- `hf_dl.script_help`: the help of a script, without its imports (`training`)
- `hf_dl.cli`: the `hf-dl` command

The repository has the training and evaluation programs in `scripts/` and the demo pages in `spaces/`. An installed
wheel has copies of them, which the `hf-dl` command runs.

`import hf_dl` registers the models with the Auto classes of transformers. It works before or after the import of
transformers, and no remote code runs:

    import hf_dl
    from transformers import AutoModel

    model = AutoModel.from_pretrained("runs/train_slots")

Importing hf_dl alone does not load torch or transformers. The models are registered when transformers is imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

__version__ = "0.1.0"


class _RegisterWithTransformers(importlib.abc.MetaPathFinder):
    """Import `hf_dl.models` after transformers is loaded; the other finders find transformers."""

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
