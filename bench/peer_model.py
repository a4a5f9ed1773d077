"""Quantize a model to NF4 on the CPU with transformers + bitsandbytes and save it.

Usage: python bench/peer_model.py HF_DIR OUT_DIR USAGE_FILE   (writes its peak resident kilobytes into USAGE_FILE)
"""
import resource
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

source, out, usage = sys.argv[1:4]
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu", dtype=torch.bfloat16)
model.save_pretrained(out)
AutoTokenizer.from_pretrained(source).save_pretrained(out)
with open(usage, "w", encoding="utf-8") as f:
    f.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
