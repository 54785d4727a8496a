"""Makes tests/golden/reward/pickles: odd and hostile checkpoints for the reader of .pt files.

    python tests/golden/make_pickles.py

    plain.pt           zip: a dict of plain values beside an OrderedDict state dict
    legacy.pt          the same in the format before torch 1.6 (no zip)
    cuda.pt            zip: tensors at cuda:0
    half.pt            zip: f16, bf16, f32, f64, integers, bool, a transposed tensor, two tensors in
                       one storage with offsets, an empty one, a scalar
    half-legacy.pt     the tensors of half.pt in the legacy format (storages shared there as well)
    parameters.pt      zip: torch.nn.Parameter values (torch._utils._rebuild_parameter)
    numpy.pt           zip: NumPy scalars and an array beside the state dict, as trainers leave them
    argparse.pt        zip: an argparse.Namespace beside the state dict
    hostile.pt         zip: the whole object is os.system("touch hostile-was-run")
    hostile_nested.pt  zip: the same call in a dict, after the tensors of "state_dict"
    hostile_builtin.pt zip: builtins.eval in place of a tensor
    hostile_legacy.pt  legacy: os.system in a dict
    hostile_build.pt   zip: a class instance whose BUILD state would run (collections.Counter is
                       innocent, subprocess.Popen is not)
    bomb.pt            zip: a tensor of 2^40 elements over a storage of 4
    outside.pt         zip: a tensor whose offset and strides leave its storage
    missing.pt         zip: a tensor whose storage file is not in the archive
    deflated.pt        the entries of plain.pt compressed, as zip tools write them

pickles.json has for every file that should load, by the key its tensors sit under ("" for none),
each tensor's dtype, shape and sum (f64); the others are listed under "refused" (no call may run and
a reader has to say no), "either" (a reader may take the state dict or refuse, but nothing may run).

Made with Python 3.11, torch 2.15, numpy 2.4.6.
"""

import argparse
import io
import os
import pickle
import shutil
import subprocess
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import torch
from reward_common import REWARD, write_bytes, write_json

FOLDER = REWARD / "pickles"
MARK = "hostile-was-run"


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


class Built:
    """Pickles as a class instance made by a call, then given a state by BUILD."""

    def __reduce__(self):
        return subprocess.Popen, (["touch", MARK],), {"returncode": 0}


def weights(seed=91):
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (name, torch.randn(shape, generator=generator))
        for name, shape in (("layer.weight", [3, 4]), ("layer.bias", [3]), ("out.weight", [1, 3]))
    )


def plain():
    return {
        "epoch": 3,
        "name": "tiny",
        "lr": 1e-4,
        "best": None,
        "done": True,
        "big": 2**40,
        "negative": -70000,
        "huge": 2**80,
        "text": "naïve ☂ " + "x" * 300,
        "bytes": b"\x00\xff",
        "betas": (0.9, 0.999),
        "sizes": [1, 2, 3, [4, ()]],
        "config": {"width": 16, "inner": {"act": "gelu"}, 7: {"deep": set()}},
        "state_dict": weights(),
    }


def halves():
    base = weights(92)["layer.weight"]
    store = torch.arange(10, dtype=torch.float32) / 4
    return {
        "half": base.half(),
        "bfloat": base.bfloat16() * 3,
        "single": base.clone(),
        "double": base.double() / 3,
        "steps": torch.tensor([1, -2, 2**40]),
        "short": torch.tensor([[7, -8]], dtype=torch.int32),
        "byte": torch.tensor([0, 255], dtype=torch.uint8),
        "flag": torch.tensor([True, False, True]),
        "transposed": base.clone().T,
        "strided": store[1:9:2],
        "first": store[:4].view(2, 2),
        "second": store[4:],
        "scalar": torch.tensor(4.5),
        "empty": torch.zeros(0, 3),
    }


