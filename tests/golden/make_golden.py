"""Makes the golden models: tiny random StableDiffusion folders, each with its reference tensors.

    python tests/golden/make_golden.py --tokenizer models/emoji/tokenizer [--only NAME ...]

Each folder has what the others lack; SPECS says what. The weights are rounded to their stored type
first and the reference is made from the rounded ones, in f32. Each folder is then checked: every
tensor of every network has to matter to the reference, diffusers' StableDiffusionPipeline has to
load it and to draw the same latents. The schedules keep the DDIM chain well conditioned: f32 and
f64 agree to 3e-5 on out.latents.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, transformers 5.23.0, safetensors 0.8.
"""

import argparse
import shutil
import sys
import warnings
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parents[1] / "scripts"))

import torch
from diffusers import StableDiffusionPipeline
from reference import load_folder, load_scheduler, predict, write_reference
from sd_folder import (
    SD15_SCHEDULER,
    SD15_TEXT,
    SD15_UNET,
    SD15_VAE,
    old_text_names,
    old_vae_names,
    random_weights,
    write_json,
    write_model_index,
    write_shards,
    write_tokenizer,
    write_weights,
)

MAX_FILE, MAX_TOTAL = 1_500_000, 9_000_000
LEAST_SHARE = 5e-4
UNET_STEM, TEXT_STEM = "diffusion_pytorch_model", "model"


def unet(**fields):
    """A UNet config of two or more levels, without the fields that are left to their defaults."""
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.42.1",
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        **fields,
    }


def vae(channels, **fields):
    """A small VAE config that shrinks images by 2 ** (levels - 1)."""
    levels = len(channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.42.1",
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 64,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **fields,
    }


def text(**fields):
    """A small CLIP text encoder over the emoji tokenizer's vocabulary."""
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 2131,
        "bos_token_id": 2129,
        "eos_token_id": 2130,
        "pad_token_id": 2130,
    }
    return {**SD15_TEXT, **small, **fields}


def ddim(**fields):
    """A DDIM scheduler config."""
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.42.1",
        "num_train_timesteps": 1000,
        **fields,
    }


