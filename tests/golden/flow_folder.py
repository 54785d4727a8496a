"""Writes folders of flow models, Stable Diffusion 3 and FLUX.1, with random weights.

For make_flow_golden.py, make_schedule_golden.py and random_flow.py, which put `scripts` on the
path.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, transformers 5.23.0, safetensors 0.8.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
from sd_folder import (
    GAINS,
    SD15_TEXT,
    random_weights,
    write_json,
    write_shards,
    write_tokenizer,
    write_weights,
)
from t5_tokenizer import write_t5_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

# The fields that the repositories publish. SD 3's transformer has no qk_norm or
# dual_attention_layers, FLUX's no out_channels or axes_dims_rope. Readers have to know diffusers'
# defaults for what is absent.
SD3_TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "_diffusers_version": "0.29.0.dev0",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
SD35_LARGE_TRANSFORMER = {
    **SD3_TRANSFORMER,
    "_diffusers_version": "0.31.0.dev0",
    "caption_projection_dim": 2432,
    "dual_attention_layers": [],
    "num_attention_heads": 38,
    "num_layers": 38,
    "qk_norm": "rms_norm",
}
SD35_MEDIUM_TRANSFORMER = {
    **SD3_TRANSFORMER,
    "_diffusers_version": "0.31.0.dev0",
    "dual_attention_layers": list(range(13)),
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
}
FLUX_DEV_TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel",
    "_diffusers_version": "0.30.0.dev0",
    "_name_or_path": "../checkpoints/flux-dev/transformer",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
FLUX_SCHNELL_TRANSFORMER = {
    **FLUX_DEV_TRANSFORMER,
    "_name_or_path": "../checkpoints/flux-schnell/transformer",
    "guidance_embeds": False,
}
SD3_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.29.0.dev0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
FLUX_DEV_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
FLUX_SCHNELL_SCHEDULER = {**FLUX_DEV_SCHEDULER, "shift": 1.0, "use_dynamic_shifting": False}
SD3_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.29.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
FLUX_VAE = {
    **SD3_VAE,
    "_diffusers_version": "0.30.0.dev0",
    "_name_or_path": "../checkpoints/flux-dev",
    "mid_block_add_attention": True,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
# The token ids are not the tokenizer's: where eos_token_id is 2, transformers pools at the largest
# id instead.
CLIP_TEXT = {**SD15_TEXT, "bos_token_id": 0, "eos_token_id": 2, "torch_dtype": "float16"}
CLIP_TEXT_PROJECTION = {**CLIP_TEXT, "architectures": ["CLIPTextModelWithProjection"]}
T5_TEXT = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": 32128,
}

DIFFUSERS = {
    "transformer": lambda config: TRANSFORMERS[config["_class_name"]].from_config(config),
    "vae": AutoencoderKL.from_config,
}
TRANSFORMERS = {cls.__name__: cls for cls in (SD3Transformer2DModel, FluxTransformer2DModel)}
TEXT_ENCODERS = {
    "CLIPTextModel": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
    "CLIPTextModelWithProjection": lambda config: CLIPTextModelWithProjection(
        CLIPTextConfig(**config)
    ),
    "T5EncoderModel": lambda config: T5EncoderModel(T5Config(**config)),
}
# T5 does not scale its attention; the latents of a flow model are about 1 in size.
FLOW_GAINS = {
    **{part: gain for part, gain in GAINS.items() if part != "decoder.conv_in"},
    "add_q_proj": 1.5,
    "add_k_proj": 1.5,
    "SelfAttention.q": 0.6,
}
PIPELINES = {
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "FluxTransformer2DModel": "FluxPipeline",
}
SLOTS = {
    "StableDiffusion3Pipeline": ["text_encoder", "text_encoder_2", "text_encoder_3"],
    "FluxPipeline": ["text_encoder", "text_encoder_2"],
}


def random_flow_weights(kind, config, seed, dtype):
    """The state dict of a random component, under the names that the repositories use."""
    kind = config["architectures"][0] if kind.startswith("text_encoder") else kind
    weights = random_weights(kind, config, seed, dtype, {**DIFFUSERS, **TEXT_ENCODERS}, FLOW_GAINS)
    weights.pop("encoder.embed_tokens.weight", None)  # T5's other name for shared.weight
    if kind == "CLIPTextModel":
        weights = {f"text_model.{key}": value for key, value in weights.items()}
    return weights


def write_component(folder, kind, config, seed, dtype, shards=1):
    """Writes config and weights of one network to folder/kind."""
    stem = "model" if kind.startswith("text_encoder") else "diffusion_pytorch_model"
    weights = random_flow_weights(kind, config, seed, dtype)
    write_json(folder / kind / "config.json", config)
    if shards > 1:
        write_shards(folder / kind, stem, weights, shards)
    else:
        write_weights(folder / kind / f"{stem}.safetensors", weights)


def write_flow_index(folder, pipeline, text_encoders):
    """model_index.json of a whole pipeline; a text encoder that is not given is null."""
    index = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": [
            "diffusers",
            next(name for name in PIPELINES if PIPELINES[name] == pipeline),
        ],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for name in SLOTS[pipeline]:
        tokenizer = name.replace("text_encoder", "tokenizer")
        cls = text_encoders[name]["architectures"][0] if name in text_encoders else None
        reader = "T5TokenizerFast" if cls == "T5EncoderModel" else "CLIPTokenizer"
        index[name] = ["transformers", cls] if cls else [None, None]
        index[tokenizer] = ["transformers", reader] if cls else [None, None]
    start = {"_class_name": pipeline, "_diffusers_version": "0.30.0.dev0"}
    write_json(Path(folder) / "model_index.json", {**start, **dict(sorted(index.items()))})


def write_flow_folder(folder, spec, clip_tokenizer, t5_tokenizer, seed):
    """Writes a folder by its spec, which holds the components' configs: a whole one if with a VAE.

    `text` has the text encoders' configs by name, `tokenizers` what write_tokenizer takes for each
    CLIP; `dtype` and `shards` are the transformer's, the rest is f16.
    """
    write_component(
        folder, "transformer", spec["transformer"], seed, spec["dtype"], spec.get("shards", 1)
    )
    if "vae" not in spec:
        return
    pipeline = PIPELINES[spec["transformer"]["_class_name"]]
    write_component(folder, "vae", spec["vae"], seed + 1, torch.float16)
    for i, (name, config) in enumerate(spec["text"].items()):
        shards = spec.get("text_shards", {}).get(name, 1)
        write_component(folder, name, config, seed + 2 + i, torch.float16, shards)
        tokenizer = folder / name.replace("text_encoder", "tokenizer")
        if config["model_type"] == "t5":
            write_t5_tokenizer(tokenizer, t5_tokenizer)
        else:
            write_tokenizer(
                clip_tokenizer, tokenizer, tokenizer_json=False, **spec["tokenizers"][name]
            )
    write_json(folder / "scheduler" / "scheduler_config.json", spec["scheduler"])
    write_flow_index(folder, pipeline, spec["text"])
