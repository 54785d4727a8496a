"""Trains the small CLIP that scores emoji: does a picture show "red apple on a white background"?

    npm pack emoji-datasource-google@16.0.0 emojibase-data@17.0.0      # and unpack both
    python scripts/train_emoji_clip.py emoji.npz --images emoji-datasource-google \
        --labels emojibase-data --minutes 20 --checkpoint ../emoji-clip.pt
    python scripts/train_emoji_clip.py emoji.npz --evaluate            # measures a finished folder

EMOJI_NPZ holds `rgba` [N,64,64,4] (8 bits), `captions` [N] and, where it has more than the concepts
to be learnt, `subcategories` [N]. If it is missing, it is written from the two packages. Tokenizer
and held-out prompts are those of `--emoji`.

The loss is contrastive. Every batch is a grid: each of its concepts stands on each of its colours,
and half of the batches take runs of neighbouring, similar concepts. So a wrong caption is often
wrong in one word only. More captions of the same concepts and of others, without pictures, serve as
negatives. So do pictures without captions: bare backgrounds, and emoji cut into squares that are
shuffled. A classifier of concept and of colour, which pictures and captions share, speeds training
up and is thrown away. The weights that are saved are a moving average.

15% of all pairs of concept and colour, and all pairs of prompts-held-out.txt, are kept out of the
batches. The evaluation at the end is on these pairs. `--checkpoint FILE` is written every few
minutes; a run that finds it goes on from there.

Made with Python 3.11, torch 2.15, transformers 5.23.0 on one thread of a CPU.
"""

import argparse
import copy
import math
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from train_emoji_flow import COLORS, PREVIEW, SUBJECTS, emoji
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

NAMES = list(COLORS)
PALETTE = torch.tensor(list(COLORS.values())).float() / 255
SIZE, TOKENS, PROJECTION = 64, 16, 64
TEXT = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
VISION = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4)
# A batch: CONCEPTS x SHADES pictures, less those held out, and MORE captions of other concepts.
CONCEPTS, SHADES, MORE, RUN = 16, 4, 48, 4
# Pictures without captions: one bare background of each shade, and so many shuffled emoji.
SHUFFLED, SQUARE = 6, 16
HELD_OUT = 0.15
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
# The spoilt pictures of the evaluation: standard deviations of the blur (pixels) and the noise.
BLUR, NOISE = 1.0, 0.05


def load(args):
    """Pictures [N,4,64,64] and captions of the concepts to be learnt."""
    if not args.npz.exists():
        folders = [f / "package" if (f / "package").exists() else f for f in args.packages]
        rgba, captions = emoji(*folders)
        bytes_ = (rgba * 255).round().byte().permute(0, 2, 3, 1).numpy()
        np.savez_compressed(args.npz, rgba=bytes_, captions=np.array(captions))
    data = np.load(args.npz)
    rgba, captions = data["rgba"], [str(c) for c in data["captions"]]
    if "subcategories" in data:
        known = [i for i, s in enumerate(data["subcategories"]) if str(s).startswith(SUBJECTS)]
        rgba, captions = rgba[known], [captions[i] for i in known]
    return torch.from_numpy(rgba).permute(0, 3, 1, 2).float() / 255, captions


def hold_out(captions, prompts):
    """Which pairs [concept, colour] training never sees."""
    held = torch.rand(len(captions), len(NAMES), generator=torch.Generator().manual_seed(1))
    held = held < HELD_OUT
    for line in prompts.read_text().splitlines():
        concept, _, rest = line.strip().rpartition(" on a ")
        if concept:
            held[captions.index(concept), NAMES.index(rest.removesuffix(" background"))] = True
    return held


def compose(rgba, color):
    """Pictures over the colours [B,3]."""
    alpha = rgba[:, 3:]
    return rgba[:, :3] * alpha + color[:, :, None, None] * (1 - alpha)


