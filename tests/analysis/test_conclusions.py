"""Conclusions, sentence by sentence: what the interval allows, and not more."""

from dataclasses import replace

import pytest

from lib import stats
from lib.analysis import ablations, across_models, efficiency, latency
from lib.analysis.energy import conclusions
from lib.analysis.memory import ledger
from lib.analysis.rows import Rows
from lib.records.record import Record, environment_record, warning
from lib.show import wording
from lib.stats import Estimate
from tests.samples.records import key, spread

ENV = environment_record({"gpu": "G"})
OTHER = environment_record({"gpu": "H"})
RANDOM = (
    "- Random weights: valid for memory and dense latency; prefill of a mixture of experts "
    "depends on its router."
)


def row(kind, samples=None, values=None, model="m", env=ENV, error=None, missing=None, **changes):
    changes = {"weights": "checkpoint"} | changes
    return Record(
        kind,
        key(model, **changes),
        samples or {},
        values or {},
        missing or {},
        error,
        env_id=env.env_id,
    )


def lines(text):
    return text.split("\n") if text else []


# --- one number, one ratio


def test_a_number_has_its_interval_and_its_count():
    assert wording.number(Estimate(2.0, 1.5, 2.5, 7), "ms") == "2.000 ms [1.500, 2.500], n = 7"
    assert wording.number(Estimate(2.0, n=3), "ms") == "2.000 ms, n = 3"
    assert wording.number(stats.missing("no counter"), "J") == "not measured (no counter)"
    assert wording.number(stats.missing("not measured"), "J") == "not measured"


@pytest.mark.parametrize(
    "estimate, sentence",
    [
        (Estimate(2.0, 1.5, 2.5, 6), "Speed of a: 2.000 times that of b [1.500, 2.500], higher."),
        (Estimate(0.5, 0.4, 0.6, 6), "Speed of a: 0.5 times that of b [0.4, 0.6], lower."),
        (
            Estimate(1.1, 0.9, 1.3, 6),
            "Speed of a: no difference resolved from b (1.100 times [0.9, 1.300]).",
        ),
        (
            Estimate(1.0, 1.0, 1.2, 6),  # an end that touches one does not exclude it
            "Speed of a: no difference resolved from b (1.000 times [1.000, 1.200]).",
        ),
        (
            Estimate(2.0, n=3, reason="n = 3: an interval needs n >= 6"),
            "Speed of a: 2.000 times that of b, without an interval (n = 3: an interval needs "
            "n >= 6).",
        ),
        (
            stats.missing("no samples on one side of the ratio"),
            "Speed of a: not compared with b (no samples on one side of the ratio).",
        ),
    ],
)
def test_the_interval_chooses_the_sentence(estimate, sentence):
    assert wording.compared("Speed of a", {"b": estimate}) == sentence


# --- latency


def latency_rows(long_factor=2.0, n=11):
    """TTFT 0.15 s at 100 tokens; calls of 10 and 20 tokens, 0.05 s for each token."""
    rows = []
    for context, factor in ((100, 1.0), (200, long_factor)):
        rows.append(
            row("latency", {"ttft_s": [0.1 * factor + 0.05] * n}, context=context, new_tokens=1)
        )
        rows += [
            row("latency", {"e2e_s": [0.1 * factor + 0.05 * g] * n}, context=context, new_tokens=g)
            for g in (10, 20)
        ]
    return rows


def test_latency_tells_first_token_output_decode_and_the_change_with_context():
    # 0.2 s + 10 x 0.05 s = 0.7 s, 14.29 tok/s; at 100 tokens 0.6 s, so the ratio is 6/7
    assert lines(latency.conclusion(latency_rows())) == [
        "- m at 200 tokens of context and 10 new tokens: TTFT 250.0 ms [250.0, 250.0], n = 11; "
        "output throughput 14.29 tok/s [14.29, 14.29], n = 11; decode alone 20.00 tok/s "
        "[20.00, 20.00], n = 33.",
        "- Output throughput of m at 200: 0.857 times that of 100 tokens [0.857, 0.857], lower.",
    ]


