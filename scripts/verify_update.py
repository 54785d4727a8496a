"""Recomputes a policy-gradient update with diffusers and peft and compares it with a dump of ours.

    python scripts/verify_update.py DUMP.safetensors --model MODEL_DIR [--tolerance 1e-3] \\
        [--dtype float64]

The model is a StableDiffusion or SDXL folder with a `unet`, or one of Stable Diffusion 3, FLUX.1,
FLUX.2 [klein] or Z-Image with a `transformer`. The dump holds the strings objective, clip_range,
guidance_scale, kl_beta, guidance_gradient, prediction_type, lora_rank, lora_alpha, lora_targets as
metadata, and in f32 (N samples, S trained steps):

    prompt_embeds                [N, T, D]
    pooled_prompt_embeds         [N, P]  Stable Diffusion 3, FLUX.1 and SDXL only
    time_ids                     [N, 6]  SDXL only
    prompt_lengths               [N]     Z-Image only: how many of the T tokens are a row's own;
                                         those behind them are padding, which it is not told of
    negative_prompt_embeds, negative_pooled_prompt_embeds, negative_time_ids,
    negative_prompt_lengths              where guidance has two branches
    timesteps                    [S]     0 to 1000
    alphas_cumprod               [S]     read for v_prediction only
    weights, weights_native      [S]     the credit rule's, and the sampler's own, for the KL
    quadratic, loss_weights      [S]     q and l below; 1 where the dump has none
    row_weights                  [S, N]  r below, 0 where a step does not have the row; 1 where
                                         the dump has none
    latents, noise, eps_old      [S, N, C, H, W]  of FLUX.2 the 2 x 2 patches: [S, N, 4 c, h, w]
    advantages                   [N]
    log_rho                      [S, N]
    lora.KEY, grad.KEY           KEY as diffusers saves it: unet.(module).lora_A.weight,
                                 transformer.(module)....

The update, with eps the prediction after guidance (of a flow model its velocity), Delta = eps -
eps_old, z the noise, w the weights, A the advantages and xi the clip range:

    log rho = -mean_D[w Delta z + q/2 w^2 Delta^2]
    loss    = 1/E sum over N and S of
              r * (l * objective + kl_beta * 1/2 mean_D[w_native^2 (eps - eps_ref)^2])

E is the metadata's entries, N S where it has none.

An update by an objective of the forward process (nft, awm) has no trajectory. Its dump holds, in
place of latents, eps_old, log_rho and the weights:

    x0                           [N, C, H, W]     the images' latents as they end
    noise                        [S, N, C, H, W]  z, of each time
    row_weights                  [S, N]           1 where an image is noised to a time
    signal, noise_level          [S]     x_t = signal x0 + noise_level z
    x0_x, x0_p                   [S]     the image of a prediction p: x0_x x_t - x0_p p
    old.KEY                      the adapter of the old policy; sampled.KEY that which sampled the
                                 epoch, where it is not the one of now

and the metadata nft_beta and advantage_clamp. With p the prediction after guidance, b nft_beta, c
advantage_clamp and xi the clip range:

    nft    e+- = x0_x x_t - x0_p p+- - x0,  p+ = b p + (1-b) p_old,  p- = (1+b) p_old - b p
           L = c/b [q mean(e+^2)/n+ + (1-q) mean(e-^2)/n-] + kl_beta mean (p - p_ref)^2
           q = 1/2 + A/(2c),  n+- = max(mean|e+-|, 1e-5) without gradient
    awm    log pi = -[(m + 1e-10)^(1/4) - (1e-10)^(1/4)] 4 noise_level,  m = mean (p - p*)^2
           L = max(-A rho, -A clip(rho, 1-xi, 1+xi))/c + kl_beta mean (p - p_ref)^2
               + mean (p - p_old)^2,   p* = (x0_x x_t - x0)/x0_p

eps_ref is the network without its adapter. Guidance is classifier-free, u + g (c - u), and none at
g <= 1; Z-Image's is c + g (c - u), and none at g = 0. FLUX.1 takes g as an input instead, where it
has an embedding for it, and so does FLUX.2; where FLUX.2's model_index.json says is_distilled there
is none. Z-Image's velocity is its transformer's output times -1, at t = 1 - timestep / 1000. Errors
are relative to the largest entry of the tensor recomputed here.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, peft 0.21.2, safetensors 0.8.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from reference import is_flow, is_sdxl, load_component
from reference_flow import Flux, StableDiffusion3, load_transformer
from reference_qwen import Flux2, ZImage
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
FORWARD_TENSORS = [
    "prompt_embeds",
    "timesteps",
    "alphas_cumprod",
    "x0",
    "noise",
    "row_weights",
    "signal",
    "noise_level",
    "x0_x",
    "x0_p",
    "advantages",
]
FORWARD = ["nft", "awm"]
ONES = ["quadratic", "loss_weights"]  # of each step; older dumps have neither
CHOICES = {
    "objective": ["ppo-clip", "log-ratio", "log-hinge", *FORWARD],
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
    entries: int = 0
    nft_beta: float = 1.0
    advantage_clamp: float = 5.0

    @classmethod
    def parse(cls, metadata):
        later = {"entries": "0", "nft_beta": "1", "advantage_clamp": "5"}
        metadata = later | metadata
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


@dataclass
class Dump:
    """A dump's tensors; adapters and gradients by diffusers' LoRA key."""

    data: dict
    adapter: dict
    gradients: dict
    old: dict
    sampled: dict


PREFIXES = {"adapter": "lora.", "gradients": "grad.", "old": "old.", "sampled": "sampled."}


def read_dump(path, dtype):
    """(settings, dump) of a file."""
    with safe_open(path, "pt") as file:
        settings = Settings.parse(file.metadata() or {})
        everything = {name: file.get_tensor(name).to(dtype) for name in file.keys()}
    forward = settings.objective in FORWARD
    require(everything, FORWARD_TENSORS if forward else TENSORS)
    named = {
        field: {
            name.removeprefix(prefix): tensor
            for name, tensor in everything.items()
            if name.startswith(prefix)
        }
        for field, prefix in PREFIXES.items()
    }
    if named["adapter"].keys() != named["gradients"].keys():
        differ = sorted(named["adapter"].keys() ^ named["gradients"].keys())[:4]
        raise ValueError(f"lora. and grad. differ in their keys: {differ}")
    data = {}
    if not forward:
        data = {name: torch.ones_like(everything["weights"]) for name in ONES}
        data["row_weights"] = torch.ones_like(everything["log_rho"])
    data |= {
        name: tensor
        for name, tensor in everything.items()
        if not name.startswith(tuple(PREFIXES.values()))
    }
    if settings.entries == 0:
        settings.entries = data["row_weights"].numel()
    if forward:
        signal, level = (
            data["signal"].view(-1, 1, 1, 1, 1),
            data["noise_level"].view(-1, 1, 1, 1, 1),
        )
        data["latents"] = signal * data["x0"] + level * data["noise"]
    return settings, Dump(data, **named)


def predict_unet(unet, settings, data, step, negative=""):
    """eps [N, C, H, W] of a step; `negative` is the prefix of the embeddings without the prompt."""
    latents, alpha_bar = data["latents"][step], data["alphas_cumprod"][step]
    timestep = data["timesteps"][step].expand(len(latents))
    output = unet(latents, timestep, encoder_hidden_states=data[negative + "prompt_embeds"]).sample
    if settings.prediction_type == "v_prediction":
        output = alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * latents
    return output


def predict_sdxl(unet, settings, data, step, negative=""):
    """eps [N, C, H, W] of a step of an SDXL UNet, as predict_unet."""
    added = {
        "text_embeds": data[negative + "pooled_prompt_embeds"],
        "time_ids": data[negative + "time_ids"],
    }
    told = functools.partial(unet, added_cond_kwargs=added)
    return predict_unet(told, settings, data, step, negative)


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


def predict_z_image(transformer, settings, data, step, negative=""):
    """The velocity [N, C, H, W] of a step, as predict_unet; the network's own is the other way."""
    latents = data["latents"][step]
    texts, lengths = data[negative + "prompt_embeds"], data[negative + "prompt_lengths"]
    output = transformer(
        list(latents.unsqueeze(2).unbind()),
        ((1000 - data["timesteps"][step]) / 1000).expand(len(latents)),
        [text[: int(length)] for text, length in zip(texts, lengths)],
    )
    return -torch.stack(output.sample).squeeze(2)


