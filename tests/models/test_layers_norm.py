import socket
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_dl.models import layers_norm_kernel
from hf_dl.models.layers_norm import (
    NORMS,
    BatchInstanceNorm2d,
    BatchNorm2d,
    GroupNorm2d,
    InstanceNorm2d,
    LayerNorm2d,
    check_norm,
    make_norm,
    standardize,
)
from hf_dl.models.layers_norm_kernel import Pool

CHANNELS, SHAPE = 8, (4, 8, 6, 5)


class TwoCalls(nn.Module):
    """Batch-instance normalization from two layers of torch, as in the code of its authors."""

    def __init__(self, channels=CHANNELS):
        super().__init__()
        self.batch, self.instance = nn.BatchNorm2d(channels, affine=False), nn.InstanceNorm2d(channels)
        self.weight, self.bias, self.gate = (nn.Parameter(torch.ones(channels)) for _ in range(3))

    def forward(self, x):
        weight, bias, gate = (p[:, None, None] for p in (self.weight, self.bias, self.gate))
        return weight * (gate * self.batch(x) + (1 - gate) * self.instance(x)) + bias


# Pairs of our layer and the layer of torch, with parameters in the same order. A new norm adds its reference here.
PAIRS = {
    "batch": lambda: (BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)),
    "batch, no affine": lambda: (BatchNorm2d(CHANNELS, affine=False), nn.BatchNorm2d(CHANNELS, affine=False)),
    "batch, no running": lambda: (
        BatchNorm2d(CHANNELS, track_running_stats=False),
        nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    ),
    "instance": lambda: (InstanceNorm2d(CHANNELS), nn.InstanceNorm2d(CHANNELS, affine=True)),
    "instance, no affine": lambda: (InstanceNorm2d(CHANNELS, affine=False), nn.InstanceNorm2d(CHANNELS)),
    "batch_instance": lambda: (BatchInstanceNorm2d(CHANNELS, gate_multiplier=1), TwoCalls()),
    "layer": lambda: (LayerNorm2d(CHANNELS), nn.GroupNorm(1, CHANNELS)),
    "layer, pixels": lambda: (LayerNorm2d(CHANNELS, image_size=SHAPE[2:]), nn.LayerNorm(SHAPE[1:])),
    "group": lambda: (GroupNorm2d(4, CHANNELS), nn.GroupNorm(4, CHANNELS)),
}
OURS = [name for name in NORMS if name not in ("none", "torch_batch")]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def make_pair(name, dtype):
    """Make both layers of a pair with the same random parameters."""
    ours, theirs = (module.to(dtype) for module in PAIRS[name]())
    draw = torch.Generator().manual_seed(0)
    named = dict(ours.named_parameters())
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=draw, dtype=torch.float64))
            named[key].copy_(parameter)
    assert named.keys() == dict(theirs.named_parameters()).keys()
    return ours, theirs


def make_images(dtype, memory_format=torch.contiguous_format, *, mean=1.0, seed=0, shape=SHAPE):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw, dtype=torch.float64) * 2 + mean
    x = x + torch.randn(shape[0], shape[1], 1, 1, generator=draw, dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=memory_format)


def forward_and_backward(module, x, seed=1):
    x = x.detach().requires_grad_()
    y = module(x)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    module.zero_grad()
    y.backward(dy.contiguous(memory_format=torch.preserve_format))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def assert_same(found, expected, tolerance):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        assert (ours - theirs).abs().max().item() <= tolerance * scale


# ---------------------------------------------------------------------------------------- equal to torch


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_equal_torch(name, dtype, tolerance, memory_format, monkeypatch):
    monkeypatch.setattr(layers_norm_kernel, "_BLOCK_BYTES", 2000)  # several blocks, of which the last one is smaller
    ours, theirs = make_pair(name, dtype)
    _, exact = make_pair(name, torch.float64)
    # A mean above 4 deviations shifts x. The group norm of torch in float32 and channels_last then has errors of 4e-5.
    for mean, other in ((1.0, theirs), (1.0, exact), (20.0, exact), (100.0, exact)):
        x = make_images(dtype, FORMATS[memory_format], mean=mean, seed=int(mean))
        found = forward_and_backward(ours, x)
        assert_same(found, forward_and_backward(other, x.double() if other is exact else x), tolerance)
        for tensor in found[:2]:
            assert tensor.is_contiguous(memory_format=FORMATS[memory_format])


