# SPDX-License-Identifier: Apache-2.0
"""From a call of any VQ module to what a monitor reads: latents, indices, codebook.

    adapt(module, inputs, outputs) -> Record

Known are the modules of this package, `VectorQuantize` and `SimVQ` of vector-quantize-pytorch, and those with the interface of
taming-transformers, LlamaGen and diffusers: an `nn.Embedding` called `embedding` and an integer tensor among the outputs.
For anything else write the same function; three fields of `Record` are enough.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Metric = Literal["l2", "cosine"]
TABLE_NAMES = ("codebook", "embedding", "embeddings", "embed", "codes")


@dataclass
class Record:
    """One call of a VQ module.

    Attributes:
        latents: What was compared with the codes, (..., d), features last; or a function that returns it, if that costs
            something: it is called for one step in a hundred.
        indices: The selected codes, integers, as many as there are latents; -1 where masked.
        codebook: Returns the effective table (K, d) as it is at the time of asking.
        metric: How latents and codes are compared: `l2`, or `cosine` (directions alone).
        parameter: The trained tensor (K, d) whose gradient says which codes learn, if the table is one.
        trained: Whether a gradient flows to the encoder; None: unknown.
        autocast: Whether the call ran under autocast; a look-up that is shielded from it says False.
        stats: Further numbers about this call, by name: `winner_mass` and `effective_losers` of a soft assignment.
    """

    latents: Tensor | Callable[[], Tensor]
    indices: Tensor
    codebook: Callable[[], Tensor]
    metric: Metric = "l2"
    parameter: Tensor | None = None
    trained: bool | None = None
    autocast: bool = False
    stats: Mapping[str, Any] = field(default_factory=dict)


Adapter = Callable[[nn.Module, tuple[Any, ...], Any], Record]


def adapt(module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Record:
    """What a call of a VQ module was.

    Args:
        module: The module that was called.
        inputs: Its positional arguments; the first holds the latents.
        outputs: What it returned.

    Raises:
        ValueError: The module has an interface that is not known here.
    """
    given = [value for value in inputs if isinstance(value, Tensor) and value.is_floating_point()]
    trained = given[0].requires_grad if given else None
    if hasattr(outputs, "assignment"):
        return _of_ours(module, outputs, trained)
    if not given:
        raise _unknown(module, "it was called without latents as a positional argument")
    table, parameter = _table(module)
    indices = _integers(module, outputs)
    if type(module).__module__.startswith("vector_quantize_pytorch"):
        return _of_vector_quantize_pytorch(module, given[0], indices, table)
    if getattr(module, "remap", None) is not None:
        raise _unknown(module, "its indices are remapped (`remap`), so they name no rows of the codebook")
    metric: Metric = "cosine" if getattr(module, "l2_norm", False) else "l2"
    rows = _features_last(module, given[0], indices.numel(), table().shape[1])
    return Record(rows, indices, table, metric, parameter, trained, torch.is_autocast_enabled(given[0].device.type))


def _of_ours(module: nn.Module, outputs: Any, trained: bool | None) -> Record:
    if getattr(outputs, "inner", ()):
        raise _unknown(module, "it holds several quantizers: attach a monitor to each of its layers")
    seen = outputs.assignment
    base = getattr(getattr(module, "codes", None), "base", None)
    parameter = base if isinstance(base, nn.Parameter) else None
    return Record(seen.z, seen.indices, module.codebook, "l2", parameter, trained, stats=seen.stats)  # type: ignore[arg-type]


def _of_vector_quantize_pytorch(module: Any, latents: Tensor, indices: Tensor, table: Callable[[], Tensor]) -> Record:
    if getattr(module, "separate_codebook_per_head", False) and module.heads > 1:
        raise _unknown(module, "each of its heads has a codebook of its own")
    first = getattr(module, "channel_first", False) or not getattr(module, "channel_last", True)
    first = first or getattr(module, "accept_image_fmap", False) or getattr(module, "accept_3d_fmap", False)
    heads = getattr(module, "heads", 1)

    def rows() -> Tensor:
        given = latents.movedim(1, -1) if first and latents.dim() > 2 else latents
        given = module.project_in(given) if isinstance(getattr(module, "project_in", None), nn.Module) else given
        return given.unflatten(-1, (heads, -1)) if heads > 1 else given

    metric: Metric = "cosine" if getattr(module, "use_cosine_sim", False) else "l2"
    cast = torch.is_autocast_enabled(latents.device.type)
    return Record(rows, indices, table, metric, trained=latents.requires_grad, autocast=cast)


def _table(module: nn.Module) -> tuple[Callable[[], Tensor], Tensor | None]:
    """The codebook of a foreign module, read anew at each call, and its parameter if it is one."""
    for name in TABLE_NAMES:
        if isinstance(getattr(type(module), name, None), property):
            # It may cost something, as with SimVQ.
            return lambda: getattr(module, name), None  # noqa: B023  returned at once
        found = getattr(module, name, None)
        if isinstance(found, nn.Embedding):
            return lambda: getattr(module, name).weight, found.weight  # noqa: B023  returned at once
        if callable(found) and not isinstance(found, nn.Module):
            return found, None
        if isinstance(found, Tensor) and found.dim() == 2:
            parameter = found if isinstance(found, nn.Parameter) else None
            return lambda: getattr(module, name), parameter  # noqa: B023  returned at once
    raise _unknown(module, f"it has no codebook (K, d) under any of the names {', '.join(TABLE_NAMES)}")


def _flatten(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in _flatten(item)]
    return [value]


def _integers(module: nn.Module, outputs: Any) -> Tensor:
    found = [x for x in _flatten(outputs) if isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32)]
    if not found:
        raise _unknown(module, "it returns no integer tensor of indices")
    return found[-1]


def _features_last(module: nn.Module, latents: Tensor, count: int, dim: int) -> Tensor:
    """Latents (..., d). Where both axes could hold the features, images have them at axis 1, all else at the last."""
    if latents.numel() != count * dim:
        raise _unknown(module, f"latents of shape {tuple(latents.shape)} are not {count} vectors of its {dim} features")
    second, last = latents.dim() > 2 and latents.shape[1] == dim, latents.shape[-1] == dim
    if second and (latents.dim() >= 4 or not last):
        return latents.movedim(1, -1)
    if last:
        return latents
    raise _unknown(module, f"latents of shape {tuple(latents.shape)} have its {dim} features at no axis known here")


def compared(rows: Tensor, metric: Metric) -> Tensor:
    """Rows as they are compared: of unit length for `cosine`."""
    return F.normalize(rows, dim=-1) if metric == "cosine" else rows


def _unknown(module: nn.Module, why: str) -> ValueError:
    name = type(module).__name__
    return ValueError(
        f"a monitor cannot read {name}: {why}; pass adapter=, a function (module, inputs, outputs) -> "
        "steadyvq.diagnosis.Record"
    )
