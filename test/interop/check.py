"""What transformers + bitsandbytes make of quantized folders.

Usage: python test/interop/check.py [--counts FILE] ORIGINAL_DIR QUANTIZED_DIR...

For each folder: every code and scale against bitsandbytes' own quantization of the original, the state's JSON byte for byte,
the tokenizer's ids on a page of mixed text, and the model itself: it loads, answers, and its next-token distribution stays near the
original's (mean KL divergence; bitsandbytes itself: NF4 0.28, FP4 0.51, int8 0.03). Exit 1 when any folder fails.
"""
import argparse
import gc
import json
import logging
import os
import sys

import bitsandbytes.functional as F
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

logging.disable(logging.WARNING)
CODES_MAY_DIFFER = 1e-5
KL_LIMIT = {"nf4": 0.4, "fp4": 0.6, "int8": 0.06}
PROSE = (
    "Water boils at a temperature of one hundred degrees Celsius at sea level. On high mountains the pressure of the air is "
    "lower, so it boils earlier."
)
PAGE = PROSE + "\n\n\tdef f(x):\n\t    return {'a': x**2, \"b\": [1_000, 2.5e-3]}  # tabs   and   spaces\n" + (
    "Ünïcödé, 日本語, Ελληνικά, 🙂👩‍🚀, it's 12345 o'clock; <|im_start|>user\nhi<|im_end|>\r\n   \n"
)


class Folder:
    """The tensors of a model folder, one file or many."""

    def __init__(self, path):
        index = os.path.join(path, "model.safetensors.index.json")
        names = ["model.safetensors"]
        if os.path.exists(index):
            with open(index, encoding="utf-8") as f:
                names = sorted(set(json.load(f)["weight_map"].values()))
        self.files = [safe_open(os.path.join(path, name), "pt") for name in names]
        self.where = {key: f for f in self.files for key in f.keys()}

    def __contains__(self, name):
        return name in self.where

    def __getitem__(self, name):
        return self.where[name].get_tensor(name)


# bitsandbytes' CUDA kernels decide FP4 by these decimal literals and add the sign bit to every negative value. Its CPU path
# decides by midpoints and gives tiny positive values code 8 (-0), tiny negative ones code 0: about 0.6 % of the codes of a
# bf16 model are other codes there (nearly all of them zeros of the other sign). halfbyte follows the CUDA kernels.
FP4_LITERALS = torch.tensor([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333])
FP4_BY_RANK = torch.tensor([0, 1, 6, 7, 4, 5, 2, 3])


def fp4_of_cuda(weight, absmax, blocksize):
    """The packed codes that bitsandbytes' CUDA kernel gives."""
    flat = weight.flatten().float()
    scaled = flat * (1.0 / absmax.flatten()).repeat_interleave(blocksize)[: flat.numel()]
    scaled = torch.nan_to_num(scaled, nan=0.0)
    codes = FP4_BY_RANK[torch.bucketize(scaled.abs(), FP4_LITERALS)] + 8 * (scaled < 0)
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).to(torch.uint8)
    return (codes[::2] << 4) | codes[1::2]


def nibbles_differing(a, b):
    differing = a.flatten() ^ b.flatten()
    return int(((differing & 15) != 0).sum() + ((differing >> 4) != 0).sum())


def compare_4bit(original, quantized, key, found):
    name = key.split(".quant_state.")[0]
    text = bytes(quantized[key].tolist()).decode()
    meta = json.loads(text)
    nested = name + ".nested_absmax" in quantized
    packed, state = F.quantize_4bit(
        original[name], blocksize=meta["blocksize"], quant_type=meta["quant_type"], compress_statistics=nested
    )
    ours = quantized[name].flatten().view(torch.uint8)
    found["codes"] += 2 * ours.numel()
    if meta["quant_type"] == "fp4":
        found["cpu_codes_differing"] = found.get("cpu_codes_differing", 0) + nibbles_differing(packed, ours)
        packed = fp4_of_cuda(original[name], state.absmax, meta["blocksize"])
    found["codes_differing"] += nibbles_differing(packed, ours)
    found["scales"] += state.absmax.numel()
    found["scales_differing"] += int((state.absmax.flatten() != quantized[name + ".absmax"].flatten()).sum())
    if text != json.dumps(meta):
        found["problems"].append(f"{key}: the JSON is not what Python writes")
    if not nested:
        expected = state.as_dict(packed=True)
        own = bytes(expected["quant_state.bitsandbytes__" + meta["quant_type"]].tolist()).decode()
        if text != own:
            found["problems"].append(f"{key}: {text} is not bitsandbytes' {own}")
        if not torch.equal(expected["quant_map"], quantized[name + ".quant_map"]):
            found["problems"].append(f"{name}: quant_map differs")
    found["tensors"] += 1
    return meta["quant_type"]


