# SPDX-License-Identifier: Apache-2.0
"""Quantizers of DAC, EnCodec and Mimi from checkpoints of the published names, against their arithmetic written out."""

import pytest
import torch
from cases import normal
from foreign import State
from safetensors.torch import save_file
from torch import Tensor

from steadyvq import build_quantizer
from steadyvq.interop import from_dac, from_encodec, from_mimi

B, T, D, INNER, K, LAYERS = 2, 9, 12, 4, 16, 3


def nearest(x: Tensor, table: Tensor) -> Tensor:
    return (x[..., None, :] - table).square().sum(-1).argmin(-1)


def length(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).sqrt()


def dac(form: str) -> State:
    """`form` is how weight norm is written: as always, as since torch 2.1, or resolved."""
    state = {}
    for i in range(LAYERS):
        name = f"quantizer.quantizers.{i}"
        state[f"{name}.codebook.weight"] = normal(K, INNER, seed=i)
        for side, (out, inside) in {"in_proj": (INNER, D), "out_proj": (D, INNER)}.items():
            g, v = normal(out, 1, 1, seed=20 + i).abs() + 0.5, normal(out, inside, 1, seed=40 + i)
            names = {
                "old": {"weight_g": g, "weight_v": v},
                "new": {"parametrizations.weight.original0": g, "parametrizations.weight.original1": v},
                "resolved": {"weight": g * v / v.square().sum((1, 2), keepdim=True).sqrt()},
            }[form]
            state |= {f"{name}.{side}.{key}": value for key, value in names.items()}
            state[f"{name}.{side}.bias"] = 0.1 * normal(out, seed=60 + i)
    return {**state, "encoder.block.0.bias": torch.zeros(3)}


