"""Builds the package. The metadata is in pyproject.toml; this file is where an optional native extension plugs in."""

from setuptools import setup

setup()
