"""Makes sdxl/ and sdxl-v/: tiny random SDXL folders, each with its reference tensors.

    python tests/golden/make_sdxl_golden.py --tokenizer models/emoji/tokenizer

sdxl    the fields of the published configs, with its Euler scheduler; not square; the second
        encoder pools at the largest token; no negative prompt is zeros
sdxl-v  v prediction at zero terminal SNR, an end token that is looked for, "" where no negative
        prompt is given, one transformer layer for all levels
lora/sdxl-peft.safetensors, lora/sdxl-kohya.safetensors and lora/sdxl-reference.safetensors
        an adapter of sdxl, as diffusers saves it and under sd-scripts' names; the inputs of a
        prediction and the prediction with it
lora/sdxl-conv-*.safetensors
        the same of an adapter of its convolutions
sdxl/tiled.safetensors
        latents, and what the VAE decodes of them in tiles of 8 latent pixels

Every tensor of the UNet has to matter to the reference.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, transformers 5.23.0, peft 0.21.2, safetensors
0.8.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parents[1] / "scripts"))

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from make_golden import LEAST_SHARE, ddim, least_visible, text, vae
from make_lora import TARGETS, metadata, random_adapter
from make_single_file import load_part, unet_file
from peft import get_peft_model_state_dict
from reference import load_component, save_tensors, write_reference
from reference_sdxl import predict_sdxl
from safetensors.torch import load_file, save_file
from sd_folder import BUILDERS, random_weights, write_json, write_tokenizer, write_weights
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

BUILDERS["text_encoder_2"] = lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config))
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
WIDTH, WIDTH_2, POOLED, TIME = 24, 40, 20, 8
MERGES = 400
WORDS = {
    "vocab_size": 514 + MERGES,
    "bos_token_id": 512 + MERGES,
    "eos_token_id": 513 + MERGES,
    "max_position_embeddings": 16,
}

UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": TIME,
    "attention_head_dim": [1, 2, 3],
    "block_out_channels": [8, 16, 24],
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": WIDTH + WIDTH_2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 4,
    "num_attention_heads": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": POOLED + 6 * TIME,
    "resnet_time_scale_shift": "default",
    "sample_size": 8,
    "time_embedding_type": "positional",
    "transformer_layers_per_block": [1, 2, 3],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
EULER = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
SECOND = {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": WIDTH_2,
    "projection_dim": POOLED,
    "num_hidden_layers": 3,
    "hidden_act": "gelu",
}
SPECS = {
    "sdxl": {
        "unet": UNET,
        "vae": vae([8, 8, 16], scaling_factor=0.13025, force_upcast=True),
        "text_encoder": text(hidden_size=WIDTH, **WORDS),
        "text_encoder_2": text(
            **{**WORDS, **SECOND, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
        ),
        "scheduler": EULER,
        "reference": {"height": 12, "width": 8},
    },
    "sdxl-v": {
        "unet": {
            **UNET,
            "layers_per_block": 1,
            "transformer_layers_per_block": 1,
            "block_out_channels": [8, 16],
            "attention_head_dim": [1, 2],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        },
        "vae": vae([8, 16], scaling_factor=0.13025),
        "text_encoder": text(hidden_size=WIDTH, **WORDS),
        "text_encoder_2": text(**WORDS, **SECOND),
        "scheduler": ddim(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
        "zeros": False,
    },
}


def write_folder(folder, spec, tokenizer, seed):
    """Writes a model folder by its spec; all weights are f16."""
    for i, kind in enumerate(["unet", "vae", "text_encoder", "text_encoder_2"]):
        write_json(folder / kind / "config.json", spec[kind])
        weights = random_weights(kind, spec[kind], seed + i, torch.float16)
        write_weights(folder / kind / f"{STEMS.get(kind, 'model')}.safetensors", weights)
    for name, pad in [("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")]:
        write_tokenizer(
            tokenizer, folder / name, 16, pad_token=pad, tokenizer_json=False, merges=MERGES
        )
    write_json(folder / "scheduler" / "scheduler_config.json", spec["scheduler"])
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionXLPipeline",
            "_diffusers_version": "0.19.0.dev0",
            "force_zeros_for_empty_prompt": spec.get("zeros", True),
            "scheduler": ["diffusers", spec["scheduler"]["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


INPUTS = ["latents", "timestep", "encoder_hidden_states", "pooled_projections", "time_ids"]


def check_visible(folder, tensors):
    """Fails if the reference would not notice an error in one of the UNet's tensors."""
    unet = load_component(UNet2DConditionModel, folder / "unet")
    inputs = [tensors[f"in.{name}"] for name in INPUTS]
    share, name = least_visible(unet, lambda: predict_sdxl(unet, *inputs))
    print(f"  least visible: {name} {share:.1e}")
    if share < LEAST_SHARE:
        raise AssertionError(f"{folder.name}: {name} hardly changes the output ({share:.1e})")


