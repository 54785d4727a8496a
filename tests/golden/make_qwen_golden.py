"""Makes the golden models with Qwen3 as text encoder: tiny random Z-Image and FLUX.2 folders.

    python tests/golden/make_qwen_golden.py --emoji models/emoji [--only NAME ...]

Each folder has what the others lack; SPECS says what. As in make_flow_golden.py the weights are
rounded to their stored type first, the reference is made from the rounded ones in f32, and each
folder is then checked: every tensor of every network has to matter to the reference, diffusers has
to load the folder and to draw the same latents, and transformers and tokenizers have to make the
same ids. The tokenizers are trained on the emoji model's prompts.

The first layer of Z-Image's time embedding is 1024 x 256 in any size of the network; it is stored
in 8 bits, as it would be half of these folders otherwise.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, transformers 5.24.0, tokenizers 0.23.3,
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
from flow_folder import FLOW_GAINS, FLUX_DEV_SCHEDULER, FLUX_VAE
from make_flow_golden import vae
from make_golden import LEAST_SHARE, check_sizes, least_visible
from qwen_tokenizer import train_qwen_tokenizer, write_qwen_tokenizer
from reference import write_reference
from reference_flow import load_transformer, predict_flow
from reference_qwen import (
    QWEN_FAMILIES,
    Flux2,
    ZImage,
    embed_tokens,
    load_qwen_pipeline,
    load_text_encoder,
    sample_qwen,
    tokenize_chat,
)
from sd_folder import random_weights, write_json, write_weights
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

MAX_FILE, MAX_TOTAL = 500_000, 1_500_000
VOCABULARY, ROWS = 380, 384  # the embedding has more rows than the tokenizer has tokens

# The fields that the repositories publish.
Z_IMAGE_TRANSFORMER = {
    "_class_name": "ZImageTransformer2DModel",
    "_diffusers_version": "0.36.0.dev0",
    "all_f_patch_size": [1],
    "all_patch_size": [2],
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_kv_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "norm_eps": 1e-05,
    "qk_norm": True,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
}
FLUX2_TRANSFORMER = {
    "_class_name": "Flux2Transformer2DModel",
    "_diffusers_version": "0.37.0.dev0",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-06,
    "guidance_embeds": False,
    "in_channels": 128,
    "joint_attention_dim": 7680,
    "mlp_ratio": 3.0,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
    "out_channels": None,
    "patch_size": 1,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}
Z_IMAGE_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.36.0.dev0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": False,
}
FLUX2_SCHEDULER = {
    **FLUX_DEV_SCHEDULER,
    "_diffusers_version": "0.37.0.dev0",
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
FLUX2_VAE = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "_class_name": "AutoencoderKLFlux2",
    "_diffusers_version": "0.37.0.dev0",
    "batch_norm_eps": 0.0001,
    "batch_norm_momentum": 0.1,
    "latent_channels": 32,
    "patch_size": [2, 2],
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# As transformers 4 and 5 write it.
QWEN3_OLD = {
    **QWEN3,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
}
QWEN3_NEW = {
    **QWEN3,
    "dtype": "bfloat16",
    "layer_types": ["full_attention"] * 36,
    "pad_token_id": None,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "transformers_version": "5.0.0",
}


def z_image(heads, axes, text, **fields):
    """A small Z-Image transformer; its rotary axes add up to the head's width."""
    small = {
        "axes_dims": axes,
        "axes_lens": [160, 16, 16],
        "cap_feat_dim": text,
        "dim": heads * sum(axes),
        "in_channels": 4,
        "n_heads": heads,
        "n_kv_heads": heads,
        "n_layers": 2,
    }
    return {**Z_IMAGE_TRANSFORMER, **small, **fields}


def flux2(heads, axes, text, **fields):
    """A small FLUX.2 transformer."""
    small = {
        "attention_head_dim": sum(axes),
        "axes_dims_rope": axes,
        "in_channels": 16,
        "joint_attention_dim": text,
        "num_attention_heads": heads,
        "num_layers": 2,
        "num_single_layers": 2,
    }
    return {**FLUX2_TRANSFORMER, **small, **fields}


