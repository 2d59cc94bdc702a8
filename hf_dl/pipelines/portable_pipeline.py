"""A diffusers pipeline that is saved with its code, so that it loads with hf_dl and without."""

import ast
import functools
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import PreTrainedModel

logger = logging.get_logger(__name__)

LIBRARIES = ("diffusers", "transformers")
"""The libraries whose classes need no saved code."""

HUB_ARGUMENTS = ("revision", "cache_dir", "token", "force_download", "local_files_only")
"""Arguments of `PortablePipeline.from_pretrained` for the download."""

LOADING_ARGUMENTS = (
    "dtype",
    "torch_dtype",
    "variant",
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "low_cpu_mem_usage",
    "disable_mmap",
    "quantization_config",
)
"""Arguments of `PortablePipeline.from_pretrained` that `DiffusionPipeline.from_pretrained` defines."""


class PortablePipeline(DiffusionPipeline):
    """Base class of pipelines whose parts are models of hf_dl, diffusers or transformers.

    A saved pipeline contains the code of its parts, one file per part, because diffusers downloads single files from
    the Hub.

    Attributes:
        component_names: Names of the parts: the arguments of the pipeline's constructor.
    """

    component_names: tuple[str, ...] = ()

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the pipeline with its code, so that it loads from a folder or the Hub, with hf_dl or without.

        diffusers records the modules of this process, which other machines may not have. This method saves the code
        of each part as one file next to its weights and records that file in `model_index.json`.

        Args:
            save_directory: The folder to write to.
            safe_serialization: False has no effect: weights are never pickled, as in transformers.
            variant: Suffix of the weight files, such as "fp16", for `from_pretrained`.
            max_shard_size: Passed on to `DiffusionPipeline.save_pretrained`.
            push_to_hub: Whether to call `push_to_hub` afterwards.
            repo_id: Hub id for `push_to_hub`. Defaults to the name of the folder.
            **kwargs: Further arguments of `push_to_hub`.

        Raises:
            ValueError: If the code of a part is not in a file.
        """
        if not safe_serialization:
            logger.warning("safe_serialization=False has no effect, because weights are never pickled; leave it out.")
        folder = Path(save_directory)
        super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        parts = {name: index[name] for name in self.component_names}
        parts = {name: part for name, part in parts.items() if part[0] not in LIBRARIES}
        parts["."] = [type(self).__module__, type(self).__name__]
        for name, (module_name, class_name) in parts.items():
            module = sys.modules.get(module_name)
            if module is None or module_name == "__main__" or not getattr(module, "__file__", None):
                raise ValueError(
                    f"{class_name} is defined in {module_name}, which is not a file that can be saved; define it in "
                    "a module."
                )
            file = module_name.rpartition(".")[2]
            source, siblings = _one_file(module)
            for sibling in siblings:  # transformers also saves them, for the Auto classes
                (folder / name / f"{sibling}.py").unlink(missing_ok=True)
            (folder / name / f"{file}.py").write_text(source, encoding="utf-8")
            index["_class_name" if name == "." else name] = [file, class_name]
        (folder / self.config_name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(repo_id or folder.name, variant=variant, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "PortablePipeline":
        """Load a pipeline from a folder or the Hub, as `DiffusionPipeline.from_pretrained` does.

        If hf_dl is installed, its own classes are used, and code in the repository is ignored even with
        `trust_remote_code=True`.

        Args:
            pretrained_model_name_or_path: A folder that `save_pretrained` wrote, or a Hub id.
            **kwargs: Parts to use instead of the saved ones, such as `scheduler`. Arguments of
                `DiffusionPipeline.from_pretrained`: `dtype`, one type or a dict from parts to types; `variant`;
                `device_map`; and the others in `LOADING_ARGUMENTS`. The Hub's `revision`, `cache_dir`, `token`,
                `force_download` and `local_files_only`.

        Raises:
            ValueError: If the folder has no pipeline of this class or no such variant, or hf_dl does not know the
                class of a part. Also if tensors are missing from the weights, or `use_safetensors` is False.
            OSError: If the folder does not exist and the Hub does not return the repository.
        """
        models = _installed_models()
        if models is None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        name_or_path = str(pretrained_model_name_or_path)
        kwargs.pop("trust_remote_code", None)
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors=False would load pickles, which can run any code; leave it out.")
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        if unknown := [name for name in kwargs if name not in (*LOADING_ARGUMENTS, *cls.component_names)]:
            raise TypeError(f"from_pretrained got unexpected arguments: {', '.join(unknown)}.")
        if missing := [name for name in cls.component_names if kwargs.get(name, name) is None]:
            raise ValueError(f"{missing[0]}=None is not a part of a {cls.__name__}; pass a model, or leave it out.")
        variant, folder = kwargs.get("variant"), Path(name_or_path)
        saved = [name for name in cls.component_names if name not in kwargs]
        if not folder.is_dir():
            try:
                folder = _download(name_or_path, saved, variant, hub)
            except (OSError, ValueError) as error:  # the errors of huggingface_hub are subclasses of these
                raise OSError(
                    f"{name_or_path!r} is not a folder, and the Hub did not return it "
                    f"({type(error).__name__}); pass a folder that save_pretrained wrote, or check id and connection."
                ) from error
        path = folder / cls.config_name
        index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if index.get("_class_name") not in (cls.__name__, [cls.__module__.rpartition(".")[2], cls.__name__]):
            raise ValueError(
                f"{name_or_path!r} has no {cls.config_name} of a {cls.__name__}; expected a folder that its "
                "save_pretrained wrote."
            )
        for name in saved:
            library, class_name = index.get(name, (None, None))
            if library not in LIBRARIES and _find_class(models, class_name) is None:
                raise ValueError(
                    f"{name} is a {class_name} of {library}, which hf_dl does not know; load it yourself and pass it "
                    f"as {name}=..., or use DiffusionPipeline.from_pretrained(..., trust_remote_code=True)."
                )
            files = sorted(file.name.split(".") for file in (folder / name).glob("*.safetensors"))
            if variant is None and files and all(len(file) > 2 for file in files):
                found = files[0][1].partition("-0")[0]
                raise ValueError(f"The weights of {name} are the variant {found!r}; pass variant={found!r}.")
        pipe = super().from_pretrained(str(folder), use_safetensors=True, **kwargs)
        for name in saved:  # the libraries only warn of missing tensors and keep random weights
            if missing := _missing_tensors(getattr(pipe, name), folder / name, variant):
                raise ValueError(
                    f"The weights of {name} lack {len(missing)} tensors, such as {missing[0]}; save the pipeline "
                    "again, or install the version of hf_dl that saved it."
                )
        pipe.register_to_config(_name_or_path=name_or_path)
        return pipe

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load `model_index.json`, in which `DiffusionPipeline.from_pretrained` finds the class of each part.

        If hf_dl is installed, its classes replace the code that was saved with them. Unknown classes are replaced by
        None, which lets diffusers use the part that the user passes.
        """
        loaded, models = super().load_config(pretrained_model_name_or_path, **kwargs), _installed_models()
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if models is not None:
            index["_class_name"] = cls.__name__
            for name in (name for name in cls.component_names if name in index):
                library, class_name = index[name]
                if library not in LIBRARIES:
                    kind = _find_class(models, class_name)
                    index[name] = [None, None] if kind is None else [kind.__module__, class_name]
        return loaded

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "PortablePipeline":
        """Create a pipeline from the parts of another one, as `DiffusionPipeline.from_pipe` does.

        diffusers takes a model only if the annotation of the constructor names its exact class. This method also takes
        models of a subclass.

        Args:
            pipeline: The other pipeline. The new one shares its parts.
            **kwargs: Parts to use instead, and `dtype`, to which all parts are converted. Defaults to float32.
        """
        kinds = cls._get_signature_types()
        parts = {
            name: part
            for name, part in pipeline.components.items()
            if name in cls.component_names and isinstance(part, kinds[name])
        }
        return super().from_pipe(pipeline, **(parts | kwargs))


