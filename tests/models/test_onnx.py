"""Classifiers exported to ONNX give the logits of torch."""

import numpy as np
import onnxruntime
import pytest
import torch

from tests.models import test_conv_classifier, test_norm_resnet, test_small_vit

slow = pytest.mark.slow
KINDS = [
    test_conv_classifier.TestHierarchical,
    pytest.param(test_conv_classifier.TestSoftmax, marks=slow),
    pytest.param(test_conv_classifier.TestTwoLevel, marks=slow),
    pytest.param(test_conv_classifier.TestAdaptiveWithBatchNorm, marks=slow),
    pytest.param(test_norm_resnet.TestBatchInstanceWithProjections, marks=slow),
    pytest.param(test_norm_resnet.TestGroup, marks=slow),
    pytest.param(test_small_vit.TestForImageClassification, marks=slow),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_exported_to_onnx_has_the_logits_of_torch(kind, tmp_path):
    torch.manual_seed(0)
    contract = kind()
    model = contract.model_class(contract.config()).eval()
    dynamic = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.onnx.export(
        model, kwargs=contract.exported_inputs(2), dynamo=True, dynamic_shapes=dynamic, verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for size in (2, 5):
        inputs = contract.exported_inputs(size)
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            expected = model(**inputs).logits.numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
