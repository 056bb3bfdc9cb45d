"""Runs: how far each is now; and one as an HTML page: its curves, where its time went, what it was made with.

`records.py` reads what the trainer left in the run's folder and stitches the jobs of the run together,
`walltime.py` adds up where the time went, `curves.py` draws, `page.py` writes.
"""

from __future__ import annotations

from envbuilder.run_report.now import RunNow, runs_now
from envbuilder.run_report.page import write_report
from envbuilder.run_report.records import History, Job, read_run

__all__ = ["History", "Job", "RunNow", "read_run", "runs_now", "write_report"]
