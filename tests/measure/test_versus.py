"""An upgrade verdict from blocks that a fake machine has timed, with what was planted in B.

The noise of CI: blocks of one side differ by 1 % (standard deviation), calls of a block by 3 %, one
call in twenty takes a fifth longer, and over a run everything slows by 1 %. Three rounds of
A B B A, eight calls of each arm in a block.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from lib import files, stats
from lib.analysis import versus as analysis
from lib.analysis import versus_why
from lib.files import ROOT
from lib.measure import versus
from lib.records import store
from lib.records.record import Record, select
from lib.report import versus as report
from lib.stacks import logits_check
from lib.stacks.registry import STACKS
from lib.stacks.stack import Decoded
from tests.fakes.device import FakeDevice, FakeModel, opened

DOCS = ROOT / "docs" / "versus.md"
TRIALS, ROUNDS, CALLS, NEW_TOKENS = 200, 3, 8, 100


class Noise(NamedTuple):
    """Standard deviations of blocks and of the calls of a block, the share of slow calls, and by
    how much the end of a run is slower than its start."""

    block: float = 0.0
    call: float = 0.0
    slow: float = 0.0
    drift: float = 0.0


CI = Noise(0.01, 0.03, 0.05, 0.01)
RESTLESS = Noise(0.03, 0.003, 0.0, 0.01)  # blocks differ by ten times what their calls tell


@dataclass(frozen=True)
class Plant:
    """What B does otherwise: times of its calls, bytes of its cache and tokens by these factors."""

    time: float = 1.0
    cache: int = 1
    tokens: float = 1.0


class Planted(FakeModel):
    """A model of one block, whose calls take 0.1 s and 10 ms a token, with noise."""

    def __init__(
        self, rng: random.Random, plant: Plant, noise: Noise = CI, drift: float = 1.0
    ) -> None:
        super().__init__(FakeDevice(), prefill_s=0.1, token_s=0.01)
        self.rng, self.plant, self.noise, self.drift = rng, plant, noise, drift

    def open_stack(self, net, *, decoding="greedy", capacity=None):
        rng, plant, noise = self.rng, self.plant, self.noise
        slower = plant.time * self.drift * math.exp(rng.gauss(0, noise.block))

        def generate(ids, new_tokens, on_token=None):
            tokens = max(1, round(new_tokens * plant.tokens))
            seconds = (self.prefill_s + self.token_s * tokens) * slower
            seconds *= math.exp(rng.gauss(0, noise.call))
            seconds *= 1.2 if rng.random() < noise.slow else 1
            self.device.now_s += seconds
            keys, values = (torch.zeros(50 * plant.cache) for _ in range(2))
            layer = SimpleNamespace(keys=keys, values=values)
            return Decoded(torch.zeros(1, tokens), SimpleNamespace(layers=[layer]))

        return generate


@pytest.fixture
def stacks(monkeypatch):
    """Stacks that the model opens itself, and a gate that passes."""
    for stack in ("hf-eager", "graph"):
        fake = opened(stack, lambda net, **options: net.open_stack(net, **options))
        monkeypatch.setitem(STACKS, stack, fake)
    monkeypatch.setattr(logits_check, "row", lambda model, **given: Record("gate", model.key()))


@pytest.fixture
def fakes(stacks, monkeypatch):
    """The same with rows that go nowhere."""
    monkeypatch.setattr(store, "append", lambda path, row: row)


def trial(seed: int, plant: Plant, rounds: int = ROUNDS, noise: Noise = CI) -> analysis.Run:
    """One run of a fake machine."""
    rng, blocks = random.Random(seed), []
    for number in range(1, 4 * rounds + 1):
        letter = "ABBA"[(number - 1) % 4]
        drift = 1 + noise.drift * number / 4 / rounds
        model = Planted(rng, plant if letter == "B" else Plant(), noise, drift)
        rows = versus.block(
            model,
            context=32,
            new_tokens=NEW_TOKENS,
            calls=CALLS,
            seed=0,
            explain=number <= 4,
            records_path="",
        )
        blocks.append(analysis.Block(letter, number, rows))
    packages = {"A": {"versions": {"torch": "1"}}, "B": {"versions": {"torch": "2"}}}
    return analysis.Run(tuple(blocks), {"sought": 0.05, "rounds": rounds, **packages})


def words(run: analysis.Run) -> list[str]:
    return [verdict.word for verdict in analysis.verdicts(run)]


def rates(plant: Plant, noise: Noise = CI) -> dict[str, float]:
    """Of the trials the share whose whole call on generate() got each verdict, and under `alarm`
    that in which any arm was called slower or faster."""
    runs = [words(trial(seed, plant, noise=noise)) for seed in range(TRIALS)]
    every = (analysis.SLOWER, analysis.FASTER, analysis.SAME, analysis.UNSEEN)
    share = {word: sum(run[1] == word for run in runs) / TRIALS for word in every}
    return share | {"alarm": sum(bool({*run} & {*every[:2]}) for run in runs) / TRIALS}


def test_equal_environments_raise_few_alarms(fakes):
    share = rates(Plant())
    assert share["alarm"] <= 0.08, share
    assert share[analysis.SAME] >= 0.8, share
    assert f"alarms in {100 * share['alarm']:.1f} %" in documented()


def test_blocks_that_differ_by_more_than_their_calls_tell_raise_few_alarms(fakes):
    """Taken as units, their calls would alarm in nearly every run."""
    share = rates(Plant(), RESTLESS)
    assert share["alarm"] <= 0.08, share
    assert f"and calls by 0.3 %: {100 * share['alarm']:.1f} %" in documented()


def test_five_per_cent_more_time_is_found(fakes):
    share = rates(Plant(time=1.05))
    assert share[analysis.SLOWER] >= 0.8 and share[analysis.FASTER] == 0, share
    assert f"found in {100 * share[analysis.SLOWER]:.1f} %" in documented()


def documented() -> str:
    return " ".join(DOCS.read_text(encoding="utf-8").split())


def test_the_documented_smallest_effects_are_those_of_the_rule():
    lines = re.findall(r"^\| ([\d.]+) % \|(.*)\|$", DOCS.read_text(encoding="utf-8"), re.M)
    assert len(lines) == 5
    even = stats.Estimate(1.0, level=1 - 0.05 / 3)
    for noise, cells in lines:
        blocks = [stats.Blocks(even, float(noise) / 100, rounds) for rounds in (1, 2, 3, 4)]
        assert cells.split("|") == [f" {100 * b.least():.2g} % " for b in blocks]


@pytest.mark.parametrize("seed", range(5))
def test_a_cache_of_four_times_the_bytes_is_told_and_is_no_time(fakes, seed):
    """A layer of two tensors of 50 float32 numbers is 400 bytes; in B 1,600."""
    run = trial(seed, Plant(cache=4))
    assert not {*words(run)} & {analysis.SLOWER, analysis.FASTER}
    assert (
        "Bytes of the cache (hf-eager): 0.0004 in A, 0.0016 in B, 4.000 times."
        in versus_why.why(run)
    )
    others = [f for f in versus_why.facts(run) if f.counted and not f.title.startswith("bytes")]
    assert len(others) == 4 and not any(fact.differs for fact in others)


@pytest.mark.parametrize("seed", range(5))
def test_nine_per_cent_more_tokens_are_told_as_the_cause_of_the_time(fakes, seed):
    """109 tokens for 100: (0.1 + 1.09) / (0.1 + 1.0) s is 8.2 % more, and a token takes less."""
    run = trial(seed, Plant(tokens=1.09))
    assert words(run)[1:] == [analysis.SLOWER] * 2
    why = versus_why.why(run)
    assert "Tokens made by a call (hf-eager): 100.0 in A, 109.0 in B, 1.090 times." in why
    sentence = next(line for line in why if line.startswith("The calls make other numbers"))
    (on_eager, on_graph) = map(float, re.findall(r"takes ([+-][\d.]+) %", sentence))
    assert on_eager == pytest.approx(-0.75, abs=3) and on_graph == pytest.approx(-0.75, abs=3)


def test_readings_of_equal_environments_are_seldom_told_apart(fakes):
    """Of eight readings of 30 runs, at a level of 99 %."""
    every = [
        fact for seed in range(30) for fact in versus_why.facts(trial(seed, Plant(), rounds=1))
    ]
    read = [fact for fact in every if fact.a and fact.b and not fact.counted]
    assert len(read) == 240
    assert sum(fact.differs for fact in read) <= 8


def test_the_time_of_a_step_is_split_between_the_device_and_the_host(fakes):
    """A step takes 10 ms in A and 15 ms in B; the fake device works in half of it."""
    run = trial(0, Plant(time=1.5), noise=Noise())
    line = next(line for line in versus_why.why(run) if "decode step of generate()" in line)
    more, device, host = map(float, re.findall(r"([+-][\d.]+) ms", line))
    assert (more, device, host) == pytest.approx((5, 2.5, 2.5))
    assert any("the control is slower too" in text.lower() for text in versus_why.why(run))


def test_a_text_that_is_more_tokens_in_b_is_told(fakes):
    """A tokenizer that splits finer: 9 % more tokens for a text, which no arm's time shows."""
    run = trial(0, Plant())
    for block in run.blocks:
        for row in select(block.rows, "made"):
            row.values["text_tokens"] = 109 if block.letter == "B" else 100
    assert "Tokens of the same text: 100.0 in A, 109.0 in B, 1.090 times." in versus_why.why(run)
    assert not {*words(run)} & {analysis.SLOWER, analysis.FASTER}