def compare_int8(original, quantized, key, found):
    name = key[: -len("SCB")] + "weight"
    weight = original[name].half()
    scale = weight.abs().max(dim=1).values.float()
    codes = torch.round(weight.float() * (127.0 / scale)[:, None]).to(torch.int8)
    found["codes"] += codes.numel()
    found["codes_differing"] += int((codes != quantized[name]).sum())
    found["scales"] += scale.numel()
    found["scales_differing"] += int((scale != quantized[key]).sum())
    found["tensors"] += 1


def check(original_dir, quantized_dir, reference):
    found = {"folder": quantized_dir, "tensors": 0, "codes": 0, "codes_differing": 0, "scales": 0, "scales_differing": 0, "problems": []}
    original, quantized = Folder(original_dir), Folder(quantized_dir)
    kind = "int8"
    for key in quantized.where:
        if ".quant_state.bitsandbytes__" in key:
            kind = compare_4bit(original, quantized, key, found)
        elif key.endswith(".SCB"):
            compare_int8(original, quantized, key, found)
    if found["tensors"] != reference["linears"]:
        found["problems"].append(f"{found['tensors']} quantized tensors, expected {reference['linears']}")
    if found["codes_differing"] > CODES_MAY_DIFFER * found["codes"]:
        found["problems"].append("codes differ")
    tokenizer = AutoTokenizer.from_pretrained(quantized_dir)
    if tokenizer(PAGE)["input_ids"] != reference["page"]:
        found["problems"].append("the tokenizer gives other ids")
    model = AutoModelForCausalLM.from_pretrained(quantized_dir, device_map="cpu")
    with torch.no_grad():
        log_probs = torch.log_softmax(model(reference["ids"]).logits.float(), -1)
        answer = model.generate(reference["question"], max_new_tokens=12, do_sample=False)[0]
    found["answer"] = tokenizer.decode(answer[reference["question"].shape[1] :])
    kl = (reference["log_probs"].exp() * (reference["log_probs"] - log_probs)).sum(-1).mean()
    found["kl"] = round(float(kl), 4)
    if not found["kl"] <= KL_LIMIT[kind]:
        found["problems"].append(f"KL divergence {found['kl']} above {KL_LIMIT[kind]}")
    return found


def reference_of(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    question = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    ids = tokenizer(PROSE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_probs = torch.log_softmax(model(ids).logits.float(), -1)
    head = model.get_output_embeddings()
    linears = sum(isinstance(m, torch.nn.Linear) and m is not head for m in model.modules())
    return {
        "page": tokenizer(PAGE)["input_ids"],
        "ids": ids,
        "question": question if torch.is_tensor(question) else question["input_ids"],
        "log_probs": log_probs,
        "linears": linears,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--counts")
    parser.add_argument("original")
    parser.add_argument("quantized", nargs="+")
    args = parser.parse_args()
    reference = reference_of(args.original)
    failed = 0
    for folder in args.quantized:
        try:
            found = check(args.original, folder, reference)
        except Exception as error:  # the loader's own words are the finding
            found = {"folder": folder, "problems": [f"{type(error).__name__}: {error}"]}
        failed += bool(found["problems"])
        print(("FAIL " if found["problems"] else "ok ") + json.dumps(found), flush=True)
        gc.collect()
    if args.counts:
        with open(args.counts, "w", encoding="utf-8") as f:
            json.dump({"passed": len(args.quantized) - failed, "failed": failed, "skipped": 0}, f)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
