# SPDX-License-Identifier: Apache-2.0
"""The monitor: what it reads of any VQ module, and that its numbers are those of a naive loop."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from foreign_quantizers import LlamaGenStyle, TamingStyle
from torch import Tensor, nn
from torch.nn import functional as F

import steadyvq
from steadyvq.data import CropDataset, load_collection
from steadyvq.diagnosis import Record, adapt, meters
from steadyvq.diagnosis.monitor import Monitor

K, D = 24, 6


@pytest.fixture(scope="module")
def images(photos: Path) -> Tensor:
    """Crops of real photographs, (64, 3, 16, 16)."""
    return CropDataset(load_collection(str(photos), min_side=16).split("train"), 16, 64, 0).batch(0, 0, 64)


def module_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "taming":
        return TamingStyle(K, D)
    if name == "taming, spatial":
        return TamingStyle(K, D, spatial=True)
    if name == "llamagen":
        return LlamaGenStyle(K, D)
    if name == "diffusers":
        theirs = pytest.importorskip("diffusers.models.autoencoders.vae")
        return theirs.VectorQuantizer(K, D, beta=0.25)
    if name.startswith("vqp"):
        vqp = pytest.importorskip("vector_quantize_pytorch")
        if name == "vqp simvq":
            return vqp.SimVQ(dim=D, codebook_size=K, channel_first=True)
        options = {"vqp cosine": {"use_cosine_sim": True}, "vqp heads": {"heads": 2, "codebook_dim": 3}}.get(name, {})
        return vqp.VectorQuantize(dim=D, codebook_size=K, accept_image_fmap=True, **options)
    return steadyvq.build_quantizer(name, num_codes=K, dim=D, channel_axis=1)


OURS = ("vq", "nsvq", "ema", "simvq", "affine", "rotation")
FOREIGN = ("taming", "taming, spatial", "llamagen", "diffusers", "vqp", "vqp cosine", "vqp heads", "vqp simvq")


def train(
    vq: nn.Module, images: Tensor, steps: int, monitor: Monitor | None, start: int = 0, rate: float = 1e-2
) -> nn.Module:
    """A few steps of an encoder of patches in front of a VQ module; returns the encoder."""
    torch.manual_seed(1)
    encoder = nn.Conv2d(3, D, 4, 4)
    optimizer = torch.optim.Adam([*encoder.parameters(), *vq.parameters()], lr=rate)
    for step in range(start, start + steps):
        batch = images[torch.randint(len(images), (16,), generator=torch.Generator().manual_seed(step))]
        latents = encoder(batch)
        out = vq(latents)
        z_q, loss = (out.z_q, out.loss) if hasattr(out, "z_q") else _of_foreign(out)
        optimizer.zero_grad()
        ((z_q - latents.detach()).square().mean() + latents.square().mean() + loss).backward()
        optimizer.step()
        if hasattr(vq, "update"):
            vq.update(out, optimizer=optimizer)
        if monitor is not None:
            monitor.step({"reconstruction": loss})
    return encoder


def _of_foreign(out: tuple[object, ...]) -> tuple[Tensor, Tensor]:
    loss = out[1]
    if isinstance(loss, tuple):
        return out[0], sum(x for x in loss if isinstance(x, Tensor))
    return out[0], loss.sum() if loss.is_floating_point() else out[2].sum()


@pytest.mark.parametrize("name", [*OURS, *FOREIGN])
def test_every_module_is_read_right(name, images):
    """The record's own table and metric give the module's own indices, and its counts are those of the forwards."""
    vq = module_of(name)
    seen = []
    vq.register_forward_hook(lambda module, inputs, outputs: seen.append(adapt(module, inputs, outputs)))
    vq.eval()
    vq(nn.Conv2d(3, D, 4, 4)(images))
    (record,) = seen
    latents = record.latents if isinstance(record.latents, Tensor) else record.latents()
    z, table = latents.detach().reshape(-1, latents.shape[-1]), record.codebook().detach()
    assert table.shape == (K, z.shape[1])
    if record.metric == "cosine":
        z, table = F.normalize(z, dim=-1), F.normalize(table, dim=-1)
    chosen = (z - table[record.indices.reshape(-1)]).square().sum(1)
    assert len(set(record.indices.reshape(-1).tolist())) > 1
    torch.testing.assert_close(
        chosen, torch.cdist(z.double(), table.double()).amin(1).square().float(), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("name", [*OURS, *FOREIGN])
def test_a_monitor_on_every_module(name, images):
    vq = module_of(name)
    monitor = Monitor(vq, every=4, warn=False)
    train(vq, images, 8, monitor)
    row = monitor.row
    assert row["step"] == 8
    assert row["tokens"] == 8 * 16 * 16 * (2 if name == "vqp heads" else 1)
    assert row["missed"] == 0
    assert row["trained"] is True
    assert 0 < row["relative_error"] < 10
    assert row["dtypes"] == {"latents": "float32", "codebook": "float32", "autocast": None}
    assert row["code_step"] > 0
    json.dumps(row, allow_nan=False)


def test_the_numbers_are_those_of_a_naive_loop():
    """Usage, ages, errors, missed look-ups, duplicates, steps of codes: from their definitions, one token at a time."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(K, D, generator=generator)
    table[5] = table[9]
    codes = nn.Parameter(table.clone())
    rows: list[dict[str, object]] = []
    monitor = Monitor(nn.Identity(), rows.append, every=3, watch_every=1, attach=False, warn=False)
    last, tokens, peak = [-1] * K, 0, 0
    for step in range(6):
        z = torch.randn(4, 50, D, generator=generator) * (0.3 if step > 2 else 1)
        indices = torch.cdist(z, codes.detach()).argmin(-1)
        indices[0, :5] = -1
        indices[1, :7] = (indices[1, :7] + 1) % K
        before = codes.detach().clone()
        window = indices if step in (0, 1, 3) else torch.cat([window.reshape(-1), indices.reshape(-1)])
        for i in indices.reshape(-1).tolist():
            tokens += i >= 0
        for i in set(indices.reshape(-1).tolist()) - {-1}:
            last[i] = tokens
        peak = max(peak, sum(t >= 0 and tokens - t < 20 * K for t in last))
        monitor.observe(Record(z, indices, lambda: codes, parameter=codes))
        with torch.no_grad():
            codes[:12] += 0.01
        codes.grad = torch.zeros_like(codes).index_fill_(0, torch.tensor([1, 2, 3]), 1.0)
        monitor.step({"a": step})
    row = monitor.row
    assert [r["step"] for r in rows if r["kind"] == "monitor"] == [1, 3, 6]
    alive = sum(t >= 0 and tokens - t < 20 * K for t in last)
    assert (row["alive"], row["peak_alive"], row["tokens"]) == (alive, peak, tokens)
    assert row["died"] == pytest.approx(1 - alive / peak)
    young = sum(t >= 0 and tokens - t < K for t in last) / K
    assert row["ages"]["under_1"] == pytest.approx(young)
    assert sum(row["ages"].values()) + row["never_hit"] == pytest.approx(1)
    used = window.reshape(-1)[window.reshape(-1) >= 0]
    assert row["window_tokens"] == len(used)
    assert row["utilization"] == pytest.approx(len(set(used.tolist())) / K)
    share = torch.bincount(used, minlength=K).double() / len(used)
    assert row["perplexity"] == pytest.approx(float(torch.exp(-(share[share > 0] * share[share > 0].log()).sum())))
    assert row["values"]["a"] == pytest.approx((3 + 4 + 5) / 3)
    flat, chosen = z.reshape(-1, D).double(), indices.reshape(-1)
    keep = chosen >= 0
    flat, chosen = flat[keep], chosen[keep]
    distance = [float((x - before[i].double()).square().sum()) for x, i in zip(flat, chosen.tolist(), strict=True)]
    best = [min(float((x - e).square().sum()) for e in before.double()) for x in flat]
    assert row["distance_rms"] == pytest.approx(math.sqrt(sum(distance) / len(distance)))
    wrong = sum(a - b > 1e-5 * a for a, b in zip(distance, best, strict=True))
    assert row["missed"] == pytest.approx(wrong / len(distance))
    spread = float((flat - flat.mean(0)).square().sum())
    assert row["relative_error"] == pytest.approx(sum(distance) / spread)
    assert row["norm_ratio"] == pytest.approx(
        float(before.double().square().mean().sqrt() / flat.square().mean().sqrt())
    )
    hit = [i for i in range(K) if i in chosen.tolist()]
    moved = [0.01 * math.sqrt(D) if i < 12 else 0.0 for i in hit]
    assert row["code_step"] == pytest.approx(math.sqrt(sum(m * m for m in moved) / len(moved)), rel=1e-4)
    assert row["moved_codes"] == pytest.approx(12 / K)
    assert row["gradient_codes"] == pytest.approx(3 / K)
    tau = sum(distance) / len(distance)
    soft = [
        torch.softmax(torch.tensor([-float((x - e).square().sum()) / tau for e in before.double()]).double(), 0)
        for x in flat
    ]
    assert row["natural_winner_mass"] == pytest.approx(float(sum(p.max() for p in soft)) / len(soft), rel=1e-4)
    losers = [torch.cat([p[: int(p.argmax())], p[int(p.argmax()) + 1 :]]) for p in soft]
    losers = [p / p.sum() for p in losers]
    spread_of = float(torch.stack([-(p * p.log()).sum() for p in losers]).mean().exp())
    assert row["natural_losers"] == pytest.approx(spread_of, rel=1e-3)


