"""What the stages did, in words: the lines of the closing summary. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from envbuilder.display import human_bytes
from envbuilder.slurm_time import slurm_time, spoken

if TYPE_CHECKING:
    from envbuilder.compile.pipeline import CompileReport
    from envbuilder.fetch import FetchReport
    from envbuilder.install import InstallReport
    from envbuilder.slurm.dry_run import DryRun, Hours
    from envbuilder.train import TrainReport


def fetched(report: FetchReport) -> str:
    return (
        f"{report.files} files, {human_bytes(report.bytes)}; "
        f"transferred {report.transferred_files} files, {human_bytes(report.transferred_bytes)}, "
        f"in {report.seconds:.1f} s"
    )


def compiled(report: CompileReport) -> str:
    lines = []
    for wheel in report.wheels:
        receipt = wheel.receipt
        how = "from the wheelhouse" if receipt.package in report.reused else f"{receipt.seconds:.0f} s"
        dropped = ", ".join(receipt.architectures_dropped) or "none"
        kept = ", ".join(receipt.architectures_kept) or "none"
        lines.append(
            f"{receipt.package} {receipt.version} ({how}; GPU architectures kept: {kept}; "
            f"dropped: {dropped}; network: {receipt.isolation})"
        )
    return "\n".join(lines) or "nothing to compile"


def installed(report: InstallReport) -> str:
    return f"{len(report.receipt.packages)} packages in {report.seconds:.1f} s"


def trained(report: TrainReport) -> list[tuple[str, str]]:
    """What the run measured: one that had nothing left to train measured no speed."""
    outcome = report.outcome
    rows = [
        ("steps", "{}", outcome["steps"]),
        ("loss at the first step", "{:.4f}", outcome["first_loss"]),
        ("loss at the last step", "{:.4f}", outcome["last_loss"]),
        ("tokens per second", "{:.0f}", outcome["tokens_per_second"]),
        ("first step", "{:.1f} s", outcome["first_step_seconds"]),
        ("adapter", "{}", outcome["adapter"]),
    ]
    shown = [(name, form.format(value)) for name, form, value in rows if value is not None]
    if outcome["peak_memory_bytes"]:
        shown.append(("peak memory", human_bytes(outcome["peak_memory_bytes"])))
    return shown


def dry_run(run: DryRun, memory: str, unknown: str, *, is_chain: bool) -> list[tuple[str, str]]:
    """What a job would come to. `memory` says whether it fits, `unknown` why nobody knows how long the work
    takes; a chain is one job that lives several times."""
    start = run.start
    where = f" on {start.nodes}, {start.processors} processors" if start else ""
    limit = slurm_time(run.walltime_s)
    rows = [
        (
            "expected start",
            f"{start.at}{where}" if start else "Slurm would take the job; it does not say when",
        ),
        ("time limit", limit),
        ("one job", f"at most {_hours(run.one_job)}"),
    ]
    if run.estimate_s is None or run.whole is None or run.jobs is None:
        rows += [("the whole work", f"unknown: {unknown}"), ("jobs", "unknown")]
    else:
        fits = "fits" if run.jobs == 1 else "does not fit"
        many = f"{run.jobs} lives of one job" if is_chain else f"{run.jobs} jobs, one after the other"
        rows += [
            ("the whole work", f"about {spoken(run.estimate_s)}, {_hours(run.whole)}"),
            ("jobs", "1" if run.jobs == 1 else many),
            ("within the limit", f"the work {fits} into one job of {limit}"),
        ]
    rows += [("memory", memory)]
    if run.runs > 1:
        about = "at most, in one job each," if run.estimate_s is None else "about"
        rows += [("the sweep", f"{run.runs} such runs, {about} {_hours(run.all_runs)} in all")]
    if run.own_options:
        rows += [("template", f"sets {', '.join(run.own_options)} itself; hours are of what it asks for")]
    return rows


def _hours(hours: Hours) -> str:
    gpu = f"{hours.gpu_hours:.2f} GPU-hours and " if hours.gpu_hours else ""
    return f"{gpu}{hours.core_hours:.2f} core-hours"
