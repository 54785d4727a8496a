"""Writes a full-size SD 1.5 folder with random f16 weights, and a reference of its UNet.

    python tests/golden/random_sd15.py --out DIR --tokenizer DIR [--threads 2]

The configs are the SD 1.5 repository's, so are the names in the files; the tokenizer is copied from
--tokenizer. The reference (DIR/reference.safetensors, batch 1, f32) holds in.latents, in.timestep,
in.encoder_hidden_states (random) and out.prediction. Full size needs 2.1 GB of disk and about 8 GB
of memory; --tiny shrinks everything to test this script.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, transformers 5.23.0, safetensors 0.8.
"""

import argparse
import sys
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parents[1] / "scripts"))

import torch
from diffusers import UNet2DConditionModel
from reference import load_component, predict, save_tensors, spread_timesteps
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
    write_tokenizer,
    write_weights,
)

TOKENS = 77
FULL = {"unet": SD15_UNET, "vae": SD15_VAE, "text_encoder": SD15_TEXT}
TINY = {
    "unet": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 32, "sample_size": 16},
    "vae": {"block_out_channels": [32, 32, 32, 32]},
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    },
}
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def write_folder(out, tokenizer, configs, seed):
    """Writes the folder, one network in memory at a time."""
    for i, (kind, config) in enumerate(configs.items()):
        write_json(out / kind / "config.json", config)
        weights = random_weights(kind, config, seed + i, torch.float16)
        if kind == "vae":
            weights = old_vae_names(weights)
        elif kind == "text_encoder":
            weights = old_text_names(weights, config["max_position_embeddings"])
        print(f"{kind}: {sum(value.numel() for value in weights.values()) / 1e6:.1f} M values")
        write_weights(out / kind / WEIGHTS[kind], weights)
    write_json(out / "scheduler" / "scheduler_config.json", SD15_SCHEDULER)
    write_tokenizer(
        tokenizer, out / "tokenizer", TOKENS, tokenizer_json=False, special_tokens_map=True
    )
    write_model_index(out, SD15_SCHEDULER["_class_name"])


@torch.no_grad()
def write_unet_reference(out, seed):
    """The UNet's prediction for one random latent of its own size, from the weights on disk."""
    unet = load_component(UNet2DConditionModel, out / "unet")
    generator = torch.Generator().manual_seed(seed)
    size = unet.config.sample_size
    tensors = {
        "in.latents": torch.randn(1, unet.config.in_channels, size, size, generator=generator),
        "in.timestep": spread_timesteps(1),
        "in.encoder_hidden_states": torch.randn(
            1, TOKENS, unet.config.cross_attention_dim, generator=generator
        ),
    }
    tensors["out.prediction"] = predict(unet, *tensors.values())
    print(f"out.prediction: std {tensors['out.prediction'].std():.3f}")
    save_tensors(out / "reference.safetensors", tensors)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="a CLIP tokenizer's folder"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="small networks of the same structure")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if not (args.tokenizer / "vocab.json").is_file():
        parser.error(f"--tokenizer {args.tokenizer}: no vocab.json there")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out}: not empty")
    torch.set_num_threads(args.threads)
    configs = {
        kind: {**config, **(TINY[kind] if args.tiny else {})} for kind, config in FULL.items()
    }
    write_folder(args.out, args.tokenizer, configs, args.seed)
    write_unet_reference(args.out, args.seed + len(configs))


if __name__ == "__main__":
    main()