def dac_by_hand(state: State, z: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (B, T, layers) and vectors (B, d, T)."""
    rest, total, found = z.double().transpose(1, 2), torch.zeros(B, T, D, dtype=torch.float64), []
    for i in range(LAYERS):
        s = {n.split(f"quantizers.{i}.")[1]: v.double() for n, v in state.items() if f"quantizers.{i}." in n}
        maps = {}
        for side in ("in_proj", "out_proj"):
            v = s[f"{side}.weight_v"][..., 0]
            maps[side] = v / length(v) * s[f"{side}.weight_g"][..., 0]
        x = rest @ maps["in_proj"].t() + s["in_proj.bias"]
        codes = s["codebook.weight"]
        found.append(nearest(x / length(x), codes / length(codes)))
        e = codes[found[-1]] @ maps["out_proj"].t() + s["out_proj.bias"]
        rest, total = rest - e, total + e
    return torch.stack(found, -1), total.transpose(1, 2)


@pytest.mark.parametrize("form", ["old", "new", "resolved"])
def test_dac(form, tmp_path):
    z = normal(B, D, T, seed=99)
    save_file(dac(form), tmp_path / "dac.safetensors")
    vq = from_dac(tmp_path / "dac.safetensors")
    indices, vectors = dac_by_hand(dac("old"), z)
    check(vq, z, indices, vectors)


def encodec(prefix: str, codebook: str) -> State:
    state = {}
    for i in range(LAYERS):
        name = f"{prefix}layers.{i}.{codebook}"
        counts = torch.rand(K, generator=torch.Generator().manual_seed(i)) + 0.5
        table = normal(K, D, seed=i) / 2**i
        state |= {f"{name}.embed": table, f"{name}.embed_avg": table * counts[:, None]}
        state |= {f"{name}.cluster_size": counts, f"{name}.inited": torch.tensor([1.0])}
    return state


@pytest.mark.parametrize(("prefix", "codebook"), [("quantizer.vq.", "_codebook"), ("quantizer.", "codebook")])
def test_encodec(prefix, codebook):
    state, z = encodec(prefix, codebook), normal(B, D, T, seed=98)
    vq = from_encodec(state)
    rest, total, found = z.transpose(1, 2).double(), 0.0, []
    for i in range(LAYERS):
        table = state[f"{prefix}layers.{i}.{codebook}.embed"].double()
        found.append(nearest(rest, table))
        rest, total = rest - table[found[-1]], total + table[found[-1]]
    for i, layer in enumerate(vq.inner):
        assert torch.equal(layer.maintenance["ema"].sums, state[f"{prefix}layers.{i}.{codebook}.embed_avg"])
        assert torch.equal(layer.maintenance["ema"].counts, state[f"{prefix}layers.{i}.{codebook}.cluster_size"])
    check(vq, z, torch.stack(found, -1), total.transpose(1, 2))


HERE = ("rvq_first", "rvq_rest"), "vq.layers.{}._codebook", ("embedding_sum", "cluster_usage", "_initialized")
TRANSFORMERS = (
    ("semantic_residual_vector_quantizer", "acoustic_residual_vector_quantizer"),
    "layers.{}.codebook",
    ("embed_sum", "cluster_usage", "initialized"),
)


def mimi(branches: tuple[str, ...], layer: str, parts: tuple[str, ...]) -> State:
    state = {}
    for b, (branch, layers) in enumerate(zip(branches, (1, LAYERS), strict=True)):
        state[f"quantizer.{branch}.input_proj.weight"] = normal(INNER, D, 1, seed=b) / 2
        state[f"quantizer.{branch}.output_proj.weight"] = normal(D, INNER, 1, seed=5 + b) / 2
        for i in range(layers):
            name = f"quantizer.{branch}.{layer.format(i)}"
            counts = torch.rand(K, generator=torch.Generator().manual_seed(9 * b + i)) + 0.5
            counts[3] = 0
            table = normal(K, INNER, seed=10 * b + i) / 2**i
            values = (table * counts[:, None], counts, torch.ones(1))
            state |= {f"{name}.{part}": value for part, value in zip(parts, values, strict=True)}
    return state


@pytest.mark.parametrize("names", [HERE, TRANSFORMERS])
def test_mimi(names, tmp_path):
    (branches, layer, parts), z = names, normal(B, D, T, seed=97)
    state = mimi(*names)
    torch.save({"model": state}, tmp_path / "mimi.pt")
    vq = from_mimi(tmp_path / "mimi.pt")
    found, total = [], 0.0
    for branch, layers in zip(branches, (1, LAYERS), strict=True):
        into, out = (state[f"quantizer.{branch}.{side}_proj.weight"][..., 0].double() for side in ("input", "output"))
        rest, codes = z.transpose(1, 2).double() @ into.t(), 0.0
        for i in range(layers):
            sums, counts = (state[f"quantizer.{branch}.{layer.format(i)}.{part}"].double() for part in parts[:2])
            table = sums / counts.clamp(min=1e-5)[:, None]
            found.append(nearest(rest, table))
            rest, codes = rest - table[found[-1]], codes + table[found[-1]]
        total = total + codes @ out.t()
    check(vq, z, torch.stack(found, -1), total.transpose(1, 2))
    first = vq.decode(vq.encode(z)[..., :1])
    torch.testing.assert_close(first, vq.inner[0].decode(vq.encode(z)[..., :1]).transpose(1, 2))


def check(vq, z, indices, vectors):
    """Codes, vectors, decoding, saving and baking of a codec's quantizer; and that it trains and sees masks."""
    out = vq(z)
    assert torch.equal(out.indices, indices)
    assert torch.equal(vq.encode(z), indices)
    assert len(indices.unique()) > 5
    torch.testing.assert_close(out.z_q.double(), vectors, rtol=1e-5, atol=1e-5)
    assert torch.equal(vq.decode(indices), out.z_q)
    assert torch.equal(vq.decode(indices[:1, :2]), out.z_q[:1, :, :2])
    assert out.indices.shape == vq.index_shape((B, T))
    assert int(vq.entries(indices).max()) < vq.num_entries
    assert vq.index_map(indices).shape == (B, T)
    again = build_quantizer(**vq.spec)
    again.load_state_dict(vq.state_dict())
    assert torch.equal(again.eval().encode(z), indices)
    baked = vq.bake()
    assert torch.equal(baked(z).z_q, out.z_q)
    assert not any(p.requires_grad for p in baked.parameters())
    rebuilt = build_quantizer(**baked.spec)
    rebuilt.load_state_dict(baked.state_dict())
    assert torch.equal(rebuilt.eval()(z).z_q, out.z_q)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 4:] = False
    masked = vq(z, mask)
    assert torch.equal(masked.indices[mask], indices[mask])
    assert (masked.indices[0, 4:] == -1).all()
    assert torch.equal(masked.z_q[0, :, 4:], z[0, :, 4:])
    assert not vq.decode(masked.indices)[0, :, 4:].any()
    latents = z.clone().requires_grad_()
    trained = vq.train()(latents)
    (trained.z_q.square().sum() + trained.loss).backward()
    vq.update(trained)
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("read", "state", "message"),
    [
        (from_dac, {}, r"no quantizers\.0\.codebook\.weight"),
        (
            from_dac,
            {**dac("old"), "quantizer.extra": torch.zeros(1)},
            "extra of this quantizer of DAC has no counterpart",
        ),
        (
            from_dac,
            {**dac("old"), "quantizer.quantizers.1.codebook.weight": torch.zeros(K, 3)},
            r"have shapes \[\(16, 3\), \(16, 4\)\]",
        ),
        (from_dac, {n: v for n, v in dac("old").items() if "1.in_proj.weight_g" not in n}, "weight_g or .*original0"),
        (from_encodec, {}, "EnCodec"),
        (
            from_encodec,
            {**encodec("quantizer.", "codebook"), "quantizer.layers.0.codebook.inited": torch.zeros(1)},
            "k-means start",
        ),
        (from_mimi, {}, "Mimi"),
        (from_mimi, {**mimi(*HERE), "quantizer.rvq_first.input_proj.weight": torch.zeros(3, D, 1)}, "does not fit"),
        (
            from_mimi,
            {**mimi(*HERE), "quantizer.rvq_rest.vq.layers.1._codebook._initialized": torch.zeros(1)},
            "k-means start",
        ),
    ],
)
def test_what_does_not_fit_is_named(read, state, message):
    with pytest.raises(ValueError, match=message):
        read(state)


