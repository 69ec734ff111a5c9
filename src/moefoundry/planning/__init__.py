"""Sizes and costs of a recipe, before anything runs."""
