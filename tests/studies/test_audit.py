"""The audit: each rule against one planted defect in a study where everything else holds, then
the findings on the real study, and its facts against the released files and the model card."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lib import files
from lib.__main__ import main
from lib.run import kernel, plan, profiles
from lib.run.job import run_job
from lib.studies import audit
from lib.studies.arxiv_2508_16700 import rules
from lib.studies.arxiv_2508_16700.audit import decode_tok_per_s
from lib.studies.study import (
    PUBLISHED,
    SEVERITIES,
    Finding,
    Published,
    agrees,
    differences,
    load,
)
from tests.samples import study as sample

ROOT = files.ROOT
PAPER_CSVS = ROOT.parent / "shared" / "paper" / "csv"
# Rules about a sentence, or an outside source, that the made-up study does not have.
UNSAID = {"saving-is-size", "prefill-share", "realised-parameters"}
PEAK, GAP = "Peak VRAM (MB)", "Δ vs GPT-OSS (MB)"
TIME, SUM = "TPOT (tok/s)", "p50 (ms)"


def findings_of(data: dict[str, Any], entries: dict[str, Any] | None = None) -> dict[str, Finding]:
    """Findings by id, less those about what the study does not say."""
    study = Published(data, entries or sample.entries())
    every = audit.findings(study)
    return {f.id: f for f in every if f.severity != "unchecked" or f.id not in UNSAID}


def cell(data: dict, table: int, row: Any, column: str, value: str) -> None:
    spec = data["tables"][table]
    spec["rows"][str(row)][list(spec["columns"]).index(column)] = value


def fact(data: dict, name: str, value: Any) -> None:
    assert name in data["released"]
    data["released"][name]["value"] = value


def calls(data: dict, model: str, context: int, ms: tuple[float, float, float]) -> None:
    """Median times of calls of 10, 20 and 40 tokens."""
    for tokens, value in zip((10, 20, 40), ms, strict=True):
        fact(data, f"p50_ms/{model}/{context}/{tokens}", value)


# --- one defect each, by hand


def mib_as_mb(d):
    """80,482 MB are 76,754 MiB (x 2^20 / 10^6), less than the 80,000 MB of weights."""
    for column in (PEAK, GAP):
        d["tables"][5]["columns"][column]["meant"] = "MiB"
    for model, peak, gap in (
        ("Ours", "38646", "0"),
        ("Wide", "76754", "38108"),
        ("Long", "95788", "57142"),
    ):
        cell(d, 5, model, PEAK, peak)
        cell(d, 5, model, GAP, gap)


def mib_as_mb__baseline(d):
    """80 GB are 76,294 MiB: 76.3 in thousands."""
    d["claims"]["baseline-Wide"]["value"] = "76.3"


def mib_as_mb__gap(d):
    d["claims"]["peak-gap-Wide"]["value"] = "38.1"  # 39,959 MB are 40.0 GB


def peak_row(d):
    fact(d, "peak_mib/Ours/400", d["released"]["peak_mib/Ours/400"]["value"] + 20)


def kv_contribution(d):
    """410 tokens x 300,000 B = 123 MB = 117.3 MiB; 352 MiB are three times that."""
    fact(d, "kv_reported_mib/Ours/400", 3 * 410 * 300_000 / sample.MIB)


def held_logits(d):
    d["counted"]["Wide"]["vocab_size"] = 500_000  # a row of logits is the 1 MB of a prompt token


def saving_is_size(d):
    d["claims"]["saving-from-moe"] = {"text": "by the architecture", "value": None}


def mib_as_mb__quotient(d):
    cell(d, 8, "Ours", "TPOT/GB", "1.848")  # 71.43 / 38.646 thousand MiB; 71.43 / 40.523 GB = 1.763
    fact(d, "ape/Ours/TPOT/GB", 1.848)


def realised_parameters(d):
    """71.43 tok/s on 20 x 10^9 are 3.57 a 10^9: 4 times Wide's 0.893, not 20 times."""
    d["sources"]["all-experts"] = {"text": "all run", "url": "https://example.org/4", "dated": "x"}


def governance_source(d):
    fact(d, "licence/Long", "unknown")


