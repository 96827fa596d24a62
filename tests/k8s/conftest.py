"""Rendered overlays, once a session. Copy an object before changing it."""

from pathlib import Path

import pytest

from tests.k8s.manifests import OVERLAYS, Object, copy_k8s, render


@pytest.fixture(scope="session")
def k8s(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_k8s(tmp_path_factory.mktemp("manifests"))


@pytest.fixture(scope="session")
def rendered(k8s: Path) -> dict[str, list[Object]]:
    return {name: render(k8s / "overlays" / name) for name in OVERLAYS}
