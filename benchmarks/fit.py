"""Times a fit of Chinchilla's form, its bootstrap, and L-BFGS from Hoffmann's grid, on synthetic points.

python benchmarks/fit.py --markdown benchmarks/fit.md
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from outgrow.scaling import LAWS, fit
from outgrow.scaling.laws import hoffmann_grid


def points(count: int) -> dict[str, np.ndarray]:
    """Hoffmann's law (arXiv 2203.15556) with 0.3% of noise."""
    rng = np.random.default_rng(0)
    params, tokens = 10 ** rng.uniform(7, 10, count), 10 ** rng.uniform(9, 11.5, count)
    loss = 1.69 + 406.4 / params**0.34 + 410.7 / tokens**0.28
    return {"params": params, "tokens": tokens, "loss": loss * np.exp(rng.normal(0, 0.003, count))}


def main() -> None:
    """Prints the table, and writes it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=300)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    columns, law = points(arguments.points), LAWS["chinchilla"]
    ways = {"variable projection": {}, "and 4,000 resamples": {"resamples": 4000}, "L-BFGS from 4,500 starts": {"starts": hoffmann_grid}}
    lines = [
        f"# Fitting Chinchilla's form to {arguments.points} points\n",
        "`python benchmarks/fit.py`, one process on one of two CPU cores.\n",
    ]
    lines += ["| way | seconds | sum of Huber losses | alpha | beta |"]
    lines.append("|---|---|---|---|---|")
    for name, options in ways.items():
        began = time.perf_counter()
        found = fit(law, columns, **options)
        taken, (alpha, beta) = time.perf_counter() - began, (found.coefficients[key] for key in ("alpha", "beta"))
        lines.append(f"| {name} | {taken:.2f} | {found.objective:.9e} | {alpha:.6f} | {beta:.6f} |")
    print("\n".join(lines))
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
