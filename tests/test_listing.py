# SPDX-License-Identifier: Apache-2.0
"""What is said of a method where methods are listed: it must be said of every one, and be true where it can be measured."""

import re
from itertools import combinations

import pytest
import torch
from cases import GRIDS, NAMES, build, normal

import steadyvq
from steadyvq.experiments import tables
from steadyvq.quantizers import register
from steadyvq.quantizers.registry import Method, methods
from steadyvq.quantizers.scalar import ScalarQuantizer
from steadyvq.quantizers.wrappers import Wrapper


def built(method: Method, factor: int = 1) -> steadyvq.Quantizer:
    num_codes, dim = method.example
    more = {"scales": [1, 2]} if method.name in GRIDS else {}
    return steadyvq.build_quantizer(method.name, num_codes=num_codes * factor, dim=dim, **more)


def beyond_the_table(vq: steadyvq.Quantizer) -> int:
    """Numbers that the state holds beyond one table of codes; a single number is no storage."""
    return sum(value.numel() for value in vq.state_dict().values() if value.dim()) - vq.num_codes * vq.dim


def stored(cost: str) -> str:
    return cost.partition("; stores ")[2]


def test_a_listed_method_without_a_cost_is_refused():
    with pytest.raises(ValueError, match="has no cost"):
        register("costless", paper="none", summary="none")(lambda num_codes, dim: None)
    assert "costless" not in steadyvq.list_quantizers()


@pytest.mark.parametrize("method", methods().values(), ids=lambda m: m.name)
def test_cost_says_what_is_stored(method):
    vq = built(method)
    assert method.status in ("published", "reconstructed", "variant")
    assert ("no table" in method.cost) == isinstance(vq, ScalarQuantizer)
    if isinstance(vq, ScalarQuantizer):
        assert beyond_the_table(vq) < 0
        assert not stored(method.cost)
        return
    assert re.search(r"\bN K d\b|\bT K d\b", method.cost)
    if isinstance(vq, Wrapper):
        return  # stores what its layers do
    extra = beyond_the_table(vq)
    assert (extra > 0) == bool(stored(method.cost)), f"{extra} numbers beyond the table"
    grows = beyond_the_table(built(method, 2)) > extra
    assert grows == bool(re.search(r"\bK\b", stored(method.cost))), "storage that grows with the number of codes"


def test_the_measure_of_storage_sees_it():
    assert beyond_the_table(built(methods()["vq"])) == 0
    assert beyond_the_table(built(methods()["ema"])) == 24 + 24 * 6
    assert beyond_the_table(built(methods()["simvq"])) == 6 * 6 + 6


def test_tables_and_list_show_status_and_cost(steadyvq_command):
    shown = tables.method_table()
    done = steadyvq_command("list", "quantizers")
    assert done.returncode == 0, done.stderr
    words = " ".join(re.sub(r"[│┃]", " ", done.stdout).split())
    for method in methods().values():
        assert f"| `{method.name}` | {method.summary} | {method.paper} | {method.status} |" in shown
        assert re.search(rf"\b{method.name} +{method.status} ", words), method.name
    assert "N K d" in words


def test_every_method_named_in_related_is_one():
    text = (tables.ROOT / "docs" / "related.md").read_text()
    arguments = re.findall(r'(?:inner|build_quantizer\()="?([a-z_]+)"', text)
    assert set(arguments) <= set(methods())
    cells = [line.split("|")[3] for line in text.splitlines() if line.startswith("| ") and line.count("|") >= 4]
    assert len(cells) >= 40
    named = {m for cell in cells for m in re.findall(r"`([a-z_]+)`", cell)}
    assert named - {"pre_quant", "update"} <= set(methods()), "neither methods nor parts of the tokenizer"


def behaviour(name: str) -> list[torch.Tensor]:
    """What a method does with one fixed batch in three steps of gradient descent: values, gradients and codes."""
    try:
        vq = build(name, num_codes=64, dim=6)
    except ValueError:  # a grid of another size, which nothing else has
        vq = build(name)
    z = normal(64, vq.dim).requires_grad_()
    upstream = normal(64, vq.dim, seed=1)
    parameters = [p for p in vq.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.1) if parameters else None
    found = [vq.codebook()]
    for _ in range(3):
        out = vq(z)
        loss = out.loss + (out.z_q * upstream).sum()
        gradient, *others = torch.autograd.grad(loss, [z, *parameters], materialize_grads=True)
        for p, g in zip(parameters, others, strict=True):
            p.grad = g
        if optimizer:
            optimizer.step()
        vq.update(out, optimizer)
        found += [out.z_q.detach(), out.loss.detach(), gradient, vq.codebook()]
    return found


def differ(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Whether two methods differ by more than rounding."""
    pairs = zip(a, b, strict=True)
    return any(x.shape != y.shape or not torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in pairs)


def test_any_two_methods_differ():
    assert not differ(behaviour("vq"), behaviour("vq"))
    found = {name: behaviour(name) for name in NAMES}
    assert [pair for pair in combinations(NAMES, 2) if not differ(found[pair[0]], found[pair[1]])] == []
