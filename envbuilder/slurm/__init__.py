"""Slurm: the site's facts, the job's script, and its submission.

`site` reads what a person wrote down about a cluster, `script` renders a job from it (pure), `submit` hands
the job to sbatch, and `rejections` puts what sbatch answers into words.
"""
