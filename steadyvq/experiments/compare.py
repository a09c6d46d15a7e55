# SPDX-License-Identifier: Apache-2.0
"""Which method suits these photographs? Every method at one budget, each at a learning rate chosen for it.

    steadyvq compare                                            all methods, on the built-in photographs
    steadyvq compare --data my_photos --budget small --methods vq,nsvq,my_file.py:my_vq

The order matters, and it is this:

1. Search. One seed, every method at three values of one rate (`recipes/compare.yaml`): of its free codebook, or of everything
   where it has none. The value with the best PSNR on the `val` photographs is chosen. Its cost is reported.
2. Final runs. Every method at its chosen value, with other seeds. They are judged on the `test` photographs, which neither
   training nor the choice has seen: a split of their own, or, of a folder, photographs set aside for it.

All runs have the same encoder, decoder, crops in the same order, steps and batch; what else a method needs stands in the
recipe. Started again with the same `out`, finished runs are kept and unfinished ones go on.
"""

import hashlib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steadyvq.experiments.arms import Arm, check_place, is_done, train_arms
from steadyvq.experiments.verdict import Failure, Finding, Row, Trial, as_json, as_markdown, final_psnr, ranked
from steadyvq.files import write_text
from steadyvq.quantizers import list_quantizers
from steadyvq.quantizers.names import look_up
from steadyvq.quantizers.registry import accepts
from steadyvq.report import write_report
from steadyvq.training.config import RunConfig, read_recipe, resolve, with_absolute_paths
from steadyvq.training.photographs import load_photographs
from steadyvq.training.run import RunFolder, differences, source_commit
from steadyvq.training.strict import merge
from steadyvq.training.tokenizer_task import build_tokenizer, codebook_parameters

