"""Two environments in turn: which they are, in which order, what a block is given, how it ends."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from lib import __main__ as command
from lib.files import ROOT, ParamsError
from lib.models import load
from lib.records import store
from lib.records.record import select
from lib.run import lease, versus

FAKE = '''
"""Answers like an interpreter in which lib can measure; calls take 1 s, in B as long as FACTOR."""
import json, os, sys, time
from pathlib import Path

here = Path(__file__).parent
if sys.argv[1] == "-c":
    print("a remark of the start")
    print(json.dumps({"python": "3.12.3", "transformers": os.environ.get("VERSION", "5.17.0")}))
    sys.exit()
given = json.loads(sys.argv[3])
with (here / "calls").open("a") as file:
    names = ("PYTHONPATH", "CUDA_VISIBLE_DEVICES", "WORKBOOK_START")
    file.write(json.dumps([given, *map(os.environ.get, names)]) + "\\n")
from lib.records import store
from lib.records.record import Record

number, letter = Path(given["records_path"]).parent.name.split("-")
if (here / f"fails-{int(number)}").exists():
    print("Traceback (most recent call last):")
    print("lib.models.card.ModelError: it needs 99.0 GB")
    print("and a remark of the end")
    sys.exit(1)
if (here / f"hangs-{int(number)}").exists():
    time.sleep(60)
seconds = (float((here / "factor").read_text()) if letter == "B" else 1) + int(number) / 1000
key = {"stack": "hf-eager", "context": 32}
for tokens, name in ((1, "ttft_s"), (16, "e2e_s")):
    row = Record("latency", {**key, "new_tokens": tokens}, {name: [seconds] * 3})
    store.append(given["records_path"], row)
'''


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A folder with a fake interpreter, `python`, and no GPU."""
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "factor").write_text("2")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/fake.py" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(lease, "gpus", list)
    return tmp_path


def run(machine: Path, *more: str) -> int:
    python = str(machine / "python")
    line = ["versus", python, python, "--model", "tiny-qwen3", "--out", str(machine / "out"), *more]
    return command.main(line)


def calls(machine: Path) -> list:
    return [json.loads(line) for line in (machine / "calls").read_text().splitlines()]


def test_blocks_come_in_the_order_a_b_b_a_and_the_verdict_is_said(machine, capsys):
    """B takes 2 s for A's 1 s, and each block a millisecond more than the one before."""
    assert run(machine, "--rounds", "2") == 0
    folders = [Path(given["records_path"]).parent.name for given, *_ in calls(machine)]
    assert folders == ["01-A", "02-B", "03-B", "04-A", "05-A", "06-B", "07-B", "08-A"]
    out, err = capsys.readouterr()
    assert "First token on hf-eager: B is slower, +99.6% [" in out
    assert "block 8/8 A: " in err and "report: " in err
    assert (machine / "out" / "report.html").exists()


def test_a_block_is_given_the_model_the_calls_and_in_the_first_round_to_explain(machine):
    run(machine, "--rounds", "2", "--calls", "5", "--context", "64", "--dtype", "float32")
    given = [given for given, *_ in calls(machine)]
    assert [g.pop("explain") for g in given] == [True] * 4 + [False] * 4
    same = {json.dumps({n: v for n, v in g.items() if n != "records_path"}) for g in given}
    assert [json.loads(text) for text in same] == [
        {
            "name": "tiny-qwen3",
            "weights": "random",
            "dtype": "float32",
            "context": 64,
            "new_tokens": 64,
            "calls": 5,
            "seed": 0,
            "device": "auto",
        }
    ]
    assert len({start for *_, start in calls(machine)}) == 1  # one visit


