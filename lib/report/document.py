"""One self-contained HTML report from run.json files, records and executed notebooks.

Nothing is measured here. The same inputs give the same bytes: no time of writing goes in. The page
loads nothing from anywhere, and its content security policy allows one script, by its hash.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import quote

from markupsafe import Markup

from lib.analysis import bounds, cost, engines, glossary, host_bound, machine, physics, predictions
from lib.analysis.batch import figures, tables
from lib.analysis.capacity import scored
from lib.analysis.memory.figures import PROTOCOLS, memory_ledger
from lib.analysis.rows import Rows
from lib.analysis.serving import figures as serving_figures
from lib.analysis.serving import tables as serving_tables
from lib.analysis.setups import RANDOM_NOTE
from lib.files import file_sha, write_text
from lib.records.jobs import ACROSS, BEFORE_MODELS, Job, find, readable, slug
from lib.records.kinds import model_order
from lib.records.record import Record, environments
from lib.records.store import merge, precedence, refuse_links, sha
from lib.report import answer, many, pages, provenance, record_list, repeats, sections
from lib.report.abstract import findings
from lib.show import figure, notebook_html, page
from lib.show.notebook_html import demoted, read_notebook, render_fragment
from lib.show.wording import sentence
from lib.studies import paper_tables, section
from lib.studies.grids import paper_grid
from lib.studies.schema import StudyFile
from lib.studies.study import Published, load, paper_name

FRAGMENT = ("<!-- notebook -->", "<!-- end of the notebook -->")  # around it in its own page
TITLE = "What it costs to deploy an open-weight language model"
BESIDE = (
    "Other jobs ran on other GPUs of the host meanwhile: what waits for the host can be slower by "
    "them."
)


def write(
    source_dir: str | Path,
    out_dir: str | Path | None = None,
    prices: cost.Prices | None = None,
    study: Published | None = None,
    called: str | None = None,
    tell: Callable[[str], object] | None = None,
) -> Path:
    """Write report.html, tables/*.csv and each job's notebook.html; return the report's path.

    Of more than a dozen models each has a page of its own, see `many`. `source_dir` holds jobs
    (run.json, records.jsonl, notebook.ipynb) and is only read when `out_dir` is another folder.
    Costs are shown where `prices` are given; `study` is the published one beside the rows, by
    default this workbook's. `called` is what commands to run a job again call the results, if not
    by their path. `tell` hears how far it has come where that takes long.
    """
    source = Path(source_dir)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder of results; run `make report` first")
    out = Path(out_dir) if out_dir is not None else source
    jobs = find(source, called)
    if not jobs:
        raise FileNotFoundError(f"no run.json below {source}; run `make report` first")
    refuse_links(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = Rows(merge([r for job in _by_end(jobs) for r in job.records], source))
    study, parts = study or load(), many.by_model(jobs)
    path, models = out / "report.html", None
    if len(parts) > many.DOZEN:
        models = Models(parts, many.rows_of(rows, jobs), out.resolve().name)
        tasks = _stale_details(models, jobs, source, out, prices, study)
        for number in many.each(_write_one, tasks):
            if tell and (number % many.DOZEN == 0 or number == len(tasks)):
                tell(f"pages of models: {number} of {len(tasks)}")
    else:
        for folder in parts:
            (out / folder / many.PAGE).unlink(missing_ok=True)  # of when there were more
    whole = [job for job in jobs if models is None or job.parts[0] == ACROSS]
    fragments = _pages(whole, out)
    write_text(path, render(jobs, rows, source.name, out, fragments, prices, study, models=models))
    return path


class Models(NamedTuple):
    """Jobs and rows of each of more than a dozen models by its folder, the rows over all models
    under ACROSS; and what the folder of the report is called."""

    jobs: Mapping[str, Sequence[Job]]
    rows: Mapping[str, Sequence[Record]]
    home: str


class _Details(NamedTuple):
    """What a process needs to write the page of one model."""

    folder: str
    jobs: Sequence[Job]
    rows: Sequence[Record]
    profile: str
    out: Path
    prices: cost.Prices | None
    study: Published
    made: str


def _stale_details(
    models: Models,
    jobs: Sequence[Job],
    source: Path,
    out: Path,
    prices: cost.Prices | None,
    study: Published,
) -> list[_Details]:
    """The pages of models that are not what they would be now."""
    shared, tasks = many.common(source, jobs, prices, study), []
    for folder, mine in models.jobs.items():
        made = many.made_from(mine, shared)
        if not _details_stand(out, folder, mine, made):
            both = (*models.rows.get(ACROSS, ()), *models.rows.get(folder, ()))
            rows = tuple({id(row): row for row in both}.values())  # environments may be in both
            tasks.append(_Details(folder, mine, rows, source.name, out, prices, study, made))
    return tasks


def _details_stand(out: Path, folder: str, jobs: Iterable[Job], made: str) -> bool:
    """Whether a model's page below `out` was made from this, and so were its notebooks' pages."""
    page_path, tables = out / folder / many.PAGE, (out / folder / "tables").glob("*.csv")
    return pages.is_current(page_path, made, tables) and all(
        pages.is_current(path, _rendered_from(job)) if job.notebook_path else not path.exists()
        for job in jobs
        for path in [out / job.path / "notebook.html"]
    )


def _write_one(task: _Details) -> None:
    """Write the page of one model and those of its notebooks."""
    folder = task.out / task.folder
    fragments, rows = _pages(task.jobs, task.out, many.PAGE), Rows(task.rows)
    text = render(
        task.jobs, rows, task.profile, folder, fragments, task.prices, task.study, made=task.made
    )
    pages.write(folder / many.PAGE, text, (folder / "tables").glob("*.csv"))


def _pages(jobs: Sequence[Job], out: Path, report: str = "report.html") -> dict[str, str]:
    """Write each notebook's page, remove one without a notebook; returns what is in them, by the
    id of the job."""
    fragments = {job.id: _fragment(job, out) for job in jobs if job.notebook_path}
    for job in jobs:
        if job.id in fragments:
            _page(job, out, fragments[job.id], report)
        else:
            (out / job.path / "notebook.html").unlink(missing_ok=True)
    return fragments


def write_notebook_page(job_dir: str | Path, out_dir: str | Path | None = None) -> Path:
    """Write one job's notebook.html into its folder (or `out_dir`) and return the path.

    `job_dir` is `<results>/<model>/<weights>-<stack>/<notebook>`; the results folder is the
    nearest one above that holds all its jobs.
    """
    folder = Path(job_dir).resolve()
    root = _results_root(folder)
    jobs = find(root, only=folder.relative_to(root).as_posix())
    job = next((j for j in jobs if j.folder.resolve() == folder), None)
    if job is None or job.notebook_path is None:
        raise FileNotFoundError(f"{folder} holds no run.json with an executed notebook")
    out = Path(out_dir) if out_dir is not None else root
    own = len(many.by_model(jobs)) > many.DOZEN and job.parts[0] != ACROSS
    return _page(job, out, _fragment(job, out), many.PAGE if own else "report.html")


def _source(job: Job) -> Path:
    """The folder of results that a job is of."""
    return job.folder.parents[len(job.parts) - 1]


def _results_root(folder: Path) -> Path:
    """Two levels above a cross-model notebook without setup, three above any other."""
    return folder.parents[1] if folder.parent.name == ACROSS else folder.parents[2]


def _fragment(job: Job, out: Path) -> str:
    """A job's notebook as HTML, under headings of its own page.

    Rendering is most of a report's time: what the page below `out` holds of the same notebook by
    the same code is taken from there, where this program wrote it.
    """
    page_path = out / job.path / "notebook.html"
    if pages.is_current(page_path, _rendered_from(job)):
        text = page_path.read_text(encoding="utf-8")
        return text.split(FRAGMENT[0], 1)[1].rsplit(FRAGMENT[1], 1)[0]
    return render_fragment(read_notebook(job.notebook_path), job.id, title=False)


def _rendered_from(job: Job) -> str:
    """Hash of a notebook, of the name that its ids carry, and of the code that renders it."""
    return sha([job.id, file_sha(job.notebook_path), *map(file_sha, notebook_html.MADE_BY)])


def _page(job: Job, out: Path, fragment: str, report: str) -> Path:
    """Write a notebook as its own page below `out`, with a link to its section in the report, or
    in its model's page; returns its path."""
    target = out / job.path / "notebook.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    up = "/".join([".."] * (len(job.parts) - (report == many.PAGE)))
    text = page.document(
        "notebook.html",
        terms=glossary.terms(),
        title=f"{job.title} · {job.model}",
        kicker=job.setup or job.profile,
        subtitle="",
        footer="",
        demo=provenance.is_demo(job.records),
        job=job,
        fragment=Markup(FRAGMENT[0] + fragment + FRAGMENT[1]),
        rendered_from=_rendered_from(job),
        report_href=f"{up}/{report}",
        ipynb_href=quote(Path(os.path.relpath(job.notebook_path, target.parent)).as_posix()),
    )
    pages.write(target, text)
    return target


def render(
    jobs: Sequence[Job],
    every: Rows,
    profile: str,
    out: Path,
    fragments: dict[str, str],
    prices: cost.Prices | None,
    study: Published,
    *,
    models: Models | None = None,
    made: str = "",
) -> str:
    """The report as text; writes the CSVs that it embeds.

    With `models` it holds the answer, the study and what is over all of them; with `made`, which
    names what it is made from, it is the page of one of them, without these.
    """
    rows, whole = every, jobs
    if models:
        rows = Rows(models.rows.get(ACROSS, ()))
        whole = [job for job in jobs if job.parts[0] == ACROSS]
    published = study.data
    paper = [] if made else paper_tables.paper_tables(every, published)
    bound = bounds.utilisation(rows)
    beside = [t for t in (bound, machine.table(rows), predictions.table(rows)) if t.rows]
    beside += [*tables.tables(rows), *engines.tables(rows), *serving_tables.tables(rows)]
    batch, deployed = figures.section(rows), engines.section(rows)
    ledgers, kernels = sections.memory_ledgers(rows, published), host_bound.kernel_tables(rows)
    generic = sections.generic_tables(rows)
    csvs = [
        *paper_tables.write_csvs(paper, out),
        *(table.write_csv(out) for table in (*generic, *beside, *ledgers, *kernels)),
    ]
    replicated = None if made else section.part(every, study, out)
    generic += [*host_bound.tables(rows), *kernels]
    priced = cost.table(rows, prices) if prices and prices.given and not models else None
    csvs += [priced.write_csv(out)] if priced else []
    context = _paper_caption(every, published, jobs) if paper else []
    first = [t for t in paper if t.spec.get("main")]
    failures = [job for job in jobs if job.status != "ok"]
    demo = provenance.is_demo(every)
    groups = _groups(whole, fragments)
    ended = max((str(job.run.get("end") or "") for job in jobs), default="")
    first_screen = None
    if not made:
        first_screen = answer.answer(
            every,
            context=published["context"] if paper else None,
            gpu_hour_usd=prices.gpu_hour_usd if prices else None,
        )
    listed = models and many.table(models.jobs, models.rows, first_screen and first_screen.every)
    csvs += [listed.write_csv(out)] if listed else []
    keep = {*csvs, *(replicated.files if replicated else ())}
    for old in {*(out / "tables").glob("*.csv")} - keep:  # of other rows or prices
        old.unlink()
    stated, of_first = every, []
    if models:
        stated = _about(every, _leading(paper, published, first_screen))
        if first_screen and not paper:
            of_first = [f"Of the {len(first_screen.leading)} models that serve most."]
    text = page.document(
        "report.html",
        terms=glossary.terms(),
        definitions=glossary.DEFINITIONS,
        title=jobs[0].model if made else TITLE,
        kicker=f"Deployment workbook · profile {profile}",
        subtitle=_subtitle(every, ended),
        demo=demo,
        answer=first_screen,
        cautions=[
            *of_first,
            *(context or _cautions(every, environments(every))),
            _contradictions(every),
        ],
        findings=[
            *findings(stated, published, paper),
            *(replicated.findings if replicated else ()),
        ],
        replicated=replicated,
        models=listed,
        home=models.home if models else jobs[0].parts[0] if made else "",
        **({"rendered_from": made} if made else {}),
        counts=provenance.counts(jobs, [r for r in every if not made or r.kind != "ceilings"]),
        provenance=provenance.provenance(jobs),
        paper=published,
        paper_main=[paper_grid(t, context) for t in first],
        paper_numbers=section.numbers(first).capitalize() if first else "",
        paper_more=[paper_grid(t, context) for t in paper if t not in first],
        bound=bound,
        bound_figure=bound.rows and figure.html(bounds.figure(rows), rows, ["latency"]),
        batch=batch + deployed,
        serving=serving_figures.section(rows),
        predicted="" if made else scored.section(every, jobs, _source(jobs[0])),
        generic=generic,
        priced=priced,
        ledgers=ledgers,
        ledger_figures=_ledger_figures(rows),
        groups=groups,
        failures=failures[: many.DOZEN] if models else failures,
        further=max(0, len(failures) - many.DOZEN) if models else 0,
        arm_errors=provenance.arm_errors(rows),
        warnings=provenance.warnings_table(rows),
        costs=provenance.table(whole),
        downloads=[
            (path.name, page.packed_link(path.read_bytes()))
            for path in (*(replicated.files if replicated else ()), *csvs)
        ],
        records=record_list.table(rows, _by_end(whole)),
        footer=f"Made from {len(jobs)} jobs; the last one ended {readable(ended) or '?'}.",
    )
    return repeats.linked(text)


def _leading(
    paper: Sequence[paper_tables.PaperTable], published: StudyFile, first: answer.Answer | None
) -> set[str]:
    """The models that sentences are about where there are many: those of the study, or those that
    serve most."""
    if paper:
        return {name.lower() for names in published["models"].values() for name in names}
    return {name.lower() for name in first.leading} if first else set()


def _about(rows: Rows, names: set[str]) -> Rows:
    """The rows of these models, and those of none."""
    return rows.where(lambda r: str(r.key.get("model") or "").lower() in {"", *names})


def _ledger_figures(rows: Sequence[Record]) -> list[Markup]:
    """The stacked ledger of each protocol that has rows."""
    kinds = [k for k in PROTOCOLS if any(r.kind == k and not r.error for r in rows)]
    return [figure.html(memory_ledger(rows, kind=kind), rows, [kind]) for kind in kinds]


def _by_end(jobs: Iterable[Job]) -> list[Job]:
    """Jobs in the order in which their rows replace each other: finished ones win, then later."""
    return sorted(jobs, key=lambda job: precedence(job.run))


def _paper_caption(rows: Sequence[Record], published: StudyFile, jobs: Sequence[Job]) -> list[str]:
    """What holds for every number beside the paper's: card, weights, and what was interrupted."""
    every = [r for r in rows if paper_name(r.key.get("model"), published)]
    mine = [r for r in every if not r.key.get("devices")] or every  # no claim is of a sharded model
    envs = environments(rows)
    gpus = sorted({str(envs.get(r.env_id or "", {}).get("gpu") or "a CPU") for r in mine})
    where = " and ".join(gpus)
    text = f"Measured on {where}."
    if gpus != [published["gpu"]]:
        text = (
            f"Measured on {where}; the paper used {published['gpu']}, so times and energy "
            "differ by hardware, memory need not."
        )
    cut = [j for j in jobs if j.status == "interrupted" and paper_name(j.model, published)]
    names = ", ".join(f"{job.model} ({job.notebook})" for job in cut)
    interrupted = [f"Interrupted, so that cells may be missing: {names}."] if cut else []
    return [text, *_cautions(mine, envs), *interrupted]


def _cautions(rows: Sequence[Record], envs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What holds for the rows' numbers, whatever they are compared with."""
    random = any(r.key.get("weights") == "random" for r in rows)
    beside = any(envs.get(r.env_id or "", {}).get("neighbours") for r in rows)
    return [
        *([RANDOM_NOTE[:1].upper() + RANDOM_NOTE[1:] + "."] if random else []),
        *([BESIDE] if beside else []),
    ]


def _contradictions(rows: Rows) -> str:
    """How many numbers contradict each other."""
    return sentence(physics.sentence(len(physics.contradictions(rows, rows.environments))))


def _subtitle(rows: Sequence[Record], ended: str) -> str:
    studied = {str(r.key["model"]) for r in rows if r.key.get("model") and r.kind != "energy-real"}
    models = sorted(studied, key=model_order)  # without the small one that checks weight values
    models = models if len(models) <= many.DOZEN else [f"{len(models)} models"]
    gpus = sorted({str(env.get("gpu") or "CPU") for env in environments(rows).values()})
    parts = [", ".join(models), " and ".join(gpus), readable(ended)[:10]]
    return " · ".join(filter(None, parts))


def _groups(jobs: Sequence[Job], fragments: dict[str, str]) -> list[SimpleNamespace]:
    """Sections: the machine first, then the notebooks across models, then each model's."""
    by_folder: dict[str, list[Job]] = {}
    for job in sorted(jobs, key=lambda j: (j.notebook not in BEFORE_MODELS, j.parts[0] != ACROSS)):
        folder = job.path if job.notebook in BEFORE_MODELS else job.parts[0]
        by_folder.setdefault(folder, []).append(job)
    groups, names = [], Counter()
    for folder, members in by_folder.items():
        across = {
            ACROSS: ("summary", "Summary across models"),
            f"{ACROSS}/machine": ("machine", "The machine"),
        }
        name, title = across.get(folder, (f"model-{slug(folder)}", members[0].model))
        names[name] += 1
        name += f"-{names[name]}" if names[name] > 1 else ""
        parts = [_section(job, demoted(fragments.get(job.id, ""), 2)) for job in members]
        groups.append(SimpleNamespace(id=name, title=title, jobs=parts))
    return groups


def _section(job: Job, fragment: str) -> SimpleNamespace:
    return SimpleNamespace(
        id=job.id,
        title=job.title,
        status=job.status,
        setup=job.setup,
        end=job.end,
        rerun=job.rerun,
        stale=job.stale,
        fragment=Markup(fragment),
        earlier=", ".join(readable(run["end"]) for run in job.earlier),
        path=job.path,
    )
