"""LoRA fine-tuning of hybrid Mamba-Transformer-MoE models, run in the environment that envbuilder made.

`python -m trainer CONFIG.yaml --run-dir DIR` trains alone in one process or under torchrun. The pipeline:

    reading (YAML → Config) → data (JSONL → examples) → model → lora → parallel → loop → adapter

`prepare.py` and `loop.py` read as that pipeline; every other module does one of its steps.
"""
