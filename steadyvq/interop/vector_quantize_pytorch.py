# SPDX-License-Identifier: Apache-2.0
"""State dicts of vector-quantize-pytorch as our quantizers: the same tokens, vectors and, where it can be, gradients.

    theirs = VectorQuantize(dim=64, codebook_size=512, use_cosine_sim=True)
    ours = from_vector_quantize_pytorch(theirs.state_dict(), kind="VectorQuantize", use_cosine_sim=True)

Options are the constructor's arguments of that package, which a state dict does not hold; their defaults are that package's.
docs/vector-quantize-pytorch.md says for every argument what it is here and where the two differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from steadyvq.quantizers import Quantizer, VectorQuantizer, build_quantizer
from steadyvq.quantizers.names import look_up

State = Mapping[str, Tensor]

_LAYOUT = {"channel_last": True, "channel_first": False, "accept_image_fmap": False, "accept_3d_fmap": False}
_TABLE = {
    "decay": 0.8,
    "eps": 1e-5,
    "use_cosine_sim": False,
    "commitment_weight": 1.0,
    "rotation_trick": None,
    "learnable_codebook": False,
    "ema_update": None,
}
_SHARED = {"dim": None, "codebook_size": None, "overrides": None}

_OWN_RANDOMNESS = "it draws from the global generator, which no quantizer here does"
_REFUSED: dict[str, tuple[Any, str]] = {
    "heads": (1, "build `grouped` with inner='ema', which cuts the features in the same way, and copy the tables"),
    "separate_codebook_per_head": (False, "build `grouped` with inner='ema' and copy the tables"),
    "threshold_ema_dead_code": (
        0,
        "pass overrides={'maintenance': {'replace': {}}} for the replacement of this package",
    ),
    "stochastic_sample_codes": (False, _OWN_RANDOMNESS + ": `gumbel` is the method that draws codes"),
    "straight_through": (False, "there it is the Gumbel softmax: `gumbel` is that method"),
    "directional_reparam": (False, "`diveq` is that method: build it and copy the table"),
    "vq_bridge": (None, "`fvq` is that method, with another arrangement of its weights"),
    "affine_param": (
        False,
        "its codes follow running statistics of the latents: `affine` trains scale and shift instead",
    ),
    "orthogonal_reg_weight": (
        0.0,
        "no loss here is the orthogonality of codes: write one, see docs/adding-a-quantizer.md",
    ),
    "codebook_diversity_loss_weight": (0.0, "the loss 'entropy' of `ibq` is the nearest to it"),
    "commitment_use_cross_entropy_loss": (False, "no loss here is the cross entropy of distances"),
    "sync_update_v": (0.0, "it is estimator='synced' in overrides"),
    "in_place_codebook_optimizer": (None, "a forward here steps no optimiser"),
    "freeze_codebook": (False, "bake() the result, or freeze it in a stage"),
    "route_gradients_to_input": (True, "it is estimator='direct' in overrides"),
    "straight_through_activation": (None, "an activation of the latents is a layer of your model"),
    "layernorm_after_project_in": (False, "projections are layers of your model"),
    "implicit_neural_codebook": (False, "no codebook here depends on the layers before it (QINCo)"),
    "diveq": (False, "`residual` with inner='diveq' is the nearest to it"),
    "beam_size": (None, "the layers are searched greedily here"),
    "quantize_dropout_cutoff_index": (0, "any number of layers from 1 on may be dropped here"),
    "quantize_dropout_multiple_of": (1, "any number of layers may be dropped here"),
    "codebook_transform": (
        None,
        "only a linear layer is a codebook here: build the table and a `baked` quantizer of it",
    ),
    "num_codebooks": (1, "build `grouped` with this method as the inner one"),
    "noise_dropout": (0.0, _OWN_RANDOMNESS),
    "bound_hard_clamp": (False, "the bound here is tanh"),
    "orthogonal_rotation": (False, "a rotation is a layer of your model"),
    "scale": (None, "the levels of a grid have one scale"),
    "spherical": (False, "`bsq` is that method, whose gradient is divided by sqrt(d)"),
    "codebook_scale": (1.0, "divide the latents by it"),
    "frac_per_sample_entropy": (1.0, _OWN_RANDOMNESS),
    "soft_clamp_input_value": (None, "a bound of the latents is a layer of your model"),
    "experimental_softplus_entropy_loss": (False, "the entropies are plain here"),
    "cosine_sim_project_in": (False, "projections are layers of your model"),
}
"""Arguments that do not map: their default, and what to do instead."""

_WITHOUT_EFFECT = frozenset(
    [
        "affine_param_batch_decay",
        "affine_param_codebook_decay",
        "allowed_dtypes",
        "beam_score_quantizer_weights",
        "codebook_dim",
        "codebook_diversity_temperature",
        "cosine_sim_project_in_scale",
        "directional_reparam_variance",
        "entropy_loss_offset",
        "eval_beam_size",
        "force_quantization_f32",
        "frozen_codebook_dim",
        "has_projections",
        "init_fn",
        "keep_num_codebooks_dim",
        "kmeans_init",
        "kmeans_iters",
        "manual_ema_update",
        "manual_in_place_optimizer_update",
        "mlp_kwargs",
        "orthogonal_reg_active_codes_only",
        "orthogonal_reg_max_codes",
        "projection_has_bias",
        "return_indices",
        "return_zeros_for_masked_padding",
        "sample_codebook_temp",
        "sync_affine_param",
        "sync_codebook",
        "sync_kmeans",
    ]
)
"""Arguments that change nothing of loaded weights, or belong to an argument or a weight that is refused by itself."""

_KNOWN: dict[str, dict[str, Any]] = {
    "VectorQuantize": {**_SHARED, **_LAYOUT, **_TABLE},
    "ResidualVQ": {
        **_SHARED,
        **_LAYOUT,
        **_TABLE,
        "num_quantizers": None,
        "shared_codebook": False,
        "quantize_dropout": False,
        "quant_grad_frac": 0.0,
    },
    "SimVQ": {
        **_SHARED,
        **_LAYOUT,
        "rotation_trick": True,
        "input_to_quantize_commit_loss_weight": 0.25,
        "commitment_weight": 1.0,
    },
    "FSQ": {**_SHARED, **_LAYOUT, "levels": None, "preserve_symmetry": False},
    "LFQ": {
        **_SHARED,
        **_LAYOUT,
        "entropy_loss_weight": 0.1,
        "commitment_loss_weight": 0.0,
        "diversity_gamma": 1.0,
        "inv_temperature": 100.0,
    },
}


def from_vector_quantize_pytorch(state_dict: State, *, kind: str, **options: Any) -> Quantizer:
    """A quantizer with the weights of a layer of vector-quantize-pytorch.

    Args:
        state_dict: Of that layer: its `state_dict()`, keys without a prefix.
        kind: Its class: `VectorQuantize`, `ResidualVQ`, `SimVQ`, `FSQ` or `LFQ`.
        **options: The arguments that it was built with, as far as they differ from that package's defaults; and `overrides`,
            a mapping of options of our method that come last (maintenance, seed, ...).

    Raises:
        ValueError: An argument or a weight has no counterpart here; names it, and what to do instead.
    """
    build = look_up("kind of layer", kind, _BUILDERS)
    return build(dict(state_dict), _read(kind, options))


def _read(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    known = _KNOWN[kind]
    for name, value in options.items():
        if name in known or name in _WITHOUT_EFFECT:
            continue
        default, instead = look_up(f"argument of {kind}", name, {**dict.fromkeys(known, (None, "")), **_REFUSED})
        if value != default:
            raise ValueError(f"{name}={value!r} of {kind} has no counterpart here: {instead}")
    return {**known, **{name: value for name, value in options.items() if name in known}}


def _axis(given: Mapping[str, Any]) -> int:
    images = given["accept_image_fmap"] or given["accept_3d_fmap"]
    return 1 if images or given["channel_first"] or not given["channel_last"] else -1


def _build(name: str, num_codes: int, dim: int, given: Mapping[str, Any], **own: Any) -> Quantizer:
    """One of our quantizers, with the caller's overrides on top; entries of losses and maintenance one by one."""
    size = {"codebook_size": num_codes, "dim": dim}
    for argument, found in size.items():
        if given[argument] not in (None, found):
            raise ValueError(f"{argument} is {given[argument]}, but the weights were made for {argument}={found}")
    merged = {"channel_axis": _axis(given), **own}
    for key, value in dict(given["overrides"] or {}).items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return build_quantizer(name, num_codes=num_codes, dim=dim, **merged)


