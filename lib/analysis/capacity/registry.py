"""Predictions that are written down before anybody measures: one JSON file, once, and its reader.

    python -m lib.analysis.capacity.registry errors --date DAY     coefficients, errors
    python -m lib.analysis.capacity.registry register --date DAY   predictions, written once
    python -m lib.analysis.capacity.registry check outputs/predictions/FILE

The file holds all that a reader needs to judge it: date, commit, hashes of the rows and of the
question, coefficients with intervals, leave-one-out errors, the target, and every cell. It is never
written twice; `sealed` says whether it is still what was registered. The model itself is in
`model`; `learn` and `predict` are its two doors.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lib.analysis.capacity.fit import LEVEL, Miss, NotResolved
from lib.analysis.capacity.model import (
    EAGER,
    LAWS,
    RELEASED,
    Assumed,
    Capacity,
    Prediction,
    learn,
    memory,
    predict,
)
from lib.files import ROOT, read_yaml
from lib.hardware.datasheets import VALUES, datasheet, datasheets
from lib.models.card import ModelCard
from lib.records import store

__all__ = ["RELEASED", "learn", "predict", "register", "sealed"]

FOLDER = "outputs/predictions"
QUESTIONS = "params/predictions"
CODE = (
    "lib/analysis/capacity/registry.py", "lib/analysis/capacity/fit.py",
    "lib/analysis/capacity/model.py", "lib/models/card.py", "lib/stats.py", "params/gpus.yaml",
)  # fmt: skip
DIGITS = 5
METRIC_NAMES = {
    "decode_tok_per_s": "decode (tok/s)",
    "ttft_s": "TTFT (s)",
    "decode_j_per_1k": "J per 1,000 decoded",
    "call_j_per_1k": "J per 1,000, whole call",
}


class Registered(ValueError):
    """A registered file that exists, or that is not what was registered."""


def card_of(data: Mapping[str, Any]) -> ModelCard:
    """A model card from the question's entry; layers of one kind stand together there."""
    layers = tuple(
        (kind["elements"], kind["window"])
        for kind in data["kv_layers"]
        for _ in range(kind["layers"])
    )
    return ModelCard.from_dict({**data, "kv_layers": layers})


