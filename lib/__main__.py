"""The command line behind the Makefile: python -m lib VERB.

report   run the notebooks of a profile, or rebuild a report from records
job      run jobs of a profile by their names, in turn; without a name, list them
jobs     print files that run a profile on SLURM, Kubernetes or SkyPilot
visit    measure a visit: the arms that wait for the host, in one stretch of time
merge    add the slices of several result folders up, job by job
compare  ratios with intervals between two result sets
versus   the same calls under two environments: slower, faster, or neither, and why
bundle   a zip of a report and all it rests on
export   every number of a result set as CSV and Parquet
fit      will a model fit a GPU? computed from its architecture alone
plan     which measured model and stack serves so many users within limits
audit    a published study against its own data

Exit status: 0, 1 where something did not go well, 2 for bad input.
"""

from __future__ import annotations

import os
import signal
import sys


def _leave(number: int, frame: object) -> None:
    os.write(2, b"interrupted before any work began\n")
    os._exit(128 + number)


if __name__ == "__main__":  # Ctrl-C while all else is imported
    signal.signal(signal.SIGINT, _leave)

import argparse
import errno
import functools
import json
import shlex
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lib import files
from lib.analysis import cost
from lib.files import ParamsError, resolve
from lib.records import store
from lib.records.kinds import DTYPES, WEIGHTS
from lib.run import options, profiles
from lib.run.console import say, show
from lib.run.lease import BusyError
from lib.run.preflight import PreflightError

BAD_INPUT = (ValueError, OSError, RuntimeError)
# A run has more to say: whatever else it raises is a fault of ours, shown whole.
RELEASED = "outputs/released/h100-sxm"
NEXT = {
    True: "next: make fit MODEL=<yours> GPU_GB=24, or make report PROFILE=gpu MODELS=<yours>",
    False: "next: make bundle FROM={out}, or make lab",
}
REFUSED = (ParamsError, PreflightError, BusyError)


def make_report(args: argparse.Namespace) -> int:
    """Run a profile and write its report; with --from only write the report."""
    from lib.records import cut_off
    from lib.report import closing
    from lib.report import document as report

    os.environ["JUPYTER_PATH"] = files.jupyter_path(sys.path, os.environ.get("JUPYTER_PATH", ""))
    out_dir = resolve(args.out or f"outputs/{'rebuilt' if args.source else args.profile}")
    prices = cost.Prices(args.gpu_hour_usd, args.kwh_usd)
    write_report = functools.partial(report.write, prices=prices, study=study_of(args), tell=say)
    if args.source:
        store.refuse_released(out_dir)
        source = require_results(resolve(args.source))
        files.require_room(out_dir)
        for folder in cut_off.folders(source):
            say(
                f"note: {files.short(folder)} holds a run that nobody ended: `make merge` takes "
                "up what it has measured, and so does the command that began it"
            )
        page = write_report(source, out_dir)
        say(f"report: {files.short(page)}")
        return 0
    from lib.run import interim, loop, several

    profile, ran, broken = profile_of(args), (), ()
    if args.jobs > 1:
        own = [*options.of_run(args), f"--out={out_dir}"]
        ran, broken = several.measure(profile, out_dir, args.jobs, own)
    status = loop.run(
        profile,
        out_dir,
        ran=ran,
        force=args.force,
        timeout_s=args.timeout,
        wait=args.wait,
        write_page=report.write_notebook_page,
        write_report=write_report,
        after_job=interim.Interim(write_report),
        results=closing.text,
    )
    for text in broken:
        say(f"error: {text}")
    if status == 0 and not broken:
        say(NEXT[args.profile == "demo"].format(out=files.short(out_dir)))
    return status or min(len(broken), 1)


def require_results(source: Path) -> Path:
    """The folder, if a run wrote it; nothing is measured there and it is left as it is."""
    if not source.is_dir():
        raise ParamsError(f"no folder {files.short(source)}; FROM takes a folder of run.json files")
    if not store.manifests(source):
        raise ParamsError(
            f"no run.json below {files.short(source)}; choose a folder that a run wrote"
        )
    return source


