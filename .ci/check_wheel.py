"""Build the wheel, compare its files with the tree, install it in a clean environment and use it there."""

import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = {".py", ".typed", ".html", ".js", ".css", ".json", ".jsonl", ".safetensors", ".jinja", ".yaml"}


def tree() -> set[str]:
    """The package's files in the checkout, by the path under which a wheel holds them."""
    found = set()
    for folder in ("agentgym_ig", "envs", "indexes", "trainers"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in DATA and "__pycache__" not in path.parts:
                inside = path.relative_to(ROOT)
                found.add(str(inside if folder == "agentgym_ig" else Path("agentgym_ig") / inside))
    return found


def main() -> None:
    """Exit with a message at the first thing that is wrong."""
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # setuptools would ship what is left there
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", dist, ROOT], check=True, stdout=subprocess.DEVNULL
    )
    (wheel,) = dist.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    if held != tree():
        sys.exit(f"wheel and tree differ: only in one of them: {sorted(held ^ tree())}")
    print(f"{wheel.name}: {len(held)} files, as in the tree")
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(Path(scratch) / "venv", with_pip=True)
        programs = Path(scratch) / "venv" / "bin"
        pip = [str(programs / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), f"{wheel}[cpu]"], check=True)
        smoke = [str(programs / "agentgym-ig"), "eval", "--suite", "tinywiki", "--limit", "10"]
        subprocess.run(smoke, check=True, cwd=scratch)
    print("the installed wheel works")


if __name__ == "__main__":
    main()