def test_all_blocks_use_the_one_gpu_that_is_held(machine, monkeypatch):
    cards = [lease.Gpu("GPU-a", "H100"), lease.Gpu("GPU-b", "H100")]
    monkeypatch.setattr(lease, "gpus", lambda: cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run(machine, "--rounds", "1")
    assert [gpu for _, _, gpu, _ in calls(machine)] == ["GPU-a"] * 4


def test_a_shared_gpu_is_refused_before_the_first_block(machine, monkeypatch, capsys):
    monkeypatch.setattr(lease, "gpus", lambda: [lease.Gpu("MIG-a", "H100 MIG 1g.10gb")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run(machine, "--rounds", "1") == 2
    assert "(MIG-a) is shared: it is a MIG slice" in capsys.readouterr().err
    assert not (machine / "calls").exists() or calls(machine) == []


def test_a_folder_of_packages_comes_before_all_others(machine, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "inherited")
    (machine / "new" / "x").mkdir(parents=True)
    env = versus.environment("B", f"{machine / 'python'}{os.pathsep}{machine / 'new'}")
    assert env.python == str(machine / "python")
    paths = env.variables()["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(machine / "new"), str(ROOT), "inherited"]


def test_two_names_for_the_same_packages_are_said_before_any_block(machine, monkeypatch, capsys):
    """A folder above the one that holds the packages, say: its run would compare A with A."""
    (machine / "new" / "deeper").mkdir(parents=True)
    python = str(machine / "python")
    line = ["versus", python, f"{python}:{machine / 'new'}", "--model", "tiny-qwen3"]
    assert command.main([*line, "--rounds", "1", "--out", str(machine / "out")]) == 0
    err = capsys.readouterr().err
    assert err.index("the same version of every package") < err.index("block 1/4 A")
    assert (
        run(machine, "--rounds", "1", "--out", str(machine / "other")) == 0
    )  # the same, asked for
    assert "same version" not in capsys.readouterr().err


def test_a_folder_is_an_environment_or_packages_for_this_interpreter(machine):
    (machine / "venv" / "bin").mkdir(parents=True)
    (machine / "venv" / "bin" / "python").symlink_to(machine / "python")
    env = versus.environment("A", str(machine / "venv"))
    assert (env.python, env.folders) == (str(machine / "venv" / "bin" / "python"), ())
    env = versus.environment("A", str(machine))
    assert (env.python, env.folders) == (sys.executable, (str(machine),))


def test_an_empty_folder_is_refused(machine):
    (machine / "empty").mkdir()
    with pytest.raises(ParamsError, match="'.*empty' is empty"):
        versus.environment("B", f"python3{os.pathsep}{machine / 'empty'}")


def test_what_keeps_lib_from_measuring_there_is_said_before_any_block(machine, capsys):
    (machine / "broken" / "transformers").mkdir(parents=True)
    text = "raise ImportError('tokenizers<=0.23.0 is required, but found 0.23.3.\\nTry: pip')"
    (machine / "broken" / "transformers" / "__init__.py").write_text(text)
    line = ["versus", str(machine / "python"), str(machine / "broken"), "--model", "tiny-qwen3"]
    assert command.main([*line, "--out", str(machine / "out")]) == 2
    error = capsys.readouterr().err
    assert "B=" in error and "found 0.23.3" in error and error.count("\n") == 1
    assert not (machine / "out").exists() and not (machine / "calls").exists()


@pytest.mark.parametrize("number", [1, 6])
def test_a_block_that_fails_ends_the_run_and_whole_rounds_keep_their_verdict(
    machine, capsys, number
):
    (machine / f"fails-{number}").touch()
    assert run(machine, "--rounds", "2") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"block {number}/8" in error and "ModelError: it needs 99.0 GB" in error
    assert f"{number:02}-{'ABBA'[(number - 1) % 4]}/log.txt" in error
    assert (machine / "out" / "report.html").exists() is (number > 4)


def test_a_block_that_hangs_is_killed(machine, capsys):
    (machine / "hangs-2").touch()
    assert run(machine, "--rounds", "1", "--timeout", "3") == 2
    assert "block 2/4 B lasted longer than 3 s" in capsys.readouterr().err


def test_another_run_s_folder_is_not_written_again_and_its_rows_are_read_again(machine, capsys):
    run(machine, "--rounds", "1")
    assert run(machine, "--rounds", "1") == 2
    assert "is not empty" in capsys.readouterr().err
    assert len(calls(machine)) == 4
    assert command.main(["versus", "--from", str(machine / "out")]) == 0
    assert "B is slower" in capsys.readouterr().out


DAMAGE = {
    "no JSON": ("versus.json", lambda text: text[:40]),
    "a list": ("versus.json", lambda text: "[]"),
    "no versions": ("versus.json", lambda text: text.replace("versions", "other")),
    "rounds in words": ("versus.json", lambda text: text.replace('"rounds": 1', '"rounds": "x"')),
    "a line of a block cut": ("02-B/records.jsonl", lambda text: text[:-9]),
    "a block emptied": ("03-B/records.jsonl", lambda text: ""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_refused_in_one_line_or_said(machine, capsys, damage):
    run(machine, "--rounds", "1")
    name, change = DAMAGE[damage]
    path = machine / "out" / name
    path.write_text(change(path.read_text()))
    capsys.readouterr()
    status = command.main(["versus", "--from", str(machine / "out")])
    out, err = capsys.readouterr()
    if damage == "a block emptied":
        assert status == 0 and "not measured (no row in block 3)" in out
    else:
        assert status == 2 and err.count("\n") == 1 and str(machine / "out") in err


PLANT = """
import sys

if "lib.measure.versus" in sys.orig_argv:  # each layer keeps three copies of its keys and values
    from transformers import cache_utils

    update = cache_utils.DynamicLayer.update

    def planted(self, *args, **options):
        keys, values = update(self, *args, **options)
        self.copies = {n: x.clone() for x in (keys, values) for n in [f"{id(x)}{i}" for i in "abc"]}
        return keys, values

    cache_utils.DynamicLayer.update = planted
"""


def test_a_real_block_in_an_environment_with_four_times_the_cache(tmp_path):
    """Of 16 + 8 - 1 tokens; the environment is a folder whose start-up file changes the library."""
    (tmp_path / "plant").mkdir()
    (tmp_path / "plant" / "sitecustomize.py").write_text(PLANT)
    given = {"name": "tiny-qwen3", "weights": "random", "dtype": "float32", "device": "cpu"}
    given |= {"context": 16, "new_tokens": 8, "calls": 2, "seed": 0, "explain": True}
    env = versus.environment("B", str(tmp_path / "plant"))
    versus.measure(env, tmp_path / "02-B", given, {"OMP_NUM_THREADS": "1"}, 300, "block 2/4 B")
    rows = store.load(tmp_path / "02-B" / versus.ROWS)
    errors = [row.error for row in rows if row.error]
    assert errors == []
    kinds = ["environment", "card", *["latency"] * 3, *["made", "busy"] * 2]
    assert [row.kind for row in rows] == kinds
    (made,) = select(rows, "made", stack="hf-eager")
    cache = load.card("tiny-qwen3", "float32").kv_bytes(16 + 8 - 1)
    assert made.values["kv_tensor_bytes"] == 4 * cache and made.values["made_tokens"] == 8
