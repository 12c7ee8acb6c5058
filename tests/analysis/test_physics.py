"""Numbers of one arm that contradict each other: planted pairs are found, honest ones are kept."""

from dataclasses import replace

import numpy as np
import pytest

from lib.analysis import bounds, estimators, latency, metrics, physics, rows, stacks
from lib.files import ROOT
from lib.records.record import Record, environment_record
from lib.report import sections
from tests.samples import serving
from tests.samples.records import key

CARD = environment_record({"gpu": "NVIDIA H100 80GB HBM3", "cache_bytes": 50_000_000})
PLAIN = environment_record({"gpu": "G", "copy_bytes_per_s": 100e9})
SPREAD = (0.98, 0.99, 1.0, 1.0, 1.01, 1.02)
EVEN = (1.0,) * 6


def calls(tokens, seconds, env=CARD, kind="latency", spread=SPREAD, size=10**9, **changes):
    name = "ttft_s" if tokens == 1 else "e2e_s"
    times = [seconds * f for f in spread]
    values = {"decode_bytes": size}
    return Record(kind, key("m", new_tokens=tokens, **changes), {name: times}, values,
                  env_id=env.env_id)  # fmt: skip


def energy(joules, seconds, idle_w=100.0, kind="energy"):
    samples = {"energy_j": [joules * f for f in SPREAD], "e2e_s": [seconds * f for f in SPREAD]}
    samples["net_energy_j"] = [joules - (idle_w or 0.0) * seconds] * 6
    return Record(kind, key("m"), samples, {"idle_w": idle_w}, env_id=CARD.env_id)


def marked(tokens, seconds, device_s):
    """A captured call whose steps are timed by the device too."""
    row = calls(tokens, seconds, stack="graph")
    return replace(row, samples=row.samples | {"decode_s": [device_s * f for f in SPREAD]})


def served(joules):
    """A window of ten seconds of a server, on a board that draws 100 W when idle."""
    return serving.row(
        [serving.fact(11.0, 12.0)], energy_j=joules, idle_w=100.0, env_id=CARD.env_id
    )


def in_visits(last, earlier=None):
    """An arm that was measured in another visit too, as it was unless that differs."""
    return replace(last, visit="2", others=(replace(earlier or last, visit="1"),))


def pairs(*arms, env=CARD):
    return physics.contradictions(arms, {env.env_id: env.values})


# Ten tokens of 0.1 s after a prefill of 1 s would be 1.9 s.
@pytest.mark.parametrize(
    "kind, arms",
    [
        # Ten tokens in 2 s and twenty in 7: 2 tok/s of decode under 5 of the whole call.
        ("decode and whole call", [calls(10, 2.0), calls(20, 7.0)]),
        ("decode and whole call", [calls(10, 2.0, kind="batch", batch=8),
                                   calls(20, 7.0, kind="batch", batch=8)]),
        ("decode and whole call", [calls(1, 0.01), calls(10, 2.0)]),
        ("decode and whole call", [calls(10, 2.0, spread=(1, 1, 1.1)),
                                   calls(20, 7.0, spread=(1, 1, 1.1))]),
        ("decode and whole call", [calls(10, 2.0, stack="graph"),
                                   calls(20, 7.0, stack="graph", spread=(1.0, 1.01))]),
        ("first token", [calls(1, 2.8), calls(16, 1.5)]),
        ("first token", [calls(1, 2.8, spread=(1, 1.01)), calls(16, 1.5, spread=(1,))]),
        ("bytes of a step", [calls(1, 0.1, spread=EVEN), calls(11, 0.1 + 10 / 4000, spread=EVEN)]),
        ("idle board", [energy(90.0, 1.0)]),
        ("idle board", [energy(90.0, 1.0, kind="energy-slope")]),
        ("idle board", [energy(90.0, 1.0, kind="energy-again")]),
        ("idle board", [energy(90.0, 1.0, kind="batch-energy")]),
        ("idle board", [served(joules=900.0)]),
        # 64 steps of 1 GB at 3.35 TB/s take 19 ms, whatever the prefill.
        ("bytes of a call", [calls(65, 0.018)]),
        ("bytes of a call", [calls(65, 0.018, stack="vllm", experts="Fused")]),
        ("bytes of a call", [marked(11, 1.0, 10 / 4000)]),
        ("device clock", [marked(11, 1.0, 2.0)]),
        ("first token", [in_visits(calls(1, 0.5), calls(1, 2.8)), in_visits(calls(16, 1.5))]),
    ],
)  # fmt: skip
def test_planted_pairs_are_found_and_their_rows_warn(kind, arms):
    assert kind in [pair.kind for pair in pairs(*arms)]
    read = rows.Rows([CARD, *arms])
    every = [one for r in read for one in (r, *r.others)]
    texts = [w["text"] for r in every for w in r.warnings if w["code"] == physics.CODE]
    lacking = (physics.DECODE, physics.MARKED, physics.NET)
    assert texts and all(text.split(": ")[0] in lacking for text in texts)
    assert tuple(rows.Rows(read.records)) == read.records  # a second reading adds nothing
    assert [r.samples for r in read][1:] == [arm.samples for arm in arms]


