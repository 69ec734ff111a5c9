"""The Mixture-of-Experts layer: route, dispatch, experts, combine, shared experts. Start at ``layer.py``."""