def test_parts_of_users_files_are_never_run(tmp_path):
    """A saved tokenizer may name a user's file in the parts of a sum as well."""
    from steadyvq.models.tokenizer import _quantizer_names

    spec = {"name": "summed", "parts": [{"name": "projected", "inner": "vq", "inner_options": {"inner": "mine.py:vq"}}]}
    assert "mine.py:vq" in _quantizer_names(spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "summed", "parts": []}, "list of mappings"),
        ({"name": "summed", "parts": [{"name": "vq"}]}, r"indices \(\.\.\., layers\)"),
        ({"name": "projected", "inner_dim": 0}, "inner_dim is 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build_quantizer(num_codes=8, dim=4, **options)


def test_the_cosine_assignment_takes_the_most_similar_direction_and_keeps_lengths():
    """argmax_j z . e_j / (|z| |e_j|), one latent at a time; codes of other lengths, so neither l2 nor dot gives it."""
    z, table = normal(40, 6, seed=1), normal(12, 6, seed=2) * torch.linspace(0.2, 3, 12)[:, None]
    vq = build_quantizer("vq", num_codes=12, dim=6, assign="cosine")
    with torch.no_grad():
        vq.codes.base.copy_(table)
    expected = [max(range(12), key=lambda j, x=x: float(x @ table[j]) / float(table[j].norm())) for x in z]
    out = vq(z)
    assert out.indices.tolist() == expected
    assert torch.equal(out.z_q, table[expected])
    torch.testing.assert_close(out.assignment.distance, (z - table[expected]).square().sum(-1))
    for other in ("l2", "dot"):
        assert build_quantizer("vq", num_codes=12, dim=6, assign=other).assign(z, table)[0].tolist() != expected
    assert torch.equal(vq.bake()(z).indices, out.indices)
