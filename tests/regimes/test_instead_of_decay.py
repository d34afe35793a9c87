"""What stands in for weight decay, against decay itself and against formulas, in float64 on a network without eps."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from norm_matters.core.clock import Clock
from norm_matters.core.errors import UserError
from norm_matters.regimes import Regime, RegimeOptimizer
from norm_matters.regimes import exponential as exponential_module
from norm_matters.regimes.exponential import exponential_root, exponential_step
from norm_matters.regimes.replay import shuffled_channels
from norm_matters.weights.recorded import EpochNorms, NormRecorder, RecordedNorms, channel_weights

LAST = 5e-4
CLOCK = Clock(0, steps_per_epoch=30, epochs=2)


class ExactNorm(nn.Module):
    """Batch norm without eps, which torch's refuses: what is before it can be scaled without any effect."""

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean((0, 2, 3), keepdim=True)
        return x / x.square().mean((0, 2, 3), keepdim=True).sqrt()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), ExactNorm(), nn.Softplus()),
        *(nn.Conv2d(6, 8, 3, bias=False), ExactNorm(), nn.Softplus()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    ).double()


def phases(first: dict, *later: dict, lr: float = 0.1, momentum: float = 0.0) -> list[dict]:
    start = {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "groups": {"last": {"weight_decay": LAST}}}
    return [{**start, **first}, *later]


def gradients(module: nn.Module, step: int) -> None:
    """The gradients of a batch that depends on the step alone."""
    draw = torch.Generator().manual_seed(step)
    images = torch.randn(8, 3, 8, 8, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 4, (8,), generator=draw)
    nn.functional.cross_entropy(module(images), labels).backward()


def directions(module: nn.Module) -> list[Tensor]:
    """The weights of the convolutions, each channel at length 1."""
    return [(w.tensor.detach().flatten(1) / w.norms()[:, None]).clone() for w in channel_weights(module)[:2]]