@pytest.mark.parametrize("mean", [1.0, 30.0])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_equal_torch(momentum, mean):
    ours = BatchNorm2d(CHANNELS, momentum=momentum).double()
    theirs = nn.BatchNorm2d(CHANNELS, momentum=momentum).double()
    gated = BatchInstanceNorm2d(CHANNELS, momentum=momentum).double()
    for step in range(20):
        x = make_images(torch.float64, mean=mean, seed=step)
        assert_same(forward_and_backward(ours, x), forward_and_backward(theirs, x), 1e-10)
        gated(x)
    for key, expected in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gated.state_dict()[key], expected, rtol=1e-12, atol=1e-12)
    assert ours.num_batches_tracked == 20 and ours.num_batches_tracked.dtype == torch.int64
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    ours.eval(), theirs.eval()
    for module in (ours, theirs):
        module.requires_grad_(True)
    assert_same(forward_and_backward(ours, x), forward_and_backward(theirs, x), 1e-10)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_batch_instance_uses_running_statistics_for_the_batch_part_in_evaluation(dtype, tolerance, memory_format):
    ours, theirs = make_pair("batch_instance", dtype)
    for step in range(3):
        x = make_images(dtype, FORMATS[memory_format], seed=step)
        ours(x), theirs(x)
    ours.eval(), theirs.eval()
    assert_same(forward_and_backward(ours, x), forward_and_backward(theirs, x), tolerance)


@pytest.mark.parametrize("name", ["batch", "instance", "group", "layer", "layer, pixels"])
def test_state_dicts_are_compatible_with_torch(name):
    ours, theirs = make_pair(name, torch.float32)
    ours(make_images(torch.float32))
    theirs.load_state_dict(ours.state_dict())
    fresh, _ = PAIRS[name]()
    fresh.load_state_dict(theirs.state_dict())
    assert list(fresh.state_dict()) == list(theirs.state_dict())
    for key, value in ours.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value)


