"""Events, tokens and gaps of one answer, on bytes and stamps that a reader can follow."""

from __future__ import annotations

import json

import pytest

from lib.measure.serving import kinds, timing, window
from lib.measure.serving.stream import Stream, StreamError, usage_of


def event(**fields) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(content: str, finish: str | None = None, usage: int | None = None, **choice) -> bytes:
    fields = {"choices": [{"text": content, "finish_reason": finish, **choice}]}
    if usage is not None:
        fields["usage"] = {"prompt_tokens": 5, "completion_tokens": usage}
    return event(**fields)


def delta(**content) -> bytes:
    return event(choices=[{"delta": content, "finish_reason": None}])


def total(tokens: int) -> bytes:
    return event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": tokens})


def fed(*reads: tuple[float, bytes]) -> Stream:
    stream = Stream()
    for read_s, data in reads:
        stream.feed(data, read_s)
    stream.end()
    return stream


def row(stream: Stream, scheduled_s: float = 0.0, sent_s: float = 0.0) -> dict:
    return {
        "scheduled_s": scheduled_s,
        "sent_s": sent_s,
        "end_s": 9.0,
        "event_s": stream.event_s,
        "event_channels": "".join(stream.channels),
        "event_tokens": stream.tokens,
        "usage": usage_of(stream.usage),
        "failure": None,
        "asked": {"output_tokens": None},
        "chunks": stream.chunks,
    }


def figure(name: str, row: dict) -> float | None:
    """A latency of a row, by its facts."""
    return getattr(window, name)(timing.fact(row))


def test_a_role_is_no_token_and_reasoning_is_one():
    """TTFT is to the first token of any channel, the visible one comes after the reasoning."""
    stream = fed(
        (1.0, delta(role="assistant", content="")),
        (2.0, delta(reasoning_content="hm")),
        (3.0, delta(tool_calls=[{"index": 0}])),
        (4.0, delta(content="yes")),
        (5.0, total(3)),
    )
    result = row(stream, scheduled_s=0.5)
    assert result["event_channels"] == "rtc"
    assert figure("ttft_s", result) == 1.5 and figure("visible_s", result) == 3.5


def test_latency_counts_from_the_scheduled_instant_and_the_delay_stands_beside_it():
    result = row(fed((3.0, text("a")), (3.0, total(1))), scheduled_s=1.0, sent_s=2.5)
    assert figure("ttft_s", result) == 2.0 and figure("delay_s", result) == 1.5
    assert figure("latency_s", result) == 8.0


def test_a_chunk_is_not_a_token():
    """Two chunks of two tokens, 20 ms apart: one gap of 10 ms a token, as the tokens were made."""
    stream = fed(
        (1.00, text("a b", usage=2)),
        (1.02, text("c d", usage=4)),
        (1.02, total(4)),
    )
    result = row(stream)
    assert timing.tokens_of_events(result) == [2, 2]
    assert figure("tpot_s", result) == pytest.approx(0.010)
    assert timing.gaps_s(result) == []  # those inside a chunk were not seen


def test_gaps_before_single_tokens_are_seen_and_those_inside_a_chunk_are_missing():
    stream = fed(
        (1.00, text("a", usage=1)),
        (1.01, text("b", usage=2)),
        (1.04, text("c d e", usage=5)),
        (1.06, text("f", usage=6)),
        (1.06, total(6)),
    )
    result = row(stream)
    assert timing.gaps_s(result) == pytest.approx([0.01, 0.02])
    assert figure("tpot_s", result) == pytest.approx(0.06 / 5)


def test_events_of_one_read_have_one_instant():
    """Two events joined in one write: the first read brought two tokens."""
    stream = fed((1.0, text("a", usage=1) + text("b", usage=2)), (1.3, text("c", usage=3)))
    stream.usage = {"prompt_tokens": 5, "completion_tokens": 3}
    assert timing.reads_of_tokens(row(stream)) == [(1.0, 2), (1.3, 1)]
    assert figure("tpot_s", row(stream)) == pytest.approx(0.3)


def test_without_counts_as_many_events_as_tokens_are_one_each():
    stream = fed((1.0, text("a")), (1.5, text("b")), (2.5, text("c", "length", usage=3)))
    assert stream.tokens == [None, None, None]  # a total at the end tells of no chunk
    assert timing.tokens_of_events(row(stream)) == [1, 1, 1]
    assert figure("tpot_s", row(stream)) == 0.75


def test_chunks_of_unknown_size_have_no_itl():
    stream = fed((1.0, text("a")), (1.5, text("b")), (1.6, total(6)))
    assert figure("tpot_s", row(stream)) is None
    assert timing.credits(row(stream)) == [(1.0, 3.0), (1.5, 3.0)]  # spread evenly


