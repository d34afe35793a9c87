"""`bench norms` and `bench --check`: what is counted, compared and told; times come from a clock of the test's own."""

import csv
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from norm_matters.bench import memory, norm_arms, norms, timing
from norm_matters.bench.memory import Passes, channel_is_cached, copy_bandwidth, fewest_passes, kept_bytes, peak_bytes
from norm_matters.bench.norm_arms import Arm, Batch, kernel_name
from norm_matters.bench.norms import NormCase, NormRow, floor_seconds, median_speedups, norm_cases, parse_shape
from norm_matters.cli import main
from norm_matters.core.errors import UserError
from norm_matters.norms import create_norm
from norm_matters.norms.kernels.dispatch import Availability, kernels

TINY = (4, 6, 3, 5)
NORMS = ("l1", "topk:k=3")


@pytest.fixture
def clock(monkeypatch):
    """The clock of all timings: it stands still unless it is told."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    monkeypatch.setattr(memory, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


@pytest.fixture
def small_copies(monkeypatch):
    monkeypatch.setattr(memory, "_COPIED", 2**12)


@pytest.mark.parametrize(
    ("norm", "form", "cached", "passes"),
    [
        # A channel in the cache: everything is read once.
        ("l1", "plain", True, (1, 1, 2, 1)),
        ("l2", "relu", True, (1, 1, 2, 1)),
        ("topk", "add_relu", True, (2, 1, 3, 2)),
        ("mean", "plain", True, (1, 1, 1, 1)),
        ("mean", "relu", True, (1, 1, 2, 1)),
        # Else the statistics take passes of their own; l1 needs the mean first.
        ("l1", "plain", False, (3, 1, 4, 1)),
        ("l1", "relu", False, (3, 1, 4, 1)),
        ("l1", "add_relu", False, (4, 1, 5, 2)),
        ("l2", "plain", False, (2, 1, 4, 1)),
        ("linf", "relu", False, (2, 1, 4, 1)),
        ("topk", "plain", False, (2, 1, 4, 1)),
        ("l2", "add_relu", False, (3, 1, 5, 2)),
        ("mean", "plain", False, (2, 1, 2, 1)),
        ("mean", "relu", False, (2, 1, 4, 1)),
        ("mean", "add_relu", False, (3, 1, 3, 2)),
    ],
)
def test_fewest_passes(norm, form, cached, passes):
    assert fewest_passes(norm, form, cached=cached) == Passes(*passes)


def test_the_issues_nine_passes_of_l1_and_the_norms_nobody_counted():
    passes = fewest_passes("l1", "plain", cached=False)
    assert passes is not None
    assert sum(passes) == 9
    assert fewest_passes("lp", "plain", cached=True) is None


def test_a_channel_is_cached_up_to_a_mebibyte_of_rows():
    assert channel_is_cached(torch.empty(64, 3, 64, 64))
    assert not channel_is_cached(torch.empty(64, 3, 64, 65))
    assert channel_is_cached(torch.empty(64, 3, 64, 65, dtype=torch.bfloat16))
    assert not channel_is_cached(torch.empty(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))


def test_floor():
    x = torch.empty(2, 3, 4, 5)  # 480 bytes
    last = x.contiguous(memory_format=torch.channels_last)
    assert floor_seconds("topk:k=3", "plain", x, 1e3) == pytest.approx(5 * 0.48)
    assert floor_seconds("l1:eps=0.1", "plain", last, 1e3) == pytest.approx(9 * 0.48)
    assert floor_seconds("nn.BatchNorm2d", "relu", last.to(torch.bfloat16), 1e3) == pytest.approx(8 * 0.24)
    assert floor_seconds("nn.GroupNorm", "plain", x, 1e3) is None


def test_bandwidth_is_that_of_the_best_copy_but_the_first(clock, small_copies, monkeypatch):
    copy, times = torch.Tensor.copy_, iter([0.5, 4.0, 2.0, 3.0])

    def copy_(self, other):
        clock.seconds += next(times)
        return copy(self, other)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    assert copy_bandwidth() == 2 * 2**12 / 2.0


def test_kept_bytes():
    x, weight = torch.randn(10, 10, requires_grad=True), nn.Parameter(torch.randn(10, 10))
    assert kept_bytes(lambda: x * x) == 400  # the input, saved twice
    assert kept_bytes(lambda: x.exp()) == 400  # the output
    assert kept_bytes(lambda: (x * 2).sin().exp()) == 800  # both of what is in between: sin's input and exp's output
    assert kept_bytes(lambda: x * weight) == 800
    assert kept_bytes(lambda: x * weight, [weight]) == 400
    assert kept_bytes(lambda: x[:2] * x[2:4].detach()) == 400  # a storage counts whole
    assert kept_bytes(lambda: x + 1) == 0


def test_peak_bytes():
    def call() -> None:
        first, second = torch.empty(1000), torch.empty(500)
        del first
        third = torch.empty(600)
        del second, third
        torch.empty(1000)

    assert peak_bytes(call) == 6000
    x = torch.randn(1, 1, 50, 50)
    # What an operation takes for itself counts: the median sorts a copy.
    assert peak_bytes(lambda: x.median()) >= 10_000
    assert peak_bytes(lambda: x.zero_()) == 0


@pytest.mark.parametrize("form", norms.FORMS)
@pytest.mark.parametrize("layout", norm_arms.LAYOUTS)
def test_every_arm_makes_the_same_gradients(form, layout):
    """What is timed is one and the same thing, in our l2 and in torch's; and gradients of two runs do not add up."""
    batch = Batch.draw(TINY, form, dtype="float32", layout=layout, device="cpu")
    x, w, b = batch.x.detach().double().requires_grad_(), torch.ones(6).double(), torch.zeros(6).double()
    leaves = [x, w.requires_grad_(), b.requires_grad_()]
    y = nn.functional.batch_norm(x, None, None, w, b, training=True)
    if batch.residual is not None:
        leaves.append(batch.residual.detach().double().requires_grad_())
        y = y + leaves[-1]
    expected = torch.autograd.grad(y if form == "plain" else y.relu(), leaves, batch.grad.double())
    assert batch.x.is_contiguous(memory_format=norm_arms.LAYOUTS[layout])
    *arms, group = norm_arms.norm_arms(["l2"], form, batch.x, compiled=False)
    assert group.norm == "nn.GroupNorm"
    for arm in arms:
        for _ in range(2):
            batch.run(arm)
        tensors = [batch.x, *arm.layer.parameters()] + ([] if batch.residual is None else [batch.residual])
        found = [tensor.grad.double() for tensor in tensors]
        torch.testing.assert_close(found, list(expected), atol=1e-4, rtol=1e-4)


