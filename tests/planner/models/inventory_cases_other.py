"""Configurations of the other families: GPT-2, BERT, RoBERTa, OPT, GPT-NeoX, BLOOM, Falcon, T5, ViT."""

CASES: list[tuple[str, dict]] = []  # type: ignore[type-arg]
