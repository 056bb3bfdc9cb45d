"""The page of a run: one file that needs no other and no script, well-formed as XML too."""

from __future__ import annotations

import html
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from statistics import median

from envbuilder import __version__
from envbuilder.atomic import write_atomically
from envbuilder.findings import printable
from envbuilder.run_report.curves import Curve, render_curves
from envbuilder.run_report.records import History, Job, Record, number, part
from envbuilder.run_report.walltime import KINDS, walltime
from envbuilder.slurm_time import spoken

_SHOWN_PACKAGES = ("torch", "transformers", "peft", "triton", "mamba-ssm", "causal-conv1d")
_GIB = 1 << 30
_DATA_ROWS = {
    "name": "file",
    "examples": "examples",
    "tokens": "tokens",
    "trained_tokens": "of them trained",
    "truncated": "examples cut",
    "dropped": "examples left out",
}


def write_report(path: Path, history: History) -> None:
    """Writes the page of `history` to `path`, in one step. MismatchError where it can't be written."""
    write_atomically(path, render(history, made_at=datetime.now(timezone.utc)))


def render(history: History, *, made_at: datetime) -> str:
    """The page, as of `made_at`."""
    style = files("envbuilder.run_report").joinpath("page.css").read_text(encoding="utf-8")
    title = f"{history.run.name}: {_standing(history)}"
    sections = (
        ("", _problem(history) + _tiles(history)),
        ("Curves", _curves(history)),
        ("Where the time went", _times(history)),
        ("Jobs", _jobs(history)),
        ("Answers before and after", _samples(history)),
        ("Data", _data(history)),
        ("Made with", _environment(history)),
    )
    body = "\n".join(f"{f'<h2>{name}</h2>' if name else ''}\n{inside}" for name, inside in sections if inside)
    left_out = f" {history.unread} lines of metrics.jsonl are no records." if history.unread else ""
    return f"""<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<title>{_text(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<p class="over">envbuilder train · {made_at:%Y-%m-%d %H:%M} UTC</p>
<h1>{_text(title)}</h1>
{body}
<footer>Made by envbuilder {_text(__version__)} from the run's metrics.jsonl.{left_out}</footer>
</main>
</body>
</html>
"""


def _standing(history: History) -> str:
    planned = f" of {history.planned:,}" if history.planned else ""
    jobs = f", in {len(history.jobs)} jobs" if len(history.jobs) > 1 else ""
    state = history.outcome.get("status") or "not ended"
    return f"{state}, {history.done:,}{planned} steps{jobs}"


def _problem(history: History) -> str:
    error = history.outcome.get("error")
    if not isinstance(error, dict):
        return ""
    kind = "said failed" if history.outcome.get("status") == "failed" else "said"
    return f'<p class="{kind}">{_text(error.get("message"))}</p>'


def _tiles(history: History) -> str:
    steps = list(history.steps.values())
    losses = [loss for step in steps if (loss := number(step, "loss")) is not None]
    validations = [v for record in history.validations.values() if (v := number(record, "loss")) is not None]
    # The first step of each job compiles kernels: it says nothing of the speed.
    firsts = {job.first_step for job in history.jobs}
    warm = [record for step, record in history.steps.items() if step not in firsts]
    speeds = [speed for step in warm if (speed := number(step, "tokens_per_second")) is not None]
    shares = [share for step in warm if (share := number(step, "mfu")) is not None]
    memory = [peak for step in steps if (peak := number(step, "memory_bytes")) is not None]
    total = sum(walltime(history).values())
    tiles = (
        ("loss, first and last", f"{losses[0]:.4g} → {losses[-1]:.4g}" if losses else ""),
        ("validation loss, last", f"{validations[-1]:.4g}" if validations else ""),
        ("tokens/s, median", f"{median(speeds):,.0f}" if speeds else ""),
        ("MFU, median", f"{median(shares):.1%}" if shares else ""),
        ("memory, peak of rank 0", _gib(max(memory)) if memory else ""),
        ("from beginning to end", spoken(total) if history.jobs else ""),
    )
    return (
        '<ul class="tiles">'
        + "".join(f"<li><b>{_text(value)}</b>{name}</li>" for name, value in tiles if value)
        + "</ul>"
    )


def _curves(history: History) -> str:
    borders = [job.first_step for job in history.jobs[1:] if job.first_step is not None]
    steps, validations = history.steps, history.validations
    pictures = (
        (
            "Loss for a trained token",
            [_curve("training", steps, "loss"), _curve("validation", validations, "loss")],
            _plain,
        ),
        ("Tokens per second", [_curve("tokens/s", steps, "tokens_per_second")], "{:,.0f}".format),
        ("Model FLOPs utilization", [_curve("MFU", steps, "mfu")], "{:.1%}".format),
        ("Memory, peak so far", [_curve("memory", steps, "memory_bytes", unit=_GIB)], "{:.3g} GiB".format),
        ("Learning rate", [_curve("learning rate", steps, "lr")], "{:.3g}".format),
        ("Norm of the gradient", [_curve("norm", steps, "grad_norm")], _plain),
    )
    figures = "".join(
        f"<figure>{svg}</figure>\n"
        for title, curves, shown in pictures
        if (svg := render_curves(title, [curve for curve in curves if curve.points], borders, shown))
    )
    if not figures:
        return '<p class="said">No step is recorded.</p>'
    marks = '<p class="said">Dashed lines: another job went on from a checkpoint.</p>' if borders else ""
    return f'<div class="curves">{figures}</div>{marks}'