def _take(state: dict[str, Tensor], name: str, kind: str) -> Tensor:
    if name not in state:
        raise ValueError(
            f"the state dict holds no {name!r}, which a {kind} has: pass the state_dict() of that layer alone"
        )
    return state.pop(name)


def _nothing_left(state: State, kind: str) -> None:
    left = sorted(state)
    if any(name.startswith(("project_in", "project_out")) for name in left):
        raise ValueError(
            f"this {kind} has projections ({left[0]}), which are layers of your model here (Tokenizer's pre_quant and "
            "post_quant): keep them there and pass the rest of the state dict"
        )
    if left:
        raise ValueError(
            f"{', '.join(left)} of this {kind} has no counterpart here: see docs/vector-quantize-pytorch.md"
        )


def _table_options(given: Mapping[str, Any], dim: int) -> tuple[str, dict[str, Any]]:
    """Method and options of a layer with a table."""
    learnable = bool(given["learnable_codebook"])
    averages = not learnable if given["ema_update"] is None else bool(given["ema_update"])
    if averages == learnable:
        raise ValueError(
            f"ema_update={averages} with learnable_codebook={learnable}: a table here is either averaged or trained; "
            "for one that never moves, bake() the result"
        )
    rotation = dim > 1 if given["rotation_trick"] is None else given["rotation_trick"]
    weight = float(given["commitment_weight"])
    common = {
        "estimator": "rotation" if rotation else "straight_through",
        "unit_sphere": bool(given["use_cosine_sim"]),
    }
    if learnable:
        # One squared error that reaches latents and codes: each of our two terms is one of its sides.
        return "vq", {**common, "losses": {"commitment": weight, "codebook": weight}}
    ema = {"decay": float(given["decay"]), "eps": float(given["eps"])}
    return "ema", {**common, "losses": {"commitment": weight}, "maintenance": {"ema": ema}}