SPECS = {
    # SD 1.5: its configs with their missing fields, PNDM scheduler, old names in text encoder and
    # VAE, non-square.
    "sd15": dict(
        unet={
            **SD15_UNET,
            "block_out_channels": [16, 16, 16, 24],
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
            "sample_size": 8,
        },
        vae={
            **SD15_VAE,
            "block_out_channels": [4, 4, 8, 8],
            "norm_num_groups": 2,
            "sample_size": 64,
        },
        text=text(),
        scheduler=SD15_SCHEDULER,
        tokenizer=dict(length=77, tokenizer_json=False, special_tokens_map=True),
        old_names=True,
        reference=dict(height=16, width=8),
    ),
    # SD 2.1: linear projections, heads per level, v prediction, exact GELU, two bf16 shards, pad
    # token "!".
    "sd21": dict(
        unet={
            **SD15_UNET,
            "_diffusers_version": "0.10.0.dev0",
            "block_out_channels": [8, 16, 16, 24],
            "norm_num_groups": 4,
            "cross_attention_dim": 32,
            "sample_size": 16,
            "attention_head_dim": [2, 4, 4, 4],
            "layers_per_block": 1,
            "dual_cross_attention": False,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        vae=vae([4, 8, 8], norm_num_groups=2, scaling_factor=0.18215),
        text=text(hidden_act="gelu", pad_token_id=0),
        scheduler={
            **SD15_SCHEDULER,
            "_class_name": "DDIMScheduler",
            "_diffusers_version": "0.8.0",
            "prediction_type": "v_prediction",
        },
        tokenizer=dict(length=77, pad_token="!"),
        unet_dtype=torch.bfloat16,
        unet_shards=2,
    ),
    # Odd latent sizes, several transformer layers, sin before cos, only fp16 files, DDIM's default
    # clip_sample; 7 steps, whose timesteps are not 1000 // 7 apart.
    "odd": dict(
        unet=unet(
            sample_size=[9, 7],
            attention_head_dim=4,
            block_out_channels=[12, 16],
            norm_num_groups=4,
            down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
            flip_sin_to_cos=False,
            freq_shift=1,
            layers_per_block=1,
            mid_block_type="UNetMidBlock2DCrossAttn",
            transformer_layers_per_block=[2, 1],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        ),
        vae=vae([4, 8, 8], norm_num_groups=2, scaling_factor=0.5),
        text=text(max_position_embeddings=16),
        scheduler=ddim(
            beta_schedule="linear", beta_start=0.00085, beta_end=0.006, timestep_spacing="trailing"
        ),
        tokenizer=dict(length=16),
        variant=".fp16",
        reference=dict(steps=7, guidance=2.0),
    ),
    # A mid block without attention, scale and shift from the time, layers per level, no quant
    # convolutions.
    "nomid": dict(
        unet=unet(
            sample_size=8,
            act_fn="silu",
            attention_head_dim=4,
            block_out_channels=[8, 16],
            norm_num_groups=4,
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
            layers_per_block=[1, 2],
            mid_block_type="UNetMidBlock2D",
            norm_eps=1e-6,
            resnet_time_scale_shift="scale_shift",
            up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        ),
        vae=vae(
            [4, 8],
            norm_num_groups=2,
            scaling_factor=0.4,
            shift_factor=None,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text=text(max_position_embeddings=16),
        scheduler=ddim(
            beta_schedule="squaredcos_cap_v2",
            timestep_spacing="linspace",
            set_alpha_to_one=True,
            clip_sample=True,
            clip_sample_range=1.5,
            prediction_type="v_prediction",
        ),
        tokenizer=dict(length=16, tokenizer_json=False),
    ),
    # The emoji model's shape, no VAE attention, zero terminal SNR, stored as f32.
    "simple": dict(
        unet=unet(
            sample_size=8,
            attention_head_dim=4,
            block_out_channels=[16, 24, 32],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            layers_per_block=1,
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        ),
        vae=vae([8, 8, 16], mid_block_add_attention=False, scaling_factor=0.4547648069211184),
        text=text(max_position_embeddings=16),
        scheduler=ddim(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            set_alpha_to_one=False,
            timestep_spacing="trailing",
        ),
        tokenizer=dict(length=16),
        dtype=torch.float32,
        unet_dtype=torch.float32,
    ),
}


def write_folder(folder, spec, tokenizer, seed):
    """Writes a model folder by its spec."""
    dtype, variant = spec.get("dtype", torch.float16), spec.get("variant", "")
    configs = {"unet": spec["unet"], "vae": spec["vae"], "text_encoder": spec["text"]}
    for kind, config in configs.items():
        write_json(folder / kind / "config.json", config)
    write_json(folder / "scheduler" / "scheduler_config.json", spec["scheduler"])
    write_model_index(folder, spec["scheduler"]["_class_name"])
    write_tokenizer(tokenizer, folder / "tokenizer", **spec["tokenizer"])

    weights = random_weights("unet", spec["unet"], seed, spec.get("unet_dtype", torch.float16))
    if shards := spec.get("unet_shards"):
        write_shards(folder / "unet", UNET_STEM, weights, shards)
    else:
        write_weights(folder / "unet" / f"{UNET_STEM}{variant}.safetensors", weights)
    weights = random_weights("vae", spec["vae"], seed + 1, dtype)
    if spec.get("old_names"):
        weights = old_vae_names(weights)
    write_weights(folder / "vae" / f"{UNET_STEM}{variant}.safetensors", weights)
    weights = random_weights("text_encoder", spec["text"], seed + 2, dtype)
    if spec.get("old_names"):
        weights = old_text_names(weights, spec["text"]["max_position_embeddings"])
    write_weights(folder / "text_encoder" / f"{TEXT_STEM}{variant}.safetensors", weights)


def least_visible(network, output, blind=("k_proj.bias", "to_k.bias")):
    """(share, name) of the parameter that matters least.

    The share is that of itself by which the output would change, to first order, if every entry of
    the parameter changed by its own size. Left out is what ends with one of `blind`: the biases of
    attention keys, as the softmax cancels them.
    """
    network.requires_grad_(True)
    result = output()
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0))
    (result * weights).sum().backward()
    return min(
        (
            ((parameter.grad * parameter).norm() / result.norm()).item()
            if parameter.grad is not None
            else 0.0,
            name,
        )
        for name, parameter in network.named_parameters()
        if not name.endswith(blind)
    )


