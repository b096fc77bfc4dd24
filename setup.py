"""What pyproject.toml can't say: all packages found, and one more, conf/ at the top of the repository as megalina.conf."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["megalina", "megalina.*"]), "megalina.conf"])
