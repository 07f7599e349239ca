"""The least time that a forward and backward of a token divergence can take, from published peaks of the device.

    python -m bench.floor                                 # N = 8192, V = 151936, bf16, several widths
    python -m bench.floor --tokens 4096 --vocab 128256

    G     = 2 N D V                                       operations of one head GEMM
    gemm  = 4 G / rate (trained head: z_s, z_t, dX, dW)   or 3 G / rate (frozen)
    rows  = bytes * N V / bandwidth                       what the row kernels move per (token, vocabulary entry)
    model = gemm + rows                                   GEMMs and row kernels run one after the other

bytes = 18 for a KL: both fp32 logits are written by their GEMM (counted there), read for the statistics (8), read again
for the gradient (8), whose bf16 rows are written (2). JSD and the clip need one more reading: 26. The row kernels count
as bound by memory; where a device has little arithmetic beside its bandwidth they are not.

GEMM ms is at the published peak. The ratios are at the shares of the peaks that large GEMMs and copies are assumed to
reach, 71 % and 90 % (700 TFLOP/s and 3.0 TB/s of an H100). `python -m bench.gpu_report` times its floor, and both
rates, instead of taking them from here. Nothing in this table was measured.
"""

import argparse
import os
import sys
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    tflops: float  # dense bf16 with fp32 accumulation, no sparsity
    tbps: float  # memory bandwidth, terabytes a second
    source: str


DEVICES = {
    "A100": Device(312, 2.04, "NVIDIA A100 80GB SXM datasheet"),
    "H100": Device(989, 3.35, "NVIDIA H100 SXM datasheet"),
    "H200": Device(989, 4.8, "NVIDIA H200 SXM datasheet"),
    "B200": Device(2250, 8.0, "NVIDIA HGX B200 datasheet, one of eight GPUs"),
    "L40S": Device(362, 0.864, "NVIDIA L40S datasheet"),
    "4090": Device(165.2, 1.008, "NVIDIA Ada architecture whitepaper"),
    "5090": Device(209.5, 1.792, "NVIDIA RTX Blackwell architecture whitepaper"),
}
BYTES = {"kl": 18, "jsd": 26}
GEMM_SHARE, MEMORY_SHARE = 700 / 989, 3.0 / 3.35


def gemm_ms(device: Device, n: int, vocab: int, width: int, trainable: bool) -> float:
    """Milliseconds of the head GEMMs at the published peak."""
    return (4 if trainable else 3) * 2 * n * width * vocab / (device.tflops * 1e12) * 1e3


def rows_ms(device: Device, n: int, vocab: int, kind: str) -> float:
    """Milliseconds in which the memory moves what the row kernels touch."""
    return BYTES[kind] * n * vocab / (device.tbps * 1e12) * 1e3


def ratio(device: Device, n: int, vocab: int, width: int, trainable: bool, kind: str) -> float:
    """The model over its GEMMs, both at the assumed shares of the peaks."""
    rows = rows_ms(device, n, vocab, kind) / MEMORY_SHARE
    return 1 + rows / (gemm_ms(device, n, vocab, width, trainable) / GEMM_SHARE)


def table(n: int, vocab: int, widths: list[int]) -> list[str]:
    """Lines to print: GEMM milliseconds, and the model of both kinds as a multiple of the GEMMs."""
    lines = [f"N = {n}, V = {vocab}, bf16; from published peaks, not measured", ""]
    titles = ("device", "D", "head", "GEMM ms", "Mtokens/s", "KL / GEMM", "JSD / GEMM")
    lines.append("".join(f"{title:>12}" for title in titles))
    for name, device in DEVICES.items():
        for width in widths:
            for head in ("trainable", "frozen"):
                gemm = gemm_ms(device, n, vocab, width, head == "trainable")
                ratios = [ratio(device, n, vocab, width, head == "trainable", kind) for kind in BYTES]
                columns = (name, width, head, f"{gemm:.2f}", f"{n / gemm / 1e3:.2f}", *(f"{r:.2f}" for r in ratios))
                lines.append("".join(f"{column:>12}" for column in columns))
    return [*lines, "", *(f"{name}: {d.tflops:g} TFLOP/s, {d.tbps:g} TB/s, {d.source}" for name, d in DEVICES.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description="Roofline of the token divergence from published peaks.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--width", type=int, nargs="+", default=[1024, 2048, 2560, 4096])
    args = parser.parse_args()
    lines = table(args.tokens, args.vocab, args.width)
    with suppress(BrokenPipeError):
        print("\n".join(lines), flush=True)
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is not written at the exit either


if __name__ == "__main__":
    main()
