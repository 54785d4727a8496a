"""Makes adamw.json: steps of torch.optim.AdamW, after torch.nn.utils.clip_grad_norm_.

    python tests/golden/make_adamw.py

Each case has two parameters and their gradients of six steps, as they are before clipping, among
them tiny ones, large ones and zeros. `norms` holds the norm over both gradients before clipping,
`after` the parameters after each step; both are torch's in f64, `after_f32` is torch's in f32.
Betas are 0.9 and 0.999, epsilon is 1e-8. All inputs are f32 values, printed exactly.

Made with Python 3.11, torch 2.15.
"""

import json
from pathlib import Path

import torch

OUT = Path(__file__).resolve().parent / "adamw.json"
SIZES, STEPS = (5, 7), 6
# (learning rate, weight decay, largest norm); the first is never clipped.
CASES = [
    (1e-3, 0.0, 1e6),
    (1e-3, 0.1, 1.0),
    (3e-4, 1e-2, 1.0),
    (8e-3, 0.1, 0.25),
    (0.1, 0.0, 10.0),
]
# The sizes of the gradients of each step; a step of nothing but zeros is among them.
SCALES = [1.0, 1e-6, 0.0, 300.0, 1e-3, 1.0]


def inputs(seed):
    """(parameters, gradients by step) in f32."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.randn(size, generator=generator) for size in SIZES]
    gradients = []
    for scale in SCALES:
        step = [scale * torch.randn(size, generator=generator) for size in SIZES]
        step[0][0] = 0.0  # never moved by its gradient
        step[0][1] *= 1e-6  # of another size than its neighbours
        step[1][2] = abs(step[1][2])  # of one sign
        gradients.append(step)
    gradients[-1][1].zero_()  # one parameter without a gradient in a step where the other has one
    parameters[1][0] = 0.0  # nothing to decay
    return parameters, gradients


def train(parameters, gradients, learning_rate, weight_decay, max_norm, dtype):
    """(norms, parameters after each step) as lists."""
    weights = [torch.nn.Parameter(values.to(dtype, copy=True)) for values in parameters]
    optimizer = torch.optim.AdamW(
        weights,
        lr=learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=weight_decay,
        foreach=False,
    )
    norms, after = [], []
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.to(dtype, copy=True)
        norms.append(torch.nn.utils.clip_grad_norm_(weights, max_norm).item())
        optimizer.step()
        after.append([weight.tolist() for weight in weights])
    return norms, after


def case(seed, learning_rate, weight_decay, max_norm):
    """One entry of the file."""
    parameters, gradients = inputs(seed)
    run = (parameters, gradients, learning_rate, weight_decay, max_norm)
    norms, after = train(*run, torch.float64)
    _, after_f32 = train(*run, torch.float32)
    last, last_f32 = (
        torch.tensor(sum(values[-1], []), dtype=torch.float64) for values in (after, after_f32)
    )
    error = (last - last_f32).abs().max().item()
    print(
        f"lr {learning_rate:g}, decay {weight_decay:g}, norm {max_norm:g}: "
        f"f32 is off by {error:.1e}"
    )
    return {
        "lr": learning_rate,
        "weight_decay": weight_decay,
        "max_norm": max_norm,
        "parameters": [values.tolist() for values in parameters],
        "gradients": [[values.tolist() for values in step] for step in gradients],
        "norms": norms,
        "after": after,
        "after_f32": after_f32,
    }


def main():
    torch.set_num_threads(1)
    cases = [case(seed, *settings) for seed, settings in enumerate(CASES)]
    OUT.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in cases) + "\n]\n")
    print(f"{OUT.name}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