def test_no_layer_calls_the_normalization_of_torch(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("called")

    for name in ("batch_norm", "instance_norm", "group_norm", "layer_norm", "native_batch_norm", "native_group_norm"):
        monkeypatch.setattr(torch, name, refuse)
        monkeypatch.setattr(nn.functional, name, refuse, raising=False)
    for name in OURS:
        assert not isinstance(make_norm(name, CHANNELS), (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))
        with torch.profiler.profile() as profile:
            forward_and_backward(make_norm(name, CHANNELS), make_images(torch.float32))
        assert not [event.key for event in profile.key_averages() if event.key.endswith("_norm")]


# ---------------------------------------------------------------------------------------- numerically difficult inputs


@pytest.mark.parametrize("shape", [(4, 8, 128, 128), (64, 8, 4, 4)])
@pytest.mark.parametrize("name", ["batch", "instance", "batch_instance", "layer", "group"])
def test_stable_at_a_mean_of_ten_thousand(name, shape):
    x = make_images(torch.float32, mean=0.0, shape=shape) + 1e4  # rounded to float32
    ours, theirs = make_pair(name, torch.float32)
    exact = make_pair(name, torch.float64)[1]
    found, expected = forward_and_backward(ours, x), forward_and_backward(exact, x.double())
    assert_same(found[:2], expected[:2], 2e-5)
    assert_same(found[2:], expected[2:], 2e-4)  # sums over thousands of pixels


@pytest.mark.parametrize("mean", [10.0, 1e3, 1e4, 1e5])
def test_the_variance_is_exact_to_a_millionth(mean):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(32, 16, 64, 64, generator=draw) + mean
    norm = BatchNorm2d(16, momentum=1.0)
    norm(x)
    expected = x.double().var((0, 2, 3))
    assert ((norm.running_var.double() - expected) / expected).abs().max() < 1e-6
    _, mean_of, var_of, _ = standardize(x, None, None, [Pool()], eps=1e-5)
    expected = x.double().var((2, 3), correction=0)
    assert ((var_of - expected) / expected).abs().max() < 1e-6
    torch.testing.assert_close(mean_of, x.double().mean((2, 3)), rtol=1e-9, atol=1e-5)
    naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    if mean >= 1e3:  # the naive formula fails here
        assert ((naive - x.double().var((0, 2, 3))) / expected.mean()).abs().max() > 1e-3


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", OURS)
def test_statistics_are_float32_under_autocast(name, memory_format):
    norm, exact = make_norm(name, CHANNELS), make_norm(name, CHANNELS).double()
    x = make_images(torch.bfloat16, FORMATS[memory_format], mean=50.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = forward_and_backward(norm, x)
    expected = forward_and_backward(exact, x.double())
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in norm.parameters())
    assert found[0].is_contiguous(memory_format=FORMATS[memory_format])
    # Only y is rounded to 8 bits. Sums in bfloat16 would have errors of whole units.
    assert (found[0] - expected[0]).abs().max() <= 2**-8 * expected[0].abs().max()
    for buffer, other in zip(norm.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(buffer.double(), other.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mean", [0.5, 40.0])
@pytest.mark.parametrize("name", PAIRS)
def test_gradcheck(name, mean, training):
    ours, _ = make_pair(name, torch.float64)
    x = make_images(torch.float64, mean=mean, shape=(3, 8, *((6, 5) if "pixels" in name else (3, 2))))
    ours(x)
    ours.train(training)
    names = list(dict(ours.named_parameters()))

    def run(x, *parameters):
        return torch.func.functional_call(ours, dict(zip(names, parameters, strict=True)), (x,))

    inputs = [x, *ours.parameters()]
    if "gate" in names:  # inside the bounds, where values are not clipped
        with torch.no_grad():
            ours.gate.clamp_(0.1, 0.9)
    assert torch.autograd.gradcheck(run, [t.detach().requires_grad_() for t in inputs])


def test_second_derivatives_raise_an_error():
    x = make_images(torch.float64).requires_grad_()
    (dx,) = torch.autograd.grad(BatchNorm2d(CHANNELS).double()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("name", OURS)
def test_non_contiguous_inputs_and_frozen_parameters(name):
    x = make_images(torch.float64, shape=(8, 16, 6, 5))
    norm = make_norm(name, CHANNELS).double()
    part = x[::2, ::2]
    assert_same(forward_and_backward(norm, part), forward_and_backward(norm, part.contiguous()), 1e-12)
    norm.requires_grad_(False).zero_grad()
    part = part.clone().requires_grad_()
    norm(part).sum().backward()
    assert part.grad is not None and all(p.grad is None for p in norm.parameters())
    norm.requires_grad_(True)
    norm(part.detach()).square().sum().backward()
    assert all(p.grad is not None for p in norm.parameters())


# ---------------------------------------------------------------------------------------- compilers


def compare_compiled(name, backend):
    x = make_images(torch.float32, mean=30.0)
    eager, traced = make_pair(name, torch.float32)[0], make_pair(name, torch.float32)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor warns about the internals of this version of torch
        compiled = torch.compile(traced, backend=backend, fullgraph=True, dynamic=False)
        try:
            for training in (True, False):
                eager.train(training), traced.train(training)
                expected = forward_and_backward(eager, x)
                found = forward_and_backward(compiled, x)
                assert_same(found, expected, 1e-5)
            for ours, theirs in zip(traced.buffers(), eager.buffers(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        finally:
            torch.compiler.reset()


@pytest.mark.parametrize("name", PAIRS)
def test_runs_under_compile(name):
    compare_compiled(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_runs_under_compile_with_inductor(name):
    compare_compiled(name, "inductor")


def test_compiles_the_plain_average_of_running_statistics():
    traced, eager = BatchNorm2d(CHANNELS, momentum=None), BatchNorm2d(CHANNELS, momentum=None)
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    try:
        for step in range(3):
            x = make_images(torch.float32, seed=step)
            compiled(x), eager(x)
        torch.testing.assert_close(traced.running_var, eager.running_var)
        assert traced.num_batches_tracked == 3
    finally:
        torch.compiler.reset()


# ---------------------------------------------------------------------------------------- the gate


def test_the_gate_starts_at_one_which_is_batch_normalization():
    x = make_images(torch.float64)
    gated, batch = BatchInstanceNorm2d(CHANNELS).double(), BatchNorm2d(CHANNELS).double()
    assert torch.equal(gated.gate, torch.ones_like(gated.gate))
    torch.testing.assert_close(gated(x), batch(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        gated.gate.zero_()
    torch.testing.assert_close(gated(x), InstanceNorm2d(CHANNELS).double()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_the_gate_is_clipped_but_has_a_gradient_outside_its_bounds(training):
    norm = BatchInstanceNorm2d(2).double()
    x = make_images(torch.float64, shape=(4, 2, 6, 5))
    norm(x)
    norm.train(training)
    with torch.no_grad():
        norm.gate.copy_(torch.tensor([1.0, 0.0]))
    expected = norm(x)
    with torch.no_grad():
        norm.gate.copy_(torch.tensor([1.3, -0.2]))
    y = norm(x)
    assert torch.equal(y, expected)
    if training:
        assert norm.gate.tolist() == [1.0, 0.0]
    y.backward(torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0)))
    assert (norm.gate.grad != 0).all()


def test_the_gate_stays_in_bounds_during_training():
    norm = BatchInstanceNorm2d(4)
    optimizer = torch.optim.SGD(norm.parameters(), lr=1.0, momentum=0.9)
    draw, seen = torch.Generator().manual_seed(0), set()
    for step in range(20):
        x = make_images(torch.float32, shape=(4, 4, 5, 5), seed=step)
        dy = torch.randn(x.shape, generator=draw)
        # Two forward passes before a backward pass: clipping must not break the graph of the first one.
        ((norm(x) + norm(x.flip(0))) * dy).sum().backward()
        assert norm.gate.min() >= 0 and norm.gate.max() <= 1
        seen |= set(norm.gate.tolist())
        optimizer.step()
        optimizer.zero_grad()
    assert {0.0, 1.0} <= seen


def test_the_gate_multiplier_scales_the_steps_of_the_gate():
    moved = {}
    for multiplier in (1.0, 10.0):
        norm = BatchInstanceNorm2d(CHANNELS, gate_multiplier=multiplier).double()
        with torch.no_grad():
            norm.gate.fill_(0.5)
        optimizer = torch.optim.SGD(norm.parameters(), lr=1e-5)
        forward_and_backward(norm, make_images(torch.float64))
        optimizer.step()
        moved[multiplier] = (norm.gate.detach() - 0.5, norm.weight.detach() - 1)
    torch.testing.assert_close(moved[10.0][0], 10 * moved[1.0][0], rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(moved[10.0][1], moved[1.0][1], rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------- several processes


def train_in_process(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x = make_images(torch.float64, mean=5.0, shape=(7, CHANNELS, 6, 5))
    part = [x[:3], x[3:]][rank]  # parts of different sizes
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = {}
    for kind in (BatchNorm2d, BatchInstanceNorm2d):
        for sync in (False, True):
            norm = nn.parallel.DistributedDataParallel(kind(CHANNELS, sync=sync).double())
            inputs = part.clone().requires_grad_()
            y = norm(inputs)
            y.backward([dy[:3], dy[3:]][rank])
            statistics = {name: buffer.clone() for name, buffer in norm.module.named_buffers()}
            gradients = {name: p.grad * 2 for name, p in norm.module.named_parameters()}  # DDP averages
            results[kind.__name__, sync] = (y.detach(), inputs.grad, statistics, gradients)
            norm(part.clone())  # DDP copies the buffers of the first process
            results[kind.__name__, sync, "after"] = norm.module.num_batches_tracked.clone()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_statistics_only_with_sync(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_in_process, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    x = make_images(torch.float64, mean=5.0, shape=(7, CHANNELS, 6, 5))
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    close = {"rtol": 1e-10, "atol": 1e-10}
    for kind in (BatchNorm2d, BatchInstanceNorm2d):
        for found, part in ((first, x[:3]), (second, x[3:])):
            alone = kind(CHANNELS).double()
            torch.testing.assert_close(found[kind.__name__, False][0], alone(part), **close)
            torch.testing.assert_close(found[kind.__name__, False][2]["running_var"], alone.running_var, **close)
        whole, inputs = kind(CHANNELS).double(), x.clone().requires_grad_()
        y = whole(inputs)
        y.backward(dy)
        parts = [found[kind.__name__, True] for found in (first, second)]
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), y.detach(), **close)
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), inputs.grad, **close)
        for _, _, statistics, gradients in parts:
            for name, buffer in whole.named_buffers():
                torch.testing.assert_close(statistics[name], buffer, **close)
            for name, parameter in whole.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, **close)
        assert first[kind.__name__, True, "after"] == 2


# ---------------------------------------------------------------------------------------- names and invalid arguments


def test_each_norm_has_a_reference_in_pairs():
    assert {name.partition(",")[0] for name in PAIRS} == set(OURS)


@pytest.mark.parametrize("name", NORMS)
def test_make_norm_makes_each_norm(name):
    norm, x = make_norm(name, CHANNELS, num_groups=2, image_size=SHAPE[2:]), make_images(torch.float32)
    assert type(norm) is NORMS[name] and norm(x).shape == x.shape
    assert (getattr(norm, "bias", None) is not None) == norm.has_shift


def test_options_reach_the_norms_that_have_them():
    assert make_norm("group", 16, num_groups=2).num_groups == 2
    assert make_norm("group", 16).num_groups == 8 and make_norm("group", 4).num_groups == 4
    assert make_norm("layer", 16, image_size=(4, 5)).weight.shape == (16, 4, 5)
    assert isinstance(make_norm("torch_batch", CHANNELS), nn.BatchNorm2d)
    x = make_images(torch.float32)
    assert torch.equal(make_norm("none", CHANNELS)(x), x)


@pytest.mark.parametrize("name", OURS)
def test_reset_parameters(name):
    norm, fresh = make_norm(name, CHANNELS), make_norm(name, CHANNELS)
    norm(make_images(torch.float32))
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(1)
    norm.reset_parameters()
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in norm.state_dict().items())


def test_invalid_arguments_raise_an_error():
    with pytest.raises(
        ValueError, match="norm='bath' is unknown. Choose one of: none, batch, instance, batch_instance"
    ):
        make_norm("bath", 8)
    with pytest.raises(ValueError, match="num_groups=3 must divide num_channels=8"):
        GroupNorm2d(3, 8)
    with pytest.raises(ValueError, match=r"widths=\[9, 12\] do not fit norm='group': num_groups=8 .* num_channels=9"):
        check_norm("group", [9, 12])
    with pytest.raises(ValueError, match="number of channels is 0. It must be at least 1"):
        BatchNorm2d(0)
    with pytest.raises(ValueError, match="one scale per pixel of images of size 4x4"):
        LayerNorm2d(8, image_size=(4, 4))(torch.rand(2, 8, 5, 4))
    with pytest.raises(ValueError, match=r"x has shape \(2, 4, 5, 5\), expected \(batch, 8, height, width\)"):
        BatchNorm2d(8)(torch.rand(2, 4, 5, 5))
    with pytest.raises(ValueError, match="at most one value per channel"):
        BatchNorm2d(8)(torch.rand(1, 8, 1, 1))
    BatchNorm2d(8).eval()(torch.rand(1, 8, 1, 1))
    with pytest.raises(ValueError, match="The instance norm of a single pixel is always zero"):
        InstanceNorm2d(8)(torch.rand(4, 8, 1, 1))
    assert "BatchNorm2d(8, eps=1e-05, affine=True, momentum=0.1, sync=True)" in repr(BatchNorm2d(8, sync=True))
