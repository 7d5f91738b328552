"""Scripts that a release calls: .github/workflows/release.yml."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

import posthoc_ema

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPTS / script, *arguments], capture_output=True, text=True, timeout=60)


def test_tag_of_another_version_is_refused() -> None:
    done = run("check_version.py", "v99.0.0")
    assert done.returncode == 1
    version = posthoc_ema.__version__
    for path in ("Cargo.toml", "cli/Cargo.toml", "candle/Cargo.toml", "python/Cargo.toml"):
        assert f"{path}: version {version}, not 99.0.0 as the tag says\n" in done.stderr
    assert "CHANGELOG.md: no section for 99.0.0" in done.stderr
    assert "Cargo.toml" not in run("check_version.py", f"v{version}").stderr


def test_archive_holds_the_program_and_its_licences(tmp_path: Path) -> None:
    program = tmp_path / "posthoc-ema"
    program.write_bytes(b"program")
    program.chmod(0o755)
    done = run("pack_program.py", str(program), "--name", "posthoc-ema-target", "--out", str(tmp_path / "dist"))
    assert done.returncode == 0, done.stderr
    archive = tmp_path / "dist" / "posthoc-ema-target.tar.gz"
    with tarfile.open(archive) as packed:
        names = [f"posthoc-ema-target/{name}" for name in ("posthoc-ema", "LICENSE-MIT", "LICENSE-APACHE")]
        assert packed.getnames() == names
        assert packed.getmember(names[0]).mode & 0o777 == 0o755
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert archive.with_name(f"{archive.name}.sha256").read_text() == f"{digest}  {archive.name}\n"