def shuffle(rgba):
    """The squares of each picture in another order; drawn at random."""
    b, c, h, w = rgba.shape
    squares = F.unfold(rgba, SQUARE, stride=SQUARE)
    order = torch.rand(b, 1, squares.shape[2]).argsort(2).expand_as(squares)
    return F.fold(squares.gather(2, order), (h, w), SQUARE, stride=SQUARE)


def blur(x, sigma):
    """Gaussian blur, of another width [B] for each picture."""
    b, c, h, w = x.shape
    kernel = torch.exp(-(torch.arange(-3, 4) ** 2) / (2 * sigma.view(-1, 1) ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)
    x = F.pad(x, (3, 3, 3, 3), mode="replicate").reshape(1, b * c, h + 6, w + 6)
    x = F.conv2d(x, kernel.view(-1, 1, 7, 1), groups=b * c)
    return F.conv2d(x, kernel.view(-1, 1, 1, 7), groups=b * c).view(b, c, h, w)


def block_noise(x, step):
    """Rounds the cosine transform of each 8x8 block as JPEG does, in steps [B]."""
    i = torch.arange(8).float()
    dct = torch.cos(math.pi / 8 * (i + 0.5) * i[:, None]) / 2
    dct[0] /= math.sqrt(2)
    steps = step.view(-1, 1, 1, 1, 1, 1) * (1 + i[:, None] + i) / 4
    blocks = x.unfold(2, 8, 8).unfold(3, 8, 8)
    blocks = dct.T @ (torch.round(dct @ blocks @ dct.T / steps) * steps) @ dct
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(x.shape)


def some(share, x, y):
    """`y` for a random share of the pictures, `x` for the rest."""
    return torch.where(torch.rand(len(x), 1, 1, 1) < share, y, x)


def between(low, high, *shape):
    return low + (high - low) * torch.rand(*shape)


@torch.no_grad()
def augment(rgba, color):
    """Pictures in 0..1, moved, tinted, and spoilt in the ways of a generator and of JPEG."""
    n = len(rgba)
    scale = between(0.85, 1.15, n)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = torch.where(torch.rand(n) < 0.5, -1, 1) / scale
    theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = between(-0.12, 0.12, n, 2)
    # Colours are moved multiplied by alpha, so that no edge takes on a colour from outside.
    solid = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    grid = F.affine_grid(theta, rgba.shape, align_corners=False)
    solid = F.grid_sample(solid, grid, align_corners=False)
    background = (color + between(-0.04, 0.04, n, 3))[:, :, None, None]
    x = solid[:, :3] * between(0.92, 1.08, n, 3, 1, 1) + background * (1 - solid[:, 3:])
    small = F.interpolate(x, size=random.choice((20, 24, 32, 40, 48)), mode="area")
    x = some(0.4, x, F.interpolate(small, size=SIZE, mode="bicubic"))
    x = some(0.4, x, blur(x, between(0.4, 1.4, n)))
    coarse = F.interpolate(torch.randn(n, 3, 16, 16), size=SIZE, mode="bilinear")
    x = some(0.4, x, x + coarse * between(0, 0.08, n, 1, 1, 1))
    x = some(0.5, x, x + torch.randn_like(x) * between(0, 0.1, n, 1, 1, 1))
    x = some(0.3, x, block_noise(x, between(0.05, 0.4, n)))
    return (x.clamp(0, 1) - MEAN) / STD


def build(tokenizer):
    special = dict(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    shared = dict(projection_dim=PROJECTION, hidden_act="quick_gelu")
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=TOKENS, **special)
    return CLIPModel(
        CLIPConfig(
            text_config={**TEXT, **text, **shared},
            vision_config={**VISION, "image_size": SIZE, "patch_size": 8, **shared},
            projection_dim=PROJECTION,
        )
    )


class Classes(nn.Module):
    """Concept and colour of a normalised embedding; used in training only."""

    def __init__(self, concepts):
        super().__init__()
        self.linear = nn.Linear(PROJECTION, concepts + len(NAMES))
        self.scale = nn.Parameter(torch.tensor(2.5))

    def loss(self, embeds, concept, color):
        logits = self.linear(embeds * self.scale.exp())
        n = logits.shape[1] - len(NAMES)
        return F.cross_entropy(logits[:, :n], concept) + F.cross_entropy(logits[:, n:], color)

    def bare(self, embeds):
        """A bare background is to be no concept more than another."""
        logits = self.linear(embeds * self.scale.exp())[:, : -len(NAMES)]
        return -F.log_softmax(logits, 1).mean()


def batch(held):
    """Concepts and colours of the captions, and how many of them, from the first, have pictures."""
    n = len(held)
    if random.random() < 0.5:
        chosen = torch.randperm(n)[:CONCEPTS]
    else:
        starts = RUN * torch.randperm(n // RUN)[: CONCEPTS // RUN] + random.randrange(RUN)
        chosen = ((starts[:, None] + torch.arange(RUN)) % n).flatten()
    order = torch.randperm(len(NAMES))
    others = torch.ones(n, dtype=torch.bool)
    others[chosen] = False
    others = others.nonzero()[:, 0]
    pairs = [
        torch.cartesian_prod(chosen, order[:SHADES]),
        torch.cartesian_prod(chosen, order[SHADES:]),
        torch.stack(
            [
                others[torch.randperm(len(others))[:MORE]],
                order[:SHADES][torch.randint(SHADES, (MORE,))],
            ],
            1,
        ),
    ]
    pairs = [p[~held[p[:, 0], p[:, 1]]] for p in pairs]
    concept, color = torch.cat(pairs).T
    return concept, color, len(pairs[0])


def save(model, tokenizer_folder, out):
    out.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).half().save_pretrained(out)
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    ).save_pretrained(out)
    for file in tokenizer_folder.iterdir():
        shutil.copyfile(file, out / file.name)


