"""What kernels require of a model, checked before the run: an error names the sites, the rule and the cure."""

import warnings
from collections.abc import Iterable, Mapping

from numpyro_diffusion.denoise import Product
from numpyro_diffusion.denoise.wrapped import inside
from numpyro_diffusion.infer.model.record import Reading
from numpyro_diffusion.infer.model.sites import PriorSite
from numpyro_diffusion.infer.model.structure import Structure
from numpyro_diffusion.solve import GivenMap, Solver


def check_fixed(kernel: str, structure: Structure, but_altered: Iterable[str] = ()) -> None:
    """Raises `ValueError` unless the model is the same function of its sites every time it runs.

    Args:
        kernel: name of the kernel, for the message.
        structure: of the model.
        but_altered: diffusion sites that may be masked or scaled.
    """
    if structure.subsampled:
        raise ValueError(
            f"{kernel} needs all data at every step; the plates {list(structure.subsampled)} show a random part of "
            "them. Drop subsample_size"
        )
    if structure.draws_elsewhere:
        raise ValueError(
            f"{kernel} needs a likelihood that is a fixed function of its sites; the model draws random numbers by "
            "numpyro.prng_key() outside of a sample site. Make them a sample site, or draw them once and pass them as "
            "an argument"
        )
    if structure.in_loop:
        raise ValueError(
            f"{kernel} cannot read the diffusion sites {list(structure.in_loop)} inside numpyro's scan. Put them in a "
            "plate before it, or write a Python loop with a name for each"
        )
    altered = [name for name in structure.diffusion if structure.latent[name].is_altered]
    altered = sorted(set(altered) - set(but_altered))
    if altered:
        raise ValueError(
            f"sites {altered} must carry their DiffusionPrior unmasked and unscaled; got a mask, a scale handler or a "
            "subsampling plate around them"
        )


def check_supports(kernel: str, structure: Structure) -> None:
    """Raises `ValueError` if the support of a site depends on a site in another block of a composite kernel."""
    moving = {name: sorted(s.support_given) for name, s in structure.latent.items() if s.support_given}
    if moving:
        raise ValueError(
            f"the supports of sites {sorted(moving)} depend on sites of other blocks, {moving}, which {kernel} cannot "
            "follow. Put these sites into one block"
        )


def check_has_prior(structure: Structure) -> None:
    """Raises `ValueError` unless the model has a latent diffusion site."""
    if not structure.diffusion:
        observed = list(structure.observed_priors)
        reason = f"the DiffusionPrior sites {observed} are observed" if observed else "it has no DiffusionPrior site"
        raise ValueError(f"the model needs a latent DiffusionPrior site; {reason}")


def check_continuous(kernel: str, structure: Structure) -> None:
    """Raises `ValueError` if a latent site is discrete."""
    if structure.discrete:
        raise ValueError(
            f"{kernel} moves continuous sites; sites {structure.discrete} are discrete. Marginalise them, or give them "
            "a block of numpyro.infer.Gibbs, such as DiscreteGibbs"
        )


def check_diffusion_only(kernel: str, structure: Structure) -> None:
    """Raises `ValueError` if a latent site is not a diffusion site, or a prior depends on another diffusion site."""
    check_continuous(kernel, structure)
    if structure.others:
        copied = [name.removesuffix("_unobserved") for name in structure.others if name.endswith("_unobserved")]
        if copied:
            raise ValueError(
                f"sites {copied} are sampled with obs_mask=, which adds latent copies of the data "
                f"({copied[0]}_unobserved). Leave what is missing out by a mask instead: "
                f"with numpyro.handlers.mask(mask=...): numpyro.sample({copied[0]!r}, ..., obs=y)"
            )
        x_kernel = "" if kernel == "DiffusionPCN" else f", x_kernel={kernel}"
        raise ValueError(
            f"{kernel} moves DiffusionPrior sites only; the model also has latent sites {structure.others}. Use "
            f"DiffusionGibbs(model{x_kernel}), which moves these by NUTS"
        )
    if structure.dependent:
        raise ValueError(
            f"the priors of diffusion sites {structure.dependent} depend on other diffusion sites that {kernel} moves "
            "together with them; use NoiseSpace(model)"
        )


def check_walk(kernel: str, reading: Reading) -> None:
    """Raises unless a kernel can draw all latent sites of a model by the reverse process of their priors."""
    check_fixed(kernel, reading.structure)
    check_has_prior(reading.structure)
    check_diffusion_only(kernel, reading.structure)


def check_walkable(kernel: str, sites: Mapping[str, PriorSite]) -> None:
    """Raises `ValueError` for a prior whose reverse process and flow end at another law than its own.

    Args:
        kernel: name of the kernel, for the message.
        sites: the diffusion sites.
    """
    products = [name for name, site in sites.items() if isinstance(inside(site.denoiser), Product)]
    if products:
        raise ValueError(
            f"the priors of sites {products} are a Product, whose reverse process and flow do not end at the product: "
            f"{kernel} would sample another law. Make one factor the prior and the others numpyro.factor, or use "
            "MALA(model), or AnnealedLangevin(model, metropolis=True)"
        )


def check_reverse(kernel: str, solver: Solver | GivenMap, sites: Mapping[str, PriorSite]) -> None:
    """Raises `ValueError` unless a solver can draw the clean point given a noisy one; warns if that is of first order.

    A kernel that noises a point and denoises it needs that law, by its flow or by the reverse process. In a solver of
    first order it is off by far more than the law of its draws: `Ancestral(num_times=64)` gives a variance of .45 for
    .5.
    """
    if isinstance(solver, GivenMap):
        for name, site in sites.items():
            if tuple(site.denoiser.event_shape) != solver.event_shape or site.prior.batch_shape:
                raise ValueError(
                    f"{kernel} needs a GivenMap of the law of site {name!r}, of points of shape "
                    f"{tuple(site.denoiser.event_shape)}; this one is of one law of points of shape "
                    f"{solver.event_shape}. Use solve.Adams()"
                )
        return
    if solver.law == "marginals":
        raise ValueError(
            f"{kernel} needs the law of the clean point given the noisy one; {solver} has law={solver.law!r}. Use "
            "solve.Adams() or solve.DPMSolverPP(eta=1.0)"
        )
    if solver.evaluations() is None:
        raise ValueError(f"{kernel} needs a solver with a fixed number of steps, such as solve.Adams(); got {solver}")
    if solver.order < 2:
        warnings.warn(
            f"{kernel} relies on the law of the clean point given the noisy one, which {solver} has to first order in "
            "its steps: variances may be off by ten per cent. Use solve.Adams() or solve.DPMSolverPP(eta=1.0), or many "
            "more steps",
            stacklevel=4,
        )


def check_names(kernel: str, structure: Structure, names: Iterable[str]) -> None:
    """Raises `ValueError` if the model has a site with a name that a kernel needs for itself."""
    taken = sorted(set(names) & set(structure.latent))
    if taken:
        raise ValueError(f"{kernel} needs the site names {taken} for itself. Rename these sites of the model")
