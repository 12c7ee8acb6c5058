"""A synthetic tree of results whose numbers can be checked with a pencil.

With f = 1, 2, 4 for GPT-OSS-20B, Qwen3-32B and Yi-34B, every median is exact:
- TTFT = f x context / 20,480 s, so 100 f ms at 2,048 tokens of context;
- end-to-end = TTFT + 0.01 f x new tokens, so 0.74 f s at 2,048/64, and 100/f tok/s of decode;
- energy of a call = 0.64 kJ x f for 64 tokens, so 10,000 f J per 1,000 tokens;
- peak memory = 43,000, 64,500 and 86,000 MiB, so GPT-OSS needs 1/3 and 1/2 less.
Samples lie at 0, +-1, ... +-5 % around the median (n = 11).
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
from nbformat import v4

from lib.records.record import KEY_FIELDS, Record, environment_record, warning
from lib.records.store import append
from lib.stacks.registry import STACKS

MIB = 2**20
FACTORS = {"gpt-oss-20b": 1, "qwen3-32b": 2, "yi-34b": 4}
PEAK_MIB = {"gpt-oss-20b": 43000, "qwen3-32b": 64500, "yi-34b": 86000}
ACTIVE = {"gpt-oss-20b": 4_000_000_000, "qwen3-32b": 32_000_000_000, "yi-34b": 34_000_000_000}
GPU = {
    "device": "cuda", "gpu": "NVIDIA H100 80GB HBM3", "driver": "580.1", "cuda": "13.0",
    "cpu": "Test CPU", "packages": {"torch": "2.11.0", "transformers": "5.17.0"},
}  # fmt: skip
CPU = {
    "device": "cpu", "gpu": None, "driver": None, "cuda": None, "cpu": "Test CPU",
    "packages": {"torch": "2.13.0", "transformers": "5.17.0"},
}  # fmt: skip
SVG = (
    "<svg xmlns='http://www.w3.org/2000/svg' onload='document.title=\"owned\"'>"
    "<circle r='5'/></svg>"
)
XSS = '<script>document.title="owned"</script><img src=x onerror=\'document.title="owned"\'>'


def spread(median: float, n: int = 11) -> list[float]:
    """n values at 0, +-1 %, ... around the median, in a shuffled but fixed order."""
    half = n // 2
    values = [median * (1 + k / 100) for k in range(-half, half + 1)]
    return values[::2] + values[1::2]


def key(model: str, **changes: Any) -> dict[str, Any]:
    """All key fields of an arm."""
    experts = "grouped_mm" if "oss" in model or "moe" in model else "none"
    base = {
        "model": model,
        "weights": "random",
        "dtype": "bfloat16",
        "stack": "hf-eager",
        "experts": experts,
        "attention": "sdpa",
        "cache": "dynamic",
        "batch": 1,
        "context": 2048,
        "new_tokens": 64,
        "decoding": "greedy",
        "engine": None,
    }
    return dict.fromkeys(KEY_FIELDS) | base | changes


def source(model: str) -> dict[str, Any]:
    """Where the weights come from, as every record says."""
    return {"model_source": "random (seed 0)", "model_revision": None, "loaded_dtype": "bfloat16"}


def ttft_s(model: str, context: int) -> float:
    return FACTORS.get(model, 1) * context / 20480


def e2e_s(model: str, context: int, new_tokens: int) -> float:
    return ttft_s(model, context) + 0.01 * FACTORS.get(model, 1) * new_tokens


def card(model: str, env_id: str) -> Record:
    experts = 32 if "oss" in model else 0
    values = {
        "total_params": 21_000_000_000,
        "active_params": ACTIVE.get(model, 34_000_000),
        "weight_bytes": 40_000 * MIB,
        "experts": experts,
    }
    return Record("card", {"model": model}, values=values | source(model), env_id=env_id)


def latency(model: str, env_id: str, contexts: Sequence[int]) -> list[Record]:
    rows = []
    for context in contexts:
        k = key(model, context=context, new_tokens=1)
        rows.append(
            Record(
                "latency",
                k,
                {"ttft_s": spread(ttft_s(model, context))},
                source(model),
                env_id=env_id,
            )
        )
        for tokens in (64, 128):
            k = key(model, context=context, new_tokens=tokens)
            e2e = spread(e2e_s(model, context, tokens))
            rows.append(
                Record(
                    "latency",
                    k,
                    {"e2e_s": e2e, "warmup_s": [9.0]},
                    source(model),
                    warnings=(warning("spread", "raise the repeats (now 11)"),) * (tokens == 128),
                    env_id=env_id,
                )
            )
        step = 0.01 * FACTORS.get(model, 1)
        stamps = [[ttft_s(model, context) + i * step for i in range(64)] for _ in range(2)]
        rows.append(
            Record(
                "itl",
                key(model, context=context),
                {"token_s": stamps},
                source(model),
                env_id=env_id,
            )
        )
    return rows


def memory(model: str, env_id: str, contexts: Sequence[int], *, gpu: bool = True) -> list[Record]:
    rows = []
    for kind in ("memory-paper", "memory"):
        for context in contexts:
            peak = PEAK_MIB.get(model, 4000) * MIB - (2048 - context) * MIB
            values = {
                "peak_bytes": peak,
                "baseline_bytes": peak - 1000 * MIB,
                "kv_tensor_bytes": 400 * MIB,
                "kv_card_bytes": 400 * MIB,
                "logits_bytes": 500 * MIB,
                "workspace_bytes": 100 * MIB,
                "memory_source": "cuda allocator" if gpu else "process resident set",
            }
            missing = {} if gpu else {"reserved_bytes": "the resident set does not report it"}
            if gpu:
                values["reserved_bytes"] = peak + 200 * MIB
            rows.append(
                Record(
                    kind,
                    key(model, context=context),
                    {},
                    values | source(model),
                    missing,
                    env_id=env_id,
                )
            )
    return rows


def energy(model: str, env_id: str, contexts: Sequence[int], *, gpu: bool = True) -> list[Record]:
    rows = []
    for context in contexts:
        e2e, joules = e2e_s(model, context, 64), 640.0 * FACTORS.get(model, 1)
        samples = {"e2e_s": spread(e2e)}
        values, missing = {"window_energy_j": 4000.0, "window_s": 10.0, "idle_w": 75.0}, {}
        if gpu:
            samples |= {"energy_j": spread(joules), "paper_energy_j": spread(joules * 0.9)}
        else:
            reason = "no NVML energy counter: the device is a CPU"
            values, missing = {}, dict.fromkeys(("energy_j", "paper_energy_j", "idle_w"), reason)
        rows.append(
            Record(
                "energy",
                key(model, context=context),
                samples,
                values | source(model),
                missing,
                env_id=env_id,
            )
        )
    return rows


def ablations(model: str, env_id: str, contexts: Sequence[int]) -> list[Record]:
    base = e2e_s(model, 512, 64)

    def row(kind: str, seconds: float | None, error: str | None = None, **changes: Any) -> Record:
        k = key(model, **({"context": 512} | changes))
        samples = {} if seconds is None else {"e2e_s": spread(seconds)}
        return Record(f"ablation-{kind}", k, samples, source(model), error=error, env_id=env_id)

    slower = {
        "greedy": 1.0,
        "temperature 0.7 top-p 0.9": 1.25,
        "temperature 0.7 top-k 50": 1.0,
        "temperature 1.0 top-p 0.95": 1.02,
        "temperature 0.3 top-p 0.8": 1.02,
    }
    mismatch = "RuntimeError: expected scalar type BFloat16 but found Half"
    return [
        *(row("decoding", base * f, decoding=name) for name, f in slower.items()),
        *(row("context", e2e_s(model, c, 64), context=c) for c in contexts if c >= 512),
        row("precision", base),
        row("precision", None, mismatch, dtype="float16"),
        row("precision", base * 2, dtype="float32"),
        *(row("experts", base * f, experts=e) for e, f in (("grouped_mm", 1), ("loop", 3))),
        row("stack", base),
    ]


def captured(model: str, env_id: str, stack: str = "graph") -> list[Record]:
    """Calls on a captured step at 2,048 tokens: 2 f^2 ms a token, so 500, 125 and 31.25 tok/s."""
    rows = []
    for tokens in (1, 64, 128):
        seconds = ttft_s(model, 2048) + 0.002 * FACTORS[model] ** 2 * tokens * (tokens > 1)
        name = "ttft_s" if tokens == 1 else "e2e_s"
        rows.append(
            Record(
                "latency",
                key(model, stack=stack, new_tokens=tokens, cache="static"),
                {name: spread(seconds)},
                source(model),
                env_id=env_id,
            )
        )
    return rows


def trace(model: str, env_id: str) -> Record:
    """A decode step that uses 4 times the nominal parameters where there are experts.

    It reads 10 GB x f, so that the bytes allow GPT-OSS 2 and 4 times the others' throughput, and 8
    and 16 times by its architecture.
    """
    active, size, more = ACTIVE[model], 10_000_000_000 * FACTORS[model], 4 if "oss" in model else 1
    values = {
        "active_params_nominal": active,
        "active_params_realised": active * more,
        "decode_bytes": size // more,
        "decode_bytes_realised": size,
    }
    return Record("trace", key(model, new_tokens=None), {}, values | source(model), env_id=env_id)


def all_experts(env_id: str) -> list[Record]:
    """GPT-OSS with every expert computed: calls take 1.5 times as long, and 1,000 MiB more."""
    model, changed = "gpt-oss-20b", {"experts": "all_experts"}
    rows = []
    for row in (*latency(model, env_id, (2048,)), *memory(model, env_id, (2048,))):
        samples = {n: [1.5 * x for x in s] if n == "e2e_s" else s for n, s in row.samples.items()}
        values = dict(row.values)
        if "peak_bytes" in values:
            values["peak_bytes"] += 1000 * MIB
        rows.append(Record(row.kind, row.key | changed, samples, values, env_id=env_id))
    return rows


def every_expert(rows: Sequence[Record]) -> list[Record]:
    """The same rows with every expert computed, as the paper's software did."""
    other = {"grouped_mm": "all_experts"}
    return [
        replace(r, key=r.key | {"experts": other.get(r.key["experts"], r.key["experts"])})
        if "experts" in r.key
        else r
        for r in rows
    ]


