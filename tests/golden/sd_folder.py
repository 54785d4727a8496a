"""Writes StableDiffusion folders with random weights, in diffusers' layout.

For make_golden.py and random_sd15.py. Folders of flow models are flow_folder.py's.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, transformers 5.23.0, safetensors 0.8.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

# The configs that the SD 1.5 repository publishes: the UNet's has no use_linear_projection or
# upcast_attention, the VAE's no scaling_factor. Readers have to know diffusers' defaults for what
# is absent.
SD15_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": [
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    ],
}
SD15_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD15_TEXT = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 49406,
    "dropout": 0.0,
    "eos_token_id": 49407,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}

BUILDERS = {
    "unet": UNet2DConditionModel.from_config,
    "vae": AutoencoderKL.from_config,
    "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
}
GAINS = {"conv_shortcut": 1.2, "samplers": 1.2, "to_q": 1.5, "to_k": 1.5, "decoder.conv_in": 0.05}
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@torch.no_grad()
def randomise(parameter, name, generator, gains=GAINS):
    """Random values under which every layer shows in the output.

    Norms are near 1, biases near 0, weights go by fan-in. The convolutions on the residual stream
    itself grow it a little, so that the deepest blocks are not drowned by the skip connections;
    queries and keys make attention choose; the VAE's decoder takes latents of size 10 to 50.
    `gains` holds what departs from 1, by parts of names.
    """
    parameter.normal_(generator=generator)
    if name.endswith("bias"):
        parameter.mul_(0.3)
    elif parameter.ndim == 1:
        parameter.mul_(0.2).add_(1.0)
    else:
        gain = next((gain for part, gain in gains.items() if part in name), 1.0)
        parameter.mul_(gain / parameter[0].numel() ** 0.5)


def random_weights(kind, config, seed, dtype, builders=BUILDERS, gains=GAINS):
    """The state dict of a random "unet", "vae" or "text_encoder", rounded to `dtype`."""
    model = builders[kind](config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        randomise(parameter, name, generator, gains)
    return {key: value.to(dtype).contiguous() for key, value in model.state_dict().items()}


def old_vae_names(weights):
    """The VAE's attention under its names of when SD 1.5 was published: query, key, ..."""
    renamed = {}
    for key, value in weights.items():
        for new, old in OLD_ATTENTION.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        renamed[key] = value
    return renamed


def old_text_names(weights, positions):
    """A text encoder as transformers 4 saved it: under `text_model.`, with the position ids."""
    renamed = {f"text_model.{key}": value for key, value in weights.items()}
    renamed["text_model.embeddings.position_ids"] = torch.arange(positions).unsqueeze(0)
    return renamed


def write_json(path, value):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_weights(path, weights):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600


def write_shards(folder, stem, weights, shards):
    """Splits the weights, in the order of names, into files of about equal size, with an index."""
    total = sum(value.nbytes for value in weights.values())
    parts, seen = [{} for _ in range(shards)], 0
    for key in sorted(weights):
        parts[min(seen * shards // total, shards - 1)][key] = weights[key]
        seen += weights[key].nbytes
    weight_map = {}
    for i, part in enumerate(parts, 1):
        name = f"{stem}-{i:05}-of-{shards:05}.safetensors"
        write_weights(Path(folder) / name, part)
        weight_map.update(dict.fromkeys(part, name))
    write_json(
        Path(folder) / f"{stem}.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def shorten_tokenizer(folder, merges):
    """Leaves a CLIP tokenizer only its first merges, the bytes and the two special tokens."""
    vocab = json.loads((folder / "vocab.json").read_text())
    tokens = sorted(vocab, key=vocab.get)
    tokens = tokens[: 512 + merges] + tokens[-2:]
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    )
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[: 1 + merges]) + "\n")


def write_tokenizer(
    source,
    folder,
    length,
    pad_token="<|endoftext|>",
    tokenizer_json=True,
    special_tokens_map=False,
    merges=None,
):
    """Copies a CLIP tokenizer under another length and pad token; `merges`: with only the first."""
    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ["vocab.json", "merges.txt"] + ["tokenizer.json"] * tokenizer_json:
        shutil.copyfile(source / name, folder / name)
    if merges:
        shorten_tokenizer(folder, merges)

    def special(content):
        return {
            "content": content,
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": False,
        }

    bos, eos = special("<|startoftext|>"), special("<|endoftext|>")
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": {"__type": "AddedToken", **bos},
            "do_lower_case": True,
            "eos_token": {"__type": "AddedToken", **eos},
            "errors": "replace",
            "model_max_length": length,
            "pad_token": pad_token,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": {"__type": "AddedToken", **eos},
        },
    )
    if special_tokens_map:
        tokens = {"bos_token": bos, "eos_token": eos, "pad_token": pad_token, "unk_token": eos}
        write_json(folder / "special_tokens_map.json", tokens)


def write_model_index(folder, scheduler):
    """model_index.json of a StableDiffusionPipeline without a safety checker."""
    write_json(
        Path(folder) / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.42.1",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", scheduler],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
