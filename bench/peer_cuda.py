"""bitsandbytes' CUDA kernels, and what torch has for the rest, by CUDA events: microseconds by operation, as JSON.

Usage: python bench/peer_cuda.py ELEMENTS... [--products JSON]

The library's own functions are called, into memory that is there already, back to back behind a kernel that sleeps while they are
enqueued: the time is the GPU's, without what Python costs. Operations made of several (double quantization) and products go
through bitsandbytes' Python functions. The lower quartile of the rounds, as in halfbyte's benches.

Products are a list of {"name", "kind", "m", "n", "k", "threshold"}: each by bitsandbytes' `matmul_4bit` or `matmul`, and densely by
torch with the weight in the activations' dtype (cuBLASLt). With outlier columns bitsandbytes waits for the GPU in every
call, so that its time is the host's as well, however it is measured.
"""
import argparse
import json
import logging

import torch
import bitsandbytes
import bitsandbytes.functional as F
from bitsandbytes.autograd._functions import MatmulLtState
from bitsandbytes.cextension import lib

from peer_timing import on_cuda as typical

logging.disable(logging.WARNING)
DTYPES = {"f32": ("fp32", torch.float32), "f16": ("fp16", torch.float16), "bf16": ("bf16", torch.bfloat16)}
# The bitsandbytes library launches its quantizers on the default stream.
STREAM = torch._C._cuda_getCurrentRawStream(0)


def close(a, b, limit):
    error = (a.float() - b.float()).abs().mean().item()
    assert error < limit, f"mean error {error}"


def measure(n):
    torch.manual_seed(1)
    values = torch.randn(n, device="cuda", dtype=torch.float32) * 0.05
    ops = {}
    other = torch.empty_like(values)
    copy = typical(lambda: other.copy_(values))
    code = F.create_dynamic_map().cuda()
    for name, (suffix, dtype) in DTYPES.items():
        x = values.to(dtype)
        back = torch.empty_like(x)
        q = torch.empty(n, device="cuda", dtype=torch.uint8)
        absmax = torch.empty(n // 256, device="cuda", dtype=torch.float32)
        a, b, c, d, e = (t.data_ptr() for t in (code, x, absmax, q, back))
        quantize = getattr(lib, f"cquantize_blockwise_{suffix}")
        decode = getattr(lib, f"cdequantize_blockwise_{suffix}")
        ops[f"quantize_blockwise_{name}"] = typical(lambda: quantize(a, b, c, d, 256, n))
        ops[f"dequantize_blockwise_{name}"] = typical(lambda: decode(a, d, c, e, 256, n, STREAM))
        close(back, x, 0.002)
        for kind in ("nf4", "fp4"):
            packed = torch.empty(n // 2, device="cuda", dtype=torch.uint8)
            absmax4 = torch.empty(n // 64, device="cuda", dtype=torch.float32)
            c4, d4 = absmax4.data_ptr(), packed.data_ptr()
            quantize4 = getattr(lib, f"cquantize_blockwise_{suffix}_{kind}")
            decode4 = getattr(lib, f"cdequantize_blockwise_{suffix}_{kind}")
            ops[f"quantize_{kind}_{name}"] = typical(lambda: quantize4(None, b, c4, d4, 64, n))
            ops[f"dequantize_{kind}_{name}"] = typical(lambda: decode4(None, d4, c4, e, 64, n, STREAM))
            close(back, x, 0.01)
    half = values.to(torch.float16).reshape(-1, 4096)
    rows, cols = half.shape
    codes = torch.empty_like(half, dtype=torch.int8)
    stats = torch.empty(rows, device="cuda", dtype=torch.float32)
    a, b, c = half.data_ptr(), codes.data_ptr(), stats.data_ptr()
    ops["int8_vectorwise_quant_f16"] = typical(lambda: lib.cint8_vector_quant(a, b, c, 0.0, rows, cols, STREAM))
    close(codes * stats[:, None] / 127, half, 0.002)
    x = values.to(torch.bfloat16)
    double = dict(blocksize=64, quant_type="nf4", compress_statistics=True)
    ops["quantize_nf4_bf16_double"] = typical(lambda: F.quantize_4bit(x, **double))
    packed, state = F.quantize_4bit(x, **double)
    ops["dequantize_nf4_bf16_double"] = typical(lambda: F.dequantize_4bit(packed, state))
    for source, target in (("f32", "bf16"), ("f32", "f16"), ("bf16", "f32"), ("f16", "f32")):
        y = values.to(DTYPES[source][1])
        z = torch.empty_like(y, dtype=DTYPES[target][1])
        ops[f"convert_{source}_{target}"] = typical(lambda: z.copy_(y))
    ops["mean_f32"] = typical(lambda: values.mean())
    return {"copy": copy, "ops": ops}


def product(kind, m, n, k, threshold=0.0, **_):
    torch.manual_seed(1)
    dtype = torch.float16 if kind == "int8" else torch.bfloat16
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    weight = torch.randn(n, k, device="cuda", dtype=dtype) * 0.05
    dense = lambda: torch.nn.functional.linear(x, weight)
    if kind == "int8":
        # As many outliers as in halfbyte's bench; dense and threshold 0 see them too.
        x[:, 7::512] *= 20
        codes, scale, _ = F.int8_vectorwise_quant(weight)
        state = MatmulLtState()
        state.CB, state.SCB = codes, scale
        state.has_fp16_weights, state.is_training, state.threshold = False, False, threshold
        run = lambda: bitsandbytes.matmul(x, codes, state=state)
    else:
        packed, state = F.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=kind == "nf4 double")
        run = lambda: bitsandbytes.matmul_4bit(x, packed.t(), state)
    with torch.no_grad():
        error = (run().float() - dense().float()).norm() / dense().float().norm()
        assert error < 0.3, f"{kind} {m} {n} {k}: error {error}"
        return {"bitsandbytes": typical(run), "bitsandbytesLaunched": typical(run, ahead=False), "dense": typical(dense)}


parser = argparse.ArgumentParser()
parser.add_argument("elements", nargs="*")
parser.add_argument("--products", default="[]")
args = parser.parse_args()
versions = f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__} (conversions, the mean, dense products), {torch.cuda.get_device_name(0)}"
sizes = {n: measure(int(n)) for n in args.elements}
products = {one["name"]: product(**{key: value for key, value in one.items() if key != "name"}) for one in json.loads(args.products)}
print(json.dumps({"versions": versions, "sizes": sizes, "products": products}))
