"""The Triton kernels under Triton's interpreter, against their naive twins in float64; what surrounds them, on the CPU.

The interpreter must be chosen before Triton is imported, so those tests run in one process of their own.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import mgic
from mgic.errors import UserError
from mgic.kernels import choice as choices
from mgic.kernels import (
    grouped_conv,
    level,
    naive_grouped_conv,
    naive_level,
    naive_restriction_chain,
    ops,
    restriction_chain,
)
from mgic.kernels.floors import H200, Floors, block_floors, macs, moved, network_floors, seconds
from mgic.runtime import EngineUnavailable
from mgic.runtime.accelerate import TOLERANCES
from mgic.runtime.gpu import fuse
from mgic.runtime.ops import Convolution

ROOT = Path(__file__).parents[1]


def run_python(code, **environment):
    """Run a program in a process of its own; return what it printed."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def few(*sizes, dtype=torch.float32):
    return torch.randn(sizes).to(dtype)


def weight(outputs, inputs, kernel=1):
    return torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel * kernel) ** 0.5


CONV = (few(2, 12, 5, 7), weight(24, 4, 3), torch.randn(24), 3, 1, "relu", few(2, 24, 5, 7), few(2, 24, 5, 7), -1.0)
CHAIN = (few(2, 16, 3, 5), [weight(8, 4), weight(4, 4)], [4, 2])
LEVEL = (
    *(few(2, 16, 5, 3), few(2, 8, 5, 3)),
    *([weight(16, 4), weight(4, 8), weight(4, 2, 3), weight(16, 2)], [torch.randn(c) for c in (16, 4, 4, 16)]),
    *(2, "relu", True),
)


@pytest.fixture(scope="module")
def interpreted():
    """Largest errors of the kernels under the interpreter, by case."""
    program = ROOT / "benchmarks" / "gpu_kernels.py"
    command = [sys.executable, str(program), "--interpret", "few"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_equals_its_twin_in_float64_under_the_interpreter(interpreted):
    """Every tiling, on outputs that were poisoned with NaN, on odd shapes."""
    assert {name.split()[0] for name in interpreted} == {"grouped_conv", "restriction_chain", "level"}
    assert len(interpreted) >= 16
    for name, error in interpreted.items():
        assert error < (2e-2 if "bfloat16" in name else 1e-5), name


def test_a_level_of_the_cycle_is_the_kernel():
    """The twin itself against the modules it stands for."""
    block = mgic.MGICBlock(mgic.Bottleneck, channels=32, group_size=4, coarsest=4).eval()
    random_norms(block)
    x = torch.randn(2, 32, 5, 7)
    with torch.no_grad():
        xs = restriction_chain(x, [r.weight for r in block.restrict], [r.groups for r in block.restrict])
        change = None
        for j in reversed(range(len(block.levels))):
            relax, here = block.relax[j], x if j == 0 else xs[j - 1]
            parts = [(getattr(relax, f"conv{i}"), getattr(relax, f"norm{i}")) for i in (1, 2, 3)]
            if change is not None:
                parts = [(block.prolong[j], block.norm[j]), *parts]
            folded = [fold(conv.weight, norm) for conv, norm in parts]
            weights, biases = [f[0] for f in folded], [f[1] for f in folded]
            change = level(here, change, weights, biases, block.levels[j].groups, "relu", j > 0)
        torch.testing.assert_close(change, block(x), rtol=1e-4, atol=1e-5)


def fold(weight, norm):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 6)])
def test_the_operations_pass_torchs_own_checks(memory_format, size):
    """Schemas, fake kernels (shapes and strides), dynamic shapes, tracing."""
    x = few(2, 12, *size).to(memory_format=memory_format)
    coarse = few(2, 6, *size)
    torch.library.opcheck(grouped_conv, (x, weight(6, 4, 3), torch.randn(6), 3, 1, "hard_swish"))
    torch.library.opcheck(grouped_conv, (x, weight(12, 12), torch.randn(12), 1, 1, "none", x, x, -1.0))
    torch.library.opcheck(grouped_conv, (x, weight(6, 4, 3), torch.randn(6), 3, 2, "relu"))
    torch.library.opcheck(restriction_chain, (x, [weight(8, 3), weight(4, 4)], [4, 2]))
    weights, biases = [weight(12, 3), weight(12, 6, 3), weight(12, 6, 3)], [torch.randn(12)] * 3
    torch.library.opcheck(level, (x, coarse, weights, biases, 2, "relu", True))
    torch.library.opcheck(level, (x, None, weights[1:], biases[1:], 2, "relu", False))


