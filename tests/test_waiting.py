# SPDX-License-Identifier: Apache-2.0
"""A training step does not make the host wait for the device; counted on CPUs in test_operation_counts.py, forbidden here."""

import copy

import pytest
import torch
from test_operation_counts import SIZES, counted

import steadyvq
from steadyvq.quantizers.base import HostNumber


def test_a_number_is_asked_for_once_and_again_when_somebody_else_wrote_it() -> None:
    number, buffer = HostNumber(), torch.tensor(3)

    def advance() -> None:
        number.advance(buffer)

    assert counted(advance).waits == 1
    assert counted(advance).waits == 0
    assert (int(buffer), number.of(buffer)) == (5, 5)
    buffer.copy_(torch.tensor(40))  # a checkpoint was loaded
    assert number.advance(buffer) == 41
    other = buffer.clone()  # the module was moved or copied
    other.add_(7)
    assert number.of(other) == 48
    assert copy.deepcopy(number).of(buffer) == 41


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["vq", "ema", "simvq", "nsvq", "rotation", "fsq", "lfq"])
def test_no_synchronisation_on_a_card(name: str) -> None:
    size = SIZES.get(name, {"num_codes": 1024, "dim": 16})
    # Replacement asks once per event how many codes it is about: there is none in these steps.
    rare = {"maintenance": {"replace": {"every": 1000}}} if name == "nsvq" else {}
    vq = steadyvq.build_quantizer(name, **size, **rare).cuda()
    optimizer = torch.optim.Adam(list(vq.parameters()) or [torch.zeros(1, device="cuda")], fused=True)
    z = torch.randn(4096, vq.dim, device="cuda", requires_grad=True)

    def step() -> None:
        out = vq(z)
        (out.z_q.sum() + out.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        vq.update(out, optimizer=optimizer)

    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
