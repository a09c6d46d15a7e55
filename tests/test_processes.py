# SPDX-License-Identifier: Apache-2.0
"""One process or several, one batch or its pieces: the same run."""

import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_recipe
from runs import assert_same, log, start, state, toy, wait

from steadyvq.training.processes import Processes, launched, step_seed

CUTS = {"two": (2, None), "four micro-batches": (1, 2), "two by two": (2, 2)}
"""Name -> processes and largest micro-batch, of a global batch of 8."""


@pytest.fixture(scope="module")
def runs(photos: Path, tmp_path_factory: pytest.TempPathFactory):
    """Trains a toy once for all tests, cut in a certain way; returns its folder and what it recorded."""
    folder = tmp_path_factory.mktemp("cuts")
    known = {}

    def run(task: str, cut: str, *sets: str):
        key = (task, cut, *sets)
        if key not in known:
            processes, largest = CUTS.get(cut, (1, None))
            path = folder / f"run{len(known)}"
            settings = [*sets, *([f"micro_batch_size={largest}"] if largest else [])]
            record = ["--record", path.with_suffix(".pt")] if task in ("masked", "fixed") else []
            options = [word for setting in settings for word in ("--set", setting)]
            toy(task, path, photos, *options, *record, processes=processes)
            known[key] = path, torch.load(path.with_suffix(".pt")) if record else None
        return known[key]

    return run


@pytest.mark.recovery
@pytest.mark.parametrize("cut", CUTS)
class TestCuts:
    def test_float64_with_masks_replacement_and_a_freeze(self, runs, cut):
        """Unequal numbers of valid latents: 16 a crop in the first half of the batch, 4 to 6 in the second."""
        (path, whole), (cut_path, pieces) = runs("masked", "one"), runs("masked", cut)
        assert whole["replaced"].sum() >= 20
        assert whole["replaced"].sum(0).count_nonzero() >= 20, "many different rows"
        valid = (whole["indices"] >= 0).sum(-1)
        assert valid[0, :4].sum() >= 3 * valid[0, 4:].sum()
        assert [row["stage"] for row in log(path) if row["kind"] == "stage"] == ["joint", "refine"]
        assert torch.equal(whole["indices"], pieces["indices"].reshape(whole["indices"].shape))
        assert torch.equal(whole["replaced"], pieces["replaced"])
        torch.testing.assert_close(whole["table"], pieces["table"], rtol=0, atol=1e-9)
        assert_same(state(path), state(cut_path), 1e-9)

    @pytest.mark.parametrize("method", ["nsvq", "ema", "simvq", "gumbel", "diveq"])
    def test_float32_on_fixed_latents(self, runs, cut, method):
        """Replacement, calibration, and noise: drawn tokens and noisy steps are functions of the position in the batch."""
        maintenance = "{replace: {patience: 2.0, cap: 0.1}}"
        temperature = "{effective_losers: 4}" if method == "nsvq" else "0.35"
        options = f"quantizer.options={{maintenance: {maintenance}, temperature: {temperature}}}"
        settings = (f"quantizer.name={method}", options)
        (_, whole), (_, pieces) = runs("fixed", "one", *settings), runs("fixed", cut, *settings)
        assert whole["replaced"].sum() >= 20
        assert torch.equal(whole["indices"], pieces["indices"].reshape(whole["indices"].shape))
        assert torch.equal(whole["replaced"], pieces["replaced"])
        torch.testing.assert_close(whole["table"], pieces["table"], rtol=0, atol=1e-6)

    def test_tokens_of_unequal_lines(self, runs, cut):
        path, cut_path = runs("next_token", "one")[0], runs("next_token", cut)[0]
        assert_same(state(path), state(cut_path), 1e-9)


