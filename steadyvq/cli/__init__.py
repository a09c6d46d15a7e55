# SPDX-License-Identifier: Apache-2.0
"""The command line: `steadyvq COMMAND`.

    steadyvq demo                                   watch a codebook die and ours live, on real photographs
    steadyvq compare --data DIR                     which method suits your images
    steadyvq train quickstart --data DIR            a tokenizer for your images
    steadyvq train quickstart --set optim.lr=3e-4   one setting changed
    steadyvq train --resume runs/quickstart         go on after an interruption
    steadyvq doctor runs/quickstart                 what is wrong with its codebook, if anything
    steadyvq transplant runs/quickstart --codes 4096    a new codebook inside a trained tokenizer
    steadyvq import vqgan.ckpt tokenizer            somebody else's tokenizer as one of ours
    steadyvq experiment toy-drift                   a claim of the papers, tested in minutes

Only the parser is imported here: torch is loaded by the command that needs it, so `--help` is instant.
"""

import argparse
import difflib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import steadyvq

# 0 done, 2 bad input, 3 the run failed (not finite, disk full), 130 interrupted by Ctrl-C.
BAD_INPUT, FAILED, INTERRUPTED = 2, 3, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence with the nearest known word."""

    def words(self) -> list[str]:
        """Options and commands, those of the commands included."""
        found = [option for action in self._actions for option in action.option_strings]
        for action in self._actions:
            found += action.choices or ()
            if isinstance(action, argparse._SubParsersAction):
                found += [word for parser in action.choices.values() for word in parser.words()]
        return found

    def read(self, words: Sequence[str] | None) -> argparse.Namespace:
        """The arguments; what nobody knows is told by the command that was given it, with its own words."""
        found, rest = self.parse_known_args(words)
        if rest:
            commands = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
            chosen = [action.choices[found.command] for action in commands if getattr(found, "command", None)]
            (chosen[0] if chosen else self).error(f"unrecognized arguments: {' '.join(rest)}")
        return found

    def error(self, message: str) -> NoReturn:
        """Prints the error and leaves with exit code 2."""
        wrong = [word.strip("',") for word in message.split() if word.strip("',").startswith("-") or "'" in word]
        near = [match for word in wrong[:1] for match in difflib.get_close_matches(word, self.words(), 1)]
        hint = f"; did you mean {near[0]}?" if near else f"; see `{self.prog} --help`"
        sys.stderr.write(f"{self.prog}: {message}{hint}\n")
        raise SystemExit(BAD_INPUT)


def build_parser() -> Parser:
    """All commands and their options."""
    parser = Parser(prog="steadyvq", description="Discrete tokenizers whose whole codebook stays in use.")
    parser.add_argument("--version", action="version", version=f"steadyvq {steadyvq.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    _add_demo(commands)
    _add_compare(commands)
    _add_train(commands)
    _add_transplant(commands)
    _add_use(commands)
    _add_exchange(commands)
    _add_data(commands)
    _add_tokens(commands)
    _add_generate(commands)
    _add_report_and_list(commands)
    _add_kernels(commands)
    _add_experiment(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[Parser]") -> None:
    demo = commands.add_parser(
        "demo", help="watch a plain codebook die and ours live on the same photographs, in minutes", allow_abbrev=False
    )
    demo.add_argument(
        "what",
        nargs="?",
        default="collapse",
        choices=("collapse", "generate"),
        help="or generate: from tokens to pictures",
    )
    demo.add_argument("--data", help="a folder of images (default: the built-in photographs of mvtb-data)")
    demo.add_argument(
        "--out", type=Path, help="where the runs and report.html go (default: runs/demo, runs/generate, ...)"
    )
    demo.add_argument("--prior", choices=("autoregressive", "diffusion"), help="of generate (default: autoregressive)")
    demo.add_argument("--arms", help="comma-separated arms (default: all of the recipe)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting for all arms")


def _add_compare(commands: "argparse._SubParsersAction[Parser]") -> None:
    compare = commands.add_parser(
        "compare", help="train methods at one budget and rank them, each at its best learning rate", allow_abbrev=False
    )
    compare.add_argument(
        "--methods", help="comma-separated names or file.py:function (default: all of `steadyvq list`)"
    )
    compare.add_argument("--data", default="mvtb", help="a folder of images (default: the photographs of mvtb-data)")
    compare.add_argument("--seeds", type=int, default=3, help="final runs of every method (default: 3)")
    compare.add_argument("--budget", default="tiny", help="tiny (200 steps, the default) or small (1,000)")
    compare.add_argument("--out", type=Path, default=Path("runs/compare"), help="the folder; given again, it goes on")
    compare.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting for all runs")


def _add_train(commands: "argparse._SubParsersAction[Parser]") -> None:
    train = commands.add_parser("train", help="train a tokenizer from a recipe", allow_abbrev=False)
    train.add_argument("recipe", nargs="?", help="a recipe of the package (`steadyvq list recipes`) or a YAML file")
    train.add_argument("--data", help="a folder of images or shards, hf:..., wds:..., or mvtb")
    train.add_argument("--out", type=Path, help="the run folder (default: runs/RECIPE)")
    train.add_argument("--quantizer", metavar="NAME", help="a method (`steadyvq list`) or file.py:function")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting; repeatable")
    train.add_argument("--init-from", type=Path, metavar="RUN", help="start from the weights of a run or checkpoint")
    train.add_argument(
        "--train", choices=("all", "decoder", "codebook"), help="what learns after --init-from (default: all of it)"
    )
    train.add_argument("--resume", type=Path, metavar="RUN", help="continue an interrupted run")
    train.add_argument(
        "--auto-resume", action="store_true", help="continue the run in --out if there is one, else begin it"
    )
    train.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")


def _add_transplant(commands: "argparse._SubParsersAction[Parser]") -> None:
    transplant = commands.add_parser(
        "transplant", help="a new quantizer inside a trained encoder and decoder", allow_abbrev=False
    )
    transplant.add_argument("tokenizer", type=Path, help="a run folder, a checkpoint or a saved tokenizer")
    transplant.add_argument("--quantizer", metavar="NAME", help="the new method (default: the recipe's, nsvq)")
    transplant.add_argument("--codes", type=int, metavar="K", help="its number of codes (default: the recipe's, 4096)")
    transplant.add_argument("--data", help="a folder of images, or mvtb (default: those of the run)")
    transplant.add_argument(
        "--train", choices=("all", "decoder", "codebook"), default="all", help="what learns (default: codes, then both)"
    )
    transplant.add_argument("--out", type=Path, help="the run folder (default: runs/transplant)")
    transplant.add_argument(
        "--recipe", default="transplant", help="stages and rates (default: transplant), or a YAML file"
    )
    transplant.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting; repeatable"
    )
    transplant.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")


def _add_use(commands: "argparse._SubParsersAction[Parser]") -> None:
    evaluate = commands.add_parser("eval", help="measure a trained tokenizer on photographs", allow_abbrev=False)
    evaluate.add_argument("run", type=Path, help="a run folder or a saved tokenizer")
    evaluate.add_argument("--data", help="a folder of images (default: the run's own data)")
    evaluate.add_argument("--split", default="val", help="val, test, train or all")
    evaluate.add_argument("--crop", type=int, help="side of the crops in pixels (default: the run's)")
    evaluate.add_argument(
        "--scale",
        type=float,
        help="photographs are shrunk by this factor first (default: the run's data.min_scale, or 1)",
    )
    evaluate.add_argument("--count", type=int, help="number of crops (default: the run's)")
    evaluate.add_argument(
        "--lpips", metavar="NETS", help="alex, vgg, alex,vgg or none (default: those whose weights are found)"
    )
    evaluate.add_argument(
        "--lpips-weights", type=Path, metavar="PATH", help="a file or folder with the weights of LPIPS"
    )
    evaluate.add_argument(
        "--fd", action="store_true", help="also Frechet and kernel distances, by the networks whose weights are found"
    )
    evaluate.add_argument(
        "--fd-weights", type=Path, metavar="PATH", help="the file of the 2015 Inception, or a folder with weights"
    )
    evaluate.add_argument(
        "--self-check", action="store_true", help="with --fd: show whether the networks work as they were trained"
    )
    evaluate.add_argument("--against", type=Path, metavar="RECORD", help="show the difference from another evaluation")
    evaluate.add_argument("--out", type=Path, help="where the JSON record goes (default: RUN/evaluations)")
    encode = commands.add_parser("encode", help="images to tokens", allow_abbrev=False)
    encode.add_argument("run", type=Path, help="a run folder or a saved tokenizer")
    encode.add_argument("--data", required=True, help="a folder of images")
    encode.add_argument("--size", type=int, help="images are resized and centre-cropped to this side (default: run's)")
    encode.add_argument("--out", type=Path, required=True, help="the .npz file of tokens")
    decode = commands.add_parser("decode", help="tokens to images", allow_abbrev=False)
    decode.add_argument("run", type=Path, help="a run folder or a saved tokenizer")
    decode.add_argument("tokens", type=Path, help="an .npz file written by encode, or a folder written by tokenize")
    decode.add_argument("--out", type=Path, required=True, help="the folder of PNG files")
    for command in (evaluate, encode, decode):
        command.add_argument("--quantizer", metavar="FILE.py:FUNCTION", help="where your own quantizer lies, if moved")


def _add_exchange(commands: "argparse._SubParsersAction[Parser]") -> None:
    inward = commands.add_parser("import", help="somebody else's checkpoint as one of ours", allow_abbrev=False)
    inward.add_argument("file", type=Path, help="a checkpoint (.ckpt, .pt, .safetensors) or a diffusers folder")
    inward.add_argument("out", type=Path, help="the folder of the tokenizer")
    inward.add_argument(
        "--format",
        default="auto",
        help="taming, llamagen, simvq, ibq, lfq, fvq, diffusers, kl, diffusers_kl (default: auto)",
    )
    inward.add_argument(
        "--weights", default="auto", help="ema, model, or auto: the average where there is one (default)"
    )
    inward.add_argument("--groups", type=int, help="groups of every GroupNorm (default: 32, or what diffusers says)")
    outward = commands.add_parser("export", help="a trained tokenizer as another project's file", allow_abbrev=False)
    outward.add_argument("run", type=Path, help="a run folder or a saved tokenizer")
    outward.add_argument("out", type=Path, help="the file (for diffusers the folder)")
    outward.add_argument("--format", required=True, help="taming, llamagen or diffusers")
    outward.add_argument("--quantizer", metavar="FILE.py:FUNCTION", help="where your own quantizer lies, if moved")


def _add_data(commands: "argparse._SubParsersAction[Parser]") -> None:
    data = commands.add_parser("data", help="write, check and fetch data sets", allow_abbrev=False)
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    shard = actions.add_parser(
        "shard", help="write images into indexed tar files; run again, it goes on", allow_abbrev=False
    )
    shard.add_argument("source", help="a folder of images, with or without class folders")
    shard.add_argument("out", type=Path, help="the folder of the shards")
    shard.add_argument("--samples", type=int, default=4000, help="images in one shard (default: 4000)")
    shard.add_argument("--check", action="store_true", help="decode every image and leave out the unreadable ones")
    shard.add_argument("--threads", type=int, default=8, help="files read at the same time (default: 8)")
    verify = actions.add_parser("verify", help="read every byte of a shard set again", allow_abbrev=False)
    verify.add_argument("shards", type=Path, help="the folder of the shards")
    verify.add_argument("--decode", action="store_true", help="decode every image too")
    fetch = actions.add_parser("fetch", help="photographs for searches, from Debian's archive", allow_abbrev=False)
    fetch.add_argument("name", choices=["corpus"], help="corpus: 385 photographs in 300 MB, mostly landscapes")
    fetch.add_argument(
        "--from", dest="source", type=Path, metavar="DIR", help="where the .deb files lie (default: fetch them)"
    )


def _add_parts(parser: Parser) -> None:
    parser.add_argument("--num-shards", type=int, metavar="N", help="jobs of an array that share the work")
    parser.add_argument("--shard-index", type=int, metavar="I", help="which of these jobs this is, from 0")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")


def _add_tokens(commands: "argparse._SubParsersAction[Parser]") -> None:
    tokenize = commands.add_parser(
        "tokenize", help="a data set as stored tokens; run again, it goes on", allow_abbrev=False
    )
    tokenize.add_argument("tokenizer", type=Path, help="a run folder or a saved tokenizer")
    tokenize.add_argument("--data", required=True, help="a folder of images or shards, or mvtb")
    tokenize.add_argument("--out", type=Path, required=True, help="the folder of the tokens")
    tokenize.add_argument(
        "--views", default="centre", help="centre (default), ten-crop or random-N, with ,flip also mirrored"
    )
    tokenize.add_argument("--size", type=int, help="side of the views in pixels (default: the run's crops)")
    tokenize.add_argument(
        "--crop-range", type=float, default=1.1, help="ten-crop cuts a square this larger (default: 1.1)"
    )
    tokenize.add_argument("--seed", type=int, default=0, help="of random crops")
    tokenize.add_argument("--shard-images", type=int, default=4096, help="images in one shard (default: 4096)")
    tokenize.add_argument("--batch", type=int, default=32, help="crops in one forward (default: 32)")
    tokenize.add_argument("--threads", type=int, default=4, help="images read at the same time (default: 4)")
    tokenize.add_argument(
        "--latents", choices=("float32", "float16"), help="store the latents before quantization too, for diffusion"
    )
    _add_parts(tokenize)
    tokenize.add_argument("--quantizer", metavar="FILE.py:FUNCTION", help="where your own quantizer lies, if moved")
    tokens = commands.add_parser("tokens", help="look at stored tokens, copy them for others", allow_abbrev=False)
    actions = tokens.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    inspect = actions.add_parser("inspect", help="check every byte; use of the codes, pictures", allow_abbrev=False)
    inspect.add_argument("--out", type=Path, help="the picture (default: inspect.png beside the tokens)")
    inspect.add_argument("--tokenizer", type=Path, help="decodes them (default: the one stored with them)")
    inspect.add_argument("--quantizer", metavar="FILE.py:FUNCTION", help="where your own quantizer lies, if moved")
    export = actions.add_parser("export", help="tokens as another project reads them", allow_abbrev=False)
    for command in (inspect, export):
        command.add_argument("tokens", type=Path, help="a folder written by tokenize")
    export.add_argument("out", type=Path, help="the folder of the copy")
    export.add_argument("--format", required=True, help="llamagen, bin, parquet or webdataset")


def _add_generate(commands: "argparse._SubParsersAction[Parser]") -> None:
    sample = commands.add_parser("sample", help="pictures from a prior; run again, it goes on", allow_abbrev=False)
    sample.add_argument("run", type=Path, help="the run folder of a prior")
    sample.add_argument("--out", type=Path, required=True, help="the folder of PNG files")
    sample.add_argument("--num", type=int, default=64, help="pictures (default: 64)")
    sample.add_argument(
        "--class", dest="classes", metavar="NAMES", help="classes, by name or number (default: all in turn)"
    )
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--guidance", type=float, help="classifier-free guidance (default: 1, none)")
    sample.add_argument("--temperature", type=float, help="0: the likeliest token (default: 1)")
    sample.add_argument("--top-k", type=int, help="draw from the likeliest so many codes (default: 0, all)")
    sample.add_argument("--top-p", type=float, help="draw from the likeliest codes of this share (default: 1)")
    sample.add_argument("--scheduler", help="of diffusion: ddpm, ddim (default), dpm++, or flow for flow matching")
    sample.add_argument(
        "--steps",
        type=int,
        help="from noise to a picture (diffusion, default: 50) or to all tokens (masked, default: 8)",
    )
    sample.add_argument(
        "--choice-temperature", type=float, help="of a masked prior: how much chance decides what stays (default: 4.5)"
    )
    sample.add_argument("--batch", type=int, default=64, help="pictures drawn together (default: 64)")
    sample.add_argument(
        "--dtype", choices=("float64", "float32", "bfloat16"), help="(default: float64 on a CPU, float32 elsewhere)"
    )
    sample.add_argument("--tokenizer", type=Path, help="decodes them (default: the one stored with the tokens)")
    sample.add_argument("--quantizer", metavar="FILE.py:FUNCTION", help="where your own quantizer lies, if moved")
    _add_parts(sample)
    judge = commands.add_parser("eval-gen", help="how close samples come to photographs", allow_abbrev=False)
    judge.add_argument("samples", type=Path, help="a folder written by sample")
    judge.add_argument("--data", required=True, help="a folder of images, or mvtb")
    judge.add_argument("--split", default="all", help="train, val, test or all (default)")
    judge.add_argument("--count", type=int, help="crops of the photographs (default: as many as there are samples)")
    judge.add_argument("--scale", type=float, default=1.0, help="photographs are shrunk by this first (default: 1)")
    judge.add_argument(
        "--fd-weights", type=Path, metavar="PATH", help="the file of the 2015 Inception, or a folder with weights"
    )
    judge.add_argument("--out", type=Path, help="the JSON record (default: evaluation.json beside the samples)")


def _add_report_and_list(commands: "argparse._SubParsersAction[Parser]") -> None:
    report = commands.add_parser(
        "report", help="one self-contained report.html of one or several runs", allow_abbrev=False
    )
    report.add_argument("runs", nargs="+", type=Path, help="run folders")
    report.add_argument("--out", type=Path, help="the HTML file (default: report.html in the first run)")
    doctor = commands.add_parser(
        "doctor", help="name what is wrong with a codebook, from the log of its training", allow_abbrev=False
    )
    doctor.add_argument("log", type=Path, metavar="RUN", help="a run folder, or the log file of a steadyvq.Monitor")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    listing = commands.add_parser("list", help="methods and recipes", allow_abbrev=False)
    listing.add_argument("what", nargs="?", default="quantizers", choices=("quantizers", "recipes"))


def _add_kernels(commands: "argparse._SubParsersAction[Parser]") -> None:
    kernels = commands.add_parser("kernels", help="which kernels are used on this machine, and why", allow_abbrev=False)
    what = kernels.add_subparsers(dest="what", metavar="WHAT", required=True, parser_class=Parser)
    explain = what.add_parser("explain", help="the kernels for one size of problem", allow_abbrev=False)
    explain.add_argument("num_latents", metavar="N", type=int, help="latents of a forward: batch times token grid")
    explain.add_argument("num_codes", metavar="K", type=int, help="codes")
    explain.add_argument("dim", metavar="d", type=int, help="dimensions")
    explain.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    explain.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    explain.add_argument("--measure", action="store_true", help="also time the search on this CPU")


def _add_experiment(commands: "argparse._SubParsersAction[Parser]") -> None:
    experiment = commands.add_parser(
        "experiment", help="test claims of the papers; every one is a command", allow_abbrev=False
    )
    experiment.add_argument("name", nargs="?", help="which one (--list shows all)")
    experiment.add_argument("--list", action="store_true", help="all experiments and what they ask")
    experiment.add_argument("--profile", default="tiny", choices=("tiny", "small", "full"), help="size (default: tiny)")
    experiment.add_argument("--seeds", type=int, help="seeds per arm (default: the experiment's, 3 or more)")
    experiment.add_argument(
        "--out", type=Path, help="the folder; given again, it goes on (default: runs/experiments/NAME-PROFILE)"
    )
    experiment.add_argument(
        "--cells",
        type=Path,
        help="where runs are kept; experiments may share it (default: runs/experiments/cells; with --out, in OUT)",
    )
    experiment.add_argument("--data", help="photographs to train on (default: as the experiment's recipe says)")
    experiment.add_argument("--dry-run", action="store_true", help="print every arm's settings and run nothing")
    experiment.add_argument("--workers", type=int, help="processes at a time (default: one per core)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 2 bad input, 3 failed, 130 interrupted."""
    arguments = build_parser().read(argv)
    code = _guarded(arguments)
    if "torch.distributed" in sys.modules:
        from steadyvq.training.processes import leave

        return leave(code)
    return code


