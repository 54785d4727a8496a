"""Makes the golden flow models: tiny random SD3 and FLUX.1 folders, each with its reference.

    python tests/golden/make_flow_golden.py --emoji models/emoji [--only NAME ...]

Each folder has what the others lack; SPECS says what. The weights are rounded to their stored type
first and the reference is made from the rounded ones, in f32. Each folder is then checked: every
tensor of every network has to matter to the reference, diffusers has to load it and to draw the
same latents, and the T5 tokenizer's JSON has to mean what transformers makes of it. CLIP's
tokenizer and T5's training text are the emoji model's. The networks are well conditioned: f32 and
f64 agree to 1e-6 on every output; sinusoids of the timesteps in f64 would change predictions by
2e-5.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, transformers 5.23.0, tokenizers 0.23.3,
safetensors 0.8.
"""

import argparse
import shutil
import sys
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parents[1] / "scripts"))

import torch
from diffusers.utils import logging as diffusers_logging
from flow_folder import (
    CLIP_TEXT,
    CLIP_TEXT_PROJECTION,
    FLUX_DEV_SCHEDULER,
    FLUX_DEV_TRANSFORMER,
    FLUX_SCHNELL_SCHEDULER,
    FLUX_SCHNELL_TRANSFORMER,
    FLUX_VAE,
    SD3_SCHEDULER,
    SD3_TRANSFORMER,
    SD3_VAE,
    SD35_LARGE_TRANSFORMER,
    SD35_MEDIUM_TRANSFORMER,
    T5_TEXT,
    write_flow_folder,
)
from make_golden import LEAST_SHARE, check_sizes, least_visible
from reference import write_reference
from reference_flow import components, load_pipeline, load_transformer, predict_flow, sample_euler
from t5_tokenizer import train_t5_tokenizer
from tokenizers import Tokenizer
from transformers import T5TokenizerFast
from transformers.utils import logging as transformers_logging

MAX_FILE, MAX_TOTAL = 1_000_000, 2_200_000
T5_TOKENS, T5_ROWS = 200, 208  # T5's embedding has more rows than its tokenizer has tokens
CLIP_MERGES = 300  # of the emoji tokenizer's 1617, for smaller embeddings
CLIP_TOKENS = 512 + CLIP_MERGES + 2


def sd3(published, heads, head_dim, **fields):
    """A small SD 3 transformer."""
    width = heads * head_dim
    small = {
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "caption_projection_dim": width,
        "num_layers": 2,
        "pos_embed_max_size": 12,
        "sample_size": 8,
    }
    return {**published, **small, **fields}


def flux(published, heads, axes, **fields):
    """A small FLUX transformer; its rotary axes add up to the head's width."""
    small = {
        "attention_head_dim": sum(axes),
        "axes_dims_rope": axes,
        "num_attention_heads": heads,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
    }
    return {**published, **small, **fields}


def vae(published, channels, **fields):
    """A small VAE that shrinks images by 2 ** (levels - 1)."""
    levels = len(channels)
    small = {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": 4,
        "sample_size": 8 * 2 ** (levels - 1),
    }
    return {**published, **small, **fields}


def clip(published, width, layers, **fields):
    """A small CLIP text encoder over a part of the emoji tokenizer's vocabulary."""
    small = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": width,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
        "vocab_size": CLIP_TOKENS,
        "max_position_embeddings": 16,
    }
    return {**published, **small, **fields}


def t5(width, **fields):
    """A small T5 encoder whose attention is narrower than its width."""
    small = {
        "d_model": width,
        "d_ff": width + 4,
        "d_kv": 8,
        "num_heads": 3,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "relative_attention_max_distance": 20,
        "relative_attention_num_buckets": 8,
        "vocab_size": T5_ROWS,
    }
    return {**T5_TEXT, **small, **fields}


def clip_tokenizers(length):
    """What write_tokenizer takes for the first and, where there is one, the second CLIP."""
    first = dict(length=length, merges=CLIP_MERGES)
    return {"text_encoder": first, "text_encoder_2": {**first, "pad_token": "!"}}


