"""opsd: on-policy self-distillation for multimodal emotion recognition.

`fused_token_kl` and `Divergence` live in `opsd_kernels`; they are loaded when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsd_kernels import Divergence, fused_token_kl

__version__ = "0.1.0"
__all__ = ["Divergence", "__version__", "fused_token_kl"]


def __getattr__(name: str) -> Any:
    """Importing opsd must stay cheap, so torch comes in only with the first use of the loss."""
    if name in ("Divergence", "fused_token_kl"):
        import opsd_kernels

        return getattr(opsd_kernels, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
