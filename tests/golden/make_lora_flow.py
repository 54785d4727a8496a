"""Makes the flow models' part of lora/: LoRAs of `sd3odd` and `flux-wide`, by peft and diffusers.

    python tests/golden/make_lora_flow.py

sd3-peft, flux-peft             the adapters, as the pipelines' save_lora_weights write them
sd3-reference, flux-reference   the inputs of the models' own references, and out.prediction, the
                                transformer with the adapter

Rank 4 and alpha 8, so that a reader that takes alpha = rank is wrong by a factor of 2. Run
make_flow_golden.py first. The order of the adapters' metadata strings varies from run to run
(safetensors'), nothing else.
Made with Python 3.11, torch 2.15, diffusers 0.42.1, peft 0.21.2, safetensors 0.8.
"""

import sys
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parents[1] / "scripts"))

import torch
from make_lora import OUT, metadata, random_adapter
from peft import get_peft_model_state_dict
from reference import save_tensors
from reference_flow import load_transformer, predict_flow
from safetensors.torch import load_file

MODELS = {"sd3": "sd3odd", "flux": "flux-wide"}
ATTENTION = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
]


def targets(transformer):
    """All attention, and what FLUX's single blocks have beside it; not the last proj_out."""
    single = [
        name
        for name, _ in transformer.named_modules()
        if name.startswith("single_transformer_blocks.")
    ]
    return ATTENTION + [name for name in single if name.endswith((".proj_mlp", ".proj_out"))]


def make(name, model, modules=None, rank=4):
    """Writes one adapter, of these modules or else of `targets`, and its reference.

    The reference has the inputs of the transformer alone.
    """
    folder = GOLDEN / model
    if not (folder / "transformer").is_dir():
        sys.exit(f"error: the golden model `{model}` is missing: make that first")
    torch.manual_seed(7)
    family, transformer = load_transformer(folder)
    whole = ("in.latents", "in.image", "in.input_ids", "in.attention_mask")
    tensors = {
        key: value
        for key, value in load_file(folder / "reference.safetensors").items()
        if key[:3] == "in." and key not in whole
    }
    with torch.no_grad():
        plain = predict_flow(transformer, tensors)
        config = random_adapter(transformer, modules or targets(transformer), rank)
        tensors["out.prediction"] = predict_flow(transformer, tensors)
    change = ((tensors["out.prediction"] - plain).norm() / plain.norm()).item()
    layers = get_peft_model_state_dict(transformer)
    print(f"{name}: {len(layers)} matrices change the prediction by {change:.0%}")
    if change < 0.05:
        raise AssertionError("the adapter hardly shows in the prediction")
    save_tensors(OUT / f"{name}-reference.safetensors", tensors)
    family.pipeline.save_lora_weights(
        OUT,
        transformer_lora_layers=layers,
        weight_name=f"{name}-peft.safetensors",
        transformer_lora_adapter_metadata=metadata(config),
    )
    (OUT / f"{name}-peft.safetensors").chmod(0o644)  # safetensors writes 0600


def main():
    torch.set_num_threads(1)
    for name, model in MODELS.items():
        make(name, model)


if __name__ == "__main__":
    main()