def cells_of(question: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every cell that is asked for: each context at batch 1, each batch at one context."""
    found = []
    for group in question["cells"]:
        shapes = [(context, 1) for context in group["contexts"]]
        shapes += [(group["batch_context"], batch) for batch in group["batches"]]
        for model in group["models"]:
            for stack in group["stacks"]:
                for context, batch in shapes:
                    found.append(
                        {
                            "set": group["set"], "gpu": group["gpu"], "model": model,
                            "form": group["form"], "stack": stack, "context": context,
                            "batch": batch,
                        }
                    )  # fmt: skip
    return found


def learned(question: Mapping[str, Any], root: Path = ROOT) -> Capacity:
    """The laws fitted to the question's rows and leads."""
    cards = {name: card_of(data) for name, data in question["cards"].items()}
    rows = store.load_tree(root / question["rows"])
    return learn(
        rows, question["gpu"], earlier=question["earlier"], leads=question["leads"], cards=cards,
        assumed=Assumed(**question["assumed"]),
    )  # fmt: skip


def build(question_file: Path, date: str, root: Path = ROOT) -> dict[str, Any]:
    """All that is registered, as JSON data. Numbers are rounded to five digits."""
    question = read_yaml(question_file)
    model = learned(question, root)
    cards = {name: card_of(data) for name, data in question["cards"].items()}
    gpus = dict.fromkeys([question["gpu"], *(g["gpu"] for g in question["cells"])])
    cells = []
    for cell in cells_of(question):
        cells += _lines(model, cards, cell, question["new_tokens"])
    known = [_compared(model, cards, item, question["new_tokens"]) for item in question["known"]]
    return {
        "schema": 1,
        "date": date,
        "git": _git(root),
        "level": LEVEL,
        "target": question["target"],
        "summary": summary(cells),
        "rows": _hashes(sorted((root / question["rows"]).rglob("records.jsonl")), root),
        "question": _hashes([question_file.resolve()], root)[0],
        "code": _hashes([root / name for name in CODE], root),
        "datasheets": {g: {n: getattr(datasheet(g), n) for n in VALUES} for g in gpus},
        "assumed": asdict(model.assumed),
        "idle_w": _round(model.idle_w),
        "joules_per_operation": _round(model.flop_j),
        "kernels_per_layer": [
            {"model_type": kind, "stack": stack, "kernels": _round(count)}
            for (kind, stack), count in sorted(model.kernels.by.items())
        ],
        "laws": laws(model),
        "leave_one_out": misses(model.misses),
        "cells": cells,
        "known_before": known,
        "earlier_visits": question["earlier"],
        "leads": question["leads"],
        "not_looked_at": question["not_looked_at"],
    }


def _lines(
    model: Capacity, cards: Mapping[str, ModelCard], cell: Mapping[str, Any], new_tokens: int
) -> list[dict[str, Any]]:
    card = cards[f"{cell['model']} {cell['form']}"]
    where = (cell["gpu"], cell["stack"], cell["context"], cell["batch"])
    found = predict(model, card, *where, form=cell["form"], new_tokens=new_tokens)
    need = memory(model, card, *where, new_tokens)
    held = {"holds": need.holds, "needed_gb": _round(need.needed_bytes / 1e9)}
    return [{**cell, **held, **_line(prediction)} for prediction in found.values()]


def _line(prediction: Prediction) -> dict[str, Any]:
    line: dict[str, Any] = {"metric": prediction.metric, "unit": prediction.unit}
    if prediction.value is None:
        line["missing"] = prediction.reason
        if prediction.step_alone:
            names = ("value", "low", "high")
            numbers = map(_round, prediction.step_alone)
            line["step_alone"] = dict(zip(names, numbers, strict=True))
        return line
    return line | {
        "value": _round(prediction.value),
        "low": _round(prediction.low),
        "high": _round(prediction.high),
        "half_width": _round(prediction.half_width, 3),
        "bound": prediction.bound,
        "notes": list(dict.fromkeys(prediction.notes)),
    }


def _compared(
    model: Capacity, cards: Mapping[str, ModelCard], item: Mapping[str, Any], new_tokens: int
) -> dict[str, Any]:
    card = cards[f"{item['model']} {item['form']}"]
    where = (item["gpu"], item["stack"], item["context"], item["batch"])
    found = predict(model, card, *where, form=item["form"], new_tokens=new_tokens)
    line = _line(found[item["metric"]])
    line["predicted"] = line.pop("value", None)
    line = {**item, **line}
    if line["predicted"] is not None:
        line["error"] = _round(line["predicted"] / item["value"] - 1, 3)
        line["covered"] = line["low"] <= item["value"] <= line["high"]
    return line


def laws(model: Capacity) -> dict[str, Any]:
    """Coefficients with intervals, sizes of what each law misses, and what is not resolved."""
    told: dict[str, Any] = {}
    for law, names in LAWS.items():
        if law not in model.fits:
            told[law] = {"missing": model.reasons.get(law, "no rows")}
            continue
        fitted, coefficients = model.fits[law], {}
        for name, (unit, meaning) in names.items():
            entry: dict[str, Any] = {"unit": unit, "meaning": meaning}
            try:
                value, low, high = map(_round, fitted.coefficient(name))
                entry |= {"value": value, "low": low, "high": high}
            except NotResolved as why:
                entry["missing"] = str(why)
            coefficients[name] = entry
        told[law] = {
            "rows": len(fitted.cells),
            "coefficients": coefficients,
            "log_sd": {name: _round(v, 3) for name, v in asdict(fitted.spread).items()},
            "residual_rms": _round(math.sqrt(float((fitted.residual**2).mean())), 3),
            "inflation": _round(fitted.inflate, 3),
            "degrees_of_freedom": fitted.freedom,
        }
    return told


def misses(found: Sequence[Miss]) -> list[dict[str, Any]]:
    """For each law and what was left out: errors, coverage and width of the predictions."""
    groups: dict[tuple[str, str], list[Miss]] = {}
    for miss in found:
        groups.setdefault((miss.law, miss.left_out), []).append(miss)
    told = []
    for (law, label), group in groups.items():
        line: dict[str, Any] = {"law": law, "left_out": label, "rows": len(group)}
        seen = [m for m in group if m.guess is not None]
        line["predicted"] = len(seen)
        if seen:
            errors = [abs(m.error) for m in seen]
            line |= {
                "median_error": _round(statistics.median(errors), 3),
                "largest_error": _round(max(errors), 3),
                "covered": sum(bool(m.covered) for m in seen),
                "median_half_width": _round(
                    statistics.median(_half(m.guess.interval()) for m in seen), 3
                ),
            }
        if reasons := sorted({m.reason for m in group if m.guess is None}):
            line["missing"] = "; ".join(reasons)
        told.append(line)
    return told


def _half(interval: tuple[float, float, float]) -> float:
    value, low, high = interval
    return (high - low) / 2 / value


def summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median half-widths of the cells with a value: all, by stack, by metric, by set."""

    def of(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        widths = [line["half_width"] for line in lines if "half_width" in line]
        found: dict[str, Any] = {"cells": len(widths)}
        if widths:
            found["median_half_width"] = _round(statistics.median(widths), 3)
            found["wider_than_15_percent"] = sum(w > 0.15 for w in widths)
        return found

    told = {
        "all": of(cells),
        "without hf-eager": of(c for c in cells if c["stack"] != EAGER),
        "not predicted": sum("missing" in c for c in cells),
    }
    for name in ("stack", "metric", "set"):
        told[f"by {name}"] = {
            value: of(c for c in cells if c[name] == value)
            for value in dict.fromkeys(c[name] for c in cells)
        }
    return told


def _round(value: float | None, digits: int = DIGITS) -> float | None:
    if value is None:
        return None
    if not math.isfinite(value):
        raise ValueError(f"{value} cannot be registered")
    return float(f"{value:.{digits}g}")


def _hashes(paths: Iterable[Path], root: Path) -> list[dict[str, str]]:
    return [
        {"file": str(p.relative_to(root)), "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in paths
    ]


def _git(root: Path) -> dict[str, Any]:
    def output(*arguments: str) -> str:
        made = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return made.stdout.strip()

    changed = output("status", "--porcelain", "--", "lib", "params", "outputs/released")
    return {"commit": output("rev-parse", "HEAD"), "changed_files": bool(changed)}


# --- files


def register(date: str, folder: Path | None = None, root: Path = ROOT) -> Path:
    """Write the predictions of a date: JSON, its hash, and a readable page. Never a second time."""
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise Registered(f"date {date!r}: give it as YYYY-MM-DD") from None
    question = root / QUESTIONS / f"{date}-capacity.yaml"
    if not question.exists():
        raise Registered(f"no question {QUESTIONS}/{question.name}: write what is to be predicted")
    target = (folder or root / FOLDER) / f"{date}-capacity.json"
    if target.exists():
        raise Registered(f"{target.name} is registered and is not written again; take another date")
    data = build(question, date, root)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    target.write_text(text, encoding="utf-8")
    target.with_suffix(".md").write_text(page(data), encoding="utf-8")
    seals = (f"{_sha(path)}  {path.name}\n" for path in (target, target.with_suffix(".md")))
    target.with_suffix(".sha256").write_text("".join(seals), encoding="utf-8")
    return target


def errors(date: str, root: Path = ROOT) -> str:
    """Coefficients and leave-one-out errors of a question's rows, in Markdown."""
    question = root / QUESTIONS / f"{date}-capacity.yaml"
    if not question.exists():
        raise Registered(f"no question {QUESTIONS}/{question.name}")
    model = learned(read_yaml(question), root)
    return f"{_coefficients(laws(model))}\n\n{_left_out(misses(model.misses))}"


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sealed(path: Path) -> dict[str, Any]:
    """The registered predictions, if neither they nor their page were changed since."""
    lines = path.with_suffix(".sha256").read_text(encoding="utf-8").splitlines()
    stated = {name: sha for sha, name in (line.split() for line in lines)}
    for file in (path, path.with_suffix(".md")):
        if _sha(file) != stated.get(file.name):
            raise Registered(f"{file.name} is not what was registered: its sha256 is {_sha(file)}")
    return json.loads(path.read_text(encoding="utf-8"))


def page(data: Mapping[str, Any]) -> str:
    """The registered predictions for reading, in Markdown."""
    target, git = data["target"], data["git"]
    parts = [
        f"# Predictions registered on {data['date']}",
        "What a small model, fitted to the released rows of one card, says about cells that nobody "
        "had measured here when it was written. Nothing in this page is changed afterwards; what "
        "is measured later is compared with it elsewhere.",
        f"Commit `{git['commit'][:12]}`{' with changed files' if git['changed_files'] else ''}; "
        f"{len(data['rows'])} row files; intervals at {data['level']:.0%}. Target: coverage of at "
        f"least {target['coverage_at_least']:.0%}, median half-width at most "
        f"{target['median_half_width_at_most']:.0%}, median error of decode throughput at most "
        f"{target['median_decode_error_at_most']:.0%}, over {target['over']}.",
        "## Widths",
        _widths(data["summary"]),
        "## Cells",
        "TTFT is that of the library's prefill, which hf-eager, graph and graph-compiled share: it "
        "stands with each of them, and is one number. Decode throughput is of all sequences.",
        *_cell_tables(data["cells"]),
        "## Known beforehand, outside the coverage",
        _known(data["known_before"]),
        "Published and not looked at: " + "; ".join(data["not_looked_at"]) + ".",
        "## Coefficients",
        _coefficients(data["laws"]),
        "## What was left out and predicted",
        _left_out(data["leave_one_out"]),
        "## Assumed, not fitted",
        "Standard deviations of logarithms: "
        + ", ".join(f"{name} {value:g}" for name, value in data["assumed"].items())
        + ".",
        "## Rows",
        f"Beside these, {len(data['earlier_visits'])} earlier visits of generate() from the "
        f"repository's history, and {len(data['leads'])} single readings of vLLM; both stand in "
        "the JSON file.",
        "\n".join(f"- `{row['file']}` {row['sha256'][:16]}" for row in data["rows"]),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    marks = [":--"] * left + ["--:"] * (len(head) - left)
    lines = [head, marks, *rows]
    return "\n".join(
        "| " + " | ".join(str(x).replace("|", "\\|") for x in line) + " |" for line in lines
    )


def _number(value: float) -> str:
    text = f"{value:.4g}"
    return f"{float(text):,.0f}" if abs(value) >= 1000 else text


def _shown(line: Mapping[str, Any]) -> str:
    if "value" not in line:
        return "–"
    low, high = _number(line["low"]), _number(line["high"])
    return f"{_number(line['value'])} [{low}, {high}]"


def _widths(told: Mapping[str, Any]) -> str:
    rows = [(name, told[name]) for name in ("all", "without hf-eager")]
    for group in ("by stack", "by metric", "by set"):
        rows += list(told[group].items())
    table = _table(
        ("cells", "with a value", "median half-width", "wider than 15 %"),
        [
            (
                METRIC_NAMES.get(name, name),
                one["cells"],
                f"{one['median_half_width']:.1%}" if one["cells"] else "–",
                one.get("wider_than_15_percent", "–"),
            )
            for name, one in rows
        ],
    )
    return f"{table}\n\nNot predicted, each with its reason: {told['not predicted']}."


def _cell_tables(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    parts, groups = [], {}
    for cell in cells:
        where = (cell["set"], cell["model"], cell["form"], cell["stack"])
        shape = (cell["context"], cell["batch"])
        groups.setdefault(where, {}).setdefault(shape, {})[cell["metric"]] = cell
    title = ""
    for (group, model, form, stack), shapes in groups.items():
        if group != title:
            parts.append(f"### {group}")
            title = group
        rows, reasons, notes = [], {}, {}
        for (context, batch), lines in shapes.items():
            one = next(iter(lines.values()))
            shown = [_shown(lines[name]) for name in METRIC_NAMES]
            at = f"{context:,} × {batch}"
            decode = lines["decode_tok_per_s"]
            if "step_alone" in decode:
                shown[0] = f"({_shown(decode['step_alone'])})"
            bound = decode.get("bound") or "–"
            rows.append((f"{context:,}", batch, *shown, bound, one["holds"]))
            for line in lines.values():
                if "missing" in line:
                    reasons.setdefault(line["missing"], {})[at] = None
                for note in line.get("notes", ()):
                    notes.setdefault(note, {})[at] = None
        head = ("context", "batch", *METRIC_NAMES.values(), "decode waits for", "holds")
        text = f"**{model}, {form}, {stack}**\n\n{_table(head, rows, left=0)}"
        for word, found in (("Not predicted", reasons), ("Note", notes)):
            for reason, places in found.items():
                text += f"\n\n{word} at {'; '.join(places)}: {reason}."
        if any("step_alone" in c["decode_tok_per_s"] for c in shapes.values()):
            text += (
                "\n\nIn brackets: the step alone, if the cache were filled in pieces; not counted."
            )
        parts.append(text)
    return parts


def _known(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for line in lines:
        predicted = "–"
        if line["predicted"] is not None:
            predicted = _shown({**line, "value": line["predicted"]})
        error = f"{line['error']:+.0%}" if "error" in line else line.get("missing", "–")
        rows.append(
            (
                f"{line['model']} {line['form']}, {line['stack']}, {line['gpu']}",
                f"{line['context']:,} × {line['batch']}",
                METRIC_NAMES[line["metric"]],
                _number(line["value"]),
                predicted,
                error,
                line["source"],
            )
        )
    head = ("cell", "context × batch", "metric", "known", "predicted", "error", "source")
    return _table(head, rows, left=3)


def _coefficients(told: Mapping[str, Any]) -> str:
    rows = []
    for law, one in told.items():
        for name, c in one.get("coefficients", {}).items():
            shown = _shown(c) if "value" in c else c["missing"]
            if "value" in c:
                shown = f"{c['value']:.3g} [{c['low']:.3g}, {c['high']:.3g}]"
            rows.append((law, name, c["meaning"], c["unit"], shown))
    sizes = [
        (
            law,
            one["rows"],
            one["log_sd"]["model"],
            one["log_sd"]["visit"],
            one["log_sd"]["row"],
            f"{one['residual_rms']:.1%}",
            one["degrees_of_freedom"],
            one["inflation"],
        )
        for law, one in told.items()
        if "rows" in one
    ]
    lacking = [f"- {law}: {one['missing']}" for law, one in told.items() if "missing" in one]
    head = ("law", "rows", "sd model", "sd visit", "sd row", "residual", "freedom", "inflation")
    tables = [
        _table(("law", "coefficient", "what", "unit", f"value [{LEVEL:.0%}]"), rows, left=4),
        _table(head, sizes),
    ]
    return "\n\n".join(tables + lacking)


def _left_out(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for line in lines:
        some = line["predicted"] > 0
        rows.append(
            (
                line["law"],
                line["left_out"],
                line["rows"],
                line["predicted"],
                f"{line['median_error']:.1%}" if some else "–",
                f"{line['largest_error']:.1%}" if some else "–",
                f"{line['covered']} of {line['predicted']}" if some else "–",
                f"{line['median_half_width']:.1%}" if some else "–",
                line.get("missing", ""),
            )
        )
    head = ("law", "left out", "rows", "predicted", "median error", "largest", "covered",
            "median half-width", "not resolved")  # fmt: skip
    return _table(head, rows, left=2)


# --- other cards of the datasheet list


def cards_file(date: str, root: Path = ROOT) -> Path:
    """Write what the laws of a registration say of every other listed card; not registered.

    Cells that the card holds, at the contexts and batches that were asked of the H200: decode
    throughput of all sequences (tok/s) and TTFT (s), each with the ends of its interval.
    """
    question = read_yaml(root / QUESTIONS / f"{date}-capacity.yaml")
    model, asked = learned(question, root), cells_of(question)
    cards = {name: card_of(data) for name, data in question["cards"].items()}
    by_stack = {
        stack: sorted({(c["context"], c["batch"]) for c in asked
                       if c["stack"] == stack and c["gpu"] != question["gpu"]})
        for stack in dict.fromkeys(c["stack"] for c in asked)
    }  # fmt: skip
    arms = dict.fromkeys((c["model"], c["form"], c["stack"]) for c in asked)
    done = {c["gpu"] for c in asked}
    cells = []
    for gpu in (name for name in datasheets() if name not in done):
        for name, form, stack in arms:
            for context, batch in by_stack[stack]:
                told = predict(
                    model, cards[f"{name} {form}"], gpu, stack, context, batch, form=form
                )
                decode, first = told["decode_tok_per_s"], told["ttft_s"]
                if decode.value is not None:
                    cells.append(
                        [gpu, name, form, stack, context, batch, _ends(decode), _ends(first)]
                    )
    head = {
        "schema": 1,
        "registered": f"{date}-capacity.json",
        "git": _git(root),
        "level": LEVEL,
        "fields": [
            "gpu",
            "model",
            "form",
            "stack",
            "context",
            "batch",
            "decode_tok_per_s",
            "ttft_s",
        ],
    }
    lines = ",\n".join(json.dumps(cell) for cell in cells)
    path = root / FOLDER / f"{date}-cards.json"
    path.write_text(
        f'{json.dumps(head, indent=1)[:-2]},\n "cells": [\n{lines}\n]}}\n', encoding="utf-8"
    )
    return path


def _ends(told: Prediction) -> list[float] | None:
    if told.value is None:
        return None
    return [_round(x, 4) for x in (told.value, told.low, told.high)]


# --- the command line


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 for a question without an answer."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.analysis.capacity.registry",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    once = commands.add_parser("register", help="write the predictions of a date, once")
    once.add_argument("--date", required=True, help="YYYY-MM-DD, of a file in params/predictions")
    shown = commands.add_parser("errors", help="coefficients and leave-one-out errors")
    shown.add_argument("--date", required=True, help="YYYY-MM-DD, of a file in params/predictions")
    other = commands.add_parser("cards", help="the other cards of the datasheet list, in a file")
    other.add_argument("--date", required=True, help="YYYY-MM-DD, of a file in params/predictions")
    check = commands.add_parser("check", help="whether a registered file is still what it was")
    check.add_argument("file", help="outputs/predictions/....json")
    args = parser.parse_args(argv)
    try:
        if args.command == "register":
            path = register(args.date)
            sys.stdout.write(f"registered {path.name}, sha256 beside it\n")
        elif args.command == "cards":
            sys.stdout.write(f"{cards_file(args.date).name}\n")
        elif args.command == "errors":
            sys.stdout.write(errors(args.date) + "\n")
        else:
            data = sealed(ROOT / args.file)
            sys.stdout.write(f"{args.file} is what was registered on {data['date']}\n")
    except (ValueError, OSError, LookupError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
