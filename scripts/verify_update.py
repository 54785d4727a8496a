"""Recomputes a policy-gradient update with diffusers and peft and compares it with what our program dumped.

    python scripts/verify_update.py DUMP.safetensors --model MODEL_DIR [--tolerance 1e-3] [--dtype float64]

The dump holds the strings objective, clip_range, guidance_scale, kl_beta, guidance_gradient, prediction_type,
lora_rank, lora_alpha, lora_targets as metadata, and in f32 (N samples, S trained steps):

    prompt_embeds, negative_prompt_embeds           [N, T, D]
    timesteps, alphas_cumprod, weights, weights_native   [S]     weights: the credit rule's, weights_native: the KL's
    latents, noise, eps_old                         [S, N, C, H, W]
    advantages                                      [N]
    log_rho                                         [S, N]
    lora.KEY, grad.KEY          KEY as diffusers saves it: unet.(module).lora_A.weight, unet.(module).lora_B.weight

The update, with Delta = eps - eps_old, z the noise, w the weights, A the advantages and xi the clip range:

    log rho = -mean_D[w Delta z + 1/2 w^2 Delta^2]
    loss    = mean over N and S of the objective + kl_beta * 1/2 mean_D[w_native^2 (eps - eps_ref)^2]

eps_ref is the network without its adapter. Errors are relative to the largest entry of the tensor recomputed here.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, peft 0.21.2, safetensors 0.8.
"""

import argparse
import math
import sys
from dataclasses import dataclass, fields

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from reference import load_component
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

TENSORS = [
    "prompt_embeds", "negative_prompt_embeds", "timesteps", "alphas_cumprod", "latents", "noise", "eps_old",
    "advantages", "weights", "weights_native", "log_rho",
]
CHOICES = {
    "objective": ["ppo-clip", "log-ratio", "log-hinge"],
    "guidance_gradient": ["both", "conditional"],
    "prediction_type": ["epsilon", "v_prediction"],
}


@dataclass
class Settings:
    """The dump's metadata."""

    objective: str
    clip_range: float
    guidance_scale: float
    kl_beta: float
    guidance_gradient: str
    prediction_type: str
    lora_rank: int
    lora_alpha: float
    lora_targets: str

    @classmethod
    def parse(cls, metadata):
        missing = [field.name for field in fields(cls) if field.name not in metadata]
        if missing:
            raise ValueError(f"the dump's metadata lacks {', '.join(missing)}")
        values = {field.name: field.type(metadata[field.name]) for field in fields(cls)}
        for name, choices in CHOICES.items():
            if values[name] not in choices:
                raise ValueError(f"metadata {name} is {values[name]!r}, not one of {', '.join(choices)}")
        return cls(**values)


def read_dump(path, dtype):
    """(settings, tensors, adapter, gradients) of a dump; the last two by diffusers' LoRA key."""
    with safe_open(path, "pt") as file:
        settings = Settings.parse(file.metadata() or {})
        everything = {name: file.get_tensor(name).to(dtype) for name in file.keys()}
    missing = [name for name in TENSORS if name not in everything]
    if missing:
        raise ValueError(f"the dump lacks {', '.join(missing)}")
    adapter, gradients = (
        {name.removeprefix(prefix): tensor for name, tensor in everything.items() if name.startswith(prefix)}
        for prefix in ("lora.", "grad.")
    )
    if adapter.keys() != gradients.keys():
        raise ValueError(f"lora. and grad. differ in their keys: {sorted(adapter.keys() ^ gradients.keys())[:4]}")
    return settings, {name: everything[name] for name in TENSORS}, adapter, gradients


def attach_adapter(unet, settings, adapter):
    """Adds the dump's adapter to the UNet through peft; returns its parameters by diffusers' key."""
    unet.add_adapter(
        LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=settings.lora_targets.split(",")
        )
    )
    parameters = {
        "unet." + name.replace(".default.", "."): parameter
        for name, parameter in unet.named_parameters()
        if ".lora_" in name
    }
    if parameters.keys() != adapter.keys():
        raise ValueError(
            f"peft makes {len(parameters)} LoRA tensors for targets {settings.lora_targets}, the dump has "
            f"{len(adapter)}; only in peft: {sorted(parameters.keys() - adapter.keys())[:3]}, only in the dump: "
            f"{sorted(adapter.keys() - parameters.keys())[:3]}"
        )
    for key, parameter in parameters.items():
        if parameter.shape != adapter[key].shape:
            raise ValueError(f"{key}: {list(adapter[key].shape)} in the dump, {list(parameter.shape)} in peft")
        with torch.no_grad():
            parameter.copy_(adapter[key])
        parameter.requires_grad_(True)
    return parameters


def guided_noise(unet, settings, data, step):
    """eps [N, C, H, W] of a step: each branch turned into eps, then guided."""
    latents, alpha_bar = data["latents"][step], data["alphas_cumprod"][step]
    timestep = data["timesteps"][step].expand(len(latents))

    def eps(hidden_states):
        output = unet(latents, timestep, encoder_hidden_states=hidden_states).sample
        if settings.prediction_type == "v_prediction":
            output = alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * latents
        return output

    cond = eps(data["prompt_embeds"])
    if settings.guidance_scale <= 1:
        return cond
    with torch.set_grad_enabled(torch.is_grad_enabled() and settings.guidance_gradient == "both"):
        uncond = eps(data["negative_prompt_embeds"])
    return uncond + settings.guidance_scale * (cond - uncond)