def test_latency_without_a_difference_or_an_interval():
    assert "of m at 200: no difference resolved from 100 tokens" in latency.conclusion(
        latency_rows(1)
    )
    few = lines(latency.conclusion(latency_rows(n=3)))
    assert "TTFT 250.0 ms, n = 3;" in few[0]
    assert few[1].endswith("without an interval (n = 3: an interval needs n >= 6).")


def test_latency_says_what_was_not_measured():
    rows = [r for r in latency_rows() if r.key["new_tokens"] == 10 and r.key["context"] == 200]
    assert lines(latency.conclusion(rows)) == [
        "- m at 200 tokens of context and 10 new tokens: TTFT not measured; output "
        "throughput 14.29 tok/s [14.29, 14.29], n = 11; decode alone not measured (a slope needs "
        "3 calls of each of two lengths; there are 11 of 10 tokens)."
    ]


def test_a_model_with_first_tokens_only_has_no_throughput():
    rows = [row("latency", {"ttft_s": spread(1.0)}, context=200, new_tokens=1)]
    assert lines(latency.conclusion(rows)) == [
        "- m: only first tokens were timed, so no throughput is stated."
    ]


def steady(n=12, later=1.0):
    """First tokens that scatter by some percent; in the second half they take `later` as long."""
    return [0.1 * (1 + 0.01 * (7 * i % 5 - 2)) * (later if 2 * i >= n else 1) for i in range(n)]


def aa_line(samples):
    (line,) = lines(latency.aa([row("aa", {"ttft_s": samples}, context=100, new_tokens=1)]))
    return line


def test_an_arm_against_itself():
    sentence = aa_line(steady())
    assert sentence.startswith("- A/A check, TTFT of m at 100 tokens against itself, n = 12: the ")
    assert (
        "pairs of neighbouring blocks, as it should be; second half against first: no difference"
        in sentence
    )
    changed = aa_line(steady(later=1.5))
    assert "second half against first: 1.5" in changed and "prove nothing" in changed
    assert aa_line(steady(n=8)) == (
        "- A/A check of m at 100 tokens: not made (n = 8: two blocks need n >= 12)."
    )
    assert latency.aa([]) == "- No arm was measured against itself."


def test_intervals_that_are_too_narrow_are_said_to_be(monkeypatch):
    few = Estimate(0.6, n=100)
    monkeypatch.setattr(stats, "aa_coverage", lambda samples: few)
    assert "in 60% of 100 pairs of neighbouring blocks, too few, so that intervals" in aa_line(
        steady()
    )


def test_the_conclusion_on_latency_holds_the_a_a_check():
    rows = [*latency_rows(), row("aa", {"ttft_s": steady()}, context=100, new_tokens=1)]
    assert "- A/A check, TTFT of m at 100 tokens" in latency.conclusion(rows)


# --- memory


def test_memory_tells_implementations_of_experts_apart():
    values = {
        "peak_bytes": 3 * 10**9,
        "baseline_bytes": 2 * 10**9,
        "kv_tensor_bytes": 10**8,
        "logits_bytes": 6 * 10**8,
        "workspace_bytes": 3 * 10**8,
    }
    rows = [
        row("memory-paper", values=values, context=200, experts=name)
        for name in ("grouped_mm", "all_experts")
    ]
    sentences = lines(ledger.conclusion(rows))
    assert [line.split(" under")[0] for line in sentences] == [
        "- m (experts grouped_mm)",
        "- m (experts all_experts)",
    ]


def test_memory_names_the_largest_part_of_each_protocol():
    values = {
        "peak_bytes": 3 * 10**9,
        "baseline_bytes": 2 * 10**9,
        "kv_tensor_bytes": 10**8,
        "logits_bytes": 6 * 10**8,
        "workspace_bytes": 3 * 10**8,
    }
    small = {**values, "peak_bytes": 2_400_000_000, "logits_bytes": 0}
    rows = [
        row("memory-paper", values=values, context=200),
        row("memory-paper", values=values, context=100),
        row("memory", values=small, context=200),
    ]
    assert lines(ledger.conclusion(rows)) == [
        "- m under the paper's protocol at 200 tokens: peak 3.000 GB, 1,000.0 MB above the "
        "baseline; the largest part is the held logits with 60%, the KV cache is 10%.",
        "- m under generate() at 200 tokens: peak 2.400 GB, 400.0 MB above the baseline; the "
        "largest part is the workspace with 75%, the KV cache is 25%.",
    ]