def rate_is_not_tokens_over_p50(d):
    cell(d, 1, "Ours", SUM, "141.00")  # 10 / 0.141 s = 70.92, printed is 71.43


def ttft_is_one_sample(d):
    """A reading of 50 ms is above the 22 and 44 ms of the others, the median of 11 ms below."""
    fact(d, "ttft_once_ms/Ours/100", 50.0)
    cell(d, 3, 100, "Ours", "50.00")


def mixed_runs(d):
    """45.45 tok/s is the latency runs', 36.50 the energy runs'; each has 35.71 or 46.00 as well."""
    for context, rate, joules in ((100, 46.0, 3300), (400, 36.5, 4200)):
        fact(d, f"energy_tok_per_s/Wide/{context}", rate)
        fact(d, f"power_w/Wide/{context}", joules * rate / 1000)
    cell(d, 2, 400, "Wide", "36.50")
    cell(d, 4, "Wide", "TPOT@400", "36.50")
    cell(d, 4, "Wide", "ΔTPOT (%)", "-19.7")
    d["claims"]["drop-Wide"]["value"] = "19.7"


def mixed_runs__of_table_7(d):
    """41.67 tok/s at 200 is the latency runs'; the energy runs, and so table 7, have 40.00."""
    fact(d, "energy_tok_per_s/Wide/200", 40.0)
    fact(d, "power_w/Wide/200", 3600 * 40.0 / 1000)


def prefill_in_throughput(d):
    """At 400 a token takes what it takes at 100; only the first ten take longer."""
    for model, factor in (("Ours", 1), ("Wide", 2), ("Long", 4)):
        calls(d, model, 400, (140 * factor, 250 * factor, 470 * factor))


def decode_gain(d):
    """Half of the call is prefill: 5.5 and 7 ms a token, so 142.9 against 35.7 tok/s, +300 %."""
    calls(d, "Ours", 100, (110, 165, 275))
    calls(d, "Ours", 400, (140, 210, 350))


def even_number_of_runs(d):
    """Calls of 100 and 120 ms: their median is 110 ms, that of 10 / 0.1 and 10 / 0.12 is 91.67."""
    fact(d, "p50_ms/Ours/100/10", 110.0)
    fact(d, "tpot/Ours/100/10", (10 / 0.1 + 10 / 0.12) / 2)


def p95_is_the_maximum(d):
    d["released"]["p95_equals_p99"]["value"] = 36


def gpu_is_not_named(d):
    fact(d, "gpu", "Test GPU Pro")


def tokens_per_joule(d):
    d["tables"][6]["columns"]["Tokens/W"]["unit"] = "tokens/W"


def claims_follow(d):
    d["claims"]["tokens-per-joule-vs-Wide"]["value"] = "198"  # 4200 / 1400 is +200 %


def claims_follow__nearly(d):
    d["claims"]["tokens-per-joule-vs-Wide"]["value"] = "199.5"  # half a point is rounding


def energy_trend(d):
    """3300, 4300, 4200 J: the second step falls. 4300 J are 179.2 W x 24 ms."""
    cell(d, 7, "Wide", "200", "4300.0")
    fact(d, "power_w/Wide/200", 4300 / 24)


def prefill_share(d):
    d["claims"]["prefill-dominates"] = {"text": "prefill dominates", "value": None}


def greedy_baselines_differ(d):
    cell(d, 12, "Transformers", "p50 tok/s", "88.00")  # (90.91 - 88.00) / 90.91 = 3.2 % > 1.5 %


def same_arm_twice(d):
    cell(d, 10, 200, "p50 tok/s", "80.00")  # 80.00 / 83.33 is -4.0 %


def claims_follow__saving(d):
    d["claims"]["energy-vs-Long"]["value"] = "80.0"  # 1 - 1400 / 11200 is 87.5 %


def last_digits(d):
    cell(d, 7, "Long", "200", "9600.1")  # 200 W x 48 ms


def claims_follow__count(d):
    d["claims"]["wide-params"]["value"] = "42"


