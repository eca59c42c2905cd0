"""Checkpoints: what is loaded is what was saved, and a file that is anything else says what it is."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from numpyro_diffusion import checkpoint, noise
from numpyro_diffusion.denoise import Gaussian, NetworkDenoiser
from numpyro_diffusion.nn import MLP

SCHEDULES = [
    noise.VE(sigma_min=0.013, sigma_max=41.0),
    noise.VP(beta_min=0.2, beta_max=17.0, t_min=1e-3),
    noise.SubVP(beta_max=11.0),
    noise.Cosine(t_min=0.003),
    noise.Rectified(t_max=0.97),
    noise.Tabulated([11.0, 2.5, -9.0]),
]


def awake(event_shape):
    """A small network with random weights everywhere, also where it starts at zero."""
    sizes = {"features": 8, "num_blocks": 1, "embed_features": 6}
    graphdef, weights = nnx.split(nnx.eval_shape(lambda: MLP(event_shape, **sizes, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(0)
    weights = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), weights)
    return nnx.merge(graphdef, weights)


def make(schedule=SCHEDULES[1], target="edm", event_shape=(2, 3)):
    location = np.random.default_rng(1).normal(size=event_shape)
    return NetworkDenoiser(awake(event_shape), schedule=schedule, location=location, scale=2.5, target=target)


class Gain(nnx.Module):
    """A user's own backbone, with a matrix that is stored in column order."""

    def __init__(self, size, *, rngs=None):
        self.event_shape, self.size = (size,), size
        self.gain = nnx.Param(jnp.zeros((size, 2)))

    @property
    def config(self):
        return {"size": self.size}

    def __call__(self, x, c_noise, cond=None):
        return x * self.gain[...].sum(1)


class Forgetful(Gain):
    """A backbone whose `config` is not the one it was built with."""

    @property
    def config(self):
        return {"size": self.size + 1}


class Silent(nnx.Module):
    def __init__(self):
        self.event_shape = (2,)


def diverged(denoiser):
    """The denoiser with one weight that is NaN, not in the first array."""
    denoiser = jax.tree.map(jnp.array, denoiser)
    kernel = denoiser.weights["input_layer"]["kernel"]
    kernel[...] = kernel[...].at[2, 3].set(jnp.nan)
    return denoiser


@pytest.fixture
def path(tmp_path):
    return tmp_path / "denoiser.safetensors"


@pytest.fixture
def saved(path):
    checkpoint.save(path, make())
    return path


def rewrite(path, edit):
    """Applies `edit(description, tensors)` to a file, and writes the result as a well-formed file."""
    with safetensors.safe_open(path, framework="numpy") as file:
        description = json.loads(file.metadata()["numpyro_diffusion"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edit(description, tensors)
    path.write_bytes(safetensors.numpy.save(tensors, {"numpyro_diffusion": json.dumps(description)}))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("target", ["edm", "x0", "eps", "v", "velocity", "score"])
def test_loaded_denoiser_is_the_saved_one(path, schedule, target):
    denoiser = make(schedule, target)
    checkpoint.save(path, denoiser.unfreeze())
    loaded = checkpoint.load(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(denoiser)  # schedule, target, sizes, frozen
    jax.tree.map(np.testing.assert_array_equal, loaded, denoiser)


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 3)])
def test_predictions_are_equal_bit_for_bit(path, event_shape):
    denoiser = make(event_shape=event_shape)
    checkpoint.save(path, denoiser)
    predict = jax.jit(lambda denoiser, x_t: denoiser(x_t, 0.4).x0)
    x_t = jnp.ones(event_shape)
    np.testing.assert_array_equal(predict(checkpoint.load(path), x_t), predict(denoiser, x_t))


def test_saving_again_gives_the_same_bytes_and_leaves_nothing_else(saved):
    before = saved.read_bytes()
    for _ in range(3):
        checkpoint.save(saved, checkpoint.load(saved))
        assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_failed_save_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint._files.os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(saved, make(target="v"))
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_description_can_be_read_without_this_library(saved):
    with safetensors.safe_open(saved, framework="numpy") as file:
        assert list(file.metadata()) == ["numpyro_diffusion"]
        text = file.metadata()["numpyro_diffusion"]
        names = set(file.keys())
    description = json.loads(text)
    assert text == json.dumps(description, sort_keys=True, separators=(",", ":"))
    assert description["schedule"] == {
        "class": "VP",
        "config": {"beta_min": 0.2, "beta_max": 17.0, "t_min": 1e-3, "t_max": 1.0},
    }
    assert description["network"]["class"] == "MLP" and description["network"]["config"]["features"] == 8
    assert (description["format"], description["target"], description["dtype"]) == (1, "edm", "float32")
    assert description["event_shape"] == [2, 3]
    assert {"location", "scale", "weights/blocks/0/first/kernel"} <= names


