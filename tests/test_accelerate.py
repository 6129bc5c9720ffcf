"""Ways to run a network: each gives what eager PyTorch gives, and `mgic.accelerate` takes the fastest that does."""

import copy
import shutil
import time
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import mgic
from mgic.errors import UserError
from mgic.runtime import paths
from mgic.runtime.accelerate import SHAPES_KEPT
from mgic.runtime.paths import PATHS, PathUnavailable, relative_error

SIZE = (2, 3, 11, 7)
RUNTIMES = {
    "eager": (),
    "eager_nhwc": (),
    "onnxruntime": ("onnxruntime", "onnxscript"),
    "openvino": ("openvino", "onnxscript"),
    "engine": (),
}


class Two(nn.Module):
    """A multigrid block on a strided stem, and two outputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.block = mgic.MGICBlock(mgic.BasicBlock, 16, group_size=4, coarsest=8)
        for norm in self.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.uniform_(norm.running_var, 0.5, 1.5)

    def forward(self, x):
        y = self.block(self.stem(x))
        return OrderedDict(features=y, pooled=[y.mean((2, 3))])


@pytest.fixture
def network():
    return Two().eval()


@pytest.fixture(scope="module", params=RUNTIMES)
def built(request):
    """A path of each kind, built once, and its network."""
    for package in RUNTIMES[request.param]:
        pytest.importorskip(package)
    torch.manual_seed(0)
    network = Two().eval()
    before = copy.deepcopy(network.state_dict())
    try:
        run = PATHS[request.param](network, torch.randn(SIZE), 1)
    except PathUnavailable as reason:
        if shutil.which("c++"):
            raise
        pytest.skip(str(reason))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert network.stem.weight.is_contiguous()
    return network, run


def eager(network, x):
    with torch.no_grad():
        return network(x)


def slow(model, example_input, threads):
    run = paths.eager(model, example_input, threads)

    def wait(x):
        time.sleep(0.02)
        return run(x)

    return wait


def wrong(model, example_input, threads):
    run = paths.eager(model, example_input, threads)
    return lambda x: OrderedDict(run(x), features=run(x)["features"] * 1.001)


def wrong_on_other_inputs(model, example_input, threads):
    run = paths.eager(model, example_input, threads)
    answer = run(example_input)
    return lambda x: answer


def missing(model, example_input, threads):
    raise PathUnavailable("abacus is not installed: pip install abacus")


def only_this_shape(model, example_input, threads):
    if example_input.shape != SIZE:
        raise PathUnavailable(f"no plan for {tuple(example_input.shape)}")
    return paths.eager(model, example_input, threads)


def test_a_path_returns_what_the_network_returns_whatever_the_memory_format(built):
    network, run = built
    for x in (
        torch.randn(SIZE),
        torch.randn(SIZE).to(memory_format=torch.channels_last),
        torch.randn(2, 7, 11, 3).permute(0, 3, 2, 1),
        torch.randn(4, 6, 11, 7)[::2, ::2],
        torch.randn(SIZE, requires_grad=True),
    ):
        found = run(x)
        assert isinstance(found, OrderedDict)
        assert relative_error(found, eager(network, x)) < 1e-5
        assert not found["features"].requires_grad


def test_a_path_keeps_what_it_returned_before(built):
    """A runtime that reuses its output buffers must not do it with ours."""
    run = built[1]
    first = run(torch.zeros(SIZE))
    kept = copy.deepcopy(first)
    run(torch.ones(SIZE))
    assert relative_error(first, kept) == 0


def test_a_path_can_be_called_from_several_threads_at_once(built):
    network, run = built
    inputs = [torch.randn(SIZE) for _ in range(24)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, inputs))
    assert max(relative_error(y, eager(network, x)) for x, y in zip(inputs, found, strict=True)) < 1e-5


def test_torch_compile_freezes_and_compiles_each_network_apart(monkeypatch):
    """In place of the compiler: it would take long, and whether PyTorch's works is not tested here."""
    freezing, codes = [], []

    def compiler(program, dynamic):
        assert dynamic is False
        codes.append(type(program).forward.__code__)  # PyTorch counts recompilations by the code of a function

        def optimized(x):
            freezing.append(torch._inductor.config.freezing)
            return program(x)

        return optimized

    monkeypatch.setattr(torch, "compile", compiler)
    networks = [nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU()).eval() for width in (1, 2, 3)]
    x = torch.randn(2, 3, 4, 4)
    for network in networks:
        run = PATHS["compile"](network, x, 1)
        assert freezing.pop() is True  # called once while the network is compiled, for it is traced when it is called
        assert relative_error(run(x.requires_grad_()), eager(network, x)) < 1e-6
        assert freezing.pop() is False
    assert len({id(code) for code in codes}) == len(networks)