def quotients(d):
    cell(d, 8, "Ours", "APE-1/TTFT", "18.900")  # 1 / 0.014 s / 4 = 17.857
    fact(d, "ape/Ours/APE-1/TTFT", 18.9)


def efficiency_file(d):
    fact(d, "ape/Long/APE-Energy", 0.5)


def claims_follow__quotient(d):
    d["claims"]["ape-energy"]["value"] = "0.250"  # 1 / 1.4 J / 4 = 0.179


def claims_follow__order(d):
    d["claims"]["peak-lower"]["direction"] = "higher"


def throughput_falls(d):
    cell(d, 2, 200, "Long", "23.00")  # 22.73 at 100


def within_bandwidth(d):
    d["sources"]["bandwidth"]["bytes_per_s"] = 2e12  # Wide reads 35.7 x 80 GB = 2.86 TB/s


SAID: dict[Callable[[dict], None], tuple[str, ...]] = {
    mib_as_mb: ("error", "Wide would peak at 76.75 GB", "80.00 GB", "it is 80.48 GB"),
    mib_as_mb__baseline: ("error", "76.3 GB", "80.0 GB (baseline-Wide); printed is MiB / 1000",
                          "baseline-Ours beside them is GB"),
    mib_as_mb__gap: ("error", "38.1 GB", "40.0 GB (peak-gap-Wide)"),
    peak_row: ("note", "40,543.97 MB", "+0.05 %"),  # 20 MiB are 20.97 MB of 40,523
    kv_contribution: ("error", "410 tokens", "= 117.3 MiB", "3.0 times that (Ours)"),
    held_logits: ("caution", "grows by 1,000,000 B a prompt token, a row of logits is 1,000,000 B"),
    saving_is_size: ("caution", "against Wide the weights save 50.0 %", "ones would save 90.0 %"),
    mib_as_mb__quotient: ("error", "1.763 tok/s/GB (Ours)"),
    realised_parameters: ("caution", "on 20.00 x 10^9: 3.57", "4.0 times Wide, 10.0 times Long"),
    governance_source: ("caution", "unknown, Permissive (Long)"),
    rate_is_not_tokens_over_p50: ("error", "10 / p50 = 70.92 (Ours)"),
    ttft_is_one_sample: ("error", "1 of 9 cells", "at 100 the medians are 11.0 ms (Ours), 22.0 ms",
                         "so Long answers last and Ours first"),
    mixed_runs__of_table_7: ("caution", "41.67 tok/s (Wide at 200)", "gave 40.00 tok/s"),
    mixed_runs: ("error", "latency runs at 100, energy runs at 400",
                        "within the latency runs -21.4 %, within the energy runs -20.7 %"),
    prefill_in_throughput: ("caution", "+0.0 % (Ours), +0.0 % (Wide), +0.0 % (Long)"),
    decode_gain: ("caution", "142.86 tok/s (Ours)", "+300.0 % (Wide)"),
    even_number_of_runs: ("error", "in 1 of 27 rows", "ten"),
    p95_is_the_maximum: ("caution", "36 of 36"),
    gpu_is_not_named: ("note", "Test GPU Pro with 95,000 MiB"),
    tokens_per_joule: ("note", "0.7143 (Ours)", "tokens per joule"),
    claims_follow: ("error", "200 (tokens-per-joule-vs-Wide)"),
    claims_follow__nearly: ("note", "200 (tokens-per-joule-vs-Wide)"),
    efficiency_file: ("note", "0.5 (APE-Energy of Long)"),
    energy_trend: ("error", "Wide: steps +1,000.0, -100.0 J; the largest ends at 200, and "
                   "one falls"),
    prefill_share: ("error", "at most 10 % (Ours)"),
    greedy_baselines_differ: ("note", "a spread of 3.2 %; the effects are 1.5 to 1.5 %", "own"),
    same_arm_twice: ("caution", "-4.0 % (at 200)"),
    claims_follow__saving: ("error", "87.5 (energy-vs-Long)"),
    last_digits: ("note", "9600.0"),
    claims_follow__count: ("error", "40 (wide-params)"),
    quotients: ("error", "17.86 (APE-1/TTFT of Ours)"),
    claims_follow__quotient: ("error", "0.1786 (ape-energy)"),
    claims_follow__order: ("error", "0.4035 to 0.5035 (peak-lower)"),
    throughput_falls: ("error", "22.73, 23.00, 17.86 (Long)"),
    within_bandwidth: ("error", "2.86 TB/s (Wide), above 2.00 TB/s"),
}  # fmt: skip