@torch.no_grad()
def text_embeds(model, ids):
    parts = [model.get_text_features(part).pooler_output for part in ids.split(500)]
    return F.normalize(torch.cat(parts), dim=-1)


@torch.no_grad()
def image_embeds(model, x):
    x = ((x.clamp(0, 1) * 255).round() / 255 - MEAN) / STD
    parts = [model.get_image_features(part).pooler_output for part in x.split(100)]
    return F.normalize(torch.cat(parts), dim=-1)


def retrieval(images, texts, concept, color):
    """Shares of pictures whose caption is first: of 10 colours, of 100 concepts, of all held out.

    `texts` [concepts, colours, d] are all captions.
    """
    row = torch.arange(len(images))
    scores = torch.einsum("nd,ncd->nc", images, texts[concept])
    colors = scores.argmax(1) == color
    random_ = torch.rand(len(images), len(texts), generator=torch.Generator().manual_seed(2))
    random_[row, concept] = -1
    hundred = random_.argsort(1)[:, :100]
    scores = torch.einsum("nd,nkd->nk", images, texts[hundred, color[:, None]])
    concepts = hundred[row, scores.argmax(1)] == concept
    everything = (images @ texts[concept, color].T).argmax(1) == row
    return [100 * share.float().mean().item() for share in (colors, concepts, everything)]


@torch.no_grad()
def evaluate(model, rgba, held, ids, kinds=("clean", "blur and noise"), vae=None):
    """Prints the retrieval of held-out pairs; `ids` [concepts, colours, tokens]."""
    model.eval()
    texts = text_embeds(model, ids.flatten(0, 1)).view(*ids.shape[:2], -1)
    concept, color = held.nonzero().T
    x = compose(rgba[concept], PALETTE[color])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    for kind in kinds:
        y = x
        if kind == "blur and noise":
            y = blur(x, torch.full((len(x),), BLUR)) + NOISE * noise
        elif kind == "through the VAE":
            y = torch.cat([vae(part * 2 - 1).sample for part in x.split(50)]) / 2 + 0.5
        shares = retrieval(image_embeds(model, y), texts, concept, color)
        print(
            f"{kind}, {len(x)} held-out pairs: {shares[0]:.1f}% of 10 colours, {shares[1]:.1f}% "
            f"of 100 concepts, {shares[2]:.1f}% of all held-out captions",
            flush=True,
        )
    return texts


