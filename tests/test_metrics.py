# SPDX-License-Identifier: Apache-2.0
"""Every measure against its definition, written out naively here."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steadyvq.data import load_collection
from steadyvq.metrics import (
    EvaluationRecord,
    ImageQuality,
    Probe,
    UsageMeter,
    assignment_churn,
    encoder_drift,
    estimate,
    psnr,
    read_record,
    relative_quantisation_error,
    ssim,
    to_uint8,
    uniform_utilization,
    write_record,
)


def meter_of(indices: torch.Tensor, num_codes: int) -> UsageMeter:
    meter = UsageMeter(num_codes)
    meter.update(indices)
    return meter


# ---- usage ----


def test_uniform_tokens_reach_the_ceiling_and_no_more() -> None:
    tokens = torch.randint(65536, (16, 64, 64), generator=torch.Generator().manual_seed(0))
    report = meter_of(tokens, 65536).report()
    assert report.tokens == 65536
    assert report.ceiling == pytest.approx(1 - math.exp(-1), abs=1e-4)
    assert report.utilization == pytest.approx(report.ceiling, abs=0.005)
    assert report.of_ceiling == pytest.approx(1.0, abs=0.01)
    assert "(63." in str(report)
    assert "a uniform source of 65,536 tokens would reach 63.2 %" in str(report)
    few = meter_of(tokens.flatten()[:1000], 65536).report()
    assert f"{100 * few.utilization:.1f}" == "1.5"
    assert f"{100 * few.ceiling:.1f}" == "1.5"


def test_report_line() -> None:
    meter = UsageMeter(1024)
    meter.update(torch.arange(651).repeat(32)[:20480])
    assert str(meter.report()) == (
        "651/1024 codes (63.6 %; a uniform source of 20,480 tokens would reach 100.0 %), perplexity 651"
    )


def test_zipf_tokens_agree_with_numpy() -> None:
    tokens = np.random.default_rng(1).zipf(1.3, 20000)
    tokens = tokens[tokens <= 4096] - 1
    report = meter_of(torch.from_numpy(tokens), 4096).report()
    values, counts = np.unique(tokens, return_counts=True)
    shares = counts / counts.sum()
    entropy = -(shares * np.log2(shares)).sum()
    assert (report.tokens, report.active) == (len(tokens), len(values))
    assert report.utilization == len(values) / 4096
    assert report.entropy_bits == pytest.approx(entropy, rel=1e-12)
    assert report.perplexity == pytest.approx(2**entropy, rel=1e-12)
    assert report.ceiling == pytest.approx(1 - (1 - 1 / 4096) ** len(tokens), rel=1e-9)
    assert report.of_ceiling == pytest.approx(report.utilization / report.ceiling)


@given(hnp.arrays(np.int64, st.integers(0, 60), elements=st.integers(-1, 9)), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_merged_meters_equal_the_meter_of_the_union(tokens: np.ndarray, cut: int) -> None:
    whole = meter_of(torch.from_numpy(tokens), 10)
    first, second = meter_of(torch.from_numpy(tokens[:cut]), 10), meter_of(torch.from_numpy(tokens[cut:]), 10)
    first.merge(second)
    assert torch.equal(first.counts, whole.counts)
    assert first.report() == whole.report()
    assert whole.counts.tolist() == [int((tokens == code).sum()) for code in range(10)]


def test_ceiling_keeps_its_digits() -> None:
    assert uniform_utilization(3 * 10**9, 1) == pytest.approx(1 / (3 * 10**9), rel=1e-12, abs=0)
    assert uniform_utilization(10, 0) == 0.0
    assert (uniform_utilization(1, 0), uniform_utilization(1, 5)) == (0.0, 1.0)
    assert uniform_utilization(4, 2) == pytest.approx(1 - 0.75**2)


def test_masked_and_empty_batches_count_nothing() -> None:
    meter = UsageMeter(4)
    meter.update(torch.empty(0, 3, dtype=torch.int64))
    meter.update(torch.full((2, 2), -1))
    empty = meter.report()
    assert (empty.tokens, empty.active, empty.perplexity, empty.of_ceiling) == (0, 0, 0.0, 0.0)
    meter.update(torch.tensor([[3, -1], [3, 3]], dtype=torch.int32))
    assert meter.counts.tolist() == [0, 0, 0, 3]
    report = meter.report()
    assert (report.perplexity, math.copysign(1, report.entropy_bits)) == (1.0, 1.0)


def test_meter_state_round_trip_and_reset() -> None:
    meter = meter_of(torch.tensor([0, 1, 1]), 3)
    saved = meter.state()
    meter.update(torch.tensor([2]))
    fresh = UsageMeter(3)
    fresh.load_state(saved)
    assert fresh.counts.tolist() == [1, 2, 0]
    meter.reset()
    assert meter.counts.tolist() == [0, 0, 0]


def test_meter_errors() -> None:
    meter = UsageMeter(4)
    for bad in (4, -2):
        with pytest.raises(ValueError, match="num_codes=4: pass indices in"):
            meter.update(torch.tensor([0, bad]))
    assert meter.counts.sum() == 0
    with pytest.raises(ValueError, match="cannot merge a meter of 5 codes into one of 4"):
        meter.merge(UsageMeter(5))
    with pytest.raises(ValueError, match="saved counts are of 5 codes"):
        meter.load_state(UsageMeter(5).state())
    with pytest.raises(ValueError, match="num_codes is 0"):
        UsageMeter(0)


# ---- image quality ----


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Crops of real photographs and noisy copies, floats in [-1, 1]."""
    pytest.importorskip("mvtbdata")
    photos = load_collection("mvtb", min_side=64, max_side=400)
    clean = torch.stack([image[:, :48, :64] for image in photos.images[::15]]).float() / 127.5 - 1.0
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    return clean, clean + noise * torch.linspace(0.02, 0.5, len(clean))[:, None, None, None]


