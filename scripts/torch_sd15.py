"""Does the work of an epoch on a Stable Diffusion 1.x folder in PyTorch: its time and memory.

    python scripts/torch_sd15.py --model DIR [--device cuda] [--type f32|bf16] [--images 16]
        [--batch 8] [--steps 10] [--train-steps 5] [--epochs 3] [--size 512] [--checkpointing]

The work of `pcpo-wgpu train --images-per-epoch 16 --batch 8 --steps 10 --train-steps 5
--updates-per-epoch 1 --rank 16 --guidance-scale 5 --initial-noise own`: images by DDIM with noise
and guidance, decoded one by one, and one optimizer step on some of their steps, by diffusers' own
UNet and VAE and a LoRA of peft. The prompt's embeddings are noise: what they say changes no time.
Prints the seconds of each epoch by phase and the peak memory that PyTorch allocated.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, peft 0.21.2.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
GUIDANCE, TOKENS = 5.0, 77


class Trainer:
    """A UNet with its LoRA and optimizer, a VAE, and the sampler's coefficients."""

    def __init__(self, args):
        torch.manual_seed(0)
        self.args, folder = args, Path(args.model)
        options = {"torch_dtype": TYPES[args.type]}
        net = UNet2DConditionModel.from_pretrained(folder / "unet", **options).to(args.device)
        vae = AutoencoderKL.from_pretrained(folder / "vae", **options).to(args.device)
        self.net, self.vae = net.requires_grad_(False), vae.requires_grad_(False)
        net.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS))
        self.lora = [p for p in net.parameters() if p.requires_grad]
        for p in self.lora:
            p.data = p.data.float()
        if args.checkpointing:
            net.enable_gradient_checkpointing()
            net.train()
        self.optimizer = torch.optim.AdamW(self.lora, 3e-4)
        width = net.config.cross_attention_dim
        self.text = torch.randn(2, 1, TOKENS, width, device=args.device)
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            set_alpha_to_one=False,
            steps_offset=1,
        )
        scheduler.set_timesteps(args.steps)
        self.steps = []
        for t in scheduler.timesteps.tolist():
            after = t - 1000 // args.steps
            a, b = (scheduler.alphas_cumprod[max(i, 0)].item() for i in (t, after))
            sigma = scheduler._get_variance(t, after).sqrt().item()
            slope = (1 - b - sigma**2) ** 0.5 - (b * (1 - a) / a) ** 0.5
            self.steps.append((t, (b / a) ** 0.5, slope, sigma))
        self.shape = (net.config.in_channels, args.size // 8, args.size // 8)

    def noise(self, x, t):
        """The guided prediction at latents x."""
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.type == "bf16"):
            text = self.text.expand(2, len(x), *self.text.shape[2:]).flatten(0, 1)
            when = torch.full((2 * len(x),), t, device=x.device)
            u, c = self.net(torch.cat([x, x]), when, text).sample.float().chunk(2)
        return u + GUIDANCE * (c - u)

    @torch.no_grad()
    def rollout(self, count, trained):
        x, kept = torch.randn(count, *self.shape, device=self.args.device), {}
        for i, (t, keep, slope, sigma) in enumerate(self.steps):
            e, z = self.noise(x, t), torch.randn_like(x)
            if i in trained:
                kept[i] = x, e, z
            x = keep * x + slope * e + sigma * z
        return x, kept

    @torch.no_grad()
    def decode(self, latents):
        scaling = self.vae.config.scaling_factor
        pixels = [self.vae.decode((x / scaling).to(self.vae.dtype)[None]).sample for x in latents]
        return torch.cat(pixels).float()

    def update(self, batches, advantages):
        total = sum(len(x) * len(kept) for x, kept in batches)
        for advantage, (_, kept) in zip(advantages, batches):
            for i, (x, old, z) in kept.items():
                t, _, slope, sigma = self.steps[i]
                change = slope / sigma * (self.noise(x, t) - old)
                log_rho = -(change * z + change.square() / 2).mean((1, 2, 3))
                loss = (1e-4 * advantage.abs() - advantage * log_rho).clamp(min=0).sum()
                loss.div(total).backward()
        torch.nn.utils.clip_grad_norm_(self.lora, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def wait(self):
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def epoch(self):
        """Seconds of the rollout, of decoding and of the update."""
        args, marks = self.args, [self.wait()]
        trained = set(range(args.train_steps))
        batches = [self.rollout(args.batch, trained) for _ in range(args.images // args.batch)]
        marks.append(self.wait())
        rewards = torch.stack([self.decode(x).mean((1, 2, 3)) for x, _ in batches])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        marks.append(self.wait())
        self.update(batches, advantages)
        marks.append(self.wait())
        return [b - a for a, b in zip(marks, marks[1:])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--type", default="f32", choices=list(TYPES))
    parser.add_argument(
        "--checkpointing", action="store_true", help="a second forward, less memory"
    )
    counts = {"images": 16, "batch": 8, "steps": 10, "train-steps": 5, "epochs": 3, "size": 512}
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    trainer = Trainer(args)
    for number in range(1, args.epochs + 1):
        parts = trainer.epoch()
        split = "rollout {:.3f}, decode {:.3f}, update {:.3f}".format(*parts)
        print(f"epoch {number}: {sum(parts):.3f} s ({split})", flush=True)
    if args.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
