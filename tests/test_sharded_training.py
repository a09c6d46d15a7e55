# SPDX-License-Identifier: Apache-2.0
"""Runs whose table is cut among processes are those of one process with the whole table."""

from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_recipe
from runs import assert_same, log, start, state, toy, wait

from steadyvq import Tokenizer
from steadyvq.cli import main
from steadyvq.quantizers import ShardedQuantizer, Shards, VectorQuantizer
from steadyvq.quantizers.shards import bytes_per_process
from steadyvq.training.config import resolve
from steadyvq.training.tokenizer_task import TokenizerTask

OF_THE_CUT = ("vq/effective_losers", "vq/ns_grad_max", "vq/ns_grad_over_eps")
"""Means over micro-batches of what is no mean over latents; the same with a table that is not cut."""
OPTIONS = {"maintenance": {"replace": {"patience": 1.0, "cap": 0.1}}}


def known(run: Path) -> dict[str, object]:
    """What a checkpoint holds, less the monitor, which needs a whole table and rests where there is none."""
    return {name: value for name, value in state(run).items() if not name.startswith("/task/monitor")}


def rows(run: Path) -> list[dict[str, object]]:
    return [row for row in log(run) if row["kind"] not in ("monitor", "warning")]


def assert_same_run(run: Path, whole: Path) -> None:
    """Codes, moments, averages, temperature, idle counts, discriminator and log, through the three stages of NSVQ."""
    assert_same(known(whole), known(run), 1e-9)
    found, expected = rows(run), rows(whole)
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert_same(*({k: v for k, v in r.items() if k not in OF_THE_CUT} for r in (row, other)), 1e-7)


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """An uninterrupted run of one process, in which the setting changes nothing."""
    path = tmp_path_factory.mktemp("tables") / "whole"
    toy("table", path, photos)
    return path


