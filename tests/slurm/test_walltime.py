"""Walltimes: read, written, and chosen from an estimate within the limits."""

from __future__ import annotations

import pytest

from envbuilder.slurm.walltime import Walltime, choose_walltime, warning_s
from envbuilder.slurm_time import seconds_of, slurm_time, spoken


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:30:00", 1800),
        ("1-12:00:00", 129600),
        ("2:00", 120),
        ("24:00:00", 86400),
        (" 00:30:00 ", 1800),
        ("UNLIMITED", None),
        ("", None),
        ("30", None),
        ("Partition_Limit", None),
    ],
)
def test_slurm_s_times_are_read(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("seconds", [60, 1800, 86399, 86400, 129600])
def test_what_is_written_for_sbatch_is_read_again(seconds: int) -> None:
    assert seconds_of(slurm_time(seconds)) == seconds


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (99, "99 s"), (600, "10 min"), (11100, "3 h 05 min")]
)
def test_times_for_people(seconds: float, words: str) -> None:
    assert spoken(seconds) == words


@pytest.mark.parametrize(
    ("site_s", "estimate_s", "limits_s", "chosen"),
    [
        # Nobody knows: the site's, and Slurm judges it.
        (7200, None, (1800, None), Walltime(7200)),
        # Half as much again and three minutes, in whole minutes.
        (7200, 600, (), Walltime(1080)),
        (7200, 601, (), Walltime(1140)),
        (7200, 0, (), Walltime(180)),
        # Not beyond the site's, the QoS's or the partition's.
        (1800, 1080, (), Walltime(1800)),
        (1800, 1081, (), Walltime(1800, 2)),
        (7200, 3600, (1800, 86400), Walltime(1800, 4)),
        (7200, 3600, (86400, 1800), Walltime(1800, 4)),
        (7200, 3600, (None, None), Walltime(5580)),
        # A limit that the margin alone fills still gets something done.
        (120, 60, (), Walltime(120, 2)),
    ],
)
def test_a_walltime_is_chosen(
    site_s: int, estimate_s: float | None, limits_s: tuple[int | None, ...], chosen: Walltime
) -> None:
    assert choose_walltime(site_s, estimate_s, limits_s) == chosen


@pytest.mark.parametrize(("walltime_s", "before_s"), [(7200, 120), (600, 120), (300, 60), (60, 20), (0, 20)])
def test_a_job_is_warned_in_time(walltime_s: int, before_s: int) -> None:
    assert warning_s(walltime_s) == before_s
