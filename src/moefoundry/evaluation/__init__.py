"""Evaluation of trained models: generation."""
