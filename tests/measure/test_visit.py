"""A visit: mirrored order, as many samples as said, warm lengths, and rows that outlive a stop."""

import json
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest

import lib.hardware
from lib.__main__ import main
from lib.files import ROOT, ParamsError
from lib.measure import visit
from lib.models import card as models_card
from lib.models import experts as models_experts
from lib.models import load as models_load
from lib.records import record, store
from lib.records.record import Record
from lib.report import leaks
from lib.run import plan, scrub
from lib.stacks import logits_check
from lib.stacks.registry import STACKS
from tests.fakes.device import FakeDevice, FakeModel, opened

RELEASED = ROOT / "outputs" / "released"
UUID = "GPU-0123abcd-1111-2222-3333-444455556666"


class Machine(FakeDevice):
    """A fake GPU whose launches take 5 us."""

    def card(self):
        return {"launch_s": 5e-6}

    def environment(self):
        return {**super().environment(), "gpu_uuid": UUID, "cpu": "A Processor", "cpu_count": 16}


class Named(FakeModel):
    """A dense model of a given name; its control marks its steps by the device's clock."""

    def __init__(self, name, device, **times):
        super().__init__(device, **times)
        self.name = name

    def key(self, **changes):
        return {**super().key(**changes), "model": self.name}


@pytest.fixture
def machine(monkeypatch):
    """Models that take 0.1 s and 10 ms a token; `built` lists them as they were built."""
    device, built = Machine(), []
    times = {"prefill_s": 0.1, "token_s": 0.01, "cold_s": 0.005}

    def load(name, **arguments):
        if name == "too-large":
            raise models_card.ModelError("too-large needs 99.0 GB")
        built.append(Named(name, device, **times))
        return built[-1]

    def row(model, *, stack, context, seed, env_id):
        return Record("gate", model.key(stack=stack, context=context), env_id=env_id)

    for stack in ("hf-eager", "graph"):
        monkeypatch.setitem(
            STACKS, stack, opened(stack, lambda net, **options: net.open_stack(net))
        )
    monkeypatch.setattr(models_load, "load", load)
    monkeypatch.setattr(logits_check, "row", row)
    monkeypatch.setattr(visit, "host_score_per_s", lambda: 25.0)
    return SimpleNamespace(device=device, built=built, times=times)


def measured(machine, out, **changes):
    arguments = {
        "names": ["A", "B", "C"],
        "contexts": [16],
        "new_tokens": 64,
        "code": {"lib_sha": plan.lib_sha()},
        "clean": lambda text: scrub.text(text, scrub.names(out)),
    }
    folder = visit.visit(out, device=machine.device, **{**arguments, **changes})
    return store.load(folder / visit.ROWS), summary_of(folder)


def summary_of(folder):
    return json.loads((folder / visit.SUMMARY).read_text())


def test_models_come_forward_and_back_and_are_built_anew(machine, tmp_path):
    rows, summary = measured(machine, tmp_path)
    assert [m.name for m in machine.built] == list("ABCCBA")
    assert len({id(m) for m in machine.built}) == 6
    places = [(r.values["position"], r.key["model"], r.values["direction"]) for r in rows[1:]]
    assert list(dict.fromkeys(places)) == [
        (1, "A", "forward"),
        (2, "B", "forward"),
        (3, "C", "forward"),
        (4, "C", "back"),
        (5, "B", "back"),
        (6, "A", "back"),
    ]
    assert [b["position"] for b in summary["blocks"]] == [1, 2, 3, 4, 5, 6]
    phases = ("start_s", "loaded_s", "gated_s", "warmed_s", "end_s")
    assert [s for b in summary["blocks"] for s in map(b.get, phases)] == sorted(
        b[name] for b in summary["blocks"] for name in phases
    )