def rule_of(plant: Callable) -> str:
    """The rule that a plant breaks: several plants of one rule have something after "__"."""
    return plant.__name__.partition("__")[0].replace("_", "-")


def test_a_study_that_holds_has_no_finding():
    assert findings_of(sample.study()) == {}
    every = audit.findings(Published(sample.study(), sample.entries()))
    assert {f.id for f in every} == UNSAID and {f.severity for f in every} == {"unchecked"}
    assert all(f.follows.startswith("not checked: ") for f in every)


@pytest.mark.parametrize("plant", SAID, ids=lambda plant: plant.__name__)
def test_a_planted_defect_gives_its_finding_and_no_other(plant):
    data = sample.study()
    plant(data)
    every = findings_of(data)
    assert every.keys() == {rule_of(plant)}
    (finding,) = every.values()
    severity, *parts = SAID[plant]
    assert finding.severity == severity
    for part in parts:
        assert part in finding.printed + finding.follows
    assert finding.printed and finding.rule
    assert {*finding.claims} <= data["claims"].keys()


def test_energy_at_one_power_is_the_throughput_again():
    """105 against 100 W: ln 2 / ln 2.1 = 93 % of the gain is time. At 150 W it is 63 %."""
    every = findings_of(sample.study(wide_w=105))
    assert every.keys() == {"energy-is-time"}
    follows = every["energy-is-time"].follows
    assert "9 of 9 rows" in follows and "100.0 against 105.0 W (-4.8 %)" in follows
    assert "93 % of the gain over Wide" in follows and "Long" not in follows


@pytest.mark.parametrize(
    ("joules", "follows"),
    [
        (3200, "steps -100.0, +1,000.0 J; the largest ends at 400, and one falls"),
        (4000, "steps +700.0, +200.0 J; the largest ends at 200"),
        (3700, None),
    ],
)
def test_energy_must_rise_and_rise_most_at_the_end(joules, follows):
    """3300 and 4200 J at the ends; 3700 J between them rises by 400, then by 500."""
    data = sample.study()
    cell(data, 7, "Wide", "200", f"{joules}.0")
    fact(data, "power_w/Wide/200", joules / 24)
    every = findings_of(data)
    assert every.keys() == ({"energy-trend"} if follows else set())
    assert follows is None or every["energy-trend"].follows == f"Wide: {follows}"


def test_one_idle_reading_in_the_first_row_is_found():
    """(9 x 100 + 50) / 10 = 95 W; without the reading it is 100 W again, 5 % more."""
    every = findings_of(sample.study(first_idle=True))
    assert every.keys() == {"first-row-is-partly-idle"}
    follows = every["first-row-is-partly-idle"].follows
    assert "95.0 W (Ours)" in follows and "without one idle reading 100.0 W (Ours)" in follows
    assert "too low by 5.0 % (Ours), 6.7 % (Wide)" in follows  # Wide: 140 for 150 W
    assert "9 of 9 means" in follows


def test_a_licence_that_the_publisher_does_not_state():
    entries = sample.entries()
    entries["wide"]["governance"]["licence"] = "MIT"
    every = findings_of(sample.study(), entries)
    assert every.keys() == {"licences"}
    assert "MIT, permissive (Wide, looked up 2026-01-01)" in every["licences"].follows
    assert every["licences"].sources == ("https://example.org",)
    entries["wide"]["governance"]["licence"] = "apache 2.0"  # another spelling is no difference
    assert findings_of(sample.study(), entries) == {}


def test_every_rule_has_a_planted_defect():
    planted = {rule_of(plant) for plant in SAID}
    planted |= {"energy-is-time", "first-row-is-partly-idle", "licences"}
    assert planted == {audit.name_of(rule) for group in rules.AUDIT.values() for rule in group}


