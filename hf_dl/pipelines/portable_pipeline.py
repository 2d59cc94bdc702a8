"""A diffusers pipeline that is saved with its code, so that it loads with hf_dl and without."""

import ast
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel


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
            safe_serialization: Must be True: weights are never pickled.
            variant: Passed on to `DiffusionPipeline.save_pretrained`.
            max_shard_size: Passed on to `DiffusionPipeline.save_pretrained`.
            push_to_hub: Whether to call `push_to_hub` afterwards.
            repo_id: Hub id for `push_to_hub`. Defaults to the name of the folder.
            **kwargs: Further arguments of `push_to_hub`.

        Raises:
            ValueError: If `safe_serialization` is False, or the code of a part is not in a file.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write pickles; leave it out.")
        folder = Path(save_directory)
        super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        parts = {name: index[name] for name in self.component_names}
        parts = {name: part for name, part in parts.items() if part[0] not in ("diffusers", "transformers")}
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
            self.push_to_hub(repo_id or folder.name, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "PortablePipeline":
        """Load a pipeline from a folder or the Hub.

        If hf_dl is installed, its own classes are used, and code in the repository is ignored even with
        `trust_remote_code=True`. Otherwise, this is `DiffusionPipeline.from_pretrained`.

        Args:
            pretrained_model_name_or_path: A folder that `save_pretrained` wrote, or a Hub id.
            **kwargs: `dtype` (or `torch_dtype`), see `to`; the Hub's `revision`, `cache_dir`, `token`,
                `force_download` and `local_files_only`; and parts to use instead of the saved ones, such as
                `scheduler`.

        Raises:
            ValueError: If the folder has no pipeline of this class, hf_dl does not know the class of a part, or
                tensors are missing from the weights.
            OSError: If the folder does not exist and the Hub does not return the repository.
        """
        try:
            models = importlib.import_module("hf_dl.models")
        except ImportError:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs.pop("trust_remote_code", None)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        components = {name: kwargs.pop(name) for name in cls.component_names if name in kwargs}
        hub = {
            name: kwargs.pop(name)
            for name in ("revision", "cache_dir", "token", "force_download", "local_files_only")
            if name in kwargs
        }
        if kwargs:
            raise TypeError(f"from_pretrained got unexpected arguments: {', '.join(kwargs)}.")
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            patterns = ["*.json", "*.safetensors"]
            try:
                folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns=patterns, **hub))
            except (OSError, ValueError) as error:  # the errors of huggingface_hub are subclasses of these
                raise OSError(
                    f"{str(pretrained_model_name_or_path)!r} is not a folder, and the Hub did not return it "
                    f"({type(error).__name__}); pass a folder that save_pretrained wrote, or check id and connection."
                ) from error
        path = folder / cls.config_name
        index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if index.get("_class_name") not in (cls.__name__, [cls.__module__.rpartition(".")[2], cls.__name__]):
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} has no {cls.config_name} of a {cls.__name__}; expected a "
                "folder that its save_pretrained wrote."
            )
        for name in cls.component_names:
            if name in components:
                continue
            library, class_name = index[name]
            kind = getattr(diffusers if library == "diffusers" else models, class_name, None)
            if not (isinstance(kind, type) and issubclass(kind, (ModelMixin, SchedulerMixin, PreTrainedModel))):
                raise ValueError(
                    f"{name} is a {class_name} of {library}, which hf_dl does not know; load it yourself and pass it "
                    f"as {name}=..., or use DiffusionPipeline.from_pretrained(..., trust_remote_code=True)."
                )
            if issubclass(kind, SchedulerMixin):
                components[name] = kind.from_pretrained(folder / name)
                continue
            components[name], info = kind.from_pretrained(
                folder / name, use_safetensors=True, output_loading_info=True
            )
            if missing := sorted(info["missing_keys"]):  # the libraries only warn and keep random weights
                raise ValueError(
                    f"The weights of {name} lack {len(missing)} tensors, such as {missing[0]}; save the pipeline "
                    "again, or install the version of hf_dl that saved it."
                )
        pipe = cls(**components)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe if dtype is None else pipe.to(dtype=dtype)


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
