"""Record every operation of a network in one forward pass, and the module that makes it.

`trace` calls the network under a `TorchDispatchMode`, which sees all functions of torch below autograd. Hooks keep
the stack of running modules, so that functional calls such as `F.relu(x)` or `x + y` are known, too. No numbers are
needed: networks and images on the meta device or with fake tensors use no memory.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .arithmetic_fields import Field, Part, Window, combine
from .arithmetic_formulas import Call, bind, multiply_adds, window_of
from .arithmetic_rules import FACTORIES, propagate

IMAGE = -1  # number of the image among the operations
SAVED_RESULTS = ("relu", "sigmoid", "tanh", "softmax", "attention", "exp", "sqrt", "rsqrt", "reciprocal")
"""Functions whose result is saved for backward, by the names of `Call.label`."""


@dataclass(frozen=True)
class Result:
    """An output.

    Attributes:
        shape: Its shape.
        bytes: Bytes of its values.
        in_place: Whether it overwrites an input.
        field: Its receptive field, or None.
    """

    shape: tuple[int, ...]
    bytes: int
    in_place: bool
    field: Field | None


@dataclass
class Operation:
    """One operation.

    Attributes:
        key: Name of the module that makes it, and the number of that module's call.
        leaf: Whether the module has no submodules.
        call: The call. Its tensors are kept only as long as the operation is recorded.
        inputs: Numbers of the operations that made its inputs; `IMAGE` for the image.
        parameters: Names of the parameters that it is the first to use.
        result: The first output.
        macs: Multiply-adds and their formula.
        spatial: Input and output sizes along the dimensions of the window.
        before: Field of its first input, or None.
        saved_bytes: Bytes of the tensors that are saved for backward, without parameters, buffers and the image.
        window: The window of a convolution or a pooling layer.
    """

    key: tuple[str, int]
    leaf: bool
    call: Call
    inputs: set[int]
    parameters: list[str]
    result: Result
    macs: tuple[int, str]
    spatial: tuple[tuple[int, ...], ...]
    before: Field | None = None
    saved_bytes: int = 0
    window: Window | None = None


@dataclass
class Trace:
    """The operations of a forward pass.

    Attributes:
        operations: The operations, in their order.
        module_saved: Bytes saved for backward inside each call of a module without submodules.
        results: The output of each call of a module without submodules.
        modules: The modules by name.
        output: Number of the operation that made the output.
        outputs: Numbers of the operations that made any output.
    """

    operations: list[Operation]
    module_saved: dict[tuple[str, int], int]
    results: dict[tuple[str, int], Result]
    modules: dict[str, nn.Module]
    output: int
    outputs: set[int]


@dataclass
class _Recorder(TorchDispatchMode):
    model: nn.Module
    image: torch.Tensor
    operations: list[Operation] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()
        self.modules = dict(self.model.named_modules())
        self.names = {module: name for name, module in self.modules.items()}
        self.parameters = {_storage(p): name for name, p in self.model.named_parameters()}
        self.constants = {*self.parameters, *(_storage(b) for b in self.model.buffers()), _storage(self.image)}
        self.unused = set(self.parameters.values())
        self.fields = WeakTensorKeyDictionary()
        self.fields[self.image] = Field.of_image(self.image.shape)
        self.makers = {_storage(self.image): IMAGE}  # of storages
        self.written: dict[int, dict[int, Field]] = {}  # storages that were changed in place, by offset
        self.stack: list[tuple[str, int]] = [("", 0)]
        self.calls: dict[str, int] = {}
        self.saved: dict[int, int] = {}  # storages that were counted
        self.pending, self.module_saved, self.results = 0, {}, {}

    # -----------------------------------------------------------------------------------------------------------------
    # Modules

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep the stack of running modules."""
        with ExitStack() as stack:
            for module in self.names:
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            yield

    def _enter(self, module: nn.Module, _: Any) -> None:
        name = self.names[module]
        self.calls[name] = self.calls.get(name, 0) + 1
        self.stack.append((name, self.calls[name]))

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        key = self.stack.pop()
        if isinstance(output, torch.Tensor) and self._is_leaf(key):
            self.results[key] = self._result(output, args)

    def _result(self, output: torch.Tensor, inputs: Any) -> Result:
        before = {_storage(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)}
        size = output.numel() * output.element_size()
        return Result(tuple(output.shape), size, _storage(output) in before, self._find(output))

    def _is_leaf(self, key: tuple[str, int]) -> bool:
        return next(self.modules[key[0]].children(), None) is None

    # -----------------------------------------------------------------------------------------------------------------
    # Operations

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call the function and record it."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        name = function._schema.name.partition("::")[2]
        if inputs and outputs and name not in FACTORIES and not name.startswith("new_"):
            call = Call(name, bind(function, args, kwargs), outputs)
            self._record(function, call, inputs)
        return result

    def _find(self, tensor: Any) -> Field | None:
        if not isinstance(tensor, torch.Tensor):
            return None
        found, pieces = self.fields.get(tensor), list(self.written.get(_storage(tensor), {}).values())
        if found is not None or not pieces:
            return found
        # The tensor was written through views. If these are blocks of its rows, their fields are joined.
        rest, rows = pieces[0].dims[1:], [math.prod(p.size for p in piece.dims[0]) for piece in pieces if piece.dims]
        regular = all(
            piece.dims and piece.dims[1:] == rest and all(part.axis is None for part in piece.dims[0])
            for piece in pieces
        )
        size = sum(rows) * math.prod(part.size for dim in rest for part in dim)
        if not regular or size != tensor.numel() or not tensor.is_contiguous():
            whole = combine([replace(piece.mix(), dims=()) for piece in pieces], ())
            return replace(whole, dims=tuple((Part(length),) for length in tensor.shape))
        resized = [replace(piece, dims=((Part(sum(rows)),), *rest)) for piece in pieces]
        return combine(resized, (sum(rows), *(math.prod(p.size for p in dim) for dim in rest))).reshape(tensor.shape)

    def _record(self, function: Any, call: Call, inputs: list[torch.Tensor]) -> None:
        fields = propagate(call, inputs, self._find, pointwise=_is_pointwise(function))
        before = {_storage(tensor) for tensor in inputs}
        for out, found in zip(call.outputs, fields, strict=True):
            if found is not None:
                self.fields[out] = found
                if not function.is_view and _storage(out) in before:
                    self.written.setdefault(_storage(out), {})[out.storage_offset()] = found
        if function.is_view:  # no work, no memory
            return
        names = [self.parameters[_storage(t)] for t in inputs if _storage(t) in self.parameters]
        makers = {self.makers[_storage(t)] for t in inputs if _storage(t) in self.makers}
        if not (names or makers):
            return
        self.makers |= {_storage(out): len(self.operations) for out in call.outputs}
        names = [name for name in dict.fromkeys(names) if name in self.unused]
        self.unused -= set(names)
        window = window_of(call)
        count = 0 if window is None else len(window.kernel)
        sizes = [] if window is None else [call.image.shape[-count:], call.outputs[0].shape[-count:]]
        self.operations.append(
            Operation(
                key=self.stack[-1],
                leaf=self._is_leaf(self.stack[-1]),
                call=call,
                inputs=makers,
                parameters=names,
                result=self._result(call.outputs[0], inputs),
                macs=multiply_adds(call),
                spatial=tuple(tuple(size) for size in sizes),
                before=next((found for t in inputs if (found := self._find(t)) is not None), None),
                saved_bytes=self.pending,
                window=window,
            )
        )
        self.pending = 0

    # -----------------------------------------------------------------------------------------------------------------
    # Tensors saved for backward

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count the storage of a saved tensor once, for the first module or function that saves it."""
        storage = _storage(tensor)
        if storage in self.constants or storage in self.saved:
            return tensor
        self.saved[storage] = size = tensor.untyped_storage().nbytes()
        key = self.stack[-1]
        if self._is_leaf(key):
            self.module_saved[key] = self.module_saved.get(key, 0) + size
            return tensor
        last = self.operations[-1] if self.operations else None
        outputs = [] if last is None else [_storage(out) for out in last.call.outputs]
        # Results are saved after the call, and inputs before it.
        if storage in outputs[1:] or (storage in outputs[:1] and last.call.label in SAVED_RESULTS):
            last.saved_bytes += size
        else:
            self.pending += size
        return tensor


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@functools.cache
def _is_pointwise(function: Any) -> bool:
    """Return whether torch tags a function as elementwise, in the form with or without `out`."""
    packet = function._overloadpacket
    return any(torch.Tag.pointwise in getattr(packet, name).tags for name in packet.overloads())


def trace(model: nn.Module, image: torch.Tensor, *, training: bool = False) -> Trace:
    """Call a network once and record its operations.

    Args:
        model: The network. It gets the image as its only argument.
        image: Images (batch, channels, height, width).
        training: Whether modules are in training mode. Buffers and modes are restored afterwards.

    Returns:
        The operations.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    recorder = _Recorder(model, image)
    try:
        model.train(training)
        hooks = torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda tensor: tensor)
        with recorder.running(), torch.enable_grad(), hooks, recorder:
            result = model(image)
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
    tensors, logits = _tensors(result), getattr(result, "logits", None)
    found = [recorder.makers[_storage(t)] for t in tensors if _storage(t) in recorder.makers]
    main = found[0] if found else IMAGE
    if logits is not None:
        main = recorder.makers.get(_storage(logits), main)
    for operation in recorder.operations:
        operation.call = Call(operation.call.name, {}, [])  # without the tensors
    return Trace(recorder.operations, recorder.module_saved, recorder.results, recorder.modules, main, {main, *found})