def test_duplicates_are_counted_and_near_codes_are_not():
    codes = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    assert meters.table_numbers(codes, "l2")["duplicates"] == 0
    codes[:20] = codes[100:120]
    assert meters.table_numbers(codes, "l2")["duplicates"] == pytest.approx(40 / 200)
    assert meters.table_numbers(codes + 50, "l2")["duplicates"] == pytest.approx(40 / 200)
    # A collapsed table: most codes small and random, a few large. None of them lies on another.
    small = torch.cat([torch.randn(190, 8) / 1000, torch.randn(10, 8)])
    assert meters.table_numbers(small, "l2")["duplicates"] == 0


def test_drift_is_that_of_a_shifted_encoder(images):
    vq = module_of("taming")
    encoder = nn.Conv2d(3, D, 4, 4)
    model = nn.Sequential(encoder, nn.Dropout(0.5), vq)
    monitor = Monitor(vq, every=2, probe=(model, images[:8]), warn=False)
    shift = torch.tensor([0.3, 0, 0, 0, -0.4, 0.0])
    for _ in range(4):
        model(images[:16])
        with torch.no_grad():
            encoder.bias += shift
        monitor.step()
    assert model.training
    assert vq.training
    assert monitor.row["drift_rms"] == pytest.approx(2 * 0.5, rel=1e-5)
    assert monitor.row["drift_per_step"] == pytest.approx(0.5, rel=1e-5)
    z = encoder(images[:8]).detach().movedim(1, -1).reshape(-1, D)
    assert monitor.row["drift"] == pytest.approx(float(1 / (z - z.mean(0)).square().sum(1).mean().sqrt()), rel=1e-4)
    assert monitor.row["tokens"] == 4 * 16 * 16, "the probe is not counted"
    assert 0 < monitor.row["churn"] <= 1