def slowed(clock, monkeypatch, costs):
    """Each run of an implementation of a norm takes its seconds, the i-th run of all (i + 1) times as many."""
    run, counts = Batch.run, {}

    def timed(self, arm: Arm) -> None:
        run(self, arm)
        counts[arm.name] = counts.get(arm.name, 0) + 1
        clock.seconds += counts[arm.name] * costs.get((arm.norm, arm.implementation), 1.0)

    monkeypatch.setattr(Batch, "run", timed)


def test_rows_of_a_case(clock, monkeypatch):
    slowed(clock, monkeypatch, {("l1", "reference"): 4.0, ("nn.BatchNorm2d", "native"): 2.0})
    case = NormCase(NORMS, "add_relu", TINY, "float32", "contiguous")
    with kernels("reference"):
        rows = case.measure(1440.0, repeats=3)  # a byte takes as long as 4 * 6 * 3 * 5 * 4 of them take in a second
    assert [(row.norm, row.implementation) for row in rows] == [
        ("l1", "reference"),
        ("topk:k=3", "reference"),
        ("nn.BatchNorm2d", "native"),
        ("nn.GroupNorm", "native"),
    ]
    assert {row[1:5] for row in rows} == {("add_relu", "4x6x3x5", "float32", "contiguous")}
    # Two runs before the rounds, two to warm up: the rounds are the fifth to the seventh, the sixth is the median.
    assert [row.milliseconds for row in rows] == [24e3, 6e3, 12e3, 6e3]
    assert [row.speedup for row in rows] == [0.5, 2.0, 1.0, 2.0]
    # 2 + 1 + 3 + 2 passes, a second each.
    assert [row.floor_ms for row in rows] == [8e3, 8e3, 8e3, None]
    assert [row.share_of_floor for row in rows] == [8 / 24, 8 / 6, 8 / 12, None]
    batch_norm = rows[2]
    assert batch_norm.kept_bytes is not None
    # Input, output (for ReLU's mask) and two numbers per channel.
    assert 2 * 1440 < batch_norm.kept_bytes <= 2 * 1440 + 4 * 6 * 4
    # Normalised and added, before the first is given back; then gradients of input and residual with the output.
    assert batch_norm.peak_bytes is not None
    assert 3 * 1440 <= batch_norm.peak_bytes < 6 * 1440
    assert all(row.error == "" for row in rows)


def test_a_failing_implementation_is_told_and_the_others_are_measured(monkeypatch):
    run = Batch.run

    def failing(self, arm: Arm) -> None:
        if arm.norm == "l1":
            raise RuntimeError("out of\npaper")
        run(self, arm)

    monkeypatch.setattr(Batch, "run", failing)
    with kernels("reference"):
        failed, other, native, _ = NormCase(NORMS, "plain", TINY, "float32", "channels_last").measure(1e9, repeats=1)
    assert failed.error == "RuntimeError: out of"
    assert failed[6:-1] == (None,) * 6
    assert other.error == native.error == ""
    assert other.milliseconds is not None
    assert native.speedup == 1


