"""`compile --sbatch`: the job submitted, and followed to its end."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from envbuilder.cli.app import Options
from envbuilder.paths import Root
from envbuilder.session import Session
from envbuilder.slurm_time import spoken

if TYPE_CHECKING:
    from envbuilder.slurm.follow import Ended
    from envbuilder.slurm.submit import Wishes


def compile_in_a_job(
    opts: Options,
    session: Session,
    recipe: Path,
    site: str,
    flags: Sequence[str],
    wishes: Wishes,
    *,
    wait: bool,
) -> None:
    """Submits `compile` with `flags`, and, with `wait`, follows the job and prints its outcome.

    `recipe` is the recipe's path as it was typed. Raises what ended the job, with its exit code.
    """
    from envbuilder.slurm.follow import follow
    from envbuilder.slurm.submit import submit_compile

    session.bundle()  # An incomplete bundle is found here, not after hours in a queue.
    words = ["compile", recipe, "--sbatch", "--site", site, *flags, *_typed(wishes)]
    again = typed_again(opts.root, [str(word) for word in words])
    job = submit_compile(
        session.recipe_path,
        session.recipe.name,
        site,
        opts.root,
        flags,
        reporter=opts.reporter,
        again=again,
        wishes=wishes,
    )
    if not wait:
        opts.submitted(job)
        return
    opts.reporter.stage(f"submitted job {job.id}; its log: {job.log}")
    print_ended(opts, follow(job.id, job.log, root=opts.root, reporter=opts.reporter, again=again))


def print_ended(opts: Options, ended: Ended) -> None:
    """Prints the outcome of a job that did all."""
    lives = f", in {ended.lives} lives" if ended.lives > 1 else ""
    opts.lines(
        {
            "job": ended.id,
            "state": ended.state,
            "lives": ended.lives,
            "seconds": ended.seconds,
            "log": ended.log,
        },
        f"job {ended.id} did all{lives}; it was followed for {spoken(ended.seconds)}",
        f"its log: {ended.log}",
    )


def typed_again(root: Root, words: Sequence[str]) -> str:
    """The command line of `envbuilder WORDS` under this root."""
    where = [] if root == Root.resolve(None) else ["--root", str(root.path)]
    return shlex.join(["envbuilder", *where, *words])


def _typed(wishes: Wishes) -> list[str]:
    return ["--requeue"] if wishes.requeue else []
