"""Weight values refilled in place and restored, and a peer on the same windows."""

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lib import models
from lib.analysis.energy import conclusions, quantities, tables
from lib.hardware.device import open_device
from lib.measure.energy import checks
from lib.records import store
from lib.stacks.registry import STACKS
from tests.fakes.board import Board, BoardDevice, BoardModel
from tests.fakes.device import opened

CELL = {"stack": "hf-eager", "context": 8, "new_tokens": 21, "seed": 0, "env_id": "e"}


class Values(BoardModel):
    """A dense model of one matrix, whose decoding draws more the larger its weights are."""

    weights, dtype = "random", "float32"

    def __init__(self, device):
        super().__init__(device)
        self.card.experts = 0
        self.layer = torch.nn.Linear(8, 8)
        self.net = self.layer

    def open_stack(self, net, *, decoding="greedy", capacity=None):
        inner = super().open_stack(net, decoding=decoding)

        def generate(*args, **options):
            size = float(self.layer.weight.detach().abs().mean())
            self.token = (0.05, 300.0 + 1000 * size)
            return inner(*args, **options)

        return generate


@pytest.fixture
def model(monkeypatch):
    fake = Values(BoardDevice(Board()))
    monkeypatch.setitem(STACKS, "hf-eager", opened("hf-eager", fake.open_stack))
    fresh = SimpleNamespace(net=torch.nn.Linear(8, 8))
    monkeypatch.setattr(models.load, "load", lambda name, **options: fresh)
    fake.fresh = fresh
    return fake


def weights_sweep(model, folder, **changes):
    arguments = (
        CELL
        | {"name": "fake", "weight_values": ["normal", "zero"], "repeats": 3, "window_s": 5.0}
        | changes
    )
    return checks.sweep(model, **arguments, records_path=folder / "records.jsonl")


def test_each_value_has_a_row_in_balanced_blocks(model, tmp_path):
    rows = weights_sweep(model, tmp_path)
    by_value = {r.key["weights"]: r for r in rows}
    assert by_value.keys() == {"random-normal", "random-zero"}
    assert {r.kind for r in rows} == {"energy-weights"}
    zero, normal = (by_value[f"random-{v}"].samples["energy_j"] for v in ("zero", "normal"))
    assert zero == pytest.approx([100 + 15 * 20] * 3, rel=5e-3)
    assert all(4 < more - less < 25 for more, less in zip(normal, zero, strict=True))
    assert model.net is model.fresh.net  # restored from the seed


def test_no_values_no_rows(model, tmp_path):
    assert weights_sweep(model, tmp_path, weight_values=[]) == []
    with pytest.raises(ValueError, match=r"unknown weight values \['ones'\]"):
        weights_sweep(model, tmp_path, weight_values=["ones"])


def test_the_same_seed_fills_the_same_and_scales_stay():
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    scale = net[1].weight.clone()
    checks.refill(net, "normal", 1)
    first = net[0].weight.clone()
    assert first.std().item() == pytest.approx(0.02, rel=0.1)
    checks.refill(net, "tiny", 1)
    assert net[0].weight.abs().max() <= 1e-3
    checks.refill(net, "normal", 1)
    assert torch.equal(net[0].weight, first) and torch.equal(net[1].weight, scale)
    checks.refill(net, "normal", 2)
    assert not torch.equal(net[0].weight, first)
    checks.refill(net, "constant", 1)
    assert (net[0].weight == net[0].weight[0, 0]).all()
    assert net[0].weight[0, 0].item() == pytest.approx(0.01)
    checks.refill(net, "zero", 1)
    assert not net[0].weight.any()


def test_a_real_model_is_restored_to_the_bit():
    model = models.load.load(
        "tiny-qwen3", weights="random", dtype="float32", device=open_device("cpu"), seed=0
    )
    before = {name: p.clone() for name, p in model.net.named_parameters()}
    checks.refill(model.net, "zero", 0)
    checks.restore(model, "tiny-qwen3", 0)
    after = dict(model.net.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.card, "experts", 4), "mixture of experts routes by its values"),
        (lambda m: setattr(m, "weights", "gguf"), "gguf weights cannot be drawn again"),
        (lambda m: m.device.missing.update(energy="no counter"), "no counter"),
    ],
)
def test_weights_that_must_not_change_are_left_alone(model, tmp_path, change, reason):
    change(model)
    before = model.layer.weight.clone()
    (row,) = weights_sweep(model, tmp_path)
    assert reason in row.missing["energy_j"] and torch.equal(model.layer.weight, before)


def real(folder, device, name="small"):
    return checks.against_real(
        name,
        dtype="float32",
        device=device,
        **CELL,
        repeats=4,
        window_s=5.0,
        records_path=folder / "records.jsonl",
    )


