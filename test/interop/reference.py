"""Write a GGUF model as transformers reads it, in bf16: the folder that the interop test quantizes and compares with.

Usage: python test/interop/reference.py MODEL.gguf OUT_DIR
"""
import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

path, out = sys.argv[1:3]
folder, name = os.path.split(os.path.abspath(path))
config = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=config)
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
model.save_pretrained(out)
tokenizer.save_pretrained(out)
