"""The layers of the package, read from its imports without importing anything."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_dl"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
BELOW = {"programs", "models", "data", "metrics", "explain", "pipelines", "training", "reporting"}  # the recipes
# What a layer may import of hf_dl besides its own siblings; a layer is a folder or a file of the package.
ALLOWED = {
    "programs": set(),
    "models": set(),
    "data": {"programs"},
    "metrics": {"programs"},
    "explain": set(),
    "pipelines": {"models", "programs"},
    "training": set(),
    "reporting": set(),
    "recipes": BELOW,
    "demo": {*BELOW, "recipes"},
    "script_help": {"training"},
    "cli": {*BELOW, "recipes", "demo", "publishing", "systems", "script_help"},
    "__main__": {"cli"},
    "systems": set(),
    "progress": set(),
    "publishing": {*BELOW, "recipes", "demo"},
}
EVERYWHERE = {
    "hf_dl.models.image_input",  # opens images; it is in models because checkpoints carry it
    "hf_dl.publishing.files",  # talks to the Hub, as the next one does
    "hf_dl.publishing.hub",
    "hf_dl.progress",  # bars; it imports nothing of hf_dl
}
OUTSIDE = {"scripts", "spaces", "tests"}


def layer_of(name):
    return name.removesuffix(".py").split("/")[0]


def read_imports(source, name):
    """List (line, absolute module) of the imports of a file; `from a import b` gives both a and a.b."""
    folder = ("hf_dl/" + name).split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def find_violations(source, name):
    """Sentences about the imports of the file hf_dl/<name> that break the layers."""
    layer = layer_of(name)
    found = []
    for line, module in read_imports(source, name):
        parts = module.split(".")
        if parts[0] in OUTSIDE:
            found.append(f"hf_dl/{name}:{line} imports {module}; the package never imports {parts[0]}.")
        # `from hf_dl import x` is also listed as hf_dl.x, which names the layer
        elif parts[0] == "hf_dl" and len(parts) > 1 and layer != "__init__":
            shared = {".".join(parts[:2]), ".".join(parts[:3])} & EVERYWHERE
            if parts[1] not in ALLOWED[layer] | {layer} and not shared:
                found.append(f"hf_dl/{name}:{line} imports {module}; {layer} may not import {parts[1]}.")
    if layer in ("models", "programs"):
        found += find_unportable(source, name)
    return found


def find_unportable(source, name):
    """Sentences about imports that fail in the copy of the code in a checkpoint."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            bad = any(alias.name.split(".")[0] == "hf_dl" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            absolute = node.level == 0 and node.module.split(".")[0] == "hf_dl"
            sibling = node.level == 1 and node.module is not None and "." not in node.module
            bad = absolute or (node.level > 0 and not sibling)
        else:
            continue
        if bad:
            found.append(f"hf_dl/{name}:{node.lineno} `{ast.unparse(node)}`; write `from .file import name`.")
    return found


@pytest.mark.parametrize("name", FILES)
def test_imports_keep_the_layers(name):
    assert find_violations((PACKAGE / name).read_text(), name) == []


def test_files_that_every_layer_may_import_import_nothing_else():
    for module in EVERYWHERE:
        name = module.removeprefix("hf_dl.").replace(".", "/") + ".py"
        imported = {".".join(found.split(".")[:3]) for _, found in read_imports((PACKAGE / name).read_text(), name)}
        assert {found for found in imported if found.startswith("hf_dl")} <= EVERYWHERE


def test_every_file_is_in_a_layer():
    assert {layer_of(name) for name in FILES} <= {*ALLOWED, "__init__"}
    assert len(FILES) > 15


def test_models_is_one_flat_folder():
    files = [name for name in FILES if name.startswith("models/")]
    assert files and all(name.count("/") == 1 for name in files)


def test_only_the_package_itself_loads_the_models():
    """`import hf_dl` stays fast, because hf_dl/__init__.py imports only hf_dl.models, and only when needed."""
    source = (PACKAGE / "__init__.py").read_text()
    assert {module for _, module in read_imports(source, "__init__.py") if module.startswith("hf_dl")} == {
        "hf_dl.models"
    }


