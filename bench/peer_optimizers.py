"""bitsandbytes' and torch's optimizer steps: microseconds by optimizer, as JSON.

Usage: python bench/peer_optimizers.py cpu|cuda ELEMENTS [--shapes JSON]     (OMP_NUM_THREADS decides about a CPU's threads)

bitsandbytes through its operator `optimizer_update_8bit_blockwise` or `optimizer_update_32bit`, on one flat tensor: on a GPU that is its
kernel, on a CPU a chain of torch's operations. What raises an error there is left out (bf16 with one 32-bit state, 8-bit LAMB). torch's own
optimizers, fused and foreach, keep their states in the dtype of the parameter. With `--shapes` (of a model's tensors) the classes
make steps on bf16 tensors of them, and on one tensor of as many elements: `model` and `whole`, each also without a GPU that is kept busy.
"""
import argparse
import json
import logging
import os

import torch

logging.disable(logging.WARNING)

import bitsandbytes
import bitsandbytes.functional as F

from peer_timing import on_cpu, on_cuda

parser = argparse.ArgumentParser()
parser.add_argument("device", choices=["cpu", "cuda"])
parser.add_argument("elements", type=int)
parser.add_argument("--shapes", default="[]")
args = parser.parse_args()
DEVICE, N = args.device, args.elements
BLOCK = 256
TWO_STATES = ("adam", "adamw", "lamb", "ademamix")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
NAMES = {"adamw": "adam", "sgd": "momentum"}
if DEVICE == "cpu":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def typical(run, **options):
    return on_cuda(run, **options) if DEVICE == "cuda" else on_cpu(run, 5) * 1e3


def values(n, dtype, seed=1):
    torch.manual_seed(seed)
    return (torch.randn(n, device=DEVICE) * 0.05).to(dtype)


def update(name, bits, dtype):
    """A step of bitsandbytes."""
    p, g = values(N, dtype), values(N, dtype, 2)
    kernel = NAMES.get(name, name)
    shape = (2, N) if name == "ademamix" else (N,)
    two = name in TWO_STATES
    state = torch.uint8 if bits == 8 else torch.float32
    state1 = torch.zeros(shape, dtype=state, device=DEVICE)
    state2 = torch.zeros(N, dtype=state, device=DEVICE) if two else None
    lr, decay, eps = 1e-3, 0.01 if name == "adamw" else 0.0, 1e-8
    betas = (0.9, 0.999, 0.9999)
    step = 0

    if bits == 8:
        blocks = -(-N // BLOCK)
        maps = [F.create_dynamic_map(signed).to(DEVICE) for signed in (True, False)]
        scales = torch.zeros((2, blocks) if name == "ademamix" else (blocks,), device=DEVICE)
        scales2 = torch.zeros(blocks, device=DEVICE) if two else None

        def run():
            nonlocal step
            step += 1
            F.optimizer_update_8bit_blockwise(
                kernel, g, p, state1, state2, *betas, 5.0, eps, step, lr, maps[0], maps[1] if two else None, scales, scales2, decay
            )
    else:
        norm = torch.zeros(1, device=DEVICE) if name in ("lamb", "lars") else None
        bound = {"lamb": 1.0, "lars": 0.02}.get(name, 0.0)

        def run():
            nonlocal step
            step += 1
            # As bitsandbytes' classes do it, the norm of the parameter is torch's.
            length = torch.norm(p.float()).item() if norm is not None else 0.0
            torch.ops.bitsandbytes.optimizer_update_32bit(
                kernel, g, p, state1, state2, norm, bound, length, *betas, 5.0, eps, decay, step, lr, 1.0
            )

    return run, p


def torch_step(make, dtype, **options):
    p = torch.nn.Parameter(values(N, dtype))
    p.grad = values(N, dtype, 2)
    return make([p], lr=1e-3, **options).step


def families():
    ops = {}
    for dtype_name, dtype in DTYPES.items():
        for name in ("adam", "adamw", "sgd", "rmsprop", "adagrad", "lion", "ademamix", "lamb", "lars"):
            for bits in (8, 32):
                try:
                    run, p = update(name, bits, dtype)
                    before = p.clone()
                    run()
                except (ValueError, RuntimeError, NotImplementedError, KeyError):
                    continue
                assert not torch.equal(before, p), f"{name} {bits} {dtype_name} does nothing"
                del before
                ops[f"{name}_{bits}_{dtype_name}"] = typical(run)
                del run, p
        ways = {
            "torch fused adamw": (torch.optim.AdamW, dict(fused=True)),
            "torch foreach adamw": (torch.optim.AdamW, dict(foreach=True)),
            "torch fused sgd": (torch.optim.SGD, dict(fused=True, momentum=0.9)),
            "torch fused adagrad": (torch.optim.Adagrad, dict(fused=True)),
        }
        for name, (make, options) in ways.items():
            try:
                ops[f"{name}_32_{dtype_name}"] = typical(torch_step(make, dtype, **options))
            except (ValueError, RuntimeError):
                continue
        g = torch.nn.Parameter(values(N, dtype))
        g.grad = values(N, dtype)
        # A norm that nothing exceeds; torch multiplies by 1 then, as halfbyte does.
        ops[f"clip_{dtype_name}"] = typical(lambda: torch.nn.utils.clip_grad_norm_([g], 1e9))
        ops[f"norm_{dtype_name}"] = typical(lambda: torch.linalg.vector_norm(g.grad))
    return ops


def model(shapes):
    """Steps on a model's tensors by the classes, and on one tensor."""
    ops = {}
    whole = [[sum(torch.Size(shape).numel() for shape in shapes)]]
    for what, own in (("model", shapes), ("whole", whole)):
        for name, make in (
            ("adamw_8", lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3)),
            ("adamw_32", lambda p: bitsandbytes.optim.AdamW32bit(p, lr=1e-3)),
            ("torch fused adamw_32", lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)),
        ):
            params = [torch.nn.Parameter(values(torch.Size(shape).numel(), torch.bfloat16).reshape(shape)) for shape in own]
            for p in params:
                p.grad = values(p.numel(), torch.bfloat16).reshape(p.shape)
            step = make(params).step
            ops[f"{name}_bf16 {what}"] = typical(step)
            if DEVICE == "cuda":
                ops[f"{name}_bf16 {what}, launched"] = typical(step, ahead=False)
            del step, params
    return ops


with torch.no_grad():
    source = values(N, torch.float32)
    target = torch.empty_like(source)
    copy = typical(lambda: target.copy_(source))
    del source, target
    shapes = json.loads(args.shapes)
    ops = families() | (model(shapes) if shapes else {})
    versions = f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}"
    print(json.dumps({"versions": versions, "copy": copy, "ops": ops}))