def _tensors(result: Any) -> list[torch.Tensor]:
    values = tree_leaves(dict(result)) if isinstance(result, dict) else tree_leaves(result)
    return [value for value in values if isinstance(value, torch.Tensor)]


@dataclass
class Step:
    """A line of the tables: a call of a module without submodules, or a function that another module calls.

    Attributes:
        name: Name of the module.
        number: Number of the module's call.
        operation: Class of the module, or name of the function.
        operations: Its operations.
        result: Its output.
        inputs: Numbers of the steps that made its inputs; `IMAGE` for the image.
        saved_bytes: Bytes saved for backward.
    """

    name: str
    number: int
    operation: str
    operations: list[Operation]
    result: Result
    inputs: set[int] = field(default_factory=set)
    saved_bytes: int = 0

    @property
    def main(self) -> Operation:
        """Return the operation with a window or a matrix product, or else the last operation."""
        heavy = [each for each in self.operations if each.macs[0] or each.window is not None]
        return heavy[0] if heavy else self.operations[-1]

    @property
    def parameters(self) -> list[str]:
        """Return the names of the parameters that the step is the first to use."""
        return [name for each in self.operations for name in each.parameters]


def make_steps(found: Trace) -> tuple[list[Step], int]:
    """Join the operations of each module without submodules, unless it has several windows or matrix products.

    Args:
        found: The operations.

    Returns:
        The steps that contribute to an output, and the number of the step that makes the first output.
    """
    heavy: dict[tuple[str, int], int] = {}
    for each in found.operations:
        heavy[each.key] = heavy.get(each.key, 0) + bool(each.macs[0] or each.window is not None)
    steps, places, started = [], {IMAGE: IMAGE}, set()
    previous = None  # module call of the last step, if its operations are joined
    for number, each in enumerate(found.operations):
        joined = each.leaf and heavy[each.key] <= 1
        result = found.results.get(each.key, each.result) if joined else each.result
        if not joined or previous != each.key:
            steps.append(_start(each, found.modules, joined=joined, result=result))
            if each.leaf and each.key not in started:
                started.add(each.key)
                steps[-1].saved_bytes = found.module_saved.get(each.key, 0)
        previous = each.key if joined else None
        step, places[number] = steps[-1], len(steps) - 1
        step.operations.append(each)
        step.inputs |= {places[i] for i in each.inputs} - {places[number]}
        step.saved_bytes += each.saved_bytes
    return _prune(steps, places[found.output], {places[i] for i in found.outputs})


def _start(first: Operation, modules: dict[str, nn.Module], *, joined: bool, result: Result) -> Step:
    """Make a step. A function with parameters has the name of the module that owns them."""
    name, number = first.key
    label = type(modules[name]).__name__ if joined else first.call.label
    if not joined and first.parameters:
        name, number = first.parameters[0].rpartition(".")[0], 1
    return Step(name, number, label, [], result)


def _prune(steps: list[Step], output: int, outputs: set[int]) -> tuple[list[Step], int]:
    """Remove steps that contribute to no output, such as checks of values."""
    kept = set(outputs)
    for number in range(len(steps) - 1, -1, -1):
        if number in kept:
            kept |= steps[number].inputs
    order = sorted(kept - {IMAGE})
    new = {IMAGE: IMAGE} | {number: place for place, number in enumerate(order)}
    for number in order:
        steps[number].inputs = {new[source] for source in steps[number].inputs}
    return [steps[number] for number in order], new[output]