def test_evaluation_is_not_counted_and_masks_are_left_out(images):
    vq = module_of("nsvq")
    monitor = Monitor(vq, every=1, warn=False)
    latents = nn.Conv2d(3, D, 4, 4)(images[:4])
    mask = torch.rand(4, 4, 4) > 0.5
    vq(latents, mask=mask)
    vq.eval()
    vq(latents)
    monitor.step()
    assert monitor.row["tokens"] == int(mask.sum())


def test_accumulation_and_processes_count_as_one_batch():
    """Two processes, or two micro-batches, report what one forward of everything does."""
    from two_processes import Pair

    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(K, D, generator=generator)
    batches = [torch.randn(100, D, generator=generator) for _ in range(6)]
    of = lambda z: Record(z, torch.cdist(z, codes).argmin(1), lambda: codes)  # noqa: E731

    def rows(parts: int, reduce=None, rank: int | None = None) -> dict[str, object]:
        options = {} if reduce is None else {"reduce": reduce}
        monitor = Monitor(nn.Identity(), every=3, attach=False, warn=False, **options)
        for z in batches:
            for i, part in enumerate(z.chunk(parts)):
                if rank is None or rank == i:
                    monitor.observe(of(part))
            monitor.step()
        return monitor.row

    whole, cut, both = rows(1), rows(2), {}
    pair = Pair()

    def work(rank: int) -> None:
        both[rank] = rows(2, lambda tensor: sum(pair._exchange(rank, tensor)), rank)

    pair.run(work)
    assert both[0] == both[1]
    names = ("tokens", "window_tokens", "alive", "peak_alive", "active", "perplexity")
    assert [cut[n] for n in names] == [whole[n] for n in names]
    assert [both[0][n] for n in names] == [whole[n] for n in names]
    assert both[0]["distance_rms"] == pytest.approx(whole["distance_rms"])