def run_one(args: argparse.Namespace) -> int:
    """Run jobs in turn, in a process beside others; writes no report."""
    from lib.run import loop, plan

    out_dir = resolve(args.out or f"outputs/{args.profile}")
    profile = profile_of(args)
    if not args.names:
        show("".join(f"{job.name}\n" for job in plan.plan(profile, out_dir)))
        return 0
    return loop.run(
        profile,
        out_dir,
        only=args.names,
        back=resolve(args.back) if args.back else None,
        force=args.force,
        timeout_s=args.timeout,
        wait=args.wait,
    )


def print_jobs(args: argparse.Namespace) -> int:
    """Print files that run a profile elsewhere, one for each GPU; ENGINE=slurm runs them too."""
    from lib.run import elsewhere, groups, plan

    if args.more and not args.engine:
        raise ParamsError(f"{' '.join(args.more)} is for the engine: add ENGINE=slurm")
    out_dir = resolve(args.out or f"outputs/jobs/{args.profile}")
    profile = profile_of(args)
    jobs = plan.plan(profile, out_dir)
    every = elsewhere.stretches(groups.groups(jobs), out_dir, options.of_run(args), args.timeout)
    form = "sbatch" if args.engine else args.format
    for path in elsewhere.write(form, every, out_dir, gpu=args.gpu, image=args.image):
        show(f"{files.short(path)}\n")
    status = elsewhere.snakemake(every, out_dir, args.gpu, args.more) if args.engine else 0
    if not args.engine:
        script = shlex.quote(files.short(out_dir / "submit.sh"))
        say(f"submit them: sh {script} [options of the scheduler]")
    say(f"then: make merge FROM={shlex.quote(files.short(out_dir))} OUT=<folder>")
    if reading := ",".join(dict.fromkeys(job.notebook for job in jobs if job.reads)):
        names = ("profile", *(name for name in profiles.SLICES if name != "notebooks"))
        given = (f"{n.upper()}={shlex.quote(v)} " for n in names if (v := getattr(args, n)))
        say(f"and what reads: make report {''.join(given)}NOTEBOOKS={reading} OUT=<folder>")
    return status


