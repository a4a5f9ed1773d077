"""The errors of halfbyte's products over a real model's linear layers beside those of bitsandbytes, both against float64.

Usage: python test/interop/check_products.py [--expect LAYERS] [--dtypes bf16,f16,f32] [--counts FILE] [--json FILE] OPERANDS_DIR [RESULTS_DIR]

--counts adds to what the file has; --dtypes are those that products.mjs was given. The folders are of test/interop/products.mjs (RESULTS_DIR: another run with --results-only, on another device). On the same packed
weights, scales and activations, bitsandbytes computes on the CPU what `matmul_4bit` and LLM.int8()'s `matmul` give. An error is the
Frobenius norm of the difference from the float64 product over the norm of that, of one layer at one number of rows.

- 4 bits: the float64 product is that with the decoded weight rounded to the activations' dtype, which is what bitsandbytes multiplies
  with. How far both are from the product with the weight as it is before that rounding is printed as well.
- int8: once against the same parts (codes, scales, outlier columns) multiplied exactly, which measures the arithmetic, and once
  against activations times decoded weight, which measures LLM.int8() as a whole.

A product passes when its error is not above bitsandbytes'. Where bitsandbytes' is as good as the result's dtype allows (the float64
product, rounded to it), both round the same sums and a rounding more or less falls to either: there ours may be up to 1.02 times
that least possible error. LLM.int8() as a whole is as far off as its codes are, which are the same for both: what the arithmetic adds falls to
either side in a layer, so there the mean over the layers is judged (to a thousandth), as it is of everything else as well.
What begins with -- (the cpu's fast mode, the weight before rounding) is measured, not judged. Exit 1 when a product does not pass or is missing (4 bits
with every dtype, int8 with those of 16 bits, at every number of rows, of every layer), or there are fewer layers than --expect.
"""
import argparse
import glob
import json
import logging
import os
import sys
import warnings

logging.disable(logging.WARNING)
warnings.filterwarnings("ignore")

import bitsandbytes
import bitsandbytes.functional as F
import torch
from bitsandbytes.autograd._functions import MatmulLtState
from safetensors import safe_open

TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# LLM.int8() is for 16 bits.
INT8_DTYPES = ("bf16", "f16")
BLOCKSIZE = 64
ROOM = 1.02
# Of a mean over layers. What is the same in both makes nearly all of it, and what is not falls to either side.
ROOM_OF_MEAN = 1.001
MEASURED = ("nf4 fast", "nf4 exact, weight unrounded")


def error(result, reference):
    return float((result.double() - reference).norm() / reference.norm())


class FourBit:
    """A layer's NF4 weight: the float64 product, and bitsandbytes'."""

    def __init__(self, tensor, name, shape):
        packed, absmax = tensor(f"{name}.packed"), tensor(f"{name}.absmax")
        self.code = F.get_4bit_type("nf4", device="cpu")
        nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
        self.weight = (self.code[nibbles].view(-1, BLOCKSIZE) * absmax[:, None]).view(shape)
        self.packed, self.absmax, self.shape = packed, absmax, shape

    def reference(self, x, dtype):
        return x.double() @ self.weight.to(dtype).double().T

    def unrounded(self, x):
        return x.double() @ self.weight.double().T

    def theirs(self, x, dtype):
        state = F.QuantState(self.absmax, self.shape, self.code, BLOCKSIZE, "nf4", dtype)
        return bitsandbytes.matmul_4bit(x, self.packed.t(), state)


class Int8:
    """A layer's int8 weight: the float64 products with and without the activations' own rounding, and bitsandbytes'."""

    def __init__(self, tensor, name, threshold):
        self.codes, self.scale, self.threshold = tensor(f"{name}.codes"), tensor(f"{name}.scale"), threshold
        self.wide = self.codes.double()
        self.steps = self.scale.double() / 127

    def product(self, x):
        return (x.double() @ self.wide.T) * self.steps

    def parts(self, x, dtype):
        codes, scale, outliers = F.int8_vectorwise_quant(x.half(), threshold=self.threshold)
        codes[:, outliers] = 0
        rest = (codes.double() @ self.wide.T) * (scale.double() / 127)[:, None] * self.steps
        # Outlier columns of the weight are decoded to the activations' dtype, as both do.
        decoded = (self.wide[:, outliers] * self.steps[:, None]).to(dtype).double()
        return rest + x[:, outliers].double() @ decoded.T, outliers.numel()

    def theirs(self, x):
        state = MatmulLtState()
        state.CB, state.SCB = self.codes, self.scale
        state.has_fp16_weights, state.is_training, state.threshold = False, False, self.threshold
        return bitsandbytes.matmul(x, self.codes, state=state)


class Tally:
    """All layers of one kind of product, one dtype and one number of rows."""

    def __init__(self, judged):
        self.judged, self.layers, self.above, self.outliers, self.missing = judged, 0, 0, 0, 0
        self.ours, self.theirs, self.worst, self.failed = 0.0, 0.0, (0.0, ""), []

    def add(self, layer, ours, theirs, least=None):
        """`least`: the least possible error, or None where the mean is judged."""
        self.layers += 1
        self.above += ours > theirs
        self.ours += ours
        self.theirs += theirs
        self.worst = max(self.worst, (ours / theirs, layer))
        if not self.judged or least is None:
            return
        limit = max(theirs, ROOM * least)
        # Also true of NaN.
        if not ours <= limit:
            self.failed.append(f"{layer}: error {ours:.4e}, bitsandbytes {theirs:.4e}, limit {limit:.4e}")

    def finish(self, expected):
        if not self.judged:
            return
        if self.missing or self.layers < expected:
            self.failed.append(f"{self.layers} layers, expected {max(expected, self.layers + self.missing)}")
        if self.layers and not self.ours <= ROOM_OF_MEAN * self.theirs:
            self.failed.append(f"mean error {self.ours / self.layers:.4e}, bitsandbytes {self.theirs / self.layers:.4e}")

    def summary(self):
        ratio, layer = self.worst
        if not self.layers:
            return {"layers": 0, "failed": len(self.failed)}
        return {
            "layers": self.layers,
            "ours": self.ours / self.layers,
            "theirs": self.theirs / self.layers,
            "ratio": self.ours / self.theirs,
            "worst": ratio,
            "worst_layer": layer,
            "above": self.above,
            "failed": len(self.failed),
        }