def test_a_resumed_monitor_goes_on_as_if_nothing_had_happened(images):
    logs: dict[str, list[dict[str, object]]] = {"whole": [], "parts": []}
    for name, cuts in (("whole", (20,)), ("parts", (9, 11))):
        codes = nn.Parameter(torch.randn(K, D, generator=torch.Generator().manual_seed(0)))
        state, done = None, 0
        for steps in cuts:
            monitor = Monitor(nn.Identity(), logs[name].append, every=5, attach=False, warn=False)
            if state is not None:
                monitor.load_state_dict(state)
            for step in range(done, done + steps):
                z = torch.randn(64, D, generator=torch.Generator().manual_seed(step))
                monitor.observe(Record(z, torch.cdist(z, codes.detach()).argmin(1), lambda codes=codes: codes))
                with torch.no_grad():
                    codes += 0.01
                monitor.step({"x": float(step)})
            state, done = monitor.state_dict(), done + steps
    assert logs["parts"] == logs["whole"]
    assert len(logs["whole"]) == 5


def test_it_warns_once_of_a_dying_codebook_and_keeps_quiet_of_a_living_one(tmp_path):
    path = tmp_path / "logs" / "monitor.jsonl"
    monitor = Monitor(nn.Identity(), path, every=50, attach=False)
    codes = torch.randn(K, D)

    def train_on(used: int) -> None:
        for _ in range(20):
            monitor.observe(Record(torch.randn(4 * K, D), torch.arange(4 * K) % used, lambda: codes))
            monitor.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_on(K)
    with pytest.warns(UserWarning, match=r"of the 24 codes that were alive at the peak have had no hit") as said:
        train_on(K // 2)
    assert len(said) == 1
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["monitor", "warning"]
    assert rows[1]["died"] == pytest.approx(0.5)


@pytest.mark.parametrize(("lost", "warned"), [(10, False), (18, True)])
def test_codes_that_are_being_revived_are_not_dying_unless_most_are(lost, warned):
    """The same deaths as above, while dead codes are moved onto others: quiet up to HOPELESS."""
    codes = torch.randn(K, D, generator=torch.Generator().manual_seed(0))
    monitor = Monitor(nn.Identity(), every=1000, watch_every=2, attach=False, warn=False)
    for step in range(60):
        used = K if step < 10 else K - lost
        monitor.observe(Record(torch.randn(4 * K, D), torch.arange(4 * K) % used, lambda: codes))
        codes[: K - lost] += 0.001
        codes[K - 1 - step % 5] = codes[step % 10] + 0.01 * torch.randn(D)
        monitor.step()
    assert ("dying" in monitor.warned) == warned
    assert monitor.ages.revived[-1] > 0


def test_bad_use_is_told_in_a_sentence(images):
    layer = nn.Linear(3, 3)
    Monitor(layer, warn=False)
    with pytest.raises(ValueError, match="pass adapter="):
        layer(torch.randn(2, 3))
    vq = module_of("taming")
    with pytest.raises(ValueError, match="no single number"):
        Monitor(vq, warn=False).step({"loss": torch.zeros(3)})
    with pytest.raises(ValueError, match="the codebook has 24 rows"):
        Monitor(vq, attach=False).observe(Record(torch.zeros(2, D), torch.tensor([1, K]), lambda: torch.zeros(K, D)))
    monitor = Monitor(vq, probe=lambda: None, warn=False)
    vq(nn.Conv2d(3, D, 4, 4)(images))
    with pytest.raises(ValueError, match="the probe did not call the monitored module"):
        monitor.step()
    monitor.close()
    whole = steadyvq.build_quantizer("residual", num_codes=K, dim=D, channel_axis=1)
    Monitor(whole, warn=False)
    with pytest.raises(ValueError, match="attach a monitor to each of its layers"):
        whole(torch.randn(2, D, 4, 4))


def test_a_layer_of_a_residual_quantizer_has_its_own_monitor(images):
    whole = steadyvq.build_quantizer("residual", num_codes=K, dim=D, channel_axis=1)
    layers = [part for part in whole.modules() if isinstance(part, steadyvq.Quantizer) and part is not whole]
    monitors = [Monitor(layer, every=1, warn=False) for layer in layers]
    whole(torch.randn(2, D, 4, 4))
    for monitor in monitors:
        assert monitor.step()["tokens"] == 32


def test_a_monitor_needs_torch_alone():
    code = "import sys, steadyvq; steadyvq.Monitor; print(' '.join(sorted({m.split('.')[0] for m in sys.modules})))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {
        "PIL",
        "yaml",
        "rich",
        "lightning_fabric",
        "torchmetrics",
        "jaxtyping",
        "lightning",
        "transformers",
    }


