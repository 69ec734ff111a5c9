"""Preparation of data beside LLM Foundry's and beside Hugging Face's datasets and tokenizers, on the same text.

    python -m benchmarks.data [--megabytes 48] [--rounds 3] [--memory-gigabytes 1] [--directory DIR]

The text is Python source of the installed packages, as JSON Lines and as files of text. Every contender has all cores,
the same tokenizer, and puts one end-of-text token behind each document. Each runs in a process of its own, and its
clock starts when its libraries are imported. They run in turn. Written down are tokens a second, CPU time, bytes on
disk, and the peak memory of the process and its children (proportional set size). With ``--memory-gigabytes`` a corpus
of that size is prepared once more, for its peak memory alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import harness

CORES = len(os.sched_getaffinity(0))
SEQ_LEN = 2048
VOCAB = 16384
EOS = "<|endoftext|>"
TARGETS = {"LLM Foundry, JSON": 1.5, "LLM Foundry, text": 1.5, "datasets + tokenizers": 1.0}


def ours(layout: str, corpus: Path, tokenizer: Path, out: Path) -> Callable[[], int]:
    from moefoundry.data.options import PrepareOptions
    from moefoundry.data.prepare import prepare
    from moefoundry.data.summary import Layout

    length = SEQ_LEN if layout == "packed" else None
    options = PrepareOptions(
        str(corpus), out, length, tokenizer=tokenizer, val_fraction=0, max_loss=1, layout=Layout(layout)
    )
    return lambda: prepare(options).corpus.splits["train"].tokens


def llm_foundry_json(corpus: Path, tokenizer: Path, out: Path) -> Callable[[], int]:
    from llmfoundry.command_utils.data_prep.convert_dataset_json import convert_dataset_json

    def run() -> int:
        convert_dataset_json(str(corpus), str(out), None, SEQ_LEN, "train", str(tokenizer), eos_text=EOS)
        return _samples(out) * SEQ_LEN

    return run


def llm_foundry_text(corpus: Path, tokenizer: Path, out: Path) -> Callable[[], int]:
    from llmfoundry.command_utils.data_prep.convert_text_to_mds import convert_text_to_mds

    def run() -> int:
        convert_text_to_mds(
            str(tokenizer), str(out), str(corpus), SEQ_LEN, EOS, "", False, None, CORES, "", True, False
        )
        return _samples(out) * SEQ_LEN

    return run


def hugging_face(corpus: Path, tokenizer: Path, out: Path) -> Callable[[], int]:
    import datasets
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    eos = backend.token_to_id(EOS)
    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = backend.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [[*each.ids, eos] for each in encoded]}

    def run() -> int:
        data = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(out / "cache"))
        options = {"batched": True, "batch_size": 128, "remove_columns": data.column_names, "features": features}
        tokens = data.map(encode, num_proc=CORES, **options)
        tokens.save_to_disk(str(out / "data"), num_proc=CORES)
        return sum(map(len, tokens.with_format("numpy")["input_ids"]))

    return run


def _samples(out: Path) -> int:
    return sum(shard["samples"] for shard in json.loads((out / "index.json").read_text())["shards"])


CONTENDERS: dict[str, tuple[str, Callable[[Path, Path, Path], Callable[[], int]]]] = {
    "documents": ("json", partial(ours, "documents")),
    "packed": ("json", partial(ours, "packed")),
    "documents, text": ("text", partial(ours, "documents")),
    "LLM Foundry, JSON": ("json", llm_foundry_json),
    "LLM Foundry, text": ("text", llm_foundry_text),
    "datasets + tokenizers": ("json", hugging_face),
}
PAIRS = [
    ("documents", "LLM Foundry, JSON"),
    ("packed", "LLM Foundry, JSON"),
    ("documents, text", "LLM Foundry, text"),
    ("documents", "datasets + tokenizers"),
    ("packed", "datasets + tokenizers"),
    ("documents, text", "datasets + tokenizers"),
]


def run_one(name: str, corpus: Path, tokenizer: Path, out: Path) -> None:
    """In a process of its own: print the seconds and the tokens of a contender."""
    run = CONTENDERS[name][1](corpus, tokenizer, out)
    start, cpu_start = time.perf_counter(), cpu_seconds()
    tokens = run()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds() - cpu_start, "tokens": tokens}))


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(name: str, corpora: dict[str, Path], tokenizer: Path, root: Path) -> dict[str, Any]:
    """Run a contender; return its seconds, tokens, bytes on disk and peak memory in MiB."""
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    paths = [str(corpora[CONTENDERS[name][0]]), str(tokenizer), str(out)]
    command = [sys.executable, "-m", "benchmarks.data", "--one", name, *paths]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with (root / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True)
        peak = watch_memory(process)
        output = process.communicate()[0]
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{name}: {log.read()[-3000:]}")
    shutil.rmtree(out / "cache", ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return json.loads(output.splitlines()[-1]) | {"bytes": size, "peak_mib": peak}


def watch_memory(process: subprocess.Popen[str]) -> float:
    """Return the peak of the memory of a process and its children, in MiB, when it has ended."""
    peak, root = 0.0, psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for each in [root, *root.children(recursive=True)]:
                total += each.memory_full_info().pss
        except psutil.Error:
            continue
        peak = max(peak, total / 2**20)
        time.sleep(0.1)
    return peak


def texts(nbytes: int) -> Iterator[str]:
    """Source of the installed packages, again from the start where there is less."""
    packages = Path(os.__file__).parent
    files = sorted([*packages.rglob("*.py"), *Path(psutil.__file__).parents[1].rglob("*.py")])
    while nbytes > 0:
        for file in files:
            try:
                text = file.read_text()
            except (OSError, ValueError):
                continue
            if text.strip() and EOS not in text:
                yield text
                nbytes -= len(text.encode())
                if nbytes <= 0:
                    return


def write_json_lines(file: Path, nbytes: int) -> None:
    with file.open("w") as stream:
        for text in texts(nbytes):
            stream.write(json.dumps({"text": text}) + "\n")


def write_corpora(root: Path, nbytes: int) -> dict[str, Path]:
    root.mkdir()
    write_json_lines(root / "text.jsonl", nbytes)
    (root / "text").mkdir()
    for number, text in enumerate(texts(nbytes)):
        (root / "text" / f"{number:06d}.txt").write_text(text)
    return {"json": root / "text.jsonl", "text": root / "text"}


def compare(results: dict[str, list[dict[str, Any]]], megabytes: float) -> list[harness.Comparison]:
    """Check that all have the same tokens, and compare their rates and sizes."""
    counts = {name: rounds[0]["tokens"] for name, rounds in results.items()}
    most = max(counts.values())
    assert all(most - count < CORES * SEQ_LEN + most // 10_000 for count in counts.values()), counts
    rates = {name: [each["tokens"] / each["seconds"] for each in rounds] for name, rounds in results.items()}
    case = f"{megabytes:g} MB of source, vocabulary {VOCAB}, {CORES} processes"
    return [
        harness.Comparison("data", f"{mine}, {case}", "tokens/s", peer, rates[mine], rates[peer], TARGETS[peer])
        for mine, peer in PAIRS
    ]


def notes(results: dict[str, list[dict[str, Any]]], memory: dict[str, Any] | None, gigabytes: float) -> list[str]:
    sizes = ", ".join(f"{name} {rounds[0]['bytes'] / rounds[0]['tokens']:.2f}" for name, rounds in results.items())
    peaks = ", ".join(
        f"{name} {statistics.median(each['peak_mib'] for each in rounds):,.0f}" for name, rounds in results.items()
    )
    work = ", ".join(
        f"{name} {statistics.median(1e6 * each['cpu_seconds'] / each['tokens'] for each in rounds):.2f}"
        for name, rounds in results.items()
    )
    lines = [
        f"data: CPU seconds for a million tokens, which a busy machine hardly changes: {work}",
        f"data: bytes on disk a token: {sizes}",
        f"data: peak memory, MiB: {peaks}",
    ]
    if memory:
        lines.append(f"data: peak memory of preparing {gigabytes:g} GB as documents: {memory['peak_mib']:,.0f} MiB")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Preparation of data beside other tools.")
    parser.add_argument("--one", nargs=4, metavar=("NAME", "CORPUS", "TOKENIZER", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--megabytes", type=float, default=48.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-gigabytes", type=float, default=0.0)
    parser.add_argument("--directory", type=Path, help="where the text is written (default: a temporary one)")
    args = parser.parse_args()
    if args.one:
        run_one(args.one[0], *map(Path, args.one[1:]))
        return
    from moefoundry.data.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory(prefix="data-", dir=args.directory) as scratch:
        root = Path(scratch)
        corpora = write_corpora(root / "in", int(args.megabytes * 1e6))
        train_tokenizer(texts(16_000_000), VOCAB).save(root / "tokenizer")
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        for _ in range(args.rounds):
            for name, rounds in results.items():
                rounds.append(measure(name, corpora, root / "tokenizer", root))
                print(name, rounds[-1], file=sys.stderr, flush=True)
        memory = None
        if args.memory_gigabytes:
            write_json_lines(root / "large.jsonl", int(args.memory_gigabytes * 1e9))
            memory = measure("documents", {"json": root / "large.jsonl"}, root / "tokenizer", root)
    about = harness.machine(CORES, "default")
    comparisons = compare(results, args.megabytes)
    record = harness.Record("data", about, comparisons, notes(results, memory, args.memory_gigabytes))
    print(f"{harness.write(record)}\n{harness.render([record])}")


if __name__ == "__main__":
    main()