def test_memory_names_the_part_that_is_alive_at_the_peak():
    values = {
        "peak_bytes": 3 * 10**9,
        "baseline_bytes": 2 * 10**9,
        "kv_tensor_bytes": 10**8,
        "logits_bytes": 6 * 10**8,
        "workspace_bytes": 3 * 10**8,
        "kv_peak_bytes": 9 * 10**7,
        "peak_in": "prefill experts",
        "expert_workspace_bytes": 7 * 10**8,
        "kv_peak_behind_bytes": 0,
    }
    (line,) = lines(ledger.conclusion([row("memory-paper", values=values, context=200)]))
    assert line.endswith(
        "the largest part is the workspace of the experts with 70%, the KV cache is 9%."
    )


def test_memory_of_an_unknown_cache_is_not_told_apart():
    values = {"peak_bytes": 3 * 10**9, "baseline_bytes": 2 * 10**9}
    (line, *_) = lines(ledger.conclusion([row("memory", values=values, context=200)]))
    assert line.endswith("1,000.0 MB above the baseline; its parts are not told apart.")


# --- energy


def test_energy_per_1k_its_idle_share_and_the_papers_estimator():
    values = {"window_energy_j": 550.0, "window_s": 2.2, "idle_w": 75.0}
    samples = {"energy_j": [50.0] * 11, "paper_energy_j": [45.0] * 10 + [90.0]}
    assert lines(
        conclusions.conclusion([row("energy", samples, values, context=200, new_tokens=10)])
    ) == [
        # 50 J for 10 tokens; 75 W x 2.2 s = 165 J of 550 J; in the median 45 J against 50 J
        "- m at 200 tokens: 5,000 J per 1,000 generated tokens [5,000, 5,000], n = 11 (GPU board, "
        "gross), of which 30% is what the idle board draws in that time; the paper's before/after "
        "estimator gives -10.0% [-10.0%, -10.0%].",
        "- m, uncertainty: 95 % over blocks ±0.0%, gain of the sensor, assumed and not measured, "
        "±5% (the gain cancels in ratios on one card).",
    ]


def test_energy_that_was_not_measured_says_why():
    reason = "no NVML energy counter: the device is a CPU"
    rows = [row("energy", {"e2e_s": [1.0]}, missing={"energy_j": reason})]
    assert lines(conclusions.conclusion(rows)) == [
        f"- m: energy not measured ({reason}).",
        f"- Not measured on 1 arm(s), energy_j: {reason}.",
    ]


# --- ablations


def arm(name, seconds=None, error=None, **changes):
    samples = {} if seconds is None else {"e2e_s": spread(seconds)}
    return row(f"ablation-{name}", samples, error=error, **changes)


def test_ablations_compare_with_the_first_arm_that_worked():
    rows = [
        arm("precision", error="RuntimeError: boom", dtype="float16"),
        arm("precision", 1.0, dtype="bfloat16"),
        arm("precision", 2.0, dtype="float32"),
        arm("precision", 0.5, dtype="float8"),
        arm("precision", 1.001, dtype="int8"),
    ]
    sentences = [line for line in lines(ablations.conclusion(rows)) if "dtype" in line]
    assert sentences[0] == "- dtype float16 failed: RuntimeError: boom."
    slower = "- Output throughput of dtype float32: 0.5 times that of bfloat16 ["
    faster = "- Output throughput of dtype float8: 2.000 times that of bfloat16 ["
    assert sentences[1].startswith(slower) and sentences[1].endswith("], lower.")
    assert sentences[2].startswith(faster) and sentences[2].endswith("], higher.")
    same = "- Output throughput of dtype int8: no difference resolved from bfloat16 ("
    assert sentences[3].startswith(same)


def test_an_ablation_whose_rows_warn_has_no_verdict():
    """A longer prompt that is faster: the short arm warns that it spread."""
    noisy = warning("spread", "repetitions spread over 28% of their median")
    harmless = warning("power_cap", "the board ran at its power limit")
    for marks, word in (((noisy,), "not judged: a row warns of spread"), ((harmless,), "faster")):
        short = replace(arm("context", 1.0, context=512), warnings=marks)
        arms = [short, arm("context", 0.5, context=1024)]
        table = ablations.table(arms, "context").frame().set_index("context")
        assert table.loc[1024, "verdict"] == word
        (sentence,) = [x for x in lines(ablations.conclusion(arms)) if "context 1024" in x]
        assert ("higher" in sentence) is (word == "faster")
        assert ("a row warns of spread" in sentence) is (word != "faster")


