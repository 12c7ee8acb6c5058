"""Find, or build, the Python environment that a make target runs in.

    python3 tools/bootstrap.py report|lab|test [--python PATH]

prints the path of one interpreter on stdout; everything said to a person goes to stderr. The
interpreter is, in this order: the one PYTHON= names; the active environment (VIRTUAL_ENV,
CONDA_PREFIX, then python3 on PATH) where it satisfies the ranges of pyproject.toml; .venv in the
repository, built from the locks if it is not there or was built from other ones. pip takes no file
whose sha256 is not in a lock, but for a build of torch from an index that the user named.

Standard library only, and written so that Python 3.8 can read it: an old Python must be able to
start this file and be told what is wrong.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
SPARE = ROOT / ".venv.old"
LOCK = ROOT / "requirements.lock"
TORCH_LOCK = ROOT / "requirements-torch.lock"
STAMP = "workbook.json"  # in .venv: which locks it was built from; null while it is being built
OLDEST = (3, 11)  # requires-python
# Where more than python3 is there, the versions the lock is tested with come first.
NAMES = ("python3", "python3.13", "python3.12", "python3.11", "python3.14", "python")
# Runs under any Python: what is this interpreter, and can it make environments?
PROBE = (
    "import sys, json\n"
    "try:\n"
    "    import venv, ensurepip\n"
    "    ok = True\n"
    "except ImportError:\n"
    "    ok = False\n"
    "print(json.dumps({'version': list(sys.version_info[:3]), 'executable': sys.executable,"
    " 'venv': ok}))\n"
)
UNREACHABLE = re.compile(
    r"connection (?:broken|error|refused|timed out)|NewConnectionError|ConnectTimeout|"
    r"Max retries exceeded|Read timed out|name resolution|ProxyError|"
    r"Could not find a version .*\(from versions: none\)|Could not fetch URL",
    re.IGNORECASE,
)
# Only files that a lock names, all of them there, and none that runs code when it is built.
HASHED = ("--require-hashes", "--no-deps", "--only-binary", ":all:")
# Settings of pip that say where its files come from; others say what is installed, and where to.
SOURCES = re.compile(
    "PIP_(INDEX_URL|EXTRA_INDEX_URL|NO_INDEX|FIND_LINKS|TRUSTED_HOST|PROXY|CERT|CLIENT_CERT|"
    "CACHE_DIR|NO_CACHE_DIR|DEFAULT_TIMEOUT|TIMEOUT|RETRIES|CONFIG_FILE|KEYRING_PROVIDER)"
)
# What a configuration file of pip may hold, and the variables here overrule.
OVERRULED = ("USER", "REQUIRE_HASHES", "NO_DEPS", "DRY_RUN", "PRE")
OTHER_FILE = "DO NOT MATCH THE HASHES"  # pip, of a file whose sha256 the lock does not have


class SetupError(Exception):
    """Set-up cannot go on; the text is one paragraph that says what to do."""


# --- what an interpreter has -----------------------------------------------------------------


def release(version):
    """Numbers of a version: "2.11.0+cu130" -> (2, 11, 0). Local and pre-release parts drop out."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    if not found:
        raise ValueError(f"not a version: {version!r}")
    return tuple(int(part) for part in found.group().split("."))


def parse(requirement):
    """Name and bounds of a declared range: "torch>=2.11,<3" -> ("torch", [(">=", "2.11"), ...])."""
    found = re.fullmatch(
        r"([A-Za-z0-9._-]+?)\s*((?:>=|<)[\d.]+(?:,(?:>=|<)[\d.]+)*)", requirement.strip()
    )
    if not found:
        raise ValueError(f"{requirement!r} is not of the form name>=oldest,<next")
    bounds = [re.fullmatch(r"(>=|<)([\d.]+)", part).groups() for part in found[2].split(",")]
    return found[1], bounds


def inside(version, bounds):
    """Whether a version lies within bounds of `parse`."""

    def padded(text):
        numbers = release(text)
        return numbers + (0,) * (6 - len(numbers))

    here = padded(version)
    return all(
        here >= padded(bound) if sign == ">=" else here < padded(bound) for sign, bound in bounds
    )


