"""Growing on disk against `cp` of the same output and against mergekit's passthrough: whole processes, time and peak memory.

    python benchmarks/grow.py --place DIR --mergekit PATH/TO/mergekit-yaml --json out.json
    python benchmarks/grow.py --place DIR --sizes 1.9B --rounds 3    # 58 GB of disk

A base of `layers` Llama layers in bf16 is written at random and stacked to four times as many. The tools take turns, a round each;
before each the disk is idle (`sync`), and a time ends when the bytes are on the disk (the command, then `sync`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from outgrow.arch import LLAMA
from outgrow.checkpoint.safetensors_file import write_header

# hidden, ffn, heads, layers of the base
SIZES = {"0.1B": (1024, 2816, 16, 6), "0.4B": (2048, 5632, 32, 6), "1.9B": (4096, 11008, 32, 8)}


def write_base(directory: Path, hidden: int, ffn: int, heads: int, layers: int) -> None:
    """A random Llama checkpoint in bf16."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32000,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    header, entries = write_header({name: ("BF16", shape) for name, shape in LLAMA.shapes(config).items()})
    generator = np.random.default_rng(0)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        for entry in entries.values():
            values = generator.standard_normal(entry.bytes // 2, dtype=np.float32) * 0.02
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def mergekit_recipe(path: Path, base: Path, layers: int, times: int) -> None:
    """Passthrough of all layers, `times` times."""
    slices = "".join(f"  - sources:\n    - model: {base}\n      layer_range: [0, {layers}]\n" for _ in range(times))
    path.write_text(f"slices:\n{slices}merge_method: passthrough\ndtype: bfloat16\n")


def timed(command: list[str], output: Path) -> dict[str, float]:
    """Seconds until the output is on the disk, and seconds of the command alone."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(command)}: {errors.decode()[-2000:]}")
    ended = time.perf_counter()
    os.sync()
    return {"seconds": time.perf_counter() - began, "command_seconds": ended - began}


def peak_megabytes(command: list[str], output: Path) -> float:
    """Peak resident memory of a command, from the system's own count of one child."""
    shutil.rmtree(output, ignore_errors=True)
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=2, check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", type=Path, required=True, help="a directory on the disk to measure")
    parser.add_argument("--mergekit", help="mergekit-yaml of an environment that has it; left out if not given")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.1B", "0.4B"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, object] = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "commit": commit()}
    for size in arguments.sizes:
        found[size] = compare(arguments.place / size, *SIZES[size], arguments.rounds, arguments.mergekit)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def compare(place: Path, hidden: int, ffn: int, heads: int, layers: int, rounds: int, mergekit: str | None) -> dict[str, dict[str, float]]:
    """One size: every tool in turn, `rounds` times."""
    shutil.rmtree(place, ignore_errors=True)
    base, target, copy, merged, deep, broad = (place / name for name in ("base", "target", "copy", "merged", "deep", "wide"))
    write_base(base, hidden, ffn, heads, layers)
    outgrow = [str(Path(sys.executable).with_name("outgrow")), "grow", str(base)]
    stack = ["--factor", "4", "--no-measure"]
    width = ["--operator", f"direct-width(hidden={hidden * 3 // 2}, kv={heads * 3 // 2})", "--no-measure"]
    for kept, how in ((deep, stack), (broad, width)):
        subprocess.run([*outgrow, str(kept), *how], check=True, stdout=subprocess.DEVNULL)
    # name: (command, what it writes, the output whose copy it is held against)
    commands = {
        "cp of the stack": (["cp", "-r", str(deep), str(copy)], copy, deep),
        "outgrow stack x4": ([*outgrow, str(target), *stack], target, deep),
        "cp of the wide": (["cp", "-r", str(broad), str(copy)], copy, broad),
        "outgrow width x1.5": ([*outgrow, str(target), *width], target, broad),
    }
    if mergekit:
        mergekit_recipe(place / "recipe.yaml", base, layers, 4)
        commands["mergekit passthrough x4"] = ([mergekit, str(place / "recipe.yaml"), str(merged), "--no-copy-tokenizer"], merged, deep)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, (command, output, _) in commands.items():
            times[name].append(timed(command, output))
    copies = {deep: "cp of the stack", broad: "cp of the wide"}
    rows: dict[str, dict[str, float]] = {}
    for name, (command, output, kept) in commands.items():
        whole, alone = (sorted(one[key] for one in times[name]) for key in ("seconds", "command_seconds"))
        rows[name] = {
            "bytes": sum(path.stat().st_size for path in kept.iterdir()),
            "median_seconds": statistics.median(whole), "least_seconds": whole[0], "most_seconds": whole[-1],
            "command_median_seconds": statistics.median(alone), "peak_megabytes": peak_megabytes(command, output),
        }  # fmt: skip
    for name, row in rows.items():
        ratio = row["median_seconds"] / rows[copies[commands[name][2]]]["median_seconds"]
        print(f"{place.name} {name} ({row['bytes'] / 1e9:.2f} GB): {row['median_seconds']:.2f} s ({row['least_seconds']:.2f} to "
              f"{row['most_seconds']:.2f}), {ratio:.2f} x cp, peak {row['peak_megabytes']:.0f} MB", flush=True)  # fmt: skip
    shutil.rmtree(place)
    return rows


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
