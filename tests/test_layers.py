"""The arrows of the architecture: who may import whom, and what an import may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Inside opsd an import goes to a lower line, or stays on its line without a cycle.
RANKS = [
    "integrations",  # torch and opsd_kernels only
    "errors durable manifest stop environment intervals few_rows byte_lru digests transfer offload autocast logits say "
    "pace chat world sharding heap collector containers",
    "fit",
    "sections config_problems config bnb cli leaks video processing packing responses positions",
    "prefix_entry prefix_codes tensor_file prefix_files prefix_store feature_cache",
    "parts attention_rows attention_plan attention_kernels attention_flash_attn attention_choice attention "
    "decode_attention families liger",
    "rows data media decoder prompts prompt_cache features model four_bit adapter loading plain engine rewards",
    "sampling stopping graphs draw decode plain_rollout rollout served teacher_cache teacher objectives adamw "
    "adamw_low_bit optim in_backward log progress trackers",
    "checkpoint shelf resume group plan run run_dirs checks opening saving metrics step held_out answers page report",
    "affect rationales",
    "evaluate recipes rationalize export train ablation ablate",
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names.split()}


def imports(package: Path) -> dict[str, set[str]]:
    """Dotted module -> dotted names it imports anywhere in its file, functions included."""
    found: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        names = found.setdefault(".".join(path.relative_to(package.parent).with_suffix("").parts), set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}:{node.lineno}: imports are absolute"
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
    assert found, f"no modules in {package}"
    return found


def test_layers_point_one_way() -> None:
    everyone_else = {"bench", "tests", "jobs", "models", "files"}
    for module, names in imports(ROOT / "opsd").items():
        assert not {name.split(".")[0] for name in names} & {*everyone_else, "triton"}, module
    allowed = {"torch", "triton", "opsd_kernels"} | sys.stdlib_module_names
    for module, names in imports(ROOT / "kernels" / "opsd_kernels").items():
        assert {name.split(".")[0] for name in names} <= allowed, module
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the package `kernels` of transformers"


def test_arrows_inside_opsd_point_down_and_never_round() -> None:
    known = imports(ROOT / "opsd")
    graph: dict[str, set[str]] = {}
    for module, names in known.items():
        used = {name if name in known else name.rpartition(".")[0] for name in names}
        graph[module] = {name for name in used if name in known} - {module}
        for other in graph[module]:
            here, there = module.split(".")[1], other.split(".")[1]
            assert {here, there} <= RANK.keys(), f"give {here} and {there} a line in RANKS"
            assert RANK[there] <= RANK[here], f"{module} imports {other}, which is above it"
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(("modules", "loads"), [("opsd, opsd.config, opsd.data", ""), ("opsd_kernels", "torch")])
def test_imports_are_cheap(modules: str, loads: str) -> None:
    code = f"import sys, {modules}; print(*sorted({{'torch', 'transformers', 'triton'}} & set(sys.modules)))"
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == loads


def test_opsd_offers_the_loss() -> None:
    import opsd
    import opsd_kernels

    assert opsd.fused_token_kl is opsd_kernels.fused_token_kl
    assert opsd.Divergence is opsd_kernels.Divergence