def train(
    module: nn.Module,
    optimizer: RegimeOptimizer,
    clock: Clock = CLOCK,
    recorder: NormRecorder | None = None,
    steps: range | None = None,
) -> tuple[list[list[Tensor]], RecordedNorms]:
    """The directions after every step; and the norms, with a recorder."""
    found, epochs = [], {}
    for step in steps or range(clock.total_steps):
        if recorder:
            recorder.before_step()
        optimizer.prepare(clock.at_step(step))
        optimizer.zero_grad()
        gradients(module, step)
        optimizer.step()
        found.append(directions(module))
        if recorder and (step + 1) % clock.steps_per_epoch == 0:
            recorder.end_epoch()
            epochs[(step + 1) // clock.steps_per_epoch] = EpochNorms(recorder.take(), f"epoch of step {step}")
    return found, RecordedNorms("runs/on", epochs)


def with_decay(decay: float, momentum: float, *later: dict) -> tuple[list[list[Tensor]], RecordedNorms]:
    """A run with decay, its norms recorded at every step."""
    module = network()
    optimizer = RegimeOptimizer(module, Regime(phases({"weight_decay": decay}, *later, momentum=momentum)))
    recorder = NormRecorder(channel_weights(module), every="step", steps=CLOCK.steps_per_epoch)
    return train(module, optimizer, recorder=recorder)


def replaced(form: dict | None, momentum: float, *later: dict, norms: RecordedNorms | None = None):
    """The same without decay but with something in its place."""
    module = network()
    regime = Regime(phases({"instead_of_decay": form}, *later, momentum=momentum))
    return train(module, RegimeOptimizer(module, regime, norms=norms, clock=CLOCK))[0]


def gap(run: list[list[Tensor]], other: list[list[Tensor]]) -> float:
    """The largest difference of any direction at any step."""
    return max((a - b).abs().max().item() for x, y in zip(run, other, strict=True) for a, b in zip(x, y, strict=True))


DROP = {"epoch": 1, "lr": 0.01}


@pytest.mark.parametrize("decay", [5e-4, 5e-3])
def test_the_correction_of_every_step_with_its_factor_is_decay_for_plain_sgd(decay: float) -> None:
    run, norms = with_decay(decay, 0.0, DROP)
    exact = replaced({"form": "lr-correction", "every": "step", "decay": decay}, 0.0, DROP, norms=norms)
    assert gap(run, exact) < 1e-12
    without = gap(run, replaced({"form": "lr-correction", "every": "step"}, 0.0, DROP, norms=norms))
    # The rate is too small by the share lr decay.
    assert 1e-2 < without / (0.1 * decay) < 1


@pytest.mark.parametrize("decay", [5e-4, 5e-3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_exponential_rate_is_decay_with_momentum_and_through_drops(decay: float, momentum: float) -> None:
    run, norms = with_decay(decay, momentum, DROP)
    exact = replaced({"form": "exponential-lr", "decay": decay}, momentum, DROP)
    assert gap(run, exact) < 1e-10
    if momentum:
        form = {"form": "lr-correction", "every": "step", "decay": decay}
        assert gap(run, replaced(form, momentum, DROP, norms=norms)) > 1e-6, "norms alone do not know of the buffer"


@pytest.mark.parametrize(
    "later",
    [
        [{"epoch": 1, "reset": True}],
        [{"step": 20, "lr": {"schedule": "cosine", "from": 0.1, "to": 0.0}}],
        [{"step": 25, "momentum": 0.5}],
    ],
    ids=["buffers emptied", "a schedule", "another momentum"],
)
def test_the_exponential_rate_follows_whatever_the_regime_does(later: list[dict]) -> None:
    run, _ = with_decay(5e-3, 0.9, *later)
    assert gap(run, replaced({"form": "exponential-lr", "decay": 5e-3}, 0.9, *later)) < 1e-10


def test_decay_that_begins_and_ends_is_followed_too() -> None:
    module = network()
    middle = [{"step": 10, "weight_decay": 0.01}, {"step": 30, "weight_decay": 0.0}]
    run, _ = train(module, RegimeOptimizer(module, Regime(phases({}, *middle, momentum=0.9))))
    form = {"form": "exponential-lr"}
    middle = [
        {"step": 10, "instead_of_decay": {**form, "decay": 0.01}},
        {"step": 30, "instead_of_decay": {**form, "decay": 0.0}},
    ]
    assert gap(run, replaced(None, 0.9, *middle)) < 1e-10


def test_long_weights_are_shortened_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exponential_module, "RENORMALISE_AT", 2.0)
    run, _ = with_decay(0.05, 0.9, DROP)
    module = network()
    start = channel_weights(module)[0].norms()
    regime = Regime(phases({"instead_of_decay": {"form": "exponential-lr", "decay": 0.05}}, DROP, momentum=0.9))
    found, _ = train(module, RegimeOptimizer(module, regime))
    assert gap(run, found) < 1e-10
    ((length, _),) = exponential_lengths(0.1, 0.9, 0.05, 30)[-1:]
    assert length > 4, "it would have become as long as that"
    assert (channel_weights(module)[0].norms() < 3 * start).all()


def exponential_lengths(lr: float, momentum: float, decay: float, steps: int) -> list[tuple[float, float]]:
    found, length, carried = [], 1.0, 0.0
    for _ in range(steps):
        _, length, carried = exponential_step(lr, momentum, decay, length, carried)
        found.append((length, carried))
    return found


@pytest.mark.parametrize(("lr", "momentum", "decay"), [(0.1, 0.9, 5e-4), (0.1, 0.0, 5e-3), (1.0, 0.5, 0.02)])
def test_the_growth_comes_to_the_larger_root(lr: float, momentum: float, decay: float) -> None:
    lengths = [length for length, _ in exponential_lengths(lr, momentum, decay, 300)]
    alpha = lengths[-2] / lengths[-1]
    assert alpha == pytest.approx(exponential_root(lr, momentum, decay), abs=1e-12)
    assert alpha**2 - (1 + momentum - lr * decay) * alpha + momentum == pytest.approx(0, abs=1e-12)


def test_the_formula_with_both_former_weights_is_the_same_thing() -> None:
    """Li and Arora's form, written out for one weight with a gradient that scales as 1 / |w|."""
    lr, momentum, decay = 0.1, 0.9, 0.01
    target = np.array([1.0, 2.0, -1.0])

    def gradient(w: np.ndarray) -> np.ndarray:
        across = target - w * (target @ w) / (w @ w)
        return -across / math.sqrt(w @ w)

    alpha = exponential_root(lr, momentum, decay)
    now = np.array([1.0, 0.0, 0.5])
    before = alpha * now
    # A former weight that is alpha times as long is, for decay, the same weight: the buffer is empty.
    w, v = now.copy(), np.zeros(3)
    for step in range(40):
        now, before = (
            now + momentum / alpha**2 * (now - before) - lr * alpha ** (-2 * step - 1) * gradient(now),
            now,
        )
        v = momentum * v + gradient(w) + decay * w
        w = w - lr * v
    np.testing.assert_allclose(now / np.linalg.norm(now), w / np.linalg.norm(w), atol=1e-12)


def test_decay_that_turns_weights_round_is_refused() -> None:
    with pytest.raises(UserError, match="lr 1 and decay 1 shorten weights below 0"):
        exponential_step(1.0, 0.0, 1.0, 1.0, 0.0)
    with pytest.raises(UserError, match=r"swing through 0; exponential-lr is for lr \* decay up to 0\.00263"):
        exponential_root(1.0, 0.9, 0.5)


def plain_norms(module: nn.Module, epochs: int = 2, rows: int = 1, factor: float = 0.5) -> RecordedNorms:
    """Norms of each channel, all different: half of those that the network has, and longer from row to row."""
    return RecordedNorms(
        "runs/on",
        {
            epoch: EpochNorms(
                {
                    w.layer: np.stack([factor * (epoch + 0.1 * row) * w.norms().numpy() for row in range(rows)])
                    for w in channel_weights(module)
                },
                f"file {epoch}",
            )
            for epoch in range(1, epochs + 1)
        },
    )


@pytest.mark.parametrize(
    ("settings", "momentum", "nesterov"),
    [({}, 0.0, False), ({"momentum": 0.9}, 0.9, False), ({"momentum": 0.9, "nesterov": True}, 0.9, True)],
    ids=["plain", "momentum", "nesterov"],
)
@pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_the_buffer_is_multiplied_at_the_update(
    settings: dict, momentum: float, nesterov: bool, implementation: dict
) -> None:
    module = network()
    norms = plain_norms(module, rows=4)
    form = {"form": "lr-correction", "every": "step", "decay": 0.3}
    regime = Regime(phases({"instead_of_decay": form, **settings, **implementation}))
    clock = Clock(0, steps_per_epoch=3, epochs=2)
    optimizer = RegimeOptimizer(module, regime, norms=norms, clock=clock)
    recorded = norms.epochs
    expected = {w.layer: w.tensor.detach().numpy().copy() for w in channel_weights(module)[:2]}
    buffers = {layer: np.zeros_like(value) for layer, value in expected.items()}
    for step in range(6):
        optimizer.prepare(clock.at_step(step))
        optimizer.zero_grad()
        gradients(module, step)
        # torch's foreach form writes into gradients for Nesterov's momentum.
        given = {w.layer: w.tensor.grad.numpy().copy() for w in channel_weights(module)[:2]}
        optimizer.step()
        for w in channel_weights(module)[:2]:
            gradient, value = given[w.layer], expected[w.layer]
            buffers[w.layer] = momentum * buffers[w.layer] + gradient
            moved = gradient + momentum * buffers[w.layer] if nesterov else buffers[w.layer]
            target = recorded[step // 3 + 1].layers[w.layer][step % 3]
            factor = (value**2).sum((1, 2, 3)) / target**2
            np.testing.assert_allclose(optimizer.lr_factors()[w.layer], factor, rtol=1e-10)
            expected[w.layer] = value - 0.1 / (1 - 0.1 * 0.3) * factor[:, None, None, None] * moved
            np.testing.assert_allclose(w.tensor.detach().numpy(), expected[w.layer], rtol=1e-10)
        assert {group["lr"] for group in optimizer.optimizer.param_groups} == {0.1}, "the groups tell the regime's rate"


def test_of_an_epoch_the_norms_at_its_end_count() -> None:
    module = network()
    norms = plain_norms(module, rows=4)
    regime = Regime(phases({"instead_of_decay": {"form": "lr-correction", "every": "epoch"}}))
    clock = Clock(0, steps_per_epoch=3, epochs=2)
    optimizer = RegimeOptimizer(module, regime, norms=norms, clock=clock)
    for step in range(6):
        lengths = {w.layer: w.norms() for w in channel_weights(module)[:2]}
        train(module, optimizer, clock, steps=range(step, step + 1))
        for layer, length in lengths.items():
            target = torch.from_numpy(norms.epochs[step // 3 + 1].layers[layer][-1])
            torch.testing.assert_close(optimizer.lr_factors()[layer], (length / target) ** 2)


def test_a_norm_schedule_keeps_the_rate_and_puts_channels_to_their_norms() -> None:
    module = network()
    norms = plain_norms(module, epochs=3)
    form = {"form": "norm-schedule", "lr": 0.1}
    drops = [{"epoch": 1, "lr": 0.01}, {"epoch": 2, "lr": 0.001}]
    clock = Clock(0, steps_per_epoch=2, epochs=3)
    optimizer = RegimeOptimizer(module, Regime(phases({"instead_of_decay": form}, *drops)), norms=norms, clock=clock)
    rates = []
    for step in range(6):
        last = module[-1].weight.detach().clone()
        rates.append(optimizer.prepare(clock.at_step(step)))
        optimizer.zero_grad()
        gradients(module, step)
        moved = {w.layer: w.tensor.detach() - 0.1 * w.tensor.grad for w in channel_weights(module)[:2]}
        optimizer.step()
        for w in channel_weights(module)[:2]:
            target = norms.epochs[step // 2 + 1].layers[w.layer][-1] * math.sqrt(10) ** (step // 2)
            np.testing.assert_allclose(w.norms(), target, rtol=1e-12)
            length = moved[w.layer].flatten(1).norm(dim=1)
            expected = moved[w.layer] * (torch.from_numpy(target) / length)[:, None, None, None]
            torch.testing.assert_close(w.tensor.detach(), expected)
        change = rates[-1] * (module[-1].weight.grad + LAST * last)
        torch.testing.assert_close(module[-1].weight.detach(), last - change)
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001]), "what is not of the schedule has the regime's"


def test_a_shuffled_correction_takes_another_channels_norm() -> None:
    module = network()
    norms = plain_norms(module)
    weights = channel_weights(module)[:2]
    order = shuffled_channels(weights, 3)
    assert sorted(order[:6].tolist()) == list(range(6)), "within the layer"
    assert sorted(order[6:].tolist()) == list(range(6, 14))
    assert all(not torch.any(shuffled_channels(weights, seed) == torch.arange(14)) for seed in range(20)), "its own"
    assert torch.equal(order, shuffled_channels(weights, 3))
    assert not torch.equal(order, shuffled_channels(weights, 4))
    lengths = weights[1].norms()
    regime = Regime(phases({"instead_of_decay": {"form": "lr-correction", "shuffle": 3}}))
    optimizer = RegimeOptimizer(module, regime, norms=norms, clock=CLOCK)
    train(module, optimizer, steps=range(1))
    target = torch.from_numpy(norms.epochs[1].layers["3"][-1])[order[6:] - 6]
    torch.testing.assert_close(optimizer.lr_factors()["3"], (lengths / target) ** 2)


@pytest.mark.parametrize("form", [{"form": "lr-correction"}, {"form": "norm-schedule", "lr": 0.2}])
def test_a_channel_that_died_in_the_recorded_run_is_not_corrected(form: dict) -> None:
    module = network()
    norms = plain_norms(module)
    for epoch in norms.epochs.values():
        epoch.layers["0"][:, 2] = 0.0
    before = channel_weights(module)[0].norms()[2].item()
    optimizer = RegimeOptimizer(module, Regime(phases({"instead_of_decay": form})), norms=norms, clock=CLOCK)
    train(module, optimizer, steps=range(3))
    if form["form"] == "lr-correction":
        assert optimizer.lr_factors()["0"][2] == 1
    assert channel_weights(module)[0].norms()[2].item() == pytest.approx(before, rel=0.2)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


FORMS = [
    {"form": "lr-correction", "every": "epoch"},
    {"form": "lr-correction", "every": "step", "decay": 0.01, "shuffle": 1},
    {"form": "norm-schedule", "lr": 0.2},
    {"form": "exponential-lr", "decay": 0.01},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["form"] + form.get("every", ""))
@pytest.mark.parametrize("stop", [20, 30])
def test_a_state_goes_on_to_the_bit(form: dict, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exponential_module, "RENORMALISE_AT", 1.5)
    module = network()
    norms = plain_norms(module, rows=31) if form["form"] != "exponential-lr" else None
    regime = Regime(phases({"instead_of_decay": form}, DROP, momentum=0.9))
    optimizer = RegimeOptimizer(module, regime, norms=norms, clock=CLOCK)
    train(module, optimizer, steps=range(stop))
    tensors = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    numbers, copied = copy.deepcopy(optimizer.numbers()), copy.deepcopy(module)
    train(module, optimizer, steps=range(stop, 60))
    again = RegimeOptimizer(copied, regime, norms=norms, clock=CLOCK)
    again.load(tensors, numbers, CLOCK.at_step(stop))
    train(copied, again, steps=range(stop, 60))
    for ours, theirs in zip(module.parameters(), copied.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert optimizer.numbers() == again.numbers()
    # Back to where it was, as a rollback does.
    optimizer.load(tensors, numbers, CLOCK.at_step(stop))
    optimizer.prepare(CLOCK.at_step(stop))
    assert optimizer.numbers()["instead_of_decay"] == {**numbers["instead_of_decay"], **_epoch_of(stop, norms)}


def _epoch_of(step: int, norms: RecordedNorms | None) -> dict:
    epoch = step // CLOCK.steps_per_epoch + 1
    return {} if norms is None else {"epochs": epoch, "norms": norms.digest(epoch)}


def test_a_state_before_the_first_step_goes_back_to_the_beginning() -> None:
    module = network()
    regime = Regime(phases({"instead_of_decay": {"form": "exponential-lr", "decay": 0.01}}, momentum=0.9))
    optimizer = RegimeOptimizer(module, regime, clock=CLOCK)
    start = copy.deepcopy(optimizer.numbers())
    optimizer.prepare(CLOCK)
    first = optimizer.optimizer.param_groups[0]["lr"]
    train(module, optimizer, steps=range(5))
    optimizer.load({}, start, CLOCK)
    optimizer.prepare(CLOCK)
    assert optimizer.optimizer.param_groups[0]["lr"] == first > 0.1


def test_other_norms_are_refused_when_a_run_goes_on() -> None:
    module = network()
    norms, others = plain_norms(module), plain_norms(module)
    others.epochs[1] = others.epochs[1]._replace(digest="another file")  # type: ignore[index]
    regime = Regime(phases({"instead_of_decay": {"form": "lr-correction"}}))
    optimizer = RegimeOptimizer(module, regime, norms=norms, clock=CLOCK)
    train(module, optimizer, steps=range(3))
    again = RegimeOptimizer(module, regime, norms=others, clock=CLOCK)
    with pytest.raises(
        UserError, match=r"^regime\.norms: the norms of 'runs/on' are not those that the run began with"
    ):
        again.load({}, optimizer.numbers(), CLOCK.at_step(3))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["form"] + form.get("every", ""))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_that_is_left_out_on_the_device_changes_nothing(form: dict, momentum: float) -> None:
    module = network()
    norms = plain_norms(module, rows=31) if form["form"] != "exponential-lr" else None
    optimizer = RegimeOptimizer(
        module, Regime(phases({"instead_of_decay": form}, momentum=momentum)), norms=norms, clock=CLOCK
    )
    for step, leave_out in enumerate((True, False, True, False)):
        optimizer.prepare(CLOCK.at_step(step))
        optimizer.zero_grad()
        gradients(module, step)
        if leave_out:
            for parameter in module.parameters():
                parameter.grad.fill_(math.nan)
        before = copy.deepcopy(module.state_dict())
        optimizer.step(torch.tensor(leave_out))
        for name, tensor in module.state_dict().items():
            if leave_out and step and form["form"] == "norm-schedule":
                torch.testing.assert_close(tensor, before[name])  # put to its norm once more
            elif leave_out and form["form"] == "norm-schedule":
                assert tensor.isfinite().all()
            else:
                assert torch.equal(tensor, before[name]) == leave_out, name


def test_channels_last_weights_of_every_kind_of_layer_are_moved() -> None:
    torch.manual_seed(0)
    kinds = {"conv": nn.Conv2d(4, 6, 3, groups=2), "up": nn.ConvTranspose2d(4, 6, 3, groups=2), "fc": nn.Linear(3, 2)}
    modules = [nn.ModuleDict(copy.deepcopy(kinds)).double() for _ in range(2)]
    for parameter in modules[1].parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    for form in FORMS[1:3]:
        regime = Regime([{"lr": 0.1, "momentum": 0.9, "instead_of_decay": {**form, "layers": "conv|up|fc"}}])
        for module in modules:
            optimizer = RegimeOptimizer(module, regime, norms=plain_norms(module, rows=31), clock=CLOCK)
            for step in range(3):
                optimizer.prepare(CLOCK.at_step(step))
                draw = torch.Generator().manual_seed(step)
                for parameter in module.parameters():
                    drawn = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
                    parameter.grad = torch.empty_like(parameter).copy_(drawn)
                optimizer.step()
        for ours, theirs in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_parameters_are_parted_into_those_with_and_those_without() -> None:
    module = network()
    regime = Regime(phases({"instead_of_decay": {"form": "exponential-lr", "decay": 0.02}, "momentum": 0.9}))
    optimizer = RegimeOptimizer(module, regime, clock=CLOCK)
    optimizer.prepare(CLOCK)
    found = {tuple(p.shape for p in group["params"]): group for group in optimizer.optimizer.param_groups}
    assert {shape: (group["lr"] > 0.1, group["weight_decay"]) for shape, group in found.items()} == {
        ((6, 3, 3, 3), (8, 6, 3, 3)): (True, 0.0),
        ((4, 8), (4,)): (False, LAST),
    }
    only = Regime(phases({"instead_of_decay": {"form": "exponential-lr", "decay": 0.02, "layers": "^3$"}}))
    optimizer = RegimeOptimizer(module, only, clock=CLOCK)
    optimizer.prepare(CLOCK)
    sizes = [(len(group["params"]), group["lr"] > 0.1) for group in optimizer.optimizer.param_groups]
    assert sizes == [(1, False), (1, True), (2, False)]


def test_without_it_nothing_is_looked_up_or_saved() -> None:
    module = network()
    optimizer = RegimeOptimizer(module, Regime(phases({})), clock=CLOCK)
    train(module, optimizer, steps=range(2))
    assert optimizer._replaying is None
    assert "instead_of_decay" not in optimizer.numbers()
    assert optimizer.lr_factors() == {}


def test_the_batch_size_changes_the_constant_rate_too() -> None:
    form = {"form": "norm-schedule", "lr": 0.1}
    regime = Regime(phases({"instead_of_decay": form}), lr_factor=2.0)
    settings = regime.at(CLOCK)
    assert settings["lr"] == settings["instead_of_decay"].lr == 0.2
