"""`mgic bench`: the numbers of a comparison follow from the times of its rounds; a path that fails is a reason, no crash."""

import csv
import io
import json
import os

import pytest
import torch
from torch import nn

import mgic
from mgic import benchmarking
from mgic.benchmarking import (
    TRAINING,
    TRIES,
    Case,
    Group,
    Network,
    Timing,
    compare,
    group,
    measure,
    quartiles,
    run_benchmark,
    thread_scaling,
)
from mgic.benchmarking.cases import training_step
from mgic.benchmarking.timing import _Answer, _prepare
from mgic.cli import main
from mgic.cli_bench import SUITES, suite
from mgic.counting import Cost
from mgic.errors import UserError
from mgic.training.records import read_record

SMALL, TWIN = Network("resnet20", size=8), Network("mgic_resnet20", size=8)


def timing(network, path, seconds, **setting):
    return Timing(Case(Network(network), path, **setting), tuple(seconds))


def answer(pipe, case):
    """A process that times nothing: what it says tells which case it is, and how often it was asked."""
    if case.path == "dead":
        os._exit(7)
    if case.path == "refused":
        pipe.send(Timing(case, reason="not today"))
        return
    pipe.send(Timing(case, error=0.0))
    for count in range(1 + 3):  # once before the rounds
        if case.path == "dies" and count == 2:
            pipe.poll(None)  # with the question unread
            os._exit(8)
        pipe.send(_Answer(pipe.recv() * count + case.batch, (1.0, 1.0)))


def disturbed(pipe, case):
    """A process that says how often it was asked, with the times of the reference computation that its path lists."""
    pipe.send(Timing(case, error=0.0))
    for count, references in enumerate(json.loads(case.path)):
        pipe.recv()
        pipe.send(_Answer(count, tuple(references)))


@pytest.fixture
def instant(monkeypatch):
    """Benchmarks that measure nothing: a case takes as many seconds as its path has letters, and ``batch`` milliseconds."""
    measured = []

    def made_up(cases, rounds, seconds):
        measured.append(list(cases))
        return [Timing(c, (len(c.path) + c.batch / 1000,) * rounds, 0.0, 0.1, 5.0) for c in cases]

    monkeypatch.setattr(benchmarking, "measure", made_up)
    return measured


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("resnet20", Network("resnet20")),
        ("resnet20@48", Network("resnet20", size=48)),
        ("mgic_resnet20:group_size=4,width=2.0", Network("mgic_resnet20", {"group_size": 4, "width": 2.0})),
        ("mgic_mobilenetv3_100@64:act=relu", Network("mgic_mobilenetv3_100", {"act": "relu"}, 64)),
        ("torchvision:resnet18", Network("torchvision:resnet18")),
        ("a:b=[1, 2],c={d: 3, e: x}", Network("a", {"b": [1, 2], "c": {"d": 3, "e": "x"}})),
    ],
)
def test_a_network_is_read_from_text_and_written_as_the_same(text, network):
    assert Network.parse(text) == network
    assert str(network) == text


@pytest.mark.parametrize(
    "text", ["", "@8", "resnet20@big", "resnet20:group_size", "resnet20:=4", "resnet20:a=1,,b=2", "a:b={c"]
)
def test_text_that_is_no_network_is_refused(text):
    with pytest.raises(UserError, match="name@SIZE or name:argument=value"):
        Network.parse(text)


def test_a_network_to_time_is_the_same_every_time_and_hides_no_branch_behind_a_zero():
    model, size = Network.parse("resnet18@32").build()
    again, _ = Network.parse("resnet18@32").build()
    assert size == (3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert min(float(norm.weight.detach().min()) for norm in norms) >= 0.5
    assert not model.training


def test_channels_and_pixels_are_those_asked_for():
    assert Network.parse("resnet18@32:in_chans=1").build()[1] == (1, 32, 32)
    converted, size = Network.parse("torchvision:resnet18@32:conversion={group_size: 8, coarsest: 16}").build()
    assert size == (3, 32, 32)
    assert any(isinstance(m, mgic.MGICBlock) for m in converted.modules())


def test_branches_that_can_be_merged_are_merged():
    counted = Network.parse("mobileone_s0@32").cost()
    assert counted.macs < mgic.cost(mgic.create_model("mobileone_s0"), (3, 32, 32)).macs


@pytest.mark.parametrize(
    ("text", "message"),
    [("resnet21", "no model 'resnet21'"), ("resnet20:depth=3", "depth")],
)
def test_a_network_that_cannot_be_built_is_refused_before_anything_is_timed(text, message, instant):
    with pytest.raises(UserError, match=message):
        run_benchmark([group([text], paths=["eager"])])
    assert instant == []


def test_a_group_is_every_combination_and_its_peer_comes_first():
    one = group(["mgic_resnet20", "resnet20"], "resnet20", ["eager", "engine"], [1, 2], [1])
    assert one.peer == Network("resnet20")
    assert [(c.batch, c.network.name, c.path) for c in one.cases] == [
        (batch, name, path)
        for batch in (1, 2)
        for name in ("resnet20", "mgic_resnet20")
        for path in ("eager", "engine")
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": ["egine"]}, "no path 'egine'; did you mean engine"),
        ({"batches": [0]}, r"batch must be positive numbers, got \[0\]"),
        ({"threads": []}, r"threads must be positive numbers, got \[\]"),
    ],
)
def test_a_group_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        group(["resnet20"], **change)