def test_arms_take_turns_after_one_call_of_each_length(machine, tmp_path):
    """TTFT, headline, and the control at a quarter of the headline and at all of it."""
    rows, _ = measured(machine, tmp_path, names=["A"])
    turn = [1, 64, 16, 64]
    assert [m.calls for m in machine.built] == [turn * 4] * 2
    latency = record.select(rows, "latency")
    arms = [(r.key["stack"], r.key["new_tokens"]) for r in latency]
    assert arms == [("hf-eager", 1), ("hf-eager", 64), ("graph", 16), ("graph", 64)] * 2
    assert {r.key["context"] for r in latency} == {16}


def test_three_samples_an_arm_and_none_is_the_first_of_its_length(machine, tmp_path):
    """0.1 s and 10 ms a token; a token of a length not called before takes 5 ms more."""
    rows, _ = measured(machine, tmp_path, names=["A"])
    first = record.select(rows, "latency")[:4]
    assert first[0].samples == {
        "ttft_s": pytest.approx([0.11] * 3),
        "warmup_s": pytest.approx([0.115]),
    }
    assert first[1].samples["e2e_s"] == pytest.approx([0.74] * 3)
    assert first[1].samples["warmup_s"] == pytest.approx([0.74 + 63 * 0.005])
    assert first[2].samples["e2e_s"] == pytest.approx([0.26] * 3)
    assert [r.warnings for r in first] == [()] * 4
    starts = [(number, arm) for arm, r in enumerate(first) for number in r.values["call_start_s"]]
    assert [arm for _, arm in sorted(starts)] == [0, 1, 2, 3] * 3  # rounds, not one arm at a time


def test_every_row_says_its_visit_and_has_an_ordinary_key(machine, tmp_path):
    rows, summary = measured(machine, tmp_path)
    assert {r.values["visit"] for r in rows} == {summary["id"]}
    assert summary["id"] == f"{UUID}, A Processor x 16, {summary['start']}"
    assert summary["gpu_uuid"] == UUID and summary["host"] == "A Processor x 16"
    assert {r.env_id for r in rows} == {rows[0].env_id} and rows[0].kind == "environment"
    kinds = Counter(r.kind for r in rows)
    assert kinds == {"environment": 1, "card": 3, "gate": 3, "latency": 24}
    row = record.select(rows, "latency")[0]
    assert row.values["launch_s"] == 5e-6 and row.values["host_score_per_s"] == 25.0
    assert set(row.key) <= set(record.KEY_FIELDS)
    assert row.missing["board"] == "no counter on the fake"


def test_medians_are_told_for_each_arm_forward_and_back(machine, tmp_path):
    _, summary = measured(machine, tmp_path, names=["A", "B"])
    assert len(summary["medians"]) == 8
    entry = next(m for m in summary["medians"] if m["model"] == "B" and m["sample"] == "ttft_s")
    assert entry == {
        "model": "B",
        "stack": "hf-eager",
        "experts": "none",
        "context": 16,
        "new_tokens": 1,
        "sample": "ttft_s",
        "forward": pytest.approx(0.11),
        "back": pytest.approx(0.11),
    }
    assert summary["status"] == "ok" and summary["within_budget"] is True
    assert summary["protocol"]["rounds"] == 3 and len(summary["lib_sha"]) == 64


def test_a_visit_longer_than_its_budget_says_so(machine, tmp_path):
    machine.times |= {"prefill_s": 7.0}  # 32 calls, of 145 tokens in each of the eight rounds
    _, summary = measured(machine, tmp_path, names=["A"])
    assert summary["seconds"] == pytest.approx(32 * 7 + 8 * 145 * 0.01 + 2 * 64 * 0.005)
    assert summary["within_budget"] is True
    machine.times |= {"prefill_s": 8.0}
    _, summary = measured(machine, tmp_path, names=["A"])
    assert summary["seconds"] > visit.BUDGET_S == 240.0
    assert (summary["status"], summary["within_budget"]) == ("ok", False)


