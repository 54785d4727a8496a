"""Trains the embedded flow model: a miniature Stable Diffusion 3 on the latents of the emoji VAE.

    npm pack emoji-datasource-google@16.0.0 emojibase-data@17.0.0      # and unpack both
    python scripts/train_emoji_flow.py --images emoji-datasource-google --labels emojibase-data \
        --emoji models/emoji --out models/emoji-flow --minutes 75

Rectified flow: x = (1 - t) x0 + t z, target v = z - x0, t logit-normal, 10% empty captions, a
moving average of the weights. Two small CLIP encoders with projections and a T5 of one layer are
trained along. diffusers' pipeline takes as many T5 tokens as `max_sequence_length` says, padding
included, so training sees several numbers of them and the model draws the same with any. `--resume
DIR` goes on from saved weights. The folder is written as f16 at the end and every few minutes.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, transformers 5.23.0 on two CPU cores.
"""

import argparse
import copy
import json
import math
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from t5_tokenizer import train_t5_tokenizer, write_t5_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

COLORS = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "red": (214, 48, 49),
    "orange": (240, 147, 43),
    "yellow": (249, 214, 63),
    "green": (60, 174, 88),
    "blue": (52, 120, 220),
    "purple": (142, 84, 190),
    "pink": (247, 160, 190),
    "gray": (140, 146, 152),
}
SUBJECTS = ("face-", "cat-face", "monkey", "animal", "plant", "food", "drink", "transport")
PREVIEW = [
    "red apple on a white background",
    "grinning face on a blue background",
    "cat face on a pink background",
    "pizza on a green background",
    "automobile on a yellow background",
    "tropical fish on a black background",
    "cherry blossom on a gray background",
    "rocket on a purple background",
    "tiger face",
    "hot dog",
    "smiling face with heart-eyes on a white background",
    "penguin on a orange background",
    "green apple on a red background",
    "whale",
    "banana on a blue background",
    "owl on a white background",
]
WIDTH, LAYERS, TEXT_WIDTHS, TOKENS, BATCH, EMPTY = 128, 4, (64, 32), 16, 64, 0.1
JOINT = sum(TEXT_WIDTHS)
# T5 tokens and how often each number of them is drawn; 256 is diffusers' default.
T5_VOCABULARY, T5_TOKENS, T5_SHARES = 256, (16, 32, 256), (0.82, 0.15, 0.03)
# Latents are small: the schedule needs no shift towards noise.
SHIFT = 1.0
# Most images show the whole caption; some the concept alone, over any background.
BARE = 0.2


def emoji(images, labels):
    """Pictures [N,64,64,4] and captions of the concepts that the embedded models know."""
    label = {
        e["hexcode"].replace("-FE0F", ""): e["label"]
        for e in json.loads((labels / "en/data.json").read_text())
    }
    rgba, captions = [], []
    for e in sorted(
        json.loads((images / "emoji_pretty.json").read_text()), key=lambda e: e["sort_order"]
    ):
        code = e["unified"].replace("-FE0F", "")
        known = e["subcategory"].startswith(SUBJECTS) and e["category"] != "Symbols"
        if known and e["has_img_google"] and code in label:
            rgba.append(
                np.asarray(Image.open(images / "img/google/64" / e["image"]).convert("RGBA"))
            )
            captions.append(label[code].lower())
    return torch.from_numpy(np.stack(rgba)).permute(0, 3, 1, 2).float() / 255, captions


@torch.no_grad()
def encode(vae, rgba):
    """Latents [N, colours, 2, 4, 16, 16] of each concept on each background, plain and mirrored."""
    out = torch.empty(len(rgba), len(COLORS), 2, 4, 16, 16)
    for c, color in enumerate(COLORS.values()):
        background = torch.tensor(color).float().view(1, 3, 1, 1) / 255
        for start in range(0, len(rgba), 64):
            part = rgba[start : start + 64]
            picture = (part[:, :3] * part[:, 3:] + background * (1 - part[:, 3:])) * 2 - 1
            for mirrored, x in enumerate((picture, picture.flip(-1))):
                mean = vae.encode(x).latent_dist.mean
                out[start : start + 64, c, mirrored] = (
                    mean - vae.config.shift_factor
                ) * vae.config.scaling_factor
    return out


def text_encoder(tokenizer, width):
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 16,
            max_position_embeddings=TOKENS,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )


def t5_encoder():
    return T5EncoderModel(
        T5Config(
            vocab_size=T5_VOCABULARY,
            d_model=JOINT,
            d_kv=24,
            d_ff=128,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


def transformer():
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=JOINT,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=JOINT,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def embed(clips, t5, ids, t5_ids):
    """The pipeline's sequence [B, 16 + T, 96] and pooled embedding [B, 96] of prompts."""
    outputs = [clip(ids, output_hidden_states=True) for clip in clips]
    clip = torch.cat([o.hidden_states[-2] for o in outputs], -1)
    return torch.cat([clip, t5(t5_ids)[0]], 1), torch.cat([o.text_embeds for o in outputs], -1)


def save(out, modules, vae, tokenizer, t5_tokenizer):
    halves = [copy.deepcopy(m).half() for m in modules]
    StableDiffusion3Pipeline(
        transformer=halves[0],
        text_encoder=halves[1],
        text_encoder_2=halves[2],
        text_encoder_3=halves[3],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer,
        vae=copy.deepcopy(vae).half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    ).save_pretrained(out)
    # A resumed part remembers the folder it came from.
    for file in out.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")


def preview(out, file, t5_tokens=16):
    pipe = StableDiffusion3Pipeline.from_pretrained(out, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        PREVIEW,
        num_inference_steps=16,
        guidance_scale=3.0,
        max_sequence_length=t5_tokens,
        output_type="np",
        generator=torch.Generator().manual_seed(1),
    ).images
    sheet = (
        (images * 255)
        .round()
        .astype("uint8")
        .reshape(2, 8, 64, 64, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(128, 512, 3)
    )
    Image.fromarray(sheet).resize((1024, 256), Image.NEAREST).save(file)


def cut(ids, length):
    """Token ids as the tokenizer would cut them: the end (1) last where there was more."""
    ids = ids[:, :length].clone()
    ids[:, -1] = torch.where(ids[:, -1] > 1, 1, ids[:, -1])
    return ids


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("images", "labels", "emoji", "out"):
        parser.add_argument(f"--{flag}", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", type=Path, help="a folder that an earlier training wrote")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(args.threads)

    vae = AutoencoderKL.from_pretrained(args.emoji / "vae").float().eval()
    # The SD3 pipeline subtracts a shift, which the emoji VAE has none of.
    vae.register_to_config(shift_factor=0.0)
    tokenizer = CLIPTokenizer.from_pretrained(args.emoji / "tokenizer")
    images = args.images / "package" if (args.images / "package").exists() else args.images
    labels = args.labels / "package" if (args.labels / "package").exists() else args.labels
    rgba, captions = emoji(images, labels)
    latents = encode(vae, rgba)
    print(
        f"{len(captions)} concepts, latents of std {latents.std():.3f} "
        f"and mean {latents.mean():.3f}",
        flush=True,
    )

    texts = [""] + captions + [f"{c} on a {name} background" for c in captions for name in COLORS]
    with tempfile.TemporaryDirectory() as folder:
        write_t5_tokenizer(folder, train_t5_tokenizer(texts, T5_VOCABULARY))
        t5_tokenizer = T5TokenizerFast.from_pretrained(folder)
    longest = dict(padding="max_length", truncation=True, return_tensors="pt")
    ids = tokenizer(texts, max_length=TOKENS, **longest).input_ids
    t5_ids = t5_tokenizer(texts, max_length=max(T5_TOKENS), **longest).input_ids
    models = [
        transformer(),
        *(text_encoder(tokenizer, width) for width in TEXT_WIDTHS),
        t5_encoder(),
    ]
    if args.resume:
        parts = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
        models = [
            type(m).from_pretrained(args.resume / part).float() for m, part in zip(models, parts)
        ]
    print("parameters:", *(sum(p.numel() for p in m.parameters()) for m in models), flush=True)
    averages = [copy.deepcopy(m).eval() for m in models]
    parameters = [p for m in models for p in m.parameters()]
    averaged = [p for m in averages for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, args.rate, betas=(0.9, 0.99), weight_decay=0.01)
    start, step, running, saved = time.time(), 0, None, 0
    while (done := (time.time() - start) / 60 / args.minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                args.rate
                * min(1, (step + 1) / 200)
                * max(0.01, 0.5 + 0.5 * math.cos(math.pi * done))
            )
        concept, color = (
            torch.randint(len(captions), (BATCH,)),
            torch.randint(len(COLORS), (BATCH,)),
        )
        x0 = latents[concept, color, torch.randint(2, (BATCH,))]
        u = torch.rand(BATCH)
        whole = 1 + len(captions) + len(COLORS) * concept + color
        text = torch.where(u < EMPTY, 0, torch.where(u < EMPTY + BARE, 1 + concept, whole))
        length = random.choices(T5_TOKENS, T5_SHARES)[0]
        sequence, pooled = embed(models[1:3], models[3], ids[text], cut(t5_ids[text], length))
        t, z = torch.sigmoid(torch.randn(BATCH)), torch.randn_like(x0)
        x = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * z
        v = models[0](x, sequence, pooled, 1000 * t).sample
        loss = (v - (z - x0)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.9995, (1 + step) / (10 + step))
            torch._foreach_lerp_(averaged, parameters, 1 - decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        step += 1
        if step % 50 == 0:
            print(f"{done * args.minutes:.1f} min, step {step}, loss {running:.4f}", flush=True)
        if (time.time() - start) / 60 - saved > 6:
            saved = (time.time() - start) / 60
            save(args.out, averages, vae, tokenizer, t5_tokenizer)
            preview(args.out, args.out / "preview.png")
    save(args.out, averages, vae, tokenizer, t5_tokenizer)
    preview(args.out, args.out / "preview.png")
    for name in ("prompts.txt", "prompts-held-out.txt"):
        shutil.copy(args.emoji / name, args.out / name)
    print(f"{step} steps of {BATCH}, loss {running:.4f}; written to {args.out}")


if __name__ == "__main__":
    main()