def _curve(name: str, records: dict[int, Record], field: str, *, unit: float = 1) -> Curve:
    points = [
        (float(step), value / unit)
        for step, record in sorted(records.items())
        if (value := number(record, field)) is not None
    ]
    return Curve(name, points)


def _times(history: History) -> str:
    spent = walltime(history)
    total = sum(spent.values())
    if not total:
        return ""
    rows = "".join(
        f"<tr><td>{kind}</td><td class='number'>{_text(_seconds(spent[kind]))}</td>"
        f"<td class='number'>{spent[kind] / total:.1%}</td>"
        f"<td class='bar'><i style='width: {100 * spent[kind] / max(spent.values()):.1f}%'></i></td>"
        f"<td class='soft'>{meaning}</td></tr>\n"
        for kind, meaning in KINDS.items()
        if spent[kind] > 0
    )
    return f'<div class="sheet"><table><tbody>{rows}</tbody></table></div>'


def _jobs(history: History) -> str:
    names = ("", "began", "lasted", "steps", "where", "processes")
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in _job(place, job)) + "</tr>\n"
        for place, job in enumerate(history.jobs, start=1)
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="sheet">{table}</div>' if rows else ""


def _job(place: int, job: Job) -> Iterator[object]:
    slurm = job.place.get("job")
    yield f"{place}" + (f", Slurm {slurm}" if slurm else "")
    yield f"{datetime.fromtimestamp(job.began, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
    yield _seconds(job.ended - job.began)
    yield "none" if job.first_step is None else f"{job.first_step:,} to {job.last_step:,}"
    yield ", ".join(str(place) for place in (job.place.get("host"), job.start.get("device")) if place)
    yield job.start.get("processes", "")


def _samples(history: History) -> str:
    prompts = list(dict.fromkeys(prompt for _, prompt in history.samples))
    shown = "".join(_sample(history, prompt) for prompt in prompts)
    return f'<div class="sheet">{shown}</div>' if shown else ""


def _sample(history: History, prompt: str) -> str:
    records = {when: history.samples.get((when, prompt), {}) for when in ("before", "after")}
    expected = next((r["expected"] for r in records.values() if r.get("expected")), None)
    answers = [(when, record.get("text")) for when, record in records.items() if record]
    if expected is not None:
        answers.append(("the data's answer", expected))
    parts = "".join(f"<div><h4>{name}</h4><pre>{_text(text)}</pre></div>" for name, text in answers)
    return f'<div class="sample"><p>{_text(prompt)}</p>{parts}</div>\n'


def _data(history: History) -> str:
    names = {"data": "training", "validation_data": "validation"}
    found = [(names[key], history.start[key]) for key in names if isinstance(history.start.get(key), dict)]
    if not found:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("", *_DATA_ROWS.values()))
    rows = "".join(
        f"<tr><td>{name}</td>" + "".join(f"<td>{_figure(data.get(key))}</td>" for key in _DATA_ROWS) + "</tr>"
        for name, data in found
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="sheet">{table}</div>'


def _environment(history: History) -> str:
    receipt, start = history.receipt, history.start
    packages = receipt.get("packages")
    versions = {
        str(package.get("name")): str(package.get("version"))
        for package in (packages if isinstance(packages, list) else [])
        if isinstance(package, dict)
    }
    model, kernels = part(start, "model"), part(start, "kernels")
    main = [f"{name} {versions[name]}" for name in _SHOWN_PACKAGES if name in versions]
    facts = (
        ("Recipe", receipt.get("recipe")),
        ("Lock", receipt.get("lock_sha256") and f"sha256 {receipt['lock_sha256']}"),
        ("Python", receipt.get("python")),
        ("Packages", f"{len(versions)}: {', '.join(main)}, …" if versions else None),
        ("Compiled for", ", ".join(map(str, receipt.get("compute_capabilities") or ())) or None),
        ("Parameters", _figure(model.get("parameters")) or None),
        ("Trained by LoRA", _figure(model.get("trainable_parameters")) or None),
        ("Base model", start.get("placement")),
        ("Kernels", "; ".join(f"{kind}: {name}" for kind, name in kernels.items()) or None),
    )
    rows = "".join(f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in facts if value is not None)
    listed = "\n".join(f"{name} {version}" for name, version in versions.items())
    more = (("The config", history.config), ("All packages", listed))
    details = "".join(
        f"<details><summary>{name}</summary><pre>{_text(text)}</pre></details>"
        for name, text in more
        if text.strip()
    )
    listing = f'<dl class="facts">{rows}</dl>' if rows else ""
    return f'<div class="sheet">{listing}{details}</div>' if listing or details else ""


def _figure(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else _text(value or "")


def _plain(value: float) -> str:
    return f"{value:.4g}"


def _gib(value: float) -> str:
    return f"{value / _GIB:.2f} GiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else spoken(seconds)


def _text(value: object) -> str:
    return html.escape(printable(str(value)))