def test_counts_that_do_not_add_up_to_the_usage_are_not_believed():
    stream = fed((1.0, text("a", usage=1)), (1.5, text("b", usage=2)), (1.6, total(5)))
    assert timing.tokens_of_events(row(stream)) is None


def test_token_ids_count_without_any_text():
    stream = fed(
        (1.0, text("", token_ids=[7])),
        (1.2, text("", token_ids=[8, 9])),
        (1.2, total(3)),
    )
    result = row(stream)
    assert result["event_channels"] == "ii" and result["event_tokens"] == [1, 2]
    assert figure("ttft_s", result) == 1.0 and figure("visible_s", result) is None
    assert figure("tpot_s", result) == pytest.approx(0.1)


def test_a_count_that_rises_without_text_is_a_token_held_back():
    """Half a character: the server counts it and shows nothing yet."""
    stream = fed((1.0, text("", usage=1)), (1.2, text("é", usage=2)), (1.3, total(2)))
    assert row(stream)["event_channels"] == "hc" and figure("ttft_s", row(stream)) == 1.0


def test_a_single_token_that_is_not_shown_came_with_the_end():
    """An answer of one token without text, as a server without a tokenizer sends it."""
    stream = fed((1.0, text("", "length", usage=1)), (1.0, total(1)))
    assert row(stream)["event_channels"] == "h" and figure("ttft_s", row(stream)) == 1.0


def test_no_token_has_no_ttft():
    stream = fed((1.0, text("", "stop")), (1.0, total(0)))
    result = row(stream)
    assert figure("ttft_s", result) is None and figure("tpot_s", result) is None
    assert stream.complete and timing.fact(result)["output_tokens"] == 0


def test_one_token_has_no_gap():
    result = row(fed((1.0, text("a", usage=1)), (1.0, total(1))))
    assert figure("tpot_s", result) is None and timing.fact(result)["first_tokens"] == 1


def test_an_event_counts_from_the_read_that_ends_it():
    data = text("a", usage=1)
    stream = fed((1.0, data[:10]), (2.0, data[10:-1]), (3.0, data[-1:]), (3.0, total(1)))
    assert stream.event_s == [2.0]  # its line ended in the second read


@pytest.mark.parametrize(
    "data, failure_class, words",
    [
        (b"data: {no json\n\n", "malformed", "no JSON"),
        (b"hello\n", "malformed", "no server-sent event"),
        (b"data: [1]\n", "malformed", "no object"),
        (b'data: {"choices": [3]}\n', "malformed", "another form"),
        (b'data: {"error": {"message": "out of memory"}}\n', "error_event", "out of memory"),
        (b"data: {", "malformed", "stops inside a line"),
    ],
)
def test_a_stream_that_is_none_says_so(data, failure_class, words):
    with pytest.raises(StreamError, match=words) as caught:
        fed((1.0, data))
    assert caught.value.failure_class == failure_class


def usage_event(**usage) -> bytes:
    return event(choices=[], usage={"prompt_tokens": 8, "completion_tokens": 2, **usage})


END = text("", finish="length")
SAYS_IT_FAILED = [
    (b'event: error\ndata: {"message": "boom", "code": 500}\n\n', "error_event", "says: boom"),
    (b"event: error\ndata: boom\n\n", "error_event", "says: boom"),
    (event(object="error", message="boom"), "error_event", "says: boom"),
    (event(error="boom"), "error_event", "says: boom"),
]
CANNOT_BE = [
    (b"data: " + b"[" * 100_000 + b"\n\n", "malformed", "no JSON"),
    (b'data: {"choices": [],\n\n', "malformed", "no JSON"),
    (b"data: " + b"x" * 2**22, "malformed", "a line of over"),
    (END + text("late"), "malformed", "text after the end"),
    (b"data: [DONE]\n\n" + text("late"), "malformed", "text after the end"),
    (event(model="a") + event(model="b"), "wrong_model", "by model 'a', and then by 'b'"),
    (event(model={"a": 1}), "malformed", "another form"),
    (event(model=3), "malformed", "another form"),
    (text("", finish=float("nan")), "malformed", "another form"),
    (event(usage=[1]), "malformed", "another form"),
    (usage_event(prompt_tokens_details=3), "malformed", "another form"),
    (usage_event(prompt_tokens_details={"cached_tokens": 9}), "malformed", "with 9 cached"),
    *((usage_event(completion_tokens=n), "malformed", "usage whose output_tokens are")
      for n in (-1, 2.0, "2", True, float("nan"))),
]  # fmt: skip


@pytest.mark.parametrize("data, failure_class, words", [*SAYS_IT_FAILED, *CANNOT_BE])
def test_what_an_answer_cannot_say_has_a_reason(data, failure_class, words):
    with pytest.raises(StreamError, match=words) as caught:
        fed((1.0, data))
    assert caught.value.failure_class == failure_class


