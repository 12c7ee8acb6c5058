"""A trained model behind `transformers serve`, over loopback: `make serve-check`.

Starts the server, checks that it keeps lengths, loads it with one user, two users and a slow rate,
and says what came of it. A smoke test of everything that a GPU would use, on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lib.hardware.device import CpuDevice
from lib.measure.serving import reading, server, sweep, timing
from lib.measure.serving.arrivals import Lengths, Load
from lib.measure.serving.plan import Cell
from lib.measure.serving.server import EndpointError
from lib.models.origin import files, find
from lib.records import record
from lib.records.record import Record

# Slow enough for a small model on two processors.
LOADS = (Load("closed", 1), Load("closed", 2), Load("fixed", 0.25))
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 8


def run(model: str, out: Path, *, continuous_batching: bool, window_s: float) -> list[Record]:
    """The records of every load; raises EndpointError where the server is not right."""
    from transformers import AutoTokenizer

    origin = find(model)
    folder, _ = files(origin)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = CpuDevice()
    with server.start(
        "transformers",
        str(folder),
        options=("--device", "cpu", "--dtype", "float32"),
        log=out / "server.log",
        continuous_batching=continuous_batching,
        tokenizer=tokenizer,
    ) as served:
        row = server.check(served.endpoint, prompt_tokens=48, output_tokens=16, timeout_s=120.0)
        values = {**served.values, "check_chunks": row["chunks"], "check_reads": len(row["read_s"])}
        values["check_itl_s"], _ = timing.mean_itl_s(row)
        session = sweep.Session(
            served.endpoint,
            out / "records.jsonl",
            device,
            0,
            None,
            {"model": origin.name, "weights": "checkpoint"},
            values,
            timeout_s=120.0,
        )
        shape = Lengths(PROMPT_TOKENS), Lengths(OUTPUT_TOKENS)
        cells = [Cell(load, *shape, warmup_s=3.0, window_s=window_s) for load in LOADS]
        return sweep.sweep(session, cells)


def lines(rows: Sequence[Record]) -> Iterator[str]:
    """What a reader sees: one line a load."""
    for row in rows:
        name = reading.load(row).label if row.error is None else row.key["batch"]
        if row.error:
            yield f"{name}: {row.error}"
            continue
        first, each = reading.tail(row, "ttft_s", 50), reading.tail(row, "tpot_s", 50)
        shown = [
            "no figure" if tail.estimate.value is None else f"{tail.estimate.value * 1e3:.1f} ms"
            for tail in (first, each)
        ]
        rate = reading.tokens_per_s(row).value
        yield (
            f"{name}: TTFT {shown[0]}, TPOT {shown[1]} (medians of {first.of - first.failed}), "
            f"{rate:.1f} output tokens/s, {first.failed} of {first.of} failed"
            + "".join(f"; {w['code']}: {w['text']}" for w in row.warnings)
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 2 where the server cannot be started, 1 where a load failed."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.measure.serving.serve_check", description=__doc__
    )
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--window-s", type=float, default=30.0)
    parser.add_argument("--continuous-batching", action="store_true")
    args = parser.parse_args(argv)
    try:
        rows = run(
            args.model,
            args.out,
            continuous_batching=args.continuous_batching,
            window_s=args.window_s,
        )
    except (EndpointError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    values = rows[0].values
    batching = "on" if values["continuous_batching"] else "off"
    sys.stderr.write(
        f"transformers {values['server_version']}, continuous batching {batching}; 16 tokens came "
        f"in {values['check_chunks']} chunks and {values['check_reads']} reads\n"
    )
    for line in lines(rows):
        sys.stderr.write(line + "\n")
    return 1 if any(row.error for row in record.select(rows, reading.KIND)) else 0


if __name__ == "__main__":
    sys.exit(main())