def test_export_keeps_the_operations():
    class Net(nn.Module):
        def forward(self, x):
            return grouped_conv(x, *CONV[1:])

    program = torch.export.export(Net(), (CONV[0],))
    assert "mgic.grouped_conv" in str(program.graph)
    torch.testing.assert_close(program.module()(CONV[0]), naive_grouped_conv(*CONV))


def test_the_operations_return_channels_last_and_equal_their_twins():
    for found, expected in (
        *[(grouped_conv(*CONV), naive_grouped_conv(*CONV)), (level(*LEVEL), naive_level(*LEVEL))],
        *zip(restriction_chain(*CHAIN), naive_restriction_chain(*CHAIN), strict=True),
    ):
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_on_a_gpu_every_tiling_its_parts_and_the_twin_compete(monkeypatch):
    """Without one: what would be timed is looked at instead. A group too wide for the chip has its parts and the twin."""
    offered = {}

    def choose(name, arguments, ways):
        offered[name] = list(ways)
        return ways["twin"]

    monkeypatch.setattr(ops, "choose", choose)
    ops._fastest("level", LEVEL, lambda: (naive_level(*LEVEL),), lambda: (ops.level_by_operations(*LEVEL),))
    assert [name.split()[0] for name in offered["level"]] == ["level"] * 4 + ["parts", "twin"]
    torch.testing.assert_close(ops.level_by_operations(*LEVEL), naive_level(*LEVEL))
    x, _, weights, biases, *rest = LEVEL
    torch.testing.assert_close(
        ops.level_by_operations(x, None, weights[1:], biases[1:], *rest),
        naive_level(x, None, weights[1:], biases[1:], *rest),
    )
    wide = (few(1, 512, 2, 2), None, [weight(512, 256, 3)] * 2, [torch.zeros(512)] * 2, 2, "relu", False)
    ops._fastest("level", wide, lambda: (naive_level(*wide),), lambda: (ops.level_by_operations(*wide),))
    assert offered["level"] == ["parts", "twin"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: weight(24, 4, 5)}, r"1x1 and 3x3 convolutions of stride 1 or 2, got \(5, 5\)"),
        ({4: 3}, "stride 3"),
        ({5: "tanh"}, "act must be one of none, relu, hard_swish, got 'tanh'"),
        ({0: few(2, 12, 5, 7).double()}, "float32, bfloat16 or float16, got torch.float64"),
        ({3: 5}, "groups=5 must divide the 24 outputs"),
    ],
)
def test_what_the_kernels_do_not_know_is_refused(change, message):
    arguments = [change.get(i, argument) for i, argument in enumerate(CONV[:6])]
    with pytest.raises(UserError, match=message):
        grouped_conv(*arguments)


def test_a_level_of_another_form_is_refused():
    x, coarse, weights, biases, *rest = LEVEL
    with pytest.raises(UserError, match=r"got kernels \[1, 3\]"):
        level(x, coarse, weights[1:3], biases[1:3], *rest)
    with pytest.raises(UserError, match="4 weights need as many biases, got 3"):
        level(x, coarse, weights, biases[1:], *rest)


def test_neither_the_library_nor_the_kernels_import_triton():
    run_python("import sys, mgic, mgic.kernels, mgic.runtime.accelerate; assert 'triton' not in sys.modules")


