# SPDX-License-Identifier: Apache-2.0
"""A table cut among processes trains as the whole table in one process does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sharded_process as process
import torch
from runs import environment

import steadyvq
from steadyvq.quantizers.sharded import ShardedQuantizer
from steadyvq.quantizers.shards import Shards, bytes_per_process

EXACT = {"rtol": 0.0, "atol": 1e-9}


def nothing(parameters: list, valid: torch.Tensor) -> None:
    """One process has the whole gradient."""


def one_process(name: str) -> dict[str, Any]:
    vq = steadyvq.build_quantizer(
        process.method(name), num_codes=process.CODES, dim=process.DIM, init="normal", **process.OPTIONS[name]
    )
    return process.train(vq, slice(None), nothing, range(process.STEPS))


def two_processes(name: str, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).parent / "sharded_process.py")]
    started = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder / "meet"), name, str(folder / "out")],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(0, 1),
        )
        for rank in range(2)
    ]
    for running in started:
        _, errors = running.communicate(timeout=120)
        assert running.returncode == 0, errors
    return [torch.load(folder / f"out.{rank}") for rank in range(2)]


@pytest.mark.recovery
@pytest.mark.parametrize("name", process.OPTIONS)
def test_two_processes_with_a_cut_table_are_one_with_the_whole(name: str, tmp_path: Path) -> None:
    whole, parts = one_process(name), two_processes(name, tmp_path)
    assert [part["own"] for part in parts] == [13, 14]
    if name != "vq":
        assert sum(whole["replaced"]) >= 5
    state = whole["vq"].state_dict()
    memory = whole["optimizer"].state[whole["vq"].codes.base]
    for part in parts:
        assert part["replaced"] == whole["replaced"]
        assert part["state"].keys() == state.keys()
        for key, value in state.items():
            torch.testing.assert_close(part["state"][key], value, **EXACT)
        for key, value in whole["encoder"].items():
            torch.testing.assert_close(part["encoder"][key], value, **EXACT)
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(part["moments"][key], memory[key], **EXACT)
    for step, tokens in enumerate(whole["tokens"]):
        assert torch.equal(torch.cat([part["tokens"][step] for part in parts]), tokens)
    x, mask = process.data(99)
    encoded = whole["vq"].eval().encode(x, mask)
    assert torch.equal(torch.cat([part["encoded"] for part in parts]), encoded)
    decoded = torch.cat([part["decoded"] for part in parts])
    torch.testing.assert_close(decoded, whole["vq"].decode(encoded.clamp_min(0)), **EXACT)


class Ranks:
    """Shards of a table in one process, to load and save a state in each of them."""

    def __init__(self, name: str, count: int) -> None:
        self.parts = [
            ShardedQuantizer(name, 10, 4, Shards(rank, count, gather=self._gather), **process.OPTIONS[name])
            for rank in range(count)
        ]

    def _gather(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return [part.base.detach() for part in self.parts]


def test_a_state_loads_in_any_number_of_processes() -> None:
    whole = steadyvq.build_quantizer("nsvq", num_codes=10, dim=4, **process.OPTIONS["nsvq"])
    whole.codes.base.data.normal_(generator=torch.Generator().manual_seed(1))
    whole.maintenance["replace"].usage.copy_(torch.arange(10))
    state = whole.state_dict()
    for count in (1, 3, 4):
        ranks = Ranks("nsvq", count)
        for part in ranks.parts:
            part.load_whole_state(state)
        assert [part.high for part in ranks.parts][-1] == 10
        for part in ranks.parts:
            assert all(torch.equal(value, state[key]) for key, value in part.whole_state().items())
        state = ranks.parts[-1].whole_state()
    again = steadyvq.build_quantizer("nsvq", num_codes=10, dim=4, **process.OPTIONS["nsvq"])
    again.load_state_dict(state)
    assert torch.equal(again.codebook(), whole.codebook())
    with pytest.raises(ValueError, match="this quantizer has 11"):
        ShardedQuantizer("nsvq", 11, 4).load_whole_state(state)


def test_one_process_is_the_ordinary_quantizer() -> None:
    z = torch.randn(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = steadyvq.build_quantizer("nsvq", num_codes=20, dim=4, init="normal").double()
    cut = ShardedQuantizer("nsvq", 20, 4, init="normal").double()
    results = []
    for vq, table in ((plain, plain.codes.base), (cut, cut.base)):
        leaf = z.clone().requires_grad_()
        out = vq(leaf)
        (out.loss + out.z_q.square().sum()).backward()
        results.append([out.z_q, out.loss, leaf.grad, table.grad, *out.losses.values(), *out.stats.values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    baked = cut.bake()
    assert torch.equal(baked.encode(z), plain.encode(z))
    cut.init_from(z, method="data")
    assert cut.codebook().shape == (20, 4)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("simvq", {}, "vq"),
        ("vq", {"codebook": "linear"}, "free codebook"),
        ("nsvq", {"losses": {"ns": {"squared": False}}}, "squared distances"),
        ("vq", {"maintenance": {"anchor": {}}}, "replace, temperature"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ShardedQuantizer(name, 20, 4, **options)


def test_the_plan_is_what_is_held() -> None:
    """Of 4,096 codes in four processes, and then of a million by the same formula."""
    vq = ShardedQuantizer("nsvq", 4096, 8, Shards(1, 4, gather=lambda rows: [rows * 0, rows, rows * 0, rows * 0]))
    plan = bytes_per_process(4096, 8, 4, 4 * 64)
    optimizer = torch.optim.Adam(vq.parameters())
    vq.base.grad = torch.zeros_like(vq.base)
    optimizer.step()
    held = {
        "table": vq.base,
        "gradient": vq.base.grad,
        "moments": [value for value in optimizer.state[vq.base].values() if value.dim()],
        "replacement": [b for b in vq.maintenance.buffers() if b.dim()],
    }
    for name, tensors in held.items():
        together = tensors if isinstance(tensors, list) else [tensors]
        assert plan[name] == sum(tensor.numel() * tensor.element_size() for tensor in together), name
    million = bytes_per_process(1 << 20, 128, 8, 32_768)
    assert million["table"] == (1 << 20) * 128 * 4 // 8
    assert sum(million.values()) < sum(bytes_per_process(1 << 20, 128, 1, 32_768).values()) / 5