@pytest.mark.parametrize(
    "arms",
    [
        [calls(1, 1.0), calls(11, 2.0), calls(21, 3.0)],
        [calls(10, 2.0), calls(20, 4.0)],  # no prefill at all: 5 and 5 tok/s
        [calls(10, 2.0), calls(20, 4.1)],  # the wrong way round, and the intervals meet
        [calls(1, 1.0), calls(11, 1.01)],  # noise hides the slope; that is no contradiction
        [calls(1, 2.8, context=2048), calls(16, 1.5, context=64)],  # two arms
        [calls(1, 2.8), calls(16, 1.5, experts="loop")],
        [calls(1, 2.8), calls(16, 1.5, env=PLAIN)],  # two machines
        [calls(1, 2.8), replace(calls(16, 1.5), error="OutOfMemoryError: x")],
        [calls(1, 0.1, size=10**6), calls(11, 0.1 + 10 / 4000, size=10**6)],  # a cache holds it
        [energy(101.0, 1.0), energy(50.0, 1.0, idle_w=None)],
        [served(joules=1001.0), served(joules=None)],
        [marked(11, 1.0, 0.9)],  # the prefill takes the rest
        [calls(65, 0.02)],  # 64 steps of 1 GB, and a millisecond for the prefill
        [in_visits(calls(1, 1.0), calls(1, 1.2)), in_visits(calls(16, 1.5))],
        [calls(10, 2.0), Record("latency", key("m"), missing={"e2e_s": "x"}, env_id=CARD.env_id)],
    ],
)
def test_what_does_not_contradict_is_left_alone(arms):
    assert pairs(*arms) == []


def test_what_is_derived_is_missing_and_names_the_pair_and_what_was_timed_stays():
    arms = [CARD, calls(10, 2.0), calls(20, 7.0)]
    line = latency.table(arms).frame().iloc[0]
    assert line["output throughput (tok/s)"] == pytest.approx(5)
    assert line["decode throughput (tok/s)"] is None
    assert "decode throughput 2.000 tok/s [" in line["missing"]
    assert "lies below the output throughput [4.902, 5.102] tok/s" in line["missing"]
    assert physics.sentence(1) in latency.table(arms).notes
    for reading in (estimators.tpot_ms, estimators.decode_tok_per_s, estimators.decode_share):
        busy = Record("busy", key("m"), values={"decode_busy_s": 0.1})
        assert "contradiction" in reading([*arms[1:], busy]).reason, reading
    assert "contradiction" in stacks.conclusion(arms)


@pytest.mark.parametrize(
    ("size", "cache", "comes"),
    [
        (4 * 50_000_000, 50_000_000, True),  # four caches full
        (4 * 50_000_000 - 1, 50_000_000, False),
        (2**28, None, True),
        (2**28 - 1, None, False),
        (None, 50_000_000, False),
        (0, None, False),
    ],
)
def test_what_comes_from_memory_is_several_caches_full(size, cache, comes):
    assert physics.comes_from_memory(size, cache) is comes


