"""The version of this package, apart from what the package exports."""

__version__ = "0.1.0"
