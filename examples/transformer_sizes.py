"""The shapes of GPT-2 small (124 M parameters) grown to those of GPT-2 medium (355 M): the plan, and what comes of it.

At an eighth of all widths and a quarter of the depth, unless --full is given; weights are random, so nothing is downloaded.
"""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fastmorph as fm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--full", action="store_true", help="at full size: some 4 GB of memory, and a minute or two")
full = parser.parse_args().full
width, depth, vocabulary = (1, 1, 50257) if full else (8, 4, 500)

SMALL = {"hidden_size": 768 // width, "num_attention_heads": 12, "num_hidden_layers": 12 // depth}
MEDIUM = {"hidden_size": 1024 // width, "num_attention_heads": 16, "num_hidden_layers": 24 // depth}

torch.manual_seed(0)
ids = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
small = GPT2LMHeadModel(GPT2Config(**SMALL, **ids)).eval()

# Inner channels of MLPs are four times the width in both.
plan = fm.transformers.recipe(small, {**MEDIUM, "intermediate_size": 4 * MEDIUM["hidden_size"]})
print(plan)

grown = fm.transformers.grow(small, **MEDIUM, intermediate_size=4 * MEDIUM["hidden_size"], generator=0)
print(grown.certificate)
before, after = (sum(tensor.numel() for tensor in model.parameters()) / 1e6 for model in (small, grown.model))
print(f"{before:.3g} M parameters have become {after:.3g} M.")

# A stock GPT2LMHeadModel with the config of the larger one, which writes what the smaller one writes.
assert (grown.model.config.n_embd, grown.model.config.n_head, grown.model.config.n_layer) == tuple(MEDIUM.values())
prompt = torch.randint(1, vocabulary, (1, 5))
one, two = (model.generate(prompt, max_new_tokens=8, do_sample=False) for model in (small, grown.model))
assert torch.equal(one, two)
