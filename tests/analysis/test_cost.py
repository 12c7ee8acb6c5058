"""Costs that a reader can redo: with f = 1 a call takes 0.74 s for 64 tokens and 640 J."""

from __future__ import annotations

import csv

import pytest

from lib.__main__ import main
from lib.analysis import cost
from lib.analysis.cost import Prices
from lib.files import ParamsError
from lib.records.record import Record
from lib.report import document
from lib.stats import Estimate
from tests.samples import records as sample

ENV = sample.environment_record(sample.GPU)


def rows(*more: Record) -> list[Record]:
    model = "gpt-oss-20b"
    return [
        ENV,
        *sample.latency(model, ENV.env_id, (2048,)),
        *sample.energy(model, ENV.env_id, (2048,)),
        *more,
    ]


def line(table, new_tokens: int = 64) -> dict[str, Estimate]:
    names = [c.title for c in table.columns]
    (cells,) = (r for r in table.rows if r[names.index("new tokens")] == new_tokens)
    return dict(zip(names, cells, strict=True))


def test_the_three_formulas_by_hand():
    """An hour at 3.60 USD is 0.001 USD a second; a kWh at 0.36 USD is 10^-7 USD a joule."""
    costs = line(cost.table(rows(), Prices(3.6, 0.36)))
    tokens, requests = costs["GPU time, 10^6 output tokens"], costs["GPU time, 1,000 requests"]
    assert tokens.value == pytest.approx(0.001 * 0.74 / 64 * 1e6)  # 11.5625
    assert requests.value == pytest.approx(0.001 * 0.74 * 1000)  # 0.74
    assert costs["energy, 10^6 output tokens"].value == pytest.approx(1e-7 * 640 / 64 * 1e6)  # 1
    assert tokens.low == pytest.approx(tokens.value * 0.96)  # the interval of the latency
    assert tokens.n == 11


def test_a_batch_shares_the_call():
    batch = Record(
        "batch",
        sample.key("gpt-oss-20b", batch=4),
        {"e2e_s": sample.spread(1.48)},
        sample.source("gpt-oss-20b"),
        env_id=ENV.env_id,
    )
    table = cost.table(rows(batch), Prices(3.6))
    at = [c.title for c in table.columns].index("batch")
    (four,) = (r for r in table.rows if r[at] == 4)
    tokens, requests = four[-2:]
    assert tokens.value == pytest.approx(0.001 * 1.48 / (4 * 64) * 1e6)  # half of one alone
    assert requests.value == pytest.approx(0.001 * 1.48 / 4 * 1000)


@pytest.mark.parametrize(
    ("prices", "kinds"), [(Prices(1.0), ["GPU", "GPU"]), (Prices(None, 1.0), ["energy"])]
)
def test_columns_appear_only_with_their_price(prices, kinds):
    table = cost.table(rows(), prices)
    titles = [c.title for c in table.columns if c.numeric]
    assert [title.split()[0].strip(",") for title in titles] == kinds
    notes = " ".join(table.notes)
    assert ("/ 3600 x t / (b g)" in notes) == ("GPU" in kinds)
    assert ("per kWh" in notes) == ("energy" in kinds)


def test_a_call_of_one_token_and_missing_energy():
    table = cost.table(rows(), Prices(1.0, 1.0))
    assert [r[2] for r in table.rows] == [64, 128]
    assert "not measured" in line(table, 128)["energy, 10^6 output tokens"].reason
    cpu = [sample.environment_record(sample.CPU)]
    cpu += sample.energy("demo-moe", cpu[0].env_id, (64,), gpu=False)
    costs = line(cost.table(cpu, Prices(1.0, 1.0)))
    assert "no NVML energy counter" in costs["energy, 10^6 output tokens"].reason
    assert costs["GPU time, 10^6 output tokens"].value > 0


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan"), float("inf")])
def test_a_price_is_positive(price):
    with pytest.raises(ParamsError, match="KWH_USD is"):
        Prices(None, price)


def test_the_report_shows_costs_where_prices_are_given(tmp_path):
    root = sample.write_paper(tmp_path / "paper")
    assert "grid-money" not in document.write(root, tmp_path / "out").read_text()
    assert not (tmp_path / "out" / "tables" / "money.csv").exists()
    arguments = ["--from", str(root), "--out", str(tmp_path / "out"), "--gpu-hour-usd", "3.6"]
    assert main(["report", *arguments]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="grid-money"' in page and "3.6 USD an hour" in page and "money.csv" in page
    with (tmp_path / "out" / "tables" / "money.csv").open() as file:
        lines = {(x["model"], x["context"], x["new tokens"]): x for x in csv.DictReader(file)}
    cost = lines["gpt-oss-20b", "2048", "64"]["GPU time, 10^6 output tokens (USD)"]
    assert float(cost) == 11.5625
    with pytest.raises(SystemExit) as refused:
        main(["report", *arguments, "--kwh-usd", "-1"])
    assert refused.value.code == 2