def test_weights_in_column_order_are_saved_right(path):
    backbone = Gain(3)
    backbone.gain = nnx.Param(np.asfortranarray(np.arange(6.0, dtype=np.float32).reshape(3, 2)))
    checkpoint.save(path, NetworkDenoiser(backbone))
    loaded = checkpoint.load(path, backbone_class=Gain)
    np.testing.assert_array_equal(loaded.backbone.gain[...], np.arange(6.0).reshape(3, 2))


def test_float32_weights_stay_float32_in_double_precision(x64, path):
    denoiser = make()
    checkpoint.save(path, denoiser)
    loaded = checkpoint.load(path)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(np.testing.assert_array_equal, loaded, denoiser)


def test_float64_weights_need_double_precision(path):
    with (jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64)(True):
        denoiser = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) / 3.0, make())
        checkpoint.save(path, denoiser)
        jax.tree.map(np.testing.assert_array_equal, checkpoint.load(path), denoiser)
    with pytest.raises(ValueError, match="its weights are float64, which JAX would round. Set jax_enable_x64"):
        checkpoint.load(path)


@pytest.mark.parametrize("narrow", ["all", "weights"])
def test_bfloat16_weights_come_back_and_can_be_read_by_others(path, narrow):
    """All of a denoiser in bfloat16, or its weights and not its units: stored as float32, which holds them exactly."""
    denoiser = make()
    if narrow == "all":
        denoiser = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), denoiser)
    else:
        weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), denoiser.weights)
        denoiser = denoiser._replace(weights=weights)
    checkpoint.save(path, denoiser)
    loaded = checkpoint.load(path)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), loaded, denoiser)
    assert loaded.dtype == jnp.bfloat16 and loaded.scale.dtype == (jnp.bfloat16 if narrow == "all" else jnp.float32)
    before = path.read_bytes()
    checkpoint.save(path, loaded)
    assert path.read_bytes() == before
    stored = safetensors.numpy.load_file(path)["weights/input_layer/kernel"]
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, denoiser.weights["input_layer"]["kernel"][...].astype(np.float32))


# Damage


@pytest.mark.parametrize("size", [0, 4, 200, 2000, -1])
def test_truncated_file(saved, size):
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(ValueError, match="cannot load .*denoiser.safetensors: it is truncated, corrupt or not"):
        checkpoint.load(saved)


def test_any_file_that_is_not_safetensors(path):
    path.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 8)
    with pytest.raises(ValueError, match="it is truncated, corrupt or not a safetensors file"):
        checkpoint.load(path)


def test_every_flipped_byte_is_noticed(saved):
    whole = saved.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for position in [*range(8, 8 + header, 97), *range(8 + header, len(whole), 499), len(whole) - 1]:
        saved.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ValueError, match="cannot load"):
            checkpoint.load(saved)


def test_one_changed_weight_is_corruption(saved):
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(ValueError, match="the content is not what was saved: the file is corrupt"):
        checkpoint.load(saved)


def edit_schedule(description, tensors):
    description["schedule"]["config"]["beta_max"] = 16.0


def edit_format(description, tensors):
    description["format"] = 7


def edit_shape(description, tensors):
    tensors["weights/input_layer/kernel"] = tensors["weights/input_layer/kernel"].T.copy()


def edit_config(description, tensors):
    description["network"]["config"]["features"] = 16


def edit_unknown_config(description, tensors):
    description["network"]["config"]["depth"] = 16


def edit_names(description, tensors):
    tensors["weights/stem/kernel"] = tensors.pop("weights/input_layer/kernel")


def edit_dtype(description, tensors):
    tensors["scale"] = tensors["scale"].astype(np.float16)


def edit_network(description, tensors):
    description["network"]["class"] = "Transformer"


def edit_schedule_class(description, tensors):
    description["schedule"]["class"] = "Sigmoid"


def edit_event_shape(description, tensors):
    description["event_shape"] = [6]


def edit_target(description, tensors):
    description["target"] = "noise"


def edit_kind(description, tensors):
    description["schedule"]["class"] = ["VP"]


