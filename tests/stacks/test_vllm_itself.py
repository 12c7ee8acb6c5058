"""The stack on vLLM itself, where VLLM_PYTHON names an interpreter with it; one for CPUs will do.

Other tests stand in for vLLM. This one is for a change of its version, or of the files that run
inside it: VLLM_PYTHON=path make test ARGS=tests/stacks/test_vllm_itself.py
"""

from __future__ import annotations

import os

import pytest

from lib.hardware.apart import open_apart
from lib.measure import vllm, vllm_logits
from lib.models import origin
from lib.stacks.vllm_settings import require_installed

pytestmark = pytest.mark.skipif(
    "VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no interpreter with vLLM"
)
CORES = os.cpu_count() or 1


@pytest.fixture
def engine(request, tmp_path, monkeypatch):
    model, form, devices = request.param
    if devices > CORES:
        pytest.skip(f"{devices} workers need as many cores, there are {CORES}")
    require_installed()
    monkeypatch.setattr(vllm, "BATCHED_TOKENS", 256)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, range(devices))))
    config = origin.config_of(origin.find(model))
    config.head_dim = 64  # vLLM on a CPU has no attention sinks for smaller ones
    config.save_pretrained(tmp_path / model)
    with vllm.opened(
        str(tmp_path / model), weights="random", dtype=form, device=open_apart("cpu"), seed=3,
        contexts=[32], tokens=96, devices=devices, folder=tmp_path,
    ) as opened:  # fmt: skip
        yield opened


@pytest.mark.parametrize(
    "engine",
    [
        (model, form, devices)
        for model, form in (
            ("tiny-qwen3", "bfloat16"),
            ("tiny-gpt-oss", "bfloat16"),
            ("tiny-gpt-oss", "mxfp4"),
        )
        for devices in (1, 2)
    ],
    indirect=True,
    ids=lambda given: f"{given[0]} {given[1]} on {given[2]}",
)
def test_an_engine_computes_what_our_net_does(engine):
    """Alone and in a batch, whole and sharded; and a batch has the same steps at every call."""
    assert [row.error for row in vllm_logits.gates(engine, None)] == [None]
    ids = engine.prompt(64, seed=3, batch=16)  # 1,024 tokens, 256 a step
    calls = [engine.generate(ids, 8).scheduler for _ in range(4)]
    assert len({call["steps"] for call in calls}) == 1 and calls[0]["steps"] > 8
    assert {call["running"] for call in calls} == {16}
    assert vllm.measured(engine, ids, new_tokens=4, repeats=2, env_id=None).error is None
    batch = vllm_logits.sampled(engine, ids, 4)
    assert [row.error for row in vllm_logits.batch_gates(engine, [batch], None)] == [None]


@pytest.mark.parametrize("engine", [("tiny-gpt-oss", "mxfp4", 2)], indirect=True, ids=["sharded"])
def test_an_engine_with_the_first_layers_computes_what_our_net_with_the_same_does(engine):
    engine.first_layers, engine.known["layers"] = 2, 2
    ids = engine.prompt(64, seed=3, batch=2)
    batch = vllm_logits.sampled(engine, ids, 4)
    rows = [
        *vllm_logits.batch_gates(engine, [batch], None),
        *vllm_logits.late_gates(engine, [32], 3, None),
    ]
    assert [(row.error, row.key["batch"]) for row in rows] == [(None, 2), (None, 1)]
