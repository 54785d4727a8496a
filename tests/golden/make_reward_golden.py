"""Makes tests/golden/reward: pictures, tiny CLIP-like models, and what they say of the pictures.

    python tests/golden/make_reward_golden.py --tokenizer models/emoji/tokenizer [--only PART ...]

The parts, in order:

    pictures    pictures/: small pictures of odd shapes and modes
    prepared    pictures.json, prepared.safetensors: pictures after resizing, before normalising
    clip        clip/, clip.json: transformers.CLIPModel, f32, quick_gelu
    clip-odd    clip-odd/, clip-odd.json: an old-style folder: bf16, gelu, plain integer sizes, own
                mean and std, eos_token_id 2 (pooled at the largest token id), position_ids among
                the weights, heads of 24 and 20, a patch of 14 that does not divide 48
    open_clip   open_clip/, open_clip.json: open_clip, f16 safetensors, gelu, head_width 80
    open_clip_pt  open_clip_pt/, open_clip_pt.json: an open_clip checkpoint in a .pt, quick_gelu
    hps         hps.json: open_clip/ with HPS v2.1's picture preparation
    aesthetic   heads/, aesthetic.json: heads over the image features of clip/

Pictures with alpha are first put over white, grey ones become RGB. A transformers folder has its
pictures prepared by CLIPImageProcessorPil (Pillow; the plain CLIPImageProcessor is torchvision's
and gives other pixels), open_clip by open_clip.image_transform on Pillow pictures. The weights are
rounded to their stored type first and the references are made from the rounded ones, in f32.
The rows of open_clip's token embedding repeat every 1021 so that they compress.

Each JSON has: pictures, prompts, tokens (by the reference tokenizer, padded and truncated),
image_features and text_features (L2-normalised), logit_scale (exp of the parameter), cosine
[picture][prompt].

Made with Python 3.11, torch 2.15, transformers 5.23.0, open_clip_torch 3.3.0, torchvision 0.29.2,
pillow 13.0.0, safetensors 0.8.
"""

import argparse
import io
import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import open_clip
import torch
import torch.nn.functional as functional
import torchvision.transforms.functional as vision
from PIL import Image
from reward_common import (
    MEAN,
    PICTURES,
    PROMPTS,
    REWARD,
    SIZE,
    STD,
    cosine,
    least_spread,
    load_pictures,
    numbers,
    randomise,
    write_bytes,
    write_json,
)
from safetensors.torch import save, save_file
from torchvision.transforms import InterpolationMode
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging

logging.disable_progress_bar()
MAX_TOTAL = 6_000_000


# Pictures


def scene(width, height, seed, levels=256, noise=6.0):
    """An RGB array: gradients, discs of several colours, noise, rounded to some levels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    x, y = (x + 0.5) / width, (y + 0.5) / height
    base, slope = rng.uniform(20, 235, 3), rng.uniform(-150, 150, (2, 3))
    out = base + (x[..., None] - 0.5) * slope[0] + (y[..., None] - 0.5) * slope[1]
    for _ in range(4):
        cx, cy, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.1, 0.3)
        inside = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
        out[inside] = rng.uniform(0, 255, 3)
    out = out + rng.normal(0, noise, out.shape)
    step = 255 / (levels - 1)
    return np.clip(np.round(out / step) * step, 0, 255).astype(np.uint8)


def encode(picture, **options):
    stream = io.BytesIO()
    picture.save(stream, **options)
    return stream.getvalue()


def make_pictures():
    shutil.rmtree(PICTURES, ignore_errors=True)

    def put(name, picture, **options):
        kind = "PNG" if name.endswith("png") else "JPEG"
        options = {"optimize": True, **options}
        write_bytes(PICTURES / name, encode(picture, format=kind, **options))

    rgb = Image.fromarray
    put("a-dot-1x1.png", rgb(np.array([[[200, 30, 90]]], np.uint8)))
    put("b-tiny-7x5.png", rgb(scene(7, 5, 1, noise=40)))
    put("c-exact-48x48.png", rgb(scene(48, 48, 2)))
    put("d-wide-201x31.png", rgb(scene(201, 31, 3, levels=16, noise=9)))
    put("e-tall-31x200.png", rgb(scene(31, 200, 4, levels=8, noise=12)))
    put("f-square-97x97.jpg", rgb(scene(97, 97, 5, noise=12)), quality=90, subsampling=0)
    photo = rgb(scene(640, 480, 6, noise=8))
    put("g-photo-640x480.jpg", photo, quality=80, progressive=True)
    put("h-grey-50x61.png", rgb(scene(50, 61, 7)).convert("L"))
    alpha = scene(53, 79, 9, levels=32)[..., :1]
    put("i-alpha-53x79.png", rgb(np.concatenate([scene(53, 79, 8, levels=32), alpha], 2)))
    palette = rgb(scene(40, 33, 10)).quantize(16, dither=Image.Dither.NONE)
    put("j-palette-40x33.png", palette, transparency=bytes([0, 255, 128, 255, 60]))
    put("k-strip-120x1.png", rgb(scene(120, 1, 11, noise=30)))


# Preparation


def transformers_crop(picture):
    """Shortest side to SIZE (the long one cut to an integer), Pillow's bicubic, floored crop."""
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    other = int(SIZE * long / short)
    size = (SIZE, other) if width <= height else (other, SIZE)
    out = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
    return out.crop((left, top, left + SIZE, top + SIZE))


