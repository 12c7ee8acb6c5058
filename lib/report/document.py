"""One self-contained HTML report from run.json files, records and executed notebooks.

Nothing is measured here. The same inputs give the same bytes: no time of writing goes in. The page
loads nothing from anywhere, and its content security policy allows one script, by its hash.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

from markupsafe import Markup

from lib.analysis import bounds, cost, engines, host_bound, machine, physics, predictions
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
from lib.report import answer, provenance, record_list, sections
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


def write(
    source_dir: str | Path,
    out_dir: str | Path | None = None,
    prices: cost.Prices | None = None,
    study: Published | None = None,
    called: str | None = None,
) -> Path:
    """Write report.html, tables/*.csv and each job's notebook.html; return the report's path.

    `source_dir` holds jobs (run.json, records.jsonl, notebook.ipynb) and is only read when
    `out_dir` is another folder. Costs are shown where `prices` are given; `study` is the published
    one beside the rows, by default this workbook's. `called` is what commands to run a job again
    call the results, if not by their path.
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
    fragments = {job.id: _fragment(job, out) for job in jobs if job.notebook_path}
    for job in jobs:
        if job.notebook_path:
            _page(job, out, fragments[job.id])
    path = out / "report.html"
    write_text(path, render(jobs, source, out, fragments, prices, study or load()))
    return path


def write_notebook_page(job_dir: str | Path, out_dir: str | Path | None = None) -> Path:
    """Write one job's notebook.html into its folder (or `out_dir`) and return the path.

    `job_dir` is `<results>/<model>/<weights>-<stack>/<notebook>`; the results folder is the
    nearest one above that holds all its jobs.
    """
    folder = Path(job_dir).resolve()
    root = _results_root(folder)
    job = next((j for j in find(root) if j.folder.resolve() == folder), None)
    if job is None or job.notebook_path is None:
        raise FileNotFoundError(f"{folder} holds no run.json with an executed notebook")
    out = Path(out_dir) if out_dir is not None else root
    return _page(job, out, _fragment(job, out))


def _results_root(folder: Path) -> Path:
    """Two levels above a cross-model notebook without setup, three above any other."""
    return folder.parents[1] if folder.parent.name == ACROSS else folder.parents[2]


def _fragment(job: Job, out: Path) -> str:
    """A job's notebook as HTML, under headings of its own page.

    Rendering is most of a report's time: what the page below `out` holds of the same notebook by
    the same code is taken from there.
    """
    page_path = out / job.path / "notebook.html"
    if page_path.is_file():
        text = page_path.read_text(encoding="utf-8")
        if f'name="rendered-from" content="{_rendered_from(job)}"' in text:
            return text.split(FRAGMENT[0], 1)[1].rsplit(FRAGMENT[1], 1)[0]
    return render_fragment(read_notebook(job.notebook_path), job.id, title=False)


def _rendered_from(job: Job) -> str:
    """Hash of a notebook, of the name that its ids carry, and of the code that renders it."""
    return sha([job.id, file_sha(job.notebook_path), file_sha(Path(notebook_html.__file__))])


def _page(job: Job, out: Path, fragment: str) -> Path:
    """Write a notebook as its own page below `out`; returns its path."""
    target = out / job.path / "notebook.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    up = "/".join([".."] * len(job.parts))
    text = page.document(
        "notebook.html",
        title=f"{job.title} · {job.model}",
        kicker=job.setup or job.profile,
        subtitle="",
        footer="",
        demo=provenance.is_demo(job.records),
        job=job,
        fragment=Markup(FRAGMENT[0] + fragment + FRAGMENT[1]),
        rendered_from=_rendered_from(job),
        report_href=f"{up}/report.html",
        ipynb_href=quote(Path(os.path.relpath(job.notebook_path, target.parent)).as_posix()),
    )
    write_text(target, text)
    return target


def render(
    jobs: Sequence[Job],
    source: Path,
    out: Path,
    fragments: dict[str, str],
    prices: cost.Prices | None,
    study: Published,
) -> str:
    """The report as text; writes the CSVs that it embeds."""
    rows = Rows(merge([r for job in _by_end(jobs) for r in job.records], source))
    published = study.data
    paper = paper_tables.paper_tables(rows, published)
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
    replicated = section.part(rows, study, out)
    generic += [*host_bound.tables(rows), *kernels]
    priced = cost.table(rows, prices) if prices and prices.given else None
    (out / "tables" / "money.csv").unlink(missing_ok=True)  # of other prices
    csvs += [priced.write_csv(out)] if priced else []
    context = _paper_caption(rows, published, jobs) if paper else []
    first = [t for t in paper if t.spec.get("main")]
    failures = [job for job in jobs if job.status != "ok"]
    demo = provenance.is_demo(rows)
    groups = _groups(jobs, fragments)
    ended = max((str(job.run.get("end") or "") for job in jobs), default="")
    return page.document(
        "report.html",
        title=TITLE,
        kicker=f"Deployment workbook · profile {source.name}",
        subtitle=_subtitle(rows, ended),
        demo=demo,
        answer=answer.answer(
            rows,
            context=published["context"] if paper else None,
            gpu_hour_usd=prices.gpu_hour_usd if prices else None,
        ),
        cautions=[*(context or _cautions(rows)), _contradictions(rows)],
        findings=[
            *findings(rows, published, paper),
            *(replicated.findings if replicated else ()),
        ],
        replicated=replicated,
        counts=provenance.counts(jobs, rows),
        provenance=provenance.provenance(jobs),
        paper=published,
        paper_main=[paper_grid(t, context) for t in first],
        paper_numbers=section.numbers(first).capitalize() if first else "",
        paper_more=[paper_grid(t, context) for t in paper if t not in first],
        bound=bound,
        bound_figure=bound.rows and figure.html(bounds.figure(rows), rows, ["latency"]),
        batch=batch + deployed,
        serving=serving_figures.section(rows),
        predicted=scored.section(rows, jobs, source),
        generic=generic,
        priced=priced,
        ledgers=ledgers,
        ledger_figures=_ledger_figures(rows),
        groups=groups,
        failures=failures,
        arm_errors=provenance.arm_errors(rows),
        warnings=provenance.warnings_table(rows),
        costs=provenance.table(jobs),
        downloads=[(p.name, page.data_link(p)) for p in (replicated.files if replicated else [])]
        + [(p.name, page.data_link(p)) for p in csvs],
        records=record_list.table(rows, _by_end(jobs)),
        footer=f"Made from {len(jobs)} jobs; the last one ended {readable(ended) or '?'}.",
    )


def _ledger_figures(rows: Sequence[Record]) -> list[Markup]:
    """The stacked ledger of each protocol that has rows."""
    kinds = [k for k in PROTOCOLS if any(r.kind == k and not r.error for r in rows)]
    return [figure.html(memory_ledger(rows, kind=kind), rows, [kind]) for kind in kinds]


def _by_end(jobs: Iterable[Job]) -> list[Job]:
    """Jobs in the order in which their rows replace each other: finished ones win, then later."""
    return sorted(jobs, key=lambda job: precedence(job.run))


def _paper_caption(rows: Sequence[Record], published: StudyFile, jobs: Sequence[Job]) -> list[str]:
    """What holds for every number beside the paper's: card, weights, and what was interrupted."""
    mine = [r for r in rows if paper_name(r.key.get("model"), published)]
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
    return [text, *_cautions(mine), *interrupted]


def _cautions(rows: Sequence[Record]) -> list[str]:
    """What holds for the rows' numbers, whatever they are compared with."""
    random = any(r.key.get("weights") == "random" for r in rows)
    return [RANDOM_NOTE[:1].upper() + RANDOM_NOTE[1:] + "."] if random else []


def _contradictions(rows: Rows) -> str:
    """How many numbers contradict each other."""
    return sentence(physics.sentence(len(physics.contradictions(rows, rows.environments))))


def _subtitle(rows: Sequence[Record], ended: str) -> str:
    studied = {str(r.key["model"]) for r in rows if r.key.get("model") and r.kind != "energy-real"}
    models = sorted(studied, key=model_order)  # without the small one that checks weight values
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