def test_without_triton_nothing_changes_on_the_cpu():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mgic; from mgic.kernels import grouped_conv\n"
        "net, x = mgic.create_model('mgic_resnet20').eval(), torch.randn(1, 3, 32, 32)\n"
        "fast = mgic.accelerate(net, x, paths=['eager', 'engine'])\n"
        "assert torch.allclose(fast(x), net(x), atol=1e-4)\n"
        "print(tuple(grouped_conv(x, torch.ones(2, 3, 1, 1), torch.zeros(2), 1, 1, 'relu').shape))"
    )
    assert run_python(code).strip() == "(1, 2, 32, 32)"


class Clock:
    """Says how long a way takes; counts the questions."""

    def __init__(self, **seconds):
        self.seconds, self.asked = seconds, 0

    def __call__(self, way):
        self.asked += 1
        return self.seconds[way.__name__]


def good():
    return (torch.ones(3),)


def quick():
    return (torch.ones(3),)


def wrong():
    return (torch.full((3,), 1.1),)


def broken():
    raise RuntimeError("out of resource: shared memory")


def test_the_fastest_way_that_is_right_is_chosen():
    clock = Clock(good=2.0, quick=1.0, wrong=0.1, broken=0.1)
    with pytest.warns(
        UserWarning, match=r"(broken does not run here: out of resource|wrong differs from its twin)"
    ) as seen:
        found = choices.measure({"broken": broken, "wrong": wrong, "quick": quick, "twin": good}, clock)
    assert found == "quick"
    assert len(seen) == 2
    assert choices.measure({"quick": quick, "twin": good}, Clock(good=1.0, quick=2.0)) == "twin"