@torch.no_grad()
def evaluate_scores(model, texts, rgba, held):
    """Prints mean scores of right and wrong captions, and of pictures of the background alone."""
    concept, color = held.nonzero().T
    images = image_embeds(model, compose(rgba[concept], PALETTE[color]))
    scores = torch.einsum("nd,kcd->nkc", images, texts)
    row = torch.arange(len(scores))
    true, same_concept = scores[row, concept, color], scores[row, concept].sum(1)
    same_color, every = scores[row, :, color].sum(1), scores.flatten(1).sum(1)
    k, c = texts.shape[:2]
    means = (
        true,
        (same_concept - true) / (c - 1),
        (same_color - true) / (k - 1),
        (every - same_concept - same_color + true) / ((k - 1) * (c - 1)),
    )
    names = ("true caption", "colour wrong", "concept wrong", "both wrong")
    print("mean score,", ", ".join(f"{n} {m.mean():.3f}" for n, m in zip(names, means)))
    blank = image_embeds(model, PALETTE[:, :, None, None].expand(-1, -1, SIZE, SIZE))
    scores = torch.einsum("cd,kcd->kc", blank, texts)
    torch.manual_seed(4)
    shuffled = image_embeds(model, compose(shuffle(rgba[concept]), PALETTE[color]))
    shuffled = (shuffled * texts[concept, color]).sum(1)
    for name, other in (("bare background", scores[concept, color]), ("shuffled", shuffled)):
        print(
            f"{name}: mean score {other.mean():.3f}, best {other.max():.3f}; below the true "
            f"picture for {100 * (other < true).float().mean():.1f}% of the captions"
        )


