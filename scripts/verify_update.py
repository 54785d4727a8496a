"""Recomputes a policy-gradient update with diffusers and peft and compares it with a dump of ours.

    python scripts/verify_update.py DUMP.safetensors --model MODEL_DIR [--tolerance 1e-3] \\
        [--dtype float64]

The model is a StableDiffusion folder with a `unet`, or one of Stable Diffusion 3 or FLUX.1 with a
`transformer`. The dump holds the strings objective, clip_range, guidance_scale, kl_beta,
guidance_gradient, prediction_type, lora_rank, lora_alpha, lora_targets as metadata, and in f32 (N
samples, S trained steps):

    prompt_embeds                [N, T, D]
    pooled_prompt_embeds         [N, P]  transformers only
    negative_prompt_embeds, negative_pooled_prompt_embeds    where guidance has two branches
    timesteps                    [S]     0 to 1000
    alphas_cumprod               [S]     read for v_prediction only
    weights, weights_native      [S]     the credit rule's, and the sampler's own, for the KL
    quadratic, loss_weights      [S]     q and l below; 1 where the dump has none
    latents, noise, eps_old      [S, N, C, H, W]
    advantages                   [N]
    log_rho                      [S, N]
    lora.KEY, grad.KEY           KEY as diffusers saves it: unet.(module).lora_A.weight,
                                 transformer.(module)....

The update, with eps the prediction after guidance (of a flow model its velocity), Delta = eps -
eps_old, z the noise, w the weights, A the advantages and xi the clip range:

    log rho = -mean_D[w Delta z + q/2 w^2 Delta^2]
    loss    = mean over N and S of
              l * objective + kl_beta * 1/2 mean_D[w_native^2 (eps - eps_ref)^2]

eps_ref is the network without its adapter. Guidance is classifier-free, u + g (c - u), and none at
g <= 1; FLUX.1 takes g as an input instead, where it has an embedding for it. Errors are relative to
the largest entry of the tensor recomputed here.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, peft 0.21.2, safetensors 0.8.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from reference import is_flow, load_component
from reference_flow import Flux, StableDiffusion3, load_transformer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

TENSORS = [
    "prompt_embeds",
    "timesteps",
    "alphas_cumprod",
    "latents",
    "noise",
    "eps_old",
    "advantages",
    "weights",
    "weights_native",
    "log_rho",
]
ONES = ["quadratic", "loss_weights"]  # of each step; older dumps have neither
CHOICES = {
    "objective": ["ppo-clip", "log-ratio", "log-hinge"],
    "guidance_gradient": ["both", "conditional"],
    "prediction_type": ["epsilon", "v_prediction", "velocity"],
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
                raise ValueError(
                    f"metadata {name} is {values[name]!r}, not one of {', '.join(choices)}"
                )
        return cls(**values)


def require(tensors, names):
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"the dump lacks {', '.join(missing)}")


def read_dump(path, dtype):
    """(settings, tensors, adapter, gradients) of a dump; the last two by diffusers' LoRA key."""
    with safe_open(path, "pt") as file:
        settings = Settings.parse(file.metadata() or {})
        everything = {name: file.get_tensor(name).to(dtype) for name in file.keys()}
    require(everything, TENSORS)
    adapter, gradients = (
        {
            name.removeprefix(prefix): tensor
            for name, tensor in everything.items()
            if name.startswith(prefix)
        }
        for prefix in ("lora.", "grad.")
    )
    if adapter.keys() != gradients.keys():
        raise ValueError(
            f"lora. and grad. differ in their keys: {sorted(adapter.keys() ^ gradients.keys())[:4]}"
        )
    data = {name: torch.ones_like(everything["weights"]) for name in ONES}
    data |= {
        name: tensor
        for name, tensor in everything.items()
        if not name.startswith(("lora.", "grad."))
    }
    return settings, data, adapter, gradients


def predict_unet(unet, settings, data, step, negative=""):
    """eps [N, C, H, W] of a step; `negative` is the prefix of the embeddings without the prompt."""
    latents, alpha_bar = data["latents"][step], data["alphas_cumprod"][step]
    timestep = data["timesteps"][step].expand(len(latents))
    output = unet(latents, timestep, encoder_hidden_states=data[negative + "prompt_embeds"]).sample
    if settings.prediction_type == "v_prediction":
        output = alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * latents
    return output