def test_baselines_at_other_contexts_are_other_arms():
    data = sample.study()
    greedy_baselines_differ(data)
    data["tables"][12]["context"] = 400
    assert findings_of(data) == {}
    for table in (9, 11, 12):
        data["tables"][table]["context"] = None
    assert "the paper states no context" in findings_of(data)["greedy-baselines-differ"].follows


def test_what_a_study_lacks_is_said_not_guessed():
    data = sample.study()
    del data["released"]["kv_reported_mib/Ours/400"]
    missing = findings_of(data)["kv-contribution"]
    assert missing.severity == "unchecked"
    assert missing.follows == "not checked: released holds no kv_reported_mib/Ours/400"


def test_decode_throughput_is_the_slope_of_the_call_times():
    """110, 220, 440 ms for 10, 20, 40 tokens: 11 ms a token, whatever is added to every call."""
    study = Published(sample.study())
    assert decode_tok_per_s(study, "Ours", 100) == pytest.approx(1000 / 11)
    calls(study.data, "Ours", 100, (210, 320, 540))
    assert decode_tok_per_s(study, "Ours", 100) == pytest.approx(1000 / 11)


@pytest.mark.parametrize(
    ("text", "exact", "same"),
    [
        ("31.27", 31.279, True),
        ("31.27", 31.281, False),
        ("43461", 43461.9, True),
        ("43461", 43462.1, False),
        ("-17.0", -16.93, True),
        ("0.0283", 0.0285, False),
    ],
)
def test_agreement_is_one_unit_of_the_last_digit(text, exact, same):
    assert agrees(text, exact) is same


def test_findings_as_text_and_as_markdown():
    bare = Finding("error", "table 5", "1 | 2", "3", (), ("https://example.org",))
    finding = replace(bare, id="an-id", topic="memory", rule="a rule")
    lines = audit.markdown([finding], "memory").splitlines()
    row = "| **an-id** (error, table 5) | 1 \\| 2 | 3 [[1]](https://example.org) | a rule |"
    assert lines[2] == row
    assert audit.markdown([finding], "energy") == "No finding: every rule of this section holds."
    assert audit.text([finding]).splitlines() == [
        "error     an-id  (table 5)",
        "  printed  1 | 2",
        "  follows  3",
        "  rule     a rule",
        "  source   https://example.org",
    ]


def test_the_conclusion_counts():
    study = Published(sample.study(), sample.entries())
    every = audit.findings(study)
    total = sum(map(len, rules.AUDIT.values()))
    text = audit.conclusion(study, every)
    assert f"Rules checked: {total}, of which {total - 3} hold; the others gave 3 unch" in text
    mib_as_mb__gap(study.data)
    text = audit.conclusion(study, audit.findings(study))
    assert f"of which {total - 4} hold; the others gave 1 error, 3 unchecked." in text
    assert "touched by errors: decimal-units, peak-gap-Wide." in text


# --- the real study


@pytest.fixture(scope="module")
def paper() -> Published:
    return load()