SPECS = {
    # A lone transformer in f32: heads of 12 values, text of another width than the network, more
    # latents than it says.
    "sd3odd": dict(
        transformer=sd3(
            SD3_TRANSFORMER,
            2,
            12,
            in_channels=4,
            out_channels=4,
            joint_attention_dim=20,
            pooled_projection_dim=14,
            pos_embed_max_size=7,
            sample_size=10,
        ),
        dtype=torch.float32,
        reference=dict(height=12, width=6, max_sequence_length=9),
    ),
    # A lone transformer in bf16: more single blocks than double ones, three heads, one wide sample.
    "flux-wide": dict(
        transformer=flux(
            FLUX_DEV_TRANSFORMER,
            3,
            [2, 2, 4],
            num_layers=1,
            num_single_layers=3,
            joint_attention_dim=20,
            pooled_projection_dim=12,
        ),
        dtype=torch.bfloat16,
        reference=dict(batch=1, height=4, width=20, max_sequence_length=6),
    ),
    # SD 3: its configs with their missing fields, three text encoders, of which CLIP-G knows its
    # own eos.
    "sd3": dict(
        transformer=sd3(
            SD3_TRANSFORMER,
            3,
            8,
            in_channels=8,
            out_channels=8,
            joint_attention_dim=40,
            pooled_projection_dim=36,
        ),
        dtype=torch.float16,
        vae=vae(SD3_VAE, [4, 4, 8], latent_channels=8),
        text={
            "text_encoder": clip(CLIP_TEXT_PROJECTION, 16, 2),
            "text_encoder_2": clip(
                CLIP_TEXT_PROJECTION, 20, 3, hidden_act="gelu", eos_token_id=CLIP_TOKENS - 1
            ),
            "text_encoder_3": t5(40),
        },
        tokenizers=clip_tokenizers(16),
        scheduler=SD3_SCHEDULER,
        reference=dict(max_sequence_length=16),
    ),
    # SD 3.5 medium: a second attention in two of three blocks, rms norms of q and k, no T5,
    # non-square in a large grid, 77 CLIP tokens, pooled embeddings of other widths than CLIP's.
    "sd35m": dict(
        transformer=sd3(
            SD35_MEDIUM_TRANSFORMER,
            3,
            8,
            num_layers=3,
            dual_attention_layers=[0, 1],
            in_channels=4,
            out_channels=4,
            joint_attention_dim=40,
            pooled_projection_dim=30,
            pos_embed_max_size=14,
        ),
        dtype=torch.float16,
        vae=vae(SD3_VAE, [4, 8]),
        text={
            "text_encoder": clip(
                CLIP_TEXT_PROJECTION, 16, 2, projection_dim=12, max_position_embeddings=77
            ),
            "text_encoder_2": clip(
                CLIP_TEXT_PROJECTION,
                16,
                3,
                projection_dim=18,
                max_position_embeddings=77,
                hidden_act="gelu",
            ),
        },
        tokenizers=clip_tokenizers(77),
        scheduler=SD3_SCHEDULER,
        reference=dict(height=6, width=10, max_sequence_length=5),
    ),
    # SD 3.5 large: rms norms without a second attention, two bf16 shards.
    "sd35l": dict(
        transformer=sd3(
            SD35_LARGE_TRANSFORMER,
            3,
            8,
            in_channels=4,
            out_channels=4,
            joint_attention_dim=24,
            pooled_projection_dim=16,
        ),
        dtype=torch.bfloat16,
        shards=2,
        reference=dict(max_sequence_length=7),
    ),
    # FLUX.1 [dev]: guidance embedding, shift by the number of latents, T5 in two shards.
    "flux-dev": dict(
        transformer=flux(
            FLUX_DEV_TRANSFORMER, 2, [2, 4, 6], joint_attention_dim=32, pooled_projection_dim=20
        ),
        dtype=torch.float16,
        vae=vae(FLUX_VAE, [4, 4, 8]),
        text={"text_encoder": clip(CLIP_TEXT, 20, 2), "text_encoder_2": t5(32)},
        text_shards={"text_encoder_2": 2},
        tokenizers=clip_tokenizers(16),
        scheduler=FLUX_DEV_SCHEDULER,
        reference=dict(height=8, width=8, max_sequence_length=18),
    ),
    # FLUX.1 [schnell]: no guidance, no shift, non-square, 77 CLIP tokens.
    "flux-schnell": dict(
        transformer=flux(
            FLUX_SCHNELL_TRANSFORMER,
            2,
            [4, 4, 4],
            num_layers=1,
            joint_attention_dim=28,
            pooled_projection_dim=16,
        ),
        dtype=torch.float16,
        vae=vae(FLUX_VAE, [4, 8]),
        text={
            "text_encoder": clip(CLIP_TEXT, 16, 2, max_position_embeddings=77),
            "text_encoder_2": t5(28),
        },
        tokenizers=clip_tokenizers(77),
        scheduler=FLUX_SCHNELL_SCHEDULER,
        reference=dict(height=8, width=12, max_sequence_length=12),
    ),
    # Uneven rotary axes, three f16 shards.
    "flux-rope": dict(
        transformer=flux(
            FLUX_SCHNELL_TRANSFORMER,
            2,
            [4, 6, 6],
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=24,
            pooled_projection_dim=18,
        ),
        dtype=torch.float16,
        shards=3,
        reference=dict(height=6, width=8, max_sequence_length=8),
    ),
}


def never_used(config):
    """Endings of the names of what cannot show: the last SD 3 block has no use for text queries."""
    last = f"transformer_blocks.{config['num_layers'] - 1}.attn."
    names = [last + "add_q_proj.weight", last + "add_q_proj.bias", last + "norm_added_q.weight"]
    return tuple(names) if config["_class_name"] == "SD3Transformer2DModel" else ()


