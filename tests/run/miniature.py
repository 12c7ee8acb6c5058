"""A small workbook with this library: two models, and notebooks that can be held."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from lib.files import ROOT
from lib.records import store
from tests.run.test_loop import make_notebook

HEAD = 'model = "x"\nrecords_path = "x"\ndevice = "auto"\nhold = "x"'
NOTE = """
import os, time
from pathlib import Path
from lib.records import record, store
visit = os.environ.get("SLURMD_NODENAME", "here") + os.environ["WORKBOOK_START"]
seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "WORKBOOK_NEIGHBOURS")}
values = {"device": "cpu", "visit": visit} | {k: v for k, v in seen.items() if v}
env = store.append(records_path, record.environment_record(values))
def row(context):
    key = {"model": model, "stack": "hf-eager", "context": context, "batch": 1, "new_tokens": 8}
    return record.Record(KIND, key, {"e2e_s": [float(len(model))]}, env_id=env.env_id)
first = store.append(records_path, row(1))
while Path(hold, KIND).exists():
    time.sleep(0.05)
second = store.append(records_path, row(2))
"""


def make(root: Path) -> Path:
    """The workbook; files `hold/latency` and `hold/memory` hold its notebooks."""
    for name in ("lib", "params"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("hold", "notebooks"):
        (root / name).mkdir()
    for name in ("latency", "memory"):
        cell = f"KIND = {name!r}\n{NOTE.strip()}"
        make_notebook(root / "notebooks" / f"{name}.ipynb", HEAD, cell)
    profile = {
        "defaults": {"device": "auto", "hold": str(root / "hold")},
        "notebooks": {"latency": {}, "memory": {}},
        "models": ["a/one", {"name": "b/three", "notebooks": ["latency"]}],
    }
    (root / "params" / "tiny.yaml").write_text(json.dumps(profile))
    return root


def run(workbook: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
    """Its command line in another process, with its own library before this one."""
    more = {"PYTHONPATH": environ.pop("PYTHONPATH", "")}
    return subprocess.run(
        [sys.executable, "-m", "lib", *arguments],
        cwd=workbook,
        env=os.environ | more | environ,
        capture_output=True,
        text=True,
        timeout=180,
    )


def rows(folder: Path) -> list[tuple]:
    """What was measured, each visit by itself, without where and when."""
    merged = [one for row in store.load_tree(folder) for one in (row, *row.others)]
    return sorted((r.kind, *r.key.values(), *r.samples["e2e_s"]) for r in merged if r.samples)