def naive_psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = (np.rint((np.clip(t.double().numpy(), -1, 1) + 1) * 127.5) for t in (a, b))
    return float(10 * np.log10(255**2 / ((x - y) ** 2).mean()))


def naive_ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Wang et al. (2004), equation 13, window by window."""
    x, y = (to_uint8(t[None])[0].double().numpy() for t in (a, b))
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weight = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(3):
        for i in range(x.shape[1] - 10):
            for j in range(x.shape[2] - 10):
                p, q = x[channel, i : i + 11, j : j + 11], y[channel, i : i + 11, j : j + 11]
                mp, mq = (weight * p).sum(), (weight * q).sum()
                vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
                cov = (weight * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_psnr_is_per_image_and_on_eight_bits(pictures: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, noisy = pictures
    values = psnr(clean, noisy)
    assert values.tolist() == pytest.approx([naive_psnr(a, b) for a, b in zip(clean, noisy, strict=True)], abs=1e-4)
    assert values.max() - values.min() > 10
    assert torch.equal(psnr(to_uint8(clean), noisy), values)
    # Less than half a level is no difference; one value off by one level is the ceiling.
    assert torch.equal(psnr(clean, clean + 0.4 / 127.5), psnr(clean, clean))
    one_off = to_uint8(clean[:1]).clone()
    one_off[0, 0, 0, 0] ^= 1
    assert torch.equal(psnr(clean[:1], one_off), psnr(clean[:1], clean[:1]))


def test_psnr_of_a_known_error() -> None:
    black, grey = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert psnr(black, grey).item() == 0.0
    assert psnr(black, black).item() == pytest.approx(48.13 + 10 * math.log10(3072), abs=0.01)


def test_ssim_agrees_with_the_formula(pictures: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, noisy = (part[:3, :, :24, :28] for part in pictures)
    expected = [naive_ssim(a, b) for a, b in zip(clean, noisy, strict=True)]
    assert ssim(clean, noisy).tolist() == pytest.approx(expected, abs=1e-4)
    assert ssim(clean, clean).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert ssim(clean[:1], noisy[:1]).shape == (1,)


def test_image_errors() -> None:
    a = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match="compare images of one shape"):
        psnr(a, a[:1])
    with pytest.raises(ValueError, match="images are 8 x 16, but SSIM has a window of 11 x 11"):
        ssim(a[..., :8], a[..., :8])
    with pytest.raises(ValueError, match=r"dtype torch\.int64"):
        psnr(a.long(), a)
    with pytest.raises(ValueError, match="1 photographs are named for 2 images"):
        ImageQuality().update(a, a, ["x"])
    with pytest.raises(ValueError, match="no images were measured"):
        ImageQuality().report()


def test_quality_over_batches_is_quality_of_the_whole(pictures: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, noisy = pictures
    names = ["a", "b", "a", "c", "b"][: len(clean)]
    whole, parts = ImageQuality(), ImageQuality()
    whole.update(clean, noisy, names)
    for i in range(len(clean)):
        parts.update(clean[i : i + 1], noisy[i : i + 1], names[i : i + 1])
    report = whole.report()
    assert parts.report().psnr == report.psnr
    assert (report.images, report.photographs) == (5, 3)
    values = psnr(clean, noisy)
    assert report.psnr.mean == pytest.approx(float(values.mean()))
    assert report.psnr.by_photograph == pytest.approx(
        {"a": float(values[[0, 2]].mean()), "b": float(values[[1, 4]].mean()), "c": float(values[3])}
    )
    assert report.psnr.low is not None
    assert report.psnr.low < report.psnr.mean < (report.psnr.high or 0.0)


def test_other_measures_are_summarised_like_ours(pictures: tuple[torch.Tensor, torch.Tensor]) -> None:
    clean, noisy = pictures
    names = ["a", "b", "a", "c", "b"]
    values = torch.tensor([0.5, 0.1, 0.2, 0.4, 0.3])
    quality = ImageQuality()
    quality.update(clean[:2], noisy[:2], names[:2], {"mine": values[:2]})
    quality.update(clean[2:], noisy[2:], names[2:], {"mine": values[2:]})
    assert quality.report().others == {"mine": estimate(values.tolist(), names)}


def test_interval_is_the_bootstrap_over_photographs() -> None:
    rng = np.random.default_rng(0)
    groups = {f"p{i}": rng.normal(rng.normal(30, 3), 1, size=rng.integers(1, 9)) for i in range(15)}
    values = [float(v) for group in groups.values() for v in group]
    names = [name for name, group in groups.items() for _ in group]
    means = []
    for _ in range(6000):
        drawn = [list(groups.values())[i] for i in rng.integers(0, 15, 15)]
        means.append(np.concatenate(drawn).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    found = estimate(values, names)
    assert found.mean == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.08 * (high - low))
    # Resampling images would claim far more certainty.
    single = estimate(values, [str(i) for i in range(len(values))])
    assert found.high is not None
    assert found.low is not None
    assert single.high is not None
    assert single.low is not None
    assert found.high - found.low > 1.3 * (single.high - single.low)
    assert estimate(values, names) == found
    assert estimate(values, names, seed=1).low != found.low
    alone = estimate([1.0, 3.0], ["x", "x"])
    assert (alone.mean, alone.low, alone.high, str(alone)) == (2.0, None, None, "2.000")


# ---- drift ----


def test_relative_error_agrees_with_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    z, z_q = torch.randn(2, 5, 7, generator=generator) + 4.0, torch.randn(2, 5, 7, generator=generator) + 4.0
    rows, codes = z.reshape(-1, 7).double(), z_q.reshape(-1, 7).double()
    mean = sum(rows) / len(rows)
    above = sum(float(((c - r) ** 2).sum()) for r, c in zip(rows, codes, strict=True))
    below = sum(float(((r - mean) ** 2).sum()) for r in rows)
    assert relative_quantisation_error(z, z_q) == pytest.approx(above / below, rel=1e-9)
    assert relative_quantisation_error(100 * z, 100 * z_q) == pytest.approx(above / below, rel=1e-5)
    assert relative_quantisation_error(z, z.reshape(-1, 7).mean(0).expand_as(z)) == pytest.approx(1.0, rel=1e-5)
    assert relative_quantisation_error(z, z) == 0.0
    assert relative_quantisation_error(torch.ones(3, 2), torch.zeros(3, 2)) == math.inf
    assert relative_quantisation_error(torch.ones(3, 2), torch.ones(3, 2)) == 0.0


def test_drift_of_nothing_and_of_a_translation() -> None:
    z = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert encoder_drift(z, z) == (0.0, 0.0)
    shift = torch.arange(6.0, dtype=torch.float64)
    rows = z.reshape(-1, 6)
    spread = math.sqrt(sum(float(((row - rows.mean(0)) ** 2).sum()) for row in rows) / len(rows))
    drift, rms = encoder_drift(z, z + shift)
    assert rms == pytest.approx(math.sqrt(sum(i * i for i in range(6))), rel=1e-9)
    assert drift == pytest.approx(rms / spread, rel=1e-9)
    assert encoder_drift(z, 2 * z - rows.mean(0))[0] == pytest.approx(1.0, rel=1e-9)


def test_churn_leaves_masked_positions_out() -> None:
    before, after = torch.tensor([[1, 2, -1, 4]]), torch.tensor([[1, 3, -1, 0]])
    assert assignment_churn(before, after) == pytest.approx(2 / 3)
    assert assignment_churn(before, before) == 0.0
    assert assignment_churn(torch.full((3,), -1), torch.full((3,), -1)) == 0.0


def test_probe_compares_with_the_call_before_and_survives_a_checkpoint() -> None:
    z = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    indices = torch.arange(8)
    probe = Probe()
    assert probe.state_dict() == {}
    first = probe(z, z * 0.5, indices)
    assert (first["drift"], first["drift_rms"], first["churn"]) == (None, None, None)
    assert first["relative_error"] == relative_quantisation_error(z, z * 0.5)
    resumed = Probe()
    resumed.load_state_dict({name: value.clone() for name, value in probe.state_dict().items()})
    # The remembered latents must not follow an update in place.
    z += torch.tensor([3.0, 0.0, 4.0])
    changed = indices.clone()
    changed[:2] = 0
    second = probe(z, z, changed)
    assert second["drift_rms"] == pytest.approx(5.0, rel=1e-6)
    assert second["churn"] == 1 / 8
    assert resumed(z, z, changed) == second
    assert probe(z, z, changed) == {"drift": 0.0, "drift_rms": 0.0, "churn": 0.0, "relative_error": 0.0}
    with pytest.raises(ValueError, match="pass the same probe batch every time"):
        probe(z[:4], z[:4], changed[:4])


# ---- records ----


def record(**metrics: object) -> EvaluationRecord:
    return EvaluationRecord(
        metrics=metrics,
        data="mvtb",
        split="val",
        crop=64,
        count=240,
        photographs=12,
        tokens=15360,
        pixels_hash="ab",
        config_hash="cd",
        step=1000,
        version="0.1.0",
        protocol="PSNR is the mean of per-image dB on 8-bit images",
    )


def test_record_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "eval.json"
    written = record(psnr=23.5, error=math.inf, low=None, nested={"a": [1.0, -math.inf]}, ssim=0.1 + 0.2)
    write_record(path, written)
    assert read_record(path) == written
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["metrics"]["error"] == "inf"
    write_record(path, record(psnr=math.nan))
    assert math.isnan(read_record(path).metrics["psnr"])
    assert [entry.name for entry in path.parent.iterdir()] == ["eval.json"]


def test_failed_write_keeps_the_old_record(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    write_record(path, record(psnr=1.0))
    with pytest.raises(TypeError):
        write_record(path, record(psnr=object()))
    assert read_record(path) == record(psnr=1.0)
    # A folder in the way lets the last step fail, after the temporary file is written.
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_record(tmp_path / "taken", record(psnr=1.0))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["eval.json", "taken"]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "not an evaluation record"),
        ('{"data": 1}', "missing or unknown"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_record(path)