def check_shard(operands, results, dtypes, tallies):
    metadata = results.metadata()
    if operands.metadata()["operands"] != metadata["operands"]:
        raise SystemExit("the results are of other operands")
    threshold = float(metadata["threshold"])
    rows_of = [int(count) for count in metadata["rows"].split(",")]
    given = set(results.keys())
    for key in sorted(operands.keys()):
        if not key.endswith(".packed"):
            continue
        name = key.removesuffix(".packed")
        int8 = Int8(operands.get_tensor, name, threshold)
        four = FourBit(operands.get_tensor, name, int8.codes.shape)
        for dtype_name in dtypes:
            dtype = TORCH[dtype_name]
            all_rows = operands.get_tensor(f"{name}.x.{dtype_name}")
            split = lambda t: t.split(rows_of)
            references, plains = split(four.reference(all_rows, dtype)), split(four.unrounded(all_rows))
            products = split(int8.product(all_rows)) if dtype_name in INT8_DTYPES else references
            for rows, x, reference, plain, product in zip(rows_of, split(all_rows), references, plains, products):
                where = f"{dtype_name}, M={rows}"
                own = lambda kind: results.get_tensor(f"{name}.{kind}.{dtype_name}.{rows}")
                tally = lambda kind: tallies.setdefault(f"{kind} {where}", Tally(kind not in MEASURED))
                there = lambda kind: f"{name}.{kind}.{dtype_name}.{rows}" in given
                upstream = four.theirs(x, dtype)
                theirs, least = error(upstream, reference), error(reference.to(dtype), reference)
                if there("exact"):
                    exact = own("exact")
                    tally("nf4 exact").add(name, error(exact, reference), theirs, least)
                    if dtype != torch.float32:
                        tally("nf4 exact, weight unrounded").add(name, error(exact, plain), error(upstream, plain))
                else:
                    tally("nf4 exact").missing += 1
                if there("fast"):
                    tally("nf4 fast").add(name, error(own("fast"), reference), theirs)
                if dtype_name not in INT8_DTYPES:
                    continue
                if not there("int8"):
                    for kind in ("int8 arithmetic", "int8 as a whole"):
                        tally(kind).missing += 1
                    continue
                parts, outliers = int8.parts(x, dtype)
                ours, upstream = own("int8"), int8.theirs(x)
                tally("int8 arithmetic").add(name, error(ours, parts), error(upstream, parts), error(parts.to(dtype), parts))
                tally("int8 as a whole").add(name, error(ours, product), error(upstream, product))
                tally("int8 arithmetic").outliers += outliers


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--expect", type=int, default=1)
    parser.add_argument("--dtypes", default=",".join(TORCH))
    parser.add_argument("--counts")
    parser.add_argument("--json")
    parser.add_argument("operands")
    parser.add_argument("results", nargs="?")
    args = parser.parse_args()
    dtypes = args.dtypes.split(",")
    if not set(dtypes) <= TORCH.keys():
        parser.error(f"--dtypes: any of {', '.join(TORCH)}")
    tallies = {}
    files = sorted(glob.glob(os.path.join(args.results or args.operands, "results-*.safetensors")))
    if not files:
        raise SystemExit("no results")
    for path in files:
        results = safe_open(path, "pt")
        name = os.path.basename(path).replace("results", "operands")
        check_shard(safe_open(os.path.join(args.operands, name), "pt"), results, dtypes, tallies)
    if not tallies:
        raise SystemExit("no results in the files")
    device = results.metadata()["device"]
    for tally in tallies.values():
        tally.finish(args.expect)
    failed = sum(bool(tally.failed) for tally in tallies.values())
    judged = sum(tally.judged for tally in tallies.values())
    print(f"halfbyte on {device} against bitsandbytes {bitsandbytes.__version__} on a CPU; mean errors over the layers")
    for kind, tally in tallies.items():
        found = tally.summary()
        if not found["layers"]:
            print(f"FAIL {kind}: missing")
            continue
        note = f", {tally.outliers / found['layers']:.1f} outlier columns" if tally.outliers else ""
        print(
            f"{'FAIL' if tally.failed else 'ok' if tally.judged else '--'} {kind}: {found['layers']} layers, ours {found['ours']:.4e}, bitsandbytes "
            f"{found['theirs']:.4e}, ratio {found['ratio']:.4f}, worst {found['worst']:.5f}, above in {found['above']}{note}"
        )
        for line in tally.failed[:5]:
            print(f"  {line}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump({"device": device, "products": {kind: tally.summary() for kind, tally in tallies.items()}}, f, indent=1)
    if args.counts:
        counts = {"passed": 0, "failed": 0, "skipped": 0}
        if os.path.exists(args.counts):
            with open(args.counts, encoding="utf-8") as f:
                counts = json.load(f)
        counts["passed"] += judged - failed
        counts["failed"] += failed
        with open(args.counts, "w", encoding="utf-8") as f:
            json.dump(counts, f)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
