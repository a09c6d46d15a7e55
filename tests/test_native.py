# SPDX-License-Identifier: Apache-2.0
"""The compiled search: the bits of the reference on every input, a proven screen, and a build that can fail without harm."""

import os
import platform
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import CASES, grid, oracle, random
from torch import Tensor

from steadyvq import kernels
from steadyvq.cli import main
from steadyvq.kernels import choice, native, reference, rounding, statistics, streaming

LIBRARY = native.library()
pytestmark = pytest.mark.skipif(LIBRARY.functions is None, reason=f"no compiled kernel: {LIBRARY.reason}")
SCREENS = [False, True, None] if LIBRARY.bfloat16 else [False, None]


def same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(got[0], expected[0]) and torch.equal(got[1].nan_to_num(-1), expected[1].nan_to_num(-1))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("bfloat16", SCREENS)
def test_it_has_the_bits_of_the_reference(case: str, dot: bool, bfloat16: bool | None) -> None:
    z, table = CASES[case]()
    assert same(native.nearest(z, table, dot=dot, bfloat16=bfloat16), reference.nearest(z, table, dot=dot))


@pytest.mark.parametrize("bfloat16", SCREENS)
@given(
    n=st.integers(1, 420),
    k=st.integers(1, 1200),
    d=st.integers(1, 70),
    seed=st.integers(0, 2**20),
    offset=st.sampled_from([0.0, 3.0, 1e4]),
    tied=st.booleans(),
    dot=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_any_shape(bfloat16, n, k, d, seed, offset, tied, dot) -> None:
    make = grid if tied else lambda rows, width, seed: random(rows, width, seed=seed)
    z, table = make(n, d, seed) + offset, make(k, d, seed + 1) + offset
    assert same(native.nearest(z, table, dot=dot, bfloat16=bfloat16), reference.nearest(z, table, dot=dot))


def trained(n: int, k: int, d: int, spread: float) -> tuple[Tensor, Tensor]:
    """Codes in clusters and latents close to them, as after training."""
    centres = random(16, d, seed=1)
    table = centres[torch.arange(k) % 16] + spread * random(k, d, seed=2)
    return table[torch.arange(n) * 7 % k] + 0.3 * spread * random(n, d, seed=3), table


@pytest.mark.parametrize("bfloat16", SCREENS)
@pytest.mark.parametrize("spread", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize(("k", "d"), [(20_000, 8), (6_000, 64), (2_000, 300)])
def test_large_tables_of_trained_codes(k: int, d: int, spread: float, bfloat16: bool | None) -> None:
    z, table = trained(500, k, d, spread)
    got = native.nearest(z, table, bfloat16=bfloat16)
    assert same(got, streaming.nearest(z, table))
    assert torch.equal(got[0][:20], oracle(z[:20], table)[0])


def test_products_in_bfloat16_alone_are_wrong_where_the_search_is_right() -> None:
    z, table = random(800, 8, seed=1), random(20_000, 8, seed=2)
    rounded = (2 * z.bfloat16() @ table.bfloat16().t()).float() - table.square().sum(1)
    exact = streaming.nearest(z, table)[0]
    assert (rounded.argmax(1) != exact).sum() > 20
    assert torch.equal(native.nearest(z, table)[0], exact)


@pytest.mark.parametrize("bfloat16", SCREENS)
def test_codes_that_no_screen_can_tell_apart(bfloat16: bool | None) -> None:
    """Two far clusters of codes a few float32 steps wide: half of all codes are within every bound."""
    bump = torch.randint(-2, 3, (4_000, 24), generator=torch.Generator().manual_seed(6))
    table = (random(2, 24, seed=5) * 10).repeat(2_000, 1) * (1 + bump * torch.finfo(torch.float32).eps)
    z = random(250, 24, seed=7) * 10
    expected = reference.nearest(z[:40], table)
    got = native.nearest(z, table, bfloat16=bfloat16)
    assert same((got[0][:40], got[1][:40]), expected)


def test_many_equal_codes_are_searched_once() -> None:
    table = torch.cat([random(1, 16, seed=1) * 100, random(3, 16, seed=2).repeat(20_000, 1)])
    z = random(3_000, 16, seed=3)
    seen = []

    def counted(z: Tensor, codes: Tensor, ids: Tensor, dot: bool, patience: int | None) -> tuple[Tensor, Tensor] | None:
        seen.append(len(codes))
        return native._search(z, codes, ids, dot, patience, bfloat16=None)

    indices, _ = native.over_finite(counted, z, table, False)
    assert seen == [len(table), 4]
    assert torch.equal(indices, oracle(z, table[:4])[0])


@pytest.mark.parametrize("bfloat16", SCREENS)
def test_bad_rows(bfloat16: bool | None) -> None:
    z, table = random(300, 16, seed=1), random(2_000, 16, seed=2)
    z[[0, 7, 299], [1, 2, 3]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    table[3, 1], table[7] = torch.nan, torch.inf
    assert same(native.nearest(z, table, bfloat16=bfloat16), reference.nearest(z, table))


def test_it_does_not_depend_on_the_batch_or_the_number_of_threads() -> None:
    z, table = grid(1_001, 12, 1), grid(3_000, 12, 2)
    whole = native.nearest(z, table)
    for size in (1, 13, 700):
        assert torch.equal(torch.cat([native.nearest(part, table)[0] for part in z.split(size)]), whole[0])
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert same(native.nearest(z, table), whole)
    finally:
        torch.set_num_threads(before)


# Inputs near the ends of float32 are not packed.
PACKED = [case for case, make in CASES.items() if rounding.exponent_of(*make()) in native._EXPONENTS]


@pytest.mark.skipif(not LIBRARY.bfloat16, reason="no bfloat16 products")
@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("case", PACKED)
def test_scores_in_bfloat16_are_lower_bounds(case: str, dot: bool) -> None:
    """Of the operands as they are packed, in exact arithmetic, against the exact scores of the exact inputs."""
    z, table = (t.float().contiguous() for t in CASES[case]())
    exponent = rounding.exponent_of(z, table)
    prepared = native._prepare(LIBRARY, z, table, exponent, dot, True)
    _, _, _, tiles, packed, _, starts, centre, slack = (t.double() for t in prepared.tensors)
    (n, d), k, width = z.shape, len(table), LIBRARY.call("bfloat16_width", z.shape[1])
    rows = tiles.view(-1, width // 2, LIBRARY.rows, 2).permute(0, 2, 1, 3).reshape(-1, width)[:n]
    codes = packed.view(-1, width // 2, 16, 2).permute(0, 2, 1, 3).reshape(-1, width)[:k]
    bound = starts[:k] + rows @ codes.T
    exact_z, exact_e = (t.double() * 2.0**exponent - centre for t in (z, table))
    exact = (0 if dot else exact_e.square().sum(1)) - 2 * exact_z @ exact_e.T
    tiny = 1e-12 * (exact_z.norm(dim=1).amax() + exact_e.norm(dim=1).amax()) ** 2  # of float64 sums here
    assert (bound <= exact + tiny).all()
    # Rounding a latent and a code costs at most 2^-8 of the product of their lengths each, and as much for the bound.
    reach = exact_z.norm(dim=1)[:, None] * exact_e.norm(dim=1)
    sums = (d + 8) * 2.0**-22 * (reach + exact_e.square().sum(1))
    assert (bound >= exact - 2.0**-5 * reach - 4 * sums - tiny).all()
    assert (slack[:n] >= 0).all()


@pytest.mark.skipif(not LIBRARY.bfloat16, reason="no bfloat16 products")
def test_bfloat16_is_given_up_where_it_does_not_pay(monkeypatch) -> None:
    used = []
    prepare = native._prepare

    def noted(kernel, z, codes, exponent, dot, bfloat16):
        used.append(bfloat16)
        return prepare(kernel, z, codes, exponent, dot, bfloat16)

    monkeypatch.setattr(native, "_prepare", noted)
    for spread, screens in ((1.0, [True]), (0.02, [True, False])):
        z, table = trained(1_000, 4_000, 24, spread)
        used.clear()
        assert same(native.nearest(z, table), streaming.nearest(z, table))
        assert used == screens


def test_bad_arguments_and_foreign_inputs() -> None:
    z, table = random(40, 8, seed=1), random(90, 8, seed=2)
    assert same(native.nearest(z.double(), table), reference.nearest(z.double(), table))
    wide = random(6, 4_100, seed=1), random(9, 4_100, seed=2)
    assert same(native.nearest(*wide), reference.nearest(*wide))
    with kernels.use_backend("native"):
        assert torch.equal(kernels.nearest(z, table)[0], oracle(z, table)[0])
    if not LIBRARY.bfloat16:
        with pytest.raises(ValueError, match="AVX512-BF16"):
            native.nearest(z, table, bfloat16=True)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="options of x86 compilers")
@pytest.mark.parametrize("case", [*CASES, "trained"])
def test_the_kernels_of_older_processors(case: str, monkeypatch) -> None:
    """AVX2 alone: other tiles, other lanes, no bfloat16."""
    older = native.library("-march=x86-64-v3")
    assert (older.bfloat16, older.rows, older.groups) == (False, 6, 1)
    monkeypatch.setattr(native, "library", lambda: older)
    z, table = trained(300, 5_000, 24, 0.1) if case == "trained" else CASES[case]()
    for dot in (False, True):
        assert same(native.nearest(z, table, dot=dot), reference.nearest(z, table, dot=dot))
    logits = random(5, 100, seed=1) * 9
    weight = logits.clone()
    largest, top, rest, _ = native.softmax_rows(weight, torch.arange(5), True)
    torch.testing.assert_close((top + rest).log() + largest, logits.logsumexp(1))


# --- softmax ---------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 40),
    codes=st.integers(1, 5_000),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    losers=st.booleans(),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=60)
def test_softmax_rows_against_float64(rows, codes, spread, losers, threads, seed) -> None:
    logits = random(rows, codes, seed=seed) * spread + 7
    winner = torch.randint(0, codes, (rows,), generator=torch.Generator().manual_seed(seed))
    winner[::2] = logits.argmax(1)[::2]
    weight = logits.clone()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        largest, top, rest, cost = native.softmax_rows(weight, winner, losers)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(largest, logits.amax(1))
    # A difference of float32 numbers is what the kernel sees; from there on everything is exact here.
    shifted = (logits - largest[:, None]).double()
    exact = torch.where(shifted > -60, shifted.exp(), 0.0)
    mine = exact.gather(1, winner[:, None])
    others = exact.scatter(1, winner[:, None], 0.0)
    kept = others if losers else exact
    close = {"rtol": 3e-7, "atol": 0.0}
    torch.testing.assert_close(weight.double(), kept, **close)
    torch.testing.assert_close(top.double(), mine[:, 0], **close)
    torch.testing.assert_close(rest.double(), others.sum(1), rtol=3e-6, atol=0.0)
    torch.testing.assert_close(cost.double(), (kept * shifted).sum(1), rtol=3e-6, atol=0.0)


@pytest.mark.parametrize("losers", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 0.35, 50.0])
@pytest.mark.parametrize(("n", "k", "d"), [(150, 1_000, 16), (70, 9_001, 5), (3, 40, 4)])
def test_compiled_statistics_are_those_of_float64(n: int, k: int, d: int, temperature: float, losers: bool) -> None:
    z, table = random(n, d, seed=1), random(k, d, seed=2)
    table = table - table.mean(0)
    indices = streaming.nearest(z, table)[0]
    indices[::7] = (indices[::7] + 3) % k
    row, factor = torch.rand(n, generator=torch.Generator().manual_seed(3)), torch.linspace(0.5, 2.0, k)
    row[::5] = 0.0
    given = (temperature, row, factor)
    options = {"losers": losers, "want_row_sum": True}
    got = statistics.soft_statistics(z, table, indices, *given, **options, compiled=True)
    plain = statistics.soft_statistics(z, table, indices, *given, **options, compiled=False)
    doubles = (temperature, row.double(), factor.double())
    exact = reference.soft_statistics(z.double(), table.double(), indices, *doubles, **options)
    for a, b, c in zip(got, plain, exact, strict=True):
        # Logits of size |z|^2 / tau carry that many float32 steps of error, in either path.
        tolerance = 4e-7 * (8 + float(z.square().sum(1).max() + table.square().sum(1).max()) / temperature)
        scale = float(c.abs().max()) + 1e-30
        assert float((a - c).abs().max()) <= tolerance * scale
        assert float((b - c).abs().max()) <= tolerance * scale


# --- choice and build ------------------------------------------------------------------------------------------------


def test_the_choice_is_told_with_its_reason() -> None:
    assert choice.search_choice(2048, 65536, 128) == ("native", choice.search_choice(2048, 65536, 128).reason)
    assert "compiled for this processor" in choice.search_choice(2048, 65536, 128).reason
    if not torch.cuda.is_available():
        assert choice.search_choice(2048, 65536, 128, device="cuda").backend == "streaming"
        assert "this is cuda: " in choice.search_choice(2048, 65536, 128, device="cuda").reason
    assert "float64" in choice.search_choice(2048, 65536, 128, dtype=torch.float64).reason
    assert "4096 dimensions" in choice.search_choice(2048, 65536, 5000).reason
    assert "small" in choice.search_choice(8, 16, 4).reason
    assert choice.softmax_choice(2048, 65536, 128).backend == "native"
    assert choice.softmax_choice(2048, 65536, 128, dtype=torch.float64).backend == "streaming"


def test_the_choice_can_be_asked_for(capsys) -> None:
    assert main(["kernels", "explain", "2048", "65536", "128"]) == 0
    out = capsys.readouterr().out
    assert "nearest code" in out
    assert "softmax over codes" in out
    assert out.count("compiled for this processor") == 2
    assert LIBRARY.reason in out
    assert main(["kernels", "explain", "64", "512", "8", "--measure"]) == 0
    assert re.search(r"measured, \d+ thread\(s\): [\d.]+ ms; torch.cdist and argmin [\d.]+ ms", capsys.readouterr().out)
    assert main(["kernels", "explain", "0", "512", "8"]) == 2
    assert "N is 0, but there has to be at least 1" in capsys.readouterr().err


EXPLAIN = "from steadyvq.kernels import choice; print(*choice.search_choice(2048, 65536, 128), sep=': ')"


def explained(**environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", EXPLAIN]
    env = {**os.environ, **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_build_that_fails_leaves_the_search_in_torch(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    started = {
        "switched off by STEADYVQ_NATIVE=0": explained(STEADYVQ_NATIVE="0"),
        "there is no C compiler": explained(PATH="", CC=""),
        "could not compile the kernels": explained(CC="/bin/false", XDG_CACHE_HOME=str(tmp_path / "a")),
        "Not a directory": explained(XDG_CACHE_HOME=str(tmp_path / "file")),
    }
    for words, process in started.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.startswith("streaming: "), out
        assert words in out
    assert list((tmp_path / "a").rglob("*.so")) == []


@pytest.mark.slow
def test_processes_that_start_together_share_one_build(tmp_path) -> None:
    for process in [explained(XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]:
        out, err = process.communicate(timeout=120)
        assert out.startswith("native: "), out + err
    assert len(list(tmp_path.rglob("*"))) == 2  # the folder and one library