@pytest.mark.recovery
@pytest.mark.parametrize(
    ("cut", "adaptive"), [("two", False), ("four micro-batches", True), ("two by two", True)], ids=str
)
def test_a_tokenizer_against_a_discriminator(runs, cut, adaptive):
    """Through the stages of NSVQ: both sides, both optimisers, the means of the logits and the codebook, to 1e-9."""
    settings = (f"adversarial.adaptive={str(adaptive).lower()}",)
    (path, _), (cut_path, _) = runs("adversarial", "one", *settings), runs("adversarial", cut, *settings)
    assert [row["stage"] for row in log(path) if row["kind"] == "stage"] == ["joint", "warmup", "refine"]
    whole = state(path)
    assert whole["/module/discriminator.real_mean"] != 0
    assert_same(whole, state(cut_path), 1e-9)
    rows = [{k: v for k, v in row.items() if k.startswith("adversarial/")} for row in log(path)]
    cut_rows = [{k: v for k, v in row.items() if k.startswith("adversarial/")} for row in log(cut_path)]
    assert sum("adversarial/weight" in row for row in rows) == 15 + 30, "from step 5, and not in the warmup"
    for row, cut_row in zip(rows, cut_rows, strict=True):
        assert row == pytest.approx(cut_row, rel=1e-7, abs=1e-9)


@pytest.mark.recovery
def test_the_three_stages_of_nsvq(runs):
    """The whole recipe with its discriminator at a fixed weight; 9 crops in a step, of which one process has 5."""
    path, cut_path = runs("recipe", "one")[0], runs("recipe", "two")[0]
    stages, cut_stages = ([row for row in log(run) if row["kind"] == "stage"] for run in (path, cut_path))
    assert [row["stage"] for row in stages] == ["joint", "warmup", "refine"]
    assert stages[1]["reason"].startswith("plateau of commitment")
    assert stages == cut_stages, "the same freeze epoch"
    weights = [row.get("adversarial/weight") for row in log(path) if row["kind"] == "train"]
    freeze = stages[1]["step"]
    ramp = [0.1 * (i + 1) / 10 for i in range(10)]
    assert weights[:freeze] == pytest.approx([0.1] * freeze)
    assert weights[freeze : freeze + 5] == [None] * 5
    assert weights[freeze + 5 : freeze + 15] == pytest.approx(ramp)
    whole, cut = state(path), state(cut_path)
    (codes,) = (name for name in whole if name.endswith("quantizer.codes.base") and name.startswith("/module"))
    torch.testing.assert_close(whole[codes], cut[codes], rtol=0, atol=1e-9)
    assert_same(whole, cut, 1e-9)


@pytest.mark.recovery
@pytest.mark.parametrize("frozen", ["encoder", "quantizer"])
def test_a_loss_that_couples_the_batch_sees_all_processes(runs, frozen):
    """The entropy of the mean assignment, with its gradient; a frozen quantizer computes it all the same."""
    stages = f"stages=[{{name: only, frozen: [{frozen}]}}]"
    settings = ("quantizer.name=lfq", "quantizer.num_codes=64", stages)
    (path, whole), (cut_path, pieces) = runs("masked", "one", *settings), runs("masked", "two", *settings)
    assert torch.equal(whole["indices"], pieces["indices"])
    assert_same(state(path), state(cut_path), 1e-6)  # a temperature of 0.01 magnifies the last digits


@pytest.mark.recovery
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_resumed_run_may_have_another_number_of_processes(runs, photos, tmp_path, before, after):
    whole, _ = runs("masked", "one")
    toy("masked", tmp_path / "run", photos, "--harm", "die", 33, processes=before, code=-9)
    toy("masked", tmp_path / "run", photos, "--resume", processes=after)
    assert_same(state(whole), state(tmp_path / "run"), 1e-6)
    assert [row["step"] for row in log(whole)] == [row["step"] for row in log(tmp_path / "run")]


@pytest.mark.recovery
def test_a_resumed_run_may_have_other_micro_batches_and_nothing_else(runs, photos, tmp_path):
    whole, _ = runs("masked", "one")
    toy("masked", tmp_path / "run", photos, "--harm", "die", 33, code=-9)
    toy("masked", tmp_path / "run", photos, "--resume", "--set", "micro_batch_size=3")
    assert_same(state(whole), state(tmp_path / "run"), 1e-6)


@pytest.mark.recovery
def test_processes_fail_together(photos, tmp_path):
    """The first one cannot write the log; the others must not wait for it for ever."""
    said = toy("masked", tmp_path / "run", photos, "--harm", "fill_log", 7, processes=2, code=3)
    assert said.count("No space left on device") == 2