def test_other_tokens_of_the_same_number_are_told(fakes):
    run = trial(0, Plant())
    assert versus_why.same_ids(run) is True
    other = next(r for r in run.blocks[1].rows if r.kind == "made")
    other.values["made_sha"] = "0"
    assert versus_why.same_ids(run) is False
    assert any("differ between blocks" in line for line in versus_why.why(run))


def test_a_run_of_one_round_has_wide_intervals_and_says_what_it_could_see(fakes):
    """Two degrees of freedom: 5 % of this noise cannot be seen, and the text says so."""
    run = trial(0, Plant(time=1.05), rounds=1)
    verdict = analysis.verdicts(run)[1]
    assert verdict.word == analysis.UNSEEN and verdict.blocks.least() > 0.05
    assert "a difference of 5 % could not have been seen (" in verdict.text
    assert re.search(r"smallest effect that could have been seen is [\d.]+ %", verdict.text)


def test_an_arm_that_fails_in_one_block_has_no_verdict_and_the_others_do(fakes, monkeypatch):
    """The level is then shared by two arms."""

    def refuse(model, **arguments):
        raise RuntimeError("other logits")

    monkeypatch.setattr(logits_check, "row", refuse)
    run = trial(0, Plant())
    verdicts = analysis.verdicts(run)
    assert words(run)[2] == "not measured" and "other logits" in verdicts[2].text
    assert verdicts[0].blocks.ratio.level == pytest.approx(0.975)