def _told_elsewhere(error: Exception) -> int | None:
    """The exit code if the first of several processes has told the user already, else None."""
    from steadyvq.training.processes import FailedElsewhere

    if not isinstance(error, FailedElsewhere):
        return None
    return BAD_INPUT if error.bad_input else FAILED


def _guarded(arguments: argparse.Namespace) -> int:
    """Runs a command; failures that a user can mend become a sentence and an exit code."""
    try:
        return _run(arguments)
    except ValueError as error:
        sys.stderr.write(f"steadyvq {arguments.command}: {error}\n")
        return BAD_INPUT
    except OSError as error:
        sys.stderr.write(f"steadyvq {arguments.command}: {error}; what was written before is kept\n")
        return FAILED
    except KeyboardInterrupt:
        sys.stderr.write(
            f"steadyvq {arguments.command}: stopped at once; nothing was saved since the last checkpoint\n"
        )
        return INTERRUPTED
    except Exception as error:
        code = _told_elsewhere(error)
        if code is None and "torch.distributed" not in sys.modules:
            raise
        if code is None:
            # The interpreter's own end might hang in a process that belongs to a group; `leave` skips it.
            traceback.print_exc()
            return 1
        return code


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "demo":
        from steadyvq.cli.train import demo

        return demo(arguments)
    if arguments.command == "compare":
        from steadyvq.cli.compare import compare

        return compare(arguments)
    if arguments.command == "train":
        from steadyvq.cli.train import train

        return train(arguments)
    if arguments.command == "transplant":
        from steadyvq.cli.transplant import transplant

        return transplant(arguments)
    if arguments.command == "data":
        from steadyvq.cli.data import data

        return data(arguments)
    if arguments.command in ("tokenize", "tokens"):
        from steadyvq.cli import tokens

        return {"tokenize": tokens.tokenize, "tokens": tokens.tokens}[arguments.command](arguments)
    if arguments.command in ("sample", "eval-gen"):
        from steadyvq.cli import generate

        return {"sample": generate.sample, "eval-gen": generate.evaluate_samples}[arguments.command](arguments)
    if arguments.command == "report":
        from steadyvq.cli.show import report

        return report(arguments)
    if arguments.command == "doctor":
        from steadyvq.cli.show import doctor

        return doctor(arguments)
    if arguments.command == "list":
        from steadyvq.cli.show import listing

        return listing(arguments)
    if arguments.command == "kernels":
        from steadyvq.cli.kernels import explain

        return explain(arguments)
    if arguments.command == "experiment":
        from steadyvq.cli.experiment import experiment

        return experiment(arguments)
    if arguments.command in ("import", "export"):
        from steadyvq.cli import exchange

        return {"import": exchange.import_file, "export": exchange.export_file}[arguments.command](arguments)
    from steadyvq.cli import use

    return {"eval": use.evaluate_run, "encode": use.encode, "decode": use.decode}[arguments.command](arguments)