def test_r32_a_missing_package_is_a_reason_that_says_how_to_install_it(network, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(PathUnavailable, match=r"onnxruntime is not installed: pip install 'mgic\[onnx\]'"):
        PATHS["onnxruntime"](network, torch.randn(SIZE), 1)
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(PathUnavailable, match=r"openvino is not installed: pip install 'mgic\[openvino\]'"):
        PATHS["openvino"](network, torch.randn(SIZE), 1)


@pytest.mark.parametrize("name", ["compile", "onnxruntime", "openvino"])
def test_a_network_that_cannot_be_exported_is_a_reason(name):
    for package in RUNTIMES.get(name, ()):
        pytest.importorskip(package)

    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum().item() > 0 else x - 1

    with pytest.raises(PathUnavailable, match=r"^(torch.compile|ONNX export): \w+: "):
        PATHS[name](Branches(), torch.randn(SIZE), 1)


def test_eager_gives_torch_its_threads_back(network):
    before = torch.get_num_threads()
    seen = []
    network.stem.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    PATHS["eager"](network, torch.randn(SIZE), before + 1)(torch.randn(SIZE))
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_the_relative_error_sees_structure_shape_and_nan():
    x = torch.tensor([1.0, -4.0])
    assert relative_error({"a": x, "b": [x, x + 1]}, {"a": x, "b": [x, x]}) == 0.25
    assert relative_error([x], (x,)) == float("inf")
    assert relative_error(x[None], x) == float("inf")
    assert relative_error(x * float("nan"), x) == float("inf")
    assert relative_error(x, x * float("nan")) == float("inf")
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0


def test_accelerate_takes_the_fastest_correct_path_and_reports_the_others(network):
    choice = {"slow": slow, "wrong": wrong, "stuck": wrong_on_other_inputs, "abacus": missing, "fast": paths.eager}
    network.train()
    before = copy.deepcopy(network.state_dict())
    fast = mgic.accelerate(network, torch.randn(SIZE), paths=choice, threads=1, rounds=3)
    found = {one.path: one for one in fast.report.results}
    assert fast.path == "fast"
    assert list(found) == list(choice)
    assert found["slow"].milliseconds > 20 > found["fast"].milliseconds > 0
    assert found["slow"].error == found["fast"].error == 0
    assert found["wrong"].error == pytest.approx(1e-3, rel=0.01)
    assert found["wrong"].reason == found["stuck"].reason == "not equal to eager within 0.0001"
    assert found["wrong"].milliseconds is None
    assert found["abacus"].reason == "abacus is not installed: pip install abacus"
    assert "abacus is not installed" in str(fast.report)
    assert network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("choice", ["eager", ["eager"], ("eager", "eager_nhwc")])
def test_paths_can_be_chosen_by_name(network, choice):
    fast = mgic.accelerate(network, torch.randn(SIZE), paths=choice, rounds=1)
    assert [row.path for row in fast.report.results] == (["eager"] if "eager_nhwc" not in choice else list(choice))


def test_accelerate_is_eager_where_no_path_is_right(network):
    with pytest.warns(
        UserWarning, match=r"eager PyTorch runs the network, .* wrong: not equal .*; abacus: abacus is not"
    ):
        fast = mgic.accelerate(network, torch.randn(SIZE), paths={"wrong": wrong, "abacus": missing}, rounds=1)
    x = torch.randn(SIZE)
    assert fast.path == "eager"
    assert [one.path for one in fast.report.results] == ["wrong", "abacus", "eager"]
    assert relative_error(fast(x), eager(network, x)) == 0
    assert relative_error(fast(x[:1]), eager(network, x[:1])) == 0


def test_an_accelerated_network_is_a_copy_in_eval_mode():
    network = Two().train()
    x = torch.randn(SIZE)
    wanted = eager(copy.deepcopy(network).eval(), x)
    fast = mgic.accelerate(network, x, paths={"eager": paths.eager}, rounds=1)
    nn.init.zeros_(network.stem.weight)
    assert relative_error(fast(x), wanted) == 0
    assert list(fast.parameters()) == []
    assert fast.eval() is fast
    with pytest.raises(UserError, match="for inference"):
        fast.train()
    assert not fast.training


def test_another_shape_builds_the_path_again_once_and_forgets_the_oldest(network):
    built = []

    def counted(model, example_input, threads):
        built.append(tuple(example_input.shape))
        return paths.eager(model, example_input, threads)

    fast = mgic.accelerate(network, torch.randn(SIZE), paths={"counted": counted}, rounds=1)
    shapes = [(n, 3, 9, 8) for n in range(1, SHAPES_KEPT + 2)]
    for shape in [SIZE, shapes[0], shapes[0], *shapes, SIZE, shapes[0]]:
        x = torch.randn(shape)
        assert relative_error(fast(x), eager(network, x)) == 0
    assert built == [SIZE, *shapes, shapes[0]]


def test_a_shape_the_path_cannot_do_falls_back_to_eager_with_one_warning(network):
    fast = mgic.accelerate(network, torch.randn(SIZE), paths={"only": only_this_shape}, rounds=1)
    x = torch.randn(1, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"eager PyTorch runs inputs of \(1, 3, 8, 8\): no plan for"):
        assert relative_error(fast(x), eager(network, x)) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(fast(x), eager(network, x)) == 0


def test_a_path_that_is_wrong_for_another_shape_is_not_used_for_it(network):
    def wrong_elsewhere(model, example_input, threads):
        return (paths.eager if example_input.shape == SIZE else wrong)(model, example_input, threads)

    fast = mgic.accelerate(network, torch.randn(SIZE), paths={"odd": wrong_elsewhere}, rounds=1)
    x = torch.randn(1, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"odd differs from eager by 1\.0e-03"):
        assert relative_error(fast(x), eager(network, x)) == 0


def test_empty_double_and_differentiable_inputs_are_eagers(network):
    """No path is built for them; `only_this_shape` would warn, which is an error here."""
    fast = mgic.accelerate(network, torch.randn(SIZE), paths={"only": only_this_shape}, rounds=1)
    assert fast(torch.randn(0, 3, 11, 7))["features"].shape == (0, 16, 5, 3)
    with pytest.raises(RuntimeError, match=r"Double|double"):
        fast(torch.randn(SIZE, dtype=torch.float64))  # as the network itself says it
    x = torch.randn(SIZE, requires_grad=True)
    fast(x)["features"].sum().backward()
    found, x.grad = x.grad, None
    network(x)["features"].sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=0, atol=0)