def saved(value, **options):
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def rezip(data, change=None, drop=(), method=zipfile.ZIP_STORED):
    """A zip checkpoint again, its data.pkl through `change`, without the entries in `drop`."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", method) as new:
        for entry in old.infolist():
            body = old.read(entry)
            if change is not None and entry.filename.endswith("/data.pkl"):
                body = change(body)
            if not any(entry.filename.endswith(name) for name in drop):
                new.writestr(zipfile.ZipInfo(entry.filename), body, compress_type=method)
    return stream.getvalue()


def replaced(old, new, count=None):
    def change(body):
        found = body.count(old)
        assert found >= 1 and count in (None, found), (old, found)
        return body.replace(old, new)

    return change


def short_text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def one(shape, stride, offset):
    """A checkpoint with one tensor of 4 f32 whose pickled place is anything."""

    def rebuild(tensor):
        storage = torch.storage.TypedStorage(
            wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True
        )
        arguments = (storage, offset, shape, stride, False, OrderedDict())
        return Call(torch._utils._rebuild_tensor_v2, *arguments)

    return saved({"state_dict": {"w": rebuild(torch.tensor([1.0, 2.0, 3.0, 4.0]))}})


def numpy_checkpoint():
    return {
        "best_loss": np.float64(0.25),
        "step": np.int64(7),
        "rng": np.arange(5, dtype=np.uint32),
        "state_dict": weights(93),
    }


def describe(tensors):
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "sum": tensor.detach().double().sum().item(),
        }
        for name, tensor in tensors.items()
    }


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    old = {"_use_new_zipfile_serialization": False}
    namespace = argparse.Namespace(lr=0.1, name="tiny", layers=[1, 2])
    parameters = OrderedDict(
        (name, torch.nn.Parameter(tensor, requires_grad="bias" not in name))
        for name, tensor in weights(94).items()
    )
    shell = Call(os.system, f"touch {MARK}")
    evaluate = Call(eval, f"open('{MARK}', 'w')")
    files = {
        "plain.pt": saved(plain()),
        "legacy.pt": saved(plain(), **old),
        "cuda.pt": rezip(
            saved({"epoch": 1, "state_dict": weights(95)}),
            replaced(short_text("cpu"), short_text("cuda:0")),
        ),
        "half.pt": saved(halves()),
        "half-legacy.pt": saved(halves(), **old),
        "parameters.pt": saved(parameters),
        "numpy.pt": saved(numpy_checkpoint()),
        "argparse.pt": saved({"args": namespace, "state_dict": weights(96)}),
        "hostile.pt": saved(shell),
        "hostile_nested.pt": saved({"epoch": 1, "state_dict": {**weights(97), "zz": shell}}),
        "hostile_builtin.pt": saved({"state_dict": {"w": evaluate, **weights(98)}}),
        "hostile_legacy.pt": saved({"state_dict": {"w": shell}}, **old),
        "hostile_build.pt": saved({"count": Counter("aab"), "args": Built(), **weights(99)}),
        "bomb.pt": one((2**20, 2**20), (0, 0), 0),
        "outside.pt": one((2, 2), (2, 1), 1),
        "missing.pt": rezip(saved({"state_dict": weights(89)}), drop=("/data/1",)),
        "deflated.pt": rezip(saved(plain()), method=zipfile.ZIP_DEFLATED),
    }
    for name, data in files.items():
        write_bytes(FOLDER / name, data)

    def load(name):
        return torch.load(FOLDER / name, weights_only=True, map_location="cpu")

    with torch.serialization.safe_globals([argparse.Namespace]):
        args = describe(load("argparse.pt")["state_dict"])
    count = torch.load(FOLDER / "numpy.pt", weights_only=False)
    loads = {
        "plain.pt": {"state_dict": describe(load("plain.pt")["state_dict"])},
        "legacy.pt": {"state_dict": describe(load("legacy.pt")["state_dict"])},
        "deflated.pt": {"state_dict": describe(plain()["state_dict"])},
        "cuda.pt": {"state_dict": describe(load("cuda.pt")["state_dict"])},
        "half.pt": {"": describe(load("half.pt"))},
        "half-legacy.pt": {"": describe(load("half-legacy.pt"))},
        "parameters.pt": {"": describe(load("parameters.pt"))},
    }
    assert loads["half.pt"] == loads["half-legacy.pt"] == {"": describe(halves())}
    either = {
        "numpy.pt": {"state_dict": describe(count["state_dict"])},
        "argparse.pt": {"state_dict": args},
    }
    refused = sorted(set(files) - set(loads) - set(either))
    for name in refused:
        try:
            load(name)
        except (pickle.UnpicklingError, RuntimeError) as error:
            print(f"{name}: torch says {str(error).splitlines()[0][:90]}")
        else:
            print(f"{name}: torch itself takes it")
    assert not os.path.exists(MARK), "a hostile checkpoint was run"
    write_json(
        FOLDER.parent / "pickles.json", {"loads": loads, "either": either, "refused": refused}
    )
    print(f"{sum(len(data) for data in files.values())} bytes in {len(files)} files")


if __name__ == "__main__":
    main()