def test_ablations_in_which_nothing_can_be_compared():
    rows = [arm("decoding", 1.0), arm("context", error="ModelError: too long", context=4096)]
    sentences = lines(ablations.conclusion(rows))
    assert "- decoding: 1 arm(s) ran, so nothing is compared." in sentences
    assert "- context 4096 failed: ModelError: too long." in sentences
    assert "- context: 0 arm(s) ran, so nothing is compared." in sentences


# --- efficiency


def test_efficiency_divides_by_active_parameters_and_says_what_is_missing():
    rows = [
        row("card", values={"active_params": 2_000_000_000}),
        *latency_rows(),
        row("memory-paper", values={"peak_bytes": 4 * 10**9}, context=200, new_tokens=10),
        row("energy", missing={"energy_j": "no counter"}, context=200, new_tokens=10),
    ]
    # 10 / 0.7 s / 2; 1 / 0.2 s / 2; 10 / 0.7 s / 4 GB
    assert lines(efficiency.conclusion(rows, 200)) == [
        "- m at 200 tokens, per billion of its 2 billion active parameters: 7.143 tok/s [7.143, "
        "7.143], n = 11; 2.000 first tokens per second [2.000, 2.000], n = 11; tokens per joule "
        "not measured (no counter). Per GB of peak memory: 3.571 tok/s [3.571, 3.571], n = 11.",
        "- Not measured on 1 arm(s), energy_j: no counter.",
    ]
    nothing = efficiency.conclusion(rows, 999)
    assert "- m: nothing measured at 999 tokens; measured: [100, 200" in nothing


def test_efficiency_takes_the_peak_of_the_implementation_that_was_timed():
    """Memory may be measured for further implementations, which need more of it."""
    timed = [row("card", values={"active_params": 2_000_000_000}), *latency_rows()]
    own = row("memory-paper", values={"peak_bytes": 4 * 10**9}, context=200, new_tokens=10)
    other = row(
        "memory-paper",
        values={"peak_bytes": 8 * 10**9},
        context=200,
        new_tokens=10,
        experts="all_experts",
    )
    text = efficiency.conclusion([*timed, own, other], 200)
    assert "Per GB of peak memory: 3.571 tok/s" in text  # 10 / 0.7 s / 4 GB, not / 8 GB


# --- models against each other


def pair(a_s, b_s, env=ENV, context=200, **changes):
    return [
        row("latency", {"e2e_s": spread(a_s)}, model="a", context=200, new_tokens=10),
        row(
            "latency",
            {"e2e_s": spread(b_s)},
            model="b",
            context=context,
            new_tokens=10,
            env=env,
            **changes,
        ),
    ]


def test_models_are_compared_in_the_direction_that_the_sentence_says():
    first = lines(across_models.models([ENV, *pair(1.0, 2.0)]))[0]
    start = "- At 200 tokens, output throughput of a: 2.000 times that of b ["
    assert first.startswith(start) and first.endswith("], higher.")
    first = lines(across_models.models([ENV, *pair(2.0, 1.0)]))[0]
    assert first.startswith("- At 200 tokens, output throughput of a: 0.5 times that of b [")
    assert first.endswith("], lower.")
    first = lines(across_models.models([ENV, *pair(1.0, 1.0)]))[0]
    start = "- At 200 tokens, output throughput of a: no difference resolved from b (1.000 times ["
    assert first.startswith(start)


def test_models_on_a_shared_gpu_are_not_compared_and_their_rows_carry_a_warning():
    """Also where the visit on the shared one is not the last."""
    shared = environment_record({"gpu": "G", "gpu_uuid": "MIG-1"})
    one, other = pair(1.0, 2.0)
    visited = replace(one, others=(replace(one, env_id=shared.env_id),))
    for first in (replace(one, env_id=shared.env_id), visited):
        text = across_models.models([ENV, shared, first, other])
        assert "Output throughput: a and b are not compared; measured on a MIG slice (G)." in text
        assert "2.000 times" not in text and "Warning on 1 arm(s), shared_gpu" in text
    rows = Rows([ENV, shared, visited, other])
    assert [w["code"] for row in Rows(rows) for w in row.warnings] == ["shared_gpu"]


