"""A result set of many models, to measure what a report of them costs.

    python tools/many_models.py outputs/demo 200 outputs/many

copies the jobs of a result set, then again under other names of models, in turn, until there are so
many; the jobs over all models are copied as they are. Rows, notebooks and hashes are real ones, and
so are structure and size; the numbers are those of the models that were copied.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib.records.store import ACROSS, artefacts, manifests

TEXTS = ("run.json", "records.jsonl", "notebook.ipynb")  # that name the model


def copies(source: Path, count: int, out: Path) -> list[str]:
    """Write `count` models below `out`, copied from those of `source` in turn; returns their names.

    Files that do not name a model are links to the originals.
    """
    jobs: dict[str, list[Path]] = {}
    for path in manifests(source):
        jobs.setdefault(path.relative_to(source).parts[0], []).append(path.parent)
    across, models = jobs.pop(ACROSS, []), list(jobs)
    for folder in across:
        _copy(folder, out / folder.relative_to(source), {})
    names = []
    for n in range(count):
        model = models[n % len(models)]
        name = model if n < len(models) else f"{model}-{n:03d}"
        names.append(name)
        for folder in jobs[model]:
            target = out / name / folder.relative_to(source / model)
            _copy(folder, target, {model: name, _name(folder, model): name})
    return names


def _name(folder: Path, model: str) -> str:
    """What the rows of a job call its model; the folder of a model with a slash differs."""
    manifest = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return (manifest.get("parameters") or {}).get("model") or model


def _copy(folder: Path, target: Path, renamed: dict[str, str]) -> None:
    """A job's files, its model renamed, and hashes that are true of them."""
    target.mkdir(parents=True)
    for path in (p for p in folder.iterdir() if p.is_file() and p.suffix != ".html"):
        if path.name not in TEXTS:
            os.link(path, target / path.name)
            continue
        text = path.read_text(encoding="utf-8")
        for old, new in renamed.items():
            text = re.sub(rf"(?<![\w-]){re.escape(json.dumps(old)[1:-1])}(?![\w-])", new, text)
        (target / path.name).write_text(text, encoding="utf-8")
    manifest = json.loads((target / "run.json").read_text(encoding="utf-8"))
    if manifest.get("artefacts"):
        names = {item["path"] for item in manifest["artefacts"]}
        manifest["artefacts"] = [x for x in artefacts(target) if x["path"] in names]
        (target / "run.json").write_text(json.dumps(manifest), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a result set")
    parser.add_argument("count", type=int, help="how many models")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    args = parser.parse_args(arguments)
    if args.out.exists():
        parser.error(f"{args.out} exists; name a new folder")
    names = copies(args.source, args.count, args.out)
    print(f"{len(names)} models, {len(manifests(args.out))} jobs: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
