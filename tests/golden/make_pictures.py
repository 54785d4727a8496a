"""Makes pictures.json: small pictures as Pillow, PyTorch and transformers resize and prepare them.

    python tests/golden/make_pictures.py

Bytes are hexadecimal, pixel by pixel; prepared pictures are f32, channel by channel, little-endian
hexadecimal too. From version 13 on Pillow resizes a picture that loses far more rows than columns
down first; 12.0 and older, which reward models were trained with, always go across first.
`pillow` does so with any version, by one call for each pass.

Made with Python 3.11, Pillow 13.0, torch 2.15, transformers 5.23.0.
"""

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

GOLDEN = Path(__file__).resolve().parent
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
BICUBIC = Image.Resampling.BICUBIC
rng = np.random.default_rng(20)


def noise(width, height):
    """Half of the values black or white, so that the overshoot has to be clipped."""
    values = rng.integers(0, 256, (height, width, 3))
    extreme = rng.integers(0, 2, values.shape) * 255
    return np.where(rng.integers(0, 2, values.shape), values, extreme).astype(np.uint8)


def pillow(picture, width, height):
    """Bicubic, across and then down."""
    image = Image.fromarray(picture)
    image = image.resize((width, image.height), BICUBIC).resize((width, height), BICUBIC)
    return np.asarray(image)


def torch_resize(picture, width, height):
    """Bicubic, antialiased, on values in 0..1, as [3, height, width]."""
    values = torch.from_numpy(picture).permute(2, 0, 1).contiguous() / 255
    return torch.nn.functional.interpolate(
        values[None], size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )[0]


def hexed(values):
    return np.ascontiguousarray(values).tobytes().hex()


def described(picture):
    height, width, _ = picture.shape
    return {"width": width, "height": height, "pixels": hexed(picture)}


def resized(from_width, from_height, width, height):
    picture = noise(from_width, from_height)
    case = {**described(picture), "to": [width, height]}
    case["pillow"] = hexed(pillow(picture, width, height))
    # PyTorch 2.15 gives the columns of a result that is one pixel wide the weights of another row.
    if width > 1:
        case["torch"] = hexed(torch_resize(picture, width, height).permute(1, 2, 0).numpy())
    return case


def shortest_edge(picture, size):
    height, width, _ = picture.shape
    long = int(size * max(width, height) / min(width, height))
    return pillow(picture, *((size, long) if width <= height else (long, size)))


def transformers(picture, size, crop):
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop)
    # Resized beforehand: see above. The processor finds nothing left to resize.
    prepared = processor(Image.fromarray(shortest_edge(picture, size)), return_tensors="np")
    return prepared["pixel_values"][0]


def stretch(picture, size, crop):
    processor = CLIPImageProcessorPil(size={"height": size, "width": size}, crop_size=crop)
    prepared = processor(Image.fromarray(pillow(picture, size, size)), return_tensors="np")
    return prepared["pixel_values"][0]


def open_clip(picture, size, crop):
    """torchvision's Resize, CenterCrop, ToTensor and Normalize; the crop pads before it cuts."""
    values = torch.from_numpy(shortest_edge(picture, size).copy()).permute(2, 0, 1)
    less = [max(crop - side, 0) for side in values.shape[1:]]
    pads = [less[1] // 2, less[1] - less[1] // 2, less[0] // 2, less[0] - less[0] // 2]
    values = torch.nn.functional.pad(values, pads)
    top, left = (round((side - crop) / 2) for side in values.shape[1:])
    return ((values[:, top : top + crop, left : left + crop] / 255 - MEAN) / STD).numpy()


def hps(picture, size, crop):
    """HPSv2's ResizeMaxSize on a tensor, and Normalize."""
    assert size == crop
    height, width, _ = picture.shape
    scale = size / float(max(height, width))
    height, width = (round(side * scale) for side in (height, width))
    values = torch_resize(picture, width, height)
    less = [size - width, size - height]
    pads = [less[0] // 2, less[0] - less[0] // 2, less[1] // 2, less[1] - less[1] // 2]
    return ((torch.nn.functional.pad(values, pads) - MEAN) / STD).numpy()


FITS = {"transformers": transformers, "open_clip": open_clip, "stretch": stretch, "hps": hps}


def prepared(fit, width, height, size, crop):
    picture = noise(width, height)
    values = FITS[fit](picture, size, crop).astype("<f4")
    assert values.shape == (3, crop, crop)
    return {**described(picture), "fit": fit, "size": size, "crop": crop, "input": hexed(values)}


def transparent():
    """A PNG with every alpha, and what it looks like on white."""
    pixels = rng.integers(0, 256, (16, 32, 4), dtype=np.uint8)
    pixels[..., 3] = np.arange(512).reshape(16, 32) % 256
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.save(file, "png")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, image).convert("RGB")
    return {"png": file.getvalue().hex(), "pixels": hexed(np.asarray(flat))}


def main():
    resizes = [
        *[(37, 23, 16, 10), (8, 8, 21, 21), (40, 30, 7, 30), (13, 40, 13, 9), (23, 5, 4, 31)],
        *[(1, 1, 5, 3), (1, 9, 4, 4), (17, 1, 6, 5), (31, 33, 1, 2), (9, 60, 12, 3)],
        *[(24, 18, 23, 17), (5, 5, 5, 5), (30, 7, 2, 1)],
    ]
    inputs = [
        *[("transformers", *shape) for shape in [(40, 29, 16, 16), (13, 29, 16, 16)]],
        *[("transformers", *shape) for shape in [(20, 50, 11, 16), (31, 20, 9, 12)]],
        ("transformers", 19, 33, 20, 15),
        *[("open_clip", *shape) for shape in [(40, 29, 16, 16), (13, 29, 16, 16)]],
        ("open_clip", 30, 25, 16, 16),
        *[("open_clip", *shape) for shape in [(20, 50, 11, 16), (31, 20, 9, 12), (37, 16, 16, 16)]],
        *[("stretch", *shape) for shape in [(40, 29, 16, 16), (13, 29, 16, 11)]],
        *[("hps", *shape) for shape in [(40, 29, 16, 16), (13, 30, 17, 17), (9, 6, 20, 20)]],
        *[("hps", *shape) for shape in [(64, 5, 16, 16), (16, 16, 16, 16), (32, 5, 16, 16)]],
    ]
    golden = {
        "resizes": [resized(*sides) for sides in resizes],
        "inputs": [prepared(*case) for case in inputs],
        "transparent": transparent(),
    }
    (GOLDEN / "pictures.json").write_text(json.dumps(golden, indent=0) + "\n")


main()