class _Table:
    """The weights of one `_codebook`, taken out of a state dict."""

    def __init__(self, state: dict[str, Tensor], prefix: str, kind: str) -> None:
        self.embed, self.counts, self.sums = (
            _take(state, f"{prefix}_codebook.{name}", kind) for name in ("embed", "cluster_size", "embed_avg")
        )
        placed = state.pop(f"{prefix}_codebook.initted", torch.tensor(True))
        if not bool(placed):
            raise ValueError("this codebook waits for its k-means start: run a batch through the layer first")
        if self.embed.shape[0] != 1:
            raise ValueError(f"this {kind} has {self.embed.shape[0]} heads: {_REFUSED['heads'][1]}")

    def into(self, vq: Quantizer) -> None:
        """Copies table and averages."""
        assert isinstance(vq, VectorQuantizer)
        with torch.no_grad():
            vq.codes.base.copy_(self.embed[0])
            for name, value in (("counts", self.counts), ("sums", self.sums)):
                if "ema" in vq.maintenance:
                    getattr(vq.maintenance["ema"], name).copy_(value[0])


def _vector_quantize(state: dict[str, Tensor], given: dict[str, Any]) -> Quantizer:
    table = _Table(state, "", "VectorQuantize")
    _nothing_left(state, "VectorQuantize")
    _, num_codes, dim = table.embed.shape
    name, options = _table_options(given, dim)
    vq = _build(name, num_codes, dim, given, **options)
    table.into(vq)
    return vq


