"""``moefoundry convert``: what ``scripts/convert_ckpt.py`` runs. Heavy imports happen in :func:`run`."""

from __future__ import annotations

import argparse
import re
import warnings
from typing import TYPE_CHECKING, Any

from moefoundry.cli.arguments import local_path, place

if TYPE_CHECKING:
    from moefoundry.conversion.convert import Summary

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
TOLERANCE = 1e-3  # of logits in fp32; those of a different model differ by far more


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="convert from and to Hugging Face",
        description="Convert checkpoints from and to Hugging Face directories; see docs/conversion.md.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    _add_import(actions)
    _add_export(actions)
    _add_consolidate(actions)
    _add_upcycle(actions)


def run(args: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is all there is
    print(_ACTIONS[args.action](args))
    return 0


def _add_import(actions: Any) -> None:
    parser = actions.add_parser("import", help="Hugging Face directory -> weights-only checkpoint", allow_abbrev=False)
    _place(parser, "--hf", "config.json and safetensors")
    _path(parser, "--output", "checkpoint directory to make")
    _dtype(parser)
    _verify(parser)


def _add_export(actions: Any) -> None:
    parser = actions.add_parser("export", help="checkpoint -> Hugging Face directory", allow_abbrev=False)
    _place(parser, "--checkpoint", "a checkpoint of any mesh, or the run that holds it")
    _path(parser, "--hf", "directory to make")
    _ema(parser)
    parser.add_argument("--family", metavar="F", help="model_type to export as (default: the first that fits)")
    parser.add_argument("--tokenizer", type=local_path, metavar="DIR", help="tokenizer (default: the run's)")
    _dtype(parser)
    _shard_size(parser)
    _verify(parser)


def _add_consolidate(actions: Any) -> None:
    parser = actions.add_parser("consolidate", help="checkpoint -> safetensors with our names", allow_abbrev=False)
    _place(parser, "--checkpoint", "a checkpoint of any mesh, or the run that holds it")
    _path(parser, "--output", "a file *.safetensors, or a directory")
    _ema(parser)
    _shard_size(parser)


def _add_upcycle(actions: Any) -> None:
    parser = actions.add_parser(
        "upcycle", help="dense Hugging Face directory -> mixture of experts", allow_abbrev=False
    )
    _place(parser, "--hf", "a dense model: config.json and safetensors")
    _path(parser, "--output", "checkpoint directory to make")
    parser.add_argument("--num-experts", type=int, required=True, metavar="E", help="experts of each layer")
    parser.add_argument("--top-k", type=int, required=True, metavar="K", help="experts of each token")
    parser.add_argument("--granularity", type=int, default=1, metavar="G", help="slices of the FFN (default 1)")
    parser.add_argument("--noise", type=float, default=0.0, metavar="STD", help="noise added to experts (default 0)")
    parser.add_argument("--seed", type=int, default=17, metavar="N", help="of the router and the noise (default 17)")
    parser.add_argument("--layers", type=_layers, metavar="0,2,4-7", help="blocks that get experts (default all)")
    _dtype(parser)


def _import(args: argparse.Namespace) -> Summary:
    from moefoundry.checkpoint.fetch import directory_at
    from moefoundry.conversion.convert import import_hf
    from moefoundry.conversion.tensor_map import Dtype

    with directory_at(args.hf) as hf:
        return import_hf(hf, args.output, Dtype(args.dtype), args.tolerance if args.verify else None)


def _export(args: argparse.Namespace) -> Summary:
    from moefoundry.checkpoint.fetch import checkpoint_at
    from moefoundry.checkpoint.weights import Weights
    from moefoundry.conversion.convert import export_hf
    from moefoundry.conversion.tensor_map import Dtype

    with checkpoint_at(args.checkpoint) as checkpoint:
        return export_hf(
            checkpoint,
            args.hf,
            family_name=args.family,
            dtype=Dtype(args.dtype),
            max_shard_bytes=args.max_shard_size,
            tokenizer=args.tokenizer,
            tolerance=args.tolerance if args.verify else None,
            weights=Weights.ema if args.ema else Weights.trained,
        )


def _consolidate(args: argparse.Namespace) -> Summary:
    from moefoundry.checkpoint.fetch import checkpoint_at
    from moefoundry.checkpoint.weights import Weights
    from moefoundry.conversion.convert import consolidate

    weights = Weights.ema if args.ema else Weights.trained
    with checkpoint_at(args.checkpoint) as checkpoint:
        return consolidate(checkpoint, args.output, args.max_shard_size, weights)


def _upcycle(args: argparse.Namespace) -> Summary:
    from moefoundry.checkpoint.fetch import directory_at
    from moefoundry.conversion.tensor_map import Dtype
    from moefoundry.conversion.upcycle import Upcycling, upcycle

    options = Upcycling(args.num_experts, args.top_k, args.granularity, args.layers, args.noise, args.seed)
    with directory_at(args.hf) as hf:
        return upcycle(hf, args.output, options, Dtype(args.dtype))


_ACTIONS = {"import": _import, "export": _export, "consolidate": _consolidate, "upcycle": _upcycle}


def _path(parser: argparse.ArgumentParser, option: str, text: str) -> None:
    parser.add_argument(option, type=local_path, required=True, metavar="PATH", help=text)


def _place(parser: argparse.ArgumentParser, option: str, text: str) -> None:
    parser.add_argument(option, type=place, required=True, metavar="PLACE", help=f"{text}; a path or a URL")


def _ema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ema", action="store_true", help="the moving average in place of the trained parameters")


def _dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16", "keep"], default="keep", help="of the parameters written (default keep)"
    )


def _shard_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="such as 500MB (default 5GB)"
    )


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verify", action="store_true", help="compare logits with transformers; both models in memory")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, metavar="X", help=f"of --verify (default {TOLERANCE:g})"
    )


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(B|KB|MB|GB)", text)
    if not match or not (size := int(float(match[1]) * UNITS[match[2]])):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write a number and one of {', '.join(UNITS)}")
    return size


def _layers(text: str) -> frozenset[int]:
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} are no layers; write numbers and ranges, such as 0,2,4-7")
    ranges = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return frozenset(index for ends in ranges for index in range(ends[0], ends[-1] + 1))
