"""Proves that diffusers loads a LoRA file and predicts with it what a reference says.

    python scripts/verify_lora.py --model MODEL_DIR --lora FILE.safetensors \\
        --reference FILE.safetensors [--kohya]

The reference holds the network's inputs (of a UNet in.latents, in.timestep,
in.encoder_hidden_states, and of SDXL in.pooled_projections and in.time_ids; of a flow model's
transformer what reference_flow.py and reference_qwen.py say) and out.prediction, the network with
the adapter. With --kohya the file has to be in kohya's format (lora_unet_....lora_down.weight,
.lora_up.weight, .alpha), which is verified of UNets only, else in diffusers' (unet. or transformer.
....lora_A.weight, .lora_B.weight). The file goes through the pipeline's load_lora_weights; it fails
too if diffusers drops one of the file's tensors or if the adapter does not change the prediction.

Made with Python 3.11, torch 2.15, diffusers 0.42.1, peft 0.21.2, safetensors 0.8.
"""

import argparse
import sys
import warnings
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from reference import is_flow, is_sdxl, load_folder, predict
from reference_flow import load_transformer, predict_flow
from reference_sdxl import load_pipeline, predict_sdxl
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

INPUTS = ["in.latents", "in.timestep", "in.encoder_hidden_states"]
FLOW_INPUTS = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")


def check_format(path, prefix, kohya):
    """How many matrices a file holds; fails if its keys are not of the promised format."""
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
    strange = [key for key in keys if not key.startswith(prefix)]
    if strange:
        switch = "on" if kohya else "off"
        raise ValueError(f"{path}: {strange[0]} does not start with {prefix} (--kohya is {switch})")
    return sum(not key.endswith(".alpha") for key in keys)


def load_unet(model):
    """(pipeline, network, inputs, prediction at a reference's tensors) of a StableDiffusion one."""
    with warnings.catch_warnings(
        action="ignore", category=FutureWarning
    ):  # about the scheduler's steps_offset
        pipe = StableDiffusionPipeline(
            **vars(load_folder(model)),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return (
        pipe,
        pipe.unet,
        INPUTS,
        lambda tensors: predict(pipe.unet, *(tensors[name] for name in INPUTS)),
    )


def load_sdxl(model):
    """The same of an SDXL folder."""
    pipe = load_pipeline(model)
    names = [*INPUTS, "in.pooled_projections", "in.time_ids"]
    return (
        pipe,
        pipe.unet,
        names,
        lambda tensors: predict_sdxl(pipe.unet, *(tensors[name] for name in names)),
    )


def load_flow(model):
    """The same of a flow model's folder, whose pipeline is empty but for the transformer."""
    family, transformer = load_transformer(model)
    names = ["vae", "scheduler", *family.text_encoders]
    names += [name.replace("text_encoder", "tokenizer") for name in family.text_encoders]
    pipe = family.pipeline(transformer=transformer, **dict.fromkeys(names))
    inputs = [f"in.{name}" for name in getattr(family, "inputs", FLOW_INPUTS)]
    return pipe, transformer, inputs, lambda tensors: predict_flow(transformer, tensors)


def verify(model, lora, reference, kohya, tolerance):
    """Prints what was loaded and the error; returns a sentence for each reason to fail."""
    lora, flow = Path(lora), is_flow(model)
    if flow and kohya:
        raise ValueError("--kohya: of UNets only")
    matrices = check_format(
        lora, "transformer." if flow else "lora_unet_" if kohya else "unet.", kohya
    )
    load = load_flow if flow else load_sdxl if is_sdxl(model) else load_unet
    pipe, network, inputs, prediction = load(model)
    tensors = load_file(reference)
    missing = [name for name in [*inputs, "out.prediction"] if name not in tensors]
    if missing:
        raise ValueError(f"{reference} lacks {', '.join(missing)}")
    expected = tensors["out.prediction"]
    with torch.no_grad():
        plain = prediction(tensors)
        try:
            pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
        except (TypeError, KeyError) as problem:
            raise ValueError(f"diffusers refuses {lora}: {problem}") from problem
        adapted = prediction(tensors)
    loaded = sum(".lora_" in name for name, _ in network.named_parameters())
    config = next(iter(network.peft_config.values()))
    print(f"loaded {loaded} of {matrices} matrices, rank {config.r}, alpha {config.lora_alpha}")
    size = expected.abs().max()
    error = ((adapted - expected).abs().max() / size).item()
    change = ((adapted - plain).abs().max() / size).item()
    print(f"error {error:.3e} (tolerance {tolerance:g}), the adapter's own effect {change:.3e}")

    failures = []
    if loaded != matrices:
        failures.append(f"diffusers took {loaded} of the file's {matrices} matrices")
    if not change > 10 * tolerance:
        failures.append(
            f"the adapter's effect {change:.3e} is too small to be told from the tolerance"
        )
    if not error <= tolerance:
        failures.append(f"the prediction is off by {error:.3e}")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--lora", required=True, metavar="FILE")
    parser.add_argument("--reference", required=True, metavar="FILE")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--kohya", action="store_true", help="the file is in kohya's format")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        failures = verify(args.model, args.lora, args.reference, args.kohya, args.tolerance)
    except (OSError, ValueError, SafetensorError) as problem:
        sys.exit(f"error: {problem}")
    if failures:
        sys.exit("FAILED: " + "; ".join(failures))
    print("OK")


if __name__ == "__main__":
    main()