@pytest.mark.parametrize(
    ("first", "second", "step_s"),
    [
        ((1, 1.0, 3, "hf-eager"), (11, 2.0, 3, "hf-eager"), 0.1),
        ((1, 1.0, 2, "hf-eager"), (11, 2.0, 3, "hf-eager"), None),  # three calls of each
        ((1, 1.0, 2, "graph"), (11, 2.0, 2, "graph"), 0.1),  # captured steps: two
        ((1, 1.0, 1, "graph"), (11, 2.0, 2, "graph"), None),
        ((1, 1.0, 2, "some engine"), (11, 2.0, 2, "some engine"), None),
        ((1, 1.0, 3, "hf-eager"), (11, 1.0, 3, "hf-eager"), None),  # a step takes no time
        ((1, 1.0, 3, "hf-eager"), (11, 0.9, 3, "hf-eager"), None),
        ((1, 1.0, 3, "hf-eager"), (11, 31.0, 3, "hf-eager"), 3.0),
    ],
)
def test_a_line_needs_calls_of_two_lengths_that_take_longer(first, second, step_s):
    arms = [calls(n, s, spread=(1.0,) * k, stack=stack) for n, s, k, stack in (first, second)]
    line, used = physics.line(arms)
    assert line.value == (None if step_s is None else pytest.approx(step_s))
    enough = [k >= (2 if stack == "graph" else 3) for _, _, k, stack in (first, second)]
    assert used == [arm for arm, counts in zip(arms, enough, strict=True) if counts]


@pytest.mark.parametrize(
    ("stack", "batch", "longest", "step_s", "lengths"),
    [
        ("vllm", 4, 3, 0.02, {61, 161}),  # 2.0 s over 100 steps: prefill in pieces is in both
        ("vllm", 4, 2, 0.015, {1, 61}),  # 0.9 s over 60 steps: the longest has too few calls
        ("vllm", 1, 3, 0.018125, {1, 61, 161}),  # the middle one of 0.9/60, 2.9/160 and 2.0/100
        ("graph", 4, 3, 0.018125, {1, 61, 161}),  # one prefill of all sequences
    ],
)
def test_a_call_of_one_token_is_no_point_where_a_batch_is_scheduled_in_pieces(
    stack, batch, longest, step_s, lengths
):
    arms = [
        calls(n, s, spread=(1.0,) * k, stack=stack, batch=batch)
        for n, s, k in ((1, 1.0, 3), (61, 1.9, 3), (161, 3.9, longest))
    ]
    line, used = physics.line(arms)
    assert line.value == pytest.approx(step_s)
    assert {arm.key["new_tokens"] for arm in used} == lengths


@pytest.mark.parametrize(
    ("ttft_s", "e2e_s", "apart"),
    [
        ((1.5,) * 6, (1.5,) * 6, False),  # as long as each other
        ((1.51,) * 6, (1.5,) * 6, True),
        ([1.01 * f for f in SPREAD], SPREAD, False),  # 0.99 to 1.03, and 0.98 to 1.02
    ],
)
def test_a_first_token_takes_no_longer_than_the_call(ttft_s, e2e_s, apart):
    arms = [calls(1, 1.0, spread=tuple(ttft_s)), calls(16, 1.0, spread=tuple(e2e_s))]
    assert ("first token" in [pair.kind for pair in pairs(*arms)]) is apart


@pytest.mark.parametrize(
    ("bytes_per_s", "size", "apart"),
    [
        (2e9, 10**9, False),  # 2 steps a second of 1 GB: just what 2 GB/s deliver
        (1.9e9, 10**9, True),
        (1.9e9, None, False),
        (1.0, None, False),
        (None, 10**9, False),
    ],
)
def test_a_step_takes_as_long_as_its_bytes(bytes_per_s, size, apart):
    arms = [calls(1, 1.0, spread=EVEN, size=size), calls(5, 3.0, spread=EVEN, size=size)]
    found = physics.of_calls(arms, bytes_per_s)
    assert [pair.kind for pair in found] == ["bytes of a step"] * apart
    if apart:
        assert found[0].text.endswith("above the 1.900 steps/s at which memory delivers its bytes")


