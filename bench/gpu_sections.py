"""What a CUDA machine is asked, section by section; gpu_report.py has their order and their time."""

import functools
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator

import torch

from bench.cases import Case, gradient_error, operands, teacher_head, true_gradient
from bench.measure import interleaved, peak_extra_bytes, summary, timed
from bench.providers import PROVIDERS, absent, max_error, ours_loss
from bench.results import Row, row
from bench.sections import Budget
from opsd_kernels import launch, tune

N, VOCAB, WIDTHS = 8192, 151936, (2048, 4096, 1024)
ROUNDS = 25
LEAST = 6.0  # seconds without which a case is not begun
# MiB above inputs, outputs and the head's gradient that a case may take
WORKSPACE = {"trainable": 1.2 * 1024, "frozen": 0.75 * 1024, "frozen, shared head": 0.75 * 1024}


def checks(*parts: Callable[[], Iterable[Row]]) -> Callable[[Budget], Iterator[Row]]:
    def rows(budget: Budget) -> Iterator[Row]:
        for part in parts:
            yield from part()

    return rows


def ceilings(budget: Budget) -> Iterator[Row]:
    """What the device reaches: a large copy, counting bytes read and written, and a large product of random bf16."""
    source = torch.randn(1 << 30, device="cuda")  # 4 GiB
    target = torch.empty_like(source)
    yield {"ceiling": "copy", "tbps": 2 * source.nbytes / _median_seconds(target.copy_, source) / 1e12}
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    flops = 2 * 8192**3
    yield {"ceiling": "bf16 product", "tflops": flops / _median_seconds(torch.mm, a, b) / 1e12}
    seconds = _median_seconds(functools.partial(torch.mm, out_dtype=torch.float32), a, b)
    yield {"ceiling": "bf16 product, fp32 result", "tflops": flops / seconds / 1e12}


def _median_seconds(function: Callable[..., object], *operands: torch.Tensor) -> float:
    def step() -> None:
        function(*operands)

    step()
    return summary(timed(step) for _ in range(9))["ms"] / 1e3


def speed(*cases: Case, names: Iterable[str]) -> Callable[[Budget], Iterator[Row]]:
    """Providers in turn, case by case, each with an equal part of what is left."""

    def rows(budget: Budget) -> Iterator[Row]:
        for i, case in enumerate(cases):
            if budget.left < LEAST:
                yield {"case": str(case), "provider": "all", "absent": "no time left"}
                continue
            yield from measure(case, 0.6 * budget.left / (len(cases) - i), names)
            forget()

    return rows


def measure(case: Case, seconds: float, names: Iterable[str]) -> list[Row]:
    """Rows of one case: who is absent, wrong or out of memory, and the timings of everyone else, interleaved."""
    rows: list[Row] = []
    steps: dict[str, Callable[[], None]] = {}
    facts: dict[str, Row] = {}
    for name in names:
        reason = absent(name, case)
        try:
            if not reason:
                step = PROVIDERS[name](case)
                step()
                error = None if name == "floor" else gradient_error(case)
                facts[name] = {"extra_mib": peak_extra_bytes(step, case.device) / 2**20, "dx_error": error}
                if error is not None and not error <= max_error(name, case):
                    reason = f"wrong: dX is off by {error:.1e}"
                else:
                    steps[name] = step
        except Exception as error:  # a peer may fail in any way; the report goes on without it
            said = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {said[0][:200] if said else ''}"
            print(f"{name}: {traceback.format_exc()}", file=sys.stderr)
        if reason:
            rows.append({"case": str(case), "provider": name, "absent": reason})
            rows[-1] |= {"ok": False} if name == "triton" else {}
        if case.device == "cuda":
            torch.cuda.empty_cache()
    timings = {name: summary(times) for name, times in interleaved(steps, ROUNDS, seconds).items()}
    floor_ms = timings["floor"]["ms"] if "floor" in timings else None
    rows += [row(str(case), name, case.n, timing, floor_ms, **facts[name]) for name, timing in timings.items()]
    return rows


def forget() -> None:
    """The tensors of the case before."""
    operands.cache_clear()
    teacher_head.cache_clear()
    true_gradient.cache_clear()
    torch._dynamo.reset()


def memory(budget: Budget) -> Iterator[Row]:
    """Workspace of the forward from 1k to 128k tokens, beside what it leaves behind: below the limits, and flat."""
    for label, trainable, shared in (
        ("trainable", True, False),
        ("frozen", False, False),
        ("frozen, shared head", False, True),
    ):
        found: dict[int, float] = {}
        for n in (1024, 4096, 16384, 131072):
            if budget.left < LEAST:
                return
            case = Case("memory", n, VOCAB, 4096, "jsd", torch.bfloat16, trainable, "cuda", shared)
            forward, backward = _step_bytes(case)
            found[n] = forward
            forget()
            ok = forward <= WORKSPACE[label]
            yield {"memory": label, "tokens": n, "forward_mib": forward, "backward_mib": backward, "ok": ok}
        flat = found[131072] - found[4096]
        yield {"memory": label, "check": "128k tokens like 4k", "more_mib": flat, "ok": flat <= 16}


def _step_bytes(case: Case) -> tuple[float, float]:
    """MiB that the forward and the backward hold above what each leaves behind."""
    student, head, teacher = operands(case)
    held: list[torch.Tensor] = []

    def forward() -> None:
        held[:] = [ours_loss(case, "triton")(student, head, teacher)]

    def backward() -> None:
        held.pop().backward()

    forward()
    backward()  # compiled by now
    student.grad = head.grad = None
    return peak_extra_bytes(forward, case.device) / 2**20, peak_extra_bytes(backward, case.device) / 2**20


def tuning(*names: str) -> Callable[[Budget], Iterator[Row]]:
    """Rows to paste into launch.py, and what each makes of a step at D = 1024, where the rows weigh most."""

    def rows(budget: Budget) -> Iterator[Row]:
        for i, name in enumerate(names):
            left = budget.left - LEAST * (len(names) - i)
            if left < LEAST:
                yield {"tuned": name, "absent": "no time left"}
                continue
            where, found = tune.tune(VOCAB, "bfloat16", name, left / (len(names) - i))
            facts = {"tried": found.tried, "complete": found.complete}
            yield {"tuned": name, "row": tune.line(where, found), "before": found.before, "after": found.after, **facts}
            yield {"tuned": name, **_with_row(where, found.launch, tune.DIVERGENCES[name].kind)}
            forget()

    return rows


def _with_row(where: launch.Where, found: launch.Launch, kind: str) -> Row:
    """Milliseconds of a step without and with a row of the table, for this process only."""
    step = PROVIDERS["triton"](Case("head", N, VOCAB, 1024, kind, torch.bfloat16, True, "cuda", shared=False))
    before = launch.TABLE.pop(where, None)
    times = {}
    for label, row_ in (("table", before), ("tuned", found)):
        if row_ is not None:
            launch.TABLE[where] = row_
        step()
        times[f"{label}_ms"] = summary(timed(step) for _ in range(7))["ms"]
    launch.TABLE.pop(where)
    if before is not None:
        launch.TABLE[where] = before
    return times