def open_clip_crop(picture):
    out = vision.resize(picture, SIZE, InterpolationMode.BICUBIC)
    return vision.center_crop(out, [SIZE, SIZE])


def hps_pad(picture):
    """HPS v2.1: the longest side to SIZE on f32 [3, h, w] in 0..1, not clamped, padded with 0."""
    image = vision.to_tensor(picture)
    height, width = image.shape[1:]
    scale = SIZE / float(max(height, width))
    if scale != 1.0:
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        image = vision.resize(image, size, InterpolationMode.BICUBIC, antialias=True)
    pad_h, pad_w = SIZE - image.shape[1], SIZE - image.shape[2]
    padding = [pad_w // 2, pad_h // 2, pad_w - pad_w // 2, pad_h - pad_h // 2]
    return vision.pad(image, padding, fill=0)


def pixels(picture):
    return torch.from_numpy(np.array(picture))


def processor(folder):
    return CLIPImageProcessorPil.from_pretrained(folder)


def make_prepared():
    reference = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        do_rescale=False,
        do_normalize=False,
    )
    plain = open_clip.image_transform(SIZE, is_train=False, mean=[0.0] * 3, std=[1.0] * 3)
    tensors, rows, differ = {}, [], 0
    for name, picture in load_pictures().items():
        ours, theirs = pixels(transformers_crop(picture)), reference(picture)["pixel_values"][0]
        theirs = torch.as_tensor(np.asarray(theirs)).permute(1, 2, 0)
        assert torch.equal(ours.float(), theirs.float()), f"{name}: transformers crops otherwise"
        crop = pixels(open_clip_crop(picture))
        assert torch.equal(vision.to_tensor(crop.numpy()), plain(picture)), f"{name}: open_clip"
        differ += not torch.equal(ours, crop)
        tensors[f"transformers/{name}"] = ours
        tensors[f"open_clip/{name}"] = crop
        tensors[f"hps/{name}"] = hps_pad(picture).contiguous()
        tensors[f"rgb/{name}"] = pixels(picture) if name[0] in "fhijk" else None
        rows.append({"picture": name, "width": picture.width, "height": picture.height})
    assert differ >= 2, "the crop rules hardly differ"
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    write_bytes(REWARD / "prepared.safetensors", save(tensors))
    write_json(
        REWARD / "pictures.json",
        {
            "size": SIZE,
            "file": "prepared.safetensors",
            "about": "transformers/* and open_clip/*: u8 [48, 48, 3] after the crop; hps/*: f32 "
            "[3, 48, 48] after padding, before normalising; rgb/*: u8 [h, w, 3] over white",
            "pictures": rows,
            "crops_differ": differ,
        },
    )


# transformers


def write_tokenizer(folder, source):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def plain_json(path, value):
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def fresh(name):
    folder = REWARD / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@torch.no_grad()
