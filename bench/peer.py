"""bitsandbytes' native CPU library on the array of a file: milliseconds by operation (the lower quartile of some rounds), as JSON.

Usage: python bench/peer.py FILE [kernels] [products]   (float32 values; OMP_NUM_THREADS decides about the threads)

Dequantization calls the library itself, into memory that is there already, as halfbyte's benches do: through
bitsandbytes.functional a fresh output costs more in page faults than in arithmetic. Quantization is slow enough for that not to matter.

Products are of a 4096 x 4096 weight. A 4-bit product has two ways there: decode the weight and multiply densely, or, once its codes are
laid out anew for it, a kernel for AVX512-BF16, which rounds activations and scales to bf16. What counts is the faster.
"""
import ctypes
import json
import logging
import os
import sys

import numpy
import torch

logging.disable(logging.WARNING)

import bitsandbytes
import bitsandbytes.functional as F
from bitsandbytes.autograd._functions import MatmulLtState
from bitsandbytes.cextension import lib

from peer_timing import on_cpu as typical

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
values = torch.from_numpy(numpy.fromfile(sys.argv[1], dtype=numpy.float32))
DTYPES = {"f32": ("fp32", torch.float32), "f16": ("fp16", torch.float16), "bf16": ("bf16", torch.bfloat16)}


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def numbers(*sizes):
    return [ctypes.c_longlong(size) for size in sizes]


def kernels():
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
    return out


N = K = 4096
ROWS = (1, 2, 4, 8, 16, 64)
OUTLIERS_EVERY = 512
THRESHOLD = 6.0


def products():
    out = {}
    weight = values[: N * K].reshape(N, K)
    for name, (_, dtype) in DTYPES.items():
        w = weight.to(dtype)
        packed, state = F.quantize_4bit(w, blocksize=64, quant_type="nf4")
        packed_cpu, state_cpu = None, None
        if F.has_avx512bf16():
            again, copied = F.quantize_4bit(w, blocksize=64, quant_type="nf4")
            packed_cpu, state_cpu = F._convert_weight_packed_for_cpu(again, copied)
        for m in ROWS:
            x = values[: m * K].reshape(m, K).to(dtype)
            ways = [typical(lambda: bitsandbytes.matmul_4bit(x, packed.t(), state), 5)]
            if packed_cpu is not None:
                ways.append(typical(lambda: bitsandbytes.matmul_4bit(x, packed_cpu, state_cpu), 5))
            out[f"matmul4bit_nf4_{name}_m{m}"] = min(ways)
            out[f"matmul_{name}_m{m}"] = typical(lambda: torch.nn.functional.linear(x, w), 5)
    codes, scale, _ = F.int8_vectorwise_quant(weight.to(torch.float16))
    for m in ROWS:
        x = (values[: m * K].reshape(m, K) * 20).to(torch.float16)
        x[:, 7::OUTLIERS_EVERY] *= 20
        own, _, _ = F.int8_vectorwise_quant(x)
        out[f"igemm_m{m}"] = typical(lambda: F.int8_linear_matmul(own, codes), 5)
        for threshold in (0.0, THRESHOLD):
            state = MatmulLtState()
            state.CB, state.SCB = codes, scale
            state.has_fp16_weights, state.is_training, state.threshold = False, False, threshold
            run = lambda: bitsandbytes.matmul(x, codes, state=state)
            out[f"matmul8bit_f16_m{m}_threshold{threshold:.0f}"] = typical(run, 5)
    return out


def measure(what):
    return {name: time for part in what for name, time in {"kernels": kernels, "products": products}[part]().items()}


with torch.no_grad():
    print(json.dumps(measure(sys.argv[2:] or ["kernels"])))
