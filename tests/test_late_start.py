# SPDX-License-Identifier: Apache-2.0
"""A stage that places the codes: an autoencoder that settles without a codebook, then k-means on its latents."""

import pytest
import torch

from steadyvq.quantizers import build_quantizer
from steadyvq.training.config import RunConfig, read_recipe, resolve
from steadyvq.training.loop import Engine
from steadyvq.training.run import RunFolder
from steadyvq.training.stages import steady_stages
from steadyvq.training.tokenizer_task import TokenizerTask, codebook_parameters

SETTLE = {
    "name": "settle",
    "until": {"max_epochs": 1},
    "estimator": "unquantized",
    "weights": {"commitment": 0.0},
    "paused": ["replace"],
}


def config(method: str, **changes: object) -> RunConfig:
    paused = ["ema", "replace"] if method == "ema" else ["replace"]
    maintenance = {"replace": {}} | ({"ema": {"decay": 0.9}} if method == "ema" else {})
    return resolve(
        {
            "data": {"crop_size": 16, "epoch_samples": 16, "eval_crops": 8},
            "model": {"channels": 8, "multipliers": [1], "num_res_blocks": 1, "num_mid_blocks": 0, "z_channels": 4},
            "quantizer": {
                "name": method,
                "num_codes": 16,
                "dim": 4,
                "init_samples": 8,
                "options": {"maintenance": maintenance},
            },
            "optim": {"lr": 1e-2, "codebook_lr": 1e-2},
            "stages": [{**SETTLE, "paused": paused}, {"name": "quantise", "place": "kmeans"}],
            "epochs": 2,
            "batch_size": 4,
            "eval_every": 2,
            "probe_images": 4,
            **changes,
        }
    )


class Watched(TokenizerTask):
    """Keeps what stages found and left."""

    def begin_stage(self, schedule, optimizers, average):
        before = {name: value.clone() for name, value in self.tokenizer.state_dict().items()}
        super().begin_stage(schedule, optimizers, average)
        crops = [self.train_crops.batch(0, start, 4) for start in (0, 4)]
        with torch.no_grad():
            latents = torch.cat([self.tokenizer.latents(images) for images in crops])
        self.seen = {
            "codes_before": before["quantizer.codes.base"],
            "codes": self.quantizer.codebook().detach().clone(),
            "average": average.shadow["quantizer.codes.base"].clone(),
            "latents": latents,
            "moments": [
                value.abs().max().item()
                for parameter in codebook_parameters(self.quantizer)
                for value in optimizers["tokenizer"].state[parameter].values()
                if value.shape == parameter.shape
            ],
        }


@pytest.mark.parametrize("method", ["vq", "ema"])
def test_codes_are_placed_where_the_encoder_has_settled(method, tmp_path):
    own = config(method)
    task = Watched(own)
    Engine(task, RunFolder.create(tmp_path / "run", own, "test"), quiet=True).fit()
    seen = task.seen
    # The same placing by hand, from a codebook of its own.
    expected = build_quantizer("vq", num_codes=16, dim=4, channel_axis=1)
    expected.init_from(seen["latents"], method="kmeans", seed=own.seed)
    torch.testing.assert_close(seen["codes"], expected.codebook().detach(), rtol=0, atol=0)
    assert not torch.equal(seen["codes"], seen["codes_before"])
    # Averaged weights and Adam's moments know nothing of the codes that were there before.
    assert torch.equal(seen["average"], seen["codes"])
    assert all(moment == 0 for moment in seen["moments"])
    assert method == "ema" or seen["moments"]


def test_without_a_codebook_an_autoencoder_learns_and_codes_stay(tmp_path):
    own = config("vq", stages=[{**SETTLE, "until": {}, "weights": {"commitment": 0.0, "codebook": 0.0}}])
    task = TokenizerTask(own)
    codes = task.quantizer.codebook().detach().clone()
    weights = [parameter.detach().clone() for parameter in task.tokenizer.encoder.parameters()]
    Engine(task, RunFolder.create(tmp_path / "run", own, "test"), quiet=True).fit()
    assert torch.equal(task.quantizer.codebook(), codes)
    assert any(not torch.equal(a, b) for a, b in zip(weights, task.tokenizer.encoder.parameters(), strict=True))


def test_the_decoder_sees_latents_in_training_and_codes_in_evaluation():
    quantizer = build_quantizer("vq", num_codes=8, dim=4, channel_axis=-1, estimator="unquantized")
    z = torch.randn(5, 4, requires_grad=True)
    out = quantizer.train()(z)
    assert torch.equal(out.z_q, z)
    (gradient,) = torch.autograd.grad(out.z_q.sum(), z)
    assert torch.equal(gradient, torch.ones_like(z))
    assert torch.equal(quantizer.eval()(z).z_q, quantizer.codebook()[out.indices])


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_that_is_resumed_places_its_codes_once(stop, tmp_path):
    """Stopped before and after the codes were placed (after step 4), it ends with the same weights as a run in one go."""
    own = config("vq", checkpoint_every=1)
    whole = TokenizerTask(own)
    Engine(whole, RunFolder.create(tmp_path / "whole", own, "test"), quiet=True).fit()

    class Stopped(TokenizerTask):
        def begin_step(self, step):
            super().begin_step(step)
            if step == stop:
                raise OSError("stopped for the test")

    run = RunFolder.create(tmp_path / "parts", own, "test")
    with pytest.raises(OSError, match="stopped for the test"):
        Engine(Stopped(own), run, quiet=True).fit()
    again = TokenizerTask(own)
    Engine(again, run, resume=True, quiet=True).fit()
    for name, value in whole.tokenizer.state_dict().items():
        assert torch.equal(value, again.tokenizer.state_dict()[name]), name


@pytest.mark.parametrize(
    ("method", "stages", "told"),
    [
        ("vq", [{"name": "joint", "place": "data"}], "set quantizer.init=data"),
        ("fvq", [SETTLE, {"name": "quantise", "place": "kmeans"}], "codes of fvq cannot be placed on latents"),
        ("fsq", [SETTLE, {"name": "quantise", "place": "kmeans"}], "it has no table of codes"),
    ],
)
def test_a_stage_that_cannot_place_is_refused_before_training(method, stages, told):
    stages = [{**stage, "paused": [], "weights": {}} for stage in stages]
    size = {"fsq": {"num_codes": 240, "dim": 3}, "fvq": {"num_codes": 16, "dim": 4}}.get(
        method, {"num_codes": 16, "dim": 4}
    )
    own = config("vq", stages=stages, quantizer={"name": method, **size})
    with pytest.raises(ValueError, match=told):
        TokenizerTask(own)


def test_the_stages_in_code_are_those_of_the_recipe():
    own = resolve(read_recipe("steady"))
    assert own.stages == steady_stages()
    assert own.quantizer.name == "ema"
