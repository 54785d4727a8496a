"""Makes measure.json: distances, diversity and pixel statistics of small sets of pictures.

    python tests/golden/measure/make_measure_golden.py

Each number is computed here from its definition, by loops and by scipy's general functions, and not
in the way that the program takes.

Made with Python 3.11, numpy 2.4.6, scipy 1.17.1.
"""

import colorsys
import json
from pathlib import Path

import numpy as np
from scipy.linalg import eigvalsh, norm, sqrtm, svdvals
from scipy.signal import convolve2d

GOLDEN = Path(__file__).resolve().parent
rng = np.random.default_rng(31)


def rows(n, d, offset=0.0):
    """n correlated rows of d features, as f32 of four decimals."""
    values = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) / np.sqrt(d)
    return np.round(values + offset, 4).astype(np.float32).astype(np.float64)


def rows_of_rank(rank, n, d):
    """n rows of d features that span `rank` dimensions: eighths, which f32 holds exactly."""
    return rng.integers(-3, 4, (n, rank)) @ rng.integers(-3, 4, (rank, d)) / 8


def root(covariance):
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def frechet(a, b):
    s1, s2 = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    difference = a.mean(0) - b.mean(0)
    product = root(s1) @ s2 @ root(s1)
    shared = np.sqrt(eigvalsh((product + product.T) / 2).clip(0)).sum()
    d = a.shape[1]
    if min(len(a), len(b)) > d and min(np.linalg.matrix_rank(s) for s in (s1, s2)) == d:
        assert abs(np.trace(sqrtm(s1 @ s2)).real - shared) < 1e-9 * shared
    else:
        # The eigenvalues that are zero but for rounding leave more of it after the root.
        centred = (a - a.mean(0)) @ (b - b.mean(0)).T
        exact = svdvals(centred).sum() / np.sqrt((len(a) - 1) * (len(b) - 1))
        assert abs(exact - shared) < 1e-6 * exact
        shared = exact
    return difference @ difference + np.trace(s1) + np.trace(s2) - 2 * shared


def kid(a, b):
    def kernel(x, y):
        return (x @ y / len(x) + 1) ** 3

    def within(x):
        unequal = [kernel(p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j]
        return np.mean(unequal)

    return within(a) + within(b) - 2 * np.mean([kernel(p, q) for p in a for q in b])


def unit(x):
    return x / norm(x, axis=1, keepdims=True)


def cmmd(a, b):
    def kernel(x, y):
        return np.mean([np.exp(-norm(p - q) ** 2 / 200) for p in x for q in y])

    a, b = unit(a), unit(b)
    return 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))


def pairwise(x):
    x = unit(x)
    return np.mean([1 - x[i] @ x[j] for i in range(len(x)) for j in range(i)])


def vendi(x):
    values = eigvalsh(unit(x) @ unit(x).T / len(x))
    values = values[values > 1e-15]
    return np.exp(-np.sum(values * np.log(values)))


def picture(width, height):
    """Half of the values black or white."""
    values = rng.integers(0, 256, (height, width, 3))
    extreme = rng.integers(0, 2, values.shape) * 255
    return np.where(rng.integers(0, 2, values.shape), values, extreme)


def pixels(pictures):
    saturation, value, contrast, laplacian = [], [], [], []
    for p in pictures:
        hsv = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in p.reshape(-1, 3) / 255])
        grey = p @ np.array([0.299, 0.587, 0.114])
        saturation.append(hsv[:, 1].mean())
        value.append(hsv[:, 2].mean())
        contrast.append((grey / 255).std())
        if min(grey.shape) >= 3:
            stencil = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
            laplacian.append(convolve2d(grey, stencil, "valid").var())
        else:
            laplacian.append(0.0)
    values = np.concatenate([p.ravel() for p in pictures])
    return {
        "pvs": np.std(saturation) + np.std(value) + np.std(contrast),
        "saturated": np.mean((values == 0) | (values == 255)),
        "saturation": np.mean(saturation),
        "laplacian_variance": np.mean(laplacian),
    }


def written(x):
    return [[float(np.float32(v)).__round__(4) for v in row] for row in x]


def distances(name, a, b):
    numbers = {"frechet": frechet(a, b), "kid": kid(a, b), "cmmd": cmmd(a, b)}
    return {"name": name, "a": written(a), "b": written(b), **numbers}


def diversity(x):
    return {"rows": written(x), "pairwise_cosine_distance": pairwise(x), "vendi": vendi(x)}


def main():
    same = rows(9, 8)
    pictures = [picture(9, 7), picture(5, 4), picture(2, 6)]
    golden = {
        "distances": [
            distances("more rows than dimensions", rows(45, 8), rows(100, 8, 0.3)),
            distances("fewer rows than dimensions", rows(6, 16), rows(5, 16, 0.2)),
            distances("fewer rows on one side", rows(4, 12, -0.5), rows(40, 12)),
            distances("many rows of low rank", rows_of_rank(3, 50, 10), rows_of_rank(4, 30, 10)),
            distances("one dimension", rows(7, 1), rows(11, 1, 2.0)),
        ],
        "diversity": [
            diversity(rows(4, 16, 0.5)),
            diversity(rows(12, 8)),
            diversity(np.concatenate([same, same[:3]])),
            diversity(rows(2, 8, 3.0)),
        ],
        "pixels": {
            "pictures": [
                {"width": p.shape[1], "height": p.shape[0], "rgb": p.ravel().tolist()}
                for p in pictures
            ],
            **pixels(pictures),
        },
    }
    (GOLDEN / "measure.json").write_text(json.dumps(golden) + "\n")


main()