def as_the_paper(rows: Sequence[Record]) -> list[Record]:
    """The same rows with every expert computed and no warning."""
    return [replace(r, warnings=()) for r in every_expert(rows)]


def png(width: int = 640, height: int = 280) -> str:
    """A small picture as base64: a diagonal band."""
    line = [
        b"\x00" + bytes(230 if abs(x * height - y * width) > 6000 else 60 for x in range(width))
        for y in range(height)
    ]

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(line), 9))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")).decode()


def notebook(
    title: str, *, hostile: bool = False, error: str | None = None
) -> nbformat.NotebookNode:
    """An executed notebook: Markdown with a formula, folded code, a table, a figure, noise."""
    table = (
        "<style>.x{color:red}</style><table border='1' class='dataframe'><thead><tr><th></th>"
        "<th>context</th><th>TTFT (ms)</th></tr></thead><tbody><tr><th>0</th><td>512</td>"
        "<td>25.0</td></tr><tr><th>1</th><td>2048</td><td>100.0</td></tr></tbody></table>"
    )
    outputs = [
        v4.new_output(
            "stream", name="stderr", text="Kernel is running over TCP without encryption\n"
        ),
        v4.new_output(
            "execute_result", {"text/html": table, "text/plain": "table"}, execution_count=2
        ),
        v4.new_output(
            "display_data",
            {"image/png": png(), "text/plain": "<Figure>"},
            metadata={"image/png": {"alt": "Diagonal band: time grows with context"}},
        ),
        v4.new_output("stream", name="stdout", text="wide " * 60 + "\n"),
    ]
    if hostile:
        outputs += [
            v4.new_output("display_data", {"text/html": XSS + "</div></div></main><h1>out</h1>"}),
            v4.new_output("display_data", {"text/markdown": f"model says {XSS} [x](javascript:1)"}),
            v4.new_output("display_data", {"application/javascript": "document.title='owned'"}),
            v4.new_output("stream", name="stdout", text=XSS),
            v4.new_output("display_data", {"image/svg+xml": SVG}),
        ]
    if error:
        outputs.append(
            v4.new_output(
                "error",
                ename="RuntimeError",
                evalue=error,
                traceback=[f"\x1b[31mRuntimeError\x1b[0m: {error}"],
            )
        )
    danger = f"\n\n{XSS}\n\n<iframe src='https://example.org'></iframe>" if hostile else ""
    cells = [
        v4.new_markdown_cell(
            f"# {title}\n\n**Question.** How long does one call take? "
            "Throughput is $\\frac{g}{t_g}$ and costs $5." + danger
        ),
        v4.new_code_cell(
            'model = "sample"  # which model\nrepeats = 11',
            metadata={"tags": ["parameters"]},
            execution_count=1,
        ),
        v4.new_markdown_cell("## Result\n\n$$A = \\frac{1}{N}\\sum_i x_i$$"),
        v4.new_code_cell("rows.show()  # " + "long " * 40, outputs=outputs, execution_count=2),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    return v4.new_notebook(cells=cells, metadata=metadata)


def write_job(
    root: Path,
    path: str,
    records: Sequence[Record],
    env: dict[str, Any],
    *,
    status: str = "ok",
    end: str = "2026-11-24T10:31:02.000+00:00",
    model: str | None = None,
    error: str | None = None,
    hostile: bool = False,
    with_notebook: bool = True,
) -> Path:
    """One job's folder: run.json, records.jsonl and notebook.ipynb."""
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for row in (environment_record(env), *records):
        append(folder / "records.jsonl", row)
    name = path.split("/")[-1]
    stack = next((s for s in STACKS if path.rpartition("/")[0].endswith(s)), "hf-eager")
    if with_notebook:
        nb = notebook(f"{name} of {model}", hostile=hostile, error=error)
        nbformat.write(nb, folder / "notebook.ipynb")
    manifest = {
        "status": status,
        "attempt": 1,
        "start": "2026-11-24T10:00:00+00:00",
        "end": end,
        "parameters": {"model": model or path.split("/")[0], "weights": "random", "stack": stack},
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "artefacts": [],
        "error": {"name": "RuntimeError", "value": error, "cell": 4} if error else None,
    }
    (folder / "run.json").write_text(json.dumps(manifest))
    return folder


def write_paper(root: Path, *, hostile: bool = False, without: Sequence[str] = ()) -> Path:
    """The paper's three models on an H100: 16 jobs ran, one of them failed, one is missing."""
    env_id = environment_record(GPU).env_id
    contexts, planned = (128, 512, 1024, 2048), []
    for model in FACTORS:
        rows = {
            "latency": [card(model, env_id), *latency(model, env_id, contexts)],
            "memory": memory(model, env_id, contexts),
            "energy": energy(model, env_id, contexts),
            "ablations": ablations(model, env_id, (*contexts, 4096)) if "oss" in model else [],
            "ape": [],
        }
        for name, records in rows.items():
            path = f"{model}/random-hf-eager/{name}"
            planned.append(path)
            if name in without or (model, name) == ("yi-34b", "ape"):
                continue
            failed = "CUDA out of memory" if (model, name) == ("yi-34b", "ablations") else None
            write_job(
                root,
                path,
                every_expert(records),
                GPU,
                model=model,
                error=failed,
                hostile=hostile,
                status="failed" if failed else "ok",
            )
    planned.append("_all/summary")
    write_job(root, "_all/summary", [], GPU, model="_all", end="2026-11-24T11:02:00+00:00")
    (root / "plan.json").write_text(json.dumps({"jobs": planned}))
    return root


def write_demo(root: Path, models: Sequence[str] = ("demo-moe", "demo-dense")) -> Path:
    """Scaled-down models on a CPU: no energy, no model of the paper."""
    env_id = environment_record(CPU).env_id
    for model in models:
        where = f"{model.replace('/', '--')}/random-hf-eager"
        rows = [card(model, env_id), *latency(model, env_id, (64, 128))]
        write_job(root, f"{where}/latency", rows, CPU, model=model)
        rows = memory(model, env_id, (64, 128), gpu=False)
        write_job(root, f"{where}/memory", rows, CPU, model=model)
        rows = energy(model, env_id, (64, 128), gpu=False)
        write_job(root, f"{where}/energy", rows, CPU, model=model)
    return root