def clipped_objective(settings, log_rho, advantages):
    """(objective, clipped) of each sample, a clipped one as a constant: its gradient is 0.

    Clipping is decided in f64 and by log rho, because rho - 1 cancels in f32.
    """
    xi, exact = settings.clip_range, log_rho.detach().double()
    lower, upper = (math.log1p(-xi), math.log1p(xi)) if settings.objective == "ppo-clip" else (-xi, xi)
    clipped = ((advantages > 0) & (exact > upper)) | ((advantages < 0) & (exact < lower))
    objective = {
        "ppo-clip": lambda: -advantages * log_rho.exp(),
        "log-ratio": lambda: -advantages * (1 + log_rho),
        "log-hinge": lambda: xi * advantages.abs() - advantages * log_rho,
    }[settings.objective]()
    return torch.where(clipped, objective.detach(), objective), clipped


def recompute(unet, settings, data):
    """Runs the update backward into the adapter's gradients; returns log rho and the numbers that show it did work."""
    steps, advantages = len(data["timesteps"]), data["advantages"]
    log_rhos, largest_delta, kl_sum, clipped_up, clipped_down, flipped = [], 0.0, 0.0, 0, 0, 0
    for step in range(steps):
        eps = guided_noise(unet, settings, data, step)
        delta, weight = eps - data["eps_old"][step], data["weights"][step]
        log_rho = -(weight * delta * data["noise"][step] + 0.5 * weight**2 * delta**2).mean((1, 2, 3))
        objective, clipped = clipped_objective(settings, log_rho, advantages)
        loss = objective.mean()
        if settings.kl_beta > 0:
            unet.disable_adapters()
            with torch.no_grad():
                reference = guided_noise(unet, settings, data, step)
            unet.enable_adapters()
            kl = (0.5 * data["weights_native"][step] ** 2 * (eps - reference) ** 2).mean()
            loss = loss + settings.kl_beta * kl
            kl_sum += kl.item()
        (loss / steps).backward()

        _, dumped = clipped_objective(settings, data["log_rho"][step], advantages)
        log_rhos.append(log_rho.detach())
        largest_delta = max(largest_delta, delta.detach().abs().max().item())
        clipped_up += (clipped & (advantages > 0)).sum().item()
        clipped_down += (clipped & (advantages < 0)).sum().item()
        flipped += (clipped != dumped).sum().item()
    return torch.stack(log_rhos), {
        "largest |Delta|": largest_delta, "KL": kl_sum / steps, "clipped with A > 0": clipped_up,
        "clipped with A < 0": clipped_down, "clipped in only one of the two": flipped,
    }


def error(dumped, expected):
    """Largest difference relative to the largest expected entry; absolute if all those are 0; infinite for a NaN."""
    if dumped.shape != expected.shape:
        raise ValueError(f"shape {list(dumped.shape)} in the dump, {list(expected.shape)} recomputed")
    difference, size = (dumped - expected).abs().max().item(), expected.abs().max().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / size if size > 0 else difference


def vacuous(settings, facts, expected):
    """What would let a wrong program pass."""
    reasons = []
    if facts["largest |Delta|"] == 0:
        reasons.append("Delta is 0: the policy equals the one that sampled")
    if settings.kl_beta > 0 and facts["KL"] == 0:
        reasons.append("the KL is 0: the adapter does nothing")
    if not any(gradient.any() for key, gradient in expected.items() if ".lora_A." in key):
        reasons.append("all gradients of A are 0")
    reasons += [f"no entry {name}" for name in ("clipped with A > 0", "clipped with A < 0") if not facts[name]]
    return reasons


def verify(dump, model, dtype, tolerance, allow_vacuous, save):
    """Compares and prints; returns a sentence for each reason to fail."""
    settings, data, adapter, gradients = read_dump(dump, dtype)
    unet = load_component(UNet2DConditionModel, f"{model}/unet", dtype)
    parameters = attach_adapter(unet, settings, adapter)
    log_rho, facts = recompute(unet, settings, data)
    expected = {
        key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for key, parameter in parameters.items()
    }
    if save:
        save_file({key: value.float().contiguous() for key, value in expected.items()}, save)
    errors = {key: error(gradients[key], expected[key]) for key in sorted(expected)}
    errors["log_rho"] = error(data["log_rho"], log_rho)
    for key, value in errors.items():
        note = "" if key == "log_rho" or expected[key].any() else "  (absolute: the gradient is 0)"
        print(f"{value:.3e}  {key}{note}")
    for name, value in facts.items():
        print(f"{name}: {value:.6g}")
    worst = max(errors, key=errors.get)
    print(f"worst: {errors[worst]:.3e} ({worst}), tolerance {tolerance:g}")

    failures = [] if allow_vacuous else vacuous(settings, facts, expected)
    if errors[worst] > tolerance:
        failures.append(f"{worst} is off by {errors[worst]:.3e}, more than {tolerance:g}")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dump", metavar="DUMP.safetensors")
    parser.add_argument("--model", required=True, metavar="MODEL_DIR", help="the folder whose UNet was trained")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--allow-vacuous", action="store_true", help="accept a dump that exercises no clip, KL or A")
    parser.add_argument("--save", metavar="FILE", help="write the recomputed gradients to this safetensors file")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        failures = verify(args.dump, args.model, getattr(torch, args.dtype), args.tolerance, args.allow_vacuous, args.save)
    except (OSError, ValueError, SafetensorError) as problem:
        sys.exit(f"error: {problem}")
    if failures:
        sys.exit("FAILED: " + "; ".join(failures))
    print("OK")


if __name__ == "__main__":
    main()
