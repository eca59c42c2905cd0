"""Draws the weightings of `train.weighting` on one axis, for docs/concepts/training.md.

python benchmarks/weightings.py --png docs/concepts/weightings.png
"""

import argparse
from pathlib import Path

import numpy as np

from numpyro_diffusion.train import weighting

SHOWN = {
    "EDM": weighting.EDM(),
    "Simple (cosine)": weighting.Simple(),
    "MinSNR(5)": weighting.MinSNR(5.0),
    "LogitNormal": weighting.LogitNormal(),
    "Likelihood": weighting.Likelihood(),
    "Sigmoid(2)": weighting.Sigmoid(2.0),
    "V (cosine), FlowMatching": weighting.FlowMatching(),
    "X0 (cosine)": weighting.X0(),
}


def draw(path: Path) -> None:
    import matplotlib.pyplot as plt

    log_snr = np.linspace(-8.0, 10.0, 400)
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.2), sharex=True, layout="constrained")
    for name, weight in SHOWN.items():
        values = np.asarray(weight(log_snr))
        error = values / (1.0 + np.exp(-log_snr))  # the expected integrand for standard normal data
        curves = values / np.interp(0.0, log_snr, values), error / np.trapezoid(error, log_snr)
        for axis, curve in zip(axes, curves, strict=True):
            axis.plot(log_snr, curve, "-" if weight.monotonic else "--", label=name, linewidth=1.3)
    axes[0].set(yscale="log", ylim=(1e-3, 1e3), ylabel=r"$w(\lambda) / w(0)$")
    axes[1].set(ylabel="share of the loss", ylim=(0.0, 0.35))
    for axis in axes:
        axis.set_xlabel(r"log-SNR $\lambda$ (noise left, data right)")
        axis.grid(alpha=0.2)
    axes[1].legend(fontsize=7, title="dashed: not monotonic", title_fontsize=7)
    figure.savefig(path, dpi=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="the same: it takes seconds")
    parser.add_argument("--png", type=Path, help="where to write the figure")
    options = parser.parse_args()
    for name, weight in SHOWN.items():
        values = np.asarray(weight(np.array([-6.0, 0.0, 6.0])))
        print(f"{name:26} monotonic {weight.monotonic!s:5}  w(-6), w(0), w(6) = {np.array2string(values, precision=4)}")
    if options.png:
        draw(options.png)


if __name__ == "__main__":
    main()
