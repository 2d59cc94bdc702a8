"""Tests that every model of the package must pass. Test classes inherit `ModelContract` and define a tiny config."""

import copy
import json
import math
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.ao.quantization import quantize_dynamic
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel, Trainer, TrainingArguments

from hf_dl.models.layers_problem_type import PROBLEM_TYPES
from tests.memory import aligned

HALVES = (torch.bfloat16, torch.float16)
TASKS = {
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForObjectDetection": "object-detection",
}
_SAME = "another class tests the same code"
SAME_CODE = dict.fromkeys(
    (
        "loads_in_a_fresh_process_without_the_package",
        "exports_with_any_batch_size",
        "trainer_trains_and_evaluates",
        "copies_are_equal_and_independent",
        "gradient_checkpointing_keeps_the_gradients",
        "problem_type",
    ),
    _SAME,
)
"""For `skipped` of classes that differ from another one in an option of a layer."""


def owners(model, name):
    """Yield the module of this name, and the modules that contain it, the innermost first."""
    while name:
        yield model.get_submodule(name)
        name = name.rpartition(".")[0]
    yield model


def cast(inputs, dtype):
    """Return the inputs with floating-point tensors in another precision."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


class ModelContract:
    """Tests of a `PreTrainedModel`.

    A subclass sets `model_class`, `auto_classes` and `output_key`, and defines `config()` and `inputs(batch)`. Tests
    that do not apply stand in `skipped`, with the reason. `pytest -rs` shows these reasons. Tests in `slow` are slow
    tests of this class, because another test of the default run covers the same code.
    """

    skipped = {}  # name of a test without "test_": why it does not apply
    slow = {}  # name of a test without "test_": which other test covers the same code

    model_class = None
    processor_class = None
    auto_classes = ()  # names of Auto classes that must load the saved model
    output_key = "logits"  # the field of the output that is compared
    frozen = ()  # parameters that are not trained
    overfit_steps = 300
    overfit_learning_rate = 3e-3
    row_tolerance = 1e-5  # largest difference between a row of a batch and the row alone
    overfit_ratio = 0.1  # largest final loss on eight examples, as a fraction of the first
    half_tolerance = 0.05  # largest difference of a forward pass in half precision, as a fraction of the output
    problem_types = ()  # of a classifier, which must refuse the others; empty for other models
    dynamo: dict[str, bool] = {}  # settings of torch._dynamo.config that torch.compile needs for a single graph
    checkpoints = ()  # parts that gradient checkpointing computes again; empty if it must be refused

    @pytest.fixture(autouse=True)
    def supported(self, request):
        reason = self.skipped.get(request.function.__name__.removeprefix("test_"))
        if reason:
            pytest.skip(f"{type(self).__name__}: {reason}")

    def config(self):
        raise NotImplementedError

    def inputs(self, batch):
        """Return keyword arguments of forward with independent random rows."""
        raise NotImplementedError

    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return self.model_class(self.config()).eval()

    def load(self, folder, dtype):
        return self.model_class.from_pretrained(folder, dtype=dtype)

    def answer(self, model, inputs):
        torch.manual_seed(0)
        return getattr(model(**inputs), self.output_key)

    def smooth_answer(self, model, inputs):
        """Return an output that depends continuously on the weights."""
        return self.answer(model, inputs)

    def loss(self, model, inputs):
        """Return a scalar that depends on all parameters which are trained."""
        return model(**inputs).loss

    def exported_inputs(self, batch):
        """Return the inputs of inference, which an exported model takes."""
        return {name: value for name, value in self.inputs(batch).items() if name != "labels"}

    def test_forward_takes_main_input_first_and_puts_the_loss_first(self, model):
        inputs = self.inputs(2)
        assert model.main_input_name == next(iter(inputs))
        output = model(**inputs)
        assert next(iter(output.keys())) == "loss" and output.loss.ndim == 0
        as_tuple = model(**inputs, return_dict=False)
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.loss)

    def test_save_and_load_give_every_parameter_and_buffer_back(self, model, tmp_path):
        with torch.no_grad():  # with initial values, a tensor that is not loaded would go unnoticed
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor) * 0.1)
        model.save_pretrained(tmp_path)
        assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
        loaded = self.model_class.from_pretrained(tmp_path)
        before, after = self.config().to_dict(), loaded.config.to_dict()
        expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        found = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
        assert expected.keys() == found.keys()
        for name in expected:
            assert torch.equal(expected[name], found[name]), name
        assert not loaded.training
        inputs = self.inputs(3)
        assert torch.equal(self.answer(model, inputs), self.answer(aligned(loaded), inputs))
        written_by_saving = {"dtype", "architectures", "auto_map", "_name_or_path"}
        assert {k: after[k] for k in before if k not in written_by_saving} == {
            k: v for k, v in before.items() if k not in written_by_saving
        }

    def test_auto_classes_load_it(self, model, tmp_path):
        import transformers

        model.save_pretrained(tmp_path)
        assert type(AutoConfig.from_pretrained(tmp_path)) is self.model_class.config_class
        for name in self.auto_classes:
            assert type(getattr(transformers, name).from_pretrained(tmp_path)) is self.model_class, name
        if self.processor_class is not None:
            self.processor_class().save_pretrained(tmp_path)
            assert type(AutoImageProcessor.from_pretrained(tmp_path)) is self.processor_class

    def test_loads_in_a_fresh_process_without_the_package(self, model, tmp_path, run_fresh):
        from safetensors.torch import load_file, save_file

        model.save_pretrained(tmp_path)
        if self.processor_class is not None:
            self.processor_class().save_pretrained(tmp_path)
        inputs = self.inputs(2)
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, tmp_path / "inputs.safetensors")
        program = f"""
