"""How the peers' times are measured: the lower quartile of some rounds, as in halfbyte's benches."""
import time

import torch

ROUNDS = 15
# Cycles of the sleeping kernel for a second: GPUs run at up to 2 GHz.
CYCLES = 2_000_000_000


def quartile(times):
    return sorted(times)[len(times) // 4]


def on_cpu(run, rounds=9):
    """Milliseconds."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return quartile(times)


def on_cuda(run, ahead=True):
    """Microseconds of the GPU; without `ahead` of a GPU that waits for the host."""
    for _ in range(5):
        run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(5):
        run()
    end.record()
    end.synchronize()
    count = max(3, min(60, int(4 / (start.elapsed_time(end) / 5)) + 1))
    began = time.perf_counter()
    for _ in range(count):
        run()
    enqueued = time.perf_counter() - began
    torch.cuda.synchronize()
    times = []
    for _ in range(ROUNDS):
        if ahead:
            torch.cuda._sleep(max(6_000_000, int(1.5 * enqueued * CYCLES)))
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return quartile(times)