@pytest.mark.recovery
@pytest.mark.slow
class TestTwoProcesses:
    def test_begun_by_two_carried_on_by_one_and_ended_by_two(self, whole, photos, tmp_path):
        """In micro-batches of unequal numbers first; killed before and after the freeze."""
        cut = ("--set", "micro_batch_size=2")
        toy("table", tmp_path / "run", photos, *cut, "--harm", "die", 7, processes=2, code=-9)
        toy("table", tmp_path / "run", photos, "--resume", "--harm", "die", 12, code=-9)
        toy("table", tmp_path / "run", photos, "--resume", processes=2)
        assert_same_run(tmp_path / "run", whole)
        train = [row for row in rows(whole) if row["kind"] == "train"]
        assert sum(row.get("vq/replaced", 0) for row in train) >= 5
        assert [row["stage"] for row in rows(whole) if row["kind"] == "stage"] == ["joint", "warmup", "refine"]
        assert sum(row["grad_norm/tokenizer"] > 0.3 for row in train) >= 10, "clipped"
        assert sum("adversarial/weight" in row for row in train) >= 5

    def test_the_command(self, photos, tmp_path, capsys, monkeypatch):
        """Trained by two, then read by every command as the tokenizer that it is."""
        monkeypatch.chdir(tmp_path)
        quantizer = {"name": "nsvq", "num_codes": 33, "dim": 8, "options": OPTIONS, "init": "kmeans", "sharded": True}
        Path("cut.yaml").write_text(yaml.safe_dump(tiny_recipe(photos, quantizer=quantizer, train="all")))
        said = wait(start("-m", "steadyvq", "train", tmp_path / "cut.yaml", "--out", tmp_path / "run", processes=2))
        assert "16 of 33 codes" in said
        tokenizer = Tokenizer.from_pretrained("run/tokenizer")
        assert type(tokenizer.quantizer) is VectorQuantizer
        assert tokenizer.quantizer.codebook().shape == (33, 8)
        assert state(Path("run"))["/module/quantizer.codes.base"].shape == (33, 8)
        for words in (
            ["eval", "run"],
            ["tokenize", "run", "--data", str(photos), "--out", "tokens"],
        ):
            assert main(words) == 0, capsys.readouterr().err
        assert main(["doctor", "run"]) == 2
        assert "rests where several processes share a table" in capsys.readouterr().err
        codebook = ("--init-from", tmp_path / "run", "--train", "codebook", "--out", tmp_path / "codes")
        wait(start("-m", "steadyvq", "train", tmp_path / "cut.yaml", *codebook, processes=2))
        fixed = Tokenizer.from_pretrained("codes/tokenizer")
        assert torch.equal(fixed.decoder.conv_in.weight, tokenizer.decoder.conv_in.weight)
        assert not torch.equal(fixed.quantizer.codebook(), tokenizer.quantizer.codebook())


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            (
                {"quantizer": {"name": "simvq", "sharded": True}},
                "the table of 'simvq' cannot be cut .* choose vq or nsvq",
            ),
            ({"quantizer": {"sharded": True}, "strategy": "fsdp"}, "leave one of them out"),
            (
                {"quantizer": {"sharded": True}, "stages": [{"name": "joint", "estimator": "direct"}]},
                "stage 'joint' has the estimator 'direct'",
            ),
        ],
    )
    def test_of_configurations(self, changes, words):
        with pytest.raises(ValueError, match=words):
            resolve(changes)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"assign": "dot"}, "leave `assign` and `estimator` out"),
            ({"estimator": "rotation"}, "leave `assign` and `estimator` out"),
            ({"unit_sphere": True}, "free codebook without unit_sphere"),
            ({"losses": {"ns": {"squared": False}}}, "squared distances"),
        ],
    )
    def test_of_one_process_are_those_of_several(self, photos, options, words):
        quantizer = {"name": "nsvq", "num_codes": 32, "dim": 8, "options": options, "sharded": True}
        with pytest.raises(ValueError, match=words):
            TokenizerTask(resolve(tiny_recipe(photos, quantizer=quantizer)))

    def test_more_processes_than_codes(self):
        with pytest.raises(ValueError, match="num_codes is 3, but 4 processes share the table"):
            ShardedQuantizer("vq", 3, 2, Shards(0, 4))

    def test_a_loss_that_couples_the_batch(self, photos):
        quantizer = {"num_codes": 32, "dim": 8, "options": {"losses": {"ns": {"per_code": True}}}, "sharded": True}
        assert ShardedQuantizer("nsvq", 32, 8, **quantizer["options"]).batch_coupled == ("ns",)
        task = TokenizerTask(resolve(tiny_recipe(photos, quantizer=quantizer, micro_batch_size=2)))
        with pytest.raises(ValueError, match="couples all latents of a batch"):
            task.check_accumulation()


class TestPlan:
    RECIPE = """
title: million
data: {crop_size: 256}
model: {multipliers: [1, 2, 2, 4]}
quantizer: {name: nsvq, num_codes: 1048576, dim: 128, sharded: true}
batch_size: 32
"""

    def test_a_million_codes(self, tmp_path, capsys, monkeypatch):
        (tmp_path / "million.yaml").write_text(self.RECIPE)
        words = ["train", str(tmp_path / "million.yaml"), "--dry-run"]
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert resolve(yaml.safe_load(shown)).quantizer.sharded, "a recipe with comments"
        held = bytes_per_process(1 << 20, 128, 8, 32 * 32 * 32, averaged=True)
        assert (
            f"\n# 8 processes: {sum(held.values()) / 1e6:,.0f} (table 67, gradient 67, moments 134, average 67,"
            in shown
        )
        assert "whole table, 537, while it evaluates" in shown
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "8"}.items():
            monkeypatch.setenv(name, value)
        assert main(words) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "processes: " in line]
        assert line.startswith("# 64 processes: ")

    def test_runs_that_do_not_use_it_have_the_names_they_had(self):
        plain, cut = resolve({"quantizer": {"name": "vq"}}), resolve({"quantizer": {"name": "vq", "sharded": True}})
        assert plain.hash() == resolve({"quantizer": {"name": "vq", "sharded": False}}).hash()
        assert plain.hash() != cut.hash()
