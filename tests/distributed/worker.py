"""
One process of several: runs the jobs of a plan one after another and writes its figures.

    python -m tests.distributed.worker PLAN.json

`RANK`, `WORLD_SIZE` and so on come from the environment, as torchrun and accelerate set them.
"""

import importlib
import json
import os
import sys
from pathlib import Path


def patch_for_cpu(backend: str) -> None:
    """What a machine without accelerators needs so that the real code path runs. Nothing of it is in the package."""
    import torch
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    # Resuming asks for RNG states on the process's device, `cpu:<index>`, which torch does not know as a location
    torch.serialization.register_package(5, lambda _: None, lambda obj, loc: obj if loc.startswith("cpu:") else None)
    if backend.startswith("zero"):
        # DeepSpeed would compile a kernel for sums over shared memory (minutes); without it the sums go through gloo
        # (`deepspeed.comm.torch` as an attribute is torch itself)
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    if backend == "fsdp2":
        # accelerate honours the FSDP plugin on accelerators only; on the CPU it would silently train with DDP
        init = AcceleratorState.__init__

        def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
            init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
            if fsdp_plugin is not None:
                self.distributed_type = DistributedType.FSDP
                self.fsdp_plugin = fsdp_plugin
                PartialState._shared_state["distributed_type"] = DistributedType.FSDP

        AcceleratorState.__init__ = with_fsdp


def main(path: str) -> None:
    plan = json.loads(Path(path).read_text())
    import torch

    torch.set_num_threads(1)
    patch_for_cpu(plan["backend"])
    from tests.distributed import jobs

    for spec in plan["jobs"]:
        spec["stages"] = tuple(spec["stages"])
        job = jobs.Job(**spec)
        folder = Path(plan["folder"]) / job.name
        folder.mkdir(parents=True, exist_ok=True)
        figures = jobs.run(job, plan["model_dir"], folder, plan["num_processes"], plan["deepspeed"])
        (folder / f"figures_{os.environ['RANK']}.json").write_text(json.dumps(figures))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
