"""What each weighting of `train.weighting` makes of the noise levels: its weight at three, and whether it is monotonic.

    python benchmarks/weightings.py --png docs/concepts/weightings.png

The figure, of docs/concepts/training.md, has all of them on one axis.
"""

import argparse
import json
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
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--png", type=Path, help="where to write the figure")
    options = parser.parse_args()
    rows = []
    print(f"{'weighting':26}{'monotonic':>10}{'w(-6)':>10}{'w(0)':>10}{'w(6)':>10}")
    for name, weight in SHOWN.items():
        values = [float(value) for value in weight(np.array([-6.0, 0.0, 6.0]))]
        rows.append(
            {"weighting": name, "monotonic": weight.monotonic, "w(-6)": values[0], "w(0)": values[1], "w(6)": values[2]}
        )
        print(f"{name:26}{weight.monotonic!s:>10}{values[0]:10.4g}{values[1]:10.4g}{values[2]:10.4g}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.png:
        draw(options.png)


if __name__ == "__main__":
    main()