REAL = {
    "mib-as-mb": "Qwen3-32B would peak at 63.65 GB",
    "peak-row": "43,479.89 MiB in the released file of GPT-OSS-20B, +0.04 %",
    "kv-contribution": "99.0 MiB, held 99.0, reported 35.9 times that (GPT-OSS-20B)",
    "held-logits": "Qwen3-32B: beside the cache the peak grows by 305,552 B",
    "saving-is-size": "against Qwen3-32B the weights save 36.2 %",
    "efficiency-file": "8.644 (APE-TPOT of GPT-OSS-20B)",
    "realised-parameters": "2.1 times Qwen3-32B, 2.0 times Yi-34B",
    "licences": "Apache-2.0, permissive (Qwen3-32B, looked up",
    "governance-source": "Restricted (Yi-34B)",
    "rate-is-not-tokens-over-p50": "31.12 (GPT-OSS-20B), 23.37 (Qwen3-32B), 26.35 (Yi-34B)",
    "ttft-is-one-sample": "9 of 12 cells",
    "even-number-of-runs": "in 36 of 36 rows",
    "mixed-runs": "latency runs -12.0 %, within the energy runs -11.2 %",
    "prefill-in-throughput": "-0.8 % (GPT-OSS-20B), +0.5 % (Qwen3-32B), -4.6 % (Yi-34B)",
    "decode-gain": "+48.3 % (Qwen3-32B), +28.8 % (Yi-34B)",
    "p95-is-the-maximum": "36 of 36",
    "gpu-is-not-named": "NVIDIA H100 NVL",
    "tokens-per-joule": "0.1024 (GPT-OSS-20B)",
    "claims-follow": "34.73 (tokens-per-joule-vs-qwen)",
    "energy-is-time": "12 of 12 rows; power is 305.3 against 312.2 W (-2.2 %)",
    "energy-trend": "Qwen3-32B: steps +2,038.2, -294.8, +1,154.7 J",
    "prefill-share": "at most 22 % (GPT-OSS-20B)",
    "first-row-is-partly-idle": "283.6 W (GPT-OSS-20B), 293.5 W (Qwen3-32B), 348.0 W (Yi-34B)",
    "greedy-baselines-differ": "a spread of 3.7 %; the effects are 1.2 to 2.1 %",
    "same-arm-twice": "-5.0 % (at 512), -4.6 % (at 1024), -3.3 % (at 2048)",
    "last-digits": "-16.9",
    "memory-is-measured-once": "one row for each",
    "energy-has-no-chat-template": "applies no template",
    "energy-rate-is-a-mean": "over the mean time of 5 runs",
    "versions-differ": "transformers 4.55.2",
}


def test_the_findings_on_the_paper(paper):
    every = {f.id: f for f in audit.findings(paper)}
    assert every.keys() == REAL.keys()
    for name, part in REAL.items():
        assert part in every[name].follows, name
    assert {name for f in every.values() for name in f.claims} <= paper.data["claims"].keys()
    assert [f.severity for f in every.values()] == sorted(
        (f.severity for f in every.values()), key=SEVERITIES.index
    )


def test_held_logits_are_shown_for_one_model_only(paper):
    follows = next(f.follows for f in audit.findings(paper) if f.id == "held-logits")
    assert follows.count("(something else is larger there)") == 2
    assert "Qwen3-32B" in follows.split(";")[0]


def test_medians_change_who_answers_last_at_128_512_and_1024(paper):
    follows = next(f.follows for f in audit.findings(paper) if f.id == "ttft-is-one-sample")
    assert follows.count("so Qwen3-32B answers last and GPT-OSS-20B first") == 2
    assert "at 128 the medians are 35.9 ms (GPT-OSS-20B), 46.1 ms (Qwen3-32B)" in follows
    assert (
        "so Yi-34B answers last and GPT-OSS-20B before it" in follows and "at 2048" not in follows
    )


def test_one_root_is_counted_once(paper):
    """Peaks, baselines, gaps and tok/s per GB: all are MiB under another name."""
    every = {f.id: f for f in audit.findings(paper)}
    units = every["mib-as-mb"]
    assert {*units.claims} == {
        *("decimal-units", "baseline-qwen", "baseline-yi", "peak-gap-qwen", "peak-gap-yi")
    }
    assert "65.5" in units.follows and "0.686 tok/s/GB (GPT-OSS-20B)" in units.follows
    assert "baseline-gpt-oss beside them is GB" in units.follows
    errors = [f.id for f in every.values() if f.severity == "error"]
    assert len(errors) == 9 and "claims-follow" not in errors


def test_what_was_read_names_its_file_and_what_is_done_well_is_said(paper):
    read = [f for f in audit.findings(paper) if f.rule == audit.READ]
    assert len(read) == 4 and all(f.sources[0].startswith("https://github.com/") for f in read)
    text = audit.conclusion(paper, audit.findings(paper))
    assert "scripts beside its text gave 4 cautions." in text and text.count("Done well: ") == 5
    assert "Rules checked: 29, of which" in text


def test_claims_are_complete(paper):
    claims = paper.data["claims"]
    assert 40 <= len(claims) <= 55
    for name, claim in claims.items():
        assert claim.get("model") in (None, *paper.models)
        values = claim["value"] if isinstance(claim["value"], list) else [claim["value"]]
        for value in values:
            assert value is None or isinstance(value, str) and float(value) is not None
        assert claim["value"] is not None or claim.get("direction"), name


