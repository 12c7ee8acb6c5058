"""Other clients' outputs are read as claims, and every client gets a row, also one that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from lib.measure.serving import clients
from lib.measure.serving.clients import CLIENTS, Client, Scenario
from lib.measure.serving.nullserver import prompt_key
from lib.measure.serving.script import Behaviour

timed = pytest.mark.usefixtures("a_processor_is_free")

AIPERF = [
    {
        "metadata": {
            "x_request_id": "a-1",
            "credit_issued_ns": 10**18,
            "request_start_ns": 10**18 + 900_000,
        },
        "metrics": {
            "time_to_first_token": {"value": 58.0, "unit": "ms"},
            "time_to_first_output_token": {"value": 60.0, "unit": "ms"},
            "inter_token_latency": {"value": 9.98, "unit": "ms"},
            "output_sequence_length": {"value": 24, "unit": "tokens"},
            "usage_prompt_cache_read_tokens": {"value": 16, "unit": "tokens"},
        },
    },
    {
        "metadata": {"x_request_id": "a-2"},
        "metrics": {"error_isl": {"value": 32, "unit": "tokens"}},
        "error": {"type": "InvalidInferenceResultError"},
    },
]


def guidellm_row(start_s: float, targeted_s: float, **values) -> dict:
    times = {"request_start": start_s, "targeted_start": targeted_s}
    return {"info": {"timings": times}, "input_metrics": {}, **values}


def test_aiperfs_records_are_read_as_claims():
    good, bad = clients.aiperf_claims("\n".join(map(json.dumps, AIPERF)))
    assert good == {
        "id": "a-1",
        "ttft_s": 0.058,
        "visible_s": 0.06,
        "itl_s": pytest.approx(0.00998),
        "output_tokens": 24,
        "cached_tokens": 16,
        "delay_s": 0.0009,
        "failed": False,
    }
    assert bad["failed"] and bad["ttft_s"] is None and bad["id"] == "a-2"


def test_guidellms_report_is_read_as_claims_with_its_errors():
    body = {"prompt": "w0 w7"}
    good = guidellm_row(
        7e9 + 0.25,
        7e9,
        time_to_first_token_ms=51.0,
        inter_token_latency_ms=9.1,
        request_args=json.dumps({"body": body}),
    )
    requests = {"successful": [good], "errored": [guidellm_row(8e9, -1.0)], "incomplete": None}
    result = clients.guidellm_claims({"benchmarks": [{"requests": requests}]})
    assert [claim["failed"] for claim in result] == [False, True]
    assert result[0]["ttft_s"] == 0.051 and result[0]["itl_s"] == pytest.approx(0.0091)
    # The same prompt as parts of a chat has the same name only where it is the same text.
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "w0 w7"}]}]}
    assert result[0]["prompt_key"] == prompt_key(body) == prompt_key(parts)
    assert result[1]["prompt_key"] is None
    assert [claim["delay_s"] for claim in result] == [0.25, None]  # -1 is no instant


@timed
def test_our_client_passes_in_the_table(tmp_path):
    scenario = Scenario((Behaviour(bundle=4),), requests=12)
    result = clients.measure(CLIENTS["ours"], Path(sys.executable), scenario, tmp_path / "run")
    checks = {check["name"]: check for check in result["checks"]}
    assert (
        "error" not in result and checks["requests"]["text"] == "12 told of, 12 seen by the server"
    )
    assert checks["itl_s"]["ok"] and checks["output_tokens"]["ok"]
    assert "arrivals" not in checks  # twelve are too few to test a law


def test_a_client_that_fails_has_a_row_with_its_error(tmp_path, monkeypatch):
    def broken(python, url, scenario, folder, log):
        clients._call([sys.executable, "-c", "import sys; sys.exit(3)"], folder, log, {})

    def hanging(python, url, scenario, folder, log):
        clients._call([sys.executable, "-c", "import time; time.sleep(60)"], folder, log, {})

    monkeypatch.setattr(clients, "RUN_LIMIT_S", 1.0)
    errors = []
    for name, run in (("broken", broken), ("hanging", hanging)):
        scenario = Scenario((Behaviour(),), requests=2)
        result = clients.measure(Client(name, run), Path(sys.executable), scenario, tmp_path / name)
        errors.append(result["error"])
    assert errors[0] == "RuntimeError: it ended with status 3"
    assert errors[1] == "RuntimeError: it did not end within 1 s"


def test_the_table_is_told_in_lines():
    check = {"name": "itl_s", "ok": False, "text": "median error at most -9.04%"}
    row = {"title": "GuideLLM", "version": "0.8.1"}
    row["scenarios"] = {"a": {"checks": [check]}, "b": {"checks": [], "error": "it broke"}}
    assert clients.lines({"clients": [row]}) == [
        "GuideLLM 0.8.1, a: itl_s is off: median error at most -9.04%",
        "GuideLLM 0.8.1, b: it broke",
    ]
    good = {
        "title": "ours",
        "version": None,
        "scenarios": {"a": {"checks": [{**check, "ok": True}]}},
    }
    assert clients.lines({"clients": [good]}) == ["every client passes every check"]


def test_the_tokenizer_that_clients_get_counts_words(tmp_path):
    folder = clients.tokenizer_folder(tmp_path / "tokenizer")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encoded = tokenizer.encode(clients.words_of(3))
    assert len(encoded.ids) == clients.PROMPT_TOKENS and 0 not in encoded.ids
    assert clients.words_of(3) != clients.words_of(4)


def test_each_client_but_ours_has_a_version_and_an_environment(tmp_path):
    assert {name for name, client in CLIENTS.items() if client.version is None} == {"ours"}
    assert clients.environment(CLIENTS["ours"], tmp_path) == Path(sys.executable)
    home = tmp_path / "aiperf" / "bin"
    home.mkdir(parents=True)
    (home / "python").touch()
    (home / "aiperf").touch()
    assert clients.environment(CLIENTS["aiperf"], tmp_path) == home / "python"