def predict_flux2(transformer, settings, data, step, negative=""):
    """The velocity [N, 4 c, h, w] of a step, as predict_unet; guidance as in predict_flux."""
    latents, text = data["latents"][step], data[negative + "prompt_embeds"]
    own = Flux2.own_inputs(transformer.config, latents, text, settings.guidance_scale)
    scale = (
        latents.new_full([len(latents)], settings.guidance_scale)
        if transformer.config.guidance_embeds
        else None
    )
    velocity = transformer(
        hidden_states=own["in.hidden_states"],
        encoder_hidden_states=text,
        timestep=data["timesteps"][step].expand(len(latents)) / 1000,
        img_ids=own["in.img_ids"],
        txt_ids=own["in.txt_ids"],
        guidance=scale,
    ).sample
    return Flux2.unpack(velocity, *latents.shape[-2:])


@dataclass
class Network:
    """A network, its place in the pipeline, its prediction, and its own parts of a dump."""

    name: str
    module: torch.nn.Module
    predict: Callable
    prediction_types: tuple
    embeds: tuple
    two_branches: bool = True
    from_cond: bool = False  # guidance goes on from the prompt's prediction, not from the other

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
        return self.two_branches and settings.guidance_scale > (0 if self.from_cond else 1)

    def guided_prediction(self, settings, data, step):
        """eps or velocity [N, C, H, W] of a step after guidance."""
        cond = self.predict(self.module, settings, data, step)
        if not self.guided(settings):
            return cond
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and settings.guidance_gradient == "both"
        ):
            uncond = self.predict(self.module, settings, data, step, "negative_")
        start = cond if self.from_cond else uncond
        return start + settings.guidance_scale * (cond - uncond)