def evaluate_preview(texts, captions, model, file):
    """Prints where the true caption stands among all, for the generated pictures of a preview."""
    sheet = np.asarray(Image.open(file).convert("RGB"))[::2, ::2].reshape(2, SIZE, 8, SIZE, 3)
    x = torch.from_numpy(sheet.copy()).permute(0, 2, 4, 1, 3).flatten(0, 1).float() / 255
    embeds = image_embeds(model, x)
    every = texts.flatten(0, 1)
    for prompt, embed in zip(PREVIEW, embeds):
        concept, _, rest = prompt.rpartition(" on a ")
        scores = every @ embed
        best = divmod(scores.argmax().item(), len(NAMES))
        found = f"{captions[best[0]]} on a {NAMES[best[1]]} background"
        rank = "no background named"
        if concept:
            color = NAMES.index(rest.removesuffix(" background"))
            true = scores[captions.index(concept) * len(NAMES) + color]
            rank = f"score {true:.3f}, place {1 + (scores > true).sum().item()} of {len(every)}"
        print(f"{prompt}: {rank}; best {scores.max():.3f}, {found}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("npz", type=Path, metavar="EMOJI_NPZ")
    parser.add_argument("--images", type=Path, default=Path("emoji-datasource-google"))
    parser.add_argument("--labels", type=Path, default=Path("emojibase-data"))
    parser.add_argument("--emoji", type=Path, default=Path("models/emoji"))
    parser.add_argument("--out", type=Path, default=Path("models/emoji-clip"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--checkpoint", type=Path, help="written, and gone on from if it exists")
    parser.add_argument("--evaluate", action="store_true", help="measure --out, train nothing")
    args = parser.parse_args()
    args.packages = args.images, args.labels
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(args.threads)

    tokenizer = CLIPTokenizer.from_pretrained(args.emoji / "tokenizer")
    rgba, captions = load(args)
    held = hold_out(captions, args.emoji / "prompts-held-out.txt")
    texts = [f"{c} on a {name} background" for c in captions for name in NAMES]
    longest = dict(padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    ids = tokenizer(texts, **longest).input_ids.view(len(captions), len(NAMES), TOKENS)
    print(f"{len(captions)} concepts, {held.sum()} of {held.numel()} pairs held out", flush=True)
    if args.evaluate:
        from diffusers import AutoencoderKL

        model = CLIPModel.from_pretrained(args.out).float()
        vae = AutoencoderKL.from_pretrained(args.emoji / "vae").float().eval()
        kinds = ("clean", "blur and noise", "through the VAE")
        every = evaluate(model, rgba, held, ids, kinds, vae)
        evaluate_scores(model, every, rgba, held)
        evaluate_preview(every, captions, model, args.emoji / "preview.png")
        return

    model = build(tokenizer)
    average = copy.deepcopy(model).eval()
    classes = Classes(len(captions))
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    parameters = [*model.parameters(), *classes.parameters()]
    optimizer = torch.optim.AdamW(parameters, args.rate, betas=(0.9, 0.98), weight_decay=0.02)
    parts = dict(model=model, average=average, classes=classes, optimizer=optimizer)
    step, before, running = 0, 0.0, None
    if args.checkpoint and args.checkpoint.exists():
        state = torch.load(args.checkpoint, weights_only=False)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step, before, running = state["step"], state["minutes"], state["running"]
        torch.set_rng_state(state["torch"])
        random.setstate(state["random"])

    def write(minutes):
        save(average, args.emoji / "tokenizer", args.out)
        if args.checkpoint:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= dict(step=step, minutes=minutes, running=running)
            state |= {"torch": torch.get_rng_state(), "random": random.getstate()}
            torch.save(state, args.checkpoint.with_suffix(".part"))
            args.checkpoint.with_suffix(".part").replace(args.checkpoint)

    start, saved = time.time(), before
    while (minutes := before + (time.time() - start) / 60) < args.minutes:
        cosine = 0.5 + 0.5 * math.cos(math.pi * minutes / args.minutes)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 100) * max(0.01, cosine)
        concept, color, n = batch(held)
        shades, some_ = color[:n].unique(), torch.randperm(n)[:SHUFFLED]
        pictures = rgba[concept[:n]]
        spoilt = torch.cat([torch.zeros_like(pictures[: len(shades)]), shuffle(pictures[some_])])
        x = augment(
            torch.cat([pictures, spoilt]),
            PALETTE[torch.cat([color[:n], shades, color[some_]])],
        )
        tokens = ids[concept, color]
        used = (tokens != tokenizer.eos_token_id).sum(1).max().item() + 1
        output = model(input_ids=tokens[:, :used], pixel_values=x)
        logits, target = output.logits_per_image, torch.arange(n)
        loss = (F.cross_entropy(logits[:n], target) + F.cross_entropy(logits[:, :n].T, target)) / 2
        bare = output.image_embeds[n : n + len(shades)]
        extra = classes.loss(output.image_embeds[:n], concept[:n], color[:n])
        extra = extra + classes.loss(output.text_embeds, concept, color)
        optimizer.zero_grad()
        (loss + 0.5 * extra + 0.2 * classes.bare(bare)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
            decay = min(0.995, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        loss, extra = loss.item(), extra.item()
        running = loss if running is None else 0.98 * running + 0.02 * loss
        step += 1
        if step % 50 == 0:
            print(
                f"{minutes:.1f} min, step {step}, loss {running:.3f}, now {loss:.3f} "
                f"and classes {extra:.3f}",
                flush=True,
            )
        if minutes - saved > 4:
            saved = minutes
            write(minutes)
            evaluate(average, rgba, held, ids)
    write(args.minutes)
    print(f"{step} steps, loss {running:.3f}; written to {args.out}")
    evaluate(CLIPModel.from_pretrained(args.out).float(), rgba, held, ids)


if __name__ == "__main__":
    main()