def write_tiles(folder, latents):
    """tiled.safetensors: latents, and the image that the VAE decodes of them in tiles of 8."""
    vae = load_component(AutoencoderKL, folder / "vae")
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 32
    with torch.no_grad():
        image = vae.decode(latents / vae.config.scaling_factor).sample
    save_tensors(folder / "tiled.safetensors", {"latents": latents, "image": image})


def sd_scripts_names(folder):
    """sd-scripts' name of each of a UNet's modules: the authors', without dots."""
    made = unet_file(load_part(folder / "unet"), UNET)
    return {
        how["of"][0].removesuffix(".weight"): "lora_unet_"
        + theirs.removesuffix(".weight").replace(".", "_")
        for theirs, how in made.items()
    }


CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]


def write_adapter(folder, out, name, targets):
    """An adapter by diffusers' and by sd-scripts' names, and what is predicted with it."""
    torch.manual_seed(7)
    unet = load_component(UNet2DConditionModel, folder / "unet")
    reference = load_file(folder / "reference.safetensors")
    tensors = {f"in.{name}": reference[f"in.{name}"] for name in INPUTS}
    config = random_adapter(unet, targets)
    with torch.no_grad():
        tensors["out.prediction"] = predict_sdxl(unet, *tensors.values())
    save_tensors(out / f"{name}-reference.safetensors", tensors)
    layers = get_peft_model_state_dict(unet)
    StableDiffusionXLPipeline.save_lora_weights(
        out,
        unet_lora_layers=layers,
        weight_name=f"{name}-peft.safetensors",
        unet_lora_adapter_metadata=metadata(config),
    )
    kohya, names = {}, sd_scripts_names(folder)
    for key, value in layers.items():
        module, side = re.fullmatch(r"(.*)\.lora_([AB])\.weight", key).groups()
        own = names[module]
        kohya[f"{own}.lora_{'down' if side == 'A' else 'up'}.weight"] = value.contiguous()
        kohya[f"{own}.alpha"] = torch.tensor(float(config.lora_alpha))
    save_file(kohya, out / f"{name}-kohya.safetensors")
    for kind in ["peft", "kohya"]:
        (out / f"{name}-{kind}.safetensors").chmod(0o644)
    # diffusers itself has to read the names.
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(kohya, unet_config=unet.config)
    if len(state) != len(layers) or len(alphas) * 2 != len(layers):
        raise AssertionError(f"diffusers reads {len(state)} of {len(layers)} tensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="the emoji model's tokenizer folder"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    for i, (name, spec) in enumerate(SPECS.items()):
        print(name)
        folder, seed = GOLDEN / name, 9000 + 100 * i
        shutil.rmtree(folder, ignore_errors=True)
        write_folder(folder, spec, args.tokenizer, seed)
        tensors, _ = write_reference(folder, folder, seed=seed + 9, **spec.get("reference", {}))
        for key, tensor in tensors.items():
            print(f"  {key:33} {str(list(tensor.shape)):18} std {tensor.float().std():.3f}")
        check_visible(folder, tensors)
    write_adapter(GOLDEN / "sdxl", GOLDEN / "lora", "sdxl", TARGETS)
    write_adapter(GOLDEN / "sdxl", GOLDEN / "lora", "sdxl-conv", CONVOLUTIONS)
    latents = torch.randn(1, 4, 20, 13, generator=torch.Generator().manual_seed(5))
    write_tiles(GOLDEN / "sdxl", latents)


if __name__ == "__main__":
    main()