def prompt_embeds(family, pipe, record):
    """All embeddings as one vector; the pooled ones, though few, weigh as much as the others."""
    embeds = family.embed(pipe, record["prompts"], record["max_sequence_length"])
    return torch.cat([value.flatten() / value.detach().norm() for value in embeds.values()])


def check_visible(folder, spec, tensors, record):
    """Fails if the reference would not notice an error in one of the tensors of the networks."""
    family, transformer = load_transformer(folder)
    networks = {"transformer": (transformer, lambda: predict_flow(transformer, tensors))}
    if record:
        pipe = load_pipeline(family, folder, transformer)
        networks["vae"] = (
            pipe.vae,
            lambda: torch.cat(
                [
                    pipe.vae.encode(tensors["in.image"]).latent_dist.mean.flatten(),
                    pipe.vae.decode(
                        tensors["out.latents"] / pipe.vae.config.scaling_factor
                    ).sample.flatten(),
                ]
            ),
        )
        for name in spec["text"]:
            networks[name] = getattr(pipe, name), lambda: prompt_embeds(family, pipe, record)
    for kind, (network, output) in networks.items():
        share, name = least_visible(
            network, output, ("k_proj.bias", "to_k.bias", *never_used(spec["transformer"]))
        )
        print(f"  {kind:14} least visible: {name} {share:.1e}")
        if share < LEAST_SHARE:
            raise AssertionError(
                f"{folder.name}: {kind}'s {name} hardly changes the output ({share:.1e})"
            )


@torch.no_grad()
def check_pipeline(folder, tensors, record):
    """Fails unless diffusers loads the folder by itself and draws the reference's latents."""
    family, _ = load_transformer(folder)
    missing = [name for name in family.text_encoders if name not in components(folder)]
    missing += [name.replace("text_encoder", "tokenizer") for name in missing]
    # diffusers wants to be told of these, although they are null in model_index.json
    pipe = family.pipeline.from_pretrained(folder, dtype=torch.float32, **dict.fromkeys(missing))
    pipe.set_progress_bar_config(disable=True)
    latents = sample_euler(
        family,
        pipe,
        tensors["in.latents"],
        record["prompts"],
        record["steps"],
        record["guidance"],
        record["max_sequence_length"],
    )
    error = (
        (latents - tensors["out.latents"]).abs().max() / tensors["out.latents"].abs().max()
    ).item()
    print(f"  pipeline: {error:.1e} from the reference's latents")
    if not error < 1e-5:
        raise AssertionError(
            f"{folder.name}: {family.pipeline.__name__}'s latents differ by {error:.1e}"
        )


def check_t5_tokenizer(folder, prompts):
    """Fails unless transformers, which reads only the vocabulary, agrees with tokenizer.json."""
    for file in folder.glob("tokenizer_*/tokenizer.json"):
        mine = [encoding.ids for encoding in Tokenizer.from_file(str(file)).encode_batch(prompts)]
        theirs = T5TokenizerFast.from_pretrained(file.parent)(prompts).input_ids
        print(f"  T5 tokens: {[len(ids) for ids in mine]}")
        if mine != theirs:
            raise AssertionError(
                f"{folder.name}: {theirs} of transformers, {mine} of tokenizer.json"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emoji", type=Path, required=True, help="the emoji model's folder")
    parser.add_argument("--only", nargs="+", choices=SPECS, default=list(SPECS), metavar="NAME")
    args = parser.parse_args()
    tokenizer, prompts = args.emoji / "tokenizer", args.emoji / "prompts.txt"
    if not (tokenizer / "vocab.json").is_file() or not prompts.is_file():
        parser.error(f"--emoji {args.emoji}: no tokenizer/vocab.json or prompts.txt there")
    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()  # that prompts are truncated is meant
    transformers_logging.set_verbosity_error()
    t5_tokenizer = train_t5_tokenizer(prompts.read_text().splitlines(), T5_TOKENS)
    for name in args.only:
        print(name)
        folder, spec, seed = GOLDEN / name, SPECS[name], 1000 + 100 * list(SPECS).index(name)
        shutil.rmtree(folder, ignore_errors=True)
        write_flow_folder(folder, spec, tokenizer, t5_tokenizer, seed)
        tensors, record = write_reference(folder, folder, seed=seed + 9, **spec["reference"])
        for key, tensor in tensors.items():
            print(
                f"  {key:33} {str(list(tensor.shape)):18} "
                f"std {tensor.float().std(correction=0):.3f}"
            )
        check_visible(folder, spec, tensors, record)
        if record:
            check_pipeline(folder, tensors, record)
            check_t5_tokenizer(folder, record["prompts"])
    check_sizes([name for name in SPECS if (GOLDEN / name).is_dir()], MAX_FILE, MAX_TOTAL)


if __name__ == "__main__":
    main()