def make_visit(args: argparse.Namespace) -> int:
    """Measure one visit; 2 where it ended before its last round, 1 where a model failed."""
    from lib.measure import visit
    from lib.run import lease, plan, scrub

    out = resolve(args.out)
    store.refuse_released(out)
    for gpu in lease.visible(lease.gpus())[:1] if args.device == "cuda" else ():
        if reason := lease.shared_by(gpu):
            raise lease.shared_error(gpu, reason)
    device = visit.ready(out, args.models or (), args.device)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` sends it
    try:
        folder = visit.visit(
            out,
            names=args.models or visit.MODELS,
            contexts=args.contexts or visit.CONTEXTS,
            new_tokens=visit.NEW_TOKENS if args.new_tokens is None else args.new_tokens,
            dtype=args.dtype,
            device=device,
            code={"lib_sha": plan.lib_sha(), "git": plan.git_state()},
            clean=lambda text: scrub.text(text, scrub.names(out)),
        )
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    is_whole, errors = visit.outcome(folder)
    for error in errors:
        say(f"error: {error}")
    return 2 if not is_whole else 1 if errors else 0


def profile_of(args: argparse.Namespace) -> profiles.Profile:
    """The profile that a command line names, with its slices; what a server serves it is asked."""
    for name in profiles.SLICES:
        if (text := getattr(args, name)) and not files.split(text):
            raise ParamsError(
                f"{name.upper()}={text} names nothing; leave it out for all, or name some"
            )
    names = (*profiles.SLICES, profiles.SERVER, profiles.ALSO)
    slices = {key: getattr(args, key) for key in names}
    if args.server and not args.models:
        from lib.measure.serving import server

        try:
            slices["models"] = server.models(args.server)[0]["id"]
        except server.EndpointError as error:
            raise ParamsError(f"SERVER={args.server}: {error}") from None
    return profiles.profile(args.profile, slices)


def merge_folders(args: argparse.Namespace) -> int:
    """Merge result folders and write the report of what they hold together."""
    from lib.records import slices
    from lib.report import document as report
    from lib.run import elsewhere

    if not args.sources or not args.out:
        example = 'make merge FROM="outputs/a outputs/b" OUT=outputs/c'
        raise ParamsError(f"FROM and OUT are needed: {example}")
    out_dir = resolve(args.out)
    sources = [part for source in args.sources for part in elsewhere.parts(resolve(source))]
    files.require_room(out_dir.parent)
    stale = slices.merge(sources, out_dir)
    for line in slices.doubts(sources):
        say(f"note: {line}")
    page = report.write(out_dir)
    for name in stale:
        say(f"left out, since it has read other rows: {name}")
    if stale:
        say("run these again with make report OUT= and the profile they came from")
    say(f"report: {files.short(page)}")
    return 0


def compare_sets(args: argparse.Namespace) -> int:
    """Compare two result sets; 1 where no arm of them can be compared."""
    from lib.report import comparison

    if not args.a or not args.b:
        raise ParamsError("A and B are needed: make compare A=outputs/x B=outputs/y")
    a, b = resolve(args.a), resolve(args.b)
    out = resolve(args.out or f"outputs/compared/{a.name}--{b.name}")
    page, pairs = comparison.write(a, b, out)
    show(comparison.text(pairs))
    if not pairs:
        say("nothing is comparable; the report says why")
    say(f"report: {files.short(page)}")
    return 0 if pairs else 1


def make_versus(args: argparse.Namespace) -> int:
    """Measure two environments in turn and say which is slower; with --from only say it again."""
    from lib.analysis import versus as analysis
    from lib.report import versus as report
    from lib.run import versus

    def verdict(folder: Path) -> None:
        run = analysis.load(folder)
        show("\n".join(["", report.summary(run), ""]))
        say(f"report: {files.short(report.write(folder))}")

    if args.source:
        verdict(resolve(args.source))
        return 0
    if not args.model:
        raise ParamsError("MODEL is needed: make versus A=python3 B=folder MODEL=Qwen3-32B")
    start = datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` sends it
    try:
        versus.run(
            versus.environment("A", args.a),
            versus.environment("B", args.b),
            out=resolve(args.out or f"outputs/versus/{store.model_folder(args.model)}-{start}"),
            rounds=args.rounds,
            timeout_s=args.timeout,
            device=args.device,
            sought=args.effect / 100,
            options={
                "name": args.model,
                "weights": args.weights,
                "dtype": args.dtype,
                "context": args.context,
                "new_tokens": args.new_tokens,
                "calls": args.calls,
                "seed": 0,
            },
            after_round=verdict,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def write_bundle(args: argparse.Namespace) -> int:
    """Zip a result set; refused where something personal is in it."""
    from lib.report import bundle, leaks

    source = resolve(args.source)
    target = resolve(args.out or f"outputs/bundles/{source.name}.zip")
    personal = [pair for pair in leaks.here() if pair[1] not in args.allow]
    path = bundle.write(source, target, personal)
    size = path.stat().st_size / 1e6
    say(f"bundle: {files.short(path)} ({size:.1f} MB, SHA-256 {files.file_sha(path)})")
    return 0


def export_numbers(args: argparse.Namespace) -> int:
    """Write every number of a result set as CSV and Parquet, with a data dictionary."""
    from lib.analysis import frame

    source = require_results(resolve(args.source))
    out = resolve(args.out or f"outputs/export/{source.name}")
    store.refuse_released(out)
    for path in frame.export(source, out):
        say(f"{files.short(path)} ({path.stat().st_size / 1e6:.2f} MB)")
    return 0


def check_fit(args: argparse.Namespace) -> int:
    """Print whether a model fits a GPU, as text or JSON."""
    from lib.analysis import fit, predictions
    from lib.analysis.capacity import predicted
    from lib.hardware.datasheets import datasheet
    from lib.measure.memory import forecast
    from lib.models import card, formats, load, origin, shapes

    sheet = datasheet(predicted.card_named(args.gpu) if args.gpu else None)
    gpu_gb = args.gpu_gb or (sheet.memory_bytes or 0) / 1e9
    bandwidth_gb_s = args.bandwidth_gb_s or (sheet.memory_bytes_per_s or 0) / 1e9
    if not args.model or not gpu_gb:
        example = "make fit MODEL=gpt-oss-20b GPU_GB=80, or GPU=H200"
        raise ParamsError(f"MODEL and GPU_GB are needed: {example}")
    shipped = None if resolve(args.model).exists() else shapes.shipped(args.model)
    model = origin.Origin(shipped[0], config=shipped[1]) if shipped else args.model
    try:
        answer = fit.answer(
            functools.partial(load.card, model),
            gpu_gb=gpu_gb,
            forms=formats.listed(args.dtype) or formats.USUAL,
            bandwidth_gb_s=bandwidth_gb_s or None,
            contexts=args.context or fit.CONTEXTS,
            workspace_of=forecast.workspace_of(model),
        )
    except card.ModelError as error:
        raise ParamsError(f"{error}; {shapes.hint(args.model)}") from None
    if shipped:
        answer["shapes"] = f"shapes ship with the workbook, the hub was not asked: {shipped[2]}"
    if lines := predictions.released_lines(answer["card"]["name"]):
        answer["measured"] = lines
    text = json.dumps(answer, indent=2, allow_nan=False) if args.json else fit.text(answer)
    show(text + "\n")
    return 0


def make_plan(args: argparse.Namespace) -> int:
    """Print which options serve so many users, and what stops the others; a GPU is predicted."""
    from lib.analysis import choice, planner
    from lib.analysis.capacity import predicted, score
    from lib.analysis.rows import load
    from lib.hardware.datasheets import datasheet

    every = score.released() if args.gpu and not args.source else ()
    sources = every or [require_results(resolve(args.source or RELEASED))]
    options = [option for source in sources for option in choice.options(load(source))]
    gpu = predicted.card_named(args.gpu, (o.gpu for o in options)) if args.gpu else ""
    board = next((o.gpu_bytes for o in options if gpu and o.gpu == gpu and o.gpu_bytes), None)
    gpu_gb = args.gpu_gb or (board or datasheet(gpu).memory_bytes or 0) / 1e9
    if not gpu_gb:
        raise ParamsError("GPU or GPU_GB is needed: make plan GPU=H100 CONTEXT=2048 USERS=8")
    ask = choice.Ask(
        gpu_gb=gpu_gb,
        context=args.context,
        users=args.users,
        ttft_ms=args.ttft_ms,
        itl_ms=args.itl_ms,
        gpu_hour_usd=args.gpu_hour_usd,
        gpu=gpu,
        devices=args.devices or min((o.devices for o in options), default=1),
    )
    choices = [*options, *predicted.options(options)]
    show(planner.text(choice.offers(choices, ask), ask, choices) + "\n")
    return 0


def score_predictions(args: argparse.Namespace) -> int:
    """Set the registered predictions against what was measured since; default: released sets."""
    from lib.analysis.capacity import score, scored

    sources = [require_results(resolve(source)) for source in args.sources]
    out = resolve(args.out or "outputs/scored") if args.out or sources else None
    path = scored.write(sources or score.released(), out)
    say(f"{files.short(path)} and {path.with_suffix('.md').name}")
    return 0


def study_of(args: argparse.Namespace) -> Any:
    """The published study that a command line names, or this workbook's."""
    from lib.studies import study as studies

    path = resolve(args.study or studies.PUBLISHED)
    if not path.is_file():
        raise ParamsError(f"no study {args.study}; --study takes a file of params/published/")
    return studies.load(path)


def audit_study(args: argparse.Namespace) -> int:
    """Print the audit of a study; 1 where its facts differ from the files of --csv."""
    from lib.studies import audit
    from lib.studies import study as studies

    study = study_of(args)
    if args.csv is not None and not args.csv.is_dir():
        raise ParamsError(f"no folder {args.csv}; CSV takes the folder of the released files")
    findings = audit.findings(study)
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    title = f"{study.data['title']} ({study.data['source']})"
    show(f"{title}\n\n{audit.text(findings, width)}\n\n")
    show(f"{audit.conclusion(study, findings)}\n\n")
    if args.csv is None:
        return 0
    differences = studies.differences(study.data, args.csv)
    facts = len(study.data["released"])
    equal = f"released facts: {facts - len(differences)} of {facts} equal the files in {args.csv}"
    show("\n".join([*differences, equal]) + "\n")
    return 1 if differences else 0


def parser() -> argparse.ArgumentParser:
    """All verbs with their options."""
    top = options.Parser(
        prog="python -m lib",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = top.add_subparsers(metavar="VERB", required=True, dest="verb")

    def verb(name, function, errors=BAD_INPUT) -> argparse.ArgumentParser:
        text = function.__doc__
        own = verbs.add_parser(name, help=text, description=text)
        own.set_defaults(run=function, errors=errors)
        return own

    one = verb("report", make_report, errors=REFUSED)
    add_run_options(one)
    one.add_argument("--from", dest="source", type=Path, help="only rebuild a report")
    one.add_argument("--gpu-hour-usd", type=options.PRICE, help="price: shows cost per token")
    one.add_argument("--study", type=Path, help="default: the study of this workbook")
    one.add_argument("--kwh-usd", type=options.PRICE, help="price: shows cost of energy per token")
    one.add_argument("--jobs", type=options.JOBS, default=1, help="at once, one a GPU")

    one = verb("job", run_one, errors=REFUSED)
    one.add_argument("names", nargs="*", metavar="NAME", help="its folder below the results")
    one.add_argument("--back", type=Path, help="then again into this folder, the last one first")
    add_run_options(one)

    one = verb("jobs", print_jobs, errors=REFUSED)
    one.add_argument("--format", default="sbatch", choices=("sbatch", "k8s", "skypilot"))
    one.add_argument("--engine", default="", choices=("", "slurm"), help="run them by Snakemake")
    one.add_argument("--gpu", default="", help="its kind, as the scheduler calls it")
    one.add_argument("--image", default="", help="of a container, for k8s")
    one.add_argument("more", nargs="*", metavar="OPTION", help="for the engine, after --")
    add_run_options(one)

    one = verb("visit", make_visit, errors=REFUSED)
    one.add_argument("--out", required=True, help="the folder that gets the visit's own folder")
    one.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    one.add_argument("--models", nargs="+", metavar="NAME")
    one.add_argument("--contexts", nargs="+", type=options.TOKENS, metavar="TOKENS")
    one.add_argument("--new-tokens", type=options.TOKENS, metavar="TOKENS")
    one.add_argument("--dtype", default="bfloat16", choices=DTYPES)

    one = verb("merge", merge_folders)
    one.add_argument("sources", nargs="*", metavar="FOLDER")
    one.add_argument("--out", help="the folder that gets all of them")

    one = verb("compare", compare_sets)
    one.add_argument("a", nargs="?", metavar="A")
    one.add_argument("b", nargs="?", metavar="B")
    one.add_argument("--out", help="default: outputs/compared/<A>--<B>")

    one = verb("versus", make_versus)
    one.add_argument("a", nargs="?", default="", metavar="A", help="an interpreter or a folder")
    one.add_argument("b", nargs="?", default="", metavar="B", help="of packages, or both: x:y")
    one.add_argument("--model", help="hub id, folder or entry of params/models.yaml")
    one.add_argument("--weights", default="random", choices=WEIGHTS)
    one.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    one.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    one.add_argument("--context", type=options.TOKENS, default=2048)
    one.add_argument("--new-tokens", type=options.TOKENS, default=64)
    one.add_argument("--calls", type=options.CALLS, default=8, help="of each arm in a block")
    one.add_argument("--rounds", type=options.ROUNDS, default=3, help="of four blocks A B B A")
    one.add_argument("--effect", type=options.PERCENT, default=5, help="%% that matters")
    one.add_argument("--timeout", type=options.SECONDS, default=900, help="seconds for a block")
    one.add_argument("--from", dest="source", type=Path, help="only say what a run's rows say")
    one.add_argument("--out", help="default: outputs/versus/<model>-<start>")

    one = verb("bundle", write_bundle)
    one.add_argument("source", nargs="?", default="outputs/demo")
    one.add_argument("--out", help="default: outputs/bundles/<folder>.zip")
    one.add_argument(
        "--allow", action="append", default=[], metavar="WORD", help="a name that is not personal"
    )

    one = verb("export", export_numbers)
    one.add_argument("source", nargs="?", default=RELEASED, help="a folder of results")
    one.add_argument("--out", help="default: outputs/export/<folder>")

    one = verb("fit", check_fit)
    one.add_argument("--model")
    one.add_argument("--gpu", default="", help="a card of params/gpus.yaml: H200, L4 ...")
    one.add_argument("--gpu-gb", type=options.gigabytes, help="of the card; default: that of --gpu")
    one.add_argument("--dtype", default="", help="bfloat16, mxfp4, 4-bit ...")
    one.add_argument("--bandwidth-gb-s", type=options.BANDWIDTH, help="for the decode limit")
    one.add_argument("--context", type=options.token_counts, help="tokens: 2048,8192")
    one.add_argument("--json", action="store_true", help="the same as JSON, in bytes")

    one = verb("plan", make_plan)
    one.add_argument("source", nargs="?", help=f"default: {RELEASED}; with --gpu all released")
    one.add_argument("--gpu", default="", help="a card of params/gpus.yaml: H200, L4 ...")
    one.add_argument("--gpu-gb", type=options.gigabytes, help="of the card; default: that of --gpu")
    one.add_argument("--context", type=options.TOKENS, default=2048)
    one.add_argument("--users", type=options.USERS, default=1)
    one.add_argument("--ttft-ms", type=options.MS, help="longest wait for the first token")
    one.add_argument("--itl-ms", type=options.MS, help="longest mean wait between tokens")
    one.add_argument("--gpu-hour-usd", type=options.PRICE, help="of one: for USD a million tokens")
    one.add_argument("--devices", type=options.GPUS, help="GPUs that share a model: 1")

    one = verb("score", score_predictions)
    one.add_argument("sources", nargs="*", metavar="FOLDER", help="default: the released sets")
    one.add_argument("--out", help="default: outputs/predictions; outputs/scored with FOLDER")

    one = verb("audit", audit_study)
    one.add_argument("--study", type=Path, help="default: the study of this workbook")
    one.add_argument("--csv", type=Path, help="folder of the study's released CSV files")
    return top


def add_run_options(verb: argparse.ArgumentParser) -> None:
    """What to run and how, for all jobs or for one."""
    verb.add_argument("--profile", default="demo")
    for name in profiles.SLICES:
        verb.add_argument(f"--{name}", default="", help="comma or space separated")
    verb.add_argument("--server", default="", help="URL of a server that runs: loads that one")
    verb.add_argument("--also", default="", help="further stacks: graph-compiled, vllm")
    verb.add_argument("--out", type=Path, help="default: outputs/<profile>")
    verb.add_argument("--force", **options.FLAG, help="measure finished jobs again")
    verb.add_argument(
        "--timeout", type=options.SECONDS, default=3600, help="seconds for one notebook"
    )
    verb.add_argument("--wait", **options.FLAG, help="wait for a GPU that is in use")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        options.refuse_variables(os.environ.pop("WORKBOOK_GIVEN", ""), args)
        files.expanded("~")  # in a container a user may have none
        return args.run(args)
    except KeyboardInterrupt as error:
        say("interrupted")
        return 128 + (error.args[0] if error.args else signal.SIGINT)
    except args.errors as error:
        text = files.disk_fault(error) if isinstance(error, OSError) else ""
        say(f"error: {text or error}")
        return 2
    except OSError as error:
        if not (text := files.disk_fault(error)):
            raise
        say(f"error: {text}")
        return 2 if error.errno == errno.ENAMETOOLONG else 1


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _interrupt)
    for name in ("SIGTERM", "SIGHUP"):  # what is half written goes, whoever ends it
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:
            signal.signal(getattr(signal, name), _interrupt)
    sys.exit(main())