def write_transformers_reference(name):
    folder = REWARD / name
    model, info = CLIPModel.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    model.eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    pictures = load_pictures()
    prepared = processor(folder)(list(pictures.values()), return_tensors="pt")["pixel_values"]
    out = model(input_ids=tokens.input_ids, pixel_values=prepared)
    masked = model(**tokens, pixel_values=prepared)
    torch.testing.assert_close(out.text_embeds, masked.text_embeds)
    images = functional.normalize(out.image_embeds, dim=-1)
    texts = functional.normalize(out.text_embeds, dim=-1)
    scale = model.logit_scale.exp()
    torch.testing.assert_close(scale * images @ texts.T, out.logits_per_image)
    table = cosine(images, texts)
    least_spread(name, table)
    write_json(
        REWARD / f"{name}.json",
        {
            "pictures": list(pictures),
            "prompts": PROMPTS,
            "tokens": tokens.input_ids.tolist(),
            "image_features": numbers(images),
            "text_features": numbers(texts),
            "logit_scale": scale.item(),
            "cosine": table,
        },
    )


def make_clip(tokenizer):
    folder = fresh("clip")
    config = CLIPConfig(
        text_config={
            "vocab_size": 2131,
            "hidden_size": 32,
            "intermediate_size": 64,
            "projection_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
            "hidden_act": "quick_gelu",
            "bos_token_id": 2129,
            "eos_token_id": 2130,
            "pad_token_id": 2130,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "projection_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": 16,
            "hidden_act": "quick_gelu",
        },
        projection_dim=24,
    )
    model = CLIPModel(config)
    randomise(dict(model.named_parameters()), seed=71)
    model.logit_scale.data.fill_(4.2)
    model.save_pretrained(folder)
    # As transformers 4 wrote it; version 5 of save_pretrained leaves the same fields.
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    ).save_pretrained(folder)
    write_tokenizer(folder, tokenizer)
    write_transformers_reference("clip")


def make_clip_odd(tokenizer):
    folder = fresh("clip-odd")
    config = {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 20,
        "text_config": {
            "bos_token_id": 0,
            "eos_token_id": 2,
            "hidden_act": "gelu",
            "hidden_size": 40,
            "intermediate_size": 56,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 16,
            "model_type": "clip_text_model",
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "pad_token_id": 1,
            "projection_dim": 512,
            "vocab_size": 2131,
        },
        "text_config_dict": None,
        "torch_dtype": "bfloat16",
        "vision_config": {
            "hidden_act": "gelu",
            "hidden_size": 72,
            "image_size": SIZE,
            "intermediate_size": 80,
            "layer_norm_eps": 1e-05,
            "model_type": "clip_vision_model",
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "patch_size": 14,
            "projection_dim": 512,
        },
        "vision_config_dict": None,
    }
    plain_json(folder / "config.json", config)
    model = CLIPModel(CLIPConfig.from_pretrained(folder))
    randomise(dict(model.named_parameters()), seed=72)
    model.logit_scale.data.fill_(3.3)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plain_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": SIZE,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.5, 0.45, 0.4],
            "image_std": [0.3, 0.25, 0.27],
            "resample": 3,
            "size": SIZE,
        },
    )
    write_tokenizer(folder, tokenizer)
    write_transformers_reference("clip-odd")


# open_clip


