"""The shipped recipe is one that `edgevlm train` takes, and describes the shipped model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from edgevlm.core.config import from_recipe
from edgevlm.distill.recipe import TrainRecipe
from edgevlm.models.checkpoint import load_model

SHIPPED = Path("edgevlm/shipped/nano")


def test_the_recipe_builds_the_shipped_model(root: Path) -> None:
    recipe = from_recipe(TrainRecipe, root / SHIPPED / "recipe.toml")
    shipped = load_model("nano").model.config
    vision = dataclasses.replace(recipe.model.vision, reparameterized=True)  # type: ignore[call-arg]
    assert shipped == dataclasses.replace(recipe.model, vision=vision)


def test_the_published_scores_are_those_of_the_shipped_bundle(root: Path) -> None:
    """The result file names the bundle by the hash of its sums, and its figures stand in the card and the README."""
    scores = json.loads((root / SHIPPED / "scores.json").read_text())
    sums = (root / "edgevlm/shipped/nano.bundle/SHA256SUMS").read_bytes()
    assert scores["bundle_sha256"] == hashlib.sha256(sums).hexdigest()
    assert scores["num_scenes"] >= 2000
    accuracy = {one["control"]: one["overall"]["accuracy"] for one in scores["scores"]}
    assert accuracy[None] - accuracy["shuffled"] >= 0.30
    for text in ((root / SHIPPED / "README.md").read_text(), (root / "README.md").read_text()):
        assert f"{100 * accuracy[None]:.1f}" in text
        assert f"{100 * accuracy['shuffled']:.1f}" in text


def test_the_shipped_model_is_within_its_limits(root: Path) -> None:
    """At most 7 M parameters and 15 MB; widths that every 4-bit block format divides."""
    model = load_model("nano").model
    decoder = model.config.decoder
    assert sum(parameter.numel() for parameter in model.parameters()) <= 7_000_000
    assert (root / SHIPPED / "model.safetensors").stat().st_size <= 15_000_000
    assert decoder.hidden_size % 256 == decoder.intermediate_size % 256 == 0
    assert decoder.head_dim == 64
