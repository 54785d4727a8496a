"""Measures a GPU: training on a Stable Diffusion 1.5 of random weights, ours and PyTorch's.

    python scripts/measure_gpu.py --model DIR [--device 0] [--epochs 3]
        [--program target/release/pcpo-wgpu] [--compute f32,f16]

DIR is what tests/golden/random_sd15.py writes; pictures have 512 pixels. Each row of the table is
the last of some epochs of 8 images of 4 steps with guidance, two of them trained: 64 predictions in
the rollout and 32 with their gradients in the update, the same by scripts/torch_sd15.py. Memory is
what nvidia-smi reports at most of any card, others' work included, while the command runs, where
there is one. Rows of PyTorch need CUDA; without it they are left out.

Made with Python 3.11.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

IMAGES, BATCH, STEPS, TRAINED = 8, 8, 4, 2
JOB = (
    "--preset pcpo --storage f16 --resolution 512 --sampler ddim --guidance-scale 5 --group-size 4"
    " --updates-per-epoch 1 --rank 16 --reward color:blue --sample-every 1000 --learning-rate 3e-4"
    " --initial-noise own"
).split()
QUERY = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]


class PeakMemory:
    """The most MiB that nvidia-smi reports while it is entered; None without nvidia-smi."""

    def __enter__(self):
        self.most, self.over = None, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        if shutil.which("nvidia-smi"):
            self.thread.start()
        return self

    def watch(self):
        while not self.over.wait(0.2):
            used = subprocess.run(QUERY, capture_output=True, text=True).stdout.split()
            self.most = max([self.most or 0, *(int(n) for n in used if n.isdigit())])

    def __exit__(self, *_):
        self.over.set()
        if self.thread.is_alive():
            self.thread.join()


def counts(flags):
    numbers = {"batch": BATCH, "steps": STEPS, "train-steps": TRAINED, **flags}
    return [word for name, n in numbers.items() for word in (f"--{name}", str(n))]


def ours(args, compute):
    """Seconds of the last epoch's rollout, decoding and update."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [args.program, "train", "--model", args.model, "--device", args.device, *JOB]
        command += counts({"images-per-epoch": IMAGES, "epochs": args.epochs})
        command += ["--compute", compute, "--out", run, "--prompt", "a cat", "--prompt", "a dog"]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "epoch"][-1]
    return [last[f"{phase}_seconds"] for phase in ("rollout", "decode", "update")]


def torchs(args, kind):
    """The same by PyTorch."""
    script = Path(__file__).with_name("torch_sd15.py")
    command = [sys.executable, script, "--model", args.model, "--type", kind]
    command += counts({"images": IMAGES, "epochs": args.epochs})
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    last = [line for line in done.stdout.splitlines() if line.startswith("epoch")][-1]
    return [float(n) for n in re.findall(r"[a-z] ([0-9.]+)", last.split("(")[1])]


def has_cuda():
    test = "import torch, diffusers, peft; assert torch.cuda.is_available()"
    return not subprocess.run([sys.executable, "-c", test], capture_output=True).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--device", default="0", help="as `pcpo-wgpu devices` lists it")
    parser.add_argument("--program", default="target/release/pcpo-wgpu", metavar="FILE")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--compute", default="f32,f16", help="of ours, with commas between")
    args = parser.parse_args()
    rows = [(f"pcpo-wgpu {c}", lambda c=c: ours(args, c)) for c in args.compute.split(",")]
    if has_cuda():
        rows += [(f"PyTorch {t}", lambda t=t: torchs(args, t)) for t in ("f32", "bf16")]
    print("| | predictions/s, rollout | images/s, decode | gradients/s, update | peak MiB |")
    print("|---|---|---|---|---|", flush=True)
    for name, run in rows:
        with PeakMemory() as memory:
            rollout, decode, update = run()
        done = (2 * IMAGES * STEPS / rollout, IMAGES / decode, 2 * IMAGES * TRAINED / update)
        cells = [f"{n:.1f}" for n in done]
        print("|", " | ".join([name, *cells, str(memory.most or "")]), "|", flush=True)


if __name__ == "__main__":
    main()
