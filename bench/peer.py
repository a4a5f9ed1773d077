"""bitsandbytes' native CPU library on the array of a file: milliseconds by operation (the lower quartile of some rounds), as JSON.

Usage: python bench/peer.py FILE   (float32 values; OMP_NUM_THREADS decides about the threads)

Dequantization calls the library itself, into memory that is there already, as halfbyte's benches do: through
bitsandbytes.functional a fresh output costs more in page faults than in arithmetic. Quantization is slow enough for that not to matter.
"""
import ctypes
import json
import os
import sys
import time

import numpy
import torch
import bitsandbytes.functional as F
from bitsandbytes.cextension import lib

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
values = torch.from_numpy(numpy.fromfile(sys.argv[1], dtype=numpy.float32))
DTYPES = {"f32": ("fp32", torch.float32), "f16": ("fp16", torch.float16), "bf16": ("bf16", torch.bfloat16)}


def typical(run, rounds=9):
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)[len(times) // 4]


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def numbers(*sizes):
    return [ctypes.c_longlong(size) for size in sizes]


out = {}
for name, (suffix, dtype) in DTYPES.items():
    x = values.to(dtype)
    n = x.numel()
    back = torch.empty_like(x)
    q, state = F.quantize_blockwise(x, blocksize=256)
    decode = getattr(lib, f"cdequantize_blockwise_cpu_{suffix}")
    operands = [pointer(state.code), pointer(q), pointer(state.absmax), pointer(back), *numbers(256, n)]
    out[f"quantize_blockwise_{name}"] = typical(lambda: F.quantize_blockwise(x, blocksize=256), 3)
    out[f"dequantize_blockwise_{name}"] = typical(lambda: decode(*operands))
    assert torch.equal(back, F.dequantize_blockwise(q, state))
    for kind in ("nf4", "fp4"):
        packed, state4 = F.quantize_4bit(x, blocksize=64, quant_type=kind)
        decode4 = getattr(lib, f"cdequantize_blockwise_cpu_{kind}_{suffix}")
        operands4 = [pointer(packed), pointer(state4.absmax), pointer(back), *numbers(64, 1, n)]
        out[f"quantize_{kind}_{name}"] = typical(lambda: F.quantize_4bit(x, blocksize=64, quant_type=kind), 3)
        out[f"dequantize_{kind}_{name}"] = typical(lambda: decode4(*operands4))
        assert torch.equal(back, F.dequantize_4bit(packed, state4).flatten())
half = values.to(torch.float16).reshape(-1, 4096)
out["int8_vectorwise_quant_f16"] = typical(lambda: F.int8_vectorwise_quant(half), 3)
print(json.dumps(out))
