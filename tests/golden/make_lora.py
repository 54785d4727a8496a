"""Makes lora/: a LoRA of the golden model `simple`, made and saved by peft and diffusers.

make_lora_flow.py and make_lora_qwen.py add those of the flow models.

    python tests/golden/make_lora.py

peft.safetensors        the adapter, as StableDiffusionPipeline.save_lora_weights writes it
reference.safetensors   in.latents, in.timestep, in.encoder_hidden_states and out.prediction, the
                        UNet with the adapter

Rank 4 and alpha 8, so that a reader that takes alpha = rank is wrong by a factor of 2. Run
make_golden.py first. The order of peft.safetensors' metadata strings varies from run to run
(safetensors'), nothing else.
Made with Python 3.11, torch 2.15, diffusers 0.42.1, peft 0.21.2, safetensors 0.8.
"""

import sys
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parents[1] / "scripts"))

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from reference import load_component, predict, save_tensors
from safetensors.torch import load_file

MODEL, OUT = GOLDEN / "simple", GOLDEN / "lora"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def random_adapter(network, targets=TARGETS, rank=4):
    """Adds an adapter whose B is random too; returns its config."""
    network.add_adapter(
        LoraConfig(
            r=rank, lora_alpha=2 * rank, init_lora_weights="gaussian", target_modules=targets
        )
    )
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return network.peft_config["default"]


def metadata(config):
    """The adapter's config as metadata; target_modules is a set, whose order would vary."""
    values = config.to_dict()
    return {
        key: sorted(value) if isinstance(value, set) else value for key, value in values.items()
    }


def main():
    if not (MODEL / "unet").is_dir():
        sys.exit("error: the golden model `simple` is missing: run make_golden.py first")
    torch.set_num_threads(1)
    torch.manual_seed(7)
    unet = load_component(UNet2DConditionModel, MODEL / "unet")
    inputs = load_file(MODEL / "reference.safetensors")
    names = ["in.latents", "in.timestep", "in.encoder_hidden_states"]
    tensors = {name: inputs[name] for name in names}
    with torch.no_grad():
        plain = predict(unet, *tensors.values())
        config = random_adapter(unet)
        tensors["out.prediction"] = predict(unet, *tensors.values())
    change = ((tensors["out.prediction"] - plain).norm() / plain.norm()).item()
    print(f"the adapter changes the prediction by {change:.0%}")
    if change < 0.05:
        raise AssertionError("the adapter hardly shows in the prediction")
    save_tensors(OUT / "reference.safetensors", tensors)
    StableDiffusionPipeline.save_lora_weights(
        OUT,
        unet_lora_layers=get_peft_model_state_dict(unet),
        weight_name="peft.safetensors",
        unet_lora_adapter_metadata=metadata(config),
    )
    (OUT / "peft.safetensors").chmod(0o644)  # safetensors writes 0600


if __name__ == "__main__":
    main()
