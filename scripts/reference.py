"""Writes reference tensors of a diffusers folder: DIR/reference.safetensors and DIR/reference.json.

A folder with a `transformer` goes to reference_flow.py (Stable Diffusion 3, FLUX.1), which hands
Z-Image and FLUX.2 on to reference_qwen.py, as are lone Qwen3 text encoders; one whose UNet takes a
pooled text embedding (SDXL) goes to reference_sdxl.py; these list their tensors. Of a
StableDiffusion folder they are as follows. Everything runs on the CPU in f32 and in eval mode; all
tensors are f32 (B images, H x W latents, T tokens of width D):

    in.latents                [B, C, H, W]  standard normal
    in.timestep               [B]           a different one for each sample
    in.input_ids              [B, T]        the prompts, padded and truncated to model_max_length
    in.encoder_hidden_states  [B, T, D]     last_hidden_state of the prompts
    in.negative_hidden_states [1, T, D]     last_hidden_state of the empty prompt
    in.image                  [B, 3, h, w]  smooth noise in [-1, 1], h x w the size of out.image
    out.prediction            [B, C, H, W]  the UNet at in.latents, in.timestep and the prompts
    out.latents               [B, C, H, W]  DDIM at eta 0 from in.latents, eps = u + g (c - u)
    out.image                 [B, 3, h, w]  vae.decode(out.latents / scaling_factor), not clamped
    out.encoded               [B, C, H, W]  mean of vae.encode(in.image) * scaling_factor

Made with Python 3.11, torch 2.15, diffusers 0.42.1, transformers 5.23.0, safetensors 0.8.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()

PROMPTS = ["red apple on a white background", "a photo of a cat, 2 dogs & a bicycle!"]


def load_component(cls, folder, dtype=torch.float32):
    """One network of a model folder, frozen, in eval mode; its fp16 variant if it has no other."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json: not a component of a diffusers folder"
        )
    names = [file.name for file in folder.glob("*.safetensors")]
    plain = [name for name in names if ".fp16" not in name]
    if not names:
        raise FileNotFoundError(f"{folder} has no .safetensors weights")
    variant = {} if plain else {"variant": "fp16"}
    model, info = cls.from_pretrained(
        folder, output_loading_info=True, use_safetensors=True, dtype=dtype, **variant
    )
    missing = sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]
    if missing:
        raise ValueError(
            f"{folder}: the weights lack, or have in another shape, {', '.join(missing)}"
        )
    return model.eval().requires_grad_(False)


def is_flow(folder):
    """Whether a folder has a transformer in the UNet's place, or is one itself."""
    folder = Path(folder)
    config = folder / "config.json"
    lone = config.is_file() and "Transformer" in json.loads(config.read_text()).get(
        "_class_name", ""
    )
    return lone or (folder / "transformer").is_dir()


def is_qwen(folder):
    """Whether a folder is that of a Qwen3 text encoder."""
    config = Path(folder) / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("model_type") == "qwen3"


def is_sdxl(folder):
    """Whether a folder's UNet takes a pooled text embedding and time ids."""
    config = Path(folder) / "unet" / "config.json"
    fields = json.loads(config.read_text()) if config.is_file() else {}
    return fields.get("addition_embed_type") == "text_time"


def load_scheduler(folder):
    """The DDIM scheduler of a model folder, whatever scheduler class its config names."""
    return DDIMScheduler.from_config(
        json.loads((Path(folder) / "scheduler_config.json").read_text())
    )


def load_folder(folder):
    """All parts of a model folder that a reference needs."""
    folder = Path(folder)
    return SimpleNamespace(
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=load_component(CLIPTextModel, folder / "text_encoder"),
        unet=load_component(UNet2DConditionModel, folder / "unet"),
        vae=load_component(AutoencoderKL, folder / "vae"),
        scheduler=load_scheduler(folder / "scheduler"),
    )


def tokenize(tokenizer, prompts):
    """Token ids [B, T], padded and truncated to the tokenizer's model_max_length."""
    length = tokenizer.model_max_length
    return tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def spread_timesteps(batch):
    """981, 261, 541, ...: a timestep for each sample, far apart."""
    return torch.tensor([(981 - 720 * i) % 1000 for i in range(batch)])


def predict(unet, latents, timestep, hidden_states):
    """The UNet's raw output."""
    return unet(latents, timestep, encoder_hidden_states=hidden_states).sample


def sample_ddim(unet, scheduler, latents, cond, uncond, steps, guidance):
    """The DDIM chain at eta 0 under classifier-free guidance."""
    scheduler.set_timesteps(steps)
    uncond = uncond.expand_as(cond)
    for t in scheduler.timesteps:
        u, c = predict(unet, latents.repeat(2, 1, 1, 1), t, torch.cat([uncond, cond])).chunk(2)
        latents = scheduler.step(u + guidance * (c - u), t, latents, eta=0.0).prev_sample
    return latents