def test_the_time_ratio_is_the_median_over_the_rounds_between_the_fastest_paths():
    costs = {Network("a"): Cost(0, 1000, (1,)), Network("b"): Cost(0, 250, (1,))}
    timings = [
        timing("a", "slow", [9, 9, 9]),
        timing("a", "fast", [4, 4, 40]),  # in the third round something else ran, for both
        timing("b", "slow", [3, 3, 3.1]),
        timing("b", "fast", [2, 1, 20]),
        timing("b", "none", []),
        timing("a", TRAINING, [1, 1, 1]),
        timing("b", TRAINING, [2, 2, 2]),
        timing("b", "fast", [8, 8, 8], batch=2),  # without a peer
    ]
    inference, training = compare(Network("a"), timings, costs)
    assert (inference["path"], inference["peer_path"], inference["batch"]) == ("fast", "fast", 1)
    assert inference["time_ratio"] == 0.5
    assert inference["time_ratio_quartiles"] == (0.25, 0.5)
    assert inference["flop_ratio"] == 0.25
    assert inference["efficiency"] == 0.5
    assert (training["path"], training["time_ratio"]) == (TRAINING, 2)


def test_thread_scaling_compares_the_same_path_and_batch():
    timings = [
        timing("a", "x", [4, 4, 4], threads=1),
        timing("a", "x", [2, 3, 2], threads=2),
        timing("a", "y", [9, 9, 9], threads=2),
        timing("a", "x", [7, 7, 7], threads=2, batch=16),
    ]
    (row,) = thread_scaling(timings)
    assert (row["path"], row["batch"], row["threads"]) == ("x", 1, 2)
    assert (row["time_ratio"], row["throughput_ratio"]) == (0.5, 2)


def test_quartiles_are_values_that_were_measured():
    assert quartiles([4.0]) == (4.0, 4.0)
    assert quartiles(range(9)) == (2, 6)
    assert quartiles([3, 1, 2, 4]) == (1, 4)


def test_processes_are_asked_in_turns_and_one_that_ends_is_a_reason():
    paths = ["works", "dead", "refused", "dies", "works"]
    cases = [Case(SMALL, path, batch=10 * i) for i, path in enumerate(paths)]
    found = measure(cases, rounds=3, seconds=0.5, serve=answer)
    assert [one.case for one in found] == cases
    assert found[0].seconds == (0.5, 1.0, 1.5)
    assert found[4].seconds == (40.5, 41.0, 41.5)
    assert [one.reason for one in found] == [
        None,
        "its process ended with status 7",
        "not today",
        "its process ended with status 8",
        None,
    ]
    assert found[3].seconds == ()


def test_a_process_is_asked_again_until_nobody_disturbs_it():
    """A limit of 1.2; before the rounds (answer 0) nothing is known of how fast the reference computation can be."""
    quiet, before, after = (1.0, 1.15), (1.3, 1.0), (1.0, 1.3)
    calm = json.dumps([(2.0, 2.0), before, after, quiet, quiet])
    never = json.dumps([quiet, quiet, *[before] * (TRIES - 1), (1.25, 1.0)])
    one, other = measure([Case(SMALL, calm), Case(SMALL, never)], rounds=2, seconds=0.1, serve=disturbed)
    assert (one.seconds, one.disturbed) == ((3, 4), 0)
    assert (other.seconds, other.disturbed) == ((1, 1 + TRIES), 1)  # the least disturbed answer


def test_the_limit_is_that_of_as_many_threads():
    slow, fast = json.dumps([[4.0, 4.0]] * 2), json.dumps([[2.0, 2.0]] * 2)
    cases = [Case(SMALL, slow), Case(SMALL, fast, threads=2)]
    assert [one.disturbed for one in measure(cases, rounds=1, seconds=0.1, serve=disturbed)] == [0, 0]


