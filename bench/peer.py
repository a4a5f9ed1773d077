"""bitsandbytes' own CPU operations on the array of a file: median milliseconds by operation, as JSON.

Usage: python bench/peer.py FILE   (float32 values; OMP_NUM_THREADS decides about the threads)
"""
import json
import os
import statistics
import sys
import time

import numpy
import torch
import bitsandbytes.functional as F

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
values = torch.from_numpy(numpy.fromfile(sys.argv[1], dtype=numpy.float32))
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def median(run, rounds=9):
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


out = {}
for name, dtype in DTYPES.items():
    x = values.to(dtype)
    q, state = F.quantize_blockwise(x, blocksize=256)
    out[f"quantize_blockwise_{name}"] = median(lambda: F.quantize_blockwise(x, blocksize=256), 3)
    out[f"dequantize_blockwise_{name}"] = median(lambda: F.dequantize_blockwise(q, state))
    for kind in ("nf4", "fp4"):
        packed, state4 = F.quantize_4bit(x, blocksize=64, quant_type=kind)
        out[f"quantize_{kind}_{name}"] = median(lambda: F.quantize_4bit(x, blocksize=64, quant_type=kind), 3)
        out[f"dequantize_{kind}_{name}"] = median(lambda: F.dequantize_4bit(packed, state4))
half = values.to(torch.float16).reshape(-1, 4096)
out["int8_vectorwise_quant_f16"] = median(lambda: F.int8_vectorwise_quant(half), 3)
print(json.dumps(out))
