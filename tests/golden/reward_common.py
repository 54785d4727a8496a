"""What the generators of tests/golden/reward share: seeded weights, pictures, atomic writing."""

import json
import math
import os
from pathlib import Path

import torch
from PIL import Image

torch.set_num_threads(1)

REWARD = Path(__file__).resolve().parent / "reward"
PICTURES = REWARD / "pictures"
SIZE = 48
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]

LONG_PROMPT = "a smiling yellow face with a big red heart and a blue tree on the mountain, " * 8
PROMPTS = [
    "",
    "a photo of a cat!",
    "a red heart on a black background",
    "  Two  DOGS &amp; the cat's\t3.5 apples... ",
    "Crème brûlée — naïve café, 50% off?! ☂ 猫 ½",
    LONG_PROMPT.strip(),
]


def write_json(path, value):
    """Writes a JSON file whole or not at all: one line for each field."""
    lines = [f" {json.dumps(key)}: {json.dumps(value[key])}" for key in value]
    write_bytes(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def write_bytes(path, data):
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


@torch.no_grad()
def randomise(tensors, seed, gain=1.6):
    """Fills {name: tensor} in place: normal weights of std gain / sqrt(fan in), biases of 0.1,
    norms about 1, embeddings of 0.5. Integers stay as they are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, std, mean=0.0):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.ndim == 0:
            continue
        if name.endswith("bias"):
            normal(tensor, 0.1)
        elif tensor.ndim == 1 and ("norm" in name.lower() or "ln_" in name):
            normal(tensor, 0.2, 1.0)
        elif "embedding.weight" in name and tensor.ndim == 2 or "embeddings.weight" in name:
            normal(tensor, 0.5)
        elif "pos_embed" in name or "positional_embedding" in name or "class" in name:
            normal(tensor, 0.5)
        elif tensor.ndim == 1 or "cls_token" in name:
            normal(tensor, 0.5)
        elif name in ("text_projection", "visual.proj"):
            normal(tensor, gain / math.sqrt(tensor.shape[0]))
        else:
            normal(tensor, gain / math.sqrt(tensor[0].numel()))


def load_picture(path):
    """A picture as RGB: with an alpha channel (or a transparent palette colour) over white."""
    picture = Image.open(path)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def picture_paths():
    return sorted(path for path in PICTURES.iterdir() if path.suffix in (".png", ".jpg"))


def load_pictures():
    """The pictures in the order of their names, as {name: RGB picture}."""
    return {path.name: load_picture(path) for path in picture_paths()}


def numbers(tensor):
    return tensor.detach().double().tolist()


def cosine(images, texts):
    """Cosines [image][prompt] of normalised features, summed in f64."""
    return numbers(images.double() @ texts.double().T)


def least_spread(name, table):
    """Refuses references that hardly depend on the picture or on the prompt."""
    table = torch.tensor(table, dtype=torch.float64)
    across = (table.std(0).min().item(), table.std(1).min().item())
    print(
        f"{name}: {table.min():.3f} to {table.max():.3f}, least std over pictures "
        f"{across[0]:.3f}, over prompts {across[1]:.3f}"
    )
    if min(across) < 0.02:
        raise SystemExit(f"{name}: the scores hardly differ")
