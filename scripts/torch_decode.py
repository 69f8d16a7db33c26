"""Measures decoding by transformers.generate without prefill: `torch_decode.py f32|bf16 MODEL_DIR` prints tokens per second at batch 16.

The time of 47 steps of 16 rows is the time for 48 new tokens after prompts of 40, minus the time for one; each is the least of three."""
import sys
import time

import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(2)
torch.manual_seed(0)
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[sys.argv[1]]
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=dtype).eval()
prompts = torch.randint(0, 49152, (16, 40))


def seconds(new):
    start = time.time()
    with torch.no_grad():
        model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new,
                       do_sample=True, pad_token_id=0)
    return time.time() - start


seconds(1)
taken = min(seconds(48) for _ in range(3)) - min(seconds(1) for _ in range(3))
print(f"{16 * 47 / taken:.1f}")