def qwen3(published, width, heads, head_dim, layers, inner, **fields):
    """A small Qwen3, whose heads together are not as wide as the network."""
    small = {
        "bos_token_id": VOCABULARY - 5,
        "eos_token_id": VOCABULARY - 3,
        "head_dim": head_dim,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "vocab_size": ROWS,
    }
    if "layer_types" in published:
        small["layer_types"] = ["full_attention"] * layers
    return {**published, **small, **fields}


SPECS = {
    # Z-Image: bf16 but for one layer, uneven axes, padding in the picture and in the prompts, of
    # which one is padded to 32 tokens and one to 64; one head of keys in the text encoder, its
    # names with `model.`, its rotary base as transformers 4 wrote it; the chat template in the
    # tokenizer's config.
    "z-image": dict(
        transformer=z_image(2, [2, 6, 4], 24),
        dtype=torch.bfloat16,
        vae=vae(FLUX_VAE, [4, 8]),
        text=qwen3(QWEN3_OLD, 24, 3, 10, 3, 40),
        prefix="model.",
        text_class="Qwen3Model",
        scheduler=Z_IMAGE_SCHEDULER,
        reference=dict(height=8, width=10, max_sequence_length=48),
    ),
    # FLUX.2 [klein]: two branches, a prompt that is cut off, running statistics in the VAE; 28
    # layers of the text encoder and two heads of keys for four of queries, its names without
    # `model.`, its rotary base as transformers 5 writes it; the chat template in a file of its own.
    "flux2-klein": dict(
        transformer=flux2(2, [2, 4, 4, 2], 24),
        dtype=torch.bfloat16,
        vae=vae(FLUX2_VAE, [4, 8]),
        text=qwen3(QWEN3_NEW, 8, 4, 4, 28, 12, num_key_value_heads=2),
        prefix="",
        text_class="Qwen3ForCausalLM",
        scheduler=FLUX2_SCHEDULER,
        reference=dict(
            height=8,
            width=12,
            max_sequence_length=40,
            prompts=["Cafe\u0301, it's 1 apple", "a photo of a cat, 2 dogs & a bicycle!"],
        ),
    ),
    # A lone transformer in f16: guidance as an input, more single blocks than double ones, uneven
    # axes.
    "flux2-guided": dict(
        transformer=flux2(
            2, [2, 4, 2, 2], 18, guidance_embeds=True, num_layers=1, num_single_layers=3
        ),
        dtype=torch.float16,
        reference=dict(batch=2, height=4, width=10, max_sequence_length=7),
    ),
}

# Pad tokens are as large as what they stand beside; the deep text encoder's layers are all heard.
GAINS = {"pad_token": 4.0, "to_qkv_mlp_proj": 1.2, "embed_tokens": 3.0, **FLOW_GAINS}
IN_8_BITS = "t_embedder.mlp.0.weight"


PLACES = {"transformer": "transformer", "vae": "vae", "text": "text_encoder"}
BUILDERS = {
    "transformer": lambda config: QWEN_FAMILIES[config["_class_name"]].transformer.from_config(
        config
    ),
    "vae": lambda config: VAES[config["_class_name"]].from_config(config),
    "text": lambda config: Qwen3ForCausalLM(Qwen3Config(**config)),
}
VAES = {family.vae.__name__: family.vae for family in QWEN_FAMILIES.values()}


