"""Tests that every model of the package must pass. Test classes inherit `ModelContract` and define a tiny config."""

import json
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor

from tests.memory import aligned


class ModelContract:
    """Tests of a `PreTrainedModel`.

    A subclass sets `model_class`, `auto_classes` and `output_key`, and defines `config()` and `inputs(batch)`.
    """

    model_class = None
    processor_class = None
    auto_classes = ()  # names of Auto classes that must load the saved model
    output_key = "logits"  # the field of the output that is compared
    frozen = ()  # parameters that are not trained
    overfit_steps = 300
    overfit_learning_rate = 3e-3
    row_tolerance = 1e-5  # largest difference between a row of a batch and the row alone
    overfit_ratio = 0.1  # largest final loss on eight examples, as a fraction of the first

    def config(self):
        raise NotImplementedError

    def inputs(self, batch):
        """Return keyword arguments of forward with independent random rows."""
        raise NotImplementedError

    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return self.model_class(self.config()).eval()

    def answer(self, model, inputs):
        torch.manual_seed(0)
        return getattr(model(**inputs), self.output_key)

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
        expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        found = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
        assert expected.keys() == found.keys()
        for name in expected:
            assert torch.equal(expected[name], found[name]), name
        assert not loaded.training
        inputs = self.inputs(3)
        assert torch.equal(self.answer(model, inputs), self.answer(aligned(loaded), inputs))
        before, after = self.config().to_dict(), loaded.config.to_dict()
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
    print(type(transformers.AutoImageProcessor.from_pretrained(".", trust_remote_code=True)).__name__)
"""
        printed = run_fresh(program, cwd=tmp_path)
        if self.processor_class is not None:
            assert printed.strip() == self.processor_class.__name__
        for name in self.auto_classes:
            found = load_file(tmp_path / f"{name}.safetensors")["output"]
            torch.testing.assert_close(found, self.answer(model, inputs), rtol=1e-5, atol=1e-6)
        assert (
            json.loads((tmp_path / "config.json").read_text())["model_type"]
            == self.model_class.config_class.model_type
        )

    def test_every_parameter_gets_a_gradient(self, model):
        model.train()
        model(**self.inputs(4)).loss.backward()
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
            loss = model(**self.inputs(4)).loss
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)

    def test_compiles_to_the_same_numbers(self, model):
        # aot_eager traces like inductor, but does not need a C++ compiler.
        inputs = self.inputs(2)
        expected = self.answer(model, inputs)
        try:
            compiled = torch.compile(model, backend="aot_eager")
            # After a graph break, such as drawing from a generator, dynamo reads .grad of the tensors it resumes with.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            torch.testing.assert_close(self.answer(compiled, inputs), expected, rtol=1e-4, atol=1e-5)
        finally:
            torch.compiler.reset()

    def test_overfits_eight_examples(self):
        torch.manual_seed(0)
        model, inputs = self.model_class(self.config()).train(), self.inputs(8)
        optimizer = torch.optim.Adam(model.parameters(), lr=self.overfit_learning_rate)
        first = None
        for _ in range(self.overfit_steps):
            loss = model(**inputs).loss
            first = first or loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < self.overfit_ratio * first
