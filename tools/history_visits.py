"""Rows of a released set that only its history still holds, as further visits of its arms.

    python tools/history_visits.py [--set outputs/released/h100-sxm]

Once, of two measurements of an arm the later one replaced the earlier. The lines that were lost so,
and whose environment names its GPU, are written as they were to visits/history-<commit>.jsonl
beside the set, with the line of their environment; <commit> is the first that held them. A line
that is in the set, or in a file that is there, is not written again. Energy that no counter
measured, as in the first days, is another measurement and is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lib import files
from lib.records.store import VISITS

KINDS = ("latency", "energy")  # calls that wait for the host, of one sequence


def git(*arguments: str) -> str:
    """What git prints."""
    done = subprocess.run(["git", *arguments], cwd=files.ROOT, capture_output=True, check=True)
    return done.stdout.decode()


def states(folder: str) -> Iterator[tuple[str, str]]:
    """Commit and text of every state of every records.jsonl below a folder, the oldest first."""
    for commit in git("log", "--reverse", "--format=%h", "--", folder).split():
        changed = git("show", "--format=", "--name-only", "--diff-filter=AM", commit, "--", folder)
        for path in changed.splitlines():
            if path.endswith("records.jsonl"):
                yield commit, git("show", f"{commit}:{path}")


def place(row: dict) -> str:
    """What a measurement is known by: the same arm in the same environment, with the same times."""
    return json.dumps([row["kind"], row["key"], row["env_id"], row["samples"]], sort_keys=True)


def is_timed(row: dict) -> bool:
    """Whether it is a call of today's method that did not fail."""
    sound = row["kind"] in KINDS and row["samples"] and not row["error"]
    return bool(sound and (row["kind"] != "energy" or row["values"].get("estimator")))


def lost(folder: str, present: set[str]) -> dict[str, list[str]]:
    """By commit, lines of timed rows that are not `present`, after those of their environment."""
    seen, by_commit = set(present), {}
    for commit, text in states(folder):
        rows = [(line, json.loads(line)) for line in text.splitlines()]
        envs = {row["env_id"]: (line, row) for line, row in rows if row["kind"] == "environment"}
        for line, row in rows:
            env_line, env = envs.get(row["env_id"], ("", {"values": {}}))
            if is_timed(row) and env["values"].get("gpu_uuid") and place(row) not in seen:
                seen.add(place(row))
                lines = by_commit.setdefault(commit, [])
                lines += [one for one in (env_line, line) if one not in lines]
    return by_commit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", default="outputs/released/h100-sxm")
    folder = parser.parse_args().set
    visits = files.ROOT / folder / ".." / VISITS
    there = [*(files.ROOT / folder).rglob("records.jsonl"), *visits.rglob("*.jsonl")]
    lines = [line for path in there for line in path.read_text("utf-8").splitlines()]
    for commit, rows in lost(folder, {place(json.loads(line)) for line in lines}).items():
        path = visits.resolve() / f"history-{commit}.jsonl"
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        print(f"{path.relative_to(files.ROOT)}: {len(rows)} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