def random_component(kind, spec, seed, dtype):
    """The state dict of a random component, under the names that the repositories use."""
    weights = random_weights(kind, spec[kind], seed, dtype, BUILDERS, GAINS)
    generator = torch.Generator().manual_seed(seed + 50)
    if kind == "text":
        weights.pop("lm_head.weight")  # tied
        return {
            spec["prefix"] + key.removeprefix("model."): value for key, value in weights.items()
        }
    if IN_8_BITS in weights:
        weights[IN_8_BITS] = weights[IN_8_BITS].to(torch.float8_e4m3fn)
    if "bn.running_mean" in weights:
        channels = len(weights["bn.running_mean"])
        weights["bn.running_mean"] = torch.randn(channels, generator=generator).to(dtype)
        variance = 0.5 + 3 * torch.rand(channels, generator=generator)
        weights["bn.running_var"] = variance.to(dtype)
        weights["bn.num_batches_tracked"] = torch.tensor(1000)
    return weights


def write_folder(folder, spec, tokenizer, seed):
    """Writes a folder by its spec, which holds the components' configs: a whole one if with a VAE.

    `dtype` is the transformer's, the rest is f16.
    """
    for i, (kind, place) in enumerate(PLACES.items()):
        if kind not in spec:
            continue
        stem = "model" if kind == "text" else "diffusion_pytorch_model"
        dtype = spec["dtype"] if kind == "transformer" else torch.float16
        write_json(folder / place / "config.json", spec[kind])
        write_weights(
            folder / place / f"{stem}.safetensors", random_component(kind, spec, seed + i, dtype)
        )
    if "vae" not in spec:
        return
    family = QWEN_FAMILIES[spec["transformer"]["_class_name"]]
    write_qwen_tokenizer(folder / "tokenizer", tokenizer, template_file=family is Flux2)
    write_json(folder / "scheduler" / "scheduler_config.json", spec["scheduler"])
    told = {"is_distilled": False} if family is Flux2 else {}
    write_json(
        folder / "model_index.json",
        {
            "_class_name": family.pipeline.__name__,
            "_diffusers_version": spec["transformer"]["_diffusers_version"],
            **told,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", spec["text_class"]],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", family.transformer.__name__],
            "vae": ["diffusers", family.vae.__name__],
        },
    )


def never_used(family, config):
    """Endings of the names of what cannot show: what comes after the last layer that is taken."""
    layers = config["num_hidden_layers"]
    taken = layers - 1 if family is ZImage else Flux2.layers[-1]
    names = [name for name, _ in BUILDERS["text"](config).named_parameters()]
    late = [f"layers.{i}." for i in range(taken, layers)]
    return tuple(
        name.removeprefix("model.") if family is ZImage else name  # which loads the inner model
        for name in names
        if name in ("model.norm.weight", "lm_head.weight") or any(part in name for part in late)
    )


def check_visible(folder, spec, tensors, record):
    """Fails if the reference would not notice an error in one of the tensors of the networks."""
    family, transformer = load_transformer(folder)
    none = ("(none)",)
    networks = {"transformer": (transformer, lambda: predict_flow(transformer, tensors), none)}
    if record:
        vae = load_qwen_pipeline(family, folder, transformer).vae
        networks["vae"] = (
            vae,
            lambda: torch.cat(
                [
                    family.encode(vae, tensors["in.image"]).flatten(),
                    family.decode(vae, tensors["out.latents"]).flatten(),
                ]
            ),
            ("to_k.bias",),
        )
    if "text" in spec:
        text_encoder = load_text_encoder(family, folder / "text_encoder")
        ids, mask = tensors["in.input_ids"], tensors["in.attention_mask"]
        networks["text_encoder"] = (
            text_encoder,
            lambda: embed_tokens(family, text_encoder, ids, mask),
            never_used(family, spec["text"]),
        )
    for kind, (network, output, blind) in networks.items():
        share, name = least_visible(network, output, blind)
        print(f"  {kind:14} least visible: {name} {share:.1e}")
        if share < LEAST_SHARE:
            raise AssertionError(
                f"{folder.name}: {kind}'s {name} hardly changes the output ({share:.1e})"
            )


