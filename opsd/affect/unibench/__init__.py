"""MER-UniBench: nine test sets, the official files in and out, the official scores (AffectGPT, arXiv 2501.16566)."""
