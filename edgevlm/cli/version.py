"""``edgevlm version``: what is installed here."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import typer

from edgevlm.cli.console import Json, print_json
from edgevlm.core.optional import libraries, package_version


@dataclass(frozen=True, kw_only=True)
class Versions:
    """EdgeVLM, Python, the system, and every installed library that EdgeVLM uses."""

    edgevlm: str
    python: str
    system: str
    libraries: dict[str, str]


def command(json: Json = False) -> None:
    """Show the versions of EdgeVLM, Python and the libraries it uses."""
    versions = find_versions()
    if json:
        print_json(versions)
        return
    typer.echo(f"edgevlm {versions.edgevlm}, Python {versions.python}, {versions.system}")
    for name, version in versions.libraries.items():
        typer.echo(f"  {name} {version}")


def find_versions() -> Versions:
    """The versions on this machine; nothing is imported."""
    return Versions(
        edgevlm=edgevlm_version(),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        libraries={library.package: library.version for library in libraries() if library.version},
    )


def edgevlm_version() -> str:
    """The installed version of EdgeVLM, or ``unknown`` when its folder was never installed."""
    return package_version("edgevlm") or "unknown"
