"""Makes flow_grids.json: the sigmas and timesteps that diffusers' pipelines step through.

    python tests/golden/make_schedule_golden.py

Each entry names the scheduler's config, the pipeline that asks it ("sd3": so many steps; "flux":
sigmas from 1 to 1 / steps), the number of steps and, where the shift depends on it, the number of
image tokens. `sigmas` has one more value than `timesteps`, the final 0. The numbers are diffusers'
f32 ones.

Made with Python 3.11, torch 2.15, diffusers 0.42.1.
"""

import json
import sys
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parents[1] / "scripts"))

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from flow_folder import FLUX_DEV_SCHEDULER, FLUX_SCHNELL_SCHEDULER, SD3_SCHEDULER

DYNAMIC = {**FLUX_DEV_SCHEDULER, "_diffusers_version": "0.42.1"}


def grid(name, config, pipeline, steps, image_seq_len=None):
    """What the pipeline makes of the scheduler; `image_seq_len` is for dynamic shifting."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    asked = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if pipeline == "flux" else {}
    if scheduler.config.use_dynamic_shifting:
        asked["mu"] = calculate_shift(
            image_seq_len,
            scheduler.config.base_image_seq_len,
            scheduler.config.max_image_seq_len,
            scheduler.config.base_shift,
            scheduler.config.max_shift,
        )
    timesteps, _ = retrieve_timesteps(scheduler, steps, **asked)
    return {
        "name": name,
        "config": config,
        "pipeline": pipeline,
        "steps": steps,
        "image_seq_len": image_seq_len,
        "sigmas": scheduler.sigmas.tolist(),
        "timesteps": timesteps.tolist(),
    }


def grids():
    yield from (grid(f"sd3-{n}", SD3_SCHEDULER, "sd3", n) for n in (8, 10, 28))
    yield from (grid(f"shift1-{n}", {**SD3_SCHEDULER, "shift": 1.0}, "sd3", n) for n in (4, 10))
    yield from (grid(f"flux-schnell-{n}", FLUX_SCHNELL_SCHEDULER, "flux", n) for n in (4, 10))
    for n in (8, 16, 28):
        yield from (
            grid(f"flux-dev-{n}-{seq}", FLUX_DEV_SCHEDULER, "flux", n, seq)
            for seq in (64, 1024, 4096)
        )
    yield grid("sd3-dynamic-10-1024", DYNAMIC, "sd3", 10, 1024)
    yield grid("flux-linear-8-1024", {**DYNAMIC, "time_shift_type": "linear"}, "flux", 8, 1024)


def main():
    entries = list(grids())
    for entry in entries:
        if len(entry["sigmas"]) != entry["steps"] + 1 or len(entry["timesteps"]) != entry["steps"]:
            raise AssertionError(f"{entry['name']}: {len(entry['sigmas'])} sigmas")
        print(
            f"{entry['name']:22} {entry['sigmas'][0]:.6f} ... "
            f"{entry['sigmas'][-2]:.6f} {entry['sigmas'][-1]:.0f}"
        )
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    (GOLDEN / "flow_grids.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