def test_without_native_there_is_no_ratio(monkeypatch):
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: 1 / 0)
    first, *_ = NormCase(("l2",), "plain", TINY, "float32", "contiguous").measure(1e9, repeats=1)
    assert first.milliseconds is not None
    assert first.speedup is None


def test_the_kernels_that_a_norm_uses(monkeypatch):
    x = torch.randn(TINY)
    backend = SimpleNamespace(__name__="norm_matters.norms.kernels.cpu")
    monkeypatch.setattr(norm_arms, "has_kernel", lambda x, statistic, dtype, reducer: statistic.estimator.kind == "l1")
    monkeypatch.setattr(norm_arms, "fast_backend", lambda x, estimator: backend)
    assert kernel_name(create_norm("l1", 6), x) == "cpu"
    assert kernel_name(create_norm("l2", 6), x) is None
    assert kernel_name(create_norm("lp:p=3", 6), x) is None
    assert kernel_name(create_norm("ghost:size=2", 6), x) is None
    assert kernel_name(nn.BatchNorm2d(6), x) is None


def test_kernels_come_before_the_reference(monkeypatch):
    monkeypatch.setattr(norm_arms, "kernel_name", lambda norm, x: "cpu" if norm.name == "l1" else None)
    arms = norm_arms.norm_arms(["l2", "l1"], "relu", torch.randn(TINY), compiled=True)
    assert [(arm.norm, arm.implementation, arm.choice) for arm in arms] == [
        ("l2", "reference", "reference"),
        ("l2", "compiled", "reference"),
        ("l1", "cpu", "auto"),
        ("l1", "reference", "reference"),
        ("l1", "compiled", "reference"),
        ("nn.BatchNorm2d", "native", "auto"),
        ("nn.BatchNorm2d", "native compiled", "auto"),
        ("nn.GroupNorm", "native", "auto"),
    ]


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (16, 16), (48, 24), (7, 7), (37, 1)])
def test_groups_divide_the_channels(channels, groups):
    (*_, last) = norm_arms.norm_arms([], "plain", torch.randn(2, channels, 2, 2), compiled=False)
    assert last.layer.norm.num_groups == groups


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's code generator uses what torch has deprecated
def test_compiled_forms():
    rows = NormCase(("l1",), "relu", TINY, "float32", "contiguous", compiled=True).measure(1e9, repeats=1)
    assert {"compiled", "native compiled"} <= {row.implementation for row in rows}
    assert [row.error for row in rows] == [""] * len(rows)


def test_cases_are_all_combinations():
    cases = norm_cases(["l1", " l1", "topk"], ["2x3x4x5", "2x3x1x1"], forms=["relu", "plain"], dtypes=["bfloat16"])
    assert [(case.layout, case.form, case.shape) for case in cases] == [
        (layout, form, shape)
        for layout in ("contiguous", "channels_last")
        for form in ("plain", "relu")
        for shape in ((2, 3, 4, 5), (2, 3, 1, 1))
    ]
    assert {(case.norms, case.dtype, case.compiled) for case in cases} == {(("l1", "topk:k=10"), "bfloat16", False)}
    assert len(norm_cases()) == 6 * 3 * 2


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError) as caught:
        norm_cases(
            ["l3", "layer"], ["64x64", "0x3x4x4"], forms=["rely"], layouts=["channel_last"], dtypes=["float16", "half"]
        )
    told = caught.value.problems
    for part in (
        "--norms: unknown norm 'l3'",
        "--norms: 'layer' is no batch norm of its own",
        "--shapes: '64x64' is no NxCxHxW with two or more values per channel; write e.g. '64x64x8x8'",
        "--shapes: '0x3x4x4' is no NxCxHxW with two or more values per channel; write e.g. '8x3x4x4'",
        "--forms: 'rely' is unknown, there are plain, relu, add_relu; did you mean 'relu'?",
        "--layouts: 'channel_last' is unknown, there are contiguous, channels_last; did you mean 'channels_last'?",
        "--dtypes: 'half' is unknown, there are float32, bfloat16, float16",
    ):
        assert any(problem.startswith(part) for problem in told), part
    assert len(told) == 7


@pytest.mark.parametrize("text", ["1x3x1x1", "1x2x3", "1x2x3x4x5", "axbxcxd", "2x-3x4x5", "", "2x3x4x²"])
def test_wrong_shapes(text):
    with pytest.raises(UserError) as caught:
        parse_shape(text)
    parse_shape(str(caught.value).split("'")[-2])  # what it proposes is valid