def test_no_round_begins_after_the_last_minute_and_its_rows_are_kept(machine, tmp_path):
    """Rounds of 120 s and 1.45 s of tokens: the fourth begins before 420 s, a fifth would not."""
    machine.times |= {"prefill_s": 30.0}
    rows, summary = measured(machine, tmp_path)
    assert summary["status"] == "timeout" and summary["within_budget"] is False
    assert summary["error"].endswith("no round begins after 420 s")
    latency = record.select(rows, "latency")
    counts = [len(r.samples.get("ttft_s") or r.samples["e2e_s"]) for r in latency]
    assert counts == [3] * 4 and len(machine.built) == 1  # after 486 s no second block begins


def interrupt_at(machine, monkeypatch, call):
    """Stop the visit inside the given call, counted from 1 over all models."""
    seen = []
    timed = visit.latency.timed

    def stop(*arguments):
        seen.append(1)
        if len(seen) == call:
            raise KeyboardInterrupt
        return timed(*arguments)

    monkeypatch.setattr(visit.latency, "timed", stop)


def test_a_killed_visit_keeps_what_it_measured(machine, tmp_path, monkeypatch):
    """In the second block's second timed round, after its first two calls: 16 + 8 + 2 are done."""
    interrupt_at(machine, monkeypatch, 27)
    with pytest.raises(KeyboardInterrupt):
        measured(machine, tmp_path)
    (folder,) = tmp_path.iterdir()
    latency = record.select(store.load(folder / visit.ROWS), "latency")
    counts = [len(r.samples.get("ttft_s") or r.samples["e2e_s"]) for r in latency]
    assert counts == [3, 3, 3, 3, 2, 2, 1, 1]
    assert [[w["code"] for w in r.warnings] for r in latency] == [[]] * 4 + [["cut_off"]] * 4
    assert "after 2 of 3 timed calls" in latency[4].warnings[0]["text"]
    summary = summary_of(folder)
    assert summary["status"] == "interrupted" and len(summary["blocks"]) == 1
    assert summary["medians"][0]["forward"] == pytest.approx(0.11)
    assert summary["medians"][0]["back"] is None


def test_summary_is_there_while_it_runs(machine, tmp_path, monkeypatch):
    """A process that is killed outright leaves the blocks before: its summary says running."""
    found = []
    write = visit.files.write_json
    monkeypatch.setattr(
        visit.files,
        "write_json",
        lambda path, data: (write(path, data), found.append((data["status"], len(data["blocks"])))),
    )
    measured(machine, tmp_path, names=["A"])
    assert found == [("running", 0), ("running", 1), ("running", 2), ("ok", 2)]


