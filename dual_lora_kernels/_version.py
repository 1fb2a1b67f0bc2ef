"""The package's version, which its parts write into files."""

__version__ = "0.1.0"