RECIPE = "compare"
SEARCHED_ON, JUDGED_ON = "val", "test"
REFERENCE = "vq"
"""Extra parameters are counted against this method."""
MOST_IN_REPORT = 18
"""Runs that curves can tell apart; where there are more, the report shows the first seed of every method."""


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        out: Folder of the comparison.
        methods: Registered names or file.py:function (None: every registered method).
        data: A folder of photographs, or `mvtb`.
        seeds: Number of final runs of every method; their seeds are 0, 1, ...
        budget: Name of a budget of the recipe.
        sets: `key=value` pairs for all runs.
    """

    out: Path
    methods: Sequence[str] | None = None
    data: str = "mvtb"
    seeds: int = 3
    budget: str = "tiny"
    sets: Sequence[str] = ()


class Comparison:
    """The plan of a comparison: which runs there are, in the order in which they are made.

    Args:
        settings: What the user asked for.

    Raises:
        ValueError: A method or budget is unknown, a setting or the data cannot be used, or `out` holds other runs. Nothing
            was written.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.seeds < 1:
            raise ValueError(f"--seeds is {settings.seeds}, but every method needs at least 1 final run")
        self.settings = settings
        recipe = dict(read_recipe(RECIPE))
        self._own: dict[str, Any] = recipe.pop("arms")
        self.search: dict[str, Any] = recipe.pop("search")
        budget = look_up("budget", settings.budget, recipe.pop("budgets"))
        self._base = merge(merge(recipe, budget), {"data": {"source": settings.data}})
        names = list_quantizers() if settings.methods is None else [name.strip() for name in settings.methods]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the method {name!r} is named {names.count(name)} times: name every method once")
            accepts(name, "")  # refuses what is no method
        check_place(settings.out / "run")
        # Without a method: what is wrong with the settings themselves is said before anything is built.
        self.config = with_absolute_paths(resolve(self._base, settings.sets))
        self.steps = self.config.epochs * self.config.steps_per_epoch
        self._check_data()
        reference = self._built(REFERENCE, 0)
        self.findings = [self._built(name, reference.parameters) for name in names]
        failed = [f for f in self.findings if f.failures]
        if len(failed) == len(self.findings):
            raise ValueError(f"no method can be built; {failed[0].label}: {failed[0].failures[0].reason}")
        self._check_folders(self.search_arms())

    def _check_data(self) -> None:
        photographs = load_photographs(self.config)
        have = set(photographs.splits)
        if not {"train", SEARCHED_ON, JUDGED_ON} <= have:
            raise ValueError(
                f"{self.settings.data!r} has {len(photographs)} photograph(s), but a comparison needs at least 3: some to "
                "train on, others to choose learning rates on, and others to judge on; put more into the folder"
            )
        self.photographs = {split: photographs.splits.count(split) for split in sorted(have)}

    def _built(self, name: str, reference: int) -> Finding:
        """What is known of a method before it is trained; one that cannot be built is a finding too."""
        finding = Finding(name, label_of(name))
        try:
            config = self._config(name)
            tokenizer = build_tokenizer(config)
        except Exception as error:  # a quantizer may be anybody's
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return replace(finding, failures=[Failure("build", None, " ".join(reason.split()))])
        quantizer = tokenizer.quantizer
        side = config.data.crop_size // tokenizer.downsampling
        indices = math.prod(quantizer.index_shape((1, side, side)))
        parameters = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
        return replace(
            finding,
            rate_name="codebook_lr" if codebook_parameters(quantizer) else "lr",
            num_codes=quantizer.num_codes,
            bits=indices * math.log2(quantizer.num_codes) / side**2,
            parameters=parameters,
            extra_parameters=parameters - reference,
        )

    def _config(self, name: str, *pairs: str) -> RunConfig:
        """The configuration of a run of a method; `pairs` stand above everything else."""
        own = with_lengths(self._own.get(name, {"quantizer": {"name": name}}), self.steps)
        data = merge(merge(self._base, {"title": label_of(name)}), own)
        return with_absolute_paths(resolve(data, [*self.settings.sets, *pairs]))

    def _arm(self, finding: Finding, phase: str, rate: float, seed: int, split: str) -> Arm:
        pairs = (f"optim.{finding.rate_name}={rate}", f"data.eval_split={split}", f"seed={seed}")
        config = self._config(finding.name, *pairs)
        path = self.settings.out / phase / f"{finding.label}-lr{rate:g}-seed{seed}"
        return Arm(config, path, self.command)

    @property
    def command(self) -> str:
        """The command that makes the comparison, or goes on with it."""
        s = self.settings
        words = ["steadyvq", "compare", "--data", s.data, "--seeds", str(s.seeds), "--budget", s.budget]
        words += ["--methods", ",".join(s.methods)] if s.methods is not None else []
        return shlex.join([*words, *(w for pair in s.sets for w in ("--set", pair)), "--out", str(s.out)])

    def rates(self, finding: Finding) -> list[float]:
        """The values of the search."""
        return [float(rate) for rate in self.search["rates"][finding.rate_name]]

    def search_arms(self) -> list[Arm]:
        """The runs of the search, method by method."""
        seed = self.search["seed"]
        usable = [f for f in self.findings if f.rate_name]
        return [self._arm(f, "search", rate, seed, SEARCHED_ON) for f in usable for rate in self.rates(f)]

    def final_arms(self) -> list[Arm]:
        """The final runs of every method whose rate was chosen."""
        chosen = [(f, f.rate) for f in self.findings if f.rate is not None]
        seeds = range(self.settings.seeds)
        return [self._arm(f, "final", rate, seed, JUDGED_ON) for f, rate in chosen for seed in seeds]

    def num_final(self) -> int:
        """How many final runs there will be, before the search has said at which rates."""
        return self.settings.seeds * sum(1 for f in self.findings if f.rate_name)

    def _check_folders(self, arms: Sequence[Arm]) -> None:
        for arm in arms:
            if (arm.path / "config.yaml").is_file():
                changed = differences(RunFolder.open(arm.path).config.to_dict(), arm.config.to_dict())
                if changed:
                    raise ValueError(
                        f"{arm.path} was trained with other settings (differs in {', '.join(changed[:5])}): go on with "
                        "those, or choose another folder with --out"
                    )

    def run(self) -> list[Finding]:
        """Trains everything that is not yet trained: the search first, then the final runs.

        Raises:
            KeyboardInterrupt: The user interrupted; running this again goes on.
            ValueError: The folder holds final runs with other settings.
        """
        failed = self._train(self.search_arms(), later=self.num_final() * self.steps)
        self.findings = [self._searched(f, failed) for f in self.findings]
        arms = self.final_arms()
        self._check_folders(arms)
        failed = self._train(arms)
        self.findings = [self._finished(f, arms, failed) for f in self.findings]
        return self.findings

    def _train(self, arms: Sequence[Arm], later: int = 0) -> dict[Path, str]:
        return train_arms([arm for arm in arms if not is_done(arm.path)], keep_going=True, later=later)

    def _searched(self, finding: Finding, failed: Mapping[Path, str]) -> Finding:
        """The finding with its trials and the rate that they choose."""
        if not finding.rate_name:
            return finding
        trials, failures = [], list(finding.failures)
        for rate in self.rates(finding):
            arm = self._arm(finding, "search", rate, self.search["seed"], SEARCHED_ON)
            if arm.path in failed:
                failures.append(Failure("search", rate, failed[arm.path]))
            psnr = None if arm.path in failed else final_psnr(arm.path)
            trials.append(Trial(rate, psnr, arm.path))
        known = {t.rate: t.psnr for t in trials if t.psnr is not None}
        return replace(finding, trials=trials, failures=failures, rate=max(known, key=known.__getitem__, default=None))

    def _finished(self, finding: Finding, arms: Sequence[Arm], failed: Mapping[Path, str]) -> Finding:
        """The finding with its final runs."""
        own = [arm for arm in arms if arm.config.title == finding.label]
        failures = [Failure("final", arm.config.seed, failed[arm.path]) for arm in own if arm.path in failed]
        done = [arm.path for arm in own if arm.path not in failed]
        return replace(finding, runs=done, failures=[*finding.failures, *failures])

    def facts(self) -> Row:
        """What holds for all runs."""
        return {
            "experiment": RECIPE,
            "command": self.command,
            "commit": source_commit(),
            "budget": self.settings.budget,
            "steps": self.steps,
            "batch_size": self.config.batch_size,
            "data": self.settings.data,
            "photographs": self.photographs,
            "search": {**self.search, "split": SEARCHED_ON},
            "judged_on": JUDGED_ON,
        }

    def write(self) -> list[Row]:
        """Writes compare.md, compare.json and, of the final runs, report.html; returns the rows, best first."""
        out, facts, rows = self.settings.out, self.facts(), ranked(self.findings)
        write_text(out / "compare.md", as_markdown(facts, rows))
        write_text(out / "compare.json", as_json(facts, rows, self.findings))
        by_method = [[Path(run["path"]) for run in row["runs"]] for row in rows if row["runs"]]
        every = sum(map(len, by_method)) <= MOST_IN_REPORT
        shown = [path for runs in by_method for path in (runs if every else runs[:1])]
        if shown:
            which = "all final runs" if every else "the first final run of every method"
            note = f"Shown: {which}. Means over seeds, costs and the search of learning rates: compare.md and compare.json."
            write_report(shown, out / "report.html", title="Methods compared", note=note)
        return rows


def label_of(name: str) -> str:
    """What a method is called in tables and folders; a file's content is part of it, so that a changed one trains anew."""
    where, colon, function = name.rpartition(":")
    if not colon:
        return name
    file = Path(where).expanduser()
    digest = f"-{hashlib.sha256(file.read_bytes()).hexdigest()[:6]}" if file.is_file() else ""
    return re.sub(r"[^\w.-]", "_", f"{file.name.removesuffix('.py')}.{function}") + digest


def with_lengths(value: Any, steps: int) -> Any:
    """Settings in which `steps/N` has become the N-th part of the run, at least 1."""
    if isinstance(value, Mapping):
        return {key: with_lengths(item, steps) for key, item in value.items()}
    found = re.fullmatch(r"steps/(\d+)", value) if isinstance(value, str) else None
    return max(1, steps // int(found[1])) if found else value
