"""`fused_token_kl` in other people's loops: Hugging Face (hf), TRL (trl), Liger (liger). Nothing is loaded here."""