def test_a_new_shape_may_come_from_several_threads_at_once(network):
    fast = mgic.accelerate(network, torch.randn(SIZE), paths={"eager": paths.eager}, rounds=1)
    inputs = [torch.randn(n % 3 + 1, 3, 8, 8) for n in range(12)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(fast, inputs))
    assert all(relative_error(y, eager(network, x)) == 0 for x, y in zip(inputs, found, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 0}, "threads=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"paths": {}}, "paths must not be empty"),
        ({"paths": []}, "paths must not be empty"),
        ({"paths": ["eager", "egine"]}, "no path 'egine'; did you mean engine"),
        (
            {"example_input": torch.zeros(SIZE, dtype=torch.int64)},
            "on cpu example_input must be float32, got torch.int64",
        ),
        ({"example_input": torch.zeros(0, 3, 4, 4)}, r"not be empty, got a batch of \(0, 3, 4, 4\)"),
        ({"example_input": torch.zeros(SIZE, device="meta")}, "input is on meta, but there are weights on cpu"),
    ],
)
def test_accelerate_refuses_what_makes_no_sense(network, change, message):
    arguments = {"example_input": torch.randn(SIZE), "paths": {"eager": paths.eager}} | change
    with pytest.raises(UserError, match=message):
        mgic.accelerate(network, **arguments)
