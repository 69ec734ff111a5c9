"""A short all-reduce over the ranks of this host, in processes of their own, so that a hang ends with a finding.

As a program (``python -m moefoundry.doctor.all_reduce RANK WORLD_SIZE FILE``) it is one of the ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from moefoundry.doctor.finding import Finding, Status

NAME = "all-reduce"
CPU_RANKS = 2
ELEMENTS = {"nccl": 64 * 2**20, "gloo": 2**20}  # fp32, summed in one call
REPEATS = 5


def all_reduce(world_size: int, seconds: float, program: Sequence[str] | None = None) -> Finding:
    """Start the ranks and wait for their sum.

    Args:
        world_size: Number of ranks.
        seconds: Time-out, which includes the start of the processes.
        program: Command of a rank, without its arguments.
    """
    program = program or (sys.executable, "-m", "moefoundry.doctor.all_reduce")
    with tempfile.TemporaryDirectory(prefix="moefoundry-") as scratch:
        file, logs = Path(scratch, "store"), [Path(scratch, f"rank{rank}.log") for rank in range(world_size)]
        processes = []
        try:
            for rank, log in enumerate(logs):
                command = [*program, str(rank), str(world_size), str(file), str(seconds)]
                with log.open("wb") as stream:
                    processes.append(subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT))
            codes = _wait(processes, seconds)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        texts = [log.read_text(errors="replace").splitlines() for log in logs]
    return _judge(codes, texts, seconds)


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[int | None]:
    """Wait for all ranks, or until one fails. Returns their statuses; None of those that run still."""
    end = time.monotonic() + seconds
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes) or time.monotonic() > end:
            return codes
        time.sleep(0.05)


def _judge(codes: Sequence[int | None], texts: Sequence[Sequence[str]], seconds: float) -> Finding:
    for rank, code in enumerate(codes):
        if code:
            text = f"rank {rank} of {len(codes)} ended with {code}: {(texts[rank] or ['no output'])[-1]}"
            return Finding(
                NAME, Status.error, text, "run it again with NCCL_DEBUG=INFO, TORCH_DISTRIBUTED_DEBUG=DETAIL"
            )
    if None in codes:
        hung = ", ".join(f"{rank}" for rank, code in enumerate(codes) if code is None)
        text = f"ranks {hung} of {len(codes)} did not end within {seconds:.0f} s"
        remedy = "run it again with NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 shows whether links between GPUs are at fault"
        return Finding(NAME, Status.error, text, remedy if _on_gpus(texts) else "give it a longer --timeout")
    result = json.loads(texts[0][-1])
    speed = f"{result['bytes'] / 2**20:.0f} MiB in {1000 * result['seconds']:.1f} ms"
    return Finding(NAME, Status.ok, f"{len(codes)} ranks, {result['backend']}: the sum is right; {speed}")


def _on_gpus(texts: Sequence[Sequence[str]]) -> bool:
    return any(line.startswith("nccl") for lines in texts for line in lines)


def run_rank(rank: int, world_size: int, file: str, seconds: float) -> None:
    """Join the group, sum, compare, and print the time of a sum.

    Raises:
        RuntimeError: The sum is wrong, or the ranks do not find each other.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= world_size
    backend, device = ("nccl", torch.device("cuda", rank)) if on_gpu else ("gloo", torch.device("cpu"))
    print(backend, flush=True)
    if on_gpu:
        torch.cuda.set_device(device)
    limit = timedelta(seconds=seconds)
    dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=world_size, timeout=limit)
    numbers = torch.full((ELEMENTS[backend],), rank + 1.0, device=device)
    dist.all_reduce(numbers)
    expected = world_size * (world_size + 1) / 2
    if not bool((numbers == expected).all()):
        raise RuntimeError(f"the sum of 1 to {world_size} is {expected:g}, and was {numbers.unique().tolist()[:4]}")
    numbers.zero_()
    start = time.perf_counter()
    for _ in range(REPEATS):
        dist.all_reduce(numbers)
    if on_gpu:
        torch.cuda.synchronize()
    taken = (time.perf_counter() - start) / REPEATS
    dist.destroy_process_group()
    print(json.dumps({"backend": backend, "bytes": numbers.numel() * 4, "seconds": taken}), flush=True)


def ranks_here() -> int:
    """Count the ranks that a launch on this host would have: one for each GPU, or two on a CPU."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else CPU_RANKS


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
