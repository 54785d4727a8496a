"""Makes the part of lora/ that has Qwen3 models: LoRAs of `z-image` and `flux2-klein`.

    python tests/golden/make_lora_qwen.py

z-image-peft, flux2-peft             the adapters, as the pipelines' save_lora_weights write them
z-image-reference, flux2-reference   the inputs of the models' own references, and out.prediction,
                                     the transformer with the adapter

Rank 2 and alpha 4, so that a reader that takes alpha = rank is wrong by a factor of 2. FLUX.2's
adapter has all attention, what its single blocks have fused with it, and of one single block the
way out. Run make_qwen_golden.py first. The order of the adapters' metadata strings varies from run
to run (safetensors'), nothing else.
Made with Python 3.11, torch 2.15, diffusers 0.42.1, peft 0.21.2, safetensors 0.8.
"""

import sys
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parents[1] / "scripts"))

import torch
from make_lora import TARGETS
from make_lora_flow import ATTENTION, make

ADAPTERS = {
    "z-image": ("z-image", TARGETS),
    "flux2": (
        "flux2-klein",
        [*ATTENTION, "to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out"],
    ),
}


def main():
    torch.set_num_threads(1)
    for name, (model, targets) in ADAPTERS.items():
        make(name, model, targets, rank=2)


if __name__ == "__main__":
    main()