@pytest.mark.parametrize("path", sorted(PUBLISHED.parent.glob("*.yaml")))
def test_every_study_is_what_the_schema_says(path):
    assert load(path).data["tables"]


@pytest.mark.parametrize(
    ("line", "wrong", "message"),
    [
        ("context: 2048", "contxt: 2048", "key of study.yaml: 'contxt'; did you mean 'context'"),
        ("dtype: bfloat16\n", "", "study.yaml lacks dtype"),
        ("  1:\n", '  "1":\n', "study.yaml, tables, 1 is '1', needs a whole number"),
        (
            "{unit: ms, metric: ttft_ms}",
            "{unt: ms}",
            "study.yaml, tables, 1, columns, TTFT .ms.: 'unt'; did you",
        ),
        ('["459.72"', "[459.72", "rows, GPT-OSS-20B, 0 is 459.72, needs text .in quotes. or null"),
        (
            'value: "20.9"',
            "value: 20.9",
            "total-params, value is 20.9, needs text .* a list or null",
        ),
        ("direction: higher", "direction: up", "is 'up', needs 'higher' or 'lower'"),
        ("context: 2048", "context: 2048\ncontext: 512", "the key context appears twice"),
    ],
)
def test_a_wrong_study_is_named_with_its_fix(tmp_path, line, wrong, message):
    text = PUBLISHED.read_text(encoding="utf-8")
    assert line in text
    (tmp_path / "study.yaml").write_text(text.replace(line, wrong, 1), encoding="utf-8")
    with pytest.raises(files.ParamsError, match=message):
        load(tmp_path / "study.yaml")


def test_facts_equal_the_released_files(paper):
    if not PAPER_CSVS.is_dir():
        pytest.skip("the paper's released CSVs are not beside the checkout")
    assert len(paper.data["released"]) > 100
    assert differences(paper.data, PAPER_CSVS) == []


def test_counts_equal_the_model_card(paper):
    models = pytest.importorskip("lib.models.load")
    for title, counted in paper.data["counted"].items():
        card = models.card(paper.entry(title)[0]).as_dict()
        assert {name: card[name] for name in counted} == counted, title


def test_governance_of_the_papers_models_is_sourced(paper):
    for title in paper.models:
        stated = paper.entry(title)[1]["governance"]
        assert stated["source"]
        assert all(url.startswith("https://") for url in stated["source"])
        assert stated["licence"] == paper.entry(title)[1]["license"]


def test_curves_are_the_printed_values_and_the_slopes(paper):
    lines = {label: (model, x, y) for label, model, _, x, y in rules.throughput_curves(paper)}
    model, x, y = lines["GPT-OSS-20B, printed"]
    assert (model, x, y) == ("gpt-oss-20b", [128, 512, 1024, 2048], [39.79, 38.18, 36.2, 31.27])
    slope = 192e3 / (6892.468690872192 - 2056.731104850769)  # 64 to 256 tokens
    assert lines["GPT-OSS-20B, decode only"][2][-1] == pytest.approx(slope)
    assert len(lines) == 6
    ttft = {label: y for label, _, _, _, y in rules.ttft_curves(paper)}
    assert ttft["Yi-34B, printed"][0] == 54.43
    assert ttft["Yi-34B, released median"][0] == pytest.approx(45.2676, abs=1e-4)


