"""Reference tensors of a flow model's folder, Stable Diffusion 3 or FLUX.1, for reference.py.

Z-Image and FLUX.2 are reference_qwen.py's, which lists their tensors. Everything runs on the CPU in
f32 and in eval mode. Tensors, all f32 (B images, H x W latents, T tokens of width D, pooled
embeddings of width P). The inputs are what diffusers' transformer.forward takes, by its names:

    in.hidden_states          standard normal; SD3 [B, C, H, W]; FLUX [B, S, 4 C], that is, packed,
                              with S = H/2 * W/2
    in.timestep               [B], a different one for each sample; SD3 0 to 1000, FLUX 0 to 1
    in.encoder_hidden_states  [B, T, D], standard normal
    in.pooled_projections     [B, P], standard normal
    in.img_ids, in.txt_ids    [S, 3] and [T, 3], FLUX only: (0, row, column) of each packed latent,
                              zeros for tokens
    in.guidance               [B], a different one for each sample; only FLUX with guidance_embeds
    out.prediction            like in.hidden_states

A whole pipeline, that is, a model_index.json with a VAE and a text encoder, also gives:

    in.latents                        [B, C, H, W]  in.hidden_states, not packed
    in.image                          [B, 3, h, w]  smooth noise in [-1, 1], as large as out.image
    out.prompt_embeds                 [B, T, D]     the pipeline's encode_prompt
    out.pooled_prompt_embeds          [B, P]        the pipeline's encode_prompt
    out.negative_prompt_embeds        [1, T, D]     SD3 only: of the empty prompt
    out.negative_pooled_prompt_embeds [1, P]        SD3 only: of the empty prompt
    out.latents                       [B, C, H, W]  the pipeline's Euler steps from in.latents
    out.image                         [B, 3, h, w]  vae.decode(out.latents / scaling_factor
                                                    + shift_factor), not clamped
    out.encoded                       [B, C, H, W]  (mean of vae.encode(in.image) - shift_factor)
                                                    * scaling_factor

Guidance is classifier-free with SD3, and with FLUX the input of the guidance embedding.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, transformers 5.23.0, safetensors 0.8.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from reference import PROMPTS, load_component, smooth_image, spread_timesteps
from reference_qwen import QWEN_FAMILIES, ZImage, make_qwen_reference
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

STEPS = 8
INPUTS = [
    "hidden_states",
    "timestep",
    "encoder_hidden_states",
    "pooled_projections",
    "img_ids",
    "txt_ids",
    "guidance",
]


class StableDiffusion3:
    """What diffusers does with Stable Diffusion 3 and 3.5."""

    transformer, pipeline = SD3Transformer2DModel, StableDiffusion3Pipeline
    text_encoders = {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    tokens, guidance = 256, 3.0

    @staticmethod
    def default_size(config, whole):
        return config.sample_size

    @staticmethod
    def channels(config):
        return config.in_channels

    @staticmethod
    def pack(latents):
        return latents

    @staticmethod
    def unpack(latents, height, width):
        return latents

    @staticmethod
    def own_inputs(config, batch, height, width, tokens, guidance):
        return {"in.timestep": spread_timesteps(batch).float()}

    @staticmethod
    def embed(pipe, prompts, tokens):
        cond, uncond, pooled, negative_pooled = pipe.encode_prompt(
            prompts, None, None, max_sequence_length=tokens
        )
        return {
            "out.prompt_embeds": cond,
            "out.pooled_prompt_embeds": pooled,
            "out.negative_prompt_embeds": uncond[:1],
            "out.negative_pooled_prompt_embeds": negative_pooled[:1],
        }


class Flux:
    """What diffusers does with FLUX.1."""

    transformer, pipeline = FluxTransformer2DModel, FluxPipeline
    text_encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    tokens, guidance = 512, 3.5

    @staticmethod
    def default_size(config, whole):
        return 16 if whole else 8

    @staticmethod
    def channels(config):
        return config.in_channels // 4

    @staticmethod
    def pack(latents):
        return FluxPipeline._pack_latents(latents, *latents.shape)

    @staticmethod
    def unpack(latents, height, width):
        return FluxPipeline._unpack_latents(latents, height, width, vae_scale_factor=1)

    @staticmethod
    def own_inputs(config, batch, height, width, tokens, guidance):
        inputs = {
            "in.timestep": spread_timesteps(batch) / 1000,
            "in.img_ids": FluxPipeline._prepare_latent_image_ids(
                batch, height // 2, width // 2, "cpu", torch.float32
            ),
            "in.txt_ids": torch.zeros(tokens, 3),
        }
        if config.guidance_embeds:
            inputs["in.guidance"] = guidance - 0.5 * torch.arange(batch)
        return inputs

    @staticmethod
    def embed(pipe, prompts, tokens):
        cond, pooled, _ = pipe.encode_prompt(prompts, None, max_sequence_length=tokens)
        return {"out.prompt_embeds": cond, "out.pooled_prompt_embeds": pooled}


FAMILIES = {family.transformer.__name__: family for family in (StableDiffusion3, Flux)}
FAMILIES |= QWEN_FAMILIES


def load_transformer(folder, dtype=torch.float32):
    """(family, transformer) of a folder with a `transformer`, or of the component's own."""
    folder = Path(folder)
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    if name not in FAMILIES:
        raise ValueError(f"{folder} holds a {name}: not one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    return family, load_component(family.transformer, folder, dtype)


def components(folder):
    """The names of a pipeline's components that are there."""
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        return set()
    return {
        name
        for name, value in json.loads(index.read_text()).items()
        if isinstance(value, list) and value[0]
    }


def is_whole(family, folder):
    """Whether a folder has a VAE and a text encoder besides its transformer."""
    present = components(folder)
    return "vae" in present and not present.isdisjoint(family.text_encoders)


def load_pipeline(family, folder, transformer):
    """diffusers' pipeline of a folder around a transformer that is already loaded."""
    folder, present = Path(folder), components(folder)
    parts = {
        "transformer": transformer,
        "vae": load_component(AutoencoderKL, folder / "vae"),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    }
    for name, cls in family.text_encoders.items():
        tokenizer = name.replace("text_encoder", "tokenizer")
        reader = T5TokenizerFast if cls is T5EncoderModel else CLIPTokenizer
        parts[name] = load_component(cls, folder / name) if name in present else None
        parts[tokenizer] = (
            reader.from_pretrained(folder / tokenizer) if tokenizer in present else None
        )
    pipe = family.pipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def predict_flow(transformer, tensors):
    """The transformer's raw output at the inputs of a reference."""
    if isinstance(transformer, ZImage.transformer):
        return ZImage.predict(transformer, tensors)  # it takes lists
    return transformer(
        **{name: tensors[f"in.{name}"] for name in INPUTS if f"in.{name}" in tensors}
    ).sample


def sample_euler(family, pipe, latents, prompts, steps, guidance, tokens):
    """The latents that the pipeline itself ends with, not packed."""
    height, width = latents.shape[-2:]
    final = pipe(
        prompts,
        height=height * pipe.vae_scale_factor,
        width=width * pipe.vae_scale_factor,
        latents=family.pack(latents),
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=tokens,
        output_type="latent",
    ).images
    return family.unpack(final, height, width)


def encode_and_decode(vae, latents, generator):
    """in.image, out.image and out.encoded of the VAE; some VAEs have no shift."""
    scaling, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    decoded = vae.decode(latents / scaling + shift).sample
    image = smooth_image(len(latents), *decoded.shape[-2:], generator)
    encoded = (vae.encode(image).latent_dist.mean - shift) * scaling
    return {"in.image": image, "out.image": decoded, "out.encoded": encoded}


@torch.no_grad()
def make_reference(
    folder,
    seed=0,
    batch=2,
    steps=STEPS,
    guidance=None,
    height=None,
    width=None,
    prompts=None,
    max_sequence_length=None,
):
    """(tensors, record): what the reference's files hold; a lone transformer has no record."""
    family, transformer = load_transformer(folder)
    if family in QWEN_FAMILIES.values():
        return make_qwen_reference(
            family,
            transformer,
            folder,
            seed,
            batch,
            steps,
            guidance,
            height,
            width,
            prompts,
            max_sequence_length,
        )
    config, whole = transformer.config, is_whole(family, folder)
    prompts = [(prompts or PROMPTS)[i % len(prompts or PROMPTS)] for i in range(batch)]
    guidance = family.guidance if guidance is None else guidance
    tokens = max_sequence_length or family.tokens
    height = height or family.default_size(config, whole)
    width = width or family.default_size(config, whole)
    if height % 2 or width % 2:
        raise ValueError(f"{height} x {width} latents: both have to be even")
    pipe = load_pipeline(family, folder, transformer) if whole else None
    embeds = family.embed(pipe, prompts, tokens) if whole else {}
    text_length = embeds["out.prompt_embeds"].shape[1] if whole else tokens

    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, family.channels(config), height, width, generator=generator)
    tensors = {
        "in.hidden_states": family.pack(latents),
        "in.encoder_hidden_states": torch.randn(
            batch, text_length, config.joint_attention_dim, generator=generator
        ),
        "in.pooled_projections": torch.randn(
            batch, config.pooled_projection_dim, generator=generator
        ),
        **family.own_inputs(config, batch, height, width, text_length, guidance),
    }
    tensors["out.prediction"] = predict_flow(transformer, tensors)
    if not whole:
        return tensors, None
    final = sample_euler(family, pipe, latents, prompts, steps, guidance, tokens)
    tensors |= {
        "in.latents": latents.clone(),
        **embeds,
        "out.latents": final,
    }  # safetensors wants no shared memory
    tensors |= encode_and_decode(pipe.vae, final, generator)
    record = {
        "prompts": prompts,
        "steps": steps,
        "guidance": guidance,
        "max_sequence_length": tokens,
        "eta": 0.0,
    }
    return tensors, record
