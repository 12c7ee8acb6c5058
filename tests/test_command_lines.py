"""Bad command lines: each ends with status 2 and one line that names the value and the fix."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from lib import __main__ as command
from lib.files import ROOT
from lib.run import loop, options
from tools import failure_matrix

LONG = "x" * 5000
RELEASED = "outputs/released/h100-sxm"
FIT = "fit --model gpt-oss-20b --gpu-gb 80"

BAD = [  # the line, the value that it must name, and a word of the fix
    # which command
    ("", "VERB", "--help"),
    ("reprot", "reprot", "report"),
    ("report extra", "extra", "--help"),
    ("report --prof demo", "--prof", "--profile"),
    ("report --modles x", "--modles", "did you mean '--models'"),
    ("report --profile", "--profile", "expected one argument"),
    # what to run
    ("report --profile dmo", "dmo", "did you mean 'demo'"),
    ("report --profile DEMO", "DEMO", "did you mean 'demo'"),
    ("report --profile models", "models", "PROFILE=<name>"),
    ("report --profile gpus", "gpus", "PROFILE=<name>"),
    ("report --profile ../params/demo", "../params/demo", "Known: "),
    ("report --profile demo.yaml", "demo.yaml", "did you mean 'demo'"),
    (f"report --profile {LONG}", "xxx", "Known: "),
    ("report --models ,", "MODELS=,", "leave it out"),
    ("report --models nonsense", "nonsense", "MODELS=<name>"),
    ("report --models tiny-qwen", "tiny-qwen", "did you mean 'tiny-qwen3'"),
    ("report --models tiny-qwen3,nonsense", "nonsense", "MODELS=<name>"),
    ("report --models https://example.org/a/b", "https://example.org/a/b", "hub id"),
    ("report --models a/b/c", "a/b/c", "hub id"),
    ("report --models ../nowhere", "../nowhere", "folder"),
    ("report --models nowhere.gguf", "nowhere.gguf", ".gguf file"),
    (f"report --models {LONG}", "xxx", "hub id"),
    (f"report --models a/{LONG}", "xxx", "hub id"),
    ("report --profile gpu", "'gpu'", "MODELS="),
    ("report --notebooks latecy", "latecy", "did you mean 'latency'"),
    ("report --notebooks ,,", "NOTEBOOKS=,,", "leave it out"),
    ("report --notebooks latency,../x", "../x", "NOTEBOOKS=<name>"),
    ("report --notebooks start", "start", "NOTEBOOKS=<name>"),
    ("report --weights rnd", "rnd", "WEIGHTS=<name>"),
    ("report --weights ,", "WEIGHTS=,", "leave it out"),
    ("report --weights Random", "Random", "did you mean 'random'"),
    ("report --stack fast", "fast", "STACK=<name>"),
    ("report --stack eager", "eager", "did you mean 'hf-eager'"),
    ("report --dtype bf16", "bf16", "DTYPE=<name>"),
    ("report --dtype float32,bfloat16", "float32, bfloat16", "one value"),
    ("report --dtype int3", "int3", "DTYPE=<name>"),
    ("report --devices 2", "devices: 2", "STACK=vllm"),
    ("report --devices 0", "devices: 0", "whole number of GPUs"),
    ("report --devices two", "'two'", "whole number of GPUs"),
    # how
    ("report --timeout -5", "'-5'", "seconds above 0"),
    ("report --timeout=-5", "'-5'", "seconds above 0"),
    ("report --timeout 0", "'0'", "seconds above 0"),
    ("report --timeout nan", "'nan'", "seconds above 0"),
    ("report --timeout inf", "'inf'", "seconds above 0"),
    ("report --timeout 1e30", "'1e30'", "up to 10,000,000"),
    ("report --timeout 1h", "'1h'", "such as 3600"),
    ("report --timeout one", "'one'", "such as 3600"),
    ("report --force maybe", "'maybe'", "1 or 0"),
    ("report --force=2", "'2'", "1 or 0"),
    ("report --wait sometimes", "'sometimes'", "1 or 0"),
    ("report --gpu-hour-usd -1", "'-1'", "USD above 0"),
    ("report --gpu-hour-usd 0", "'0'", "USD above 0"),
    ("report --gpu-hour-usd nan", "'nan'", "USD above 0"),
    ("report --gpu-hour-usd $2", "'$2'", "such as 2.5"),
    ("report --gpu-hour-usd 2,5", "'2,5'", "such as 2.5"),
    ("report --kwh-usd inf", "'inf'", "USD above 0"),
    ("report --kwh-usd cheap", "'cheap'", "such as 2.5"),
    ("report --study nowhere.yaml", "nowhere.yaml", "params/published"),
    ("report --study params", "params", "params/published"),
    # where
    (f"report --from {RELEASED} --out README.md", "README.md", "choose another"),
    (f"report --from {RELEASED} --out README.md/x", "README.md", "choose another"),
    (f"report --from {RELEASED} --out /proc/x", "/proc/x", "choose another"),
    (f"report --from {RELEASED} --out {LONG}", "xxx", "shorter name"),
    ("report --out README.md", "README.md", "choose another"),
    ("report --out README.md/x/y", "README.md", "choose another"),
    (f"report --out {RELEASED}", RELEASED, "choose another"),
    ("report --out outputs/released/new", "outputs/released/new", "choose another"),
    ("report --from outputs/nowhere", "outputs/nowhere", "FROM takes a folder"),
    ("report --from README.md", "README.md", "FROM takes a folder"),
    ("report --from tests", "tests", "that a run wrote"),
    (f"report --from {LONG}", "xxx", "shorter name"),
    ("report --out ~nobody-here/x", "~nobody-here/x", "write the path out"),
    ("report --from ~nobody-here/x", "~nobody-here/x", "write the path out"),
    ("report --models ~nobody-here/x", "~nobody-here/x", "write the path out"),
    ("report --study ~nobody-here/x", "~nobody-here/x", "write the path out"),
    ("versus ~nobody-here/x lib --model tiny-qwen3", "~nobody-here/x", "write the path out"),
    ("versus lib lib:~nobody-here/x --model tiny-qwen3", "~nobody-here/x", "write the path out"),
    # one job
    ("job --profile demo nothing", "nothing", "Known: "),
    ("job --profile dmo", "dmo", "did you mean 'demo'"),
    ("job ../../x", "../../x", "Known: "),
    ("job a b", "'a'", "Known: "),
    ("job _all/machine nothing", "nothing", "Known: "),
    ("job --back", "--back", "expected one argument"),
    ("job _all/machine --back README.md", "README.md", "choose another"),
    (f"job _all/machine --back {RELEASED}", RELEASED, "choose another"),
    # several GPUs, and elsewhere
    ("report --jobs 2", "JOBS=2", "leave JOBS out"),
    ("report --jobs 0", "'0'", "above 0"),
    ("report --jobs -2", "'-2'", "above 0"),
    ("report --jobs 1.5", "'1.5'", "whole number"),
    ("report --jobs all", "'all'", "such as 2"),
    ("report --jobs 1e9", "'1e9'", "up to 1,024"),
    ("jobs --format slurm", "'slurm'", "choose from"),
    ("jobs --engine pbs", "'pbs'", "choose from"),
    ("jobs --profile dmo", "dmo", "did you mean 'demo'"),
    ("jobs --models nonsense", "nonsense", "MODELS=<name>"),
    ("jobs --format k8s --out outputs/x-jobs", "FORMAT=k8s", "IMAGE="),
    ("jobs --profile paper --format skypilot --out outputs/x-jobs", "FORMAT=skypilot", "GPU="),
    (f"jobs --out {RELEASED}", RELEASED, "choose another"),
    ("jobs --gpu a;b --out outputs/x-jobs", "'a;b'", "as the scheduler does"),
    ("jobs --out README.md", "README.md", "choose another"),
    ("jobs -- --dry-run", "--dry-run", "ENGINE=slurm"),
    # folders of results
    ("merge", "FROM and OUT", "make merge FROM="),
    (f"merge {RELEASED}", "OUT", "make merge FROM="),
    ("merge outputs/nowhere --out outputs/x-merged", "outputs/nowhere", "FROM takes results"),
    (f"merge {RELEASED} --out {RELEASED}/sub", f"{RELEASED}/sub", "choose another"),
    (f"merge {RELEASED} --out outputs/released", "outputs/released", "choose another"),
    (f"merge {RELEASED} --out outputs", "outputs", "choose a"),
    (f"merge {RELEASED} --out tests", "tests", "choose a new OUT"),
    ("compare", "A and B", "make compare A="),
    (f"compare {RELEASED}", "B", "make compare A="),
    (f"compare {RELEASED} outputs/nowhere", "outputs/nowhere", "folder"),
    (f"compare README.md {RELEASED}", "README.md", "folder"),
    ("compare a b c", "c", "--help"),
    # two environments
    ("versus", "MODEL", "make versus A="),
    ("versus --model tiny-qwen3", "A is needed", "folder of packages"),
    ("versus python3 --model tiny-qwen3", "B is needed", "folder of packages"),
    ("versus no-python lib --model tiny-qwen3", "A=no-python", "name an interpreter"),
    ("versus README.md lib --model tiny-qwen3", "A=README.md", "name an interpreter"),
    (f"versus {LONG} lib --model tiny-qwen3", "xxx", "shorter name"),
    ("versus lib python3:nowhere --model tiny-qwen3", "'nowhere'", "no folder"),
    ("versus /bin/true lib --model tiny-qwen3", "A=/bin/true", "no Python"),
    (f"versus lib lib --model tiny-qwen3 --out {RELEASED}/x", f"{RELEASED}/x", "choose another"),
    ("versus lib lib --model x --rounds 0", "'0'", "such as 3"),
    ("versus lib lib --model x --calls 1.5", "'1.5'", "such as 8"),
    ("versus lib lib --model x --effect -5", "'-5'", "such as 5"),
    ("versus lib lib --model x --weights none", "'none'", "choose from"),
    ("versus lib lib --model nonsense", "nonsense", "known: "),
    ("versus --from tests", "tests", "that it wrote"),
    ("bundle outputs/nowhere", "outputs/nowhere", "FROM takes a folder"),
    ("bundle README.md", "README.md", "FROM takes a folder"),
    ("bundle tests", "tests", "FROM takes a folder"),
    (f"bundle {RELEASED} --out outputs/released/x.zip", "outputs/released/x.zip", "choose another"),
    (f"bundle {RELEASED} --out tests", "tests", "a file"),
    (f"bundle {RELEASED} --out README.md/x.zip", "README.md", "choose another"),
    ("score outputs/nowhere", "outputs/nowhere", "FROM takes a folder"),
    (f"score {RELEASED} --out outputs/released/x", "outputs/released/x", "choose another"),
    ("score tests", "tests", "choose a folder"),
    # which option
    ("plan", "GPU or GPU_GB", "make plan GPU="),
    ("plan --gpu-gb 0.0001GB", "'0.0001GB'", "above 0"),
    ("plan --gpu A100", "'A100'", "GPU="),
    ("plan --gpu H300", "'H300'", "Known: "),
    ("plan outputs/nowhere --gpu H200", "outputs/nowhere", "FROM takes a folder"),
    # will it fit
    ("fit", "MODEL and GPU_GB", "make fit MODEL="),
    ("fit --model gpt-oss-20b", "GPU_GB", "make fit MODEL="),
    ("fit --gpu-gb 80", "MODEL", "make fit MODEL="),
    ("fit --model gpt-oss-20b --gpu H300", "'H300'", "Known: "),
    ("fit --model Llama-3.3-70B --gpu-gb 24", "Llama-3.3-70B", "meta-llama/Llama-3.3-70B-Instruct"),
    ("fit --model gpt-oss-20 --gpu-gb 80", "gpt-oss-20", "did you mean"),
    (f"fit --model {LONG} --gpu-gb 80", "xxx", "shorter name"),
    ("fit --model nowhere.gguf --gpu-gb 80", "nowhere.gguf", ".gguf file"),
    ("fit --model gpt-oss-20b --gpu-gb -80", "'-80'", "above 0"),
    ("fit --model gpt-oss-20b --gpu-gb 0", "'0'", "above 0"),
    ("fit --model gpt-oss-20b --gpu-gb nan", "'nan'", "above 0"),
    ("fit --model gpt-oss-20b --gpu-gb inf", "'inf'", "above 0"),
    ("fit --model gpt-oss-20b --gpu-gb 1e300", "'1e300'", "up to 1,000,000"),
    ("fit --model gpt-oss-20b --gpu-gb 80TB", "'80TB'", "such as 80"),
    (f"{FIT} --dtype int99", "int99", "Known: "),
    (f"{FIT} --bandwidth-gb-s -1", "'-1'", "above 0"),
    (f"{FIT} --bandwidth-gb-s 1e300", "'1e300'", "up to"),
    (f"{FIT} --context 0", "'0'", "above 0"),
    (f"{FIT} --context -1", "'-1'", "above 0"),
    (f"{FIT} --context 2k", "'2k'", "such as 2048"),
    (f"{FIT} --context 1e9", "'1e9'", "such as 2048"),
    (f"{FIT} --context 10000000000", "'10000000000'", "up to 1,000,000,000"),
    (f"{FIT} --context ,", "','", "such as 2048"),
    # the rest
    ("audit --study nowhere.yaml", "nowhere.yaml", "params/published"),
    ("audit --csv nowhere", "nowhere", "CSV takes the folder"),
    ("audit --study params/models.yaml", "models.yaml", ""),
    ("visit", "--out", "--help"),
    ("visit --out x --device tpu", "'tpu'", "choose from"),
    ("visit --out x --dtype int8", "'int8'", "choose from"),
    (f"visit --device cpu --out {RELEASED}", RELEASED, "choose another"),
    ("visit --device cpu --out README.md", "README.md", "choose another"),
    ("visit --device cpu --out x --models nonsense", "nonsense", "known: "),
    ("visit --out x --contexts -1", "'-1'", "above 0"),
    ("visit --out x --new-tokens 0", "'0'", "above 0"),
]


@pytest.mark.parametrize(("line", "value", "fix"), BAD, ids=[line[:60] for line, *_ in BAD])
def test_a_bad_command_line_is_one_line_with_value_and_fix(line, value, fix, capsys, monkeypatch):
    monkeypatch.setitem(loop.run.__kwdefaults__, "check", lambda *_: pytest.fail("it was accepted"))
    try:
        status = command.main(line.split())
    except SystemExit as leave:
        status = leave.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert value in err and fix in err
    assert len(err) < 2500


def test_there_are_as_many_as_were_tried():
    assert len(BAD) >= 93 and len({line for line, *_ in BAD}) == len(BAD)


@pytest.mark.parametrize("line", ["report --out x", "bundle x", "plan --gpu H100", "jobs --out x"])
def test_a_user_without_a_home_is_told(line, monkeypatch, capsys):
    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert command.main(line.split()) == 2
    assert capsys.readouterr().err == (
        "error: '~' is no path: there is no such home folder; set HOME, or write the path out\n"
    )


def test_a_visit_without_a_gpu_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("lib.run.lease.gpus", lambda: [])
    assert command.main(["visit", "--out", str(tmp_path / "v")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and '"cuda" was asked for' in err
    assert not (tmp_path / "v").exists()


def test_a_visit_whose_model_cannot_be_built_has_not_gone_well(capsys, tmp_path):
    (tmp_path / "model").mkdir()  # a folder without config.json
    line = ["visit", "--device=cpu", f"--out={tmp_path / 'v'}", "--models", str(tmp_path / "model")]
    assert command.main(line) == 1
    assert "error: " in capsys.readouterr().err


YES = ("1", "y", "yes", "YES", "t", "true", "True", "on", "On", " 1 ")
NO = ("0", "n", "no", "No", "f", "false", "False", "FALSE", "off", "Off", "")


@pytest.mark.parametrize(("words", "value"), [(YES, True), (NO, False)])
def test_yes_and_no_as_people_write_them(words, value):
    for word in words:
        args = command.parser().parse_args(["report", f"--force={word}", "--wait", word])
        assert (args.force, args.wait) == (value, value)
    assert command.parser().parse_args(["report", "--force"]).force is True
    assert command.parser().parse_args(["report"]).force is False


@pytest.mark.parametrize(
    ("line", "given", "says"),
    [
        ("report", "MODEL", "'MODEL'; did you mean 'MODELS'"),
        ("report", "MODLES", "'MODLES'; did you mean 'MODELS'"),
        ("report", "GPU_GB", "'GPU_GB'"),
        ("report", "ENGINE", "'ENGINE'"),
        ("report --from x", "JOBS", "make report FROM=: 'JOBS'"),
        ("report --from x", "MODELS FORCE", "make report FROM=: 'FORCE'"),
        ("report --from x", "FORCE", "'FORCE'"),
        ("plan", "gpu", "make plan: 'gpu'; did you mean 'GPU'"),
        ("plan", "MODEL", "make plan: 'MODEL'"),
        ("fit", "USERS", "make fit: 'USERS'"),
        ("fit", "MODELS", "did you mean 'MODEL'"),
        ("compare a b", "FROM", "make compare: 'FROM'"),
        ("merge a --out b", "PROFILE", "make merge: 'PROFILE'"),
        ("bundle", "MODELS", "make bundle: 'MODELS'"),
        ("export", "A", "make export: 'A'"),
        ("audit", "FROM", "make audit: 'FROM'"),
        ("score", "STUDY", "make score: 'STUDY'"),
        ("versus a b", "MODELS", "did you mean 'MODEL'"),
        ("jobs", "JOBS", "make jobs: 'JOBS'"),
    ],
)
def test_a_variable_that_would_not_be_heeded_is_refused(line, given, says):
    with pytest.raises(command.ParamsError, match=says):
        options.refuse_variables(given, command.parser().parse_args(line.split()))


def test_make_tells_every_verb_what_was_given():
    """The tests may run under make themselves; its flags and variables are not for this one."""
    own = ("MAKE", "MFLAGS", "ARGS", "WORKBOOK_GIVEN")
    ran = subprocess.run(
        ["make", "plan", "gpu=H200", f"PYTHON={sys.executable}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
        env={name: value for name, value in os.environ.items() if not name.startswith(own)},
    )  # fmt: skip
    assert ran.returncode == 2 and "did you mean 'GPU'" in ran.stderr


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("bundle", "PROFILE FROM OUT ARGS PYTHON"),
        ("plan", "FROM GPU GPU_GB CONTEXT USERS TTFT_MS ITL_MS GPU_HOUR_USD"),
        ("fit", "MODEL GPU GPU_GB DTYPE BANDWIDTH_GB_S CONTEXT ARGS"),
        (
            "versus",
            "FROM A B MODEL WEIGHTS DTYPE CONTEXT NEW_TOKENS CALLS ROUNDS EFFECT TIMEOUT OUT",
        ),
        ("jobs", "PROFILE MODELS STACK OUT FORMAT ENGINE GPU IMAGE ARGS FORCE WAIT TIMEOUT"),
        ("merge", "FROM OUT"),
        ("compare", "A B OUT"),
        ("export", "FROM OUT"),
        ("score", "FROM OUT"),
        ("audit", "STUDY CSV ARGS"),
    ],
)
def test_every_verb_takes_what_the_makefile_hands_it(line, given):
    options.refuse_variables(given, command.parser().parse_args([line]))


def test_variables_for_other_programs_pass():
    measured, rebuilt = (
        command.parser().parse_args(line.split()) for line in ("report", "report --from x")
    )
    foreign = "HF_HOME CUDA_VISIBLE_DEVICES OMP_NUM_THREADS"
    options.refuse_variables(f"PROFILE MODELS JOBS ALSO KWH_USD {foreign}", measured)
    options.refuse_variables("FROM OUT STUDY", rebuilt)


@pytest.mark.parametrize("wait_s", [0.3, 0.8, 2.0])
def test_ctrl_c_in_the_first_seconds_leaves_no_traceback(wait_s, tmp_path):
    code = "import sys; sys.argv[0] = 'lib'; import runpy; print('.', flush=True)\n"
    code += "runpy.run_module('lib', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "report", "--out", str(tmp_path / "o")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdout.readline()
    time.sleep(wait_s)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in err and "interrupted" in err


WAITING = {  # a verb, and a function of it that is held
    "merge": ("lib.records.slices", "_write_plan"),
    "bundle": ("lib.report.leaks", "find"),
    "compare": ("lib.report.comparison", "load"),
    "export": ("lib.analysis.frame", "frame"),
    "score": ("lib.analysis.capacity.score", "build"),
    "plan": ("lib.analysis.choice", "options"),
}


@pytest.mark.parametrize(
    ("verb", "number"),
    [
        *((verb, signal.SIGTERM) for verb in WAITING),
        ("merge", signal.SIGINT),
        ("merge", signal.SIGHUP),
    ],
)
def test_a_verb_that_is_ended_leaves_nothing_half_written(verb, number, tmp_path):
    module, name = WAITING[verb]
    code = "import sys, runpy, time, importlib\n"
    code += f"setattr(importlib.import_module({module!r}), {name!r}, lambda *_, **__: ("
    code += "print('.', flush=True), time.sleep(60)))\nsys.argv[0] = 'lib'\n"
    code += "runpy.run_module('lib', run_name='__main__', alter_sys=True)"
    out, temporary = tmp_path / "o" / "x", tmp_path / "t"
    temporary.mkdir()
    more = [str(ROOT / RELEASED)] * (2 if verb == "compare" else 1)
    more += [] if verb == "plan" else ["--out", str(out)]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            verb,
            *more,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [
            signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        ],
    )
    assert process.stdout.readline() == ".\n", process.communicate()[1]
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err.endswith("interrupted\n")
    assert "Traceback" not in err
    left = [
        path for folder in (out.parent, temporary) for path in folder.rglob("*") if path.is_file()
    ]
    assert left == []


def test_the_page_of_failures_is_what_the_tables_say():
    assert failure_matrix.TARGET.read_text(encoding="utf-8") == failure_matrix.text()