def test_the_first_blocks_alone_look_at_what_a_call_made_and_after_all_times(fakes):
    run = trial(0, Plant())
    kinds = [[row.kind for row in block.rows] for block in run.blocks]
    timed = ["environment", "card", *["latency"] * 3]
    assert kinds[:4] == [timed + ["made", "busy"] * 2] * 4 and kinds[4:] == [timed] * 8
    counts = {len(analysis.times_s(r)) for b in run.blocks for r in select(b.rows, "latency")}
    assert counts == {CALLS}


def test_the_page_and_its_tables_hold_the_verdict(stacks, tmp_path):
    """Rows of two whole rounds and of one block more, which counts for nothing."""
    run = trial_on_disk(tmp_path, Plant(time=1.5), blocks=9)
    page = report.write(tmp_path)
    assert len(run.blocks) == 8 and words(run)[1] == analysis.SLOWER
    text = page.read_text(encoding="utf-8")
    assert "B is slower" in text and "2 of 3 rounds" in text
    assert (tmp_path / "verdict.md").read_text(encoding="utf-8").startswith("B against A (torch 2")
    names = sorted(path.name for path in (tmp_path / "tables").iterdir())
    assert names == ["verdicts.csv", "versions.csv", "why.csv"]


def trial_on_disk(folder, plant: Plant, blocks: int) -> analysis.Run:
    rng = random.Random(0)
    for number in range(1, blocks + 1):
        letter = "ABBA"[(number - 1) % 4]
        versus.block(
            Planted(rng, plant if letter == "B" else Plant()),
            context=32,
            new_tokens=16,
            calls=3,
            seed=0,
            explain=number <= 4,
            records_path=folder / f"{number:02}-{letter}" / "records.jsonl",
        )
    sides = {n: {"text": "python3", "versions": {"torch": v}} for n, v in (("A", "1"), ("B", "2"))}
    manifest = {"rounds": 3, "sought": 0.05, "start": "2026-01-01T00:00:00Z", "device": "cpu"}
    manifest |= {"options": {}, **sides}
    files.write_json(folder / "versus.json", manifest)
    return analysis.load(folder)