def check_visible(folder, tensors):
    """Fails if the reference would not notice an error in one of the tensors of the networks."""
    model = load_folder(folder)
    scaling = model.vae.config.scaling_factor
    outputs = {
        "unet": lambda: predict(
            model.unet,
            tensors["in.latents"],
            tensors["in.timestep"],
            tensors["in.encoder_hidden_states"],
        ),
        "text_encoder": lambda: (
            model.text_encoder(tensors["in.input_ids"].long()).last_hidden_state
        ),
        "vae": lambda: torch.cat(
            [
                model.vae.encode(tensors["in.image"]).latent_dist.mean.flatten(),
                model.vae.decode(tensors["out.latents"] / scaling).sample.flatten(),
            ]
        ),
    }
    for kind, output in outputs.items():
        share, name = least_visible(getattr(model, kind), output)
        print(f"  {kind:12} least visible: {name} {share:.1e}")
        if share < LEAST_SHARE:
            raise AssertionError(
                f"{folder.name}: {kind}'s {name} hardly changes the output ({share:.1e})"
            )


@torch.no_grad()
def check_pipeline(folder, tensors, record, variant):
    """Fails unless diffusers' own pipeline, under the same schedule, draws the same latents."""
    options = {"variant": variant.strip(".")} if variant else {}
    with warnings.catch_warnings(
        action="ignore", category=FutureWarning
    ):  # on sample_size, steps_offset, clip_sample
        pipe = StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, dtype=torch.float32, **options
        )
    pipe.scheduler = load_scheduler(
        folder / "scheduler"
    )  # the pipeline sets clip_sample and steps_offset its own way
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        record["prompts"],
        height=64,
        width=64,
        latents=tensors["in.latents"],
        num_inference_steps=record["steps"],
        guidance_scale=record["guidance"],
        eta=record["eta"],
        output_type="latent",
    ).images
    error = (
        (latents - tensors["out.latents"]).abs().max() / tensors["out.latents"].abs().max()
    ).item()
    print(f"  pipeline: {error:.1e} from the reference's latents")
    if not error < 1e-4:
        raise AssertionError(
            f"{folder.name}: StableDiffusionPipeline's latents differ by {error:.1e}"
        )


def check_sizes(names, max_file=MAX_FILE, max_total=MAX_TOTAL):
    """Fails if a file, or all these folders together, are too large for the repository."""
    sizes = {
        file: file.stat().st_size
        for name in names
        for file in (GOLDEN / name).rglob("*")
        if file.is_file()
    }
    large = [str(file.relative_to(GOLDEN)) for file, size in sizes.items() if size > max_file]
    total = sum(sizes.values())
    if large or total > max_total:
        raise AssertionError(
            f"{total} bytes in all (at most {max_total}); over {max_file}: {large}"
        )
    print(f"{len(names)} folders: {total} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="the emoji model's tokenizer folder"
    )
    parser.add_argument("--only", nargs="+", choices=SPECS, default=list(SPECS), metavar="NAME")
    args = parser.parse_args()
    if not (args.tokenizer / "vocab.json").is_file():
        parser.error(f"--tokenizer {args.tokenizer}: no vocab.json there")
    torch.set_num_threads(1)
    for name in args.only:
        print(name)
        folder, spec, seed = GOLDEN / name, SPECS[name], 100 * (1 + list(SPECS).index(name))
        shutil.rmtree(folder, ignore_errors=True)
        write_folder(folder, spec, args.tokenizer, seed)
        tensors, record = write_reference(
            folder, folder, seed=seed + 3, **spec.get("reference", {})
        )
        for key, tensor in tensors.items():
            print(f"  {key:26} {str(list(tensor.shape)):18} std {tensor.float().std():.3f}")
        check_visible(folder, tensors)
        check_pipeline(folder, tensors, record, spec.get("variant"))
    check_sizes(list(SPECS))


if __name__ == "__main__":
    main()
