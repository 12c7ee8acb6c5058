"""What the engine's process does by itself, without vLLM: records, tokens, bytes, forced logits."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch

from lib.stacks import vllm_engine, vllm_inspect
from lib.stacks.vllm_engine import Recorder, Streamed
from lib.stacks.vllm_inspect import Inspect


def step(running, waiting=0, share=0.1, hits=0, preempted=0):
    """What vLLM hands its loggers after a step."""
    return (
        SimpleNamespace(
            num_running_reqs=running,
            num_waiting_reqs=waiting,
            num_skipped_waiting_reqs=0,
            kv_cache_usage=share,
            prefix_cache_stats=SimpleNamespace(queries=10, hits=hits),
        ),
        SimpleNamespace(num_preempted_reqs=preempted),
    )


def recorded(*steps, most=64):
    recorder = Recorder(most)
    for stats in steps:
        recorder.record(*stats, mm_cache_stats=None)
    return recorder.values()


def test_the_recorder_keeps_the_peak_of_a_call():
    values = recorded(step(1, 7, 0.02), step(8, 0, 0.16), step(8, 0, 0.2, hits=3))
    assert values == {
        **{"steps": 3, "running": 8, "waiting": 7, "queued": 0, "preempted": 0},
        **{"cache_share": 0.2, "prefix_queries": 30, "prefix_hits": 3},
    }


@pytest.mark.parametrize(
    ("stats", "queued"),
    [
        (step(4, 28, 0.1), 0),  # waits for its turn in the prefill: a sequence takes 2.5 %
        (step(4, 28, 0.98), 1),  # each takes a quarter, and none is left
        (step(4, 28, 0.75), 1),  # one more takes 19 % of 25, too near to be sure: under 1.5 times
        (step(4, 28, 0.6), 0),
        (step(64, 1, 0.1), 1),  # every place is taken
        (step(0, 3, 0.0), 0),  # none has begun
    ],
)
def test_waiting_for_room_is_told_from_waiting_for_the_prefill(stats, queued):
    assert recorded(stats)["queued"] == queued


def test_a_preempted_sequence_is_counted():
    assert recorded(step(4), step(3, 1, preempted=1))["preempted"] == 1


def test_places_are_told_once_all_sequences_have_reached_them():
    told = []
    streamed = Streamed(["a", "b"], told.append)
    for name, tokens in (("a", [1]), ("b", [5, 6]), ("a", [2, 3]), ("b", [])):
        streamed.add(name, tokens)
        streamed.tell()
    assert told == [1, 2] and streamed.tokens == {"a": [1, 2, 3], "b": [5, 6]}


class Wrapped:
    """As some kernels keep weights: a storage with the tensor, and a layout, in an object."""

    def __init__(self, tensor):
        self.storage = SimpleNamespace(data=tensor, layout=None)
        self.itself = self


class Mxfp4MoEMethod:
    def __init__(self, scales):
        self.precision = SimpleNamespace(weight_scale=Wrapped(scales))


def mixture():
    model = torch.nn.Module()
    model.embed_tokens = torch.nn.Embedding(10, 4, dtype=torch.bfloat16)  # 80 bytes
    model.router = torch.nn.Linear(4, 2, bias=False)  # 32 bytes
    model.experts = torch.nn.Module()
    model.experts.bias = torch.nn.Parameter(torch.zeros(2, 3))  # 24 bytes
    model.experts.w13_weight = Wrapped(torch.zeros(100, dtype=torch.uint8))
    model.experts.quant_method = Mxfp4MoEMethod(torch.zeros(7, dtype=torch.uint8))
    model.rotary = torch.nn.Module()
    model.rotary.register_buffer("angles", torch.zeros(500))
    return model


def test_weights_are_counted_where_a_kernel_holds_them():
    assert vllm_inspect.bytes_by_part(mixture()) == {
        "embeddings": {"bfloat16": 80},
        "rest": {"float32": 32},
        "experts": {"float32": 24, "uint8": 107},
        "tables": {"float32": 2000},
    }


def test_a_storage_that_two_names_share_counts_once():
    model = torch.nn.Module()
    model.embed_tokens, model.lm_head = torch.nn.Linear(2, 3, bias=False), torch.nn.Module()
    model.lm_head.weight = torch.nn.Parameter(model.embed_tokens.weight.data)
    assert vllm_inspect.bytes_by_part(model) == {"embeddings": {"float32": 24}}
    halves = torch.zeros(8).split(4)
    assert vllm_inspect.storage_bytes(vllm_inspect.tensors_in({"kv": list(halves)})) == 32


def test_methods_and_kernels_are_named():
    model = mixture()
    model.experts.quant_method.mxfp4_backend = SimpleNamespace(value="TRITON")
    model.experts.quant_method.experts_cls = Wrapped
    model.router.quant_method = SimpleNamespace()
    model.router.attn_backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
    found = list(vllm_inspect.quant_methods(model, experts=True))
    assert found == ["Mxfp4MoEMethod Wrapped TRITON"]
    assert list(vllm_inspect.quant_methods(model, experts=False)) == ["SimpleNamespace"]
    assert list(vllm_inspect.attention_backends(model)) == ["FLASH_ATTN"]


class Model(torch.nn.Module):
    """Logits (sequences, 5) that always prefer token 0."""

    def compute_logits(self, hidden):
        return torch.tensor([[3.0, 1.0, 0.0, 2.0, 1.0]]).repeat(len(hidden), 1)


def worker(model):
    inspect = Inspect()
    inspect.model_runner = SimpleNamespace(get_model=lambda: model)
    return inspect


def test_a_continuation_is_forced_and_the_true_logits_are_kept(tmp_path):
    model = Model()
    inspect, path = worker(model), tmp_path / "logits.bin"
    inspect.force(1, [4, 2])
    hidden = torch.zeros(1, 1)
    chosen = [model.compute_logits(hidden).argmax().item() for _ in range(3)]
    assert chosen == [4, 2, 0]  # then the model's own choice
    assert model.compute_logits(torch.zeros(7, 1)).shape == (7, 5)  # not of this request
    assert inspect.forced_logits(str(path)) == [2, 1, 5]
    kept = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32).view(2, 5)
    assert torch.equal(kept, model.compute_logits(torch.zeros(2, 1)))
    assert "compute_logits" not in vars(model)


def test_a_step_that_gave_no_logits_leaves_none(tmp_path):
    inspect = worker(Model())
    inspect.force(1, [4])
    assert inspect.forced_logits(str(tmp_path / "none")) == []


def test_parameters_are_overwritten_in_place():
    model = torch.nn.Linear(2, 2)
    where = model.bias.data_ptr()
    before = worker(model).overwrite({"bias": [1.0, -1e4]})
    assert model.bias.tolist() == [1.0, -1e4] and model.bias.data_ptr() == where
    worker(model).overwrite(before)
    assert model.bias.tolist() == before["bias"]


def test_one_number_stands_for_a_parameter_of_equal_numbers():
    """Norms of a deep model are written and told back as one number each."""
    model = torch.nn.LayerNorm(4)
    before = worker(model).overwrite({"weight": [0.0], "bias": [1.0, 2.0, 3.0, 4.0]})
    assert before == {"weight": [1.0], "bias": [0.0]}
    assert model.weight.tolist() == [0.0] * 4 and model.bias.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert worker(model).overwrite(before)["bias"] == [1.0, 2.0, 3.0, 4.0]
    assert model.weight.tolist() == [1.0] * 4 and model.bias.tolist() == [0.0] * 4


def test_an_answer_is_one_line_whatever_its_length():
    """A pipe takes 64 KiB at once; nothing started here inherits it."""
    read, write = os.pipe()
    os.set_inheritable(write, True)
    answer = vllm_engine.answering(write)
    assert not os.get_inheritable(write)
    answer({"tokens": [1, 2]})
    assert json.loads(os.read(read, 100)) == {"tokens": [1, 2]}
    with pytest.raises(ValueError):  # not a number is no JSON
        answer({"x": float("nan")})
    os.close(read), os.close(write)


def test_an_error_in_a_request_is_an_answer_and_the_next_is_served(monkeypatch, capsys):
    told, lines = [], ['{"op": "count", "by": 0}', '{"op": "count", "by": 2}', '{"op": "stop"}']
    monkeypatch.setattr("sys.stdin", iter(lines))
    engine = SimpleNamespace(count=lambda by, answer: {"value": 6 / by})
    vllm_engine.serve(told.append, engine)
    assert told == [
        {"op": "count", "error": "ZeroDivisionError: division by zero"},
        {"op": "count", "value": 3.0},
    ]
    assert "Traceback" in capsys.readouterr().err


def test_what_several_workers_tell_is_one_model():
    """Bytes are added up, and a number that one of them lacks is none."""
    held = [
        {"parameter_bytes": {"rest": {"bfloat16": 6}}, "linear": {"L": 2}, "loaded": {"digest": d}}
        for d in ("a", "b")
    ]
    assert vllm_engine.described(held) == {
        "parameter_bytes": {"rest": {"bfloat16": 12}}, "linear": {"L": 2},
        "loaded": {"digest": "a"}, "draws": ["a", "b"],
    }  # fmt: skip
    assert vllm_engine.described(held[:1])["parameter_bytes"] == {"rest": {"bfloat16": 6}}
    parts = [{"weights_bytes": 2, "allocated_bytes": None}, {"weights_bytes": 3, "more": 1}]
    assert vllm_engine.summed(parts) == {"weights_bytes": 5, "allocated_bytes": None, "more": 1}


def test_one_gpu_of_several_writes_the_logits(tmp_path):
    """All have the same ones, and two that write a file at once leave half of it."""
    model = Model()
    inspect, path = worker(model), tmp_path / "logits.bin"
    inspect.rank = 1
    inspect.force(1, [4])
    for _ in range(2):
        model.compute_logits(torch.zeros(1, 1))
    assert inspect.forced_logits(str(path)) == [1, 1, 5] and not path.exists()


def test_what_json_cannot_hold_is_told_by_its_name():
    assert vllm_engine.plain(torch.bfloat16) == "bfloat16"
    assert vllm_engine.plain(SimpleNamespace(name="FULL")) == "FULL"
    assert vllm_engine.plain(None) is None and vllm_engine.plain(3) == 3