def test_an_event_may_have_several_lines_and_a_last_line_no_end():
    """As the format allows: a mark of the byte order, any line ends, an event on two lines."""
    head, tail = text("a", usage=1).split(b", ", 1)
    data = b"\xef\xbb\xbf" + head + b",\r\ndata: " + tail + b"data\n\n" + total(1)
    stream = fed((1.0, data), (2.0, b"data: [DONE]"))
    assert stream.done and stream.event_s == [1.0] and stream.usage["completion_tokens"] == 1


def test_characters_that_reads_cut_are_whole_again():
    data = 'data: {"choices": [{"text": "\N{SNOWMAN}"}]}\n\n'.encode()
    stream = fed(*((float(n), data[n : n + 1]) for n in range(len(data))))
    assert stream.channels == ["c"] and stream.event_s == [len(data) - 2]


def test_tokens_that_were_never_shown_came_with_the_end():
    """The usage counts two, and no event had text: they have a time, and count for throughput."""
    result = row(fed((1.0, END), (2.0, total(2))))
    assert timing.credits(result) == [(1.0, 2.0)] and figure("ttft_s", result) == 1.0
    assert figure("visible_s", result) is None


def test_a_count_that_falls_is_not_believed():
    result = row(fed((1.0, text("a", usage=3)), (2.0, text("b", usage=2)), (2.0, total(2))))
    assert result["event_tokens"] == [3, None]
    assert all(count >= 0 for _, count in timing.credits(result))


def test_comments_and_other_fields_of_a_stream_are_passed_over():
    stream = fed((1.0, b": ping\nevent: message\r\nid: 3\r\n\r\n" + b"data: [DONE]\r\n\r\n"))
    assert stream.done and not stream.event_s


def test_cached_and_reasoning_tokens_are_kept_and_absent_ones_are_none():
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": None}
    assert usage_of(usage)["cached_tokens"] is None
    usage["prompt_tokens_details"] = {"cached_tokens": 6}
    usage["completion_tokens_details"] = {"reasoning_tokens": 3}
    result = usage_of(usage)
    assert (result["cached_tokens"], result["reasoning_tokens"]) == (6, 3)
    assert timing.computed_prompt_tokens({"usage": result}) == 3


def test_silence_is_the_longest_time_in_which_nobody_got_anything():
    at = window.Window(1.0, 3.0, "all")
    rows = [
        {"scheduled_s": 0.0, "read_s": [0.9, 1.1, 2.6], "end_s": 2.6},
        {"scheduled_s": 0.0, "read_s": [1.4, 2.0, 3.5], "end_s": 3.5},
    ]
    assert timing.silence_s(rows, at) == pytest.approx(0.6)  # from 1.4 to 2.0, and 2.0 to 2.6
    assert timing.silence_s([], at) == 0.0


def test_silence_while_nobody_waits_is_none():
    """Of the 1.5 s between two answers the second request waited for 0.3 s."""
    at = window.Window(1.0, 4.0, "all")
    rows = [
        {"scheduled_s": 0.5, "read_s": [1.4, 1.5], "end_s": 1.5},
        {"scheduled_s": 2.7, "read_s": [3.0, 3.2], "end_s": 3.2},
    ]
    assert timing.silence_s(rows, at) == pytest.approx(0.4)  # from 1.0 to 1.4
    assert timing.silence_s(rows[1:], at) == pytest.approx(0.3)


def test_each_kind_of_server_is_asked_in_its_own_way():
    vllm = kinds.body("vllm", "completions", "m", (1, 2), 8)
    assert vllm["prompt"] == [1, 2] and vllm["ignore_eos"] and vllm["min_tokens"] == 8
    assert vllm["stream_options"]["continuous_usage_stats"]
    other = kinds.body("transformers", "completions", "m", "a b", 8)
    assert not {"ignore_eos", "min_tokens", "stream_options"} & other.keys()
    config = json.loads(other["generation_config"])
    assert config["max_new_tokens"] == config["min_new_tokens"] == 8
    chat = kinds.body("openai", "chat", "m", "a b", 8)
    assert chat["messages"] == [{"role": "user", "content": "a b"}]
    for body in (vllm, other, chat):
        assert body["stream"] and body["temperature"] == 0 and body["max_tokens"] == 8


def test_what_a_kind_cannot_do_is_refused_in_words():
    with pytest.raises(ValueError, match="takes no token ids"):
        kinds.body("transformers", "completions", "m", (1, 2), 8)
    with pytest.raises(ValueError, match="unknown kind of server 'triton'.*vllm"):
        kinds.kind("triton")