def edit_missing(description, tensors):
    del description["dtype"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_schedule, "the content is not what was saved: the file is corrupt. Copy or save it again"),
        (edit_format, "it has format 7; this version reads up to 2. Upgrade numpyro_diffusion"),
        (
            edit_shape,
            r"weights/input_layer/kernel must be float32 of shape \(6, 8\); got float32 of shape \(8, 6\)",
        ),
        (edit_config, r"must be float32 of shape \(.*16.*\); got float32 of shape \(.*8.*\)"),
        (edit_unknown_config, "its network cannot be rebuilt from its config .*depth"),
        (edit_names, r"missing \['weights/input_layer/kernel'\], unknown \['weights/stem/kernel'\]"),
        (edit_dtype, r"scale must be float32 of shape \(\); got float16 of shape \(\)"),
        (edit_network, "its network class 'Transformer' is none of MLP, UNet. Give it as backbone_class="),
        (
            edit_schedule_class,
            "its schedule class 'Sigmoid' is none of VP, SubVP, VE, Cosine, Rectified, Tabulated. Upgrade",
        ),
        (edit_event_shape, r"its event_shape is \[6\]; its network's is \(2, 3\)"),
        (edit_target, "its network cannot be rebuilt from its config .*target must be one of"),
        (edit_missing, r"its description is damaged \(KeyError\('dtype'\)\)"),
        (edit_kind, "its description is damaged .*schedule.class is"),
    ],
)
def test_file_that_disagrees_with_itself(saved, edit, message):
    rewrite(saved, edit)
    with pytest.raises(ValueError, match="cannot load .*denoiser.safetensors: .*" + message):
        checkpoint.load(saved)


def test_a_file_with_a_weight_that_is_not_finite_is_refused(path, monkeypatch):
    monkeypatch.setattr(checkpoint._checks, "finite", lambda *_: None)  # a writer that does not look
    checkpoint.save(path, diverged(make()))
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"cannot load .*: weights/input_layer/kernel must be finite; got 1 non-finite"
    ):
        checkpoint.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_safetensors_file(path, metadata):
    path.write_bytes(safetensors.numpy.save({"kernel": np.ones(3)}, metadata))
    with pytest.raises(ValueError, match="it is a safetensors file, but numpyro_diffusion did not write it"):
        checkpoint.load(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "1"}', '{"format": 1}'])
def test_damaged_description(path, text):
    path.write_bytes(safetensors.numpy.save({"kernel": np.ones(3)}, {"numpyro_diffusion": text}))
    with pytest.raises(ValueError, match="its description is damaged"):
        checkpoint.load(path)


def test_missing_file(path):
    with pytest.raises(FileNotFoundError):
        checkpoint.load(path)


# A user's own network


def test_own_backbone_is_given_by_its_class(path):
    checkpoint.save(path, NetworkDenoiser(Gain(3), scale=2.0))
    assert isinstance(checkpoint.load(path, backbone_class=Gain).backbone, Gain)
    with pytest.raises(ValueError, match="its network class 'Gain' is none of MLP, UNet. Give it as backbone_class="):
        checkpoint.load(path)
    with pytest.raises(ValueError, match="its network is a Gain; backbone_class is MLP"):
        checkpoint.load(path, backbone_class=MLP)


class Steps(noise.Rectified):
    """A user's own schedule."""


@pytest.mark.parametrize(
    ("error", "message", "build"),
    [
        (
            TypeError,
            "denoiser must be one of NetworkDenoiser, FlowMap, GivenMap, LearnedPrior to be saved; got Gaussian",
            lambda: Gaussian(jnp.zeros(2)),
        ),
        (
            TypeError,
            "backbone must have a dict `config` to be saved; Silent has none",
            lambda: NetworkDenoiser(Silent()),
        ),
        (
            ValueError,
            "schedule must be one of VP, SubVP, VE, Cosine, Rectified, Tabulated to be saved; got Steps",
            lambda: make(Steps()),
        ),
        (
            ValueError,
            r"denoiser could not be loaded again: its event_shape is \[3\]; its network's is \(4,\)",
            lambda: NetworkDenoiser(Forgetful(3)),
        ),
        (
            ValueError,
            "weights/blocks/0/first/bias must be one of bfloat16, float16, float32, float64 to be saved; got int32",
            lambda: jax.tree.map(lambda leaf: leaf.astype(jnp.int32), make()),
        ),
        (
            ValueError,
            r"weights/input_layer/kernel must be finite; got 1 non-finite values, the first at index \(2, 3\)",
            lambda: diverged(make()),
        ),
        (ValueError, "scale must be finite; got 1 non-finite", lambda: make()._replace(_scale=jnp.float32(np.inf))),
    ],
)
def test_what_cannot_be_saved_is_refused_before_writing(path, error, message, build):
    with pytest.raises(error, match=message):
        checkpoint.save(path, build())
    assert not path.exists()
