"""Runs a module in more processes than GPUs: `torchrun … -m benchmarks.training.shared_gpus MODULE …`.

NCCL takes two processes on one GPU only if it holds them for two machines; then they talk over sockets. So it
shows that what is sharded over so many processes fits and computes the same, and nothing of its speed.
"""

from __future__ import annotations

import os
import runpy
import sys


def main() -> None:
    import torch

    gpus = torch.cuda.device_count()
    if gpus:
        os.environ["NCCL_HOSTID"] = f"process-{os.environ['RANK']}"
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % gpus)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
