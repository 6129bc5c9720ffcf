"""The op list, its interpreter and the fused engine: three ways to the same numbers."""

import ctypes
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import mgic
from mgic.runtime import Engine, EngineUnavailable, build, capture, compile_engine, plan
from mgic.runtime.engine import _Op, _Step
from mgic.runtime.ops import Convolution, Copy, TorchCall

TOLERANCE = 1e-5
NETWORKS = [name for name in mgic.list_models() if timm.is_model(name)]
SETS = ["portable"] + (["avx2"] if {"avx2", "fma"} <= build._processor_flags() else [])


def randomized(model: nn.Module) -> nn.Module:
    """Eval mode, and norms that do something: as built they are the identity."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.2),
                (module.bias.data, -0.2, 0.2),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def check(model: nn.Module, x: Tensor, threads: int = 1, name: str | None = None) -> Engine:
    """Engine against interpreter against eager."""
    with torch.no_grad():
        expected = model(x)
        program = capture(model, x)
        assert error(program(x), expected) < TOLERANCE
    engine = Engine(program, threads, name)
    assert error(engine(x), expected) < TOLERANCE
    return engine


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_the_same_in_eager_interpreter_and_engine(name):
    torch.manual_seed(0)
    model = randomized(mgic.create_model(name))
    engine = check(model, torch.randn(2, 3, 57, 33))
    assert not any(isinstance(s, plan.HostCall) for s in engine._segments), "PyTorch was needed"


def test_the_engine_counts_the_multiply_adds_that_cost_counts():
    """All but products with zeros: MgNet's first step applies its operator to a first guess of zero."""
    for name in ("mgic_resnet20", "mgic_mobilenetv3_060", "mg_resnet_cifar", "resnet20"):
        model = mgic.create_model(name).eval()
        size = model.pretrained_cfg["input_size"]
        engine = compile_engine(model, torch.randn(1, *size), 1)
        assert sum(node.macs for node in engine.nodes) == mgic.cost(model, size).macs, name


def test_nothing_behind_a_convolution_costs_a_pass_of_its_own():
    """Norms, activations, residuals and the cycle's subtraction ride on the convolutions."""
    for name in ("mgic_resnet56", "mgic_resnet18", "mgnet20", "mgiad20"):
        program = capture(mgic.create_model(name).eval(), torch.randn(1, 3, 32, 32))
        kinds = Counter(type(op.compute).__name__ for op in program.ops)
        assert set(kinds) <= {"Convolution", "Mean", "Pool", "Copy"}, (name, kinds)
        # MgNet's first step, from zero, smooths the data itself, which is needed later too.
        assert kinds["Copy"] == ("mgn" in name or "mgiad" in name), (name, kinds)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("model", ["mgic_resnet20", "mgic_mobilenetv3_060", "mgnet20"])
def test_every_instruction_set_gives_the_same(name, model, monkeypatch):
    monkeypatch.setenv("MGIC_ISA", name)
    network = randomized(mgic.create_model(model))
    x = torch.randn(3, 3, 37, 50)
    with torch.no_grad():
        expected = network(x)
    for threads in (1, 2, 3):
        engine = compile_engine(network, x, threads)
        assert engine.instruction_set == name
        assert error(engine(x), expected) < TOLERANCE