def _installed_models() -> ModuleType | None:
    """Return `hf_dl.models`, or None where only the saved code of a pipeline is available."""
    try:
        return importlib.import_module("hf_dl.models")
    except ImportError:
        return None


def _find_class(models: ModuleType, name: str) -> type | None:
    """Return the model class of hf_dl with this name, or None if the name is unknown."""
    kind = getattr(models, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, (ModelMixin, PreTrainedModel)) else None


def _download(repo_id: str, parts: list[str], variant: str | None, hub: dict[str, Any]) -> Path:
    """Download a pipeline without its code. Parts without files of the variant come in the ordinary files."""
    fetch = functools.partial(snapshot_download, repo_id)
    ordinary = {"ignore_patterns": ["*.*.safetensors"]}
    if variant is None:
        return Path(fetch(allow_patterns=["*.json", "*.safetensors"], **ordinary, **hub))
    patterns = ["*.json", f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"]
    folder = Path(fetch(allow_patterns=patterns, **hub))
    others = [f"{part}/*.safetensors" for part in parts if not any((folder / part).glob(f"*.{variant}*.safetensors"))]
    fetch(allow_patterns=others, **ordinary, **(hub | {"revision": folder.name}))
    return folder


def _missing_tensors(part: Any, folder: Path, variant: str | None) -> list[str]:
    """Return the names of a model's tensors that its files do not have."""
    if not isinstance(part, torch.nn.Module) or getattr(part, "hf_quantizer", None) is not None:
        return []
    files = list(folder.glob("*.safetensors"))
    variants = [file for file in files if variant and f"{file.name.split('.')[1]}-".startswith(f"{variant}-")]
    stored: set[str] = set()
    for file in variants or [file for file in files if file.name.count(".") == 1]:
        with safe_open(file, "pt") as tensors:
            stored.update(tensors.keys())
    return sorted(part.state_dict().keys() - stored)


def _one_file(module: ModuleType) -> tuple[str, list[str]]:
    """Return the code of a module with the code of its siblings inserted before it, and the names of the siblings."""
    parts: list[str] = []
    names: list[str] = []

    def add(module: ModuleType) -> None:
        source = Path(module.__file__).read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        for node in ast.parse(source).body:
            if not isinstance(node, ast.ImportFrom) or (not node.level and node.module != "__future__"):
                continue
            lines[node.lineno - 1 : node.end_lineno] = ["\n"] * (node.end_lineno - node.lineno + 1)
            if node.level:
                relative = "." * node.level + (node.module or "")
                sibling = importlib.util.resolve_name(relative, module.__package__)
                if sibling.rpartition(".")[2] not in names:
                    names.append(sibling.rpartition(".")[2])
                    add(importlib.import_module(sibling))
        parts.append("".join(lines).strip("\n"))

    add(module)
    return "\n\n\n".join(parts) + "\n", names