@pytest.mark.parametrize(
    "name, source",
    [
        ("models/x.py", "from . import layers_attention"),
        ("models/x.py", "from .. import data"),
        ("models/x.py", "from ..metrics import segmentation"),
        ("models/x.py", "from ..metrics.segmentation import adjusted_rand_index"),
        ("models/x.py", "from .parts.attention import SlotAttention"),
        ("models/x.py", "import hf_dl"),
        ("models/x.py", "import numpy, hf_dl.models.slot_autoencoder as s"),
        ("models/x.py", "from hf_dl.models.slot_autoencoder import SlotAutoencoderConfig"),
        ("models/x.py", "def f():\n    from hf_dl.data import scenes"),
        ("models/__init__.py", "from hf_dl import training"),
        ("programs/x.py", "from ..data import scenes"),
        ("data/x.py", "from hf_dl.models.slot_autoencoder import SlotAutoencoderModel"),
        ("data/x.py", "from ..metrics import segmentation"),
        ("metrics/x.py", "from ..data import scenes"),
        ("metrics/x.py", "from .. import models"),
        ("explain.py", "from .models import slot_autoencoder"),
        ("pipelines/x.py", "from hf_dl.data import scenes"),
        ("training/x.py", "from hf_dl import data"),
        ("training/x.py", "from ..models.slot_autoencoder import SlotAutoencoderModel"),
        ("reporting/x.py", "from hf_dl.training.args import TrainingArgs"),
        ("reporting/x.py", "import importlib\nimportlib.import_module('hf_dl.models')"),
        ("reporting/x.py", "import scripts.publish"),
        ("data/x.py", "from tests.conftest import x"),
        ("training/x.py", "from ..recipes import slots"),
        ("reporting/x.py", "from hf_dl.recipes.slots import evaluate"),
        ("recipes/x.py", "from hf_dl.demo import examples"),
        ("recipes/x.py", "from hf_dl.cli import main"),
        ("recipes/x.py", "import scripts.train_slots"),
        ("demo/x.py", "from ..cli import main"),
        ("publishing.py", "from .cli import main"),
    ],
)
def test_a_wrong_import_is_found(name, source):
    assert find_violations(source, name)


@pytest.mark.parametrize(
    "name, source",
    [
        (
            "models/x.py",
            "import torch\nfrom transformers import AutoModel\nfrom .layers_attention import SlotAttention",
        ),
        ("data/x.py", "from ..programs import parse\nfrom .raycast import render\nfrom . import raycast"),
        ("metrics/x.py", "from hf_dl.programs import execute\nfrom .segmentation import adjusted_rand_index"),
        ("pipelines/x.py", "from hf_dl.models.slot_autoencoder import SlotAutoencoderModel\nfrom ..programs import p"),
        ("training/x.py", "from . import checkpoint\nfrom .args import TrainingArgs"),
        ("recipes/x.py", "from hf_dl.models.x import X\nfrom hf_dl.training.run import R\nfrom . import slots"),
        ("demo/x.py", "from ..recipes.slots import load_images\nfrom ..data import scenes"),
        ("cli.py", "from .recipes import slots\nfrom .publishing import publish\nfrom . import demo"),
        ("data/x.py", "from ..models.image_input import open_image"),
        ("data/x.py", "from ..progress import Progress"),
    ],
)
def test_a_right_import_is_not(name, source):
    assert find_violations(source, name) == []


# ---------------------------------------------------------------------------------------------------------------------
# Scripts and Spaces

PROGRAMS = sorted(
    path.relative_to(ROOT).as_posix() for name in ("scripts", "spaces") for path in (ROOT / name).rglob("*.py")
)
SCRIPTS = {Path(name).stem for name in PROGRAMS if name.startswith("scripts/")}


def find_script_violations(source, name):
    """Sentences about a script or a Space that changes the import path or imports another script."""
    found = [
        f"{name}:{node.lineno} uses sys.path; import from hf_dl instead."
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path")
        or (isinstance(node, ast.ImportFrom) and node.module == "sys" and any(a.name == "path" for a in node.names))
    ]
    relative = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.level]
    imported = [(node.lineno, ast.unparse(node)) for node in relative]
    imported += [
        (line, module)
        for line, module in read_imports(source, name)
        if module.split(".")[0] in OUTSIDE | SCRIPTS and line not in {node.lineno for node in relative}
    ]
    found += [f"{name}:{line} imports {module}; move the shared code to hf_dl/recipes." for line, module in imported]
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_scripts_stand_alone(name):
    assert find_script_violations((ROOT / name).read_text(), name) == []


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.path.insert(0, '.')",
        "import sys\nsys.path += ['.']",
        "from sys import path",
        "import evaluate_slots",
        "import evaluate_slots as slots",
        "from train_slots import Args",
        "from scripts import train_slots",
        "from scripts.train_slots import Args",
        "from . import train_slots",
        "from .train_slots import Args",
        "def f():\n    import importlib\n    importlib.import_module('train_slots')",
    ],
)
def test_a_wrong_import_of_a_script_is_found(source):
    assert find_script_violations(source, "scripts/train_x.py")


def test_a_right_import_of_a_script_is_not():
    source = (
        "import sys\nfrom hf_dl.recipes import slots\nfrom hf_dl.recipes.slots import load_images\nprint(sys.argv)"
    )
    assert find_script_violations(source, "scripts/train_x.py") == []