def test_an_instruction_set_this_processor_lacks_is_refused(monkeypatch):
    monkeypatch.setenv("MGIC_ISA", "sse9")
    with pytest.raises(EngineUnavailable, match="MGIC_ISA='sse9' cannot be used on this processor: choose from"):
        compile_engine(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    network = randomized(mgic.create_model("mgic_resnet20"))
    return network, compile_engine(network, torch.randn(1, 3, 33, 57), 2)


@pytest.mark.parametrize("batch", range(6))
def test_batches_of_any_size(small, batch):
    network, engine = small
    x = torch.randn(batch, 3, 33, 57)
    with torch.no_grad():
        assert error(engine(x), network(x)) < TOLERANCE


def test_inputs_of_any_memory_format(small):
    network, engine = small
    x = torch.randn(2, 3, 57, 33)
    with torch.no_grad():
        expected = network(x.transpose(2, 3))
        assert error(engine(x.transpose(2, 3)), expected) < TOLERANCE
        assert error(engine(x.transpose(2, 3).to(memory_format=torch.channels_last)), expected) < TOLERANCE
        assert error(engine(torch.randn(4, 3, 33, 57).expand(4, 3, 33, 57)[::2]), expected) > TOLERANCE


def test_an_image_leaves_no_trace_in_the_next_result(small):
    network, engine = small
    a, b = torch.randn(1, 3, 33, 57), torch.randn(1, 3, 33, 57)
    alone = compile_engine(network, a, 2)(b)
    engine(a)
    engine(torch.full_like(a, 1e30))
    assert torch.equal(engine(b), alone)
    assert torch.equal(engine(torch.cat([a, b, a]))[1:2], alone)


def test_a_nan_in_the_image_reaches_the_result(small):
    _, engine = small
    x = torch.randn(1, 3, 33, 57)
    x[0, 1, 5, 7] = torch.nan
    assert engine(x).isnan().all()
    assert engine(torch.randn(1, 3, 33, 57)).isfinite().all()


def test_calls_from_several_threads_do_not_disturb_one_another(small):
    _, engine = small
    images = [torch.randn(1 + i % 3, 3, 33, 57) for i in range(6)]
    expected = [engine(x) for x in images]
    wrong = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(engine(images[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inputs_the_engine_was_not_made_for_are_refused_with_its_size(small):
    _, engine = small
    for x in (torch.randn(1, 3, 32, 57), torch.randn(1, 3, 33, 57).double(), torch.randn(3, 33, 57)):
        with pytest.raises(EngineUnavailable, match=r"of shape \(N, 3, 33, 57\), got"):
            engine(x)


def test_only_float_images_are_captured():
    for x in (torch.randn(3, 8, 8), torch.randn(0, 3, 8, 8), torch.randn(1, 3, 8, 8).double()):
        with pytest.raises(EngineUnavailable, match=r"float32 images \(N, C, H, W\) with N >= 1"):
            capture(nn.Conv2d(3, 4, 3), x)


def test_capturing_leaves_the_network_as_it_was():
    network = mgic.create_model("mgic_resnet20").train()
    network.head.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    capture(network, torch.randn(2, 3, 32, 32))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


class Lambda(nn.Module):
    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, x):
        return self.function(x, *self.parts)


def conv(c_in, c_out, kernel=1, **options):
    return nn.Conv2d(c_in, c_out, kernel, **options)


ACTIVATIONS = [
    F.relu, F.relu6, F.hardswish, F.hardsigmoid, torch.sigmoid, F.silu, torch.tanh, F.gelu, F.elu,
    lambda x: F.gelu(x, approximate="tanh"), lambda x: F.leaky_relu(x, 0.1), lambda x: x.clamp(-0.3, 0.4),
    lambda x: x.clamp(min=0.1), lambda x: -x, lambda x: 2 - x, lambda x: x / 3, lambda x: 3 * x + 1,
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", SETS)
def test_activations_behind_a_convolution_and_alone(activation, name):
    torch.manual_seed(1)
    both = Lambda(lambda x, c: activation(c(activation(3 * x))), conv(5, 6, 3, padding=1))
    engine = check(both, torch.randn(2, 5, 9, 11), name=name)
    assert [node.kind for node in engine.nodes] == ["load", "map", "conv", "store"]
    vector = Lambda(lambda x, c: activation(c(x.mean((2, 3)))), nn.Linear(5, 19))
    check(vector, torch.randn(2, 5, 3, 4), name=name)


def test_activations_keep_large_values_and_nan():
    x = torch.tensor([-1e37, -200.0, -88.0, 0.0, 88.0, 200.0, 1e37, torch.nan]).reshape(1, 1, 1, 8)
    for activation in ACTIVATIONS:
        with torch.no_grad():
            expected, found = activation(x), compile_engine(Lambda(activation), x, 1)(x)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True), (activation, found, expected)


OPERATIONS = {
    "max pool": lambda x, c: F.max_pool2d(c(x), 3, 2, 1),
    "max pool with ceil": lambda x, c: F.max_pool2d(c(x), 3, 2, 0, ceil_mode=True),
    "max pool of negative numbers": lambda x, c: F.max_pool2d(-c(x).abs(), 2),
    "average pool": lambda x, c: F.avg_pool2d(c(x), 2),
    "average pool without padding": lambda x, c: F.avg_pool2d(c(x), 3, 2, 1, count_include_pad=False),
    "average pool with ceil": lambda x, c: F.avg_pool2d(c(x), 3, 2, 1, ceil_mode=True),
    "adaptive pool": lambda x, c: F.adaptive_avg_pool2d(c(x), (3, 2)),
    "global pool": lambda x, c: F.adaptive_avg_pool2d(c(x), 1) + 1,
    "concatenation": lambda x, c: F.relu(torch.cat([c(x), F.relu(x), c(c(x)[:, :6])], 1)),
    "the same part twice": lambda x, c: torch.cat([c(x), c(x)] * 2, 1) * 2,
    "a part that is used again": lambda x, c: torch.cat([y := c(x), F.relu(y)], 1).mean(1, keepdim=True) + y,
    "nested concatenation": lambda x, c: torch.cat([torch.cat([c(x), x], 1), x], 1).abs(),
    "slices": lambda x, c: c(x)[:, 2:5] * c(x)[:, 3:6] + c(x).chunk(2, 1)[0],
    "a slice in a concatenation": lambda x, c: torch.cat([c(x)[:, 1:4], x], 1) * 1,
    "shuffled channels": lambda x, c: c(c(x).view(1, 2, 3, 12, 10).transpose(1, 2).reshape(1, 6, 12, 10)),
    "every other pixel": lambda x, c: F.pad(c(x)[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2)) + 0,
    "every third column": lambda x, c: c(x[:, :, :, ::3]),
    "bilinear": lambda x, c: F.interpolate(c(x), size=(17, 5), mode="bilinear"),
    "bilinear, aligned": lambda x, c: F.interpolate(c(x), size=(17, 23), mode="bilinear", align_corners=True),
    "nearest": lambda x, c: F.relu(F.interpolate(c(x), scale_factor=2, mode="nearest")),
    "flatten": lambda x, c: F.linear(c(x).flatten(1), torch.linspace(-1, 1, 5040).reshape(7, 720)),
    "squeeze and excite": lambda x, c: c(x) * torch.sigmoid(c(c(x).mean((2, 3), keepdim=True))),
    "a scale that comes first": lambda x, c: torch.sigmoid(c(x).mean((2, 3), keepdim=True)) * c(x),
    "minus a scale": lambda x, c: c(x).mean((2, 3), keepdim=True) - c(x),
    "a scale per channel": lambda x, c: c(x) * torch.arange(6.0).reshape(6, 1, 1) + torch.ones(1, 6, 1, 1),
    "zeros of this shape": lambda x, c: c(x) - torch.zeros_like(x),
    "in place": lambda x, c: c(x).relu_().add_(x).mul_(2),
    "the image itself": lambda x, c: x + x,
    "residuals": lambda x, c: F.relu(c(F.relu(c(x))) + x) - x,
    "differences": lambda x, c: x - F.relu(x - c(x)),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations(operation, name):
    torch.manual_seed(2)
    network = Lambda(OPERATIONS[operation], conv(6, 6))
    x = torch.randn(1, 6, 12, 10)
    engine = check(network, x, name=name)
    engine.threads = 3
    with torch.no_grad():
        assert error(engine(x), network(x)) < TOLERANCE


def test_an_operation_the_engine_does_not_know_is_named_and_runs_in_torch():
    network = Lambda(lambda x, c: c(torch.cumsum(F.relu(c(x)), 2).sin()) + x, conv(4, 4, 3, padding=1))
    x = torch.randn(3, 4, 9, 7)
    program = capture(network, x)
    assert program.torch_calls() == ["cumsum", "sin"]
    engine = check(network, x, threads=2)
    assert [type(s).__name__ for s in engine._segments if isinstance(s, plan.HostCall)] == ["HostCall"] * 2


def test_unknown_operations_at_both_ends():
    network = Lambda(lambda x, c: torch.softmax(c(torch.cos(x)).flatten(2), 2), conv(4, 4))
    check(network, torch.randn(2, 4, 5, 6))


def test_several_results_keep_their_structure():
    network = Lambda(lambda x, c: {"image": x, "both": [c(x), (F.relu(c(x)), 3)]}, conv(3, 4))
    x = torch.randn(2, 3, 6, 7)
    with torch.no_grad():
        expected = network(x)
    for found in (capture(network, x)(x), compile_engine(network, x, 1)(x)):
        assert found["both"][1][1] == 3
        assert torch.equal(found["image"], x)
        assert error(found["both"][0], expected["both"][0]) < TOLERANCE
        assert error(found["both"][1][0], expected["both"][1][0]) < TOLERANCE


def test_features_of_timm():
    network = randomized(mgic.create_model("mgic_resnet20", features_only=True))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(x)
    for found, wanted in zip(compile_engine(network, x, 2)(x), expected, strict=True):
        assert error(found, wanted) < TOLERANCE


def test_memory_changed_through_another_view_is_refused_not_misread():
    def overwrite(x, c):
        y = c(x)
        y[:, :2].zero_()
        return y

    with pytest.raises(EngineUnavailable, match="memory that zero has changed through another view"):
        capture(Lambda(overwrite, conv(3, 4)), torch.randn(1, 3, 4, 4))


def test_networks_that_mix_the_images_of_a_batch_are_refused():
    with pytest.raises(EngineUnavailable, match="mixes the images of a batch"):
        capture(Lambda(lambda x, c: c(x).sort(0).values[0].sum(), conv(3, 4)), torch.randn(2, 3, 4, 4))


sizes = st.integers(1, 19)


@settings(max_examples=150, deadline=None)
@given(
    groups=st.integers(1, 5),
    per_group=st.integers(1, 9),
    outputs=st.integers(1, 11),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    size=st.tuples(sizes, sizes),
    threads=st.integers(1, 3),
    name=st.sampled_from(SETS),
    then=st.sampled_from(["nothing", "convolution", "residual"]),
)
def test_convolutions_of_any_shape(
    groups, per_group, outputs, kernel, stride, padding, dilation, size, threads, name, then
):
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if any(n + 2 * p < e for n, p, e in zip(size, padding, extents, strict=True)):
        return
    torch.manual_seed(groups * outputs)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    layers = [nn.Conv2d(groups * per_group, groups * outputs, kernel, **options)]
    if then != "nothing":
        layers += [nn.BatchNorm2d(groups * outputs), nn.ReLU()]
    if then == "convolution":
        layers += [nn.Conv2d(groups * outputs, 3, 3, padding=1)]
    network = randomized(nn.Sequential(*layers))
    if then == "residual":
        network = Lambda(lambda x, c: F.relu(c(x) + c(x)) - c(x), network)
    check(network, torch.randn(1, groups * per_group, *size), threads, name)


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 20),
    multiplier=st.integers(1, 3),
    kernel=st.sampled_from([2, 3, 5, 7]),
    stride=st.integers(1, 3),
    size=st.tuples(st.integers(1, 30), st.integers(1, 40)),
    threads=st.integers(1, 3),
    name=st.sampled_from(SETS),
)
def test_depthwise_convolutions_and_pools_of_any_shape(channels, multiplier, kernel, stride, size, threads, name):
    if min(size) + 2 * (kernel // 2) < kernel:
        return
    torch.manual_seed(channels)
    depthwise = nn.Conv2d(channels, multiplier * channels, kernel, stride, kernel // 2, groups=channels)
    x = torch.randn(1, channels, *size)
    check(Lambda(lambda x, c: F.hardswish(c(x)), depthwise), x, threads, name)
    check(nn.Sequential(nn.MaxPool2d(kernel, stride, kernel // 2), nn.ReLU()), x, threads, name)
    check(nn.AvgPool2d(kernel, stride, kernel // 2), x, threads, name)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("size", [(4, 1), (7, 7), (8, 8), (12, 20), (14, 17), (21, 3)])
def test_depthwise_convolutions_that_keep_the_size(kernel, size, name):
    """They read the map where it lies; what follows reads their result over its edges, or adds to it."""
    torch.manual_seed(kernel)
    depthwise = nn.Conv2d(5, 5, kernel, padding=kernel // 2, groups=5)
    x = torch.randn(2, 5, *size)
    check(nn.Sequential(conv(5, 5), depthwise, nn.Hardswish(), conv(5, 3, 3, padding=1)), x, 1, name)
    check(Lambda(lambda x, c: F.relu(c(x) + x), depthwise), x, 2, name)


def test_a_layer_that_is_run_twice_is_kept_once():
    layer, x = conv(64, 64, 3, padding=1), torch.randn(1, 64, 5, 5)
    floats = [compile_engine(nn.Sequential(*[layer] * n), x, 1)._constants.floats.size for n in (1, 3)]
    assert floats[1] - floats[0] < 0.05 * floats[0]
    other = compile_engine(nn.Sequential(layer, conv(64, 64, 3, padding=1)), x, 1)
    assert other._constants.floats.size > 1.9 * floats[0]


def test_long_sums_are_cut_into_parts_without_a_difference():
    """More taps than fit into the cache: partial sums are kept in the result."""
    torch.manual_seed(4)
    x = torch.randn(1, 300, 6, 11)
    check(Lambda(lambda x, c: F.relu(c(x) + x) - x, conv(300, 300, 3, padding=1)), x, threads=2)
    check(conv(900, 7), torch.randn(1, 900, 5, 5))
    check(conv(300, 5, 3, stride=2), x)


def test_memory_is_used_again():
    """Twelve layers need the room of two."""
    layers = [conv(8, 8, 3, padding=1) for _ in range(12)]
    engine = compile_engine(nn.Sequential(*layers), torch.randn(1, 8, 64, 64), 1)
    two = compile_engine(nn.Sequential(*layers[:2]), torch.randn(1, 8, 64, 64), 1)
    assert engine.arena_floats <= two.arena_floats


def test_the_profile_names_every_operation_once(small):
    _, engine = small
    profile = engine.profile(torch.randn(1, 3, 33, 57), rounds=2)
    assert [node for node, _ in profile] == engine.nodes
    assert all(seconds > 0 for _, seconds in profile)


def test_a_machine_without_a_compiler_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("MGIC_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(EngineUnavailable, match=r"no C\+\+ compiler was found"):
        build.build("portable")


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'engine.cpp:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("MGIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(EngineUnavailable, match=r"could not compile the engine for portable: .*no such thing"):
        build.build("portable")
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MGIC_CACHE", str(tmp_path / "file"))
    with pytest.raises(EngineUnavailable, match="set MGIC_CACHE to another folder"):
        build.build("portable")


def test_processes_that_start_together_all_get_a_whole_library(tmp_path):
    """R24 for the engine: a slow compiler, four processes, one file in the end."""
    source = tmp_path / "engine.cpp"
    names = ("mgic_run", "mgic_profile", "mgic_op_size", "mgic_step_size", "mgic_lanes")
    source.write_text("\n".join(f'extern "C" int {name}() {{ return LANES; }}' for name in names))
    code = (
        f"from pathlib import Path; from mgic.runtime import build; build.SOURCE = Path({str(source)!r}); "
        "print(build.load('portable').mgic_lanes())"
    )
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\nsleep 0.3\nexec {build.compiler()} "$@"\n')
    slow.chmod(0o755)
    environment = {**os.environ, "MGIC_CACHE": str(tmp_path / "cache"), "CXX": str(slow)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [process.communicate()[0].strip() for process in started] == ["4"] * 4
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"]


def test_a_damaged_library_is_named(monkeypatch, tmp_path):
    library = tmp_path / "engine.so"
    library.write_bytes(b"nothing")
    monkeypatch.setattr(build, "build", lambda name: library)
    with pytest.raises(EngineUnavailable, match=r"engine\.so cannot be loaded .*; delete it"):
        build.load.__wrapped__("portable")


SANITIZED = """
import ctypes, sys
import numpy as np, torch
from mgic.runtime import build, engine
sys.path.insert(0, {tests!r})
import test_runtime as t
from torch import nn

class Exact:  # memory of exactly the size asked for, from the allocator that the sanitizer watches
    def __init__(self, floats):
        self.floats = np.zeros(floats, np.float32)
        self.address = self.floats.ctypes.data

engine._Arena = Exact
flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g0")
original = build.build
build.build = lambda name: original(name, flags)
torch.manual_seed(0)
for name in t.SETS[-1:]:
    for model in ("mgic_resnet20", "mgic_mobilenetv3_060"):
        network = t.randomized(t.mgic.create_model(model))
        t.check(network, torch.randn(3, 3, 33, 57), 2, name)
    for operation in t.OPERATIONS.values():
        t.check(t.Lambda(operation, t.conv(6, 6)), torch.randn(1, 6, 12, 10), 2, name)
    for kernel, size in ((3, (4, 1)), (5, (7, 7)), (7, (8, 9)), (3, (28, 17))):
        t.check(nn.Conv2d(6, 6, kernel, 1, kernel // 2, groups=6), torch.randn(1, 6, *size), 1, name)
    for kernel, stride, size in ((3, 2, (7, 5)), (5, 1, (7, 7)), (7, 2, (9, 30)), (4, 3, (11, 6))):
        t.check(nn.Conv2d(6, 12, kernel, stride, kernel // 2, groups=6), torch.randn(1, 6, *size), 1, name)
        t.check(nn.Conv2d(6, 10, kernel, stride, kernel // 2, groups=2), torch.randn(1, 6, *size), 2, name)
        t.check(nn.MaxPool2d(kernel, stride, kernel // 2), torch.randn(1, 6, *size), 2, name)
print("clean")
"""


def test_address_and_undefined_behaviour_sanitizers_find_nothing():
    library = subprocess.run(
        [build.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("this compiler has no address sanitizer")
    environment = {**os.environ, "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    code = SANITIZED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "clean", done.stderr[-3000:]


def test_the_structures_of_both_languages_agree():
    for name in SETS:
        library = build.load(name)
        assert library.mgic_op_size() == ctypes.sizeof(_Op)
        assert library.mgic_step_size() == ctypes.sizeof(_Step)
        assert library.mgic_lanes() == build.INSTRUCTION_SETS[name][0]


def test_the_description_has_a_line_for_each_operation():
    network = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU()).eval()
    program = capture(network, torch.randn(1, 3, 5, 6))
    assert program.describe() == "3 = convolution relu (0): 4 x 5 x 6"
    assert isinstance(program.ops[0].compute, Convolution)
    assert not any(isinstance(op.compute, Copy | TorchCall) for op in program.ops)
