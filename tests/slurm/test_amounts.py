"""What a script's options come to; the answers are those of Slurm 22.05, asked with these very options."""

from __future__ import annotations

import pytest

from envbuilder.slurm.amounts import Amounts, amounts_of
from envbuilder.slurm.template import head_options


@pytest.mark.parametrize(
    ("words", "amounts"),
    [
        ("", Amounts(1, 1, 0)),
        ("-N2", Amounts(2, 2, 0)),
        ("-N 2 -n 1", Amounts(1, 1, 0)),  # "can't run 1 processes on 2 nodes, setting nnodes to 1"
        ("--nodes=1-4", Amounts(4, 4, 0)),
        ("-n4 --ntasks-per-node=2", Amounts(2, 4, 0)),
        ("-n 3 -c 8", Amounts(1, 24, 0)),
        ("-N2 -c8 --ntasks-per-node=2", Amounts(2, 32, 0)),
        ("-N2 --gres=gpu:2", Amounts(2, 2, 4)),
        ("-N2 --gres=gres:gpu:2", Amounts(2, 2, 4)),
        ("-n2 --gres=gpu", Amounts(1, 2, 1)),
        ("-N2 --gres=gpu:a100:3,tmpfs:100G", Amounts(2, 2, 6)),
        ("-N2 --gres=gpu:a100", Amounts(2, 2, 2)),
        ("--gres=none", Amounts(1, 1, 0)),
        ("--gres=tmpfs:10", Amounts(1, 1, 0)),
        ("-N2 --gpus-per-node=a100:4", Amounts(2, 2, 8)),
        ("-N2 --gpus=3", Amounts(2, 2, 3)),
        ("-G volta:3,kepler:5", Amounts(1, 1, 8)),
        ("-N2 -n2 --gpus-per-task=2", Amounts(2, 2, 4)),
        ("-N1 --gpus=2 --cpus-per-gpu=2", Amounts(1, 4, 2)),
    ],
)
def test_options_come_to_what_slurm_makes_of_them(words: str, amounts: Amounts) -> None:
    assert amounts_of(head_options(f"#!/bin/bash\n#SBATCH {words}\n")) == amounts