def test_a_network_is_really_run_checked_and_timed():
    """Its own processes, eager and in training; the peak of a batch of 64 is above that of 1 by its features at least."""
    cases = [Case(TWIN, "eager"), Case(TWIN, "eager", batch=64), Case(TWIN, TRAINING, batch=2)]
    one, many, training = measure(cases, rounds=2, seconds=0.001)
    for found in (one, many, training):
        assert found.reason is None
        assert len(found.seconds) == 2
        assert 0 < min(found.seconds) < 30
    assert one.error == many.error == 0
    assert training.error is None
    features = mgic.memory(TWIN.build()[0], (3, 8, 8), batch=64).inference / 2**20
    if one.peak_mib is not None:
        assert many.peak_mib - one.peak_mib > 0.5 * features


def test_a_path_with_wrong_outputs_is_not_timed(monkeypatch):
    monkeypatch.setitem(benchmarking.WAYS, "wrong", lambda model, x, threads: lambda x: model(x).detach() * 1.001)
    with pytest.raises(UserError, match=r"differs from eager by 1\.0e-03"):
        _prepare(Case(SMALL, "wrong"))


def test_a_training_step_trains():
    model, size = SMALL.build()
    x = torch.randn(4, *size)
    before = [p.detach().clone() for p in model.parameters()]
    step = training_step(model, x, 1)
    step(x)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_finished_groups_are_kept_and_another_setting_is_timed_again(instant, tmp_path):
    groups = [group([SMALL], paths=["eager"]), group([TWIN], SMALL, paths=["eager", "engine"])]
    first = run_benchmark(groups, 3, 0.1, tmp_path)
    again = run_benchmark(groups, 3, 0.1, tmp_path)
    assert len(instant) == 2
    assert json.dumps(vars(again)) == json.dumps(vars(first))
    run_benchmark(groups, 4, 0.1, tmp_path)
    run_benchmark([groups[1]], 4, 0.1, tmp_path)
    assert len(instant) == 5


@pytest.mark.parametrize(("rounds", "seconds"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_rounds_and_seconds_must_be_positive(rounds, seconds, instant):
    with pytest.raises(UserError, match="must be positive"):
        run_benchmark([group([SMALL])], rounds, seconds)


def test_the_command_writes_what_it_prints(instant, tmp_path, capsys):
    files = [f"--{kind}={tmp_path / kind}" for kind in ("json", "csv", "plot", "record")]
    call = [
        "bench",
        "inference",
        "mgic_resnet20@8",
        "--dense",
        "resnet20@8",
        "--paths",
        "[eager, engine]",
        "--rounds=3",
    ]
    assert main([*call, *files]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "json").read_text())
    macs = {name: mgic.cost(mgic.create_model(name), (3, 8, 8)).macs for name in ("resnet20", "mgic_resnet20")}
    (pair,) = found["comparisons"]
    assert (pair["network"], pair["peer"], pair["path"]) == ("mgic_resnet20@8", "resnet20@8", "eager")
    assert pair["flop_ratio"] == pair["efficiency"] == macs["mgic_resnet20"] / macs["resnet20"]
    assert f"{macs['mgic_resnet20']:,}" in printed
    assert f"{pair['efficiency']:.2f}" in printed
    rows = list(csv.DictReader(io.StringIO((tmp_path / "csv").read_text())))
    assert [float(row["ms"]) for row in rows] == [row["ms"] for row in found["timings"]] == [5001, 6001] * 2
    assert (tmp_path / "plot").read_bytes().startswith(b"\x89PNG")
    record = read_record(tmp_path / "record")
    assert record["n"] == 3
    assert record["command"] == "mgic " + " ".join(call).replace("[eager, engine]", "'[eager, engine]'")
    assert record["metrics"]["resnet20@8 eager batch 1 threads 1 seconds"]["values"] == [5.001] * 3
    assert record["comparisons"] == found["comparisons"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["inference"], "needs the names of networks"),
        (["inferense", "resnet20"], "cannot time 'inferense'; did you mean inference"),
        (["efficiency", "resnet20"], "bench efficiency is fixed: models belong to bench inference"),
        (["table8", "--threads", "[2]"], "threads belong to bench inference"),
        (["inference", "resnet20", "--paths", "[fast]"], "there is no path 'fast'"),
    ],
)
def test_a_wrong_call_is_one_line(call, message, capsys, instant):
    assert main(["bench", *call]) == 2
    assert message in capsys.readouterr().err
    assert instant == []


@pytest.mark.parametrize("name", SUITES)
def test_every_network_of_a_suite_can_be_built(name):
    """On the meta device, as they are named; each group compares with a network that is in it."""
    for one in suite(name):
        assert isinstance(one, Group)
        assert one.peer is None or one.peer in {case.network for case in one.cases}
    with torch.device("meta"):
        for network in {case.network for one in suite(name) for case in one.cases}:
            assert mgic.create_model(network.name, **network.args).num_classes > 1