def test_real_weights_stand_beside_random_ones_of_the_same_shape(monkeypatch, tmp_path):
    """Real ones draw 3 W of 300 more while they decode: 3 of 400 J."""
    device = BoardDevice(Board())

    def load(name, *, weights, **options):
        watts = 303.0 if weights == "checkpoint" else 300.0
        model = BoardModel(device, token=(0.05, watts))
        model.net, model.weights, model.net.parameters = model, weights, lambda: ()
        model.key = lambda **changes: BoardModel.key(model, **{"weights": weights} | changes)
        return model

    monkeypatch.setattr(models.load, "load", load)
    monkeypatch.setitem(
        STACKS, "hf-eager", opened("hf-eager", lambda net, **options: net.open_stack(net))
    )
    rows = real(tmp_path, device)
    assert [(r.kind, r.key["weights"]) for r in rows] == [
        ("energy-real", "checkpoint"),
        ("energy-real", "random"),
    ]
    ratio = quantities.real_effect(rows)
    assert ratio.n == 4
    assert ratio.value == pytest.approx(403 / 400, abs=1e-3)
    text = conclusions.checks(rows)
    assert "Energy of fake with real weights: 1.008 times that of random ones" in text
    assert "real against random" in [row[0] for row in tables.weights(rows).rows]


def test_a_real_model_that_is_not_at_hand_is_a_reason(monkeypatch, tmp_path):
    def refuse(name, **options):
        raise models.card.ModelError("no network")

    monkeypatch.setattr(models.load, "load", refuse)
    (row,) = real(tmp_path, BoardDevice(Board()))
    assert row.missing == {"energy_j": "small could not be loaded: no network"}
    assert real(tmp_path, BoardDevice(Board()), name="") == []


# --- Zeus


class Zeus:
    """Two plain readings of the counter, as ZeusMonitor takes them."""

    def __init__(self, device):
        self.device, self.open = device, {}

    def begin_window(self, key, sync_execution=True):
        assert not sync_execution
        self.open[key] = self.device.energy_j()

    def end_window(self, key, sync_execution=True):
        return SimpleNamespace(total_energy=self.device.energy_j() - self.open.pop(key))


def installed(monkeypatch, make):
    package, monitor = ModuleType("zeus"), ModuleType("zeus.monitor")
    monitor.ZeusMonitor = make
    monkeypatch.setitem(sys.modules, "zeus", package)
    monkeypatch.setitem(sys.modules, "zeus.monitor", monitor)


def peer(model, folder, **changes):
    arguments = CELL | {"peer_windows": 5, "window_s": 6.0} | changes
    return checks.compare(model, **arguments, records_path=folder / "records.jsonl")


def test_zeus_and_ours_measure_the_same_windows(model, tmp_path, monkeypatch):
    monitors = []

    def monitor(gpu_indices, cpu_indices):
        monitors.append((gpu_indices, cpu_indices, os.environ["CUDA_VISIBLE_DEVICES"]))
        return Zeus(model.device)

    installed(monkeypatch, monitor)
    monkeypatch.setattr(model.device, "board_state", lambda: {"nvml_index": 3})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-fake")
    (row,) = peer(model, tmp_path)
    assert monitors == [([0], [], "3")] and os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-fake"
    assert store.load(tmp_path / "records.jsonl") == [row]
    s = row.samples
    assert {len(values) for values in s.values()} == {5}
    assert all(seconds >= 6 for seconds in s["long_s"]) and max(s["short_s"]) < 2.5
    worst = {
        name: max(
            abs(z / o - 1) for z, o in zip(s[f"zeus_{name}_j"], s[f"ours_{name}_j"], strict=True)
        )
        for name in ("long", "short")
    }
    assert worst["long"] < 0.03 and worst["short"] < 0.1  # up to one tick of each window


def test_without_zeus_or_where_it_fails_the_reason_is_recorded(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zeus", None)
    (row,) = peer(model, tmp_path)
    assert row.missing["zeus_long_j"].startswith("zeus is not installed")

    def refuse(**options):
        raise ValueError("no such GPU")

    installed(monkeypatch, refuse)
    (row,) = peer(model, tmp_path)
    assert "the number of the GPU is not known" in row.missing["zeus_long_j"]
    monkeypatch.setattr(model.device, "board_state", lambda: {"nvml_index": 3})
    (row,) = peer(model, tmp_path)
    assert "zeus cannot measure here: no such GPU" in row.missing["zeus_long_j"]
    assert peer(model, tmp_path, peer_windows=0) == []
    model.device.missing["energy"] = "no counter"
    (row,) = peer(model, tmp_path)
    assert row.missing == {"zeus_long_j": "no counter"}