def predict_sd3(transformer, settings, data, step, negative=""):
    """The velocity [N, C, H, W] of a step, as predict_unet."""
    latents = data["latents"][step]
    return transformer(
        hidden_states=latents,
        timestep=data["timesteps"][step].expand(len(latents)),
        encoder_hidden_states=data[negative + "prompt_embeds"],
        pooled_projections=data[negative + "pooled_prompt_embeds"],
    ).sample


def predict_flux(transformer, settings, data, step):
    """The velocity [N, C, H, W] of a step; guidance is an input where it has an embedding."""
    latents, embeds = data["latents"][step], data["prompt_embeds"]
    batch, _, height, width = latents.shape
    own = Flux.own_inputs(
        transformer.config, batch, height, width, embeds.shape[1], settings.guidance_scale
    )
    scale = (
        latents.new_full([batch], settings.guidance_scale)
        if transformer.config.guidance_embeds
        else None
    )
    velocity = transformer(
        hidden_states=Flux.pack(latents),
        timestep=data["timesteps"][step].expand(batch) / 1000,
        encoder_hidden_states=embeds,
        pooled_projections=data["pooled_prompt_embeds"],
        img_ids=own["in.img_ids"],
        txt_ids=own["in.txt_ids"],
        guidance=scale,
    ).sample
    return Flux.unpack(velocity, height, width)


@dataclass
class Network:
    """A network, its place in the pipeline, its prediction, and its own parts of a dump."""

    name: str
    module: torch.nn.Module
    predict: Callable
    prediction_types: tuple
    embeds: tuple
    two_branches: bool = True

    def check(self, settings, data):
        """Fails if the dump is another kind of network's."""
        if settings.prediction_type not in self.prediction_types:
            raise ValueError(
                f"the dump is of {settings.prediction_type}, the model has a {self.name}"
            )
        require(data, self.embeds)
        if self.guided(settings):
            require(data, ["negative_" + name for name in self.embeds])

    def guided(self, settings):
        """Whether guidance combines two predictions."""
        return self.two_branches and settings.guidance_scale > 1

    def guided_prediction(self, settings, data, step):
        """eps or velocity [N, C, H, W] of a step after guidance."""
        cond = self.predict(self.module, settings, data, step)
        if not self.guided(settings):
            return cond
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and settings.guidance_gradient == "both"
        ):
            uncond = self.predict(self.module, settings, data, step, "negative_")
        return uncond + settings.guidance_scale * (cond - uncond)


def load_network(model, dtype):
    """The network of a model folder."""
    if not is_flow(model):
        unet = load_component(UNet2DConditionModel, f"{model}/unet", dtype)
        return Network("unet", unet, predict_unet, ("epsilon", "v_prediction"), ("prompt_embeds",))
    family, transformer = load_transformer(model, dtype)
    return Network(
        "transformer",
        transformer,
        {StableDiffusion3: predict_sd3, Flux: predict_flux}[family],
        ("velocity",),
        ("prompt_embeds", "pooled_prompt_embeds"),
        two_branches=family is StableDiffusion3,
    )


def attach_adapter(network, settings, adapter):
    """Adds the dump's adapter through peft; returns its parameters by diffusers' key."""
    network.module.add_adapter(
        LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules=settings.lora_targets.split(","),
        )
    )
    parameters = {
        f"{network.name}.{name.replace('.default.', '.')}": parameter
        for name, parameter in network.module.named_parameters()
        if ".lora_" in name
    }
    if parameters.keys() != adapter.keys():
        raise ValueError(
            f"peft makes {len(parameters)} LoRA tensors for targets {settings.lora_targets}, "
            f"the dump has {len(adapter)}; "
            f"only in peft: {sorted(parameters.keys() - adapter.keys())[:3]}, "
            f"only in the dump: {sorted(adapter.keys() - parameters.keys())[:3]}"
        )
    for key, parameter in parameters.items():
        if parameter.shape != adapter[key].shape:
            raise ValueError(
                f"{key}: {list(adapter[key].shape)} in the dump, {list(parameter.shape)} in peft"
            )
        with torch.no_grad():
            parameter.copy_(adapter[key])
        parameter.requires_grad_(True)
    return parameters