def row(norm: str, implementation: str, ratio: float | None, shape: str = "1x1x1x2", form: str = "relu") -> NormRow:
    return NormRow(norm, form, shape, "float32", "contiguous", implementation, 1.0, ratio)


def test_medians_are_over_the_shapes_of_what_auto_uses():
    rows = [
        row("l1", "cpu", 2.0, "a"),
        row("l1", "reference", 0.1, "a"),
        row("l1", "compiled", 9.0, "a"),
        row("l1", "cpu", 4.0, "b"),
        row("l1", "reference", 0.1, "b"),
        row("l1", "reference", 1.0, "c"),
        row("linf", "reference", 0.5, "a"),
        row("linf", "reference", None, "b"),
        row("nn.BatchNorm2d", "native", 1.0, "a"),
        row("l1", "cpu", 3.0, "a", "plain"),
    ]
    assert median_speedups(rows) == {
        ("relu", "contiguous", "float32"): {"l1": 2.0, "linf": 0.5},
        ("plain", "contiguous", "float32"): {"l1": 3.0},
    }


def test_command(tmp_path, small_copies, capsys):
    arguments = ["--norms", "l1,topk:k=3", "--shapes", "2x4x3x3", "--forms", "relu", "--layouts", "contiguous"]
    assert main(["bench", "norms", *arguments, "--repeats", "1", "--output", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    measured = [line for line in lines if line[:4] == ["relu", "contiguous", "float32", "2x4x3x3"]]
    with (tmp_path / "new" / "norms.csv").open() as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == list(NormRow._fields)
    assert [line[4:6] for line in measured] == [[row["norm"], row["implementation"]] for row in written]
    assert [f"{float(row['speedup']):.3g}" for row in written] == [line[7] for line in measured]
    (summary,) = [line for line in shown.splitlines() if line.startswith("  relu, contiguous, float32")]
    assert " l1 x" in summary
    assert " topk:k=3 x" in summary
    page = (tmp_path / "new" / "norms.html").read_text()
    assert "bench norms --norms l1,topk:k=3" in page
    assert "GB/s, a copy&#x27;s" in page


def test_quick_takes_small_shapes_and_three_rounds(small_copies, monkeypatch, capsys):
    seen = []

    def measure(self, bandwidth, *, repeats):
        seen.append((self.shape, self.form, self.layout, repeats))
        return [row("l1", "reference", 1.0)]

    monkeypatch.setattr(NormCase, "measure", measure)
    assert main(["bench", "norms", "--quick"]) == 0
    assert len(seen) == 2 * 3 * 2
    assert {(shape, repeats) for shape, _, _, repeats in seen} == {((16, 16, 16, 16), 3), ((8, 64, 8, 8), 3)}
    seen.clear()
    assert main(["bench", "norms", "--shapes", "1x1x1x2", "--repeats", "5", "--quick"]) == 0
    assert {(shape, repeats) for shape, _, _, repeats in seen} == {((1, 1, 1, 2), 5)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--norms", "l7"], "--norms: unknown norm 'l7'"),
        (["--shapes", "64x64x56"], "--shapes: '64x64x56' is no NxCxHxW"),
        (["--forms", "add"], "--forms: 'add' is unknown"),
        (["--layouts", "nhwc"], "--layouts: 'nhwc' is unknown"),
        (["--dtypes", "float64"], "--dtypes: 'float64' is unknown, there are float32, bfloat16, float16; did you mean"),
        (["--repeats", "0"], "--repeats: value '0' is not valid"),
        (["--device", "cuda:99"], "'cuda:99' is not to be had here"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(["bench", "norms", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_check(monkeypatch, capsys):
    from norm_matters.bench import machine

    found = [Availability("reference", "any", None), Availability("cpu", "cpu", "no C compiler")]
    monkeypatch.setattr(machine, "available_backends", lambda: found)
    monkeypatch.setattr(machine, "keep_pages", lambda: "pages are kept")
    monkeypatch.setattr(machine.cpu, "simd_names", lambda: ["avx2", "baseline"])
    monkeypatch.setattr(machine.cpu, "current_simd", lambda: "baseline")
    assert main(["bench", "--check"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["kernels:", "reference              yes, on any"],
        ["kernels:", "cpu                    no: no C compiler"],
        ["instructions", "of the C kernels   baseline, of avx2, baseline"],
        ["torch", f"{torch.__version__}, {torch.get_num_threads()} threads"],
        ["allocator", "pages are kept"],
    ]
    monkeypatch.setattr(machine, "keep_pages", lambda: None)
    monkeypatch.setattr(machine.cpu, "simd_names", list)
    facts = machine.machine_facts()
    assert facts["instructions of the C kernels"] == "none"
    assert facts["allocator"].startswith("left as it is")