@pytest.mark.recovery
def test_an_error_of_one_process_is_told_and_ends_all(photos, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "from steadyvq.quantizers import compose\n"
        "def make(num_codes, dim, **overrides):\n"
        "    vq = compose(num_codes, dim, {'losses': {'commitment': 0.25, 'codebook': 1.0}}, overrides)\n"
        "    if os.environ['RANK'] == '1':\n"
        "        vq.register_forward_hook(lambda *_: 1 / 0)\n"
        "    return vq\n"
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe(photos)))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "steadyvq", "train")
    own = ("--quantizer", f"{tmp_path / 'mine.py'}:make", "--out", tmp_path / "run")
    (process,) = start(*launch, tmp_path / "tiny.yaml", *own)
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "ZeroDivisionError" in said


@pytest.mark.recovery
def test_two_interrupts_of_one_process_end_all(photos, tmp_path):
    """In a step of many seconds; what the others do then is the launcher's business, and here nobody launches."""
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(tiny_recipe(photos)))
    large = ("--set", "batch_size=20000", "--set", "data.epoch_samples=20000")
    started = start("-m", "steadyvq", "train", tmp_path / "long.yaml", "--out", tmp_path / "run", *large, processes=2)
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert all(process.poll() is None for process in started), [p.communicate()[1] for p in started]
        time.sleep(0.05)
    time.sleep(1.0)
    for _ in range(2):
        started[1].send_signal(signal.SIGINT)
        time.sleep(1.0)
    said = started[1].communicate(timeout=60)[1]
    assert started[1].returncode == 130, said
    started[0].communicate(timeout=60)
    assert started[0].returncode != 0


@pytest.mark.recovery
def test_a_loop_of_the_users_own(tmp_path):
    """DistributedDataParallel, `across_processes`, unequal numbers of latents, and warnings where it is forgotten."""
    script = Path(__file__).with_name("own_loop.py")
    wait(start(script, tmp_path / "one.pt"))
    said = wait(start(script, tmp_path / "two.pt", processes=2))
    assert said.count("call steadyvq.across_processes(model)") == 2
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    assert torch.equal(one["placed"], two["placed"]), "k-means sees the latents of all processes"
    assert one["replaced"] == two["replaced"] > 0
    torch.testing.assert_close(one["table"], two["table"], rtol=0, atol=1e-9)


class TestShares:
    @pytest.mark.parametrize("count", [1, 2, 3, 4])
    @pytest.mark.parametrize("largest", [None, 1, 2, 3, 100])
    @pytest.mark.parametrize("total", [4, 7, 12])
    def test_they_cover_the_batch_in_order(self, total, largest, count):
        processes = Processes()
        processes.count = count
        cuts = []
        for processes.rank in range(count):
            cuts.append(processes.shares(total, largest))
        assert [p for shares in cuts for share in shares for p in share] == list(range(total))
        assert len({len(shares) for shares in cuts}) == 1, "as many forwards everywhere"
        assert all(len(share) for shares in cuts for share in shares)
        if largest is not None and total % count == 0:
            assert all(len(share) <= largest for shares in cuts for share in shares)

    def test_more_processes_than_samples(self):
        processes = Processes()
        processes.count = 8
        with pytest.raises(ValueError, match="batch_size is 4, but 8 processes share it"):
            processes.shares(4)

    def test_launchers(self):
        torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
        slurm = {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
        assert launched({}) == (1, 1)
        assert launched(torchrun) == (4, 2)
        restarted = {**torchrun, "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "False"}
        assert launched(restarted) == (4, 2)
        with pytest.raises(ValueError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"):
            launched({**restarted, "TORCHELASTIC_USE_AGENT_STORE": "True"})
        assert launched(slurm) == (4, 2)
        assert launched({**slurm, **torchrun}) == (4, 2), "torchrun inside a SLURM job"
        assert launched({**slurm, "SLURM_JOB_NAME": "bash"}) == (1, 1)
        with pytest.raises(ValueError, match="ask for --nodes and --ntasks-per-node"):
            launched({**slurm, "SLURM_NNODES": "3"})
        del slurm["SLURM_NTASKS_PER_NODE"]
        with pytest.raises(ValueError, match="ask for --nodes and --ntasks-per-node"):
            launched(slurm)

    def test_no_two_steps_draw_the_same_numbers(self):
        seeds = [step_seed(seed, step, rank) for seed in range(4) for step in range(200) for rank in range(4)]
        assert len(set(seeds)) == len(seeds)
        assert all(0 <= seed < 1 << 63 for seed in seeds)
