# SPDX-License-Identifier: Apache-2.0
"""Side by side with vector-quantize-pytorch: same weights and inputs, so same tokens, vectors, gradients, or a known reason."""

import inspect
from pathlib import Path

import pytest
import torch
import vector_quantize_pytorch as package
from cases import normal
from torch import Tensor

import steadyvq
from steadyvq.interop import from_vector_quantize_pytorch as load
from steadyvq.interop import vector_quantize_pytorch as interop

B, N, D, K = 3, 20, 8, 32


def latents(seed: int = 3, dim: int = D) -> Tensor:
    return normal(B, N, dim, seed=seed)


def theirs(kind: str, **arguments: object) -> torch.nn.Module:
    """A layer of the package whose codes lie among the latents."""
    layer = getattr(package, kind)(**arguments)
    with torch.no_grad():
        for i, (name, value) in enumerate(layer.named_buffers()):
            if name.endswith("_codebook.embed"):
                table = normal(*value.shape, seed=20 + i)
                value.copy_(torch.nn.functional.normalize(table, dim=-1) if arguments.get("use_cosine_sim") else table)
                layer.get_buffer(name.replace("embed", "embed_avg")).copy_(value)
    return layer


def compare(layer: torch.nn.Module, ours: steadyvq.Quantizer, z: Tensor, times: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tokens and vectors are equal, and the gradient of z_q; `times`: theirs has it that many times. Returns both losses."""
    upstream = normal(*z.shape, seed=9)
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    out, found = layer(x), ours(y)
    assert torch.equal(out[1].long(), found.indices)
    assert len(found.indices.unique()) > 5
    torch.testing.assert_close(out[0], found.z_q, rtol=1e-5, atol=1e-5)
    (a,) = torch.autograd.grad((out[0] * upstream).sum(), x, retain_graph=True)
    (b,) = torch.autograd.grad((found.z_q * upstream).sum(), y, retain_graph=True)
    torch.testing.assert_close(a, times * b, rtol=1e-4, atol=1e-5)
    if len(out) < 3:
        return out[0].new_zeros(()), found.loss
    loss = out[2].sum()
    if loss.requires_grad and found.loss.requires_grad:
        (a,) = torch.autograd.grad(loss, x)
        (b,) = torch.autograd.grad(found.loss, y)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    return loss, found.loss


@pytest.mark.parametrize("rotation", [True, False])
@pytest.mark.parametrize("cosine", [True, False])
def test_moving_averages_step_after_step(cosine, rotation):
    """The package updates in the forward, here `update` does; both quantize with the codes of the step before."""
    options = {"use_cosine_sim": cosine, "rotation_trick": rotation, "decay": 0.7, "commitment_weight": 0.5}
    layer = theirs("VectorQuantize", dim=D, codebook_size=K, **options)
    ours = load(layer.state_dict(), kind="VectorQuantize", **options)
    start = ours.codebook()
    for step in range(8):
        z = latents(step)
        torch.testing.assert_close(*compare(layer, ours, z))
        ours.update(ours(z))
        torch.testing.assert_close(layer.codebook, ours.codebook(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer._codebook.cluster_size[0], ours.maintenance["ema"].counts)
    assert (ours.codebook() - start).abs().max() > 0.1


def test_rotation_is_the_default_of_the_package():
    layer = theirs("VectorQuantize", dim=D, codebook_size=K)
    compare(layer, load(layer.state_dict(), kind="VectorQuantize"), latents())


def test_images_and_evaluation():
    layer = theirs("VectorQuantize", dim=D, codebook_size=K, accept_image_fmap=True).eval()
    ours = load(layer.state_dict(), kind="VectorQuantize", accept_image_fmap=True).eval()
    z = normal(2, D, 5, 4)
    out, indices, _ = layer(z)
    assert torch.equal(indices, ours(z).indices)
    assert torch.equal(out, ours(z).z_q)
    assert torch.equal(layer.get_output_from_indices(indices), ours.decode(indices))


def test_a_learnable_table_gets_the_same_gradient():
    options = {"learnable_codebook": True, "ema_update": False, "rotation_trick": False, "commitment_weight": 0.4}
    layer = package.VectorQuantize(dim=D, codebook_size=K, **options)
    with torch.no_grad():
        layer._codebook.embed.copy_(normal(1, K, D, seed=4))
    ours = load(layer.state_dict(), kind="VectorQuantize", **options)
    z = latents()
    mine, own = layer(z)[2], ours(z).loss
    # One term that reaches both sides there, two terms here: equal gradients, twice the value.
    torch.testing.assert_close(2 * mine, own)
    a, b = torch.autograd.grad(mine, layer._codebook.embed)[0], torch.autograd.grad(own, ours.codes.base)[0]
    torch.testing.assert_close(a[0], b)
    compare(layer, ours, z)


@pytest.mark.parametrize("rotation", [True, False])
def test_simvq(rotation):
    layer = package.SimVQ(dim=D, codebook_size=K, rotation_trick=rotation, commitment_weight=0.7)
    with torch.no_grad():
        layer.code_transform.weight.mul_(5)
    ours = load(layer.state_dict(), kind="SimVQ", rotation_trick=rotation, commitment_weight=0.7)
    z = latents()
    torch.testing.assert_close(*compare(layer, ours, z))
    a = torch.autograd.grad(layer(z)[2], layer.code_transform.weight)[0]
    torch.testing.assert_close(a, torch.autograd.grad(ours(z).loss, ours.codes.weight)[0])
    indices = ours.encode(z)
    torch.testing.assert_close(layer.indices_to_codes(indices), ours.decode(indices))


def test_simvq_with_a_bias():
    layer = package.SimVQ(dim=D, codebook_size=K, codebook_transform=torch.nn.Linear(D, D))
    ours = load(layer.state_dict(), kind="SimVQ")
    torch.testing.assert_close(layer.codebook, ours.codebook())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("levels", [[8, 5, 5], [4, 3, 7]])
def test_fsq(levels, symmetric):
    layer = package.FSQ(levels=levels, preserve_symmetry=symmetric)
    ours = load(layer.state_dict(), kind="FSQ", levels=levels, preserve_symmetry=symmetric)
    compare(layer, ours, latents(dim=3))


def test_lfq():
    """Entropies: eps is a floor inside the logarithm there and 0 here, which moves values a little."""
    arguments = {"entropy_loss_weight": 0.3, "commitment_loss_weight": 0.2, "diversity_gamma": 1.5}
    layer = package.LFQ(codebook_size=2**6, dim=6, **arguments)
    ours = load(layer.state_dict(), kind="LFQ", **arguments)
    z = 0.05 * latents(dim=6)
    upstream = normal(*z.shape, seed=9)
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    out, found = layer(x), ours(y)
    assert torch.equal(out.indices.long(), found.indices)
    torch.testing.assert_close(out.quantized, found.z_q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.entropy_aux_loss, found.loss, rtol=1e-3, atol=1e-3)
    for objective in ((out.quantized, found.z_q), (out.entropy_aux_loss, found.loss)):
        pairs = zip(objective, (x, y), strict=True)
        a, b = (
            torch.autograd.grad((value * (upstream if value.dim() else 1)).sum(), v, retain_graph=True)[0]
            for value, v in pairs
        )
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3 * float(b.abs().max()))


@pytest.mark.parametrize("rotation", [True, False])
def test_residual_with_attached_residuals(rotation):
    options = {"rotation_trick": rotation, "quant_grad_frac": 1.0}
    layer = theirs("ResidualVQ", dim=D, codebook_size=K, num_quantizers=3, **options)
    ours = load(layer.state_dict(), kind="ResidualVQ", **options)
    for step in range(3):
        z = latents(step)
        torch.testing.assert_close(*compare(layer, ours, z))
        ours.update(ours(z))
        torch.testing.assert_close(layer.codebooks, ours.codebook(), rtol=1e-5, atol=1e-6)


def test_detached_residuals_hand_the_gradient_over_once_per_layer_there():
    layer = theirs("ResidualVQ", dim=D, codebook_size=K, num_quantizers=3, rotation_trick=False)
    ours = load(layer.state_dict(), kind="ResidualVQ", rotation_trick=False)
    torch.testing.assert_close(*compare(layer, ours, latents(), times=3.0))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("VectorQuantize", {"heads": 2, "codebook_dim": D // 2, "separate_codebook_per_head": True}, "2 heads"),
        ("VectorQuantize", {"codebook_dim": 4}, "projections"),
        ("VectorQuantize", {"kmeans_init": True}, "k-means start"),
        ("VectorQuantize", {"affine_param": True}, "no counterpart"),
        ("ResidualVQ", {"num_quantizers": 2, "implicit_neural_codebook": True}, "no counterpart"),
        ("SimVQ", {"frozen_codebook_dim": 5}, "vqgan_lc"),
        ("SimVQ", {"codebook_transform": torch.nn.Sequential(torch.nn.Linear(D, D))}, "no linear layer"),
    ],
)
def test_weights_without_a_counterpart_are_refused(kind, arguments, message):
    layer = getattr(package, kind)(dim=D, codebook_size=K, **arguments)
    with pytest.raises(ValueError, match=message):
        load(layer.state_dict(), kind=kind)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("VectorQuantise", {}, "did you mean 'VectorQuantize'"),
        ("VectorQuantize", {"threshold_ema_dead_code": 2}, "overrides="),
        ("VectorQuantize", {"decai": 0.9}, "did you mean 'decay'"),
        ("VectorQuantize", {"codebook_size": 64}, "made for codebook_size=32"),
        ("VectorQuantize", {"learnable_codebook": True, "ema_update": True}, "either averaged or trained"),
        ("ResidualVQ", {}, "no layers"),
        ("SimVQ", {}, "frozen_codebook"),
    ],
)
def test_arguments_without_a_counterpart_are_refused(kind, options, message):
    state = theirs("VectorQuantize", dim=D, codebook_size=K).state_dict()
    with pytest.raises(ValueError, match=message):
        load({} if kind == "ResidualVQ" else state, kind=kind, **options)


PAGE = (Path(__file__).parent.parent / "docs" / "vector-quantize-pytorch.md").read_text()


@pytest.mark.parametrize("kind", ["VectorQuantize", "ResidualVQ", "SimVQ", "FSQ", "LFQ"])
def test_every_argument_of_the_package_is_known_and_on_the_page(kind):
    arguments = set(inspect.signature(getattr(package, kind)).parameters) - {"vq_kwargs"}
    for name in arguments:
        mapped = name in interop._KNOWN[kind] or name in interop._REFUSED or name in interop._WITHOUT_EFFECT
        assert mapped, f"{name} of {kind} is new: map it or say why not"
        assert f"`{name}`" in PAGE, f"{name} of {kind} is not on the page"


def test_overrides_come_last_and_the_result_is_a_plain_quantizer_of_ours():
    layer = theirs("VectorQuantize", dim=D, codebook_size=K)
    ours = load(layer.state_dict(), kind="VectorQuantize", overrides={"maintenance": {"replace": {}}, "seed": 5})
    assert list(ours.maintenance) == ["ema", "replace"]
    again = steadyvq.build_quantizer(**ours.spec)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again.encode(latents()), ours.encode(latents()))