def test_decoding_as_fast_as_the_whole_call_is_possible():
    """4 and 8 tokens in 2 and 4 s: 2 tok/s of both, and no prefill."""
    assert physics.of_calls([calls(4, 2.0, spread=EVEN), calls(8, 4.0, spread=EVEN)]) == []


@pytest.mark.parametrize(
    ("joules", "seconds", "below"),
    [
        ((100.0,) * 6, (1.0,) * 6, False),  # what the idle board draws
        ((99.0,) * 6, (1.0,) * 6, True),
        ([99 * f for f in SPREAD], SPREAD, False),  # 97 to 101 J, and 98 to 102 J
        ((), (1.0,) * 6, False),
        ((1.0,) * 6, (), False),
    ],
)
def test_a_call_uses_no_less_than_the_idle_board(joules, seconds, below):
    row = Record(
        "energy", key("m"), {"energy_j": [*joules], "e2e_s": [*seconds]}, {"idle_w": 100.0}
    )
    assert [pair.kind for pair in physics.of_energy(row)] == ["idle board"] * below


def at_rate(per_s, **changes):
    return [calls(n, 0.1 + (n - 1) / per_s, spread=EVEN, **changes) for n in (1, 11)]


@pytest.mark.parametrize(
    ("values", "arms", "apart"),
    [
        # No datasheet: the best stream of 3 TB/s, and a tenth, for 1 GB.
        ({"gpu": "G"}, at_rate(3200), False),
        ({"gpu": "G"}, at_rate(3400), True),
        # An H100: 3.35 TB/s, and 50 MB of cache where the machine tells none.
        ({"gpu": "NVIDIA H100 80GB HBM3"}, at_rate(20_000, size=210_000_000), True),
        ({"gpu": "NVIDIA H100 80GB HBM3"}, at_rate(20_000, size=190_000_000), False),
        ({"gpu": "NVIDIA H100 80GB HBM3", "cache_bytes": 10**7}, at_rate(50_000, size=10**8), True),
        # One sequence, though no batch is told, reads no less than it must.
        ({"gpu": "G"}, at_rate(3400, batch=None, experts="grouped_mm"), True),
        ({"gpu": "G"}, at_rate(3400, batch=2, experts="grouped_mm"), False),
        ({"gpu": "G"}, at_rate(3400, batch=2, experts=None), True),
    ],
)
def test_a_step_is_held_against_the_memory_of_its_card(values, arms, apart):
    env = environment_record(values)
    stream = Record("ceilings", values={"read_bytes_per_s": 3e12}, env_id=env.env_id)
    rows = [replace(arm, env_id=env.env_id) for arm in (*arms, stream)]
    assert [pair.kind for pair in pairs(*rows, env=env)] == ["bytes of a step"] * apart


def test_the_table_has_a_line_a_pair_in_words():
    table = physics.table([energy(90.0, 1.0)], {CARD.env_id: CARD.values})
    assert table.rows[0][:4] == (
        "m",
        "stack hf-eager, context 2048, batch 1",
        "idle board",
        physics.NET,
    )
    assert not any(column.numeric for column in table.columns)


def test_the_bytes_of_a_mixture_at_several_users_are_expected_ones_and_no_least():
    def fast(**changes):
        return [calls(n, 0.1 + n / 4000, kind="batch", spread=EVEN, **changes) for n in (1, 11)]

    assert not pairs(*fast(batch=8, experts="grouped_mm"))
    for arms in (fast(batch=8), fast(batch=1, experts="grouped_mm")):
        assert "bytes of a step" in [pair.kind for pair in pairs(*arms)]