def apart(values, expected):
    """The largest difference, of the largest entry."""
    return ((values - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def check_exact(folder, tensors):
    """Fails if f32 is not enough for the prediction."""
    _, transformer = load_transformer(folder, torch.float64)
    exact = predict_flow(transformer, {name: value.double() for name, value in tensors.items()})
    error = apart(tensors["out.prediction"], exact)
    print(f"  prediction: {error:.1e} from that in f64")
    if not error < 1e-5:
        raise AssertionError(f"{folder.name}: f32 is off by {error:.1e}")


@torch.no_grad()
def check_pipeline(folder, tensors, record):
    """Fails unless diffusers loads the folder by itself and makes the reference's tensors."""
    family, _ = load_transformer(folder)
    prompts, tokens = record["prompts"], record["max_sequence_length"]
    pipe = family.pipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    latents, returned = sample_qwen(
        family,
        pipe,
        tensors["in.latents"],
        prompts,
        record["steps"],
        record["guidance"],
        tokens,
    )
    errors = {"latents": apart(latents, tensors["out.latents"])}
    ids, mask = tokenize_chat(pipe.tokenizer, prompts, tokens, family.thinking)
    embeds = embed_tokens(family, pipe.text_encoder, ids, mask)
    if family is Flux2:  # whose pipeline returns them as the VAE takes them
        errors["image"] = apart(pipe.vae.decode(returned).sample, tensors["out.image"])
    else:
        embeds *= mask[..., None]
    errors["prompt_embeds"] = apart(embeds, tensors["out.prompt_embeds"])
    print("  pipeline: " + ", ".join(f"{name} {value:.1e}" for name, value in errors.items()))
    if not max(errors.values()) < 1e-5:
        raise AssertionError(f"{folder.name}: {family.pipeline.__name__} differs: {errors}")


def check_tokenizer(folder, record):
    """Fails unless transformers and tokenizers make the same ids, and some are padding."""
    family, _ = load_transformer(folder)
    theirs = AutoTokenizer.from_pretrained(folder / "tokenizer")
    mine = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    tokens = record["max_sequence_length"]
    ids, mask = tokenize_chat(theirs, record["prompts"], tokens, family.thinking)
    lengths = []
    for prompt, row, real in zip(record["prompts"], ids, mask.sum(1)):
        text = theirs.decode(row[:real])
        encoded = mine.encode(
            theirs.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=family.thinking,
            )
        ).ids
        lengths.append(len(encoded))
        if encoded[:tokens] != row[:real].tolist() or row[real:].ne(theirs.pad_token_id).any():
            raise AssertionError(f"{folder.name}: {row.tolist()}, {encoded} by tokenizer.json")
    print(f"  tokens: {lengths} of {tokens}; the last begins {text[:60]!r}")
    if min(lengths) >= tokens:
        raise AssertionError(f"{folder.name}: no prompt is padded")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--emoji", type=Path, required=True, help="the emoji model's folder")
    parser.add_argument("--only", nargs="+", choices=SPECS, default=list(SPECS), metavar="NAME")
    args = parser.parse_args()
    prompts = args.emoji / "prompts.txt"
    if not prompts.is_file():
        parser.error(f"--emoji {args.emoji}: no prompts.txt there")
    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    tokenizer = train_qwen_tokenizer(prompts.read_text().splitlines(), VOCABULARY)
    for name in args.only:
        print(name)
        folder, spec, seed = GOLDEN / name, SPECS[name], 2000 + 100 * list(SPECS).index(name)
        shutil.rmtree(folder, ignore_errors=True)
        write_folder(folder, spec, tokenizer, seed)
        tensors, record = write_reference(folder, folder, seed=seed + 9, **spec["reference"])
        for key, tensor in tensors.items():
            print(
                f"  {key:33} {str(list(tensor.shape)):18} "
                f"std {tensor.float().std(correction=0):.3f}"
            )
        check_visible(folder, spec, tensors, record)
        check_exact(folder, tensors)
        if record:
            check_pipeline(folder, tensors, record)
            check_tokenizer(folder, record)
    check_sizes([name for name in SPECS if (GOLDEN / name).is_dir()], MAX_FILE, MAX_TOTAL)


if __name__ == "__main__":
    main()