def test_another_call_is_another_visit_and_touches_no_row_of_the_first(
    machine, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupt_at(machine, patch, 20)
        with pytest.raises(KeyboardInterrupt):
            measured(machine, tmp_path, names=["A"])
    (first,) = tmp_path.iterdir()
    before = (first / visit.ROWS).read_bytes()
    _, summary = measured(machine, tmp_path, names=["A"])
    day = summary["start"][:10]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{day}-0123abcd", f"{day}-0123abcd-2"]
    assert (first / visit.ROWS).read_bytes() == before


def test_an_arm_that_fails_is_a_row_and_the_others_go_on(machine, tmp_path, monkeypatch):
    def refuse(model, *, stack, **place):
        raise logits_check.GateError(f"stack {stack!r} computes something else")

    monkeypatch.setattr(logits_check, "row", refuse)
    rows, summary = measured(machine, tmp_path, names=["A", "too-large"])
    assert summary["status"] == "ok"
    by_stack = {(r.key.get("stack"), r.error, bool(r.samples)) for r in rows if r.kind != "card"}
    assert by_stack == {
        (None, None, False),  # the environment
        ("hf-eager", None, True),
        ("graph", "GateError: stack 'graph' computes something else", False),
        (None, "ModelError: too-large needs 99.0 GB", False),
    }
    assert [b.get("error") for b in summary["blocks"]][1:3] == [
        "ModelError: too-large needs 99.0 GB"
    ] * 2


def test_an_arm_that_compiles_inside_a_timed_call_has_no_times(machine, tmp_path, monkeypatch):
    timed, calls = visit.latency.timed, []

    def compiling(*arguments):
        calls.append(1)  # the seventh is the control's first timed call: 4 warm up, 2 come before
        return timed(*arguments)._replace(prepare_s=0.5 if len(calls) == 7 else 0.0)

    monkeypatch.setattr(visit.latency, "timed", compiling)
    rows, _ = measured(machine, tmp_path, names=["A"])
    found = [r.error for r in record.select(rows, "latency")[:4]]
    text = "the stack 'graph' captured or compiled inside a timed call"
    assert found == [None, None, text, None] and machine.built[0].calls.count(16) == 2


def test_errors_name_no_folder_of_the_machine(machine, tmp_path, monkeypatch):
    def fail(name, **arguments):
        raise OSError(f"{Path.home()}/weights is not there")

    monkeypatch.setattr(models_load, "load", fail)
    rows, _ = measured(machine, tmp_path, names=["A"])
    assert {r.error for r in rows[1:]} == {"OSError: ~/weights is not there"}
    assert leaks.find(tmp_path, leaks.secrets(leaks.here())) == []


def test_a_mixture_is_timed_with_every_expert_computed_too(tmp_path, monkeypatch):
    """Miniatures on a CPU, by the command line."""
    timed, in_use = visit.latency.timed, []

    def noted(generate, ids, new_tokens, device):
        in_use.append((models_experts.in_use(generate.net), new_tokens))
        return timed(generate, ids, new_tokens, device)

    monkeypatch.setattr(visit.latency, "timed", noted)
    names = ["tiny-gpt-oss", "tiny-qwen3"]
    told = ["--device", "cpu", "--dtype", "float32", "--contexts", "24", "--new-tokens", "8"]
    assert main(["visit", "--out", str(tmp_path), "--models", *names, *told]) == 0
    (folder,) = tmp_path.iterdir()
    rows = store.load(folder / visit.ROWS)
    found = defaultdict(list)
    for r in record.select(rows, "latency"):
        assert r.error is None and len(r.samples.get("ttft_s") or r.samples["e2e_s"]) == 3
        assert len(r.samples["warmup_s"]) == 1
        assert ("decode_s" in r.samples) == (r.key["stack"] == "graph")
        block = (r.values["position"], r.key["model"], r.values["direction"])
        found[block].append((r.key["stack"], r.key["experts"], r.key["new_tokens"]))
    eager = [("hf-eager", e, n) for e in ("grouped_mm", "all_experts") for n in (1, 8)]
    mixture = [*eager, ("graph", "grouped_mm", 2), ("graph", "grouped_mm", 8)]
    dense = [("hf-eager", "none", n) for n in (1, 8)] + [("graph", "none", n) for n in (2, 8)]
    assert found == {
        (1, names[0], "forward"): mixture,
        (2, names[1], "forward"): dense,
        (3, names[1], "back"): dense,
        (4, names[0], "back"): mixture,
    }
    assert [r.key["model"] for r in record.select(rows, "gate")] == names
    turn = [(e, n) for e in ("grouped_mm", "all_experts") for n in (1, 8)]
    turn += [("grouped_mm", 2), ("grouped_mm", 8)]
    assert in_use[:24] == turn * 4 == in_use[-24:]
    summary = summary_of(folder)
    assert summary["gpu_uuid"] is None and folder.name.endswith("-cpu")


def test_the_board_is_read_before_and_after_each_timed_call(machine, tmp_path, monkeypatch):
    """One degree a reading: 4 arms x 2 readings warm up, then a round lies between two calls."""
    degrees = iter(range(1000))
    sampler = SimpleNamespace(state=lambda handle: {f"{handle}_c": next(degrees)})
    monkeypatch.setattr(lib.hardware, "power_sampler", sampler, raising=False)
    monkeypatch.setitem(sys.modules, "lib.hardware.power_sampler", sampler)
    monkeypatch.setattr(visit.hardware_board, "open_board", lambda uuid: (None, f"of_{uuid}"))
    machine.device.missing, machine.device.uuid = {}, "board"
    rows, _ = measured(machine, tmp_path, names=["A"])
    first, second = record.select(rows, "latency")[:2]
    assert first.values["board"] == {"of_board_c": [[8, 9], [16, 17], [24, 25]]}
    assert second.values["board"] == {"of_board_c": [[10, 11], [18, 19], [26, 27]]}
    assert "board" not in first.missing


def test_readings_of_the_board_stand_before_and_after_each_call():
    pairs = [({"sm_hz": 1.98e9, "memory_c": 40.0}, {"sm_hz": 1.7e9}), ({"sm_hz": 1.7e9}, {})]
    assert visit.columns(pairs) == {
        "sm_hz": [[1.98e9, 1.7e9], [1.7e9, None]],
        "memory_c": [[40.0, None], [None, None]],
    }


def test_too_few_new_tokens_give_no_slope():
    card = SimpleNamespace(experts=None)
    with pytest.raises(ValueError, match="new_tokens 7 gives no slope; use at least 8"):
        visit.arms_of(card, [16], 7)


def test_the_plan_fits_the_budget_at_the_released_times():
    """Calls of a visit times what one took on the H100s of the released set."""
    seconds = {}
    for path in sorted(RELEASED.glob("h100-sxm/*/random-hf-eager/*/records.jsonl")):
        if path.parent.name in ("latency", "stacks"):
            for row in record.select(store.load(path), "latency", context=2048, batch=1):
                times = row.samples.get("ttft_s") or row.samples.get("e2e_s")
                place = (row.key["model"], row.key["stack"], row.key["experts"])
                if times:
                    seconds[*place, row.key["new_tokens"]] = statistics.median(times)
    planned = 0.0
    for name in visit.MODELS:
        mixture = name == "gpt-oss-20b"
        card = SimpleNamespace(experts=32 if mixture else None)
        for arm in visit.arms_of(card, visit.CONTEXTS, visit.NEW_TOKENS):
            experts = arm.experts or ("grouped_mm" if mixture else "none")
            tokens = 64 if arm.new_tokens == 16 else arm.new_tokens  # not released: at most this
            planned += seconds[name, arm.stack, experts, tokens] * (1 + visit.ROUNDS) * 2
    build_s, gate_s = 6 * 3.0, 3 * 6.0
    assert 120 < planned + build_s + gate_s < visit.BUDGET_S < visit.STOP_S


@pytest.mark.parametrize(
    ("status", "errors", "outcome", "code"),
    [
        ("ok", [None, None], (True, []), 0),
        ("ok", [None, "E: no"], (True, ["B back: E: no"]), 1),
        ("timeout", ["E: no"], (False, []), 2),
    ],
)
def test_the_outcome_of_a_visit_is_its_exit_code(
    tmp_path, monkeypatch, capsys, status, errors, outcome, code
):
    places = zip("AB", ("forward", "back"), errors, strict=False)
    blocks = [{"model": m, "direction": d, **({"error": e} if e else {})} for m, d, e in places]
    summary = json.dumps({"status": status, "blocks": blocks})
    (tmp_path / visit.SUMMARY).write_text(summary)
    monkeypatch.setattr(visit, "visit", lambda out, **options: tmp_path)
    assert visit.outcome(tmp_path) == outcome
    assert main(["visit", "--out", str(tmp_path), "--device", "cpu"]) == code
    assert capsys.readouterr().err == "".join(f"error: {line}\n" for line in outcome[1])


def test_a_visit_begins_only_with_models_a_device_and_a_folder(tmp_path, monkeypatch):
    assert visit.ready(tmp_path / "v", ["tiny-qwen3"], "cpu").environment()["device"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "file").write_text("")
    for out, names, device, says in (
        ("v", [str(tmp_path / "nowhere")], "cpu", "nowhere"),
        ("v", [], "cuda", '"cuda" was asked for'),
        ("file/v", [], "cpu", "file"),
    ):
        with pytest.raises(ParamsError, match=says):
            visit.ready(tmp_path / out, names, device)
