#!/usr/bin/env python3
"""Golden normals of the counter-based generator, in f64, written independently of the program.

    python tests/golden/make_philox.py > tests/golden/philox.json

Python's standard library is enough.
"""

import json
import math

M0, M1, W0, W1, MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def philox(key, ctr):
    k0, k1 = key
    x0, x1, x2, x3 = ctr
    for _ in range(10):
        p0, p1 = M0 * x0, M1 * x2
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 & MASK, (p0 >> 32) ^ x3 ^ k1, p0 & MASK
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return x0, x1, x2, x3


def normals(seed, stream, image, step, count):
    out = []
    for quad in range(-(-count // 4)):
        words = philox((seed & MASK, seed >> 32), (quad, step, image, stream))
        for u, v in (words[:2], words[2:]):
            radius = math.sqrt(-2 * math.log(((u >> 9) + 0.5) / 2**23))
            angle = 2 * math.pi * v / 2**32
            out += [radius * math.cos(angle), radius * math.sin(angle)]
    return out[:count]


STEP_NOISE = 1
print(json.dumps([round(z, 9) for z in normals(0x0123456789ABCDEF, STEP_NOISE, 1000, 5, 256)]))
