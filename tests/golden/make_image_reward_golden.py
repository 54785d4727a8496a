"""Makes tests/golden/reward/image-reward: a tiny ImageReward and its scores, image-reward.json.

    python tests/golden/make_image_reward_golden.py

The folder has ImageReward.pt (a plain state dict with ImageReward's names, stored as f16),
med_config.json and vocab.txt. As in the real files, med_config.json's encoder_width is not the
vision width (ImageReward overwrites it), its vocab_size is two more than vocab.txt has ([DEC] and
[ENC], which scoring never uses), the vision tower has heads of 64, and the state dict also holds
position_ids and the unused vision_proj and text_proj.

The references come from transformers' own layers with mapped weights, in f32: ViTModel (eps 1e-6,
qkv split in three) and BertModel with cross-attention (no causal mask, token types zeroed). A plain
forward written from the state dict has to agree. Pictures are put over white, then resized by
torchvision's Resize and CenterCrop on Pillow pictures. The reward is (mlp - MEAN) / STD.

The JSON has: pictures, prompts, tokens, attention_mask, image_tokens (the first picture's and the
last's vision tokens), scores [picture][prompt].

Made with Python 3.11, torch 2.15, transformers 5.23.0, torchvision 0.29.2, pillow 13.0.0.
"""

import json
import math
import os
import shutil
import string

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as functional
from reward_common import MEAN as PIXEL_MEAN
from reward_common import (
    PROMPTS,
    REWARD,
    SIZE,
    least_spread,
    load_pictures,
    numbers,
    randomise,
    write_bytes,
    write_json,
)
from reward_common import STD as PIXEL_STD
from torchvision import transforms
from transformers import BertConfig, BertModel, BertTokenizer, ViTConfig, ViTModel

FOLDER = REWARD / "image-reward"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
LENGTH = 35
WIDTH, DEPTH, VISION_MLP, PATCH, HEAD = 128, 2, 128, 16, 64
MED = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 128,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 124,
    "encoder_width": 64,
    "add_cross_attention": True,
}
WORDS = (
    "a photo of cat red heart on black back ##ground two dog the and blue tree with big face "
    "yellow smil ##ing mountain apple cafe off tail white picture ##ed in br ##ule ##le dark light "
    "no yes"
)


def vocabulary():
    letters = list(string.ascii_lowercase)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += list("!%&'(),-.;?") + list("0123459") + letters[1:] + [f"##{x}" for x in letters]
    words += [f"##{digit}" for digit in "0123456789"] + WORDS.split()
    assert len(words) == len(set(words))
    return words


def linear(shapes, name, out, into):
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = [out, into], [out]


def norm(shapes, name, width):
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = [width]


