"""What one GPU shows: tests, the MoE layer beside its peers, training steps, FP8, attention, checkpoints.

``python -m benchmarks.gpu --out DIR`` runs the steps of ``steps.py`` one after another, each in a process of its own
with a time limit of its own. Every figure is in ``DIR`` within seconds, so a run that is stopped leaves what it has.
"""
