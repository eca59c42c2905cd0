r"""The log-density of what a deterministic solver really draws: the law of $F(z)$, in however few steps.

A solver in $n$ steps is a smooth map $x = F(z)$ of $z \sim N(0, I)$. If $F$ is one-to-one, its draws have the density

$$\log q(F(z)) = \log N(z; 0, I) - \log | \det \partial F / \partial z |,$$

exactly: there is no error of the steps, of the terminal law or of the network, since it is the law of this map and not
of the flow that it approximates. It is known at a point whose noise is known, and costs $d$ Jacobian-vector products
through the solve, so it is for few dimensions. `flow` has the density of the flow itself at any point.

References:
    Hoffman et al., NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural transport, 2019,
    https://arxiv.org/abs/1903.03704.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from numpyro_diffusion.denoise import Denoiser
from numpyro_diffusion.solve import Solver, push_forward


class Pushed(NamedTuple):
    """A point with the log-density there of the law that it was drawn from."""

    x: jax.Array  # the point, of `event_shape`
    log_prob: jax.Array  # nats, a scalar


def pushed(solver: Solver, denoiser: Denoiser, z: jax.Array) -> Pushed:
    r"""The point $F(z)$ of a deterministic solver, and the log-density of its draws there.

    Args:
        solver: a deterministic solver.
        denoiser: the model.
        z: noise of `event_shape`.

    Returns:
        A `Pushed`, differentiable in `z`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_diffusion.denoise import Gaussian
        >>> from numpyro_diffusion.density import pushed
        >>> from numpyro_diffusion.solve import Heun
        >>> round(float(pushed(Heun(), Gaussian([3.0]), jnp.zeros(1)).log_prob), 2)
        -0.92
    """
    z = jnp.asarray(z, jnp.result_type(z, float))

    def flat(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = push_forward(solver, denoiser, z.reshape(denoiser.event_shape))
        return x.reshape(-1), x

    jacobian, x = jax.jacfwd(flat, has_aux=True)(z.reshape(-1))
    return Pushed(x, norm.logpdf(z).sum() - jnp.linalg.slogdet(jacobian)[1])