def test_lightning_trains_with_the_callback(images, tmp_path):
    lightning = pytest.importorskip("lightning")
    from steadyvq.diagnosis import lightning_callback

    vq = module_of("taming")

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.vq = nn.Conv2d(3, D, 4, 4), vq

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            z = self.encoder(batch[0])
            z_q, loss, _ = self.vq(z)
            loss = loss + (z_q - 1).square().mean()
            self.log("reconstruction", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 1e-2)

    monitor = Monitor(vq, every=4, warn=False)
    trainer = lightning.Trainer(
        max_epochs=2,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[lightning_callback(monitor)],
    )
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=8)
    trainer.fit(Model(), data)
    assert monitor.steps == trainer.global_step == 8
    assert monitor.row["tokens"] == 2 * 64 * 16
    assert monitor.row["values"]["reconstruction"] > 0


def test_transformers_trains_with_the_callback(images, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from steadyvq.diagnosis import transformers_callback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.vq = nn.Conv2d(3, D, 4, 4), module_of("taming")

        def forward(self, pixels: Tensor) -> dict[str, Tensor]:
            z_q, loss, _ = self.vq(self.encoder(pixels))
            return {"loss": loss + (z_q - 1).square().mean()}

    model = Model()
    monitor = Monitor(model.vq, every=2, warn=False)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
    )
    transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"pixels": image} for image in images],
        callbacks=[transformers_callback(monitor)],
    ).train()
    assert monitor.steps == 4
    assert monitor.row["tokens"] == 4 * 8 * 16
    assert monitor.row["values"]["loss"] > 0