def make_open_clip_model(config, seed):
    model = open_clip.CLIP(**config).eval()
    tensors = model.state_dict()
    randomise(tensors, seed)
    table = tensors["token_embedding.weight"]
    table.copy_(table[:1021].repeat(table.shape[0] // 1021 + 1, 1)[: table.shape[0]])
    tensors["logit_scale"].fill_(4.0)
    return {name: tensor.half() for name, tensor in tensors.items()}


def open_clip_config(model, mean=MEAN, std=STD):
    return {"model_cfg": model, "preprocess_cfg": {"mean": mean, "std": std}}


def load_open_clip(name):
    """The model, its picture transform and its tokenizer, as open_clip loads a local folder. It
    finds no .pt there by itself."""
    folder = REWARD / name
    location = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(
        location, precision="fp32", load_weights=False
    )
    weights = sorted(folder.glob("open_clip_*model.*"))
    assert len(weights) == 1, weights
    open_clip.load_checkpoint(model, str(weights[0]), strict=True)
    return model.eval(), transform, open_clip.get_tokenizer(location)


@torch.no_grad()
def open_clip_reference(name, prepare=None):
    model, transform, tokenizer = load_open_clip(name)
    config = json.loads((REWARD / name / "open_clip_config.json").read_text())
    preprocess = config["preprocess_cfg"]
    explicit = open_clip.image_transform(
        SIZE, is_train=False, resize_mode="shortest", interpolation="bicubic", **preprocess
    )
    pictures = load_pictures()
    batch = torch.stack([explicit(picture) for picture in pictures.values()])
    torch.testing.assert_close(
        batch, torch.stack([transform(picture) for picture in pictures.values()]), rtol=0, atol=0
    )
    if prepare is not None:
        mean, std = preprocess["mean"], preprocess["std"]
        prepared = [vision.normalize(prepare(one), mean, std) for one in pictures.values()]
        batch = torch.stack(prepared)
    tokens = tokenizer(PROMPTS)
    assert torch.equal(tokens, open_clip.get_tokenizer("ViT-B-32")(PROMPTS))
    images = model.encode_image(batch, normalize=True)
    texts = model.encode_text(tokens, normalize=True)
    return {
        "pictures": list(pictures),
        "prompts": PROMPTS,
        "tokens": tokens.tolist(),
        "image_features": numbers(images),
        "text_features": numbers(texts),
        "logit_scale": model.logit_scale.exp().item(),
        "cosine": cosine(images, texts),
    }


def write_open_clip_reference(name):
    reference = open_clip_reference(name)
    least_spread(name, reference["cosine"])
    write_json(REWARD / f"{name}.json", reference)


def make_open_clip():
    folder = fresh("open_clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": SIZE,
            "layers": 2,
            "width": 160,
            "head_width": 80,
            "mlp_ratio": 0.5,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 8,
            "heads": 2,
            "layers": 2,
        },
    }
    plain_json(folder / "open_clip_config.json", open_clip_config(config))
    tensors = make_open_clip_model(config, seed=73)
    metadata = {"format": "pt"}
    save_file(tensors, folder / "open_clip_model.safetensors", metadata=metadata)
    write_open_clip_reference("open_clip")


def make_open_clip_pt():
    folder = fresh("open_clip_pt")
    config = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": SIZE,
            "layers": 2,
            "width": 64,
            "head_width": 32,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 8,
            "heads": 1,
            "layers": 2,
        },
    }
    plain_json(folder / "open_clip_config.json", open_clip_config(config))
    tensors = make_open_clip_model(config, seed=74)
    checkpoint = {"epoch": 3, "name": "tiny", "state_dict": tensors}
    torch.save(checkpoint, folder / "open_clip_pytorch_model.pt")
    write_open_clip_reference("open_clip_pt")


def make_hps():
    reference = open_clip_reference("open_clip", prepare=hps_pad)
    del reference["logit_scale"]
    least_spread("hps", reference["cosine"])
    write_json(REWARD / "hps.json", reference)


# Aesthetic heads


def make_aesthetic():
    folder = fresh("heads")
    linear = torch.nn.Linear(24, 1)
    sizes = [24, 40, 16, 8, 4, 1]
    places = [0, 2, 4, 6, 7]
    layers = [torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])]
    mlp = {}
    for place, layer in zip(places, layers):
        mlp[f"layers.{place}.weight"], mlp[f"layers.{place}.bias"] = layer.weight, layer.bias
    randomise(dict(linear.named_parameters()), seed=75, gain=6.0)
    randomise(mlp, seed=76, gain=1.8)
    mlp["layers.7.bias"].data.fill_(5.0)
    mlp = {name: value.detach() for name, value in mlp.items()}
    torch.save(
        {name: value.detach() for name, value in linear.state_dict().items()}, folder / "linear.pth"
    )
    torch.save(mlp, folder / "mlp.pth")
    clip = json.loads((REWARD / "clip.json").read_text())
    features = torch.tensor(clip["image_features"])
    out = features
    for layer in layers:
        out = layer(out)
    scores = {"linear": numbers(linear(features)[:, 0]), "mlp": numbers(out[:, 0])}
    print("aesthetic:", scores)
    write_json(REWARD / "aesthetic.json", {"pictures": clip["pictures"], **scores})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="parts to make, of those listed above")
    options = parser.parse_args()
    parts = {
        "pictures": make_pictures,
        "prepared": make_prepared,
        "clip": lambda: make_clip(options.tokenizer),
        "clip-odd": lambda: make_clip_odd(options.tokenizer),
        "open_clip": make_open_clip,
        "open_clip_pt": make_open_clip_pt,
        "hps": make_hps,
        "aesthetic": make_aesthetic,
    }
    for part in options.only or parts:
        parts[part]()
    for path in REWARD.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    total = sum(path.stat().st_size for path in REWARD.rglob("*") if path.is_file())
    print(f"{total} bytes in all")
    if total > MAX_TOTAL:
        raise SystemExit("too large")


if __name__ == "__main__":
    main()
