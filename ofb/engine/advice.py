"""What to do about errors that are nobody's mistake: memory that ran out, a worker process that died."""

import re

import torch

from ofb.engine.config import TrainingConfig

HOST_MEMORY = re.compile("DefaultCPUAllocator: (can't allocate memory|not enough memory)")


def advice_on(error: RuntimeError, config: TrainingConfig) -> str | None:
    """What happened in a run and what helps, in one line; None where this is not such an error."""
    if isinstance(error, torch.OutOfMemoryError) or HOST_MEMORY.search(str(error)):
        parts = config.grad_accum_steps
        return (
            f"out of memory with batch_size {config.batch_size} in {parts} part{'s' if parts > 1 else ''} "
            f"({str(error).splitlines()[0].rpartition(': ')[2]}); --grad-accum-steps {2 * parts} halves what a step "
            "needs and is the same training, a smaller --batch-size is another training"
        )
    if str(error).startswith("DataLoader worker"):
        return (
            f"a process that reads images died ({str(error).splitlines()[0]}), often of too little memory; "
            f"fewer --workers than {config.worker_count} need less"
        )
    return None