def _residual(state: dict[str, Tensor], given: dict[str, Any]) -> Quantizer:
    count = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    tables = [_Table(state, f"layers.{i}.", "ResidualVQ") for i in range(count)]
    _nothing_left(state, "ResidualVQ")
    if not tables:
        raise ValueError("the state dict holds no layers: pass the state_dict() of the ResidualVQ alone")
    if given["num_quantizers"] not in (None, count):
        raise ValueError(f"num_quantizers is {given['num_quantizers']}, but the weights were made for {count} layers")
    if len({table.embed.shape for table in tables}) > 1:
        raise ValueError("the layers have codebooks of different sizes, but those of `residual` have one size")
    if given["quant_grad_frac"] not in (0, 1):
        raise ValueError(
            f"quant_grad_frac={given['quant_grad_frac']} has no counterpart here: 0 (residuals are detached) and 1 have"
        )
    _, num_codes, dim = tables[0].embed.shape
    name, options = _table_options(given, dim)
    # With detached residuals the gradient arrives once here, as straight-through, whatever the layers have.
    estimator = options.pop("estimator") if given["quant_grad_frac"] == 1 else "straight_through"
    if given["quant_grad_frac"] == 1 and estimator == "straight_through":
        estimator = "each"
    vq = _build(
        "residual",
        num_codes,
        dim,
        given,
        layers=count,
        inner=name,
        shared=bool(given["shared_codebook"]),
        dropout=float(bool(given["quantize_dropout"])),
        estimator=estimator,
        inner_options={key: value for key, value in options.items() if key != "estimator"},
    )
    for layer, table in zip(vq.inner, tables, strict=False):  # type: ignore[arg-type]
        table.into(layer)
    return vq


def _sim_vq(state: dict[str, Tensor], given: dict[str, Any]) -> Quantizer:
    base = _take(state, "frozen_codebook", "SimVQ")
    if "code_transform.weight" not in state or state["code_transform.weight"].dim() != 2:
        raise ValueError(f"this SimVQ has a transform that is no linear layer: {_REFUSED['codebook_transform'][1]}")
    weight, bias = state.pop("code_transform.weight"), state.pop("code_transform.bias", None)
    _nothing_left(state, "SimVQ")
    (num_codes, inputs), dim = base.shape, weight.shape[0]
    if inputs != dim:
        raise ValueError(
            f"the frozen codebook has {inputs} features and the codes {dim}, but those of `simvq` have as many: `vqgan_lc` "
            "with feature_dim is a linear map of frozen features of another size"
        )
    total, share = float(given["commitment_weight"]), float(given["input_to_quantize_commit_loss_weight"])
    vq = _build(
        "simvq",
        num_codes,
        dim,
        given,
        bias=bias is not None,
        estimator="rotation" if given["rotation_trick"] else "straight_through",
        losses={"commitment": total * share, "codebook": total},
    )
    assert isinstance(vq, VectorQuantizer)
    with torch.no_grad():
        vq.codes.base.copy_(base)
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                vq.codes.get_parameter(name).copy_(value)
    return vq


def _fsq(state: dict[str, Tensor], given: dict[str, Any]) -> Quantizer:
    _nothing_left(state, "FSQ")
    if given["levels"] is None:
        raise ValueError("levels is missing: an FSQ has no weights, so pass levels=[...] as it was built with")
    levels = [int(level) for level in given["levels"]]
    own: dict[str, Any] = {} if given["preserve_symmetry"] else {"form": "centred"}
    name = "fsq_symmetric" if given["preserve_symmetry"] else "fsq"
    return _build(name, math.prod(levels), len(levels), given, levels=levels, **own)


def _lfq(state: dict[str, Tensor], given: dict[str, Any]) -> Quantizer:
    bits = int(_take(state, "mask", "LFQ").numel())
    _nothing_left(state, "LFQ")
    weight = float(given["entropy_loss_weight"])
    return _build(
        "lfq",
        2**bits,
        bits,
        given,
        order="big",
        temperature=1 / float(given["inv_temperature"]),
        losses={
            "commitment": float(given["commitment_loss_weight"]),
            "sample_entropy": weight,
            "batch_entropy": {"weight": weight * float(given["diversity_gamma"]), "eps": 0.0},
        },
    )


_BUILDERS: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Quantizer]] = {
    "VectorQuantize": _vector_quantize,
    "ResidualVQ": _residual,
    "SimVQ": _sim_vq,
    "FSQ": _fsq,
    "LFQ": _lfq,
}
