"""Slurm: the site's facts, the job's script, and its submission.

`site` reads what a person wrote down about a cluster, `walltime` chooses how long a job may run and `script`
renders it (both pure), `preflight` looks whether it would be taken, `submit` hands it to sbatch, and
`rejections` puts what sbatch answers into words. `follow` stays with it to its end: `queries` asks Slurm,
`waiting` says why it waits, `joblog` reads the end of its log, and `verdict` says how it ended. `requeue` is
for the job itself, `overview` for all that are there. `sweep_queue` chooses which members of a sweep an array
is of, and `follow_sweep` stays with them.
"""
