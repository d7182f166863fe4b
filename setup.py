"""Map the top-level folders to one import name; all other metadata stands in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = {"agentgym_ig": "agentgym_ig"} | {f"agentgym_ig.{f}": f for f in ("envs", "indexes", "trainers")}

setup(
    package_dir=FOLDERS,
    packages=[
        *FOLDERS,
        *(f"{name}.{sub}" for name, folder in FOLDERS.items() for sub in find_packages(folder)),
    ],
)