import sys
sys.modules["hf_dl"] = None  # from here on `import hf_dl` raises ImportError
import torch, transformers
from safetensors.torch import load_file, save_file
inputs = load_file("inputs.safetensors")
for name in {list(self.auto_classes)!r}:
    model = getattr(transformers, name).from_pretrained(".", trust_remote_code=True)
    torch.manual_seed(0)
    save_file({{"output": model(**inputs)["{self.output_key}"].contiguous()}}, name + ".safetensors")
if {self.processor_class is not None}:
    processor = transformers.AutoImageProcessor.from_pretrained(".", trust_remote_code=True)
    print(type(processor).__name__)
    for task in {[TASKS[name] for name in self.auto_classes if name in TASKS]}:
        transformers.pipeline(task, model, image_processor=processor)
"""
        printed = run_fresh(program, cwd=tmp_path)
        if self.processor_class is not None:
            assert printed.strip() == self.processor_class.__name__
            assert "is not supported" not in (tmp_path / "fresh_stderr.txt").read_text()  # by the pipeline of the task
        for name in self.auto_classes:
            found = load_file(tmp_path / f"{name}.safetensors")["output"]
            torch.testing.assert_close(found, self.answer(model, inputs), rtol=1e-5, atol=1e-6)
        assert (
            json.loads((tmp_path / "config.json").read_text())["model_type"]
            == self.model_class.config_class.model_type
        )

    def test_initialization_reaches_every_module(self, model):
        # transformers skips modules without own tensors in code outside of it, so they must have nothing to initialize
        for name, part in model.named_modules():
            owner = next((owner for owner in owners(model, name) if isinstance(owner, PreTrainedModel)), None)
            own = (*part.parameters(recurse=False), *part.buffers(recurse=False))
            if own or not type(owner).__module__.startswith("hf_dl."):
                continue
            before = {key: value.clone() for key, value in part.state_dict().items()}
            with torch.no_grad():
                owner._init_weights(part)
            changed = [key for key, value in part.state_dict().items() if not torch.equal(value, before[key])]
            assert not changed, (name, changed)

    def test_every_parameter_gets_a_gradient(self, model):
        model.train()
        self.loss(model, self.inputs(4)).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert p.grad is not None and p.grad.abs().sum() > 0, name
            else:
                assert name in self.frozen and p.grad is None, name

    def test_rows_of_a_batch_are_independent(self, model):
        inputs = self.inputs(4)
        together = self.answer(model, inputs)
        for row in range(4):
            alone = self.answer(model, {name: tensor[row : row + 1] for name, tensor in inputs.items()})
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=self.row_tolerance)

    def test_is_finite_under_bfloat16_autocast(self, model):
        model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.loss(model, self.inputs(4))
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)

    def test_compiles_to_the_same_numbers(self, model):
        # aot_eager traces like inductor, but does not need a C++ compiler.
        inputs = self.inputs(2)
        expected = self.answer(model, inputs)
        try:
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            with torch._dynamo.config.patch(**self.dynamo):
                torch.testing.assert_close(self.answer(compiled, inputs), expected, rtol=1e-4, atol=1e-5)
        finally:
            torch.compiler.reset()

    def test_overfits_eight_examples(self):
        torch.manual_seed(0)
        model, inputs = self.model_class(self.config()).train(), self.inputs(8)
        optimizer = torch.optim.Adam(model.parameters(), lr=self.overfit_learning_rate)
        first, low = None, 0
        for _ in range(self.overfit_steps):
            loss = self.loss(model, inputs)
            first = first or loss.item()
            low = low + 1 if loss.item() < self.overfit_ratio * first else 0
            if low == 3:  # not once by chance, because some models draw noise
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < self.overfit_ratio * first

    def test_runs_in_half_precision(self, model, tmp_path):
        """Loaded in half precision, and with all weights converted, the output is close to that of float32."""
        with torch.no_grad():
            expected = self.smooth_answer(model, self.inputs(2))
            model.save_pretrained(tmp_path)
            for dtype in HALVES:
                loaded = self.load(tmp_path, dtype)
                converted = copy.deepcopy(model).to(dtype)
                assert loaded.dtype == dtype and not loaded.training
                if issubclass(self.model_class, PreTrainedModel):
                    # Parts that stay in float32 do so in a new model, too.
                    new = self.model_class._from_config(self.config(), dtype=dtype)
                    kinds = [{name: each.dtype for name, each in m.state_dict().items()} for m in (new, loaded)]
                    assert kinds[0] == kinds[1]
                for each in (loaded, converted):
                    found = self.smooth_answer(each, cast(self.inputs(2), dtype))
                    error = (found.float() - expected).norm() / expected.norm()
                    assert error < self.half_tolerance, (dtype, error)

    def test_adapters_and_quantization_reach_every_linear_layer(self, model):
        """A layer whose weight is read instead of calling the layer has no adapter, and crashes after quantization."""
        inputs = self.inputs(12)
        with torch.no_grad():
            expected = self.smooth_answer(model, inputs)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated, but still the way to quantize for CPUs
                layers = {nn.Linear, nn.LSTM, nn.GRU, nn.GRUCell}
                quantized = quantize_dynamic(copy.deepcopy(model), layers, dtype=torch.qint8)
            found = self.smooth_answer(quantized, inputs)
            assert found.isfinite().all() and not torch.equal(found, expected)
        self.train_adapters(model)

    def test_adapters_train_with_gradient_checkpointing(self, model):
        if not self.checkpoints:
            pytest.skip(f"{type(self).__name__}: refuses gradient checkpointing")
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": True})  # needs an input with a gradient
        model.enable_input_require_grads()
        self.train_adapters(model)

    def train_adapters(self, model):
        """Check that every adapter of a linear layer gets a gradient."""
        names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        if not names:
            return
        config = LoraConfig(target_modules="|".join(map(re.escape, names)), init_lora_weights=False)
        inject_adapter_in_model(config, model.train())
        self.loss(model, self.inputs(12)).backward()
        adapters = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
        assert len(adapters) == 2 * len(names)
        for name, parameter in adapters.items():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name

    def test_the_config_can_ask_for_tuples(self, model):
        inputs = self.inputs(2)
        torch.manual_seed(0)
        expected = model(**inputs).to_tuple()
        model.config.return_dict = False
        torch.manual_seed(0)
        found = model(**inputs)
        assert isinstance(found, tuple) and len(found) == len(expected)
        assert all(
            torch.equal(*pair) for pair in zip(found, expected, strict=True) if isinstance(pair[0], torch.Tensor)
        )

    def test_copies_are_equal_and_independent(self, model):
        inputs = self.inputs(2)
        expected = self.answer(model, inputs)
        for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(self.answer(each, inputs), expected)
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter.zero_()
        assert torch.equal(self.answer(model, inputs), expected)

    def test_exports_with_any_batch_size(self, model):
        with torch.no_grad():
            batch = torch.export.Dim("batch", min=2, max=64)
            inputs = self.exported_inputs(2)
            program = torch.export.export(model, (), inputs, dynamic_shapes={name: {0: batch} for name in inputs})
            exported = program.module()
            for size in (2, 5):
                inputs = self.exported_inputs(size)
                expected = self.answer(model, inputs)
                torch.testing.assert_close(self.answer(exported, inputs), expected, rtol=1e-4, atol=1e-5)

    def test_gradient_checkpointing_keeps_the_gradients(self, model):
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        if not self.checkpoints:
            with pytest.raises(ValueError, match="does not support (activation|gradient) checkpointing"):
                enable()
            return
        model.train()
        gradients, runs = [], []
        parts = [module for name, module in model.named_modules() if any(part in name for part in self.checkpoints)]
        hooks = [part.register_forward_hook(lambda *args: runs.append(1)) for part in parts]
        for way in (lambda: None, enable):
            way()
            runs.clear()
            model.zero_grad()
            torch.manual_seed(0)
            self.loss(model, self.inputs(4)).backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            gradients[-1]["runs"] = len(runs)
        for hook in hooks:
            hook.remove()
        before, after = gradients
        assert before.pop("runs") < after.pop("runs")
        assert before.keys() == after.keys()
        for name, gradient in before.items():
            torch.testing.assert_close(after[name], gradient, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("kind", PROBLEM_TYPES)
    def test_problem_type(self, kind, model):
        if not self.problem_types:
            pytest.skip(f"{type(self).__name__}: not a classifier")
        assert model.num_labels == model.config.num_labels
        inputs = self.inputs(4)
        numbers = torch.randn(4, model.num_labels, generator=torch.Generator().manual_seed(0))
        single, multiple, regression = PROBLEM_TYPES
        labels = {single: inputs["labels"], multiple: (numbers > 0).float(), regression: numbers}[kind]
        if kind not in self.problem_types:
            with pytest.raises(ValueError, match=f"problem_type='{multiple}' does not work with this head"):
                model(**inputs | {"labels": (numbers > 0).float()})
            config = self.config().to_dict() | {"problem_type": kind}
            with pytest.raises(StrictDataclassError, match=f"problem_type='{kind}' does not work with this head"):
                self.model_class.config_class.from_dict(config)
            return
        if kind == regression:  # the others are found from the labels
            model.config.problem_type = kind
        output = model(**inputs | {"labels": labels})
        assert model.config.problem_type == kind
        expected = {single: F.cross_entropy, multiple: F.binary_cross_entropy_with_logits, regression: F.mse_loss}
        torch.testing.assert_close(output.loss, expected[kind](output.logits, labels))
        assert torch.equal(model(**self.exported_inputs(4)).logits, output.logits)
        if kind == single:
            model.config.problem_type = None
        with pytest.raises(ValueError, match=r"labels has shape \(4, 2\).*, expected"):
            model(**inputs | {"labels": torch.zeros(4, 2, dtype=torch.long)})

    def test_trainer_trains_and_evaluates(self, tmp_path):
        torch.manual_seed(0)
        model, inputs = self.model_class(self.config()), self.inputs(10)
        rows = [{name: value[row] for name, value in inputs.items()} for row in range(10)]
        args = TrainingArguments(
            output_dir=tmp_path,
            max_steps=5,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=5,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            eval_strategy="steps",
            eval_steps=5,
            save_strategy="steps",
            save_steps=5,
            load_best_model_at_end=True,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 5 and all(math.isfinite(loss) for loss in losses)
        found = trainer.evaluate()["eval_loss"]
        with torch.no_grad():
            assert found == pytest.approx(self.loss(model.eval(), inputs).item(), rel=1e-3)
        # The sum over the accumulated batches would be twice as large.
        assert losses[0] < 1.6 * found + 0.1, "the loss of accumulated batches is not divided by their number"
