"""Trains the embedded flow model with PCPO in PyTorch and times its epochs, to compare with ours.

    python scripts/torch_flow.py [--model models/emoji-flow] [--epochs 3] [--threads 2] [--seed 0]

Does the work of one of our epochs of the model's train.toml, without evaluation, by diffusers' own
modules and a LoRA of peft on the CPU in f32; prints the seconds and the mean reward of each epoch.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, peft 0.21.2.
"""

import argparse
import math
import time
import tomllib
from collections import namedtuple
from pathlib import Path

import torch
from peft import LoraConfig
from reference_flow import load_pipeline, load_transformer

BATCH, ETA = 8, 0.7
TARGETS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()


# x' = a x - b v + sigma z at time t, and the credit of the step.
Step = namedtuple("Step", "t a b sigma weight")


def schedule(count, shift):
    """The steps of Flow-GRPO's SDE with proportionate credit (docs/METHOD.md, 6b)."""
    u = [1 - i / count for i in range(count + 1)]
    times = [shift * v / (1 + (shift - 1) * v) for v in u]
    rows, native = [], []
    for i, (t, after) in enumerate(zip(times, times[1:])):
        s, dt = ETA * math.sqrt(t / (1 - (t if i else after))), t - after
        drift, sigma = s * s / (2 * t), s * math.sqrt(dt)
        rows.append((t, dt, 1 - drift * dt, (1 + drift * (1 - t)) * dt, sigma))
        native.append(rows[-1][3] / sigma)
    zeta = sum(native[1:]) + native[1]
    return [Step(t, a, b, sigma, zeta * dt) for t, dt, a, b, sigma in rows]


def bluer(images):
    """The reward color:blue of images in [-1, 1]: minus the mean distance to blue, at most 1."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round()
    blue = torch.tensor([0.0, 0.0, 255.0]).view(3, 1, 1)
    return -(pixels - blue).norm(dim=1).mean((1, 2)) / (255 * math.sqrt(3))


class Trainer:
    """A model, its LoRA and optimizer, and the embeddings of the job's prompts."""

    def __init__(self, folder, seed):
        torch.manual_seed(seed)
        self.job = job = tomllib.loads((Path(folder) / "train.toml").read_text())
        family, net = load_transformer(folder)
        pipe = load_pipeline(family, folder, net)
        with torch.no_grad():
            embeddings = family.embed(pipe, job["prompt"], job["max-sequence-length"])
        rows = torch.arange(len(job["prompt"])).repeat_interleave(job["group-size"])
        self.cond = [embeddings[f"out.{n}prompt_embeds"][rows] for n in ("", "pooled_")]
        self.uncond = [embeddings[f"out.negative_{n}prompt_embeds"] for n in ("", "pooled_")]
        self.net, self.vae = net.requires_grad_(False), pipe.vae.requires_grad_(False)
        lora = {"r": job["rank"], "lora_alpha": job["rank"], "target_modules": TARGETS}
        net.add_adapter(LoraConfig(**lora))
        self.lora = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.lora, job["learning-rate"], weight_decay=1e-4)
        self.steps = schedule(job["steps"], pipe.scheduler.config.shift)
        self.shape = (net.config.in_channels, *[net.config.sample_size] * 2)
        self.updates = 0

    def velocity(self, x, t, images):
        """The guided velocity at the latents of some of the epoch's images."""
        none = [u.expand(len(x), *u.shape[1:]) for u in self.uncond]
        text, pooled = (torch.cat([u, c[images]]) for u, c in zip(none, self.cond))
        when = torch.full((2 * len(x),), 1000 * t)
        u, c = self.net(torch.cat([x, x]), text, pooled, when).sample.chunk(2)
        return u + self.job["guidance-scale"] * (c - u)

    @torch.no_grad()
    def rollout(self, images, trained):
        """(latents, {step: (x, velocity, noise)} of the trained steps) of a batch."""
        x, kept = torch.randn(len(images), *self.shape), {}
        for i, step in enumerate(self.steps):
            v, z = self.velocity(x, step.t, images), torch.randn_like(x)
            if i in trained:
                kept[i] = x, v, z
            x = step.a * x - step.b * v + step.sigma * z
        return x, kept

    @torch.no_grad()
    def decode(self, latents):
        scaling, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor
        return self.vae.decode(latents / scaling + shift).sample

    def update(self, batches, advantages):
        """One step of the optimizer on batches of (images, kept steps)."""
        xi, total = self.job["clip-range"], sum(len(images) * len(kept) for images, kept in batches)
        for images, kept in batches:
            for i, (x, old, z) in kept.items():
                step = self.steps[i]
                change = step.weight * (self.velocity(x, step.t, images) - old)
                log_rho = -(change * z + change.square() / 2).mean((1, 2, 3))
                if self.updates == 0:
                    largest = log_rho.abs().max().item()
                    assert largest < 1e-4, f"|log rho| is {largest} before the first update"
                gain = advantages[images] * log_rho
                (xi * advantages[images].abs() - gain).clamp(min=0).sum().div(total).backward()
        torch.nn.utils.clip_grad_norm_(self.lora, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1

    def epoch(self):
        """(seconds of the rollout, of decoding with rewards, of the updates; the mean reward)."""
        job, marks = self.job, [time.perf_counter()]
        trained = set(torch.randperm(job["steps"] - 1)[: job["train-steps"]].tolist())
        batches = torch.arange(job["images-per-epoch"]).split(BATCH)
        latents, kept = zip(*(self.rollout(images, trained) for images in batches))
        marks.append(time.perf_counter())
        rewards = torch.cat([bluer(self.decode(x)) for x in latents])
        groups = rewards.double().view(-1, job["group-size"])
        spread = groups.std(1, correction=0, keepdim=True) + 1e-8
        advantages = ((groups - groups.mean(1, keepdim=True)) / spread).clamp(-5, 5).flatten()
        marks.append(time.perf_counter())
        pairs, share = list(zip(batches, kept)), len(batches) // job["updates-per-epoch"]
        for first in range(0, len(pairs), share):
            self.update(pairs[first : first + share], advantages.float())
        marks.append(time.perf_counter())
        return *(b - a for a, b in zip(marks, marks[1:])), rewards.mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/emoji-flow", metavar="DIR")
    for name, default in {"epochs": 3, "threads": 2, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer = Trainer(args.model, args.seed)
    for number in range(1, args.epochs + 1):
        *parts, reward = trainer.epoch()
        split = "rollout {:.2f}, decode and reward {:.2f}, update {:.2f}".format(*parts)
        print(f"epoch {number}: {sum(parts):.2f} s ({split}), reward {reward:.4f}", flush=True)


if __name__ == "__main__":
    main()