def test_a_step_faster_than_its_bytes_is_a_dash_and_still_a_violation():
    """4,000 steps of 1 GB a second, where the card delivers 3,350 GB/s."""
    arms = [CARD, calls(1, 0.1, spread=EVEN), calls(11, 0.1 + 10 / 4000, spread=EVEN)]
    line = latency.table(arms).frame().iloc[0]
    assert "at which memory delivers its bytes" in line["missing"]
    assert bounds.utilisation(arms).frame().iloc[0]["remark"] == bounds.IMPOSSIBLE
    (sentence,) = bounds.violations(arms)
    assert "4000.0 steps/s beat the bound of 3350.0 steps/s" in sentence
    slow = [replace(r, env_id=PLAIN.env_id) for r in arms[1:]]
    assert pairs(*slow, env=PLAIN) == []  # a copy is no bound; the best read stream is
    stream = Record("ceilings", values={"read_bytes_per_s": 3e12}, env_id=PLAIN.env_id)
    assert "bytes of a step" in [p.kind for p in pairs(*slow, stream, env=PLAIN)]


def test_energy_below_the_idle_board_loses_its_net_value_alone():
    row = energy(90.0, 1.0)
    net = estimators.net_j_per_1k([row])
    assert net.value is None and "less than the [98.00, 102.0] J that the idle board" in net.reason
    assert metrics.METRICS["j_per_1k"].of([row]).value == pytest.approx(90e3 / 64)


def test_steps_by_the_device_clock_that_cannot_be_are_a_dash():
    for row in (marked(11, 1.0, 2.0), marked(11, 1.0, 10 / 4000)):
        (read,) = [r for r in rows.Rows([CARD, row]) if r.kind == "latency"]
        assert metrics.METRICS["decode_marked"].of([read]).reason.startswith("contradiction: ")
        assert metrics.METRICS["output"].of([read]).value == pytest.approx(11)
    (read,) = [r for r in rows.Rows([CARD, marked(11, 1.0, 0.5)]) if r.kind == "latency"]
    assert metrics.METRICS["decode_marked"].of([read]).value == pytest.approx(20)


def test_a_served_window_below_the_idle_board_has_no_share_of_it():
    assert metrics.METRICS["served_idle_share"].of([served(2000.0)]).value == pytest.approx(50)
    share = metrics.METRICS["served_idle_share"].of([served(900.0)])
    assert share.value is None and share.reason.startswith("contradiction: a window uses")


def test_the_report_counts_the_pairs():
    arms = [CARD, calls(1, 2.8), calls(16, 1.5)]
    (table,) = [t for t in sections.generic_tables(arms) if t.name == "contradictions"]
    assert len(table.rows) == 1 and "1 pair(s) of numbers" in table.notes[0]
    assert (
        "calls of one token take [2.744, 2.856] s, longer than the [1.470, 1.530] s"
        in (table.rows[0][-1])
    )
    honest = [CARD, calls(1, 1.0), calls(11, 2.0)]
    assert "contradictions" not in [t.name for t in sections.generic_tables(honest)]


def test_honest_sets_lose_at_most_one_cell_of_a_hundred():
    """Calls whose host changes by 5 % from call to call; one call in twelve stalls for half."""
    rng, lost, cells = np.random.default_rng(11), 0, 0
    for prefill_s, step_s in ((0.03, 0.03), (0.2, 0.03), (0.05, 0.05), (1.0, 0.01)):
        for _ in range(150):
            arm = []
            for tokens, n in ((1, 6), (64, 10)):
                noise = 1 + 0.05 * rng.normal(size=n) + 0.5 * (rng.random(n) < 1 / 12)
                seconds = (prefill_s + (tokens - 1) * step_s) * noise
                arm.append(calls(tokens, 1.0, spread=tuple(seconds), size=10**7))
            cells += 1
            lost += bool(pairs(*arm))
    print(f"{lost} of {cells} honest cells lost")
    assert lost <= cells / 100


def test_the_released_sets_have_no_pair():
    for name in ("h100-sxm", "arxiv-2605.30571"):
        released = rows.load(ROOT / "outputs" / "released" / name)
        assert physics.contradictions(released, released.environments) == []
