"""The help of a script in a fraction of a second: its flags are read from the source, and nothing heavy is imported.

`python scripts/train_slots.py --help` first imports torch and transformers, which takes several seconds.
`hf-dl train slots --help` prints the same text through `quick_help`. It reads only the dataclass of the flags and
the names that this class uses. A name that comes from another package becomes an `Unknown`.
"""

import ast
import builtins
import dataclasses
import importlib
import operator
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_dl.training.args import format_help

PACKAGE = Path(__file__).resolve().parent
_OPERATORS = {ast.BitOr: operator.or_, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow}
_REAL = ("hf_dl.training.args", "hf_dl.training.schedules")  # they need only the standard library


class UnknownValueError(Exception):
    """The help needs a value that is only known after an import."""


class Unknown:
    """A value that is not evaluated, such as a model class. Only its docstring is known."""

    def __init__(self, doc: str | None = None):
        self.__doc__ = doc

    def __getattr__(self, name: str) -> "Unknown":
        if name.startswith("__"):
            raise AttributeError(name)
        return Unknown()

    def __call__(self, *args: Any, **kwargs: Any) -> "Unknown":
        """Return an unknown value."""
        return Unknown()

    def __iter__(self, *args: Any) -> Iterator[Any]:
        raise UnknownValueError

    __str__ = __format__ = __getitem__ = __iter__

    def __or__(self, other: Any) -> "Unknown":
        return self

    __ror__ = __or__


class Source(dict):
    """The names of a Python file, evaluated when they are used.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        super().__init__()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        self.doc, self.package = ast.get_docstring(tree), _package_of(path)
        self.nodes: dict[str, ast.AST] = {}
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                self.nodes[node.name] = node
            elif isinstance(node, ast.Import | ast.ImportFrom):
                self.nodes |= {alias.asname or alias.name.split(".")[0]: node for alias in node.names}
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.nodes |= {target.id: node for target in targets if isinstance(target, ast.Name)}

    def __missing__(self, name: str) -> Any:
        if name not in self.nodes:
            raise KeyError(name)
        node = self.nodes[name]
        if isinstance(node, ast.Import | ast.ImportFrom):
            value = self._import(node, name)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            value = Unknown(ast.get_docstring(node))
        else:
            value = self.evaluate(node.value)
        self[name] = value
        return value

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def evaluate(self, node: ast.expr) -> Any:
        """Return the value of an expression of this file.

        Raises:
            UnknownValueError: If the expression is of another kind than those that describe flags.
        """
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return self[node.id] if node.id in self or node.id in self.nodes else getattr(builtins, node.id)
            case ast.Attribute():
                return getattr(self.evaluate(node.value), node.attr)
            case ast.Tuple():
                return tuple(self._elements(node.elts))
            case ast.List():
                return self._elements(node.elts)
            case ast.Dict():
                return dict(zip(map(self.evaluate, node.keys), map(self.evaluate, node.values), strict=True))
            case ast.Subscript():
                return self.evaluate(node.value)[self.evaluate(node.slice)]
            case ast.BinOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](self.evaluate(node.left), self.evaluate(node.right))
            case ast.UnaryOp(op=ast.USub()):
                return -self.evaluate(node.operand)
            case ast.Lambda() if not ast.unparse(node.args):
                return lambda: self.evaluate(node.body)
            case ast.Call():
                named = {each.arg: self.evaluate(each.value) for each in node.keywords}
                return self.evaluate(node.func)(*self._elements(node.args), **named)
            case ast.JoinedStr():
                return "".join(str(self.evaluate(part)) for part in node.values)
            case ast.FormattedValue(conversion=-1, format_spec=None):
                return format(self.evaluate(node.value))
        raise UnknownValueError

    def _elements(self, nodes: list[ast.expr]) -> list[Any]:
        values = []
        for node in nodes:
            values += self.evaluate(node.value) if isinstance(node, ast.Starred) else [self.evaluate(node)]
        return values

    def read_class(self, name: str) -> type | None:
        """Build a dataclass with the fields of a class of this file, or return None if it is not a dataclass."""
        node = self.nodes.get(name)
        if isinstance(node, ast.ImportFrom):
            found = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            module = self._module(node)
            if module in _REAL:
                return getattr(importlib.import_module(module), found)
            source = open_module(module)
            return None if source is None else source.read_class(found)
        if not isinstance(node, ast.ClassDef):
            return None
        bases = []
        for base in node.bases:
            owner = self[base.value.id] if isinstance(base, ast.Attribute) else self
            bases.append(owner.read_class(base.attr if isinstance(base, ast.Attribute) else base.id))
        fields = [
            (each.target.id, self.evaluate(each.annotation), *([self.evaluate(each.value)] if each.value else []))
            for each in node.body
            if isinstance(each, ast.AnnAssign)
        ]
        return dataclasses.make_dataclass(name, fields, bases=tuple(bases))

    def _module(self, node: ast.ImportFrom) -> str:
        parts = self.package[: len(self.package) + 1 - node.level] if node.level else []
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _import(self, node: ast.Import | ast.ImportFrom, name: str) -> Any:
        alias = next(each for each in node.names if (each.asname or each.name.split(".")[0]) == name)
        module = self._module(node) if isinstance(node, ast.ImportFrom) else alias.name
        if module.split(".")[0] in sys.stdlib_module_names or module in _REAL:
            found = importlib.import_module(module)
            return getattr(found, alias.name) if isinstance(node, ast.ImportFrom) else found
        if isinstance(node, ast.Import):
            return Unknown()
        source = open_module(f"{module}.{alias.name}")
        if source is None and (source := open_module(module)) is not None:
            return source[alias.name]
        return Unknown() if source is None else source


def _package_of(path: Path) -> list[str]:
    folder = path.resolve().parent
    return ["hf_dl", *folder.relative_to(PACKAGE).parts] if folder.is_relative_to(PACKAGE) else []


_OPENED: dict[str, Source | None] = {}


def open_module(name: str) -> Source | None:
    """Open a module of hf_dl without importing it; None for other modules."""
    if name not in _OPENED:
        top, *parts = name.split(".")
        path = PACKAGE.joinpath(*parts)
        paths = [path.with_suffix(".py"), path / "__init__.py"] if top == "hf_dl" and parts else []
        _OPENED[name] = next((Source(each) for each in paths if each.is_file()), None)
    return _OPENED[name]


def quick_help(script: Path) -> str | None:
    """Return the text of `python script --help`, without importing torch.

    Args:
        script: A script whose flags are a dataclass with the name `Args`.

    Returns:
        The help, or None if the script has no such class, or if a text depends on code that must be imported.
    """
    source = Source(script)
    try:
        cls = source.read_class("Args")
        return None if cls is None else format_help(cls, script.name, source.doc)
    except UnknownValueError:
        return None