def needs(project, purpose):
    """Requirements a target has: a report runs without JupyterLab, only tests need extras."""
    wanted = list(project["dependencies"])
    if purpose == "report":
        wanted = [item for item in wanted if parse(item)[0] not in ("jupyterlab", "itables")]
    if purpose == "test":
        extras = project["optional-dependencies"]
        wanted += extras["test"] + extras["serve"]
    return wanted


def problems(purpose):
    """What this interpreter lacks for a purpose, from package metadata alone; nothing is imported.

    Returns texts such as "torch>=2.11,<3 (has 2.5.1)". Needs Python 3.11 for tomllib.
    """
    from importlib import metadata

    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lacking = []
    for requirement in needs(project, purpose):
        name, bounds = parse(requirement)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            lacking.append(requirement)
            continue
        if not inside(version, bounds):
            lacking.append(f"{requirement} (has {version})")
    return lacking


def probe(python):
    """Version, path and venv ability of an interpreter, or None where it does not start."""
    try:
        answer = subprocess.run([str(python), "-c", PROBE], capture_output=True, timeout=60)
        return json.loads(answer.stdout) if answer.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def lacks(python, purpose):
    """`problems` as another interpreter sees them."""
    command = [str(python), str(Path(__file__).resolve()), purpose, "--check"]
    answer = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(answer.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return [f"an interpreter that works ({(answer.stderr or answer.stdout).strip()[-200:]})"]


def new_enough(info):
    return tuple(info["version"][:2]) >= OLDEST


def named(info):
    return "{} (Python {})".format(info["executable"], ".".join(map(str, info["version"])))


def listed(lacking, most=4):
    rest = f" and {len(lacking) - most} more" if len(lacking) > most else ""
    return ", ".join(lacking[:most]) + rest


# --- choosing --------------------------------------------------------------------------------


def active(environ):
    """Interpreters of the active environment, most specific first."""
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if environ.get(variable):
            yield Path(environ[variable]) / "bin" / "python"
    path = shutil.which("python3", path=environ.get("PATH"))
    if path:
        yield Path(path)


def given(python, purpose):
    """The interpreter that PYTHON= names, or an error: an explicit choice is never replaced."""
    info = probe(shutil.which(python) or python)
    if info is None:
        raise SetupError(
            f"PYTHON={python} does not start. Give the path of a Python 3.11 or newer, or leave "
            "PYTHON out and make builds .venv by itself."
        )
    if not new_enough(info):
        raise SetupError(
            f"PYTHON={python} is {named(info)}, and Python 3.11 or newer is needed. "
            "Name another, or leave PYTHON out."
        )
    lacking = lacks(info["executable"], purpose)
    if lacking:
        raise SetupError(
            f"PYTHON={python} lacks {listed(lacking, most=30)}. Install that there with "
            f"'{info['executable']} -m pip install -r {LOCK.name} -r {TORCH_LOCK.name}', or leave "
            "PYTHON out and make builds .venv by itself."
        )
    return info


def choose(purpose, python, environ, say):
    """Facts (`probe`) of the interpreter to use, after building .venv where that is needed."""
    if python:
        return given(python, purpose)
    reason = "no active environment is new enough"
    for candidate in active(environ):
        # An activated .venv of ours still has to match the lock; it comes below.
        if VENV in candidate.absolute().parents:
            continue
        info = probe(candidate)
        if info is None or not new_enough(info):
            continue
        lacking = lacks(info["executable"], purpose)
        if not lacking:
            return info
        reason = f"{named(info)} lacks {listed(lacking)}"
        break
    if ready():  # also where nothing can be written
        return probe(VENV / "bin" / "python")
    with (ROOT / ".venv.lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another make is setting up .venv: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        mine = VENV.is_dir() and not VENV.is_symlink() and (stamp() or not any(VENV.iterdir()))
        if os.path.lexists(str(VENV)) and not mine:
            return foreign(purpose)
        if not ready():
            say(reason)
            build(base(environ), say)
    return probe(VENV / "bin" / "python")


def foreign(purpose):
    """Somebody else's .venv: used if it will do, never deleted."""
    info = probe(VENV / "bin" / "python")
    lacking = lacks(info["executable"], purpose) if info and new_enough(info) else ["Python 3.11"]
    if lacking:
        raise SetupError(
            f"{VENV} is there but was not made by make, and lacks {listed(lacking)}. "
            "Rename or delete it and run make again, or install into it with "
            f"'.venv/bin/python -m pip install -r {LOCK.name} -r {TORCH_LOCK.name}'."
        )
    return info


def base(environ):
    """The interpreter that .venv is built with: the first on PATH that is new enough."""
    seen, lame = [], []
    for name in NAMES:
        path = shutil.which(name, path=environ.get("PATH"))
        info = probe(path) if path else None
        if info is None or info["executable"] in [other["executable"] for other in seen]:
            continue
        seen.append(info)
        if new_enough(info):
            if info["venv"]:
                return info
            lame.append(info)
    if lame:
        package = "python{}.{}-venv".format(*lame[0]["version"])
        raise SetupError(
            f"{named(lame[0])} cannot make a virtual environment: its venv or ensurepip module is "
            f"missing. On Debian and Ubuntu run 'apt-get install {package}' (or python3-venv), "
            "then make again; or name an environment that has the packages with PYTHON=path."
        )
    found = ", ".join(named(info) for info in seen) or "no Python at all"
    raise SetupError(
        f"Python 3.11 or newer is needed, and PATH has {found}; python3.11 to python3.14 were "
        "looked for too. Install one from your system's packages, or use conda with "
        "environment.yml, or name one with PYTHON=path."
    )


# --- building --------------------------------------------------------------------------------


def stamp():
    """Contents of the stamp in .venv, or None where it is not ours (or not there)."""
    try:
        content = json.loads((VENV / STAMP).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and {"lock", "path"} <= content.keys() else None


def expected():
    """The stamp of a finished .venv; its path is in it because environments cannot be moved."""
    locks = LOCK.read_bytes() + TORCH_LOCK.read_bytes()
    return {"lock": hashlib.sha256(locks).hexdigest(), "path": str(VENV)}


def ready():
    return stamp() == expected() and probe(VENV / "bin" / "python") is not None


def write_stamp(content):
    partial = VENV / (STAMP + ".partial")
    partial.write_text(json.dumps(content))
    partial.replace(VENV / STAMP)


def build(info, say):
    """Build .venv from the lock. Whatever stops it, no half environment counts as ready.

    A finished .venv of an earlier lock is put aside and comes back if the build fails.
    """
    finished = stamp()
    if finished and finished["lock"] and finished["path"] == str(VENV):
        shutil.rmtree(SPARE, ignore_errors=True)
        VENV.rename(SPARE)
    elif VENV.exists():
        shutil.rmtree(VENV)
    say(f"building .venv with {named(info)} from requirements.lock (once; a few minutes)")
    # Packages on PYTHONPATH, or a user-wide install, must not stand in for those of the lock.
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    clean = {k: v for k, v in clean.items() if k[:4] != "PIP_" or SOURCES.fullmatch(k)}
    clean.update({"PIP_" + name: "0" for name in OVERRULED})
    try:
        VENV.mkdir()
        write_stamp({"lock": None, "path": str(VENV)})
        command = [info["executable"], "-m", "venv", str(VENV)]
        made = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean
        )
        if made.returncode != 0:
            raise SetupError(f"'{' '.join(command)}' failed: {made.stdout.strip()[-500:]}")
        install(clean, say)
        lacking = lacks(VENV / "bin" / "python", "test")
        if lacking:
            raise SetupError(
                f"pip ended well, and yet .venv lacks {listed(lacking)}. A setting of pip sends "
                "packages elsewhere: see 'pip config list' (target, prefix, root, python, "
                "constraint), or set PIP_CONFIG_FILE=/dev/null."
            )
        site = VENV / "lib" / "python{}.{}".format(*info["version"]) / "site-packages"
        site.mkdir(parents=True, exist_ok=True)
        (site / "workbook.pth").write_text(f"{ROOT}\n")  # makes lib importable everywhere
        write_stamp(expected())
    except BaseException:  # Ctrl-C as well
        shutil.rmtree(VENV, ignore_errors=True)
        if SPARE.exists():
            SPARE.rename(VENV)
        raise
    shutil.rmtree(SPARE, ignore_errors=True)


def install(environ, say):
    """pip install the locks into .venv."""
    version, other = torch_offered(environ, say)
    pip([*HASHED, "-r", str(LOCK)], environ, say)
    if other:
        say(f"  torch {version} is of another index than PyPI: no lock has its hash")
        pip([f"torch=={version}"], environ, say)
    else:
        pip([*HASHED, "-r", str(TORCH_LOCK)], environ, say)


def torch_offered(environ, say):
    """The locked version of torch as pip would choose it here, and whether that is another build
    than the lock's: one with a local part ("2.13.0+cpu"), from an index that pip was given."""
    locked = re.search(r"^torch==([^\s;]+)", TORCH_LOCK.read_text(), re.MULTILINE).group(1)
    report = VENV / "torch.json"
    # Where two indexes have the version, pip takes the build with a local part.
    pip(["--dry-run", "--no-deps", "--report", str(report), f"torch=={locked}"], environ, say)
    found = json.loads(report.read_text())["install"]
    report.unlink()
    version = found[0]["metadata"]["version"]
    return version, "+" in version


def pip(arguments, environ, say):
    """pip install with some arguments; shows the large downloads, keeps the rest for an error."""
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", *arguments]
    tail = deque(maxlen=12)
    other = unreachable = False
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
    )
    try:
        for line in process.stdout:
            tail.append(line.rstrip())
            other = other or OTHER_FILE in line
            unreachable = unreachable or bool(UNREACHABLE.search(line))
            if re.search(r"Downloading .*\(\d{2,}[\d.]* MB\)", line):
                say("  " + line.strip())
            elif line.startswith("Installing collected packages"):
                count = line.count(",") + 1
                say(f"  installing {count} package{'s' if count > 1 else ''}")
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code == 0:
        return
    sys.stderr.write("\n".join(tail) + "\n")
    kept = (
        " The environment of the earlier lock is kept: PYTHON=.venv/bin/python uses it."
        if SPARE.exists()
        else ""
    )
    if other:
        raise SetupError(
            "the index gave another file than the lock names (the sha256 above differ), so .venv "
            "was not built. Use another index or mirror; if the file is meant to be another, "
            "'make lock' writes its hash." + kept
        )
    if unreachable:
        raise SetupError(
            "pip could not reach a package index, so .venv was not built. Connect this machine, "
            "or point pip at a mirror or a folder of wheels (PIP_INDEX_URL, PIP_FIND_LINKS), or "
            "name an environment that already has the packages with PYTHON=path." + kept
        )
    raise SetupError(
        f"pip stopped with status {code} (its last lines are above), so .venv was not built. "
        "Put right what it names and run make again, or name an environment that already has "
        "the packages with PYTHON=path." + kept
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("purpose", choices=("report", "lab", "test"))
    parser.add_argument("--python", default="", help="use this interpreter, or fail")
    parser.add_argument("--check", action="store_true", help="print what this interpreter lacks")
    options = parser.parse_args(arguments)
    if options.check:
        print(json.dumps(problems(options.purpose)))
        return 0

    def say(text):
        print(text, file=sys.stderr, flush=True)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)  # pip must not go on alone
    try:
        info = choose(options.purpose, options.python, os.environ, say)
    except (SetupError, OSError) as error:
        if isinstance(error, OSError):
            error = f"{error.filename or ROOT}: {error.strerror}, so .venv was not built."
        wrapped = textwrap.fill(
            f"set-up: {error}", 96, break_long_words=False, break_on_hyphens=False
        )
        say(wrapped)
        return 1
    except KeyboardInterrupt:
        say("\nset-up: interrupted. Nothing half-built is kept; the next make starts it again.")
        return 130
    say(f"environment: {named(info)}")
    print(info["executable"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