def clipped_objective(settings, log_rho, advantages):
    """(objective, clipped) of each sample, a clipped one as a constant: its gradient is 0.

    Clipping is decided in f64 and by log rho, because rho - 1 cancels in f32.
    """
    xi, exact = settings.clip_range, log_rho.detach().double()
    lower, upper = (
        (math.log1p(-xi), math.log1p(xi)) if settings.objective == "ppo-clip" else (-xi, xi)
    )
    clipped = ((advantages > 0) & (exact > upper)) | ((advantages < 0) & (exact < lower))
    objective = {
        "ppo-clip": lambda: -advantages * log_rho.exp(),
        "log-ratio": lambda: -advantages * (1 + log_rho),
        "log-hinge": lambda: xi * advantages.abs() - advantages * log_rho,
    }[settings.objective]()
    return torch.where(clipped, objective.detach(), objective), clipped


def log_ratio(delta, noise, weight, quadratic):
    """log rho [N] of a step."""
    return -(weight * delta * noise + 0.5 * quadratic * weight**2 * delta**2).mean((1, 2, 3))


def kl_to_reference(network, settings, data, step, eps):
    """The KL of a step to the network without its adapter, by the sampler's own weights."""
    network.module.disable_adapters()
    with torch.no_grad():
        reference = network.guided_prediction(settings, data, step)
    network.module.enable_adapters()
    return (0.5 * data["weights_native"][step] ** 2 * (eps - reference) ** 2).mean()


def recompute(network, settings, data):
    """Runs the update backward into the gradients; returns log rho and what it exercised."""
    steps, advantages = len(data["timesteps"]), data["advantages"]
    log_rhos, largest_delta, kl_sum, clipped_up, clipped_down, flipped = [], 0.0, 0.0, 0, 0, 0
    for step in range(steps):
        eps = network.guided_prediction(settings, data, step)
        delta = eps - data["eps_old"][step]
        log_rho = log_ratio(
            delta, data["noise"][step], data["weights"][step], data["quadratic"][step]
        )
        objective, clipped = clipped_objective(settings, log_rho, advantages)
        loss = data["loss_weights"][step] * objective.mean()
        if settings.kl_beta > 0:
            kl = kl_to_reference(network, settings, data, step, eps)
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
        "largest |Delta|": largest_delta,
        "KL": kl_sum / steps,
        "clipped with A > 0": clipped_up,
        "clipped with A < 0": clipped_down,
        "clipped in only one of the two": flipped,
    }


def error(dumped, expected):
    """Largest difference relative to the largest expected entry; absolute if that is 0."""
    if dumped.shape != expected.shape:
        raise ValueError(
            f"shape {list(dumped.shape)} in the dump, {list(expected.shape)} recomputed"
        )
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
    reasons += [
        f"no entry {name}"
        for name in ("clipped with A > 0", "clipped with A < 0")
        if not facts[name]
    ]
    return reasons


def verify(dump, model, dtype, tolerance, allow_vacuous, save):
    """Compares and prints; returns a sentence for each reason to fail."""
    settings, data, adapter, gradients = read_dump(dump, dtype)
    network = load_network(model, dtype)
    network.check(settings, data)
    parameters = attach_adapter(network, settings, adapter)
    log_rho, facts = recompute(network, settings, data)
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
    parser.add_argument(
        "--model", required=True, metavar="MODEL_DIR", help="the folder whose network was trained"
    )
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument(
        "--allow-vacuous", action="store_true", help="accept a dump that exercises no clip, KL or A"
    )
    parser.add_argument(
        "--save", metavar="FILE", help="write the recomputed gradients to this safetensors file"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        dtype = getattr(torch, args.dtype)
        failures = verify(
            args.dump, args.model, dtype, args.tolerance, args.allow_vacuous, args.save
        )
    except (OSError, ValueError, SafetensorError) as problem:
        sys.exit(f"error: {problem}")
    if failures:
        sys.exit("FAILED: " + "; ".join(failures))
    print("OK")


if __name__ == "__main__":
    main()