def test_a_tiling_that_writes_nothing_does_not_pass_with_the_results_of_another():
    shared = torch.empty(3)

    def writes():
        return (shared.fill_(1.0),)

    def idle():
        return (shared,)

    with pytest.warns(UserWarning, match="idle differs from its twin"):
        choices.measure({"writes": writes, "idle": idle, "twin": good}, Clock(writes=1.0, idle=0.1, good=2.0))


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A file of choices, and a clock in place of the GPU."""
    clock = Clock(good=2.0, quick=1.0)
    monkeypatch.setattr(choices, "cache_file", lambda device: tmp_path / "kernels.json")
    monkeypatch.setattr(choices, "seconds_on", lambda device: clock)
    monkeypatch.setattr(choices.Choices, "_known", {})
    return clock, tmp_path / "kernels.json"


WAYS = {"kernel": quick, "twin": good}


def test_a_choice_is_kept_and_asked_for_once_a_shape(measured, monkeypatch):
    clock, path = measured
    assert choices.choose("conv", (torch.zeros(2, 3), 4), WAYS) is quick
    once = clock.asked
    assert choices.choose("conv", (torch.ones(2, 3), 4), WAYS) is quick
    assert clock.asked == once
    monkeypatch.setattr(choices.Choices, "_known", {})  # another process
    assert choices.choose("conv", (torch.ones(2, 3), 4), WAYS) is quick
    assert clock.asked == once
    for other in ((torch.zeros(2, 4), 4), (torch.zeros(2, 3), 5), (torch.zeros(2, 3, dtype=torch.bfloat16), 4)):
        choices.choose("conv", other, WAYS)
        assert clock.asked > once
        once = clock.asked
    assert len(json.loads(path.read_text())["choices"]) == 4


@pytest.mark.parametrize(
    "content", ["{not json", "[]", '{"schema": 1, "choices": {"a": 1}}', '{"schema": 0}', "\x00\xff"]
)
def test_a_damaged_file_of_choices_is_ignored_and_written_anew(measured, content):
    _, path = measured
    path.write_text(content, encoding="latin-1")
    with pytest.warns(UserWarning, match="kernels.json .*written anew"):
        assert choices.choose("conv", (torch.zeros(2),), WAYS) is quick
    assert json.loads(path.read_text()) == {"schema": 1, "choices": {"conv float32[2]": "kernel"}}
    assert [p.name for p in path.parent.iterdir()] == ["kernels.json"]


def test_a_choice_that_no_longer_exists_is_made_again(measured):
    clock, path = measured
    path.write_text(json.dumps({"schema": 1, "choices": {"conv float32[2]": "a tiling of old"}}))
    assert choices.choose("conv", (torch.zeros(2),), WAYS) is quick
    assert clock.asked


def test_a_cache_that_cannot_be_written_costs_only_the_memory(measured, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(choices.tempfile, "mkstemp", full)
    with pytest.warns(UserWarning, match="not kept: No space left"):
        assert choices.choose("conv", (torch.zeros(2),), WAYS) is quick


def test_the_floors_are_those_of_the_estimate():
    """Gigaflops, megabytes and microseconds of the blocks of ResNet-50, batch 256, s_g = s_c = 32."""
    expected = {
        (256, 56): (112, 136, (1644, 4316, 2055, 822), (410, 1004, 478, 191)),
        (512, 28): (112, 88, (822, 2826, 1233, 411), (243, 657, 287, 113)),
        (1024, 14): (112, 49, (411, 1580, 668, 206), (163, 367, 155, 63)),
        (2048, 7): (112, 26, (206, 832, 347, 103), (143, 193, 81, 33)),
    }
    for (channels, side), (dense, ours, megabytes, microseconds) in expected.items():
        levels = mgic.plan_levels(channels, 32, 32, channels // 4, minimum=1)
        found = block_floors(levels, 256 * side * side, bottleneck=True)
        kernels = (found.dense, found.operation, found.level, found.block)
        assert (round(2e-9 * macs(found.dense)), round(2e-9 * macs(found.operation))) == (dense, ours)
        assert macs(found.operation) == macs(found.level) == macs(found.block)
        assert tuple(round(1e-6 * moved(k, H200)) for k in kernels) == megabytes
        assert tuple(round(1e6 * seconds(k, H200)) for k in kernels) == microseconds


@pytest.mark.parametrize(
    ("name", "width", "group_size", "coarsest", "milliseconds", "ratios"),
    [
        ("mgic_resnet50", 1, 32, 32, 3.61, (2.33, 1.04, 0.42)),
        ("mgic_resnet50", 1, 8, 16, 3.61, (2.71, 1.16, 0.36)),
        ("mgic_resnet18", 1, 8, 16, 1.21, (1.22, 0.46, 0.15)),
        ("mgic_resnet18", 4, 32, 32, 19.43, (0.33, None, 0.12)),
        ("mgic_resnet50", 2, 32, 32, 10.69, (1.83, 0.78, 0.32)),  # printed there as Wide-ResNet-50-2
        ("mgic_resnet50", 2, 8, 16, 10.69, (1.96, 0.82, 0.25)),
    ],
)
def test_the_floors_of_networks_are_those_of_the_estimate(name, width, group_size, coarsest, milliseconds, ratios):
    with torch.device("meta"):
        model = mgic.create_model(name, width=width, group_size=group_size, coarsest=coarsest)
    found = sum(network_floors(model, (3, 224, 224), 256), Floors())
    dense = seconds(found.dense, H200)
    assert 1e3 * dense == pytest.approx(milliseconds, abs=0.005)
    for kernels, ratio in zip((found.operation, found.level, found.block), ratios, strict=True):
        if ratio is not None:  # the estimate takes basic blocks' levels together: at s_g = 32 the sum is larger
            assert seconds(kernels, H200) / dense == pytest.approx(ratio, abs=0.005)


def test_floors_of_other_blocks_are_refused():
    with pytest.raises(UserError, match="Conv2d has no multigrid blocks"):
        network_floors(nn.Conv2d(3, 3, 1), (3, 8, 8), 1)
    with pytest.raises(UserError, match=r"convolutions of \[\]"):
        network_floors(mgic.MGICBlock(lambda channels, groups: nn.Identity(), 8, 4, 4), (8, 2, 2), 1)


def test_the_predicted_ratios_of_the_page_are_the_records():
    rows = json.loads((ROOT / "results/gpu-floors.json").read_text())["rows"]
    text = (ROOT / "docs/gpu.md").read_text()
    table = text.partition("<!-- floors -->\n")[2].partition("<!-- /floors -->")[0].strip().splitlines()[2:]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table] == [
        [
            *(row["network"], str(row["group_size"]), str(row["coarsest"])),
            *(f"{row['flop_ratio']:.2f}", f"{row['gigabytes']['dense']:.1f}"),
            *(f"{row['ratio'][depth]:.2f}" for depth in ("operation", "level", "block")),
        ]
        for row in rows
    ]


def random_norms(model):
    """Statistics and weights that leave no norm the identity."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "arguments", "levels", "chains"),
    [
        ("mgic_resnet20", {"group_size": 8, "coarsest": 8}, 3 * (2 + 3 + 4), 3 + 3),
        ("mgic_resnet50", {"group_size": 8, "coarsest": 8, "width": 0.25, "num_classes": 5}, None, None),
        ("mgiad20", {}, 0, 0),  # its steps are in another order: convolutions, one by one
        ("mgic_mobilenetv3_060", {"num_classes": 5}, 0, None),  # gates, hard_swish, depthwise convolutions
        ("resnet20", {}, 7, 0),
    ],
)
def test_the_program_cut_into_kernels_computes_what_its_interpreter_computes(name, arguments, levels, chains):
    """And finds every level: 3 blocks a stage, with 2, 3 and 4 grids. A single restriction is no chain."""
    model = random_norms(mgic.create_model(name, **arguments))
    x = torch.randn(2, 3, 32, 32)
    fused = fuse(model, x)
    with torch.no_grad():
        expected, found = fused.program(x), fused(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    counts = Counter(call.name for call in fused.calls)
    assert levels is None or counts["level"] == levels
    assert chains is None or counts["restriction_chain"] == chains
    convolutions = [op for op in fused.program.ops if isinstance(op.compute, Convolution)]
    assert sum(counts.values()) < len(fused.program.ops) or not levels
    assert counts["convolution"] < len(convolutions) / 3


def test_the_cut_program_takes_other_batches_and_half_precision():
    model = random_norms(mgic.create_model("mgic_resnet20"))
    x = torch.randn(3, 3, 16, 16)
    fused = fuse(model.bfloat16(), x.bfloat16())
    with torch.no_grad():
        for images in (x, x[:1], x.to(memory_format=torch.channels_last)):
            expected, found = fused.program(images), fused(images.bfloat16())
            assert found.dtype == torch.bfloat16
            assert (found - expected).abs().max() < TOLERANCES["cuda", torch.bfloat16] * expected.abs().max()
    assert next(model.parameters()).dtype == torch.bfloat16  # left as it is


class Steps(nn.Module):
    """Convolutions followed by steps in orders that a kernel has and has not."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=2) for _ in range(6))
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x):
        a, b, c, d, e, f = self.convs
        y = torch.relu(a(x)) + x  # behind the activation
        y = torch.relu(b(y)) * torch.sigmoid(y.mean((2, 3), keepdim=True))  # a number a channel
        y = torch.relu(x - c(y))  # subtracted from
        y = torch.tanh(d(y) + x) - y  # an unknown activation
        y = torch.relu(torch.relu(e(y) + x) - x + y) * self.scale[:, None, None]  # too much of everything
        z = torch.relu(f(y) - x)  # subtracted before the activation
        return z, y


def test_steps_that_a_kernel_cannot_do_run_behind_it():
    model, x = Steps().eval(), torch.randn(2, 8, 5, 3)
    fused = fuse(model, x)
    with torch.no_grad():
        for found, expected in zip(fused(x), model(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [call.name for call in fused.calls].count("grouped_conv") == 6


def test_a_block_that_others_read_is_not_swallowed():
    """What a level keeps inside must not be read outside; and a subtraction of something else is no change of the level."""

    class Leaky(nn.Module):
        def __init__(self, reveal):
            super().__init__()
            self.block, self.other, self.reveal = mgic.BasicBlock(8, 2), nn.Conv2d(8, 8, 1), reveal

        def forward(self, x):
            b, early = self.block, self.other(x)
            inner = b.act1(b.norm1(b.conv1(x)))
            y = b.act2(b.norm2(b.conv2(inner)) + x)
            return (y, inner) if self.reveal else y - early

    x = torch.randn(1, 8, 4, 4)
    for reveal in (True, False):
        model = random_norms(Leaky(reveal))
        fused = fuse(model, x)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
        assert "level" not in [call.name for call in fused.calls]


def test_what_is_tied_to_the_cpu_is_refused():
    class Sorted(nn.Module):
        def forward(self, x):
            return x.sort(1).values

    with pytest.raises(EngineUnavailable, match="the kernels cannot take sort"):
        fuse(Sorted(), torch.randn(1, 3, 4, 4))


@pytest.fixture(scope="module")
def compiled():
    """What the kernels need, compiled for real shapes; one kernel each, so that it takes seconds."""
    program = (
        "import sys; sys.path.insert(0, 'benchmarks'); import gpu_kernels as g, torch, json\n"
        "cases = list(g.real_cases(torch.bfloat16, False)); cases = [cases[0], cases[3], cases[-1]]\n"
        "print(json.dumps(g.compile_all(cases, [80, 90])))"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SHARED_KIB = {80: 163, 89: 99, 90: 227}  # of a program: CUDA's table of technical specifications
MOST_SPILLED = 1024  # bytes of a thread, in any tiling


def best_tilings(rows):
    """Spilled bytes of the best tiling of each case on each GPU, of those that fit into its shared memory."""
    best = {}
    for row in rows:
        assert row["stack_bytes"] <= MOST_SPILLED, row
        key = row["kernel"], row["arguments"], row["capability"]
        fits = row["shared_kib"] <= SHARED_KIB[row["capability"]]
        best[key] = min(best.get(key, float("inf")), row["stack_bytes"] if fits else float("inf"))
    return best


def test_every_kernel_compiles_for_gpus_that_are_not_here_fits_and_does_not_spill(compiled):
    assert list(best_tilings(compiled).values()) == [0] * 3 * 2


def test_every_recorded_kernel_has_a_tiling_that_fits_and_does_not_spill():
    """In float32 a register or two may spill."""
    rows = json.loads((ROOT / "results/gpu-kernels.json").read_text())["programs"]
    best = best_tilings(rows)
    assert {capability for _, _, capability in best} == set(SHARED_KIB)
    assert {kernel for kernel, _, _ in best} == {"grouped_conv", "restriction_chain", "level"}
    for (kernel, arguments, capability), spilled in best.items():
        assert spilled <= (0 if "bfloat16" in arguments else 16), (kernel, arguments, capability)
    assert all(r["shared_kib"] <= SHARED_KIB[r["capability"]] for r in rows if "bfloat16" in r["arguments"])


def test_the_recorded_run_of_the_interpreter_found_no_difference():
    record = json.loads((ROOT / "results/gpu-interpreter.json").read_text())
    assert len(record["metrics"]) >= 75
    for name, metric in record["metrics"].items():
        assert metric["mean"] < (2e-2 if "bfloat16" in name else 1e-5), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares kernels run by a CUDA device; none here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_operations_equal_their_twins(dtype):
    for operation, arguments in ((grouped_conv, CONV), (level, LEVEL), (restriction_chain, CHAIN)):
        twin = getattr(ops, f"naive_{operation._name.partition('::')[2]}")

        def cast(a):
            if isinstance(a, list):
                return [cast(b) for b in a]
            bias = isinstance(a, torch.Tensor) and a.dim() == 1
            return a.cuda() if bias else a.to("cuda", dtype) if isinstance(a, torch.Tensor) else a

        found = operation(*[cast(a) for a in arguments])
        expected = twin(*arguments)
        pairs = zip(found, expected, strict=True) if isinstance(found, list) else [(found, expected)]
        for a, b in pairs:
            tolerance = {torch.float32: 5e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
            assert (a.cpu().double() - b.double()).abs().max() <= tolerance * b.abs().max()
