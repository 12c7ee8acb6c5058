"""The mutation tester itself, on a module and a test that are planted."""

import re
import textwrap

import pytest
import yaml

from tools import mutants

SETTINGS = yaml.safe_load(mutants.SETTINGS.read_text(encoding="utf-8"))
SOURCE = "def double(x):\n    return x * 2\n"


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A project of one module, and one test that sees only that double(2) is 4."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/planted_module.py").write_text(SOURCE)
    test = """
        import sys
        sys.path.insert(0, {!r})
        from lib.planted_module import double

        def test_double():
            assert double(2) == 4
    """
    file = tmp_path / "test_planted.py"
    file.write_text(textwrap.dedent(test).format(str(tmp_path)))
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return [str(file)]


def mutant(now):
    return {"line": 2, "was": "return x * 2", "now": now, "text": SOURCE.replace("x * 2", now[7:])}


def test_a_mutant_that_the_tests_see_is_killed_and_one_that_they_miss_survives(planted, capfd):
    seen, missed, endless = (
        mutant(f"return {text}") for text in ("x * 3", "x + 2", "x * len(iter(int, 1))")
    )
    assert mutants.survivors("lib/planted_module.py", [seen, missed, endless], planted) == [missed]
    assert "lib/planted_module.py:2: return x * 2  ->  return x + 2" in capfd.readouterr().out
    assert (mutants.ROOT / "lib/planted_module.py").read_text() == SOURCE


def test_tests_that_fail_by_themselves_prove_nothing(planted, capfd):
    (mutants.ROOT / "lib/planted_module.py").write_text(SOURCE.replace("2", "3"))
    with pytest.raises(SystemExit):
        mutants.survivors("lib/planted_module.py", [], planted)
    assert "fail without a mutant" in capfd.readouterr().err


def test_a_mutant_that_does_not_end_is_killed(planted):
    endless = SOURCE.replace("return", "while True: pass\n    return")
    assert not mutants.passes("lib/planted_module.py", endless, planted, 3)


def test_equivalent_mutants_are_set_aside_and_must_exist(capsys):
    one, two = mutant("return x + 2"), mutant("return x * 3")
    listed = [{"was": one["was"], "now": one["now"], "why": "planted"}]
    assert mutants.split("m", [one, two, one], listed) == ([two], [one, one])
    with pytest.raises(SystemExit):
        mutants.split("m", [two], listed)
    assert "m has no mutant 'return x * 2' -> 'return x + 2'" in capsys.readouterr().err


def test_the_table_sums_up():
    lines, share = mutants.summary({"a": (10, 1, 2), "b": (30, 7, 0), "c": (0, 0, 1)})
    assert share == 32 / 40
    assert [line.split() for line in lines[1:]] == [
        ["a", "9", "1", "90.0", "2"],
        ["b", "23", "7", "76.7", "0"],
        ["c", "0", "0", "100.0", "1"],
        ["all", "32", "8", "80.0", "3"],
    ]


@pytest.mark.parametrize("module", SETTINGS)
def test_what_is_listed_is_there_and_has_a_reason(module):
    source = {line.strip() for line in (mutants.ROOT / module).read_text().splitlines()}
    files = [name for name in SETTINGS[module]["tests"] if name.endswith(".py")]
    assert files and all((mutants.ROOT / name).exists() for name in files)
    for entry in SETTINGS[module].get("equivalent", []):
        assert entry["was"] in source and entry["now"] not in source
        assert re.fullmatch(r".{10,}", entry["why"])