def smooth_image(batch, height, width, generator):
    """Random images in [-1, 1] whose neighbouring pixels are alike."""
    coarse = torch.randn(batch, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(
        coarse, (height, width), mode="bicubic", align_corners=True
    ).tanh()


@torch.no_grad()
def make_reference(
    folder, seed=0, batch=2, steps=10, guidance=3.0, height=None, width=None, prompts=None
):
    """(tensors, record): what reference.safetensors and reference.json hold."""
    model = load_folder(folder)
    prompts = [(prompts or PROMPTS)[i % len(prompts or PROMPTS)] for i in range(batch)]
    size = model.unet.config.sample_size
    default_height, default_width = (size, size) if size is None or isinstance(size, int) else size
    height, width = height or default_height, width or default_width
    if height is None or width is None:
        raise ValueError(
            "the UNet's config has no sample_size: give --height-latent and --width-latent"
        )

    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, model.unet.config.in_channels, height, width, generator=generator)
    timestep = spread_timesteps(batch)
    ids = tokenize(model.tokenizer, prompts)
    cond = model.text_encoder(ids).last_hidden_state
    uncond = model.text_encoder(tokenize(model.tokenizer, [""])).last_hidden_state
    scaling = model.vae.config.scaling_factor

    final = sample_ddim(model.unet, model.scheduler, latents, cond, uncond, steps, guidance)
    decoded = model.vae.decode(final / scaling).sample
    image = smooth_image(batch, *decoded.shape[-2:], generator)
    tensors = {
        "in.latents": latents,
        "in.timestep": timestep,
        "in.input_ids": ids,
        "in.encoder_hidden_states": cond,
        "in.negative_hidden_states": uncond,
        "in.image": image,
        "out.prediction": predict(model.unet, latents, timestep, cond),
        "out.latents": final,
        "out.image": decoded,
        "out.encoded": model.vae.encode(image).latent_dist.mean * scaling,
    }
    record = {"prompts": prompts, "steps": steps, "guidance": guidance, "eta": 0.0}
    return tensors, record


def save_tensors(path, tensors):
    """Writes tensors as contiguous f32; refuses values that are not finite."""
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"not finite: {', '.join(broken)}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    Path(path).chmod(0o644)  # safetensors writes 0600


def write_reference(folder, out, **options):
    """Makes a folder's reference and writes its files to `out`; returns the tensors and the record.

    A lone transformer or text encoder has no record, as there is nothing to say of prompts and
    steps.
    """
    make = make_reference
    if is_qwen(folder):
        from reference_qwen import make_text_reference as make
    elif is_flow(folder):
        from reference_flow import make_reference as make  # not at the top: it imports from here
    elif is_sdxl(folder):
        from reference_sdxl import make_reference as make
    tensors, record = make(folder, **options)
    save_tensors(Path(out) / "reference.safetensors", tensors)
    if record:
        (Path(out) / "reference.json").write_text(json.dumps(record, indent=2) + "\n")
    return tensors, record


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL_DIR", help="a model folder in diffusers' layout")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--steps", type=int, help="default: 10 of DDIM, 8 of a flow model")
    parser.add_argument("--guidance", type=float, help="default: 3.0, FLUX.1 3.5, FLUX.2 4.0")
    parser.add_argument(
        "--height-latent", type=int, help="default: the network's sample_size, 16 or 8 without"
    )
    parser.add_argument(
        "--width-latent", type=int, help="default: the network's sample_size, 16 or 8 without"
    )
    parser.add_argument(
        "--max-sequence-length",
        type=int,
        help="tokens of T5 or Qwen3 in a flow model; default: 256, FLUX and Z-Image 512, those "
        "with Qwen3 77 without a pipeline",
    )
    parser.add_argument("--prompts", nargs="+", help="repeated in turn to fill the batch")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.batch < 1:
        parser.error(f"--batch {args.batch}: at least 1")
    if args.max_sequence_length and not (is_flow(args.model) or is_qwen(args.model)):
        parser.error("--max-sequence-length: a StableDiffusion folder has no T5")
    options = {
        "seed": args.seed,
        "batch": args.batch,
        "steps": args.steps,
        "guidance": args.guidance,
        "height": args.height_latent,
        "width": args.width_latent,
        "prompts": args.prompts,
        "max_sequence_length": args.max_sequence_length,
    }
    torch.set_num_threads(args.threads)
    try:
        given = {name: value for name, value in options.items() if value is not None}
        tensors, _ = write_reference(args.model, args.out, **given)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for name, tensor in tensors.items():
        print(f"{name:33} {str(list(tensor.shape)):18} std {tensor.float().std():.4f}")


if __name__ == "__main__":
    main()