def test_the_audit_starts_without_torch():
    code = (
        "import sys, lib.studies.audit; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- the command line, the facts and the notebook

FACTS = {
    "a": {"value": 1.5, "file": "x.csv", "column": "v", "where": {"n": 1}},
    "b": {"value": "no", "file": "x.csv", "column": "w", "where": {"n": 2}},
    "c": {"value": 1, "of": 2, "file": "x.csv", "column": "v", "same_as": "u"},
}


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        ("n,v,u,w\n1,1.50,1.50,yes\n2,3,4,no\n", []),
        ("n,v,u,w\n1,1.6,1.6,yes\n2,3,4,no\n", ["a: 1.5 here, 1.6 in x.csv, column v"]),
        ("n,v,u,w\n1,1.5,1.5,yes\n2,3,4,maybe\n", ["b: no here, maybe in x.csv, column w"]),
        ("n,v,u,w\n1,1.5,1.5,yes\n2,3,3,no\n", ["c: 1 of 2 here, 2 of 2 in x.csv, column v"]),
        (
            "n,v,u,w\n1,1.5,1.5,yes\n1,1.5,2,yes\n2,3,4,no\n",
            [
                "a: 2 rows of x.csv where {'n': 1}, needs one",
                "c: 1 of 2 here, 1 of 3 in x.csv, column v",
            ],
        ),
        ("n,v,w\n1,1.5,yes\n2,3,no\n", ["c: x.csv has no column u"]),
        ("n,v,u,w\n1,,1.5,yes\n2,3,3,no\n", ["a: could not convert string to float: ''"]),
    ],
)
def test_facts_are_compared_with_the_files(tmp_path, rows, lines):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "x.csv").write_text(rows)
    assert differences({"released": FACTS}, tmp_path) == lines


def test_a_missing_file_is_a_difference(tmp_path):
    lines = differences({"released": FACTS}, tmp_path)
    assert lines[0] == f"a: no x.csv below {tmp_path}" and len(lines) == 3


def test_the_command_line_ends_with_0_unless_facts_differ(tmp_path, capsys, paper):
    assert main(["audit"]) == 0
    text = capsys.readouterr().out
    assert (
        "error     mib-as-mb  (section 3.1; tables 5 and 8; section 4.2)" in text
        and "  rule     " in text
    )
    assert main(["audit", "--csv", str(tmp_path)]) == 1
    facts = len(paper.data["released"])
    assert f"released facts: 0 of {facts} equal the files" in capsys.readouterr().out
    assert main(["audit", "--csv", str(tmp_path / "none")]) == 2
    assert "CSV takes the folder of the released files" in capsys.readouterr().err
    assert main(["audit", "--study", "params/published/none.yaml"]) == 2
    if PAPER_CSVS.is_dir():
        assert main(["audit", "--csv", str(PAPER_CSVS)]) == 0
        assert f"{facts} of {facts} equal" in capsys.readouterr().out


def job(tmp_path: Path) -> plan.Task:
    profile = profiles.profile("paper", {"notebooks": "audit"})
    (task,) = plan.plan(profile, tmp_path)
    return task


def test_the_notebook_runs_once_over_all_models(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    task = job(tmp_path)
    assert task.folder == tmp_path / "_all" / "audit" and task.reads == tmp_path
    run = run_job(task, sha="x", env=kernel.kernel_env(offline=True))
    assert (run["status"], run["error"]) == ("ok", None)
    cells = json.loads((task.folder / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in cells for o in c.get("outputs", ())]
    alts = [o["metadata"]["image/png"]["alt"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(alts) == 2 and all("GPT-OSS-20B, printed: " in alt for alt in alts)
    text = "".join("".join(o["data"].get("text/markdown", "")) for o in outputs)
    for name in REAL:
        assert f"**{name}** (" in text, name
    assert "- Rules checked: " in "".join(cells[-1]["outputs"][0]["data"]["text/markdown"])


def test_a_changed_study_is_another_job(tmp_path):
    task, models = job(tmp_path), ROOT / "params" / "models.yaml"
    study = tmp_path / "study.yaml"
    study.write_text("a: 1\n")
    task.parameters["published"] = str(study)
    before = plan.job_sha(task, "cpu", models)
    assert plan.job_sha(task, "cpu", models) == before
    study.write_text("a: 2\n")
    assert plan.job_sha(task, "cpu", models) != before


def test_only_the_papers_profile_audits():
    have = {
        name: "audit" in profiles.profile(name, {"models": "tiny-yi"}).notebooks
        for name in profiles.profiles(ROOT / "params")
    }
    assert [name for name, audits in have.items() if audits] == ["paper"]


def test_rules_do_not_change_the_study():
    data = sample.study()
    before = copy.deepcopy(data)
    findings_of(data)
    assert data == before
