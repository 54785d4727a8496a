"""Reference tensors of a StableDiffusionXLPipeline's folder, for reference.py.

Everything runs on the CPU in f32 and in eval mode. Tensors, all f32 (B images, H x W latents, T
tokens of width D, pooled embeddings of width P):

    in.latents                        [B, C, H, W]  standard normal
    in.timestep                       [B]           a different one for each sample
    in.input_ids, in.input_ids_2      [B, T]        the prompts by each tokenizer
    in.encoder_hidden_states          [B, T, D]     the pipeline's encode_prompt
    in.pooled_projections             [B, P]        the pipeline's encode_prompt
    in.time_ids                       [B, 6]        original height and width, top and left of the
                                                    crop, target height and width; others for each
    in.image                          [B, 3, h, w]  smooth noise in [-1, 1], as large as out.image
    out.prediction                    [B, C, H, W]  the UNet of these
    out.prompt_embeds                 [B, T, D]     in.encoder_hidden_states
    out.pooled_prompt_embeds          [B, P]        in.pooled_projections
    out.negative_prompt_embeds        [1, T, D]     where no negative prompt is given
    out.negative_pooled_prompt_embeds [1, P]
    out.latents                       [B, C, H, W]  the pipeline with DDIM at eta 0, from in.latents
    out.image                         [B, 3, h, w]  vae.decode(out.latents / scaling_factor)
    out.encoded                       [B, C, H, W]  mean of vae.encode(in.image) * scaling_factor

reference.json holds the prompts, steps, guidance, eta and `resolution`, [height, width] in pixels.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, transformers 5.23.0, safetensors 0.8.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from reference import (
    PROMPTS,
    load_component,
    load_scheduler,
    smooth_image,
    spread_timesteps,
    tokenize,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


def load_pipeline(folder):
    """The pipeline of a folder, with DDIM over its scheduler's betas."""
    folder = Path(folder)
    index = StableDiffusionXLPipeline.load_config(folder)
    pipe = StableDiffusionXLPipeline(
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder=load_component(CLIPTextModel, folder / "text_encoder"),
        text_encoder_2=load_component(CLIPTextModelWithProjection, folder / "text_encoder_2"),
        unet=load_component(UNet2DConditionModel, folder / "unet"),
        vae=load_component(AutoencoderKL, folder / "vae"),
        scheduler=load_scheduler(folder / "scheduler"),
        force_zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def predict_sdxl(unet, latents, timestep, hidden_states, pooled, time_ids):
    """The UNet's raw output."""
    added = {"text_embeds": pooled, "time_ids": time_ids}
    return unet(
        latents, timestep, encoder_hidden_states=hidden_states, added_cond_kwargs=added
    ).sample


@torch.no_grad()
def make_reference(
    folder, seed=0, batch=2, steps=10, guidance=3.0, height=None, width=None, prompts=None
):
    """(tensors, record): what reference.safetensors and reference.json hold."""
    pipe = load_pipeline(folder)
    prompts = [(prompts or PROMPTS)[i % len(prompts or PROMPTS)] for i in range(batch)]
    size = pipe.unet.config.sample_size
    height, width = height or size, width or size
    factor = pipe.vae_scale_factor
    resolution = [height * factor, width * factor]

    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, pipe.unet.config.in_channels, height, width, generator=generator)
    timestep = spread_timesteps(batch)
    embeds, no_embeds, pooled, no_pooled = pipe.encode_prompt(
        prompts, device="cpu", do_classifier_free_guidance=True
    )
    own = torch.tensor([*resolution, 0, 0, *resolution]).float()
    time_ids = torch.stack([own + 16 * i * torch.arange(6) for i in range(batch)])
    final = pipe(
        prompts,
        height=resolution[0],
        width=resolution[1],
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance,
        eta=0.0,
        output_type="latent",
    ).images
    scaling = pipe.vae.config.scaling_factor
    decoded = pipe.vae.decode(final / scaling).sample
    image = smooth_image(batch, *decoded.shape[-2:], generator)
    prediction = predict_sdxl(pipe.unet, latents, timestep, embeds, pooled, time_ids)
    tensors = {
        "in.latents": latents,
        "in.timestep": timestep,
        "in.input_ids": tokenize(pipe.tokenizer, prompts),
        "in.input_ids_2": tokenize(pipe.tokenizer_2, prompts),
        "in.encoder_hidden_states": embeds,
        "in.pooled_projections": pooled,
        "in.time_ids": time_ids,
        "in.image": image,
        "out.prediction": prediction,
        "out.prompt_embeds": embeds.clone(),
        "out.pooled_prompt_embeds": pooled.clone(),
        "out.negative_prompt_embeds": no_embeds[:1],
        "out.negative_pooled_prompt_embeds": no_pooled[:1],
        "out.latents": final,
        "out.image": decoded,
        "out.encoded": pipe.vae.encode(image).latent_dist.mean * scaling,
    }
    record = {
        "prompts": prompts,
        "steps": steps,
        "guidance": guidance,
        "eta": 0.0,
        "resolution": resolution,
    }
    return tensors, record
