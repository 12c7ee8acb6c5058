"""What `make fit` predicts, beside rows whose numbers are round; and the figure of the bound."""

import pytest

from lib.analysis import bounds, predictions
from lib.records.record import Record, environment_record
from lib.show import figure
from tests.analysis.test_bounds import CARD, card_row, lines, rows
from tests.samples.records import GPU, key, write_job

H100 = environment_record(GPU)


def memory(source="cuda allocator", context=4):
    values = {"baseline_bytes": 3000, "kv_tensor_bytes": 96, "memory_source": source}
    return Record("memory", key("m", context=context, new_tokens=3), {}, values, env_id=H100.env_id)


def study(*more):
    calls = rows(0.02, decode_bytes=33.5e9, context=4, env=H100)
    return [H100, card_row(H100), *calls, *more]


def test_weights_cache_and_decode_beside_their_predictions():
    (line,) = lines(predictions.table(study(memory())))
    assert line["weights, predicted (GB)"] == 2400 / 1e9
    assert line["weights, measured (GB)"] == 3000 / 1e9
    # Six tokens are cached: six in the full layer, two in the other, six numbers of two bytes each.
    assert line["cache, predicted (MB)"] == (6 + 2) * 6 * 2 / 1e6
    assert line["cache, measured (MB)"] == 96 / 1e6
    limit = 3.35e12 / CARD.decode_bytes(4)
    assert line["decode limit, predicted (tok/s)"] == pytest.approx(limit, rel=1e-3)
    assert line["decode, measured (tok/s)"] == pytest.approx(50)


def test_on_a_cpu_the_weights_are_not_measured():
    (line,) = lines(predictions.table(study(memory("torch CPU allocator"))))
    assert "on a CPU the baseline is the card's own count" in line["missing"]


def test_what_was_not_measured_says_so_and_no_card_means_no_row():
    (line,) = lines(predictions.table(study()))
    assert "no memory row" in line["missing"] and line["decode, measured (tok/s)"]
    assert predictions.table([H100, memory()]).rows == ()
    assert predictions.table([]).notes == ()


def test_what_a_released_set_measured_is_told_in_a_line(tmp_path):
    records = [
        card_row(H100),
        *rows(0.02, context=4, env=H100),
        memory(),
        *rows(0.02, context=8, env=H100),
        memory(context=8),
    ]
    write_job(tmp_path / "a-set", "m/random-hf-eager/latency", records, GPU, model="m")
    (line,) = predictions.released_lines("m", tmp_path)
    assert line.startswith("measured in the released set a-set (weights random, dtype bfloat16")
    assert "8 tokens): weights 3e-06 GB (predicted 2.4e-06), cache " in line
    assert "decode 50.00 tok/s (a limit of " in line
    assert predictions.released_lines("another", tmp_path) == []
    only = [card_row(H100), memory()]
    write_job(tmp_path / "b-set", "n/random-hf-eager/memory", only, GPU, model="m")
    assert "weights" in predictions.released_lines("m", tmp_path)[1]
    assert not any(
        "decode -" in x or "- GB" in x for x in predictions.released_lines("m", tmp_path)
    )
    assert predictions.released_lines("m", tmp_path / "none") == []


def test_the_figure_draws_throughput_under_its_bound():
    env = environment_record({**GPU, "copy_bytes_per_s": 3.35e12})
    slow = rows(0.04, decode_bytes=33.5e9, context=8, env=env)
    fast = rows(0.02, decode_bytes=33.5e9, context=4, env=env)
    ax = bounds.figure([env, *fast, *slow, *rows(0.02, 33.5e9, context=4, env=env, stack="graph")])
    text = figure.describe(ax)
    assert "m (hf-eager): 50.00 at 4 to 25.00 at 8." in text
    assert "m (hf-eager), bound: 100.0 at 4 to 100.0 at 8." in text
    assert "m (graph): 50.00 at 4." in text
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("context (tokens)", "tokens per second")
    assert figure.describe(bounds.figure([])).endswith("not measured")


def test_an_interval_without_an_end_is_not_drawn():
    """Of 10 and 20 tokens some calls take as long: the slope may be zero, the rate anything."""
    noisy = [
        Record(
            r.kind,
            r.key,
            {"e2e_s": [1.1, 1.3, 1.5, r.samples["e2e_s"][0]]},
            r.values,
            env_id=r.env_id,
        )
        for r in rows(0.02, decode_bytes=33.5e9, context=4, env=H100)
    ]
    ax = bounds.figure([H100, *noisy, *rows(0.02, 33.5e9, context=8, env=H100)])
    (arm, _) = bounds.arms([H100, *noisy, *rows(0.02, 33.5e9, context=8, env=H100)])
    assert arm.steps_per_s.low is not None and arm.steps_per_s.high is None
    assert "m: " in figure.describe(ax)


def test_a_figure_as_html_carries_its_text_and_is_the_same_each_time():
    first, again = (figure.html(bounds.figure(study()), study()) for _ in range(2))
    assert first == again and "<svg" in first
    assert 'aria-label="Decode throughput under its bound; tokens per second against' in first
    assert "NVIDIA H100 80GB HBM3; random weights, bfloat16, hf-eager" in first