def test_a_ratio_within_a_visit_is_of_one_machine_whatever_the_last_rows_are_of():
    one, other = (environment_record({"gpu": "G", "gpu_uuid": uuid}) for uuid in ("u1", "u2"))
    a, b = pair(1.0, 2.0)
    ours = replace(a, env_id=one.env_id, visit="1")
    theirs = [replace(b, env_id=e.env_id, visit=v) for e, v in ((one, "1"), (other, "2"))]
    both = [ours, replace(theirs[1], others=(theirs[0],))]
    assert "different machines" not in lines(across_models.models([one, other, *both]))[0]
    assert "different machines" in lines(across_models.models([one, other, ours, theirs[1]]))[0]


def test_models_on_different_machines_are_compared_with_a_word_about_it():
    """As far as the numbers of the boards are known."""
    one, other = (environment_record({"gpu": "G", "gpu_uuid": uuid}) for uuid in ("u1", "u2"))
    rows = [replace(r, env_id=one.env_id) for r in pair(1.0, 2.0)]
    mixed = [rows[0], replace(rows[1], env_id=other.env_id)]
    first = lines(across_models.models([one, other, *mixed]))[0]
    assert first.endswith("], higher; measured on different machines.")
    for same in (rows, [rows[0], replace(rows[1], env_id=ENV.env_id)]):
        first = lines(across_models.models([one, ENV, *same]))[0]
        assert first.endswith("], higher.")


def test_a_longer_ttft_is_a_higher_one():
    rows = [
        row("latency", {"ttft_s": spread(t)}, model=m, context=200, new_tokens=1)
        for m, t in (("a", 3.0), ("b", 1.0))
    ]
    sentences = lines(across_models.models([ENV, *rows]))
    assert (
        sentences[0] == "- Output throughput: fewer than two models measured, so none are compared."
    )
    assert sentences[1].startswith("- At 200 tokens, TTFT of a: 3.000 times that of b [")
    assert sentences[1].endswith("], higher.")


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"env": OTHER}, "gpu (G, H)"),
        ({"dtype": "float32"}, "dtype ("),
        ({"weights": "random"}, "weights ("),
        ({"stack": "graph"}, "stack ("),
    ],
)
def test_models_that_differ_in_more_than_the_model_are_not_compared(changes, named):
    first = lines(across_models.models([ENV, OTHER, *pair(1.0, 2.0, **changes)]))[0]
    assert first.startswith("- Output throughput: not compared; rows differ in ")
    assert named in first


def test_models_without_a_common_context_are_not_compared():
    text = across_models.models([ENV, *pair(1.0, 2.0, context=100)])
    assert "- Output throughput: a and b share no context and length." in lines(text)


def test_models_are_compared_at_a_length_that_both_have():
    rows = [
        row("latency", {"e2e_s": spread(t)}, model=m, context=200, new_tokens=g)
        for m, g, t in (("a", 8, 9.0), ("a", 64, 1.0), ("b", 64, 2.0))
    ]
    first = lines(across_models.models([ENV, *rows]))[0]
    assert first.startswith("- At 200 tokens, output throughput of a: 2.000 times that of b [")


# --- what a reader should beware of


def test_cautions_count_warnings_label_random_weights_and_give_reasons():
    noisy = Record("latency", key("m"), warnings=(warning("spread", "close other programs"),))
    mute = Record("memory", key("m"), missing={"reserved_bytes": "not reported"})
    assert [f"- {line}" for line in wording.cautions([noisy, noisy, mute, mute])] == [
        "- Warning on 2 arm(s), spread: for example, close other programs.",
        RANDOM,
        "- Not measured on 2 arm(s), reserved_bytes: not reported.",
    ]
    assert wording.cautions([row("latency")]) == []


@pytest.mark.parametrize("claim", [latency.conclusion, ledger.conclusion, conclusions.conclusion])
def test_no_rows_give_no_claim(claim):
    assert claim([]) == ""
    assert claim([row("latency", error="x"), row("memory", error="x")]) == ""