def has_two_branches(family, model, config):
    """Whether a flow model's pipeline guides by a second prediction."""
    if family is Flux2:
        index = Path(model) / "model_index.json"
        told = json.loads(index.read_text()) if index.is_file() else {}
        return not (told.get("is_distilled", False) or config.guidance_embeds)
    return family is not Flux


PREDICT = {
    StableDiffusion3: predict_sd3,
    Flux: predict_flux,
    ZImage: predict_z_image,
    Flux2: predict_flux2,
}
EMBEDS = {ZImage: ("prompt_embeds", "prompt_lengths"), Flux2: ("prompt_embeds",)}


def load_network(model, dtype):
    """The network of a model folder."""
    if not is_flow(model):
        unet = load_component(UNet2DConditionModel, f"{model}/unet", dtype)
        if is_sdxl(model):
            embeds = ("prompt_embeds", "pooled_prompt_embeds", "time_ids")
            return Network("unet", unet, predict_sdxl, ("epsilon", "v_prediction"), embeds)
        return Network("unet", unet, predict_unet, ("epsilon", "v_prediction"), ("prompt_embeds",))
    family, transformer = load_transformer(model, dtype)
    return Network(
        "transformer",
        transformer,
        PREDICT[family],
        ("velocity",),
        EMBEDS.get(family, ("prompt_embeds", "pooled_prompt_embeds")),
        two_branches=has_two_branches(family, model, transformer.config),
        from_cond=family is ZImage,
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
    """The KL [N] of a step to the network without its adapter, by the sampler's own weights."""
    network.module.disable_adapters()
    with torch.no_grad():
        reference = network.guided_prediction(settings, data, step)
    network.module.enable_adapters()
    return 0.5 * data["weights_native"][step] ** 2 * ((eps - reference) ** 2).mean((1, 2, 3))


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
        rows = data["row_weights"][step]
        loss = data["loss_weights"][step] * objective
        if settings.kl_beta > 0:
            kl = kl_to_reference(network, settings, data, step, eps)
            loss = loss + settings.kl_beta * kl
            kl_sum += (rows * kl).sum().item() / settings.entries
        ((rows * loss).sum() / settings.entries).backward()
        clipped = clipped & (rows > 0)

        _, dumped = clipped_objective(settings, data["log_rho"][step], advantages)
        dumped = dumped & (rows > 0)
        log_rhos.append(torch.where(rows > 0, log_rho.detach(), 0))
        largest_delta = max(largest_delta, delta.detach()[rows > 0].abs().max().item())
        clipped_up += (clipped & (advantages > 0)).sum().item()
        clipped_down += (clipped & (advantages < 0)).sum().item()
        flipped += (clipped != dumped).sum().item()
    return torch.stack(log_rhos), {
        "largest |Delta|": largest_delta,
        "KL": kl_sum,
        "clipped with A > 0": clipped_up,
        "clipped with A < 0": clipped_down,
        "clipped in only one of the two": flipped,
    }


def with_adapter(parameters, adapter, work):
    """What `work` returns with other values in the adapter's parameters, without gradients."""
    kept = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(adapter[key])
        done = work()
        for key, parameter in parameters.items():
            parameter.copy_(kept[key])
    return done


def mean_rows(values):
    return values.mean((1, 2, 3))


def nft_loss(settings, target, prediction, old, advantages, image_of):
    """NFT's own loss [N] at a time; `image_of` makes the image of a prediction."""
    b, c = settings.nft_beta, settings.advantage_clamp

    def normalised(mixed):
        off = image_of(mixed) - target
        return mean_rows(off**2) / mean_rows(off.abs()).clamp_min(1e-5).detach()

    q = 0.5 + advantages / (2 * c)
    toward = normalised(b * prediction + (1 - b) * old)
    away = normalised((1 + b) * old - b * prediction)
    return c / b * (q * toward + (1 - q) * away)


def awm_loss(settings, wanted, level, prediction, old, sampled, advantages):
    """(loss [N], clipped [N]) of AWM at a time."""

    def log_prob(p):
        m = mean_rows((p - wanted) ** 2)
        return -((m + 1e-10) ** 0.25 - 1e-10**0.25) * 4 * level

    now = log_prob(prediction)
    rho = (now - (now.detach() if sampled is None else log_prob(sampled))).exp()
    bounded = rho.clamp(1 - settings.clip_range, 1 + settings.clip_range)
    share = advantages / settings.advantage_clamp
    own = torch.maximum(-share * rho, -share * bounded)
    return own + mean_rows((prediction - old) ** 2), bounded != rho


def recompute_forward(network, settings, dump, parameters):
    """Runs an update of the forward process backward; returns what it exercised."""
    data, largest_delta, kl_sum, clipped = dump.data, 0.0, 0.0, 0
    for step in range(len(data["timesteps"])):
        rows, x = data["row_weights"][step], data["latents"][step]
        if not rows.any():
            continue

        def predict(step=step):
            return network.guided_prediction(settings, data, step)

        old = with_adapter(parameters, dump.old, predict)
        sampled = with_adapter(parameters, dump.sampled, predict) if dump.sampled else None
        prediction = predict()
        x0_x, x0_p = data["x0_x"][step], data["x0_p"][step]
        if settings.objective == "nft":
            loss = nft_loss(
                settings,
                data["x0"],
                prediction,
                old,
                data["advantages"],
                lambda p, x=x, x0_x=x0_x, x0_p=x0_p: x0_x * x - x0_p * p,
            )
        else:
            wanted = (x0_x * x - data["x0"]) / x0_p
            level = data["noise_level"][step]
            loss, bounded = awm_loss(
                settings, wanted, level, prediction, old, sampled, data["advantages"]
            )
            clipped += (bounded & (rows > 0)).sum().item()
        if settings.kl_beta > 0:
            network.module.disable_adapters()
            with torch.no_grad():
                reference = predict()
            network.module.enable_adapters()
            away = mean_rows((prediction - reference) ** 2)
            loss = loss + settings.kl_beta * away
            kl_sum += (rows * away).sum().item() / settings.entries
        ((rows * loss).sum() / settings.entries).backward()
        largest_delta = max(largest_delta, (prediction - old).detach()[rows > 0].abs().max().item())
    return {"largest |Delta|": largest_delta, "KL": kl_sum, "clipped": clipped}


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
    exercised = {"nft": (), "awm": ("clipped",)}.get(
        settings.objective, ("clipped with A > 0", "clipped with A < 0")
    )
    reasons += [f"no entry {name}" for name in exercised if not facts[name]]
    return reasons


def verify(dump, model, dtype, tolerance, allow_vacuous, save):
    """Compares and prints; returns a sentence for each reason to fail."""
    settings, dump = read_dump(dump, dtype)
    data, gradients = dump.data, dump.gradients
    network = load_network(model, dtype)
    network.check(settings, data)
    parameters = attach_adapter(network, settings, dump.adapter)
    if settings.objective in FORWARD:
        log_rho, facts = None, recompute_forward(network, settings, dump, parameters)
    else:
        log_rho, facts = recompute(network, settings, data)
    expected = {
        key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for key, parameter in parameters.items()
    }
    if save:
        save_file({key: value.float().contiguous() for key, value in expected.items()}, save)
    errors = {key: error(gradients[key], expected[key]) for key in sorted(expected)}
    if log_rho is not None:
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
