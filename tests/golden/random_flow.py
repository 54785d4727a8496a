"""Writes a flow model's transformer at full size with random f16 weights, and a reference of it.

    python tests/golden/random_flow.py --kind sd35m --out DIR [--reference] [--threads 2]

DIR/transformer holds the config that the repository of Stable Diffusion 3 (sd3, 4.2 GB), Stable
Diffusion 3.5 medium (sd35m, 4.9 GB) or FLUX.1 [dev] (flux-dev, 24 GB) publishes, and weights under
its names, in files of at most 5 GB, with diffusers' index where they are several. No more than one
file's weights are in memory at a time.

The reference (DIR/reference.safetensors, f32) is what reference_flow.py makes of one image of 64x64
latents, that is, 512 pixels, with 333 text tokens, FLUX.1 512. It takes the whole network in f32:
sd35m peaks at 16 GB of memory, its mapped file included; flux-dev would take 48 and is refused.
--tiny shrinks everything to test this script.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, safetensors 0.8.
"""

import argparse
import math
import shutil
import sys
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parents[1] / "scripts"))

import torch
from diffusers.models.embeddings import PatchEmbed
from flow_folder import (
    FLOW_GAINS,
    FLUX_DEV_TRANSFORMER,
    SD3_TRANSFORMER,
    SD35_MEDIUM_TRANSFORMER,
    TRANSFORMERS,
)
from reference import write_reference
from sd_folder import randomise, write_json, write_weights

STEM = "diffusion_pytorch_model"
DTYPE = torch.float16
LIMIT, TINY_LIMIT = 5 * 10**9, 10**5  # bytes in a file
LATENTS = 64
FULL = {"sd3": SD3_TRANSFORMER, "sd35m": SD35_MEDIUM_TRANSFORMER, "flux-dev": FLUX_DEV_TRANSFORMER}
TOKENS = {"sd3": 333, "sd35m": 333, "flux-dev": 512}
TINY_SD3 = {
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "caption_projection_dim": 24,
    "num_layers": 3,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 40,
}
TINY = {
    "sd3": TINY_SD3,
    "sd35m": {**TINY_SD3, "dual_attention_layers": [0, 1]},
    "flux-dev": {
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
        "num_attention_heads": 2,
        "num_layers": 2,
        "num_single_layers": 3,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
    },
}


def meta_tensors(config):
    """The network's parameters and buffers by name, without values."""
    with torch.device("meta"):
        return TRANSFORMERS[config["_class_name"]].from_config(config).state_dict()


def size(tensor):
    """Bytes on disk."""
    return tensor.numel() * DTYPE.itemsize


def plan_files(tensors, limit):
    """Names of the tensors of each file, in order."""
    files, filled = [[]], 0
    for name, tensor in tensors.items():
        if files[-1] and filled + size(tensor) > limit:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size(tensor)
    return files


def position_table(config):
    """The one tensor that is not random: SD 3's sinusoids of the positions."""
    return PatchEmbed(
        height=config["sample_size"],
        width=config["sample_size"],
        patch_size=config["patch_size"],
        in_channels=1,
        embed_dim=config["attention_head_dim"] * config["num_attention_heads"],
        pos_embed_max_size=config["pos_embed_max_size"],
    ).pos_embed


def make_tensor(name, shape, config, generator):
    if name == "pos_embed.pos_embed":
        return position_table(config).to(DTYPE)
    values = torch.empty(shape)
    randomise(values, name, generator, FLOW_GAINS)
    return values.to(DTYPE)


def write_transformer(folder, config, seed, limit):
    """Writes config and weights, one file's weights in memory at a time."""
    tensors, generator = meta_tensors(config), torch.Generator().manual_seed(seed)
    files, total = plan_files(tensors, limit), sum(map(size, tensors.values()))
    if total > shutil.disk_usage(folder.parent).free:
        raise OSError(f"{folder}: {total / 1e9:.1f} GB do not fit on the disk")
    write_json(folder / "config.json", config)
    weight_map = {}
    for i, names in enumerate(files, 1):
        file = (
            f"{STEM}.safetensors"
            if len(files) == 1
            else f"{STEM}-{i:05}-of-{len(files):05}.safetensors"
        )
        weights = {
            name: make_tensor(name, tensors[name].shape, config, generator) for name in names
        }
        write_weights(folder / file, weights)
        weight_map.update(dict.fromkeys(names, file))
        print(f"{file}: {sum(map(size, weights.values())) / 1e6:.1f} MB")
        del weights  # before the next file's are made
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / f"{STEM}.safetensors.index.json", index)
    print(
        "transformer: "
        f"{sum(math.prod(tensor.shape) for tensor in tensors.values()) / 1e6:.1f} M values"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=FULL, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--reference", action="store_true", help="a prediction by diffusers, in f32"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tiny", action="store_true", help="a small network of the same structure, in small files"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.reference and args.kind == "flux-dev" and not args.tiny:
        parser.error("--reference: flux-dev would take 48 GB of memory")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out}: not empty")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    config = {**FULL[args.kind], **(TINY[args.kind] if args.tiny else {})}
    try:
        write_transformer(
            args.out / "transformer", config, args.seed, TINY_LIMIT if args.tiny else LIMIT
        )
    except OSError as problem:
        parser.error(str(problem))
    if args.reference:
        tensors, _ = write_reference(
            args.out,
            args.out,
            seed=args.seed + 1,
            batch=1,
            height=LATENTS,
            width=LATENTS,
            max_sequence_length=TOKENS[args.kind],
        )
        print(f"out.prediction: std {tensors['out.prediction'].std():.3f}")


if __name__ == "__main__":
    main()
