# SPDX-License-Identifier: Apache-2.0
"""Recomputes the numbers of an exported run with numpy alone: nothing of this toolkit is imported.

    python recheck.py RUN/export.npz

Indices are recomputed from latents and codes in float64, use is the number of distinct *rows* hit, PSNR comes from the
8-bit images. Prints one line of JSON.
"""

import json
import sys

import numpy as np


def nearest(latents: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The nearest row of `codes` (K, d) to each row of `latents` (N, d), lowest index on ties."""
    found = []
    for rows in np.array_split(latents.astype(np.float64), max(1, len(latents) // 64)):
        difference = rows[:, None, :] - codes.astype(np.float64)[None]
        found.append((difference**2).sum(-1).argmin(1))
    return np.concatenate(found)


def main() -> None:
    """Reads the arrays and prints what they say."""
    with np.load(sys.argv[1], allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}
    latents = data["latents"].reshape(-1, data["latents"].shape[-1])
    tokens, codes = data["tokens"].reshape(-1), data["codes"]
    error = (data["originals"].astype(np.float64) - data["reconstructions"].astype(np.float64)) ** 2
    psnr = 10 * np.log10(255.0**2 / error.reshape(len(error), -1).mean(1))
    rows = np.unique(codes[tokens], axis=0)
    ceiling = 1 - (1 - 1 / len(codes)) ** len(tokens)
    counts = np.unique(tokens, return_counts=True)[1]
    share = counts / counts.sum()
    summary = {
        "indices_differ": int((nearest(latents, codes) != tokens).sum()),
        "active_rows": len(rows),
        "of_ceiling": round(len(rows) / len(codes) / ceiling, 5),
        "perplexity": round(float(np.exp(-(share * np.log(share)).sum())), 3),
        "psnr": round(float(psnr.mean()), 5),
        "tokens": len(tokens),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
