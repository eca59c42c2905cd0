"""The diffusion half in ratios, measured in one process: what sampling and densities cost, and what a step is worth.

    python benchmarks/diffusion.py --json OUT

    unet_over_network     wall time of a sampler per evaluation of a U-Net of a million weights on 28x28 images, over
                          the bare jitted network on the same batch
    dpm15_over_ddpm250    sliced W1 to exact draws of DPM-Solver++ with 15 evaluations over that of DDPM with 250, on 25
                          Gaussians in two dimensions with the exact denoiser; the floor is that of other exact draws
    hutchinson_over_flow  wall time of the flow's log-density with one probe over that of the flow, an MLP in 64-D
    speed_over_azula      evaluations per second of Heun's sampler over those of azula's (PyTorch, the same perceptron
                          or its own U-Net with as many weights, the same steps, the better of one thread and all), the
                          smaller of MLP and U-Net; needs `pip install azula torch`

Times are medians of interleaved repetitions.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from numpyro_diffusion.denoise import GaussianMixture, NetworkDenoiser
from numpyro_diffusion.density import log_prob
from numpyro_diffusion.diagnostics import sliced_wasserstein
from numpyro_diffusion.nn import MLP, UNet
from numpyro_diffusion.noise import VE
from numpyro_diffusion.solve import Ancestral, DPMSolverPP, Heun, Solver, sample, solve, terminal_point

IMAGE = (28, 28)


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def median_ratio(first: Callable[[], object], second: Callable[[], object], repeats: int) -> float:
    """Median over interleaved repetitions of the time of `first` over that of `second`, after a warm-up."""
    first(), second()
    return float(np.median([seconds(first) / seconds(second) for _ in range(repeats)]))


@partial(jax.jit, static_argnums=0)
def walk(solver: Solver, denoiser: NetworkDenoiser, z: jax.Array) -> jax.Array:
    keys = jax.random.split(jax.random.key(1), len(z))

    def one(z: jax.Array, key: jax.Array) -> jax.Array:
        return solve(solver, denoiser, terminal_point(denoiser, z), key if solver.stochastic else None)

    return jax.vmap(one)(z, keys)


def unet(fast: bool) -> NetworkDenoiser:
    return NetworkDenoiser(UNet(IMAGE, features=8 if fast else 32, rngs=nnx.Rngs(0)))


def mlp() -> NetworkDenoiser:
    return NetworkDenoiser(MLP((64,), features=256, rngs=nnx.Rngs(0)))


def noise(batch: int, denoiser: NetworkDenoiser) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (batch, *denoiser.event_shape))


def unet_over_network(fast: bool, repeats: int) -> float:
    denoiser, solver = unet(fast), Ancestral(6 if fast else 16, eta=0.0)
    z = noise(4 if fast else 16, denoiser)
    graphdef, weights = nnx.split(denoiser.backbone)

    @jax.jit
    def network(weights: nnx.State, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: nnx.merge(graphdef, weights)(x, jnp.float32(0.1)))(x)

    def alone() -> jax.Array:
        for _ in range(solver.evaluations()):
            out = network(weights, z)
        return out

    return median_ratio(lambda: walk(solver, denoiser, z), alone, repeats)


@jax.jit
def sliced_w1(draws: jax.Array, exact: jax.Array) -> jax.Array:
    return sliced_wasserstein(draws, exact, jax.random.key(7), 200)


@partial(jax.jit, static_argnums=(0, 3))
def draws_of(solver: Solver, law: GaussianMixture, key: jax.Array, count: int) -> jax.Array:
    return sample(solver, law, key, (count,))


def dpm15_over_ddpm250(fast: bool) -> dict[str, float]:
    corners = 8.0 * np.array([(i, j) for i in range(-2, 3) for j in range(-2, 3)])
    law = GaussianMixture(np.ones(25) / 25, corners, 1.0, VE(0.02, 80.0))
    count, repeats = (500, 2) if fast else (5000, 8)
    names = {"dpm15": DPMSolverPP(15), "ddpm250": Ancestral(250), "heun15": Heun(8)}
    distances = {name: [] for name in (*names, "floor")}
    for repeat in range(repeats):
        keys = jax.random.split(jax.random.key(repeat), 3)
        exact = law.sample(keys[0], (4 * count,))
        for name, solver in names.items():
            distances[name].append(sliced_w1(draws_of(solver, law, keys[1], count), exact))
        distances["floor"].append(sliced_w1(law.sample(keys[2], (count,)), exact))
    return {name: float(np.mean(values)) for name, values in distances.items()}


def hutchinson_over_flow(fast: bool, repeats: int) -> float:
    denoiser, solver = mlp(), Heun(8 if fast else 32)
    x = noise(32 if fast else 256, denoiser)

    @jax.jit
    def density(denoiser: NetworkDenoiser, x: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.key(1), len(x))
        return jax.vmap(lambda x, key: log_prob(denoiser, x, solver, key=key, num_probes=1).value)(x, keys)

    return median_ratio(lambda: density(denoiser, x), lambda: walk(solver, denoiser, x), repeats)


def speed_over_azula(fast: bool, repeats: int) -> dict[str, float] | str:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # PyTorch's threads wait badly on a busy machine
    try:
        import torch
        from azula.denoise import KarrasDenoiser
        from azula.nn.unet import UNet as AzulaUNet
        from azula.noise import VESchedule
        from azula.sample import HeunSampler
    except ImportError as error:
        return f"not measured: {error}. pip install azula torch"

    class Block(torch.nn.Module):
        """A block of `numpyro_diffusion.nn.MLP`."""

        def __init__(self, features: int, embed: int) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(features, elementwise_affine=False)
            self.modulation = torch.nn.Linear(embed, 2 * features)
            self.first, self.second = (torch.nn.Linear(features, features) for _ in range(2))

        def forward(self, h: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
            scale, shift = self.modulation(embedding).chunk(2, -1)
            return h + self.second(torch.nn.functional.silu(self.first((1 + scale) * self.norm(h) + shift)))

    class Backbone(torch.nn.Module):
        """`numpyro_diffusion.nn.MLP`, or azula's U-Net modulated by the same embedding."""

        def __init__(self, features: int, embed: int, image: bool) -> None:
            super().__init__()
            self.image = image
            self.register_buffer("frequencies", 32.0 ** torch.linspace(0, 1, embed // 2))
            self.embed = torch.nn.Linear(embed, embed)
            if image:
                width = [features, 2 * features, 2 * features]
                self.net = AzulaUNet(1, 1, hid_channels=width, hid_blocks=(2, 2, 2), mod_features=embed)
            else:
                self.inward = torch.nn.Linear(64, features)
                self.blocks = torch.nn.ModuleList([Block(features, embed) for _ in range(3)])
                self.outward = torch.nn.Sequential(
                    torch.nn.LayerNorm(features), torch.nn.SiLU(), torch.nn.Linear(features, 64)
                )

        def forward(self, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
            angles = c_noise[..., None] * self.frequencies
            embedding = torch.nn.functional.silu(self.embed(torch.cat([angles.sin(), angles.cos()], -1)))
            if self.image:
                return self.net(x[:, None], embedding)[:, 0]
            h = self.inward(x)
            for block in self.blocks:
                h = block(h, embedding)
            return self.outward(h)

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    steps, ratios = 4 if fast else 12, {}
    width = 8 if fast else 34  # azula's has as many weights as ours then
    for name, ours, peer, batch, times in (
        ("mlp", mlp(), Backbone(256, 64, image=False), 32 if fast else 512, repeats),
        ("unet", unet(fast), Backbone(width, 64, image=True), 4 if fast else 16, repeats // 3),
    ):
        z = noise(batch, ours)
        sampler = HeunSampler(KarrasDenoiser(peer, VESchedule(0.002, 80.0)), steps=steps, silent=True)
        start = 80.0 * torch.tensor(np.asarray(z))
        for threads in (1, os.cpu_count()):  # on a busy machine PyTorch may be faster with one
            torch.set_num_threads(threads)
            ratio = 1.0 / median_ratio(
                lambda o=ours, z=z: walk(Heun(steps + 1), o, z), lambda s=sampler, x=start: s(x).numpy(), times
            )
            ratios[name] = min(ratio, ratios.get(name, ratio))
        ratios[f"{name}_weights"] = [sum(w.size for w in jax.tree.leaves(ours.params)), count(peer)]
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="few repetitions of small problems")
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    repeats = 3 if options.fast else 15

    distances = dpm15_over_ddpm250(options.fast)
    peer = speed_over_azula(options.fast, repeats)
    results = {
        "unet_over_network": unet_over_network(options.fast, repeats),
        "dpm15_over_ddpm250": distances["dpm15"] / distances["ddpm250"],
        "sliced_w1": distances,
        "hutchinson_over_flow": hutchinson_over_flow(options.fast, repeats),
        "speed_over_azula": peer if isinstance(peer, str) else min(peer["mlp"], peer["unet"]),
        "speed_over_azula_each": peer,
        "device": jax.devices()[0].device_kind,
    }
    for name, value in results.items():
        print(f"{name:22} {value if not isinstance(value, float) else round(value, 3)}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
