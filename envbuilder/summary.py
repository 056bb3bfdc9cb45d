"""What the stages did, in words: the lines of the closing summary. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from envbuilder.display import human_bytes

if TYPE_CHECKING:
    from envbuilder.compile.pipeline import CompileReport
    from envbuilder.fetch import FetchReport
    from envbuilder.install import InstallReport
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