def state_shapes():
    """The names and shapes of ImageReward.pt, in its order."""
    shapes = {}
    vision, text, hidden = "blip.visual_encoder", "blip.text_encoder", MED["hidden_size"]
    shapes[f"{vision}.cls_token"] = [1, 1, WIDTH]
    shapes[f"{vision}.pos_embed"] = [1, (SIZE // PATCH) ** 2 + 1, WIDTH]
    shapes[f"{vision}.patch_embed.proj.weight"] = [WIDTH, 3, PATCH, PATCH]
    shapes[f"{vision}.patch_embed.proj.bias"] = [WIDTH]
    for i in range(DEPTH):
        block = f"{vision}.blocks.{i}"
        norm(shapes, f"{block}.norm1", WIDTH)
        linear(shapes, f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(shapes, f"{block}.attn.proj", WIDTH, WIDTH)
        norm(shapes, f"{block}.norm2", WIDTH)
        linear(shapes, f"{block}.mlp.fc1", VISION_MLP, WIDTH)
        linear(shapes, f"{block}.mlp.fc2", WIDTH, VISION_MLP)
    norm(shapes, f"{vision}.norm", WIDTH)
    embeddings = f"{text}.embeddings"
    shapes[f"{embeddings}.position_ids"] = [1, MED["max_position_embeddings"]]
    shapes[f"{embeddings}.word_embeddings.weight"] = [MED["vocab_size"], hidden]
    shapes[f"{embeddings}.position_embeddings.weight"] = [MED["max_position_embeddings"], hidden]
    norm(shapes, f"{embeddings}.LayerNorm", hidden)
    for i in range(MED["num_hidden_layers"]):
        layer = f"{text}.encoder.layer.{i}"
        for kind, into in (("attention", hidden), ("crossattention", WIDTH)):
            linear(shapes, f"{layer}.{kind}.self.query", hidden, hidden)
            linear(shapes, f"{layer}.{kind}.self.key", hidden, into)
            linear(shapes, f"{layer}.{kind}.self.value", hidden, into)
            linear(shapes, f"{layer}.{kind}.output.dense", hidden, hidden)
            norm(shapes, f"{layer}.{kind}.output.LayerNorm", hidden)
        linear(shapes, f"{layer}.intermediate.dense", MED["intermediate_size"], hidden)
        linear(shapes, f"{layer}.output.dense", hidden, MED["intermediate_size"])
        norm(shapes, f"{layer}.output.LayerNorm", hidden)
    linear(shapes, "blip.vision_proj", 16, WIDTH)
    linear(shapes, "blip.text_proj", 16, hidden)
    sizes = [hidden, 40, 16, 8, 4, 1]
    for place, into, out in zip([0, 2, 4, 6, 7], sizes, sizes[1:]):
        linear(shapes, f"mlp.layers.{place}", out, into)
    return shapes


def make_state():
    state = {name: torch.zeros(shape) for name, shape in state_shapes().items()}
    randomise(state, seed=81)
    state = {name: tensor.half() for name, tensor in state.items()}
    name = "blip.text_encoder.embeddings.position_ids"
    state[name] = torch.arange(MED["max_position_embeddings"])[None]
    return state


def split(state, prefix):
    return {n[len(prefix) :]: t.float() for n, t in state.items() if n.startswith(prefix)}


# With transformers' layers


def load(model, tensors):
    """Loads tensors that have to be exactly the model's."""
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def vision_model(state):
    weights = split(state, "blip.visual_encoder.")
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=WIDTH // HEAD,
        intermediate_size=VISION_MLP,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        image_size=SIZE,
        patch_size=PATCH,
        qkv_bias=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = ViTModel(config, add_pooling_layer=False)
    renamed = {
        "embeddings.cls_token": weights["cls_token"],
        "embeddings.position_embeddings": weights["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": weights["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": weights["patch_embed.proj.bias"],
        "layernorm.weight": weights["norm.weight"],
        "layernorm.bias": weights["norm.bias"],
    }
    names = set(model.state_dict())
    new = any(name.startswith("layers.") for name in names)
    for i in range(DEPTH):
        old, block = f"blocks.{i}", f"layers.{i}" if new else f"encoder.layer.{i}"
        attention = f"{block}.attention" if new else f"{block}.attention.attention"
        parts = ("q_proj", "k_proj", "v_proj") if new else ("query", "key", "value")
        out = f"{block}.attention.o_proj" if new else f"{block}.attention.output.dense"
        fc1 = f"{block}.mlp.fc1" if new else f"{block}.intermediate.dense"
        fc2 = f"{block}.mlp.fc2" if new else f"{block}.output.dense"
        for kind in ("weight", "bias"):
            for part, one in zip(parts, weights[f"{old}.attn.qkv.{kind}"].chunk(3)):
                renamed[f"{attention}.{part}.{kind}"] = one
            renamed[f"{out}.{kind}"] = weights[f"{old}.attn.proj.{kind}"]
            renamed[f"{fc1}.{kind}"] = weights[f"{old}.mlp.fc1.{kind}"]
            renamed[f"{fc2}.{kind}"] = weights[f"{old}.mlp.fc2.{kind}"]
            renamed[f"{block}.layernorm_before.{kind}"] = weights[f"{old}.norm1.{kind}"]
            renamed[f"{block}.layernorm_after.{kind}"] = weights[f"{old}.norm2.{kind}"]
    return load(model, renamed)


def text_model(state):
    """BertModel builds cross-attention from hidden_size: its keys and values are replaced."""
    weights = split(state, "blip.text_encoder.")
    weights.pop("embeddings.position_ids")
    fields = {name: MED[name] for name in MED if name not in ("encoder_width", "architectures")}
    # A decoder in name only, which it needs for cross-attention: text_features gives full masks.
    config = BertConfig(**fields, is_decoder=True, attn_implementation="eager")
    model = BertModel(config, add_pooling_layer=False)
    for layer in model.encoder.layer:
        cross = layer.crossattention.self
        cross.key = torch.nn.Linear(WIDTH, MED["hidden_size"])
        cross.value = torch.nn.Linear(WIDTH, MED["hidden_size"])
    weights["embeddings.token_type_embeddings.weight"] = torch.zeros(2, MED["hidden_size"])
    return load(model, weights)


def text_features(model, tokens, mask, image):
    """last_hidden_state[:, 0]: every token sees every token that is no padding, and the image."""
    count = tokens.shape[0]
    full = mask[:, None, None, :].expand(count, 1, LENGTH, LENGTH)
    additive = (1.0 - full.float()) * torch.finfo(torch.float32).min
    out = model(
        input_ids=tokens,
        attention_mask=additive,
        encoder_hidden_states=image.expand(count, -1, -1),
        use_cache=False,
    )
    return out.last_hidden_state[:, 0]


def mlp(state, x):
    for place in (0, 2, 4, 6, 7):
        weight, bias = state[f"mlp.layers.{place}.weight"], state[f"mlp.layers.{place}.bias"]
        x = functional.linear(x, weight.float(), bias.float())
    return x


# By hand


def attend(q, k, v, heads, mask=None):
    def parted(x):
        return x.unflatten(-1, (heads, -1)).transpose(-3, -2)

    scores = parted(q) @ parted(k).transpose(-1, -2) / math.sqrt(q.shape[-1] // heads)
    if mask is not None:
        scores = scores + (1.0 - mask[:, None, None, :].float()) * -10000.0
    return (scores.softmax(-1) @ parted(v)).transpose(-3, -2).flatten(-2)


class Plain:
    """The forward as BLIP's vit.py and med.py do it, straight from the state dict."""

    def __init__(self, state, dtype):
        self.state = {name: tensor.to(dtype) for name, tensor in state.items()}

    def linear(self, name, x):
        return functional.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name, x, eps):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return functional.layer_norm(x, weight.shape, weight, bias, eps)

    def vision(self, images):
        name, state = "blip.visual_encoder", self.state
        weight, bias = (state[f"{name}.patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
        x = functional.conv2d(images, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)
        x = torch.cat([state[f"{name}.cls_token"].expand(len(x), -1, -1), x], 1)
        x = x + state[f"{name}.pos_embed"]
        for i in range(DEPTH):
            block = f"{name}.blocks.{i}"
            qkv = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6))
            out = attend(*qkv.chunk(3, dim=-1), WIDTH // HEAD)
            x = x + self.linear(f"{block}.attn.proj", out)
            y = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", functional.gelu(y))
        return self.norm(f"{name}.norm", x, 1e-6)

    def text(self, tokens, mask, image):
        name, state, eps = "blip.text_encoder", self.state, MED["layer_norm_eps"]
        embeddings, heads = f"{name}.embeddings", MED["num_attention_heads"]
        x = state[f"{embeddings}.word_embeddings.weight"][tokens]
        x = x + state[f"{embeddings}.position_embeddings.weight"][: tokens.shape[1]]
        x = self.norm(f"{embeddings}.LayerNorm", x, eps)
        for i in range(MED["num_hidden_layers"]):
            layer = f"{name}.encoder.layer.{i}"
            for kind in ("attention", "crossattention"):
                source, shown = (x, mask) if kind == "attention" else (image, None)
                source = source.expand(len(x), -1, -1)
                q = self.linear(f"{layer}.{kind}.self.query", x)
                k = self.linear(f"{layer}.{kind}.self.key", source)
                v = self.linear(f"{layer}.{kind}.self.value", source)
                out = self.linear(f"{layer}.{kind}.output.dense", attend(q, k, v, heads, shown))
                x = self.norm(f"{layer}.{kind}.output.LayerNorm", out + x, eps)
            y = functional.gelu(self.linear(f"{layer}.intermediate.dense", x))
            y = self.linear(f"{layer}.output.dense", y)
            x = self.norm(f"{layer}.output.LayerNorm", y + x, eps)
        x = x[:, 0]
        for place in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{place}", x)
        return x[:, 0]


def prepare(picture):
    steps = transforms.Compose(
        [
            transforms.Resize(SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize(PIXEL_MEAN, PIXEL_STD),
        ]
    )
    return steps(picture)


@torch.no_grad()
def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    words = vocabulary()
    assert len(words) == MED["vocab_size"] - 2, len(words)
    write_bytes(FOLDER / "vocab.txt", ("\n".join(words) + "\n").encode())
    write_bytes(FOLDER / "med_config.json", (json.dumps(MED, indent=2) + "\n").encode())
    state = make_state()
    torch.save(state, FOLDER / "ImageReward.pt")
    state = torch.load(FOLDER / "ImageReward.pt", weights_only=True)

    tokenizer = BertTokenizer.from_pretrained(FOLDER)
    text = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    tokens, mask = text.input_ids, text.attention_mask
    for row, shown in zip(tokens, mask):
        print(" ".join(tokenizer.convert_ids_to_tokens(row[shown.bool()].tolist())))
    pictures = load_pictures()
    images = torch.stack([prepare(picture) for picture in pictures.values()])

    vision, bert = vision_model(state), text_model(state)
    features = vision(pixel_values=images).last_hidden_state
    plain, exact = Plain(state, torch.float32), Plain(state, torch.float64)
    torch.testing.assert_close(features, plain.vision(images), rtol=1e-4, atol=1e-5)
    scores = []
    for i in range(len(images)):
        out = mlp(state, text_features(bert, tokens, mask, features[i : i + 1]))[:, 0]
        torch.testing.assert_close(out, plain.text(tokens, mask, features[i]), rtol=1e-4, atol=1e-5)
        wide = exact.text(tokens, mask, exact.vision(images[i : i + 1].double()))
        torch.testing.assert_close(out.double(), wide, rtol=1e-4, atol=1e-5)
        scores.append(numbers((out - MEAN) / STD))
    least_spread("image-reward", scores)
    write_json(
        REWARD / "image-reward.json",
        {
            "pictures": list(pictures),
            "prompts": PROMPTS,
            "tokens": tokens.tolist(),
            "attention_mask": mask.tolist(),
            "image_tokens": {
                name: [[round(x, 8) for x in row] for row in numbers(features[i])]
                for i, name in ((0, list(pictures)[0]), (len(pictures) - 1, list(pictures)[-1]))
            },
            "scores": scores,
        },
    )
    for path in [FOLDER, *FOLDER.iterdir()]:
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    main()
